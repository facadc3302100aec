"""Weights that are only there while they are needed: by a plan, or those that are read once for a prompt."""

from __future__ import annotations

import os
import re
import shutil
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from torch import nn

import flux_engine
from flux_engine import (
    Engine,
    InvalidRequest,
    OutOfMemory,
    RequestCancelled,
    UnsupportedError,
    WeightsError,
    hub,
)
from flux_engine.assemble import find_model
from flux_engine.checkpoints.load import Filling
from flux_engine.config import EngineConfig
from flux_engine.families.load import load_family, sized
from flux_engine.footprint import Extent
from flux_engine.hardware import processor
from flux_engine.memory import Place, Residents
from flux_engine.models.flux import Flux
from flux_engine.models.unet import UNet
from flux_engine.params import FluxParams, UNetParams
from flux_engine.plan import PARTS, Where, plan
from flux_engine.specs import FluxSpec

CAPTION = "a small red star on a striped green and white background"
SCHNELL = hub.weights_folder() / "demo" / "flux" / "transformer" / "schnell.safetensors"


def latent(engine: Engine, caption: str = CAPTION, **fields: Any) -> torch.Tensor:
    steps = {"seed": 3, "num_inference_steps": 2, "output_type": "latent"}
    return engine(caption, **(steps | fields)).images[0]


def away(engine: Engine) -> set[str]:
    return {name for name, p in engine._pipeline.family.net.named_parameters() if p.is_meta}


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("model", ["demo-schnell", "demo-dev", "demo-sdxl"])
def test_the_bits_are_the_same(model: str, quantization: str) -> None:
    loaded = {m: flux_engine.load(model, dtype="float32", quantization=quantization, memory=m)
              for m in ("resident", "evict")}  # fmt: skip
    ours, other = loaded["evict"], loaded["resident"]
    for caption in (CAPTION, "a blue circle"):
        fields = {"true_cfg_scale": 2.0, "negative_prompt": "a green star"} if model == "demo-schnell" else {}
        assert torch.equal(latent(ours, caption, **fields), latent(other, caption, **fields))
    assert away(ours) and not away(other)
    assert ours.describe()["evicted_bytes"] > 0 == other.describe()["evicted_bytes"]


def test_a_controlnet_too() -> None:
    edges = Image.new("RGB", (64, 64))
    edges.paste("white", (10, 10, 50, 12))
    control = flux_engine.Control(kind="canny", image=edges, preprocess=False)
    made = [
        latent(
            flux_engine.load("demo-schnell", dtype="float32", controlnets=["canny"], memory=memory),
            control=control, width=64, height=64,
        )
        for memory in ("evict", "resident")
    ]  # fmt: skip
    assert torch.equal(*made)


def test_only_a_new_prompt_brings_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = flux_engine.load("demo-schnell", dtype="float32", memory="evict")
    (shelf,) = engine._pipeline.family.residents._shelves["modulation"]
    read: list[int] = []
    plain = type(shelf.filling).read
    monkeypatch.setattr(type(shelf.filling), "read", lambda self, names: read.append(1) or plain(self, names))
    latent(engine)
    latent(engine, seed=5)
    latent(engine, num_outputs=2)
    assert len(read) == 1
    latent(engine, "a blue circle")
    assert len(read) == 2
    latent(engine)
    assert len(read) == 2, "the one before the last is remembered, too"
    latent(engine, num_inference_steps=3)
    latent(engine, width=128, height=96)
    assert len(read) == 4
    assert away(engine) == set(shelf.names)


def test_a_file_that_was_replaced_does_no_harm_and_one_that_was_changed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    shutil.copyfile(SCHNELL, path)
    engine = flux_engine.load(path, dtype="float32", memory="evict")
    first = latent(engine)
    other = tmp_path / "y.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, other)
    kept = tmp_path / "kept.safetensors"
    os.link(path, kept)
    other.replace(path)
    latent(engine, "a blue circle")
    with kept.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(kept, ns=(1, 1))
    with pytest.raises(WeightsError, match="was changed while it was in use"):
        latent(engine, "a green cross")
    (shelf,) = engine._pipeline.family.residents._shelves["modulation"]
    assert away(engine) == set(shelf.names)
    assert torch.equal(latent(engine), first), "what is remembered is still there"


def test_it_can_still_be_exported(tmp_path: Path) -> None:
    engine = flux_engine.load("demo-schnell", dtype="float32", memory="evict")
    folder = engine.export(tmp_path / "out", layout="bfl")
    written = load_file(folder / "demo-schnell.safetensors")
    assert all(torch.equal(written[name].bfloat16(), tensor) for name, tensor in load_file(SCHNELL).items())
    assert away(engine)


@cache
def tight(model: str, quantization: str = "none") -> int:
    """The least bytes that a model can be planned for in float32."""
    found = find_model(model, EngineConfig())
    spec, low, high = sized(found.spec, found.parts), 10**6, 10**9
    while high - low > 10**5:
        middle = (low + high) // 2
        try:
            plan(spec, processor(middle), precisions=[quantization], dtype="float32")
            high = middle
        except OutOfMemory:
            low = middle
    return high


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("model", ["demo-schnell", "demo-sdxl"])
def test_in_less_memory_the_bits_are_the_same(model: str, quantization: str) -> None:
    """From where all fits down to where a stage has its own part alone."""
    whole = flux_engine.load(model, dtype="float32", quantization=quantization, memory="resident")
    wanted = [latent(whole, caption) for caption in (CAPTION, "a blue circle")]
    total = sum(part["bytes"] for part in whole.describe()["parts"].values())
    picture = latent(whole, output_type="pt")
    least, left = tight(model, quantization), set[str]()
    for memory in range(least, least + total, total // 3):
        ours = flux_engine.load(model, dtype="float32", quantization=quantization, memory=memory)
        assert all(map(torch.equal, [latent(ours, one) for one in (CAPTION, "a blue circle")], wanted))
        made = latent(ours, output_type="pt")
        assert (made - picture).abs().max() < 1e-4, "by rows it has other last bits"
        assert torch.equal(made, latent(ours, output_type="pt"))
        said = ours.describe()["plan"]
        there = sum(part["bytes"] for part in ours.describe()["parts"].values()) - ours.describe()["evicted_bytes"]
        assert there <= said["peak"] <= memory == said["capacity"]
        left |= set(said["leaves"])
    assert "network" in left


def test_from_the_host_as_from_the_file() -> None:
    """As on a card, whose host keeps what leaves: also two precisions, of which one is there at a time."""
    found = find_model("demo-schnell", EngineConfig())
    spec = sized(found.spec, found.parts)
    assert isinstance(spec, FluxSpec)
    extent = Extent.default(spec, steps=2)
    made = plan(spec, processor(10**9), precisions=["int8"], dtype="float32", both=True, extent=extent)
    leaves: dict[str, Where] = {part: "host" for part in made.sizes if part != "vae"}
    stays = made.always + made.sizes["vae"]
    work = {part: made.peaks[PARTS[part.partition(":")[0]]] - made.resident for part in made.sizes}
    room = stays + max(size + work[part] for part, size in made.sizes.items() if part != "vae") + 10**5
    made = replace(made, leaves=leaves, capacity=room, whole_up_to=10**9, schemes=("int8", "none"))
    place = Place(torch.float32, torch.device("cpu"), "int8", "none", Residents(made))
    family = load_family(spec, found.parts, place, embedding_cache=0)
    engine = Engine(family, slow=family.in_full_precision(found.parts))
    both = flux_engine.load("demo-schnell", dtype="float32", quantization="both", memory="resident")
    moved: list[int] = []
    for fast in (True, False, False, True):
        result = engine(CAPTION, seed=3, num_inference_steps=2, output_type="latent", go_fast=fast)
        assert torch.equal(result.images[0], latent(both, go_fast=fast)) and not result.notes
        assert result.quantization == ("int8" if fast else "none")
        moved.append(result.moved)
    assert moved[1] >= made.sizes["network:none"] and moved[3] >= made.sizes["network"], "swapped in"


def test_both_precisions_side_by_side() -> None:
    both = flux_engine.load("demo-schnell", dtype="float32", quantization="both")
    assert both.describe()["quantization"] == "both" and "full precision" in both.describe()["parts"]
    assert both.describe()["plan"]["go_fast"] == {"true": "int8, resident", "false": "none, resident"}
    slow = flux_engine.load("demo-schnell", dtype="float32")
    fast = flux_engine.load("demo-schnell", dtype="float32", quantization="int8")
    assert torch.equal(latent(both, go_fast=False), latent(slow)), "full precision to the bit, text encoders too"
    quick = latent(both)
    assert torch.equal(latent(both, go_fast=True), quick) and not torch.equal(quick, latent(slow))
    assert (quick - latent(fast)).abs().mean() < 0.1 * quick.abs().mean()
    assert slow(CAPTION, go_fast=True, num_inference_steps=1).notes == (
        "go_fast: no weights of 8 bits are loaded, demo-schnell ran in full precision",
    )
    assert fast(CAPTION, go_fast=False, num_inference_steps=1).notes == (
        "go_fast off: full precision is not loaded, demo-schnell ran in int8",
    )
    assert not fast(CAPTION, go_fast=True, num_inference_steps=1).notes
    for wrong in (1, "yes"):
        with pytest.raises(InvalidRequest, match="neither True nor False"):
            slow(CAPTION, go_fast=wrong)


def test_full_precision_cannot_come_from_a_model_saved_in_8_bits(tmp_path: Path) -> None:
    folder = flux_engine.quantize("demo-schnell", tmp_path / "saved")
    with pytest.raises(UnsupportedError, match="saved in int8 and cannot be loaded in both"):
        flux_engine.load(folder, quantization="both")


def test_what_fits_nowhere_is_refused_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Filling, "read", never)
    refusal = r"demo-schnell in full precision does not fit CPU: 256x256 takes .* are free for it\. Give it so much"
    with pytest.raises(OutOfMemory, match=refusal):
        flux_engine.load("demo-schnell", memory="5MB")


def test_a_request_that_has_no_room_is_refused_and_nothing_is_lost() -> None:
    engine = flux_engine.load("demo-schnell", dtype="float32", memory=tight("demo-schnell") + 10**6)
    first = latent(engine)
    with pytest.raises(OutOfMemory, match=r"takes about .* MB more than the .* MB that the model may take"):
        latent(engine, num_outputs=4, width=512, height=512)
    assert torch.equal(latent(engine), first)


def test_a_file_that_was_changed_stops_a_request_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    shutil.copyfile(SCHNELL, path)
    engine = flux_engine.load(path, dtype="float32", memory=tight("demo-schnell") + 10**6)
    assert "network" in engine.describe()["plan"]["leaves"]
    first = latent(engine)
    times = path.stat().st_mtime_ns
    os.utime(path, ns=(1, 1))
    for _ in range(2):
        with pytest.raises(WeightsError, match="was changed while it was in use"):
            latent(engine, "a green cross")
    os.utime(path, ns=(times, times))
    assert torch.equal(latent(engine), first)


def test_a_request_cancelled_halfway_leaves_the_next_one_whole() -> None:
    memory = tight("demo-schnell") + 10**6
    engine, other = (flux_engine.load("demo-schnell", dtype="float32", memory=m) for m in (memory, "resident"))
    cancel = threading.Event()
    with pytest.raises(RequestCancelled):
        engine(CAPTION, on_step=lambda _: cancel.set(), cancel=cancel)
    assert torch.equal(latent(engine, "a blue circle"), latent(other, "a blue circle"))


def test_previews_and_pictures_in_less_memory() -> None:
    memory = tight("demo-schnell") + 10**6
    engine, other = (flux_engine.load("demo-schnell", dtype="float32", memory=m) for m in (memory, "resident"))
    photo = Image.new("RGB", (256, 256), "red")
    made: list[list[Any]] = []
    for one in (engine, other):
        seen: list[Any] = []
        one(CAPTION, seed=1, image=photo, strength=0.5, on_step=lambda step, seen=seen: seen.append(step.preview()[0]))
        made.append(seen)
    pairs = zip(*made, strict=True)
    assert all(ImageChops.difference(a, b).convert("L").getextrema()[1] <= 2 for a, b in pairs) and made[0]


def test_learned_tokens_and_a_refiner_in_less_memory(tmp_path: Path) -> None:
    tables = {key: torch.randn(2, width) for key, width in (("clip_l", 64), ("clip_g", 32))}
    save_file(tables, tmp_path / "word.safetensors")
    memory = tight("demo-sdxl") + 10**6
    engine, other = (flux_engine.load("demo-sdxl", dtype="float32", memory=m) for m in (memory, "resident"))
    assert engine.describe()["plan"]["leaves"]
    for one in (engine, other):
        latent(one)
        one.load_textual_inversion(tmp_path / "word.safetensors")
    assert torch.equal(latent(engine, "a word circle"), latent(other, "a word circle"))


def test_it_can_be_exported_from_less_memory(tmp_path: Path) -> None:
    engine = flux_engine.load("demo-schnell", dtype="float32", memory=tight("demo-schnell") + 10**6)
    first = latent(engine)
    written = load_file(engine.export(tmp_path / "out", layout="bfl") / "demo-schnell.safetensors")
    assert all(torch.equal(written[name].bfloat16(), tensor) for name, tensor in load_file(SCHNELL).items())
    assert torch.equal(latent(engine), first)


def test_what_comes_next_is_fetched_meanwhile() -> None:
    """Where there is room for it: by a thread of its own, with the same bits."""
    engine, other = (flux_engine.load("demo-schnell", dtype="float32", memory=m) for m in ("46MB", "resident"))
    residents = engine._pipeline.family.residents
    fetched: list[str] = []
    plain = residents._carry
    residents._carry = lambda part: fetched.append(f"{threading.current_thread().name[:8]} {part}") or plain(part)
    for caption in (CAPTION, "a blue circle", "a green star"):
        assert torch.equal(latent(engine, caption), latent(other, caption))
    assert any(one.startswith("prefetch") for one in fetched), fetched


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="memory 'tiny' is not one of auto, resident, evict, and no size"):
        flux_engine.load("demo-schnell", memory="tiny")


@pytest.mark.parametrize(
    ("net", "params", "share"), [(Flux, FluxParams(guidance_embed=True), 0.275), (UNet, UNetParams(), 0.14)]
)
def test_how_much_of_the_published_models_leaves(net: type[Any], params: Any, share: float) -> None:
    """27 % of FLUX.1 is modulation; text keys and values are 13 % of SDXL's UNet."""
    with torch.device("meta"):
        made: nn.Module = net(params)
    sizes = {name: p.numel() for name, p in made.named_parameters()}
    gone = sum(size for name, size in sizes.items() if re.fullmatch(str(made.precomputed), name))
    assert gone / sum(sizes.values()) == pytest.approx(share, abs=0.01)

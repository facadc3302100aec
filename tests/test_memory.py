"""Weights that are read once for a prompt and are in the file meanwhile."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import flux_engine
from flux_engine import Engine, UnsupportedError, WeightsError, hub
from flux_engine.models.flux import Flux
from flux_engine.models.unet import UNet
from flux_engine.params import FluxParams, UNetParams

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

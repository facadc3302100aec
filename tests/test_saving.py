"""Models saved in 8 bits: the same bits as quantizing while loading, and every way such a file can be wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux_engine
from flux_engine import InvalidRequest, OutputError, UnsupportedError, WeightsError, hub
from flux_engine.checkpoints.quantized import FORMAT
from flux_engine.cli import main
from flux_engine.saving import check_source

CAPTION = "a small red star on a striped green and white background"
FILE = "transformer/model.safetensors"
DEMO = hub.weights_folder() / "demo" / "flux"
SCHNELL = DEMO / "transformer" / "schnell.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_engine.quantize("demo-schnell", tmp_path_factory.mktemp("saved") / "schnell-int8")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118  no mapping


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    tensors, metadata = read(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def latent(engine: flux_engine.Engine) -> Tensor:
    return engine(CAPTION, seed=3, num_inference_steps=2, output_type="latent").images[0]


@pytest.mark.parametrize(
    ("model", "scheme", "dtype"),
    [
        ("demo-schnell", "int8", "float32"),
        ("demo-schnell", "int8", "bfloat16"),
        ("demo-schnell", "fp8", "float32"),
        ("demo-schnell", "fp8-storage", "float32"),
        ("demo-sdxl-turbo", "int8", "float32"),
        ("demo-sdxl-turbo", "fp8", "bfloat16"),
    ],
)
def test_a_saved_model_gives_the_same_bits(model: str, scheme: str, dtype: str, tmp_path: Path) -> None:
    folder = flux_engine.quantize(model, tmp_path / "saved", scheme=scheme)
    ours = flux_engine.load(folder, dtype=dtype)
    other = flux_engine.load(model, dtype=dtype, quantization=scheme)
    assert torch.equal(latent(ours), latent(other))
    said, expected = ours.describe(), other.describe()
    assert said["quantization"] == scheme and said["parts"] == expected["parts"]
    for name in ("num_inference_steps", "guidance_scale", "schedule", "sizes", "vae"):
        assert getattr(ours.spec, name) == getattr(other.spec, name)


def test_what_is_in_the_file(saved: Path) -> None:
    tensors, metadata = read(saved / FILE)
    assert metadata["format"] == FORMAT and metadata["scheme"] == "int8" and metadata["spec"] == "demo-schnell"
    assert list(json.loads(metadata["source"])) == ["schnell.safetensors"]
    linears = json.loads(metadata["linears"])
    for name, scheme in linears.items():
        assert tensors[f"{name}.weight"].dtype == torch.int8 and scheme in ("int8", "int8-storage")
        assert tensors[f"{name}.weight_scale"].shape == tensors[f"{name}.weight"].shape[:1]
    others = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in linears}
    assert others and {tensor.dtype for tensor in others.values()} == {torch.bfloat16}, "as the source stores them"
    assert (saved / FILE).stat().st_size < 0.65 * sum(2 * t.numel() for t in tensors.values())
    whole = (saved / "vae" / "model.safetensors").stat().st_size
    assert abs(whole / (DEMO / "vae.safetensors").stat().st_size - 1) < 0.05


def test_tensors_lie_evenly_so_that_they_can_be_mapped(saved: Path) -> None:
    content = (saved / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "I8": 1}
    assert not [n for n, t in header.items() if n != "__metadata__" and t["data_offsets"][0] % sizes[t["dtype"]]]


def test_a_folder_with_configs_keeps_what_they_say(tmp_path: Path) -> None:
    flux_engine.load("demo-sdxl", dtype="float32").export(tmp_path / "diffusers")
    config = tmp_path / "diffusers" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_end": 0.0125}))
    folder = flux_engine.quantize(tmp_path / "diffusers", tmp_path / "saved")
    assert flux_engine.load(folder).spec.schedule.beta_end == 0.0125  # pyright: ignore[reportAttributeAccessIssue]


def test_it_is_loaded_as_it_was_saved(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("none", "auto", "int8"):
        assert flux_engine.load(saved, quantization=asked).describe()["quantization"] == "int8"
    with pytest.raises(UnsupportedError, match="schnell-int8 is saved in int8 and cannot be loaded in fp8"):
        flux_engine.load(saved, quantization="fp8")
    monkeypatch.setattr(flux_engine.engine.hardware, "pick_quantization", _refusing)
    with pytest.raises(UnsupportedError, match="this card does not multiply int8"):
        flux_engine.load(saved)


def _refusing(name: str, _: torch.device) -> str:
    if name == "int8":
        raise UnsupportedError("this card does not multiply int8")
    return name


def test_other_tools_are_not_given_8_bits(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="the weights are in int8, which no other tool reads"):
        flux_engine.load(saved).export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def without(name: str) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, _: tensors.pop(name)


def saying(**said: str) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda _, metadata: metadata.update(said)


def with_tensor(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, _: tensors.update({name: make(tensors[name])})


LINEAR = "single_blocks.0.linear1"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], object], str]] = {
    "another version": (saying(version="2"), "is in version 2 of flux-engine-8bit, and this reads 1"),
    "no version": (lambda _, said: said.pop("version"), "version None"),
    "no list of linears": (lambda _, said: said.pop("linears"), "does not say of itself"),
    "no JSON": (saying(linears="{"), "does not say of itself"),
    "a list where names belong": (saying(linears="[]"), "does not say of itself"),
    "a list of sources": (saying(source="[]"), "does not say of itself"),
    "a source that is no text": (saying(source='{"x": 1}'), "does not say of itself"),
    "an unknown scheme": (saying(linears=json.dumps({LINEAR: "int3"})), "does not say of itself"),
    "a linear that is not there": (saying(linears=json.dumps({"nowhere": "int8"})), "does not say of itself"),
    "an unknown spec": (saying(spec="flux-9"), "has the spec 'flux-9'; known are"),
    "another network": (saying(kind="unet"), "is not a FLUX.1 transformer"),
    "an unknown network": (saying(kind="cake"), "holds 'cake', a network that is not known here"),
    "no scale": (without(f"{LINEAR}.weight_scale"), "does not say of itself"),
    "too few scales": (with_tensor(f"{LINEAR}.weight_scale", lambda s: s[1:].clone()), "of another shape"),
    "scales of another dtype": (with_tensor(f"{LINEAR}.weight_scale", lambda s: s.half()), "float16"),
    "values of another scheme": (
        with_tensor(f"{LINEAR}.weight", lambda w: w.float().to(torch.float8_e4m3fn)),
        "said to be int8, and is stored in",
    ),
    "values of another shape": (with_tensor(f"{LINEAR}.weight", lambda w: w[1:].clone()), "of another shape"),
    "a tensor too many": (lambda tensors, _: tensors.update(extra=torch.ones(3)), "1 not known: extra"),
    "whole numbers where none belong": (with_tensor("img_in.bias", lambda b: b.to(torch.int8)), "whole numbers"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_wrong_is_refused(wrong: str, copy: Path) -> None:
    change, message = WRONG[wrong]
    rewrite(copy / FILE, change)
    with pytest.raises(WeightsError, match=message):
        flux_engine.load(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    content = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(content[:-100])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        flux_engine.load(copy)


def test_parts_of_several_schemes_are_loaded_as_each_was_saved(copy: Path, tmp_path: Path) -> None:
    other = flux_engine.quantize("demo-schnell", tmp_path / "fp8", scheme="fp8")
    shutil.copyfile(other / "text_encoder_2" / "model.safetensors", copy / "text_encoder_2" / "model.safetensors")
    parts = flux_engine.load(copy).describe()["parts"]
    assert parts["transformer"]["linears"][LINEAR.replace(".0", ".{i}")] == "int8"
    assert set(parts["text_encoder_2"]["linears"].values()) == {"int8-storage"}


def test_what_is_of_8_bits_is_not_quantized_again(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is of 8 bits already"):
        flux_engine.quantize(saved, tmp_path / "again", scheme="fp8")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(saved: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with pytest.raises(OutputError, match="exists already"):
        flux_engine.quantize("demo-schnell", saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"scheme": "int4"}, InvalidRequest, "scheme 'int4' is not one of int8, fp8, fp8-storage"),
        ({"scheme": None}, InvalidRequest, "scheme None is not one of"),
        ({"folder": 3}, OutputError, "not by 3"),
        ({"model": "demo-schnel"}, flux_engine.UnknownModel, "did you mean 'demo-schnell'"),
    ],
)
def test_bad_input(fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        flux_engine.quantize(**({"model": "demo-schnell", "folder": tmp_path / "out"} | fields))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        flux_engine.quantize("demo-schnell", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    tensors = load_file(SCHNELL)
    tensors[f"{LINEAR}.weight"][5, 7] = float("nan")
    save_file(tensors, source)
    message = f"row 5 of {LINEAR}.weight is not finite"
    with pytest.raises(WeightsError, match=message):
        flux_engine.quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(WeightsError, match=message):
        flux_engine.load(source, quantization="int8")


def test_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "small"
    assert main(["quantize", "demo-schnell", "--scheme", "fp8", "--output", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert main(["inspect", str(folder / "transformer")]) == 0
    said = capsys.readouterr().out
    assert "flux-engine, 8 bits" in said and "float8_e4m3fn" in said
    assert "missing" not in said and "not known" not in said
    picture = tmp_path / "x.png"
    assert main(["generate", CAPTION, "--model", str(folder), "--seed", "0", "--output", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    assert main(["quantize", "demo-schnell", "--scheme", "int4", "--output", str(tmp_path / "none")]) == 2
    assert "scheme 'int4' is not one of" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "scheme"), [("demo-schnell", "int8"), ("demo-sdxl", "fp8")])
def test_a_controlnet_is_saved_alone_and_gives_the_same_bits(model: str, scheme: str, tmp_path: Path) -> None:
    name = {"demo-schnell": "demo-canny", "demo-sdxl": "demo-sdxl-canny"}[model]
    folder = flux_engine.quantize(name, tmp_path / "saved", scheme=scheme)
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    edges = Image.new("RGB", (64, 64))
    edges.paste("white", (10, 10, 50, 12))
    control = flux_engine.Control(kind="canny", image=edges, preprocess=False)
    made: list[Tensor] = []
    nets: list[Any] = [{"canny": folder}, {"canny": str(folder / "model.safetensors")}, [name]]
    for net in nets:
        engine = flux_engine.load(model, dtype="float32", quantization=scheme, controlnets=net)
        made.append(engine(CAPTION, seed=3, num_inference_steps=2, output_type="latent", control=control).images[0])
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    kept = flux_engine.load(model, controlnets={"canny": folder}).describe()["parts"]
    (part,) = (part for part in kept if part.startswith("controlnet"))
    if model == "demo-schnell":  # the other one has no linear that its policy brings to 8 bits
        assert scheme in kept[part]["linears"].values(), "of 8 bits beside a model that is not"


def test_whether_it_was_made_of_what_a_model_is_now(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(saved), "--source", "demo-schnell"]) == 0
    assert "was made of demo-schnell as it is" in capsys.readouterr().out
    changed = tmp_path / "changed.safetensors"
    tensors = load_file(SCHNELL)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, changed)
    for source, words in (
        (str(changed), r"transformer was made of schnell.safetensors \([0-9a-f]{12}\), and .* has changed.safetensors"),
        ("demo-dev", "quantize it anew"),
        ("demo-sdxl", "unet"),
    ):
        with pytest.raises(WeightsError, match=words):
            check_source(saved, source)
    assert main(["inspect", str(saved), "--source", "demo-dev"]) == 1
    with pytest.raises(WeightsError, match="was not saved by quantize"):
        flux_engine.load("demo-schnell").export(tmp_path / "plain")
        check_source(tmp_path / "plain", "demo-schnell")
    net = flux_engine.quantize("demo-canny", tmp_path / "net")
    check_source(net, "demo-canny")
    with pytest.raises(WeightsError, match="quantize it anew"):
        check_source(net, "demo-sdxl-canny")

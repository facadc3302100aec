"""The command line, run as a user runs it."""

from __future__ import annotations

import argparse
import base64
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import randomise
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import flux_engine
from flux_engine import EngineConfig, InvalidRequest, OutputError, UnknownModel, cli, files, hub
from flux_engine.checkpoints.export import flux_controlnet_tensors
from flux_engine.cli import sources
from flux_engine.engine import Engine
from flux_engine.images import read_parameters
from flux_engine.models.flux_controlnet import FluxControlNet
from flux_engine.params import FluxControlNetParams
from flux_engine.pictures import flatten, read_picture
from flux_engine.specs import DEMO_DEV, FLUX_CANNY, FLUX_DEV, FLUX_KONTEXT, SDXL, ModelSpec

SIZE = (128, 96)


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flux_engine.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_generate_writes_a_picture_and_says_how_long_it_took(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.png"
    done = run("generate", "a red circle", "--seed", "0", "--output", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    for stage in ("import", "load", "encode", "denoise", "decode", "save"):
        assert f"{stage} " in done.stderr.splitlines()[-1]
    with Image.open(out) as image:
        assert image.size == (256, 256)
    text = read_parameters(out)
    assert text is not None
    assert text.startswith("a red circle\nSteps: 4, Sampler: Euler")
    assert "Seed: 0, Size: 256x256, Model: demo-schnell" in text


def test_the_seed_told_is_the_seed_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    assert cli.main(["generate", "x", "--steps", "1", "--output", str(out)]) == 0
    told = capsys.readouterr().err.splitlines()[0].rpartition(" ")[2]
    assert f"Seed: {told}," in (read_parameters(out) or "")


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp", "png"])
def test_formats_and_metadata(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"a.{ending}"
    base = ["generate", "ein grüner Stern", "--seed", "3", "--steps", "1", "--output", str(out), "--json"]
    assert cli.main(base) == 0
    with Image.open(out) as image:
        assert image.format == {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}[ending]
    text = read_parameters(out)
    assert text is not None
    assert text.startswith("ein grüner Stern\nSteps: 1")
    assert cli.main([*base, "--no-metadata"]) == 0
    assert read_parameters(out) is None


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
def test_very_long_prompts_can_be_saved(tmp_path: Path, ending: str) -> None:
    prompt = "a red circle 🎨 " * 5000
    out = tmp_path / f"a.{ending}"
    assert cli.main(["generate", prompt, "--steps", "1", "--output", str(out), "--json"]) == 0
    text = read_parameters(out)
    assert text is not None
    assert text.startswith(prompt[:20_000])


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.webp"
    code = cli.main(
        ["generate", "a red circle", "--num-outputs", "2", "--seed", "0", "--width", "100", "--height", "96",
         "--guidance", "3", "--output", str(out), "--json"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    assert captured.err == ""
    report = json.loads(captured.out)
    assert report["images"] == [str(tmp_path / "b-0.webp"), str(tmp_path / "b-1.webp")]
    assert all(Path(p).exists() for p in report["images"])
    assert (report["width"], report["height"], report["seeds"]) == (112, 96, [0, 1])
    assert len(report["notes"]) == 2
    assert set(report["timings"]) == {"import", "load", "encode", "denoise", "decode", "save", "total"}


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


IMAGE = data_uri(Image.new("RGB", SIZE, "green"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", "0"], "num_inference_steps 0"),
        (["--num-outputs", "0"], "num_outputs 0"),
        (["--width", "0", "--height", "64"], "width 0"),
        (["--guidance", "nan"], "guidance_scale nan"),
        (["--seed", "-1"], "seed -1"),
        (["--model", "nothing"], "no model 'nothing'"),
        (["--aspect-ratio", "7:5"], "aspect_ratio '7:5'"),
        (["--format", "gif"], "format 'gif'"),
        (["--output", "a.bmp"], "format 'bmp'"),
        (["--quality", "101"], "quality 101"),
        (["--strict", "--width", "100", "--height", "100"], "strict: width 100"),
        (["--image", "nothing.png"], "image 'nothing.png' does not exist"),
        (["--image", "https://example.com/a.png"], "is a link"),
        (["--mask", IMAGE], "mask without image"),
        (["--strength", "0.5"], "strength without image"),
        (["--image", IMAGE, "--strength", "nan"], "strength nan"),
        (["--image", IMAGE, "--outpaint", "8,8,8"], "outpaint '8,8,8' is neither"),
        (["--image", IMAGE, "--outpaint", "8.5,8,8,8"], "outpaint '8.5,8,8,8' is neither"),
        (["--image", IMAGE, "--outpaint", "0,0,0,0"], "no room"),
        (["--image", IMAGE, "--outpaint", "9" * 5000 + "x8"], "is too large"),
        (["--image", IMAGE, "--mask", IMAGE, "--outpaint", "8,8,8,8"], "mask and outpaint"),
        (["--image", IMAGE, "--resize", "squeeze"], "resize 'squeeze'"),
        (["--no-paste-back"], "paste_back without image"),
        (["--control", "canny"], "control 'canny' is not KIND:FILE"),
        (["--control", ":in.png"], "control ':in.png' is not KIND:FILE"),
        (["--control", f"depth:{IMAGE}"], "no ControlNet 'depth' for demo-schnell"),
        (["--model", "flux-dev", "--control", f"cany:{IMAGE}"], "did you mean 'canny'?"),
        (["--model", "flux-dev", "--control", f"canny:{IMAGE}:nan"], "scale nan"),
        (["--model", "flux-dev", "--control", f"canny:{IMAGE}:-1"], "scale -1"),
        (["--model", "flux-dev", "--control", f"canny:{IMAGE}:1:0.8-0.2"], "start 0.8 is after end 0.2"),
        (["--model", "flux-dev", "--control", "canny:nothing.png:0.5"], "control 'nothing.png' does not exist"),
        (["--model", "flux-canny-dev"], "flux-canny-dev reads a control picture"),
        (["--model", "flux-canny-dev", "--control", f"canny:{IMAGE}:0.5"], "always reads it whole"),
        (["--model", "flux-kontext-dev", "--control", f"canny:{IMAGE}"], "takes no control pictures"),
        (["--model", "flux-kontext-dev"], "give image"),
        (["--model", "flux-fill-dev", "--image", IMAGE], "mask is missing"),
        (["--controlnet", "canny"], "controlnet without control"),
        (["--controlnet", "canny=a", "--controlnet", "canny=b", "--control", f"canny:{IMAGE}"], "canny is given twice"),
        (["--controlnet", "./x", "--control", f"canny:{IMAGE}"], "say what it reads, as canny=./x"),
        (["--image-prompt", IMAGE], "say --redux and which adapter reads it: flux-redux-dev"),
        (["--image-prompt", IMAGE, "--redux", "nothing"], "no adapter 'nothing'"),
        (["--image-prompt", IMAGE, "--redux", "demo-dev"], "demo-dev is a model and no adapter"),
        (["--model", "sdxl", "--image-prompt", IMAGE, "--redux", "flux-redux-dev"], "sdxl is no FLUX.1 model"),
        (["--redux", "flux-redux-dev"], "redux without image_prompt"),
        (["--image-prompt-strength", "1"], "image_prompt_strength without image_prompt"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "x", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input_does_not_import_torch(tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "in.png")
    for args in (
        ["--steps", "0"],
        ["--image", "in.png", "--strength", "2"],
        ["--model", "flux-dev", "--control", "canny:in.png:11"],
        ["--model", "flux-dev", "--control", "pose:in.png"],  # which nothing here can draw
        ["--model", "sdxl", "--control", "canny:in.png:0.5", "--controlnet", "sdxl-controlnet-canny", "--width", "1"],
        ["--controlnet", "canny=nothing.safetensors", "--control", "canny:in.png"],
        ["--model", "flux-dev", "--image-prompt", "in.png", "--redux", "flux-redux-dev", "--num-outputs", "0"],
        ["--model", "flux-dev", "--image-prompt", "in.png", "--redux", "."],
    ):
        code = (
            "import sys; from flux_engine import cli;"
            f"assert cli.main(['generate', 'x', *{args!r}]) in (1, 2); assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


# Pictures


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> dict[str, Any]:
    """Loading gives the engine that is there; the options of the last load."""
    said: dict[str, Any] = {}

    def load(model: str, **options: Any) -> Engine:
        said.clear()
        said.update(options, model=model)
        return engine

    monkeypatch.setattr(flux_engine, "load", load)
    return said


def scene() -> Image.Image:
    """Of few colours, which every format keeps or nearly does."""
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).rectangle((0, 0, 63, 95), fill="blue")
    return image


def exif_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    scene().transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)


def see_through(path: Path) -> None:
    image = scene().convert("RGBA")
    image.paste((0, 0, 0, 0), (64, 0, 128, 96))
    image.save(path)


def with_a_hole(path: Path) -> None:
    image = scene().quantize(4)
    image.save(path, transparency=image.getpixel((100, 50)))


def of_16_bits(path: Path) -> None:
    grey = np.where(np.arange(128) < 64, 7_000, 65_535).astype(np.uint16)
    Image.fromarray(np.tile(grey, (96, 1))).save(path)


FORMATS: dict[str, Callable[[Path], Any]] = {
    "a.jpg": lambda path: scene().save(path, quality=95),
    "cmyk.jpg": lambda path: scene().convert("CMYK").save(path, quality=95),
    "rotated.jpg": exif_rotated,
    "a.png": lambda path: scene().save(path),
    "rgba.png": see_through,
    "palette.png": with_a_hole,
    "16-bit.png": of_16_bits,
    "a.gif": lambda path: scene().save(path),
    "a.webp": lambda path: scene().save(path, quality=95),
    "a.avif": lambda path: scene().save(path, quality=95),
    "a.bmp": lambda path: scene().save(path),
    "a.tiff": lambda path: scene().save(path),
    "cmyk.tiff": lambda path: scene().convert("CMYK").save(path),
    "16-bit.tiff": of_16_bits,
    "no ending": lambda path: scene().save(path, "PNG"),
    "odd:name, 0.8.png": lambda path: scene().save(path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_changed_where_the_mask_says(
    name: str, tmp_path: Path, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / name, tmp_path / "out.png"
    FORMATS[name](file)
    sent = flatten(read_picture(file, "image"))
    assert sent.size == SIZE
    assert np.abs(np.asarray(sent, dtype=int)[8:-8, 8:56] - np.asarray(sent, dtype=int)[8, 8]).max() < 12
    mask = Image.new("1", SIZE, 0)
    mask.paste(1, (32, 16, 96, 80))
    mask.save(tmp_path / "m.png")
    asked = ["generate", "a red circle", "--image", str(file), "--strength", "0.8", "--steps", "2", "--seed", "0"]
    assert cli.main([*asked, "--mask", str(tmp_path / "m.png"), "--output", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["width"], report["height"], report["strength"], report["notes"]) == (*SIZE, 0.8, [])
    with Image.open(out) as image:
        made, kept = np.asarray(image), np.asarray(mask) == 0
    assert np.array_equal(made[kept], np.asarray(sent)[kept])
    assert not np.array_equal(made[~kept], np.asarray(sent)[~kept])
    assert "Denoising strength: 0.8" in (read_parameters(out) or "")


@pytest.mark.parametrize("name", ["rgba.png", "palette.png"])
def test_transparency_is_a_mask(
    name: str, tmp_path: Path, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    FORMATS[name](tmp_path / name)
    asked = ["generate", "x", "--image", str(tmp_path / name), "--steps", "1", "--output", str(tmp_path / "out.png")]
    assert cli.main(asked) == 0
    assert "note: the transparent part of image is repainted" in capsys.readouterr().err
    with Image.open(tmp_path / "out.png") as image:
        assert np.array_equal(np.asarray(image)[:, :64], np.asarray(scene())[:, :64])
    assert cli.main([*asked, "--strict"]) == 2


def test_img2img_and_outpainting(tmp_path: Path, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    scene().save(tmp_path / "in.png")
    base = ["generate", "--image", str(tmp_path / "in.png"), "x", "--steps", "2", "--seed", "0", "--json"]
    for more, strength, size in (
        ([], 0.8, SIZE),
        (["--strength", "0"], 0.0, SIZE),
        (["--outpaint", "32,0,16,0"], 1.0, (176, 96)),
        (["--outpaint", "160x128", "--no-paste-back"], 1.0, (160, 128)),
        (["--width", "64", "--height", "64", "--resize", "cover"], 0.8, (64, 64)),
        (["--aspect-ratio", "match_input_image"], 0.8, SIZE),
        (["--resize", "none"], 0.8, SIZE),
    ):
        out = tmp_path / "out.png"
        assert cli.main([*base, *more, "--output", str(out)]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["strength"], report["width"], report["height"]) == (strength, *size)
        with Image.open(out) as image:
            assert image.size == size
            found = np.asarray(image)
        if "--outpaint" in more:
            kept = found[8:-8, 40:152] if "32,0,16,0" in more else found[24:104, 24:136]
            shown = np.asarray(scene())[8:-8, 8:120]
            assert np.array_equal(kept, shown) == ("--no-paste-back" not in more)


def test_standard_input_is_read_once_for_all(
    tmp_path: Path, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    scene().save(buffer, "WEBP", lossless=True)
    asked = ["generate", "x", "--image", "-", "--mask", "-", "--steps", "1", "--seed", "0", "--json"]
    for closed in (False, True):
        stdin = io.TextIOWrapper(io.BytesIO(buffer.getvalue()))
        monkeypatch.setattr(sys, "stdin", None if closed else stdin)
        assert cli.main([*asked, "--output", str(tmp_path / "out.png")]) == (2 if closed else 0)
    with Image.open(tmp_path / "out.png") as image:
        kept = np.asarray(scene().convert("L")) == 0
        assert np.array_equal(np.asarray(image)[kept], np.asarray(scene())[kept])
    assert "standard input cannot be read" in capsys.readouterr().err


def test_from_the_shell_with_a_picture_and_a_control_picture(tmp_path: Path) -> None:
    """As the manual says it, with a ControlNet of random weights."""
    params = FluxControlNetParams.of(DEMO_DEV.transformer, depth=1, depth_single_blocks=1)
    net = randomise(FluxControlNet(params), 1)
    assert isinstance(net, FluxControlNet)
    tensors = {name: tensor.contiguous() for name, tensor in flux_controlnet_tensors(net).items()}
    save_file(tensors, tmp_path / "edges.safetensors")
    scene().save(tmp_path / "in.jpg", quality=95)
    scene().save(tmp_path / "in:2.png")
    Image.new("L", SIZE, 255).save(tmp_path / "m.png")
    base = ["generate", "a red circle", "--model", "demo-dev", "--steps", "2", "--seed", "0", "--json"]
    base += ["--controlnet", "canny=edges.safetensors", "--save-controls"]
    done = run(
        *base, "--output", "a.webp", "--num-outputs", "2", "--image", "in.jpg", "--mask", "m.png", "--strength", "0.8",
        "--control", "canny:in:2.png:0.8", "--control-map", "canny:m.png:0.5:0-0.5", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["images"] == ["a-0.webp", "a-1.webp"]
    assert report["controls"] == ["a-control-0.png", "a-control-1.png"]
    assert (report["width"], report["height"], report["strength"]) == (*SIZE, 0.8)
    with Image.open(tmp_path / "a-control-0.png") as image:
        lines = np.asarray(image.convert("L"))
        assert image.size == SIZE
    assert lines[:, 60:68].max() == 255  # where blue meets white
    assert lines[:, :56].max() == lines[:, 72:].max() == 0
    with Image.open(tmp_path / "a-control-1.png") as image:
        assert image.convert("L").getextrema() == (255, 255)

    done = run(*base, "--control", "dept:in.jpg", cwd=tmp_path)
    assert done.returncode == 2
    assert "'dept'" in done.stderr


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("canny:in.png", ("canny", "in.png", 1.0, 0.0, 1.0)),
        ("canny:in.png:0.8", ("canny", "in.png", 0.8, 0.0, 1.0)),
        ("canny:in.png:.8:0-0.5", ("canny", "in.png", 0.8, 0.0, 0.5)),
        ("canny:in.png:1.:.25-1", ("canny", "in.png", 1.0, 0.25, 1.0)),
        ("canny:in.png:0.2-0.8", ("canny", "in.png", 1.0, 0.2, 0.8)),
        (r"depth:C:\pics\in.png", ("depth", r"C:\pics\in.png", 1.0, 0.0, 1.0)),
        (r"depth:C:\pics\in.png:2", ("depth", r"C:\pics\in.png", 2.0, 0.0, 1.0)),
        ("canny:a:b:c.png:0.5:0-1", ("canny", "a:b:c.png", 0.5, 0.0, 1.0)),
        ("canny:odd:2", ("canny", "odd", 2.0, 0.0, 1.0)),
        ("canny:odd:2:1", ("canny", "odd:2", 1.0, 0.0, 1.0)),
        ("canny:day:2024-01:1", ("canny", "day:2024-01", 1.0, 0.0, 1.0)),
        ("canny:day:2024-01-02", ("canny", "day:2024-01-02", 1.0, 0.0, 1.0)),
        ("canny:-", ("canny", "-", 1.0, 0.0, 1.0)),
        ("canny:-:0.5", ("canny", "-", 0.5, 0.0, 1.0)),
        ("canny:in.png:-1", ("canny", "in.png", -1.0, 0.0, 1.0)),
        ("canny:in.png:1:-1-2", ("canny", "in.png", 1.0, -1.0, 2.0)),
        ("canny:https://host:8080/a.png:0.5", ("canny", "https://host:8080/a.png", 0.5, 0.0, 1.0)),
        ("canny:data:image/png;base64,AAAA:0.5", ("canny", "data:image/png;base64,AAAA", 0.5, 0.0, 1.0)),
        ("canny:~/in.png", ("canny", "~/in.png", 1.0, 0.0, 1.0)),
        ("canny:a\nb.png:0.5", ("canny", "a\nb.png", 0.5, 0.0, 1.0)),
        ("canny:0.5", ("canny", "0.5", 1.0, 0.0, 1.0)),
        ("canny:" + ":" * 50_000, ("canny", ":" * 50_000, 1.0, 0.0, 1.0)),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_control_is_read_from_both_ends(text: str, meant: tuple[Any, ...]) -> None:
    one = sources._control(text, True, lambda field, file: file)
    assert (one.kind, one.image, one.scale, one.start, one.end) == meant


def test_a_home_is_meant_behind_a_colon_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    scene().save(tmp_path / "in.png")
    assert sources._control("canny:~/in.png", True, sources._reader(False)).image.size == SIZE


def beside(spec: ModelSpec, *args: str) -> tuple[ModelSpec, sources.Beside]:
    parser = argparse.ArgumentParser()
    sources.add(parser)
    return sources.beside(parser.parse_args(args), spec, hub.manifests(), EngineConfig())


def test_controlnets_are_found_by_kind_for_the_model() -> None:
    def found(spec: ModelSpec, *args: str) -> Any:
        told, load = beside(spec, *args)
        assert [net for net in told.controlnets if not net.kinds] == []
        return load.controlnets

    assert found(FLUX_DEV) == []
    assert found(FLUX_DEV, "--control", "canny:x") == ["canny"]
    assert found(FLUX_DEV, "--control", "canny:x", "--control-map", "canny:y") == ["canny"]
    assert found(FLUX_DEV, "--control", "canny:x", "--control", "depth:x") == ["canny", "depth"]
    assert found(FLUX_CANNY, "--control", "canny:x") == []
    assert found(FLUX_CANNY, "--control", "canny:x", "--control", "depth:x") == ["depth"]
    assert found(FLUX_KONTEXT, "--control", "canny:x") == ()
    # A union that is loaded for one kind answers for its others.
    assert found(FLUX_DEV, "--control", "pose:x", "--control", "gray:x") == ["pose"]
    union = ["--controlnet", "flux-controlnet-union", "--control", "canny:x"]
    assert found(FLUX_DEV, *union, "--control", "tile:x") == ["flux-controlnet-union"]
    assert found(FLUX_DEV, *union, "--control", "soft_edge:x") == ["flux-controlnet-union", "soft_edge"]
    files = ["--controlnet", "canny=a/b.safetensors", "--control", "canny:x"]
    assert found(FLUX_DEV, *files) == {"canny": "a/b.safetensors"}
    assert found(FLUX_DEV, *files, "--control", "depth:x") == {"canny": "a/b.safetensors", "depth": "depth"}
    assert found(SDXL, "--controlnet", "sdxl-controlnet-canny-small", "--control", "canny:x") == [
        "sdxl-controlnet-canny-small"
    ]
    told, _ = beside(FLUX_DEV, "--control", "canny:x")
    assert told.controls == ("canny",)
    with pytest.raises(UnknownModel, match="did you mean 'tile'"):
        found(FLUX_DEV, "--control", "tyle:x")
    with pytest.raises(InvalidRequest, match="say what it reads"):
        found(FLUX_DEV, "--controlnet", "a/b.safetensors", "--control", "canny:x")


def test_what_is_asked_for_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a prompt, where a picture is one; wherever it stands among the options."""
    said: list[dict[str, Any]] = []

    def load(model: str, **options: Any) -> Engine:
        said.append(options)
        raise InvalidRequest("enough")

    monkeypatch.setattr(flux_engine, "load", load)
    monkeypatch.chdir(tmp_path)
    scene().save("in.png")
    base = ["generate", "--model", "flux-dev", "--redux", "flux-redux-dev", "--image-prompt", "in.png"]
    for args in (base, [*base, "a star"], ["generate", "a star", *base[1:]], [*base, "--control", "canny:in.png"]):
        assert cli.main(args) == 2
    assert [one["redux"] for one in said] == ["flux-redux-dev"] * 4
    assert [one["controlnets"] for one in said] == [[], [], [], ["canny"]]
    assert cli.main(["generate", "--model", "flux-dev"]) == 2
    assert len(said) == 4


def test_no_prompt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--steps", "1"]) == 2
    assert "prompt is missing" in capsys.readouterr().err


def test_controlnets_are_listed_with_what_they_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("flux-controlnet-union ")]
    assert "controlnet (canny, tile, depth, blur, pose, gray, low_quality): " in line
    assert cli.main(["models", "--all", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["sdxl-controlnet-canny"]["controls"] == ["canny"]
    assert rows["demo-dev"]["controls"] == []


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    for out in (blocked / "a.png", tmp_path):
        assert cli.main(["generate", "x", "--output", str(out)]) in (1, 2)
        assert str(tmp_path) in capsys.readouterr().err
    if os.geteuid() != 0:  # root may write anywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert cli.main(["generate", "x", "--output", str(closed / "a.png")]) == 1
        assert "cannot write" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = tmp_path / "a.png"
    old.write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        files.write(old, b"new")
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_output_without_an_ending_gets_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", "--steps", "1", "--output", str(tmp_path / "pic"), "--format", "webp"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "pic.webp")


def test_pictures_without_a_name_are_out_whatever_lies_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo makes a folder of that name."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    assert cli.main(["generate", "x", "--steps", "1"]) == 0
    assert cli.main(["generate", "x", "--steps", "1", "--num-outputs", "2"]) == 0
    assert capsys.readouterr().out.split() == ["out.png", "out-0.png", "out-1.png"]


def test_a_shortened_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It would mean another one as soon as there is one."""
    with pytest.raises(SystemExit):
        cli.main(["generate", "x", "--num-output", "2"])
    assert "--num-output" in capsys.readouterr().err


def test_models_info_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    assert "demo-schnell" in {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert cli.main(["models"]) == 0
    assert "demo-schnell" in capsys.readouterr().out
    assert cli.main(["info", "--json", "--model", "demo-schnell", "--device", "cpu", "--dtype", "float32"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["device"] == "cpu"
    assert info["model"]["parts"]["vae"]["dtype"] == "float32"
    assert cli.main(["info"]) == 0
    assert "hardware" in capsys.readouterr().out
    assert cli.main(["schema", "flux-schnell", "--openapi"]) == 0
    assert json.loads(capsys.readouterr().out)["openapi"] == "3.0.2"
    assert cli.main(["schema", "flux-schnell"]) == 0
    assert "num_inference_steps" in capsys.readouterr().out
    assert cli.main(["schema", "flux"]) == 2
    assert "flux-schnell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generate", "a star", "--step", "3"], "flux-engine generate: error: there is no option --step; did you mean"),
        (["generate", "a", "star"], "'star' is one word too many: a text with spaces stands in quotes"),
        (
            ["cog", "init", "flux-dev", "x", "--modle=y"],
            "flux-engine cog init: error: there is no option --modle=y; did",
        ),
        (["lora", "inspect", "a", "b"], "flux-engine lora inspect: error: 'b' is one word too many"),
    ],
)
def test_what_no_command_takes(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err

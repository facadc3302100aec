"""Small models under the published names, a predictor for every schema, and the pictures that they are sent.

Fixtures for every test module that says `pytestmark = pytest.mark.usefixtures("published")`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flux_models
import pytest
import sdxl_models
import torch
from conftest import randomise
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import flux_engine
from flux_engine import Predictor, addons, hub
from flux_engine.checkpoints import export
from flux_engine.engine import Engine
from flux_engine.models.unet_controlnet import UNetControlNet
from flux_engine.params import UNetControlNetParams
from flux_engine.replicate.schemas import find_schema
from flux_engine.specs import SPECS

MULTI = "sdxl-multi-controlnet-lora"
PHOTO = (1600, 900)
CONTROLNETS = {
    "sdxl-controlnet-canny": ["canny"],
    "sdxl-controlnet-depth-small": ["depth"],
    "sdxl-controlnet-openpose": ["pose"],
    "sdxl-controlnet-softedge": ["soft_edge", "lineart"],
    "sdxl-controlnet-qrcode-monster": ["illusion"],
}
FLUX = {
    "flux-fill-dev": "fill",
    "flux-canny-dev": "structure",
    "flux-depth-dev": "depth",
    "flux-kontext-dev": "reference",
}
SMALL = {
    spec.name: spec
    for spec in (
        *map(flux_models.spec_of, ("fill", "structure", "reference")),
        replace(flux_models.spec_of("structure"), name="small-depth", structure="depth"),
        sdxl_models.BASE,
        replace(sdxl_models.BASE, name="small-sdxl-turbo", guidance_scale=None),
        sdxl_models.REFINER,
    )
}


def photo(color: str = "green", size: tuple[int, int] = PHOTO, mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", size, "white")
    w, h = size
    draw = ImageDraw.Draw(image)
    draw.ellipse((w // 4, h // 4, w // 2, h // 2), fill=color)
    draw.rectangle((0, 3 * h // 4, w, h), fill=color)
    return image.convert(mode)


def hole(left: int = 400, size: tuple[int, int] = PHOTO) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, 100, left + 500, 800))
    return mask


def cut_out() -> Image.Image:
    image = photo(mode="RGBA")
    image.putalpha(Image.eval(hole(), lambda value: 255 - value))
    return image


def content(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def manifest(root: Path, name: str, spec: str, files: dict[str, Path], more: str = "") -> None:
    said = [f'spec = "{spec}"', 'description = "-"', 'licence = "-"', 'source = "-"', more]
    said += [f"[files.{json.dumps(part)}]\npath = {json.dumps(str(path))}" for part, path in files.items()]
    (root / "manifests" / f"{name}.toml").write_text("\n".join([*said, "[files]" if not files else ""]))


def parts(folder: Path) -> dict[str, Path]:
    """An exported folder as a manifest has it."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*")):
        part = path.parent.name
        if part in ("unet", "vae", "transformer"):
            found |= {part: path} if path.suffix == ".safetensors" else {}
        elif part != "scheduler":
            found[f"{part}/{path.name}"] = path
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Small models under the published names."""
    from test_redux import publish  # a module of tests is not to be imported before pytest has rewritten it

    root = tmp_path_factory.mktemp("weights")
    (root / "manifests").mkdir()
    demo = flux_engine.load("demo-dev", device="cpu", dtype="float32")
    for name, reads in FLUX.items():
        engine = flux_models.engine_of("structure" if reads == "depth" else reads, demo)
        files = parts(engine.export(root / name))
        manifest(root, name, f"small-{reads}", {"transformer": files["transformer"]}, 'base = "demo-dev"')
    for name, like in (("flux-schnell", "demo-schnell"), ("flux-dev", "demo-dev"), ("flux-krea-dev", "demo-dev")):
        manifest(root, name, like, {}, f'base = "{like}"')
    redux = publish(root, 64)
    redux["image_encoder/model.safetensors"] = redux.pop("image_encoder") / "model.safetensors"
    manifest(root, "flux-redux-dev", "flux-dev", redux, 'kind = "adapter"')
    for name, spec in (("sdxl", sdxl_models.BASE), ("sdxl-refiner", sdxl_models.REFINER)):
        files = parts(Engine(sdxl_models.family(spec)).export(root / name))
        manifest(root, name, spec.name, files, 'family = "sdxl"')
    for name, like in (("sdxl-lightning-4step", "small-sdxl"), ("sdxl-turbo", "small-sdxl-turbo")):
        manifest(root, name, like, {}, 'base = "sdxl"')
    drawn = torch.Generator().manual_seed(3)
    shapes = {"lora_A": (4, 64), "lora_B": (64, 4)}
    stem = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{stem}.{name}.weight": torch.randn(shape, generator=drawn) / 8 for name, shape in shapes.items()}
    save_file(lora, root / "lcm.safetensors")
    manifest(root, "sdxl-lcm-lora", "", {"lora": root / "lcm.safetensors"}, 'kind = "lora"\nfamily = "sdxl"')
    for seed, (name, kinds) in enumerate(CONTROLNETS.items(), start=7):
        net = UNetControlNet(UNetControlNetParams.of(sdxl_models.BASE.unet))
        randomise(net, seed)
        net.controlnet_cond_embedding.conv_out.weight.data.mul_(256)  # each SiLU before it makes less of a picture
        tensors = {key: value.contiguous() for key, value in export.unet_controlnet_tensors(net).items()}
        save_file(tensors, root / f"{name}.safetensors")
        files = {"controlnet": root / f"{name}.safetensors"}
        manifest(
            root, name, "small-sdxl", files, f'kind = "controlnet"\nfamily = "sdxl"\ncontrols = {json.dumps(kinds)}'
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "SPECS", {**SPECS, **SMALL})
        patch.setattr(addons, "SPECS", {**SPECS, **SMALL})
        patch.setenv("FLUX_ENGINE_WEIGHTS", str(root))
        patch.setenv("FLUX_ENGINE_CACHE", str(root / "ledger"))
        yield root


Speak = Callable[[str], Predictor]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def speak(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Speak:
    """One predictor for each schema, loaded once."""
    made: dict[str, Predictor] = {}

    def speak(schema: str) -> Predictor:
        if schema not in made:
            made[schema] = Predictor(
                schema,
                device="cpu",
                dtype="float32",
                safety=None,  # they draw noise, of which a checker may say anything
                output_dir=tmp_path_factory.mktemp("out"),
                say=lines.append,
            )
        return made[schema]

    return speak


def data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(content(image)).decode()


photo_content = data_uri(photo())
other_photo = data_uri(photo("red", mode="RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT))
mask_content = data_uri(hole())
cut_out_content = data_uri(cut_out())


def least(schema: str, **more: Any) -> dict[str, Any]:
    """The least that makes a picture, in few steps."""
    given: dict[str, Any] = {one.name: photo_content for one in find_schema(schema).inputs if one.required}
    if "prompt" in given:
        given["prompt"] = "a red circle"
    if schema == "sdxl-controlnet":
        given["image"] = photo_content
    if schema == "flux-fill-dev":
        given["mask"] = mask_content
    names = [one.name for one in find_schema(schema).inputs]
    given |= {"num_inference_steps": 4 if schema == "flux-kontext-dev" else 2, "seed": 5}
    given |= {"output_format": "png"} if "output_format" in names else {}
    return given | more

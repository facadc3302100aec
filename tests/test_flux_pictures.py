"""Requests with pictures on FLUX: whole requests against diffusers' pipelines, same weights, same noise, float32.

diffusers samples what its autoencoder encodes; here it is made to take the mean, as we do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import flux_models
import numpy as np
import pytest
import torch
from conftest import assert_the_same, latent_error
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import flux_engine
from flux_engine import Control
from flux_engine.engine import Engine
from flux_engine.errors import InvalidRequest, UnsupportedError
from flux_engine.families.flux import patchify

PROMPT = "a large red circle on a blue background"
SIZE = (192, 112)
STEPS = 6


@pytest.fixture(autouse=True)
def the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture(scope="module")
def dev() -> Engine:
    return flux_engine.load("demo-dev", device="cpu", dtype="float32")


def picture(size: tuple[int, int] = SIZE, color: str = "green") -> Image.Image:
    image = Image.new("RGB", size, "white")
    w, h = size
    draw = ImageDraw.Draw(image)
    draw.ellipse((w // 4, h // 4, w // 2, h // 2 + 8), fill=color)
    draw.rectangle((0, h - 24, w, h), fill=color)
    return image


def hole(size: tuple[int, int] = SIZE, left: int = 32) -> Image.Image:
    """A mask with edges on the grid of latents, which diffusers reads at one pixel of eight."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, 16, left + 64, 80))
    return mask


def run(engine: Engine, **changed: Any) -> torch.Tensor:
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": STEPS, "output_type": "latent"}
    return torch.stack(list(engine(**(asked | changed))))


def reference(pipe: Any, engine: Engine, **asked: Any) -> torch.Tensor:
    said: dict[str, Any] = {
        "prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": engine.spec.guidance_scale or 0.0,
        "generator": [torch.Generator().manual_seed(3)], "max_sequence_length": engine.spec.max_sequence_length,
        "output_type": "latent", "width": SIZE[0], "height": SIZE[1],
    }  # fmt: skip
    return pipe(**(said | asked)).images


def theirs(name: str, engine: Engine, folder: Path) -> Any:
    return flux_models.their_pipeline(getattr(diffusers, name), engine, folder / "model")


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.8])
def test_img2img_agrees_with_diffusers(dev: Engine, tmp_path: Path, strength: float) -> None:
    mine = run(dev, image=picture(), strength=strength)
    pipe = theirs("FluxImg2ImgPipeline", dev, tmp_path)
    assert latent_error(patchify(mine), reference(pipe, dev, image=picture(), strength=strength)) <= 1e-4
    for control in ({"image": Image.new("RGB", SIZE)}, {"strength": strength - 0.2}, {"seed": 4}):
        assert latent_error(run(dev, **({"image": picture(), "strength": strength} | control)), mine) >= 1e-2
    if strength > 0.5:  # few steps of a demo model change little else
        assert latent_error(run(dev, image=picture(), strength=strength, prompt="a star"), mine) >= 1e-2


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_agrees_with_diffusers(dev: Engine, tmp_path: Path, strength: float) -> None:
    asked: dict[str, Any] = {"image": picture(), "mask": hole(), "strength": strength}
    mine = run(dev, **asked)
    pipe = theirs("FluxInpaintPipeline", dev, tmp_path)
    said = reference(pipe, dev, image=picture(), mask_image=hole(), strength=strength)
    assert latent_error(patchify(mine), said) <= 1e-4
    for control in ({"image": picture(color="black")}, {"mask": hole(left=96)}, {"prompt": "a star"}, {"seed": 4}):
        assert latent_error(run(dev, **(asked | control)), mine) >= 1e-2


def test_fill_agrees_with_diffusers(dev: Engine, tmp_path: Path) -> None:
    fill = flux_models.engine_of("fill", dev)
    size: dict[str, Any] = {"width": SIZE[0], "height": SIZE[1]}
    asked: dict[str, Any] = {"image": picture(), "mask": hole(left=36)} | size  # to the pixel
    mine = run(fill, **asked)
    pipe = theirs("FluxFillPipeline", fill, tmp_path)
    said = reference(pipe, fill, image=picture(), mask_image=hole(left=36))
    assert latent_error(patchify(mine), said) <= 1e-4
    for control in ({"image": picture(color="black")}, {"mask": hole(left=37)}, {"prompt": "a star"}):
        assert latent_error(run(fill, **(asked | control)), mine) >= (1e-2 if "mask" not in control else 1e-3)
    assert latent_error(run(fill, **(asked | {"mask": hole(left=96)})), mine) >= 1e-2


def test_structure_agrees_with_diffusers(dev: Engine, tmp_path: Path) -> None:
    canny = flux_models.engine_of("structure", dev)
    edges = picture(color="black")
    asked: dict[str, Any] = {"control": [Control(kind="canny", image=edges, preprocess=False)]}
    asked |= {"width": SIZE[0], "height": SIZE[1]}
    mine = run(canny, **asked)
    said = reference(theirs("FluxControlPipeline", canny, tmp_path), canny, control_image=edges)
    assert latent_error(patchify(mine), said) <= 1e-4
    other = [Control(kind="canny", image=picture(), preprocess=False)]
    assert latent_error(run(canny, **(asked | {"control": other})), mine) >= 1e-2
    assert latent_error(run(canny, **(asked | {"prompt": "a star"})), mine) >= 1e-2


@pytest.mark.parametrize("size", [(256, 256), (208, 320)])
def test_reference_agrees_with_diffusers(dev: Engine, tmp_path: Path, size: tuple[int, int]) -> None:
    """A picture that already has one of the sizes that Kontext was taught, and another one drawn."""
    kontext = flux_models.engine_of("reference", dev)
    asked: dict[str, Any] = {"image": picture(size), "width": SIZE[0], "height": SIZE[1]}
    mine = run(kontext, **asked)
    pipe = theirs("FluxKontextPipeline", kontext, tmp_path)
    said = reference(pipe, kontext, image=picture(size), _auto_resize=False, max_area=SIZE[0] * SIZE[1])
    assert latent_error(patchify(mine), said) <= 1e-4
    assert latent_error(run(kontext, **(asked | {"image": picture(size, "black")})), mine) >= 1e-2
    assert latent_error(run(kontext, **(asked | {"prompt": "a star"})), mine) >= 1e-2


@pytest.mark.parametrize("reads", ["fill", "structure"])
def test_a_folder_tells_what_its_network_reads(dev: Engine, tmp_path: Path, reads: str) -> None:
    made = flux_models.engine_of(reads, dev)
    loaded = flux_engine.load(made.export(tmp_path / "model"), device="cpu", dtype="float32")
    assert loaded.spec.reads == reads
    control = Control(kind="canny", image=picture(), preprocess=False)
    asked: dict[str, Any] = {"image": picture(), "mask": hole()} if reads == "fill" else {"control": control}
    asked |= {"width": SIZE[0], "height": SIZE[1], "guidance_scale": 3.5}
    assert torch.equal(run(loaded, **asked), run(made, **asked))


def test_channels_that_no_model_reads_are_refused(dev: Engine, tmp_path: Path) -> None:
    made = flux_models.engine_of("structure", dev)
    net = made._pipeline.family.net
    net.img_in = torch.nn.Linear(100, net.params.hidden_size)
    save_file(net.state_dict(), tmp_path / "odd.safetensors")
    with pytest.raises(UnsupportedError, match="reads 100 channels"):
        flux_engine.load(tmp_path / "odd.safetensors", device="cpu")


def rounded_trip(engine: Engine, image: Image.Image) -> torch.Tensor:
    """A picture through the autoencoder, (3, H, W) in [0, 1]."""
    vae = engine._pipeline.family.vae
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        return ((vae.decode(vae.encode(x))[0] + 1) / 2).clamp(0, 1)


def test_strength_0_is_the_round_trip_and_1_is_text_to_image(dev: Engine) -> None:
    nothing = dev(PROMPT, image=picture(), strength=0.0, seed=3, output_type="pt")
    assert torch.allclose(nothing.image, rounded_trip(dev, picture()), atol=1e-5)
    size = {"width": SIZE[0], "height": SIZE[1]}
    assert torch.equal(run(dev, image=picture(), strength=1.0), run(dev, **size))


def test_a_black_mask_gives_the_picture_back_and_a_white_one_is_img2img(dev: Engine) -> None:
    black, white = (Image.new("L", SIZE, value) for value in (0, 255))
    kept = dev(PROMPT, image=picture(), mask=black, seed=3, num_inference_steps=2)
    assert np.array_equal(np.asarray(kept.image), np.asarray(picture()))
    encoded = dev(
        PROMPT, image=picture(), mask=black, seed=3, num_inference_steps=2, paste_back=False, output_type="pt"
    )
    assert torch.allclose(encoded.image, rounded_trip(dev, picture()), atol=1e-4)
    masked = run(dev, image=picture(), mask=white, strength=0.7)
    assert torch.equal(masked, run(dev, image=picture(), strength=0.7))


def test_paste_back_keeps_pixels_to_the_bit(dev: Engine) -> None:
    image, mask = picture(), hole(left=35)
    black = np.asarray(mask) == 0
    pasted = np.asarray(dev(PROMPT, image=image, mask=mask, seed=3, num_inference_steps=2).image)
    plain = np.asarray(dev(PROMPT, image=image, mask=mask, seed=3, num_inference_steps=2, paste_back=False).image)
    assert np.array_equal(pasted[black], np.asarray(image)[black])
    assert not np.array_equal(plain[black], np.asarray(image)[black])
    assert np.array_equal(pasted[~black], plain[~black])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", [{"strength": 0.6}, {"mask": hole()}], ids=["img2img", "inpaint"])
def test_a_batch_has_the_bits_of_single_requests(dtype: str, asked: dict[str, Any]) -> None:
    engine = flux_engine.load("demo-schnell", device="cpu", dtype=dtype)
    said: dict[str, Any] = {"image": picture(), "num_inference_steps": 2} | asked
    batch = run(engine, num_outputs=3, **said)
    singles = torch.cat([run(engine, **(said | {"seed": 3 + k})) for k in range(3)])
    assert_the_same(batch, singles, getattr(torch, dtype))


def test_what_a_model_cannot_do_without_is_asked_for(dev: Engine) -> None:
    fill, canny, kontext = (flux_models.engine_of(reads, dev) for reads in ("fill", "structure", "reference"))
    for engine, asked, field in (
        (fill, {}, "image"),
        (fill, {"image": picture()}, "mask"),
        (canny, {}, "control"),
        (canny, {"image": picture()}, "control"),
        (kontext, {}, "image"),
        (kontext, {"image": picture(), "mask": hole()}, "mask"),
        (dev, {"mask": hole()}, "mask"),
        (dev, {"strength": 0.5}, "strength"),
        (dev, {"image": picture(), "strength": 1.5}, "strength"),
        (dev, {"image": picture(), "strength": float("nan")}, "strength"),
        (dev, {"outpaint": (8, 8, 8, 8)}, "outpaint"),
        (dev, {"image": picture(), "outpaint": (0, 0, 0, 0)}, "outpaint"),
        (dev, {"image": picture(), "outpaint": (8, 8, 8, 8), "mask": hole()}, "mask"),
        (dev, {"image": picture(), "resize": "squeeze"}, "resize"),
        (dev, {"control": [Control(kind="canny", image=picture())]}, "control"),
        (dev, {"control": "canny"}, "control"),
        (dev, {"control": [{"kind": "canny", "picture": picture()}]}, "control"),
        (canny, {"control": [Control(kind="canny", image=picture(), scale=0.5)]}, "control"),
        (canny, {"control": [Control(kind="canny", image=picture(), preprocess="cany")]}, "control"),
        (dev, {"image_prompt": picture()}, "image_prompt"),
        (dev, {"image": picture(), "resize": "none", "width": 64, "height": 64}, "resize"),
        (dev, {"aspect_ratio": "match_input_image"}, "aspect_ratio"),
        (dev, {"image": Image.new("RGB", (2000, 20))}, "image"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            engine(PROMPT, **asked)
        assert caught.value.field == field, (asked, str(caught.value))

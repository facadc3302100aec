"""Requests with pictures on SDXL: whole requests against diffusers' pipelines, same weights, same noise, float32.

diffusers samples what its autoencoder encodes; here it is made to take the mean, as we do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sdxl_models
import torch
from conftest import latent_error
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image, ImageDraw

from flux_engine.engine import Engine
from flux_engine.schedulers import scheduler_config
from flux_engine.specs import SCHEDULERS

PROMPT = "a large red circle on a blue background"
NEGATIVE = "a small star, top left"
SIZE = (96, 64)
INPAINTING = replace(
    sdxl_models.BASE, name="small-inpainting", unet=replace(sdxl_models.BASE.unet, in_channels=9), reads="fill"
)


@pytest.fixture(autouse=True)
def the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(sdxl_models.family())


@pytest.fixture(scope="module")
def inpainting() -> Engine:
    family = sdxl_models.family(INPAINTING)
    with torch.no_grad():
        family.net.conv_in.weight.mul_(2)  # what is read beside the latent matters
    return Engine(family)


@pytest.fixture(scope="module")
def folder(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine.export(tmp_path_factory.mktemp("base") / "model")


def picture(color: str = "green") -> Image.Image:
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((24, 16, 56, 40), fill=color)
    draw.rectangle((0, 48, 96, 64), fill=color)
    return image


def hole(left: int = 16) -> Image.Image:
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (left, 8, left + 40, 48))
    return mask


def run(engine: Engine, **changed: Any) -> torch.Tensor:
    asked: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": 3, "guidance_scale": 4.0, "num_inference_steps": 6,
        "output_type": "latent",
    }  # fmt: skip
    return torch.stack(list(engine(**(asked | changed))))


def reference(kind: Any, folder: Path, engine: Engine, scheduler: str, **asked: Any) -> torch.Tensor:
    import diffusers

    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    config = scheduler_config(engine.spec.schedule, scheduler)
    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    said: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 4.0, "num_inference_steps": 6,
        "generator": [torch.Generator().manual_seed(3)], "output_type": "latent",
    }  # fmt: skip
    return pipe(**(said | asked)).images


KEPT = torch.ones(SIZE[1] // 8, SIZE[0] // 8, dtype=torch.bool)
KEPT[1:6, 2:7] = False
"""Positions that `hole()` keeps."""


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_img2img_agrees_with_diffusers(engine: Engine, folder: Path, scheduler: str) -> None:
    asked: dict[str, Any] = {"image": picture(), "strength": 0.6, "scheduler": scheduler}
    mine = run(engine, **asked)
    said = reference(
        StableDiffusionXLImg2ImgPipeline, folder, engine, scheduler, image=picture(), strength=0.6,
        original_size=SIZE[::-1], target_size=SIZE[::-1],
    )  # fmt: skip
    assert latent_error(mine, said) <= 1e-4
    for control in (
        {"image": Image.new("RGB", SIZE)},
        {"strength": 0.4},
        {"prompt": "a star"},
        {"negative_prompt": "a cross"},
        {"seed": 4},
    ):
        assert latent_error(run(engine, **(asked | control)), mine) >= 1e-2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_agrees_with_diffusers(engine: Engine, folder: Path, scheduler: str, strength: float) -> None:
    asked: dict[str, Any] = {"image": picture(), "mask": hole(), "strength": strength, "scheduler": scheduler}
    mine = run(engine, **asked)
    said = reference(
        StableDiffusionXLInpaintPipeline, folder, engine, scheduler, image=picture(), mask_image=hole(),
        strength=strength, width=SIZE[0], height=SIZE[1],
    )  # fmt: skip
    assert latent_error(mine, said) <= 1e-4
    for control in ({"image": Image.new("RGB", SIZE)}, {"mask": hole(40)}, {"prompt": "a star"}, {"seed": 4}):
        other, where = run(engine, **(asked | control)), KEPT if "image" in control else ~KEPT
        assert latent_error(other[..., where], mine[..., where]) >= 1e-2


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_network_that_fills_agrees_with_diffusers(inpainting: Engine, tmp_path: Path, strength: float) -> None:
    asked: dict[str, Any] = {"image": picture(), "mask": hole(), "strength": strength}
    mine = run(inpainting, **asked)
    said = reference(
        StableDiffusionXLInpaintPipeline, inpainting.export(tmp_path / "model"), inpainting, "K_EULER",
        image=picture(), mask_image=hole(), strength=strength, width=SIZE[0], height=SIZE[1],
    )  # fmt: skip
    assert latent_error(mine, said) <= 1e-4
    for control in ({"image": Image.new("RGB", SIZE)}, {"mask": hole(40)}, {"prompt": "a star"}, {"seed": 4}):
        assert latent_error(run(inpainting, **(asked | control)), mine) >= 1e-2


def test_strength_0_is_the_round_trip_and_1_is_text_to_image(engine: Engine) -> None:
    nothing = run(engine, image=picture(), strength=0.0)
    again = run(engine, image=picture(), strength=0.0, prompt="a star", seed=9)
    assert torch.equal(nothing, again)
    size = {"width": SIZE[0], "height": SIZE[1]}
    assert torch.equal(run(engine, image=picture(), strength=1.0), run(engine, **size))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_black_mask_gives_the_latent_back_and_a_white_one_is_img2img(engine: Engine, scheduler: str) -> None:
    black, white = (Image.new("L", SIZE, value) for value in (0, 255))
    asked: dict[str, Any] = {"image": picture(), "scheduler": scheduler}
    assert torch.equal(run(engine, mask=black, **asked), run(engine, strength=0.0, **asked))
    asked["strength"] = 0.7
    assert torch.equal(run(engine, mask=white, **asked), run(engine, **asked))


@pytest.mark.parametrize("mode", ["expert_ensemble_refiner", "base_image_refiner"])
def test_the_refiner_keeps_what_the_mask_keeps(engine: Engine, mode: str) -> None:
    refined = Engine(engine._pipeline.family.refined_by(sdxl_models.family(sdxl_models.REFINER)))
    asked: dict[str, Any] = {"image": picture(), "refine": mode, "num_inference_steps": 8}
    drawn = run(refined, strength=0.5, **asked)
    assert drawn.isfinite().all()
    assert latent_error(drawn, run(refined, strength=0.5, **(asked | {"refine": None}))) >= 1e-2
    masked = run(refined, mask=hole(), **asked)
    kept = run(refined, strength=0.0, **(asked | {"refine": None}))
    assert torch.equal(masked[..., KEPT], kept[..., KEPT])


@pytest.mark.parametrize("scheduler", ["K_EULER", "K_EULER_ANCESTRAL"])
@pytest.mark.parametrize("asked", [{"strength": 0.6}, {"mask": hole()}], ids=["img2img", "inpaint"])
def test_a_batch_is_its_singles(engine: Engine, asked: dict[str, Any], scheduler: str) -> None:
    said: dict[str, Any] = {"image": picture(), "scheduler": scheduler} | asked
    batch = run(engine, num_outputs=3, **said)
    singles = torch.cat([run(engine, **(said | {"seed": 3 + k})) for k in range(3)])
    assert latent_error(batch, singles) <= 1e-5


def test_a_walk_of_no_step_gives_every_picture(engine: Engine) -> None:
    """Strength 0 is the autoencoder's round trip, of each of several pictures."""
    asked = {"image": picture(), "strength": 0, "num_inference_steps": 2, "seed": 1}
    one = engine("x", **asked)
    three = engine("x", num_outputs=3, **asked)
    assert [each.tobytes() for each in three] == [one.image.tobytes()] * 3

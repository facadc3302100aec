"""SDXL: whole requests against diffusers' pipelines, on the same weights through our converters, float32."""

from __future__ import annotations

from typing import Any

import pytest
import sdxl_models
import torch
from conftest import latent_error
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from flux_engine.engine import Engine
from flux_engine.schedulers import scheduler_config
from flux_engine.specs import SCHEDULERS

PROMPT = "a large red circle on a blue background"
NEGATIVE = "a small star, top left"
SIZE = {"width": 96, "height": 64}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(sdxl_models.family())


@pytest.fixture(scope="module")
def refined() -> Engine:
    return Engine(sdxl_models.family().refined_by(sdxl_models.family(sdxl_models.REFINER)))


@pytest.fixture(scope="module")
def theirs(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    folder = engine.export(tmp_path_factory.mktemp("base") / "model")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def their_refiner(
    refined: Engine, theirs: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory
) -> StableDiffusionXLImg2ImgPipeline:
    folder = refined._pipeline.family.refiner.export(tmp_path_factory.mktemp("refiner") / "model")
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_scheduler(pipe: Any, name: str, engine: Engine) -> Any:
    import diffusers

    config = scheduler_config(engine.spec.schedule, name)
    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    return pipe


def generator(seed: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed)]


def run(engine: Engine, **changed: Any) -> torch.Tensor:
    asked = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": 3, "guidance_scale": 4.0, "output_type": "latent",
    } | SIZE  # fmt: skip
    return torch.stack(list(engine(**(asked | changed))))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_request_agrees_with_diffusers_for_every_scheduler(
    engine: Engine, theirs: StableDiffusionXLPipeline, scheduler: str
) -> None:
    mine = run(engine, scheduler=scheduler, num_inference_steps=5)
    with_scheduler(theirs, scheduler, engine)
    reference = theirs(
        PROMPT, negative_prompt=NEGATIVE, generator=generator(), guidance_scale=4.0, num_inference_steps=5,
        output_type="latent", **SIZE,
    ).images  # fmt: skip
    assert latent_error(mine, reference) <= 1e-4
    for control in (
        {"negative_prompt": "a blue background"},
        {"prompt": "a green cross"},
        {"guidance_scale": 1.0},
        {"original_size": (640, 640)},
        {"crop_top_left": (40, 0)},
        {"target_size": (32, 32)},
        {"seed": 4},
    ):
        assert latent_error(run(engine, **({"scheduler": scheduler, "num_inference_steps": 5} | control)), mine) >= 1e-2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", ["expert_ensemble_refiner", "base_image_refiner"])
def test_refiner_agrees_with_diffusers(
    refined: Engine,
    theirs: StableDiffusionXLPipeline,
    their_refiner: StableDiffusionXLImg2ImgPipeline,
    mode: str,
    scheduler: str,
) -> None:
    asked: dict[str, Any] = {"refine": mode, "scheduler": scheduler, "num_inference_steps": 6, "guidance_scale": 4.0}
    both: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    first, second = dict(both), dict(both)
    if mode == "expert_ensemble_refiner":
        asked["high_noise_frac"] = first["denoising_end"] = second["denoising_start"] = 0.6
    else:
        asked["refine_steps"] = second["num_inference_steps"] = 8
    mine = run(refined, **asked)
    drawn = generator()  # one for both, as the hosted model has it
    for pipe in (theirs, their_refiner):
        with_scheduler(pipe, scheduler, refined)
    latent = theirs(PROMPT, generator=drawn, output_type="latent", **first, **SIZE).images
    reference = their_refiner(
        PROMPT, image=latent, generator=drawn, original_size=(64, 96), target_size=(64, 96), output_type="latent",
        **second,
    ).images  # fmt: skip
    assert latent_error(mine, reference) <= 1e-4
    without = {name: asked[name] for name in ("scheduler", "num_inference_steps", "guidance_scale")}
    assert latent_error(run(refined, **without), mine) >= 1e-2
    assert latent_error(run(refined, **(asked | {"negative_prompt": "a blue background"})), mine) >= 1e-2


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_ensemble_may_leave_either_nothing_to_do(refined: Engine, fraction: float) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 4}
    mine = run(refined, refine="expert_ensemble_refiner", high_noise_frac=fraction, **asked)
    base = run(refined, **asked)
    assert torch.equal(mine, base) == (fraction == 1.0)
    assert mine.isfinite().all()

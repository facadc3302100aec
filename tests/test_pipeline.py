"""Whole requests against diffusers' FluxPipeline: same weights through our converters, same noise, float32."""

from __future__ import annotations

import pytest
import torch
from conftest import latent_error
from diffusers import FluxPipeline

import flux_engine
from flux_engine.engine import Engine
from flux_engine.families.base import generators_of
from flux_engine.families.flux import patchify


@pytest.fixture(scope="module", params=["demo-schnell", "demo-dev"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    ours = flux_engine.load(request.param, device="cpu", dtype="float32")
    folder = ours.export(tmp_path_factory.mktemp(request.param))
    theirs = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


STEPS = 4
CASES = {
    "one": {"prompt": "a large red circle on a blue background"},
    "several": {"prompt": ["a small star", "A yellow square, top left, gray background."], "num_outputs": 2},
    "negative prompt": {"prompt": "a green cross", "negative_prompt": "a blue background", "true_cfg_scale": 2.5},
    "not square": {"prompt": "a white diamond on a black background", "width": 192, "height": 112},
    "one step": {"prompt": "a cyan triangle", "num_inference_steps": 1},
    "guidance": {"prompt": "a pink circle at the bottom", "guidance_scale": 7.0},
}


@pytest.mark.parametrize("case", CASES)
def test_request_agrees_with_diffusers(pair: tuple[Engine, FluxPipeline], case: str) -> None:
    ours, theirs = pair
    asked = {"num_inference_steps": STEPS} | CASES[case]
    if "guidance_scale" in asked and ours.spec.guidance_scale is None:
        pytest.skip("takes no guidance")
    result = ours(**asked, seed=3, output_type="latent")
    job = result.job
    noise = ours._pipeline.family.noise(generators_of(job), *job.latent_size)
    reference = theirs(
        prompt=list(job.prompts),
        negative_prompt=[job.negative_prompt] * len(job.prompts) if job.true_cfg_scale > 1 else None,
        true_cfg_scale=job.true_cfg_scale,
        width=job.width,
        height=job.height,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale or 0.0,
        latents=patchify(noise),
        max_sequence_length=ours.spec.max_sequence_length,
        output_type="latent",
        return_dict=False,
    )[0]
    mine = patchify(torch.stack(list(result)))
    assert latent_error(mine, reference) <= 1e-4


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("prompt", {"prompt": "a small black square on a yellow background"}),
        ("negative prompt", {"negative_prompt": "a blue background"}),
        ("scale", {"negative_prompt": "", "true_cfg_scale": 3.0}),
        ("guidance", {"guidance_scale": 10.0}),
        ("seed", {"seed": 4}),
        ("steps", {"num_inference_steps": 3}),
    ],
)
def test_every_input_matters(pair: tuple[Engine, FluxPipeline], name: str, changed: dict[str, object]) -> None:
    """The negative control: a model that ignored an input would pass the comparison above."""
    ours, _ = pair
    if name == "guidance" and ours.spec.guidance_scale is None:
        pytest.skip("takes no guidance")
    base = {
        "prompt": "a large red circle on a blue background",
        "num_inference_steps": STEPS,
        "seed": 3,
        "output_type": "latent",
    }
    assert latent_error(ours(**(base | changed))[0], ours(**base)[0]) >= 1e-2

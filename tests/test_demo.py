"""The shipped model draws what it is asked for."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import flux_engine
from benchmarks import oracle, world
from benchmarks.prompts import PLAIN
from flux_engine.engine import Engine


@pytest.fixture(scope="module")
def schnell() -> Engine:
    """As a user gets it: default dtype, default steps."""
    return flux_engine.load("demo-schnell")


def test_the_prompts_of_the_readme(schnell: Engine) -> None:
    wrong: list[str] = []
    for prompt, scene in PLAIN:
        verdict = oracle.judge(schnell(prompt, seed=0).image, scene)
        if not all(verdict.values()):
            wrong.append(f"{prompt}: {[name for name, good in verdict.items() if not good]}")
    assert len(wrong) <= 2, wrong


def test_the_picture_of_the_demo_script_is_right(schnell: Engine) -> None:
    prompt, scene = PLAIN[0]
    assert prompt == "a large red circle on a blue background"
    assert all(oracle.judge(schnell(prompt, seed=0).image, scene).values())


def test_the_autoencoder_keeps_drawn_pictures(engine: Engine) -> None:
    """PSNR of a round trip, over scenes of every kind at both classes of size."""
    vae = engine._pipeline.family.vae
    rng = random.Random(11)
    psnr: list[float] = []
    for side in (256, 128) * 12:
        picture = world.draw(world.sample_scene(rng, marked=0.1, held_out=None), side, side, rng)
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            error = (vae.decode(vae.encode(x)).clamp(-1, 1) - x).square().mean()
        psnr.append(float(10 * torch.log10(4 / error)))
    assert np.mean(psnr) >= 28.0, psnr

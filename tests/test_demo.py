"""The shipped models draw what they are asked for, at every size, from few steps, and guidance guides them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import flux_engine
from benchmarks import adherence, oracle, world
from benchmarks.prompts import PROMPTS
from flux_engine.engine import Engine
from flux_engine.specs import MEGAPIXELS, PUBLISHED_SIZES


@pytest.fixture(scope="module")
def schnell() -> Engine:
    """As a user gets it: default dtype, default steps."""
    return flux_engine.load("demo-schnell")


@pytest.fixture(scope="module")
def dev() -> Engine:
    return flux_engine.load("demo-dev")


@pytest.mark.parametrize(("model", "megapixels"), [("schnell", "1"), ("schnell", "0.25"), ("dev", "0.25")])
def test_the_prompts_of_the_readme(model: str, megapixels: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(model)
    wrong: list[str] = []
    for prompt, scene in PROMPTS:
        verdict = oracle.judge(engine(prompt, seed=0, megapixels=megapixels).image, scene)
        if not all(verdict.values()):
            wrong.append(f"{prompt}: {[name for name, good in verdict.items() if not good]}")
    assert len(wrong) <= 3, wrong


def test_the_picture_of_the_demo_script_is_right(schnell: Engine) -> None:
    prompt, scene = PROMPTS[0]
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


@pytest.mark.full
@pytest.mark.parametrize(("steps", "share"), [(None, 0.90), (2, 0.80)])
def test_schnell_adheres(schnell: Engine, steps: int | None, share: float) -> None:
    report = adherence.measure(schnell, 400, 0, steps=steps)
    assert report.adherence >= share, report
    assert report.two_objects >= 0.70, report


@pytest.mark.full
def test_dev_adheres(dev: Engine) -> None:
    report = adherence.measure(dev, 400, 0)
    assert report.adherence >= 0.95, report
    assert report.two_objects >= 0.70, report


@pytest.mark.full
@pytest.mark.parametrize("model", ["schnell", "dev"])
def test_held_out_combinations_are_drawn_as_well(model: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(model)
    seen = adherence.measure(engine, 200, 1, things=1, megapixels="0.25")
    unseen = adherence.measure(engine, 200, 1, things=1, megapixels="0.25", held_out=True)
    assert unseen.adherence >= seen.adherence - 0.05, (seen, unseen)


@pytest.mark.full
@pytest.mark.parametrize("megapixels", MEGAPIXELS)
@pytest.mark.parametrize("ratio", PUBLISHED_SIZES)
def test_every_size_of_the_table(schnell: Engine, ratio: str, megapixels: str) -> None:
    report = adherence.measure(schnell, 50, 2, aspect_ratio=ratio, megapixels=megapixels)
    assert report.adherence >= 0.80, report


@pytest.mark.full
def test_more_guidance_adheres_more(dev: Engine) -> None:
    """Up to the default; beyond it there is nothing left to gain."""
    shares = [
        adherence.measure(dev, 60, 3, guidance=scale, megapixels="0.25").adherence for scale in (0.0, 0.5, 1.0, 3.5)
    ]
    assert shares[0] < 0.1 < shares[1], shares
    assert shares[1] < shares[2] <= shares[3] + 0.02, shares

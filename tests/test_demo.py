"""The shipped models draw what they are asked for."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import flux_engine
from benchmarks import adherence, oracle, world
from benchmarks.adherence import Report, from_captions
from benchmarks.prompts import PROMPTS
from flux_engine.engine import Engine
from flux_engine.specs import DEMO_DEV, DEMO_SDXL

SEED = 2024


@pytest.fixture(scope="module")
def schnell() -> Engine:
    """As a user gets it: default dtype, default steps."""
    return flux_engine.load("demo-schnell")


@pytest.fixture(scope="module")
def dev() -> Engine:
    """The same of the other."""
    return flux_engine.load("demo-dev")


def measured(
    engine: Engine, count: int, *, steps: int | None = None, guidance: float | None = None, **how: Any
) -> Report:
    """The adherence of a model; `pytest -rP` shows the figures."""
    report = adherence.measure(from_captions(engine, steps=steps, guidance=guidance), count, SEED, **how)
    print(adherence.table(report))  # noqa: T201
    return report


def share(value: float | None) -> float:
    """A share of a report, which has one."""
    assert value is not None
    return value


def test_the_prompts_of_the_readme(schnell: Engine) -> None:
    wrong: list[str] = []
    for prompt, scene in PROMPTS:
        verdict = oracle.judge(schnell(prompt, seed=0).image, scene)
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


@pytest.fixture(scope="module")
def by_schnell(schnell: Engine) -> Report:
    """What demo-schnell draws in its default steps."""
    return measured(schnell, 400, held_out=True)


@pytest.fixture(scope="module")
def by_dev(dev: Engine) -> Report:
    """What demo-dev draws in its own."""
    return measured(dev, 200, held_out=True)


@pytest.mark.full
def test_demo_schnell_draws_what_it_is_asked_for(by_schnell: Report) -> None:
    assert share(by_schnell.adherence) >= 0.90


@pytest.mark.full
def test_demo_dev_draws_what_it_is_asked_for(by_dev: Report) -> None:
    assert share(by_dev.adherence) >= 0.95


@pytest.mark.full
def test_demo_schnell_draws_in_two_steps(schnell: Engine) -> None:
    report = measured(schnell, 400, steps=2)
    assert share(report.adherence) >= 0.80


@pytest.mark.full
@pytest.mark.parametrize("name", ["by_schnell", "by_dev"])
def test_held_out_pairs_and_two_objects(name: str, request: pytest.FixtureRequest) -> None:
    report: Report = request.getfixturevalue(name)
    assert share(report.held_out) >= share(report.adherence) - 0.05
    assert share(report.with_things(2)) >= 0.70


@pytest.mark.full
@pytest.mark.parametrize("size", dict.fromkeys(adherence.all_sizes(DEMO_DEV)), ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_size_of_the_table(schnell: Engine, size: tuple[int, int]) -> None:
    report = measured(schnell, 100, sizes=[size])
    assert share(report.adherence) >= 0.80


@pytest.mark.full
def test_the_guidance_of_demo_dev_makes_it_follow_the_caption(dev: Engine) -> None:
    """Rising up to the default, from none at all."""
    shares = [share(measured(dev, 60, guidance=guidance, steps=14).adherence) for guidance in (0.0, 0.5, 1.0, 3.5)]
    assert shares[0] < 0.1 and shares[0] < shares[1] < shares[2] <= shares[3], shares


@pytest.fixture(scope="module")
def sdxl() -> Engine:
    return flux_engine.load("demo-sdxl")


@pytest.fixture(scope="module")
def by_sdxl(sdxl: Engine) -> Report:
    return measured(sdxl, 200)


@pytest.fixture(scope="module")
def by_turbo() -> Report:
    return measured(flux_engine.load("demo-sdxl-turbo"), 400)


@pytest.mark.full
def test_demo_sdxl_draws_what_it_is_asked_for(by_sdxl: Report) -> None:
    assert share(by_sdxl.adherence) >= 0.90


@pytest.mark.full
def test_demo_sdxl_turbo_draws_in_four_steps(by_turbo: Report) -> None:
    assert share(by_turbo.adherence) >= 0.85


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("model", "name"),
    [("demo-schnell", "by_schnell"), ("demo-dev", "by_dev"), ("demo-sdxl", "by_sdxl"), ("demo-sdxl-turbo", "by_turbo")],
)
def test_in_8_bits_they_draw_what_they_draw(model: str, name: str, scheme: str, request: pytest.FixtureRequest) -> None:
    """The same scenes from the same seeds."""
    whole = Report(tuple(request.getfixturevalue(name).asked[:100]))
    report = measured(flux_engine.load(model, quantization=scheme), len(whole.asked))
    print(f"{model} in full precision {whole.adherence}, in {scheme} {report.adherence}")  # noqa: T201
    assert abs(share(report.adherence) - share(whole.adherence)) <= 0.02


@pytest.mark.full
def test_every_size_of_demo_sdxl(sdxl: Engine) -> None:
    """`python -m benchmarks.adherence --model demo-sdxl --size all --count 50` tells more of each."""
    report = measured(sdxl, 20, sizes=list(dict.fromkeys(adherence.all_sizes(DEMO_SDXL))))
    assert share(report.adherence) >= 0.85
    assert min(map(share, report.sizes.values())) >= 0.70, report.sizes


@pytest.mark.full
def test_a_negative_prompt_takes_a_color_away(sdxl: Engine) -> None:
    """Of the colours that a prompt leaves open, the three that come most often come, taken together, a fifth as often
    where the negative prompt names each."""
    prompt, count = "a large circle on a white background", 30

    def colors(**asked: Any) -> list[str]:
        pictures = (sdxl(prompt, seed=seed, **asked).image for seed in range(count))
        return [found.color for picture in pictures for found in oracle.read(picture).objects[:1]]

    plain = colors()
    often = sorted({color for color in plain if color}, key=plain.count, reverse=True)[:3]
    left = {color: colors(negative_prompt=f"a large {color} circle").count(color) for color in often}
    print({color: (plain.count(color), left[color]) for color in often})  # noqa: T201
    assert sum(left.values()) * 5 <= sum(map(plain.count, often))

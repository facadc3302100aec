"""What pictures that come with a request do to the shipped models, read back by the oracle."""

from __future__ import annotations

import pytest

import flux_engine
from benchmarks import conditioned
from flux_engine.engine import Engine

SEED = 2024


@pytest.fixture(scope="module", params=["demo-schnell", "demo-sdxl"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return flux_engine.load(request.param, controlnets=["canny"])


def outcomes(engine: Engine, task: str, count: int = 100, *, plain: bool = False) -> list[conditioned.Outcome]:
    made = conditioned.measure(engine, task, count, SEED, plain=plain)
    words = (task, "plain" if plain else "", engine.spec.name, conditioned.share(made), conditioned.mean(made))
    print(*words)  # noqa: T201
    return made


@pytest.mark.parametrize("model", ["demo-schnell", "demo-fill"])
def test_a_hole_is_filled_with_what_is_asked_for(model: str) -> None:
    assert conditioned.share(outcomes(flux_engine.load(model), "repaint", 6)) >= 5 / 6


@pytest.mark.parametrize("model", ["demo-schnell", "demo-sdxl"])
def test_edges_say_where_an_object_is(model: str) -> None:
    engine = flux_engine.load(model, controlnets=["canny"])
    assert conditioned.share(outcomes(engine, "canny", 4)) >= 3 / 4
    assert conditioned.share(outcomes(engine, "canny", 4, plain=True)) <= 2 / 4


@pytest.mark.full
def test_the_repainted_object_is_the_one_asked_for(engine: Engine) -> None:
    assert conditioned.share(outcomes(engine, "repaint")) >= 0.80


@pytest.mark.full
def test_what_the_mask_keeps_is_as_the_autoencoder_gives_it(engine: Engine) -> None:
    """To a step of eight bits; see `conditioned.keep`."""
    figures = conditioned.mean(outcomes(engine, "keep"))
    assert figures["kept"] <= figures["autoencoder"] + conditioned.STEP


@pytest.mark.full
def test_outpainting_keeps_the_picture_and_continues_its_background() -> None:
    assert conditioned.share(outcomes(flux_engine.load("demo-fill"), "outpaint")) >= 0.80


@pytest.mark.full
def test_edges_are_covered_by_the_object_that_is_asked_for(engine: Engine) -> None:
    assert conditioned.share(outcomes(engine, "canny")) >= 0.80
    assert conditioned.share(outcomes(engine, "canny", plain=True)) <= 0.20


@pytest.mark.full
def test_img2img_departs_further_the_stronger_it_is(engine: Engine) -> None:
    made = outcomes(engine, "depart")
    figures = list(conditioned.mean(made).values())
    assert figures == sorted(figures)
    assert conditioned.share(made) >= 0.95

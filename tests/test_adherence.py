"""The adherence benchmark counts right: with an engine that draws what is said, and with one that draws nothing."""

from __future__ import annotations

import random
from itertools import islice
from types import SimpleNamespace
from typing import Any

from PIL import Image

from benchmarks import adherence, world

COUNT, SEED = 6, 5
SCENES = {
    caption: scene
    for held_out in (False, True)
    for scene, caption in islice(adherence.scenes(SEED, held_out=held_out), COUNT)
}


def perfect(caption: str, *, seed: int, width: int = 128, height: int = 128, **_: Any) -> SimpleNamespace:
    """Looks up the scene that a caption means."""
    return SimpleNamespace(image=world.draw(SCENES[caption], width, height, random.Random(seed)))


def blank(_: str, **fields: Any) -> SimpleNamespace:
    return SimpleNamespace(image=Image.new("RGB", (64, 64), "white"))


def test_a_perfect_engine_is_right_everywhere() -> None:
    report = adherence.measure(perfect, COUNT, SEED, sizes=[(128, 128), (192, 80)], held_out=True)
    assert len(report.drawings) == 4 * COUNT and len(report.asked) == 2 * COUNT
    assert report.adherence == report.held_out == report.with_things(1) == 1.0
    assert report.sizes == {"128x128": 1.0, "192x80": 1.0}
    assert "everything" in adherence.table(report)
    assert adherence.sheet(report.drawings).width > 0


def test_an_engine_that_draws_nothing_is_right_nowhere() -> None:
    report = adherence.measure(blank, COUNT, SEED)
    assert report.adherence == 0.0 and report.held_out is None
    assert not any(report.attributes["shape"])
    assert len(report.attributes["count"]) == COUNT


def test_the_same_seed_asks_for_the_same() -> None:
    few, many = (list(islice(adherence.scenes(SEED), count)) for count in (3, 6))
    assert many[:3] == few
    assert list(islice(adherence.scenes(SEED + 1), 3)) != few
    both = list(islice(adherence.scenes(SEED), 40))
    single = [asked for asked in both if len(asked[0].things) == 1]
    assert list(islice(adherence.scenes(SEED, things=1), len(single))) == single
    assert all(
        (scene.things[0].shape, scene.things[0].color) in world.HELD_OUT
        for scene, _ in islice(adherence.scenes(SEED, held_out=True), 20)
    )

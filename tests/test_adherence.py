"""The adherence benchmark counts right: drawings of what is said, and drawings of nothing; and asks the model."""

from __future__ import annotations

import random
from itertools import islice

from PIL import Image

from benchmarks import adherence, oracle, world
from flux_engine.engine import Engine

COUNT, SEED = 6, 5


def perfect(scene: world.Scene, _: str, seed: int, size: adherence.Size | None) -> Image.Image:
    return world.draw(scene, *(size or (128, 128)), random.Random(seed))


def blank(*_: object) -> Image.Image:
    return Image.new("RGB", (64, 64), "white")


def test_perfect_drawings_are_right_everywhere() -> None:
    report = adherence.measure(perfect, COUNT, SEED, sizes=[(128, 128), (192, 80)], held_out=True)
    assert len(report.drawings) == 4 * COUNT and len(report.asked) == 2 * COUNT
    assert report.adherence == report.held_out == report.with_things(1) == 1.0
    assert report.sizes == {"128x128": 1.0, "192x80": 1.0}
    assert "everything" in adherence.table(report)
    assert adherence.sheet(report.drawings).width > 0


def test_blank_pictures_are_right_nowhere() -> None:
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


def test_a_model_is_asked_for_the_caption(engine: Engine) -> None:
    draw = adherence.from_captions(engine, steps=2)
    scene, caption = next(adherence.scenes(SEED))
    picture = draw(scene, caption, 3, (192, 80))
    assert picture == engine(caption, seed=3, num_inference_steps=2, width=192, height=80).image


def test_the_autoencoder_alone_draws_the_scene(engine: Engine) -> None:
    draw = adherence.through_autoencoder(engine)
    for scene, caption in islice(adherence.scenes(SEED), 4):
        assert all(oracle.judge(draw(scene, caption, 0, None), scene).values())

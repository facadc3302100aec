"""The shipped model draws what it is asked for, and the oracle that says so can be trusted."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest

import flux_engine
from benchmarks import oracle, world
from benchmarks.prompts import PROMPTS


def test_oracle_reads_drawn_pictures() -> None:
    rng = random.Random(1)
    right = 0
    for _ in range(150):
        scene = world.sample_scene(rng)
        width, height = rng.choice(((128, 128), (256, 256), (336, 192), (176, 256)))
        right += all(oracle.judge(world.draw(scene, width, height, rng), scene).values())
    assert right >= 149


@pytest.mark.parametrize("attribute", [field.name for field in fields(world.Scene)])
def test_oracle_sees_one_changed_attribute(attribute: str) -> None:
    rng = random.Random(2)
    noticed = 0
    for _ in range(40):
        scene = world.sample_scene(rng)
        changed = scene
        while getattr(changed, attribute) == getattr(scene, attribute) or changed.color == changed.background:
            changed = replace(scene, **{attribute: getattr(world.sample_scene(rng), attribute)})
        verdict = oracle.judge(world.draw(changed, 256, 256, rng), scene)
        noticed += not verdict[attribute]
    assert noticed == 40


def test_oracle_reads_nothing_where_there_is_nothing() -> None:
    from PIL import Image

    assert oracle.read(Image.new("RGB", (64, 64), (30, 70, 210))) == oracle.NOTHING


def test_the_demo_draws_what_is_asked() -> None:
    """As a user gets it: default dtype, default steps and size, seed 0."""
    engine = flux_engine.load("demo-schnell")
    wrong: list[str] = []
    for prompt, scene in PROMPTS:
        verdict = oracle.judge(engine(prompt, seed=0).image, scene)
        if not all(verdict.values()):
            wrong.append(f"{prompt}: {[name for name, good in verdict.items() if not good]}")
    assert len(PROMPTS) == 20
    assert len(wrong) <= 2, wrong


def test_the_picture_of_the_demo_script_is_right() -> None:
    engine = flux_engine.load("demo-schnell")
    prompt, scene = PROMPTS[0]
    assert prompt == "a large red circle on a blue background"
    assert all(oracle.judge(engine(prompt, seed=0).image, scene).values())

"""The LoRAs that ship: what they taught, under either kind of names, and how that is measured."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image, ImageFilter

import flux_engine
from benchmarks import oracle, taught, world
from benchmarks.world import Ground, Scene, Thing
from flux_engine import LoRA, hub
from flux_engine.engine import Engine

NAMES = {"demo-dev-zorblin": "demo-dev", "demo-dev-haze": "demo-dev", "demo-sdxl-haze": "demo-sdxl",
         "demo-sdxl-lcm": "demo-sdxl"}  # fmt: skip


@pytest.fixture(scope="module")
def dev() -> Engine:
    return flux_engine.load("demo-dev", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def sdxl() -> Engine:
    return flux_engine.load("demo-sdxl", device="cpu", dtype="float32")


def zorblins(count: int) -> list[tuple[Scene, Image.Image]]:
    rng = random.Random(3)
    made: list[tuple[Scene, Image.Image]] = []
    while len(made) < count:
        scene = world.sample_scene(rng)
        scene = replace(scene, things=(replace(scene.things[0], shape=world.TAUGHT_SHAPE), *scene.things[1:]))
        made.append((scene, world.draw(scene, 256, 256, rng)))
    return made


def test_the_oracle_reads_what_is_taught_and_only_where_it_may() -> None:
    for scene, picture in zorblins(60):
        blurred = picture.filter(ImageFilter.GaussianBlur(1.5))
        assert all(oracle.judge(blurred, scene, also=taught.TAUGHT).values()), scene
        assert not oracle.judge(blurred, scene)["shape"]
    rng = random.Random(4)
    for _ in range(60):  # and none of the world's shapes is taken for it
        scene = world.sample_scene(rng)
        found = oracle.read(world.draw(scene, 256, 256, rng), also=taught.TAUGHT)
        assert world.TAUGHT_SHAPE not in {each.shape for each in found.objects}


def test_haze_is_measured_and_taken_off() -> None:
    rng = random.Random(5)
    scenes = [world.sample_scene(rng) for _ in range(20)]
    plain = [world.draw(scene, 128, 128, rng) for scene in scenes]
    for amount in (0.0, 0.5, 1.0):
        hazy = [world.veil(picture, amount * world.VEIL) for picture in plain]
        assert taught.haze(hazy, plain) == pytest.approx(amount, abs=0.01)
        clear = taught.without_haze(hazy, amount)
        assert all(all(oracle.judge(p, s).values()) for p, s in zip(clear, scenes, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_either_kind_of_names_gives_the_same_weights(name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(NAMES[name].removeprefix("demo-"))
    net: Any = engine._pipeline.family.net
    base = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    found: list[dict[str, torch.Tensor]] = []
    for path in (name, taught.file_of(name), taught.file_of(name, "-kohya")):
        (prepared,) = engine.lora.set([LoRA(path, mode=None)])
        assert not prepared.unknown
        found.append({key: tensor.clone() for key, tensor in net.state_dict().items()})
    engine.lora.clear()
    assert all(torch.equal(tensor, base[key]) for key, tensor in net.state_dict().items())
    changed = [key for key, tensor in found[0].items() if not torch.equal(tensor, base[key])]
    assert len(changed) > 20
    for key in base:
        assert torch.equal(found[0][key], found[1][key])
        assert torch.allclose(found[0][key], found[2][key], rtol=1e-6, atol=1e-6), key


def test_they_are_listed_and_small() -> None:
    listed = hub.manifests()
    assert all(listed[name].kind == "lora" and NAMES[name] in listed[name].description for name in NAMES)
    assert sum(path.stat().st_size for path in taught.FOLDER.iterdir()) < 6_500_000


def test_a_new_word(dev: Engine) -> None:
    scene = Scene((Thing("zorblin", "red"),), Ground("plain", "blue"))
    asked = "a red zorblin on a blue background"
    verdicts: list[bool] = []
    for loras in ([], ["demo-dev-zorblin"]):
        picture = dev(asked, seed=1, num_inference_steps=8, loras=loras).image
        verdicts.append(all(oracle.judge(picture, scene, also=taught.TAUGHT).values()))
    assert verdicts == [False, True]


def test_a_style_at_its_scale(dev: Engine) -> None:
    asked = taught.of_the_world(4, 7)
    fields: dict[str, Any] = {"num_inference_steps": 8, "megapixels": "0.25"}
    plain = taught.draw(dev, asked, **fields)
    amounts = [
        taught.haze(taught.draw(dev, asked, **fields, loras=[LoRA("demo-dev-haze", scale)]), plain)
        for scale in (0.0, 0.5, 1.0)
    ]
    assert amounts[0] == 0
    assert 0.2 < amounts[1] < 0.8 < amounts[2] < 1.3


@pytest.mark.full
def test_the_new_word_in_every_precision() -> None:
    """Merged at scale 1, without a factor for 8 bits; and beside the weights."""
    shares = taught.word(100, 2024)
    assert shares["without"] <= 0.1
    assert min(share for name, share in shares.items() if name != "without") >= 0.85, shares


@pytest.mark.full
@pytest.mark.parametrize("model", ["demo-dev", "demo-sdxl"])
def test_the_style(model: str) -> None:
    found = taught.style(model, 100, 2024, num_inference_steps=8 if model == "demo-dev" else 25)
    assert found["haze at 0"] == 0
    assert 0.3 <= found["haze at 0.5"] / found["haze at 1"] <= 0.7, found
    assert 0.7 <= found["haze at 1"] <= 1.3, found


@pytest.mark.full
def test_few_steps_and_a_second_lora_beside() -> None:
    found = taught.lcm(100, 2024)
    assert found["with"] >= 0.85, found
    assert found["haze beside it"] >= 0.7, found

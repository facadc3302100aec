"""Random inputs of every schema: right ones resolve, and are drawn as they resolve; wrong ones are refused unloaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from published_models import Speak, cut_out, data_uri, hole, photo

from flux_engine import InvalidRequest, Predictor, preprocess
from flux_engine.predictor import predictor as module
from flux_engine.replicate.schema import Input, InvalidInput, Schema
from flux_engine.replicate.schemas import AS_OF, SCHEMAS

pytestmark = pytest.mark.usefixtures("published")
ALL = SCHEMAS | AS_OF
UNLIKE = list({schema.inputs: name for name, schema in reversed(ALL.items())}.values())[::-1]
"""One of those that have the same inputs."""
each = pytest.mark.parametrize("name", UNLIKE)
RESOLVED, DRAWN, WRONG = 500, 20, 2_000
SIZES = [(64, 64), (90, 50), (48, 80)]
PICTURES = [data_uri(photo(size=size)) for size in SIZES] + [data_uri(photo(size=(60, 60), mode="P"))]
MASKS = [data_uri(hole(10, (100, 100)).resize(size)) for size in SIZES]
HOLES = [data_uri(cut_out().resize(size)) for size in SIZES]
LORAS = ["owner/name", "https://huggingface.co/owner/name/lora.safetensors", "https://example.com/a/lora.safetensors"]
PROMPTS = [
    "a red circle", "", " ", "x" * 3234, "ein grüner Stern ✶", "line\nbreak\ttab", "null\x00byte", "🟦" * 90, "(a:1.3)",
]  # fmt: skip
LETTERS = "abcdefghijklmnop qrstuvwxyz äß漢字🙂0123456789.,:;()[]{}<>%$'\"\\"
NOT_MADE = {"openpose"}
"""Control pictures that cannot be made here, which is said."""
COSTLY = {"depth_leres", "depth_midas", "soft_edge_hed", "soft_edge_pidi"}
"""Those that take seconds, or whose networks would be fetched."""


def prompt(rng: random.Random) -> str:
    return rng.choice(PROMPTS) if rng.random() < 0.5 else "".join(rng.choices(LETTERS, k=rng.randrange(60)))


def value_of(one: Input, rng: random.Random, cheap: bool) -> Any:
    """Something that the input takes."""
    if one.choices:
        return rng.choice([c for c in one.choices if c not in NOT_MADE and not (cheap and c in COSTLY)])
    match one.type:
        case "uri":
            return rng.choice(MASKS if one.name == "mask" else PICTURES)
        case "boolean":
            return rng.choice([True, False, "true", "off"])
        case "secret":
            return rng.choice(["token", ""])
        case "integer" if one.ge is not None and one.le is not None:
            number = rng.choice([int(one.ge), int(one.le), rng.randint(int(one.ge), int(one.le))])
            return rng.choice([number, str(number), float(number)])
        case "integer" if one.name in ("width", "height"):
            return rng.randint(256, 1280)
        case "integer":
            return rng.choice([0, -1, 42, "42", rng.randint(-(2**70), 2**70)])
        case "number":
            assert one.ge is not None and one.le is not None
            return rng.choice([one.ge, one.le, rng.uniform(one.ge, one.le), str(one.le)])
        case _ if one.name in ("prompt", "negative_prompt"):
            return prompt(rng)
        case _:
            return "" if cheap else rng.choice(LORAS)


def right(schema: Schema, rng: random.Random, *, cheap: bool = False) -> dict[str, Any]:
    """Inputs that the schema takes and that go together. `cheap` for those that are drawn: few steps, small sizes."""
    chosen: dict[str, Any] = {}
    for one in schema.inputs:
        if one.required or rng.random() < 0.5:
            chosen[one.name] = None if one.optional and rng.random() < 0.2 else value_of(one, rng, cheap)
    chosen |= dict.fromkeys(schema.agreements, True)
    for name in schema.needs:
        if chosen.get(name) is None:
            chosen[name] = rng.choice(MASKS if name == "mask" else PICTURES)
    if chosen.get("aspect_ratio") == "custom":
        chosen |= {"width": rng.randint(256, 1280), "height": rng.randint(256, 1280)}
    if chosen.get("refine_steps") is not None:
        chosen["refine_steps"] = rng.choice([0, 4, 20])
    for steering in schema.steering:
        if steering.chosen and chosen.get(steering.chosen, "none") != "none":
            chosen[steering.image] = rng.choice(PICTURES)
        if {"start", "end"} <= steering.settings.keys():
            first, last = sorted((rng.random(), rng.random()))
            chosen |= {steering.settings["start"]: first, steering.settings["end"]: last}
    if schema.sizing and (said := chosen.get(schema.sizing.chosen)) in schema.sizing.images:
        chosen[schema.sizing.images[said]] = rng.choice(PICTURES)
    if cheap:
        chosen.pop(schema.sizing.chosen if schema.sizing else "", None)
        least = {one.name: max(2, int(one.ge or 1)) for one in schema.inputs if one.name == "num_inference_steps"}
        chosen |= {name: rng.randint(low, 4) for name, low in least.items()}
        chosen |= {one.name: "0.25" for one in schema.inputs if one.name == "megapixels"}
        chosen |= {name: 384 for name in ("width", "height") if chosen.get(name) is not None}
        chosen |= {"num_outputs": rng.randint(1, 2)} if "num_outputs" in chosen else {}
    if chosen.get("refine") == "base_image_refiner":
        chosen["refine_steps"] = 4
    return chosen


def times(count: int) -> Callable[[Any], Any]:
    """So many examples, the same in every run."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    how = settings(max_examples=count, deadline=None, database=None, suppress_health_check=checks)
    return lambda test: seed(20251)(how(test))


@each
def test_right_inputs_resolve(speak: Speak, name: str) -> None:
    predictor = speak(name)
    seen: set[str] = set()

    @times(RESOLVED)
    @given(st.randoms(use_true_random=True))
    def check(rng: random.Random) -> None:
        inputs = right(predictor.schema, rng)
        resolved = predictor.resolve(inputs)
        assert resolved["num_outputs"] == int(inputs.get("num_outputs", 1)) == len(resolved["seeds"])
        assert resolved["width"] >= 32 and resolved["height"] >= 32
        assert resolved["unread"] == []
        for one in predictor.schema.inputs:
            if inputs.get(one.name) is None and one.name != "seed":
                assert resolved["inputs"].get(one.name) == one.default
        seen.update(one for one in inputs if inputs[one] is not None)

    check()
    assert seen == {one.name for one in predictor.schema.inputs}  # nothing is left untried


@each
def test_right_inputs_are_drawn_as_they_resolve(speak: Speak, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = replace(preprocess.PREPROCESSORS["depth"], run=lambda picture, *_: picture)  # its network would be fetched
    monkeypatch.setattr(preprocess, "PREPROCESSORS", {**preprocess.PREPROCESSORS, "depth": depth})
    predictor = speak(name)
    made: list[Path] = []

    @times(DRAWN)
    @given(st.randoms(use_true_random=True))
    def check(rng: random.Random) -> None:
        inputs = right(predictor.schema, rng, cheap=True) | {"seed": 5}
        resolved = predictor.resolve(inputs)
        paths = predictor.predict(**inputs)
        files = [paths] if isinstance(paths, Path) else paths
        files = [path for path in files if not path.name.startswith("control-")]
        assert [path.name for path in files] == resolved["files"]
        for path in files:
            with Image.open(path) as picture:
                kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[path.suffix[1:]]
                assert (picture.format, picture.size) == (kind, (resolved["width"], resolved["height"]))
                picture.load()
        made.extend(files)

    check()
    assert len(made) >= DRAWN


TYPES_REFUSED: dict[str, list[Any]] = {
    "string": [3, None, True, ["x"], {"a": 1}, 1.5],
    "secret": [3, True, ["x"], {}],
    "integer": ["x", "4.5", "", 1.5, True, [1], {}, float("nan"), float("inf"), "1e3"],
    "number": ["x", "", True, [1.0], {}, float("nan"), "inf", float("-inf"), 10**400],
    "boolean": ["maybe", "", 2, 0.5, [True], {}, "tru"],
    "uri": ["", " ", 3, True, ["x"], {}, 1.5],
}
PICTURES_REFUSED = [
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1/x.png",
    "http://[::1]/x.png",
    "http://169.254.169.254/latest/meta-data",
    "https://user:secret@localhost/x.png",
    "ftp://example.com/x.png",
    "data:image/png;base64,AAAA",
    "data:image/png;base64",
    "data:image/png;base64,%%%",
    PICTURES[0][: len(PICTURES[0]) // 2],
    "A" * 200,
]
"""Texts that lead to no picture; none of them is fetched from anywhere."""


def wrong(schema: Schema, rng: random.Random) -> tuple[dict[str, Any], str]:
    """Inputs with one thing wrong, and the input that it is about."""
    inputs: dict[str, Any] = {"prompt": "x"} if any(one.name == "prompt" for one in schema.inputs) else {}
    for one in schema.inputs:
        if (one.required and one.type == "uri") or one.name in schema.needs:
            inputs[one.name] = PICTURES[0]
    inputs |= dict.fromkeys(schema.agreements, True)
    one = rng.choice(schema.inputs)
    ways = ["type", "unknown", "null"]
    ways += ["missing"] if one.required else []
    ways += ["limits"] * 2 if one.ge is not None else []
    ways += ["choice"] * 2 if one.choices else []
    ways += ["picture"] * 3 if one.type == "uri" and (one.field or one.required) and one.name != "mask" else []
    match rng.choice(ways):
        case "unknown":
            name = rng.choice([one.name + "_", one.name.upper(), "", "__class__", "self", "cancel_", "präfix"])
            return inputs | {name: 1}, name
        case "missing":
            inputs.pop(one.name)
        case "null" if not one.optional:
            inputs[one.name] = None
        case "limits":
            low, high = float(one.ge or 0), float(one.le or 0)
            inputs[one.name] = rng.choice([low - 1, high + 1, low - 10**9, high * 10 + 1, -1e300, 1e300])
        case "choice":
            inputs[one.name] = rng.choice(["", "1:2", " 1:1", one.choices[0] + " ", "webp,png", "\0"])
        case "picture":
            inputs[one.name] = rng.choice(PICTURES_REFUSED)
        case _:
            inputs[one.name] = rng.choice([v for v in TYPES_REFUSED[one.type] if v is not None or not one.optional])
    return inputs, one.name


def test_wrong_inputs_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded for inputs that are wrong")

    monkeypatch.setattr(module, "load", load)
    predictors = [Predictor(name, device="cpu", dtype="float32", say=lambda line: None) for name in ALL]
    rng = random.Random(7)
    for index in range(WRONG):
        predictor = predictors[index % len(predictors)]
        inputs, name = wrong(predictor.schema, rng)
        with pytest.raises(InvalidRequest) as caught:
            predictor.predict(**inputs)
        if not str(inputs.get(name, "")).startswith("http"):  # of a link nothing is known that is not fetched
            with pytest.raises(InvalidRequest) as validated:
                predictor.resolve(inputs)
            assert str(validated.value) == str(caught.value)
        assert isinstance(caught.value, InvalidInput), (inputs, caught.value)
        assert name in [problem["loc"][-1] for problem in caught.value.detail], (inputs, caught.value.detail)
        assert len(str(caught.value)) < 3_000


def test_long_prompts(speak: Speak) -> None:
    """A megabyte is refused, and of less the text encoders read what they read."""
    predictor, asked = speak("flux-schnell"), {"seed": 1, "num_inference_steps": 1, "megapixels": "0.25"}
    with pytest.raises(InvalidInput, match="at most 100,000 are read"):
        predictor.predict(prompt="red circle " * 95_000, **asked)
    paths = predictor.predict(prompt="red circle " * 9_000, **asked)
    assert isinstance(paths, list)
    with Image.open(paths[0]) as picture:
        assert picture.size == (128, 128)

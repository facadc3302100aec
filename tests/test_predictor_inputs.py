"""Random inputs of every schema: right ones resolve, and are drawn as they resolve; wrong ones are refused unloaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image
from published_models import Speak, cut_out, data_uri, hole, photo

from flux_engine import InvalidRequest, Predictor
from flux_engine.predictor import predictor as module
from flux_engine.replicate.schema import Input, InvalidInput, Schema
from flux_engine.replicate.schemas import AS_OF, SCHEMAS

pytestmark = pytest.mark.usefixtures("published")
ALL = SCHEMAS | AS_OF
each = pytest.mark.parametrize("name", list(ALL))
RESOLVED, DRAWN, WRONG = 500, 20, 2_000
SIZES = [(64, 64), (90, 50), (48, 80)]
PICTURES = [data_uri(photo(size=size)) for size in SIZES] + [data_uri(photo(size=(60, 60), mode="P"))]
MASKS = [data_uri(hole(10, (100, 100)).resize(size)) for size in SIZES]
HOLES = [data_uri(cut_out().resize(size)) for size in SIZES]
LORAS = ["owner/name", "https://huggingface.co/owner/name/lora.safetensors", "https://example.com/a/lora.safetensors"]
PROMPTS = st.one_of(st.text(max_size=60), st.sampled_from(["a red circle", "x" * 3234, "ein grüner Stern ✶", ""]))
SIDES = st.integers(256, 1280)


def value_of(one: Input, draw_loras: bool) -> SearchStrategy[Any]:
    """What the input takes."""
    if one.choices:
        return st.sampled_from(one.choices)
    match one.type:
        case "uri":
            return st.sampled_from(MASKS if one.name == "mask" else PICTURES)
        case "boolean":
            return st.booleans()
        case "secret":
            return st.sampled_from(["token", ""])
        case "integer":
            if one.name in ("width", "height"):
                return SIDES if one.ge is None else st.integers(int(one.ge), int(one.le or 0))
            low, high = (int(one.ge), int(one.le or 0)) if one.ge is not None else (-(2**70), 2**70)
            return st.one_of(st.integers(low, high), st.integers(low, high).map(str))
        case "number":
            return st.floats(one.ge, one.le, allow_nan=False)
        case _ if one.name in ("prompt", "negative_prompt"):
            return PROMPTS
        case _:
            return st.sampled_from(LORAS if draw_loras else [""])


@st.composite
def right(draw: Any, schema: Schema, *, cheap: bool = False) -> dict[str, Any]:
    """Inputs that the schema takes and that go together. `cheap` for those that are drawn: few steps, small sizes."""
    chosen: dict[str, Any] = {}
    for one in schema.inputs:
        if not one.required and not draw(st.booleans()):
            continue
        chosen[one.name] = None if one.optional and draw(st.integers(0, 4)) == 0 else draw(value_of(one, not cheap))
    for name in schema.agreements:
        chosen[name] = True
    for name in schema.needs:
        if chosen.get(name) is None:
            chosen[name] = draw(st.sampled_from(MASKS if name == "mask" else PICTURES))
    if chosen.get("aspect_ratio") == "custom":
        chosen |= {"width": draw(SIDES), "height": draw(SIDES)}
    if "refine_steps" in chosen:
        chosen["refine_steps"] = draw(st.sampled_from([None, 0, 4, 20]))
    for steering in schema.steering:
        if steering.chosen and chosen.get(steering.chosen, "none") != "none":
            chosen[steering.image] = draw(st.sampled_from(PICTURES))
    if schema.sizing and schema.sizing.chosen:
        for said, image in schema.sizing.images.items():
            if chosen.get(schema.sizing.chosen) == said:
                chosen[image] = draw(st.sampled_from(PICTURES))
    if cheap:
        least = {one.name: max(2, int(one.ge or 1)) for one in schema.inputs if one.name == "num_inference_steps"}
        chosen |= {name: draw(st.integers(low, 4)) for name, low in least.items()}
        chosen |= {one.name: "0.25" for one in schema.inputs if one.name == "megapixels"}
        chosen |= {name: 384 for name in ("width", "height") if name in chosen}
        chosen |= {"num_outputs": draw(st.integers(1, 2))} if chosen.get("num_outputs") is not None else {}
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
    @given(right(predictor.schema))
    def check(inputs: dict[str, Any]) -> None:
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
def test_right_inputs_are_drawn_as_they_resolve(speak: Speak, name: str) -> None:
    predictor = speak(name)
    made: list[Path] = []

    @times(DRAWN)
    @given(right(predictor.schema, cheap=True))
    def check(inputs: dict[str, Any]) -> None:
        inputs["seed"] = 5
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


def wrong(schema: Schema, rng: random.Random) -> tuple[dict[str, Any], str | None]:
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
        with pytest.raises(InvalidRequest) as validated:
            predictor.resolve(inputs)
        assert str(validated.value) == str(caught.value)
        assert isinstance(caught.value, InvalidInput), (inputs, caught.value)
        assert name in [problem["loc"][-1] for problem in caught.value.detail], (inputs, caught.value.detail)
        assert len(str(caught.value)) < 3_000


def test_a_long_prompt_is_drawn(speak: Speak) -> None:
    """A megabyte, of which the text encoders read what they read."""
    predictor = speak("flux-schnell")
    (path,) = predictor.predict(prompt="red circle " * 95_000, seed=1, num_inference_steps=1, megapixels="0.25")  # type: ignore[misc]
    with Image.open(path) as picture:
        assert picture.size == (128, 128)

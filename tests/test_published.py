"""The schemas of January 2025 against what was published then, and against those of today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flux_engine.replicate.schema import Schema
from flux_engine.replicate.schemas import AS_OF, find_schema

DATA = Path(__file__).parents[2] / "shared" / "data" / "replicate_schemas.json"
"""The published components of 19 models, where they are at hand."""
FIXTURE = Path(__file__).parent / "published_2025_01.json"
"""Of each dated schema what is compared, from the same source."""
MODELS = {
    "flux-schnell@2025-01": "black-forest-labs/flux-schnell",
    "flux-dev@2025-01": "black-forest-labs/flux-dev",
    "flux-schnell-lora@2025-01": "black-forest-labs/flux-schnell-lora",
    "flux-dev-lora@2025-01": "black-forest-labs/flux-dev-lora",
    "flux-fill-dev@2025-01": "black-forest-labs/flux-fill-dev",
    "flux-canny-dev@2025-01": "black-forest-labs/flux-canny-dev",
    "flux-depth-dev@2025-01": "black-forest-labs/flux-depth-dev",
    "flux-redux-dev@2025-01": "black-forest-labs/flux-redux-dev",
    "flux-finetune@2025-01": "ostris/flux-dev-lora-trainer",
    "sdxl@2025-01": "stability-ai/sdxl",
    "sdxl-lightning-4step@2025-01": "bytedance/sdxl-lightning-4step",
    "sdxl-controlnet@2025-01": "lucataco/sdxl-controlnet",
}
OURS = {"description", "nullable"}
"""What is not compared, and why: replicate/dated.py."""
each = pytest.mark.parametrize("schema", AS_OF.values(), ids=list(AS_OF))


def components(schemas: dict[str, Any]) -> dict[str, Any]:
    """Input and Output in a form that can be compared, the order of inputs by `x-order`."""
    properties = schemas["Input"]["properties"]
    inputs: list[list[Any]] = []
    for name in sorted(properties, key=lambda one: properties[one]["x-order"]):
        shape = {key: value for key, value in properties[name].items() if key not in OURS}
        if "allOf" in shape:
            (reference,) = shape.pop("allOf")
            enum = schemas[reference["$ref"].rpartition("/")[2]]
            shape["enum"] = [enum["title"], enum["type"], enum["enum"]]
        inputs.append([name, shape])
    return {"inputs": inputs, "required": schemas["Input"].get("required", []), "output": schemas["Output"]}


def test_every_one_has_its_published_model() -> None:
    assert list(AS_OF) == list(MODELS) == list(json.loads(FIXTURE.read_text()))


@each
def test_equal_to_the_fixture(schema: Schema) -> None:
    published = json.loads(FIXTURE.read_text())[schema.name]
    assert components(schema.openapi()["components"]["schemas"]) == published


@each
@pytest.mark.skipif(not DATA.exists(), reason="the published components are not at hand, only the fixture")
def test_equal_to_what_was_published(schema: Schema) -> None:
    published = json.loads(DATA.read_text())[MODELS[schema.name]]
    assert components(schema.openapi()["components"]["schemas"]) == components(published.get("schemas", published))


@each
def test_todays_takes_all_of_it(schema: Schema) -> None:
    """Whoever asks as then is understood now: every input is still there, and takes no less."""
    today = {one.name: one for one in find_schema(schema.name.partition("@")[0]).inputs}
    for one in schema.inputs:
        now = today[one.name]
        assert (one.name, now.type) == (one.name, one.type)
        assert set(one.choices) <= set(now.choices)
        assert now.ge is None or one.ge is None or now.ge <= one.ge
        assert now.le is None or one.le is None or now.le >= one.le

"""The published schemas: every input of each, written down by hand, and what their declarations make of inputs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flux_engine.errors import UnknownSchema
from flux_engine.replicate.documentation import page
from flux_engine.replicate.schema import Input, InvalidInput, Schema
from flux_engine.replicate.schemas import SCHEMAS, find_schema
from flux_engine.specs import SCHEDULERS

REQUIRED = object()
NO_URL = "Input should be a URL or a data URI, as a string, or a path object or an open file"
MULTI = "sdxl-multi-controlnet-lora"
RATIOS = ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]
FORMATS = ["webp", "jpg", "png"]
NAMED = ["DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "K_EULER_ANCESTRAL", "K_EULER", "PNDM"]
CONTROLS = ["none", "edge_canny", "illusion", "depth_leres", "depth_midas", "soft_edge_pidi", "soft_edge_hed",
            "lineart", "lineart_anime", "openpose"]  # fmt: skip

DEV = [
    ("prompt", "string", REQUIRED),
    ("aspect_ratio", "string", "1:1", RATIOS),
    ("image", "uri", None),
    ("prompt_strength", "number", 0.8, 0, 1),
    ("num_outputs", "integer", 1, 1, 4),
    ("num_inference_steps", "integer", 28, 1, 50),
    ("guidance", "number", 3, 0, 10),
    ("seed", "integer", None),
    ("output_format", "string", "webp", FORMATS),
    ("output_quality", "integer", 80, 0, 100),
    ("disable_safety_checker", "boolean", False),
    ("go_fast", "boolean", True),
    ("megapixels", "string", "1", ["1", "0.25"]),
]
SCHNELL = [
    ("prompt", "string", REQUIRED),
    ("aspect_ratio", "string", "1:1", RATIOS),
    ("num_outputs", "integer", 1, 1, 4),
    ("num_inference_steps", "integer", 4, 1, 4),
    ("seed", "integer", None),
    ("output_format", "string", "webp", FORMATS),
    ("output_quality", "integer", 80, 0, 100),
    ("disable_safety_checker", "boolean", False),
    ("go_fast", "boolean", True),
    ("megapixels", "string", "1", ["1", "0.25"]),
]
LORA = [("lora_weights", "string", None), ("lora_scale", "number", 1, -1, 3)]
EXTRA_LORA = [("extra_lora", "string", None), ("extra_lora_scale", "number", 1, -1, 3)]
INPUTS: dict[str, list[tuple[Any, ...]]] = {  # name, type, default, then the choices or the limits
    "flux-schnell": SCHNELL,
    "flux-dev": DEV,
    "flux-krea-dev": DEV,
    "flux-schnell-lora": [*SCHNELL[:-1], *LORA, SCHNELL[-1]],
    "flux-dev-lora": [
        *DEV[:-1],
        *LORA,
        *EXTRA_LORA,
        DEV[-1],
        ("hf_api_token", "secret", None),
        ("civitai_api_token", "secret", None),
    ],
    "flux-finetune": [
        ("prompt", "string", REQUIRED),
        ("image", "uri", None),
        ("mask", "uri", None),
        ("aspect_ratio", "string", "1:1", [*RATIOS, "custom"]),
        ("height", "integer", None, 256, 1440),
        ("width", "integer", None, 256, 1440),
        ("prompt_strength", "number", 0.8, 0, 1),
        ("model", "string", "dev", ["dev", "schnell"]),
        ("num_outputs", "integer", 1, 1, 4),
        ("num_inference_steps", "integer", 28, 1, 50),
        ("guidance_scale", "number", 3, 0, 10),
        ("seed", "integer", None),
        ("output_format", "string", "webp", FORMATS),
        ("output_quality", "integer", 80, 0, 100),
        ("disable_safety_checker", "boolean", False),
        ("go_fast", "boolean", False),
        ("megapixels", "string", "1", ["1", "0.25"]),
        ("replicate_weights", "string", None),
        ("lora_scale", "number", 1, -1, 3),
        *EXTRA_LORA,
    ],
    "flux-fill-dev": [
        ("prompt", "string", REQUIRED),
        ("image", "uri", REQUIRED),
        ("mask", "uri", None),
        ("num_outputs", "integer", 1, 1, 4),
        ("num_inference_steps", "integer", 28, 1, 50),
        ("guidance", "number", 30, 0, 100),
        ("seed", "integer", None),
        ("megapixels", "string", "1", ["1", "0.25", "match_input"]),
        ("output_format", "string", "webp", FORMATS),
        ("output_quality", "integer", 80, 0, 100),
        ("lora_weights", "string", None),
        ("lora_scale", "number", 1, -1, 3),
        ("disable_safety_checker", "boolean", False),
    ],
    "flux-canny-dev": [
        ("prompt", "string", REQUIRED),
        ("control_image", "uri", REQUIRED),
        ("num_outputs", "integer", 1, 1, 4),
        ("num_inference_steps", "integer", 28, 1, 50),
        ("guidance", "number", 30, 0, 100),
        ("seed", "integer", None),
        ("output_format", "string", "webp", FORMATS),
        ("output_quality", "integer", 80, 0, 100),
        ("disable_safety_checker", "boolean", False),
        ("megapixels", "string", "1", ["1", "0.25", "match_input"]),
    ],
    "flux-depth-dev": [
        ("prompt", "string", REQUIRED),
        ("control_image", "uri", REQUIRED),
        ("num_outputs", "integer", 1, 1, 4),
        ("num_inference_steps", "integer", 28, 1, 50),
        ("guidance", "number", 10, 0, 100),
        ("seed", "integer", None),
        ("output_format", "string", "webp", FORMATS),
        ("output_quality", "integer", 80, 0, 100),
        ("disable_safety_checker", "boolean", False),
        ("megapixels", "string", "1", ["1", "0.25", "match_input"]),
    ],
    "flux-redux-dev": [
        ("redux_image", "uri", REQUIRED),
        ("aspect_ratio", "string", "1:1", RATIOS),
        ("num_outputs", "integer", 1, 1, 4),
        ("num_inference_steps", "integer", 28, 1, 50),
        ("guidance", "number", 3, 0, 10),
        ("seed", "integer", None),
        ("output_format", "string", "webp", FORMATS),
        ("output_quality", "integer", 80, 0, 100),
        ("disable_safety_checker", "boolean", False),
        ("megapixels", "string", "1", ["1", "0.25"]),
    ],
    "flux-redux-schnell": [
        ("redux_image", "uri", REQUIRED),
        ("aspect_ratio", "string", "1:1", RATIOS),
        ("num_outputs", "integer", 1, 1, 4),
        ("num_inference_steps", "integer", 4, 1, 4),
        ("seed", "integer", None),
        ("output_format", "string", "webp", FORMATS),
        ("output_quality", "integer", 80, 0, 100),
        ("disable_safety_checker", "boolean", False),
        ("megapixels", "string", "1", ["1", "0.25"]),
    ],
    "flux-kontext-dev": [
        ("prompt", "string", REQUIRED),
        ("input_image", "uri", REQUIRED),
        ("aspect_ratio", "string", "match_input_image", [*RATIOS, "match_input_image"]),
        ("num_inference_steps", "integer", 28, 4, 50),
        ("guidance", "number", 2.5, 0, 10),
        ("seed", "integer", None),
        ("output_format", "string", "webp", FORMATS),
        ("output_quality", "integer", 80, 0, 100),
        ("disable_safety_checker", "boolean", False),
        ("go_fast", "boolean", True),
    ],
    "sdxl": [
        ("prompt", "string", "An astronaut riding a rainbow unicorn"),
        ("negative_prompt", "string", ""),
        ("image", "uri", None),
        ("mask", "uri", None),
        ("width", "integer", 1024),
        ("height", "integer", 1024),
        ("num_outputs", "integer", 1, 1, 4),
        ("scheduler", "string", "K_EULER", NAMED),
        ("num_inference_steps", "integer", 50, 1, 500),
        ("guidance_scale", "number", 7.5, 1, 50),
        ("prompt_strength", "number", 0.8, 0, 1),
        ("seed", "integer", None),
        ("refine", "string", "no_refiner", ["no_refiner", "expert_ensemble_refiner", "base_image_refiner"]),
        ("high_noise_frac", "number", 0.8, 0, 1),
        ("refine_steps", "integer", None),
        ("apply_watermark", "boolean", True),
        ("lora_scale", "number", 0.6, 0, 1),
        ("replicate_weights", "string", None),
        ("disable_safety_checker", "boolean", False),
    ],
    "sdxl-lightning-4step": [
        ("prompt", "string", "self-portrait of a woman, lightning in the background"),
        ("negative_prompt", "string", "worst quality, low quality"),
        ("width", "integer", 1024, 256, 1280),
        ("height", "integer", 1024, 256, 1280),
        ("num_outputs", "integer", 1, 1, 4),
        ("scheduler", "string", "K_EULER", [*NAMED, "DPM++2MSDE"]),
        ("num_inference_steps", "integer", 4, 1, 10),
        ("guidance_scale", "number", 0, 0, 50),
        ("seed", "integer", None),
        ("disable_safety_checker", "boolean", False),
    ],
    "sdxl-turbo": [
        ("prompt", "string", REQUIRED),
        ("agree_to_research_only", "boolean", False),
        ("width", "integer", 512),
        ("height", "integer", 512),
        ("num_outputs", "integer", 1, 1, 30),
        ("num_inference_steps", "integer", 1, 1, 4),
        ("seed", "integer", None),
    ],
    "sdxl-lcm": [
        ("prompt", "string", "An astronaut riding a rainbow unicorn"),
        ("negative_prompt", "string", ""),
        ("image", "uri", None),
        ("mask", "uri", None),
        ("width", "integer", 1024),
        ("height", "integer", 1024),
        ("num_outputs", "integer", 1, 1, 4),
        ("num_inference_steps", "integer", 8, 1, 10),
        ("guidance_scale", "number", 2, 1, 50),
        ("prompt_strength", "number", 0.8, 0, 1),
        ("seed", "integer", None),
        ("apply_watermark", "boolean", True),
        ("lora_scale", "number", 0.6, 0, 1),
        ("replicate_weights", "string", None),
        ("disable_safety_checker", "boolean", False),
    ],
    "sdxl-controlnet": [
        ("image", "uri", None),
        ("prompt", "string", "aerial view, a futuristic research complex in a bright foggy jungle, hard lighting"),
        ("negative_prompt", "string", "low quality, bad quality, sketches"),
        ("num_inference_steps", "integer", 50, 1, 500),
        ("condition_scale", "number", 0.5, 0, 1),
        ("seed", "integer", 0),
    ],
    MULTI: [
        ("prompt", "string", "An astronaut riding a rainbow unicorn"),
        ("negative_prompt", "string", ""),
        ("image", "uri", None),
        ("mask", "uri", None),
        ("width", "integer", 768),
        ("height", "integer", 768),
        ("sizing_strategy", "string", "width_height",
         ["width_height", "input_image", "controlnet_1_image", "controlnet_2_image", "controlnet_3_image",
          "mask_image"]),
        ("num_outputs", "integer", 1, 1, 4),
        ("scheduler", "string", "K_EULER", NAMED),
        ("num_inference_steps", "integer", 30, 1, 500),
        ("guidance_scale", "number", 7.5, 1, 50),
        ("prompt_strength", "number", 0.8, 0, 1),
        ("seed", "integer", None),
        ("refine", "string", "no_refiner", ["no_refiner", "base_image_refiner"]),
        ("refine_steps", "integer", None),
        ("apply_watermark", "boolean", True),
        ("lora_scale", "number", 0.6, 0, 1),
        ("lora_weights", "string", None),
        ("disable_safety_checker", "boolean", False),
        ("controlnet_1", "string", "none", CONTROLS),
        ("controlnet_1_image", "uri", None),
        ("controlnet_1_conditioning_scale", "number", 0.75, 0, 4),
        ("controlnet_1_start", "number", 0, 0, 1),
        ("controlnet_1_end", "number", 1, 0, 1),
        ("controlnet_2", "string", "none", CONTROLS),
        ("controlnet_2_image", "uri", None),
        ("controlnet_2_conditioning_scale", "number", 0.75, 0, 4),
        ("controlnet_2_start", "number", 0, 0, 1),
        ("controlnet_2_end", "number", 1, 0, 1),
        ("controlnet_3", "string", "none", CONTROLS),
        ("controlnet_3_image", "uri", None),
        ("controlnet_3_conditioning_scale", "number", 0.75, 0, 4),
        ("controlnet_3_start", "number", 0, 0, 1),
        ("controlnet_3_end", "number", 1, 0, 1),
    ],
}  # fmt: skip
SINGLE = {"flux-kontext-dev", "sdxl-controlnet"}
FIELDS = {
    "go_fast": "go_fast",  # input -> the field of Request it fills
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "image": "image",
    "input_image": "image",
    "redux_image": "image_prompt",
    "mask": "mask",
    "prompt_strength": "strength",
    "aspect_ratio": "aspect_ratio",
    "megapixels": "megapixels",
    "width": "width",
    "height": "height",
    "num_outputs": "num_outputs",
    "num_inference_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_scale": "guidance_scale",
    "scheduler": "scheduler",
    "seed": "seed",
    "refine": "refine",
    "high_noise_frac": "high_noise_frac",
    "refine_steps": "refine_steps",
}

each = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))


def complete(schema: Schema) -> dict[str, Any]:
    """The least that the schema takes."""
    return {one.name: "https://example.com/x.png" for one in schema.inputs if one.required}


def properties(schema: Schema) -> dict[str, Any]:
    return schema.openapi()["components"]["schemas"]["Input"]["properties"]


def refusal(schema: Schema, given: Mapping[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as caught:
        schema.validate(given)
    return [(problem["loc"][-1], problem["msg"]) for problem in caught.value.detail]


def test_all_are_written_down() -> None:
    assert list(SCHEMAS) == list(INPUTS)
    for name, schema in SCHEMAS.items():
        assert schema.name == name
        assert schema.title


@each
def test_inputs_are_the_published_ones(schema: Schema) -> None:
    rows = INPUTS[schema.name]
    assert [one.name for one in schema.inputs] == [row[0] for row in rows]
    for one, (name, kind, default, *rest) in zip(schema.inputs, rows, strict=True):
        choices = rest[0] if len(rest) == 1 else []
        low, high = rest if len(rest) == 2 else (None, None)
        assert (name, one.type, one.required) == (name, kind, default is REQUIRED)
        expected = None if default is REQUIRED else default
        assert (name, one.default, type(one.default)) == (name, expected, type(expected))
        assert (name, one.ge, one.le) == (name, low, high)
        assert (name, list(one.choices)) == (name, choices)


@each
def test_openapi_says_the_same(schema: Schema) -> None:
    document = schema.openapi()
    schemas = document["components"]["schemas"]
    rows = INPUTS[schema.name]
    assert schemas["Input"]["required"] == [row[0] for row in rows if row[2] is REQUIRED]
    for order, (name, kind, default, *rest) in enumerate(rows):
        shape: dict[str, Any] = {"x-order": order}
        if len(rest) == 1:
            shape["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
            enum = {"title": name, "description": "An enumeration.", "type": "string", "enum": rest[0]}
            assert schemas[name] == enum
        else:
            secret = {"type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True}
            special = {"uri": {"type": "string", "format": "uri"}, "secret": secret}
            shape |= special.get(kind, {"type": kind})
            shape["title"] = " ".join(word.capitalize() for word in name.split("_"))
        if len(rest) == 2:
            shape |= {"minimum": rest[0], "maximum": rest[1]}
        if default is None:
            shape["nullable"] = True
        elif default is not REQUIRED:
            shape["default"] = default
        found = dict(schemas["Input"]["properties"][name])
        assert found.pop("description")
        assert found == shape
    for name in re.findall(r"#/components/schemas/(\w+)", str(document)):
        assert name in schemas


def test_openapi_of_pictures() -> None:
    shapes = properties(SCHEMAS["flux-fill-dev"])
    for name in ("image", "mask"):
        shapes[name].pop("description")
    assert shapes["image"] == {"type": "string", "format": "uri", "title": "Image", "x-order": 1}
    assert shapes["mask"] == {"type": "string", "format": "uri", "title": "Mask", "x-order": 2, "nullable": True}


@each
def test_output(schema: Schema) -> None:
    found = schema.openapi()["components"]["schemas"]["Output"]
    if schema.name in SINGLE:
        assert found == {"type": "string", "format": "uri", "title": "Output"}
    else:
        assert found == {"type": "array", "items": {"type": "string", "format": "uri"}, "title": "Output"}
    assert schema.single == (schema.name in SINGLE)


def test_what_sdxl_does_otherwise() -> None:
    for name, schema in SCHEMAS.items():
        assert ("output_format" in properties(schema)) == name.startswith("flux")
        assert schema.output_format == ("jpg" if name == "sdxl-turbo" else "png")
        assert schema.returns_controls == (name == MULTI)
        assert schema.seeds_from_one == (name == "sdxl-controlnet")
    assert set(NAMED) <= set(SCHEDULERS)


@each
def test_fields_of_request(schema: Schema) -> None:
    for one in schema.inputs:
        expected = FIELDS.get(one.name)
        if (schema.name, one.name) == ("sdxl-controlnet", "image"):
            expected = None  # it steers; nothing is made from it
        assert (one.name, one.field) == (one.name, expected)
    filled = [one.field for one in schema.inputs if one.field is not None]
    assert len(filled) == len(set(filled))


@each
def test_defaults_stand(schema: Schema) -> None:
    values = schema.validate(complete(schema))
    for one in schema.inputs:
        if not one.required:
            assert values[one.name] == one.default
        if one.default is not None:
            assert one.check(one.default) == one.default
    nulls = complete(schema) | {one.name: None for one in schema.inputs if one.optional}
    assert schema.validate(nulls) == values


@each
def test_every_choice(schema: Schema) -> None:
    for one in schema.inputs:
        for choice in one.choices:
            assert schema.validate(complete(schema) | {one.name: choice})[one.name] == choice
        if one.choices:
            ((name, message),) = refusal(schema, complete(schema) | {one.name: "nonsense"})
            assert name == one.name
            listed = ", ".join(f"'{choice}'" for choice in one.choices[:-1])
            assert message == f"Input should be {listed} or '{one.choices[-1]}'"


@each
def test_every_limit(schema: Schema) -> None:
    for one in schema.inputs:
        if one.ge is None or one.le is None:
            continue
        for value in (one.ge, one.le):
            assert schema.validate(complete(schema) | {one.name: value})[one.name] == value
        for value, words in ((one.ge - 1, f"greater than or equal to {one.ge:g}"),
                             (one.le + 1, f"less than or equal to {one.le:g}")):  # fmt: skip
            ((name, message),) = refusal(schema, complete(schema) | {one.name: value})
            assert (name, message) == (one.name, f"Input should be {words}")


@pytest.mark.parametrize(
    ("schema", "given", "name", "message"),
    [
        ("flux-fill-dev", {"prompt": "x"}, "image", "Field required"),
        ("flux-fill-dev", {"prompt": "x", "image": None}, "image", NO_URL),
        ("flux-fill-dev", {"prompt": "x", "image": ""}, "image", "Input should be a valid URL, input is empty"),
        ("flux-fill-dev", {"prompt": "x", "image": " "}, "image", "Input should be a valid URL, input is empty"),
        ("flux-fill-dev", {"prompt": "x", "image": "a", "mask": 3}, "mask", NO_URL),
        ("flux-fill-dev", {"prompt": "x", "image": "a", "mask": [1]}, "mask", NO_URL),
        ("flux-fill-dev", {"prompt": "x", "image": b"a"}, "image", NO_URL),
        ("flux-fill-dev", {"prompt": "x", "image": True}, "image", NO_URL),
        ("flux-fill-dev", {"prompt": "x", "image": "a", "lora_scale": 3.5}, "lora_scale",
         "Input should be less than or equal to 3"),
        ("flux-canny-dev", {"prompt": "x"}, "control_image", "Field required"),
        ("flux-depth-dev", {"control_image": "a"}, "prompt", "Field required"),
        ("flux-redux-dev", {}, "redux_image", "Field required"),
        ("flux-redux-schnell", {"redux_image": "a", "num_inference_steps": 5}, "num_inference_steps",
         "Input should be less than or equal to 4"),
        ("flux-kontext-dev", {"prompt": "x", "input_image": "a", "num_inference_steps": 3}, "num_inference_steps",
         "Input should be greater than or equal to 4"),
        ("flux-dev", {"prompt": "x", "prompt_strength": 1.5}, "prompt_strength",
         "Input should be less than or equal to 1"),
        ("flux-dev", {"prompt": "x", "prompt_strength": "half"}, "prompt_strength",
         "Input should be a valid number, unable to parse string as a number"),
        ("flux-dev", {"prompt": "x", "prompt_strength": None}, "prompt_strength",
         "Input should be a valid number"),
        ("flux-dev", {"prompt": "x", "prompt_strength": float("nan")}, "prompt_strength",
         "Input should be a finite number"),
        ("flux-dev", {"prompt": "x", "guidance": True}, "guidance", "Input should be a valid number"),
        ("flux-dev", {"prompt": "x", "seed": "4.2"}, "seed",
         "Input should be a valid integer, unable to parse string as an integer"),
        ("sdxl", {"scheduler": "Keros Euler"}, "scheduler",
         "Input should be 'DDIM', 'DPMSolverMultistep', 'HeunDiscrete', 'KarrasDPM', 'K_EULER_ANCESTRAL', 'K_EULER' "
         "or 'PNDM'"),
        ("sdxl", {"width": 512.5}, "width", "Input should be a valid integer, got a number with a fractional part"),
        ("sdxl", {"apply_watermark": 1}, "apply_watermark", "Input should be a valid boolean"),
        ("sdxl", {"negative_prompt": None}, "negative_prompt", "Input should be a valid string"),
        (MULTI, {"controlnet_2": None}, "controlnet_2", "Input should be a valid string"),
        (MULTI, {"controlnet_3_end": 1.1}, "controlnet_3_end",
         "Input should be less than or equal to 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(schema: str, given: dict[str, Any], name: str, message: str) -> None:
    assert refusal(SCHEMAS[schema], given) == [(name, message)]


def test_what_another_schema_takes_is_refused() -> None:
    ((name, message),) = refusal(SCHEMAS["flux-redux-dev"], {"redux_image": "a", "prompt": "x"})
    assert name == "prompt"
    assert message.startswith("Extra inputs are not permitted. flux-redux-dev takes redux_image, aspect_ratio, ")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("num_output", "; did you mean 'num_outputs'?"),
        ("strength", "; here it is 'prompt_strength'."),
        ("guidance_scale", "; here it is 'guidance'."),
        ("zzz", "."),
    ],
)
def test_what_an_unknown_input_may_have_meant(name: str, said: str) -> None:
    ((found, message),) = refusal(SCHEMAS["flux-dev"], {"prompt": "x", name: 1})
    assert found == name
    assert message.startswith(f"Extra inputs are not permitted{said} flux-dev takes prompt, ")


@pytest.mark.parametrize(
    "value",
    ["https://example.com/a.png", "data:image/png;base64,AAAA", "a.png", Path("a.png"), io.BytesIO(b"")],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_pictures_pass_as_they_are(value: object) -> None:
    """Nothing is opened, fetched or even looked for."""
    assert SCHEMAS["flux-dev"].validate({"prompt": "x", "image": value})["image"] is value
    assert SCHEMAS["flux-canny-dev"].validate({"prompt": "x", "control_image": value})["control_image"] is value


def test_what_is_sent_unasked_for() -> None:
    """Explicit nulls, as a third of the published examples with pictures have them."""
    values = SCHEMAS["sdxl"].validate({"image": None, "mask": None, "seed": None, "refine_steps": None, "width": 768.0})
    assert [values[name] for name in ("image", "mask", "seed", "refine_steps", "width")] == [
        None,
        None,
        None,
        None,
        768,
    ]


def test_a_refused_picture_is_not_repeated_in_full() -> None:
    with pytest.raises(InvalidInput, match=r"not b'.x89PNG") as caught:
        SCHEMAS["flux-dev"].validate({"prompt": "x", "image": b"\x89PNG" * 1_000_000})
    assert len(str(caught.value)) < 250
    assert len(json.dumps(caught.value.detail)) < 300


@pytest.mark.parametrize(
    ("given", "expected"),
    [  # what cog 0.16.12 answers to the same, status 422
        ({"prompt": 3}, {"type": "string_type", "msg": "Input should be a valid string", "input": 3}),
        ({"num_outputs": 9},
         {"type": "less_than_equal", "msg": "Input should be less than or equal to 4", "input": 9, "ctx": {"le": 4}}),
        ({"num_outputs": 0}, {"type": "greater_than_equal", "msg": "Input should be greater than or equal to 1",
                              "input": 0, "ctx": {"ge": 1}}),
        ({"num_outputs": "z"}, {"type": "int_parsing", "input": "z",
                                "msg": "Input should be a valid integer, unable to parse string as an integer"}),
        ({"num_outputs": 1.5}, {"type": "int_from_float", "input": 1.5,
                                "msg": "Input should be a valid integer, got a number with a fractional part"}),
        ({"num_outputs": None}, {"type": "int_type", "msg": "Input should be a valid integer", "input": None}),
        ({"prompt_strength": "q"}, {"type": "float_parsing", "input": "q",
                                    "msg": "Input should be a valid number, unable to parse string as a number"}),
        ({"megapixels": "2"}, {"type": "enum", "msg": "Input should be '1' or '0.25'", "input": "2",
                               "ctx": {"expected": "'1' or '0.25'"}}),
        ({"go_fast": "maybe"}, {"type": "bool_parsing", "input": "maybe",
                                "msg": "Input should be a valid boolean, unable to interpret input"}),
    ],
)  # fmt: skip
def test_cogs_own_words(given: dict[str, Any], expected: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        SCHEMAS["flux-dev"].validate({"prompt": "x"} | given)
    (name,) = given
    assert caught.value.detail == [{"loc": ["body", "input", name]} | expected]


def test_what_is_missing_and_what_is_no_object() -> None:
    with pytest.raises(InvalidInput) as caught:
        SCHEMAS["flux-dev"].validate({})
    assert caught.value.detail == [{"loc": ["body", "input", "prompt"], "type": "missing", "msg": "Field required"}]
    with pytest.raises(InvalidInput) as caught:
        SCHEMAS["flux-dev"].validate([])  # pyright: ignore[reportArgumentType]
    assert caught.value.detail[0]["loc"] == ["body", "input"]


@pytest.mark.parametrize(
    ("name", "sent", "read"),
    [
        ("seed", "42", 42),
        ("seed", " -1 ", -1),
        ("seed", 10**400, 10**400),
        ("guidance", "2.5", 2.5),
        ("guidance", 3, 3.0),
        ("go_fast", "true", True),
        ("go_fast", "Off", False),
        ("num_outputs", 2.0, 2),
    ],
)
def test_numbers_and_truths_may_be_sent_as_texts(name: str, sent: object, read: object) -> None:
    found = SCHEMAS["flux-dev"].validate({"prompt": "x", name: sent})[name]
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize("sent", [10**400, "1e999", float("-inf")], ids=["digits", "text", "infinite"])
def test_numbers_too_large_for_any(sent: object) -> None:
    assert refusal(SCHEMAS["flux-dev"], {"prompt": "x", "guidance": sent}) == [
        ("guidance", "Input should be a finite number")
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flux-dve", "did you mean 'flux-dev'"),
        ("flux-krea-dev@2025-01", "of dated ones there are flux-schnell@2025-01, "),
        ("flux-dev@2024-01", "the only date is 2025-01"),
    ],
)
def test_unknown_schemas(name: str, message: str) -> None:
    with pytest.raises(UnknownSchema, match=message):
        find_schema(name)


def test_a_variation_leaves_its_original_alone() -> None:
    one = Input(name="image", type="uri", description="A picture")
    assert replace(one, required=True).optional is False
    assert one.optional


def test_the_page_of_all_is_current() -> None:
    """`flux-engine schema --all --markdown > docs/schemas.md`."""
    assert (Path(__file__).parent.parent / "docs" / "schemas.md").read_text() == page(SCHEMAS.values())

"""The schemas as they were published in January 2025, `NAME@2025-01`: for clients that were written against them.

The plain names are what is published since: every input of these, and more. The source is the npm package
all-the-public-replicate-models 1.352.0; `flux-finetune` is what ostris/flux-dev-lora-trainer gives each model that it
trains. What the OpenAPI documents of these differ in from the published ones:

- descriptions, and the default prompts' punctuation, are ours where a text is no default;
- `nullable` says which inputs take null for "not given", as Cog has written it since: the published servers took it,
  too, and did not say so.
"""

from __future__ import annotations

from dataclasses import replace

from flux_engine.replicate.flux import (
    FLUX_CANNY_DEV,
    FLUX_DEPTH_DEV,
    FLUX_DEV,
    FLUX_DEV_LORA,
    FLUX_FILL_DEV,
    FLUX_FINETUNE,
    FLUX_REDUX_DEV,
    FLUX_SCHNELL,
    FLUX_SCHNELL_LORA,
)
from flux_engine.replicate.schema import Schema
from flux_engine.replicate.sdxl import SDXL, SDXL_CONTROLNET, SDXL_LIGHTNING_4STEP

DATE = "2025-01"


def _dated(schema: Schema, *names: str, **changes: dict[str, object]) -> Schema:
    """A schema of that month: of today's inputs these, in this order (all as they are, if none is named), with other
    attributes where `changes` says so."""
    known = {one.name: one for one in schema.inputs}
    inputs = tuple(replace(known[name], **changes.get(name, {})) for name in names or known)
    loras = tuple(one for one in schema.loras if one.weights in (names or known))
    model = schema.model or schema.name
    return replace(schema, name=f"{schema.name}@{DATE}", model=model, inputs=inputs, loras=loras)


def _without(schema: Schema, *names: str) -> tuple[str, ...]:
    return tuple(one.name for one in schema.inputs if one.name not in names)


DATED = (
    _dated(FLUX_SCHNELL),
    _dated(FLUX_DEV),
    _dated(FLUX_SCHNELL_LORA),
    _dated(
        FLUX_DEV_LORA,
        *_without(FLUX_DEV_LORA, "extra_lora", "extra_lora_scale", "hf_api_token", "civitai_api_token"),
    ),
    _dated(FLUX_FILL_DEV, *_without(FLUX_FILL_DEV, "lora_weights", "lora_scale")),
    _dated(FLUX_CANNY_DEV),
    _dated(FLUX_DEPTH_DEV),
    replace(
        _dated(FLUX_REDUX_DEV, redux_image={"required": False}),
        needs={"redux_image": "give a picture: there is nothing to make variations of without one"},
    ),
    _dated(
        FLUX_FINETUNE,
        "prompt",
        "image",
        "mask",
        "aspect_ratio",
        "width",
        "height",
        "num_outputs",
        "lora_scale",
        "num_inference_steps",
        "model",
        "guidance_scale",
        "prompt_strength",
        "seed",
        "extra_lora",
        "extra_lora_scale",
        "output_format",
        "output_quality",
        "replicate_weights",
        "disable_safety_checker",
        lora_scale={"le": 2},
        guidance_scale={"default": 3.5},
        extra_lora_scale={"le": 2},
        output_quality={"default": 90},
    ),
    _dated(SDXL),
    _dated(SDXL_LIGHTNING_4STEP),
    _dated(SDXL_CONTROLNET),
)

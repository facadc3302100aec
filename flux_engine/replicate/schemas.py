"""The published schemas. Names, order, defaults and limits are the hosted models'; the descriptions are ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flux_engine.errors import UnknownSchema, did_you_mean
from flux_engine.replicate.schema import Input, Schema
from flux_engine.specs import MEGAPIXELS, PUBLISHED_SIZES

PROMPT = Input(
    name="prompt",
    type="string",
    required=True,
    field="prompt",
    description="What the picture shows",
)
ASPECT_RATIO = Input(
    name="aspect_ratio",
    type="string",
    default="1:1",
    choices=tuple(PUBLISHED_SIZES),
    field="aspect_ratio",
    description="Width to height of the picture",
)
NUM_OUTPUTS = Input(
    name="num_outputs",
    type="integer",
    default=1,
    ge=1,
    le=4,
    field="num_outputs",
    description="How many pictures to make",
)
SCHNELL_STEPS = Input(
    name="num_inference_steps",
    type="integer",
    default=4,
    ge=1,
    le=4,
    field="num_inference_steps",
    description="Denoising steps. Fewer are faster and rougher; 4 is best",
)
SEED = Input(
    name="seed",
    type="integer",
    field="seed",
    description="Random seed; the same seed gives the same picture",
)
OUTPUT_FORMAT = Input(
    name="output_format",
    type="string",
    default="webp",
    choices=("webp", "jpg", "png"),
    description="File format of the pictures",
)
OUTPUT_QUALITY = Input(
    name="output_quality",
    type="integer",
    default=80,
    ge=0,
    le=100,
    description="Quality of webp and jpg files, 0 to 100; png has none",
)
DISABLE_SAFETY_CHECKER = Input(
    name="disable_safety_checker",
    type="boolean",
    default=False,
    description="Return pictures without looking at what they show",
)
GO_FAST = Input(
    name="go_fast",
    type="boolean",
    default=True,
    description="Allow 8-bit weights for speed; otherwise 16-bit",
)
MEGAPIXELS_INPUT = Input(
    name="megapixels",
    type="string",
    default="1",
    choices=MEGAPIXELS,
    field="megapixels",
    description="About how many million pixels the picture has",
)

FLUX_SCHNELL = Schema(
    name="flux-schnell",
    title="FLUX.1 schnell",
    inputs=(
        PROMPT,
        ASPECT_RATIO,
        NUM_OUTPUTS,
        SCHNELL_STEPS,
        SEED,
        OUTPUT_FORMAT,
        OUTPUT_QUALITY,
        DISABLE_SAFETY_CHECKER,
        GO_FAST,
        MEGAPIXELS_INPUT,
    ),
)

SCHEMAS: Mapping[str, Schema] = MappingProxyType({schema.name: schema for schema in (FLUX_SCHNELL,)})


def find_schema(name: str) -> Schema:
    """A declared schema by name. Raises UnknownSchema with the known ones."""
    if name in SCHEMAS:
        return SCHEMAS[name]
    raise UnknownSchema(f"no schema {name!r}{did_you_mean(name, SCHEMAS)} Known: {', '.join(SCHEMAS)}")

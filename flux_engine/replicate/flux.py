"""The published schemas of FLUX.1 models."""

from __future__ import annotations

from dataclasses import replace

from flux_engine.replicate.inputs import (
    DISABLE_SAFETY_CHECKER,
    IMAGE,
    LORA_SCALE,
    LORA_WEIGHTS,
    MASK,
    NUM_OUTPUTS,
    PROMPT,
    PROMPT_STRENGTH,
    SEED,
    STEPS,
)
from flux_engine.replicate.schema import Input, Schema, Steering
from flux_engine.sizes import MEGAPIXELS, PUBLISHED_SIZES

ASPECT_RATIO = Input(
    name="aspect_ratio",
    type="string",
    default="1:1",
    choices=tuple(PUBLISHED_SIZES),
    field="aspect_ratio",
    description="Width to height of the picture",
)
SCHNELL_STEPS = replace(STEPS, default=4, le=4, description="Denoising steps. Fewer are faster and rougher; 4 is best")
DEV_STEPS = replace(
    STEPS, default=28, le=50, description="Denoising steps. Fewer are faster and rougher; 28 to 50 are best"
)
GUIDANCE = Input(
    name="guidance",
    type="number",
    default=3,
    ge=0,
    le=10,
    field="guidance_scale",
    description="How closely to follow what is asked; lower looks more natural",
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
GO_FAST = Input(
    name="go_fast",
    type="boolean",
    default=True,
    field="go_fast",
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
MEGAPIXELS_OR_MATCH = replace(
    MEGAPIXELS_INPUT,
    choices=(*MEGAPIXELS, "match_input"),
    description="About how many million pixels the picture has; match_input makes it as large as the given one, "
    "up to 1440x1440",
)
CONTROL_IMAGE = Input(
    name="control_image", type="uri", required=True, description="Picture whose edges are found and followed"
)
REDUX_IMAGE = Input(
    name="redux_image",
    type="uri",
    required=True,
    field="image_prompt",
    description="Picture to make variations of; it stands in for a prompt",
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

FLUX_DEV = Schema(
    name="flux-dev",
    title="FLUX.1 dev",
    sizes_without_image=("aspect_ratio", "megapixels"),
    inputs=(
        PROMPT,
        ASPECT_RATIO,
        replace(IMAGE, description="Picture to start from; the result has its shape, whatever aspect_ratio says"),
        PROMPT_STRENGTH,
        NUM_OUTPUTS,
        DEV_STEPS,
        GUIDANCE,
        SEED,
        OUTPUT_FORMAT,
        OUTPUT_QUALITY,
        DISABLE_SAFETY_CHECKER,
        GO_FAST,
        MEGAPIXELS_INPUT,
    ),
)

FLUX_KREA_DEV = replace(FLUX_DEV, name="flux-krea-dev", title="FLUX.1 Krea dev")

FLUX_FILL_DEV = Schema(
    name="flux-fill-dev",
    title="FLUX.1 Fill dev",
    needs={"mask": "say what to paint: a mask, or an image that is transparent there"},
    inputs=(
        PROMPT,
        replace(IMAGE, required=True, description="Picture to paint in; its transparency can be the mask"),
        MASK,
        NUM_OUTPUTS,
        DEV_STEPS,
        replace(GUIDANCE, default=30, le=100),
        SEED,
        MEGAPIXELS_OR_MATCH,
        OUTPUT_FORMAT,
        OUTPUT_QUALITY,
        LORA_WEIGHTS,
        LORA_SCALE,
        DISABLE_SAFETY_CHECKER,
    ),
)

FLUX_CANNY_DEV = Schema(
    name="flux-canny-dev",
    title="FLUX.1 Canny dev",
    steering=(Steering(image="control_image", kind="canny"),),
    inputs=(
        PROMPT,
        CONTROL_IMAGE,
        NUM_OUTPUTS,
        DEV_STEPS,
        replace(GUIDANCE, default=30, le=100),
        SEED,
        OUTPUT_FORMAT,
        OUTPUT_QUALITY,
        DISABLE_SAFETY_CHECKER,
        MEGAPIXELS_OR_MATCH,
    ),
)

FLUX_DEPTH_DEV = Schema(
    name="flux-depth-dev",
    title="FLUX.1 Depth dev",
    steering=(Steering(image="control_image", kind="depth"),),
    inputs=(
        PROMPT,
        replace(CONTROL_IMAGE, description="Picture whose depth is estimated and followed"),
        NUM_OUTPUTS,
        DEV_STEPS,
        replace(GUIDANCE, default=10, le=100),
        SEED,
        OUTPUT_FORMAT,
        OUTPUT_QUALITY,
        DISABLE_SAFETY_CHECKER,
        MEGAPIXELS_OR_MATCH,
    ),
)

FLUX_REDUX_DEV = Schema(
    name="flux-redux-dev",
    title="FLUX.1 Redux dev",
    model="flux-dev",
    redux="flux-redux-dev",
    always={"prompt": ""},
    inputs=(
        REDUX_IMAGE,
        ASPECT_RATIO,
        NUM_OUTPUTS,
        DEV_STEPS,
        GUIDANCE,
        SEED,
        OUTPUT_FORMAT,
        OUTPUT_QUALITY,
        DISABLE_SAFETY_CHECKER,
        MEGAPIXELS_INPUT,
    ),
)

FLUX_REDUX_SCHNELL = Schema(
    name="flux-redux-schnell",
    title="FLUX.1 Redux schnell",
    model="flux-schnell",
    redux="flux-redux-dev",
    always={"prompt": ""},
    inputs=(
        REDUX_IMAGE,
        ASPECT_RATIO,
        NUM_OUTPUTS,
        SCHNELL_STEPS,
        SEED,
        OUTPUT_FORMAT,
        OUTPUT_QUALITY,
        DISABLE_SAFETY_CHECKER,
        MEGAPIXELS_INPUT,
    ),
)

FLUX_KONTEXT_DEV = Schema(
    name="flux-kontext-dev",
    title="FLUX.1 Kontext dev",
    edits=True,
    single=True,
    inputs=(
        replace(PROMPT, description="What to change in the picture, or what to make of it"),
        replace(IMAGE, name="input_image", required=True, description="Picture to edit: jpeg, png, gif or webp"),
        replace(
            ASPECT_RATIO,
            default="match_input_image",
            choices=(*ASPECT_RATIO.choices, "match_input_image"),
            description="Width to height of the picture; match_input_image keeps the given one's",
        ),
        replace(DEV_STEPS, ge=4),
        replace(GUIDANCE, default=2.5),
        SEED,
        OUTPUT_FORMAT,
        OUTPUT_QUALITY,
        DISABLE_SAFETY_CHECKER,
        GO_FAST,
    ),
)

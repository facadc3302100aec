"""The published schemas of FLUX.1 models."""

from __future__ import annotations

from dataclasses import replace

from flux_engine.replicate.inputs import (
    CIVITAI_API_TOKEN,
    DISABLE_SAFETY_CHECKER,
    EXTRA_LORA,
    EXTRA_LORA_SCALE,
    HF_API_TOKEN,
    IMAGE,
    LORA_SCALE,
    LORA_WEIGHTS,
    MASK,
    NSFW_DETECTED,
    NUM_OUTPUTS,
    PROMPT,
    PROMPT_STRENGTH,
    SEED,
    STEPS,
)
from flux_engine.replicate.schema import CUSTOM, Input, Schema, Stacked, Steering
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


def _before(name: str, inputs: tuple[Input, ...], *more: Input) -> tuple[Input, ...]:
    """More inputs before the one of that name."""
    at = next(number for number, one in enumerate(inputs) if one.name == name)
    return (*inputs[:at], *more, *inputs[at:])


MAIN = Stacked("lora_weights", "lora_scale")
EXTRA = Stacked("extra_lora", "extra_lora_scale")
FLUX_SCHNELL_LORA = replace(
    FLUX_SCHNELL,
    name="flux-schnell-lora",
    title="FLUX.1 schnell with a LoRA",
    model="flux-schnell",
    loras=(MAIN,),
    inputs=_before("megapixels", FLUX_SCHNELL.inputs, LORA_WEIGHTS, LORA_SCALE),
)

FLUX_DEV_LORA = replace(
    FLUX_DEV,
    name="flux-dev-lora",
    title="FLUX.1 dev with LoRAs",
    model="flux-dev",
    loras=(MAIN, EXTRA),
    inputs=(
        *_before("megapixels", FLUX_DEV.inputs, LORA_WEIGHTS, LORA_SCALE, EXTRA_LORA, EXTRA_LORA_SCALE),
        HF_API_TOKEN,
        CIVITAI_API_TOKEN,
    ),
)

CUSTOM_SIDE = Input(
    name="height",
    type="integer",
    ge=256,
    le=1440,
    field="height",
    description="Height in pixels, rounded up to a multiple of 16; counts where aspect_ratio is custom",
)
FLUX_FINETUNE = Schema(
    name="flux-finetune",
    title="A fine-tune of FLUX.1",
    nothing_left=NSFW_DETECTED,
    models={"dev": "flux-dev", "schnell": "flux-schnell"},
    loras=(Stacked("replicate_weights", "lora_scale"), EXTRA),
    sizes_without_image=("aspect_ratio", "megapixels", "width", "height"),
    with_mask_too=True,
    inputs=(
        PROMPT,
        replace(IMAGE, description="Picture to start from, or to paint in; the result has its shape"),
        MASK,
        replace(
            ASPECT_RATIO,
            choices=(*ASPECT_RATIO.choices, CUSTOM),
            description="Width to height of the picture; custom is as width and height say",
        ),
        CUSTOM_SIDE,
        replace(CUSTOM_SIDE, name="width", field="width", description="Width in pixels, likewise"),
        PROMPT_STRENGTH,
        Input(
            name="model",
            type="string",
            default="dev",
            choices=("dev", "schnell"),
            description="Which model draws; schnell needs few steps: 4",
        ),
        NUM_OUTPUTS,
        DEV_STEPS,
        replace(GUIDANCE, name="guidance_scale"),
        SEED,
        OUTPUT_FORMAT,
        OUTPUT_QUALITY,
        DISABLE_SAFETY_CHECKER,
        replace(GO_FAST, default=False),
        MEGAPIXELS_INPUT,
        replace(
            LORA_WEIGHTS, name="replicate_weights", description="LoRA to apply in the place of the fine-tune's own"
        ),
        LORA_SCALE,
        EXTRA_LORA,
        EXTRA_LORA_SCALE,
    ),
)

FLUX_FILL_DEV = Schema(
    name="flux-fill-dev",
    title="FLUX.1 Fill dev",
    loras=(MAIN,),
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

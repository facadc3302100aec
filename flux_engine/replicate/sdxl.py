"""The published schemas of SDXL models. They take no output format: files are png, of Turbo jpg."""

from __future__ import annotations

from dataclasses import replace

from flux_engine.replicate.inputs import (
    DISABLE_SAFETY_CHECKER,
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
from flux_engine.replicate.schema import Input, Schema, Sizing, Stacked, Steering

SDXL_PROMPT = replace(PROMPT, required=False, default="An astronaut riding a rainbow unicorn")
NEGATIVE_PROMPT = Input(
    name="negative_prompt", type="string", default="", field="negative_prompt", description="What to keep away from"
)
WIDTH = Input(name="width", type="integer", default=1024, field="width", description="Width of the picture in pixels")
HEIGHT = replace(WIDTH, name="height", field="height", description="Height of the picture in pixels")
SCHEDULER = Input(
    name="scheduler",
    type="string",
    default="K_EULER",
    choices=("DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "K_EULER_ANCESTRAL", "K_EULER", "PNDM"),
    field="scheduler",
    description="How to step from noise to the picture",
)
GUIDANCE_SCALE = Input(
    name="guidance_scale",
    type="number",
    default=7.5,
    ge=1,
    le=50,
    field="guidance_scale",
    description="Scale of classifier-free guidance: how closely to follow the prompt; 1 is off",
)
REFINE = Input(
    name="refine",
    type="string",
    default="no_refiner",
    choices=("no_refiner", "expert_ensemble_refiner", "base_image_refiner"),
    field="refine",
    description="Whether a refiner takes the last steps, goes over the finished picture, or does nothing",
)
HIGH_NOISE_FRAC = Input(
    name="high_noise_frac",
    type="number",
    default=0.8,
    ge=0,
    le=1,
    field="high_noise_frac",
    description="Share of the way before expert_ensemble_refiner takes over",
)
REFINE_STEPS = Input(
    name="refine_steps",
    type="integer",
    field="refine_steps",
    description="Steps of base_image_refiner; as many as num_inference_steps if left out",
)
APPLY_WATERMARK = Input(
    name="apply_watermark",
    type="boolean",
    default=True,
    description="Mark pictures, unseen, as made by a machine",
)
SDXL_LORA_SCALE = replace(LORA_SCALE, default=0.6, ge=0, le=1)

SDXL = Schema(
    name="sdxl",
    title="SDXL",
    nothing_left=NSFW_DETECTED,
    refiner="sdxl-refiner",
    loras=(Stacked("replicate_weights", "lora_scale"),),
    sizes_without_image=("width", "height"),
    inputs=(
        SDXL_PROMPT,
        NEGATIVE_PROMPT,
        IMAGE,
        MASK,
        WIDTH,
        HEIGHT,
        NUM_OUTPUTS,
        SCHEDULER,
        STEPS,
        GUIDANCE_SCALE,
        PROMPT_STRENGTH,
        SEED,
        REFINE,
        HIGH_NOISE_FRAC,
        REFINE_STEPS,
        APPLY_WATERMARK,
        SDXL_LORA_SCALE,
        replace(LORA_WEIGHTS, name="replicate_weights"),
        DISABLE_SAFETY_CHECKER,
    ),
)

SDXL_LIGHTNING_4STEP = Schema(
    name="sdxl-lightning-4step",
    title="SDXL Lightning in 4 steps",
    nothing_left=NSFW_DETECTED,
    inputs=(
        replace(SDXL_PROMPT, default="self-portrait of a woman, lightning in the background"),
        replace(NEGATIVE_PROMPT, default="worst quality, low quality"),
        replace(WIDTH, ge=256, le=1280),
        replace(HEIGHT, ge=256, le=1280),
        NUM_OUTPUTS,
        replace(SCHEDULER, choices=(*SCHEDULER.choices, "DPM++2MSDE")),
        replace(STEPS, default=4, le=10, description="Denoising steps; 4 is what it was made for"),
        replace(GUIDANCE_SCALE, default=0, ge=0, description="Scale of classifier-free guidance; up to 1 is off"),
        SEED,
        DISABLE_SAFETY_CHECKER,
    ),
)

SDXL_TURBO = Schema(
    name="sdxl-turbo",
    title="SDXL Turbo",
    nothing_left=NSFW_DETECTED,
    agreements={"agree_to_research_only": "this model may be used for research only: send true to agree"},
    output_format="jpg",
    inputs=(
        PROMPT,
        Input(
            name="agree_to_research_only",
            type="boolean",
            default=False,
            description="Whether you agree to use this model for research only, not commercially",
        ),
        replace(WIDTH, default=512),
        replace(HEIGHT, default=512),
        replace(NUM_OUTPUTS, le=30),
        replace(STEPS, default=1, le=4),
        SEED,
    ),
)

SDXL_LCM = Schema(
    name="sdxl-lcm",
    title="SDXL with LCM-LoRA",
    nothing_left=NSFW_DETECTED,
    model="sdxl",
    base_loras=("sdxl-lcm-lora",),
    loras=SDXL.loras,
    sizes_without_image=SDXL.sizes_without_image,
    always={"scheduler": "LCM"},
    inputs=(
        SDXL_PROMPT,
        NEGATIVE_PROMPT,
        IMAGE,
        MASK,
        WIDTH,
        HEIGHT,
        NUM_OUTPUTS,
        replace(STEPS, default=8, le=10, description="Denoising steps; 4 to 8 are best"),
        replace(
            GUIDANCE_SCALE,
            default=2,
            description="Scale of classifier-free guidance: 1 to 2; 1 is off, and ignores the negative prompt",
        ),
        PROMPT_STRENGTH,
        SEED,
        APPLY_WATERMARK,
        SDXL_LORA_SCALE,
        replace(LORA_WEIGHTS, name="replicate_weights"),
        DISABLE_SAFETY_CHECKER,
    ),
)

SDXL_CONTROLNET = Schema(
    name="sdxl-controlnet",
    title="SDXL with a Canny ControlNet",
    nothing_left=NSFW_DETECTED,
    model="sdxl",
    controlnets={"canny": "sdxl-controlnet-canny"},
    always={"guidance_scale": 5.0},  # what diffusers' pipeline does that is told nothing
    needs={"image": "give a picture: there are no edges to follow without one"},
    sizing=Sizing(table="buckets", image="image"),
    steering=(
        Steering(image="image", kind="canny", settings={"scale": "condition_scale"}, options={"low": 100, "high": 200}),
    ),
    single=True,
    seeds_from_one=True,
    inputs=(
        replace(IMAGE, field=None, description="Picture whose edges are found and followed"),
        replace(
            SDXL_PROMPT,
            default="aerial view, a futuristic research complex in a bright foggy jungle, hard lighting",
        ),
        replace(NEGATIVE_PROMPT, default="low quality, bad quality, sketches"),
        STEPS,
        Input(
            name="condition_scale",
            type="number",
            default=0.5,
            ge=0,
            le=1,
            description="How strictly the edges are followed",
        ),
        replace(SEED, default=0, description="Random seed; 0 draws one"),
    ),
)

PREPROCESSORS: dict[str, tuple[str, ...]] = {
    "edge_canny": ("canny",),
    "illusion": ("illusion",),
    "depth_leres": ("depth",),
    "depth_midas": ("depth",),
    "soft_edge_pidi": ("soft_edge",),
    "soft_edge_hed": ("soft_edge",),
    "lineart": ("lineart", "soft_edge"),
    "lineart_anime": ("lineart", "soft_edge"),
    "openpose": ("pose",),
}
"""What a ControlNet is chosen by -> the kinds of control picture that answer for it."""
STAND_INS = {
    "depth_leres": "depth_midas",
    "soft_edge_pidi": "soft_edge_hed",
    "lineart": "lineart_standard",
    "lineart_anime": "lineart_standard",
}
"""Whose networks are published as pickles only, which are not loaded -> what draws the same kind of picture."""


def _controlnet(name: str) -> tuple[Input, ...]:
    """The inputs of one of several ControlNets."""
    scale = Input(
        name=f"{name}_conditioning_scale",
        type="number",
        default=0.75,
        ge=0,
        le=4,
        description=f"How strictly {name} is followed",
    )
    return (
        Input(
            name=name,
            type="string",
            default="none",
            choices=("none", *PREPROCESSORS),
            description="What a ControlNet follows",
        ),
        Input(name=f"{name}_image", type="uri", description=f"Picture that {name} follows"),
        scale,
        replace(scale, name=f"{name}_start", default=0, le=1, description=f"Share of the steps before {name} begins"),
        replace(scale, name=f"{name}_end", default=1, le=1, description=f"Share of the steps after which {name} ends"),
    )


def _steering(name: str) -> Steering:
    """What they mean."""
    settings = {"scale": f"{name}_conditioning_scale", "start": f"{name}_start", "end": f"{name}_end"}
    return Steering(image=f"{name}_image", chosen=name, kinds=PREPROCESSORS, stand_ins=STAND_INS, settings=settings)


SEVERAL = ("controlnet_1", "controlnet_2", "controlnet_3")
SDXL_MULTI_CONTROLNET_LORA = Schema(
    name="sdxl-multi-controlnet-lora",
    title="SDXL with up to three ControlNets",
    nothing_left=NSFW_DETECTED,
    model="sdxl",
    refiner="sdxl-refiner",
    loras=(Stacked("lora_weights", "lora_scale"),),
    controlnets={
        "canny": "sdxl-controlnet-canny",
        "depth": "sdxl-controlnet-depth-small",
        "pose": "sdxl-controlnet-openpose",
        "soft_edge": "sdxl-controlnet-softedge",
        "illusion": "sdxl-controlnet-qrcode-monster",
    },
    sizing=Sizing(
        table="1024 wide",
        chosen="sizing_strategy",
        images={"input_image": "image", "mask_image": "mask"} | {f"{name}_image": f"{name}_image" for name in SEVERAL},
    ),
    steering=tuple(map(_steering, SEVERAL)),
    returns_controls=True,
    inputs=(
        SDXL_PROMPT,
        NEGATIVE_PROMPT,
        IMAGE,
        MASK,
        replace(WIDTH, default=768),
        replace(HEIGHT, default=768),
        Input(
            name="sizing_strategy",
            type="string",
            default="width_height",
            choices=(
                "width_height",
                "input_image",
                "controlnet_1_image",
                "controlnet_2_image",
                "controlnet_3_image",
                "mask_image",
            ),
            description="Where the size comes from: width and height, or one of the given pictures",
        ),
        NUM_OUTPUTS,
        SCHEDULER,
        replace(STEPS, default=30),
        GUIDANCE_SCALE,
        PROMPT_STRENGTH,
        SEED,
        replace(
            REFINE,
            choices=("no_refiner", "base_image_refiner"),
            description="Whether a refiner goes over the finished picture",
        ),
        REFINE_STEPS,
        APPLY_WATERMARK,
        SDXL_LORA_SCALE,
        LORA_WEIGHTS,
        DISABLE_SAFETY_CHECKER,
        *(one for name in SEVERAL for one in _controlnet(name)),
    ),
)

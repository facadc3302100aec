"""Inputs that published schemas share. Where one has another default or limit, its schema says so by `replace`."""

from __future__ import annotations

from dataclasses import replace

from flux_engine.replicate.schema import Input

NSFW_DETECTED = "NSFW content detected. Try running it again, or try a different prompt."
"""The error of a prediction whose pictures are all unsafe, as SDXL's predictors and the fine-tunes have it."""

PROMPT = Input(name="prompt", type="string", required=True, field="prompt", description="What the picture shows")
IMAGE = Input(name="image", type="uri", field="image", description="Picture to start from")
MASK = Input(
    name="mask", type="uri", field="mask", description="What to paint anew: white is painted, black is kept as it is"
)
PROMPT_STRENGTH = Input(
    name="prompt_strength",
    type="number",
    default=0.8,
    ge=0,
    le=1,
    field="strength",
    description="How far to leave the given picture: 1 keeps nothing of it",
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
STEPS = Input(
    name="num_inference_steps",
    type="integer",
    default=50,
    ge=1,
    le=500,
    field="num_inference_steps",
    description="Denoising steps",
)
SEED = Input(name="seed", type="integer", field="seed", description="Random seed; the same seed gives the same picture")
DISABLE_SAFETY_CHECKER = Input(
    name="disable_safety_checker",
    type="boolean",
    default=False,
    description="Return pictures without looking at what they show",
)
LORA_WEIGHTS = Input(
    name="lora_weights",
    type="string",
    description="LoRA to apply: a name on Replicate or Hugging Face, one that ships, or an address",
)
LORA_SCALE = Input(name="lora_scale", type="number", default=1, ge=-1, le=3, description="Strength of the LoRA")
EXTRA_LORA = replace(LORA_WEIGHTS, name="extra_lora", description="Another LoRA to apply beside the first")
EXTRA_LORA_SCALE = replace(LORA_SCALE, name="extra_lora_scale", description="Strength of the other LoRA")
HF_API_TOKEN = Input(name="hf_api_token", type="secret", description="Hugging Face token, for LoRAs that need one")
CIVITAI_API_TOKEN = Input(name="civitai_api_token", type="secret", description="CivitAI token, for LoRAs that need one")

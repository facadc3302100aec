"""What a model is, as frozen data: widths, sizes, schedule, defaults.

A variant is a base and `dataclasses.replace`. Code asks the spec for a property (`spec.transformer.guidance_embed`),
never a model for its name. Nothing here needs torch: a request is validated before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from flux_engine.errors import InvalidRequest
from flux_engine.params import (
    ClipParams,
    DiffusionSchedule,
    FlowSchedule,
    FluxParams,
    T5Params,
    UNetParams,
    VAEParams,
)
from flux_engine.sizes import SizeTable

Reads = Literal["nothing", "fill", "structure", "reference"]
"""What a network reads beside the latent: a picture with a hole and the hole's mask; a control picture; a picture that
is to be changed."""


@dataclass(frozen=True, kw_only=True)
class ControlNetSpec:
    """A ControlNet that was loaded."""

    name: str
    kinds: Mapping[str, int | None]
    """Kind of control picture -> the mode it is told, None for a network of one kind."""


UNION_MODES: Mapping[str, int] = MappingProxyType(
    {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "low_quality": 6}
)
"""Kind of control picture -> what a union ControlNet for FLUX.1 is told (InstantX/FLUX.1-dev-Controlnet-Union)."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything about a model that is not its weights."""

    family: ClassVar[str]
    name: str
    vae: VAEParams
    encoders: tuple[ClipParams | T5Params, ...]
    """The text encoders."""
    sizes: SizeTable
    num_inference_steps: int
    """Default number of denoising steps."""
    max_inference_steps: int = 1000
    guidance_scale: float | None = None
    """Default guidance scale; None for a model that takes none."""
    guidance_embedded: bool = True
    """Whether the network reads the guidance scale; else it is that of classifier-free guidance."""
    true_cfg_scale: float = 1.0
    """Default scale of classifier-free guidance when a negative prompt is given, where `guidance_scale` is not it."""
    reads: Reads = "nothing"
    structure: str = ""
    """Which control picture it is, where the network reads one: "canny", "depth"."""
    widened: bool = False
    """Whether its first layer has columns of zeros, for a LoRA that has it read a control picture beside the latent."""
    controlnets: tuple[ControlNetSpec, ...] = ()
    """Those that were loaded with it."""
    checker: str = "published"
    """The safety checker that a Predictor has look at its pictures, unless it is told which."""

    @property
    def controls(self) -> tuple[str, ...]:
        """The kinds of control picture that a request may bring."""
        own = (self.structure,) if self.reads == "structure" else ()
        return own + tuple(dict.fromkeys(kind for net in self.controlnets for kind in net.kinds))


@dataclass(frozen=True, kw_only=True)
class FluxSpec(ModelSpec):
    """A FLUX.1 model."""

    family: ClassVar[str] = "flux"
    transformer: FluxParams
    schedule: FlowSchedule
    max_sequence_length: int
    """T5 tokens a prompt is padded or cut to."""
    image_prompts: bool = False
    """Whether Redux was loaded with it, which reads pictures as prompts."""


@dataclass(frozen=True)
class Scheduler:
    """One of diffusers' schedulers."""

    kind: str
    """The class."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What is set in it besides the model's own config."""
    draws: bool = False
    """Whether it draws noise on the way, and so takes the pictures' generators."""


SCHEDULERS: Mapping[str, Scheduler] = MappingProxyType(
    {
        "DDIM": Scheduler("DDIMScheduler"),
        "DPMSolverMultistep": Scheduler("DPMSolverMultistepScheduler"),
        "HeunDiscrete": Scheduler("HeunDiscreteScheduler"),
        "KarrasDPM": Scheduler("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        "K_EULER_ANCESTRAL": Scheduler("EulerAncestralDiscreteScheduler", draws=True),
        "K_EULER": Scheduler("EulerDiscreteScheduler"),
        "PNDM": Scheduler("PNDMScheduler"),
        "DPM++2MSDE": Scheduler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, draws=True),
        "LCM": Scheduler("LCMScheduler", draws=True),
    }
)
"""SDXL's schedulers by the names that hosted models publish."""
LCM_STEPS = 50
"""Steps the LCM scheduler was distilled from, and so the most it takes."""


REFINER_STRENGTH = 0.3
"""Share of its steps that a refiner walks over a picture that is done."""


@dataclass(frozen=True, kw_only=True)
class SDXLSpec(ModelSpec):
    """An SDXL model."""

    family: ClassVar[str] = "sdxl"
    unet: UNetParams
    schedule: DiffusionSchedule
    zero_negative: bool = True
    """Without a negative prompt the other half of the guidance reads zeros, not the empty prompt."""
    aesthetic_score: bool = False
    """The refiner's: it is told a score instead of the target size, and has the second text encoder only."""
    refiner: SDXLSpec | None = None
    """The refiner that was loaded with it."""


def refined(spec: ModelSpec, refiner: ModelSpec | None) -> ModelSpec:
    """A model's spec with its refiner's, if there is one.

    Raises InvalidRequest for a refiner that is to draw by itself, for one beside a model that is not SDXL, and for a
    model that is none.
    """
    if isinstance(spec, SDXLSpec) and spec.aesthetic_score:
        raise InvalidRequest(
            f"{spec.name} refines what another model drew: load('sdxl', refiner={spec.name!r})", field="model"
        )
    if refiner is None:
        return spec
    if not (isinstance(refiner, SDXLSpec) and refiner.aesthetic_score):
        raise InvalidRequest(f"{refiner.name} is no refiner", field="refiner")
    if not isinstance(spec, SDXLSpec):
        raise InvalidRequest(f"{spec.name} is no SDXL model and takes no refiner", field="refiner")
    return replace(spec, refiner=refiner)


FLUX_SCHNELL = FluxSpec(
    name="flux-schnell",
    transformer=FluxParams(),
    vae=VAEParams(),
    encoders=(ClipParams(), T5Params()),
    schedule=FlowSchedule(shifted=False),
    sizes=SizeTable(),
    max_sequence_length=256,
    num_inference_steps=4,
    true_cfg_scale=2.0,
)

FLUX_DEV = replace(
    FLUX_SCHNELL,
    name="flux-dev",
    transformer=FluxParams(guidance_embed=True),
    schedule=FlowSchedule(shifted=True),
    max_sequence_length=512,
    num_inference_steps=28,
    guidance_scale=3.5,
)

# Reads a picture and its mask beside the latents: 16 channels each, and 8 x 8 mask pixels, in patches of 2 x 2.
FLUX_FILL = replace(
    FLUX_DEV,
    name="flux-fill-dev",
    transformer=FluxParams(guidance_embed=True, in_channels=384),
    guidance_scale=30.0,
    reads="fill",
    sizes=SizeTable(follow="area"),
)
FLUX_CANNY = replace(
    FLUX_DEV,
    name="flux-canny-dev",
    transformer=FluxParams(guidance_embed=True, in_channels=128),
    guidance_scale=30.0,
    reads="structure",
    structure="canny",
    sizes=SizeTable(follow="area"),
)
FLUX_DEPTH = replace(FLUX_CANNY, name="flux-depth-dev", guidance_scale=10.0, structure="depth")
FLUX_KONTEXT = replace(
    FLUX_DEV,
    name="flux-kontext-dev",
    guidance_scale=2.5,
    reads="reference",
    sizes=SizeTable(follow="preferred", table="kontext", classes=("1",)),
)

# Draws at a quarter of the published sizes: 1:1 is 256 px at one megapixel, 128 px at a quarter of it.
DEMO_DEV = replace(
    FLUX_DEV,
    name="demo-dev",
    checker="demo",
    transformer=FluxParams(
        vec_in_dim=64,
        context_in_dim=64,
        hidden_size=192,
        num_heads=3,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(8, 28, 28),
        guidance_embed=True,
    ),
    vae=VAEParams(channels=16, channel_multipliers=(1, 2, 4, 4), norm_groups=8),
    encoders=(
        ClipParams(hidden_size=64, layers=3, mlp=256),
        T5Params(d_model=64, layers=3, heads=4, d_kv=16, d_ff=128, vocabulary=286),
    ),
    sizes=SizeTable(divisor=4, min_side=32, max_side=512, max_pixels=512 * 512),
    max_sequence_length=40,
)

DEMO_SCHNELL = replace(
    DEMO_DEV,
    name="demo-schnell",
    transformer=replace(DEMO_DEV.transformer, guidance_embed=False),
    schedule=FLUX_SCHNELL.schedule,
    num_inference_steps=FLUX_SCHNELL.num_inference_steps,
    guidance_scale=None,
)

DEMO_FILL = replace(
    DEMO_SCHNELL,
    name="demo-fill",
    transformer=replace(DEMO_SCHNELL.transformer, in_channels=384),
    reads="fill",
    sizes=replace(DEMO_SCHNELL.sizes, follow="area"),
)

SDXL = SDXLSpec(
    name="sdxl",
    unet=UNetParams(),
    vae=VAEParams(latent_channels=4, scaling_factor=0.13025, shift_factor=0.0, quant_conv=True, force_upcast=True),
    encoders=(ClipParams(), ClipParams(hidden_size=1280, layers=32, mlp=5120, projection=True)),
    schedule=DiffusionSchedule(),
    sizes=SizeTable(multiple=8, classes=("1",), follow_limit=2048),
    num_inference_steps=50,
    guidance_scale=7.5,
    guidance_embedded=False,
)
SDXL_REFINER = replace(
    SDXL,
    name="sdxl-refiner",
    encoders=SDXL.encoders[1:],
    unet=UNetParams(
        block_out_channels=(384, 768, 1536, 1536),
        transformer_depth=(0, 4, 4, 0),
        mid_depth=4,
        cross_attention_dim=1280,
        add_embed_dim=2560,
    ),
    zero_negative=False,
    aesthetic_score=True,
)
SDXL_INPAINTING = replace(SDXL, name="sdxl-inpainting", unet=UNetParams(in_channels=9), reads="fill")
# Draws 512 px squares from pure noise in one to four steps, without guidance (arXiv 2311.17042).
SDXL_TURBO = replace(
    SDXL,
    name="sdxl-turbo",
    schedule=DiffusionSchedule(scheduler="K_EULER_ANCESTRAL", timestep_spacing="trailing"),
    sizes=SizeTable(multiple=8, classes=("0.25", "1")),
    num_inference_steps=1,
    guidance_scale=None,
)
# One spec for each number of steps (arXiv 2402.13929).
SDXL_LIGHTNING_4STEP = replace(
    SDXL,
    name="sdxl-lightning-4step",
    schedule=DiffusionSchedule(timestep_spacing="trailing"),
    num_inference_steps=4,
    guidance_scale=1.0,
)
SDXL_LIGHTNING_2STEP = replace(SDXL_LIGHTNING_4STEP, name="sdxl-lightning-2step", num_inference_steps=2)
SDXL_LIGHTNING_8STEP = replace(SDXL_LIGHTNING_4STEP, name="sdxl-lightning-8step", num_inference_steps=8)
# Reads its guidance scale, as FLUX.1 dev does (arXiv 2311.05556).
SDXL_LCM = replace(
    SDXL,
    name="sdxl-lcm",
    unet=UNetParams(guidance_embed=True),
    schedule=DiffusionSchedule(scheduler="LCM"),
    num_inference_steps=4,
    guidance_scale=8.0,
    guidance_embedded=True,
)

# Draws at a quarter of the published sizes. Predicts v: at pure noise, predicting noise says nothing of a picture.
DEMO_SDXL = replace(
    SDXL,
    name="demo-sdxl",
    checker="demo",
    unet=UNetParams(
        block_out_channels=(32, 64, 96),
        transformer_depth=(0, 1, 1),
        mid_depth=1,
        head_dim=32,
        cross_attention_dim=96,
        add_embed_dim=32 + 6 * 256,
    ),
    vae=VAEParams(
        latent_channels=4, channels=16, norm_groups=8, scaling_factor=0.24, shift_factor=0.0, quant_conv=True
    ),
    encoders=(DEMO_DEV.encoders[0], ClipParams(hidden_size=32, layers=3, mlp=128, projection=True)),
    schedule=DiffusionSchedule(prediction_type="v_prediction"),
    sizes=replace(DEMO_DEV.sizes, multiple=8, classes=("1",), follow_limit=2048),
    zero_negative=False,
    num_inference_steps=25,
    guidance_scale=2.0,
)
DEMO_SDXL_TURBO = replace(
    DEMO_SDXL,
    name="demo-sdxl-turbo",
    schedule=DiffusionSchedule(prediction_type="v_prediction", timestep_spacing="trailing"),
    num_inference_steps=4,
    guidance_scale=None,
)

SPECS: Mapping[str, ModelSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            FLUX_SCHNELL,
            FLUX_DEV,
            FLUX_FILL,
            FLUX_CANNY,
            FLUX_DEPTH,
            FLUX_KONTEXT,
            DEMO_SCHNELL,
            DEMO_DEV,
            DEMO_FILL,
            SDXL,
            SDXL_REFINER,
            SDXL_INPAINTING,
            SDXL_TURBO,
            SDXL_LIGHTNING_2STEP,
            SDXL_LIGHTNING_4STEP,
            SDXL_LIGHTNING_8STEP,
            SDXL_LCM,
            DEMO_SDXL,
            DEMO_SDXL_TURBO,
        )
    }
)

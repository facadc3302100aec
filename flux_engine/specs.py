"""What a model is, as frozen data: widths, sizes, schedule, defaults.

A variant is a base and `dataclasses.replace`. Code asks the spec for a property (`spec.transformer.guidance_embed`),
never a model for its name. Nothing here needs torch: a request is validated before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from types import MappingProxyType
from typing import ClassVar

from flux_engine.errors import InvalidRequest, WeightsError

Shapes = Mapping[str, Sequence[int]]
"""Tensor name -> shape, as read from a checkpoint's header."""


@dataclass(frozen=True, kw_only=True)
class FluxParams:
    """Widths and depths of a FLUX.1 transformer. The defaults are FLUX.1 schnell's."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    num_heads: int = 24
    mlp_ratio: float = 4.0
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: float = 10_000.0
    guidance_embed: bool = False

    def __post_init__(self) -> None:
        head_dim, rest = divmod(self.hidden_size, self.num_heads)
        if rest or sum(self.axes_dim) != head_dim:
            raise ValueError(
                f"hidden_size {self.hidden_size} over {self.num_heads} heads does not give axes_dim {self.axes_dim}"
            )

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FluxParams:
        """Read every width and depth off a checkpoint with Black Forest Labs' key names.

        Raises WeightsError naming the first key that is missing.
        """
        img_in = _shape(shapes, "img_in.weight")
        hidden, in_channels = img_in[0], img_in[1]
        head_dim = _shape(shapes, "double_blocks.0.img_attn.norm.query_norm.scale")[0]
        # A head's width is split as FLUX splits 128: an eighth for the index, the rest for rows and columns.
        index_dim = head_dim // 8
        return cls(
            in_channels=in_channels,
            out_channels=_shape(shapes, "final_layer.linear.weight")[0],
            vec_in_dim=_shape(shapes, "vector_in.in_layer.weight")[1],
            context_in_dim=_shape(shapes, "txt_in.weight")[1],
            hidden_size=hidden,
            num_heads=hidden // head_dim,
            mlp_ratio=_shape(shapes, "double_blocks.0.img_mlp.0.weight")[0] / hidden,
            depth=_count(shapes, "double_blocks."),
            depth_single_blocks=_count(shapes, "single_blocks."),
            axes_dim=(
                index_dim,
                (head_dim - index_dim) // 2,
                (head_dim - index_dim) // 2,
            ),
            guidance_embed="guidance_in.in_layer.weight" in shapes,
        )


@dataclass(frozen=True, kw_only=True)
class UNetParams:
    """Widths and depths of an SDXL UNet, the finest resolution first. The defaults are SDXL base's."""

    in_channels: int = 4
    """4, or 9 for inpainting: latent, mask and masked picture."""
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    """Transformer blocks in each attention of a resolution."""
    mid_depth: int = 10
    layers_per_block: int = 2
    head_dim: int = 64
    cross_attention_dim: int = 2048
    add_embed_dim: int = 2816
    """Width of the pooled text with the embedded sizes."""
    norm_groups: int = 32
    guidance_embed: bool = False

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> UNetParams:
        """Read every width and depth off a checkpoint with diffusers' key names, q, k and v joined. What no shape tells
        is SDXL's: heads 64 wide and 32 groups, or what divides the channels.

        Raises WeightsError naming the first key that is missing.
        """
        levels = _count(shapes, "down_blocks.")
        channels = tuple(_shape(shapes, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels))
        depth = tuple(_count(shapes, f"down_blocks.{i}.attentions.0.transformer_blocks.") for i in range(levels))
        return cls(
            in_channels=_shape(shapes, "conv_in.weight")[1],
            out_channels=_shape(shapes, "conv_out.weight")[0],
            block_out_channels=channels,
            transformer_depth=depth,
            mid_depth=_count(shapes, "mid_block.attentions.0.transformer_blocks."),
            layers_per_block=_count(shapes, "down_blocks.0.resnets."),
            head_dim=gcd(64, *channels),
            cross_attention_dim=_shape(shapes, "mid_block.attentions.0.transformer_blocks.0.attn2.to_kv.weight")[1],
            add_embed_dim=_shape(shapes, "add_embedding.linear_1.weight")[1],
            norm_groups=gcd(32, *channels),
            guidance_embed="time_embedding.cond_proj.weight" in shapes,
        )


@dataclass(frozen=True, kw_only=True)
class VAEParams:
    """Widths of the autoencoder. The defaults are FLUX's."""

    image_channels: int = 3
    latent_channels: int = 16
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    quant_conv: bool = False
    force_upcast: bool = False
    """Overflows in float16, and runs in another dtype."""

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> VAEParams:
        """Read every width and depth off a checkpoint with LDM's key names. What no shape tells is FLUX's: scaling, and
        32 groups, or as many as divide the channels.

        Raises WeightsError naming the first key that is missing.
        """
        channels = _shape(shapes, "decoder.norm_out.weight")[0]
        levels = _count(shapes, "decoder.up.")
        widths = [_shape(shapes, f"decoder.up.{level}.block.0.conv1.weight")[0] for level in range(levels)]
        return cls(
            image_channels=_shape(shapes, "decoder.conv_out.weight")[0],
            latent_channels=_shape(shapes, "decoder.conv_in.weight")[1],
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            num_res_blocks=_count(shapes, "decoder.up.0.block.") - 1,
            norm_groups=gcd(32, channels),
            quant_conv="quant_conv.weight" in shapes,
        )

    @property
    def downscale(self) -> int:
        """How many pixels a latent position covers along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """FLUX's time shift: none for schnell, by the number of image tokens for dev.

    The exponent goes linearly from `base_shift` at `base_tokens` to `max_shift` at `max_tokens`.
    Source: black-forest-labs/flux, src/flux/sampling.py.
    """

    shifted: bool
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096


@dataclass(frozen=True, kw_only=True)
class DiffusionSchedule:
    """SDXL's noise schedule, betas evenly spaced between their square roots, and how its timesteps are walked."""

    scheduler: str = "K_EULER"
    """Default scheduler, one of `SCHEDULERS`."""
    prediction_type: str = "epsilon"
    """What the network predicts: "epsilon" or "v_prediction"."""
    timestep_spacing: str = "leading"
    """"leading", or "trailing", which begins with pure noise: for distilled models."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000


PUBLISHED_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "1:1": (1024, 1024),
        "16:9": (1344, 768),
        "21:9": (1536, 640),
        "3:2": (1216, 832),
        "2:3": (832, 1216),
        "4:5": (896, 1088),
        "5:4": (1088, 896),
        "3:4": (896, 1152),
        "4:3": (1152, 896),
        "9:16": (768, 1344),
        "9:21": (640, 1536),
    }
)
"""Aspect ratio -> (width, height) at one megapixel, as the hosted FLUX models publish them."""

MEGAPIXELS = ("1", "0.25")


@dataclass(frozen=True, kw_only=True)
class SizeTable:
    """Which picture sizes a model has. Every side is in pixels."""

    divisor: int = 1
    """The published sizes are divided by this. 1 for published models; small demo models have more."""
    multiple: int = 16
    """Sides are multiples of this: 8 for the autoencoder, 2 for the transformer's patches."""
    min_side: int = 128
    max_side: int = 2048
    max_pixels: int = 2048 * 2048

    def named(self, aspect_ratio: str, megapixels: str = "1") -> tuple[int, int]:
        """(width, height) of a published aspect ratio. Raises InvalidRequest for a name that is not in the table."""
        if aspect_ratio not in PUBLISHED_SIZES:
            raise InvalidRequest(
                f"aspect_ratio {aspect_ratio!r} is not one of {', '.join(PUBLISHED_SIZES)}; "
                "for another size give width and height",
                field="aspect_ratio",
            )
        if megapixels not in MEGAPIXELS:
            raise InvalidRequest(
                f"megapixels {megapixels!r} is not one of {', '.join(map(repr, MEGAPIXELS))}",
                field="megapixels",
            )
        divisor = self.divisor * (1 if megapixels == "1" else 2)
        width, height = PUBLISHED_SIZES[aspect_ratio]
        return self._round(width / divisor), self._round(height / divisor)

    def _round(self, side: float) -> int:
        return int(side / self.multiple + 0.5) * self.multiple


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything about a model that is not its weights."""

    family: ClassVar[str] = ""
    name: str
    vae: VAEParams
    sizes: SizeTable
    default_size: str = "1"
    """Megapixels of a picture when nothing is asked for."""
    num_inference_steps: int
    """Default number of denoising steps."""
    max_inference_steps: int = 1000
    guidance_scale: float | None = None
    """Default guidance scale; None for a model that takes none."""
    guidance_embedded: bool = True
    """Whether the network reads the guidance scale; else it is that of classifier-free guidance."""
    true_cfg_scale: float = 1.0
    """Default scale of classifier-free guidance when a negative prompt is given, where `guidance_scale` is not it."""

    @property
    def needs_picture(self) -> bool:
        """Whether the network reads a picture beside the latent."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FluxSpec(ModelSpec):
    """A FLUX.1 model."""

    family: ClassVar[str] = "flux"
    transformer: FluxParams
    schedule: FlowSchedule
    max_sequence_length: int
    """T5 tokens a prompt is padded or cut to."""

    @property
    def needs_picture(self) -> bool:
        return self.transformer.in_channels != 4 * self.vae.latent_channels


SCHEDULERS = (
    "DDIM",
    "DPMSolverMultistep",
    "HeunDiscrete",
    "KarrasDPM",
    "K_EULER_ANCESTRAL",
    "K_EULER",
    "PNDM",
    "DPM++2MSDE",
    "LCM",
)
"""Names of SDXL's schedulers, as hosted models publish them."""
LCM_STEPS = 50
"""Steps the LCM scheduler was distilled from, and so the most it takes."""


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

    @property
    def needs_picture(self) -> bool:
        return self.unet.in_channels != self.vae.latent_channels


FLUX_SCHNELL = FluxSpec(
    name="flux-schnell",
    transformer=FluxParams(),
    vae=VAEParams(),
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
)
FLUX_CANNY = replace(
    FLUX_DEV,
    name="flux-canny-dev",
    transformer=FluxParams(guidance_embed=True, in_channels=128),
    guidance_scale=30.0,
)
FLUX_DEPTH = replace(FLUX_CANNY, name="flux-depth-dev", guidance_scale=10.0)
FLUX_KONTEXT = replace(FLUX_DEV, name="flux-kontext-dev", guidance_scale=2.5)

# Draws at a quarter of the published sizes: 1:1 is 256 px at one megapixel, 128 px at a quarter of it.
DEMO_DEV = replace(
    FLUX_DEV,
    name="demo-dev",
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

SDXL = SDXLSpec(
    name="sdxl",
    unet=UNetParams(),
    vae=VAEParams(latent_channels=4, scaling_factor=0.13025, shift_factor=0.0, quant_conv=True, force_upcast=True),
    schedule=DiffusionSchedule(),
    sizes=SizeTable(multiple=8),
    num_inference_steps=50,
    guidance_scale=7.5,
    guidance_embedded=False,
)
SDXL_REFINER = replace(
    SDXL,
    name="sdxl-refiner",
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
SDXL_INPAINTING = replace(SDXL, name="sdxl-inpainting", unet=UNetParams(in_channels=9))
# Draws 512 px squares from pure noise in one to four steps, without guidance (arXiv 2311.17042).
SDXL_TURBO = replace(
    SDXL,
    name="sdxl-turbo",
    schedule=DiffusionSchedule(scheduler="K_EULER_ANCESTRAL", timestep_spacing="trailing"),
    default_size="0.25",
    num_inference_steps=1,
    guidance_scale=None,
)
# One spec for each number of steps (arXiv 2402.13929).
SDXL_LIGHTNING_4STEP = replace(
    SDXL,
    name="sdxl-lightning-4step",
    schedule=DiffusionSchedule(timestep_spacing="trailing"),
    num_inference_steps=4,
    guidance_scale=None,
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
    schedule=DiffusionSchedule(prediction_type="v_prediction"),
    sizes=SizeTable(divisor=4, multiple=8, min_side=32, max_side=512, max_pixels=512 * 512),
    num_inference_steps=25,
    guidance_scale=3.0,
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


def _shape(shapes: Shapes, key: str) -> Sequence[int]:
    if key not in shapes:
        raise WeightsError(f"no tensor {key!r}: this is not the network it seems to be")
    return shapes[key]


def _count(shapes: Shapes, prefix: str) -> int:
    """Number of blocks whose keys start with `prefix` and a number."""
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})

"""What a model is, as frozen data: widths, sizes, schedule, defaults.

A variant is a base and `dataclasses.replace`. Code asks the spec for a property (`spec.transformer.guidance_embed`),
never a model for its name. Nothing here needs torch: a request is validated before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from types import MappingProxyType

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

    name: str
    family: str
    transformer: FluxParams
    vae: VAEParams
    schedule: FlowSchedule
    sizes: SizeTable
    max_sequence_length: int
    """T5 tokens a prompt is padded or cut to."""
    num_inference_steps: int
    """Default number of denoising steps."""
    max_inference_steps: int = 1000
    guidance_scale: float | None = None
    """Default of the guidance embedding; None for a model without one."""
    true_cfg_scale: float = 1.0
    """Default scale of classifier-free guidance when a negative prompt is given."""


FLUX_SCHNELL = ModelSpec(
    name="flux-schnell",
    family="flux",
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

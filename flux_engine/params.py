"""Widths and depths of the networks, and noise schedules, as frozen data that a checkpoint's shapes can give.

Nothing here needs torch: a request is validated before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import gcd

from flux_engine.errors import WeightsError

Shapes = Mapping[str, Sequence[int]]
"""Tensor name -> shape, as read from a checkpoint's header."""


@dataclass(frozen=True, kw_only=True)
class FluxTrunkParams:
    """What a FLUX.1 transformer and its ControlNets have in common. The defaults are FLUX.1 schnell's."""

    in_channels: int = 64
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


@dataclass(frozen=True, kw_only=True)
class FluxParams(FluxTrunkParams):
    """Widths and depths of a FLUX.1 transformer. The defaults are FLUX.1 schnell's."""

    out_channels: int = 64

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FluxParams:
        """Read every width and depth off a checkpoint with Black Forest Labs' key names.

        Raises WeightsError naming the first key that is missing.
        """
        return cls(**vars(_trunk(shapes)), out_channels=_shape(shapes, "final_layer.linear.weight")[0])


@dataclass(frozen=True, kw_only=True)
class FluxControlNetParams(FluxTrunkParams):
    """Widths and depths of a ControlNet for FLUX.1. The defaults are InstantX's canny's."""

    depth: int = 5
    depth_single_blocks: int = 0
    guidance_embed: bool = True
    hint_channels: int = 64
    """Of the tokens that steer."""
    hint_width: int = 0
    """Of the convolutions that make those tokens of a picture, XLabs' way; 0 where they are a latent's."""
    num_modes: int = 0
    """How many kinds of hint one network tells apart (union); 0 for one that is not told."""

    @classmethod
    def of(cls, flux: FluxParams, *, depth: int, depth_single_blocks: int) -> FluxControlNetParams:
        """One of this depth for this transformer."""
        own = ("depth", "depth_single_blocks")
        common = {f.name: getattr(flux, f.name) for f in fields(FluxTrunkParams) if f.name not in own}
        return cls(**common, depth=depth, depth_single_blocks=depth_single_blocks)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FluxControlNetParams:
        """Read every width and depth off a checkpoint with Black Forest Labs' key names.

        Raises WeightsError naming the first key that is missing.
        """
        return cls(
            **vars(_trunk(shapes)),
            hint_channels=_shape(shapes, "controlnet_x_embedder.weight")[1],
            hint_width=shapes.get("input_hint_block.0.weight", (0,))[0],
            num_modes=shapes.get("controlnet_mode_embedder.weight", (0,))[0],
        )


@dataclass(frozen=True, kw_only=True)
class UNetEncoderParams:
    """What a UNet and its ControlNets have in common: all but the way up, the finest resolution first. The defaults
    are SDXL base's."""

    in_channels: int = 4
    """4, or 9 for inpainting: latent, mask and masked picture."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    head_dim: int = 64
    cross_attention_dim: int = 2048
    add_embed_dim: int = 2816
    """Width of the pooled text with the embedded sizes."""
    norm_groups: int = 32

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]


@dataclass(frozen=True, kw_only=True)
class UNetParams(UNetEncoderParams):
    """Widths and depths of an SDXL UNet. The defaults are SDXL base's."""

    out_channels: int = 4
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    """Transformer blocks in each attention of a resolution; 0 for one without."""
    mid_depth: int = 10
    guidance_embed: bool = False

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> UNetParams:
        """Read every width and depth off a checkpoint with diffusers' key names, q, k and v joined. What no shape tells
        is SDXL's: heads 64 wide and 32 groups, or what divides the channels.

        Raises WeightsError naming the first key that is missing.
        """
        found = _encoder(shapes, _shape(shapes, "mid_block.attentions.0.transformer_blocks.0.attn2.to_kv.weight")[1])
        levels = range(len(found.block_out_channels))
        return cls(
            **vars(found),
            out_channels=_shape(shapes, "conv_out.weight")[0],
            transformer_depth=tuple(_depth(shapes, f"down_blocks.{i}.") or 0 for i in levels),
            mid_depth=count_of(shapes, "mid_block.attentions.0.transformer_blocks."),
            guidance_embed="time_embedding.cond_proj.weight" in shapes,
        )


@dataclass(frozen=True, kw_only=True)
class UNetControlNetParams(UNetEncoderParams):
    """Widths and depths of a ControlNet for SDXL's UNet. The defaults are those of a full one, whose encoder is SDXL
    base's: the published "mid" has depths (None, 0, 1) and 1, "small" (None, None, None) and 0."""

    transformer_depth: tuple[int | None, ...] = (None, 2, 10)
    """Transformer blocks in each attention of a resolution: None where there is none, 0 for one of no blocks, which
    still projects twice."""
    mid_depth: int | None = 10
    """The same of the middle, which is one residual block where there is no attention."""
    conditioning_channels: int = 3
    """Of the picture that steers."""
    embedding_channels: tuple[int, ...] = (16, 32, 96, 256)
    """Widths that the picture goes through, each but the first at half the resolution of the one before."""

    @property
    def reads_text(self) -> bool:
        """Whether any block does. Of what text, no shape tells otherwise."""
        return any((*self.transformer_depth, self.mid_depth))

    @classmethod
    def of(cls, unet: UNetParams) -> UNetControlNetParams:
        """A full one for this UNet."""
        return cls(
            **{field.name: getattr(unet, field.name) for field in fields(UNetEncoderParams)},
            transformer_depth=tuple(depth or None for depth in unet.transformer_depth),
            mid_depth=unet.mid_depth,
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> UNetControlNetParams:
        """Read every width and depth off a checkpoint with diffusers' key names, q, k and v joined. What no shape tells
        is SDXL's, as for the UNet; so is the width of the text for a network that does not read it.

        Raises WeightsError naming the first key that is missing.
        """
        readers = (shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_kv.weight"))
        found = _encoder(shapes, next(readers, cls.cross_attention_dim))
        levels = range(len(found.block_out_channels))
        hint = "controlnet_cond_embedding."
        first = _shape(shapes, f"{hint}conv_in.weight")
        steps = range(1, count_of(shapes, f"{hint}blocks."), 2)
        return cls(
            **vars(found),
            transformer_depth=tuple(_depth(shapes, f"down_blocks.{i}.") for i in levels),
            mid_depth=_depth(shapes, "mid_block."),
            conditioning_channels=first[1],
            embedding_channels=(first[0], *(_shape(shapes, f"{hint}blocks.{i}.weight")[0] for i in steps)),
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
        levels = count_of(shapes, "decoder.up.")
        widths = [_shape(shapes, f"decoder.up.{level}.block.0.conv1.weight")[0] for level in range(levels)]
        return cls(
            image_channels=_shape(shapes, "decoder.conv_out.weight")[0],
            latent_channels=_shape(shapes, "decoder.conv_in.weight")[1],
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            num_res_blocks=count_of(shapes, "decoder.up.0.block.") - 1,
            norm_groups=gcd(32, channels),
            quant_conv="quant_conv.weight" in shapes,
        )

    @property
    def downscale(self) -> int:
        """How many pixels a latent position covers along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True, kw_only=True)
class ReduxParams:
    """Widths of FLUX.1 Redux's adapter. The defaults are the published one's."""

    in_dim: int = 1152
    """Of what the vision tower gives."""
    text_dim: int = 4096

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> ReduxParams:
        """Read off a checkpoint. Raises WeightsError for a key that is missing, or is no matrix."""
        up, down = _shape(shapes, "redux_up.weight"), _shape(shapes, "redux_down.weight")
        if len(up) != 2 or len(down) != 2:
            raise WeightsError(f"'redux_up.weight' {list(up)} and 'redux_down.weight' {list(down)} are no matrices")
        return cls(in_dim=up[1], text_dim=down[0])


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


def _trunk(shapes: Shapes) -> FluxTrunkParams:
    """What a FLUX.1 transformer and a ControlNet tell alike."""
    img_in = _shape(shapes, "img_in.weight")
    hidden, in_channels = img_in[0], img_in[1]
    head_dim = _shape(shapes, "double_blocks.0.img_attn.norm.query_norm.scale")[0]
    # A head's width is split as FLUX splits 128: an eighth for the index, the rest for rows and columns.
    index_dim = head_dim // 8
    return FluxTrunkParams(
        in_channels=in_channels,
        vec_in_dim=_shape(shapes, "vector_in.in_layer.weight")[1],
        context_in_dim=_shape(shapes, "txt_in.weight")[1],
        hidden_size=hidden,
        num_heads=hidden // head_dim,
        mlp_ratio=_shape(shapes, "double_blocks.0.img_mlp.0.weight")[0] / hidden,
        depth=count_of(shapes, "double_blocks."),
        depth_single_blocks=count_of(shapes, "single_blocks."),
        axes_dim=(index_dim, (head_dim - index_dim) // 2, (head_dim - index_dim) // 2),
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )


def _encoder(shapes: Shapes, cross_attention_dim: int) -> UNetEncoderParams:
    """What a UNet and a ControlNet tell alike."""
    levels = count_of(shapes, "down_blocks.")
    channels = tuple(_shape(shapes, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels))
    return UNetEncoderParams(
        in_channels=_shape(shapes, "conv_in.weight")[1],
        block_out_channels=channels,
        layers_per_block=count_of(shapes, "down_blocks.0.resnets."),
        head_dim=gcd(64, *channels),
        cross_attention_dim=cross_attention_dim,
        add_embed_dim=_shape(shapes, "add_embedding.linear_1.weight")[1],
        norm_groups=gcd(32, *channels),
    )


def _depth(shapes: Shapes, block: str) -> int | None:
    """Transformer blocks in each attention of a block, None if it has no attention."""
    blocks = count_of(shapes, f"{block}attentions.0.transformer_blocks.")
    return blocks if blocks or f"{block}attentions.0.norm.weight" in shapes else None


def _shape(shapes: Shapes, key: str) -> Sequence[int]:
    if key not in shapes:
        raise WeightsError(f"no tensor {key!r}: this is not the network it seems to be")
    return shapes[key]


def count_of(shapes: Shapes, prefix: str) -> int:
    """Number of blocks whose keys start with `prefix` and a number."""
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})


@dataclass(frozen=True, kw_only=True)
class ClipParams:
    """Widths and depth of a CLIP text encoder. The defaults are CLIP-L's."""

    hidden_size: int = 768
    layers: int = 12
    mlp: int = 3072
    vocabulary: int = 49408
    positions: int = 77
    projection: bool = False


@dataclass(frozen=True, kw_only=True)
class T5Params:
    """Widths and depth of a T5 encoder of version 1.1. The defaults are those of XXL."""

    d_model: int = 4096
    layers: int = 24
    heads: int = 64
    d_kv: int = 64
    d_ff: int = 10240
    vocabulary: int = 32128

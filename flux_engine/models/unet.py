"""SDXL's UNet: base, refiner, inpainting and what was distilled from them.

Attribute names are those of diffusers' UNet2DConditionModel, except that q, k and v are joined: `attn1.to_qkv`,
`attn2.to_kv`. Source of the architecture: SDXL (arXiv 2307.01952), as in Stability-AI/generative-models,
sgm/modules/diffusionmodules/openaimodel.py.

What differs from the reference: everything that depends on the prompt and the schedule but not on the latent is made
once by `precompute`: the embedding of time, size and pooled text as every residual block adds it, for every call, and
keys and values of the text in every cross-attention. `forward` has no linear that reads anything but the picture.

Shapes: B batch, S calls, C channels, h w latent size, L tokens (L = h w inside a block), H heads, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine import ops
from flux_engine.models.layers import NormSiLU, Residuals, Stepwise
from flux_engine.models.unet_attention import CrossAttention, Transformer, UNetStatics
from flux_engine.params import UNetEncoderParams, UNetParams

IDS_DIM = 256
"""Width of the sinusoidal embedding of each of the numbers that tell sizes and crops, and of the guidance scale."""


class Embedder(nn.Module):
    """Two linears with SiLU between."""

    def __init__(self, in_dim: int, dim: int, guidance: bool = False) -> None:
        super().__init__()
        self.guidance = guidance
        if guidance:
            self.cond_proj = nn.Linear(IDS_DIM, in_dim, bias=False)
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, params: UNetEncoderParams) -> None:
        super().__init__()
        self.norm1 = NormSiLU(params.norm_groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(params.time_embed_dim, out_channels)
        self.norm2 = NormSiLU(params.norm_groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_width = in_channels != out_channels
        self.number = 0
        """Which of the statics is this block's."""

    def forward(self, x: Tensor, statics: UNetStatics) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w). `statics` are those of one call."""
        update = self.conv1(self.norm1(x)) + statics.time[self.number]
        update = self.conv2(self.norm2(update))
        return (self.conv_shortcut(x) if self.changes_width else x) + update


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """To `size` (h, w), which is not always twice as much: what was odd had been rounded up."""
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, each with attention or, without a depth, all without. `widths` are (in, out) of
    each block."""

    def __init__(self, widths: Iterable[tuple[int, int]], depth: int | None, params: UNetEncoderParams) -> None:
        super().__init__()
        widths = list(widths)
        self.resnets = nn.ModuleList(ResnetBlock(a, b, params) for a, b in widths)
        if depth is not None:
            self.attentions = nn.ModuleList(Transformer(b, depth, params) for _, b in widths)
        self.attends = depth is not None

    def block(self, i: int, x: Tensor, statics: UNetStatics) -> Tensor:
        """The i-th block."""
        x = self.resnets[i](x, statics)
        return self.attentions[i](x, statics) if self.attends else x


class DownLevel(Level):
    def __init__(
        self, widths: Iterable[tuple[int, int]], depth: int | None, params: UNetEncoderParams, *, last: bool
    ) -> None:
        widths = list(widths)
        super().__init__(widths, depth, params)
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(widths[-1][1])])
        self.last = last

    def forward(self, x: Tensor, statics: UNetStatics) -> list[Tensor]:
        """What every block gives, and the step down: for the way up, which begins with the last of them."""
        passed: list[Tensor] = []
        for i in range(len(self.resnets)):
            x = self.block(i, x, statics)
            passed.append(x)
        if not self.last:
            passed.append(self.downsamplers[0](x))
        return passed


class UpLevel(Level):
    def __init__(
        self, widths: Iterable[tuple[int, int]], depth: int | None, params: UNetEncoderParams, *, last: bool
    ) -> None:
        widths = list(widths)
        super().__init__(widths, depth, params)
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(widths[-1][1])])
        self.last = last

    def forward(self, x: Tensor, passed: list[Tensor], statics: UNetStatics) -> Tensor:
        """Takes off `passed` what it reads."""
        for i in range(len(self.resnets)):
            x = self.block(i, torch.cat((x, passed.pop()), dim=1), statics)
        return x if self.last else self.upsamplers[0](x, passed[-1].shape[2:])


class Middle(nn.Module):
    """Attention between two residual blocks; without a depth one residual block."""

    def __init__(self, channels: int, depth: int | None, params: UNetEncoderParams) -> None:
        super().__init__()
        self.attends = depth is not None
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, params) for _ in range(1 + self.attends))
        if depth is not None:
            self.attentions = nn.ModuleList([Transformer(channels, depth, params)])

    def forward(self, x: Tensor, statics: UNetStatics) -> Tensor:
        x = self.resnets[0](x, statics)
        return self.resnets[1](self.attentions[0](x, statics), statics) if self.attends else x


class UNetEncoder(Stepwise):
    """What a UNet and its ControlNets have in common: the way down, and what is made once for a request.

    `depths` are transformer blocks in each attention of a resolution and `mid_depth` those of the middle, None where
    there is no attention.
    """

    alike: ClassVar[bool] = False
    precomputed: ClassVar[str] = r"(time|add)_embedding\..*|.*\.time_emb_proj\..*|.*\.attn2\.to_kv\..*"
    """Parameters that only `precompute` reads, as a regular expression."""
    blocks: ClassVar[str] = r"(down_blocks|mid_block|up_blocks)\..*"
    """Parameters that may leave the device as a whole. The rest is small, and stays."""

    def __init__(
        self, params: UNetEncoderParams, depths: Sequence[int | None], mid_depth: int | None, *, guidance: bool = False
    ) -> None:
        super().__init__()
        channels, count = params.block_out_channels, params.layers_per_block
        last = len(channels) - 1
        self.time_embedding = Embedder(channels[0], params.time_embed_dim, guidance=guidance)
        self.add_embedding = Embedder(params.add_embed_dim, params.time_embed_dim)
        self.conv_in = nn.Conv2d(params.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownLevel(
                [(channels[max(i - 1, 0)], width)] + [(width, width)] * (count - 1), depths[i], params, last=i == last
            )
            for i, width in enumerate(channels)
        )
        self.mid_block = Middle(channels[-1], mid_depth, params)
        self._number_blocks()

    def _number_blocks(self) -> None:
        """Give every block its place among the statics; again once there are more."""
        self._resnets = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        self._attentions = [module for module in self.modules() if isinstance(module, CrossAttention)]
        for modules in (self._resnets, self._attentions):
            for number, module in enumerate(modules):
                module.number = number

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def precompute(
        self,
        context: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        timesteps: Tensor,
        guidance: Tensor | None = None,
    ) -> UNetStatics:
        """Everything that does not depend on the latent, for all calls at once.

        context (B, L, cross_attention_dim): the text encoders' tokens. pooled (B, pooled_dim). time_ids (B, N):
        sizes and crops in pixels, and the refiner's aesthetic score. timesteps (S,) in [0, 1000), one per call, or
        (S, B) if the rows differ. guidance (B,): the guidance scale, for a network that has it embedded (LCM).
        """
        if (guidance is not None) != self.time_embedding.guidance:
            raise ValueError(f"guidance_embed is {self.time_embedding.guidance}, guidance is {guidance!r}")
        dtype, batch = self.dtype, context.shape[0]
        t = timesteps if timesteps.dim() == 2 else timesteps[:, None].expand(-1, batch)
        embedded = ops.sinusoidal_embedding(t.reshape(-1), self.conv_in.out_channels, time_factor=1.0)
        embedded = embedded.to(dtype).unflatten(0, t.shape)  # (S, B, C)
        if guidance is not None:
            embedded = embedded + self.time_embedding.cond_proj(guidance_embedding(guidance, IDS_DIM).to(dtype))
        ids = ops.sinusoidal_embedding(time_ids.reshape(-1), IDS_DIM, time_factor=1.0).reshape(batch, -1)
        added = self.add_embedding(torch.cat((pooled.to(dtype), ids.to(dtype)), dim=-1))
        activated = F.silu(self.time_embedding(embedded) + added)  # (S, B, D)
        context = context.to(dtype)
        return UNetStatics(
            time=tuple(block.time_emb_proj(activated)[..., None, None] for block in self._resnets),
            text=tuple(layer.keys_and_values(context) for layer in self._attentions),
        )

    def enter(self, x: Tensor) -> Tensor:
        """x (B, in_channels, h, w) -> (B, C, h, w), in the weights' dtype, channels last."""
        return self.conv_in(x.to(self.dtype).contiguous(memory_format=torch.channels_last))

    def down(self, x: Tensor, statics: UNetStatics) -> list[Tensor]:
        """From what `enter` gives to what is passed on the way down, that first: the middle reads the last of it, and
        the way up all of it."""
        passed = [x]
        for level in cast("Iterable[DownLevel]", self.down_blocks):
            passed += self.call_block(level, passed[-1], statics)
        return passed


class UNet(UNetEncoder):
    """Predicts the noise in a latent, or what the model was taught to predict of it."""

    def __init__(self, params: UNetParams) -> None:
        depths = [depth or None for depth in params.transformer_depth]
        super().__init__(params, depths, params.mid_depth, guidance=params.guidance_embed)
        self.params = params
        channels, count = params.block_out_channels, params.layers_per_block
        last = len(channels) - 1
        # Every block on the way up reads one that was passed on the way down: of its own resolution, and at last of the
        # one above, which is the step down to this one.
        self.up_blocks = nn.ModuleList(
            UpLevel(
                [
                    ((channels[min(i + 1, last)] if j == 0 else width) + (above if j == count else width), width)
                    for j in range(count + 1)
                ],
                depths[i],
                params,
                last=i == 0,
            )
            for i, width, above in reversed(list(zip(range(last + 1), channels, channels[:1] + channels, strict=False)))
        )
        self.conv_norm_out = NormSiLU(params.norm_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], params.out_channels, 3, padding=1)
        self._number_blocks()

    def forward(self, x: Tensor, call: int, statics: UNetStatics, residuals: Residuals | None = None) -> Tensor:
        """The prediction at call number `call`. x (B, in_channels, h, w) -> (B, out_channels, h, w), in the weights'
        dtype.

        `residuals` are a ControlNet's: one for each that is passed on the way down, and the middle's last.
        """
        return self.call_step(self.predict, x, statics.at(call), residuals)

    def predict(self, x: Tensor, statics: UNetStatics, residuals: Residuals | None) -> Tensor:
        """`forward` with what one call reads of the statics."""
        passed = self.down(self.enter(x), statics)
        x = self.call_block(self.mid_block, passed[-1], statics)
        if residuals is not None:
            *passed, x = (
                state if added is None else state + added for state, added in zip((*passed, x), residuals, strict=True)
            )
        for level in cast("Iterable[UpLevel]", self.up_blocks):
            x = self.call_block(level, x, passed, statics)
        return self.conv_out(self.conv_norm_out(x))


def guidance_embedding(scale: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of guidance scales (B,) -> float32 (B, dim), sines before cosines.

    Source: latent consistency models (arXiv 2310.04378): of (scale - 1) times 1000.
    """
    half = dim // 2
    frequency = torch.exp(
        torch.arange(half, dtype=torch.float32, device=scale.device) * -(math.log(10_000) / (half - 1))
    )
    angle = ((scale.float() - 1) * 1000)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)

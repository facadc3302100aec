"""The attention of SDXL's UNet: transformer blocks over the positions of a feature map.

What depends on the prompt and the schedule alone is among the statics (`UNet.precompute`).
Shapes: B batch, S calls, L tokens, H heads, D width, C channels, h w size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux_engine.attention import attention
from flux_engine.linears import geglu, linear, normed
from flux_engine.models.layers import BatchRows, GroupNorm, merge_heads
from flux_engine.params import UNetEncoderParams


@dataclass(frozen=True)
class UNetStatics:
    """What `precompute` makes for one prompt batch and one schedule; frozen for the whole request."""

    time: tuple[Tensor, ...]
    """For each residual block what it adds to its channels (S, B, C, 1, 1)."""
    text: tuple[tuple[Tensor, Tensor], ...]
    """For each cross-attention the text's keys and values, each (B, H, L, D)."""

    def at(self, call: int) -> UNetStatics:
        """What one call reads: the same without the axis of calls."""
        return UNetStatics(tuple(rows[call] for rows in self.time), self.text)

    @staticmethod
    def cat(parts: Sequence[UNetStatics]) -> UNetStatics:
        """The statics of several prompts as those of one batch."""
        return UNetStatics(
            time=tuple(torch.cat(rows, dim=1) for rows in zip(*(p.time for p in parts), strict=True)),
            text=tuple(
                (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))
                for pairs in zip(*(p.text for p in parts), strict=True)
            ),
        )

    def of(self, rows: BatchRows) -> UNetStatics:
        """Some rows of the batch alone."""
        return UNetStatics(
            time=tuple(one[:, rows] for one in self.time), text=tuple((k[rows], v[rows]) for k, v in self.text)
        )


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, L, H D) -> (B, H, L, D)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """x plus the attention of `norm(x)`. (B, L, D) -> (B, L, D)."""
        qkv = linear(self.to_qkv, normed(self.to_qkv, norm, x))
        q, k, v = (split_heads(part, self.head_dim) for part in qkv.chunk(3, dim=-1))
        return linear(self.to_out[0], merge_heads(attention(q, k, v)), residual=x)


class CrossAttention(nn.Module):
    """Looks at the text, whose keys and values are among the statics."""

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.number = 0
        """Which of the statics is this layer's."""

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, L, context_dim) -> each (B, H, L, D)."""
        k, v = (split_heads(part, self.head_dim).contiguous() for part in self.to_kv(context).chunk(2, dim=-1))
        return k, v

    def forward(self, x: Tensor, norm: nn.LayerNorm, statics: UNetStatics) -> Tensor:
        """x plus the attention of `norm(x)`. (B, L, D) -> (B, L, D)."""
        q = split_heads(linear(self.to_q, normed(self.to_q, norm, x)), self.head_dim)
        return linear(self.to_out[0], merge_heads(attention(q, *statics.text[self.number])), residual=x)


class GEGLU(nn.Module):
    """There for the checkpoint key `proj`; what it is named after is `geglu` of the linear behind."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        # The identity is there for the checkpoint key `net.2`: diffusers has a dropout in its place.
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """x plus what comes of `norm(x)`. (B, L, D) -> (B, L, D)."""
        proj = self.net[0].get_submodule("proj")
        return linear(self.net[2], geglu(self.net[2], linear(proj, normed(proj, norm, x))), residual=x)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, params: UNetEncoderParams) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = SelfAttention(dim, params.head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, params.cross_attention_dim, params.head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, statics: UNetStatics) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = self.attn1(x, self.norm1)
        x = self.attn2(x, self.norm2, statics)
        return self.ff(x, self.norm3)


class Transformer(nn.Module):
    """Transformer blocks over the positions of a feature map."""

    def __init__(self, channels: int, depth: int, params: UNetEncoderParams) -> None:
        super().__init__()
        self.norm = GroupNorm(params.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, params) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, statics: UNetStatics) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        b, c, h, w = x.shape
        tokens = linear(self.proj_in, _tokens(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, statics)
        return linear(self.proj_out, tokens, residual=_tokens(x)).reshape(b, h, w, c).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C): free where channels are last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)

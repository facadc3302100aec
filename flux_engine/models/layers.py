"""Layers that several networks have."""

from __future__ import annotations

from torch import Tensor, nn

from flux_engine import ops


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, head_dim) -> (B, L, D)."""
    return x.transpose(1, 2).flatten(2)


class NormSiLU(nn.GroupNorm):
    """GroupNorm with SiLU behind it, as one op."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6) -> None:
        super().__init__(groups, channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        return ops.group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)

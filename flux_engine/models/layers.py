"""Layers that several networks have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

from torch import Tensor, nn

from flux_engine import ops

Residuals = tuple[Tensor | None, ...]
"""What ControlNets add inside a network: a slot for each place where something can be added, in the order in which the
network comes to them, None where nothing is."""
BatchRows = slice | Sequence[int]
"""Some rows of a batch."""


def add_residuals(parts: Sequence[Residuals]) -> Residuals:
    """The sum of what several ControlNets add to one network, slot by slot. What is in several slots is added once."""
    sums: dict[tuple[int, ...], Tensor] = {}
    slots: list[Tensor | None] = []
    for slot in zip(*parts, strict=True):
        given = [residual for residual in slot if residual is not None]
        key = tuple(map(id, given))
        if given and key not in sums:
            sums[key] = reduce(add, given)
        slots.append(sums.get(key))
    return tuple(slots)


def scaled(residuals: Residuals, scale: float | Tensor) -> Residuals:
    """Each residual times `scale`. What is in several slots is multiplied once."""
    every = {id(residual): residual for residual in residuals if residual is not None}
    products = {key: residual * scale for key, residual in every.items()}
    return tuple(None if residual is None else products[id(residual)] for residual in residuals)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, head_dim) -> (B, L, D)."""
    return x.transpose(1, 2).flatten(2)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm as one of our ops."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class NormSiLU(nn.GroupNorm):
    """GroupNorm with SiLU behind it, as one op."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6) -> None:
        super().__init__(groups, channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        return ops.group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)

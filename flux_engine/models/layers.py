"""Layers that several networks have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, ClassVar

from torch import Tensor, nn

from flux_engine import ops

Residuals = tuple[Tensor | None, ...]
"""What ControlNets add inside a network: a slot for each place where something can be added, in the order in which the
network comes to them, None where nothing is."""
Runner = Callable[..., Any]
"""Calls what it is given, a module or a method of one, with the rest: as it is, or by what was compiled of it."""


def directly(what: Callable[..., Any], *args: Any) -> Any:
    """The Runner of what is not compiled."""
    return what(*args)


class Stepwise(nn.Module):
    """A network that is called once for every step, and how its calls are made: compiling.py and capture.py put other
    Runners there."""

    precomputed: ClassVar[str]
    """Parameters that calls do not read, as a regular expression."""
    alike: ClassVar[bool]
    """Whether blocks of one class have the same sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.call_step: Runner = directly
        """Makes a whole call."""
        self.call_block: Runner = directly
        """Calls each of its blocks."""


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

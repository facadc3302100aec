"""What a wrapper checks before it launches; on tensors without numbers too, so a dry run refuses what a card would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flux_kernels.arch import FLOATS, LIMITS
from flux_kernels.errors import ArgumentError

WIDEST = 16384
"""A row is in the registers of one block, at most 32 numbers for each thread."""


def floating(op: str, name: str, value: Tensor, dims: int) -> None:
    """The tensor that the others have to fit: of so many axes, the last one of neighbours."""
    if value.dim() != dims:
        raise ArgumentError(f"{op}: {name} has {value.dim()} axes, not {dims}")
    if value.dtype not in FLOATS:
        raise ArgumentError(f"{op}: {name} is {_dtype(value.dtype)}, not one of {', '.join(map(_dtype, FLOATS))}")
    neighbours(op, name, value)


def fits(
    op: str, name: str, value: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """A tensor of exactly this shape, with one of these dtypes, on this device, the last axis of neighbours."""
    if tuple(value.shape) != tuple(shape):
        raise ArgumentError(f"{op}: {name} has shape {list(value.shape)}, not {list(shape)}")
    if value.dtype not in dtypes:
        raise ArgumentError(f"{op}: {name} is {_dtype(value.dtype)}, not {' or '.join(map(_dtype, dtypes))}")
    if value.device != device:
        raise ArgumentError(f"{op}: {name} is on {value.device}, and the rest on {device}")
    neighbours(op, name, value)


def per_batch(op: str, name: str, value: Tensor, x: Tensor) -> None:
    """A row for each picture, or one for all: (B or 1, 1, D) beside x (B, L, D)."""
    batch = 1 if value.dim() == 3 and value.shape[0] == 1 else x.shape[0]
    fits(op, name, value, (batch, 1, x.shape[-1]), (x.dtype,), x.device)


def stride_of_batch(value: Tensor) -> int:
    """How far apart rows are that `per_batch` found right."""
    return 0 if value.shape[0] == 1 else value.stride(0)


def neighbours(op: str, name: str, value: Tensor) -> None:
    """The last axis has stride 1, unless it is of one."""
    if value.shape[-1] != 1 and value.stride(-1) != 1:
        raise ArgumentError(f"{op}: the last axis of {name} has stride {value.stride(-1)}, not 1")


def width(op: str, value: Tensor) -> None:
    """The last axis is not empty and not too long for one block."""
    if not 0 < value.shape[-1] <= WIDEST:
        raise ArgumentError(f"{op}: rows of {value.shape[-1]}, where 1 to {WIDEST} are possible")


def eight_bits(op: str, dtype: torch.dtype) -> None:
    """A dtype to quantize to."""
    if dtype not in LIMITS:
        raise ArgumentError(f"{op}: {_dtype(dtype)} is not one of {', '.join(map(_dtype, LIMITS))}")


def result(op: str, dtype: torch.dtype) -> None:
    """A dtype to give results in."""
    if dtype not in FLOATS:
        raise ArgumentError(f"{op}: {_dtype(dtype)} is not one of {', '.join(map(_dtype, FLOATS))}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

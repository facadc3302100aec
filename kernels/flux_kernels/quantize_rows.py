"""Tokens to 8 bits, with a scale for each from its own numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_kernels import arch, checks, registry
from flux_kernels.jit import jit
from flux_kernels.numerics import store_quantized
from flux_kernels.rows import row_options

if TYPE_CHECKING:
    import triton.language as tl

NAME = "quantize_rows"
TINY = 2.0**-100
"""The smallest scale, which rows of zeros have."""


@jit
def kernel(x, values, scales, x_row, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row for each program of the grid (M,)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    mask = index < WIDTH
    numbers = tl.load(x + row * x_row + index, mask=mask, other=0.0).to(tl.float32)
    store_quantized(numbers, index, mask, values + row * WIDTH, scales + row, limit)


def reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (M, K) -> values (M, K) in `dtype`, int8 or e4m3, and scales (M,), float32: a row is about values times scale.

    The largest number of a row becomes the largest of the dtype. A row that is not finite has a scale that is not
    either, and values without meaning.
    """
    x = x.float()
    scales = (x.abs().amax(dim=1) / arch.LIMITS[dtype]).clamp(min=TINY)
    scaled = x / scales[:, None]
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scales


def empty(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Checked, and room for the results. Raises ArgumentError, KernelUnavailable."""
    checks.floating(NAME, "x", x, 2)
    checks.width(NAME, x)
    checks.eight_bits(NAME, dtype)
    arch.require(NAME, x.device, x.dtype, dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`reference` by the kernel. Rows of x may be apart, of K numbers side by side."""
    values, scales = empty(x, dtype)
    kernel.launch((x.shape[0],), x, values, scales, x.stride(0), arch.LIMITS[dtype], **row_options(x.shape[1]))
    return values, scales


registry.define(f"{NAME}(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", cuda=quantize_rows, fake=empty)

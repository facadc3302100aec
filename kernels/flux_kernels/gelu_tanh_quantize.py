"""GELU in its tanh approximation, and its result in 8 bits with a scale for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_kernels import arch, checks, quantize_rows, registry
from flux_kernels.jit import jit
from flux_kernels.numerics import gelu_tanh, store_quantized
from flux_kernels.rows import row_options

if TYPE_CHECKING:
    import triton.language as tl

NAME = "gelu_tanh_quantize"


@jit
def kernel(x, values, scales, x_row, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row for each program of the grid (M,)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    mask = index < WIDTH
    numbers = tl.load(x + row * x_row + index, mask=mask, other=0.0).to(tl.float32)
    store_quantized(gelu_tanh(numbers), index, mask, values + row * WIDTH, scales + row, limit)


def reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (M, K) -> values (M, K) in `dtype`, int8 or e4m3, and scales (M,), float32. Nothing is rounded between."""
    return quantize_rows.reference(F.gelu(x.float(), approximate="tanh"), dtype)


def empty(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Checked, and room for the results. Raises ArgumentError, KernelUnavailable."""
    checks.floating(NAME, "x", x, 2)
    checks.width(NAME, x)
    checks.eight_bits(NAME, dtype)
    arch.require(NAME, x.device, x.dtype, dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


def gelu_tanh_quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`reference` by the kernel. Rows of x may be apart, of K numbers side by side."""
    values, scales = empty(x, dtype)
    kernel.launch((x.shape[0],), x, values, scales, x.stride(0), arch.LIMITS[dtype], **row_options(x.shape[1]))
    return values, scales


registry.define(f"{NAME}(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", cuda=gelu_tanh_quantize, fake=empty)

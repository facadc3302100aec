"""What a block adds to its stream: `x + gate * update`, kept finite in float16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_kernels import arch, checks, registry
from flux_kernels.jit import jit
from flux_kernels.numerics import kept_finite
from flux_kernels.rows import row_options

if TYPE_CHECKING:
    import triton.language as tl

NAME = "gated_residual"
FP16_MAX = 65504.0


@jit(do_not_specialize=("L",))
def kernel(
    x, gate, update, out, L, x_batch, x_row, gate_batch, update_batch, update_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row for each program of the grid (L, B)."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, BLOCK)
    mask = index < WIDTH
    result = tl.load(x + batch * x_batch + row * x_row + index, mask=mask).to(tl.float32)
    factor = tl.load(gate + batch * gate_batch + index, mask=mask).to(tl.float32)
    result += factor * tl.load(update + batch * update_batch + row * update_row + index, mask=mask).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + (batch * L + row) * WIDTH + index, kept_finite(result, dtype).to(dtype), mask=mask)


def reference(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x and update (B, L, D), gate (B, 1, D) -> (B, L, D). In float32, rounded once; in float16 clamped before, because
    FLUX's stream passes the largest float16 and would become inf and then NaN. NaN stays."""
    out = x.float() + gate.float() * update.float()
    return (out.clamp(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else out).to(x.dtype)


def empty(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Checked, and room for the result. Raises ArgumentError, KernelUnavailable."""
    checks.floating(NAME, "x", x, 3)
    checks.width(NAME, x)
    checks.per_batch(NAME, "gate", gate, x)
    checks.fits(NAME, "update", update, x.shape, (x.dtype,), x.device)
    arch.require(NAME, x.device, x.dtype)
    return x.new_empty(x.shape)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`reference` by the kernel. Rows of x and update may be apart; gate may be of one row for all pictures."""
    out = empty(x, gate, update)
    batch, length, width = x.shape
    kernel.launch(
        (length, batch), x, gate, update, out, length, *x.stride()[:2], checks.stride_of_batch(gate),
        *update.stride()[:2], **row_options(width),
    )  # fmt: skip
    return out


registry.define(f"{NAME}(Tensor x, Tensor gate, Tensor update) -> Tensor", cuda=gated_residual, fake=empty)

"""adaLN: LayerNorm without weights, then `x * (1 + scale) + shift`. Source: DiT (arXiv 2212.09748)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from flux_kernels import arch, checks, registry
from flux_kernels.jit import jit
from flux_kernels.numerics import normalised
from flux_kernels.rows import row_options

if TYPE_CHECKING:
    import triton.language as tl

NAME = "layer_norm_modulate"


@jit(do_not_specialize=("L",))
def kernel(
    x, shift, scale, out, L, x_batch, x_row, shift_batch, scale_batch, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row for each program of the grid (L, B)."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, BLOCK)
    mask = index < WIDTH
    numbers = tl.load(x + batch * x_batch + row * x_row + index, mask=mask, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale + batch * scale_batch + index, mask=mask, other=0.0).to(tl.float32)
    summand = tl.load(shift + batch * shift_batch + index, mask=mask, other=0.0).to(tl.float32)
    result = normalised(numbers, mask, WIDTH, eps) * factor + summand
    tl.store(out + (batch * L + row) * WIDTH + index, result.to(out.dtype.element_ty), mask=mask)


def reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """x (B, L, D); shift and scale (B, 1, D) -> (B, L, D). In float32, rounded once."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.float()) + shift.float()).to(x.dtype)


def empty(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Checked, and room for the result. Raises ArgumentError, KernelUnavailable."""
    checks.floating(NAME, "x", x, 3)
    checks.width(NAME, x)
    checks.per_batch(NAME, "shift", shift, x)
    checks.per_batch(NAME, "scale", scale, x)
    arch.require(NAME, x.device, x.dtype)
    return x.new_empty(x.shape)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """`reference` by the kernel. Rows of x may be apart, of D numbers side by side; shift and scale may be of one row
    for all pictures."""
    out = empty(x, shift, scale, eps)
    batch, length, width = x.shape
    kernel.launch(
        (length, batch), x, shift, scale, out, length, *x.stride()[:2],
        checks.stride_of_batch(shift), checks.stride_of_batch(scale), eps, **row_options(width),
    )  # fmt: skip
    return out


registry.define(
    f"{NAME}(Tensor x, Tensor shift, Tensor scale, float eps=1e-6) -> Tensor", cuda=layer_norm_modulate, fake=empty
)

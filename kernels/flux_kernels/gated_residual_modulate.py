"""What a block adds to its stream, and adaLN of the sum, which the next one reads: the stream goes by once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from flux_kernels import arch, checks, gated_residual, layer_norm_modulate, registry
from flux_kernels.jit import jit
from flux_kernels.numerics import kept_finite, normalised
from flux_kernels.rows import row_options

if TYPE_CHECKING:
    import triton.language as tl

NAME = "gated_residual_modulate"


@jit(do_not_specialize=("L",))
def kernel(
    x, gate, update, shift, scale, out, modulated, L, x_batch, x_row, gate_batch, update_batch, update_row, shift_batch,
    scale_batch, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row for each program of the grid (L, B)."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, BLOCK)
    mask = index < WIDTH
    stream = tl.load(x + batch * x_batch + row * x_row + index, mask=mask, other=0.0).to(tl.float32)
    gates = tl.load(gate + batch * gate_batch + index, mask=mask, other=0.0).to(tl.float32)
    place = update + batch * update_batch + row * update_row + index
    stream += gates * tl.load(place, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    rounded = kept_finite(stream, dtype).to(dtype)
    target = (batch * L + row) * WIDTH + index
    tl.store(out + target, rounded, mask=mask)
    factor = 1.0 + tl.load(scale + batch * scale_batch + index, mask=mask, other=0.0).to(tl.float32)
    summand = tl.load(shift + batch * shift_batch + index, mask=mask, other=0.0).to(tl.float32)
    result = normalised(rounded.to(tl.float32), mask, WIDTH, eps) * factor + summand
    tl.store(modulated + target, result.to(dtype), mask=mask)


def reference(
    x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x and update (B, L, D); gate, shift and scale (B, 1, D) -> the new x, and that modulated, (B, L, D) both.

    Exactly the one op after the other: what is normalised is the new x as it was rounded.
    """
    stream = gated_residual.reference(x, gate, update)
    return stream, layer_norm_modulate.reference(stream, shift, scale, eps)


def empty(
    x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Checked, and room for the results. Raises ArgumentError, KernelUnavailable."""
    checks.floating(NAME, "x", x, 3)
    checks.width(NAME, x)
    checks.fits(NAME, "update", update, x.shape, (x.dtype,), x.device)
    for name, row in (("gate", gate), ("shift", shift), ("scale", scale)):
        checks.per_batch(NAME, name, row, x)
    arch.require(NAME, x.device, x.dtype)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def gated_residual_modulate(
    x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`reference` by the kernel. Rows of x and update may be apart; the rest may be of one row for all pictures."""
    out, modulated = empty(x, gate, update, shift, scale, eps)
    batch, length, width = x.shape
    kernel.launch(
        (length, batch), x, gate, update, shift, scale, out, modulated, length, *x.stride()[:2],
        checks.stride_of_batch(gate), *update.stride()[:2], checks.stride_of_batch(shift),
        checks.stride_of_batch(scale), eps, **row_options(width),
    )  # fmt: skip
    return out, modulated


registry.define(
    f"{NAME}(Tensor x, Tensor gate, Tensor update, Tensor shift, Tensor scale, float eps=1e-6) -> (Tensor, Tensor)",
    cuda=gated_residual_modulate,
    fake=empty,
)

"""adaLN, and its result in 8 bits with a scale for each token: what a linear of 8 bits reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_kernels import arch, checks, layer_norm_modulate, quantize_rows, registry
from flux_kernels.jit import jit
from flux_kernels.numerics import normalised, store_quantized
from flux_kernels.rows import row_options

if TYPE_CHECKING:
    import triton.language as tl

NAME = "layer_norm_modulate_quantize"


@jit(do_not_specialize=("L",))
def kernel(
    x, shift, scale, values, scales, L, x_batch, x_row, shift_batch, scale_batch, eps, limit,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row for each program of the grid (L, B)."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, BLOCK)
    mask = index < WIDTH
    numbers = tl.load(x + batch * x_batch + row * x_row + index, mask=mask, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale + batch * scale_batch + index, mask=mask, other=0.0).to(tl.float32)
    summand = tl.load(shift + batch * shift_batch + index, mask=mask, other=0.0).to(tl.float32)
    result = normalised(numbers, mask, WIDTH, eps) * factor + summand
    place = batch * L + row
    store_quantized(result, index, mask, values + place * WIDTH, scales + place, limit)


def reference(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x (B, L, D); shift and scale (B, 1, D) -> values (B L, D) in `dtype`, int8 or e4m3, and scales (B L,), float32.

    Between the two nothing is rounded. A row that is not finite has a scale that is not either.
    """
    modulated = layer_norm_modulate.reference(x.float(), shift.float(), scale.float(), eps)
    return quantize_rows.reference(modulated.flatten(0, 1), dtype)


def empty(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Checked, and room for the results. Raises ArgumentError, KernelUnavailable."""
    checks.floating(NAME, "x", x, 3)
    checks.width(NAME, x)
    checks.per_batch(NAME, "shift", shift, x)
    checks.per_batch(NAME, "scale", scale, x)
    checks.eight_bits(NAME, dtype)
    arch.require(NAME, x.device, x.dtype, dtype)
    count = x.shape[0] * x.shape[1]
    return x.new_empty((count, x.shape[2]), dtype=dtype), x.new_empty(count, dtype=torch.float32)


def layer_norm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`reference` by the kernel, on what `layer_norm_modulate` takes."""
    values, scales = empty(x, shift, scale, dtype, eps)
    batch, length, width = x.shape
    kernel.launch(
        (length, batch), x, shift, scale, values, scales, length, *x.stride()[:2],
        checks.stride_of_batch(shift), checks.stride_of_batch(scale), eps, arch.LIMITS[dtype], **row_options(width),
    )  # fmt: skip
    return values, scales


registry.define(
    f"{NAME}(Tensor x, Tensor shift, Tensor scale, ScalarType dtype, float eps=1e-6) -> (Tensor, Tensor)",
    cuda=layer_norm_modulate_quantize,
    fake=empty,
)

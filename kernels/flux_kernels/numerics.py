"""What several kernels compute, on float32 in registers. A row is a vector whose masked end is zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flux_kernels.jit import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def normalised(x, mask, width, eps):
    """LayerNorm of a row without weights. In two passes: a sum of squares loses digits where the mean is large."""
    centred = tl.where(mask, x - tl.sum(x, 0) / width, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)


@jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(u)) is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3). Triton has no tanh of its own."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@jit
def kept_finite(x, dtype: tl.constexpr):
    """Clamped to what float16 holds, if that is the dtype. NaN stays NaN."""
    if dtype == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x


@jit
def store_quantized(x, index, mask, values, scale, limit):
    """A row -> `values`, 8 bits of x / scale, and `scale`, its largest number / limit. Both divisions round to nearest,
    as torch's do, so that the result has the reference's bits. A row that is not finite has an infinite scale.
    """
    largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 0)
    step = tl.maximum(tl.div_rn(largest, limit), 7.888609052210118e-31)  # 2**-100
    scaled = tl.div_rn(x, tl.zeros_like(x) + step)
    if values.dtype.element_ty == tl.int8:
        # Adding 1.5 * 2**23 leaves no room for a fraction: rounds half to even.
        scaled = (scaled + 12582912.0) - 12582912.0
    tl.store(values + index, scaled.to(values.dtype.element_ty), mask=mask)
    tl.store(scale, step)

"""Linears with weights of 8 bits: a scale for each row of the weight and, where activations are of 8 bits as well, for
each token. Scales come from the numbers at hand, so nothing is calibrated and no token's result depends on another's.

Shapes: M tokens, K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine import kernels

TINY = 2.0**-100
"""Smallest scale: a row of zeros has one, too, and nothing is divided by zero."""
TRIES = 4
WORK = 2**26
"""Bytes of float32 that are worked on at a time where tokens are multiplied, or a weight comes back from 8 bits."""
BLOCK = 2**22
"""The same where a weight is brought to 8 bits: freed pieces that are larger stay with the process."""


@dataclass(frozen=True)
class Scheme:
    """How a linear's numbers are kept."""

    name: str
    dtype: torch.dtype
    """Of the weight."""
    limit: float
    """The largest number there is."""
    multiplies: bool
    """Activations are of 8 bits as well; otherwise only memory is saved."""
    grid: tuple[int, int] = (1, 1)
    """Of a product on CUDA: least number of tokens; what K and N are multiples of."""


INT8 = Scheme("int8", torch.int8, 127.0, True, (17, 8))
"""torch._int_mm refuses 16 tokens and fewer (aten/src/ATen/native/cuda/Blas.cpp)."""
FP8 = Scheme("fp8", torch.float8_e4m3fn, 448.0, True, (1, 16))
INT8_STORAGE = Scheme("int8-storage", torch.int8, 127.0, False)
FP8_STORAGE = Scheme("fp8-storage", torch.float8_e4m3fn, 448.0, False)
SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in (INT8, FP8, INT8_STORAGE, FP8_STORAGE)}


def quantize_rows(x: Tensor, scheme: Scheme, *, over: bool = False) -> tuple[Tensor, Tensor]:
    """x (M, K) -> values (M, K) in the scheme's dtype, and scale (M,), float32: a row is about values times scale.

    A row that is not finite has a scale that is not either, and so has everything that comes of it. `over` lets x, if
    it is in float32, be written over, which on a CPU is sooner done than to find memory.
    """
    x = x.float()
    scale = _largest(x).div_(scheme.limit).clamp_(min=TINY)
    return _rounded(x.div_(scale) if over else x / scale, scheme), scale.squeeze(1)


def quantize_weight(weight: Tensor, scheme: Scheme, *, over: bool = False) -> tuple[Tensor, Tensor]:
    """The same for rows of a weight, with more care, as it is done once.

    What is rounded to e4m3 has the same relative error at every magnitude, so a row's largest number need not become
    the largest there is: of TRIES scales within an octave each row has that with the smallest squared error.
    """
    if not scheme.dtype.is_floating_point:
        return quantize_rows(weight, scheme, over=over)
    weight = weight.float()
    least = _largest(weight).div_(scheme.limit).clamp_(min=TINY)
    best = torch.full_like(least, float("inf"))
    values, scale = quantize_rows(weight, scheme)
    for i in range(TRIES):
        tried = least * 2 ** (i / TRIES)
        rounded = _rounded(weight / tried, scheme)
        error = (rounded.float() * tried - weight).square_().sum(dim=1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried, scale[:, None]).squeeze(1)
        values = torch.where(better, rounded.view(torch.uint8), values.view(torch.uint8)).view(scheme.dtype)
    return values, scale


def _largest(x: Tensor) -> Tensor:
    """Of every row, of its numbers without their signs; on a CPU sooner there than a norm of torch's."""
    return torch.maximum(x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True).neg_())


def _rounded(x: Tensor, scheme: Scheme) -> Tensor:
    return (x if scheme.dtype.is_floating_point else x.round_()).to(scheme.dtype)


class QuantizedLinear(nn.Module):
    """nn.Linear with a weight of 8 bits: `weight` (N, K), `weight_scale` (N,) in float32, `bias` (N,) or None."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.weight = _fixed(torch.empty((out_features, in_features), dtype=scheme.dtype))
        self.weight_scale = _fixed(torch.empty(out_features, dtype=torch.float32))
        self.bias = _fixed(torch.empty(out_features)) if bias else None

    @classmethod
    def like(cls, linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
        """An empty one of its size, on its device."""
        with linear.weight.device:
            return cls(linear.in_features, linear.out_features, bias=linear.bias is not None, scheme=scheme)

    @classmethod
    def of(cls, linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
        """The same linear in 8 bits. Raises ValueError for a weight that is not finite."""
        made = cls.like(linear, scheme)
        values, scale = quantize_weight(linear.weight.detach(), scheme)
        if not scale.isfinite().all():
            raise ValueError(f"the weight's row {int(scale.isfinite().logical_not().nonzero()[0])} is not finite")
        made.weight, made.weight_scale = _fixed(values), _fixed(scale)
        made.bias = None if linear.bias is None else _fixed(linear.bias.detach())
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the dtype of x."""
        tokens = x.reshape(-1, self.in_features)
        out = self._product(tokens) if self.scheme.multiplies else self._by_blocks(tokens)
        return out.reshape(*x.shape[:-1], self.out_features)

    def has_kernel(self, x: Tensor) -> bool:
        """Whether a kernel multiplies such tokens."""
        if kernels.usable(x):
            return self.scheme is INT8 and self.in_features % 4 == 0
        return self.scheme.multiplies and kernels.on_card(f"{self.scheme.name}_linear", x)

    def product(self, values: Tensor, scales: Tensor, *after: Any) -> Tensor:
        """By a kernel: tokens (M, K) that are of 8 bits already, with scales (M,) -> (M, N). `after` is what is done to
        the result (flux_kernels/gemm.py): gelu_from, residual, gate, dtype."""
        if kernels.on_processor(values):
            return torch.ops.flux_cpu.int8_linear(values, scales, self.weight, self.weight_scale, self.bias, *after)
        product = torch.ops.flux_kernels.int8_linear if self.scheme is INT8 else torch.ops.flux_kernels.fp8_linear
        return product(values, scales, self.weight, self.weight_scale, self.bias, *after)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By a kernel: tokens (..., K) -> (M, K) in 8 bits, and scales (M,)."""
        if kernels.on_processor(x):
            return torch.ops.flux_cpu.quantize_rows(x)
        return torch.ops.flux_kernels.quantize_rows(x.reshape(-1, self.in_features), self.scheme.dtype)

    def dequantized(self) -> Tensor:
        """The weight (N, K) in float32."""
        return self.weight.float() * self.weight_scale[:, None]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme.name}"

    def _product(self, x: Tensor) -> Tensor:
        """By a kernel, or some tokens at a time: all that is wider than 8 bits is larger than what it is made of."""
        if self.has_kernel(x):
            return self.product(*self.rows(x), None, None, None, x.dtype)
        count = max(INT8.grid[0], WORK // (4 * max(self.in_features, self.out_features)))
        if len(x) <= count:
            return self._product_of(x)
        out = x.new_empty(len(x), self.out_features)
        for start in range(0, len(x), count):
            out[start : start + count] = self._product_of(x[start : start + count])
        return out

    def _product_of(self, x: Tensor) -> Tensor:
        values, scale = quantize_rows(x, self.scheme)
        if self.scheme is INT8:
            out = int8_product(values, self.weight).float()
            out.mul_(scale[:, None]).mul_(self.weight_scale)
        else:
            out = fp8_product(values, scale, self.weight, self.weight_scale, x.dtype)
        if self.bias is not None:
            out = out.add_(self.bias)
        return out.to(x.dtype)

    def _by_blocks(self, x: Tensor) -> Tensor:
        """By a kernel, or weights come back to the dtype of x some rows at a time."""
        if self.scheme is FP8_STORAGE and kernels.on_card("fp8_storage_linear", x):
            return torch.ops.flux_kernels.fp8_storage_linear(x, self.weight, self.weight_scale, self.bias)
        item = 4 if x.dtype is torch.float16 else 2  # bytes that a number of the weight takes meanwhile
        # On a processor not by the number of tokens, on which a token's last bits would then depend.
        count = WORK // max(item * self.in_features, 4 * len(x)) if x.is_cuda else BLOCK // (item * self.in_features)
        count = max(1, count)
        if count >= self.out_features:
            return self._block(x, slice(None))
        out = x.new_empty(len(x), self.out_features)
        for start in range(0, self.out_features, count):
            out[:, start : start + count] = self._block(x, slice(start, start + count))
        return out

    def _block(self, x: Tensor, rows: slice) -> Tensor:
        """Some columns of the result."""
        bias = None if self.bias is None else self.bias[rows]
        if x.dtype is torch.float16:  # sums before their scale would run over
            weight = (self.weight[rows].float() * self.weight_scale[rows, None]).to(x.dtype)
            return F.linear(x, weight, bias)
        # Numbers of 8 bits are exact in bfloat16: so there is one pass over the weight, and scales are of few sums.
        out = F.linear(x, self.weight[rows].to(x.dtype)).float().mul_(self.weight_scale[rows])
        return (out if bias is None else out.add_(bias)).to(x.dtype)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times the transpose of b (N, K), both int8 -> (M, N), int32, exact."""
    padded_a, padded_b = (on_grid(a, b, INT8.grid)) if a.is_cuda else (a, b)
    return torch._int_mm(padded_a, padded_b.t())[: len(a), : len(b)]


def fp8_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) times the transpose of b (N, K), both e4m3 with scales for their rows -> (M, N).

    In bfloat16 on CUDA, the only dtype that products with scales for rows have there; elsewhere in `dtype`.
    """
    rows, columns = len(a), len(b)
    if a.is_cuda:
        dtype = torch.bfloat16
        a, b = on_grid(a, b, FP8.grid)
        b_scale = F.pad(b_scale, (0, len(b) - columns))
    out = torch._scaled_mm(a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None], out_dtype=dtype)
    return out[:rows, :columns]


def on_grid(a: Tensor, b: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """a (M, K) and b (N, K) with zeros behind, for a product on CUDA that wants `grid`. As they are if they fit."""
    least, multiple = grid
    inner, columns = -a.shape[1] % multiple, -len(b) % multiple
    rows = max(0, least - len(a))
    if inner or rows:
        a = F.pad(a, (0, inner, 0, rows))
    if inner or columns:
        b = F.pad(b, (0, inner, 0, columns))
    return a, b


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)

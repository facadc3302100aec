"""The product that the linears share: tokens times the transpose of a weight, with scales for the rows of both, and
what comes after it done to the sums while they are in registers.

Shapes: M tokens, K in, N out, B pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_kernels import arch, checks, registry
from flux_kernels.errors import ArgumentError
from flux_kernels.gated_residual import FP16_MAX
from flux_kernels.jit import jit
from flux_kernels.numerics import gelu_tanh, kept_finite

if TYPE_CHECKING:
    import triton.language as tl

GROUP = 8
"""Rows of blocks that are worked on together, so that the weight's columns they share are still in the cache."""


@jit
def decoded(bits, dtype: tl.constexpr):
    """e4m3 numbers, as bytes, times 2**-8, in `dtype`: exact in both, also where e4m3 has few bits (subnormals).

    The four bits of the exponent become the lower four of float16's five, which has a bias of 15 where e4m3 has 7.
    """
    wide = bits.to(tl.int16)
    magnitude = wide & 0x7F
    half = tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7).to(tl.int16) | ((wide & 0x80) << 8).to(tl.int16)
    half = half.to(tl.float16, bitcast=True)
    return half if dtype == tl.float16 else half.to(tl.float32).to(dtype)


@jit(do_not_specialize=("M", "tokens"))
def kernel(
    values, scales, weight, weight_scale, bias, residual, gate, out, M, N, K, gelu_from, tokens, values_row, weight_row,
    residual_row, gate_row, ENCODED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of the result for each program. `EVEN`: K is a multiple of BLOCK_K; `tokens`: of one picture."""
    number = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = number // (GROUP * columns)
    size = tl.minimum(rows - group * GROUP, GROUP)
    tile_m = group * GROUP + number % (GROUP * columns) % size
    tile_n = number % (GROUP * columns) // size

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows behind the end are the last one again: nothing needs a mask until results are stored.
    source = tl.minimum(row, M - 1).to(tl.int64)
    a = values + source[:, None] * values_row + inner
    b = weight + tl.minimum(column, N - 1).to(tl.int64) * weight_row + inner[:, None]
    integers: tl.constexpr = values.dtype.element_ty == tl.int8
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if integers else tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            left, right = tl.load(a), tl.load(b)
        else:
            real = inner < K - start
            left, right = tl.load(a, mask=real, other=0.0), tl.load(b, mask=real[:, None], other=0.0)
        if ENCODED:
            right = decoded(right, left.dtype)
        # On Hopper e4m3 products are added up with few bits: after each block they go on in float32.
        total = tl.dot(left, right, total, max_num_imprecise_acc=BLOCK_K, out_dtype=total.dtype)
        a += BLOCK_K
        b += BLOCK_K

    present = column < N
    result = total.to(tl.float32)
    if scales is not None:
        result *= tl.load(scales + source)[:, None]
    by_column = tl.load(weight_scale + column, mask=present, other=0.0)
    result *= by_column * 256.0 if ENCODED else by_column
    if bias is not None:
        result += tl.load(bias + column, mask=present, other=0.0).to(tl.float32)
    if gelu_from is not None:
        result = tl.where(column >= gelu_from, gelu_tanh(result), result)
    mask = (row < M)[:, None] & present
    dtype: tl.constexpr = out.dtype.element_ty
    if residual is not None:
        if gate is not None:
            gates = gate + (source // tokens)[:, None] * gate_row + column
            result *= tl.load(gates, mask=mask, other=0.0).to(tl.float32)
        result += tl.load(residual + source[:, None] * residual_row + column, mask=mask, other=0.0).to(tl.float32)
        result = kept_finite(result, dtype)
    tl.store(out + source[:, None] * N + column, result.to(dtype), mask=mask)


@dataclass(frozen=True)
class After:
    """What comes after a product (M, N), in this order: plus `bias` (N,); GELU (tanh) of the columns from `gelu_from`
    on; times `gate` (B, 1, N), or (1, 1, N) for all; plus `residual` (M, N) or (B, L, N), clamped if in float16."""

    bias: Tensor | None = None
    gelu_from: int | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None

    def check(self, op: str, out: Tensor) -> None:
        """It fits the result. Raises ArgumentError."""
        count, width = out.shape
        if self.bias is not None:
            checks.fits(op, "bias", self.bias, (width,), arch.FLOATS, out.device)
        if self.gelu_from is not None and not 0 <= self.gelu_from <= width:
            raise ArgumentError(f"{op}: gelu_from {self.gelu_from} is not a column of {width}")
        if self.residual is not None:
            rows = self.residual.reshape(-1, self.residual.shape[-1])
            checks.fits(op, "residual", rows, (count, width), (out.dtype,), out.device)
        if self.gate is not None:
            pictures = self.gate.shape[0] if self.gate.dim() else 0
            if self.residual is None or pictures == 0 or count % pictures:
                raise ArgumentError(
                    f"{op}: a gate of {pictures} pictures wants a residual of as many, for {count} tokens"
                )
            checks.fits(op, "gate", self.gate, (pictures, 1, width), (out.dtype,), out.device)

    def reference(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """The definition, on float32, rounded once."""
        if self.bias is not None:
            sums = sums + self.bias.float()
        if self.gelu_from is not None:
            activated = F.gelu(sums[:, self.gelu_from :], approximate="tanh")
            sums = torch.cat((sums[:, : self.gelu_from], activated), dim=1)
        if self.residual is not None:
            if self.gate is not None:
                sums = (sums.unflatten(0, (len(self.gate), -1)) * self.gate.float()).flatten(0, 1)
            sums = sums + self.residual.reshape(sums.shape).float()
            if dtype == torch.float16:
                sums = sums.clamp(-FP16_MAX, FP16_MAX)
        return sums.to(dtype)


def run(
    out: Tensor, values: Tensor, scales: Tensor | None, weight: Tensor, weight_scale: Tensor, after: After,
    *, encoded: bool = False,
) -> Tensor:  # fmt: skip
    """Fill out (M, N) by the kernel, from what was checked. `encoded`: the weight is bytes of e4m3, and tokens are in
    float16 or bfloat16."""
    count, inner = values.shape
    width = weight.shape[0]
    tile = arch.tile(values.device, values.element_size(), out.dtype)
    gate = after.gate
    residual = None if after.residual is None else after.residual.reshape(count, width)
    kernel.launch(
        (-(-count // tile.m) * -(-width // tile.n),),
        values, scales, weight, weight_scale, after.bias, residual, gate, out, count, width, inner, after.gelu_from,
        1 if gate is None else max(1, count // gate.shape[0]), values.stride(0), weight.stride(0),
        0 if residual is None else residual.stride(0), 0 if gate is None else checks.stride_of_batch(gate),
        ENCODED=encoded, EVEN=inner % tile.k == 0, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def product(
    op: str, name: str, values: Tensor, weight: Tensor, weight_scale: Tensor, dtypes: tuple[torch.dtype, ...],
    weights: tuple[torch.dtype, ...], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Room for the result (M, N) of what both kinds of linear have in common, checked. Raises ArgumentError."""
    if values.dim() != 2 or weight.dim() != 2:
        raise ArgumentError(f"{op}: {name} and weight have {values.dim()} and {weight.dim()} axes, not 2")
    count, inner = values.shape
    checks.fits(op, name, values, (count, inner), dtypes, values.device)
    checks.fits(op, "weight", weight, (weight.shape[0], inner), weights, values.device)
    checks.fits(op, "weight_scale", weight_scale, (weight.shape[0],), (torch.float32,), values.device)
    return values.new_empty((count, weight.shape[0]), dtype=dtype)


@dataclass(frozen=True)
class EightBitLinear:
    """A linear whose tokens and weight have 8 bits, and scales for the rows of both."""

    name: str
    dtype: torch.dtype

    def reference(
        self,
        values: Tensor,
        scales: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        gelu_from: int | None,
        residual: Tensor | None,
        gate: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """values (M, K) and weight (N, K) of 8 bits, scales (M,) and weight_scale (N,) in float32 -> (M, N) in `dtype`.

        The sum of products is exact; the rest, `After`, is in float32 and rounded once.
        """
        sums = (values.double() @ weight.double().t()).float() * scales[:, None] * weight_scale
        return After(bias, gelu_from, residual, gate).reference(sums, dtype)

    def empty(
        self,
        values: Tensor,
        scales: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        gelu_from: int | None,
        residual: Tensor | None,
        gate: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Checked, and room for the result. Raises ArgumentError, KernelUnavailable."""
        checks.result(self.name, dtype)
        out = product(self.name, "values", values, weight, weight_scale, (self.dtype,), (self.dtype,), dtype)
        checks.fits(self.name, "scales", scales, (values.shape[0],), (torch.float32,), values.device)
        After(bias, gelu_from, residual, gate).check(self.name, out)
        arch.require(self.name, values.device, dtype)
        return out

    def __call__(
        self,
        values: Tensor,
        scales: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        gelu_from: int | None,
        residual: Tensor | None,
        gate: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """`reference` by the kernel. Rows may be apart, of K numbers side by side."""
        out = self.empty(values, scales, weight, weight_scale, bias, gelu_from, residual, gate, dtype)
        return run(out, values, scales, weight, weight_scale, After(bias, gelu_from, residual, gate))

    def define(self) -> None:
        """Make it one of torch's operations."""
        registry.define(
            f"{self.name}(Tensor values, Tensor scales, Tensor weight, Tensor weight_scale, Tensor? bias, "
            "int? gelu_from, Tensor? residual, Tensor? gate, ScalarType dtype) -> Tensor",
            cuda=self.__call__,
            fake=self.empty,
        )

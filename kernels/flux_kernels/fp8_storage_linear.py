"""A linear whose weight is kept in e4m3 and multiplied in float16 or bfloat16: half the memory, on cards without e4m3.

Triton has no e4m3 below compute capability 8.9, so the kernel reads bytes and puts them together by bit arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flux_kernels import arch, gemm, registry
from flux_kernels.gemm import After

NAME = "fp8_storage_linear"
HALVES = (torch.float16, torch.bfloat16)


def reference(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) in float16 or bfloat16; weight (N, K), e4m3 or its bytes; weight_scale (N,), float32; bias (N,)
    -> (M, N) in the dtype of x. The sum of products is exact; the rest is in float32 and rounded once."""
    numbers = weight.view(torch.float8_e4m3fn).double()
    return After(bias).reference((x.double() @ numbers.t()).float() * weight_scale, x.dtype)


def empty(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Checked, and room for the result. Raises ArgumentError, KernelUnavailable."""
    out = gemm.product(NAME, "x", x, weight, weight_scale, HALVES, (torch.float8_e4m3fn, torch.uint8), x.dtype)
    After(bias).check(NAME, out)
    arch.require(NAME, x.device, x.dtype)
    return out


def fp8_storage_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference` by the kernel. Rows may be apart, of K numbers side by side."""
    out = empty(x, weight, weight_scale, bias)
    return gemm.run(out, x, None, weight.view(torch.uint8), weight_scale, After(bias), encoded=True)


registry.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor",
    cuda=fp8_storage_linear,
    fake=empty,
)

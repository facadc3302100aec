"""What the tests of the kernels for processors share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flux_kernels import cpu
from torch import Tensor, nn

from flux_engine import kernels
from flux_engine.quantization.linears import INT8, QuantizedLinear

OPS = torch.ops.flux_cpu
WIDE, HALF = torch.float32, torch.bfloat16
BOUND = {WIDE: 1e-6, HALF: 5e-3}
"""Of max |a - b| / max |b|: a rounding to bfloat16 is 0.004 of a number."""
needs_kernels = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
both = pytest.mark.parametrize("dtype", [WIDE, HALF], ids=["float32", "bfloat16"])


def without_gradients() -> Iterator[None]:
    """What each of them runs in."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    kernels.choose("auto")


def close(found: Tensor, exact: Tensor, bound: float) -> None:
    assert found.shape == exact.shape
    error = (found.double() - exact.double()).abs().max() / exact.double().abs().max()
    assert error <= bound, f"{error:.2e}"


def some(*shape: int, dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    return (torch.randn(*shape) * 2 + mean).to(dtype)


def layers() -> list[nn.Module]:
    linear = nn.Linear(96, 80).to(HALF)
    return [linear, QuantizedLinear.of(linear, INT8)]

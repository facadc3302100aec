"""Every kernel against its torch reference on the card that is there: the interpreter's cases, and the true widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_kernels import KernelUnavailable, arch
from flux_kernels.ops import OPS
from kernel_cases import CASES, ON_A_CARD, Draw, compared
from kernel_launches import SIZES, Size, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def refused(op: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a rule says that this card has no such kernel, which then has to be what the wrapper says."""
    dtypes = tuple(x.dtype if isinstance(x, torch.Tensor) else x for x in arguments)
    dtypes = tuple(dtype for dtype in dtypes if isinstance(dtype, torch.dtype))
    if arch.why_not(op, dtypes, torch.cuda.get_device_capability()) is None:
        return False
    with pytest.raises(KernelUnavailable):
        getattr(OPS[op], op)(*arguments)
    return True


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_what_its_reference_does(name: str) -> None:
    case = CASES[name]
    if not refused(case.op, case.arguments("cuda")):
        assert case.error("cuda") is None


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_at_true_widths(size: Size) -> None:
    draw = Draw(torch.Generator("cuda").manual_seed(0))
    arguments = tensors(size, draw)
    if not refused(size.op, arguments):
        op = getattr(torch.ops.flux_kernels, size.op)
        least = ON_A_CARD.get(size.op, 0.0)
        assert compared(op(*arguments), OPS[size.op].reference(*arguments), least) is None

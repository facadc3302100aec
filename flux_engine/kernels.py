"""Which of flux_kernels are in force: chosen once for the process, never by trying.

"auto" takes what this machine can run, "off" leaves everything to torch. What runs is told by `describe`.
"""

from __future__ import annotations

import torch
from flux_kernels import cpu
from torch import Tensor

from flux_engine.errors import UnsupportedError

_chosen: tuple[bool, bool] | None = None
"""Whether kernels compute, and whether they multiply, where a processor does. Plain numbers, so that torch.compile has
them for constants; None until the first is asked for, or an engine is loaded."""


def choose(setting: str) -> None:
    """`EngineConfig.kernels`. Raises UnsupportedError for "on" where there are none."""
    global _chosen
    if setting == "on" and cpu.why_not():
        raise UnsupportedError(f"kernels 'on' asked for, but {cpu.why_not()}; use 'auto'")
    there = setting != "off" and cpu.why_not() is None
    _chosen = there, there and not cpu.has_matrix_unit()


def usable(x: Tensor) -> bool:
    """Whether what is done to these numbers is done by a kernel. None has a gradient."""
    return x.is_cpu and x.dtype in cpu.DTYPES and not torch.is_grad_enabled() and _choice()[0]


def multiplies(x: Tensor) -> bool:
    """The same of products and attention without 8 bits: not where the processor has a unit for matrices (AMX), which
    torch's own use."""
    return usable(x) and _choice()[1]


def _choice() -> tuple[bool, bool]:
    if _chosen is None:
        choose("auto")
        assert _chosen is not None
    return _chosen


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What computes there: "attention", "linears", those of 8 bits ("int8"), and "tokens", all that is done between."""
    computes, multiplies = _choice()
    if device.type != "cpu" or not computes or dtype not in cpu.DTYPES:
        why = (cpu.why_not() or "kernels are off") if device.type == "cpu" and not computes else None
        said = "torch" if why is None else f"torch ({why})"
        return dict.fromkeys(("attention", "linears", "int8", "tokens"), said)
    ours = "flux_kernels (AVX-512)"
    products = ours if multiplies else "torch (AMX)"
    wide = products if dtype is torch.bfloat16 else f"torch ({str(dtype).removeprefix('torch.')})"
    return {"attention": wide, "linears": wide, "int8": products, "tokens": ours}

"""Which of flux_kernels are in force: chosen once for the process, never by trying.

"auto" takes what this machine can run, "off" leaves everything to torch. What runs is told by `describe`.
"""

from __future__ import annotations

import torch
from flux_kernels import cpu
from torch import Tensor

from flux_engine.errors import UnsupportedError

_chosen: bool | None = None
"""Whether kernels compute, where a processor does. A plain value, so that torch.compile has it for a constant; None
until it is first asked for, or an engine is loaded."""


def choose(setting: str) -> None:
    """`EngineConfig.kernels`. Raises UnsupportedError for "on" where there are none."""
    global _chosen
    if setting == "on" and cpu.why_not():
        raise UnsupportedError(f"kernels 'on' asked for, but {cpu.why_not()}; use 'auto'")
    _chosen = setting != "off" and cpu.why_not() is None


def usable(x: Tensor) -> bool:
    """Whether what is done to these numbers is done by a kernel. None has a gradient."""
    return x.is_cpu and x.dtype in cpu.DTYPES and not torch.is_grad_enabled() and _choice()


def multiplies(x: Tensor) -> bool:
    """The same of products and attention without 8 bits, which are for bfloat16 alone."""
    return x.dtype is torch.bfloat16 and usable(x)


def _choice() -> bool:
    if _chosen is None:
        choose("auto")
        assert _chosen is not None
    return _chosen


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What computes there: "attention", "linears", those of 8 bits ("int8"), and "tokens", all that is done between."""
    computes = _choice()
    if device.type != "cpu" or not computes or dtype not in cpu.DTYPES:
        why = (cpu.why_not() or "kernels are off") if device.type == "cpu" and not computes else None
        said = "torch" if why is None else f"torch ({why})"
        return dict.fromkeys(("attention", "linears", "int8", "tokens"), said)
    products = f"flux_kernels ({cpu.isa()})"
    wide = products if dtype is torch.bfloat16 else f"torch ({str(dtype).removeprefix('torch.')})"
    return {"attention": wide, "linears": wide, "int8": products, "tokens": "flux_kernels (AVX-512)"}

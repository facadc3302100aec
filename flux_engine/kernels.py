"""Which of flux_kernels are in force: chosen once for the process, never by trying.

"auto" takes what this machine can run, "off" leaves everything to torch. What runs is told by `describe`.
"""

from __future__ import annotations

import torch
from flux_kernels import cpu
from torch import Tensor

from flux_engine.errors import UnsupportedError

_on = True


def choose(setting: str) -> None:
    """`EngineConfig.kernels`. Raises UnsupportedError for "on" where there are none."""
    global _on
    if setting == "on" and cpu.why_not():
        raise UnsupportedError(f"kernels 'on' asked for, but {cpu.why_not()}; use 'auto'")
    _on = setting != "off"


def usable(x: Tensor) -> bool:
    """Whether what is done to these numbers is done by a kernel. None has a gradient."""
    return _on and x.is_cpu and x.dtype in cpu.DTYPES and not torch.is_grad_enabled() and _there()


def multiplies(x: Tensor) -> bool:
    """The same of products and attention without 8 bits: not where the processor has a unit for matrices (AMX), which
    torch's own use."""
    return usable(x) and not _has_matrix_unit()


# torch.compile takes these for constants, and does not look into what they call.
@torch.compiler.assume_constant_result
def _there() -> bool:
    return cpu.why_not() is None


@torch.compiler.assume_constant_result
def _has_matrix_unit() -> bool:
    return cpu.has_matrix_unit()


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What computes there: "attention", "linears", those of 8 bits ("int8"), and "tokens", all that is done between."""
    if device.type != "cpu" or not _on or not _there() or dtype not in cpu.DTYPES:
        why = "kernels are off" if not _on else cpu.why_not() if device.type == "cpu" else None
        said = "torch" if why is None else f"torch ({why})"
        return dict.fromkeys(("attention", "linears", "int8", "tokens"), said)
    ours = "flux_kernels (AVX-512)"
    products = "torch (AMX)" if _has_matrix_unit() else ours
    wide = products if dtype is torch.bfloat16 else f"torch ({str(dtype).removeprefix('torch.')})"
    return {"attention": wide, "linears": wide, "int8": products, "tokens": ours}

"""Which of flux_kernels are in force: chosen once for the process, never by trying.

"auto" takes what this machine can run, "off" leaves everything to torch. What runs is told by `describe`.
"""

from __future__ import annotations

import torch
from flux_kernels import cpu
from torch import Tensor

from flux_engine.errors import UnsupportedError

KERNELS = ("auto", "on", "off")
_on = True


def choose(setting: str) -> None:
    """Raises UnsupportedError for "on" where there are none, and for what is no setting."""
    global _on
    if setting not in KERNELS:
        raise UnsupportedError(f"kernels {setting!r} is not one of {', '.join(KERNELS)}")
    if setting == "on" and cpu.why_not():
        raise UnsupportedError(f"kernels 'on' asked for, but {cpu.why_not()}; use 'auto'")
    _on = setting != "off"


def usable(x: Tensor) -> bool:
    """Whether what is done to these numbers is done by a kernel. None has a gradient."""
    return _on and x.is_cpu and x.dtype in cpu.DTYPES and not torch.is_grad_enabled() and _there()


def multiplies(x: Tensor) -> bool:
    """The same of products: not where the processor has a unit for matrices (AMX), which torch's own use."""
    return usable(x) and not _has_matrix_unit()


# torch.compile takes these for constants, and does not look into what they call.
@torch.compiler.assume_constant_result
def _there() -> bool:
    return cpu.why_not() is None


@torch.compiler.assume_constant_result
def _has_matrix_unit() -> bool:
    return cpu.has_matrix_unit()


def describe(device: torch.device) -> dict[str, str]:
    """What runs on a device: "products" and "attention", and "tokens", which is all that is done between them."""
    if device.type != "cpu":
        return dict.fromkeys(("products", "attention", "tokens"), "torch")
    if not _on or not _there():
        said = f"torch ({'kernels are off' if not _on else cpu.why_not()})"
        return dict.fromkeys(("products", "attention", "tokens"), said)
    ours = "flux_kernels (AVX-512)"
    products = "torch (AMX)" if _has_matrix_unit() else ours
    return {"products": products, "attention": products, "tokens": ours}

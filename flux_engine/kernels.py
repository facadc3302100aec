"""Which of flux_kernels are in force: chosen once for the process, never by trying.

On a processor they are compiled C++ (csrc), on a card Triton's. "auto" takes what the device can run, "off" leaves
everything to torch. What runs is told by `describe`.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from flux_kernels import arch, cpu
from flux_kernels.ops import OPS
from torch import Tensor

from flux_engine.errors import UnsupportedError

CPU = torch.device("cpu")
_chosen: bool | None = None
"""Whether kernels compute where a processor does. A plain value, so that torch.compile has it for a constant; None
until it is first asked for, or an engine is loaded."""
_on_card: frozenset[tuple[str, torch.dtype, torch.dtype | None]] = frozenset()
"""The same for the card of the last engine on one: ops, with the dtypes that `arch.available` tells of."""


def choose(setting: str, device: torch.device = CPU) -> None:
    """`EngineConfig.kernels`, for a device. Raises UnsupportedError for "on" where there are none."""
    global _chosen, _on_card
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    reason = cpu.why_not() if capability is None else _why_not_on(capability)
    if setting == "on" and reason:
        raise UnsupportedError(f"kernels 'on' asked for, but {reason}; use 'auto'")
    _chosen = setting != "off" and cpu.why_not() is None
    if capability or setting == "off":  # an engine on a processor takes no kernels from one on a card
        _on_card = for_card(capability) if capability and setting != "off" and not reason else frozenset()


def for_card(capability: arch.Capability) -> frozenset[tuple[str, torch.dtype, torch.dtype | None]]:
    """All that such a card runs."""
    return frozenset((op, *dtypes) for op in OPS for dtypes in arch.available(op, capability))


def _why_not_on(capability: arch.Capability) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return arch.why_not("quantize_rows", (torch.float16,), capability)


def on_processor(x: Tensor) -> bool:
    """Where these numbers are, and so which of the two kinds of kernel is theirs."""
    return x.is_cpu


def usable(x: Tensor) -> bool:
    """Whether what is done to these numbers on a processor is done by a kernel. None has a gradient."""
    return x.is_cpu and x.dtype in cpu.DTYPES and not torch.is_grad_enabled() and _choice()


def multiplies(x: Tensor) -> bool:
    """The same of products and attention without 8 bits, which are for bfloat16 alone."""
    return x.dtype is torch.bfloat16 and usable(x)


def on_card(op: str, x: Tensor, to: torch.dtype | None = None) -> bool:
    """Whether `torch.ops.flux_kernels` has an op for these numbers, on a card. `to` are the 8 bits that it gives."""
    return x.is_cuda and (op, x.dtype, to) in _on_card and not torch.is_grad_enabled()


def _choice() -> bool:
    if _chosen is None:
        choose("auto")
        assert _chosen is not None
    return _chosen


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What computes there: "attention", "linears", those of 8 bits ("int8", "fp8"), and "tokens", all that is done
    between."""
    if device.type == "cuda":
        ours = {"int8": "int8_linear", "fp8": "fp8_linear", "tokens": "layer_norm_modulate"}
        found = {
            name: "flux_kernels (Triton)" if (op, dtype, None) in _on_card else "torch" for name, op in ours.items()
        }
        return {"attention": "torch", "linears": "torch", **found}
    computes = _choice()
    if device.type != "cpu" or not computes or dtype not in cpu.DTYPES:
        missing = device.type == "cpu" and not computes
        said = f"torch ({cpu.why_not() or 'kernels are off'})" if missing else "torch"
        return dict.fromkeys(("attention", "linears", "int8", "tokens"), said)
    products = f"flux_kernels ({cpu.isa()})"
    wide = products if dtype is torch.bfloat16 else f"torch ({str(dtype).removeprefix('torch.')})"
    return {"attention": wide, "linears": wide, "int8": products, "tokens": "flux_kernels (AVX-512)"}

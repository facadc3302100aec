"""Which device and which dtype: decided once, from what the machine can do, never by trying and falling back."""

from __future__ import annotations

import torch

from flux_engine.errors import UnsupportedError

BF16_CAPABILITY = (8, 0)
"""First compute capability that multiplies bf16. torch reports emulated bf16 as supported on older cards."""
FP8_CAPABILITY = (8, 9)
INT8_CAPABILITY = (7, 5)


def pick_device(name: str) -> torch.device:
    """The torch device a name means. Raises UnsupportedError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnsupportedError(f"device {name!r} is not a device: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UnsupportedError(
                f"device {name!r} asked for, but torch {torch.__version__} sees {count} CUDA devices; use device='cpu'"
            )
    elif device.type != "cpu":
        raise UnsupportedError(f"device {name!r}: only cpu and cuda are supported")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype the networks compute in.

    "auto" is bfloat16 where the hardware multiplies it, else float16 on a GPU and float32 on a CPU (where float16 is
    ten times slower than float32).
    """
    native_bf16 = has_bf16(device)
    if name == "auto":
        if native_bf16:
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "bfloat16" and device.type == "cuda" and not native_bf16:
        raise UnsupportedError(
            f"dtype 'bfloat16' asked for, but {torch.cuda.get_device_name(device)} only emulates it, slowly; "
            "use dtype='float16'"
        )
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]


def pick_quantization(name: str, device: torch.device) -> str:
    """The scheme that is in force: the one asked for, or for "auto" what the device multiplies.

    Raises UnsupportedError for one that it does not.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if name == "auto":
        if capability is None:
            return "int8" if has_vnni() else "none"
        return "fp8" if capability >= FP8_CAPABILITY else "int8" if capability >= INT8_CAPABILITY else "none"
    least = {"fp8": FP8_CAPABILITY, "int8": INT8_CAPABILITY}.get(name)
    if capability is not None and least is not None and capability < least:
        other = "int8" if name == "fp8" and capability >= INT8_CAPABILITY else "fp8-storage"
        raise UnsupportedError(
            f"quantization {name!r} asked for, but {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]} and multiplies it from {least[0]}.{least[1]} on; use {other!r}"
        )
    return name


def has_vnni() -> bool:
    """Whether the processor multiplies 8-bit integers itself."""
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"

"""Which device and which dtype: decided once, from what the machine can do, never by trying and falling back."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from flux_engine.errors import UnsupportedError

Capability = tuple[int, int]
BF16_CAPABILITY: Capability = (8, 0)
"""First compute capability that multiplies bf16. torch reports emulated bf16 as supported on older cards."""
FP8_CAPABILITY: Capability = (8, 9)
INT8_CAPABILITY: Capability = (7, 5)


@dataclass(frozen=True)
class Card:
    """What a plan has to know of a device."""

    name: str
    memory: int
    """Bytes that a process gets."""
    capability: Capability | None
    """None for a processor."""
    link: float
    """Bytes a second from host memory."""
    bf16: bool

    def runs(self, scheme: str) -> bool:
        """Whether it multiplies what a scheme keeps; a processor does, fast or not."""
        return self.capability is None or self.capability >= LEAST.get(scheme, (0, 0))

    @property
    def best(self) -> str:
        """The scheme that is fastest there."""
        if self.capability is None:
            return "int8" if has_vnni() else "none"
        return next((scheme for scheme in ("fp8", "int8") if self.runs(scheme)), "none")


LEAST: Mapping[str, Capability] = MappingProxyType({"fp8": FP8_CAPABILITY, "int8": INT8_CAPABILITY})
"""Scheme -> the first compute capability that multiplies it."""
MEMINFO, CGROUP = "/proc/meminfo", "/sys/fs/cgroup"
PCI3, PCI4, PCI5 = 12e9, 24e9, 48e9
CARDS: Mapping[str, Card] = MappingProxyType(
    {
        name: Card(name, int(memory * 1e9), capability, link, capability >= BF16_CAPABILITY)
        for name, memory, capability, link in (
            ("T4", 15.8, (7, 5), PCI3),
            ("A10", 23.6, (8, 6), PCI4),
            ("L4", 23.6, (8, 9), PCI4),
            ("RTX 4090", 25.3, (8, 9), PCI4),
            ("A100 40 GB", 42.3, (8, 0), PCI4),
            ("A40", 47.5, (8, 6), PCI4),
            ("L40S", 47.5, (8, 9), PCI4),
            ("A100 80 GB", 84.9, (8, 0), PCI4),
            ("H100", 84.9, (9, 0), PCI5),
            ("H200", 150.0, (9, 0), PCI5),
        )
    }
)
"""From the least memory on; the memory is what torch reports as a card's total, rounded down."""


def card_of(device: torch.device) -> Card:
    """A device that is here, with the memory that is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        capability = torch.cuda.get_device_capability(device)
        return Card(torch.cuda.get_device_name(device), free, capability, PCI4, has_bf16(device))
    return processor(free_memory())


def processor(memory: int) -> Card:
    """The one of this machine, as if so many bytes of memory were free."""
    return Card("CPU", memory, None, float("inf"), has_bf16(torch.device("cpu")))


def free_memory() -> int:
    """Bytes of host memory that this process may still take: what is free, or what its container leaves."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    lines = _read(MEMINFO).splitlines()
    found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    limit, used, kinds = (_read(f"{CGROUP}/memory.{name}").strip() for name in ("max", "current", "stat"))
    if limit.isdecimal() and used.isdecimal():
        # What is used has files in it that were read, which go when the memory is needed.
        files = [int(n) for n in re.findall(r"^(?:in)?active_file (\d+)$", kinds, re.MULTILINE)]
        found.append(int(limit) - int(used) + sum(files))
    return max(0, min(found))


def processors() -> int:
    """How many of the machine's this process may use: those it is bound to, or what its container has time on."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(f"{CGROUP}/cpu.max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        bound = min(bound, -(-int(quota) // int(period)))
    return max(1, bound)


def limit_threads() -> None:
    """Have torch compute with no more threads than there are processors for this process: it counts the machine's, and
    with twice as many a step takes several times as long. For the whole process; fewer stay as they are."""
    if torch.get_num_threads() > processors():
        torch.set_num_threads(processors())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


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
    """The scheme that is in force: the one asked for, or for "auto" what the device multiplies; for "both" the one of
    8 bits.

    Raises UnsupportedError for one that it does not.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    card = Card("", 0, capability, 0.0, bf16=False)
    if name == "auto":
        return card.best
    if name == "both":
        name = "int8" if card.best == "none" else card.best
    if capability is not None and not card.runs(name):
        other = "int8" if name == "fp8" and card.runs("int8") else "fp8-storage"
        raise UnsupportedError(
            f"quantization {name!r} asked for, but {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]} and multiplies it from {LEAST[name][0]}.{LEAST[name][1]} on; "
            f"use {other!r}"
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

"""Which kernel is for which card, and how large its tiles are there. The only place that knows compute capabilities.

Sources: the table of what Triton 3.7 to 3.9 compiles, which tests/test_kernels_compile.py makes anew; NVIDIA's CUDA C++
programming guide, "Technical specifications per compute capability", for shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache

import torch

from flux_kernels.errors import KernelUnavailable

Capability = tuple[int, int]

SHARED: dict[Capability, int] = {
    (7, 5): 65536,
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
}
"""Compute capability -> bytes of shared memory that a block may have. A card between two is taken for the lower."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""8-bit dtype -> the largest number there is."""


@dataclass(frozen=True)
class Rule:
    """Below `least` an op is not for a card, nor where `dtype` is one of its dtypes, if that is given."""

    ops: tuple[str, ...]
    least: Capability
    because: str
    instead: str
    dtype: torch.dtype | None = None

    def applies(self, op: str, dtypes: tuple[torch.dtype, ...]) -> bool:
        return op in self.ops and (self.dtype is None or self.dtype in dtypes)


CARDS: dict[Capability, str] = {
    (7, 5): "T4",
    (8, 0): "A100",
    (8, 6): "A40",
    (8, 9): "L40S",
    (9, 0): "H100",
    (10, 0): "B200",
    (12, 0): "RTX 5090",
}
"""Compute capability -> a card that has it."""
NORMS = ("layer_norm_modulate", "qk_norm_rotary", "gated_residual", "gated_residual_modulate", "group_norm_silu")
QUANTIZING = ("layer_norm_modulate_quantize", "quantize_rows", "gelu_tanh_quantize")
PRODUCTS = ("int8_linear", "fp8_linear", "fp8_storage_linear")

RULES = (
    Rule((*NORMS, *QUANTIZING, *PRODUCTS), (7, 5), "Triton compiles for 7.5 and above", "torch's own operations"),
    Rule(("int8_linear",), (8, 0), "Triton has no tensor cores on 7.5", "torch._int_mm"),
    Rule(("fp8_linear",), (8, 9), "there is no product of e4m3 below 8.9", "int8_linear, or fp8_storage_linear"),
    Rule(("fp8_storage_linear",), (8, 0), "Triton has no tensor cores on 7.5", "torch.mm of weights cast to float16"),
    Rule(QUANTIZING, (8, 9), "Triton has no e4m3 below 8.9", "int8", torch.float8_e4m3fn),
)


def refusal(op: str, dtypes: tuple[torch.dtype, ...], capability: Capability) -> Rule | None:
    """The rule by which an op that has these dtypes is not for such a card; None where it is."""
    return next((rule for rule in RULES if capability < rule.least and rule.applies(op, dtypes)), None)


def why_not(op: str, dtypes: tuple[torch.dtype, ...], capability: Capability) -> str | None:
    """The same in words, with what to use instead."""
    rule = refusal(op, dtypes, capability)
    if rule is None:
        return None
    what = op if rule.dtype is None else f"{op} to {str(rule.dtype).removeprefix('torch.')}"
    needed, found = (f"{major}.{minor}" for major, minor in (rule.least, capability))
    return f"{what} needs compute capability {needed}, and this is {found}: {rule.because}; use {rule.instead}"


@cache
def available(op: str, capability: Capability) -> frozenset[tuple[torch.dtype, torch.dtype | None]]:
    """What an op is for on such a card: pairs of the dtype that it reads (a linear of 8 bits: gives) and of the 8 bits
    that it gives, None for none."""
    reads = FLOATS if op != "fp8_storage_linear" else FLOATS[1:]
    gives: tuple[torch.dtype | None, ...] = tuple(LIMITS) if op in QUANTIZING else (None,)
    pairs = ((one, other) for one in reads for other in gives)
    return frozenset(
        pair for pair in pairs if why_not(op, tuple(dtype for dtype in pair if dtype is not None), capability) is None
    )


_assumed: ContextVar[Capability | None] = ContextVar("assumed", default=None)


@contextmanager
def assumed(capability: Capability) -> Iterator[None]:
    """Inside, every CUDA device is taken for such a card: for dry runs, which have none."""
    token = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(token)


def require(op: str, device: torch.device, *dtypes: torch.dtype) -> None:
    """Raise KernelUnavailable where an op is not for a card. Nothing is known of a card that is not there, unless one
    is `assumed`; other devices have implementations of their own, with their own limits."""
    capability = _capability(device)
    reason = None if capability is None else why_not(op, dtypes, capability)
    if reason:
        raise KernelUnavailable(reason)


def _capability(device: torch.device) -> Capability | None:
    if device.type != "cuda":
        return None
    return _assumed.get() or _real_capability(device)


@cache
def _real_capability(device: torch.device) -> Capability | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Tile:
    """How a product is cut: M x N x K of a block, warps, stages of the pipeline that loads them."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


SMALL = Tile(16, 16, 32, 4, 1)
"""Of the interpreter, which needs no speed."""

TILES: dict[int, dict[Capability, Tile]] = {
    1: {
        (8, 0): Tile(128, 128, 128, 8, 4),
        (8, 6): Tile(128, 128, 128, 8, 3),
        (8, 9): Tile(128, 128, 128, 8, 3),
        (9, 0): Tile(128, 128, 128, 8, 4),
        (10, 0): Tile(128, 128, 128, 8, 4),
        (12, 0): Tile(128, 128, 128, 8, 3),
    },
    2: {
        (8, 0): Tile(128, 128, 64, 8, 4),
        (8, 6): Tile(128, 128, 64, 8, 3),
        (8, 9): Tile(128, 128, 64, 8, 3),
        (9, 0): Tile(128, 128, 64, 8, 4),
        (10, 0): Tile(128, 128, 64, 8, 4),
        (12, 0): Tile(128, 128, 64, 8, 3),
    },
}
"""Bytes of a token's number -> card -> tile."""


def tile(device: torch.device, size: int, result: torch.dtype) -> Tile:
    """For tokens whose numbers have `size` bytes, and results in some dtype. The same for any number of tokens: another
    size of a picture compiles nothing."""
    capability = _capability(device)
    if capability is None:
        return SMALL
    tiles = TILES[size]
    found = tiles[max(known for known in tiles if known <= capability)]
    # A residual in float32 takes twice the registers.
    return replace(found, n=found.n // 2) if result == torch.float32 else found


def products(op: str, capability: Capability) -> tuple[str, ...]:
    """The tensor-core instruction that an op's products are made by; one of them where it depends on Triton's version.

    Triton 3.7 multiplies int8 on 10.0 by the older instruction, 3.8 and 3.9 by the newer.
    """
    if capability < (9, 0) or capability >= (12, 0):
        return ("mma.sync",)
    if capability < (10, 0):
        return ("wgmma.mma_async",)
    return ("tcgen05.mma", "mma.sync") if op == "int8_linear" else ("tcgen05.mma",)

"""What a device can do: measured here, and by datasheets. The floor of a step is its arithmetic at these speeds.

A ceiling is the fastest that any way at hand multiplied matrices of the network's own sizes, without anything before or
after; torch's way and ours both try. So it is what an engine could reach on this machine, and moves with it.

Shapes: M tokens, K and N the sides of a weight, H heads, L tokens, D width of a head, C channels, h w size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.attention import attention
from flux_engine.bench.measure import repeated
from flux_engine.linears import Rows, linear
from flux_engine.quantization.linears import SCHEMES, QuantizedLinear, fp8_product, int8_product, quantize_rows
from flux_engine.work import Work

COPIED = 2**28
"""Bytes that are copied to measure the memory: many times a processor's last cache."""


@dataclass(frozen=True)
class Peak:
    """A card by its datasheet: dense, without sparsity, in operations and bytes a second."""

    bf16: float | None
    fp16: float
    int8: float
    fp8: float | None
    bandwidth: float

    def of(self, dtype: torch.dtype, scheme: str) -> float | None:
        """Of matrices of a dtype, or of 8 bits where a scheme multiplies these; None for what is not published."""
        if scheme in ("int8", "fp8"):
            return self.int8 if scheme == "int8" else self.fp8
        return {torch.bfloat16: self.bf16, torch.float16: self.fp16}.get(dtype)


def _tera(bf16: float | None, fp16: float, int8: float, fp8: float | None, bandwidth: float) -> Peak:
    return Peak(bf16 and bf16 * 1e12, fp16 * 1e12, int8 * 1e12, fp8 and fp8 * 1e12, bandwidth * 1e12)


PEAKS: Mapping[str, Peak] = MappingProxyType(
    {
        "T4": _tera(None, 65, 130, None, 0.32),
        "A10": _tera(125, 125, 250, None, 0.60),
        "L4": _tera(121, 121, 242, 242, 0.30),
        "RTX 4090": _tera(165, 165, 660, 330, 1.01),
        "A100 40 GB": _tera(312, 312, 624, None, 1.56),
        "A40": _tera(150, 150, 299, None, 0.70),
        "L40S": _tera(362, 362, 733, 733, 0.86),
        "A100 80 GB": _tera(312, 312, 624, None, 2.04),
        "H100": _tera(989, 989, 1979, 1979, 3.35),
        "H200": _tera(989, 989, 1979, 1979, 4.8),
    }
)
"""Name of a card (`hardware.CARDS`) -> its datasheet; H100 and H200 as SXM, products summed in float32."""


@dataclass(frozen=True)
class Sizes:
    """Of what is multiplied to find the ceilings; 0 tokens, heads or channels where a network has none."""

    tokens: int = 0
    width: int = 0
    heads: int = 0
    length: int = 0
    head_dim: int = 0
    channels: int = 0
    h: int = 0
    w: int = 0


@dataclass(frozen=True)
class Ceiling:
    """The fastest of several ways."""

    per_second: float
    """FLOP, or bytes."""
    by: str
    """Which way it was."""


def measure_ceilings(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, scheme: str, *, repeats: int = 3
) -> dict[str, Ceiling]:
    """For the kinds of `Work`: "linear", "kept", "attention", "convolution"; and "bandwidth"."""
    found: dict[str, Ceiling] = {}
    with torch.inference_mode():
        if sizes.tokens:
            found["kept"] = _of_linears(sizes, device, dtype, "none", repeats)
            found["linear"] = _of_linears(sizes, device, dtype, scheme, repeats) if scheme != "none" else found["kept"]
        if sizes.heads:
            found["attention"] = _of_attention(sizes, device, dtype, repeats)
        if sizes.channels:
            found["convolution"] = _of_convolution(sizes, device, dtype, repeats)
        here = torch.ones(COPIED, dtype=torch.uint8, device=device)
        there = torch.empty_like(here)
        found["bandwidth"] = _fastest({"copy": lambda: there.copy_(here)}, 2 * COPIED, device, repeats)
    return found


def floor(work: Work, item: int, scheme: str, ceilings: Mapping[str, Ceiling]) -> float:
    """Seconds that a call takes at least: its arithmetic at the ceilings, or its weights at the memory's speed."""
    kinds = ("linear", "kept", "attention", "convolution")
    computing = sum(getattr(work, kind) / ceilings[kind].per_second for kind in kinds if getattr(work, kind))
    reading = work.bytes(item, quantized=scheme != "none") / ceilings["bandwidth"].per_second
    return max(computing, reading)


def datasheet_floor(work: Work, dtype: torch.dtype, scheme: str, peak: Peak) -> float | None:
    """The same by a datasheet; None where it does not speak of such a dtype."""
    plain, fast = peak.of(dtype, "none"), peak.of(dtype, scheme)
    if plain is None or fast is None:
        return None
    computing = work.linear / fast + (work.flops - work.linear) / plain
    return max(computing, work.bytes(dtype.itemsize, quantized=scheme != "none") / peak.bandwidth)


def _fastest(ways: Mapping[str, Callable[[], object]], amount: float, device: torch.device, repeats: int) -> Ceiling:
    best = {name: min(repeated(way, device, warm_up=1, repeats=repeats)) for name, way in ways.items()}
    name = min(best, key=lambda each: best[each])
    return Ceiling(amount / best[name], name)


def _of_linears(sizes: Sizes, device: torch.device, dtype: torch.dtype, scheme: str, repeats: int) -> Ceiling:
    """The better of both of an MLP's matrices."""
    inner = 4 * sizes.width
    each = [_of_linear(sizes.tokens, k, n, device, dtype, scheme, repeats)
            for k, n in ((sizes.width, inner), (inner, sizes.width))]  # fmt: skip
    return max(each, key=lambda one: one.per_second)


def _of_linear(m: int, k: int, n: int, device: torch.device, dtype: torch.dtype, scheme: str, repeats: int) -> Ceiling:
    x = _random((m, k), device, dtype)
    with device:
        layer = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
    ways: dict[str, Callable[[], object]]
    if scheme in ("none", "int8-storage", "fp8-storage"):
        ways = {"torch linear": lambda: F.linear(x, layer.weight), "flux_engine": lambda: linear(layer, x[None])}
        return _fastest(ways, 2 * m * k * n, device, repeats)
    small = QuantizedLinear.of(layer, SCHEMES[scheme])
    values, scales = quantize_rows(x, small.scheme)
    if scheme == "int8":
        ways = {"torch._int_mm": lambda: int8_product(values, small.weight)}
        if small.has_kernel(x[None]):
            rows = Rows(values, scales, torch.Size((1, m, k)), dtype)
            ways["flux_engine"] = lambda: linear(small, rows)
    else:
        ways = {"torch._scaled_mm": lambda: fp8_product(values, scales, small.weight, small.weight_scale, dtype)}
    return _fastest(ways, 2 * m * k * n, device, repeats)


def _of_attention(sizes: Sizes, device: torch.device, dtype: torch.dtype, repeats: int) -> Ceiling:
    shape = (1, sizes.heads, sizes.length, sizes.head_dim)
    q, k, v = (_random(shape, device, dtype) for _ in range(3))
    ways = {
        "torch scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v),
        "flux_engine": lambda: attention(q, k, v),
    }
    return _fastest(ways, 4 * sizes.heads * sizes.length**2 * sizes.head_dim, device, repeats)


def _of_convolution(sizes: Sizes, device: torch.device, dtype: torch.dtype, repeats: int) -> Ceiling:
    C = sizes.channels
    x, weight = _random((1, C, sizes.h, sizes.w), device, dtype), _random((C, C, 3, 3), device, dtype)
    last = torch.channels_last
    x_last, weight_last = x.contiguous(memory_format=last), weight.contiguous(memory_format=last)
    ways = {
        "torch conv2d": lambda: F.conv2d(x, weight, padding=1),
        "torch conv2d, channels last": lambda: F.conv2d(x_last, weight_last, padding=1),
    }
    return _fastest(ways, 2 * 9 * C * C * sizes.h * sizes.w, device, repeats)


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

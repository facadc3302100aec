"""Every kernel at the widths of the published models, and what becomes of it on cards that are not there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import flux_kernels
import torch
from flux_kernels import KernelUnavailable, arch, jit
from flux_kernels.arch import Capability
from flux_kernels.crosscompile import compiled
from flux_kernels.ops import OPS
from kernel_cases import EIGHT, FLOATS, short
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.dry_run import register_guard

CACHE = Path(__file__).parent.parent / "out" / "kernels"
Outcome = dict[str, Any]
"""What became of a launch: `compiled`'s fields, or "error"."""


@dataclass(frozen=True)
class Size:
    op: str
    dtype: torch.dtype
    """Of numbers in floating point, what is read or what is given."""
    variant: str = ""
    eight: torch.dtype | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.op, short(self.dtype), self.eight and short(self.eight), self.variant)))


def sizes() -> Iterable[Size]:
    for op in OPS:
        if op.endswith("_linear"):
            kept = (torch.float8_e4m3fn if op == "fp8_linear" else torch.int8) if op != "fp8_storage_linear" else None
            for dtype in FLOATS if kept else FLOATS[1:]:
                yield Size(op, dtype, "all after" if kept else "", kept)
                if kept:
                    yield from (Size(op, dtype, variant, kept) for variant in ("nothing after", "bias and gelu"))
        elif op.endswith(("quantize", "rows")):
            yield from (Size(op, dtype, eight=eight) for dtype, eight in product(FLOATS, EIGHT))
        elif op == "group_norm_silu":
            yield from (Size(op, dtype, layout) for dtype, layout in product(FLOATS, ("channels last", "contiguous")))
        else:
            yield from (Size(op, dtype) for dtype in FLOATS)


SIZES = tuple(sizes())
DEFAULT = tuple(size for size in SIZES if size.variant not in ("nothing after", "bias and gelu", "contiguous"))
"""What the default tier compiles: every kernel and dtype, of the products those with everything after."""


@dataclass(frozen=True)
class Empty:
    """Draws tensors without looking at their numbers: on a card that is not there they have none."""

    device: str = "cuda"

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def positive(self, *shape: int) -> Tensor:
        return self(*shape)


def tensors(size: Size, draw: Any, tokens: int = 4608) -> tuple[Any, ...]:
    """A call of the op as FLUX.1 makes it at 1024 pixels, or SDXL's VAE for GroupNorm."""
    t, width = size.dtype, 3072

    def stream() -> Tensor:
        return draw(1, tokens, width, dtype=t)

    def after(columns: int) -> tuple[Any, ...]:
        if size.variant == "nothing after":
            return None, None, None, None
        if size.variant == "bias and gelu":
            return draw(columns, dtype=t), 0, None, None
        return draw(columns, dtype=t), 64, draw(1, tokens, columns, dtype=t), draw(1, 6, 1, columns, dtype=t)[:, 2]

    def modulation(count: int) -> tuple[Tensor, ...]:
        return draw(1, 6, 1, width, dtype=t).unbind(1)[:count]

    def qk() -> tuple[Any, ...]:
        wide = draw(1, tokens, 7 * width, dtype=t)[..., : 3 * width]  # linear1's, whose rest is the MLP's
        q, k, _ = wide.unflatten(-1, (3, 24, 128)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, draw(128, dtype=t), draw(128, dtype=t), draw(tokens, 64), draw(tokens, 64)

    def picture() -> tuple[Any, ...]:
        layout = torch.channels_last if size.variant == "channels last" else torch.contiguous_format
        return draw(2, 320, 128, 96, dtype=t).contiguous(memory_format=layout), 32, draw(320), draw(320), 1e-5

    calls: dict[str, Callable[[], tuple[Any, ...]]] = {
        "layer_norm_modulate": lambda: (stream(), *modulation(2)),
        "layer_norm_modulate_quantize": lambda: (stream(), *modulation(2), size.eight),
        "quantize_rows": lambda: (draw(tokens, 5 * width, dtype=t), size.eight),
        "gelu_tanh_quantize": lambda: (draw(tokens, 4 * width, dtype=t), size.eight),
        "qk_norm_rotary": qk,
        "gated_residual": lambda: (stream(), *modulation(1), stream()),
        "gated_residual_modulate": lambda: (stream(), *modulation(1), stream(), *modulation(2)),
        "group_norm_silu": picture,
        "fp8_storage_linear": lambda: (
            draw(tokens, width, dtype=t), draw(width, width, dtype=torch.float8_e4m3fn), draw.positive(width),
            draw(width, dtype=t),
        ),
    }  # fmt: skip
    if size.op in calls:
        return calls[size.op]()
    return (
        draw(tokens, 4 * width, dtype=size.eight), draw.positive(tokens), draw(width, 4 * width, dtype=size.eight),
        draw.positive(width), *after(width), t,
    )  # fmt: skip


def launches(size: Size, capability: Capability, tokens: int = 4608) -> list[jit.Launch]:
    """What the wrapper would launch on a card. Raises KernelUnavailable."""
    register_guard()
    with FakeTensorMode(allow_non_fake_inputs=True), arch.assumed(capability), jit.recorded() as recorded:
        getattr(OPS[size.op], size.op)(*tensors(size, Empty(), tokens))
    return recorded


def outcomes(size: Size, capability: Capability) -> list[Outcome]:
    """What becomes of a size's launches. What a rule refuses is compiled as the oldest card that has it runs it."""
    try:
        wanted = launches(size, capability)
    except KernelUnavailable:
        oldest = min(c for c in arch.SHARED if arch.why_not(size.op, dtypes(size), c) is None)
        wanted = launches(size, oldest)
    found: list[Outcome] = []
    for launch in wanted:
        try:
            found.append(asdict(compiled(launch, capability)))
        except Exception as error:  # noqa: BLE001 Triton raises any
            found.append({"error": f"{type(error).__name__}: {error}"[:400]})
    return found


def dtypes(size: Size) -> tuple[torch.dtype, ...]:
    return (size.dtype,) if size.eight is None else (size.dtype, size.eight)


def all_outcomes(wanted: Iterable[tuple[Size, Capability]]) -> dict[tuple[Size, Capability], list[Outcome]]:
    """Of many, by all processors; remembered in `out/` for as long as the sources and Triton are the same."""
    wanted = list(wanted)
    files = {one: CACHE / f"{_key(*one)}.json" for one in wanted}
    missing = [one for one in wanted if not files[one].exists()]
    if missing:
        CACHE.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            for one, found in zip(missing, pool.map(outcomes, *zip(*missing, strict=True), chunksize=4), strict=True):
                temporary = files[one].with_suffix(f".{os.getpid()}")
                temporary.write_text(json.dumps(found))
                temporary.replace(files[one])
    return {one: json.loads(file.read_text()) for one, file in files.items()}


def _key(size: Size, capability: Capability) -> str:
    import triton

    told = hashlib.sha256(f"{triton.__version__} {size} {capability}".encode())
    for path in (Path(__file__), *sorted(Path(flux_kernels.__file__).parent.glob("*.py"))):
        told.update(path.read_bytes())
    return told.hexdigest()[:32]

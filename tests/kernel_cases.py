"""What every kernel is given to compute, on any device, and how near it has to come to its torch reference.

Numbers come from the case's name. In interpreter and card alike a result may be rounded to the neighbour of the
reference's: see TOLERANCE.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from flux_kernels.ops import OPS
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EIGHT = (torch.int8, torch.float8_e4m3fn)
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""dtype -> largest error, of the largest number: float32 is summed in another order; of the others it is a last bit."""

ON_A_CARD = {"fp8_linear": 2**-9}
"""Op -> the least tolerance on a card: its tensor cores add products of e4m3 up with 13 bits, which an interpreter does
not show (arXiv 2412.19437, section 3.3.2)."""

Make = Callable[["Draw"], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Make

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def arguments(self, device: str) -> tuple[Any, ...]:
        draw = Draw(torch.Generator().manual_seed(zlib.crc32(self.id.encode())))
        return tuple(x.to(device) if isinstance(x, Tensor) else x for x in self.make(draw))

    def error(self, device: str = "cpu") -> str | None:
        """What is wrong with the kernel's results; None if nothing."""
        module = OPS[self.op]
        arguments = self.arguments(device)
        least = 0.0 if device == "cpu" else ON_A_CARD.get(self.op, 0.0)
        return compared(getattr(module, self.op)(*arguments), module.reference(*arguments), least)


class Draw:
    """Random tensors, one after another."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, generator=self.generator, dtype=dtype, device=self.generator.device)
        numbers = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return (numbers * 60 if dtype == torch.float8_e4m3fn else numbers).to(dtype)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device) * 0.01 + 1e-4


def compared(
    results: Tensor | tuple[Tensor, ...], wanted: Tensor | tuple[Tensor, ...], least: float = 0.0
) -> str | None:
    """What differs, by more than TOLERANCE and `least`. Values of 8 bits are compared with their scales, if these are
    finite."""
    if isinstance(results, Tensor):
        assert isinstance(wanted, Tensor)
        return _compared(results, wanted, least)
    for a, b in zip(results, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
            return f"{a.dtype} {list(a.shape)} {a.stride()}, not {b.dtype} {list(b.shape)} {b.stride()}"
    if wanted[0].dtype in EIGHT:
        return _quantized(*results, *wanted)
    errors = [_compared(a, b, least) for a, b in zip(results, wanted, strict=True)]
    return next((error for error in errors if error), None)


def _compared(a: Tensor, b: Tensor, least: float) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
        return f"{a.dtype} {list(a.shape)} {a.stride()}, not {b.dtype} {list(b.shape)} {b.stride()}"
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return "other numbers are not finite than the reference's"
    if not finite.any():
        return None
    x, y = a[finite].double(), b[finite].double()
    error = (x - y).abs().max().item() / max(y.abs().max().item(), 1e-30)
    return None if error <= max(least, TOLERANCE[b.dtype]) else f"relative error {error:.2g}"


def _quantized(values: Tensor, scales: Tensor, wanted: Tensor, wanted_scales: Tensor) -> str | None:
    finite = wanted_scales.isfinite()
    if not torch.equal(finite, scales.isfinite()):
        return "other scales are not finite than the reference's"
    a, b = scales[finite].double(), wanted_scales[finite].double()
    if ((a - b).abs() > TOLERANCE[torch.float32] * b).any():
        return f"scales differ by {((a - b) / b).abs().max().item():.2g}"
    x, y = values[finite].double(), wanted[finite].double()
    step = torch.ones_like(y) if values.dtype == torch.int8 else torch.clamp(y.abs() / 8, min=2**-9)
    if ((x - y).abs() > step).any():
        return "a value is more than one step away"
    if (x != y).sum() > max(1, 0.01 * x.numel()):
        return f"{(x != y).double().mean().item():.1%} of the values are one step away"
    return None


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "zeros": lambda x: x.index_fill(-2, torch.tensor([0]), 0),
    "nan": lambda x: x.index_fill(-1, torch.tensor([x.shape[-1] // 2]), float("nan")),
    "one nan": lambda x: _put(x, float("nan")),
    "one inf": lambda x: _put(x, float("inf")),
    "large mean": lambda x: x + 30,
    "large": lambda x: x * 1e4,
    "small": lambda x: x * 1e-6,
    "constant": lambda x: torch.ones_like(x),
    "outlier": lambda x: _put(x, 1000.0),
}
"""What is done to random rows."""


def _put(x: Tensor, number: float) -> Tensor:
    x = x.clone()
    x.view(-1)[x.numel() // 3] = number
    return x


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def apart(x: Tensor) -> Tensor:
    """The same rows, as a slice of longer ones."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 11), float("nan"), dtype=x.dtype)
    wide[..., 3:-8] = x
    return wide[..., 3:-8]


def later(x: Tensor) -> Tensor:
    """The same tokens, as the last ones of longer pictures."""
    longer = torch.cat((torch.full_like(x[:, :1], float("nan")), x), dim=1)
    return longer[:, 1:]


SHAPES = ((2, 5, 33), (1, 7, 64), (3, 1, 16), (2, 3, 1000), (1, 2, 1), (2, 0, 8), (0, 3, 8))
STREAMS = {"rows apart": apart, "tokens behind others": later}


def modulations(draw: Draw, count: int, batch: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As a block gets them: parts of one tensor."""
    return draw(batch, 6, 1, width, dtype=dtype).unbind(1)[:count]


def token_cases(op: str, build: Callable[..., tuple[Any, ...]]) -> Iterator[tuple[str, Make]]:
    """`build(draw, x, batch of the modulation)` over shapes, kinds of rows, strides and dtypes."""
    for dtype, shape in product(FLOATS, SHAPES):
        name = f"{short(dtype)}-{'x'.join(map(str, shape))}"
        yield name, lambda d, s=shape, t=dtype: build(d, d(*s, dtype=t), s[0])
    for dtype, (kind, change) in product(FLOATS, ROWS.items()):
        name = f"{short(dtype)}-{kind}"
        yield name, lambda d, c=change, t=dtype: build(d, c(d(2, 3, 40)).to(t), 2)
    for dtype, (kind, place) in product(FLOATS, STREAMS.items()):
        name = f"{short(dtype)}-{kind}"
        yield name, lambda d, p=place, t=dtype: build(d, p(d(2, 3, 24, dtype=t)), 2)
        yield f"{name}-one for all", lambda d, p=place, t=dtype: build(d, p(d(2, 3, 24, dtype=t)), 1)


def _modulate(d: Draw, x: Tensor, batch: int) -> tuple[Any, ...]:
    return x, *modulations(d, 2, batch, x.shape[-1], x.dtype)


def _residual(d: Draw, x: Tensor, batch: int) -> tuple[Any, ...]:
    update = d(*x.shape, dtype=x.dtype)
    return x, modulations(d, 1, batch, x.shape[-1], x.dtype)[0], later(update) if x.shape[0] else update


def _residual_modulate(d: Draw, x: Tensor, batch: int) -> tuple[Any, ...]:
    gate, shift, scale = modulations(d, 3, batch, x.shape[-1], x.dtype)
    return x, gate, apart(d(*x.shape, dtype=x.dtype)), shift, scale


def cases() -> Iterator[Case]:
    builds = {
        "layer_norm_modulate": _modulate,
        "gated_residual": _residual,
        "gated_residual_modulate": _residual_modulate,
    }
    for op, build in builds.items():
        yield from (Case(op, name, make) for name, make in token_cases(op, build))
    for eight in EIGHT:
        suffix = f"-{short(eight)}"
        for name, make in token_cases(
            "layer_norm_modulate_quantize", lambda d, x, b, e=eight: (*_modulate(d, x, b), e)
        ):
            if "0x" not in name or eight == torch.int8:
                yield Case("layer_norm_modulate_quantize", name + suffix, make)
        for op in ("quantize_rows", "gelu_tanh_quantize"):
            yield from (Case(op, name + suffix, make) for name, make in row_cases(eight))
    yield from qk_cases()
    yield from group_cases()
    yield from linear_cases()
    yield from storage_cases()


def row_cases(eight: torch.dtype) -> Iterator[tuple[str, Make]]:
    for dtype, shape in product(FLOATS, ((5, 33), (1, 1), (3, 128), (2, 1000), (0, 8))):
        yield f"{short(dtype)}-{shape[0]}x{shape[1]}", lambda d, s=shape, t=dtype: (d(*s, dtype=t), eight)
    for dtype, (kind, change) in product(FLOATS, ROWS.items()):
        yield f"{short(dtype)}-{kind}", lambda d, c=change, t=dtype: (c(d(4, 40)).to(t), eight)
    for dtype in FLOATS:
        largest, least = torch.finfo(dtype).max, torch.finfo(dtype).tiny
        yield f"{short(dtype)}-largest", lambda d, t=dtype, n=largest: ((d(3, 24).sign() * n).to(t), eight)
        yield f"{short(dtype)}-least", lambda d, t=dtype, n=least: ((d(3, 24).sign() * n).to(t), eight)
        yield f"{short(dtype)}-rows apart", lambda d, t=dtype: (apart(d(5, 24, dtype=t)), eight)


def qk_cases() -> Iterator[Case]:
    def views(d: Draw, b: int, length: int, h: int, width: int, rest: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """Views of a fused projection, whose rows have `rest` more numbers."""
        wide = d(b, length, 3 * h * width + rest, dtype=dtype)
        q, k, _ = wide[..., : 3 * h * width].unflatten(-1, (3, h, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        angle = d(length, width // 2) * 100
        return q, k, d(width, dtype=dtype), d(width, dtype=dtype), angle.cos(), angle.sin()

    shapes = (
        (1, 5, 2, 24, 0),
        (2, 21, 3, 16, 0),
        (2, 16, 1, 40, 7),
        (1, 33, 2, 128, 512),
        (1, 1, 1, 2, 0),
        (2, 0, 1, 8, 0),
    )
    for dtype, shape in product(FLOATS, shapes):
        name = f"{short(dtype)}-{'x'.join(map(str, shape))}"
        yield Case("qk_norm_rotary", name, lambda d, s=shape, t=dtype: views(d, *s, dtype=t))
    for dtype, (kind, change) in product(FLOATS, ROWS.items()):
        if kind in ("large mean", "constant"):
            continue

        def changed(d: Draw, c: Any = change, t: torch.dtype = dtype) -> tuple[Any, ...]:
            q, k, *rest = views(d, 1, 3, 2, 12, 0, t)
            return c(q.contiguous().float()).to(t), k, *rest

        yield Case("qk_norm_rotary", f"{short(dtype)}-{kind}", changed)
    for dtype in FLOATS[1:]:

        def in_float32(d: Draw, t: torch.dtype = dtype) -> tuple[Any, ...]:
            q, k, a, b, *tables = views(d, 1, 3, 2, 16, 0, t)
            return q, k.contiguous(), a.float(), b.float(), *tables

        yield Case("qk_norm_rotary", f"{short(dtype)}-weights in float32", in_float32)


def group_cases() -> Iterator[Case]:
    last, first = torch.channels_last, torch.contiguous_format
    shapes = ((2, 12, 3, 5, 3), (1, 8, 1, 1, 4), (1, 70, 7, 9, 7), (2, 6, 20, 30, 2), (1, 6, 2, 2, 1), (0, 4, 2, 2, 2))
    for dtype, shape, layout in product(FLOATS, shapes, (last, first)):
        *sizes, groups = shape
        name = f"{short(dtype)}-{'x'.join(map(str, shape))}-{'last' if layout is last else 'first'}"

        def make(d: Draw, s: Any = sizes, g: int = groups, t: Any = dtype, m: Any = layout) -> tuple[Any, ...]:
            x = d(*s, dtype=t).contiguous(memory_format=m)
            return x, g, d(s[1], dtype=t), d(s[1], dtype=t), 1e-5

        yield Case("group_norm_silu", name, make)
    for dtype, kind in product(FLOATS, ("large mean", "constant", "one nan", "one inf", "large", "outlier")):
        if kind == "constant" and dtype == torch.float32:
            continue  # torch's own sum of squares leaves a deviation there, which is none

        def changed(d: Draw, t: Any = dtype, c: Any = ROWS[kind]) -> tuple[Any, ...]:
            x = c(d(2, 8, 5, 9)).to(t).contiguous(memory_format=last)
            return x, 4, d(8), d(8), 1e-5

        yield Case("group_norm_silu", f"{short(dtype)}-{kind}", changed)


def linear_cases() -> Iterator[Case]:
    shapes = ((18, 40, 50), (1, 7, 32), (5, 16, 96), (33, 17, 128), (6, 1, 1), (0, 8, 16))
    for op, eight in (("int8_linear", torch.int8), ("fp8_linear", torch.float8_e4m3fn)):

        def tokens(d: Draw, m: int, n: int, k: int, t: torch.dtype = eight) -> tuple[Tensor, ...]:
            return d(m, k, dtype=t), d.positive(m), d(n, k, dtype=t), d.positive(n)

        for dtype, shape in product(FLOATS, shapes):

            def plain(d: Draw, s: Any = shape, t: Any = dtype, f: Any = tokens) -> tuple[Any, ...]:
                return *f(d, *s), None, None, None, None, t

            yield Case(op, f"{short(dtype)}-{'x'.join(map(str, shape))}", plain)

        for dtype, bias, gelu_from, stream in product(FLOATS, (None, True), (None, 0, 9), ("", "gate", "add")):
            if bias is None and gelu_from is None and not stream:
                continue

            def after(
                d: Draw, t: Any = dtype, b: Any = bias, g: Any = gelu_from, s: str = stream, f: Any = tokens
            ) -> Any:
                residual = apart(d(2, 9, 21, dtype=t)) if s else None
                gate = modulations(d, 1, 2, 21, t)[0] if s == "gate" else None
                return *f(d, 18, 21, 40), d(21, dtype=t) if b else None, g, residual, gate, t

            yield Case(op, f"{short(dtype)}-bias {bias}-gelu {gelu_from}-{stream}", after)

        for dtype in FLOATS:

            def strided(d: Draw, t: Any = dtype, e: Any = eight) -> tuple[Any, ...]:
                wide, weight = d(20, 80, dtype=e), d(24, 64, dtype=e)
                return wide[3:15, :48], d.positive(12), weight[::2, 16:], d.positive(12), d(12), 12, None, None, t

            def one_gate(d: Draw, t: Any = dtype, f: Any = tokens) -> tuple[Any, ...]:
                return *f(d, 18, 21, 40), None, None, d(18, 21, dtype=t), d(1, 1, 21, dtype=t), t

            def overflow(d: Draw, t: Any = dtype, f: Any = tokens) -> tuple[Any, ...]:
                values, scales, weight, by_row = f(d, 6, 8, 32)
                return values, scales * 1e3, weight, by_row * 1e3, None, None, d(6, 8, dtype=t), None, t

            def not_finite(d: Draw, t: Any = dtype, f: Any = tokens) -> tuple[Any, ...]:
                values, scales, *rest = f(d, 6, 8, 32)
                scales[1], scales[4] = float("inf"), float("nan")
                return values, scales, *rest, d(8), None, d(6, 8, dtype=t), None, t

            for name, make in (
                ("rows apart", strided), ("one gate", one_gate), ("overflow", overflow), ("not finite", not_finite)
            ):  # fmt: skip
                yield Case(op, f"{short(dtype)}-{name}", make)


def storage_cases() -> Iterator[Case]:
    for dtype in FLOATS[1:]:
        for m, n, k in ((18, 40, 50), (1, 7, 32), (5, 16, 96), (33, 17, 128), (0, 8, 16)):

            def make(d: Draw, m: int = m, n: int = n, k: int = k, t: Any = dtype) -> tuple[Any, ...]:
                return d(m, k, dtype=t), d(n, k, dtype=torch.float8_e4m3fn), d.positive(n), d(n, dtype=t)

            yield Case("fp8_storage_linear", f"{short(dtype)}-{m}x{n}x{k}", make)

        def every_number(d: Draw, t: Any = dtype) -> tuple[Any, ...]:
            """A token of a single 1 reads the weight's column: all 254 numbers of e4m3, to the bit."""
            codes = torch.arange(256, dtype=torch.uint8)
            weight = codes[(codes & 0x7F) != 0x7F].view(-1, 2).contiguous()
            return torch.eye(2, dtype=t), weight, torch.ones(len(weight)), None

        def nan(d: Draw, t: Any = dtype) -> tuple[Any, ...]:
            weight = torch.full((2, 16), 0x30, dtype=torch.uint8)
            weight[0, 3], weight[1, 5] = 0x7F, 0xFF
            return d(3, 16, dtype=t), torch.cat((weight, weight[:1] * 0 + 0x31)), torch.ones(3), None

        def strided(d: Draw, t: Any = dtype) -> tuple[Any, ...]:
            return apart(d(6, 24, dtype=t)), d(10, 40, dtype=torch.float8_e4m3fn)[:, 8:32], d.positive(10), None

        for name, build in (("every number", every_number), ("nan", nan), ("rows apart", strided)):
            yield Case("fp8_storage_linear", f"{short(dtype)}-{name}", build)


CASES = {case.id: case for case in cases()}

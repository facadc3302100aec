"""The kernels for processors against torch's own operations, on one thread, in turn.

    python -m benchmarks.cpu_kernels [--repeats 15] [--only attention] [--save]

Every case is computed by all that the processor can multiply by ("AMX", "AVX-512") and by torch, once each in a round,
in an order that turns around; a figure is the median of the rounds. Linears are told without anything around them: ours
do a bias, GELU, a gate and a residual in the same pass. int8 is against torch._int_mm, which leaves out the scales.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from flux_kernels import cpu

from benchmarks import harness
from flux_engine import ops
from flux_engine.bench.statistics import Spread

HALF = torch.bfloat16
LINEARS = [(256, 3072, 9216), (1280, 3072, 9216), (1280, 15360, 3072), (1280, 1280, 10240), (4096, 640, 1920)]
"""Tokens, in and out: of FLUX.1 at small sizes and at 512 px, of SDXL's two levels at 1024 px."""
ATTENTION = [(24, 1280, 1280, 128), (10, 4096, 4096, 64), (10, 4096, 77, 64)]
"""Heads, queries, keys, width: FLUX.1 at 512 px, SDXL at 1024 px, the same to its text."""
TOKENS = (1280, 3072)
NOTHING = (None, None, None, None)
"""Of bias, GELU, residual and gate."""
LEAST = 2e-3
"""Seconds that a measurement lasts at least."""


@dataclass(frozen=True)
class Case:
    """What is computed by ours and by torch, and how much that is: operations, or bytes read and written."""

    name: str
    work: float
    unit: str
    ours: Callable[[], object]
    torchs: Callable[[], object]
    multiplies: bool = True


def cases() -> Iterator[Case]:
    """One at a time: their numbers take up to half a gigabyte."""
    for tokens, inner, outer in LINEARS:
        size, work = f"{tokens:,} x {inner:,} -> {outer:,}", 2.0 * tokens * inner * outer
        values, weight = (torch.randint(-128, 128, (n, inner), dtype=torch.int8) for n in (tokens, outer))
        scales = torch.rand(tokens), torch.rand(outer)
        yield Case(
            f"int8 linear, {size}",
            work,
            "GOP/s",
            lambda v=values, w=weight, s=scales: cpu.int8_linear(v, s[0], w, s[1], *NOTHING, HALF),
            lambda v=values, w=weight: torch._int_mm(v, w.t()),
        )
        x, w = torch.randn(tokens, inner).to(HALF), torch.randn(outer, inner).to(HALF)
        yield Case(
            f"bf16 linear, {size}",
            work,
            "GFLOP/s",
            lambda x=x, w=w: cpu.bf16_linear(x, w, *NOTHING),
            lambda x=x, w=w: F.linear(x, w),
        )
    for heads, queries, keys, width in ATTENTION:
        q = torch.randn(1, heads, queries, width).to(HALF)
        k, v = torch.randn(2, 1, heads, keys, width).to(HALF)
        yield Case(
            f"attention, {heads} x {queries:,} to {keys:,}, width {width}",
            4.0 * heads * queries * keys * width,
            "GFLOP/s",
            lambda q=q, k=k, v=v: cpu.attention(q, k, v),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
        )
    yield from by_rows()


def by_rows() -> Iterator[Case]:
    """What is done between linears; torch's part is what the library does without kernels."""
    x, row = torch.randn(1, *TOKENS).to(HALF), torch.randn(1, 1, TOKENS[1]).to(HALF)
    size, bytes_of = f"{TOKENS[0]:,} x {TOKENS[1]:,}", 2.0 * x.numel()
    heads = x.unflatten(-1, (24, 128)).transpose(1, 2)
    weight, angle = torch.randn(128).to(HALF), torch.rand(TOKENS[0], 64)
    cos, sin = angle.cos(), angle.sin()
    picture = torch.randn(1, 128, 128, 128).to(HALF).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 128).to(HALF)
    half = TOKENS[1] // 2
    operations: list[tuple[str, float, Callable[[], object], Callable[[], object]]] = [
        (
            f"norm and modulation, {size}",
            2 * bytes_of,
            lambda: cpu.layer_norm(x, row, row, 1e-6, 1.0),
            lambda: F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + row) + row,
        ),
        (
            f"to 8 bits, {size}",
            1.5 * bytes_of,
            lambda: cpu.quantize_rows(x),
            lambda: (x / x.abs().amax(-1, keepdim=True) * 127).round().to(torch.int8),
        ),
        (
            f"GEGLU, {size}",
            1.5 * bytes_of,
            lambda: cpu.geglu(x),
            lambda: x[..., :half] * F.gelu(x[..., half:]),
        ),
        (
            f"norm and rotation of q and k, {size}",
            4 * bytes_of,
            lambda: cpu.qk_norm_rotary(heads, heads, weight, weight, cos, sin, 1e-6),
            lambda: [ops.apply_rotary(F.rms_norm(h, (128,), weight), cos, sin) for h in (heads, heads)],
        ),
        (
            f"residual and gate, {size}",
            3 * bytes_of,
            lambda: cpu.gated_residual(x, row, x),
            lambda: x + row * x,
        ),
        (
            "GroupNorm and SiLU, 128 x 128 x 128",
            4.0 * picture.numel(),
            lambda: cpu.group_norm(picture, 32, scale, shift, 1e-6, True),
            lambda: F.silu(F.group_norm(picture, 32, scale, shift, 1e-6)),
        ),
    ]
    for name, work, ours, torchs in operations:
        yield Case(name, work, "GB/s", ours, torchs, multiplies=False)


def by(isa: str, compute: Callable[[], object]) -> Callable[[], object]:
    """The same, by what is named."""

    def run() -> object:
        cpu.isa(isa)
        return compute()

    return run


def ways(case: Case) -> dict[str, Callable[[], object]]:
    """Name -> what computes the case."""
    there = [each for each in ("AMX", "AVX-512") if cpu.isa(each) == each] if case.multiplies else ["AVX-512"]
    return {**{isa: by(isa, case.ours) for isa in there}, "torch": case.torchs}


def measure(case: Case, repeats: int) -> dict[str, Spread]:
    """Rates in billions a second, by who computes."""
    candidates = ways(case)
    loops: dict[str, int] = {}
    for name, run in candidates.items():
        run()
        loops[name] = max(1, round(LEAST / seconds(run, 1)))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats):
        for name in list(candidates)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(case.work / seconds(candidates[name], loops[name]) / 1e9)
    return {name: Spread.of(rates) for name, rates in found.items()}


def seconds(run: Callable[[], object], times: int) -> float:
    """Of one of several calls."""
    began = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - began) / times


def main() -> None:
    """Measure, print a table as READMEs have it, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--save", action="store_true", help="add the line to benchmarks/results")
    args = parser.parse_args()
    if cpu.why_not():
        sys.exit(f"there are no kernels here: {cpu.why_not()}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    before, usual = harness.load(), cpu.isa()
    line: dict[str, object] = {"benchmark": "cpu_kernels", "repeats": args.repeats, "before": before}
    sys.stdout.write("| | AMX | AVX-512 | torch | | best / torch |\n| --- | --- | --- | --- | --- | --- |\n")
    rates: dict[str, dict[str, float]] = {}
    apart: list[float] = []
    with torch.inference_mode():
        for case in cases():
            if args.only not in case.name:
                continue
            found = measure(case, args.repeats)
            rates[case.name] = {name: round(spread.median, 1) for name, spread in found.items()}
            apart += [spread.relative for spread in found.values()]
            cells = [f"{found[name].median:,.0f}" if name in found else "" for name in ("AMX", "AVX-512", "torch")]
            best = max(spread.median for name, spread in found.items() if name != "torch")
            share = best / found["torch"].median
            sys.stdout.write(f"| {case.name} | {' | '.join(cells)} | {case.unit} | {share:.2f} |\n")
            sys.stdout.flush()
    cpu.isa(usual)
    line |= {"rates": rates, "apart": round(statistics.median(apart), 3), "after": harness.load()}
    line["machine"] = harness.machine()
    if args.save:
        harness.save(line, "cpu_kernels")
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

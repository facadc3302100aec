"""What step caches and guidance in an interval cost and save: errors at every call, pictures judged, time.

python -m benchmarks.stepcache --model demo-dev [--count N] [--seed N] [--steps N] [--negative-prompt TEXT]
    [--settings first-block:threshold=0.1 taylor:interval=4 guidance:0.2-0.8 taylor+guidance:0.2-1 ...]

Every setting draws the same captions from the same seeds as the whole walk does. `error at` is the relative L2 of the
picture that the network foresees there, over all captions, against the whole walk at the same share of the calls;
`latent` that of the latent in the end. `right` is the share of pictures that show all that the caption states, by the
oracle. `time` is the median over pictures of a picture's time, text remembered, and `ratio` divides it by the whole
walk's; settings take turns, A B, B A, ...
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

import flux_engine
from benchmarks import oracle, world
from benchmarks.adherence import scenes
from benchmarks.harness import load, machine
from benchmarks.quality import Likeness
from flux_engine import Engine
from flux_engine.bench.statistics import Spread
from flux_engine.specs import SDXLSpec

WHOLE = "all calls"
CACHES = ("taylor:interval=2", "taylor", "taylor:order=2", "taylor:interval=5")
FIRST_BLOCK = tuple(f"first-block:threshold={threshold:g}" for threshold in (0.04, 0.08, 0.12, 0.2))
GUIDED = ("guidance:0-0.8", "guidance:0.2-1", "guidance:0.2-0.8", "taylor+guidance:0.2-1")
QUARTERS = (0.25, 0.5, 0.75)


@dataclass
class Found:
    """What was measured of a setting."""

    calls: list[Likeness] = field(default_factory=list)
    """What is foreseen at each call, beside the whole walk."""
    latent: Likeness = field(default_factory=Likeness)
    skipped: int = 0
    drawn: int = 0
    right: int = 0
    seconds: list[float] = field(default_factory=list)

    def error_at(self, share: float) -> float:
        return self.calls[round(share * len(self.calls)) - 1].relative

    @property
    def share_skipped(self) -> float:
        """Of all calls."""
        return self.skipped / (self.drawn * len(self.calls))


def fields_of(setting: str) -> dict[str, Any]:
    """Of a request: a step cache, guidance:START-END, or both with + between. Raises ValueError."""
    if setting == WHOLE:
        return {}
    asked: dict[str, Any] = {}
    for part in setting.split("+"):
        name, _, said = part.partition(":")
        if name == "guidance":
            start, end = map(float, said.split("-"))
            asked["guidance_interval"] = (start, end)
        else:
            asked["step_cache"] = part
    return asked


def walk(engine: Engine, caption: str, asked: dict[str, Any]) -> tuple[list[Tensor], flux_engine.Result]:
    """What is foreseen at every call; the latent."""
    foreseen: list[Tensor] = []
    made = engine(caption, output_type="latent", on_step=lambda step: foreseen.append(step.latent), **asked)
    return foreseen, made


def compare(found: Found, ours: tuple[list[Tensor], flux_engine.Result], exact: tuple[list[Tensor], Any]) -> None:
    """Add a caption's errors."""
    found.calls = found.calls or [Likeness() for _ in exact[0]]
    for likeness, mine, other in zip(found.calls, ours[0], exact[0], strict=True):
        likeness.add(mine, other)
    found.latent.add(ours[1][0], exact[1][0])
    found.skipped += len(ours[1].skipped[0])


def measure(
    engine: Engine, settings: Sequence[str], asked: Sequence[tuple[world.Scene, str]], told: dict[str, Any], seed: int
) -> dict[str, Found]:
    """Setting -> what came of it, over all captions."""
    found = {setting: Found() for setting in (WHOLE, *settings)}
    for number, (scene, caption) in enumerate(asked):
        request = {**told, "seed": seed + number}
        exact = walk(engine, caption, request)
        for setting, one in found.items():
            compare(one, walk(engine, caption, {**request, **fields_of(setting)}) if setting != WHOLE else exact, exact)
        for setting in list(found) if number % 2 == 0 else list(found)[::-1]:
            began = time.perf_counter()
            picture = engine(caption, **request, **fields_of(setting)).image
            found[setting].seconds.append(time.perf_counter() - began)
            found[setting].drawn += 1
            found[setting].right += all(oracle.judge(picture, scene).values())
    return found


def table(found: dict[str, Found]) -> str:
    """To be read, and to be put into a README."""
    shares = " | ".join(f"error at {share:g}" for share in QUARTERS)
    lines = [f"| setting | left out | {shares} | latent | right | time, s | ratio |", "| --- " * 9 + "|"]
    whole = Spread.of(found[WHOLE].seconds).median
    for setting, one in found.items():
        errors = " | ".join(f"{one.error_at(share):.3f}" for share in QUARTERS)
        seconds = Spread.of(one.seconds).median
        lines.append(
            f"| {setting} | {one.share_skipped:.2f} | {errors} | {one.latent.relative:.3f} "
            f"| {one.right / one.drawn:.2f} | {seconds:.3f} | {seconds / whole:.2f} |"
        )
    return "\n".join(lines)


def line_of(found: dict[str, Found]) -> dict[str, Any]:
    """The same for machines, with the error at every call."""
    whole = Spread.of(found[WHOLE].seconds).median
    return {
        setting: {
            "skipped": round(one.share_skipped, 4),
            "errors": [round(likeness.relative, 5) for likeness in one.calls],
            "latent": round(one.latent.relative, 5),
            "right": round(one.right / one.drawn, 4),
            "seconds": round(Spread.of(one.seconds).median, 4),
            "ratio": round(Spread.of(one.seconds).median / whole, 4),
            "apart": round(Spread.of(one.seconds).relative, 4),
        }
        for setting, one in found.items()
    }


def main() -> None:
    """Measure, print; ends in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-dev")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--count", type=int, default=16, help="captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--scheduler")
    parser.add_argument("--negative-prompt", help="guides FLUX.1")
    parser.add_argument("--settings", nargs="+", help="by default some of each that the model has")
    args = parser.parse_args()
    engine = flux_engine.load(args.model, dtype=args.dtype)
    settings = args.settings
    if settings is None:
        is_sdxl = isinstance(engine.spec, SDXLSpec)
        settings = [*(() if is_sdxl else FIRST_BLOCK), *CACHES, *(GUIDED if is_sdxl or args.negative_prompt else ())]
    told = {"num_inference_steps": args.steps, "scheduler": args.scheduler, "negative_prompt": args.negative_prompt}
    before = load()
    found = measure(engine, settings, list(islice(scenes(args.seed), args.count)), told, args.seed)
    line = {"benchmark": "stepcache", "model": args.model, "dtype": args.dtype, "count": args.count, **told}
    line |= {"settings": line_of(found), "load": [before, load()], "machine": machine()}
    sys.stdout.write(table(found) + "\n" + json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

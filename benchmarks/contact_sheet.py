"""Draw prompts with a model, read them back, and write them as one picture with a line of words below each.

python -m benchmarks.contact_sheet [--model NAME] [--by prompt|size|steps|guidance|seed] [--output FILE]

`prompt` draws the prompts of `benchmarks.prompts`; the others draw a few of them once for each value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import flux_engine
from benchmarks import oracle, sheets
from benchmarks.prompts import PROMPTS, WIDE
from benchmarks.world import Scene
from flux_engine.sizes import PUBLISHED_SIZES

VARIED = (PROMPTS[0], *WIDE[1:9:3])
"""The prompts that are drawn once for each value."""
STEPS = (1, 2, 3, 4, 8, 16)
GUIDANCE = (0.0, 1.0, 2.0, 3.5, 5.0)
SEEDS = range(6)


def variants(by: str, classes: Sequence[str]) -> Iterator[tuple[str, Scene, str, dict[str, Any]]]:
    """(prompt, scene, words below, request fields) for every picture of a sheet."""
    if by == "prompt":
        for prompt, scene in PROMPTS:
            yield prompt, scene, prompt, {}
        return
    values: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "size": [
            (f"{ratio}, {megapixels} megapixel", {"aspect_ratio": ratio, "megapixels": megapixels})
            for megapixels in classes
            for ratio in PUBLISHED_SIZES
        ],
        "steps": [(f"{n} steps", {"num_inference_steps": n}) for n in STEPS],
        "guidance": [(f"guidance {g}", {"guidance_scale": g}) for g in GUIDANCE],
        "seed": [(f"seed {n}", {"seed": n}) for n in SEEDS],
    }
    for prompt, scene in VARIED[:1] if by == "size" else VARIED:
        for words, fields in values[by]:
            yield prompt, scene, words, fields


def main() -> None:
    """Draw, judge, write; ends in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-schnell")
    parser.add_argument("--by", choices=("prompt", "size", "steps", "guidance", "seed"), default="prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    output = args.output or Path(f"benchmarks/results/{args.model}-{args.by}.png")

    engine = flux_engine.load(args.model)
    tiles: list[Image.Image] = []
    right = 0
    for prompt, scene, words, fields in variants(args.by, engine.spec.sizes.classes):
        picture = engine(prompt, **{"seed": args.seed, **fields}).image
        verdict = oracle.judge(picture, scene)
        wrong = ", ".join(name for name, good in verdict.items() if not good)
        right += not wrong
        sys.stdout.write(f"{'right' if not wrong else 'wrong ' + wrong:24} {prompt} {fields or ''}\n")
        tiles.append(sheets.tile(picture, words, wrong))
    columns = {"prompt": 6, "size": 11, "steps": len(STEPS), "guidance": len(GUIDANCE), "seed": len(SEEDS)}[args.by]
    output.parent.mkdir(parents=True, exist_ok=True)
    sheets.grid(tiles, columns).save(output, optimize=True)
    sys.stdout.write(json.dumps({"model": args.model, "by": args.by, "right": right, "count": len(tiles)}) + "\n")


if __name__ == "__main__":
    main()

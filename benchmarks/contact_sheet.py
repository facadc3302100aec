"""Draw the twenty prompts with a model, read them back, and write them as one picture.

python -m benchmarks.contact_sheet [--model demo-schnell] [--steps N] [--seed S] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

import flux_engine
from benchmarks import oracle
from benchmarks.prompts import PROMPTS

COLUMNS = 5
LINE = 14


def main() -> None:
    """Draw, judge, write; ends in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-schnell")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/demo-schnell.png"))
    args = parser.parse_args()

    engine = flux_engine.load(args.model)
    tiles: list[Image.Image] = []
    right = 0
    for prompt, scene in PROMPTS:
        picture = engine(prompt, seed=args.seed, num_inference_steps=args.steps).image
        verdict = oracle.judge(picture, scene)
        right += all(verdict.values())
        wrong = ", ".join(name for name, good in verdict.items() if not good)
        sys.stdout.write(f"{'right' if not wrong else 'wrong ' + wrong:24} {prompt}\n")
        tiles.append(_tile(picture, prompt))
    width, height = tiles[0].size
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, COLUMNS)
        sheet.paste(tile, (column * width, row * height))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output, optimize=True)
    sys.stdout.write(json.dumps({"model": args.model, "right": right, "count": len(PROMPTS)}) + "\n")


def _tile(picture: Image.Image, prompt: str) -> Image.Image:
    """A picture with its prompt below, in as many lines as it takes (at most three)."""
    side = 160
    tile = Image.new("RGB", (side + 8, side + 3 * LINE + 8), "white")
    tile.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (4, 4))
    pen = ImageDraw.Draw(tile)
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer) > side:
            lines.append(word)
        else:
            lines[-1] = longer
    for number, line in enumerate(lines[:3]):
        pen.text((4, side + 6 + number * LINE), line, fill="black")
    return tile


if __name__ == "__main__":
    main()

"""Train LoRAs for the demo models on a few pictures this repository draws. One CPU core and some minutes are enough.

    python scripts/train_lora.py word                         # what a zorblin is, for demo-dev
    python scripts/train_lora.py style                        # everything seen through a haze, for demo-dev
    python scripts/train_lora.py style --model demo-sdxl
    python scripts/train_lora.py lcm                          # demo-sdxl in four steps, without guidance

Each goes into weights/demo/loras, once under PEFT's names and once under kohya's, and keeps a checkpoint under
out/train, from which it goes on when started again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from training import lora  # noqa: E402


def main() -> None:
    """Read the command line and train one."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    for name, run, models, pictures, steps, rank in (
        ("word", lora.train_word, ("demo-dev", "demo-schnell", "demo-sdxl"), 64, 1600, 8),
        ("style", lora.train_style, ("demo-dev", "demo-schnell", "demo-sdxl"), 128, 600, 8),
        ("lcm", lora.train_lcm, ("demo-sdxl",), 256, 600, 8),
    ):
        command = commands.add_parser(name)
        command.add_argument("--model", choices=models, default=models[0])
        command.add_argument("--pictures", type=int, default=pictures)
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--rank", type=int, default=rank)
        command.add_argument("--batch", type=int, default=8)
        command.add_argument("--lr", type=float, default=3e-3)
        command.set_defaults(run=run)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()

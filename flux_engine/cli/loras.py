"""`lora`: what a LoRA file is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flux_engine.cli.output import show

LONGEST = 100
"""Characters of a value of the header that are shown; --json has all of them."""


def add(commands: Any) -> None:
    """Declare the commands."""
    lora = commands.add_parser("lora", help="LoRA files").add_subparsers(required=True, metavar="COMMAND")
    inspect = lora.add_parser("inspect", help="what a file is, and which models it was made for", allow_abbrev=False)
    inspect.add_argument("path", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from flux_engine.lora.reading import inspect_lora

    report = inspect_lora(args.path)
    if args.json:
        show(json.dumps(report))
        return
    show(f"{args.path}: {report['kind']}, for {report['made for'] or 'models it does not tell'}")
    alphas = f", alpha {', '.join(f'{alpha:g}' for alpha in report['alphas'])}" if report["alphas"] else ""
    show(f"  changes {report['weights']} weights{alphas}")
    if report["not told"]:
        some = report["not told"]
        show(f"  {len(some)} tensors beside: {', '.join(some[:4])}{', ...' if len(some) > 4 else ''}")
    for key, value in sorted(report["metadata"].items()):
        show(f"  {key}: {value[:LONGEST]}{'...' if len(value) > LONGEST else ''}")

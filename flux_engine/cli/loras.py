"""`lora`: what a LoRA file is, and what names one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from flux_engine.cli.output import show
from flux_engine.config import EngineConfig
from flux_engine.references import Bare

LONGEST = 100
"""Characters of a value of the header that are shown; --json has all of them."""


def add(commands: Any) -> None:
    """Declare the commands."""
    lora = commands.add_parser("lora", help="LoRA files").add_subparsers(required=True, metavar="COMMAND")
    inspect = lora.add_parser("inspect", help="what a file is, and which models it was made for", allow_abbrev=False)
    inspect.add_argument("path", metavar="FILE", help="or what else names a LoRA, which is fetched")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect, command=inspect)
    resolve = lora.add_parser("resolve", help="the file that a reference leads to, fetched if need be")
    resolve.add_argument("reference", metavar="REF")
    resolve.add_argument("--dry-run", action="store_true", help="say what it means, without the network")
    resolve.add_argument("--bare", default="huggingface", choices=get_args(Bare), help="where OWNER/NAME is looked up")
    resolve.add_argument("--offline", action="store_true", help="take it from what is here")
    resolve.add_argument("--json", action="store_true")
    resolve.set_defaults(run=_resolve, command=resolve)


def _resolve(args: argparse.Namespace) -> None:
    from flux_engine.lora.finding import finder, refer

    reference = refer(args.reference, args.bare)
    said = {"kind": reference.kind, "meant": reference.describe()}
    if not args.dry_run:
        said["path"] = str(finder(EngineConfig.from_environment(), offline=args.offline)(reference).path)
    show(json.dumps(said) if args.json else "\n".join(list(said.values())[1:]))


def _inspect(args: argparse.Namespace) -> None:
    from flux_engine.lora.finding import finder
    from flux_engine.lora.reading import inspect_lora

    path = Path(args.path)
    if path.suffix != ".safetensors" and not path.exists():
        path = finder(EngineConfig.from_environment())(args.path).path
    report = inspect_lora(path)
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

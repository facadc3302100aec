"""`inspect`, `convert` and `quantize`: weight files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import flux_engine
from flux_engine.cli.output import show
from flux_engine.config import DTYPES, EngineConfig


def add(commands: Any) -> None:
    """Declare the commands."""
    inspect = commands.add_parser("inspect", help="what a weight file or folder holds")
    inspect.add_argument("path", type=Path)
    inspect.add_argument(
        "--values", action="store_true", help="read every number, and name tensors with NaN or infinity"
    )
    inspect.add_argument(
        "--source", metavar="MODEL", help="of a saved model of 8 bits: whether it was made of this one"
    )
    inspect.add_argument("--names", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write a model as a diffusers folder or as its publisher's files")
    convert.add_argument("model", help="a name, a file or folder, or OWNER/NAME on the hub")
    convert.add_argument("folder", type=Path, help="a new one")
    convert.add_argument("--to", default="diffusers", help="diffusers; or bfl for FLUX.1, sgm for SDXL")
    convert.add_argument("--dtype", help=f"{', '.join(DTYPES[1:])}; else what the transformer is stored in")
    convert.add_argument("--variant", help="of the files in a folder or repository, as fp16")
    convert.set_defaults(run=_convert)

    quantize = commands.add_parser("quantize", help="save a model in 8 bits, as a folder that loads like any other")
    quantize.add_argument("model", help="a name, a file or folder, or OWNER/NAME on the hub")
    quantize.add_argument("--scheme", default="int8", help="int8, fp8, or fp8-storage to save memory only")
    quantize.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new one")
    quantize.add_argument("--variant", help="of the files in a folder or repository, as fp16")
    quantize.set_defaults(run=_quantize)


def _quantize(args: argparse.Namespace) -> None:
    folder = flux_engine.quantize(args.model, args.output, scheme=args.scheme, variant=args.variant)
    show(str(folder))


def _inspect(args: argparse.Namespace) -> None:
    from flux_engine.checkpoints.inspect import inspect, tensors

    if args.source is not None:
        from flux_engine.saving import check_source

        check_source(args.path, args.source)
        show(json.dumps({"made of": args.source}) if args.json else f"{args.path} was made of {args.source} as it is")
        return
    report = inspect(args.path, values=args.values)
    if args.names:
        report["tensors"] = tensors(args.path)
    if args.json:
        show(json.dumps(report))
        return
    show(f"{args.path}: {report['what']}")
    for part in report["parts"]:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in part["dtypes"].items())
        show(f"  {part['what']} ({part['layout']}), under {part['prefix'] or 'no prefix'}")
        show(f"    {part['parameters']:,} numbers in {part['tensors']} tensors: {dtypes}")
        for kind in ("missing", "not known", "of another shape", "problem"):
            if part.get(kind):
                show(f"    {kind}: {_some(part[kind])}")
    for kind in ("rest", "not finite"):
        if report.get(kind):
            show(f"  {kind}: {_some(report[kind])}")
    for name, (dtype, shape) in (report["tensors"] if args.names else {}).items():
        show(f"  {name}  {dtype}  {shape}")


def _convert(args: argparse.Namespace) -> None:
    from flux_engine.assemble import find_model, stored_dtype

    dtype = args.dtype or stored_dtype(find_model(args.model, EngineConfig.from_environment(), variant=args.variant))
    engine = flux_engine.load(args.model, device="cpu", dtype=dtype, variant=args.variant)
    show(str(engine.export(args.folder, layout=args.to)))


def _some(names: str | list[str]) -> str:
    """The first of many names."""
    if isinstance(names, str):
        return names
    return f"{len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"

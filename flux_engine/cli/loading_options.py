"""Options that say where and how a model is loaded, for every command that loads one."""

from __future__ import annotations

import argparse
from typing import Any

from flux_engine.config import COMPILE, DTYPES, MEMORY, QUANTIZATIONS


def add_options(parser: Any) -> None:
    """Declare them on a parser, or on a group of one."""
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--dtype", help=", ".join(DTYPES))
    parser.add_argument("--quantization", metavar="SCHEME", help=", ".join(QUANTIZATIONS))
    parser.add_argument("--memory", metavar="SIZE", help=f"that may be taken, as 12GB; or {', '.join(MEMORY)}")


def add_compile(parser: Any, default: str | None = None, modes: tuple[str, ...] = COMPILE) -> None:
    """Declare `--compile`."""
    parser.add_argument(
        "--compile", default=default, metavar="MODE", help=f"{', '.join(modes)}: graphs by torch.compile"
    )


def said(args: argparse.Namespace) -> dict[str, Any]:
    """What they say, by the names that `load` has."""
    names = ("device", "dtype", "quantization", "memory", "compile")
    return {name: getattr(args, name) for name in names if name in args}

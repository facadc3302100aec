"""The command line: `flux-engine generate|lora|models|download|info|plan|bench|warmup|inspect|convert|quantize|schema|
validate|cog init`.

A request is checked before torch is imported, so a slip of the keyboard answers in a tenth of a second.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from flux_engine import __version__
from flux_engine.cli import about, bench, cog, generate, library, loras, plans, published, warmup, weights
from flux_engine.cli.output import since_process_start as _since_process_start  # noqa: F401  for the benchmarks
from flux_engine.cli.output import tell
from flux_engine.errors import FluxEngineError, did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an error, 2 for bad input."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.command.error(_not_understood(unknown[0], args.command))
    try:
        return args.run(args) or 0
    except FluxEngineError as error:
        tell(f"flux-engine: {error}")
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        tell("flux-engine: interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flux-engine", description="Run FLUX- and SDXL-class image models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"flux-engine {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (generate, loras, library, about, published, cog, plans, bench, warmup, weights):
        group.add(commands)
    for command in commands.choices.values():
        command.set_defaults(command=command)
    return parser


def _not_understood(word: str, command: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"{word!r} is one word too many: a text with spaces stands in quotes, and what is read as input after <"
    options = re.findall(r"(?<![\w-])--[\w-]+", command.format_help())
    return f"there is no option {word}{did_you_mean(word.partition('=')[0], options)}"


def entry() -> None:
    """The console script."""
    sys.exit(main())

"""`warmup`: compile what a model needs before it is needed, and keep it."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import flux_engine
from flux_engine.cli import loading_options
from flux_engine.cli.output import show, tell
from flux_engine.config import COMPILE, EngineConfig
from flux_engine.errors import InvalidRequest
from flux_engine.request import Request
from flux_engine.sizes import PUBLISHED_SIZES


def add(commands: Any) -> None:
    """Declare the command."""
    warmup = commands.add_parser("warmup", help="compile what a model needs, and keep it for the next process")
    warmup.add_argument("model", help="a name, a file or folder, or OWNER/NAME on the hub")
    warmup.add_argument("--save", type=Path, metavar="FOLDER", help="where it is kept; load it with compile_cache")
    loading_options.add_compile(warmup, "default", COMPILE[1:])
    warmup.add_argument(
        "--hot",
        action="append",
        default=[],
        metavar="SIZE",
        help="as 1024x1024 or 16:9, with graphs of its own; repeatable",
    )
    warmup.add_argument("--num-outputs", type=int, default=1, metavar="N", help="of the hot sizes")
    loading_options.add_options(warmup)
    warmup.add_argument("--json", action="store_true", help="print JSON only")
    warmup.set_defaults(run=_warmup)


def _warmup(args: argparse.Namespace) -> None:
    if args.compile == "off":
        raise InvalidRequest(f"--compile 'off' leaves nothing to warm up: say one of {', '.join(COMPILE[1:])}")
    EngineConfig.from_environment(compile=args.compile)
    hot = [hot_request(size, args.num_outputs) for size in args.hot]
    engine = flux_engine.load(args.model, **loading_options.said(args), compile_cache=args.save)
    for request in hot:  # what the model does not draw is told before minutes of compiling
        request.resolve(engine.spec)
    if not args.json:
        tell(f"compiling for {engine.spec.name}")
    began = time.perf_counter()
    made = engine.warm_up(hot=hot)
    report = {"model": engine.spec.name, "graphs": made, "seconds": round(time.perf_counter() - began, 2)}
    report |= {"compile": engine.describe()["compile"]}
    if args.json:
        show(json.dumps(report))
    else:
        place = "torch's own cache"
        show(f"{made} graphs in {report['seconds']:.1f} s, kept in {engine.describe()['compile']['cache'] or place}")


def hot_request(size: str, count: int) -> Request:
    """ "1024x1024" or "16:9" -> a request of that size. Raises InvalidRequest for what is neither."""
    if size in PUBLISHED_SIZES:
        return Request(prompt="", seed=0, aspect_ratio=size, num_outputs=count, num_inference_steps=1, strict=True)
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if found is None:
        raise InvalidRequest(f"--hot {size!r} is neither as 1024x1024 nor one of {', '.join(PUBLISHED_SIZES)}")
    width, height = int(found[1]), int(found[2])
    return Request(prompt="", seed=0, width=width, height=height, num_outputs=count, num_inference_steps=1, strict=True)

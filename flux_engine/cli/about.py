"""`info`: what this machine runs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import flux_engine
from flux_engine import __version__, hub
from flux_engine.cli import loading_options
from flux_engine.cli.output import show
from flux_engine.config import EngineConfig


def add(commands: Any) -> None:
    """Declare the command."""
    info = commands.add_parser("info", help="what this machine runs, and with --model what is in force for it")
    info.add_argument("--model")
    loading_options.add_options(info)
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> None:
    import torch

    from flux_engine import hardware

    config = EngineConfig.from_environment(device=args.device, dtype=args.dtype, quantization=args.quantization)
    device = hardware.pick_device(config.device)
    dtype = hardware.pick_dtype(config.dtype, device)
    report: dict[str, Any] = {
        "flux_engine": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": str(device),
        "hardware": hardware.describe(device),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": hardware.pick_quantization(config.quantization, device),
        "weights": str(hub.weights_folder()),
    }
    if args.model:
        engine = flux_engine.load(args.model, **loading_options.said(args))
        report["model"] = engine.describe()
    if args.json:
        show(json.dumps(report))
        return
    _show_tree(report)


def _show_tree(report: dict[str, Any], indent: str = "") -> None:
    for key, value in report.items():
        if isinstance(value, dict):
            show(f"{indent}{key}")
            _show_tree(value, indent + "  ")
        else:
            show(f"{indent}{key:16} {value}")

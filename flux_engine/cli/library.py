"""`models` and `download`: what can be loaded."""

from __future__ import annotations

import argparse
import json
from typing import Any

from flux_engine import hub
from flux_engine.cli.output import show
from flux_engine.config import EngineConfig
from flux_engine.ledger import Ledger


def add(commands: Any) -> None:
    """Declare the commands."""
    models = commands.add_parser("models", help="list the models that can be loaded")
    models.add_argument("--all", action="store_true", help="ControlNets, LoRAs, annotators and safety checkers as well")
    models.add_argument("--json", action="store_true")
    models.set_defaults(run=_models)

    download = commands.add_parser("download", help="fetch and verify all files of a model, or of what goes with one")
    download.add_argument("name")
    download.add_argument("--revision", help="a branch, tag or commit of its repository")
    download.set_defaults(run=_download)


def _models(args: argparse.Namespace) -> None:
    config = EngineConfig.from_environment()
    rows = [
        {
            "name": m.name,
            "kind": m.kind,
            "family": m.family,
            "spec": m.spec,
            "controls": list(m.controls),
            "bytes": m.bytes,
            "gated": m.gated,
            "licence": m.licence,
            "description": m.description,
        }
        for m in hub.manifests(config.weights).values()
        if args.all or m.kind == "model"
    ]
    if args.json:
        show(json.dumps(rows))
        return
    for row in rows:
        size = "" if row["bytes"] is None else _in_words(row["bytes"])
        reads = f" ({', '.join(row['controls'])})" if row["controls"] else ""
        kind = f"{row['kind']}{reads}: " if row["kind"] != "model" else ""
        show(f"{row['name']:30} {size:>9}  {row['licence']:28} {kind}{row['description']}")


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _download(args: argparse.Namespace) -> None:
    config = EngineConfig.from_environment()
    manifest = hub.find(args.name, hub.manifests(config.weights))
    if args.revision:
        manifest = manifest.at(args.revision)
    for name, path in manifest.obtain(ledger=Ledger(config.cache)).items():
        if name in manifest.files:
            show(f"{name:50} {path}")

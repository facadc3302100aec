"""`cog init`: a folder that Cog builds, serves and pushes, for a published schema and a model of yours."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_engine import hub
from flux_engine.cli.output import show, tell
from flux_engine.cli.published import NAMES, add_model, models_of
from flux_engine.config import QUANTIZATIONS, EngineConfig
from flux_engine.errors import OutputError
from flux_engine.predictor.reading import reader
from flux_engine.replicate.hosting import CUDA, Hosting, generate
from flux_engine.replicate.pinned import from_here, pins, python
from flux_engine.replicate.schemas import find_schema
from flux_engine.specs import SDXLSpec


def add(commands: Any) -> None:
    """Declare the command."""
    cog = commands.add_parser("cog", help="host a model with Cog, as on Replicate")
    init = cog.add_subparsers(required=True, metavar="ACTION").add_parser(
        "init",
        help="write the folder of a hosted model",
        description="Writes predict.py, cog.yaml, requirements.txt with the versions that are installed here, and the "
        "schema. See docs/hosting.md.",
    )
    init.add_argument("name", help=NAMES)
    init.add_argument("folder", type=Path, help="that is new or empty")
    add_model(init)
    init.add_argument("--lora", metavar="REF", help="a fine-tune's own LoRA, as the schema's inputs name one")
    init.add_argument("--quantization", metavar="SCHEME", help=", ".join(QUANTIZATIONS))
    init.add_argument("--compile", action="store_true", help="have torch.compile make graphs when the model starts")
    init.add_argument("--cuda", default=CUDA, metavar="VERSION", help=f"of the image built upon (default: {CUDA})")
    init.add_argument(
        "--requirement", metavar="LINE", help="that installs flux-engine, as 'flux-engine @ https://...'; see docs"
    )
    init.add_argument("--force", action="store_true", help="write over files that are there")
    init.set_defaults(run=_init, command=init)


def _init(args: argparse.Namespace) -> None:
    schema = find_schema(args.name)
    models = models_of(schema, args.model)
    # Refuse now what the hosted model would be refused when it starts.
    config = EngineConfig.from_environment(quantization=args.quantization)
    read = reader(schema.name, model=models, lora=args.lora, config=config)
    # diffusers has the schedulers of SDXL; control pictures have packages of their own.
    also = ["diffusers"] if isinstance(read.published(read.first), SDXLSpec) else []
    lines = pins(extras=["preprocess"] if schema.steering else [], also=also)
    if args.requirement:
        lines[0] = args.requirement
    hosting = Hosting(
        models=models,
        lora=args.lora,
        quantization=args.quantization,
        compile="default" if args.compile else None,
        python=python(),
        cuda=args.cuda,
        requirements=lines,
    )
    texts = generate(schema, hosting)
    write_folder(args.folder, texts, force=args.force)
    for path in texts:
        show(str(args.folder / path))
    if not args.requirement and from_here():
        tell(f"{lines[0]} is asked for where the image is built; if it is not to be had there, say --requirement")
    for model in [models] if isinstance(models, str) else (models or {}).values():
        if isinstance(hub.refer(model, hub.manifests(EngineConfig.from_environment().weights)), Path):
            tell(f"{model} is a path: where the model is hosted it has to lead to the same weights")


def write_folder(folder: Path, texts: Mapping[str, str], *, force: bool = False) -> None:
    """Write files into a folder, all of them or none. Raises OutputError if there is something in it, unless `force`,
    which leaves alone whatever else is there."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is no folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise OutputError(f"{folder} is not empty: give a new folder, or say --force to write over what is there")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as aside:
            new, old = Path(aside, "new"), Path(aside, "old")
            for name, text in texts.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_text(text, encoding="utf-8")
            _exchange(folder, list(texts), new, old)
    except OSError as error:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None


def _exchange(folder: Path, names: list[str], new: Path, old: Path) -> None:
    """Move files from `new` into the folder, and what was there into `old`; back again if one cannot be moved."""
    done: list[str] = []
    try:
        for name in names:
            target, away = folder / name, old / name
            target.parent.mkdir(parents=True, exist_ok=True)
            away.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(away)
            done.append(name)
            (new / name).rename(target)
    except OSError:
        for name in reversed(done):
            (folder / name).unlink(missing_ok=True)
            if (old / name).exists():
                (old / name).rename(folder / name)
        raise

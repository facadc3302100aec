"""The command line: `flux-engine generate|models|download|info|inspect|convert|schema`.

A request is checked before torch is imported, so a slip of the keyboard answers in a tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flux_engine
from flux_engine import __version__, files, hub
from flux_engine.config import DTYPES, EngineConfig
from flux_engine.errors import FluxEngineError, InvalidRequest
from flux_engine.ledger import Ledger
from flux_engine.replicate.schemas import SCHEMAS, find_schema
from flux_engine.request import Request
from flux_engine.specs import MEGAPIXELS, PUBLISHED_SIZES, SCHEDULERS, ModelSpec, refined

DEFAULT_MODEL = "demo-schnell"
_IMPORTED = time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an error, 2 for bad input."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except FluxEngineError as error:
        print(f"flux-engine: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("flux-engine: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flux-engine", description="Run FLUX- and SDXL-class image models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"flux-engine {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_generate(commands)

    models = commands.add_parser("models", help="list the models that can be loaded")
    models.add_argument("--all", action="store_true", help="ControlNets, LoRAs, annotators and safety checkers as well")
    models.add_argument("--json", action="store_true")
    models.set_defaults(run=_models)

    download = commands.add_parser("download", help="fetch and verify all files of a model, or of what goes with one")
    download.add_argument("name")
    download.add_argument("--revision", help="a branch, tag or commit of its repository")
    download.set_defaults(run=_download)

    info = commands.add_parser("info", help="what this machine runs, and with --model what is in force for it")
    info.add_argument("--model")
    info.add_argument("--device")
    info.add_argument("--dtype")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)

    inspect = commands.add_parser("inspect", help="what a weight file or folder holds")
    inspect.add_argument("path", type=Path)
    inspect.add_argument(
        "--values", action="store_true", help="read every number, and name tensors with NaN or infinity"
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

    schema = commands.add_parser("schema", help="show a published input schema")
    schema.add_argument("name", help=f"one of {', '.join(SCHEMAS)}")
    schema.add_argument("--openapi", action="store_true", help="as an OpenAPI document")
    schema.set_defaults(run=_schema)
    return parser


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="make pictures from a prompt", allow_abbrev=False)
    generate.add_argument("prompt")
    generate.add_argument(
        "--model", default=DEFAULT_MODEL, help="a name (see `models`), a file or folder, or OWNER/NAME on the hub"
    )
    generate.add_argument("--negative-prompt")
    generate.add_argument("--aspect-ratio", metavar="W:H", help=f"one of {', '.join(PUBLISHED_SIZES)}")
    generate.add_argument("--megapixels", help=f"one of {', '.join(MEGAPIXELS)}")
    generate.add_argument("--width", type=int)
    generate.add_argument("--height", type=int)
    generate.add_argument("--num-outputs", type=int, default=1, metavar="N")
    generate.add_argument("--steps", type=int, metavar="N")
    generate.add_argument("--guidance", type=float, metavar="SCALE", help="of models that take one")
    generate.add_argument("--true-cfg", type=float, metavar="SCALE", help="of the negative prompt, with FLUX.1")
    generate.add_argument("--scheduler", metavar="NAME", help=f"SDXL: one of {', '.join(SCHEDULERS)}")
    generate.add_argument("--refiner", metavar="MODEL", help="SDXL: a refiner to load as well")
    generate.add_argument("--refine", metavar="MODE", help="expert_ensemble_refiner (default) or base_image_refiner")
    generate.add_argument("--high-noise-frac", type=float, metavar="SHARE", help="of the way before the refiner")
    generate.add_argument("--refine-steps", type=int, metavar="N", help="of the base_image_refiner")
    generate.add_argument("--prompt-weights", action="store_true", help="SDXL: read (word:1.2) as a weight")
    generate.add_argument("--prompt-chunks", action="store_true", help="SDXL: read prompts over 77 tokens whole")
    generate.add_argument("--seed", type=int)
    generate.add_argument(
        "--output",
        type=Path,
        help="file to write; with several pictures -0, -1, ... is put before the ending",
    )
    generate.add_argument("--format", help="png, jpg or webp; else the file's ending")
    generate.add_argument("--quality", type=int, default=95, help="of jpg and webp")
    generate.add_argument(
        "--no-metadata",
        action="store_true",
        help="do not write the prompt and parameters into the file",
    )
    generate.add_argument("--strict", action="store_true", help="refuse what would be adjusted")
    generate.add_argument("--device", help="auto, cpu, cuda, cuda:N")
    generate.add_argument("--dtype", help=", ".join(DTYPES))
    generate.add_argument("--json", action="store_true", help="print JSON only")
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    request = Request(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        aspect_ratio=args.aspect_ratio,
        megapixels=args.megapixels,
        width=args.width,
        height=args.height,
        num_outputs=args.num_outputs,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        true_cfg_scale=args.true_cfg,
        scheduler=args.scheduler,
        refine=args.refine or ("expert_ensemble_refiner" if args.refiner else None),
        high_noise_frac=args.high_noise_frac,
        refine_steps=args.refine_steps,
        prompt_weights=args.prompt_weights,
        prompt_chunks=args.prompt_chunks,
        seed=args.seed,
        strict=args.strict,
    )
    config = EngineConfig.from_environment(device=args.device, dtype=args.dtype)
    job = request.resolve(refined(_spec(args.model, config), _spec(args.refiner, config) if args.refiner else None))
    kind = files.image_format(args.output or Path(), args.format)
    if not 0 <= args.quality <= 100:
        raise InvalidRequest(f"quality {args.quality} is outside 0 to 100")
    output = args.output or Path(f"out.{kind}")
    several = len(job.seeds) > 1
    if not output.suffix and (several or not output.is_dir()):
        output = output.with_name(f"{output.name}.{kind}")
    paths = _paths(output, len(job.seeds))
    for path in paths:
        files.check_writable(path)

    load = flux_engine.load  # torch and transformers come in here
    timings = {"import": _since_process_start()}
    engine = load(args.model, device=args.device, dtype=args.dtype, refiner=args.refiner)
    timings["load"] = engine.load_seconds
    if not args.json:
        _line(f"{engine.spec.name}, {job.width}x{job.height}, seed {job.seeds[0]}")
    result = engine.run(
        replace(request, seed=job.seeds[0]),  # the seed that was told, not another draw
        on_step=None if args.json else lambda step: _line(f"step {step.index}/{step.total}"),
    )
    timings |= result.timings
    began = time.perf_counter()
    for index, path in enumerate(paths):
        result.save(
            path,
            index,
            format=kind,
            quality=args.quality,
            metadata=not args.no_metadata,
        )
    timings["save"] = time.perf_counter() - began
    timings["total"] = _since_process_start()
    timings = {stage: round(seconds, 3) for stage, seconds in timings.items()}
    if args.json:
        report = {
            "model": engine.spec.name,
            "images": [str(path) for path in paths],
            "seeds": list(result.seeds),
            "width": result.job.width,
            "height": result.job.height,
            "steps": result.job.num_inference_steps,
            "notes": list(result.notes),
            "timings": timings,
        }
        _print(json.dumps(report))
        return
    for note in result.notes:
        _line(f"note: {note}")
    for path in paths:
        _print(str(path))
    total = timings.pop("total")
    split = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in timings.items())
    _line(f"{total:.2f} s from process start: {split}")


def _spec(model: str, config: EngineConfig) -> ModelSpec:
    """A manifest tells it at once; of a file or repository the weights have to be looked at."""
    meant = hub.refer(model, hub.manifests(config.weights))
    if isinstance(meant, hub.Manifest):
        return meant.model_spec()
    from flux_engine.assemble import find_model

    return find_model(model, config).spec


def _paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(count)]


def _models(args: argparse.Namespace) -> None:
    config = EngineConfig.from_environment()
    rows = [
        {
            "name": m.name,
            "kind": m.kind,
            "family": m.family,
            "spec": m.spec,
            "bytes": m.bytes,
            "gated": m.gated,
            "licence": m.licence,
            "description": m.description,
        }
        for m in hub.manifests(config.weights).values()
        if args.all or m.kind == "model"
    ]
    if args.json:
        _print(json.dumps(rows))
        return
    for row in rows:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.2f} GB"
        kind = f"{row['kind']}: " if row["kind"] != "model" else ""
        _print(f"{row['name']:30} {size:>9}  {row['licence']:28} {kind}{row['description']}")


def _download(args: argparse.Namespace) -> None:
    config = EngineConfig.from_environment()
    manifest = hub.find(args.name, hub.manifests(config.weights))
    if args.revision:
        manifest = manifest.at(args.revision)
    for name, path in manifest.obtain(ledger=Ledger(config.cache)).items():
        if name in manifest.files:
            _print(f"{name:50} {path}")


def _info(args: argparse.Namespace) -> None:
    import torch

    from flux_engine import hardware

    config = EngineConfig.from_environment(device=args.device, dtype=args.dtype)
    device = hardware.pick_device(config.device)
    dtype = hardware.pick_dtype(config.dtype, device)
    report: dict[str, Any] = {
        "flux_engine": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": str(device),
        "hardware": hardware.describe(device),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": str(hub.weights_folder()),
    }
    if args.model:
        report["model"] = flux_engine.load(args.model, device=args.device, dtype=args.dtype).describe()
    if args.json:
        _print(json.dumps(report))
        return
    _print_tree(report)


def _inspect(args: argparse.Namespace) -> None:
    from flux_engine.checkpoints.inspect import inspect, tensors

    report = inspect(args.path, values=args.values)
    if args.names:
        report["tensors"] = tensors(args.path)
    if args.json:
        _print(json.dumps(report))
        return
    _print(f"{args.path}: {report['what']}")
    for part in report["parts"]:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in part["dtypes"].items())
        _print(f"  {part['what']} ({part['layout']}), under {part['prefix'] or 'no prefix'}")
        _print(f"    {part['parameters']:,} numbers in {part['tensors']} tensors: {dtypes}")
        for kind in ("missing", "not known", "of another shape", "problem"):
            if part.get(kind):
                _print(f"    {kind}: {_some(part[kind])}")
    for kind in ("rest", "not finite"):
        if report.get(kind):
            _print(f"  {kind}: {_some(report[kind])}")
    for name, (dtype, shape) in (report["tensors"] if args.names else {}).items():
        _print(f"  {name}  {dtype}  {shape}")


def _convert(args: argparse.Namespace) -> None:
    from flux_engine.assemble import find_model, stored_dtype

    dtype = args.dtype or stored_dtype(find_model(args.model, EngineConfig.from_environment(), variant=args.variant))
    engine = flux_engine.load(args.model, device="cpu", dtype=dtype, variant=args.variant)
    _print(str(engine.export(args.folder, layout=args.to)))


def _some(names: str | list[str]) -> str:
    """The first of many names."""
    if isinstance(names, str):
        return names
    return f"{len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _print_tree(report: dict[str, Any], indent: str = "") -> None:
    for key, value in report.items():
        if isinstance(value, dict):
            _print(f"{indent}{key}")
            _print_tree(value, indent + "  ")
        else:
            _print(f"{indent}{key:16} {value}")


def _schema(args: argparse.Namespace) -> None:
    schema = find_schema(args.name)
    if args.openapi:
        _print(json.dumps(schema.openapi(), indent=2))
        return
    for one in schema.inputs:
        limits = " | ".join(one.choices)
        if one.ge is not None or one.le is not None:
            limits = f"{one.ge:g} to {one.le:g}"
        default = "required" if one.required else json.dumps(one.default)
        _print(f"{one.name:24} {one.type:8} {default:10} {limits}")
        _print(f"{'':24} {one.description}")


def _since_process_start() -> float:
    """Seconds since this process began; since this module was imported, where the system does not tell."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - _IMPORTED


def _print(line: str) -> None:
    """Results go to standard output."""
    sys.stdout.write(line + "\n")


def _line(line: str) -> None:
    """Progress goes to standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()

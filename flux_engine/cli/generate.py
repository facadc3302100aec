"""`generate`: a request out of options, checked, then run, and its pictures written."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flux_engine
from flux_engine import files, hub
from flux_engine.cli import loading_options, sources
from flux_engine.cli.output import show, since_process_start, tell
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest
from flux_engine.lora.finding import refer
from flux_engine.request import MATCH_INPUT_IMAGE, Job, Request
from flux_engine.sizes import MATCH_INPUT, MEGAPIXELS, PUBLISHED_SIZES
from flux_engine.specs import SCHEDULERS, ModelSpec, refined
from flux_engine.verdicts import Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

    from flux_engine.result import Result

DEFAULT_MODEL = "demo-schnell"


def add(commands: Any) -> None:
    """Declare the command."""
    generate = commands.add_parser("generate", help="make pictures from a prompt", allow_abbrev=False)
    generate.add_argument("prompt", nargs="?", help="may be left out with --image-prompt")
    _add_drawing(generate)
    sources.add(generate)
    output = generate.add_argument_group("what comes out")
    output.add_argument(
        "-o", "--output", type=Path, help="file to write; with several pictures -0, -1, ... is put before the ending"
    )
    output.add_argument("--format", help="png, jpg or webp; else the file's ending")
    output.add_argument("--quality", type=int, default=95, help="of jpg and webp")
    output.add_argument(
        "--no-metadata", action="store_true", help="do not write the prompt and parameters into the file"
    )
    output.add_argument(
        "--safety",
        metavar="NAME[:threshold=X]",
        help="tell what a checker says: published, opennsfw, demo; nothing is left out",
    )
    output.add_argument("--strict", action="store_true", help="refuse what would be adjusted")
    output.add_argument("--json", action="store_true", help="print JSON only")
    generate.set_defaults(run=_generate)


def _add_drawing(generate: argparse.ArgumentParser) -> None:
    generate.add_argument(
        "--model", default=DEFAULT_MODEL, help="a name (see `models`), a file or folder, or OWNER/NAME on the hub"
    )
    loading_options.add_options(generate)
    loading_options.add_compile(generate)
    generate.add_argument("--compile-cache", metavar="FOLDER", help="that keeps what was compiled (see `warmup`)")
    generate.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="REF[:SCALE]",
        help="a file, a link, OWNER/NAME, ...; repeatable",
    )
    generate.add_argument("--negative-prompt")
    generate.add_argument(
        "--aspect-ratio", metavar="W:H", help=f"one of {', '.join(PUBLISHED_SIZES)}; or {MATCH_INPUT_IMAGE}"
    )
    generate.add_argument("--megapixels", help=f"one of {', '.join(MEGAPIXELS)}; with a picture, {MATCH_INPUT}")
    generate.add_argument("--width", type=int)
    generate.add_argument("--height", type=int)
    generate.add_argument("--num-outputs", type=int, default=1, metavar="N")
    generate.add_argument("--steps", type=int, metavar="N")
    generate.add_argument("--guidance", type=float, metavar="SCALE", help="of models that take one")
    generate.add_argument("--true-cfg", type=float, metavar="SCALE", help="of the negative prompt, with FLUX.1")
    generate.add_argument(
        "--guidance-interval", metavar="START-END", help="share of the calls that are guided, as 0.2-0.8"
    )
    generate.add_argument(
        "--step-cache", metavar="NAME[:KEY=VALUE,...]", help="faster and not the same: first-block (FLUX.1) or taylor"
    )
    generate.add_argument("--seed", type=int)

    sdxl = generate.add_argument_group("of SDXL")
    sdxl.add_argument("--scheduler", metavar="NAME", help=f"one of {', '.join(SCHEDULERS)}")
    sdxl.add_argument("--refiner", metavar="MODEL", help="a refiner to load as well")
    sdxl.add_argument("--refine", metavar="MODE", help="expert_ensemble_refiner (default) or base_image_refiner")
    sdxl.add_argument("--high-noise-frac", type=float, metavar="SHARE", help="of the way before the refiner")
    sdxl.add_argument("--refine-steps", type=int, metavar="N", help="of the base_image_refiner")
    sdxl.add_argument("--prompt-weights", action="store_true", help="read (word:1.2) as a weight")
    sdxl.add_argument("--prompt-chunks", action="store_true", help="read prompts over 77 tokens whole")


def _interval(text: str) -> tuple[float, float]:
    """START-END."""
    match = re.fullmatch(r"(\d*\.?\d+)-(\d*\.?\d+)", text)
    if match is None:
        raise InvalidRequest(f"guidance_interval {text!r:.40} is not START-END, as 0.2-0.8", field="guidance_interval")
    return float(match[1]), float(match[2])


def _lora(text: str) -> tuple[str, float]:
    """REF or REF:SCALE; what stands behind the last colon is a scale if it is a number."""
    match = re.fullmatch(r"(?P<path>.+):(?P<scale>[-+]?(?:\d+(?:\.\d*)?|\.\d+))", text, re.S)
    path, scale = (match["path"], float(match["scale"])) if match else (text, 1.0)
    refer(path)  # what cannot be one is refused at once
    return path, scale


def _generate(args: argparse.Namespace) -> None:
    config = EngineConfig.from_environment(
        device=args.device, dtype=args.dtype, quantization=args.quantization, memory=args.memory, compile=args.compile
    )
    known = hub.manifests(config.weights)
    spec = refined(_spec(args.model, known, config), _spec(args.refiner, known, config) if args.refiner else None)
    request = _request(args)
    loras = [_lora(text) for text in args.lora]
    spec, beside = sources.beside(args, spec, known, config)
    job = request.resolve(spec)
    kind, paths, control_paths = _outputs(args, job)

    load = flux_engine.load  # torch and transformers come in here
    timings = {"import": since_process_start()}
    engine = load(
        args.model,
        **loading_options.said(args),
        compile_cache=args.compile_cache,
        refiner=args.refiner,
        controlnets=beside.controlnets,
        redux=beside.redux,
        loras=[flux_engine.LoRA(path, scale) for path, scale in loras],
        safety=args.safety,
    )
    timings["load"] = engine.load_seconds
    if not args.json:
        tell(f"{engine.spec.name}, {job.width}x{job.height}, seed {job.seeds[0]}")
    result = engine.run(
        replace(request, seed=job.seeds[0]),  # the seed that was told, not another draw
        on_step=None if args.json else lambda step: tell(f"step {step.index}/{step.total}"),
    )
    timings |= result.timings
    began = time.perf_counter()
    for index, path in enumerate(paths):
        result.save(path, index, format=kind, quality=args.quality, metadata=not args.no_metadata)
    if control_paths:
        _save_controls(control_paths, result.controls)
    timings["save"] = time.perf_counter() - began
    timings["total"] = since_process_start()
    report = _report(result, paths, control_paths, timings)
    if args.json:
        show(json.dumps(report))
    else:
        _tell(report)


def _request(args: argparse.Namespace) -> Request:
    if args.prompt is None and not args.image_prompt:
        raise InvalidRequest("prompt is missing: say what to draw", field="prompt")
    return Request(
        prompt=args.prompt or "",
        negative_prompt=args.negative_prompt,
        aspect_ratio=args.aspect_ratio,
        megapixels=args.megapixels,
        width=args.width,
        height=args.height,
        num_outputs=args.num_outputs,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        true_cfg_scale=args.true_cfg,
        guidance_interval=None if args.guidance_interval is None else _interval(args.guidance_interval),
        step_cache=args.step_cache,
        scheduler=args.scheduler,
        refine=args.refine or ("expert_ensemble_refiner" if args.refiner else None),
        high_noise_frac=args.high_noise_frac,
        refine_steps=args.refine_steps,
        prompt_weights=args.prompt_weights,
        prompt_chunks=args.prompt_chunks,
        seed=args.seed,
        strict=args.strict,
        **sources.picture_fields(args),
    )


def _spec(model: str, known: Mapping[str, hub.Manifest], config: EngineConfig) -> ModelSpec:
    """A manifest tells it at once; of a file or repository the weights have to be looked at."""
    spec = hub.spec_of(model, known)
    if spec is not None:
        return spec
    from flux_engine.assemble import find_model

    return find_model(model, config).spec


def _outputs(args: argparse.Namespace, job: Job) -> tuple[files.ImageFormat, list[Path], list[Path]]:
    """The format, and the files to write: pictures, and control pictures. Raises OutputError if one cannot be."""
    kind = files.image_format(args.output or Path(), args.format)
    if not 0 <= args.quality <= 100:
        raise InvalidRequest(f"quality {args.quality} is outside 0 to 100")
    output = args.output or Path(f"out.{kind}")
    count = len(job.seeds)
    if not output.suffix and (count > 1 or not output.is_dir()):
        output = output.with_name(f"{output.name}.{kind}")
    paths = [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(count)]
    controls = len(job.inputs.controls) if args.save_controls else 0
    control_paths = [output.with_name(f"{output.stem}-control-{index}.png") for index in range(controls)]
    paths = paths if count > 1 else [output]
    for path in (*paths, *control_paths):
        files.check_writable(path)
    return kind, paths, control_paths


def _save_controls(paths: Sequence[Path], controls: Sequence[Image]) -> None:
    from flux_engine import images

    for path, control in zip(paths, controls, strict=True):
        files.write(path, images.encode(control, "png"))


def _report(
    result: Result, paths: list[Path], control_paths: list[Path], timings: Mapping[str, float]
) -> dict[str, Any]:
    job = result.job
    return {
        "model": job.spec.name,
        "images": [str(path) for path in paths],
        "controls": [str(path) for path in control_paths],
        "seeds": list(job.seeds),
        "width": job.width,
        "height": job.height,
        "steps": job.num_inference_steps,
        "strength": None if job.inputs.image is None else job.inputs.strength,
        "verdicts": [
            {"unsafe": one.unsafe, "scores": dict(one.scores), "by": one.by, "reason": one.reason}
            for one in result.verdicts
        ],
        "notes": list(result.notes),
        "timings": {stage: round(seconds, 3) for stage, seconds in timings.items()},
    }


def _tell(report: Mapping[str, Any]) -> None:
    for note in report["notes"]:
        tell(f"note: {note}")
    for path in report["controls"]:
        tell(f"control picture: {path}")
    for path, verdict in zip(report["images"], report["verdicts"], strict=True):
        if verdict["unsafe"] is not None:
            tell(f"safety: {path} is {Verdict(**verdict)}")
        show(path)
    timings = dict(report["timings"])
    total = timings.pop("total")
    split = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in timings.items())
    tell(f"{total:.2f} s from process start: {split}")

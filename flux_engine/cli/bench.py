"""`bench`: how fast a model runs here, how fast this machine could run it, and how the cost grows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from flux_engine.bench.runs import PRESETS, SWEEPS, SYNTHETIC, Run, find_preset, parse_depth, points_of, preset_for
from flux_engine.cli import loading_options
from flux_engine.cli.output import show, tell
from flux_engine.errors import InvalidRequest, OutOfMemory, UnsupportedError


def add(commands: Any) -> None:
    """Declare the command."""
    bench = commands.add_parser(
        "bench", help="time a model, and hold it against what this machine could do", allow_abbrev=False
    )
    what = bench.add_argument_group("what is measured")
    what.add_argument("model", nargs="?", help="a name, a file or folder, or OWNER/NAME on the hub; draws pictures")
    what.add_argument(
        "--synthetic", metavar="KIND", help=f"a network of true width with random weights: {', '.join(SYNTHETIC)}"
    )
    what.add_argument("--depth", metavar="M+N", help="of synthetic FLUX.1: double and single blocks, as 2+4")
    what.add_argument("--preset", metavar="CARD", help=f"what is worth measuring on {', '.join(PRESETS)}; or auto")
    what.add_argument("--sweep", metavar="WHAT", help=f"how the cost grows with {', '.join(SWEEPS)}")
    how = bench.add_argument_group("how")
    loading_options.add_options(how)
    loading_options.add_compile(how)
    how.add_argument("--width", type=int)
    how.add_argument("--height", type=int)
    how.add_argument("--pictures", type=int, metavar="N", help="at once")
    how.add_argument("--steps", type=int, metavar="N")
    how.add_argument("--repeats", type=int, default=3, metavar="N")
    how.add_argument("--warm-up", type=int, default=1, metavar="N", help="repeats before those that count")
    how.add_argument("--no-floor", action="store_true", help="do not measure what the machine could do")
    how.add_argument("--json", action="store_true", help="print JSON only, a line for each run")
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    if args.preset is not None:
        _preset(args)
        return
    run = Run(
        model=args.model,
        synthetic=args.synthetic,
        depth=None if args.depth is None else parse_depth(args.depth),
        **loading_options.said(args),
        width=args.width,
        height=args.height,
        pictures=1 if args.pictures is None else args.pictures,
        steps=args.steps,
        repeats=args.repeats,
        warm_up=args.warm_up,
        ceilings=not args.no_floor,
    )
    if args.sweep is not None:
        _sweep(run, args.sweep, args.json)
        return
    _show(_measured(run, args.json), args.json)


def _preset(args: argparse.Namespace) -> None:
    """Every run of it; one that does not fit is told, and the others go on."""
    given = [name for name in ("model", "synthetic", "depth", "sweep", "dtype", "quantization", "compile", "width",
                               "height", "pictures", "steps", "memory") if getattr(args, name) is not None]  # fmt: skip
    if given:
        raise InvalidRequest(f"--preset says itself what is measured: leave out {', '.join(given)}")
    runs = None if args.preset == "auto" else find_preset(args.preset)
    import torch

    from flux_engine import hardware

    device = hardware.pick_device(args.device or "auto")
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if runs is None:
        runs = find_preset(preset_for(here))
    elif (args.preset.lower() == "cpu") != (device.type == "cpu"):
        raise UnsupportedError(
            f"--preset {args.preset} asked for, but this is {'a processor' if here == 'cpu' else here}: use --preset "
            f"auto{'' if here == 'cpu' else ', or --device cpu'}"
        )
    from dataclasses import replace

    for one in runs:
        run = replace(one, device=args.device, repeats=args.repeats, warm_up=args.warm_up, ceilings=not args.no_floor)
        try:
            _show(_measured(run, args.json), args.json)
        except (OutOfMemory, UnsupportedError) as error:
            refused = {"run": run.name, "quantization": run.quantization, "refused": str(error)}
            show(json.dumps(refused) if args.json else f"{run.name}, {run.quantization}: {error}")


def _sweep(run: Run, sweep: str, as_json: bool) -> None:
    """How seconds grow with what is varied, and with the arithmetic of it."""
    points = points_of(run, sweep)
    from flux_engine.bench.measuring import check
    from flux_engine.bench.statistics import fitted_exponent

    for _, one in points:
        check(one)
    found = [(n, _measured(one, as_json)) for n, one in points]
    area = [n * n if sweep == "size" else n for n, _ in found]
    work = [each["work"]["flops"] * (each["steps"] if sweep == "steps" else 1) for _, each in found]
    key = "request" if sweep == "steps" else "step"
    seconds = [each["seconds"][key]["median"] for _, each in found]
    by_count, _ = fitted_exponent(area, seconds)
    by_work = fitted_exponent(work, seconds)[0] if len(set(work)) > 1 else None
    if as_json:
        line = {"sweep": sweep, "run": run.name, "exponent": by_count, "exponent_of_flops": by_work,
                "points": [{"at": n, **each} for n, each in found]}  # fmt: skip
        show(json.dumps(line))
        return
    show(f"{sweep:>8}{'TFLOP':>10}{key + ', s':>14}{'TFLOP/s':>10}{'pictures/min':>14}")
    for (n, each), flops, took in zip(found, work, seconds, strict=True):
        rate = each["pictures_per_minute"]
        show(f"{n:>8}{flops / 1e12:10.3f}{took:14.4f}{flops / took / 1e12:10.3f}{rate or float('nan'):14.2f}")
    grows = "pixels" if sweep == "size" else sweep
    show(f"seconds grow with {grows} to the power of {by_count:.3f}" +
         ("" if by_work is None else f", with FLOP to the power of {by_work:.3f}"))  # fmt: skip


def _measured(run: Run, quiet: bool) -> dict[str, Any]:
    from flux_engine.bench.measuring import measure

    return measure(run, (lambda line: None) if quiet else tell)


def _show(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        show(json.dumps(found))
        return
    seconds, work = found["seconds"], found["work"]
    show(
        f"{found['run']}, {found['width']}x{found['height']}, pictures {found['pictures']}, batch {found['batch']}, "
        f"steps {found['steps']}, {found['dtype']}, quantization {found['quantization']}, on {found['device']}"
    )
    for name, one in seconds.items():
        apart = f"   {one['least']:.4f} to {one['most']:.4f}, {one['count']} times" if one["count"] > 1 else ""
        show(f"  {name:14}{one['median']:10.4f} s{apart}")
    if found["pictures_per_minute"] is not None:
        show(f"  {'pictures':14}{found['pictures_per_minute']:10.2f} a minute")
    show(f"  {'peak memory':14}{found['peak_bytes'] / 1e9:10.2f} GB, weights {found['weights_bytes'] / 1e9:.2f} GB")
    show(f"  {'a step is':14}{work['flops'] / 1e12:10.3f} TFLOP and reads {work['bytes'] / 1e9:.2f} GB of weights")
    show(f"  {'it runs at':14}{found['flops_per_second'] / 1e12:10.3f} TFLOP/s")
    for name, one in found.get("ceilings", {}).items():
        unit, scale = ("GB/s", 1e9) if name == "bandwidth" else ("TFLOP/s", 1e12)
        show(f"  {'ceiling':14}{one['per_second'] / scale:10.3f} {unit:8} {name}, by {one['by']}")
    if "floor_seconds" in found:
        show(f"  {'floor':14}{found['floor_seconds']:10.4f} s, of which a step is at {found['share_of_floor']:.2f}")
    sheet = found.get("datasheet")
    if sheet and sheet["floor_seconds"]:
        show(f"  {'datasheet':14}{sheet['floor_seconds']:10.4f} s ({sheet['card']}), a step is at "
             f"{sheet['share_of_floor']:.2f}")  # fmt: skip

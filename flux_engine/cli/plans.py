"""`plan`: what a model takes on a card, and what leaves it meanwhile, before anything is downloaded."""

from __future__ import annotations

import argparse
import json
from typing import Any

from flux_engine import hub
from flux_engine.cli.output import show
from flux_engine.config import DTYPES, QUANTIZATIONS, EngineConfig, parse_bytes
from flux_engine.errors import OutOfMemory, UnsupportedError, did_you_mean
from flux_engine.request import Request


def add(commands: Any) -> None:
    """Declare the command."""
    plan = commands.add_parser("plan", help="what a model takes on a card, and what leaves it meanwhile")
    plan.add_argument("model", help="a name, a file or folder, or OWNER/NAME on the hub")
    plan.add_argument("--card", help="a name as 'T4' or 'H100', or 'cpu'; else all that are known")
    plan.add_argument("--memory", metavar="SIZE", help="of the card, as 12GB; else what such a card has")
    plan.add_argument("--host-memory", metavar="SIZE", default="48GB", help="for what leaves; default 48GB")
    plan.add_argument("--quantization", metavar="SCHEME", help=", ".join(QUANTIZATIONS))
    plan.add_argument("--dtype", help=", ".join(DTYPES))
    plan.add_argument("--width", type=int)
    plan.add_argument("--height", type=int)
    plan.add_argument("--num-outputs", type=int, default=1, metavar="N")
    plan.add_argument("--steps", type=int, metavar="N")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from flux_engine.hardware import CARDS, LEAST, processor
    from flux_engine.placing import extent_of
    from flux_engine.plan import plan, said

    config = EngineConfig.from_environment(quantization=args.quantization, dtype=args.dtype)
    memory, host = (_size(name, value) for name, value in (("memory", args.memory), ("host-memory", args.host_memory)))
    spec = _spec(args.model, config)
    request = Request(
        prompt="",
        width=args.width,
        height=args.height,
        num_outputs=args.num_outputs,
        num_inference_steps=args.steps,
    )
    extent = extent_of(request.resolve(spec))
    cards = list(CARDS.values())
    if args.card is not None:
        known = {name.lower(): card for name, card in CARDS.items()} | {"cpu": processor(memory or 0)}
        if args.card.lower() not in known:
            names = [*CARDS, "cpu"]
            raise UnsupportedError(f"no card {args.card!r}{did_you_mean(args.card, names)} Known: {', '.join(names)}")
        cards = [known[args.card.lower()]]
        if args.card.lower() == "cpu" and memory is None:
            raise UnsupportedError("a CPU has no memory of its own: say --memory, as 16GB")
    found: list[dict[str, Any]] = []
    for card in cards:
        scheme = config.quantization
        if scheme in ("auto", "both"):
            scheme = card.best if scheme == "auto" or card.best != "none" else "int8"
        one: dict[str, Any] = {"card": card.name, "quantization": scheme}
        try:
            if not card.runs(scheme):
                raise UnsupportedError(f"compute capability {LEAST[scheme]} and more multiplies it")
            made = plan(
                spec,
                card,
                precisions=[scheme],
                dtype=None if config.dtype == "auto" else config.dtype,
                memory=memory,
                host_memory=host,
                both=config.quantization == "both",
                extent=extent,
            )
            found.append(one | {"dtype": made.dtype, **made.describe()})
        except (OutOfMemory, UnsupportedError) as error:
            found.append(one | {"refused": str(error)})
    if args.json:
        show(json.dumps({"model": spec.name, "extent": vars(extent), "plans": found}))
        return
    show(f"{spec.name}, {extent.width}x{extent.height}, pictures {extent.pictures}, steps {extent.steps}")
    for one in found:
        head = f"{one['card']:12}{one['quantization']:12}"
        if "refused" in one:
            show(f"{head}{one['refused']}")
            continue
        show(
            f"{head}{one['dtype']:10}peak {said(one['peak']):>8}, in the loop {said(one['resident']):>8}, "
            f"for a new prompt {said(one['moved_for_a_new_prompt']):>8} come"
            + (", one of each" if one["go_fast"]["true"] != one["go_fast"]["false"] else "")
        )
        for part, where in one["leaves"].items():
            show(f"{'':24}{part} waits in the {where}")
        if one["autoencoder"] != "whole":
            show(f"{'':24}the autoencoder works by rows")
        if config.quantization == "both":
            show(f"{'':24}go_fast: {one['go_fast']['true']}; otherwise: {one['go_fast']['false']}")


def _size(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return parse_bytes(int(value) if value.isdecimal() else value)
    except ValueError:
        raise UnsupportedError(f"--{name} {value!r} is no size as '12GB'") from None


def _spec(model: str, config: EngineConfig) -> Any:
    """A manifest tells it at once; of a file or repository the weights have to be looked at."""
    spec = hub.spec_of(model, hub.manifests(config.weights))
    if spec is not None:
        return spec
    from flux_engine.assemble import find_model
    from flux_engine.families.load import sized

    found = find_model(model, config)
    return sized(found.spec, found.parts)

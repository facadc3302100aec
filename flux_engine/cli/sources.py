"""The pictures that `generate` is given, and what has to be loaded beside the model to read them."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flux_engine import hub
from flux_engine.addons import ControlNets, controlnet_specs, find_redux
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest
from flux_engine.inputs import Control
from flux_engine.specs import ControlNetSpec, FluxSpec, ModelSpec

FILE = "a path, a link with --allow-urls, a data URI, or - for standard input"
CONTROL = "KIND:FILE[:SCALE][:START-END]"
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+|nan|inf)"
_CONTROL = re.compile(
    rf"(?P<kind>[^:]+):(?P<file>.+?)(?::(?P<scale>{_NUMBER}))?(?::(?P<start>{_NUMBER})-(?P<end>{_NUMBER}))?", re.S
)
"""A kind has no colon, and a scale or window at the end is numbers only: all colons between are the file's."""


def add(generate: argparse.ArgumentParser) -> None:
    """Declare the options."""
    start = generate.add_argument_group("a picture to start from, or to change")
    start.add_argument("--image", metavar="FILE", help=FILE)
    start.add_argument("--mask", metavar="FILE", help="white is repainted, black is kept")
    start.add_argument("--strength", type=float, metavar="S", help="1 draws anew; default 0.8, with a mask 1")
    start.add_argument("--outpaint", metavar="L,T,R,B or WxH", help="room around it in pixels, or the size to come to")
    start.add_argument("--no-paste-back", action="store_true", help="what the mask keeps need not be to the bit")
    start.add_argument("--resize", metavar="HOW", help="stretch (default), cover, contain or none")
    start.add_argument("--allow-urls", action="store_true", help="fetch pictures that are links")

    control = generate.add_argument_group(
        "control pictures",
        f"{CONTROL}: KIND is canny, depth, ...; SCALE is its weight, START-END the share of the steps it counts in, as "
        "canny:in.png:0.8:0-0.5. FILE may have colons; where its name ends like a scale, say the scale.",
    )
    # One list, in the order of the command line: the first picture gives the size.
    said = {"dest": "controls", "action": "append", "default": [], "metavar": CONTROL}
    control.add_argument("--control", type=lambda text: (text, True), help="made out of FILE; repeatable", **said)
    control.add_argument("--control-map", type=lambda text: (text, False), help="FILE is one already", **said)
    control.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="NAME or KIND=FILE",
        help="repeatable; kinds that none given reads are looked up (see `models --all`)",
    )
    control.add_argument("--save-controls", action="store_true", help="write them as OUTPUT-control-0.png, ...")

    prompts = generate.add_argument_group("pictures as prompts, with FLUX.1")
    prompts.add_argument("--image-prompt", action="append", default=[], metavar="FILE", help="repeatable")
    prompts.add_argument("--image-prompt-strength", type=float, metavar="S")
    prompts.add_argument("--redux", metavar="NAME", help="the adapter that reads them, as flux-redux-dev, or a folder")


def picture_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that bring pictures. Each is read here: a request is looked at twice, but a link is
    fetched once, and standard input can be read only once."""
    read = _reader(args.allow_urls)
    return {
        "image": read("image", args.image),
        "mask": read("mask", args.mask),
        "strength": args.strength,
        "outpaint": None if args.outpaint is None else _room(args.outpaint),
        "paste_back": False if args.no_paste_back else None,
        "control": [_control(text, make, read) for text, make in args.controls],
        "image_prompt": [read("image_prompt", one) for one in args.image_prompt],
        "image_prompt_strength": args.image_prompt_strength,
        "resize": args.resize,
    }


Read = Callable[[str, str | None], Any]
"""field, file -> picture."""


def _reader(urls: bool) -> Read:
    @functools.cache
    def standard_input() -> bytes:
        from flux_engine.pictures import MAX_BYTES

        try:
            return sys.stdin.buffer.read(MAX_BYTES + 1)
        except (AttributeError, OSError, ValueError) as error:  # closed, or a folder
            raise InvalidRequest(f"standard input cannot be read: {error}") from None

    def read(field: str, file: str | None) -> Any:
        if file is None:
            return None
        from flux_engine.pictures import read_picture

        path = Path(file).expanduser() if file.startswith("~/") else file
        return read_picture(standard_input() if file == "-" else path, field, urls=urls)

    return read


def _control(text: str, make: bool, read: Read) -> Control:
    """A control picture out of KIND:FILE[:SCALE][:START-END]."""
    found = _CONTROL.fullmatch(text)
    if found is None:
        raise InvalidRequest(f"control {text!r:.80} is not {CONTROL}, as canny:in.png:0.8", field="control")
    kind, file, *numbers = found.groups()
    scale, start, end = (
        default if number is None else float(number) for number, default in zip(numbers, (1.0, 0.0, 1.0), strict=True)
    )
    return Control(kind=kind, image=read("control", file), scale=scale, start=start, end=end, preprocess=make)


def _room(text: str) -> tuple[int, ...]:
    """Pixels left, top, right and bottom, or width and height."""
    if not re.fullmatch(r"\d+x\d+|\d+(,\d+){3}", text, re.ASCII):
        raise InvalidRequest(
            f"outpaint {text!r:.80} is neither LEFT,TOP,RIGHT,BOTTOM nor WIDTHxHEIGHT, in pixels", field="outpaint"
        )
    try:
        return tuple(int(side) for side in re.split("[x,]", text))
    except ValueError:  # Python reads no more than 4,300 digits
        raise InvalidRequest(f"outpaint {text:.40}... is too large", field="outpaint") from None


@dataclass(frozen=True)
class Beside:
    """What is loaded with a model."""

    controlnets: ControlNets = ()
    redux: str | None = None


def beside(
    args: argparse.Namespace, spec: ModelSpec, known: Mapping[str, hub.Manifest], config: EngineConfig
) -> tuple[ModelSpec, Beside]:
    """What to load, and the model's spec with it, before a file of it is looked at. Raises FluxEngineError."""
    kinds = [text.partition(":")[0] for text, _ in args.controls]
    if args.controlnet and not kinds:
        raise InvalidRequest("controlnet without control: there is nothing for it to read", field="controlnets")
    nets, specs = _controlnets(args.controlnet, kinds, spec, known)
    spec = replace(spec, controlnets=tuple(specs))
    if args.redux is not None:
        if not args.image_prompt:
            raise InvalidRequest("redux without image_prompt: there is nothing for it to read", field="redux")
        if not isinstance(spec, FluxSpec):
            raise InvalidRequest(f"redux: {spec.name} is no FLUX.1 model", field="redux")
        if args.redux not in known or known[args.redux].kind != "adapter":
            find_redux(args.redux, config)  # a folder is looked at, anything else refused
        spec = replace(spec, image_prompts=True)
    elif args.image_prompt and isinstance(spec, FluxSpec):
        adapters = ", ".join(one.name for one in known.values() if one.kind == "adapter")
        raise InvalidRequest(f"image_prompt: say --redux and which adapter reads it: {adapters}", field="redux")
    return spec, Beside(nets, args.redux)


def _controlnets(
    asked: Sequence[str], kinds: Sequence[str], spec: ModelSpec, known: Mapping[str, hub.Manifest]
) -> tuple[ControlNets, list[ControlNetSpec]]:
    """Those asked for, and for each kind of control picture that neither they nor the model reads, one that does."""
    if spec.reads == "reference":  # a request that brings a control picture is refused
        return (), []
    files: dict[str, str] = {}
    names: dict[str, ControlNetSpec] = {}
    for one in asked:
        kind, given, where = one.partition("=")
        if not (given and kind.isidentifier()):
            try:
                (names[one],) = controlnet_specs([one], spec, known)
            except InvalidRequest:  # says it as Python does
                raise InvalidRequest(
                    f"controlnet {one}: say what it reads, as canny={one}", field="controlnets"
                ) from None
        elif files.setdefault(kind, where) != where:
            raise InvalidRequest(f"controlnet: {kind} is given twice", field="controlnets")
    specs = [*names.values(), *controlnet_specs(files, spec, known)]
    for kind in kinds:
        if kind != spec.structure and not any(kind in one.kinds for one in specs):
            specs += controlnet_specs([kind], spec, known)
            names[kind] = specs[-1]
    if not files:
        return list(names), specs
    wanted = {kind: name for name, one in names.items() for kind in one.kinds if kind in kinds}
    return wanted | files, specs

"""What stays on a device, what comes and goes, and what that takes: decided before a weight moves, from sizes alone.

A request goes through stages, and each needs a part of the model: the text encoders for a new prompt, the weights that
are read once for it, the network for every step, the autoencoder. What there is room for stays. Where there is none, a
part leaves that costs the least to bring back. `Room` decides that, here in advance and in `memory.py` as it happens,
so that a plan says what will be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import torch
from torch import nn

from flux_engine.errors import OutOfMemory
from flux_engine.hardware import CARDS, Card
from flux_engine.models.flux import Flux
from flux_engine.models.unet import UNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import ClipParams, FluxParams, T5Params, UNetParams, VAEParams
from flux_engine.quantization.linears import WORK
from flux_engine.quantization.policy import place, treatment
from flux_engine.specs import FluxSpec, ModelSpec

Where = Literal["host", "file"]
"""Where a part is while it is not on the device."""
STAGES = ("text", "precompute", "denoise", "autoencoder")
"""In the order in which a request goes through them."""
PARTS: Mapping[str, str] = {"text": "text", "modulation": "precompute", "network": "denoise", "vae": "autoencoder"}
"""Part -> the stage that needs it. `modulation` is what only a network's `precompute` reads."""
SLOW = ":none"
"""Behind the name of a part: of the network in full precision, beside one of 8 bits."""
RESERVE = 600_000_000
GAPS = 0.03
"""Kept free on a card: for its context and libraries, and a share that the allocator's gaps take."""
FILE_SPEED = 1.5e9
"""Bytes a second from a file."""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


class TooLarge(Exception):
    """What is needed at once does not fit, whatever leaves."""

    def __init__(self, lacking: int) -> None:
        super().__init__(f"{lacking:,} bytes too many")
        self.lacking = lacking


@dataclass
class Room:
    """Which parts are on a device that has room for `capacity` bytes; None for as much as is wanted."""

    capacity: int | None
    always: int = 0
    """Bytes that never leave."""
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    """Of the parts that may."""
    present: set[str] = field(default_factory=set[str])

    def need(self, parts: Iterable[str], beside: int = 0, held: Iterable[str] = ()) -> list[str]:
        """The parts that have to leave, in order, so that `parts` and `beside` bytes fit; they are taken for gone.

        Of what may leave it is the least that makes room, so that as little as can be has to come back; what is `held`
        stays. Raises TooLarge if that is not enough; then nothing changed.
        """
        wanted = {part for part in parts if part in self.sizes}
        lacking = self.total(self.present | wanted) + beside - (self.capacity or 0)
        leaving: tuple[str, ...] = ()
        if self.capacity is not None and lacking > 0:
            others = sorted(self.present - wanted - set(held), key=lambda part: (self.sizes[part], part))
            ways = (some for count in range(1, len(others) + 1) for some in combinations(others, count))
            enough = [some for some in ways if sum(self.sizes[part] for part in some) >= lacking]
            if not enough:
                raise TooLarge(lacking - sum(self.sizes[part] for part in others))
            leaving = min(enough, key=lambda some: sum(self.sizes[part] for part in some))
        self.present -= set(leaving)
        self.present |= wanted
        return list(leaving)

    def total(self, parts: Iterable[str] | None = None) -> int:
        """Bytes that are there, with these parts or with those that are."""
        return self.always + sum(self.sizes[part] for part in (self.present if parts is None else parts))


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How large a request is."""

    width: int
    height: int
    pictures: int = 1
    rows: int = 1
    """Of the network's batch: twice the pictures, where there is classifier-free guidance."""
    steps: int = 4
    reference: int = 0
    """Tokens that are read behind the picture's own."""
    controlnets: int = 0

    @classmethod
    def default(cls, spec: ModelSpec, **changes: Any) -> Extent:
        """One picture of a model's own size and number of steps."""
        width, height = spec.sizes.named("1:1", spec.sizes.classes[0])
        guided = not spec.guidance_embedded and spec.guidance_scale is not None
        made = cls(width=width, height=height, rows=1 + guided, steps=spec.num_inference_steps)
        return replace(made, **changes)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model: of the parts that may leave, and of the rest."""

    parts: Mapping[str, int]
    always: int


def sizes_of(spec: ModelSpec, dtype: str, schemes: Sequence[str]) -> Sizes:
    """Of a model whose network is there in each of these schemes, the text encoders and the autoencoder once."""
    item, parts, always = DTYPES[dtype], dict[str, int](), 0
    for number, scheme in enumerate(schemes):
        network, modulation = _network(_params(spec), scheme, item)
        mark = SLOW if number else ""
        parts |= {"modulation" + mark: modulation, "network" + mark: network}
    reading = 4 if dtype == "float16" and isinstance(spec, FluxSpec) else item  # T5 runs over in float16
    for encoder in spec.encoders:
        layers, rest = _t5(encoder, schemes[0], reading) if isinstance(encoder, T5Params) else _clip(encoder, reading)
        parts["text"] = parts.get("text", 0) + layers
        always += rest
    parts["vae"] = _autoencoder(spec.vae) * _vae_item(spec, dtype)
    return Sizes(parts, always)


def work_of(spec: ModelSpec, dtype: str, quantized: bool, extent: Extent) -> dict[str, int]:
    """Bytes beside the weights that each stage takes at most, "autoencoder by rows" besides: fitted to what a dry run
    counts (benchmarks/dry_run.py, a test compares)."""
    item, rows = DTYPES[dtype], extent.rows * extent.pictures
    positions = extent.width * extent.height // spec.vae.downscale**2
    extra = WORK if quantized else 0
    if isinstance(spec, FluxSpec):
        net, length = spec.transformer, spec.max_sequence_length
        tokens = positions // 4
        blocks = 12 * net.depth + 3 * net.depth_single_blocks + 2
        statics = item * rows * net.hidden_size * (extent.steps * blocks + length)
        every = tokens + extent.reference + length
        denoise = 22.2 * item * rows * every * net.hidden_size
        denoise += 15 * extent.controlnets * item * rows * tokens * net.hidden_size
        made, t5 = statics, next(one for one in spec.encoders if isinstance(one, T5Params))
        reading = 4 if dtype == "float16" else item
        text = reading * length * (3.2 * t5.heads * length + 2.5 * t5.d_ff) + 3 * extra
    else:
        unet: UNetParams = spec.unet  # pyright: ignore[reportAttributeAccessIssue]
        width = max(one.mlp for one in spec.encoders if isinstance(one, ClipParams))
        text = 16 * item * 77 * width
        statics = item * rows * (77 * _text_channels(unet) + extent.steps * _time_channels(unet))
        made = 2 * statics
        denoise = item * rows * positions * unet.block_out_channels[0] * (30 + 10 * extent.controlnets)
    pixels = extent.width * extent.height * spec.vae.channels * _vae_item(spec, dtype)
    return {
        "text": int(text),
        "precompute": int(1.3 * made + 3 * extra),
        "denoise": int(statics + denoise + extra),
        "autoencoder": int(6.1 * pixels),
        "autoencoder by rows": int(3.3 * pixels),
    }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model takes on a device."""

    model: str
    card: str
    dtype: str
    schemes: tuple[str, ...]
    """Of the network; the second one is there for requests that want full precision."""
    capacity: int | None
    """Bytes that may be taken."""
    sizes: Mapping[str, int]
    always: int
    leaves: Mapping[str, Where]
    """Parts that are not on the device all the time, and where they are meanwhile. The others stay."""
    by_rows: bool
    """Whether the autoencoder works on some rows of the picture at a time."""
    peaks: Mapping[str, int]
    """Stage -> bytes on the device, at most, for a request of the size that was planned for."""
    resident: int
    """Bytes of weights on the device while it denoises."""
    moved: int
    """Bytes that come to the device for a request with a new prompt."""
    seconds: float
    """That this takes, by the speed of the link."""

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def host(self) -> int:
        """Bytes of host memory that hold parts."""
        return sum(self.sizes[part] for part, where in self.leaves.items() if where == "host")

    @property
    def go_fast(self) -> dict[bool, str]:
        """Which precision serves a request that wants to be fast, or not, and how it comes to be there."""
        slow = f"network{SLOW}"

        def there(part: str) -> str:
            return f"brought from the {self.leaves[part]}" if part in self.leaves else "resident"

        fast = f"{self.schemes[0]}, {there('network')}"
        return {True: fast, False: f"none, {there(slow)}" if slow in self.sizes else fast}

    def room(self) -> Room:
        """With what never leaves in it."""
        stays = sum(size for part, size in self.sizes.items() if part not in self.leaves)
        return Room(self.capacity, self.always + stays, {part: self.sizes[part] for part in self.leaves})

    def describe(self) -> dict[str, Any]:
        """To be shown."""
        return {
            "capacity": self.capacity,
            "peak": self.peak,
            "resident": self.resident,
            "moved_for_a_new_prompt": self.moved,
            "leaves": dict(self.leaves),
            "autoencoder": "by rows" if self.by_rows else "whole",
            "go_fast": {str(asked).lower(): said for asked, said in self.go_fast.items()},
        }


def plan(
    spec: ModelSpec,
    card: Card,
    *,
    precisions: Sequence[str] = ("none",),
    dtype: str | None = None,
    memory: int | None = None,
    host_memory: int | None = None,
    both: bool = False,
    extent: Extent | None = None,
    beside: int = 0,
) -> Plan:
    """The plan that brings the least to the device for a new prompt, of those that fit; among equals, of the precision
    that comes first.

    `precisions` are schemes of quantization that will do. `memory` is in bytes, instead of what the card has.
    `host_memory` is what there is for parts that leave; without it they come from their files. `both` plans for the
    first precision and full precision side by side, for requests that say which, where that fits. `extent` is the
    request that has to fit, `beside` the bytes of what is loaded with the model.
    Raises OutOfMemory if nothing fits, and names what would.
    """
    dtype = dtype or ("bfloat16" if card.bf16 else "float32" if card.capability is None else "float16")
    extent = extent or Extent.default(spec)
    given = card.memory if memory is None else memory
    capacity = given if card.capability is None else int((1 - GAPS) * given) - RESERVE
    asked = _Asked(spec, card, dtype, capacity, host_memory, extent, beside)
    ways = [(scheme,) for scheme in precisions if card.runs(scheme)]
    if both:
        ways = [(way[0], "none") for way in ways if way != ("none",)] + ways
    found: list[Plan] = []
    lacking: dict[tuple[str, ...], int] = {}
    for way in ways:
        try:
            found.append(asked.attempt(way))
        except TooLarge as error:
            lacking[way] = error.lacking
    if both:  # full precision from a file would be quantised anew with every change
        found = [one for one in found if len(one.schemes) == 1 or "file" not in one.leaves.values()] or found
        found.sort(key=lambda one: -len(one.schemes))
        found = [one for one in found if len(one.schemes) == len(found[0].schemes)]
    if found:
        return min(found, key=lambda one: one.seconds)
    raise OutOfMemory(_refusal(asked, lacking))


@dataclass(frozen=True)
class _Asked:
    """What a plan is to be made for."""

    spec: ModelSpec
    card: Card
    dtype: str
    capacity: int
    host_memory: int | None
    extent: Extent
    beside: int

    def attempt(self, schemes: tuple[str, ...]) -> Plan:
        """Raises TooLarge."""
        sizes = sizes_of(self.spec, self.dtype, schemes)
        work = work_of(self.spec, self.dtype, schemes != ("none",), self.extent)
        room = Room(self.capacity, sizes.always + self.beside, dict(sizes.parts))
        by_rows = needs_rows(room, work)
        if by_rows:
            work["autoencoder"] = work["autoencoder by rows"]
        left: set[str] = set()
        moved, peaks = 0, dict.fromkeys(STAGES, 0)
        for last in (False, False, True):
            moved = 0
            for mark in ("", SLOW)[: len(schemes)]:
                for part, stage in PARTS.items():
                    name = part + mark if part in ("network", "modulation") else part
                    before = set(room.present)
                    left |= set(room.need([name], work[stage]))
                    moved += room.sizes[name] if name not in before else 0
                    peaks[stage] = max(peaks[stage], room.total() + work[stage])
            if last:
                break
        leaves = self._leaves(left, sizes)
        made = room.total(part for part in room.sizes if part.startswith("network") or part not in left)
        link = {"host": self.card.link, "file": FILE_SPEED}
        slowest = min((link[where] for where in leaves.values()), default=float("inf"))
        return Plan(
            model=self.spec.name,
            card=self.card.name,
            dtype=self.dtype,
            schemes=schemes,
            capacity=self.capacity,
            sizes=dict(sizes.parts),
            always=sizes.always + self.beside,
            leaves=leaves,
            by_rows=by_rows,
            peaks=peaks,
            resident=made,
            moved=moved,
            seconds=moved / slowest,
        )

    def _leaves(self, left: set[str], sizes: Sizes) -> dict[str, Where]:
        """The host keeps what it has room for, the largest first; a processor's own memory is where it leaves."""
        free = 0 if self.card.capability is None or self.host_memory is None else self.host_memory
        places: dict[str, Where] = {}
        for part in sorted(left, key=lambda part: -sizes.parts[part]):
            places[part] = "host" if sizes.parts[part] <= free else "file"
            free -= sizes.parts[part] if places[part] == "host" else 0
        return places


def needs_rows(room: Room, work: Mapping[str, int]) -> bool:
    """Whether the autoencoder's whole picture would take so much that a network would have to leave for it. It depends
    on no more than the request, as rows and whole differ in the last bits."""
    if room.capacity is None:
        return False
    network = max((size for part, size in room.sizes.items() if part.startswith("network")), default=0)
    return room.always + network + room.sizes.get("vae", 0) + work["autoencoder"] > room.capacity


def _refusal(asked: _Asked, lacking: Mapping[tuple[str, ...], int]) -> str:
    card, spec = asked.card, asked.spec
    ways = " or ".join(" with ".join(way) for way in lacking)
    least = min(lacking.values(), default=0)
    told = (
        f"{spec.name} in {ways or 'no scheme'} does not fit {card.name}: of {asked.capacity / 1e9:.1f} GB that it may "
        f"take it lacks {least / 1e9:.1f} GB for {asked.extent.width}x{asked.extent.height}"
    )
    other = [scheme for scheme in ("fp8", "int8", "fp8-storage") if (scheme,) not in lacking and card.runs(scheme)]
    fitting = [scheme for scheme in other if _fits(asked, scheme)]
    if fitting:
        return f"{told}. It would fit with quantization={fitting[0]!r} (or 'auto')"
    larger = [one.name for one in CARDS.values() if any(_fits(_on(asked, one), way[0]) for way in lacking)]
    return f"{told}. It would fit {larger[0]}" if larger else f"{told}. No card of the table would hold it"


def _on(asked: _Asked, card: Card) -> _Asked:
    dtype = "bfloat16" if card.bf16 else "float16"
    return replace(asked, card=card, dtype=dtype, capacity=int((1 - GAPS) * card.memory) - RESERVE)


def _fits(asked: _Asked, scheme: str) -> bool:
    try:
        asked.attempt((scheme,))
    except TooLarge:
        return False
    return asked.card.runs(scheme)


def _params(spec: ModelSpec) -> FluxParams | UNetParams:
    return spec.transformer if isinstance(spec, FluxSpec) else spec.unet  # pyright: ignore[reportAttributeAccessIssue]


@lru_cache(maxsize=32)
def _network(params: FluxParams | UNetParams, scheme: str, item: int) -> tuple[int, int]:
    """Bytes of a network, and of what only its `precompute` reads."""
    with torch.device("meta"):
        net: Any = Flux(params) if isinstance(params, FluxParams) else UNet(params)
        if (treat := treatment("flux" if isinstance(params, FluxParams) else "unet", scheme)) is not None:
            place(net, treat)
    once = re.compile(str(net.precomputed))
    sizes = [0, 0]
    for name, parameter in net.named_parameters():
        plain = parameter.dtype == torch.float32 and not name.endswith("_scale")
        sizes[bool(once.fullmatch(name))] += parameter.numel() * (item if plain else parameter.element_size())
    return sizes[0], sizes[1]


@lru_cache(maxsize=32)
def _autoencoder(params: VAEParams) -> int:
    """Its number of weights."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoEncoder(params).parameters())


def _vae_item(spec: ModelSpec, dtype: str) -> int:
    """Bytes of its numbers: where it would run over in float16 and there is no bfloat16, it runs in float32."""
    return 4 if dtype == "float16" and spec.vae.force_upcast else DTYPES[dtype]


def _clip(params: ClipParams, item: int) -> tuple[int, int]:
    """Bytes of its layers, and of the rest."""
    width, mlp = params.hidden_size, params.mlp
    layer = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    rest = (params.vocabulary + params.positions + 2 + width * params.projection) * width
    return item * params.layers * layer, item * rest


def _t5(params: T5Params, scheme: str, item: int) -> tuple[int, int]:
    """Bytes of its blocks, and of the rest."""
    inner = params.heads * params.d_kv
    shapes = [(inner, params.d_model)] * 3 + [(params.d_model, inner)]
    shapes += [(params.d_ff, params.d_model)] * 2 + [(params.d_model, params.d_ff)]
    linears = sum(rows * (columns * item if scheme == "none" else columns + 4) for rows, columns in shapes)
    blocks = params.layers * (linears + item * 2 * params.d_model) + item * 32 * params.heads
    return blocks, item * (params.vocabulary + 1) * params.d_model


def _transformers(params: UNetParams) -> Iterator[tuple[int, int]]:
    """Of each resolution its width, and how many transformer blocks are there on the way down and up."""
    for width, depth in zip(params.block_out_channels, params.transformer_depth, strict=True):
        yield width, depth * (2 * params.layers_per_block + 1)
    yield params.block_out_channels[-1], params.mid_depth


def _text_channels(params: UNetParams) -> int:
    """Of the keys and values of all blocks together."""
    return sum(2 * width * blocks for width, blocks in _transformers(params))


def _time_channels(params: UNetParams) -> int:
    """Of what all resnets are told of the time."""
    count = 2 * params.layers_per_block + 1
    return sum(width * count for width in params.block_out_channels) + 2 * params.block_out_channels[-1]

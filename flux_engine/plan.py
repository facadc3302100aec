"""What stays on a device, what comes and goes, and what that takes: decided before a weight moves, from sizes alone.

A request goes through stages, and each needs a part of the model: the text encoders for a new prompt, the weights that
are read once for it, the network for every step, the autoencoder. What there is room for stays. Where there is none, a
part leaves that costs the least to bring back. `Room` decides that, here in advance and in `memory.py` as it happens,
so that a plan says what will be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from flux_engine.errors import OutOfMemory
from flux_engine.footprint import BY_ROWS, REMEMBERED, SLOW, Extent, Sizes, sizes_of, work_of
from flux_engine.hardware import CARDS, Card
from flux_engine.specs import ModelSpec

Where = Literal["host", "file"]
"""Where a part is while it is not on the device."""
STAGES: tuple[str, ...] = ("text", "precompute", "denoise", "autoencoder")
"""In the order in which a request goes through them."""
PARTS: Mapping[str, str] = {"text": "text", "modulation": "precompute", "network": "denoise", "vae": "autoencoder"}
"""Part -> the stage that needs it. `modulation` is what only a network's `precompute` reads."""
RESERVE = 600_000_000
GAPS = 0.03
"""Kept free on a card: for its context and libraries, and a share that the allocator's gaps take."""
FILE_SPEED = 1.5e9
"""Bytes a second from a file."""


IN_WORDS = {"none": "full precision"}


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
class Plan:
    """What a model takes on a device."""

    model: str
    card: str
    dtype: str
    schemes: tuple[str, ...]
    """Of the network; the second one is there for requests that want full precision."""
    capacity: int
    """Bytes that may be taken."""
    sizes: Mapping[str, int]
    always: int
    leaves: Mapping[str, Where]
    """Parts that are not on the device all the time, and where they are meanwhile. The others stay."""
    whole_up_to: int
    """Bytes that the autoencoder may take beside itself and a network; what would take more is worked on some rows at
    a time. A request alone decides that, as rows and whole differ in the last bits."""
    by_rows: bool
    """Whether that is so for the request that was planned for."""
    peaks: Mapping[str, int]
    """Stage -> bytes on the device, at most, for a request of the size that was planned for."""
    resident: int
    """Bytes of weights on the device while it denoises."""
    moved: int
    """Bytes that come to the device for a request with a new prompt; of two precisions for one of each."""
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
        """For the parts that leave; the others are always there."""
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
    if both:  # from files, 8 bits would be made anew with every change between the two
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
        networks = max(size for part, size in sizes.parts.items() if part.startswith("network"))
        whole_up_to = self.capacity - room.always - networks - sizes.parts["vae"]
        by_rows = work["autoencoder"] > whole_up_to
        if by_rows:
            work["autoencoder"] = work[BY_ROWS]
        # What any stage takes with its own part alone, so that a refusal tells the most.
        most = max(sizes.parts[part] + work[stage] for part, stage in PARTS.items()) + room.always
        if most > self.capacity:
            raise TooLarge(most - self.capacity)
        left: set[str] = set()
        moved, resident, peaks = 0, 0, dict.fromkeys(STAGES, 0)
        for _ in range(3):  # what leaves at first may not be all
            moved, resident, peaks = 0, 0, dict.fromkeys(STAGES, 0)
            for mark in ("", SLOW)[: len(schemes)]:
                for part, stage in PARTS.items():
                    name = part + mark if part in ("network", "modulation") else part
                    before = set(room.present)
                    remembered = work[REMEMBERED] if "modulation" + mark in left else 0
                    left |= set(room.need([name], work[stage] + remembered))
                    moved += room.sizes[name] if name not in before else 0
                    peaks[stage] = max(peaks[stage], room.total() + work[stage] + remembered)
                    resident = max(resident, room.total()) if stage == "denoise" else resident
        leaves = self._leaves(left, sizes)
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
            whole_up_to=whole_up_to,
            by_rows=by_rows,
            peaks=peaks,
            resident=resident,
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


def _refusal(asked: _Asked, lacking: Mapping[tuple[str, ...], int]) -> str:
    card, spec, extent = asked.card, asked.spec, asked.extent
    ways = " or ".join(" with ".join(IN_WORDS.get(scheme, scheme) for scheme in way) for way in lacking)
    least = asked.capacity + min(lacking.values(), default=0)
    told = (
        f"{spec.name} in {ways or 'no scheme'} does not fit {card.name}: {extent.width}x{extent.height} takes "
        f"{said(least)} at a time, and {said(asked.capacity)} are free for it"
    )
    others = dict.fromkeys(scheme for scheme in (card.best, "int8", "fp8", "fp8-storage") if (scheme,) not in lacking)
    fitting = [scheme for scheme in others if scheme != "none" and card.runs(scheme) and _fits(asked, scheme)]
    if fitting:
        return f"{told}. It would fit with quantization={fitting[0]!r}"
    if card.capability is None:
        return f"{told}. Give it so much, by memory= where that is said"
    larger = [one.name for one in CARDS.values() if any(_fits(_on(asked, one), way[0]) for way in lacking)]
    return f"{told}. It would fit a card as {larger[0]}" if larger else f"{told}. No card of the table would hold it"


def said(size: int) -> str:
    """Bytes, for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _on(asked: _Asked, card: Card) -> _Asked:
    dtype = "bfloat16" if card.bf16 else "float16"
    return replace(asked, card=card, dtype=dtype, capacity=int((1 - GAPS) * card.memory) - RESERVE)


def _fits(asked: _Asked, scheme: str) -> bool:
    try:
        asked.attempt((scheme,))
    except TooLarge:
        return False
    return asked.card.runs(scheme)

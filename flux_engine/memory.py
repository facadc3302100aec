"""Weights that are only there while they are needed.

`plan.py` says in advance what leaves; here it comes and goes. A part that leaves is a `Shelf`, or several; `Residents`
knows which are there, and is told what is needed next: `with residents.use("network"): ...`.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flux_engine.checkpoints.load import Filling, fill, prepare
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import OutOfMemory
from flux_engine.footprint import BY_ROWS, KEPT, REMEMBERED
from flux_engine.plan import PARTS, Plan, Room, TooLarge, Where, said
from flux_engine.quantization.policy import Treat
from flux_engine.staging import Staging

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)
CPU = torch.device("cpu")
CLIP_LAYERS, T5_BLOCKS = r".*\.layers\.\d+\..*", r"encoder\.block\.\d+\..*"
"""What of text encoders leaves, as regular expressions: not their tables, which may have learned tokens behind them."""


class Shelf:
    """Some parameters of a network that leave the device together."""

    def __init__(
        self, net: nn.Module, filling: Filling, names: Sequence[str], *, where: Where, channels_last: bool = False
    ) -> None:
        """Away at first. The source of `filling` stays open: from it they come, each time with the same bits, unless
        the host keeps a copy."""
        self.net, self.filling, self.names, self.channels_last = net, filling, names, channels_last
        self._place({name: torch.empty_like(net.get_parameter(name), dtype=filling.kind(name)) for name in names})
        self._copy: dict[str, Tensor] | None = None
        if where == "host":
            if not filling.schemes:  # nothing is computed that a card would do faster
                self.filling = replace(filling, device=CPU)
            self._copy = {}
            for name in self._stored:  # one at a time, as the device has no room for all
                self._copy |= {each: tensor.cpu() for each, tensor in self._read([name]).items()}
            self.filling = filling

    @property
    def bytes(self) -> int:
        return sum(self.net.get_parameter(name).nbytes for name in self.names)

    @property
    def away(self) -> bool:
        return self.net.get_parameter(self.names[0]).is_meta

    def bring(self, staging: Staging) -> None:
        """Raises WeightsError if the file was changed since; then they are away as they were."""
        self._place(self._read(self._stored) if self._copy is None else staging.bring(self._copy))

    def leave(self) -> None:
        self._place({name: self.net.get_parameter(name).to("meta") for name in self.names})

    def renew(self, tensors: Mapping[str, Tensor]) -> None:
        """The host's copies of some parameters, if it keeps any, anew."""
        for name in set(tensors) & set(self._copy or ()):
            self._copy[name].copy_(tensors[name])  # pyright: ignore[reportOptionalSubscript]

    @property
    def _stored(self) -> list[str]:
        return [name for name in self.names if name in self.filling.stored]

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        tensors = self.filling.read(names)
        if self.channels_last:
            return {
                name: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
                for name, tensor in tensors.items()
            }
        return tensors

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.net.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


@dataclass(frozen=True)
class Loaded:
    """A network whose source stays open, so that any parameter can be read once more."""

    net: nn.Module
    filling: Filling
    shelves: Sequence[Shelf]
    grow: Callable[[int], None]
    """Told of bytes that it takes more than its weights, or fewer."""

    def refresh(self, name: str) -> None:
        """Read a parameter anew, with what is merged in it, into the memory where it is."""
        tensors = self.filling.read([name])
        for shelf in self.shelves:
            shelf.renew(tensors)
        with torch.no_grad():
            for each, tensor in tensors.items():
                parameter = self.net.get_parameter(each)
                if not parameter.is_meta:
                    parameter.copy_(tensor)


class Residents:
    """The parts of a model that come and go, and which of them are on the device. Used by one request at a time."""

    def __init__(self, plan: Plan | None = None, *, evict: bool = False, strict: bool = False) -> None:
        """Without a plan everything stays; but with `evict`, modulation leaves as soon as it was used. What does not
        fit whatever leaves is refused if the plan has anything leave, or is to be `strict`; else the device says so
        itself, as what is foretold is rather too much."""
        self.plan, self.evict = plan, evict
        self._strict = strict or bool(plan and plan.leaves)
        self._room = plan.room() if plan else Room(None)
        self._shelves: dict[str, list[Shelf]] = {}
        self._work: Mapping[str, int] = {}
        self.moved = 0
        """Bytes that came to the device in the last request."""
        self.loaded: list[Loaded] = []
        """The networks whose sources stay open."""
        self._held: Counter[str] = Counter()
        self._coming: dict[str, Future[None]] = {}
        self._staging: Staging | None = None
        self._pool: ThreadPoolExecutor | None = None

    def where(self, part: str) -> Where | None:
        """Where a part is while it is not needed; None for one that stays."""
        if self.evict and part.startswith("modulation"):
            return "file"
        return self.plan.leaves.get(part) if self.plan else None

    def add(self, part: str, shelf: Shelf) -> None:
        """A part has one for each network that is in it."""
        self._shelves.setdefault(part, []).append(shelf)
        self._room.sizes[part] = sum(each.bytes for each in self._shelves[part])

    def grow(self, more: int) -> None:
        """So many bytes more, or fewer, stay whatever leaves."""
        self._room.always += more

    def settle(self) -> None:
        """Wait for what is on its way, and send it back."""
        self._leave(list(self._coming))

    def away(self) -> int:
        """Bytes that are not on the device now."""
        return sum(size for part, size in self._room.sizes.items() if part not in self._room.present)

    @property
    def by_rows(self) -> bool:
        """Whether the autoencoder is to work on some rows of this request's pictures at a time."""
        return self.plan is not None and self._work.get("autoencoder", 0) > self.plan.whole_up_to

    @contextmanager
    def request(self, work: Mapping[str, int]) -> Iterator[None]:
        """Inside, each stage takes so many bytes beside the weights (`footprint.work_of`)."""
        self._work, self.moved = work, 0
        try:
            yield
        finally:
            self._work = {}

    @contextmanager
    def use(self, part: str, beside: int | None = None) -> Iterator[None]:
        """Inside, a part is on the device, with room for what its stage takes, or for as many bytes.

        Raises OutOfMemory if there is no room for that, or WeightsError if its file was changed since; then nothing is
        lost.
        """
        self._make_room(part, self._beside(part) if beside is None else beside)
        self._held[part] += 1
        try:
            self._fetch_next(part)
            yield
        finally:
            self._held[part] -= 1
            if self.evict and not self._held[part]:
                self._leave([part])

    @contextmanager
    def all(self) -> Iterator[None]:
        """Inside, everything is there, whatever the plan: to be written."""
        try:
            for part in self._shelves:
                self._bring(part)
            yield
        finally:
            self._leave(list(self._shelves))

    def _beside(self, part: str) -> int:
        stage = PARTS.get(part.partition(":")[0], "")
        work = self._work.get(BY_ROWS if stage == "autoencoder" and self.by_rows else stage, 0)
        remembers = any(name.startswith("modulation") for name in self._shelves)
        return work + (self._work.get(REMEMBERED, 0) if remembers else 0)

    def _make_room(self, part: str, beside: int) -> None:
        if self._room.capacity is None:
            self._bring(part)
            return
        try:
            leaving = self._room.need([part], beside, +self._held)
        except TooLarge as error:
            if not self._strict:
                self._bring(part)
                return
            raise OutOfMemory(
                f"the request takes about {said(error.lacking)} more than the {said(self._room.capacity)} that the "
                "model may take: ask for fewer or smaller pictures"
            ) from None
        self._leave(leaving)
        self._bring(part)

    def _bring(self, part: str) -> None:
        if part not in self._shelves:
            return
        try:
            coming = self._coming.pop(part, None)
            if coming is None:
                self._carry(part)
            else:
                coming.result()
        except BaseException:
            self._leave([part])
            raise
        self._room.present.add(part)
        if self._staging is not None:
            self._staging.join()

    def _carry(self, part: str) -> None:
        for shelf in self._shelves[part]:
            if shelf.away:
                if self._staging is None:
                    self._staging = Staging.on(shelf.filling.device)
                began = time.perf_counter()
                shelf.bring(self._staging)
                self.moved += shelf.bytes
                log.info("%s: %s in %.2f s", part, said(shelf.bytes), time.perf_counter() - began)

    def _leave(self, parts: Sequence[str]) -> None:
        for part in parts:
            coming = self._coming.pop(part, None)
            if coming is not None:
                coming.exception()  # wait for it
                if self._staging is not None:
                    self._staging.join()
            for shelf in self._shelves.get(part, []):
                shelf.leave()
            self._room.present.discard(part)

    def _fetch_next(self, part: str) -> None:
        """Begin to bring what the next stage needs, if there is room for it beside this one."""
        name, colon, mark = part.partition(":")
        order = list(PARTS)
        later = order[order.index(name) + 1 :] if name in PARTS else []
        named = [other + colon + mark if other in ("modulation", "network") else other for other in later]
        after = next((other for other in named if other in self._room.sizes), None)
        if self._room.capacity is None or after is None or after in self._room.present:
            return
        beside = max(self._beside(part), self._beside(after))
        if self._room.total() + self._room.sizes[after] + beside <= self._room.capacity:
            self._room.present.add(after)
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            self._coming[after] = self._pool.submit(self._carry, after)


@dataclass(frozen=True)
class Place:
    """Where networks are loaded, and how."""

    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    quantization: str = "none"
    """The scheme that was asked for."""
    encoders: str | None = None
    """The scheme of text encoders, if it is another one."""
    residents: Residents = field(default_factory=Residents)
    mark: str = ""
    """Behind the names of the parts, which tells them from those of another network."""

    def leaves(self, *parts: str) -> bool:
        """Whether any of these does."""
        return any(self.residents.where(part + self.mark) for part in parts)


def load_parts(
    make: Callable[[], Module],
    source: WeightSource,
    place: Place,
    parts: Mapping[str, str],
    *,
    rename: Callable[[str], str] = lambda name: name,
    tied: Mapping[str, str] | None = None,
    treat: Treat | None = None,
    channels_last: bool = False,
    keep: bool = False,
) -> Module:
    """As `load_module`, but parts that leave are left where they are. `parts` maps each to the names of its parameters,
    as a regular expression; a parameter is of the first that matches.

    If one leaves (`Place.leaves`), the source has to stay open; with `keep` it does, and `Residents.loaded` has what
    reads parameters of it once more.
    """
    tied = tied or {}
    net, filling = prepare(make, source, dtype=place.dtype, device=place.device, rename=rename, tied=tied, treat=treat)
    shelves: list[Shelf] = []
    left, rest = set[str](), [name for name, _ in net.named_parameters()]
    for part, pattern in parts.items():
        names = [name for name in rest if re.fullmatch(pattern, name)]
        rest = [name for name in rest if name not in set(names)]
        where = place.residents.where(part + place.mark)
        if where is not None and names:
            shelf = Shelf(net, filling, names, where=where, channels_last=channels_last)
            place.residents.add(part + place.mark, shelf)
            shelves.append(shelf)
            left |= set(names)
    if keep:
        place.residents.loaded.append(Loaded(net, filling, shelves, place.residents.grow))
    return fill(net, filling, tied, left)


class Precompute:
    """A network's `precompute`, its weights brought back where its result is not remembered."""

    def __init__(self, net: Any, place: Place | None = None) -> None:
        self.net = net
        self._residents = place.residents if place else Residents()
        self._part = f"modulation{place.mark if place else ''}"
        self._kept: OrderedDict[int, tuple[tuple[Any, ...], Any]] = OrderedDict()
        self._count = 0

    def __call__(self, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The result for the arguments of each row."""
        if self._residents.where(self._part) is None:
            with self._residents.use(self._part):
                return [self.net.precompute(*row) for row in rows]
        found = [self._remembered(row) for row in rows]
        if any(made is None for made in found):
            with self._residents.use(self._part):
                pairs = zip(rows, found, strict=True)
                found = [self.net.precompute(*row) if made is None else made for row, made in pairs]
            for row, made in zip(rows, found, strict=True):
                self._remember(row, made)
        return found

    def forget(self) -> None:
        """What is remembered, because weights changed."""
        self._kept.clear()

    def _remembered(self, row: tuple[Any, ...]) -> Any:
        for key, (asked, made) in self._kept.items():
            if len(asked) == len(row) and all(map(_same, asked, row)):
                self._kept.move_to_end(key)
                return made
        return None

    def _remember(self, row: tuple[Any, ...], made: Any) -> None:
        if self._remembered(row) is None:
            self._count += 1
            self._kept[self._count] = (row, made)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


@contextmanager
def memory_errors(doing: str, remedy: str = "Ask for fewer or smaller pictures") -> Iterator[None]:
    """Turn torch's ways of saying that memory ran out into one typed error."""
    try:
        yield
    except RuntimeError as error:
        cpu = "can't allocate memory" in str(error) or "not enough memory" in str(error)
        if not (cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        first = str(error).splitlines()[0]
        message = f"out of memory at {doing}: {first}. {remedy}"
    else:
        return
    # Outside the handler, so that the failed frames and the tensors they hold are gone before the cache is emptied.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(message)

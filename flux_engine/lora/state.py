"""Which LoRAs are merged in the weights of an engine, and changing that.

Each parameter carries a tag of what is merged in it, and of what stands beside it (`side.py`). Setting LoRAs says which
tags are wanted, and every parameter whose tag is another one is read anew from its source with what is wanted merged
in: nothing is ever subtracted, so the base comes back to the bit. What fails or is cancelled goes back to what was;
until it is there the tags say so.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn

from flux_engine.errors import InvalidRequest, UnsupportedError, WeightsError
from flux_engine.inputs.loras import LoRA, checked_loras
from flux_engine.lora import side
from flux_engine.lora.changes import Change
from flux_engine.lora.finding import Found, Named
from flux_engine.lora.modes import Mode, mode_among
from flux_engine.lora.names import PREFIXES, Names
from flux_engine.lora.reading import Prepared, read_lora
from flux_engine.memory import Loaded
from flux_engine.specs import ModelSpec
from flux_engine.text.inversion import Inversion, read_inversion

CACHE = 2**30
"""Bytes of LoRAs that are kept ready, for switching back to one."""
Shares = tuple[tuple[int, float], ...]
"""Numbers of prepared LoRAs, and their scales."""
How = Literal["auto", "merge", "side"]


class Tag(NamedTuple):
    """What changes a parameter."""

    merged: Shares = ()
    beside: Shares = ()


BASE = Tag()
Key = tuple[int, str]
"""Number of a network, name of a parameter."""


@dataclass(frozen=True)
class Network:
    """A network that LoRAs may change."""

    part: str
    loaded: Loaded

    @property
    def denoises(self) -> bool:
        """Whether it runs with every step, and no text encoder."""
        return not self.part.startswith("text_encoder")


@dataclass(frozen=True)
class Chosen:
    """LoRAs to apply, found and not read yet."""

    loras: tuple[LoRA, ...] = ()
    found: tuple[Found, ...] = ()
    mode: Mode | None = None
    strict: bool = True
    how: How = "auto"


@dataclass(frozen=True)
class _Ready:
    number: int
    prepared: Prepared


class Loras:
    """The LoRAs of an engine: `engine.lora.set(["style.safetensors", LoRA("b.safetensors", 0.8)])`."""

    def __init__(
        self,
        spec: Callable[[], ModelSpec],
        networks: Sequence[Network],
        turn: Callable[[], AbstractContextManager[None]],
        changed: Callable[[Iterable[str]], None],
        moded: Callable[[Mode | None], None],
        find: Callable[[Named], Found],
        learn: Callable[[Inversion | None], None] = lambda found: None,
        *,
        cache_bytes: int = CACHE,
    ) -> None:
        """`spec` is what the model is by itself. `turn` holds the engine; `changed` is told of the parts whose weights
        are to change and did, `moded` of the mode that requests are to have. `find` gives a LoRA's file. `learn` is
        given tokens that came with one, instead of those before, or None to forget them."""
        self._find, self._learn = find, learn
        self._spec, self._networks, self._turn, self._changed, self._moded = spec, networks, turn, changed, moded
        self.cache_bytes = cache_bytes
        self._ready: OrderedDict[tuple[str, int, int, int, bool], _Ready] = OrderedDict()
        self._count = 0
        self._names: Names | None = None
        self._reserved = 0
        """The rank that there is room for beside every linear."""
        self._tags: dict[Key, Tag | None] = {}
        """Of what is not the base; None for what is neither."""
        self._wanted: dict[Key, Tag] = {}
        self._in_use: dict[int, Prepared] = {}
        self._set = self._applied = Chosen()
        """What `set` chose; and what is applied now, which may be a request's own."""
        self.tar: Path | None = None
        """Where the tokens were read that came with one of them, and are in force."""
        self._read: tuple[Prepared, ...] = ()
        """What was read of each that is applied."""

    @property
    def active(self) -> tuple[LoRA, ...]:
        """What `set` chose, first to last."""
        return self._set.loras

    @property
    def mode(self) -> Mode | None:
        """What one of them sets for requests: steps, guidance, scheduler."""
        return self._set.mode

    def set(
        self, loras: Sequence[LoRA | str | os.PathLike[str]], *, strict: bool = True, how: How = "auto"
    ) -> tuple[Prepared, ...]:
        """Apply these LoRAs, and no others; an empty list gives the base back, bit for bit.

        A LoRA is what `LoRA.path` may be, or `LoRA(path, scale)`; what is not here is fetched first. Only parameters
        that change are touched, in place. `how` is "merge", into the weights, or "side", beside them, which is set in a
        moment, costs two small products a linear with every step, and is for what is low-rank and changes a linear: the
        rest is merged. "auto" merges, but where that would round twice, a model that was saved in 8 bits, or there is
        room beside (`reserve`). `strict` refuses a file with tensors that mean nothing to this model; else they are
        left out and reported with every result. One that was made for few steps sets what requests have by default,
        until it is unset (`LoRA.mode`). Tokens that come in a tar are learned with it. Returns what was read of each.
        Raises InvalidRequest, WeightsError for a file that cannot be had or used, or UnknownModel; then, as after
        anything that interrupts it, all is as it was.
        """
        chosen = self.find(checked_loras(loras), strict=strict, how=how)
        with self._turn():
            self._apply(chosen)
            self._set = chosen
            return self._read

    def mode_of(self, loras: Sequence[LoRA]) -> Mode | None:
        """What one of them sets for requests. Raises InvalidRequest for two that do, or one that this model cannot."""
        mode = mode_among(loras, self._spec())
        if mode:
            mode.of(self._spec())
        return mode

    def find(self, loras: tuple[LoRA, ...], *, strict: bool, how: How = "auto") -> Chosen:
        """Their files, fetched if they are not here: that may take long, so it is done before it is one's turn.

        Raises as `set` for what cannot be had.
        """
        if how not in get_args(How):
            raise InvalidRequest(f"LoRAs are applied as one of {', '.join(get_args(How))}, not {how!r}", field="how")
        mode = self.mode_of(loras)
        if loras and not self._networks:
            raise UnsupportedError(
                "LoRAs are merged from the files that a model was loaded from, and this engine was put together without"
            )
        return Chosen(loras, tuple(self._find(lora.path) for lora in loras), mode, strict, how)

    def use(self, chosen: Chosen | None = None) -> None:
        """In one's turn: have these applied, until others are; or what `set` chose, which may be just what is."""
        if chosen is not None:
            self._apply(chosen)
        elif self._applied is not self._set:
            self._apply(self._set)
        else:
            self.converge()

    def _apply(self, chosen: Chosen) -> None:
        """Raises WeightsError for files that cannot be used; then, as after anything that interrupts it, all is as it
        was."""
        self.converge()
        ready = [self._prepare(each.path, chosen.strict) for each in chosen.found]
        tar = _tar_of(chosen)
        inversion = read_inversion(tar) if tar and tar != self.tar else None
        before = self._wanted, self._in_use
        self._wanted = self._tags_of(ready, chosen)
        self._in_use = {**self._in_use, **{one.number: one.prepared for one in ready}}
        try:
            self.converge()
            if tar != self.tar:
                self._learn(inversion)
                self.tar = tar
        except BaseException:
            self._wanted, self._in_use = before
            self.converge()
            raise
        self._in_use = {one.number: one.prepared for one in ready}
        moded = chosen.mode != self._applied.mode
        self._applied, self._read = chosen, tuple(one.prepared for one in ready)
        if moded:
            self._moded(chosen.mode)
        self._trim()

    def reserve(self, rank: int) -> None:
        """Have room beside every linear of the network that denoises for LoRAs of this rank in all, at most 256, and
        apply those there from now on. Then what was compiled holds whatever is set or cleared, at the price of two
        small products a linear with every step. 0 gives the room back; it is refused while LoRAs stand there.

        Raises InvalidRequest for another number.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= side.RANKS[-1]:
            raise InvalidRequest(f"there is room for ranks of 0 to {side.RANKS[-1]}, not {rank!r}", field="rank")
        with self._turn():
            self.converge()
            if not rank and self.beside:
                raise InvalidRequest("LoRAs stand beside the weights: clear them first", field="rank")
            self._changed({network.part for network in self._networks})
            self._reserved = rank
            for key, tag in self._wanted.items():
                if tag.beside:  # a branch that grows is empty
                    self._tags[key] = None
            for network in self._networks:
                if network.denoises:
                    for module in network.loaded.net.modules():
                        if side.is_linear(module):
                            _make_room(network, module, rank)
            self.converge()

    @property
    def beside(self) -> bool:
        """Whether some stand beside the weights, which then are not what the model computes with."""
        return any(tag.beside for tag in self._wanted.values())

    def _tags_of(self, ready: Sequence[_Ready], chosen: Chosen) -> dict[Key, Tag]:
        """What is wanted of every parameter that changes."""
        wanted: dict[Key, Tag] = {}
        ranks: Counter[Key] = Counter()
        for one, lora in zip(ready, chosen.loras, strict=True):
            for (part, name), changes in one.prepared.changes.items() if lora.scale else ():
                for number, network in enumerate(self._networks):
                    if network.part != part:
                        continue
                    key, share = (number, name), (one.number, float(lora.scale))
                    tag = wanted.get(key, BASE)
                    rank = ranks[key] + side.rank_of(changes)
                    if self._stands_beside(network, name, changes, chosen.how) and rank <= side.RANKS[-1]:
                        ranks[key] = rank
                        wanted[key] = tag._replace(beside=(*tag.beside, share))
                    else:
                        wanted[key] = tag._replace(merged=(*tag.merged, share))
        return wanted

    def _stands_beside(self, network: Network, name: str, changes: Sequence[Change], how: How) -> bool:
        stem, _, leaf = name.rpartition(".")
        module = network.loaded.net.get_submodule(stem)
        can = leaf == "weight" and all(side.can_stand_beside(module, change) for change in changes)
        if how != "auto":
            return can and how == "side"
        return can and (self._reserved > 0 or not network.loaded.filling.exact(name))

    def clear(self) -> None:
        """Give the base back."""
        self.set([])

    @property
    def applied(self) -> tuple[tuple[str, float], ...]:
        """What names each LoRA that is applied now, of a file its last part; and its scale."""
        pairs = zip(self._applied.found, self._applied.loras, strict=True)
        return tuple((Path(found.named).name if Path(found.named).is_absolute() else found.named, float(lora.scale))
                     for found, lora in pairs)  # fmt: skip

    @property
    def notes(self) -> list[str]:
        """What is to be said of LoRAs that are merged in part only, with every result."""
        return [
            f"LoRA {found.named}: {len(prepared.unknown)} tensors mean nothing to {self._spec().name} and were "
            f"left out: {', '.join(prepared.unknown[:3])}{', ...' if len(prepared.unknown) > 3 else ''}"
            for found, prepared in zip(self._applied.found, self._read, strict=True)
            if prepared.unknown
        ]

    def describe(self) -> list[dict[str, object]]:
        """What is applied, for `Engine.describe`."""
        return [
            {
                "path": found.named,
                "scale": lora.scale,
                "kind": prepared.kind,
                "parameters": len(prepared.changes),
                "beside": self._count_beside(prepared),
            }
            for lora, found, prepared in zip(self._applied.loras, self._applied.found, self._read, strict=True)
        ]

    def _count_beside(self, prepared: Prepared) -> int:
        """Of how many parameters the changes stand beside the weights."""
        numbers = {number for number, each in self._in_use.items() if each is prepared}
        shares = [tag.beside for tag in self._tags.values() if tag]
        return sum(any(number in numbers for number, _ in beside) for beside in shares)

    def converge(self) -> None:
        """Make of every parameter what is wanted; of most, nothing is to be made. Called before every request, in case
        the last change was interrupted twice. Raises WeightsError if a file was changed since."""
        differing = [key for key in {**self._tags, **self._wanted} if self._is(key) != self._wanted.get(key, BASE)]
        if not differing:
            return
        self._changed({self._networks[number].part for number, _ in differing})
        for key in sorted(differing):
            before, tag = self._is(key), self._wanted.get(key, BASE)
            self._tags[key] = None
            if before is None or before.merged != tag.merged:
                self._merge(key, tag.merged)
            if before is None or before.beside != tag.beside:
                self._put_beside(key, tag.beside)
            if tag != BASE:
                self._tags[key] = tag
            else:
                del self._tags[key]

    def _is(self, key: Key) -> Tag | None:
        return self._tags.get(key, BASE)

    def _changes(self, key: Key, shares: Shares) -> list[tuple[Change, float]]:
        number, name = key
        part = self._networks[number].part
        return [(change, scale) for one, scale in shares for change in self._in_use[one].changes[part, name]]

    def _merge(self, key: Key, shares: Shares) -> None:
        number, name = key
        loaded = self._networks[number].loaded
        if shares:
            loaded.filling.merged[name] = _Merged(self._changes(key, shares))
        else:
            loaded.filling.merged.pop(name, None)
        loaded.refresh(name)

    def _put_beside(self, key: Key, shares: Shares) -> None:
        number, name = key
        network = self._networks[number]
        stem, _, leaf = name.rpartition(".")
        module = network.loaded.net.get_submodule(stem)
        if leaf != "weight" or not side.is_linear(module):
            return
        changes = self._changes(key, shares)
        reserved = self._reserved if network.denoises else 0
        _make_room(network, module, max(side.rank_of([change for change, _ in changes]), reserved))
        if changes or reserved:
            side.fill(module, changes)

    def _prepare(self, path: Path, strict: bool) -> _Ready:
        try:
            stat = path.stat()
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
        key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino, strict)
        if key not in self._ready:
            networks: dict[str, nn.Module] = {}
            for network in self._networks:
                networks.setdefault(network.part, network.loaded.net)
            self._names = self._names or Names(self._spec(), networks)
            self._count += 1
            self._ready[key] = _Ready(self._count, read_lora(path, self._names, networks, strict=strict))
        self._ready.move_to_end(key)
        return self._ready[key]

    def _trim(self) -> None:
        total = sum(each.prepared.bytes for each in self._ready.values())
        for key, ready in list(self._ready.items()):
            if total > self.cache_bytes and ready.number not in self._in_use:
                total -= self._ready.pop(key).prepared.bytes


def _make_room(network: Network, module: nn.Module, rank: int) -> None:
    """Beside a linear, for so much; none for 0."""
    loaded = network.loaded
    if rank:
        loaded.grow(side.reserve(module, rank, loaded.filling.dtype, loaded.filling.device))
    else:
        loaded.grow(-side.remove(module))


def _tar_of(chosen: Chosen) -> Path | None:
    """Where learned tokens are that come with a LoRA. Raises InvalidRequest for two."""
    with_tokens = [each for each, lora in zip(chosen.found, chosen.loras, strict=True) if each.tar and lora.scale]
    if len({each.tar for each in with_tokens}) > 1:
        told = " and ".join(each.named for each in with_tokens)
        raise InvalidRequest(f"only one LoRA brings learned tokens, not {told}", field="loras")
    return with_tokens[0].tar if with_tokens else None


def networks_of(spec: ModelSpec, parts: Sequence[tuple[str, nn.Module]], loaded: Sequence[Loaded]) -> list[Network]:
    """Those of a model's networks that LoRAs may change, and that can be read once more."""
    kind = next(kind for kind in PREFIXES if isinstance(spec, kind))
    return [Network(part, each) for part, net in parts for each in loaded if part in PREFIXES[kind] and each.net is net]


@dataclass(frozen=True)
class _Merged:
    """Changes of one parameter, each with its scale."""

    parts: Sequence[tuple[Change, float]]

    @property
    def by_rows(self) -> bool:
        return all(change.by_rows for change, _ in self.parts)

    def add(self, weight: Tensor, start: int) -> None:
        base = weight if self.by_rows else weight.clone()
        for change, scale in self.parts:
            if self.by_rows:
                change.add_to_rows(weight, start, scale)
            else:
                change.add_to(weight, base, scale)

"""Key tables: how another layout names what our networks hold, and reading or writing through one.

A table is a list of entries with `{i}` for a number. An entry with several foreign names says that our tensor's rows
are theirs, one after another. The tables are in `tables.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flux_engine.checkpoints.source import Recipe, WeightSource
from flux_engine.errors import WeightsError


@dataclass(frozen=True)
class Entry:
    """One line of a key table: names without `.weight` or `.bias`, which both sides carry alike."""

    ours: str
    """Empty for what a layout holds and no network needs."""
    theirs: tuple[str, ...]
    swap_halves: bool = False
    """Our rows are (shift, scale), theirs (scale, shift)."""
    matrix: bool = False
    """Ours is a 1x1 convolution, theirs a linear with the same numbers."""
    leaf: tuple[str, str] | None = None
    """Our and their last name part, where it is not the same on both sides."""
    part: tuple[int, int] | None = None
    """(k, n): ours is the k-th of n equal parts of their rows."""
    transposed: bool = False


Table = tuple[Entry, ...]


def to_theirs(tensors: Mapping[str, Tensor], table: Table, *, width: int = 0) -> dict[str, Tensor]:
    """Rename (and split, swap, squeeze) our tensors to the other layout.

    `width` is the number of rows of every part of a joined tensor but the last, which takes the rest; without it the
    parts are equal.
    Raises WeightsError for a tensor no entry matches.
    """
    out: dict[str, Tensor] = {}
    joined: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        entry, names = _theirs(name, table)
        if entry is None:
            raise WeightsError(f"no entry of the key table matches {name!r}")
        if entry.part:
            joined.setdefault(names[0], {})[entry.part[0]] = tensor
        else:
            out |= zip(names, _parts(tensor, entry, width), strict=True)
    return out | {name: torch.cat([parts[k] for k in sorted(parts)]) for name, parts in joined.items()}


def _theirs(ours: str, table: Table) -> tuple[Entry | None, list[str]]:
    """The entry for one of our tensors, and what the other layout calls it."""
    stem, _, leaf = ours.rpartition(".")
    for entry in table:
        if entry.leaf is None or entry.leaf[0] == leaf:
            match = re.fullmatch(_pattern(entry.ours), stem)
            if match:
                last = entry.leaf[1] if entry.leaf else leaf
                return entry, [_dotted(theirs.format(**match.groupdict()), last) for theirs in entry.theirs]
    return None, [ours]


def renamed(stems: Iterable[str], table: Table) -> Iterator[tuple[str, Entry, list[str]]]:
    """Our names, each without `.weight` -> the entry that matches and what the other layout calls it; entries that
    read only a part of theirs are left out."""
    alike: dict[str, list[Entry]] = {}
    for entry in table:
        if entry.ours and not entry.part:
            alike.setdefault(_alike(entry.ours), []).append(entry)
    for stem in stems:
        for entry in alike.get(_alike(stem), ()):
            match = re.fullmatch(_pattern(entry.ours), stem)
            if match:
                yield stem, entry, [theirs.format(**match.groupdict()) for theirs in entry.theirs]


def _dotted(stem: str, leaf: str) -> str:
    return f"{stem}.{leaf}" if stem else leaf


def _alike(name: str) -> str:
    """The same for a template and all that it stands for."""
    return re.sub(r"\{i\}|\d+", "#", name)


def to_ours(source: WeightSource, table: Table) -> WeightSource:
    """The same tensors under our names. What no entry matches keeps its name, for the network to refuse.

    Where only some of the tensors that make up one of ours are there, it is missing, and those are known.
    """
    alike: dict[str, list[Entry]] = {}
    for entry in table:
        for name in entry.theirs:
            alike.setdefault(_alike(name), []).append(entry)
    recipes: dict[str, Recipe] = {}
    for name in source.recipes:
        stem, _, leaf = name.rpartition(".")
        known = False
        for entry in alike.get(_alike(stem), ()):
            matches = (re.fullmatch(_pattern(theirs), stem) for theirs in entry.theirs)
            match = next((m for m in matches if m), None)
            if match and (entry.leaf is None or entry.leaf[1] == leaf):
                known = True
                names = [_dotted(theirs.format(**match.groupdict()), leaf) for theirs in entry.theirs]
                recipe = _joined(source, names, entry) if entry.ours else None
                if recipe:
                    ours = entry.ours.format(**match.groupdict())
                    recipes[_dotted(ours, entry.leaf[0] if entry.leaf else leaf)] = recipe
        if not known:
            recipes[name] = source.recipes[name]

    def spell(name: str) -> tuple[str, ...]:
        return tuple(stored for theirs in _theirs(name, table)[1] for stored in source.spell(theirs))

    return replace(source, recipes=recipes, spell=spell)


def _joined(source: WeightSource, names: list[str], entry: Entry) -> Recipe | None:
    parts = [source.recipes.get(name) for name in names]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    recipe = found[0]
    if len(found) > 1:
        if any(part.shape[1:] != recipe.shape[1:] or part.dtype != recipe.dtype for part in found):
            told = ", ".join(f"{name} is {list(r.shape)}, {r.dtype}" for name, r in zip(names, found, strict=True))
            raise WeightsError(f"{source.path}: tensors that belong together do not fit one another: {told}")
        pieces = tuple(piece for part in found for piece in part.pieces)
        recipe = replace(recipe, pieces=pieces, shape=(sum(part.shape[0] for part in found), *recipe.shape[1:]))
    count = recipe.shape[0] if recipe.shape else 1
    if entry.swap_halves:
        halves = (recipe.rows(count // 2, count), recipe.rows(0, count // 2))
        recipe = replace(recipe, pieces=tuple(piece for half in halves for piece in half.pieces))
    if entry.part:
        k, n = entry.part
        recipe = recipe.rows(count * k // n, count * (k + 1) // n)
    if entry.matrix and len(recipe.shape) == 2:
        recipe = replace(recipe, shape=(*recipe.shape, 1, 1))
    if entry.transposed:
        recipe = replace(recipe, shape=recipe.shape[::-1], transposed=True)
    return recipe


def _pattern(template: str) -> str:
    return re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)")


def _parts(tensor: Tensor, entry: Entry, width: int) -> list[Tensor]:
    if entry.transposed:
        tensor = tensor.T
    if entry.swap_halves:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    if entry.matrix and tensor.dim() == 4:
        tensor = tensor[:, :, 0, 0]
    count = len(entry.theirs)
    if count == 1:
        return [tensor.contiguous()]
    sizes = [width or tensor.shape[0] // count] * (count - 1)
    sizes.append(tensor.shape[0] - sum(sizes))
    return [part.contiguous() for part in tensor.split(sizes)]

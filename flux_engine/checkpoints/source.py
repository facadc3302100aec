"""One reader of weights, over any file and any layout.

Everything that needs weights asks a `WeightSource` for rows of a named tensor, in the stored dtype or another one. What
the source calls a tensor may lie in several pieces, in several files, under other names: a recipe says where.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_engine.checkpoints.folders import files_of
from flux_engine.checkpoints.safetensors_file import SafetensorsFile
from flux_engine.errors import WeightsError

BUFFER = 2**20
"""Bytes read at a time where a tensor is converted: few enough to stay in the cache (benchmarks/load_weights.py)."""
_OURS = threading.local()
HALVES = {torch.float16, torch.bfloat16}
"""Between these torch converts number by number. By way of float32, which holds both exactly, it is vectorised."""


@dataclass(frozen=True)
class Piece:
    """Rows of a stored tensor."""

    file: SafetensorsFile
    name: str
    start: int
    stop: int
    scale: Tensor | None = field(default=None, compare=False)
    """What the stored numbers are multiplied by, in float32: one number, or one for each of the tensor's rows."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return self.file.tensors[self.name].dtype


@dataclass(frozen=True)
class Recipe:
    """A tensor: pieces, one after another along the first axis."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    """As it is stored; of numbers with a scale float32."""
    transposed: bool = False
    """The one piece is a matrix stored the other way round."""
    widened: int = 0
    """How many columns of zeros stand behind those of a matrix that are stored."""

    @property
    def stored(self) -> str:
        """What the file calls it, for messages."""
        return " + ".join(dict.fromkeys(piece.name for piece in self.pieces))

    @property
    def scaled(self) -> bool:
        return any(piece.scale is not None for piece in self.pieces)

    def rows(self, start: int, stop: int) -> Recipe:
        """The same, of these rows only."""
        kept: list[Piece] = []
        at = 0
        for piece in self.pieces:
            count = piece.stop - piece.start
            first, last = max(start - at, 0), min(stop - at, count)
            if first < last:
                kept.append(replace(piece, start=piece.start + first, stop=piece.start + last))
            at += count
        return replace(self, pieces=tuple(kept), shape=(stop - start, *self.shape[1:]))


@dataclass(frozen=True)
class WeightSource:
    """Tensors by name. Use it as a context manager: it holds files open."""

    path: Path
    recipes: Mapping[str, Recipe]
    files: Sequence[SafetensorsFile]
    spell: Callable[[str], tuple[str, ...]] = lambda name: (name,)
    """A tensor's name -> what the file calls the tensors that make it up, or would if they were there."""

    @classmethod
    def open(cls, path: Path) -> WeightSource:
        """A safetensors file, an index of shards, or a folder with one of either.

        Raises WeightsError for what is missing, not whole, or left open by the folder.
        """
        files: list[SafetensorsFile] = []
        try:
            recipes: dict[str, Recipe] = {}
            parts, places = files_of(path)
            for part in parts:
                file = SafetensorsFile(part)
                files.append(file)
                for name, stored in file.tensors.items():
                    if places.get(name, part.name) != part.name:
                        continue  # models may have shards in common, and some tensors of their own
                    if name in recipes:
                        other = recipes[name].pieces[0].file.path
                        raise WeightsError(f"tensor {name!r} is in {other} and in {part}")
                    rows = stored.shape[0] if stored.shape else 1
                    recipes[name] = Recipe((Piece(file, name, 0, rows),), stored.shape, stored.dtype)
            return cls(path, recipes, files)
        except BaseException:
            for file in files:
                file.close()
            raise

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Mapped tensors stay valid."""
        for file in self.files:
            file.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: recipe.shape for name, recipe in self.recipes.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers say beside the tensors."""
        return {key: value for file in self.files for key, value in file.metadata.items()}

    def under(self, prefix: str) -> WeightSource:
        """The tensors whose names begin so, without it. Shares the open files."""
        kept = {name.removeprefix(prefix): r for name, r in self.recipes.items() if name.startswith(prefix)}
        return replace(self, recipes=kept, spell=lambda name: self.spell(prefix + name))

    def widened(self, name: str, columns: int) -> WeightSource:
        """The same, with columns of zeros behind those of one matrix, so that it has so many."""
        recipe = self.recipes[name]
        wider = replace(recipe, shape=(recipe.shape[0], columns), widened=columns - recipe.shape[1])
        return replace(self, recipes={**self.recipes, name: wider})

    def rows(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        own: bool = False,
        into: Tensor | None = None,
    ) -> Tensor:
        """Rows start to stop of a tensor along its first axis, all of them by default; in the stored dtype by default.

        What is needed as it is stored is mapped where it can be, and costs no memory of its own, unless it is to have
        its `own`, which `into` may be, of their shape and dtype; what is converted is read in bounded pieces.
        Raises WeightsError for a name that is not there, rows that are not, or a file that was changed since.
        """
        if name not in self.recipes:
            raise WeightsError(f"{self.path} has no tensor {name!r}")
        recipe = self.recipes[name]
        count = recipe.shape[0] if recipe.shape else 1
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise WeightsError(f"{name!r} has {count} rows: there are none from {start} to {stop}")
        if recipe.transposed:
            return _whole(recipe, dtype or recipe.dtype, own, None)[start:stop]
        if (start, stop) != (0, count):
            recipe = recipe.rows(start, stop)
        if recipe.widened:
            stored = replace(recipe, shape=(recipe.shape[0], recipe.shape[1] - recipe.widened), widened=0)
            return F.pad(_whole(stored, dtype or recipe.dtype, own, None), (0, recipe.widened))
        return _whole(recipe, dtype or recipe.dtype, own, into)


@contextmanager
def opened(path: Path, *, keep: bool = False) -> Iterator[WeightSource]:
    """As `WeightSource.open`, closed at the end; or with `keep` only after an error, and when nothing needs it any
    more."""
    source = WeightSource.open(path)
    try:
        yield source
    except BaseException:
        source.close()
        raise
    if not keep:
        source.close()


def _whole(recipe: Recipe, dtype: torch.dtype, own: bool, into: Tensor | None) -> Tensor:
    if len(recipe.pieces) == 1 and dtype == recipe.dtype and not own and not recipe.scaled:
        (piece,) = recipe.pieces
        stored = piece.file.mapped(piece.name)
        if stored is not None:
            if stored.ndim:
                stored = stored[piece.start : piece.stop]
            return stored.T.contiguous() if recipe.transposed else stored.view(recipe.shape)
    out = torch.empty(recipe.shape[::-1] if recipe.transposed else recipe.shape, dtype=dtype) if into is None else into
    if not out.numel():
        return out
    flat = out.view(sum(piece.stop - piece.start for piece in recipe.pieces), -1)
    at = 0
    for piece in recipe.pieces:
        at = _read(piece, flat, at)
    return out.T.contiguous() if recipe.transposed else out


def _room(shape: tuple[int, int], dtype: torch.dtype, purpose: str) -> Tensor:
    """Memory of this thread for pieces on their way: to be given some by the system takes longer than to read, and what
    is freed between tensors that stay may leave holes. One tensor at a time for each purpose."""
    size = prod(shape) * dtype.itemsize
    if size > 4 * BUFFER:
        return torch.empty(shape, dtype=dtype)
    if not hasattr(_OURS, purpose):
        setattr(_OURS, purpose, torch.empty(4 * BUFFER, dtype=torch.uint8))
    return getattr(_OURS, purpose)[:size].view(dtype).view(shape)


def _read(piece: Piece, out: Tensor, at: int) -> int:
    """Into the rows of `out` from `at` on -> where the next piece begins."""
    stored, scale = piece.dtype, piece.scale
    width = out.shape[1]
    step = max(1, BUFFER // max(1, width * stored.itemsize))
    some = (min(step, piece.stop - piece.start), width)
    buffer = None if out.dtype == stored and scale is None else _room(some, stored, "read")
    by_way = scale is not None or {stored, out.dtype} == HALVES
    middle = _room(some, torch.float32, "converted") if by_way else None
    for start in range(piece.start, piece.stop, step):
        stop = min(start + step, piece.stop)
        rows = out[at : at + stop - start]
        if buffer is None:
            piece.file.read(piece.name, start, stop, rows)
        else:
            part = buffer[: stop - start]
            piece.file.read(piece.name, start, stop, part)
            converted = part if middle is None else middle[: len(part)].copy_(part)
            if scale is not None:
                converted.mul_(scale if len(scale) == 1 else scale[start:stop, None])
            rows.copy_(converted)
        at += stop - start
    return at

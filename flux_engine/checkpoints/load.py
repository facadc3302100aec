"""Fill a network from a source: made on the meta device, filled tensor by tensor, strict about names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from flux_engine.checkpoints.quantized import SCALE, Saved, quantized_rows
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError
from flux_engine.quantization.linears import BLOCK, QuantizedLinear, Scheme, quantize_weight
from flux_engine.quantization.policy import Treat, place

Module = TypeVar("Module", bound=nn.Module)
SHOWN = 8
"""How many names of each kind an error lists."""


class Merge(Protocol):
    """What is added to a parameter whenever it is read."""

    @property
    def by_rows(self) -> bool:
        """Whether some rows can be done without the others."""
        ...

    def add(self, weight: Tensor, start: int) -> None:
        """To rows of the parameter from `start` on, as they are stored, in float32, in place."""
        ...


@dataclass(frozen=True)
class Filling:
    """How the parameters of a network come from a source; as long as that is open, once more."""

    source: WeightSource
    stored: Mapping[str, str]
    """Parameter -> what the source calls it."""
    schemes: Mapping[str, Scheme]
    """Linear of 8 bits -> its scheme."""
    dtype: torch.dtype
    device: torch.device
    merged: dict[str, Merge] = field(default_factory=dict, compare=False)
    """Parameter -> what is done to it whenever it is read (LoRAs)."""

    def exact(self, name: str) -> bool:
        """Whether a parameter is stored in full precision; not so what was saved in 8 bits."""
        return self.stored[name].removesuffix(".weight") + SCALE not in self.source.recipes

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These parameters; the scales of a linear of 8 bits come with its weight.

        Raises WeightsError for a weight that is to be of 8 bits and not finite, or a file that was changed since.
        """
        # Where a CPU computes with it, a tensor has memory of its own: a file may be written over while the engine
        # runs, and a product with one row has other last bits where a tensor does not begin evenly in memory.
        own = self.device.type == "cpu"
        state: dict[str, Tensor] = {}
        for name in names:
            linear, _, leaf = name.rpartition(".")
            if name in self.merged:
                state |= self._changed(name)
            elif linear not in self.schemes or leaf == "bias":
                state[name] = self.source.rows(self.stored[name], dtype=self.dtype, own=own).to(self.device)
            elif leaf == "weight":
                state[name], state[linear + SCALE] = self._quantized(name, self.schemes[linear], own)
        return state

    def kind(self, name: str) -> torch.dtype:
        """The dtype of a parameter."""
        linear, _, leaf = name.rpartition(".")
        if linear not in self.schemes or leaf == "bias":
            return self.dtype
        return self.schemes[linear].dtype if leaf == "weight" else torch.float32

    def _changed(self, name: str) -> dict[str, Tensor]:
        """A parameter with what is merged in it: added in float32 to the numbers as they are stored, and only then
        rounded, so that nothing small is lost to a weight of 8 bits."""
        linear, _, leaf = name.rpartition(".")
        source, stored, merge = self.source, self.stored[name], self.merged[name]
        scheme = self.schemes.get(linear) if leaf == "weight" else None
        recipe = source.recipes[stored]
        scales = stored.removesuffix(".weight") + SCALE
        count = recipe.shape[0] if recipe.shape else 1
        values = torch.empty(recipe.shape, dtype=scheme.dtype if scheme else self.dtype, device=self.device)
        scale = torch.empty(count, dtype=torch.float32, device=self.device)
        some = max(1, BLOCK // (4 * max(1, prod(recipe.shape[1:]))))
        step = count if recipe.transposed or not merge.by_rows else some
        for start in range(0, count, max(1, step)):
            stop = min(start + step, count)
            weight = source.rows(stored, start, stop, dtype=torch.float32, own=True).to(self.device)
            if scheme is not None and scales in source.recipes:
                weight *= source.rows(scales, start, stop, own=True).to(self.device)[:, None]
            merge.add(weight, start)
            if scheme is None:
                values[start:stop] = weight
                told = values[start:stop]
            else:
                for row in range(0, len(weight), some):
                    rows = slice(start + row, min(start + row + some, stop))
                    values[rows], scale[rows] = quantize_weight(weight[row : row + some], scheme, over=True)
                told = scale[start:stop]
            # A sum is finite only if all are, and is sooner there; large numbers alone can make it infinite.
            if not told.sum(dtype=torch.float32).isfinite() and not told.isfinite().all():
                raise WeightsError(f"with what is to be merged in it, {name} is not finite as {self.dtype}")
        rounded = {name: values} if scheme is None else {name: values, linear + SCALE: scale}
        return rounded

    def _quantized(self, name: str, scheme: Scheme, own: bool) -> tuple[Tensor, Tensor]:
        """A matrix in 8 bits and the scales of its rows: as they are saved, or made of what is stored."""
        source, stored = self.source, self.stored[name]
        scales = stored.removesuffix(".weight") + SCALE
        if scales in source.recipes:
            return source.rows(stored, own=own).to(self.device), source.rows(scales, own=own).to(self.device)
        values = torch.empty(source.recipes[stored].shape, dtype=scheme.dtype, device=self.device)
        scale = torch.empty(len(values), dtype=torch.float32, device=self.device)

        def put(row: int, some: Tensor, their: Tensor) -> None:
            values[row : row + len(some)], scale[row : row + len(some)] = some, their

        quantized_rows(source, stored, scheme, put, self.device)
        return values, scale


def load_module(
    make: Callable[[], Module],
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rename: Callable[[str], str] = lambda name: name,
    tied: Mapping[str, str] | None = None,
    treat: Treat | None = None,
) -> Module:
    """Make a network and fill it from `source`.

    `make` builds it; nothing is allocated or initialised while it does. `rename` turns the network's name of a
    parameter into the file's. `tied` maps a parameter to the one whose storage it shares and which alone is stored.
    `treat` says which linears are to be of 8 bits; they are made so some rows at a time. A file that was saved so says
    it itself.
    Raises WeightsError listing every tensor that is missing, left over or of another shape, or for whole numbers, or
    for a weight that is to be of 8 bits and not finite; then nothing was placed.
    """
    tied = tied or {}
    module, filling = prepare(make, source, dtype=dtype, device=device, rename=rename, tied=tied, treat=treat)
    return fill(module, filling, tied)


def fill(module: Module, filling: Filling, tied: Mapping[str, str], without: Collection[str] = ()) -> Module:
    """Put the weights where `prepare` left none, but for some that come later."""
    state = filling.read(name for name in filling.stored if name not in without)
    state |= {name: state[original] for name, original in tied.items()}
    module.load_state_dict(state, strict=not without, assign=True)
    for name, original in tied.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, module.get_parameter(original))
    return module.eval().requires_grad_(False)


def prepare(
    make: Callable[[], Module],
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rename: Callable[[str], str] = lambda name: name,
    tied: Collection[str] = (),
    treat: Treat | None = None,
) -> tuple[Module, Filling]:
    """The network on the meta device, and how to fill it but for what is `tied`; as `load_module`."""
    saved = Saved.of(source)
    treat = saved.treat if saved else treat
    try:
        with torch.device("meta"):
            module = make()
            if treat is not None:
                place(module, treat)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise WeightsError(f"{source.path}: no network can be made as it is described: {error}") from None
    schemes = {n: layer.scheme for n, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
    scales = {name + SCALE for name in schemes}
    wanted = {
        name: (rename(name), tuple(tensor.shape))
        for name, tensor in module.state_dict().items()
        if name not in tied and (saved or name not in scales)
    }
    _compare(source, dict(wanted.values()))
    stored = {name: theirs for name, (theirs, _) in wanted.items()}
    eight = {linear + leaf for linear in schemes for leaf in (".weight", SCALE)}
    _refuse_whole_numbers(source, (theirs for name, theirs in stored.items() if name not in eight))
    return module, Filling(source, stored, schemes, dtype, device)


def _refuse_whole_numbers(source: WeightSource, names: Iterable[str]) -> None:
    for name in names:
        kind = source.recipes[name].dtype
        if not kind.is_floating_point:
            raise WeightsError(
                f"{source.path}: {source.recipes[name].stored} holds whole numbers ({kind}), which say nothing "
                "without the tool that quantised them: use a file in float32, bfloat16, float16 or float8"
            )


def differences(source: WeightSource, wanted: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """What does not fit, in the file's own names: tensors missing, unknown, and of another shape."""
    shapes = source.shapes
    there = {name for file in source.files for name in file.tensors}
    return {
        "missing": [
            stored for name in wanted if name not in shapes for stored in source.spell(name) if stored not in there
        ],
        "not known": [source.recipes[name].stored for name in shapes if name not in wanted],
        "of another shape": [
            f"{source.recipes[name].stored} is {list(shapes[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != tuple(shape)
        ],
    }


def _compare(source: WeightSource, wanted: Mapping[str, Sequence[int]]) -> None:
    lines = [
        f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in differences(source, wanted).items()
        if names
    ]
    if lines:
        raise WeightsError(f"{source.path} does not fit the network. Tensors " + "; ".join(lines))

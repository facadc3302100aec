"""Weights that are only there while they are read.

What a network's `precompute` reads, and nothing else does (modulation, the text's keys and values, the embeddings of
time and size), is over a quarter of FLUX.1 and a seventh of SDXL's UNet. It is read once for a new prompt.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flux_engine.checkpoints.load import Filling, load_module, prepare
from flux_engine.checkpoints.source import WeightSource
from flux_engine.quantization.policy import Treat

Module = TypeVar("Module", bound=nn.Module)
KEPT = 4
"""How many results are remembered, each for one prompt and schedule: with them a new seed brings nothing back."""


class Shelf:
    """Some parameters of a network: on the device inside `with`, and nowhere outside of it."""

    def __init__(self, net: nn.Module, filling: Filling, names: Sequence[str]) -> None:
        """The source of `filling` stays open: from it they come, each time with the same bits."""
        self.net, self.filling, self.names = net, filling, names

    @property
    def bytes(self) -> int:
        return sum(self.net.get_parameter(name).nbytes for name in self.names)

    def __enter__(self) -> None:
        """Raises WeightsError if the file was changed since; then they are as they were."""
        self._place(self.filling.read(name for name in self.names if name in self.filling.stored))

    def __exit__(self, *_: object) -> None:
        self._place({name: self.net.get_parameter(name).to("meta") for name in self.names})

    def _place(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.net.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


def load_network(
    make: Callable[[], Module],
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    treat: Treat | None = None,
    evict: bool = False,
) -> tuple[Module, Precompute]:
    """As `load_module`, for a network with a `precompute`. With `evict` its weights are left in the source, which then
    has to stay open."""
    if not evict:
        net = load_module(make, source, dtype=dtype, device=device, treat=treat)
        return net, Precompute(net)
    net, filling = prepare(make, source, dtype=dtype, device=device, treat=treat)
    away = [name for name, _ in net.named_parameters() if re.fullmatch(str(net.precomputed), name)]
    state = filling.read(name for name in filling.stored if name not in set(away))
    net.load_state_dict(state, strict=False, assign=True)
    return net.eval().requires_grad_(False), Precompute(net, Shelf(net, filling, away))


class Precompute:
    """A network's `precompute`, its weights brought back from their shelf where its result is not remembered."""

    def __init__(self, net: Any, shelf: Shelf | None = None) -> None:
        self.net, self.shelf = net, shelf
        self._kept: OrderedDict[int, tuple[tuple[Any, ...], Any]] = OrderedDict()
        self._count = 0

    def __call__(self, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The result for the arguments of each row."""
        if self.shelf is None:
            return [self.net.precompute(*row) for row in rows]
        found = [self._remembered(row) for row in rows]
        if any(made is None for made in found):
            with self.shelf:
                pairs = zip(rows, found, strict=True)
                found = [self.net.precompute(*row) if made is None else made for row, made in pairs]
            for row, made in zip(rows, found, strict=True):
                self._remember(row, made)
        return found

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

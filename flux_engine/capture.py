"""A call of a network as one CUDA graph: what the processor had told the card kernel by kernel it tells in one go.

A graph reads and writes fixed memory. So what a call reads is copied into that of its graph, what has not changed since
left out (the prompt's tokens, the rotary tables), and its result is copied out. There is a graph for each size; weights
are read where they were when it was captured.

Source of the method: CUDA programming guide, "CUDA Graphs"; torch.cuda.CUDAGraph.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flux_engine.models.layers import Stepwise

log = logging.getLogger(__name__)

KEPT = 8
"""Graphs: each has memory of its own for what its call reads, and shares what it works in."""
WARM_UP = 2
"""Calls before a capture: libraries make their workspaces, torch.compile its graphs."""

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Something to do -> what does it again, and where its results are each time."""


@dataclass
class _Captured:
    net: Stepwise
    weights: list[int]
    """Where they were."""
    read: list[Tensor]
    """Where the graph reads."""
    copied: list[Tensor | None]
    """What was copied there last, of what does not change while it is the same object."""
    replay: Callable[[], None]
    result: Any


class CUDAGraphs:
    """A Runner that captures what it calls, and plays it back."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture or _Capturing()
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def attach(self, networks: Iterable[nn.Module]) -> None:
        """Have these networks played back."""
        for net in networks:
            if isinstance(net, Stepwise):
                net.call_step = self

    def forget_moved(self) -> None:
        """Drop the graphs of networks whose weights are elsewhere by now."""
        for key, graph in list(self._graphs.items()):
            if graph.weights != _addresses(graph.net):
                del self._graphs[key]

    def __call__(self, step: Callable[..., Any], *args: Any) -> Any:
        """`step(*args)`. `step` is a method of a network; in `args` are tensors, None, and tuples and dataclasses of
        them. What is in a dataclass is taken to be frozen."""
        key = (id(_network(step)), step.__name__, signature(args))
        graph = self._graphs.get(key) or self._captured(step, args)
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        given = [(tensor, is_dataclass(arg)) for arg in args for tensor in tensors_of(arg)]
        for place, (tensor, frozen) in enumerate(given):
            if tensor is not graph.copied[place]:
                graph.read[place].copy_(tensor)
                graph.copied[place] = tensor if frozen else None
        graph.replay()
        return rebuilt(graph.result, Tensor.clone)

    def _captured(self, step: Callable[..., Any], args: tuple[Any, ...]) -> _Captured:
        read = [tensor.clone() for tensor in tensors_of(args)]
        fixed = iter(read)
        own = rebuilt(args, lambda _: next(fixed))
        for _ in range(WARM_UP):
            step(*own)
        replay, result = self._capture(lambda: step(*own))
        net = _network(step)
        log.info("captured a CUDA graph: %s, %s", type(net).__name__, tuple(read[0].shape))
        return _Captured(net, _addresses(net), read, [None] * len(read), replay, result)


def _network(step: Callable[..., Any]) -> Stepwise:
    return step.__self__  # pyright: ignore[reportFunctionMemberAccess]


def _addresses(net: Stepwise) -> list[int]:
    """Where the weights are that a call reads."""
    once = re.compile(net.precomputed)
    return [p.data_ptr() for name, p in net.named_parameters() if not once.fullmatch(name)]


class _Capturing:
    """Captures on the current card; all graphs share a pool of memory, as no two run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, do: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = do()
        return graph.replay, result


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in tuples and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_of(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif value is not None:
        raise TypeError(f"a call that is captured reads tensors, not a {type(value).__name__}")


def signature(value: Any) -> Hashable:
    """What has to be equal for one graph to serve two calls."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, tuple | list):
        return tuple(signature(each) for each in value)
    if is_dataclass(value):
        return tuple(signature(getattr(value, field.name)) for field in fields(value))
    return value


def rebuilt(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(rebuilt(each, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: rebuilt(getattr(value, field.name), change) for field in fields(value)})
    return value

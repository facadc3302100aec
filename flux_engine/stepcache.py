"""Step caches: predictions without computing all of the network. Lossy, off unless asked for, and told of afterwards.

A cache belongs to one walk over timesteps: nothing of it outlives a request, and each stage has its own. What it leaves
out also leaves out the ControlNets. Where another set of ControlNets begins to count, or guidance comes in, the call is
computed.

Rows: B rows of the batch, which are the pictures, or where there is guidance the pictures' negative rows and then their
positive ones. A picture decides for its own rows, so that it comes out of any batch as it would alone.

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from flux_engine.inputs.caching import FirstBlockCache, StepCache, TaylorCache
from flux_engine.models.flux import Flux
from flux_engine.network import Network


class Predictor(ABC):
    """What answers the calls of one walk."""

    def __init__(self, pictures: int) -> None:
        self.skipped: list[list[int]] = [[] for _ in range(pictures)]
        """For each picture the calls at which not all of the network was computed."""

    @abstractmethod
    def __call__(self, network: Network, seen: Tensor, call: int) -> Tensor:
        """The prediction at the next call. `network` is for the rows of `seen`: all of the batch, or the positive ones
        alone."""


class EveryCall(Predictor):
    """Computes the whole network."""

    def __call__(self, network: Network, seen: Tensor, call: int) -> Tensor:
        return network(seen, call)


class FirstBlock(Predictor):
    """`FirstBlockCache` at work. The decision waits for the device once a call."""

    def __init__(self, asked: FirstBlockCache, pictures: int) -> None:
        super().__init__(pictures)
        self._asked = asked
        self._last: list[int] = []
        """For each picture its last whole call; empty if there is none to go by."""
        self._moved: Tensor
        """What the first block added then to the picture's tokens (B, L, D)."""
        self._rest: Tensor
        """What the other blocks added to them and to what is read behind them."""

    def __call__(self, network: Network, seen: Tensor, call: int) -> Tensor:
        net, statics = network.stage.family.net, network.statics.at(call)
        assert isinstance(net, Flux)
        before = net.enter(network.stage.feed(seen))
        img, txt = net.call_step(net.first, before, statics)
        moved = (img - before)[:, : seen.shape[1]]
        del before
        due = self._due(network, moved, call)
        if all(due):
            after = net.call_step(net.rest, (img, txt), statics, network.residuals(seen, call))
            self._moved, self._rest, self._last = moved, after - img, [call] * len(due)
        else:
            after = img + self._rest
            self._mark(due, call)
            if any(due):
                rows = [row for row in range(len(seen)) if due[row % len(due)]]
                few = network.of(rows)
                residuals = few.residuals(seen[rows], call)
                some = net.call_step(net.rest, (img[rows], txt[rows]), few.statics.at(call), residuals)
                after[rows], self._moved[rows], self._rest[rows] = some, moved[rows], some - img[rows]
        return net.leave(after, statics)[:, : seen.shape[1]]

    def _mark(self, due: Sequence[bool], call: int) -> None:
        for picture, computed in enumerate(due):
            if computed:
                self._last[picture] = call
            else:
                self.skipped[picture].append(call)

    def _due(self, network: Network, moved: Tensor, call: int) -> list[bool]:
        """For each picture whether all of the network has to be computed."""
        pictures = len(self.skipped)
        if not self._last or len(moved) > len(self._moved):
            return [True] * pictures
        self._moved, self._rest = self._moved[-len(moved) :], self._rest[-len(moved) :]
        # Row by row: what a sum is rounded to must not depend on the batch.
        changes = [
            (now - then).float().abs().mean() / then.float().abs().mean()
            for now, then in zip(moved, self._moved, strict=True)
        ]
        change = torch.stack(changes).view(-1, pictures).amax(0).tolist()
        return [
            not change[picture] < self._asked.threshold  # also where it is not a number
            or call - last > self._asked.max_skips
            or network.steered(call) != network.steered(last)
            for picture, last in enumerate(self._last)
        ]


class Taylor(Predictor):
    """`TaylorCache` at work. Which calls are computed is the same for every row."""

    def __init__(self, asked: TaylorCache, pictures: int, calls: int) -> None:
        super().__init__(pictures)
        self._asked = asked
        self._calls = calls
        self._known: list[tuple[int, Tensor]] = []
        """The last computed calls and their predictions, float32."""

    def __call__(self, network: Network, seen: Tensor, call: int) -> Tensor:
        self._forget(network, len(seen), call)
        if not self._due(call):
            for skipped in self.skipped:
                skipped.append(call)
            return extrapolated(self._known, call)
        prediction = network(seen, call)
        # A copy: a compiled network may write its next prediction where this one is.
        kept = prediction.to(torch.float32, copy=True)
        self._known = [*self._known, (call, kept)][-self._asked.order - 1 :]
        return prediction

    def _forget(self, network: Network, rows: int, call: int) -> None:
        """Drop what says nothing of this call."""
        if self._known:
            last, known = self._known[-1]
            if rows > len(known) or network.steered(call) != network.steered(last):
                self._known = []
        self._known = [(call, known[-rows:]) for call, known in self._known]

    def _due(self, call: int) -> bool:
        asked, known = self._asked, self._known
        if call < asked.warmup or call == self._calls - 1 or len(known) <= asked.order:
            return True
        return call - known[-1][0] >= asked.interval


def extrapolated(known: Sequence[tuple[int, Tensor]], call: int) -> Tensor:
    """What the polynomial of least degree through the values at some calls has at another (Lagrange's form)."""
    nodes = [node for node, _ in known]
    weights = [math.prod((call - other) / (node - other) for other in nodes if other != node) for node in nodes]
    return torch.stack([weight * value for weight, (_, value) in zip(weights, known, strict=True)]).sum(0)


def predictor_of(asked: StepCache | None, pictures: int, calls: int) -> Predictor:
    """What answers the calls of a walk, so many."""
    match asked:
        case None:
            return EveryCall(pictures)
        case FirstBlockCache():
            return FirstBlock(asked, pictures)
        case TaylorCache():
            return Taylor(asked, pictures, calls)


def note_of(asked: StepCache, skipped: Sequence[Sequence[int]], calls: int) -> str:
    """What is to be said of it."""
    fewest, most = min(map(len, skipped)), max(map(len, skipped))
    count = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"step_cache {asked}: {count} of {calls} calls were not computed whole"

"""Weights from host memory to a card: through two pinned buffers, on a stream of its own.

Memory that is pinned can be read by the card itself, while the processor fills the other buffer; pinning all that waits
on the host would take it from everything else there. The second stream lets the network go on meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BUFFER = 2**26
"""Bytes of each of the two."""


class Event(Protocol):
    """A point in what a card was told to do."""

    def synchronize(self) -> None:
        """Wait until it was reached."""


class Link(Protocol):
    """What is asked of a card."""

    def pinned(self, size: int) -> Tensor:
        """Host memory of so many bytes, that the card can read."""
        ...

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Memory on the card."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy bytes from pinned memory, after what was begun before."""

    def mark(self) -> Event:
        """Behind all that was begun."""
        ...

    def join(self, event: Event) -> None:
        """What is begun elsewhere on the card from now on comes after this."""


class Cuda:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty_like(self, tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device=self.device)
        # It may be memory that a kernel which was started is still using.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return made

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Event:
        return self.stream.record_event()

    def join(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)  # pyright: ignore[reportArgumentType]


@dataclass
class _Buffer:
    memory: Tensor
    read: Event | None = None
    """When the card has read what is in it."""


class Staging:
    """Copies tensors to a card; `join` before they are used."""

    def __init__(self, link: Link | None, *, size: int = BUFFER) -> None:
        """Without a link, for a device that is no card, tensors are copied at once."""
        self._link, self._size = link, size
        self._buffers: list[_Buffer] = []
        self._last: Event | None = None
        self._lock = threading.Lock()

    @classmethod
    def on(cls, device: torch.device) -> Staging:
        return cls(Cuda(device) if device.type == "cuda" else None)

    def bring(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the card, in the order they are given, as they lie in memory. One thread at a time; another one waits."""
        link = self._link
        if link is None:
            return {name: tensor.clone() for name, tensor in tensors.items()}
        with self._lock:
            self._buffers = self._buffers or [_Buffer(link.pinned(self._size)) for _ in range(2)]
            made = {name: link.empty_like(tensor) for name, tensor in tensors.items()}
            turn = 0
            for name, tensor in tensors.items():
                source, target = _bytes(tensor), _bytes(made[name])
                for start in range(0, len(source), self._size):
                    some = source[start : start + self._size]
                    buffer = self._buffers[turn % 2]
                    turn += 1
                    if buffer.read is not None:
                        buffer.read.synchronize()
                    buffer.memory[: len(some)].copy_(some)
                    link.copy(target[start : start + len(some)], buffer.memory[: len(some)])
                    buffer.read = self._last = link.mark()
        return made

    def join(self) -> None:
        """What the card is told from now on comes after all that was brought."""
        if self._link is not None and self._last is not None:
            self._link.join(self._last)


def _bytes(tensor: Tensor) -> Tensor:
    """All of a tensor's memory, without gaps, in the order in which it lies there."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)

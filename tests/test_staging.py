"""Weights on their way to a card, on a link that does what it was told as late as it may."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flux_engine.staging import Event, Staging


class Late:
    """A link whose copies are done when somebody waits for them, and not before."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = self.waits = self.copied = self.buffers = 0
        self.order: list[int] = []

    def pinned(self, size: int) -> Tensor:
        self.buffers += 1
        return torch.zeros(size, dtype=torch.uint8)

    def empty_like(self, tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor)
        made.untyped_storage().fill_(7)
        return made

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.order.append(len(target))
        self.copied += len(target)
        self.queue.append(lambda: target.copy_(source))

    def mark(self) -> Event:
        return Point(self, len(self.queue))

    def join(self, event: Any) -> None:
        event.synchronize()


class Point:
    def __init__(self, link: Late, at: int) -> None:
        self.link, self.at = link, at

    def synchronize(self) -> None:
        self.link.waits += 1
        while self.link.done < self.at:
            self.link.queue[self.link.done]()
            self.link.done += 1


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bytes": torch.randint(0, 255, (1000,), generator=generator, dtype=torch.uint8),
        "eight": torch.randint(-127, 127, (60, 70), generator=generator, dtype=torch.int8),
        "float8": torch.randn(33, 17, generator=generator).to(torch.float8_e4m3fn),
        "half": torch.randn(40, 50, generator=generator).bfloat16(),
        "last": torch.randn(8, 6, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 5),
    }


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a.float(), b.float())


@pytest.mark.parametrize("size", [1, 7, 512, 4096, 10**6])
def test_every_byte_arrives_and_no_buffer_is_filled_before_it_was_read(size: int) -> None:
    link = Late()
    staging = Staging(link, size=size)
    for _ in range(2):  # the second time what is in the buffers may still be on its way
        given = tensors()
        made = staging.bring(given)
        staging.join()
        assert all(same(made[name], tensor) for name, tensor in given.items())
    assert link.buffers == 2, "memory is pinned once"
    assert link.copied == 2 * sum(t.numel() * t.element_size() for t in tensors().values())
    assert max(link.order) <= size


def test_the_other_buffer_is_filled_meanwhile() -> None:
    link = Late()
    staging = Staging(link, size=100)
    staging.bring({"x": torch.zeros(200, dtype=torch.uint8)})
    assert link.waits == 0 and link.done == 0, "two copies under way, nobody waited"
    staging.bring({"x": torch.zeros(100, dtype=torch.uint8)})
    assert link.waits == 1 and link.done == 1, "for the first buffer alone"


def test_two_at_once_wait_for_each_other() -> None:
    link, results = Late(), dict[int, dict[str, Tensor]]()
    staging = Staging(link, size=64)

    def bring(number: int) -> None:
        results[number] = staging.bring(tensors())

    threads = [threading.Thread(target=bring, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    staging.join()
    assert all(same(made[name], tensor) for made in results.values() for name, tensor in tensors().items())


def test_without_a_card_tensors_are_copied() -> None:
    staging = Staging.on(torch.device("cpu"))
    given = tensors()
    made = staging.bring(given)
    staging.join()
    assert all(same(made[name], tensor) and made[name] is not tensor for name, tensor in given.items())


@pytest.mark.gpu
def test_on_a_card() -> None:
    staging, given = Staging.on(torch.device("cuda")), tensors()
    for size in (64, 10**6):
        staging._size = size
        staging._buffers = []
        made = staging.bring(given)
        staging.join()
        assert all(same(made[name].cpu(), tensor) for name, tensor in given.items())

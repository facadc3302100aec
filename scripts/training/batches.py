"""What the transformers are shown: noised pictures from the pools on disk, and where their own steps lead."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from benchmarks import captions
from flux_engine.families.flux import image_ids, patchify
from flux_engine.sizes import MEGAPIXELS
from flux_engine.specs import DEMO_DEV
from training import hints
from training.latents import CAPTIONS, LAYOUTS, Pool, Texts, load_pool, load_texts, path_of, sizes
from training.run import log
from training.text import load_text

PURE_NOISE = 0.3
"""Share of the samples that are nothing but noise."""
FREE_BELOW = 0.6
"""Pictures whose objects stand anywhere their words allow are shown below this noise level only: there the picture
itself tells where. Above it a network that had to guess would draw the average, a blot."""
WALKS = 16
"""Batches that are on their way from noise at a time."""


def emphasis(boxes: Tensor, width: int, height: int) -> Tensor:
    """Weight of every image token (B, L): more where the objects are. boxes (B, 2, 4) in pixels."""
    rows, columns = height // 16, width // 16
    boxes = boxes / 16
    margin = 0.05 * min(rows, columns)
    y = torch.arange(rows)[None, None, :, None]
    x = torch.arange(columns)[None, None, None, :]
    left, top, right, bottom = (boxes[..., i, None, None] for i in range(4))
    inside = (x + 1 > left - margin) & (x < right + margin) & (y + 1 > top - margin) & (y < bottom + margin)
    present = boxes[..., 2] > 0
    inside = (inside & present[..., None, None]).any(dim=1)
    weight = 1.0 + 4.0 * inside.float()
    return (weight / weight.mean(dim=(1, 2), keepdim=True)).flatten(1)


def how_often(width: int, height: int) -> float:
    """Weight of a picture size among those of its class: the fewer tokens a shape has, the more each has to know of
    it, steeply; and what people get who ask for no size counts sixteen times."""
    asked_for = DEMO_DEV.sizes.named("1:1")
    return min(width, height) ** -6 * (16.0 if (width, height) == asked_for else 1.0)


def noise_level(rng: random.Random, pure: float = PURE_NOISE) -> float:
    """Often pure noise, where the caption alone decides what is drawn; else anywhere, more of it near noise."""
    if rng.random() < pure:
        return 1.0
    return 1 - rng.random() ** 1.5


@dataclass
class Batch:
    """Noised latents of one picture size, with what the network is told and what it should have known."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    tokens: Tensor
    pooled: Tensor
    positions: Tensor
    captioned: Tensor
    settled: Tensor
    """(B,): whether the caption, if it is followed, leaves one picture only."""
    guidance: Tensor
    """(B,): guidance scale."""
    size: tuple[int, int]
    """(width, height) of the pictures."""
    weight: Tensor
    answers: hints.Answers

    @property
    def mixed(self) -> Tensor:
        t = self.t[:, None, None]
        return (1 - t) * self.x0 + t * self.noise

    def velocity(self, x: Tensor) -> Tensor:
        """From x in a straight line away from the picture."""
        return (x - self.x0) / self.t[:, None, None]


@dataclass(eq=False)
class Walk:
    """A batch on its way from noise to pictures, along the network's own steps."""

    batch: Batch
    x: Tensor
    times: Sequence[float]
    """Noise levels it stops at, from 1 to 0."""
    taken: int = 0

    def go(self, velocity: Tensor) -> bool:
        """Take a step; whether there is another one."""
        now, then = self.times[self.taken], self.times[self.taken + 1]
        self.taken += 1
        self.x = self.x - (now - then) * velocity.detach()
        self.batch = replace(self.batch, t=torch.full_like(self.batch.t, then))
        # What the network chose to draw where much is open need not be what the picture shows.
        self.x = torch.where(self.batch.settled[:, None, None], self.x, self.batch.mixed)
        return then > 0


def evenly(steps: int) -> list[float]:
    """The times of a walk in steps of one length."""
    return [1 - i / steps for i in range(steps)] + [0.0]


class Walks:
    """Several walks at a time. Whichever is taken is trained on where it stands, and goes on from there, so that a
    network learns to mend what its own steps before missed, which pictures with noise never show it.

    They are not kept with a run's checkpoint: one that was stopped begins them anew.
    """

    def __init__(self, source: Source, plans: Sequence[Sequence[float]], thin: float = 0.0) -> None:
        """`plans` are the times of the walks there are to be."""
        self.source, self.plans, self.thin = source, plans, thin
        self.under_way: list[Walk] = []

    def take(self, rng: random.Random) -> Walk:
        if len(self.under_way) < WALKS:
            batch = self.source.draw(rng, lambda _: 1.0, thin=self.thin)
            (times,) = rng.choices(self.plans, [1 / len(plan) for plan in self.plans])  # as many visits to each kind
            self.under_way.append(Walk(batch, batch.noise, times))
        return self.under_way[rng.randrange(len(self.under_way))]

    def go(self, walk: Walk, velocity: Tensor) -> None:
        if not walk.go(velocity):
            self.under_way.remove(walk)


Encode = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Captions -> tokens (B, L, D), pooled (B, P)."""


class Source:
    """Draws batches of `count` from the pools on disk: one size a batch, of the large class in `large` of the cases.

    The captions are those on disk, or with `encode` written and encoded anew for every batch."""

    def __init__(
        self,
        count: int,
        large: float,
        uncaptioned: float = 0.0,
        guidance: Callable[[random.Random], float] = lambda _: 1.0,
        vae: str = "vae",
        encode: Encode | None = None,
    ) -> None:
        self.count, self.large, self.uncaptioned, self.guidance = count, large, uncaptioned, guidance
        self.encode = encode
        with torch.no_grad():
            self.nothing, self.nothing_pooled = (encode or load_text())([""])
        self.pools = {
            (layout, megapixels): [
                (pool, None if encode else load_texts(layout, size), hints.Asked(pool))
                for size in dict.fromkeys(sizes(megapixels))
                if path_of(layout, size, "latents" if encode else "texts", vae).exists()
                for pool in [load_pool(layout, size, vae)]
            ]
            for layout, megapixels in product(LAYOUTS, MEGAPIXELS)
        }
        for (layout, megapixels), pools in self.pools.items():
            counts = {f"{pool.width}x{pool.height}": len(pool.scenes) for pool, _, _ in pools}
            log.info("%s, megapixels %s: %s", layout, megapixels, counts)

    def draw(
        self, rng: random.Random, level: Callable[[random.Random], float], *, free: float = 0.0, thin: float = 0.0
    ) -> Batch:
        """A batch, with objects anywhere in `free` of the cases. In the share `thin` of the cases half of the image
        tokens are left out of a picture of the large class: neighbours tell nearly the same, so a step learns nearly as
        much for half the work (arXiv 2306.09305).
        """
        large, anywhere = rng.random() < self.large, rng.random() < free
        layout, megapixels = "free" if anywhere else "middle", MEGAPIXELS[0 if large else 1]
        pools = self.pools[layout, megapixels]
        if not pools:
            raise SystemExit(f"no {layout} pictures at megapixels {megapixels}: first run latents, then captions")
        (pool, texts, asked), *_ = rng.choices(pools, [how_often(pool.width, pool.height) for pool, _, _ in pools])
        picks = [rng.randrange(len(pool.scenes)) for _ in range(self.count)]
        tokens, pooled = self._words(pool, texts, picks, rng)
        captioned = torch.tensor([rng.random() >= self.uncaptioned for _ in picks])
        colored = torch.tensor([all(thing.color for thing in pool.scenes[pick].things) for pick in picks])
        guidance = torch.tensor([self.guidance(rng) for _ in picks])
        t = torch.tensor([FREE_BELOW * rng.random() if anywhere else level(rng) for _ in picks]).clamp(min=1e-3)
        x0 = patchify(pool.latents[picks].float())
        count = x0.shape[1]
        kept = torch.arange(count)
        if large and rng.random() < thin:
            kept = torch.randperm(count)[: count // 2].sort().values
        x0 = x0[:, kept]
        return Batch(
            x0=x0,
            noise=torch.randn_like(x0),
            t=t,
            tokens=torch.where(captioned[:, None, None], tokens, self.nothing),
            pooled=torch.where(captioned[:, None], pooled, self.nothing_pooled),
            positions=image_ids(pool.height // 16, pool.width // 16)[kept],
            captioned=captioned,
            settled=captioned & colored & (guidance >= 1),
            guidance=guidance,
            size=(pool.width, pool.height),
            weight=emphasis(pool.boxes[picks], pool.width, pool.height)[:, kept],
            answers=asked.answers(picks).at(kept),
        )

    def _words(self, pool: Pool, texts: Texts | None, picks: list[int], rng: random.Random) -> tuple[Tensor, Tensor]:
        if self.encode:
            with torch.no_grad():
                return self.encode([captions.write(pool.scenes[pick], rng) for pick in picks])
        assert texts is not None
        which = [rng.randrange(CAPTIONS) for _ in picks]
        return texts.tokens[picks, which].float(), texts.pooled[picks, which].float()

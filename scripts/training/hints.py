"""What image tokens are asked while a transformer learns, so that it learns to draw in steps it can find.

To put an edge in the right place a token has to know where it is, where the object is, how large, of which shape, and
only then what covers it. FLUX tells tokens no more than how they stand to one another, and a loss on the velocity
alone finds these steps late: of every picture only the edges depend on them. So after the double blocks each token
has to tell the facts, and after the second single block what covers its cells. The two heads are thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import world
from benchmarks.world import Ground, Thing
from training.latents import CELL, Pool

CELLS = 16 // CELL
"""Cells of the coverage maps along the side of an image token."""
COVERS = 3 * CELLS**2
SHAPES = (*world.SHAPES, world.MARKED_SHAPE)

WHERE = slice(0, 2)
"""Facts: the token's place in the picture (y, x) in [-1, 1],"""
TOWARDS = slice(2, 6)
"""the way to the centre of each object, (x, y) over half the shorter side, flattened far away,"""
PER_THING = 1 + 1 + len(SHAPES) + 3 + 1 + 3
"""for each object whether it is there, its radius, shape, colour, whether it has an outline, the outline's colour,"""
PER_GROUND = len(world.GROUNDS) + 3 + 3 + len(world.AXES)
"""and the background's kind, two colours and axis."""
FACTS = 6 + 2 * PER_THING + PER_GROUND

WEIGHTS = {"where": 1.0, "towards": 4.0, "said": 0.3, "cover": 30.0}


class Heads(nn.Module):
    """The two read-outs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.facts = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, FACTS))
        self.cover = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, COVERS))


@dataclass
class Answers:
    """What the tokens should tell."""

    facts: Tensor
    """(B, L, FACTS)."""
    known: Tensor
    """(B, 1, FACTS): 1 for a fact that the picture or the caption has, 0 for one that there is not."""
    cover: Tensor
    """(B, L, COVERS), in [0, 1]."""

    def at(self, kept: Tensor) -> Answers:
        """For these tokens only."""
        return Answers(self.facts[:, kept], self.known, self.cover[:, kept])

    def losses(self, facts: Tensor, cover: Tensor, captioned: Tensor) -> dict[str, Tensor]:
        """Squared error of every part, (B,) each. Without a caption only a token's place can be told."""
        missed = (facts - self.facts) ** 2 * self.known
        share = self.known.mean(dim=(1, 2))
        return {
            "where": missed[..., WHERE].mean(dim=(1, 2)),
            "towards": missed[..., TOWARDS].mean(dim=(1, 2)) * captioned,
            "said": missed[..., TOWARDS.stop :].mean(dim=(1, 2)) / share * captioned,
            "cover": ((cover - self.cover) ** 2).mean(dim=(1, 2)) * captioned,
        }


def color_of(name: str) -> list[float]:
    """RGB in [-1, 1]; zeros for none."""
    return [value / 127.5 - 1 for value in world.COLORS[name]] if name else [0.0, 0.0, 0.0]


def thing_facts(thing: Thing | None, radius: float) -> tuple[list[float], list[float]]:
    """The facts of an object, and which of them there are."""
    if thing is None:
        return [0.0] * PER_THING, [1.0] + [0.0] * (PER_THING - 1)
    shape = [float(thing.shape == name) for name in SHAPES]
    facts = [1.0, 4 * radius, *shape, *color_of(thing.color), float(bool(thing.outline)), *color_of(thing.outline)]
    colored, outlined = float(bool(thing.color)), float(bool(thing.outline))
    return facts, [1.0, 1.0, *[1.0] * len(SHAPES), *[colored] * 3, 1.0, *[outlined] * 3]


def ground_facts(ground: Ground) -> tuple[list[float], list[float]]:
    """The facts of a background, and which of them there are."""
    kinds = [float(ground.kind == name) for name in world.GROUNDS]
    axes = [float(ground.axis == name) for name in world.AXES]
    varied = float(ground.kind != "plain")
    facts = [*kinds, *color_of(ground.color or "white"), *color_of(ground.second), *axes]
    return facts, [1.0] * (len(kinds) + 3) + [varied] * (3 + len(axes))


class Asked:
    """The answers for the pictures of one pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.short = min(pool.width, pool.height)
        self.rows, self.columns = pool.height // 16, pool.width // 16
        self.centers = (pool.boxes[..., :2] + pool.boxes[..., 2:]) / 2  # (N, 2, (x, y)), pixels
        self.present = pool.boxes[..., 2] > 0
        radii = (pool.boxes[..., 2] - pool.boxes[..., 0]) / 2 / self.short
        rows: list[tuple[list[float], ...]] = []
        for scene, radius in zip(pool.scenes, radii.tolist(), strict=True):
            things = [*scene.things, None][:2]
            parts = [thing_facts(thing, r) for thing, r in zip(things, radius, strict=True)]
            parts.append(ground_facts(scene.ground))
            rows.append(tuple([value for part in parts for value in part[side]] for side in (0, 1)))
        self.said = torch.tensor([facts for facts, _ in rows])
        self.there = torch.tensor([known for _, known in rows])

    def answers(self, picks: list[int]) -> Answers:
        """For these pictures."""
        count = self.rows * self.columns
        y, x = torch.meshgrid(torch.arange(self.rows) + 0.5, torch.arange(self.columns) + 0.5, indexing="ij")
        where = torch.stack((y / self.rows * 2 - 1, x / self.columns * 2 - 1), dim=-1).reshape(1, count, 2)
        tokens = torch.stack((x, y), dim=-1).reshape(1, count, 1, 2) * 16
        towards = torch.tanh(2 * (self.centers[picks][:, None] - tokens) / (self.short / 2))
        said = self.said[picks][:, None].expand(-1, count, -1)
        here = self.present[picks].float().repeat_interleave(2, dim=1)
        known = torch.cat((torch.ones(len(picks), 2), here, self.there[picks]), dim=1)[:, None]
        facts = torch.cat((where.expand(len(picks), -1, -1), towards.flatten(2), said), dim=2)
        return Answers(facts, known, self._cover(picks))

    def _cover(self, picks: list[int]) -> Tensor:
        maps = self.pool.coverage[picks].float() / 255  # (B, 3, H / CELL, W / CELL)
        cells = maps.unflatten(2, (self.rows, CELLS)).unflatten(4, (self.columns, CELLS))
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

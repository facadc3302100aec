"""What image tokens are asked while a transformer learns, so that it learns to draw in steps it can find.

To put an edge in the right place a token has to know where it is, where the object is, how large, of which shape, and
only then what covers it. FLUX tells tokens no more than how they stand to one another, and a loss on the velocity
alone finds these steps late: of every picture only the edges depend on them. So after the double blocks each token
has to tell the facts, after the first single block how far its cells are from the outlines of the objects, which is
piecewise linear in the facts and so what a layer finds soonest, and after the second that again and what covers the
cells. The heads are thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import world
from benchmarks.world import Ground, Thing
from training.latents import CELL, Pool

CELLS = 16 // CELL
"""Cells of the coverage maps along the side of an image token."""
COVERS = 3 * CELLS**2
EDGES = 2 * CELLS**2
EDGE = 12.0
"""Pixels from an outline at which the answer to how far it is has gone three quarters of its way to flat."""
REACH, GRID = 4.0, 257
"""The tables of distances cover [-REACH, REACH] radii with GRID points a side."""
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

WEIGHTS = {"where": 1.0, "towards": 4.0, "said": 0.3, "edges": 10.0, "cover": 30.0}


class Heads(nn.Module):
    """The read-outs, in the order of the depth they are at."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        facts, edges, drawn = widths
        self.facts = nn.Sequential(nn.LayerNorm(facts), nn.Linear(facts, FACTS))
        self.edges = nn.Sequential(nn.LayerNorm(edges), nn.Linear(edges, EDGES))
        self.drawn = nn.Sequential(nn.LayerNorm(drawn), nn.Linear(drawn, EDGES + COVERS))


@dataclass
class Answers:
    """What the tokens should tell."""

    facts: Tensor
    """(B, L, FACTS)."""
    known: Tensor
    """(B, 1, FACTS): 1 for a fact that the picture or the caption has, 0 for one that there is not."""
    edges: Tensor
    """(B, L, EDGES): tanh of a cell's signed distance to each object's outline over EDGE."""
    outlined: Tensor
    """(B, 1, EDGES): 1 for an object that there is."""
    cover: Tensor
    """(B, L, COVERS), in [0, 1]."""

    def at(self, kept: Tensor) -> Answers:
        """For these tokens only."""
        return replace(self, facts=self.facts[:, kept], edges=self.edges[:, kept], cover=self.cover[:, kept])

    def losses(self, facts: Tensor, edges: Tensor, drawn: Tensor, captioned: Tensor) -> dict[str, Tensor]:
        """Squared error of every part, (B,) each. Without a caption only a token's place can be told."""
        again, cover = drawn.split((EDGES, COVERS), dim=-1)
        strayed = ((edges - self.edges) ** 2 + (again - self.edges) ** 2) / 2 * self.outlined
        missed = (facts - self.facts) ** 2 * self.known
        share = self.known.mean(dim=(1, 2))
        return {
            "where": missed[..., WHERE].mean(dim=(1, 2)),
            "towards": missed[..., TOWARDS].mean(dim=(1, 2)) * captioned,
            "said": missed[..., TOWARDS.stop :].mean(dim=(1, 2)) / share * captioned,
            "edges": strayed.mean(dim=(1, 2)) * captioned,
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


@cache
def distances(shape: str) -> Tensor:
    """Signed distance to a shape's outline, in radii, negative inside: (GRID, GRID), rows are y."""
    axis = torch.linspace(-REACH, REACH, GRID)
    y, x = (value[..., None] for value in torch.meshgrid(axis, axis, indexing="ij"))
    start = torch.tensor(world.outline(shape, 0, 0, 1))
    end = start.roll(-1, 0)
    side = end - start
    away = torch.cat((x, y), dim=-1)[:, :, None] - start  # (GRID, GRID, sides, 2)
    share = ((away * side).sum(-1) / (side**2).sum(-1).clamp(min=1e-9)).clamp(0, 1)
    distance = (away - share[..., None] * side).norm(dim=-1).amin(-1)
    crossed = (start[:, 1] > y) != (end[:, 1] > y)
    crossing = start[:, 0] + (y - start[:, 1]) * side[:, 0] / side[:, 1]  # where a side is level it is not crossed
    inside = (crossed & (x < crossing)).sum(-1) % 2 == 1
    return torch.where(inside, -distance, distance)


class Asked:
    """The answers for the pictures of one pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.short = min(pool.width, pool.height)
        self.rows, self.columns = pool.height // 16, pool.width // 16
        self.centers = (pool.boxes[..., :2] + pool.boxes[..., 2:]) / 2  # (N, 2, (x, y)), pixels
        self.present = pool.boxes[..., 2] > 0
        self.radii = (pool.boxes[..., 2] - pool.boxes[..., 0]) / 2  # (N, 2), pixels
        self.distances = torch.stack([distances(shape) for shape in SHAPES])
        self.shapes = torch.tensor(
            [[SHAPES.index(thing.shape) for thing in (*scene.things, *scene.things)[:2]] for scene in pool.scenes]
        )
        rows: list[tuple[list[float], ...]] = []
        for scene, radius in zip(pool.scenes, (self.radii / self.short).tolist(), strict=True):
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
        outlined = self.present[picks].float().repeat_interleave(CELLS**2, dim=1)[:, None]
        return Answers(facts, known, self._edges(picks), outlined, self._cover(picks))

    def _edges(self, picks: list[int]) -> Tensor:
        y, x = torch.meshgrid(
            (torch.arange(self.rows * CELLS) + 0.5) * CELL, (torch.arange(self.columns * CELLS) + 0.5) * CELL,
            indexing="ij",
        )  # fmt: skip
        cells = torch.stack((x, y), dim=-1).flatten(0, 1)
        radii = self.radii[picks].clamp(min=1).flatten()[:, None, None]
        away = (cells - self.centers[picks].flatten(0, 1)[:, None]) / radii  # (2 B, cells, (x, y)), radii
        tables = self.distances[self.shapes[picks].flatten()][:, None]
        found = functional.grid_sample(tables, away[:, None] / REACH, padding_mode="border", align_corners=True)
        maps = torch.tanh(found.flatten(1) * radii[..., 0] / EDGE).view(len(picks), 2, self.rows * CELLS, -1)
        return self._by_token(maps)

    def _cover(self, picks: list[int]) -> Tensor:
        return self._by_token(self.pool.coverage[picks].float() / 255)

    def _by_token(self, maps: Tensor) -> Tensor:
        """(B, n, H / CELL, W / CELL) -> (B, L, n CELLS CELLS)."""
        cells = maps.unflatten(2, (self.rows, CELLS)).unflatten(4, (self.columns, CELLS))
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

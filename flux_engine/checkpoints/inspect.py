"""What is in a weight file: its parts, their dtypes, what they lack, what belongs to none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flux_engine.checkpoints.detect import NAMES, Kind, Part, parts_of, what_is
from flux_engine.checkpoints.load import differences
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError
from flux_engine.models.flux import Flux
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import FluxParams, VAEParams

NETWORKS: Mapping[Kind, Callable[[Mapping[str, tuple[int, ...]]], nn.Module]] = {
    "flux": lambda shapes: Flux(FluxParams.from_shapes(shapes)),
    "vae": lambda shapes: AutoEncoder(VAEParams.from_shapes(shapes)),
}
"""The network that a part's own shapes ask for, where it is one of ours."""
PIECE = 2**22
"""Numbers looked at at a time."""


def inspect(path: Path, *, values: bool = False) -> dict[str, Any]:
    """What a file or folder holds, as plain data. With `values` every number is read, and tensors with any that is not
    finite are named.

    Raises WeightsError for what cannot be read at all.
    """
    with WeightSource.open(path) as source:
        parts = parts_of(source)
        taken = {stored for part in parts for stored in source.recipes if stored.startswith(part.prefix)}
        report: dict[str, Any] = {
            "path": str(path),
            "what": what_is(source),
            "bytes": sum(file.bytes for file in source.files),
            "tensors": len(source.recipes),
            "metadata": source.metadata,
            "parts": [_part(source, part) for part in parts],
            "rest": [name for name in source.recipes if name not in taken],
        }
        if values:
            report["not finite"] = [name for name in source.recipes if not _finite(source, name)]
        return report


def tensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Every tensor's dtype and shape, by its name in the file."""
    with WeightSource.open(path) as source:
        return {n: (str(r.dtype).removeprefix("torch."), list(r.shape)) for n, r in source.recipes.items()}


def _part(source: WeightSource, part: Part) -> dict[str, Any]:
    inside = part.of(source)
    shapes = inside.shapes
    report: dict[str, Any] = {
        "what": NAMES[part.kind],
        "layout": part.layout,
        "prefix": part.prefix,
        "tensors": len(shapes),
        "parameters": sum(prod(shape) for shape in shapes.values()),
        "dtypes": dict(Counter(str(r.dtype).removeprefix("torch.") for r in inside.recipes.values()).most_common()),
    }
    if part.kind in NETWORKS:
        report |= _lacks(inside, NETWORKS[part.kind])
    return report


def _lacks(source: WeightSource, make: Callable[[Mapping[str, tuple[int, ...]]], nn.Module]) -> dict[str, Any]:
    try:
        with torch.device("meta"):
            wanted = make(source.shapes).state_dict()
    except (WeightsError, ValueError, ZeroDivisionError) as error:
        return {"problem": str(error)}
    found: dict[str, Any] = dict(differences(source, {name: tuple(tensor.shape) for name, tensor in wanted.items()}))
    return found


def _finite(source: WeightSource, name: str) -> bool:
    recipe = source.recipes[name]
    if not recipe.dtype.is_floating_point or 0 in recipe.shape:
        return True
    rows = recipe.shape[0] if recipe.shape else 1
    step = max(1, PIECE // max(1, prod(recipe.shape[1:])))
    return all(
        bool(source.rows(name, start, min(start + step, rows), dtype=torch.float32).isfinite().all())
        for start in range(0, rows, step)
    )

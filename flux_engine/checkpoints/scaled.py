"""Weights of 8 bits as other tools store them, with scales beside them: read as the numbers they stand for.

Source: ComfyUI, comfy/ops.py and comfy/quant_ops.py; aredden/flux-fp8-api, float8_quantize.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor

from flux_engine.checkpoints.source import Recipe, WeightSource
from flux_engine.errors import WeightsError

VALUES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
SCALES = ("scale_weight", "weight_scale")
"""ComfyUI's name for the scale of `X.weight`, and its newer one: numbers are values times it."""
DATA = "float8_data"
"""What flux-fp8-api has beside an empty `X.weight`: numbers are values over `scale`."""
IDLE = ("scale_input", "input_scale", "input_scale_reciprocal", "comfy_quant", "scaled_fp8")
"""What is of no use: activations have scales of their own here."""
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")


def unscaled(source: WeightSource) -> WeightSource:
    """The same tensors without scales beside them, those of 8 bits as recipes that multiply them.

    Raises WeightsError for a scale that is none, or numbers in another format.
    """
    recipes = dict(source.recipes)
    for name in source.recipes:
        stem, _, leaf = name.rpartition(".")
        if leaf == DATA:
            scale = 1 / _scale(source, f"{stem}.scale", recipes[name])
            recipes[f"{stem}.weight"] = _times(recipes.pop(name), scale)
            for idle in ("scale", "scale_reciprocal"):
                recipes.pop(f"{stem}.{idle}", None)
        elif leaf in SCALES and f"{stem}.weight" in source.recipes:
            weight = source.recipes[f"{stem}.weight"]
            if weight.dtype not in VALUES:
                raise WeightsError(f"{source.path}: {name} is the scale of numbers in {weight.dtype}, not in 8 bits")
            recipes[f"{stem}.weight"] = _times(weight, _scale(source, name, weight))
            del recipes[name]
        elif leaf == "comfy_quant":
            _check_format(source, name)
    kept = {name: recipe for name, recipe in recipes.items() if name.rpartition(".")[2] not in IDLE}
    return source if kept.keys() == source.recipes.keys() else replace(source, recipes=kept)


def _times(recipe: Recipe, scale: Tensor) -> Recipe:
    pieces = tuple(replace(piece, scale=scale) for piece in recipe.pieces)
    return replace(recipe, pieces=pieces, dtype=torch.float32)


def _scale(source: WeightSource, name: str, values: Recipe) -> Tensor:
    """One number, or one for each row."""
    if name not in source.recipes:
        raise WeightsError(f"{source.path} has no {name!r}, without which {values.stored} says nothing")
    rows = values.shape[0] if values.shape else 1
    shape = source.recipes[name].shape
    if shape not in ((), (1,), (rows,), (rows, 1)) or not source.recipes[name].dtype.is_floating_point:
        raise WeightsError(f"{source.path}: {name} of shape {list(shape)} is no scale of {rows} rows")
    scale = source.rows(name, dtype=torch.float32).reshape(-1)
    if not (scale.isfinite() & (scale > 0)).all():
        raise WeightsError(f"{source.path}: {name} is not a positive number")
    return scale


def _check_format(source: WeightSource, name: str) -> None:
    try:
        said = json.loads(bytes(source.rows(name).reshape(-1).tolist()))["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{source.path}: {name} does not say a format: {error!r}") from None
    if said not in FORMATS:
        raise WeightsError(f"{source.path}: {name} says {said!r}; read here are {', '.join(FORMATS)}")

"""What is in a weight file: its parts, their dtypes, what they lack, what belongs to none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flux_engine.checkpoints.detect import NAMES, Kind, Part, parts_of, what_is
from flux_engine.checkpoints.load import differences
from flux_engine.checkpoints.quantized import SCALE, Saved
from flux_engine.checkpoints.source import WeightSource
from flux_engine.checkpoints.tables import published_clip
from flux_engine.errors import WeightsError
from flux_engine.models.flux import Flux
from flux_engine.models.flux_controlnet import FluxControlNet
from flux_engine.models.redux import ReduxAdapter
from flux_engine.models.unet import UNet
from flux_engine.models.unet_controlnet import UNetControlNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import (
    FluxControlNetParams,
    FluxParams,
    ReduxParams,
    UNetControlNetParams,
    UNetParams,
    VAEParams,
    count_of,
)

Shapes = Mapping[str, tuple[int, ...]]


def _clip(shapes: Shapes) -> Shapes:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    layers = "text_model.encoder.layers."
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    projected = "text_projection.weight" in shapes
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes[f"{layers}0.mlp.fc1.weight"][0],
        num_hidden_layers=count_of(shapes, layers),
        num_attention_heads=1,  # no shape tells
        max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
        projection_dim=shapes["text_projection.weight"][0] if projected else width,
    )
    made = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).state_dict()
    return {published_clip(name): tuple(tensor.shape) for name, tensor in made.items()}


def _t5(shapes: Shapes) -> Shapes:
    from transformers import T5Config, T5EncoderModel

    block = "encoder.block.0.layer."
    buckets, heads = shapes[f"{block}0.SelfAttention.relative_attention_bias.weight"]
    config = T5Config(
        vocab_size=shapes["shared.weight"][0],
        d_model=shapes["shared.weight"][1],
        d_kv=shapes[f"{block}0.SelfAttention.q.weight"][0] // heads,
        d_ff=shapes[f"{block}1.DenseReluDense.wo.weight"][1],
        num_layers=count_of(shapes, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if f"{block}1.DenseReluDense.wi_0.weight" in shapes else "relu",
    )
    made = T5EncoderModel(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in made.items() if name != "encoder.embed_tokens.weight"}


def _siglip(shapes: Shapes) -> Shapes:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    width, channels, patch = shapes["embeddings.patch_embedding.weight"][:3]
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=count_of(shapes, "encoder.layers."),
        num_attention_heads=1,  # no shape tells
        num_channels=channels,
        image_size=patch * isqrt(shapes["embeddings.position_embedding.weight"][0]),
        patch_size=patch,
        vision_use_head=False,
    )
    made = SiglipVisionModel(config).state_dict()
    return {name.removeprefix("vision_model."): tuple(tensor.shape) for name, tensor in made.items()}


def _own(network: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


WANTED: Mapping[Kind, Callable[[Shapes], Shapes]] = {
    "flux": lambda shapes: _own(Flux(FluxParams.from_shapes(shapes))),
    "flux_controlnet": lambda shapes: _own(FluxControlNet(FluxControlNetParams.from_shapes(shapes))),
    "unet": lambda shapes: _own(UNet(UNetParams.from_shapes(shapes))),
    "unet_controlnet": lambda shapes: _own(UNetControlNet(UNetControlNetParams.from_shapes(shapes))),
    "vae": lambda shapes: _own(AutoEncoder(VAEParams.from_shapes(shapes))),
    "clip": _clip,
    "t5": _t5,
    "redux": lambda shapes: _own(ReduxAdapter(ReduxParams.from_shapes(shapes))),
    "siglip": _siglip,
}
"""What a network of the kind that a part's own shapes ask for would have."""
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
    saved = Saved.of(source)
    report |= {"scheme": saved.scheme, "source": saved.source} if saved else {}
    scales = {f"{name}{SCALE}": shapes[f"{name}.weight"][:1] for name in saved.linears} if saved else {}
    return report | _lacks(inside, lambda shapes: {**WANTED[part.kind](shapes), **scales})


def _lacks(source: WeightSource, wanted_of: Callable[[Shapes], Shapes]) -> dict[str, Any]:
    try:
        with torch.device("meta"):
            wanted = wanted_of(source.shapes)
    except KeyError as error:
        return {"problem": f"no tensor {error}: this is not the network it seems to be"}
    except (WeightsError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        return {"problem": str(error)}
    found: dict[str, Any] = dict(differences(source, wanted))
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

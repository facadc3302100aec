"""Put a model together from its files, of whatever family it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from flux_engine.families.flux import FluxFamily
from flux_engine.families.sdxl import SDXLFamily
from flux_engine.specs import FluxSpec, ModelSpec, SDXLSpec


def load_family(
    spec: ModelSpec,
    files: Mapping[str, Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    evict: bool = False,
    embedding_cache: int,
) -> FluxFamily | SDXLFamily:
    """Read every part from its file.

    Raises WeightsError if a file does not hold what the spec or the file itself promises.
    """
    family = {FluxSpec: FluxFamily, SDXLSpec: SDXLFamily}[type(spec)]
    return family.load(
        spec,
        files,
        dtype=dtype,
        device=device,
        quantization=quantization,
        evict=evict,
        embedding_cache=embedding_cache,
    )

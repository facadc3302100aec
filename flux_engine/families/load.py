"""Put a model together from its files, of whatever family it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from flux_engine.families import flux, sdxl
from flux_engine.families.flux import FluxFamily
from flux_engine.families.sdxl import SDXLFamily
from flux_engine.memory import Place
from flux_engine.specs import FluxSpec, ModelSpec, SDXLSpec

Spec = TypeVar("Spec", bound=ModelSpec)


def sized(spec: ModelSpec, files: Mapping[str, Path]) -> ModelSpec:
    """The spec with the widths and depths that the checkpoint of its network has. Raises WeightsError if that is not
    what the spec promises."""
    if isinstance(spec, FluxSpec):
        return flux.sized(spec, files["transformer"])
    assert isinstance(spec, SDXLSpec)
    return sdxl.sized(spec, files["unet"])


def load_family(
    spec: ModelSpec, files: Mapping[str, Path], place: Place, *, embedding_cache: int
) -> FluxFamily | SDXLFamily:
    """Read every part from its file. `spec` is `sized`.

    Raises WeightsError if a file does not hold what the spec or the file itself promises.
    """
    family = {FluxSpec: FluxFamily, SDXLSpec: SDXLFamily}[type(spec)]
    return family.load(spec, files, place, embedding_cache=embedding_cache)

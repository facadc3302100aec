"""The published schemas by name. Names, order, defaults and limits are the hosted models'; descriptions are ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flux_engine.errors import UnknownSchema, did_you_mean
from flux_engine.replicate.flux import (
    FLUX_CANNY_DEV,
    FLUX_DEPTH_DEV,
    FLUX_DEV,
    FLUX_DEV_LORA,
    FLUX_FILL_DEV,
    FLUX_FINETUNE,
    FLUX_KONTEXT_DEV,
    FLUX_KREA_DEV,
    FLUX_REDUX_DEV,
    FLUX_REDUX_SCHNELL,
    FLUX_SCHNELL,
    FLUX_SCHNELL_LORA,
)
from flux_engine.replicate.schema import Schema
from flux_engine.replicate.sdxl import SDXL, SDXL_CONTROLNET, SDXL_MULTI_CONTROLNET

SCHEMAS: Mapping[str, Schema] = MappingProxyType(
    {
        schema.name: schema
        for schema in (
            FLUX_SCHNELL,
            FLUX_DEV,
            FLUX_KREA_DEV,
            FLUX_SCHNELL_LORA,
            FLUX_DEV_LORA,
            FLUX_FINETUNE,
            FLUX_FILL_DEV,
            FLUX_CANNY_DEV,
            FLUX_DEPTH_DEV,
            FLUX_REDUX_DEV,
            FLUX_REDUX_SCHNELL,
            FLUX_KONTEXT_DEV,
            SDXL,
            SDXL_CONTROLNET,
            SDXL_MULTI_CONTROLNET,
        )
    }
)


def find_schema(name: str) -> Schema:
    """A declared schema by name. Raises UnknownSchema with the known ones."""
    if name in SCHEMAS:
        return SCHEMAS[name]
    raise UnknownSchema(f"no schema {name!r}{did_you_mean(name, SCHEMAS)} Known: {', '.join(SCHEMAS)}")

"""The published schemas by name. Names, order, defaults and limits are the hosted models'; descriptions are ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flux_engine import hub
from flux_engine.errors import UnknownSchema, did_you_mean
from flux_engine.replicate.dated import DATE, DATED
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
from flux_engine.replicate.sdxl import (
    SDXL,
    SDXL_CONTROLNET,
    SDXL_LCM,
    SDXL_LIGHTNING_4STEP,
    SDXL_MULTI_CONTROLNET_LORA,
    SDXL_TURBO,
)

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
            SDXL_LIGHTNING_4STEP,
            SDXL_TURBO,
            SDXL_LCM,
            SDXL_CONTROLNET,
            SDXL_MULTI_CONTROLNET_LORA,
        )
    }
)


AS_OF: Mapping[str, Schema] = MappingProxyType({schema.name: schema for schema in DATED})
"""Some of them as they were at a date, as NAME@2025-01."""


def find_schema(name: str) -> Schema:
    """A declared schema by name. Raises UnknownSchema with the known ones."""
    if not isinstance(name, str):  # a caller's slip that Python lets pass
        raise UnknownSchema(f"a schema is named by a text, not by {name!r}")
    found = SCHEMAS.get(name) or AS_OF.get(name)
    if found is not None:
        return found
    known = f"Known: {', '.join(SCHEMAS)}"
    plain, at, date = name.partition("@")
    if at and plain in SCHEMAS:
        listed = ", ".join(AS_OF) if date == DATE else f"the only date is {DATE}"
        raise UnknownSchema(f"no schema {name!r}: of dated ones there are {listed}")
    if name in hub.manifests():
        raise UnknownSchema(f"{name!r} is a model and no schema: name a schema, and it as its model. {known}")
    raise UnknownSchema(f"no schema {name!r}{did_you_mean(name, SCHEMAS)} {known}")

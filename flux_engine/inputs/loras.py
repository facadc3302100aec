"""LoRAs as they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite

from flux_engine.errors import InvalidRequest

MAX_SCALE = 1_000


@dataclass(frozen=True)
class LoRA:
    """A LoRA and how strongly it counts: 1 as it was trained, 0 not at all, below that the other way."""

    path: str | os.PathLike[str]
    """Of a file; or as a text OWNER/NAME or OWNER/NAME/FILE on the Hugging Face hub, a CivitAI page or download link, a
    model on Replicate, an address of a .safetensors or .tar, a data URI (references.py)."""
    scale: float = 1.0
    mode: str | None = "auto"
    """What it sets for requests: a name of `lora.modes.MODES`, as "lcm" or "lightning-8"; None for nothing; "auto" is
    told by the file's name."""


def checked_loras(loras: object) -> tuple[LoRA, ...]:
    """Each as a LoRA; nothing is looked for yet. Raises InvalidRequest for what is none, or a scale that is none."""
    if isinstance(loras, str | bytes | os.PathLike | LoRA | Mapping) or not isinstance(loras, Iterable):
        raise InvalidRequest(f"loras are a list of paths or LoRA(path, scale), not {loras!r}", field="loras")
    checked: list[LoRA] = []
    for each in loras:
        lora = each if isinstance(each, LoRA) else LoRA(each)
        if not isinstance(lora.path, str | os.PathLike) or not str(lora.path) or "\0" in str(lora.path):
            raise InvalidRequest(f"a LoRA is named by the path of its file, not by {lora.path!r}", field="loras")
        scale = lora.scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not isfinite(scale):
            raise InvalidRequest(f"the scale of a LoRA is a number, not {scale!r}", field="loras")
        if abs(scale) > MAX_SCALE:
            raise InvalidRequest(f"the scale of a LoRA is at most {MAX_SCALE:,}, not {scale:g}", field="loras")
        checked.append(lora)
    return tuple(checked)

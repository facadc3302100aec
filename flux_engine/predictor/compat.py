"""`compat="published"`: what the published predictors do by mistake or by habit, and clients may count on.

| published | without compat |
| --- | --- |
| FLUX.1: `seed` 0 draws a seed (cog-flux, Kontext) | 0 is a seed |
| a seed that is drawn has 16 bits | 32 bits |
| FLUX.1 img2img begins at step int((1 - strength) * steps), 1 of 10 at 0.8 | int(steps - steps * strength), 2 |
| FLUX.1 with `go_fast`: the first LoRA counts 1.5 times its scale | as it says |
| no picture is left but control pictures: these are the answer | an error, as without control pictures |

Everything else that the published predictors do is the default: sizes and their rounding, names of files, quality,
what is ignored. What they do wrong and nobody can count on (a mask left out crashes, custom sizes left out crash, a
seed that draws another img2img each time) is not reproduced. Sources: replicate/cog-flux, replicate/cog-sdxl,
replicate/cog-flux-kontext.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from flux_engine.inputs.loras import LoRA
from flux_engine.replicate.schema import Schema
from flux_engine.request import Request
from flux_engine.specs import FluxSpec, ModelSpec

Compat = Literal["published"]
FAST_LORA = 1.5
"""What the published FLUX.1 predictors multiply the first LoRA by in 8 bits."""
MARGIN = 1e-6
"""Of a step: keeps a number that was whole from being rounded to the one below."""


def seed_of(asked: int | None, schema: Schema, spec: ModelSpec, compat: Compat | None) -> int:
    """The seed of a prediction: the one that was asked for, or one that is drawn."""
    drawn = asked is None or (schema.seeds_from_one and asked <= 0)
    if compat and asked == 0 and isinstance(spec, FluxSpec):
        drawn = True
    if not drawn:
        assert asked is not None
        return asked
    return secrets.randbits(16 if compat else 32)


def as_published(request: Request, spec: ModelSpec) -> Request:
    """A request that begins at the step at which the published predictors begin."""
    strength = request.strength
    if not isinstance(spec, FluxSpec) or strength is None or request.image is None or spec.reads != "nothing":
        return request
    steps = request.num_inference_steps or spec.num_inference_steps
    begin = int((1 - strength) * steps)
    return replace(request, strength=min(1.0, max(0.0, (steps - begin - MARGIN) / steps)) if begin else 1.0)


def scaled_as_published(loras: Sequence[LoRA], request: Request, spec: ModelSpec) -> list[LoRA]:
    """The first counts more in 8 bits."""
    if not loras or not isinstance(spec, FluxSpec) or not request.go_fast:
        return list(loras)
    return [replace(loras[0], scale=loras[0].scale * FAST_LORA), *loras[1:]]

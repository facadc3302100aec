"""Requests that stand for all others: what an engine does for them is all that it ever does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from PIL import Image

from flux_engine.inputs.control import Control
from flux_engine.request import Request
from flux_engine.specs import ModelSpec, SDXLSpec


def examples(spec: ModelSpec) -> list[Request]:
    """Small ones with one row and with several, and one for each ControlNet and the refiner of a model."""
    sizes = spec.sizes
    side = -(-2 * sizes.min_side // sizes.multiple) * sizes.multiple
    plain = Request(prompt="", seed=0, width=side, height=side + sizes.multiple, num_inference_steps=1)
    if not spec.guidance_embedded and spec.guidance_scale is not None:
        plain = replace(plain, guidance_scale=1.0)
    picture = Image.new("RGB", (side, side + sizes.multiple), "gray")
    wanted = _wanted(spec, picture)
    found = [replace(plain, **wanted)]
    found.append(replace(found[0], num_outputs=2))
    for net in spec.controlnets:
        control = Control(kind=next(iter(net.kinds)), image=picture, preprocess=False)
        found += [replace(one, control=[*wanted.get("control", []), control]) for one in found[:2]]
    if isinstance(spec, SDXLSpec) and spec.refiner is not None:
        found += [replace(one, refine="expert_ensemble_refiner", num_inference_steps=4) for one in found[:2]]
    return found


def _wanted(spec: ModelSpec, picture: Image.Image) -> dict[str, Any]:
    """What a request has to bring for a network that reads more than the latent."""
    if spec.reads == "fill":
        return {"image": picture, "mask": Image.new("L", picture.size, 255)}
    if spec.reads == "structure":
        return {"control": [Control(kind=spec.structure, image=picture, preprocess=False)]}
    return {"image": picture} if spec.reads == "reference" else {}

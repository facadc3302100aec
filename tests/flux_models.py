"""Small FLUX models with random weights that read a picture, on the demo's text encoders and autoencoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import randomise
from diffusers import AutoencoderKL, FluxTransformer2DModel

from flux_engine.engine import Engine
from flux_engine.families.flux import FluxFamily
from flux_engine.models.flux import Flux
from flux_engine.specs import DEMO_DEV, FLUX_CANNY, FLUX_FILL, FLUX_KONTEXT, FluxSpec

BASES = {"fill": FLUX_FILL, "structure": FLUX_CANNY, "reference": FLUX_KONTEXT}


def spec_of(reads: str) -> FluxSpec:
    """As the published model, in the demo's widths and sizes."""
    base = BASES[reads]
    sizes = replace(base.sizes, divisor=4, min_side=32, max_side=512, max_pixels=512 * 512)
    params = replace(DEMO_DEV.transformer, in_channels=base.transformer.in_channels)
    told = {"max_sequence_length": DEMO_DEV.max_sequence_length, "num_inference_steps": 4, "guidance_scale": 3.5}
    parts = {"transformer": params, "vae": DEMO_DEV.vae, "encoders": DEMO_DEV.encoders}
    return replace(base, name=f"small-{reads}", sizes=sizes, **parts, **told)


def engine_of(reads: str, demo: Engine) -> Engine:
    """The same weights for the same kind."""
    spec = spec_of(reads)
    torch.manual_seed(0)
    net = Flux(spec.transformer)
    randomise(net, 1)
    with torch.no_grad():
        net.img_in.weight.mul_(3)  # what is read beside the latent matters
    family = demo._pipeline.family
    return Engine(FluxFamily(spec, net, family.vae, family.text))


def their_pipeline(kind: Any, engine: Engine, folder: Path) -> Any:
    """diffusers' pipeline of a class, on the same weights through our export; its autoencoder takes the mean."""
    engine.export(folder)
    parts = {
        "transformer": FluxTransformer2DModel.from_pretrained(folder / "transformer"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
    }
    pipe = kind.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe

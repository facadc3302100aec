"""Where a model's weights go: a plan for what is to be loaded, made before any of it is; and what a job adds to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flux_engine import hardware
from flux_engine.checkpoints.source import WeightSource
from flux_engine.config import EngineConfig
from flux_engine.errors import OutOfMemory
from flux_engine.footprint import DTYPES, Extent
from flux_engine.memory import Place, Residents
from flux_engine.plan import Plan, plan
from flux_engine.request import Job
from flux_engine.specs import ModelSpec

HOST_SHARE = 0.8
"""Of the host's free memory, for what waits there."""


@dataclass(frozen=True)
class Placing:
    """How a model is loaded."""

    place: Place
    schemes: tuple[str, ...]
    """Of its network; the second one for requests that want full precision."""
    plan: Plan | None


def decide(
    spec: ModelSpec,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    saved: str | None = None,
    beside: Sequence[Path] = (),
) -> Placing:
    """For a model whose spec is `sized`, with the files of what is loaded beside it. `saved` is the scheme of a model
    that is of 8 bits already.

    Raises OutOfMemory if nothing fits, and names what would; or UnsupportedError for a scheme that the device cannot
    run.
    """
    both = config.quantization == "both"
    scheme = saved or hardware.pick_quantization(config.quantization, device)
    schemes = (scheme, "none") if both else (scheme,)
    if config.memory in ("resident", "evict"):
        residents = Residents(evict=config.memory == "evict")
        return Placing(_place(dtype, device, schemes, residents), schemes, None)
    precisions = [scheme]
    if config.quantization == "auto" and saved is None:  # where full precision has no room, int8 may
        precisions += [other for other in ("int8",) if other != scheme]
    item = 1.1 if scheme != "none" else DTYPES[str(dtype).removeprefix("torch.")]
    try:
        made = plan(
            spec,
            hardware.card_of(device),
            precisions=precisions,
            dtype=str(dtype).removeprefix("torch."),
            memory=config.bytes_of_memory(),
            host_memory=int(HOST_SHARE * hardware.free_memory()),
            both=both,
            beside=int(item * sum(map(_numbers, beside))),
        )
    except OutOfMemory as error:
        if config.memory != "auto":
            raise
        raise OutOfMemory(f"{error}. memory='resident' tries it all the same") from None
    residents = Residents(made, strict=config.memory != "auto")
    return Placing(_place(dtype, device, made.schemes, residents), made.schemes, made)


def _place(dtype: torch.dtype, device: torch.device, schemes: tuple[str, ...], residents: Residents) -> Place:
    """Both precisions share the text encoders, which are then in full precision, so that nothing of it is lost."""
    encoders = "none" if "none" in schemes else None
    return Place(dtype, device, schemes[0], encoders, residents)


def extent_of(job: Job) -> Extent:
    """How large a job is."""
    reference, downscale = job.inputs.reference, job.spec.vae.downscale
    return Extent(
        width=job.width,
        height=job.height,
        pictures=len(job.seeds),
        rows=1 if job.true_cfg_scale == 1.0 else 2,
        steps=job.num_inference_steps,
        reference=0 if reference is None else reference.width * reference.height // (2 * downscale) ** 2,
        controlnets=len(job.inputs.controls),
        kept=job.step_cache.kept if job.step_cache else 0,
    )


def _numbers(file: Path) -> int:
    """How many are in a file."""
    with WeightSource.open(file) as source:
        return sum(math.prod(shape) for shape in source.shapes.values())

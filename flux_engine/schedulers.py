"""Schedules as plain numbers, and the step that walks them.

A schedule is made once per request on the host, so that the loop never waits for the device to know a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from flux_engine.specs import FlowSchedule


@dataclass(frozen=True)
class FlowMatchEuler:
    """Euler's method on the flow dx/dt = v, from t = 1 (noise) to t = 0 (picture).

    Source: flow matching (arXiv 2210.02747), as sampled in black-forest-labs/flux, src/flux/sampling.py.
    """

    sigmas: tuple[float, ...]
    """Falling from 1 to 0, one more than there are network calls."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Time of every network call, in [0, 1]."""
        return self.sigmas[:-1]

    def step(self, velocity: Tensor, call: int, x: Tensor) -> Tensor:
        """The latent after call number `call`. Latents are float32 whatever the network computes in."""
        return x + (self.sigmas[call + 1] - self.sigmas[call]) * velocity.float()


def flow_match_euler(params: FlowSchedule, num_inference_steps: int, image_tokens: int) -> FlowMatchEuler:
    """Evenly spaced times, shifted towards noise the more image tokens there are, where the model wants that."""
    times = [1 - i / num_inference_steps for i in range(num_inference_steps + 1)]
    if params.shifted:
        slope = (params.max_shift - params.base_shift) / (params.max_tokens - params.base_tokens)
        mu = params.base_shift + slope * (image_tokens - params.base_tokens)
        times = [math.exp(mu) / (math.exp(mu) + (1 / t - 1)) if t > 0 else 0.0 for t in times]
    return FlowMatchEuler(tuple(times))

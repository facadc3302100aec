"""Schedules as plain numbers, and the step that walks them.

A schedule is made once per request on the host, so that the loop never waits for the device to know a time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from flux_engine.params import DiffusionSchedule, FlowSchedule
from flux_engine.specs import SCHEDULERS


class Schedule(Protocol):
    """What the loop over timesteps asks. Latents x are float32 whatever the network computes in."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the network is told at every call. There may be more calls than steps were asked for."""
        ...

    @property
    def times(self) -> tuple[float, ...]:
        """The same in [0, 1], 1 for noise: for callbacks."""
        ...

    def from_noise(self, noise: Tensor) -> Tensor:
        """Standard normal noise as the first latent."""
        ...

    def at(self, latent: Tensor, noise: Tensor, call: int) -> Tensor:
        """A latent with as much noise as there is before call number `call`; after the last call there is none."""
        ...

    def input(self, x: Tensor, call: int) -> Tensor:
        """x as the network reads it."""
        ...

    def step(self, prediction: Tensor, call: int, x: Tensor) -> Tensor:
        """The latent after call number `call`."""
        ...

    def foreseen(self, prediction: Tensor, call: int, x: Tensor) -> Tensor:
        """The latent with all noise taken away that the network predicts."""
        ...


@dataclass(frozen=True)
class FlowMatchEuler:
    """Euler's method on the flow dx/dt = v, from t = 1 (noise) to t = 0 (picture).

    Source: flow matching (arXiv 2210.02747), as sampled in black-forest-labs/flux, src/flux/sampling.py.
    """

    sigmas: tuple[float, ...]
    """Falling to 0, one more than there are network calls."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Time of every network call, in [0, 1]."""
        return self.sigmas[:-1]

    @property
    def times(self) -> tuple[float, ...]:
        return self.timesteps

    def from_noise(self, noise: Tensor) -> Tensor:
        return noise

    def at(self, latent: Tensor, noise: Tensor, call: int) -> Tensor:
        sigma = self.sigmas[call]
        return sigma * noise + (1 - sigma) * latent

    def input(self, x: Tensor, call: int) -> Tensor:
        return x

    def step(self, prediction: Tensor, call: int, x: Tensor) -> Tensor:
        return x + (self.sigmas[call + 1] - self.sigmas[call]) * prediction.float()

    def foreseen(self, prediction: Tensor, call: int, x: Tensor) -> Tensor:
        return x - self.sigmas[call] * prediction.float()


def flow_match_euler(
    params: FlowSchedule, num_inference_steps: int, image_tokens: int, strength: float = 1.0
) -> FlowMatchEuler:
    """Evenly spaced times, shifted towards noise the more image tokens there are, where the model wants that; of them
    the last `strength`, as diffusers counts them."""
    times = [1 - i / num_inference_steps for i in range(num_inference_steps + 1)]
    if params.shifted:
        slope = (params.max_shift - params.base_shift) / (params.max_tokens - params.base_tokens)
        mu = params.base_shift + slope * (image_tokens - params.base_tokens)
        times = [math.exp(mu) / (math.exp(mu) + (1 / t - 1)) if t > 0 else 0.0 for t in times]
    return FlowMatchEuler(tuple(times[int(num_inference_steps - num_inference_steps * strength) :]))


def scheduler_config(params: DiffusionSchedule, name: str) -> dict[str, Any]:
    """What diffusers' scheduler of this published name is made from: as SDXL's repository has it, and what the name
    says besides."""
    scheduler = SCHEDULERS[name]
    return {
        "_class_name": scheduler.kind,
        "beta_start": params.beta_start,
        "beta_end": params.beta_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": params.num_train_timesteps,
        "prediction_type": params.prediction_type,
        "timestep_spacing": params.timestep_spacing,
        "steps_offset": 1 if params.timestep_spacing == "leading" else 0,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
        **scheduler.changes,
    }


def scheduler_name(config: Mapping[str, Any]) -> str | None:
    """The published name of what a scheduler_config.json describes; None if it has none."""
    named = [
        name
        for name, scheduler in SCHEDULERS.items()
        if config.get("_class_name") == scheduler.kind
        and all(config.get(key) == value for key, value in scheduler.changes.items())
    ]
    return max(named, key=lambda name: len(SCHEDULERS[name].changes), default=None)


class Diffusers:
    """One of diffusers' schedulers, set for one request or for its part of one.

    `generators` are the pictures' own, for what a scheduler draws on the way.
    """

    def __init__(
        self,
        params: DiffusionSchedule,
        name: str,
        num_inference_steps: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        import diffusers  # seconds, which a FLUX request need not wait

        config = scheduler_config(params, name)
        kind: Any = getattr(diffusers, config["_class_name"])
        known = inspect.signature(kind).parameters  # it warns of what it does not know
        self._scheduler: Any = kind(**{key: value for key, value in config.items() if key in known})
        self._scheduler.set_timesteps(num_inference_steps, device="cpu")
        self._begin = 0
        self._end = len(self._scheduler.timesteps)
        self._options = {"generator": list(generators)} if SCHEDULERS[name].draws else {}
        self._params = params
        self._start(0)

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(self._scheduler.timesteps[self._begin : self._end].tolist())

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(t / self._params.num_train_timesteps for t in self.timesteps)

    def _timestep(self, fraction: float) -> int:
        """The timestep after which `fraction` of the noise levels have gone by."""
        return round(self._params.num_train_timesteps * (1 - fraction))

    def stop_at(self, fraction: float) -> None:
        """Leave the rest to another model: its timesteps lie below `fraction` of the way."""
        self._end = self._begin + sum(t >= self._timestep(fraction) for t in self.timesteps)

    def start_at(self, fraction: float) -> None:
        """Go on from where `stop_at` of the same fraction ended."""
        left = sum(t < self._timestep(fraction) for t in self._scheduler.timesteps.tolist())
        if self._scheduler.order == 2 and left % 2 == 0 and left:
            left += 1  # Heun visits all but the first timestep twice: not to begin between the two
        self._start(max(self._begin, len(self._scheduler.timesteps) - left))

    def start_with(self, strength: float) -> None:
        """Walk the last `strength` of the steps only."""
        steps = self._scheduler.num_inference_steps
        walked = min(int(steps * strength), steps)
        # PNDM has one call more than steps, which is not to be left over where there is no step.
        self._start((steps - walked) * self._scheduler.order if walked else self._end)

    def _start(self, index: int) -> None:
        self._begin = min(index, self._end)
        if hasattr(self._scheduler, "set_begin_index"):  # DDIM and PNDM go by the timestep alone
            self._scheduler.set_begin_index(self._begin)

    def from_noise(self, noise: Tensor) -> Tensor:
        return noise * float(self._scheduler.init_noise_sigma)

    def at(self, latent: Tensor, noise: Tensor, call: int) -> Tensor:
        here = self._begin + call
        if here >= len(self._scheduler.timesteps):
            return latent.expand_as(noise).contiguous()
        return self._scheduler.add_noise(latent, noise, self._scheduler.timesteps[here : here + 1].to(latent.device))

    def input(self, x: Tensor, call: int) -> Tensor:
        return self._scheduler.scale_model_input(x, self._scheduler.timesteps[self._begin + call])

    def step(self, prediction: Tensor, call: int, x: Tensor) -> Tensor:
        t = self._scheduler.timesteps[self._begin + call]
        return self._scheduler.step(prediction.float(), t, x, return_dict=False, **self._options)[0]

    def foreseen(self, prediction: Tensor, call: int, x: Tensor) -> Tensor:
        sigma = sigma_at(self._params, self.timesteps[call])
        length = math.sqrt(1 + sigma**2)
        scaled = self.input(x, call)  # signal and noise have length 1 in what the network reads
        if self._params.prediction_type == "v_prediction":
            return (scaled - sigma * prediction.float()) / length
        return scaled * length - sigma * prediction.float()


@cache
def log_sigmas(params: DiffusionSchedule) -> tuple[float, ...]:
    """Logarithm of noise over signal at every discrete timestep."""
    roots = torch.linspace(params.beta_start**0.5, params.beta_end**0.5, params.num_train_timesteps).double()
    kept = torch.cumprod(1 - roots**2, dim=0)
    return tuple((((1 - kept) / kept).log() / 2).tolist())


def sigma_at(params: DiffusionSchedule, timestep: float) -> float:
    """Noise over signal at a discrete timestep, or between two."""
    low = min(int(timestep), params.num_train_timesteps - 2)
    a, b = log_sigmas(params)[low : low + 2]
    return math.exp(a + (timestep - low) * (b - a))

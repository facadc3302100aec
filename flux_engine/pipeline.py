"""The request path: text, schedule, statics, loop, decode. The only loop over timesteps in the library."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flux_engine import images
from flux_engine.errors import InvalidRequest, RequestCancelled
from flux_engine.families import FluxFamily
from flux_engine.request import Job
from flux_engine.text import TextCond


@dataclass(frozen=True)
class Step:
    """What a callback sees after every network call."""

    index: int
    """Number of calls done, from 1."""
    total: int
    timestep: float
    """Time of this call, in [0, 1]."""
    latent: Tensor = field(repr=False)
    """The picture the network foresees (B, C, h, w), float32: the latent with all noise taken away."""
    _preview: Callable[[Tensor], list[Image.Image]] = field(repr=False)

    def preview(self) -> list[Image.Image]:
        """Small pictures of `latent`, one pixel per latent position. Costs nothing unless called."""
        return self._preview(self.latent)


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Output:
    """Pictures as tensors (3, H, W) in about [-1, 1], or latents (C, h, w); and the path's account of itself."""

    pictures: list[Tensor]
    timings: dict[str, float]
    notes: list[str]


class Pipeline:
    """Runs jobs on one model. Keeps nothing of a request but the text encoder's cache."""

    def __init__(self, family: FluxFamily) -> None:
        self.family = family

    @torch.inference_mode()
    def run(
        self,
        job: Job,
        *,
        on_step: OnStep | None = None,
        cancel: threading.Event | None = None,
    ) -> Output:
        """Make the pictures of a job. Raises RequestCancelled at the next step once `cancel` is set."""
        family = self.family
        clock = _Clock()
        check_cancelled(cancel)

        with clock("encode"):
            text, rows, notes = self._encode(job)
            schedule = family.schedule(job)
            statics = family.statics(job, text, rows, schedule)

        with clock("denoise"):
            h, w = job.latent_size
            x = family.to_tokens(family.noise(job.seeds, h, w))  # float32
            guided = job.true_cfg_scale != 1.0
            for call, t in enumerate(schedule.timesteps):
                check_cancelled(cancel)
                if guided:
                    negative, positive = family.net(torch.cat((x, x)), call, statics).float().chunk(2)
                    velocity = negative + job.true_cfg_scale * (positive - negative)
                else:
                    velocity = family.net(x, call, statics)
                foreseen = x - t * velocity.float() if on_step else x
                x = schedule.step(velocity, call, x)
                if on_step:
                    latent = family.to_latent(foreseen, h, w)
                    on_step(Step(call + 1, len(schedule.timesteps), t, latent, self.preview))
            latent = family.to_latent(x, h, w)

        with clock("decode"):
            if job.output_type == "latent":
                pictures = list(latent.cpu())
            else:
                # One at a time: decoding is the peak of memory, and a picture's bits must not depend on its batch.
                pictures = []
                for one in latent.split(1):
                    check_cancelled(cancel)
                    pictures.append(family.vae.decode(one)[0].float().cpu())
        return Output(pictures, clock.seconds, notes)

    def _encode(self, job: Job) -> tuple[TextCond, list[int], list[str]]:
        """Every prompt once, which of them each row of the batch uses, and what was cut.

        Where the job has guidance, a negative row for each picture comes before the positive ones.
        """
        prompts = list(job.prompts)
        if job.true_cfg_scale != 1.0:
            prompts = [job.negative_prompt] * len(prompts) + prompts
        unique = list(dict.fromkeys(prompts))
        encoder = self.family.text
        limit = encoder.max_sequence_length
        notes = [
            f"prompt cut to {limit} tokens, the last {over} are not read: {prompt[:40]!r}..."
            for prompt in unique
            if (over := encoder.tokens_over(prompt))
        ]
        if job.strict and notes:
            raise InvalidRequest("strict: " + "; ".join(notes), field="prompt")
        return encoder.encode(unique), [unique.index(prompt) for prompt in prompts], notes

    @cached_property
    def _latent_rgb(self) -> tuple[Tensor, Tensor]:
        return self.family.latent_rgb()

    def preview(self, latent: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) to small pictures (h, w), by the linear map that fits this autoencoder."""
        weight, bias = self._latent_rgb
        rgb = torch.einsum("bchw,cr->brhw", latent.float(), weight) + bias[:, None, None]
        return [images.to_pil(one) for one in rgb]


def check_cancelled(cancel: threading.Event | None) -> None:
    """Raise RequestCancelled if the event is set."""
    if cancel is not None and cancel.is_set():
        raise RequestCancelled("the request was cancelled")


class _Clock:
    """Seconds per stage. On a GPU a stage ends where its results are needed, so the last one carries the wait."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Any]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - began

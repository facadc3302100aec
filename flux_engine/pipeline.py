"""The request path: stages, text, statics, loop, decode. The only loop over timesteps in the library."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flux_engine import images
from flux_engine.conditions import build_condition, pasted_back
from flux_engine.errors import NumericalError, RequestCancelled
from flux_engine.families.base import Family, Stage, Walk, calls_between, notes_of_idle
from flux_engine.footprint import work_of
from flux_engine.network import Network
from flux_engine.placing import extent_of
from flux_engine.request import Job
from flux_engine.stepcache import Predictor, note_of, predictor_of


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
Watch = Callable[[int, Tensor], None]
"""Told of a call's number within its stage, and what the network foresees."""


@dataclass(frozen=True)
class Output:
    """Pictures as tensors (3, H, W) in about [-1, 1], or latents (C, h, w); and the path's account of itself."""

    pictures: list[Tensor]
    timings: dict[str, float]
    notes: list[str]
    maps: tuple[Image.Image, ...] = ()
    """The control pictures, as the networks read them."""
    moved: int = 0
    """Bytes of weights that came to the device."""
    skipped: tuple[tuple[int, ...], ...] = ()
    """For each picture the calls, from 1, at which a step cache left out some of the network."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance on one walk."""

    scale: float
    calls: range
    """At which there is any."""


@dataclass(frozen=True)
class _Made:
    latent: Tensor
    notes: list[str]
    maps: tuple[Image.Image, ...]
    skipped: list[list[int]]


class Pipeline:
    """Runs jobs on one model. Keeps nothing of a request but the text encoder's cache."""

    def __init__(self, family: Family[Any]) -> None:
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
        clock = _Clock()
        check_cancelled(cancel)
        family = self.family
        with family.residents.request(self._work(job)):
            made = self._latent(job, clock, on_step, cancel)
            with clock("decode"):
                if job.output_type == "latent":
                    pictures = list(made.latent.cpu())
                    self._check_finite(made.latent)
                else:
                    # One at a time: decoding is the peak of memory, and a picture's bits must not depend on its batch.
                    pictures = []
                    with family.residents.use("vae"):
                        for one in made.latent.split(1):
                            check_cancelled(cancel)
                            pictures.append(pasted_back(self._decode(one, made.notes), job.inputs))
        skipped = tuple(map(tuple, made.skipped))
        return Output(pictures, clock.seconds, made.notes, made.maps, family.residents.moved, skipped)

    def _work(self, job: Job) -> Mapping[str, int]:
        """Bytes that each stage of a job takes beside the weights."""
        family = self.family
        return work_of(family.spec, _name(family.net.dtype), family.quantization != "none", extent_of(job))

    def _latent(self, job: Job, clock: _Clock, on_step: OnStep | None, cancel: threading.Event | None) -> _Made:
        """All but the pictures. What was computed on the way is gone when it returns."""
        h, w = job.latent_size
        with clock("encode"):
            condition = build_condition(job, self.family)
            stages = self.family.stages(job, condition)
            encoded = [stage.family.encode(job, stage.condition) for stage in stages]
            statics = [stage.family.statics(job, read, stage) for stage, read in zip(stages, encoded, strict=True)]
            guides = [stage.family.guides(job, read, stage) for stage, read in zip(stages, encoded, strict=True)]
            notes = list(dict.fromkeys(note for read in encoded for note in read.notes)) + notes_of_idle(guides[0])

        with clock("denoise"):
            total = sum(len(stage.schedule.timesteps) for stage in stages)
            guided = _guided_calls(job, total)
            skipped: list[list[int]] = [[] for _ in job.seeds]
            walk: Walk | None = None
            done = 0
            for stage, fixed, guiding in zip(stages, statics, guides, strict=True):
                count = len(stage.schedule.timesteps)
                watch = on_step and self._watching(on_step, stage, done, total, h, w)
                predict = predictor_of(job.step_cache, len(job.seeds), count)
                guidance = Guidance(job.true_cfg_scale, range(guided.start - done, guided.stop - done))
                network = Network(stage, fixed, guiding)
                with stage.family.residents.use(stage.family.network_part):
                    walk = self._denoise(network, predict, guidance, stage.begin(walk), watch, cancel)
                for calls, new in zip(skipped, predict.skipped, strict=True):
                    calls += [done + call + 1 for call in new]
                done += count
            assert walk is not None
            notes += _notes_of_shortcuts(job, guided, skipped, total)
            return _Made(self.family.to_latent(walk.x, h, w), notes, condition.maps, skipped)

    def _denoise(
        self,
        network: Network,
        predict: Predictor,
        guidance: Guidance,
        walk: Walk,
        watch: Watch | None,
        cancel: threading.Event | None,
    ) -> Walk:
        """Walk the timesteps of a stage. `network` is for all rows: where there is guidance, a negative row for each
        picture first."""
        stage, schedule, x = network.stage, network.stage.schedule, walk.x
        positive_rows = network.of(slice(len(x), None)) if guidance.scale != 1.0 else network
        for call in range(len(schedule.timesteps)):
            check_cancelled(cancel)
            seen = schedule.input(x, call)
            if call in guidance.calls:
                negative, positive = predict(network, torch.cat((seen, seen)), call).float().chunk(2)
                prediction = negative + guidance.scale * (positive - negative)
            else:
                prediction = predict(positive_rows, seen, call)
            foreseen = schedule.foreseen(prediction, call, x) if watch else x
            x = schedule.step(prediction, call, x)
            if stage.known:
                x = stage.known.put_back(x, walk.noise, schedule, call + 1)
            if watch:
                watch(call, foreseen)
        return Walk(x, walk.noise)

    def _watching(self, on_step: OnStep, stage: Stage, done: int, total: int, h: int, w: int) -> Watch:
        times = stage.schedule.times

        def watch(call: int, foreseen: Tensor) -> None:
            latent = self.family.to_latent(foreseen, h, w)
            on_step(Step(done + call + 1, total, times[call], latent, self.preview))

        return watch

    def _decode(self, latent: Tensor, notes: list[str]) -> Tensor:
        """One latent (1, C, h, w) -> picture (3, H, W), never one that is not finite."""
        vae = self.family.vae
        by_rows = self.family.residents.by_rows
        picture = vae.decode(latent, by_rows=by_rows)[0].float().cpu()
        if picture.isfinite().all():
            return picture
        self._check_finite(latent)
        picture = copy.deepcopy(vae).float().decode(latent, by_rows=by_rows)[0].cpu()
        if not picture.isfinite().all():
            raise NumericalError("the autoencoder makes no finite picture of the latent, even in float32")
        note = f"decoded in float32: the autoencoder ran over in {_name(vae.dtype)}"
        if note not in notes:
            notes.append(note)
        return picture

    def _check_finite(self, latent: Tensor) -> None:
        """Raises NumericalError for a latent that is not."""
        if latent.isfinite().all():
            return
        dtype = self.family.net.dtype
        wider = {torch.float16: "dtype='bfloat16' or 'float32'", torch.bfloat16: "dtype='float32'"}.get(dtype)
        remedy = f"Load the model with {wider}" if wider else "Its weights may be damaged: try others, or less guidance"
        raise NumericalError(
            f"the network's own numbers ran over in {_name(dtype)}: the latent is not finite. {remedy}"
        )

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


def _guided_calls(job: Job, total: int) -> range:
    """The calls at which there is classifier-free guidance."""
    if job.true_cfg_scale == 1.0:
        return range(0)
    return calls_between(*job.guidance_interval, total) if job.guidance_interval else range(total)


def _notes_of_shortcuts(job: Job, guided: range, skipped: Sequence[Sequence[int]], total: int) -> list[str]:
    """What is to be said of what was left out because the job asks for it."""
    notes: list[str] = []
    if job.guidance_interval:
        start, end = job.guidance_interval
        notes.append(f"guidance_interval {start:g} to {end:g}: {len(guided)} of {total} calls were guided")
    if job.step_cache:
        notes.append(note_of(job.step_cache, skipped, total))
    return notes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Clock:
    """Seconds per stage. On a GPU a stage ends where its results are needed, so the last one carries the wait."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Any]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - began

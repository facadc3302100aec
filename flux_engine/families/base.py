"""The few points where model families differ: what they read of a prompt, what a network is fed, which schedules are
walked, what is precomputed.

Shapes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import InvalidRequest
from flux_engine.hardware import has_bf16
from flux_engine.models.vae import AutoEncoder
from flux_engine.request import Job
from flux_engine.schedulers import Schedule
from flux_engine.specs import ModelSpec
from flux_engine.text.encoders import TextCond

log = logging.getLogger(__name__)

Spec = TypeVar("Spec", bound=ModelSpec)


@dataclass(frozen=True)
class Encoded:
    """A job's prompts for one network."""

    text: TextCond
    """Each prompt once."""
    rows: list[int]
    """Which of them each row of the batch uses; where the job is guided, a negative row for each picture first."""
    notes: list[str]
    """What was cut."""


@dataclass(frozen=True)
class Stage:
    """One walk over timesteps. What one stage leaves is where the next begins."""

    family: Family[Any]
    schedule: Schedule
    begin: Callable[[Tensor | None], Tensor]
    """What the stage before left, None for the first -> where this one begins. float32."""


class Family(ABC, Generic[Spec]):
    """A model, put together: its networks and what the request path needs to know about them."""

    spec: Spec
    net: Any
    vae: AutoEncoder
    text: Any

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Every network by the name of its part."""

    @abstractmethod
    def stages(self, job: Job) -> list[Stage]:
        """The walks that make the pictures of a job."""

    @abstractmethod
    def encode(self, job: Job) -> Encoded:
        """What the network reads of a job's prompts. Raises InvalidRequest if the job is strict and one is too long."""

    @abstractmethod
    def statics(self, job: Job, encoded: Encoded, schedule: Schedule) -> Any:
        """Everything that stays the same over the calls of one stage.

        Prompts are precomputed one by one: a row's bits must not depend on the batch it is in, and a product's rounding
        depends on its size.
        """

    @abstractmethod
    def to_latent(self, x: Tensor, h: int, w: int) -> Tensor:
        """What the loop walks -> latents (B, C, h, w)."""

    publishers_layout: ClassVar[str]
    """What the layout of the publisher's own files is called."""

    @abstractmethod
    def export(self, folder: Path) -> Path:
        """Write a folder as diffusers keeps a model. Raises OutputError."""

    @abstractmethod
    def export_as_published(self, folder: Path) -> Path:
        """Write the publisher's own kind of file, or files. Raises OutputError."""

    def noise(self, generators: Sequence[torch.Generator], h: int, w: int) -> Tensor:
        """Standard normal latents (B, C, h, w), float32, drawn on the CPU from each picture's own generator."""
        channels = self.spec.vae.latent_channels
        rows = [torch.randn((1, channels, h, w), generator=generator) for generator in generators]
        return torch.cat(rows).to(self.net.device)

    def latent_rgb(self) -> tuple[Tensor, Tensor]:
        """A linear map from latent channels to RGB in [-1, 1], for previews: weight (C, 3), bias (3,).

        Fitted to what the autoencoder makes of pictures of coloured blocks, so it suits any autoencoder and needs no
        constants.
        """
        downscale, device = self.spec.vae.downscale, self.net.device
        generator = torch.Generator().manual_seed(0)
        blocks = torch.rand((4, 3, 4, 4), generator=generator) * 2 - 1
        pictures = F.interpolate(blocks, scale_factor=4 * downscale, mode="nearest")
        latent = self.vae.encode(pictures.to(device))
        if not latent.isfinite().all():  # it ran over, as a decoder can
            latent = copy.deepcopy(self.vae).float().encode(pictures.to(device))
        latent = latent.float().cpu().permute(0, 2, 3, 1).flatten(0, 2)
        colors = F.avg_pool2d(pictures, downscale).permute(0, 2, 3, 1).flatten(0, 2)
        inputs = torch.cat((latent, torch.ones(len(latent), 1)), dim=1)
        ridge = 1e-2 * len(inputs) * torch.eye(inputs.shape[1])
        solved = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ colors).to(device)
        return solved[:-1], solved[-1]


def load_vae(spec: ModelSpec, file: Path, *, dtype: torch.dtype, device: torch.device) -> AutoEncoder:
    """The autoencoder, in another dtype where it would overflow in float16."""
    if dtype == torch.float16 and spec.vae.force_upcast:
        dtype = torch.bfloat16 if has_bf16(device) else torch.float32
        log.info("the autoencoder runs in %s: it would run over in float16", str(dtype).removeprefix("torch."))
    with WeightSource.open(file) as source:
        vae = load_module(lambda: AutoEncoder(spec.vae), pick(source, "vae"), dtype=dtype, device=device)
    return channels_last(vae)


def channels_last(network: Any) -> Any:
    """Convolutions run faster on channels last, on CPUs and on tensor cores."""
    return nn.Module.to(network, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def generators_of(job: Job) -> list[torch.Generator]:
    """One for each picture, from which all of its noise comes."""
    return [torch.Generator().manual_seed(seed) for seed in job.seeds]


def encode_each_once(
    job: Job, read: Callable[[list[Any]], TextCond], prompts: list[Any], negative: Any, notes: list[str]
) -> Encoded:
    """Encode what a job reads, every prompt once."""
    if job.true_cfg_scale != 1.0:
        prompts = [negative] * len(prompts) + prompts
    unique = list(dict.fromkeys(prompts))
    return Encoded(read(unique), [unique.index(prompt) for prompt in prompts], notes)


def notes_of_cuts(job: Job, limit: int, over: Callable[[str], int], *, remedy: str = "") -> list[str]:
    """A line for every prompt of which not all will be read: `over` counts the tokens that will not.

    Raises InvalidRequest if the job is strict.
    """
    read = [("prompt", prompt) for prompt in job.prompts]
    if job.true_cfg_scale != 1.0 and job.negative_prompt:
        read.insert(0, ("negative prompt", job.negative_prompt))
    notes = [
        f"{name} cut to {limit} tokens, the last {count} are not read{remedy}: {prompt[:40]!r}..."
        for name, prompt in dict.fromkeys(read)
        if (count := over(prompt))
    ]
    if job.strict and notes:
        raise InvalidRequest("strict: " + "; ".join(notes), field="prompt")
    return notes

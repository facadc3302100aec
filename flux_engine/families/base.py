"""The few points where model families differ: what they read of a prompt, what a network is fed, which schedules are
walked, what is precomputed.

Shapes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.source import opened
from flux_engine.errors import InvalidRequest
from flux_engine.hardware import has_bf16
from flux_engine.memory import Place, Precompute, Residents, load_parts
from flux_engine.models.layers import Residuals, scaled
from flux_engine.models.vae import AutoEncoder
from flux_engine.request import Job
from flux_engine.schedulers import Schedule
from flux_engine.specs import ControlNetSpec, ModelSpec
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
class ControlNet:
    """A ControlNet that was loaded for a model."""

    spec: ControlNetSpec
    net: Any
    precompute: Precompute

    @property
    def kinds(self) -> Collection[str]:
        return self.spec.kinds


@dataclass(frozen=True)
class Hint:
    """A control picture as a ControlNet reads it."""

    controlnet: ControlNet
    embedded: Tensor
    """One row, which every row of the batch shares."""
    mode: int | None
    scale: float
    start: float
    end: float


@dataclass(frozen=True)
class Condition:
    """What a job's pictures give, made before the loop. Every tensor has one row, which the whole batch shares."""

    latent: Tensor | None = None
    """Of the picture to start from (1, C, h, w), float32."""
    mask: Tensor | None = None
    """Of what is repainted (1, 1, h, w), where what is not comes back after every call."""
    channels: Tensor | None = None
    """What the network reads beside the latent (1, N, h, w)."""
    reference: Tensor | None = None
    """Latent of the picture whose tokens it reads behind its own (1, C, h', w')."""
    prompt_tokens: Tensor | None = None
    """What Redux made of pictures (1, L, D)."""
    hints: tuple[Hint, ...] = ()
    maps: tuple[Image, ...] = ()
    """The control pictures, as the preprocessors made them."""


@dataclass(frozen=True)
class Walk:
    """Where a walk stands."""

    x: Tensor
    """float32."""
    noise: Tensor
    """What it began from."""


@dataclass(frozen=True)
class Known:
    """What is kept of a picture, in the shape that the loop walks."""

    latent: Tensor
    mask: Tensor

    def put_back(self, x: Tensor, noise: Tensor, schedule: Schedule, call: int) -> Tensor:
        """x before call number `call`, with what the mask keeps as it would be there."""
        return self.mask * x + (1 - self.mask) * schedule.at(self.latent, noise, call)


@dataclass(frozen=True)
class Stage:
    """One walk over timesteps. What one stage leaves is where the next begins."""

    family: Family[Any]
    schedule: Schedule
    begin: Callable[[Walk | None], Walk]
    """What the stage before left, None for the first -> where this one begins."""
    condition: Condition = field(default_factory=Condition)

    @cached_property
    def known(self) -> Known | None:
        """What comes back after every call."""
        made = self.condition
        if made.latent is None or made.mask is None:
            return None
        mask = made.mask.expand_as(made.latent)
        return Known(self.family.from_latent(made.latent), self.family.from_latent(mask))

    @cached_property
    def _beside(self) -> Tensor | None:
        channels = self.condition.channels
        return None if channels is None else self.family.from_latent(channels)

    @cached_property
    def _behind(self) -> Tensor | None:
        reference = self.condition.reference
        return None if reference is None else self.family.from_latent(reference)

    def feed(self, x: Tensor) -> Tensor:
        """x (B, ...) with what the network reads beside and behind it."""
        for extra, dim in ((self._beside, self.family.channel_dim), (self._behind, 1)):
            if extra is not None:
                x = torch.cat((x, extra.expand(len(x), *extra.shape[1:])), dim=dim)
        return x


@dataclass(frozen=True)
class Guide:
    """A ControlNet on one walk."""

    hint: Hint
    statics: Any
    calls: range
    """At which it counts."""
    spread: Callable[[tuple[Tensor, ...]], Residuals] = tuple
    """What the ControlNet gives -> a slot for each place of the network it steers."""

    def counts(self, call: int) -> bool:
        """Whether it adds anything at a call."""
        return call in self.calls and self.hint.scale != 0

    def residuals(self, x: Tensor, call: int) -> Residuals | None:
        """What it adds inside the network at a call, None for nothing. x (B, ...) without anything beside it."""
        if not self.counts(call):
            return None
        embedded = self.hint.embedded.expand(len(x), *self.hint.embedded.shape[1:])
        given = self.hint.controlnet.net(x, embedded, call, self.statics)
        return scaled(self.spread(given), self.hint.scale)


def calls_between(start: float, end: float, count: int) -> range:
    """The calls of a walk that lie whole within two shares of it."""
    inside = [i for i in range(count) if i / count >= start and (i + 1) / count <= end]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def notes_of_idle(guides: Sequence[Guide]) -> list[str]:
    """What is to be said of ControlNets that count at no call."""
    return [
        f"{guide.hint.controlnet.spec.name} counts at no step: none lies whole between {guide.hint.start:g} and "
        f"{guide.hint.end:g} of them"
        for guide in guides
        if not guide.calls
    ]


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
    def stages(self, job: Job, condition: Condition) -> list[Stage]:
        """The walks that make the pictures of a job."""

    @abstractmethod
    def encode(self, job: Job, condition: Condition) -> Encoded:
        """What the network reads of a job's prompts. Raises InvalidRequest if the job is strict and one is too long."""

    @abstractmethod
    def statics(self, job: Job, encoded: Encoded, stage: Stage) -> Any:
        """Everything that stays the same over the calls of one stage.

        Prompts are precomputed one by one: a row's bits must not depend on the batch it is in, and a product's rounding
        depends on its size.
        """

    @abstractmethod
    def guides(self, job: Job, encoded: Encoded, stage: Stage) -> list[Guide]:
        """The ControlNets of one stage, with what stays the same over its calls."""

    @abstractmethod
    def to_latent(self, x: Tensor, h: int, w: int) -> Tensor:
        """What the loop walks -> latents (B, C, h, w)."""

    @abstractmethod
    def from_latent(self, latent: Tensor) -> Tensor:
        """Latents, or any map of their size (B, N, h, w) -> in the shape of what the loop walks."""

    @abstractmethod
    def fill_channels(self, picture: Tensor, mask: Tensor) -> Tensor:
        """What a network that fills holes reads (1, N, h, w). picture (1, 3, H, W) in [-1, 1]; mask (1, 1, H, W), 1 in
        the hole."""

    @abstractmethod
    def hint_of(self, controlnet: ControlNet, picture: Tensor) -> Tensor:
        """A control picture (1, 3, H, W) in [0, 1] -> one row as the ControlNet reads it."""

    def read_prompts(self, pictures: Sequence[Image]) -> Tensor:
        """Pictures as prompts -> tokens (N, L, D)."""
        raise InvalidRequest(f"image_prompt: {self.spec.name} reads no pictures as prompts", field="image_prompt")

    channel_dim: ClassVar[int]
    """Where the loop's x has its channels."""
    controlnets: tuple[ControlNet, ...]
    precompute: Precompute | None
    """Of its network, which may be put together without."""
    place: Place

    @property
    def quantization(self) -> str:
        """The scheme that was asked for."""
        return self.place.quantization

    @property
    def residents(self) -> Residents:
        """Which parts are on the device."""
        return self.place.residents

    @property
    def network_part(self) -> str:
        """What has to be there for a step."""
        return "network" + self.place.mark

    publishers_layout: ClassVar[str]
    """What the layout of the publisher's own files is called."""

    @abstractmethod
    def export(self, folder: Path) -> Path:
        """Write a folder as diffusers keeps a model. Raises OutputError."""

    @abstractmethod
    def export_as_published(self, folder: Path) -> Path:
        """Write the publisher's own kind of file, or files. Raises OutputError."""

    def with_spec(self, spec: ModelSpec) -> Self:
        """The same with other defaults."""
        return replace(self, spec=spec)  # pyright: ignore[reportArgumentType]

    def with_controlnets(self, found: Sequence[tuple[ControlNetSpec, Path]]) -> Self:
        """The same with ControlNets beside it. Raises WeightsError for one that does not fit."""
        if not found:
            return self
        nets = [self.load_controlnet(spec, path) for spec, path in _each_file_once(found)]
        spec = replace(self.spec, controlnets=tuple(net.spec for net in nets))
        return replace(self, spec=spec, controlnets=tuple(nets))  # pyright: ignore[reportArgumentType]

    @abstractmethod
    def load_controlnet(self, spec: ControlNetSpec, path: Path) -> ControlNet:
        """Read one. Raises WeightsError if it was made for a model of other widths."""

    def latent_of(self, picture: Tensor, beside: int | None = None) -> Tensor:
        """Picture (1, 3, H, W) in [-1, 1] -> latent (1, C, h, w), float32. Where the autoencoder overflows, it is done
        in float32. `beside` is how many bytes that takes, if it is another size than the request's."""
        picture = picture.to(self.net.device)
        with self.residents.use("vae", beside):
            latent = self.vae.encode(picture, by_rows=self.residents.by_rows).float()
            return latent if latent.isfinite().all() else copy.deepcopy(self.vae).float().encode(picture)

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
        latent = self.latent_of(pictures, beside=0).cpu().permute(0, 2, 3, 1).flatten(0, 2)
        colors = F.avg_pool2d(pictures, downscale).permute(0, 2, 3, 1).flatten(0, 2)
        inputs = torch.cat((latent, torch.ones(len(latent), 1)), dim=1)
        ridge = 1e-2 * len(inputs) * torch.eye(inputs.shape[1])
        solved = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ colors).to(device)
        return solved[:-1], solved[-1]


def _each_file_once(found: Sequence[tuple[ControlNetSpec, Path]]) -> list[tuple[ControlNetSpec, Path]]:
    """A network that was named for several kinds answers for all of them."""
    files: dict[Path, ControlNetSpec] = {}
    for spec, path in found:
        kinds = files[path].kinds if path in files else {}
        files[path] = replace(spec, kinds={**kinds, **spec.kinds})
    return [(spec, path) for path, spec in files.items()]


def load_vae(spec: ModelSpec, file: Path, place: Place) -> AutoEncoder:
    """The autoencoder, in another dtype where it would overflow in float16."""
    if place.dtype == torch.float16 and spec.vae.force_upcast:
        place = replace(place, dtype=torch.bfloat16 if has_bf16(place.device) else torch.float32)
        log.info("the autoencoder runs in %s: it would run over in float16", str(place.dtype).removeprefix("torch."))
    with opened(file, keep=place.leaves("vae")) as source:
        parts = {"vae": AutoEncoder.blocks}
        vae = load_parts(lambda: AutoEncoder(spec.vae), pick(source, "vae"), place, parts, channels_last=True)
    return channels_last(vae)


def parts_of(net: type[Any]) -> dict[str, str]:
    """The parts of a network that denoises, for `load_parts`."""
    return {"modulation": net.precomputed, "network": net.blocks}


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

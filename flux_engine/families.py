"""The few points where model families differ: what they read of a prompt, what a network is fed, which schedules are
walked, what is precomputed.

Shapes: B batch, C latent channels, h w latent size, L tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.checkpoints import export
from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.export import Exported
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import InvalidRequest, WeightsError
from flux_engine.hardware import has_bf16
from flux_engine.models.flux import Flux, FluxStatics
from flux_engine.models.unet import UNet, UNetStatics
from flux_engine.models.vae import AutoEncoder
from flux_engine.request import Job
from flux_engine.schedulers import Diffusers, Schedule, flow_match_euler, scheduler_config
from flux_engine.specs import FluxParams, FluxSpec, ModelSpec, SDXLSpec, UNetParams
from flux_engine.text import FluxTextEncoder, TextCond
from flux_engine.text_sdxl import SDXLTextEncoder

Spec = TypeVar("Spec", bound=ModelSpec)


def patchify(latent: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> tokens of 2 x 2 patches (B, h w / 4, 4 C), channel-major within a token."""
    b, c, h, w = latent.shape
    patches = latent.reshape(b, c, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpatchify(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens (B, h w / 4, 4 C) -> latents (B, C, h, w); undoes `patchify`."""
    b, _, width = tokens.shape
    patches = tokens.reshape(b, h // 2, w // 2, width // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, width // 4, h, w)


def image_ids(rows: int, columns: int) -> Tensor:
    """Positions of image tokens (rows columns, 3): index 0, row, column. float32."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(-1, 3)


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
    def encode(self, job: Job) -> Encoded: ...

    @abstractmethod
    def statics(self, job: Job, encoded: Encoded, schedule: Schedule) -> Any:
        """Everything that stays the same over the calls of one stage.

        Prompts are precomputed one by one: a row's bits must not depend on the batch it is in, and a product's rounding
        depends on its size.
        """

    @abstractmethod
    def to_latent(self, x: Tensor, h: int, w: int) -> Tensor:
        """What the loop walks -> latents (B, C, h, w)."""

    @abstractmethod
    def export(self, folder: Path) -> Path:
        """Write a folder as diffusers keeps a model. Raises OutputError."""

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
        latent = self.vae.encode(pictures.to(device)).float().cpu().permute(0, 2, 3, 1).flatten(0, 2)
        colors = F.avg_pool2d(pictures, downscale).permute(0, 2, 3, 1).flatten(0, 2)
        inputs = torch.cat((latent, torch.ones(len(latent), 1)), dim=1)
        ridge = 1e-2 * len(inputs) * torch.eye(inputs.shape[1])
        solved = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ colors).to(device)
        return solved[:-1], solved[-1]


def load_family(
    spec: ModelSpec,
    files: Mapping[str, Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    embedding_cache: int,
) -> FluxFamily | SDXLFamily:
    """Read every part from its file.

    Raises WeightsError if a file does not hold what the spec or the file itself promises.
    """
    family = {FluxSpec: FluxFamily, SDXLSpec: SDXLFamily}[type(spec)]
    return family.load(spec, files, dtype=dtype, device=device, embedding_cache=embedding_cache)


def load_vae(spec: ModelSpec, file: Path, *, dtype: torch.dtype, device: torch.device) -> AutoEncoder:
    """The autoencoder, in another dtype where it would overflow in float16."""
    if dtype == torch.float16 and spec.vae.force_upcast:
        dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    with WeightSource.open(file) as source:
        vae = load_module(lambda: AutoEncoder(spec.vae), pick(source, "vae"), dtype=dtype, device=device)
    return channels_last(vae)


def channels_last(network: Any) -> Any:
    """Convolutions run faster on channels last, on CPUs and on tensor cores."""
    return nn.Module.to(network, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def generators_of(job: Job) -> list[torch.Generator]:
    """One for each picture, from which all of its noise comes."""
    return [torch.Generator().manual_seed(seed) for seed in job.seeds]


def encode_each_once(job: Job, read: Callable[[list[Any]], TextCond], prompts: list[Any], negative: Any) -> Encoded:
    """Encode what a job reads, every prompt once."""
    if job.true_cfg_scale != 1.0:
        prompts = [negative] * len(prompts) + prompts
    unique = list(dict.fromkeys(prompts))
    return Encoded(read(unique), [unique.index(prompt) for prompt in prompts], [])


@dataclass(frozen=True)
class FluxFamily(Family[FluxSpec]):
    """A FLUX.1 model."""

    spec: FluxSpec
    net: Flux
    vae: AutoEncoder
    text: FluxTextEncoder

    @classmethod
    def load(
        cls,
        spec: FluxSpec,
        files: Mapping[str, Path],
        *,
        dtype: torch.dtype,
        device: torch.device,
        embedding_cache: int,
    ) -> FluxFamily:
        """The transformer's widths and depths come from its checkpoint."""
        with WeightSource.open(files["transformer"]) as file:
            source = pick(file, "flux")
            params = FluxParams.from_shapes(source.shapes)
            if params.guidance_embed != (spec.guidance_scale is not None):
                raise WeightsError(
                    f"{files['transformer']} {'has' if params.guidance_embed else 'lacks'} a guidance embedding, "
                    f"which does not fit {spec.name}"
                )
            net = load_module(lambda: Flux(params), source, dtype=dtype, device=device)
        text = FluxTextEncoder.load(
            files,
            max_sequence_length=spec.max_sequence_length,
            dtype=dtype,
            device=device,
            cache_size=embedding_cache,
        )
        vae = load_vae(spec, files["vae"], dtype=dtype, device=device)
        return cls(replace(spec, transformer=params), net, vae, text)

    def networks(self) -> dict[str, nn.Module]:
        return {
            "transformer": self.net,
            "vae": self.vae,
            "text_encoder": self.text.clip,
            "text_encoder_2": self.text.t5,
        }

    def export(self, folder: Path) -> Path:
        parts = {
            "transformer": Exported(
                "diffusers",
                "FluxTransformer2DModel",
                export.flux_config(self.net.params),
                export.flux_tensors(self.net),
            ),
            "vae": export.autoencoder(self.vae),
            "text_encoder": export.text_model(self.text.clip),
            "text_encoder_2": export.t5_model(self.text.t5),
        }
        tokenizers = {"tokenizer": self.text.clip_tokenizer, "tokenizer_2": self.text.t5_tokenizer}
        scheduler = export.flux_scheduler_config(self.spec.schedule)
        return export.write_diffusers(folder, "FluxPipeline", parts, tokenizers, scheduler)

    def stages(self, job: Job) -> list[Stage]:
        h, w = job.latent_size
        schedule = flow_match_euler(self.spec.schedule, job.num_inference_steps, h * w // 4)
        return [Stage(self, schedule, lambda _: patchify(self.noise(generators_of(job), h, w)))]

    def to_latent(self, x: Tensor, h: int, w: int) -> Tensor:
        return unpatchify(x, h, w)

    def encode(self, job: Job) -> Encoded:
        encoded = encode_each_once(job, self.text.encode, list(job.prompts), job.negative_prompt or "")
        return replace(encoded, notes=cut_prompts(job, self.text.max_sequence_length, self.text.tokens_over))

    def statics(self, job: Job, encoded: Encoded, schedule: Schedule) -> FluxStatics:
        h, w = job.latent_size
        device = self.net.device
        ids = image_ids(h // 2, w // 2).to(device)
        times = torch.tensor(schedule.timesteps, dtype=torch.float32, device=device)
        guidance = None if job.guidance_scale is None else torch.tensor([job.guidance_scale], device=device)
        each = [
            self.net.precompute(tokens, pooled, ids, times, guidance)
            for tokens, pooled in zip(encoded.text.tokens.split(1), encoded.text.pooled.split(1), strict=True)
        ]
        return FluxStatics.cat([each[row] for row in encoded.rows])


def load_unet(spec: SDXLSpec, file: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[SDXLSpec, UNet]:
    """A UNet, and the spec with its widths and depths, which come from the checkpoint; a head's width and the number of
    groups, which no shape tells, from the spec."""
    with WeightSource.open(file) as opened:
        source = pick(opened, "unet")
        found = UNetParams.from_shapes(source.shapes)
        params = replace(found, head_dim=spec.unet.head_dim, norm_groups=spec.unet.norm_groups)
        if params.guidance_embed != (spec.guidance_embedded and spec.guidance_scale is not None):
            raise WeightsError(
                f"{file} {'has' if params.guidance_embed else 'lacks'} a guidance embedding, which does not fit "
                f"{spec.name}"
            )
        net = load_module(lambda: UNet(params), source, dtype=dtype, device=device)
    return replace(spec, unet=params), channels_last(net)


AESTHETIC_SCORES = (2.5, 6.0)
"""What the refiner is told of the negative prompt's picture and of the prompt's (arXiv 2307.01952, appendix)."""
REFINER_STRENGTH = 0.3
"""Share of its steps that a refiner walks over a picture that is done."""


@dataclass(frozen=True)
class SDXLFamily(Family[SDXLSpec]):
    """An SDXL model, with its refiner if it has one."""

    spec: SDXLSpec
    net: UNet
    vae: AutoEncoder
    text: SDXLTextEncoder
    refiner: SDXLFamily | None = None

    @classmethod
    def load(
        cls,
        spec: SDXLSpec,
        files: Mapping[str, Path],
        *,
        dtype: torch.dtype,
        device: torch.device,
        embedding_cache: int,
    ) -> SDXLFamily:
        spec, net = load_unet(spec, files["unet"], dtype=dtype, device=device)
        text = SDXLTextEncoder.load(files, dtype=dtype, device=device, cache_size=embedding_cache)
        return cls(spec, net, load_vae(spec, files["vae"], dtype=dtype, device=device), text)

    def with_refiner(self, spec: SDXLSpec, files: Mapping[str, Path]) -> SDXLFamily:
        """The same with a refiner's UNet beside it, which shares the autoencoder and the second text encoder.

        Raises WeightsError if it reads another text encoder's states.
        """
        spec, net = load_unet(spec, files["unet"], dtype=self.net.dtype, device=self.net.device)
        text = self.text.second()
        if spec.unet.cross_attention_dim != text.width:
            raise WeightsError(
                f"{files['unet']} reads text {spec.unet.cross_attention_dim} wide; the second text encoder of "
                f"{self.spec.name} is {text.width} wide"
            )
        return self.refined_by(SDXLFamily(spec, net, self.vae, text))

    def refined_by(self, refiner: SDXLFamily) -> SDXLFamily:
        return replace(self, spec=replace(self.spec, refiner=refiner.spec), refiner=refiner)

    def networks(self) -> dict[str, nn.Module]:
        parts = ("text_encoder", "text_encoder_2")[-len(self.text.readers) :]
        found: dict[str, nn.Module] = {"unet": self.net, "vae": self.vae}
        found |= {part: reader.clip for part, reader in zip(parts, self.text.readers, strict=True)}
        return found | ({"refiner": self.refiner.net} if self.refiner else {})

    def export(self, folder: Path) -> Path:
        """With its refiner left out, which is a model of its own; a refiner is written without the first encoder."""
        parts = {
            "unet": Exported(
                "diffusers", "UNet2DConditionModel", export.unet_config(self.net.params), export.unet_tensors(self.net)
            ),
            "vae": export.autoencoder(self.vae),
        }
        tokenizers: dict[str, Any] = {}
        for number, reader in zip(("", "_2")[-len(self.text.readers) :], self.text.readers, strict=True):
            parts[f"text_encoder{number}"] = export.text_model(reader.clip)
            tokenizers[f"tokenizer{number}"] = reader.tokenizer
        kind = "StableDiffusionXLImg2ImgPipeline" if self.spec.aesthetic_score else "StableDiffusionXLPipeline"
        said: dict[str, Any] = {"force_zeros_for_empty_prompt": self.spec.zero_negative}
        if self.spec.aesthetic_score:
            said |= {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]}
        scheduler = scheduler_config(self.spec.schedule, self.spec.schedule.scheduler)
        return export.write_diffusers(folder, kind, parts, tokenizers, scheduler, **said)

    def stages(self, job: Job) -> list[Stage]:
        h, w = job.latent_size
        generators = generators_of(job)

        def schedule(steps: int) -> Diffusers:
            return Diffusers(self.spec.schedule, job.scheduler or self.spec.schedule.scheduler, steps, generators)

        first = schedule(job.num_inference_steps)
        stages = [Stage(self, first, lambda _: first.from_noise(self.noise(generators, h, w)))]
        if job.refine is None or self.refiner is None:
            return stages
        if job.refine.mode == "expert_ensemble_refiner":
            second = schedule(job.num_inference_steps)
            first.stop_at(job.refine.high_noise_frac)
            second.start_at(job.refine.high_noise_frac)
            return [*stages, Stage(self.refiner, second, lambda x: as_left(x))]
        second = schedule(job.refine.steps)
        second.start_with(REFINER_STRENGTH)
        return [
            *stages,
            Stage(self.refiner, second, lambda x: second.from_latent(as_left(x), self.noise(generators, h, w))),
        ]

    def to_latent(self, x: Tensor, h: int, w: int) -> Tensor:
        return x

    def encode(self, job: Job) -> Encoded:
        def read(prompts: list[str | None]) -> TextCond:
            return self.text.encode(prompts, weights=job.prompt_weights, chunks=job.prompt_chunks)

        prompts = list(job.prompts)
        for word, tokens in self.text.words.items():
            prompts = [prompt.replace(word, tokens) for prompt in prompts]
        negative = job.negative_prompt
        if negative is None and not self.spec.zero_negative:
            negative = ""
        encoded = encode_each_once(job, read, prompts, negative)
        if job.prompt_chunks:
            return encoded
        over = cut_prompts(job, self.text.limit, lambda prompt: self.text.tokens_over(prompt, job.prompt_weights))
        return replace(encoded, notes=[f"{note}; prompt_chunks=True reads them" for note in over])

    def statics(self, job: Job, encoded: Encoded, schedule: Schedule) -> UNetStatics:
        assert job.told is not None
        device = self.net.device
        times = torch.tensor(schedule.timesteps, dtype=torch.float32, device=device)
        guidance = None if job.guidance_scale is None else torch.tensor([job.guidance_scale], device=device)
        told = [*job.told.original_size, *job.told.crop_top_left]
        ends = ([score] for score in AESTHETIC_SCORES) if self.spec.aesthetic_score else [job.told.target_size] * 2
        negative, positive = (torch.tensor([[*told, *end]], dtype=torch.float32, device=device) for end in ends)
        negatives = len(encoded.rows) - len(job.prompts)
        made: dict[tuple[int, bool], UNetStatics] = {}
        rows = [(row, number < negatives) for number, row in enumerate(encoded.rows)]
        for row, is_negative in dict.fromkeys(rows):
            tokens, pooled = encoded.text.tokens[row : row + 1], encoded.text.pooled[row : row + 1]
            ids = negative if is_negative else positive
            made[row, is_negative] = self.net.precompute(tokens, pooled, ids, times, guidance)
        return UNetStatics.cat([made[row] for row in rows])


def as_left(x: Tensor | None) -> Tensor:
    """What the stage before left."""
    assert x is not None
    return x


def cut_prompts(job: Job, limit: int, over: Callable[[str], int]) -> list[str]:
    """A line for every prompt that is too long. Raises InvalidRequest if the job is strict."""
    read = list(job.prompts)
    if job.true_cfg_scale != 1.0 and job.negative_prompt:
        read.insert(0, job.negative_prompt)
    notes = [
        f"prompt cut to {limit} tokens, the last {count} are not read: {prompt[:40]!r}..."
        for prompt in dict.fromkeys(read)
        if (count := over(prompt))
    ]
    if job.strict and notes:
        raise InvalidRequest("strict: " + "; ".join(notes), field="prompt")
    return notes

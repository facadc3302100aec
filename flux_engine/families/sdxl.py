"""SDXL, with its refiner.

Shapes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.checkpoints import export
from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.export import Exported
from flux_engine.checkpoints.source import WeightSource, opened
from flux_engine.errors import WeightsError
from flux_engine.families.base import (
    Condition,
    ControlNet,
    Encoded,
    Family,
    Guide,
    Stage,
    Walk,
    calls_between,
    channels_last,
    encode_each_once,
    generators_of,
    load_vae,
    notes_of_cuts,
    parts_of,
)
from flux_engine.footprint import SLOW
from flux_engine.memory import Place, Precompute, load_parts
from flux_engine.models.unet import UNet
from flux_engine.models.unet_attention import UNetStatics
from flux_engine.models.unet_controlnet import UNetControlNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import UNetControlNetParams, UNetParams
from flux_engine.quantization.policy import treatment
from flux_engine.request import Job
from flux_engine.schedulers import Diffusers, scheduler_config
from flux_engine.specs import REFINER_STRENGTH, ControlNetSpec, SDXLSpec
from flux_engine.text.encoders import TextCond
from flux_engine.text.inversion import Inversion
from flux_engine.text.sdxl import SDXLTextEncoder


def sized(spec: SDXLSpec, file: Path) -> SDXLSpec:
    """The spec with a UNet's widths and depths, which come from its checkpoint; a head's width and the number of
    groups, which no shape tells, stay the spec's. Raises WeightsError."""
    with WeightSource.open(file) as whole:
        found = UNetParams.from_shapes(pick(whole, "unet").shapes)
    if found.guidance_embed != (spec.guidance_embedded and spec.guidance_scale is not None):
        raise WeightsError(
            f"{file} {'has' if found.guidance_embed else 'lacks'} a guidance embedding, which does not fit {spec.name}"
        )
    return replace(spec, unet=replace(found, head_dim=spec.unet.head_dim, norm_groups=spec.unet.norm_groups))


def load_unet(spec: SDXLSpec, file: Path, place: Place) -> tuple[UNet, Precompute]:
    """Raises WeightsError if it is not as `spec` says."""
    with opened(file, keep=True) as whole:
        source, treat = pick(whole, "unet"), treatment("unet", place.quantization)
        parts = parts_of(UNet)
        net = load_parts(lambda: UNet(spec.unet), source, place, parts, treat=treat, channels_last=True, keep=True)
    return channels_last(net), Precompute(net, place)


AESTHETIC_SCORES = (2.5, 6.0)
"""What the refiner is told of the negative prompt's picture and of the prompt's (arXiv 2307.01952, appendix)."""


@dataclass(frozen=True)
class SDXLFamily(Family[SDXLSpec]):
    """An SDXL model, with its refiner if it has one."""

    publishers_layout: ClassVar[str] = "sgm"
    channel_dim: ClassVar[int] = 1
    spec: SDXLSpec
    net: UNet
    vae: AutoEncoder
    text: SDXLTextEncoder
    refiner: SDXLFamily | None = None
    controlnets: tuple[ControlNet, ...] = ()
    precompute: Precompute | None = None
    place: Place = field(default_factory=Place)

    @classmethod
    def load(cls, spec: SDXLSpec, files: Mapping[str, Path], place: Place, *, embedding_cache: int) -> SDXLFamily:
        """`spec` is `sized`."""
        net, precompute = load_unet(spec, files["unet"], place)
        text = SDXLTextEncoder.load(files, place, cache_size=embedding_cache)
        return cls(spec, net, load_vae(spec, files["vae"], place), text, precompute=precompute, place=place)

    def in_full_precision(self, files: Mapping[str, Path]) -> SDXLFamily:
        """The same with a UNet of its own, which is not of 8 bits."""
        place = replace(self.place, quantization="none", mark=SLOW)
        net, precompute = load_unet(self.spec, files["unet"], place)
        return replace(self, net=net, precompute=precompute, place=place)

    def with_refiner(self, spec: SDXLSpec, files: Mapping[str, Path]) -> SDXLFamily:
        """The same with a refiner's UNet beside it, which shares the autoencoder and the second text encoder.

        Raises WeightsError if it reads another text encoder's states.
        """
        place = replace(self.place, mark=":refiner")
        spec = sized(spec, files["unet"])
        net, precompute = load_unet(spec, files["unet"], place)
        text = self.text.second()
        if spec.unet.cross_attention_dim != text.width:
            raise WeightsError(
                f"{files['unet']} reads text {spec.unet.cross_attention_dim} wide; the second text encoder of "
                f"{self.spec.name} is {text.width} wide"
            )
        return self.refined_by(SDXLFamily(spec, net, self.vae, text, precompute=precompute, place=place))

    def refined_by(self, refiner: SDXLFamily) -> SDXLFamily:
        """The same with a refiner that is put together already."""
        return replace(self, spec=replace(self.spec, refiner=refiner.spec), refiner=refiner)

    def load_controlnet(self, spec: ControlNetSpec, path: Path) -> ControlNet:
        place = replace(self.place, mark=f":{spec.name}")
        with opened(path, keep=place.leaves("modulation")) as file:
            source = pick(file, "unet_controlnet")
            found = UNetControlNetParams.from_shapes(source.shapes)
            own = self.net.params
            params = replace(found, head_dim=own.head_dim, norm_groups=own.norm_groups)
            if not params.reads_text:
                params = replace(params, cross_attention_dim=own.cross_attention_dim)
            for name in ("block_out_channels", "cross_attention_dim", "add_embed_dim"):
                if getattr(params, name) != getattr(own, name):
                    raise WeightsError(
                        f"{path} was made for another model: its {name} is {getattr(params, name)}, that of "
                        f"{self.spec.name} {getattr(own, name)}"
                    )
            treat = treatment("unet_controlnet", place.quantization)
            net = load_parts(
                lambda: UNetControlNet(params),
                source,
                place,
                parts_of(UNetControlNet),
                treat=treat,
                channels_last=True,
            )
        return ControlNet(spec, channels_last(net), Precompute(net, place))

    def learn(self, found: Inversion) -> None:
        """Read learned tokens, the refiner too. Raises WeightsError if they do not fit; then nothing changed."""
        encoders = [self.text, *([self.refiner.text] if self.refiner else [])]
        made = [encoder.widened(found.tables) for encoder in encoders]
        for encoder, tables in zip(encoders, made, strict=True):
            encoder.learn(tables, found.words)

    def forget(self) -> None:
        """Take the learned tokens away again."""
        self.text.forget()
        if self.refiner:
            self.refiner.text.forget()

    def networks(self) -> dict[str, nn.Module]:
        parts = ("text_encoder", "text_encoder_2")[-len(self.text.readers) :]
        found: dict[str, nn.Module] = {"unet": self.net, "vae": self.vae}
        found |= {part: reader.clip for part, reader in zip(parts, self.text.readers, strict=True)}
        found |= {f"controlnet {one.spec.name}": one.net for one in self.controlnets}
        return found | ({"refiner": self.refiner.net} if self.refiner else {})

    def export(self, folder: Path) -> Path:
        """Without its refiner, which is a model of its own, and without learned tokens; a refiner is written without
        the first encoder."""
        parts = {
            "unet": Exported(
                "diffusers", "UNet2DConditionModel", export.unet_config(self.net.params), export.unet_tensors(self.net)
            ),
            "vae": export.autoencoder(self.vae),
        }
        tokenizers: dict[str, Any] = {}
        numbers = ("", "_2")[-len(self.text.readers) :]
        for number, reader, table in zip(numbers, self.text.readers, self.text.plain(), strict=True):
            parts[f"text_encoder{number}"] = export.text_model(reader.clip, table)
            tokenizers[f"tokenizer{number}"] = reader.tokenizer
        kind = "StableDiffusionXLImg2ImgPipeline" if self.spec.aesthetic_score else "StableDiffusionXLPipeline"
        said: dict[str, Any] = {"force_zeros_for_empty_prompt": self.spec.zero_negative}
        if self.spec.aesthetic_score:
            said |= {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]}
        scheduler = scheduler_config(self.spec.schedule, self.spec.schedule.scheduler)
        return export.write_diffusers(folder, kind, parts, tokenizers, scheduler, said)

    def export_as_published(self, folder: Path) -> Path:
        """All of the model in one file."""
        readers = zip(self.text.readers, self.text.plain(), strict=True)
        clips = [export.text_model(reader.clip, table) for reader, table in readers]
        return export.write_sgm(folder, self.spec.name.rpartition("/")[2], self.net, self.vae, clips)

    def stages(self, job: Job, condition: Condition) -> list[Stage]:
        h, w = job.latent_size
        generators = generators_of(job)
        strength = job.inputs.strength

        name = job.scheduler
        assert name is not None

        def schedule(steps: int, strength: float) -> Diffusers:
            made = Diffusers(self.spec.schedule, name, steps, generators)
            made.start_with(strength)
            return made

        first = schedule(job.num_inference_steps, strength)

        def begin(_: Walk | None) -> Walk:
            noise = self.noise(generators, h, w)
            if condition.latent is None or strength == 1:
                return Walk(first.from_noise(noise), noise)
            return Walk(first.at(condition.latent, noise, 0), noise)

        stages = [Stage(self, first, begin, condition)]
        if job.refine is None or self.refiner is None:
            return stages
        kept = Condition(latent=condition.latent, mask=condition.mask)  # the refiner reads nothing beside the latent
        if job.refine.mode == "expert_ensemble_refiner":
            second = schedule(job.num_inference_steps, strength)
            first.stop_at(job.refine.high_noise_frac)
            second.start_at(job.refine.high_noise_frac)
            return [*stages, Stage(self.refiner, second, as_left, kept)]
        again = schedule(job.refine.steps, REFINER_STRENGTH)

        def begin_again(left: Walk | None) -> Walk:
            noise = self.noise(generators, h, w)
            return Walk(again.at(as_left(left).x, noise, 0), noise)

        return [*stages, Stage(self.refiner, again, begin_again, kept)]

    def to_latent(self, x: Tensor, h: int, w: int) -> Tensor:
        return x

    def from_latent(self, latent: Tensor) -> Tensor:
        return latent

    def fill_channels(self, picture: Tensor, mask: Tensor) -> Tensor:
        """The mask, one number for each position, and the picture without what is in the hole.

        Source: diffusers/stable-diffusion-xl-1.0-inpainting-0.1, which was taught masks without any grey.
        """
        hole = (mask >= 0.5).float()
        small = F.max_pool2d(hole, self.spec.vae.downscale).to(self.net.device)
        return torch.cat((small, self.latent_of(picture * (1 - hole))), dim=1)

    def hint_of(self, controlnet: ControlNet, picture: Tensor) -> Tensor:
        return controlnet.net.embed_hint(picture.to(self.net.device))

    def encode(self, job: Job, condition: Condition) -> Encoded:
        def read(prompts: list[str | None]) -> TextCond:
            return self.text.encode(prompts, weights=job.prompt_weights, chunks=job.prompt_chunks)

        job = replace(job, prompts=tuple(map(self.text.put_words, job.prompts)))
        negative = job.negative_prompt
        if negative is None and not self.spec.zero_negative:
            negative = ""
        notes: list[str] = []
        if not job.prompt_chunks:
            notes = notes_of_cuts(
                job,
                self.text.limit,
                lambda prompt: self.text.tokens_over(prompt, job.prompt_weights),
                remedy="; prompt_chunks=True reads them",
            )
        return encode_each_once(job, read, list(job.prompts), negative, notes)

    def statics(self, job: Job, encoded: Encoded, stage: Stage) -> UNetStatics:
        return self._precomputed(self.precompute or Precompute(self.net), job, encoded, stage)

    def guides(self, job: Job, encoded: Encoded, stage: Stage) -> list[Guide]:
        count = len(stage.schedule.timesteps)
        return [
            Guide(
                hint,
                self._precomputed(hint.controlnet.precompute, job, encoded, stage),
                calls_between(hint.start, hint.end, count),
            )
            for hint in stage.condition.hints
        ]

    def _precomputed(self, precompute: Precompute, job: Job, encoded: Encoded, stage: Stage) -> UNetStatics:
        assert job.told is not None
        device = self.net.device
        times = torch.tensor(stage.schedule.timesteps, dtype=torch.float32, device=device)
        embedded = precompute.net is self.net and job.guidance_scale is not None
        guidance = torch.tensor([job.guidance_scale], device=device) if embedded else None
        told = [*job.told.original_size, *job.told.crop_top_left]
        ends = ([score] for score in AESTHETIC_SCORES) if self.spec.aesthetic_score else [job.told.target_size] * 2
        negative, positive = (torch.tensor([[*told, *end]], dtype=torch.float32, device=device) for end in ends)
        negatives = len(encoded.rows) - len(job.prompts)
        text = list(encoded.text.each())
        rows = [(row, number < negatives) for number, row in enumerate(encoded.rows)]
        each = list(dict.fromkeys(rows))
        made = precompute(
            [(*text[row], negative if is_negative else positive, times, guidance) for row, is_negative in each]
        )
        return UNetStatics.cat([made[each.index(row)] for row in rows])


def as_left(walk: Walk | None) -> Walk:
    """What the stage before left."""
    assert walk is not None
    return walk

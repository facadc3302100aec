"""FLUX.1.

Shapes: B batch, C latent channels, h w latent size, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

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
    encode_each_once,
    generators_of,
    load_vae,
    notes_of_cuts,
    parts_of,
)
from flux_engine.footprint import SLOW
from flux_engine.memory import Place, Precompute, load_parts
from flux_engine.models.flux import Flux, FluxStatics, patchify, unpatchify
from flux_engine.models.flux_controlnet import FluxControlNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import FluxControlNetParams, FluxParams
from flux_engine.quantization.policy import treatment
from flux_engine.request import Job
from flux_engine.schedulers import flow_match_euler
from flux_engine.specs import FLUX_DEV, UNION_MODES, ControlNetSpec, FluxSpec
from flux_engine.text.flux import FluxTextEncoder
from flux_engine.text.redux import Redux, mix


def image_ids(rows: int, columns: int) -> Tensor:
    """Positions of image tokens (rows columns, 3): index 0, row, column. float32."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(-1, 3)


def sized(spec: FluxSpec, file: Path) -> FluxSpec:
    """The spec with a transformer's widths and depths, which come from its checkpoint. Raises WeightsError."""
    with WeightSource.open(file) as whole:
        params = FluxParams.from_shapes(pick(whole, "flux").shapes)
    if params.guidance_embed != (spec.guidance_scale is not None):
        raise WeightsError(
            f"{file} {'has' if params.guidance_embed else 'lacks'} a guidance embedding, which does not fit {spec.name}"
        )
    return replace(spec, transformer=params)


def load_transformer(spec: FluxSpec, file: Path, place: Place) -> tuple[Flux, Precompute]:
    """Raises WeightsError if it is not as `spec` says."""
    with opened(file, keep=True) as whole:
        source, treat = pick(whole, "flux"), treatment("flux", place.quantization)
        if spec.widened:
            source = source.widened("img_in.weight", spec.transformer.in_channels)
        net = load_parts(lambda: Flux(spec.transformer), source, place, parts_of(Flux), treat=treat, keep=True)
    return net, Precompute(net, place)


@dataclass(frozen=True)
class FluxFamily(Family[FluxSpec]):
    """A FLUX.1 model."""

    publishers_layout: ClassVar[str] = "bfl"
    channel_dim: ClassVar[int] = 2
    spec: FluxSpec
    net: Flux
    vae: AutoEncoder
    text: FluxTextEncoder
    controlnets: tuple[ControlNet, ...] = ()
    redux: Redux | None = None
    precompute: Precompute | None = None
    place: Place = field(default_factory=Place)

    @classmethod
    def load(cls, spec: FluxSpec, files: Mapping[str, Path], place: Place, *, embedding_cache: int) -> FluxFamily:
        """`spec` is `sized`."""
        net, precompute = load_transformer(spec, files["transformer"], place)
        text = FluxTextEncoder.load(
            files, place, max_sequence_length=spec.max_sequence_length, cache_size=embedding_cache
        )
        return cls(spec, net, load_vae(spec, files["vae"], place), text, precompute=precompute, place=place)

    def in_full_precision(self, files: Mapping[str, Path]) -> FluxFamily:
        """The same with a transformer of its own, which is not of 8 bits."""
        place = replace(self.place, quantization="none", mark=SLOW)
        net, precompute = load_transformer(self.spec, files["transformer"], place)
        return replace(self, net=net, precompute=precompute, place=place)

    def load_controlnet(self, spec: ControlNetSpec, path: Path) -> ControlNet:
        place = replace(self.place, mark=f":{spec.name}")
        with opened(path, keep=place.leaves("modulation")) as file:
            source = pick(file, "flux_controlnet")
            params = FluxControlNetParams.from_shapes(source.shapes)
            own = self.net.params
            for name in ("hidden_size", "context_in_dim", "vec_in_dim", "axes_dim"):
                if getattr(params, name) != getattr(own, name):
                    raise WeightsError(
                        f"{path} was made for another model: its {name} is {getattr(params, name)}, that of "
                        f"{self.spec.name} {getattr(own, name)}"
                    )
            treat = treatment("flux_controlnet", place.quantization)
            net = load_parts(lambda: FluxControlNet(params), source, place, parts_of(FluxControlNet), treat=treat)
        if params.num_modes:
            kinds = {kind: UNION_MODES.get(kind) if mode is None else mode for kind, mode in spec.kinds.items()}
            for kind, mode in kinds.items():
                if mode is None or mode >= params.num_modes:
                    raise WeightsError(
                        f"{path} tells {params.num_modes} kinds of control apart, and {kind!r} is none of them"
                    )
            spec = replace(spec, kinds=kinds)
        return ControlNet(spec, net, Precompute(net, place))

    def with_redux(self, files: Mapping[str, Path]) -> FluxFamily:
        """The same with an adapter that reads pictures as prompts. Raises WeightsError for one that does not fit."""
        redux = Redux.load(files, dtype=self.net.dtype, device=self.net.device)
        if redux.text_dim != self.net.params.context_in_dim:
            raise WeightsError(
                f"{files['adapter']} gives tokens {redux.text_dim} wide; {self.spec.name} reads "
                f"{self.net.params.context_in_dim}"
            )
        return replace(self, spec=replace(self.spec, image_prompts=True), redux=redux)

    def networks(self) -> dict[str, nn.Module]:
        return {
            "transformer": self.net,
            "vae": self.vae,
            "text_encoder": self.text.clip,
            "text_encoder_2": self.text.t5,
            **{f"controlnet {one.spec.name}": one.net for one in self.controlnets},
            **({"redux": self.redux.adapter, "image_encoder": self.redux.tower} if self.redux else {}),
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
        return export.write_diffusers(folder, "FluxPipeline", parts, tokenizers, scheduler, {})

    def export_as_published(self, folder: Path) -> Path:
        """The transformer and the autoencoder."""
        return export.write_bfl(folder, self.spec.name.rpartition("/")[2], self.net, self.vae)

    def stages(self, job: Job, condition: Condition) -> list[Stage]:
        h, w = job.latent_size
        strength = job.inputs.strength
        schedule = flow_match_euler(self.spec.schedule, job.num_inference_steps, h * w // 4, strength)

        def begin(_: Walk | None) -> Walk:
            noise = patchify(self.noise(generators_of(job), h, w))
            if condition.latent is None or strength == 1:
                return Walk(schedule.from_noise(noise), noise)
            return Walk(schedule.at(patchify(condition.latent), noise, 0), noise)

        return [Stage(self, schedule, begin, condition)]

    def to_latent(self, x: Tensor, h: int, w: int) -> Tensor:
        return unpatchify(x, h, w)

    def from_latent(self, latent: Tensor) -> Tensor:
        return patchify(latent)

    def fill_channels(self, picture: Tensor, mask: Tensor) -> Tensor:
        """The picture without what is in the hole, and the pixels of the mask, 8 x 8 for each position.

        Source: black-forest-labs/flux, src/flux/sampling.py, prepare_fill.
        """
        pixels = pixel_unshuffle(mask, self.spec.vae.downscale).to(self.net.device)
        return torch.cat((self.latent_of(picture * (1 - mask)), pixels), dim=1)

    def read_prompts(self, pictures: Sequence[Image]) -> Tensor:
        assert self.redux is not None  # a request with pictures as prompts is refused without it
        return self.redux.encode(pictures)

    def hint_of(self, controlnet: ControlNet, picture: Tensor) -> Tensor:
        picture = picture.to(self.net.device) * 2 - 1
        hint = picture if controlnet.net.reads_picture else patchify(self.latent_of(picture))
        return controlnet.net.embed_hint(hint)

    def encode(self, job: Job, condition: Condition) -> Encoded:
        notes = notes_of_cuts(job, self.text.max_sequence_length, self.text.tokens_over)
        encoded = encode_each_once(job, self.text.encode, list(job.prompts), job.negative_prompt or "", notes)
        if condition.prompt_tokens is None:
            return encoded
        strength = job.inputs.prompt_strength
        return replace(encoded, text=mix(encoded.text, condition.prompt_tokens, strength))

    def _told(self, job: Job, encoded: Encoded, stage: Stage) -> tuple[Tensor, Tensor, Tensor | None]:
        """Positions of the tokens that are drawn, times, guidance scale."""
        h, w = job.latent_size
        device = self.net.device
        times = torch.tensor(stage.schedule.timesteps, dtype=torch.float32, device=device)
        guidance = None if job.guidance_scale is None else torch.tensor([job.guidance_scale], device=device)
        return image_ids(h // 2, w // 2).to(device), times, guidance

    def statics(self, job: Job, encoded: Encoded, stage: Stage) -> FluxStatics:
        ids, times, guidance = self._told(job, encoded, stage)
        if stage.condition.reference is not None:
            rows, columns = (side // 2 for side in stage.condition.reference.shape[2:])
            behind = image_ids(rows, columns).to(ids.device)
            behind[:, 0] = 1
            ids = torch.cat((ids, behind))
        precompute = self.precompute or Precompute(self.net)
        each = precompute([(tokens, pooled, ids, times, guidance) for tokens, pooled in encoded.text.each()])
        return FluxStatics.cat([each[row] for row in encoded.rows])

    def guides(self, job: Job, encoded: Encoded, stage: Stage) -> list[Guide]:
        ids, times, guidance = self._told(job, encoded, stage)
        guides: list[Guide] = []
        for hint in stage.condition.hints:
            net = hint.controlnet.net
            told = guidance if net.params.guidance_embed else None
            if net.params.guidance_embed and told is None:  # a ControlNet for dev beside a model that takes none
                told = torch.tensor([FLUX_DEV.guidance_scale], device=ids.device)
            rows = [(tokens, pooled, ids, times, told, hint.mode) for tokens, pooled in encoded.text.each()]
            each = hint.controlnet.precompute(rows)
            statics = type(each[0]).cat([each[row] for row in encoded.rows])
            calls = calls_between(hint.start, hint.end, len(stage.schedule.timesteps))
            guides.append(Guide(hint, statics, calls, partial(net.residuals, base=self.net.params)))
        return guides

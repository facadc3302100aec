"""FLUX.1.

Shapes: B batch, C latent channels, h w latent size, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from flux_engine.checkpoints import export
from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.export import Exported
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError
from flux_engine.families.base import Encoded, Family, Stage, encode_each_once, generators_of, load_vae, notes_of_cuts
from flux_engine.models.flux import Flux, FluxStatics
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import FluxParams
from flux_engine.request import Job
from flux_engine.schedulers import Schedule, flow_match_euler
from flux_engine.specs import FluxSpec
from flux_engine.text.flux import FluxTextEncoder


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
class FluxFamily(Family[FluxSpec]):
    """A FLUX.1 model."""

    publishers_layout: ClassVar[str] = "bfl"
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
        return export.write_diffusers(folder, "FluxPipeline", parts, tokenizers, scheduler, {})

    def export_as_published(self, folder: Path) -> Path:
        """The transformer and the autoencoder."""
        return export.write_bfl(folder, self.spec.name.rpartition("/")[2], self.net, self.vae)

    def stages(self, job: Job) -> list[Stage]:
        h, w = job.latent_size
        schedule = flow_match_euler(self.spec.schedule, job.num_inference_steps, h * w // 4)
        return [Stage(self, schedule, lambda _: patchify(self.noise(generators_of(job), h, w)))]

    def to_latent(self, x: Tensor, h: int, w: int) -> Tensor:
        return unpatchify(x, h, w)

    def encode(self, job: Job) -> Encoded:
        notes = notes_of_cuts(job, self.text.max_sequence_length, self.text.tokens_over)
        return encode_each_once(job, self.text.encode, list(job.prompts), job.negative_prompt or "", notes)

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

"""The few points where model families differ: how latents become tokens, how a schedule is made, what is precomputed.

Shapes: B batch, C latent channels, h w latent size, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError
from flux_engine.models.flux import Flux, FluxStatics
from flux_engine.models.vae import AutoEncoder
from flux_engine.request import Job
from flux_engine.schedulers import FlowMatchEuler, flow_match_euler
from flux_engine.specs import FluxParams, ModelSpec
from flux_engine.text import FluxTextEncoder, TextCond


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
class FluxFamily:
    """A FLUX.1 model, put together: its networks and what the request path needs to know about them."""

    spec: ModelSpec
    net: Flux
    vae: AutoEncoder
    text: FluxTextEncoder

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        files: Mapping[str, Path],
        *,
        dtype: torch.dtype,
        device: torch.device,
        embedding_cache: int,
    ) -> FluxFamily:
        """Read every part from its file. The transformer's widths and depths come from its checkpoint.

        Raises WeightsError if a file does not hold what the spec or the file itself promises.
        """
        with WeightSource.open(files["transformer"]) as file:
            source = pick(file, "flux")
            params = FluxParams.from_shapes(source.shapes)
            if params.guidance_embed != (spec.guidance_scale is not None):
                raise WeightsError(
                    f"{files['transformer']} {'has' if params.guidance_embed else 'lacks'} a guidance embedding, "
                    f"which does not fit {spec.name}"
                )
            net = load_module(lambda: Flux(params), source, dtype=dtype, device=device)
        with WeightSource.open(files["vae"]) as file:
            vae = load_module(lambda: AutoEncoder(spec.vae), pick(file, "vae"), dtype=dtype, device=device)
        # Convolutions run faster on channels last, on CPUs and on tensor cores.
        nn.Module.to(vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        text = FluxTextEncoder.load(
            files,
            max_sequence_length=spec.max_sequence_length,
            dtype=dtype,
            device=device,
            cache_size=embedding_cache,
        )
        return cls(replace(spec, transformer=params), net, vae, text)

    def schedule(self, job: Job) -> FlowMatchEuler:
        h, w = job.latent_size
        return flow_match_euler(self.spec.schedule, job.num_inference_steps, h * w // 4)

    def noise(self, seeds: Sequence[int], h: int, w: int) -> Tensor:
        """Standard normal latents (B, C, h, w), float32, drawn on the CPU from each picture's own seed."""
        channels = self.spec.vae.latent_channels
        rows = [
            torch.randn(
                (1, channels, h, w),
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in seeds
        ]
        return torch.cat(rows).to(self.net.device)

    def to_tokens(self, latent: Tensor) -> Tensor:
        return patchify(latent)

    def to_latent(self, tokens: Tensor, h: int, w: int) -> Tensor:
        return unpatchify(tokens, h, w)

    def statics(self, job: Job, text: TextCond, rows: Sequence[int], schedule: FlowMatchEuler) -> FluxStatics:
        """Everything that stays the same over the calls of one request.

        `text` holds each prompt once; `rows` says which of them each row of the batch uses. Prompts are precomputed
        one by one: a row's bits must not depend on the batch it is in, and a product's rounding depends on its size.
        """
        h, w = job.latent_size
        device = self.net.device
        ids = image_ids(h // 2, w // 2).to(device)
        times = torch.tensor(schedule.timesteps, dtype=torch.float32, device=device)
        guidance = None if job.guidance_scale is None else torch.tensor([job.guidance_scale], device=device)
        each = [
            self.net.precompute(tokens, pooled, ids, times, guidance)
            for tokens, pooled in zip(text.tokens.split(1), text.pooled.split(1), strict=True)
        ]
        return FluxStatics.cat([each[row] for row in rows])

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

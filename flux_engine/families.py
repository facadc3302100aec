"""The few points where model families differ: how latents become tokens, how a schedule is made, what is precomputed.

Shapes: B batch, C latent channels, h w latent size, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

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
        with WeightSource(files["transformer"]) as source:
            params = FluxParams.from_shapes(source.shapes)
            if params.guidance_embed != (spec.guidance_scale is not None):
                raise WeightsError(
                    f"{files['transformer']} {'has' if params.guidance_embed else 'lacks'} a guidance embedding, "
                    f"which does not fit {spec.name}"
                )
            net = load_module(lambda: Flux(params), source, dtype=dtype, device=device)
        with WeightSource(files["vae"]) as source:
            vae = load_module(
                lambda: AutoEncoder(spec.vae), source, dtype=dtype, device=device
            )
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
        return flow_match_euler(
            self.spec.schedule, job.num_inference_steps, h * w // 4
        )

    def noise(self, seeds: Sequence[int], h: int, w: int) -> Tensor:
        """Standard normal latents (B, C, h, w), float32, drawn on the CPU from each picture's own seed."""
        channels = self.spec.vae.latent_channels
        rows = [
            torch.randn(
                (1, channels, h, w),
                generator=torch.Generator().manual_seed(_signed(seed)),
            )
            for seed in seeds
        ]
        return torch.cat(rows).to(self.net.device)

    def to_tokens(self, latent: Tensor) -> Tensor:
        return patchify(latent)

    def to_latent(self, tokens: Tensor, h: int, w: int) -> Tensor:
        return unpatchify(tokens, h, w)

    def statics(self, job: Job, text: TextCond, schedule: FlowMatchEuler) -> FluxStatics:
        """Everything that stays the same over the calls of one request."""
        h, w = job.latent_size
        device = self.net.device
        rows = text.tokens.shape[0]
        guidance = (
            None
            if job.guidance_scale is None
            else torch.full((rows,), job.guidance_scale, device=device)
        )
        return self.net.precompute(
            text.tokens,
            text.pooled,
            image_ids(h // 2, w // 2).to(device),
            torch.tensor(schedule.timesteps, dtype=torch.float32, device=device),
            guidance,
        )

    def latent_rgb(self) -> tuple[Tensor, Tensor]:
        """A linear map from latent channels to RGB in [-1, 1], for previews: weight (C, 3), bias (3,).

        Fitted to what the autoencoder makes of flat colours, so it suits any autoencoder and needs no constants.
        """
        levels = torch.tensor([-1.0, 0.0, 1.0])
        colors = torch.cartesian_prod(levels, levels, levels)  # (27, 3)
        side = 4 * self.spec.vae.downscale
        flat = colors[:, :, None, None].expand(-1, -1, side, side)
        latent = self.vae.encode(flat.to(self.net.device)).float().mean(dim=(2, 3))
        inputs = torch.cat((latent, latent.new_ones(len(latent), 1)), dim=1).cpu()
        ridge = 1e-3 * torch.eye(inputs.shape[1])
        solved = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ colors)
        solved = solved.to(self.net.device)
        return solved[:-1], solved[-1]


def _signed(seed: int) -> int:
    """torch takes seeds as signed 64-bit numbers; the upper half of the unsigned range maps to the negative one."""
    return seed - 2**64 if seed >= 2**63 else seed

"""Ours, reading the same file in diffusers' layout. The first option is the scheme."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flux_engine.families.base import load_vae
from flux_engine.families.flux import load_transformer
from flux_engine.families.flux import sized as flux_sized
from flux_engine.families.sdxl import load_unet
from flux_engine.families.sdxl import sized as unet_sized
from flux_engine.memory import Place
from flux_engine.params import VAEParams
from flux_engine.specs import FLUX_SCHNELL, SDXL


class Ours:
    """A network with its inputs, and the statics of the last prompt."""

    def __init__(self, net: Any, told: tuple[Tensor, ...], x: Tensor, rows: bool) -> None:
        self.net, self.told, self.x, self.rows = net, told, x, rows
        self.statics: Any = None

    @torch.inference_mode()
    def prompt(self) -> None:
        """Prompts are precomputed one by one, as the library does it."""
        if not self.told:
            return
        *told, times = self.told
        each = [[one[row : row + 1] for one in told] for row in range(len(told[0]))] if self.rows else [told]
        guidance = [] if self.rows else [None]
        made = [self.net.precompute(*row, times, *guidance) for row in each]
        self.statics = type(made[0]).cat(made)

    @torch.inference_mode()
    def step(self, call: int) -> Tensor:
        return self.net(self.x, call, self.statics) if self.told else self.net(self.x)


def make(place: Path, case: dict[str, Any], options: set[str], cache: Path, threads: int) -> Ours:
    """Read the network as `flux_engine.load` does."""
    torch.set_num_threads(threads)
    (scheme,) = options
    where = Place(torch.bfloat16, torch.device("cpu"), scheme)
    file, told = place / "diffusion_pytorch_model.safetensors", load_file(place / "inputs.safetensors")
    if case["kind"] == "vae":
        vae = load_vae(replace(FLUX_SCHNELL, vae=_vae_params(case["case"]["config"])), file, where)
        # Like diffusers' decode, which leaves scale and shift to its pipelines.
        latent = told["z"].bfloat16().contiguous(memory_format=torch.channels_last)
        return Ours(vae.decoder, (), latent, rows=False)
    if case["kind"] == "unet":
        net, _ = load_unet(unet_sized(SDXL, file), file, where)
        read = (told["encoder_hidden_states"], told["text_embeds"], told["time_ids"], told["times"])
        return Ours(net, read, told["sample"], rows=True)
    net, _ = load_transformer(flux_sized(FLUX_SCHNELL, file), file, where)
    read = (told["encoder_hidden_states"], told["pooled_projections"], told["img_ids"], told["times"])
    return Ours(net, read, told["hidden_states"], rows=False)


def _vae_params(config: dict[str, Any]) -> VAEParams:
    widths = config["block_out_channels"]
    return VAEParams(
        latent_channels=config["latent_channels"],
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        norm_groups=config["norm_num_groups"],
    )

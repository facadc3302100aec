"""What the pictures of a job mean to a network: one small builder, run before the loop.

Shapes: C latent channels, h w latent size, H W picture size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from flux_engine.families.base import Condition, Family, Hint
from flux_engine.inputs import Inputs
from flux_engine.preprocess import preprocess
from flux_engine.request import Job


def build_condition(job: Job, family: Family[Any]) -> Condition:
    """Read a job's pictures with the model's own networks. Empty for a job without any."""
    inputs, spec = job.inputs, family.spec
    maps = [
        one.image
        if one.preprocessor is None
        else preprocess(one.preprocessor, one.image, device=str(family.net.device), **one.options)
        for one in inputs.controls
    ]
    latent = mask = channels = None
    if inputs.image is not None:
        picture = pixels(inputs.image) * 2 - 1
        hole = None if inputs.mask is None else pixels(inputs.mask)
        if hole is not None and spec.reads == "fill":
            channels = family.fill_channels(picture, hole)
        elif hole is not None:
            mask = latent_mask(hole, spec.vae.downscale).to(family.net.device)
        if mask is not None or inputs.strength < 1:
            latent = family.latent_of(picture)
    hints: list[Hint] = []
    for one, made in zip(inputs.controls, maps, strict=True):
        if spec.reads == "structure" and one.kind == spec.structure:
            channels = family.latent_of(pixels(made) * 2 - 1)
            continue
        net = next(net for net in family.controlnets if one.kind in net.kinds)
        embedded = family.hint_of(net, pixels(made))
        hints.append(Hint(net, embedded, net.spec.kinds[one.kind], one.scale, one.start, one.end))
    if spec.widened and spec.reads == "nothing":
        channels = torch.zeros(1, spec.vae.latent_channels, *job.latent_size, device=family.net.device)
    return Condition(
        latent=latent,
        mask=mask,
        channels=channels,
        reference=None if inputs.reference is None else family.latent_of(pixels(inputs.reference) * 2 - 1),
        prompt_tokens=family.read_prompts(inputs.prompts) if inputs.prompts else None,
        hints=tuple(hints),
        maps=tuple(maps),
    )


def pixels(image: Image) -> Tensor:
    """RGB or L -> (1, 3 or 1, H, W) in [0, 1], float32."""
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None].contiguous()


def latent_mask(mask: Tensor, downscale: int) -> Tensor:
    """Pixels' mask (1, 1, H, W) -> latents' (1, 1, h, w): a position of which any pixel is repainted is repainted. What
    it holds of the rest, `pasted_back` brings back."""
    return F.max_pool2d(mask, downscale)


def pasted_back(picture: Tensor, inputs: Inputs) -> Tensor:
    """A picture (3, H, W) in [-1, 1] with the pixels that its mask keeps, to the bit."""
    if not inputs.paste_back or inputs.mask is None or inputs.image is None:
        return picture
    mask, known = pixels(inputs.mask)[0], pixels(inputs.image)[0] * 2 - 1
    return torch.where(mask == 0, known, mask * picture.clamp(-1, 1) + (1 - mask) * known)

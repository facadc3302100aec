"""ControlNets for SDXL's UNet: the full ones, and the smaller ones with fewer or no transformer blocks.

Attribute names are those of diffusers' ControlNetModel, with q, k and v joined as in `unet.py`, whose way down this is.
Source of the architecture: ControlNet (arXiv 2302.05543), as in lllyasviel/ControlNet, cldm/cldm.py.

What differs from the reference: besides what the UNet's `precompute` makes once, the picture that steers goes through
its convolutions once for a request (`embed_hint`), not at every call.

Shapes: B batch, S calls, C channels, h w latent size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.models.layers import Residuals
from flux_engine.models.unet import UNetEncoder
from flux_engine.models.unet_attention import UNetStatics
from flux_engine.params import UNetControlNetParams


class HintEmbedding(nn.Module):
    """From a picture to what is added to the embedded latent."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, stride=stride)
            for width, wider in pairwise(widths)
            for a, b, stride in ((width, width, 1), (width, wider, 2))
        )
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class UNetControlNet(UNetEncoder):
    """Says what to add to a UNet's states, so that its picture follows another one."""

    def __init__(self, params: UNetControlNetParams) -> None:
        super().__init__(params, params.transformer_depth, params.mid_depth)
        self.params = params
        channels, count = params.block_out_channels, params.layers_per_block
        self.controlnet_cond_embedding = HintEmbedding(
            params.conditioning_channels, params.embedding_channels, channels[0]
        )
        # One for each that is passed on the way down: the embedded latent, every block, and the steps down.
        steps = [1] * (len(channels) - 1) + [0]
        passed = [channels[0], *(c for c, step in zip(channels, steps, strict=True) for _ in range(count + step))]
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in passed)
        self.controlnet_mid_block = nn.Conv2d(channels[-1], channels[-1], 1)

    def embed_hint(self, picture: Tensor) -> Tensor:
        """picture (B, conditioning_channels, 8h, 8w) in [0, 1] -> (B, C, h, w), once for a request."""
        picture = picture.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.controlnet_cond_embedding(picture)

    def forward(self, x: Tensor, hint: Tensor, call: int, statics: UNetStatics) -> Residuals:
        """At call number `call` one residual for each that the UNet passes on the way down, and the middle's last.

        x (B, in_channels, h, w): what the UNet reads. hint (B, C, h, w), or one for all: what `embed_hint` gave.
        """
        return self.call_step(self.samples, x, hint, statics.at(call))

    def samples(self, x: Tensor, hint: Tensor, statics: UNetStatics) -> Residuals:
        """`forward` with what one call reads of the statics."""
        passed = self.down(self.enter(x) + hint, statics)
        passed.append(self.call_block(self.mid_block, passed[-1], statics))
        layers = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        return tuple(layer(state) for layer, state in zip(layers, passed, strict=True))

"""The convolutional autoencoder of FLUX (16 latent channels) and of SDXL (4), 8 times smaller each way.

Attribute names are those of the publishers' files (`encoder.down.0.block.0.conv1`); SDXL's files carry two more 1x1
convolutions (`quant_conv`, `post_quant_conv`). Source of the architecture: CompVis/latent-diffusion, as used in
black-forest-labs/flux, src/flux/modules/autoencoder.py.

Encoding takes the posterior's mean, so the same picture always gives the same latent.
Shapes: pictures (B, 3, 8 h, 8 w) in [-1, 1]; latents (B, C, h, w).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine import ops
from flux_engine.attention import attention
from flux_engine.models import vae_rows
from flux_engine.models.layers import GroupNorm, NormSiLU, Runner, directly
from flux_engine.params import VAEParams


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = NormSiLU(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_width = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        update = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (self.nin_shortcut(x) if self.changes_width else x) + update


class AttnBlock(nn.Module):
    """One-headed attention over all positions, with 1x1 convolutions for projections as the files store them."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            layer(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for layer in (self.q, self.k, self.v)
        )  # each (B, 1, h w, C)
        mixed = attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return ops.upsampled_conv(x, self.conv.weight, self.conv.bias)


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next one."""

    def __init__(self, widths: list[int], groups: int, *, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        if down:
            self.downsample = Downsample(widths[-1])
        if up:
            self.upsample = Upsample(widths[-1])
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.down:
            x = self.downsample(x)
        return self.upsample(x) if self.up else x


class Encoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths = [params.channels * m for m in params.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(params.image_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                [widths[max(i - 1, 0)]] + [width] * params.num_res_blocks,
                params.norm_groups,
                down=i < last,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], params.norm_groups)
        self.norm_out = NormSiLU(params.norm_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * params.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 8 h, 8 w) -> mean and log variance (B, 2 C, h, w)."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        widths = [params.channels * m for m in params.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(params.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], params.norm_groups)
        self.up = nn.ModuleList(
            Level(
                [widths[min(i + 1, last)]] + [width] * (params.num_res_blocks + 1),
                params.norm_groups,
                up=i > 0,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = NormSiLU(params.norm_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], params.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, 8 h, 8 w)."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):  # `up.0` is the finest level
            x = level(x)
        return self.conv_out(self.norm_out(x))


class AutoEncoder(nn.Module):
    """Pictures to latents and back."""

    blocks: ClassVar[str] = r"(?!decoder\.conv_in\.).*"
    """Parameters that may leave the device between pictures; by what stays it is told where they belong."""

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.params = params
        self.call_decoder: Runner = directly
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)
        if params.quant_conv:
            self.quant_conv = nn.Conv2d(2 * params.latent_channels, 2 * params.latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(params.latent_channels, params.latent_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def moments(self, x: Tensor, *, by_rows: bool = False) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance before scaling, each (B, C, h, w). x (B, 3, 8 h, 8 w) in [-1, 1]. `by_rows`
        takes half the memory and longer; the result is the same to rounding."""
        x = x.to(self.dtype)
        out = vae_rows.encode(self.encoder, x) if by_rows else self.encoder(x)
        if self.params.quant_conv:
            out = self.quant_conv(out)
        mean, logvar = out.chunk(2, dim=1)
        return mean, logvar

    def encode(self, x: Tensor, *, by_rows: bool = False) -> Tensor:
        """Pictures (B, 3, 8 h, 8 w) in [-1, 1] -> scaled latents (B, C, h, w), the posterior's mean."""
        mean, _ = self.moments(x, by_rows=by_rows)
        return self.params.scaling_factor * (mean - self.params.shift_factor)

    def decode(self, z: Tensor, *, by_rows: bool = False) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, 3, 8 h, 8 w), about [-1, 1] (not clamped). `by_rows` takes half
        the memory and longer; the result is the same to rounding."""
        z = z / self.params.scaling_factor + self.params.shift_factor
        z = z.to(self.dtype)
        if self.params.quant_conv:
            z = self.post_quant_conv(z)
        return vae_rows.decode(self.decoder, z) if by_rows else self.call_decoder(self.decoder, z)

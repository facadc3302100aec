"""The autoencoder some rows of the picture at a time: the same result, in half the memory.

A convolution of three rows reads one row above and below, which is there; what a group norm needs of the whole picture,
its mean and variance, is taken first. So there are no seams, and nothing is blended: tiles, as diffusers and ComfyUI
cut them, have norms and an attention each of their own.

A block needs its input and one tensor more, where `ResnetBlock` needs four: its result goes where its input was, or,
where that has other channels, where the tensor in between was.
Shapes: B batch, C channels, h w size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.models.layers import NormSiLU

if TYPE_CHECKING:
    from flux_engine.models.vae import Decoder, Encoder, Level, Middle, ResnetBlock, Upsample

WORK = 2**24
"""Bytes of float32 that are normed at a time."""
Read = Callable[[int, int], Tensor]
"""First row and the row behind the last one -> these rows (B, C, rows, w)."""


def decode(decoder: Decoder, z: Tensor) -> Tensor:
    """As `decoder(z)`: (B, C, h, w) -> (B, 3, 8 h, 8 w)."""
    x = _middle(decoder.mid, decoder.conv_in(z))
    for level in reversed(cast("list[Level]", decoder.up)):
        for block in cast("Iterable[ResnetBlock]", level.block):  # in a function of its own, x would be held here, too
            x = _resnet(block, x)
        if level.up:
            x = _upsample(level.upsample, x)
    return _convolved(decoder.conv_out, _normed(decoder.norm_out, x), x)


def encode(encoder: Encoder, x: Tensor) -> Tensor:
    """As `encoder(x)`: (B, 3, 8 h, 8 w) -> (B, 2 C, h, w)."""
    x = encoder.conv_in(x)
    for level in cast("Iterable[Level]", encoder.down):
        for block in cast("Iterable[ResnetBlock]", level.block):
            x = _resnet(block, x)
        if level.down:
            x = level.downsample(x)
    return encoder.conv_out(encoder.norm_out(_middle(encoder.mid, x)))


def _middle(middle: Middle, x: Tensor) -> Tensor:
    return _resnet(middle.block_2, middle.attn_1(_resnet(middle.block_1, x)))


def _resnet(block: ResnetBlock, x: Tensor) -> Tensor:
    """As `block(x)`; x is used up."""
    h = _convolved(block.conv1, _normed(block.norm1, x), x)
    normed = _normed(block.norm2, h)
    height, above = h.shape[2], h[:, :, :0]
    for start, end in _strips(h):
        # A row that the next strip reads is kept before this one is written over it.
        rows = torch.cat((above, normed(start, min(end + 1, height))), dim=2)
        above = normed(end - 1, end)
        update = _product(block.conv2, rows, top=start == 0, bottom=end == height)
        if block.changes_width:
            h[:, :, start:end] = block.nin_shortcut(x[:, :, start:end]) + update
        else:
            x[:, :, start:end] += update
    return h if block.changes_width else x


def _upsample(step: Upsample, x: Tensor) -> Tensor:
    height = x.shape[2]
    out = _empty(x, step.conv.out_channels, 2)
    for start, end in _strips(x, 4):
        above, below = start > 0, end < height
        rows = F.interpolate(x[:, :, start - above : end + below], scale_factor=2.0, mode="nearest")
        rows = rows[:, :, int(above) : rows.shape[2] - below]
        out[:, :, 2 * start : 2 * end] = _product(step.conv, rows, top=not above, bottom=not below)
    return out


def _convolved(conv: nn.Conv2d, read: Read, like: Tensor) -> Tensor:
    """A convolution of three rows of what `read` gives, which is of the size of `like`."""
    height = like.shape[2]
    out = _empty(like, conv.out_channels)
    for start, end in _strips(like):
        rows = read(max(0, start - 1), min(end + 1, height))
        out[:, :, start:end] = _product(conv, rows, top=start == 0, bottom=end == height)
    return out


def _product(conv: nn.Conv2d, rows: Tensor, *, top: bool, bottom: bool) -> Tensor:
    """Rows with one above and below -> those between; where the picture ends there are zeros instead."""
    if top or bottom:
        rows = F.pad(rows, (0, 0, int(top), int(bottom)))
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def _normed(norm: NormSiLU, x: Tensor) -> Read:
    """Rows of `norm(x)`, with mean and variance of x as it is now."""
    count, means, squares = 0, 0.0, 0.0
    for start, end in _strips(x):
        some = x[:, :, start:end].float().unflatten(1, (norm.num_groups, -1))
        number = some[0, 0].numel()
        variance, mean = torch.var_mean(some, dim=(2, 3, 4), correction=0)  # (B, groups)
        # Chan, Golub, LeVeque (1979): of two parts, without the loss of subtracting large squares.
        apart = mean - means
        squares = squares + variance * number + apart.square() * (count * number / (count + number))
        means = means + apart * (number / (count + number))
        count += number
    deviation = (torch.as_tensor(squares) / count + norm.eps).rsqrt()
    width = x.shape[1] // norm.num_groups
    scale = deviation.repeat_interleave(width, dim=1) * norm.weight.float()
    shift = norm.bias.float() - torch.as_tensor(means).repeat_interleave(width, dim=1) * scale

    def read(start: int, end: int) -> Tensor:
        made = x[:, :, start:end] * scale[:, :, None, None] + shift[:, :, None, None]
        return F.silu(made.to(x.dtype), inplace=True)

    return read


def _strips(x: Tensor, larger: int = 1) -> Iterator[tuple[int, int]]:
    """Rows from and to, of which what is made of them is `larger` times as much."""
    batch, channels, height, width = x.shape
    rows = max(2, WORK // (4 * larger * batch * channels * width))
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def _empty(like: Tensor, channels: int, scale: int = 1) -> Tensor:
    batch, _, height, width = like.shape
    last = like.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (batch, channels, scale * height, scale * width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )

"""GroupNorm, then SiLU, for pictures and latents in either layout of memory. Source: arXiv 1803.08494.

A group of a large picture has millions of numbers and there are few groups, so three kernels share the work: sums of
pieces of every channel, groups put together from these, and the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_kernels import arch, checks, registry
from flux_kernels.errors import ArgumentError
from flux_kernels.jit import jit

if TYPE_CHECKING:
    import triton.language as tl

NAME = "group_norm_silu"
PIECES = 128
"""At most, of the pixels of a picture."""
TILES = {True: (32, 64), False: (512, 4)}
"""Whether channels are last in memory -> pixels and channels of a block: what is side by side is read together."""
WIDEST = 256
"""Most channels of a group."""


@jit
def places(batch, channel, pixel, P, C, CHANNELS_LAST: tl.constexpr):
    """Where pixels x channels are. Strides are made here, because P as one would make Triton compile for every size."""
    if CHANNELS_LAST:
        return batch * P * C + pixel[:, None] * C + channel
    return batch * P * C + pixel[:, None] + channel * P.to(tl.int64)


@jit(do_not_specialize=("P", "piece"))
def sums_kernel(
    x, means, squares, P, C, piece, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared differences from it, of some pixels of some channels: the grid is (pieces, C, B).

    Sums are of differences from the first pixel, so that a large mean costs no digits.
    """
    number, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = number * piece
    end = tl.minimum(start + piece, P)
    real = channel < C
    place = places(batch, channel, start + tl.zeros((1,), tl.int32), P, C, CHANNELS_LAST)
    first = tl.load(x + place, mask=real[None], other=0.0).to(tl.float32)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    square = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for offset in range(0, piece, PIXELS):
        pixel = start + offset + tl.arange(0, PIXELS)
        mask = (pixel < end)[:, None] & real
        numbers = tl.load(x + places(batch, channel, pixel, P, C, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
        numbers = tl.where(mask, numbers - first, 0.0)
        total += numbers
        square += numbers * numbers
    total, square = tl.sum(total, 0), tl.sum(square, 0)
    mean = total / (end - start)
    target = (batch * tl.num_programs(0) + number) * C + channel
    tl.store(means + target, tl.sum(first, 0) + mean, mask=real)
    tl.store(squares + target, square - total * mean, mask=real)


@jit(do_not_specialize=("P", "piece", "pieces"))
def groups_kernel(
    means, squares, statistics, P, C, piece, pieces, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """Mean and 1 / deviation of a group, from those of pieces of its channels: the grid is (groups, B)."""
    group, batch = tl.program_id(0), tl.program_id(1)
    number, index = tl.arange(0, PIECES), tl.arange(0, BLOCK)
    mask = (number < pieces)[:, None] & (index < WIDTH)
    source = (batch * pieces + number)[:, None] * C + group * WIDTH + index
    mean = tl.load(means + source, mask=mask, other=0.0)
    square = tl.load(squares + source, mask=mask, other=0.0)
    count = tl.where(mask, tl.minimum(P - number * piece, piece)[:, None].to(tl.float32), 0.0)
    whole = P.to(tl.float32) * WIDTH
    centre = tl.sum(tl.sum(mean * (count / whole), 1), 0)
    square += count * (mean - centre) * (mean - centre)
    variance = tl.sum(tl.sum(square, 1), 0) / whole
    target = statistics + (batch * tl.num_programs(0) + group) * 2
    tl.store(target, centre)
    tl.store(target + 1, tl.rsqrt(variance + eps))


@jit(do_not_specialize=("P",))
def result_kernel(
    x, statistics, weight, bias, out, P, C, WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalised, weighed, and through SiLU: the grid is (P, C, B), a tile each."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(2).to(tl.int64)
    real = channel < C
    source = statistics + (batch * (C // WIDTH) + channel // WIDTH) * 2
    mean, factor = tl.load(source, mask=real, other=0.0), tl.load(source + 1, mask=real, other=0.0)
    weights = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    biases = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    mask = (pixel < P)[:, None] & real
    place = places(batch, channel, pixel, P, C, CHANNELS_LAST)
    result = (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - mean) * (factor * weights) + biases
    tl.store(out + place, (result * tl.sigmoid(result)).to(out.dtype.element_ty), mask=mask)


def reference(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (B, C, h, w), weight and bias (C,) -> (B, C, h, w) in the layout of x. In float32, rounded once."""
    out = F.silu(F.group_norm(x.float().contiguous(), groups, weight.float(), bias.float(), eps))
    return torch.empty_like(x).copy_(out)


def empty(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Checked, and room for the result. Raises ArgumentError, KernelUnavailable."""
    if x.dim() != 4 or x.dtype not in arch.FLOATS:
        raise ArgumentError(f"{NAME}: x is {x.dtype} of {x.dim()} axes, where floating numbers of 4 are possible")
    if not (_channels_last(x) or x.is_contiguous()):
        raise ArgumentError(f"{NAME}: x is neither contiguous nor channels last, with strides {list(x.stride())}")
    channels = x.shape[1]
    if groups < 1 or channels % groups or channels // groups > WIDEST:
        raise ArgumentError(f"{NAME}: {channels} channels in {groups} groups, which may have {WIDEST} each")
    for name, row in (("weight", weight), ("bias", bias)):
        checks.fits(NAME, name, row, (channels,), (x.dtype, torch.float32), x.device)
    arch.require(NAME, x.device, x.dtype)
    return torch.empty_like(x)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`reference` by the kernels. x is contiguous, or channels last, which is read in larger pieces and faster."""
    out = empty(x, groups, weight, bias, eps)
    batch, channels, height, width = x.shape
    pixels, each, last = height * width, channels // groups, _channels_last(x)
    if out.numel() == 0:
        return out
    tile = dict(zip(("PIXELS", "CHANNELS"), TILES[last], strict=True))
    blocks = -(-channels // tile["CHANNELS"])
    piece = max(tile["PIXELS"], -(-pixels // PIECES))
    pieces = -(-pixels // piece)
    means, squares = x.new_empty((2, batch, pieces, channels), dtype=torch.float32)
    statistics = x.new_empty((batch, groups, 2), dtype=torch.float32)
    sums_kernel.launch(
        (pieces, blocks, batch), x, means, squares, pixels, channels, piece, CHANNELS_LAST=last, **tile, num_warps=4
    )
    groups_kernel.launch(
        (groups, batch), means, squares, statistics, pixels, channels, piece, pieces, eps,
        WIDTH=each, BLOCK=1 << (each - 1).bit_length(), PIECES=PIECES, num_warps=8,
    )  # fmt: skip
    result_kernel.launch(
        (-(-pixels // tile["PIXELS"]), blocks, batch), x, statistics, weight, bias, out, pixels, channels,
        WIDTH=each, CHANNELS_LAST=last, **tile, num_warps=4,
    )  # fmt: skip
    return out


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


registry.define(
    f"{NAME}(Tensor x, int groups, Tensor weight, Tensor bias, float eps) -> Tensor",
    cuda=group_norm_silu,
    fake=empty,
)

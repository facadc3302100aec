"""How much arithmetic a step is, from widths and depths alone: what a measured time is held against.

A multiplication and an addition are two FLOPs. Counted are matrices, attention and convolutions, which are all but a
thousandth; what depends on prompt and schedule alone (modulation, the text's keys) is done once for a prompt and is no
part of a step. `tests/test_work.py` compares with what torch counts.

Shapes: B batch, L tokens (Li image, Lt text), D width, C channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from flux_engine.params import FluxParams, UNetParams, VAEParams


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one call of a network: FLOPs by kind, and how many weights it reads."""

    linear: int = 0
    """FLOPs of linears that a scheme of 8 bits multiplies so."""
    kept: int = 0
    """FLOPs of linears that no scheme changes."""
    attention: int = 0
    convolution: int = 0
    weights: int = 0
    """Numbers in the matrices of `linear`."""
    weights_kept: int = 0
    """Numbers in all others that are read."""

    @property
    def flops(self) -> int:
        """All of them."""
        return self.linear + self.kept + self.attention + self.convolution

    def bytes(self, item: int, *, quantized: bool) -> int:
        """That have to be read at least once: the weights, of `item` bytes each, or of one where they are of 8 bits."""
        return self.weights * (1 if quantized else item) + self.weights_kept * item

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, batch: int) -> Work:
        """The same for a batch: weights are read once."""
        once = ("weights", "weights_kept")
        return Work(**{f.name: getattr(self, f.name) * (1 if f.name in once else batch) for f in fields(self)})


def flux_step(params: FluxParams, *, image: int, text: int, batch: int = 1) -> Work:
    """A call of FLUX.1's transformer on `image` tokens, those of reference pictures among them, and `text` tokens."""
    D, mlp, every = params.hidden_size, int(params.hidden_size * params.mlp_ratio), image + text
    matrix = 4 * D * D + 2 * D * mlp  # of one stream's block: q, k, v, projection, and the MLP's two
    double = Work(linear=2 * matrix * every, attention=4 * every * every * D, weights=2 * matrix)
    single = Work(linear=2 * matrix * every, attention=4 * every * every * D, weights=matrix)
    ends = D * (params.in_channels + params.out_channels)
    total = Work(kept=2 * image * ends, weights_kept=ends)
    for block, count in ((double, params.depth), (single, params.depth_single_blocks)):
        for _ in range(count):
            total += block
    return total * batch


def unet_step(params: UNetParams, *, h: int, w: int, text: int = 77, batch: int = 1) -> Work:
    """A call of SDXL's UNet on a latent (h, w). Guidance is a batch of two for each picture."""
    channels, count = params.block_out_channels, params.layers_per_block
    last = len(channels) - 1
    sizes = [(h, w)]
    for _ in range(last):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    area = [rows * columns for rows, columns in sizes]
    total = _conv(params.in_channels, channels[0], area[0]) + _conv(channels[0], params.out_channels, area[0])

    for i, width in enumerate(channels):
        inputs = [channels[max(i - 1, 0)]] + [width] * (count - 1)
        total += _level(inputs, width, params.transformer_depth[i], area[i], text)
        if i < last:
            total += _conv(width, width, area[i + 1])  # the step down
    total += _level([channels[-1]], channels[-1], params.mid_depth, area[-1], text)
    total += _resnet(channels[-1], channels[-1], area[-1])
    for i, width in enumerate(channels):
        below, above = channels[min(i + 1, last)], channels[max(i - 1, 0)]
        inputs = [(below if j == 0 else width) + (above if j == count else width) for j in range(count + 1)]
        total += _level(inputs, width, params.transformer_depth[i], area[i], text)
        if i > 0:
            total += _conv(width, width, area[i - 1])  # the step up
    return total * batch


def decode(params: VAEParams, *, h: int, w: int, batch: int = 1) -> Work:
    """The autoencoder's way from a latent (h, w) to a picture."""
    widths = [params.channels * m for m in params.channel_multipliers]
    last, C, area = len(widths) - 1, widths[-1], h * w
    total = _conv(params.latent_channels, C, area)
    if params.quant_conv:
        total += _conv(params.latent_channels, params.latent_channels, area, side=1)
    total += _resnet(C, C, area) + _resnet(C, C, area)
    total += _conv(C, 4 * C, area, side=1) + Work(attention=4 * area * area * C)
    for i in range(last, -1, -1):
        inputs = [widths[min(i + 1, last)]] + [widths[i]] * params.num_res_blocks
        for width in inputs:
            total += _resnet(width, widths[i], area)
        if i > 0:
            area *= 4
            total += _conv(widths[i], widths[i], area)
    return (total + _conv(widths[0], params.image_channels, area)) * batch


def _conv(inputs: int, outputs: int, area: int, *, side: int = 3) -> Work:
    """`area` counts the positions that come out."""
    numbers = side * side * inputs * outputs
    return Work(convolution=2 * numbers * area, weights_kept=numbers)


def _resnet(inputs: int, outputs: int, area: int) -> Work:
    made = _conv(inputs, outputs, area) + _conv(outputs, outputs, area)
    return made if inputs == outputs else made + _conv(inputs, outputs, area, side=1)


def _level(inputs: Sequence[int], width: int, depth: int, area: int, text: int) -> Work:
    """Blocks of one resolution, each with attention of this depth, or none."""
    total = Work()
    for each in inputs:
        total += _resnet(each, width, area)
        if depth:
            total += _transformer(width, depth, area, text)
    return total


def _transformer(D: int, depth: int, tokens: int, text: int) -> Work:
    matrix = 18 * D * D  # self-attention 4, query and output of the other 2, GEGLU 8 and 4
    each = Work(linear=2 * matrix * tokens, attention=4 * tokens * (tokens + text) * D, weights=matrix)
    total = Work(kept=4 * D * D * tokens, weights_kept=2 * D * D)
    for _ in range(depth):
        total += each
    return total

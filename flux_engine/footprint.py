"""How many bytes a model's parts take, and a request beside them: from a spec alone, before any weight is looked at.

Shapes: B batch, L tokens, D width, C channels, H W picture size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn

from flux_engine.errors import WeightsError
from flux_engine.models.flux import Flux
from flux_engine.models.unet import UNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import ClipParams, FluxParams, T5Params, UNetParams, VAEParams
from flux_engine.quantization.linears import WORK
from flux_engine.quantization.policy import place, treatment
from flux_engine.specs import FluxSpec, ModelSpec, SDXLSpec

Made = TypeVar("Made", bound=nn.Module)
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
SLOW = ":none"
"""Behind the name of a part: of the network in full precision, beside one of 8 bits."""
BY_ROWS, REMEMBERED = "autoencoder by rows", "remembered"
KEPT = 4
"""How many results of `precompute` are remembered where its weights leave, each for one prompt and schedule."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How large a request is."""

    width: int
    height: int
    pictures: int = 1
    rows: int = 1
    """Of the network's batch for each picture: two where there is classifier-free guidance."""
    steps: int = 4
    reference: int = 0
    """Tokens that are read behind the picture's own."""
    controlnets: int = 0
    kept: int = 0
    """How many times the picture's tokens, or its widest states, are kept from call to call."""

    @classmethod
    def default(cls, spec: ModelSpec, **changes: Any) -> Extent:
        """One picture of a model's own size and number of steps."""
        width, height = spec.sizes.named("1:1", spec.sizes.classes[0])
        guided = not spec.guidance_embedded and spec.guidance_scale is not None
        made = cls(width=width, height=height, rows=1 + guided, steps=spec.num_inference_steps)
        return replace(made, **changes)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model: of the parts that may leave, and of the rest."""

    parts: Mapping[str, int]
    always: int


def sizes_of(spec: ModelSpec, dtype: str, schemes: Sequence[str]) -> Sizes:
    """Of a model whose network is there in each of these schemes, the text encoders and the autoencoder once."""
    item, parts, always = DTYPES[dtype], dict[str, int](), 0
    for number, scheme in enumerate(schemes):
        mark = SLOW if number else ""
        rest, parts["modulation" + mark], parts["network" + mark] = _network(network_of(spec), scheme, item)
        always += rest
    reading = 4 if dtype == "float16" and isinstance(spec, FluxSpec) else item  # T5 runs over in float16
    read = "none" if "none" in schemes else schemes[0]  # both precisions share the text encoders
    for encoder in spec.encoders:
        layers, rest = _t5(encoder, read, reading) if isinstance(encoder, T5Params) else _clip(encoder, reading)
        parts["text"] = parts.get("text", 0) + layers
        always += rest
    rest, parts["vae"] = (count * _vae_item(spec, dtype) for count in _autoencoder(spec.vae))
    return Sizes(parts, always + rest)


def work_of(spec: ModelSpec, dtype: str, quantized: bool, extent: Extent) -> dict[str, int]:
    """Bytes beside the weights that each stage takes at most; besides, what the autoencoder takes BY_ROWS, and what is
    REMEMBERED of prompts where modulation leaves. Fitted to what a dry run counts (benchmarks/dry_run.py)."""
    item, rows = DTYPES[dtype], extent.rows * extent.pictures
    positions = extent.width * extent.height // spec.vae.downscale**2

    def wide(*sides: int) -> int:
        """What linears of 8 bits have in float32 at a time, of a matrix of this size."""
        return min(WORK, 4 * math.prod(sides)) if quantized else 0

    if isinstance(spec, FluxSpec):
        net, length, D = spec.transformer, spec.max_sequence_length, spec.transformer.hidden_size
        t5 = next(one for one in spec.encoders if isinstance(one, T5Params))
        reading = 4 if dtype == "float16" else item
        tokens = positions // 4
        blocks = 12 * net.depth + 3 * net.depth_single_blocks + 2
        statics = item * rows * D * (extent.steps * blocks + length)
        told = length * t5.d_model * (reading + item)  # what was encoded, and what of it is read
        text = reading * length * (1.5 * t5.heads * length + 5.3 * t5.d_ff)
        # In bfloat16 numbers of 8 bits are multiplied as they are, and scales are of few sums.
        in_text, in_made = (1.0, 1.0) if dtype == "bfloat16" else (2.9, 2.5)
        text += in_text * wide(max(length, t5.d_model), t5.d_ff)
        made = 2.4 * told + in_made * wide(6 * D, D)
        every = tokens + extent.reference + length
        denoise = 23.2 * item * rows * every * D + 2 * told + 2 * wide(rows * every, 7 * D)
        denoise += (15 * extent.controlnets * tokens + extent.kept * (every - length)) * item * rows * D
    else:
        unet = network_of(spec)
        assert isinstance(unet, UNetParams)
        D, widest = unet.block_out_channels, max(one.mlp for one in spec.encoders if isinstance(one, ClipParams))
        text = 13.5 * item * 77 * widest
        told = item * rows * 77 * unet.cross_attention_dim
        statics = item * rows * (77 * _text_channels(unet) + extent.steps * _time_channels(unet))
        made = told
        states = 16.1 + 5 * extent.controlnets + extent.kept
        denoise = item * rows * positions * D[0] * states + wide(rows * positions, 8 * D[0])
    several = 1 if isinstance(spec, FluxSpec) and rows == 1 else 2.05  # first row by row, then together
    pixels = extent.width * extent.height * spec.vae.channels * _vae_item(spec, dtype)
    return {
        "text": int(text),
        "precompute": int(several * statics + made),
        "denoise": int(statics + denoise),
        "autoencoder": int(6.1 * pixels + 2 * told),
        BY_ROWS: int(3.3 * pixels + 2 * told),
        REMEMBERED: int(KEPT * statics / rows),
    }


def network_of(spec: ModelSpec) -> FluxParams | UNetParams:
    """Widths and depths of what denoises."""
    if isinstance(spec, FluxSpec):
        return spec.transformer
    assert isinstance(spec, SDXLSpec)
    return spec.unet


def _made(make: Callable[[], Made]) -> Made:
    """A network on the meta device. Raises WeightsError for widths that do not go together."""
    try:
        with torch.device("meta"):
            return make()
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"no network can be made as it is described: {error}") from None


@lru_cache(maxsize=64)
def _network(params: FluxParams | UNetParams, scheme: str, item: int) -> tuple[int, int, int]:
    """Bytes of what always stays of a network, of what only its `precompute` reads, and of the rest of its blocks."""
    net: Any = _made(lambda: Flux(params) if isinstance(params, FluxParams) else UNet(params))
    with torch.device("meta"):
        if (treat := treatment("flux" if isinstance(params, FluxParams) else "unet", scheme)) is not None:
            place(net, treat)
    once, blocks = re.compile(str(net.precomputed)), re.compile(str(net.blocks))
    sizes = [0, 0, 0]
    for name, parameter in net.named_parameters():
        plain = parameter.dtype == torch.float32 and not name.endswith("_scale")
        kind = 1 if once.fullmatch(name) else 2 if blocks.fullmatch(name) else 0
        sizes[kind] += parameter.numel() * (item if plain else parameter.element_size())
    return sizes[0], sizes[1], sizes[2]


@lru_cache(maxsize=64)
def _autoencoder(params: VAEParams) -> tuple[int, int]:
    """How many numbers of it always stay, and how many are in its blocks."""
    vae = _made(lambda: AutoEncoder(params))
    sizes = [0, 0]
    for name, parameter in vae.named_parameters():
        sizes[bool(re.fullmatch(vae.blocks, name))] += parameter.numel()
    return sizes[0], sizes[1]


def _vae_item(spec: ModelSpec, dtype: str) -> int:
    """Bytes of its numbers: where it would run over in float16 and there is no bfloat16, it runs in float32."""
    return 4 if dtype == "float16" and spec.vae.force_upcast else DTYPES[dtype]


def _clip(params: ClipParams, item: int) -> tuple[int, int]:
    """Bytes of its layers, and of the rest."""
    width, mlp = params.hidden_size, params.mlp
    layer = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    rest = (params.vocabulary + params.positions + 2 + width * params.projection) * width
    return item * params.layers * layer, item * rest


def _t5(params: T5Params, scheme: str, item: int) -> tuple[int, int]:
    """Bytes of its blocks, and of the rest."""
    inner = params.heads * params.d_kv
    shapes = [(inner, params.d_model)] * 3 + [(params.d_model, inner)]
    shapes += [(params.d_ff, params.d_model)] * 2 + [(params.d_model, params.d_ff)]
    linears = sum(rows * (columns * item if scheme == "none" else columns + 4) for rows, columns in shapes)
    blocks = params.layers * (linears + item * 2 * params.d_model) + item * 32 * params.heads
    return blocks, item * (params.vocabulary + 1) * params.d_model


def _transformers(params: UNetParams) -> Iterator[tuple[int, int]]:
    """Of each resolution its width, and how many transformer blocks are there on the way down and up."""
    for width, depth in zip(params.block_out_channels, params.transformer_depth, strict=True):
        yield width, depth * (2 * params.layers_per_block + 1)
    yield params.block_out_channels[-1], params.mid_depth


def _text_channels(params: UNetParams) -> int:
    """Of the keys and values of all blocks together."""
    return sum(2 * width * blocks for width, blocks in _transformers(params))


def _time_channels(params: UNetParams) -> int:
    """Of what all resnets are told of the time."""
    count = 2 * params.layers_per_block + 1
    return sum(width * count for width in params.block_out_channels) + 2 * params.block_out_channels[-1]

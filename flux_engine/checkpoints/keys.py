"""Key tables: how other layouts name what our networks hold.

A table is a list of entries with `{i}` and `{j}` for numbers. An entry with several foreign names says that our
tensor's rows are theirs, one after another. Source of the names: huggingface/diffusers, FluxTransformer2DModel and
AutoencoderKL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_engine.errors import WeightsError


@dataclass(frozen=True)
class Entry:
    """One line of a key table: names without `.weight` or `.bias`, which both sides carry alike."""

    ours: str
    theirs: tuple[str, ...]
    swap_halves: bool = False
    """Our rows are (shift, scale), theirs (scale, shift)."""
    matrix: bool = False
    """Ours is a 1x1 convolution, theirs a linear with the same numbers."""
    leaf: tuple[str, str] | None = None
    """Our and their last name part, where it is not the same on both sides."""


def _one(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,))


def _norm(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,), leaf=("scale", "weight"))


_D = "double_blocks.{i}."
_T = "transformer_blocks.{i}."
_S = "single_blocks.{i}."
_U = "single_transformer_blocks.{i}."

FLUX_DIFFUSERS: tuple[Entry, ...] = (
    _one("img_in", "x_embedder"),
    _one("txt_in", "context_embedder"),
    _one("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    _one("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    _one("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    _one("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    _one("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    _one("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    _one(_D + "img_mod.lin", _T + "norm1.linear"),
    _one(_D + "txt_mod.lin", _T + "norm1_context.linear"),
    Entry(_D + "img_attn.qkv", (_T + "attn.to_q", _T + "attn.to_k", _T + "attn.to_v")),
    Entry(
        _D + "txt_attn.qkv",
        (_T + "attn.add_q_proj", _T + "attn.add_k_proj", _T + "attn.add_v_proj"),
    ),
    _norm(_D + "img_attn.norm.query_norm", _T + "attn.norm_q"),
    _norm(_D + "img_attn.norm.key_norm", _T + "attn.norm_k"),
    _norm(_D + "txt_attn.norm.query_norm", _T + "attn.norm_added_q"),
    _norm(_D + "txt_attn.norm.key_norm", _T + "attn.norm_added_k"),
    _one(_D + "img_attn.proj", _T + "attn.to_out.0"),
    _one(_D + "txt_attn.proj", _T + "attn.to_add_out"),
    _one(_D + "img_mlp.0", _T + "ff.net.0.proj"),
    _one(_D + "img_mlp.2", _T + "ff.net.2"),
    _one(_D + "txt_mlp.0", _T + "ff_context.net.0.proj"),
    _one(_D + "txt_mlp.2", _T + "ff_context.net.2"),
    _one(_S + "modulation.lin", _U + "norm.linear"),
    Entry(
        _S + "linear1",
        (_U + "attn.to_q", _U + "attn.to_k", _U + "attn.to_v", _U + "proj_mlp"),
    ),
    _one(_S + "linear2", _U + "proj_out"),
    _norm(_S + "norm.query_norm", _U + "attn.norm_q"),
    _norm(_S + "norm.key_norm", _U + "attn.norm_k"),
    _one("final_layer.linear", "proj_out"),
    Entry("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
)


def _resnets(ours: str, theirs: str) -> list[Entry]:
    same = ("norm1", "conv1", "norm2", "conv2")
    return [_one(f"{ours}.{name}", f"{theirs}.{name}") for name in same] + [
        _one(f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut")
    ]


def vae_diffusers(levels: int) -> tuple[Entry, ...]:
    """The autoencoder's table. Of its `levels` resolutions, diffusers counts the decoder's from the other end."""
    table: list[Entry] = []
    for side in ("encoder", "decoder"):
        table += [
            _one(f"{side}.conv_in", f"{side}.conv_in"),
            _one(f"{side}.norm_out", f"{side}.conv_norm_out"),
            _one(f"{side}.conv_out", f"{side}.conv_out"),
        ]
        middle = f"{side}.mid_block.attentions.0"
        table += _resnets(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        table += _resnets(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        table.append(_one(f"{side}.mid.attn_1.norm", f"{middle}.group_norm"))
        for ours, theirs in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("proj_out", "to_out.0"),
        ):
            table.append(Entry(f"{side}.mid.attn_1.{ours}", (f"{middle}.{theirs}",), matrix=True))
    for level in range(levels):
        up = levels - 1 - level
        table += _resnets(
            f"encoder.down.{level}.block.{{i}}",
            f"encoder.down_blocks.{level}.resnets.{{i}}",
        )
        table += _resnets(f"decoder.up.{level}.block.{{i}}", f"decoder.up_blocks.{up}.resnets.{{i}}")
        table.append(
            _one(
                f"encoder.down.{level}.downsample.conv",
                f"encoder.down_blocks.{level}.downsamplers.0.conv",
            )
        )
        table.append(
            _one(
                f"decoder.up.{level}.upsample.conv",
                f"decoder.up_blocks.{up}.upsamplers.0.conv",
            )
        )
    table += [
        _one("quant_conv", "quant_conv"),
        _one("post_quant_conv", "post_quant_conv"),
    ]
    return tuple(table)


def to_theirs(tensors: Mapping[str, Tensor], table: tuple[Entry, ...], *, width: int = 0) -> dict[str, Tensor]:
    """Rename (and split, swap, squeeze) our tensors to the other layout.

    `width` is the number of rows of every part of a joined tensor but the last, which takes the rest.
    Raises WeightsError for a tensor no entry matches.
    """
    patterns = [(re.compile(_pattern(entry.ours)), entry) for entry in table]
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        for pattern, entry in patterns:
            match = pattern.fullmatch(stem)
            if match and (entry.leaf is None or entry.leaf[0] == leaf):
                numbers = match.groupdict()
                suffix = entry.leaf[1] if entry.leaf else leaf
                names = [f"{t.format(**numbers)}.{suffix}" for t in entry.theirs]
                out |= zip(names, _parts(tensor, entry, width), strict=True)
                break
        else:
            raise WeightsError(f"no entry of the key table matches {name!r}")
    return out


def _pattern(template: str) -> str:
    return re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)")


def _parts(tensor: Tensor, entry: Entry, width: int) -> list[Tensor]:
    if entry.swap_halves:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    if entry.matrix and tensor.dim() == 4:
        tensor = tensor[:, :, 0, 0]
    count = len(entry.theirs)
    if count == 1:
        return [tensor.contiguous()]
    sizes = [width] * (count - 1)
    sizes.append(tensor.shape[0] - sum(sizes))
    return [part.contiguous() for part in tensor.split(sizes)]

"""The key tables, as the published layouts are.

Sources of the names: huggingface/diffusers, FluxTransformer2DModel, AutoencoderKL and UNet2DConditionModel;
mlfoundations/open_clip, CLIP's text tower; Stability-AI/generative-models, the UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flux_engine.checkpoints.keys import Entry, Table


def _one(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,))


def _norm(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,), leaf=("scale", "weight"))


_D = "double_blocks.{i}."
_T = "transformer_blocks.{i}."
_S = "single_blocks.{i}."
_U = "single_transformer_blocks.{i}."

FLUX_DIFFUSERS: Table = (
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

_HINT = {"conv_in": 0, **{f"blocks.{n}": 2 + 2 * n for n in range(6)}, "conv_out": 14}
"""Where XLabs' numbers diffusers' convolutions have."""
_OF_CONTROLNETS = tuple(
    _one(name, name) for name in ("controlnet_blocks.{i}", "controlnet_single_blocks.{i}", "controlnet_mode_embedder")
)
FLUX_CONTROLNET_DIFFUSERS: Table = (
    *FLUX_DIFFUSERS,
    *_OF_CONTROLNETS,
    _one("controlnet_x_embedder", "controlnet_x_embedder"),
    *(_one(f"input_hint_block.{number}", f"input_hint_block.{name}") for name, number in _HINT.items()),
)
FLUX_CONTROLNET_XLABS: Table = (
    *(_one(entry.ours, entry.ours) for entry in FLUX_DIFFUSERS),
    *_OF_CONTROLNETS,
    _one("controlnet_x_embedder", "pos_embed_input"),
    _one("input_hint_block.{i}", "input_hint_block.{i}"),
)
"""Black Forest Labs' names but for one; ComfyUI keeps other publishers' ControlNets so, too."""


def _resnets(ours: str, theirs: str) -> list[Entry]:
    same = ("norm1", "conv1", "norm2", "conv2")
    return [_one(f"{ours}.{name}", f"{theirs}.{name}") for name in same] + [
        _one(f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut")
    ]


def vae_diffusers(levels: int) -> Table:
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


def published_clip(name: str) -> str:
    """What transformers' own models call a tensor of CLIP's -> what files call it: newer versions of transformers leave
    the prefix out."""
    return name if name.startswith("text_projection.") else f"text_model.{name.removeprefix('text_model.')}"


CLIP_TRANSFORMERS: Table = (Entry("", ("text_model.embeddings",), leaf=("", "position_ids")),)
"""Older files store the numbers of the positions as well."""
SIGLIP_TRANSFORMERS: Table = (
    Entry("", ("embeddings",), leaf=("", "position_ids")),
    Entry("", ("head",), leaf=("", "probe")),
    *(_one("", f"head.{part}") for part in ("attention", "attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")),
)
"""What a vision tower's file holds beside the last states: the head pools them, and nothing here reads that."""
T5_TRANSFORMERS: Table = (_one("shared", "encoder.embed_tokens"),)
"""The table of pieces goes by either name, or by both."""


def clip_open_clip() -> Table:
    """OpenCLIP's text tower, as SDXL's single files hold it; ours is transformers' CLIPTextModelWithProjection."""
    ours, theirs = "text_model.encoder.layers.{i}", "transformer.resblocks.{i}"
    table = [
        _one("text_model.embeddings.token_embedding", "token_embedding"),
        Entry("text_model.embeddings.position_embedding", ("",), leaf=("weight", "positional_embedding")),
        _one("text_model.final_layer_norm", "ln_final"),
        Entry("text_projection", ("",), leaf=("weight", "text_projection"), transposed=True),
        Entry("", ("",), leaf=("", "logit_scale")),
        _one(f"{ours}.layer_norm1", f"{theirs}.ln_1"),
        _one(f"{ours}.layer_norm2", f"{theirs}.ln_2"),
        _one(f"{ours}.self_attn.out_proj", f"{theirs}.attn.out_proj"),
        _one(f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc"),
        _one(f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj"),
    ]
    for number, name in enumerate("qkv"):
        for leaf in ("weight", "bias"):
            there = Entry(f"{ours}.self_attn.{name}_proj", (f"{theirs}.attn",), leaf=(leaf, f"in_proj_{leaf}"))
            table.append(replace(there, part=(number, 3)))
    return tuple(table)


def unet_sgm(attention: Sequence[bool]) -> Table:
    """SDXL's UNet as its single files hold it; ours is named as diffusers names it, with q, k and v joined.

    `attention` says for each resolution, the finest first, whether it has any: base (no, yes, yes), refiner (no, yes,
    yes, no).
    """
    levels, blocks = len(attention), 2
    table = [
        _one("time_embedding.linear_1", "time_embed.0"),
        _one("time_embedding.linear_2", "time_embed.2"),
        _one("time_embedding.cond_proj", "time_embed.cond_proj"),  # LCM's; no such file is known in this layout
        _one("add_embedding.linear_1", "label_emb.0.0"),
        _one("add_embedding.linear_2", "label_emb.0.2"),
        _one("conv_in", "input_blocks.0.0"),
        _one("conv_norm_out", "out.0"),
        _one("conv_out", "out.2"),
        *_sgm_resnet("mid_block.resnets.0", "middle_block.0"),
        *_sgm_attention("mid_block.attentions.0", "middle_block.1"),
        *_sgm_resnet("mid_block.resnets.1", "middle_block.2"),
    ]
    for level in range(levels):
        down, first = f"down_blocks.{level}", 1 + (blocks + 1) * level
        for j in range(blocks):
            table += _sgm_resnet(f"{down}.resnets.{j}", f"input_blocks.{first + j}.0")
            if attention[level]:
                table += _sgm_attention(f"{down}.attentions.{j}", f"input_blocks.{first + j}.1")
        if level < levels - 1:
            table.append(_one(f"{down}.downsamplers.0.conv", f"input_blocks.{first + blocks}.0.op"))
        up, first, here = f"up_blocks.{level}", (blocks + 1) * level, attention[levels - 1 - level]
        for j in range(blocks + 1):
            table += _sgm_resnet(f"{up}.resnets.{j}", f"output_blocks.{first + j}.0")
            if here:
                table += _sgm_attention(f"{up}.attentions.{j}", f"output_blocks.{first + j}.1")
        if level < levels - 1:
            table.append(_one(f"{up}.upsamplers.0.conv", f"output_blocks.{first + blocks}.{1 + here}.conv"))
    return tuple(table)


def _sgm_resnet(ours: str, theirs: str) -> list[Entry]:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return [_one(f"{ours}.{our}", f"{theirs}.{their}") for our, their in names.items()]


def _sgm_attention(ours: str, theirs: str) -> list[Entry]:
    block = "transformer_blocks.{i}."
    inside = ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"]
    names = ["norm", "proj_in", "proj_out", *(block + name for name in inside)]
    return [
        *(_one(f"{ours}.{name}", f"{theirs}.{name}") for name in names),
        *(
            Entry(f"{ours}.{block}{joined}", tuple(f"{theirs}.{block}{name}" for name in _split(joined)))
            for joined in ("attn1.to_qkv", "attn2.to_kv")
        ),
    ]


def _split(joined: str) -> list[str]:
    """attn1.to_qkv -> attn1.to_q, attn1.to_k, attn1.to_v; any other name is its own."""
    stem, found, letters = joined.rpartition(".to_")
    return [f"{stem}.to_{letter}" for letter in letters] if found and letters in ("qkv", "kv") else [joined]


def _named_alike(table: Table) -> Table:
    """The table of a layout with our names: only q, k and v are not joined."""
    return tuple(replace(entry, theirs=tuple(_split(entry.ours))) for entry in table)


def unet_diffusers(attention: Sequence[bool]) -> Table:
    """SDXL's UNet as diffusers holds it."""
    return _named_alike(unet_sgm(attention))


def unet_controlnet_sgm(attention: Sequence[bool], hints: int) -> Table:
    """A ControlNet for SDXL's UNet under the names that the first ControlNets had, and the UNet's.

    `hints` are the convolutions that the picture which steers goes through; every second module there is a SiLU.
    """
    ours = ["conv_in", *(f"blocks.{i}" for i in range(hints - 2)), "conv_out"]
    return (
        *unet_sgm(attention),
        *(_one(f"controlnet_cond_embedding.{our}", f"input_hint_block.{2 * i}") for i, our in enumerate(ours)),
        _one("controlnet_down_blocks.{i}", "zero_convs.{i}.0"),
        _one("controlnet_mid_block", "middle_block_out.0"),
    )


def unet_controlnet_diffusers(attention: Sequence[bool], hints: int) -> Table:
    """The same as diffusers holds it."""
    return _named_alike(unet_controlnet_sgm(attention, hints))

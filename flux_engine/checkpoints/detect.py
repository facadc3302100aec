"""What a weight file holds, told from the names and shapes of its tensors and never from its own name.

One file may hold several parts, each under a prefix: a ComfyUI file a transformer, both text encoders and an
autoencoder. A part is known by a tensor that nothing else has; what stands before that tensor's name is the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from flux_engine.checkpoints.keys import Table, to_ours
from flux_engine.checkpoints.quantized import Saved
from flux_engine.checkpoints.scaled import unscaled
from flux_engine.checkpoints.source import WeightSource
from flux_engine.checkpoints.tables import (
    CLIP_TRANSFORMERS,
    FLUX_CONTROLNET_DIFFUSERS,
    FLUX_CONTROLNET_XLABS,
    FLUX_DIFFUSERS,
    SIGLIP_TRANSFORMERS,
    T5_TRANSFORMERS,
    clip_open_clip,
    unet_controlnet_diffusers,
    unet_controlnet_sgm,
    unet_diffusers,
    unet_sgm,
    vae_diffusers,
)
from flux_engine.errors import WeightsError
from flux_engine.params import count_of

Kind = Literal["flux", "flux_controlnet", "unet", "unet_controlnet", "vae", "clip", "t5", "redux", "siglip"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """One network's weights inside a file."""

    kind: Kind
    layout: str
    prefix: str
    table: Table = ()
    """From its layout to our names; empty where they are the same."""
    own: bool = False
    """Saved here (quantized.py): scales beside weights are tensors of the network."""

    def of(self, source: WeightSource) -> WeightSource:
        """The part's tensors under our names."""
        inside = source.under(self.prefix)
        if self.own:
            return inside
        inside = unscaled(inside)
        return to_ours(inside, self.table) if self.table else inside


@dataclass(frozen=True)
class Sign:
    """A tensor that gives a part away."""

    tensor: str
    kind: Kind
    layout: str
    table: Callable[[Shapes], Table] = lambda _: ()
    also: str = ""
    """A second tensor that has to be there, under the same prefix."""
    unless: str = ""
    """A tensor that must not be there: another network has both."""

    def fits(self, shapes: Shapes, prefix: str) -> bool:
        """Whether the other two say so, too."""
        return (not self.also or prefix + self.also in shapes) and not (self.unless and prefix + self.unless in shapes)


def _sgm_attention(shapes: Shapes) -> tuple[bool, ...]:
    """Which resolutions of a UNet in SGM's layout have attention."""
    levels = (count_of(shapes, "input_blocks.") + 1) // 3
    return tuple(f"input_blocks.{1 + 3 * level}.1.norm.weight" in shapes for level in range(levels))


def _attention(shapes: Shapes) -> tuple[bool, ...]:
    """The same in diffusers' layout."""
    levels = count_of(shapes, "down_blocks.")
    return tuple(f"down_blocks.{level}.attentions.0.norm.weight" in shapes for level in range(levels))


SIGNS = (
    Sign("double_blocks.0.img_attn.norm.key_norm.scale", "flux", "Black Forest Labs",
         unless="controlnet_blocks.0.weight"),
    Sign("transformer_blocks.0.attn.norm_added_k.weight", "flux", "diffusers", lambda _: FLUX_DIFFUSERS,
         also="single_transformer_blocks.0.attn.norm_k.weight", unless="controlnet_blocks.0.weight"),
    Sign("controlnet_x_embedder.weight", "flux_controlnet", "diffusers", lambda _: FLUX_CONTROLNET_DIFFUSERS,
         also="transformer_blocks.0.norm1_context.linear.weight"),
    Sign("controlnet_x_embedder.weight", "flux_controlnet", "Black Forest Labs",
         also="double_blocks.0.img_attn.norm.key_norm.scale"),
    Sign("pos_embed_input.weight", "flux_controlnet", "XLabs", lambda _: FLUX_CONTROLNET_XLABS,
         also="double_blocks.0.img_attn.norm.key_norm.scale"),
    Sign("input_blocks.0.0.weight", "unet", "SGM", lambda shapes: unet_sgm(_sgm_attention(shapes)),
         also="label_emb.0.0.weight", unless="input_hint_block.0.weight"),
    Sign("down_blocks.0.resnets.0.time_emb_proj.weight", "unet", "diffusers",
         lambda shapes: unet_diffusers(_attention(shapes)), also="add_embedding.linear_1.weight",
         unless="controlnet_cond_embedding.conv_in.weight"),
    Sign("input_hint_block.0.weight", "unet_controlnet", "SGM",
         lambda shapes: unet_controlnet_sgm(_sgm_attention(shapes), count_of(shapes, "input_hint_block.")),
         also="label_emb.0.0.weight"),
    Sign("controlnet_cond_embedding.conv_in.weight", "unet_controlnet", "diffusers",
         lambda shapes: unet_controlnet_diffusers(
             _attention(shapes), count_of(shapes, "controlnet_cond_embedding.blocks.") + 2),
         also="add_embedding.linear_1.weight"),
    Sign("decoder.up.0.block.0.norm1.weight", "vae", "LDM"),
    Sign("decoder.up_blocks.0.resnets.0.norm1.weight", "vae", "diffusers",
         lambda shapes: vae_diffusers(count_of(shapes, "decoder.up_blocks."))),
    Sign("text_model.encoder.layers.0.layer_norm1.weight", "clip", "transformers", lambda _: CLIP_TRANSFORMERS),
    Sign("transformer.resblocks.0.attn.in_proj_weight", "clip", "OpenCLIP", lambda _: clip_open_clip(),
         also="positional_embedding"),
    Sign("encoder.block.0.layer.0.SelfAttention.q.weight", "t5", "transformers", lambda _: T5_TRANSFORMERS),
    Sign("redux_up.weight", "redux", "Black Forest Labs"),
    Sign("embeddings.patch_embedding.bias", "siglip", "transformers", lambda _: SIGLIP_TRANSFORMERS,
         also="embeddings.position_embedding.weight"),  # CLIP for pictures has no such bias, BLIP no such weight
)  # fmt: skip

FOREIGN = {
    "distilled_guidance_layer.in_proj.weight": "a Chroma transformer",
    "single_stream_modulation.lin.weight": "a FLUX.2 transformer",
    "control_add_embedding.linear_1.weight": "a ControlNet for SDXL that follows pictures of several kinds (Union)",
    "lora_controlnet": "a ControlNet that is a LoRA of the UNet (Control-LoRA)",
    "controlnet_blocks.0.linear.weight": "MistoLine, a ControlNet for FLUX of its own kind",
    "controlnet_mode_embedder.fc.weight": "the alpha version of a ControlNet for FLUX, which is another network",
    "visual.conv1.weight": "CLIP for pictures",
    "text_model.head.weight": "SigLIP's text encoder",
}
"""Tensors of networks that have everything that gives a part away, and are another one."""
OTHERS = {
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet for Stable Diffusion 1 or 2",
    "zero_convs.0.0.weight": "a ControlNet for Stable Diffusion 1 or 2",
    "joint_blocks.0.context_block.attn.qkv.weight": "a Stable Diffusion 3 transformer",
    "transformer_blocks.0.attn.add_q_proj.weight": "a Stable Diffusion 3 transformer",
    "input_blocks.0.0.weight": "a Stable Diffusion 1 or 2 UNet",
    "down_blocks.0.resnets.0.time_emb_proj.weight": "a Stable Diffusion 1 or 2 UNet",
}
"""Tensors of what people also have at hand."""
LORA = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight", ".lokr_w1", ".hada_w1_a")
NAMES: Mapping[Kind, str] = {
    "flux": "a FLUX.1 transformer",
    "flux_controlnet": "a ControlNet for FLUX",
    "unet": "an SDXL UNet",
    "unet_controlnet": "a ControlNet for SDXL",
    "vae": "an autoencoder",
    "clip": "a CLIP text encoder",
    "t5": "a T5 text encoder",
    "redux": "FLUX.1 Redux's image adapter",
    "siglip": "a SigLIP vision tower",
}


def parts_of(source: WeightSource) -> list[Part]:
    """Every part that is known here, in the order of `SIGNS`."""
    saved = Saved.of(source)
    if saved:
        if saved.kind not in NAMES:
            raise WeightsError(f"{source.path} holds {saved.kind!r}, a network that is not known here")
        return [Part(cast("Kind", saved.kind), "flux-engine, 8 bits" if saved.linears else "flux-engine", "", own=True)]
    shapes = source.shapes
    foreign = {prefix for tensor in FOREIGN for prefix in _prefixes(shapes, tensor)}
    found: list[Part] = []
    for sign in SIGNS:
        for prefix in _prefixes(shapes, sign.tensor):
            if prefix not in foreign and sign.fits(shapes, prefix):
                inside = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
                found.append(Part(sign.kind, sign.layout, prefix, sign.table(inside)))
    return found


def _width(source: WeightSource) -> int | None:
    """Of a text encoder's states."""
    shape = source.shapes.get("text_model.embeddings.token_embedding.weight")
    return shape[-1] if shape else None


def _prefixes(shapes: Shapes, tensor: str) -> list[str]:
    """What stands before this name, wherever it stands."""
    prefixes = [name.removesuffix(tensor) for name in shapes if name.endswith(tensor)]
    return [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]


def what_is(source: WeightSource) -> str:
    """In words, for messages."""
    parts = parts_of(source)
    if parts:
        return " and ".join(dict.fromkeys(f"{NAMES[part.kind]} in the layout of {part.layout}" for part in parts))
    if any(name.endswith(LORA) for name in source.recipes):
        return "a LoRA"
    for tensor, words in (FOREIGN | OTHERS).items():
        if _prefixes(source.shapes, tensor):
            return words
    return f"nothing known here, {len(source.recipes)} tensors, the first of them {next(iter(source.recipes), None)!r}"


def pick(source: WeightSource, kind: Kind, *, width: int | None = None) -> WeightSource:
    """The part of this kind, under our names; of several text encoders the one of this width.

    Raises WeightsError if there is none, or more than one.
    """
    found = [part for part in parts_of(source) if part.kind == kind]
    if len(found) > 1 and width is not None:
        fitting = [part for part in found if _width(part.of(source)) == width]
        found = fitting or found
    if not found:
        raise WeightsError(f"{source.path} is not {NAMES[kind]}: it holds {what_is(source)}")
    if len(found) > 1:
        prefixes = ", ".join(part.prefix or "no prefix" for part in found)
        raise WeightsError(f"{source.path} holds {NAMES[kind]} under each of {prefixes}: keep the one that is meant")
    return found[0].of(source)

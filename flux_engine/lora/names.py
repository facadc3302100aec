"""Which weight of a model a name in a LoRA means. Names differ in layout, in what stands before them, and in whether
dots became underscores; nothing else does, so one table of names serves every trainer.

Sources: kohya-ss/sd-scripts (networks/lora_flux.py, sdxl), huggingface/diffusers (loaders/lora_conversion_utils.py),
comfyanonymous/ComfyUI (comfy/lora.py), Nerogar/OneTrainer, bghira/SimpleTuner, XLabs-AI/x-flux.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from flux_engine.checkpoints.keys import Table, renamed
from flux_engine.checkpoints.tables import FLUX_DIFFUSERS, published_clip, unet_diffusers, unet_sgm
from flux_engine.specs import FluxSpec, ModelSpec, SDXLSpec

Rows = tuple[tuple[int, int], ...]
SMALL = ("diffusion_model.", "model.diffusion_model.", "base_model.model.", "lycoris_", "lora_unet_", "")
"""What may stand before the names of the network that denoises, in every family."""
PREFIXES: Mapping[type[ModelSpec], Mapping[str, tuple[str, ...]]] = {
    FluxSpec: {
        "transformer": ("transformer.", "base_model.model.transformer.", "lora_transformer_", "unet.", *SMALL),
        "text_encoder": (
            "text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.", "lora_te1_", "lora_te_",
        ),
        "text_encoder_2": (
            "text_encoder_2.", "text_encoders.t5xxl.transformer.", "t5xxl.", "lora_te3_", "lora_te2_",
        ),
    },
    SDXLSpec: {
        "unet": ("unet.", "base_model.model.unet.", *SMALL),
        "text_encoder": ("text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.", "lora_te1_"),
        "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.", "lora_te2_"),
    },
}  # fmt: skip
PROCESSORS = (
    (re.compile(r"(.*)\.processor\.to_([qkv])_lora"), r"\1.to_\2"),
    (re.compile(r"(.*)\.processor\.to_out_lora"), r"\1.to_out.0"),
    (re.compile(r"(.*double_blocks\.\d+)\.processor\.(qkv|proj)_lora1"), r"\1.img_attn.\2"),
    (re.compile(r"(.*double_blocks\.\d+)\.processor\.(qkv|proj)_lora2"), r"\1.txt_attn.\2"),
    (re.compile(r"(.*single_blocks\.\d+)\.processor\.qkv_lora"), r"\1.linear1_qkv"),
    (re.compile(r"(.*single_blocks\.\d+)\.processor\.proj_lora"), r"\1.linear2"),
)
"""Attention processors, diffusers' and XLabs', had LoRAs of their own -> the linear that they stand for."""


@dataclass(frozen=True)
class Target:
    """A weight, or some rows of it, without the last part of its name."""

    part: str
    name: str
    rows: Rows | None = None


class Names:
    """Every name that a weight of a model goes by."""

    def __init__(self, spec: ModelSpec, networks: Mapping[str, nn.Module]) -> None:
        kind = next(kind for kind in PREFIXES if isinstance(spec, kind))
        self._prefixes = [(prefix, part) for part, known in PREFIXES[kind].items() for prefix in known]
        self._prefixes.sort(key=lambda pair: -len(pair[0]))
        self._known = {part: _known(spec, part, networks[part]) for part in PREFIXES[kind] if part in networks}

    def find(self, stem: str) -> Target | None:
        """What a name without its last parts (`.lora_A.weight`, `.alpha`) means; None if that is no weight here."""
        for pattern, plain in PROCESSORS:
            stem, found = pattern.subn(plain, stem)
            if found:
                break
        for prefix, part in self._prefixes:
            if stem.startswith(prefix):
                target = self._known.get(part, {}).get(stem.removeprefix(prefix))
                if target is not None:
                    return target
        return None


def _known(spec: ModelSpec, part: str, network: nn.Module) -> dict[str, Target]:
    """Dotted names, and the same with underscores; of two that would be alike only the dotted ones count."""
    counts: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        stem, _, leaf = name.rpartition(".")
        if stem not in counts or leaf == "weight":
            counts[stem] = parameter.shape[0] if parameter.ndim else 1
    dotted: dict[str, Target] = {stem: Target(part, stem) for stem in counts}
    if part == "transformer" and isinstance(spec, FluxSpec):
        _add(dotted, part, counts, FLUX_DIFFUSERS, spec.transformer.hidden_size)
        for stem in counts:
            if re.fullmatch(r"single_blocks\.\d+\.linear1", stem):
                dotted[f"{stem}_qkv"] = Target(part, stem, ((0, 3 * spec.transformer.hidden_size),))
    elif part == "unet" and isinstance(spec, SDXLSpec):
        attention = [bool(depth) for depth in spec.unet.transformer_depth]
        for table in (unet_sgm(attention), unet_diffusers(attention)):
            _add(dotted, part, counts, table, 0)
    else:
        dotted |= {published_clip(stem): target for stem, target in dotted.items()}
    squeezed: dict[str, Target | None] = {}
    for name, target in dotted.items():
        plain = name.replace(".", "_")
        squeezed[plain] = target if squeezed.get(plain, target) == target else None
    return {name: target for name, target in squeezed.items() if target is not None} | dotted


def _add(known: dict[str, Target], part: str, counts: Mapping[str, int], table: Table, width: int) -> None:
    for stem, entry, theirs in renamed(counts, table):
        count = counts[stem]
        sizes = [width or count // len(theirs)] * (len(theirs) - 1)
        at = 0
        for name, size in zip(theirs, [*sizes, count - sum(sizes)], strict=True):
            rows = None if len(theirs) == 1 else ((at, at + size),)
            if entry.swap_halves:
                rows = ((count // 2, count), (0, count // 2))
            known[name] = Target(part, stem, rows)
            at += size


SIGNS: Sequence[tuple[str, str]] = (
    (r"joint_blocks|joint_transformer", "Stable Diffusion 3"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"single_stream_modulation|double_stream_modulation", "FLUX.2"),
    (r"double_blocks|single_blocks|single_transformer_blocks|(^|\.|_)transformer_blocks[._]\d+[._]attn[._]", "FLUX.1"),
    (r"lora_te2_|text_encoder_2\.|transformer_blocks[._][2-9]|add_embedding|label_emb", "SDXL"),
    (r"input_blocks|down_blocks|output_blocks|up_blocks|mid_block", "Stable Diffusion or SDXL"),
)


def made_for(names: Sequence[str]) -> str | None:
    """Which models a LoRA with such names is for, as far as they tell."""
    return next((model for sign, model in SIGNS if any(re.search(sign, name) for name in names)), None)

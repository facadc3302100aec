"""Which linears of a network are of 8 bits, and why the others are not.

Convolutions, norms and embeddings are as they were: they are no linears, and hold little.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from flux_engine.quantization.linears import FP8_STORAGE, INT8, INT8_STORAGE, SCHEMES, QuantizedLinear, Scheme

How = Literal["asked", "int8", "stored", "kept"]
"""As the scheme that was asked for; the same if that is int8, else stored; with a weight of 8 bits and activations as
they are; as it was."""
Treat = Callable[[str], Scheme | None]
"""A linear's name -> its scheme, None for one that is as it was."""


@dataclass(frozen=True)
class Rule:
    """Of all linears whose names match."""

    names: str
    """A regular expression, for the whole name."""
    how: How
    why: str = ""


_FLUX_TRUNK = (
    Rule(r"(img_in|txt_in|time_in|vector_in|guidance_in)\b.*", "kept",
         "everything passes through it, and it is a hundredth of the weights"),
    Rule(r".*_blocks\.\d+\.(img_mod|txt_mod|modulation)\.lin", "stored",
         "it scales whole streams, and is multiplied once for a prompt"),
    Rule(r"(double|single)_blocks\..*", "asked"),
)  # fmt: skip
_UNET = (
    Rule(r"(time|add)_embedding\..*|.*\.time_emb_proj", "kept", "it moves whole channels, and is small"),
    Rule(r".*\.attn2\.to_kv", "stored", "it reads the text, once for a prompt"),
    Rule(r".*\.proj_(in|out)", "kept", "everything that a transformer reads or gives passes through it"),
    Rule(r".*\.transformer_blocks\..*", "asked"),
)
POLICIES: Mapping[str, tuple[Rule, ...]] = {
    "flux": (
        *_FLUX_TRUNK,
        Rule(r"final_layer\..*", "kept", "its errors are the picture's"),
    ),
    "flux_controlnet": (
        *_FLUX_TRUNK,
        Rule(r"controlnet_(x_embedder|blocks\.\d+|single_blocks\.\d+)", "kept",
             "everything that it reads or gives passes through it"),
    ),
    "unet": _UNET,
    "unet_controlnet": _UNET,
    "t5": (
        Rule(r".*\.DenseReluDense\.wo", "stored", "what it reads has outliers in the thousands"),
        Rule(r".*\.(SelfAttention\.[qkvo]|DenseReluDense\.wi(_[01])?)", "int8",
             "e4m3 loses what its keys say, and it is multiplied once for a prompt"),
    ),
}  # fmt: skip
"""Kind of network -> its rules, of which the first that matches counts. Every linear matches one."""


def rule_for(kind: str, name: str) -> Rule:
    """Raises LookupError for a linear that no rule speaks of."""
    for rule in POLICIES[kind]:
        if re.fullmatch(rule.names, name):
            return rule
    raise LookupError(f"no rule of {kind} says how its linear {name!r} is kept")


def treatment(kind: str, quantization: str) -> Treat | None:
    """How every linear of a network is kept under a scheme; None for "none"."""
    if quantization == "none":
        return None
    asked = SCHEMES[quantization]
    # Where activations stay as they are, int8 is the nearer to float32. And transformers casts what T5's `wo`
    # reads to the dtype of its weight, unless that is int8, and so would round it to e4m3.
    stored = FP8_STORAGE if asked is FP8_STORAGE and kind != "t5" else INT8_STORAGE
    schemes = {"asked": asked, "int8": INT8 if asked is INT8 else stored, "stored": stored, "kept": None}
    return lambda name: schemes[rule_for(kind, name).how]


def place(module: nn.Module, treat: Treat) -> None:
    """Put empty linears of 8 bits in the place of those that are to be so."""
    for name, linear in [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]:
        scheme = treat(name)
        if scheme is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, QuantizedLinear.like(linear, scheme))


def schemes_of(module: nn.Module) -> dict[str, dict[str, str]]:
    """What is in force, as `linears`: the scheme or dtype of every linear, those of numbered blocks that are alike as
    one. Empty for a network with none of 8 bits."""
    said: dict[str, str] = {}
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    if not any(isinstance(layer, QuantizedLinear) for _, layer in layers):
        return {}
    for name, layer in layers:
        kept = layer.scheme.name if isinstance(layer, QuantizedLinear) else str(layer.weight.dtype)
        kept = kept.removeprefix("torch.")
        alike = re.sub(r"(blocks|block|layer|resnets|attentions)\.\d+", r"\1.{i}", name)
        if said.setdefault(alike, kept) != kept:
            said[name] = kept
    return {"linears": said}

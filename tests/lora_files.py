"""One LoRA in the ways that trainers write it.

A LoRA here is {name of a linear or convolution as diffusers has it: (A (r, K), B (N, r))} with one alpha for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flux_engine.checkpoints.keys import Table, to_theirs
from flux_engine.checkpoints.tables import FLUX_DIFFUSERS, unet_diffusers, unet_sgm

RANK, ALPHA = 4, 2.0
Modules = dict[str, tuple[Tensor, Tensor]]
File = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and metadata."""


def as_diffusers(net: torch.nn.Module, width: int = 0, attention: tuple[bool, ...] = ()) -> dict[str, Tensor]:
    """A network's weights under diffusers' names: FLUX with its width, the UNet with where it has attention."""
    table = FLUX_DIFFUSERS if width else unet_diffusers(attention)
    return to_theirs(dict(net.state_dict()), table, width=width)


def modules(weights: Mapping[str, Tensor], names: list[str], seed: int = 0, size: float = 0.1) -> Modules:
    generator = torch.Generator().manual_seed(seed)
    made: Modules = {}
    for name in names:
        n, *k = weights[f"{name}.weight"].shape
        up = (n, RANK, 1, 1) if len(k) == 3 else (n, RANK)
        made[name] = (
            torch.randn((RANK, *k), generator=generator) * size,
            torch.randn(up, generator=generator) * size,
        )
    return made


def delta(pair: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
    """What a pair adds, in float64."""
    a, b = pair
    return (scale * ALPHA / RANK * (b.double().flatten(1) @ a.double().flatten(1))).reshape(b.shape[0], *a.shape[1:])


def peft(prefix: str, ab: tuple[str, str] = ("lora_A", "lora_B")) -> Callable[[Modules], File]:
    """Without alpha, which stands for alpha = rank: B has the rest."""

    def write(made: Modules) -> File:
        tensors: dict[str, Tensor] = {}
        for name, (a, b) in made.items():
            tensors[f"{prefix}{name}.{ab[0]}.weight"] = a
            tensors[f"{prefix}{name}.{ab[1]}.weight"] = b * (ALPHA / RANK)
        return tensors, {}

    return write


def with_alpha(prefix: str, down: str, up: str, *, squeeze: bool = False) -> Callable[[Modules], File]:
    def write(made: Modules) -> File:
        tensors: dict[str, Tensor] = {}
        for name, (a, b) in made.items():
            stem = prefix + (name.replace(".", "_") if squeeze else name)
            tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b, f"{stem}.alpha": torch.tensor(ALPHA)}
        return tensors, {}

    return write


def in_metadata(prefix: str, *, rslora: bool = False) -> Callable[[Modules], File]:
    """As diffusers writes it: alpha in the header."""

    def write(made: Modules) -> File:
        tensors, _ = peft(prefix)({name: (a, b / (ALPHA / RANK)) for name, (a, b) in made.items()})
        part = prefix.removesuffix(".")
        said = {f"{part}.r": RANK, f"{part}.lora_alpha": ALPHA / (RANK**0.5 if rslora else 1)}
        said |= {f"{part}.use_rslora": rslora}
        return tensors, {"lora_adapter_metadata": json.dumps(said)}

    return write


def fused(made: Modules, table: Table) -> Modules:
    """Linears that are one in the publisher's layout: A one under another, B in blocks. The rank grows, and B makes up
    for it."""
    out: Modules = {}
    for entry in table:
        for i in range(4):
            theirs = [name.format(i=i) for name in entry.theirs]
            there = [name for name in theirs if name in made]
            if not there or entry.ours.format(i=i) in out:
                continue
            assert len(there) == len(theirs), "all of what is joined has to be there"
            pairs = [made[name] for name in theirs]
            a, b = torch.cat([a for a, _ in pairs]), torch.block_diag(*(b.flatten(1) for _, b in pairs))
            if len(pairs) == 1:
                a, b = pairs[0]
            if entry.swap_halves:
                b = torch.cat(b.chunk(2)[::-1])
            out[entry.ours.format(i=i)] = (a, b * len(pairs))
    return out


def bfl(write: Callable[[Modules], File]) -> Callable[[Modules], File]:
    """The same under Black Forest Labs' names, q, k and v joined."""

    def joined(made: Modules) -> File:
        tensors, metadata = write(fused(made, FLUX_DIFFUSERS))
        ranks = {name.rsplit(".", 2)[0]: len(t) for name, t in tensors.items() if "down" in name or "lora_A" in name}
        for name in tensors:  # without alpha the factor that `fused` put in B has to go again
            stem = name.rsplit(".", 2)[0]
            if name.endswith(("lora_B.weight",)) and f"{stem}.alpha" not in tensors:
                tensors[name] = tensors[name] / (ranks[stem] / RANK)
        return tensors, metadata

    return joined


def xlabs(made: Modules) -> File:
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in fused(made, FLUX_DIFFUSERS).items():
        block, _, rest = name.partition("s.")
        number, _, rest = rest.partition(".")
        rest = {
            "img_attn.qkv": "qkv_lora1", "img_attn.proj": "proj_lora1", "txt_attn.qkv": "qkv_lora2",
            "txt_attn.proj": "proj_lora2",
        }[rest]  # fmt: skip
        stem = f"{block}s.{number}.processor.{rest}"
        tensors |= {f"{stem}.down.weight": a, f"{stem}.up.weight": b * (ALPHA / len(a))}
    return tensors, {}


def sgm(attention: tuple[bool, ...]) -> Callable[[Modules], File]:
    """kohya's names of SDXL, after the first layout's blocks."""
    ours, theirs = unet_diffusers(attention), unet_sgm(attention)
    names = {a: b for one, two in zip(ours, theirs, strict=True) for a, b in zip(one.theirs, two.theirs, strict=True)}

    def rename(name: str) -> str:
        if name in names:
            return names[name]
        import re

        for a, b in names.items():
            match = re.fullmatch(re.escape(a).replace(r"\{i\}", r"(?P<i>\d+)"), name)
            if match:
                return b.format(**match.groupdict())
        raise KeyError(name)

    def write(made: Modules) -> File:
        renamed = {rename(name): pair for name, pair in made.items()}
        return with_alpha("lora_unet_", "lora_down", "lora_up", squeeze=True)(renamed)

    return write


def processors(prefix: str) -> Callable[[Modules], File]:
    """diffusers' old attention processors, and Replicate's, which have no prefix."""

    def write(made: Modules) -> File:
        tensors: dict[str, Tensor] = {}
        for name, (a, b) in made.items():
            stem, _, last = name.replace("to_out.0", "to_out").rpartition(".")
            where = f"{prefix}{stem}.processor.{last}_lora"
            tensors |= {f"{where}.down.weight": a, f"{where}.up.weight": b * (ALPHA / RANK)}
        return tensors, {}

    return write

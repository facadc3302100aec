"""A LoRA file, of whatever kind, to one form: what it changes in which weight of a model.

A file is told by its content. Every tensor is used or listed. Nothing is read that is no safetensors file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError
from flux_engine.lora.changes import Change, Hadamard, Kronecker, LowRank, Whole
from flux_engine.lora.names import Names, Target, made_for

ADAPTER_MODEL, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""As PEFT saves an adapter by itself."""
MAX_CONFIG = 2**20
SHOWN = 6
"""How many names an error lists."""
SLOTS: Sequence[tuple[str, str]] = (
    (r"\.lora_A(\.default)?\.weight", "down"),
    (r"\.lora_B(\.default)?\.weight", "up"),
    (r"\.lora_B(\.default)?\.bias", "up_bias"),
    (r"\.(lora_linear_layer|lora)\.down\.weight|\.lora_down\.weight", "down"),
    (r"\.(lora_linear_layer|lora)\.up\.weight|\.lora_up\.weight", "up"),
    (r"(?<=_lora|lora1|lora2)\.down\.weight", "down"),
    (r"(?<=_lora|lora1|lora2)\.up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "dora"),
    (r"\.lora_magnitude_vector(\.default)?(\.weight)?", "magnitude"),
    (r"\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)", "hada_{}"),
    (r"\.lokr_(w1|w2|w1_a|w1_b|w2_a|w2_b|t2)", "lokr_{}"),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_b"),
    (r"\.w_norm", "diff"),
    (r"\.b_norm", "diff_b"),
    (r"\.(weight|bias|scale)", "instead_{}"),
)
"""The end of a tensor's name -> what it is."""
KINDS: Sequence[tuple[str, str]] = (
    ("dora|magnitude", "DoRA"),
    ("lokr_.*", "LoKr"),
    ("hada_.*", "LoHa"),
    ("down|up", "LoRA"),
    ("diff|diff_b|up_bias", "difference"),
    ("instead_.*", "weights"),
)
NAMINGS: Sequence[tuple[str, str]] = (
    (r"\.processor\.(qkv|proj)_lora", "XLabs"),
    (r"\.processor\.to_", "attention processors"),
    (r"^lora_transformer_", "OneTrainer"),
    (r"^lycoris_", "LyCORIS"),
    (r"^lora_(unet|te\d?)_", "kohya"),
    (r"^base_model\.", "PEFT with BFL names"),
    (r"^(model\.)?diffusion_model\.", "ComfyUI"),
    (r"^(transformer|unet|text_encoder(_2)?)\.", "diffusers"),
    (r"", "bare names"),
)


@dataclass(frozen=True)
class Prepared:
    """A LoRA that fits a model, not applied yet."""

    path: Path
    changes: Mapping[tuple[str, str], tuple[Change, ...]] = field(repr=False)
    """(part, parameter) -> what is done to it."""
    kind: str = ""
    """As "kohya LoRA of rank 16, transformer and text_encoder"."""
    unknown: tuple[str, ...] = ()
    """Tensors that mean nothing here."""

    @property
    def bytes(self) -> int:
        return sum(change.bytes for changes in self.changes.values() for change in changes)


def read_lora(path: Path, names: Names, networks: Mapping[str, nn.Module], *, strict: bool = True) -> Prepared:
    """Read a file for a model.

    Raises WeightsError for what is no whole safetensors file, was made for another kind of model, has values that are
    not finite or shapes that do not fit, or (if `strict`) holds tensors that mean nothing here.
    """
    with WeightSource.open(path) as source:
        slots, unknown = _sorted(path, source)
        found: dict[Target, dict[str, str]] = {}
        for stem, parts in slots.items():
            target = names.find(stem)
            if target is None:
                unknown += parts.values()
            else:
                _add(path, found.setdefault(target, {}), parts)
        if not found:
            raise WeightsError(_wrong_model(path, [*source.recipes]))
        unknown.sort()
        if unknown and strict:
            raise WeightsError(
                f"{path}: {len(unknown)} tensors mean nothing to this model: {_some(unknown)}. strict=False leaves "
                "them out"
            )
        alphas = _alphas(source.metadata, path)
        changes: dict[tuple[str, str], list[Change]] = {}
        ranks: set[int] = set()
        for target, parts in found.items():
            tensors = {slot: _finite(path, source, name) for slot, name in parts.items()}
            shapes = {name: tuple(p.shape) for name, p in networks[target.part].named_parameters()}
            for leaf, change in _changes(path, target, parts, tensors, alphas):
                parameter = _dotted(target.name, leaf)
                if leaf == "weight" and parameter not in shapes:  # of a norm, as diffusers calls it
                    parameter = _dotted(target.name, "scale")
                where = next(iter(parts.values()))
                if parameter not in shapes:
                    raise WeightsError(f"{path}: {where} changes {parameter}, which this model's {target.part} lacks")
                wrong = change.fits(shapes[parameter])
                if wrong:
                    raise WeightsError(f"{path}: {where} does not fit {target.part}: {wrong}")
                ranks |= {change.form.rank} if change.form.rank else set()
                changes.setdefault((target.part, parameter), []).append(change)
    kind = _kind(list(source.recipes), {slot for parts in found.values() for slot in parts}, ranks)
    touched = " and ".join(sorted({part for part, _ in changes}))
    told = {key: tuple(each) for key, each in changes.items()}
    return Prepared(path, told, f"{kind}, {touched}", tuple(unknown))


def inspect_lora(path: Path) -> dict[str, Any]:
    """What a LoRA file says of itself, without a model: its kind, the models it is for (None if it does not tell), how
    many weights it changes, the alphas it has, and its header's metadata. Raises WeightsError for what is none."""
    with WeightSource.open(path) as source:
        slots, unknown = _sorted(path, source)
        ranks: set[int] = set()
        alphas: set[float] = set()
        plain = {stem for stem, parts in slots.items() if all(slot.startswith("instead_") for slot in parts)}
        for parts in slots.values():
            if "down" in parts and source.recipes[parts["down"]].shape:
                ranks.add(source.recipes[parts["down"]].shape[0])
            if "alpha" in parts and len(alphas) < SHOWN:
                alphas.add(float(_finite(path, source, parts["alpha"]).flatten()[:1].sum()))
        if not slots or len(plain) == len(slots):
            raise WeightsError(f"{path} is no LoRA that is known here: it holds {_some(sorted(source.recipes))}")
        return {
            "kind": _kind(list(source.recipes), {slot for parts in slots.values() for slot in parts}, ranks),
            "made for": made_for(list(source.recipes)),
            "weights": len(slots) - len(plain),
            "alphas": sorted(alphas),
            "not told": sorted(unknown) + sorted(name for stem in plain for name in slots[stem].values()),
            "metadata": source.metadata,
        }


def _sorted(path: Path, source: WeightSource) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Names by stem and slot, and those of no slot."""
    slots: dict[str, dict[str, str]] = {}
    rest: list[str] = []
    for name in source.recipes:
        for pattern, slot in SLOTS:
            match = re.search(f"(?:{pattern})$", name)
            if match:
                groups = [group for group in match.groups() if group]
                _add(path, slots.setdefault(name[: match.start()], {}), {slot.format(*groups): name})
                break
        else:
            rest.append(name)
    return slots, rest


def _add(path: Path, there: dict[str, str], more: Mapping[str, str]) -> None:
    for slot, name in more.items():
        if slot in there:
            raise WeightsError(f"{path}: {there[slot]} and {name} say the same, and only one of them can be meant")
        there[slot] = name


def _finite(path: Path, source: WeightSource, name: str) -> Tensor:
    tensor = source.rows(name, own=True)
    if not tensor.is_floating_point() and tensor.numel() > 1:
        raise WeightsError(f"{path}: {name} holds whole numbers ({tensor.dtype}): a LoRA has floating-point numbers")
    checked = tensor.float() if tensor.element_size() == 1 else tensor
    if not checked.isfinite().all():
        raise WeightsError(f"{path}: {name} has values that are not finite: it was damaged, or its training failed")
    return tensor


def _changes(
    path: Path,
    target: Target,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    alphas: Callable[[str, int], float],
) -> list[tuple[str, Change]]:
    """What is done to the parameters under one name: the last part of each, and how."""
    left, first = dict(tensors), next(iter(names.values()))
    out: list[tuple[str, Change]] = []

    def take(*slots: str) -> list[Tensor | None]:
        return [left.pop(slot, None) for slot in slots]

    alpha, dora, vector = take("alpha", "dora", "magnitude")
    if alpha is not None and alpha.numel() != 1:
        raise WeightsError(f"{path}: {names['alpha']} has the shape {list(alpha.shape)}, and alpha is one number")
    form: LowRank | Hadamard | Kronecker | None = None
    if "down" in left or "up" in left:
        down, up, mid = take("down", "up", "mid")
        if down is None or up is None:
            raise WeightsError(f"{path}: {first} comes without its {'down (A)' if down is None else 'up (B)'} half")
        form = LowRank(down, up, mid)
    elif any(slot.startswith("hada_") for slot in left):
        halves = take(*(f"hada_{each}" for each in ("w1_a", "w1_b", "w2_a", "w2_b")))
        cores = take("hada_t1", "hada_t2")
        whole = [half for half in halves if half is not None]
        if len(whole) < 4 or (cores[0] is None) != (cores[1] is None):
            raise WeightsError(f"{path}: {first} is a part of a LoHa of which others are missing")
        form = Hadamard(whole[0], whole[1], whole[2], whole[3], *cores)
    elif any(slot.startswith("lokr_") for slot in left):
        form = Kronecker(
            _one_or_two(path, first, *take("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
            _one_or_two(path, first, *take("lokr_w2", "lokr_w2_a", "lokr_w2_b")),
            *take("lokr_t2"),
        )
    if form is not None:
        factor = 1.0
        rank = form.rank if all(tensor.ndim for tensor in form.tensors()) else None
        if rank:
            factor = (alphas(first, rank) if alpha is None else float(alpha)) / rank
        if vector is not None:
            dora = vector.reshape(-1, 1)
        out.append(("weight", Change(form, target.rows, factor, dora)))
    elif alpha is not None and not left:
        raise WeightsError(f"{path}: {names['alpha']} comes without what it scales")
    elif dora is not None or vector is not None:
        raise WeightsError(f"{path}: {first} comes without the matrices that it scales")
    for slot, tensor in left.items():
        leaf = {"diff": "weight", "diff_b": "bias", "up_bias": "bias"}.get(slot, slot.removeprefix("instead_"))
        if slot == "mid":
            raise WeightsError(f"{path}: {names[slot]} comes without what stands round it")
        out.append((leaf, Change(Whole(tensor, slot.startswith("instead_")), target.rows)))
    return out


def _one_or_two(
    path: Path, name: str, whole: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    if whole is not None and a is None and b is None:
        return whole
    if whole is None and a is not None and b is not None:
        return a, b
    raise WeightsError(f"{path}: {name} is a part of a LoKr of which others are missing or too many")


def _alphas(metadata: Mapping[str, str], path: Path) -> Callable[[str, int], float]:
    """A name and its rank -> alpha, where no tensor says it: the rank itself, unless PEFT's config says otherwise, in
    the header (diffusers' `lora_adapter_metadata`) or beside the file."""
    said = _object(metadata.get("lora_adapter_metadata", "{}"))
    beside = path.with_name(ADAPTER_CONFIG)
    if path.name == ADAPTER_MODEL and beside.is_file() and beside.stat().st_size < MAX_CONFIG:
        said |= {f"base_model.{name}": value for name, value in _object(beside.read_bytes()).items()}

    def alpha(name: str, rank: int) -> float:
        prefix, _, rest = name.partition(".")
        dot = f"{prefix}."
        value = said.get(f"{dot}lora_alpha")
        pattern = said.get(f"{dot}alpha_pattern")
        if isinstance(pattern, dict):
            module = re.sub(r"\.lora_[AB].*", "", rest)
            value = next((v for key, v in pattern.items() if module == key or module.endswith(f".{key}")), value)
        if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e6 or value != value:
            return float(rank)
        return value * rank**0.5 if said.get(f"{dot}use_rslora") is True else float(value)

    return alpha


def _object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _kind(names: Sequence[str], slots: set[str], ranks: set[int]) -> str:
    naming = next(label for sign, label in NAMINGS if any(re.search(sign, name) for name in names))
    form = next(label for sign, label in KINDS if any(re.fullmatch(sign, slot) for slot in slots))
    if not ranks:
        return f"{naming} {form}"
    return f"{naming} {form} of rank {min(ranks)}{f' to {max(ranks)}' if len(ranks) > 1 else ''}"


def _wrong_model(path: Path, names: Sequence[str]) -> str:
    model = made_for(names)
    if not names:
        return f"{path} holds no tensor"
    if model is None:
        return f"{path} is no LoRA that is known here: it holds {_some(sorted(names))}"
    return f"{path} was made for {model}, and fits nothing of this model"


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:120] for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _dotted(stem: str, leaf: str) -> str:
    return f"{stem}.{leaf}" if stem else leaf

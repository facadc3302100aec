"""What goes with a model: ControlNets, and Redux. By name, path or repository, as models are found.

A ControlNet answers for kinds of control picture ("canny", "depth"). A manifest says which; of a file one says it:
`{"canny": "my-controlnet.safetensors"}`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from flux_engine import hub
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest, UnknownModel, UnsupportedError, WeightsError, did_you_mean
from flux_engine.ledger import Ledger
from flux_engine.specs import SPECS, ControlNetSpec, FluxSpec, ModelSpec, SDXLSpec

Named = str | os.PathLike[str]
"""A manifest's name, a path, or OWNER/NAME or OWNER/NAME/FILE on the hub."""
ControlNets = Sequence[Named] | Mapping[str, Named]
"""ControlNets to load: names, or kinds of control picture, or kind -> where it is."""


def find_controlnets(
    asked: ControlNets, spec: ModelSpec, config: EngineConfig, *, offline: bool = False
) -> list[tuple[ControlNetSpec, Path]]:
    """Every ControlNet asked for, and its file, fetched where it is not here.

    Raises InvalidRequest, UnknownModel, UnsupportedError or WeightsError.
    """
    from flux_engine.assemble import file_of  # needs torch, which what a request may ask of them does not

    known = hub.manifests(config.weights)
    found: list[tuple[ControlNetSpec, Path]] = []
    for net, where in _meant(asked, spec, known):
        if isinstance(where, hub.Manifest):
            path = where.obtain(offline=offline, ledger=Ledger(config.cache), only=["controlnet"])["controlnet"]
        else:
            path = file_of(where, known, offline=offline)
        found.append((net, path))
    return found


def controlnet_specs(asked: ControlNets, spec: ModelSpec, known: Mapping[str, hub.Manifest]) -> list[ControlNetSpec]:
    """What a request may ask of them, before any of their files is looked at. Raises as `find_controlnets` does."""
    return [net for net, _ in _meant(asked, spec, known)]


def _meant(
    asked: ControlNets, spec: ModelSpec, known: Mapping[str, hub.Manifest]
) -> list[tuple[ControlNetSpec, hub.Manifest | str]]:
    """Each with its manifest, or else with where it is."""
    if isinstance(asked, (str, os.PathLike)) or not isinstance(asked, (Sequence, Mapping)):
        remedy = f": say [{os.fspath(asked)!r}]" if isinstance(asked, (str, os.PathLike)) else ""
        raise InvalidRequest(f"controlnets {asked!r:.80} is neither a list nor a mapping{remedy}", field="controlnets")
    if asked and spec.reads == "reference":
        raise UnsupportedError(f"{spec.name} takes no ControlNets: none was made for it")
    pairs = list(asked.items()) if isinstance(asked, Mapping) else [(None, one) for one in asked]
    meant: list[tuple[ControlNetSpec, hub.Manifest | str]] = []
    for kind, where in pairs:
        if not isinstance(where, str | os.PathLike) or not isinstance(kind, str | None):
            raise InvalidRequest(f"controlnets: {where!r:.80} is no name and no path", field="controlnets")
        manifest = _manifest(where, spec, known)
        name = os.fspath(where)
        if manifest is not None:
            kinds = manifest.controls if kind is None else {kind: manifest.controls.get(kind)}
            meant.append((ControlNetSpec(name=manifest.name, kinds=kinds), manifest))
        elif kind is None:
            raise InvalidRequest(f"controlnets: say what {name} reads, as {{'canny': {name!r}}}", field="controlnets")
        else:
            meant.append((ControlNetSpec(name=Path(name).stem, kinds={kind: None}), name))
    return meant


def _manifest(where: Named, spec: ModelSpec, known: Mapping[str, hub.Manifest]) -> hub.Manifest | None:
    """That of this name, or the first that was made for such a model and reads this kind; None for a path."""
    name = os.fspath(where)
    nets = {one.name: one for one in known.values() if one.kind == "controlnet"}
    fitting = [one for one in nets.values() if one.spec in SPECS and _alike(SPECS[one.spec], spec)]
    if name in nets:
        if nets[name].family != spec.family:
            raise UnknownModel(f"{name} is a ControlNet for {nets[name].family} models, and {spec.name} is none")
        return nets[name]
    for one in fitting:
        if name in one.controls or (one.repository and one.repository == name):
            return one
    if name in known:
        raise UnknownModel(f"{name} is a {known[name].kind} and no ControlNet")
    if "/" not in name and not Path(name).exists():
        kinds = dict.fromkeys(kind for one in fitting for kind in one.controls)
        near = did_you_mean(name, [*kinds, *(one.name for one in fitting)])
        there = ", ".join([*kinds, *(one.name for one in fitting)]) or "none for such a model; give a file"
        raise UnknownModel(f"no ControlNet {name!r} for {spec.name}{near} Known: {there}")
    return None


def _alike(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether what was made for the one has the widths of the other."""
    if isinstance(one, FluxSpec) and isinstance(other, FluxSpec):
        return one.transformer.hidden_size == other.transformer.hidden_size
    return (
        isinstance(one, SDXLSpec)
        and isinstance(other, SDXLSpec)
        and one.unet.block_out_channels == other.unet.block_out_channels
        and one.unet.cross_attention_dim == other.unet.cross_attention_dim
    )


def find_redux(name: Named, config: EngineConfig, *, offline: bool = False) -> Mapping[str, Path]:
    """The parts of a Redux adapter: "adapter", "image_encoder" and its configs. `name` is a manifest's, or a folder's.

    Raises UnknownModel or WeightsError.
    """
    known = hub.manifests(config.weights)
    text = os.fspath(name)
    if text in known:
        if known[text].kind != "adapter":
            raise UnknownModel(f"{text} is a {known[text].kind} and no adapter for pictures as prompts")
        return known[text].obtain(offline=offline, ledger=Ledger(config.cache))
    folder = Path(text)
    if not folder.is_dir():
        adapters = [one.name for one in known.values() if one.kind == "adapter"]
        near = did_you_mean(text, adapters)
        raise UnknownModel(f"no adapter {text!r}{near} Known: {', '.join(adapters)}; or a folder")
    adapter = next((folder / name for name in ("image_embedder", "adapter") if (folder / name).exists()), None)
    if adapter is None:
        raise WeightsError(f"{folder} has no image_embedder, which is what diffusers calls Redux's adapter")
    said = folder / "feature_extractor" / "preprocessor_config.json"
    found = {"adapter": adapter, "image_encoder": folder / "image_encoder"}
    return found | ({"feature_extractor/preprocessor_config.json": said} if said.exists() else {})

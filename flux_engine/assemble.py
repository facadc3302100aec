"""What a model name means, as parts: the name of a manifest, a file or folder here, or a repository of the hub.

A file or folder need not hold all of a model. What is missing comes from the published model whose text encoders the
transformer was made for: a transformer in one file is a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from flux_engine import hub
from flux_engine.checkpoints.detect import parts_of, pick, what_is
from flux_engine.checkpoints.folders import choose, is_index, shards_of, weights_in
from flux_engine.checkpoints.source import WeightSource
from flux_engine.config import EngineConfig
from flux_engine.errors import UnknownModel, UnsupportedError, WeightsError
from flux_engine.fetch import fetch, listing, together
from flux_engine.ledger import Ledger
from flux_engine.recognition import CONFIGS, PARTS, PLAIN, SAID, Found, config_of, is_there, needed, spec_of
from flux_engine.specs import ModelSpec


@dataclass(frozen=True)
class Model:
    """What is needed to load a model."""

    spec: ModelSpec
    parts: Mapping[str, Path]
    """Part -> its weights, a file or folder, or for a tokenizer its folder; and the text encoders' configs."""
    like: str
    """The spec that it has, or that is nearest to its own."""
    said: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What its folder's configs say, where there are any."""


def find_model(
    name: str,
    config: EngineConfig,
    *,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    only: Collection[str] | None = None,
) -> Model:
    """The parts of a model, fetched where they are not here, and its spec.

    `name` is that of a manifest, a path, or OWNER/NAME of a repository, or OWNER/NAME/FILE. `variant` chooses among
    files that a folder or repository has in several, as `x.fp16.safetensors`. `only` names the parts that are wanted.
    Raises UnknownModel, WeightsError or UnsupportedError.
    """
    for said, value in (("revision", revision), ("variant", variant)):
        if not (value is None or isinstance(value, str)):
            raise UnknownModel(f"a {said} is named by a text, not by {value!r}")
    known = hub.manifests(config.weights)
    meant = hub.refer(name, known)
    if isinstance(meant, hub.Manifest):
        if variant is not None:
            raise UnsupportedError(f"{meant.name} has no variant {variant!r}: its manifest names every file")
        manifest = meant.at(revision) if revision is not None else meant
        spec = manifest.model_spec()
        given = {*manifest.files, *(name.partition("/")[0] for name in manifest.files)}
        lacking = [part for part in (needed(spec) if only is None else only) if part not in given]
        if lacking:
            raise WeightsError(f"{meant.name}: its manifest lacks {', '.join(lacking)}: give them, or name a base")
        parts = manifest.obtain(offline=offline, ledger=Ledger(config.cache), only=only)
        return Model(spec, parts, manifest.spec)
    if isinstance(meant, hub.Repository):
        path = _repository(meant.name, meant.file, revision or "main", variant, offline)
    else:
        if revision is not None:
            raise WeightsError(f"{meant} is here and has no revision {revision!r}")
        path, name = meant, _name(meant.absolute())
    found = _in_folder(path, variant) if _is_model(path) else _in_file(path, variant)
    spec = spec_of(found, path)
    missing = set(needed(spec) if only is None else only) - found.parts.keys()
    parts = dict(found.parts)
    if missing:
        base = hub.find(spec.name, known).obtain(offline=offline, ledger=Ledger(config.cache), only=missing)
        parts |= {part: base[part] for part in missing}
    return Model(replace(spec, name=name), parts, spec.name, found.said)


def file_of(name: str, known: Mapping[str, hub.Manifest], *, offline: bool = False) -> Path:
    """The weights of one network that a path or repository names, a file or the index of its shards.

    Raises UnknownModel or WeightsError.
    """
    meant = hub.refer(name, known)
    if isinstance(meant, hub.Manifest):
        raise UnknownModel(f"{meant.name} is a whole {meant.kind}, not one network")
    if isinstance(meant, hub.Repository):
        meant = _repository(meant.name, meant.file, "main", None, offline)
    return weights_in(meant) if meant.is_dir() else meant


def stored_dtype(model: Model) -> str:
    """What most of the denoising network's numbers are stored in, as "bfloat16"."""
    parts = PARTS[model.spec.family]
    dtypes: Counter[str] = Counter()
    with WeightSource.open(model.parts[parts.network]) as source:
        for recipe in pick(source, parts.weights[parts.network]).recipes.values():
            stored = torch.bfloat16 if recipe.scaled else recipe.dtype
            dtypes[str(stored).removeprefix("torch.")] += prod(recipe.shape)
    return dtypes.most_common(1)[0][0]


def _name(path: Path) -> str:
    """What a model by path is called: by its folder, where the file's own name says what any such file is."""
    stem = path.name.removesuffix(".safetensors")
    return path.parent.name if stem in ("transformer", "unet", "model", "diffusion_pytorch_model") else stem


def _repository(repository: str, file: str | None, revision: str, variant: str | None, offline: bool) -> Path:
    """Fetch what makes up a model -> its file, or the folder with all of it."""

    def get(file: str) -> Path:
        return fetch(repository, file, revision=revision, offline=offline)

    def weights(folder: str, names: list[str]) -> Path:
        path = get(folder + choose(f"{repository} {folder}".strip(), names, variant=variant))
        if is_index(path.name):
            together([partial(get, folder + shard.name) for shard in shards_of(path)])
        return path

    if file is not None:
        return get(file)
    files = listing(repository, revision=revision, offline=offline)
    if "model_index.json" not in files:
        return weights("", [name for name in files if "/" not in name])
    index = get("model_index.json")
    calls: list[Callable[[], Path]] = []
    for part in dict.fromkeys(part for layout in PARTS.values() for part in layout.weights):
        names = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
        if names:
            calls.append(partial(weights, f"{part}/", names))
    plain = r"(scheduler|unet|vae|text_encoder(_2)?)/\w+\.json|tokenizer(_2)?/[^/]+"
    together([*calls, *(partial(get, name) for name in files if re.fullmatch(plain, name))])
    return index.parent


def _is_model(path: Path) -> bool:
    """Whether it is a folder with a folder for each part."""
    folders = {part for layout in PARTS.values() for part in layout.weights}
    return is_there(path) and path.is_dir() and any(is_there(path / part) for part in folders)


def _in_folder(path: Path, variant: str | None) -> Found:
    families = [name for name, layout in PARTS.items() if is_there(path / layout.network)]
    if len(families) != 1:
        networks = [layout.network for layout in PARTS.values()]
        have = f"has {' and '.join(networks)}" if families else f"has no {' and no '.join(networks)}"
        raise WeightsError(f"{path} cannot be loaded as a model: it {have}")
    layout = PARTS[families[0]]
    parts = {part: weights_in(path / part, variant=variant) for part in layout.weights if is_there(path / part)}
    parts |= {name: path / name for name in (*PLAIN, *CONFIGS) if is_there(path / name)}
    said = {name: config_of(path / config) for name, config in SAID.items()}
    return Found(families[0], parts, {name: config for name, config in said.items() if config})


def _in_file(path: Path, variant: str | None) -> Found:
    """Of one file, or one folder of weights."""
    weights = weights_in(path, variant=variant) if path.is_dir() else path
    with WeightSource.open(weights) as source:
        kinds = Counter(part.kind for part in parts_of(source))
        families = [name for name, layout in PARTS.items() if layout.weights[layout.network] in kinds]
        if len(families) != 1:
            raise WeightsError(f"{weights} cannot be loaded as a model: it holds {what_is(source)}")
    layout = PARTS[families[0]]
    # Of two parts of one kind a file with one of them holds neither for sure: then both come from the base.
    wanted = Counter(layout.weights.values())
    return Found(families[0], {part: weights for part, kind in layout.weights.items() if kinds[kind] >= wanted[kind]})

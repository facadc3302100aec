"""What a model name means, as parts: the name of a manifest, a file or folder here, or a repository of the hub.

A file or folder need not hold all of a model. What is missing comes from the published model whose text encoders the
transformer was made for: a transformer in one file is a model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flux_engine import hub
from flux_engine.checkpoints.detect import Kind, parts_of, pick, what_is
from flux_engine.checkpoints.folders import choose, is_index, shards_of, weights_in
from flux_engine.checkpoints.source import WeightSource
from flux_engine.config import EngineConfig
from flux_engine.errors import UnknownModel, UnsupportedError, WeightsError
from flux_engine.fetch import fetch, listing
from flux_engine.ledger import Ledger
from flux_engine.specs import FLUX_DEV, SPECS, FlowSchedule, FluxParams, ModelSpec, VAEParams

WEIGHTS: Mapping[str, Kind] = {"transformer": "flux", "vae": "vae", "text_encoder": "clip", "text_encoder_2": "t5"}
"""Part -> what its file holds."""
PLAIN = ("tokenizer", "tokenizer_2")
"""Parts that are folders without weights."""
CONFIGS = ("text_encoder/config.json", "text_encoder_2/config.json")


@dataclass(frozen=True)
class Model:
    """What is needed to load a model."""

    spec: ModelSpec
    parts: Mapping[str, Path]
    """Part -> its weights, a file or folder, or for a tokenizer its folder; and the text encoders' configs."""


def find_model(
    name: str,
    config: EngineConfig,
    *,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
) -> Model:
    """The parts of a model, fetched where they are not here, and its spec.

    `name` is that of a manifest, a path, or OWNER/NAME of a repository, or OWNER/NAME/FILE. `variant` chooses among
    files that a folder or repository has in several, as `x.fp16.safetensors`.
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
        lacking = [part for part in (*WEIGHTS, *PLAIN, *CONFIGS) if part not in given]
        if lacking:
            raise WeightsError(f"{meant.name}: its manifest lacks {', '.join(lacking)}: give them, or name a base")
        return Model(spec, manifest.obtain(offline=offline, ledger=Ledger(config.cache)))
    if isinstance(meant, hub.Repository):
        path = _repository(meant.name, meant.file, revision or "main", variant, offline)
    else:
        if revision is not None:
            raise WeightsError(f"{meant} is here and has no revision {revision!r}")
        path, name = meant, meant.absolute().name.removesuffix(".safetensors")
    found = _in_folder(path, variant) if _is_model(path) else _in_file(path, variant)
    return _completed(found, path, name, config, known, offline)


def stored_dtype(model: Model) -> str:
    """What most of the transformer's tensors are stored in, as "bfloat16"."""
    with WeightSource.open(model.parts["transformer"]) as source:
        dtypes = Counter(recipe.dtype for recipe in pick(source, "flux").recipes.values())
    return str(dtypes.most_common(1)[0][0]).removeprefix("torch.")


def _repository(repository: str, file: str | None, revision: str, variant: str | None, offline: bool) -> Path:
    """Fetch what makes up a model -> its file, or the folder with all of it."""

    def get(file: str) -> Path:
        return fetch(repository, file, revision=revision, offline=offline)

    def weights(folder: str, names: list[str]) -> Path:
        path = get(folder + choose(f"{repository} {folder}".strip(), names, variant=variant))
        if is_index(path.name):
            for shard in shards_of(path):
                get(folder + shard.name)
        return path

    if file is not None:
        return get(file)
    files = listing(repository, revision=revision, offline=offline)
    if "model_index.json" not in files:
        return weights("", [name for name in files if "/" not in name])
    index = get("model_index.json")
    for part in WEIGHTS:
        names = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
        if names:
            weights(f"{part}/", names)
    for name in files:
        if re.fullmatch(r"(scheduler|vae|text_encoder(_2)?)/\w+\.json|tokenizer(_2)?/[^/]+", name):
            get(name)
    return index.parent


@dataclass(frozen=True)
class _Found:
    """What a folder or file gives of a model."""

    parts: Mapping[str, Path]
    schedule: FlowSchedule | None = None
    vae: Mapping[str, Any] = field(default_factory=dict)
    """The autoencoder's config."""


def _is_model(path: Path) -> bool:
    """Whether it is a folder with a folder for each part."""
    return _there(path) and path.is_dir() and any(_there(path / part) for part in (*WEIGHTS, "unet"))


def _in_folder(path: Path, variant: str | None) -> _Found:
    if _there(path / "unet"):
        raise UnsupportedError(f"{path} holds a model with a UNet; this version runs FLUX.1 models only")
    if not _there(path / "transformer"):
        raise WeightsError(f"{path} cannot be loaded as a model: it has no transformer")
    parts = {part: weights_in(path / part, variant=variant) for part in WEIGHTS if _there(path / part)}
    parts |= {name: path / name for name in (*PLAIN, *CONFIGS) if _there(path / name)}
    schedule = _schedule(path / "scheduler" / "scheduler_config.json")
    return _Found(parts, schedule, _json(path / "vae" / "config.json"))


def _in_file(path: Path, variant: str | None) -> _Found:
    """Of one file, or one folder of weights."""
    weights = weights_in(path, variant=variant) if path.is_dir() else path
    with WeightSource.open(weights) as source:
        kinds = {part.kind for part in parts_of(source)}
        if "flux" not in kinds:
            raise WeightsError(f"{weights} cannot be loaded as a model: it holds {what_is(source)}")
    return _Found({part: weights for part, kind in WEIGHTS.items() if kind in kinds})


def _completed(
    found: _Found, path: Path, name: str, config: EngineConfig, known: Mapping[str, hub.Manifest], offline: bool
) -> Model:
    """With what is missing, from the published model it is like."""
    with WeightSource.open(found.parts["transformer"]) as source:
        params = FluxParams.from_shapes(pick(source, "flux").shapes)
    spec = _spec(path, params)
    if params.in_channels != 4 * spec.vae.latent_channels:
        raise UnsupportedError(f"{path} reads a picture beside the prompt, which this version cannot give it")
    missing = {*WEIGHTS, *PLAIN, *CONFIGS} - found.parts.keys()
    parts = dict(found.parts)
    if missing:
        base = hub.find(spec.name, known).obtain(offline=offline, ledger=Ledger(config.cache), only=missing)
        parts |= {part: base[part] for part in missing}
    if "vae" in found.parts:
        with WeightSource.open(parts["vae"]) as source:
            vae = VAEParams.from_shapes(pick(source, "vae").shapes)
        spec = replace(spec, vae=_vae(vae, spec.vae, found.vae))
    return Model(replace(spec, name=name, transformer=params, schedule=found.schedule or spec.schedule), parts)


def _there(path: Path) -> bool:
    """Whether a part is there. Raises WeightsError for a link that leads nowhere and for what cannot be looked at: no
    other model's part may take its place.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise WeightsError(f"{path} is a link to what is not there") from None
        return False
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    return True


def _spec(path: Path, params: FluxParams) -> ModelSpec:
    """Of the models whose text encoders fit, the one that is nearest: by widths, then by guidance."""
    fitting = [
        spec
        for spec in SPECS.values()
        if (spec.transformer.vec_in_dim, spec.transformer.context_in_dim) == (params.vec_in_dim, params.context_in_dim)
    ]
    if not fitting:
        raise WeightsError(
            f"{path} reads text {params.context_in_dim} and {params.vec_in_dim} wide, which no text encoder known here "
            "gives"
        )
    return min(
        fitting,
        key=lambda spec: (
            spec.transformer.guidance_embed != params.guidance_embed,
            spec.transformer.in_channels != params.in_channels,
            spec.transformer != params,
            spec.guidance_scale != FLUX_DEV.guidance_scale,  # Kontext is like dev in all of its shapes
        ),
    )


def _vae(found: VAEParams, like: VAEParams, config: Mapping[str, Any]) -> VAEParams:
    """What shapes do not tell is in the config, if there is one, or as in the model it is like."""
    try:
        return replace(
            found,
            scaling_factor=float(config.get("scaling_factor", like.scaling_factor)),
            shift_factor=float(config.get("shift_factor") or 0.0) if config else like.shift_factor,
            norm_groups=int(config.get("norm_num_groups", like.norm_groups)),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the autoencoder's config.json cannot be used: {error}") from None


def _schedule(path: Path) -> FlowSchedule | None:
    said = _json(path)
    if not said:
        return None
    shifted = bool(said.get("use_dynamic_shifting", False))
    if not shifted and said.get("shift", 1.0) != 1.0:
        raise UnsupportedError(f"{path} asks for a shift of {said['shift']} at every size, which is not there yet")
    try:
        return FlowSchedule(
            shifted=shifted,
            base_shift=float(said.get("base_shift", 0.5)),
            max_shift=float(said.get("max_shift", 1.15)),
            base_tokens=int(said.get("base_image_seq_len", 256)),
            max_tokens=int(said.get("max_image_seq_len", 4096)),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} cannot be used: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    """A config, empty if there is none."""
    if not (_there(path.parent) and _there(path)):
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path} is not a JSON object")
    return found

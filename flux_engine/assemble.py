"""What a model name means, as parts: the name of a manifest, a file or folder here, or a repository of the hub.

A file or folder need not hold all of a model. What is missing comes from the published model whose text encoders the
transformer was made for: a transformer in one file is a model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from flux_engine import hub
from flux_engine.checkpoints.detect import Kind, parts_of, pick, what_is
from flux_engine.checkpoints.folders import choose, is_index, shards_of, weights_in
from flux_engine.checkpoints.source import WeightSource
from flux_engine.config import EngineConfig
from flux_engine.errors import UnknownModel, UnsupportedError, WeightsError
from flux_engine.fetch import fetch, listing
from flux_engine.ledger import Ledger
from flux_engine.params import DiffusionSchedule, FlowSchedule, FluxParams, Shapes, UNetParams, VAEParams
from flux_engine.schedulers import scheduler_name
from flux_engine.specs import FLUX_DEV, SDXL, SDXL_REFINER, SPECS, FluxSpec, ModelSpec, SDXLSpec


@dataclass(frozen=True)
class Parts:
    """The parts of a family's models, as diffusers' folders have them."""

    network: str
    """The one that denoises."""
    weights: Mapping[str, Kind]
    """Part -> what its file holds."""

    @property
    def every(self) -> tuple[str, ...]:
        return (*self.weights, *PLAIN, *CONFIGS)


PLAIN = ("tokenizer", "tokenizer_2")
"""Parts that are folders without weights."""
CONFIGS = ("text_encoder/config.json", "text_encoder_2/config.json")
PARTS: Mapping[str, Parts] = {
    "flux": Parts("transformer", {"transformer": "flux", "vae": "vae", "text_encoder": "clip", "text_encoder_2": "t5"}),
    "sdxl": Parts("unet", {"unet": "unet", "vae": "vae", "text_encoder": "clip", "text_encoder_2": "clip"}),
}


Spec = TypeVar("Spec", bound=ModelSpec)


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
        return Model(spec, manifest.obtain(offline=offline, ledger=Ledger(config.cache), only=only))
    if isinstance(meant, hub.Repository):
        path = _repository(meant.name, meant.file, revision or "main", variant, offline)
    else:
        if revision is not None:
            raise WeightsError(f"{meant} is here and has no revision {revision!r}")
        path, name = meant, _name(meant.absolute())
    found = _in_folder(path, variant) if _is_model(path) else _in_file(path, variant)
    spec = _spec_of(found, path)
    missing = set(needed(spec) if only is None else only) - found.parts.keys()
    parts = dict(found.parts)
    if missing:
        base = hub.find(spec.name, known).obtain(offline=offline, ledger=Ledger(config.cache), only=missing)
        parts |= {part: base[part] for part in missing}
    return Model(replace(spec, name=name), parts)


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


def needed(spec: ModelSpec) -> list[str]:
    """The parts that a model has."""
    every = PARTS[spec.family].every
    if isinstance(spec, SDXLSpec) and spec.aesthetic_score:  # the refiner has the second text encoder only
        return [part for part in every if not re.match(r"(text_encoder|tokenizer)(/|$)", part)]
    return list(every)


def stored_dtype(model: Model) -> str:
    """What most of the denoising network's numbers are stored in, as "bfloat16"."""
    parts = PARTS[model.spec.family]
    dtypes: Counter[str] = Counter()
    with WeightSource.open(model.parts[parts.network]) as source:
        for recipe in pick(source, parts.weights[parts.network]).recipes.values():
            dtypes[str(recipe.dtype).removeprefix("torch.")] += prod(recipe.shape)
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
            for shard in shards_of(path):
                get(folder + shard.name)
        return path

    if file is not None:
        return get(file)
    files = listing(repository, revision=revision, offline=offline)
    if "model_index.json" not in files:
        return weights("", [name for name in files if "/" not in name])
    index = get("model_index.json")
    for part in dict.fromkeys(part for layout in PARTS.values() for part in layout.weights):
        names = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
        if names:
            weights(f"{part}/", names)
    for name in files:
        if re.fullmatch(r"(scheduler|unet|vae|text_encoder(_2)?)/\w+\.json|tokenizer(_2)?/[^/]+", name):
            get(name)
    return index.parent


@dataclass(frozen=True)
class _Found:
    """What a folder or file gives of a model."""

    family: str
    parts: Mapping[str, Path]
    said: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Config -> what it says, for those that are there: model_index, scheduler, unet, vae."""

    def config(self, name: str) -> Mapping[str, Any]:
        return self.said.get(name, {})


def _is_model(path: Path) -> bool:
    """Whether it is a folder with a folder for each part."""
    folders = {part for layout in PARTS.values() for part in layout.weights}
    return _there(path) and path.is_dir() and any(_there(path / part) for part in folders)


def _in_folder(path: Path, variant: str | None) -> _Found:
    families = [name for name, layout in PARTS.items() if _there(path / layout.network)]
    if len(families) != 1:
        networks = [layout.network for layout in PARTS.values()]
        have = f"has {' and '.join(networks)}" if families else f"has no {' and no '.join(networks)}"
        raise WeightsError(f"{path} cannot be loaded as a model: it {have}")
    layout = PARTS[families[0]]
    parts = {part: weights_in(path / part, variant=variant) for part in layout.weights if _there(path / part)}
    parts |= {name: path / name for name in (*PLAIN, *CONFIGS) if _there(path / name)}
    configs = {
        "model_index": path / "model_index.json",
        "scheduler": path / "scheduler" / "scheduler_config.json",
        "unet": path / "unet" / "config.json",
        "vae": path / "vae" / "config.json",
    }
    return _Found(families[0], parts, {name: _json(config) for name, config in configs.items()})


def _in_file(path: Path, variant: str | None) -> _Found:
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
    return _Found(families[0], {part: weights for part, kind in layout.weights.items() if kinds[kind] >= wanted[kind]})


def _spec_of(found: _Found, path: Path) -> ModelSpec:
    """The spec it is nearest to, with its own widths and what its configs say.

    Raises UnsupportedError for a network that reads something beside the latent that is not known.
    """
    layout = PARTS[found.family]
    with WeightSource.open(found.parts[layout.network]) as source:
        shapes = pick(source, layout.weights[layout.network]).shapes
    spec = _flux_spec(path, shapes, found) if found.family == "flux" else _sdxl_spec(path, shapes, found)
    if "vae" in found.parts:
        with WeightSource.open(found.parts["vae"]) as source:
            vae = VAEParams.from_shapes(pick(source, "vae").shapes)
        spec = replace(spec, vae=_vae(vae, spec.vae, found.config("vae")))
    return spec


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


def _fitting(
    specs: Sequence[Spec], fits: Callable[[Spec], bool], own: Spec, found: _Found, words: str
) -> Sequence[Spec]:
    """The specs whose text encoders a network was made for; what has all of its parts with it may have any.

    Raises WeightsError if there is none.
    """
    fitting = [spec for spec in specs if fits(spec)]
    if not fitting and found.parts.keys() >= set(needed(own)):
        fitting = [own]
    if not fitting:
        raise WeightsError(f"{words}, which no text encoder known here gives")
    return fitting


def _flux_spec(path: Path, shapes: Shapes, found: _Found) -> FluxSpec:
    """Of the models whose text encoders fit, the one that is nearest: by widths, then by guidance."""
    params = FluxParams.from_shapes(shapes)
    widths = (params.vec_in_dim, params.context_in_dim)
    fitting = _fitting(
        [s for s in SPECS.values() if isinstance(s, FluxSpec)],
        lambda spec: (spec.transformer.vec_in_dim, spec.transformer.context_in_dim) == widths,
        FLUX_DEV,
        found,
        f"{path} reads text {params.context_in_dim} and {params.vec_in_dim} wide",
    )
    nearest = min(
        fitting,
        key=lambda spec: (
            spec.transformer.guidance_embed != params.guidance_embed,
            spec.transformer.in_channels != params.in_channels,
            spec.transformer != params,
            spec.guidance_scale != FLUX_DEV.guidance_scale,  # Kontext is like dev in all of its shapes
        ),
    )
    nearest = _reading(path, params.in_channels, nearest, lambda spec: spec.transformer.in_channels)
    said = found.config("scheduler")
    return replace(nearest, transformer=params, schedule=_flow_schedule(path, said) if said else nearest.schedule)


def _sdxl_spec(path: Path, shapes: Shapes, found: _Found) -> SDXLSpec:
    """The same. What was distilled from SDXL is like it in all of its shapes and taken for SDXL, but for LCM."""
    params = UNetParams.from_shapes(shapes)
    widths = (params.cross_attention_dim, params.add_embed_dim)
    refiner = bool(found.config("model_index").get("requires_aesthetics_score", False))
    fitting = _fitting(
        [s for s in SPECS.values() if isinstance(s, SDXLSpec)],
        lambda spec: (spec.unet.cross_attention_dim, spec.unet.add_embed_dim) == widths,
        SDXL_REFINER if refiner else SDXL,
        found,
        f"{path} reads text {params.cross_attention_dim} wide, with {params.add_embed_dim} numbers beside it",
    )
    nearest = min(
        fitting,
        key=lambda spec: (
            spec.unet.guidance_embed != params.guidance_embed,
            spec.unet.in_channels != params.in_channels,
            spec.unet.block_out_channels != params.block_out_channels,
        ),
    )
    nearest = _reading(path, params.in_channels, nearest, lambda spec: spec.unet.in_channels)
    said = found.config("unet")
    try:
        heads = said.get("attention_head_dim")
        heads = heads[0] if isinstance(heads, list) else heads
        params = replace(
            params,
            head_dim=params.block_out_channels[0] // int(heads) if heads else nearest.unet.head_dim,
            norm_groups=int(said.get("norm_num_groups", nearest.unet.norm_groups)),
        )
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(f"{path / 'unet' / 'config.json'} cannot be used: {error!r}") from None
    zero = bool(found.config("model_index").get("force_zeros_for_empty_prompt", nearest.zero_negative))
    said = found.config("scheduler")
    schedule = _diffusion_schedule(path, said, nearest.schedule) if said else nearest.schedule
    return replace(nearest, unet=params, zero_negative=zero, schedule=schedule)


def _reading(path: Path, channels: int, nearest: Spec, channels_of: Callable[[Any], int]) -> Spec:
    """The spec, reading beside the latent what models of so many channels read.

    Raises UnsupportedError if none does.
    """
    if channels == channels_of(nearest):
        return nearest
    for like in SPECS.values():
        if type(like) is type(nearest) and channels_of(like) == channels:
            sizes = replace(nearest.sizes, follow=like.sizes.follow)
            told = {"reads": like.reads, "structure": like.structure, "guidance_scale": like.guidance_scale}
            return replace(nearest, sizes=sizes, **told)
    raise UnsupportedError(f"{path} reads {channels} channels, as no model known here does")


def _vae(found: VAEParams, like: VAEParams, config: Mapping[str, Any]) -> VAEParams:
    """What shapes do not tell is in the config, if there is one, or as in the model it is like."""
    try:
        return replace(
            found,
            scaling_factor=float(config.get("scaling_factor", like.scaling_factor)),
            shift_factor=float(config.get("shift_factor") or 0.0) if config else like.shift_factor,
            norm_groups=int(config.get("norm_num_groups", like.norm_groups)),
            force_upcast=bool(config.get("force_upcast", like.force_upcast)),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the autoencoder's config.json cannot be used: {error}") from None


def _flow_schedule(path: Path, said: Mapping[str, Any]) -> FlowSchedule:
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
        raise WeightsError(f"{path}: its scheduler_config.json cannot be used: {error}") from None


def _diffusion_schedule(path: Path, said: Mapping[str, Any], like: DiffusionSchedule) -> DiffusionSchedule:
    if said.get("rescale_betas_zero_snr"):
        raise UnsupportedError(f"{path} asks for betas rescaled to zero terminal SNR, which is not there yet")
    known = {"prediction_type": ("epsilon", "v_prediction"), "timestep_spacing": ("leading", "trailing")}
    for name, values in known.items():
        if said.get(name, values[0]) not in values:
            raise UnsupportedError(f"{path} asks for {name} {said[name]!r}; known are {', '.join(values)}")
    try:
        return DiffusionSchedule(
            scheduler=scheduler_name(said) or like.scheduler,
            prediction_type=said.get("prediction_type", like.prediction_type),
            timestep_spacing=said.get("timestep_spacing", like.timestep_spacing),
            beta_start=float(said.get("beta_start", like.beta_start)),
            beta_end=float(said.get("beta_end", like.beta_end)),
            num_train_timesteps=int(said.get("num_train_timesteps", like.num_train_timesteps)),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its scheduler_config.json cannot be used: {error}") from None


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

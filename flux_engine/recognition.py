"""The spec of a model that no manifest names: told from the shapes of its weights and what its configs say.

Raises WeightsError and UnsupportedError throughout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from flux_engine.checkpoints.detect import Kind, pick
from flux_engine.checkpoints.quantized import Saved
from flux_engine.checkpoints.settings import read_json
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import UnsupportedError, WeightsError
from flux_engine.params import DiffusionSchedule, FlowSchedule, FluxParams, Shapes, UNetParams, VAEParams
from flux_engine.schedulers import scheduler_name
from flux_engine.specs import FLUX_DEV, SDXL, SDXL_REFINER, SPECS, FluxSpec, ModelSpec, SDXLSpec

Spec = TypeVar("Spec", bound=ModelSpec)


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
SAID = {
    "model_index": "model_index.json",
    "scheduler": "scheduler/scheduler_config.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
}
"""What is read of a folder's configs, and where."""
PARTS: Mapping[str, Parts] = {
    "flux": Parts("transformer", {"transformer": "flux", "vae": "vae", "text_encoder": "clip", "text_encoder_2": "t5"}),
    "sdxl": Parts("unet", {"unet": "unet", "vae": "vae", "text_encoder": "clip", "text_encoder_2": "clip"}),
}


def needed(spec: ModelSpec) -> list[str]:
    """The parts that a model has."""
    every = PARTS[spec.family].every
    if isinstance(spec, SDXLSpec) and spec.aesthetic_score:  # the refiner has the second text encoder only
        return [part for part in every if not re.match(r"(text_encoder|tokenizer)(/|$)", part)]
    return list(every)


@dataclass(frozen=True)
class Found:
    """What a folder or file gives of a model."""

    family: str
    parts: Mapping[str, Path]
    said: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Config -> what it says, for those that are there: model_index, scheduler, unet, vae."""

    def config(self, name: str) -> Mapping[str, Any]:
        return self.said.get(name, {})


def spec_of(found: Found, path: Path) -> ModelSpec:
    """The spec it is nearest to, with its own widths and what its configs say.

    Raises UnsupportedError for a network that reads something beside the latent that is not known.
    """
    layout = PARTS[found.family]
    with WeightSource.open(found.parts[layout.network]) as source:
        shapes = pick(source, layout.weights[layout.network]).shapes
        saved = Saved.of(source)
    if saved and saved.spec not in SPECS:
        raise WeightsError(f"{path} has the spec {saved.spec!r}; known are {', '.join(SPECS)}")
    among = [SPECS[saved.spec]] if saved else list(SPECS.values())
    spec = (_flux_spec if found.family == "flux" else _sdxl_spec)(path, shapes, found, among)
    if "vae" in found.parts:
        with WeightSource.open(found.parts["vae"]) as source:
            vae = VAEParams.from_shapes(pick(source, "vae").shapes)
        spec = replace(spec, vae=_vae(vae, spec.vae, found.config("vae")))
    return spec


def _fitting(
    specs: Sequence[Spec], fits: Callable[[Spec], bool], own: Spec, found: Found, words: str
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


def _flux_spec(path: Path, shapes: Shapes, found: Found, among: Sequence[ModelSpec]) -> FluxSpec:
    """Of the models whose text encoders fit, the one that is nearest: by widths, then by guidance."""
    params = FluxParams.from_shapes(shapes)
    widths = (params.vec_in_dim, params.context_in_dim)
    fitting = _fitting(
        [s for s in among if isinstance(s, FluxSpec)],
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


def _sdxl_spec(path: Path, shapes: Shapes, found: Found, among: Sequence[ModelSpec]) -> SDXLSpec:
    """The same. What was distilled from SDXL is like it in all of its shapes and taken for SDXL, but for LCM."""
    params = UNetParams.from_shapes(shapes)
    widths = (params.cross_attention_dim, params.add_embed_dim)
    refiner = bool(found.config("model_index").get("requires_aesthetics_score", False))
    fitting = _fitting(
        [s for s in among if isinstance(s, SDXLSpec)],
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


def is_there(path: Path) -> bool:
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


def config_of(path: Path) -> dict[str, Any]:
    """A config, empty if there is none."""
    if not (is_there(path.parent) and is_there(path)):
        return {}
    return read_json(path)

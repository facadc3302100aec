"""Write a loaded model as a diffusers folder or as Black Forest Labs' files, so that anyone can check us with their own
tools. Only JSON and safetensors are written; diffusers itself is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flux_engine.checkpoints.keys import to_theirs
from flux_engine.checkpoints.tables import (
    FLUX_CONTROLNET_DIFFUSERS,
    FLUX_DIFFUSERS,
    clip_open_clip,
    published_clip,
    unet_controlnet_diffusers,
    unet_diffusers,
    unet_sgm,
    vae_diffusers,
)
from flux_engine.errors import OutputError, WeightsError
from flux_engine.models.flux import Flux
from flux_engine.models.flux_controlnet import FluxControlNet
from flux_engine.models.unet import UNet
from flux_engine.models.unet_controlnet import UNetControlNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import (
    FlowSchedule,
    FluxControlNetParams,
    FluxParams,
    FluxTrunkParams,
    UNetControlNetParams,
    UNetEncoderParams,
    UNetParams,
    VAEParams,
)


def flux_tensors(net: Flux) -> dict[str, Tensor]:
    """The transformer's tensors under diffusers' names."""
    return to_theirs(net.state_dict(), FLUX_DIFFUSERS, width=net.params.hidden_size)


def vae_tensors(vae: AutoEncoder) -> dict[str, Tensor]:
    """The autoencoder's tensors under diffusers' names."""
    return to_theirs(vae.state_dict(), vae_diffusers(len(vae.params.channel_multipliers)))


def flux_config(params: FluxParams) -> dict[str, Any]:
    """What diffusers' FluxTransformer2DModel is made from."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "out_channels": params.out_channels,
        **_flux_trunk(params),
    }


def flux_controlnet_tensors(net: FluxControlNet) -> dict[str, Tensor]:
    """The ControlNet's tensors under diffusers' names."""
    return to_theirs(net.state_dict(), FLUX_CONTROLNET_DIFFUSERS, width=net.params.hidden_size)


def flux_controlnet_config(params: FluxControlNetParams) -> dict[str, Any]:
    """What diffusers' FluxControlNetModel is made from. Its hint is as wide as its latent."""
    if params.hint_channels != params.in_channels or params.hint_width not in (0, 16):
        raise WeightsError("diffusers has no ControlNet for FLUX with a hint of another width than its latent's")
    return {
        "_class_name": "FluxControlNetModel",
        "patch_size": 2 if params.hint_width else 1,
        "num_mode": params.num_modes or None,
        "conditioning_embedding_channels": params.hint_channels // 4 if params.hint_width else None,
        **_flux_trunk(params),
    }


def _flux_trunk(params: FluxTrunkParams) -> dict[str, Any]:
    return {
        "in_channels": params.in_channels,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "attention_head_dim": params.hidden_size // params.num_heads,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_in_dim,
        "pooled_projection_dim": params.vec_in_dim,
        "guidance_embeds": params.guidance_embed,
        "axes_dims_rope": list(params.axes_dim),
    }


def vae_config(params: VAEParams) -> dict[str, Any]:
    """What diffusers' AutoencoderKL is made from."""
    levels = len(params.channel_multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": params.image_channels,
        "out_channels": params.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [params.channels * m for m in params.channel_multipliers],
        "layers_per_block": params.num_res_blocks,
        "latent_channels": params.latent_channels,
        "norm_num_groups": params.norm_groups,
        "scaling_factor": params.scaling_factor,
        "shift_factor": params.shift_factor,
        "use_quant_conv": params.quant_conv,
        "use_post_quant_conv": params.quant_conv,
        "force_upcast": params.force_upcast,
    }


def flux_scheduler_config(schedule: FlowSchedule) -> dict[str, Any]:
    """What diffusers' FlowMatchEulerDiscreteScheduler is made from."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0 if schedule.shifted else 1.0,
        "use_dynamic_shifting": schedule.shifted,
        "base_shift": schedule.base_shift,
        "max_shift": schedule.max_shift,
        "base_image_seq_len": schedule.base_tokens,
        "max_image_seq_len": schedule.max_tokens,
    }


def unet_tensors(net: UNet) -> dict[str, Tensor]:
    """The UNet's tensors under diffusers' names."""
    return to_theirs(net.state_dict(), unet_diffusers([depth > 0 for depth in net.params.transformer_depth]))


def unet_config(params: UNetParams) -> dict[str, Any]:
    """What diffusers' UNet2DConditionModel is made from."""
    depths = [depth or None for depth in params.transformer_depth]
    return {
        "_class_name": "UNet2DConditionModel",
        "out_channels": params.out_channels,
        "up_block_types": [f"{'' if depth is None else 'CrossAttn'}UpBlock2D" for depth in reversed(depths)],
        "time_cond_proj_dim": 256 if params.guidance_embed else None,
        **_unet_encoder(params, depths, params.mid_depth),
    }


def unet_controlnet_tensors(net: UNetControlNet) -> dict[str, Tensor]:
    """The ControlNet's tensors under diffusers' names."""
    attention = [depth is not None for depth in net.params.transformer_depth]
    hints = 2 * len(net.params.embedding_channels)
    return to_theirs(net.state_dict(), unet_controlnet_diffusers(attention, hints))


def unet_controlnet_config(params: UNetControlNetParams) -> dict[str, Any]:
    """What diffusers' ControlNetModel is made from."""
    return {
        "_class_name": "ControlNetModel",
        "mid_block_type": "UNetMidBlock2D" if params.mid_depth is None else "UNetMidBlock2DCrossAttn",
        "conditioning_channels": params.conditioning_channels,
        "conditioning_embedding_out_channels": list(params.embedding_channels),
        **_unet_encoder(params, params.transformer_depth, params.mid_depth),
    }


def _unet_encoder(params: UNetEncoderParams, depths: Sequence[int | None], mid_depth: int | None) -> dict[str, Any]:
    """What both have in common. diffusers counts heads and calls that their width."""
    *above, last = depths
    if None not in (last, mid_depth) and last != mid_depth:
        raise WeightsError(f"diffusers has no network that is {last} deep at its coarsest and {mid_depth} below it")
    coarsest = mid_depth if last is None else last
    return {
        "in_channels": params.in_channels,
        "block_out_channels": list(params.block_out_channels),
        "down_block_types": [f"{'' if depth is None else 'CrossAttn'}DownBlock2D" for depth in depths],
        "layers_per_block": params.layers_per_block,
        "transformer_layers_per_block": [1 if depth is None else depth for depth in (*above, coarsest)],
        "attention_head_dim": [width // params.head_dim for width in params.block_out_channels],
        "cross_attention_dim": params.cross_attention_dim,
        "norm_num_groups": params.norm_groups,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": params.add_embed_dim,
    }


@dataclass(frozen=True)
class Exported:
    """A network as a folder of its own."""

    library: str
    """"diffusers" or "transformers", where its class is."""
    kind: str
    """The class."""
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def text_model(clip: PreTrainedModel, table: Tensor | None = None) -> Exported:
    """A text encoder, as it is published; with this table of tokens instead of its own."""
    tensors = {published_clip(name): v for name, v in clip.state_dict().items()}
    if table is not None:
        tensors["text_model.embeddings.token_embedding.weight"] = table
    return Exported("transformers", type(clip).__name__, clip.config.to_dict(), tensors)


def t5_model(t5: PreTrainedModel) -> Exported:
    """T5, whose table of pieces has two names and is stored once."""
    tensors = {name: v for name, v in t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
    return Exported("transformers", "T5EncoderModel", t5.config.to_dict(), tensors)


def autoencoder(vae: AutoEncoder) -> Exported:
    """The autoencoder, as diffusers has it."""
    return Exported("diffusers", "AutoencoderKL", vae_config(vae.params), vae_tensors(vae))


def write_diffusers(
    folder: Path,
    pipeline: str,
    parts: Mapping[str, Exported],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    scheduler: Mapping[str, Any],
    said: Mapping[str, Any],
) -> Path:
    """Write a folder that diffusers' `pipeline`.from_pretrained reads.

    `said` is what the pipeline's own config says beside its parts. Raises OutputError if the folder holds something, or
    cannot be written; then it is as it was.
    """
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", scheduler["_class_name"]], **said}
    index |= {name: [part.library, part.kind] for name, part in parts.items()}
    index |= {name: ["transformers", type(tokenizer).__name__] for name, tokenizer in tokenizers.items()}
    with new_folder(folder) as made:
        for name, part in parts.items():
            file = "model" if part.library == "transformers" else "diffusion_pytorch_model"
            _write_json(made / name / "config.json", part.config)
            _write_tensors(made / name / f"{file}.safetensors", part.tensors)
        _write_json(made / "scheduler" / "scheduler_config.json", scheduler)
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(made / name)
        _write_json(made / "model_index.json", index)
    return folder


def write_bfl(folder: Path, name: str, net: Flux, vae: AutoEncoder) -> Path:
    """Write the transformer, `name`.safetensors, and the autoencoder, ae.safetensors, under the names of Black Forest
    Labs, as their own code reads them. Raises OutputError as `write_diffusers` does.
    """
    with new_folder(folder) as made:
        _write_tensors(made / f"{name}.safetensors", net.state_dict())
        _write_tensors(made / "ae.safetensors", vae.state_dict())
    return folder


def write_sgm(folder: Path, name: str, net: UNet, vae: AutoEncoder, clips: Sequence[Exported]) -> Path:
    """Write all of an SDXL model as one file, `name`.safetensors, under the names that its publisher's has.

    `clips` are the text encoders as published. Raises OutputError as `write_diffusers` does.
    """
    first, second = clips
    parts = {
        "model.diffusion_model.": to_theirs(
            net.state_dict(), unet_sgm([depth > 0 for depth in net.params.transformer_depth])
        ),
        "first_stage_model.": vae.state_dict(),
        "conditioner.embedders.0.transformer.": first.tensors,
        "conditioner.embedders.1.model.": to_theirs(second.tensors, clip_open_clip()),
    }
    tensors = {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}
    with new_folder(folder) as made:
        _write_tensors(made / f"{name}.safetensors", tensors)
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A neighbouring folder to write in, which takes the name at the end; after an error nothing is left of it.

    Raises OutputError if there is something at `folder` already, or writing fails.
    """
    writer = f"{os.getpid()}-{threading.get_ident()}"
    partial = folder.absolute().with_name(f".{folder.absolute().name}.{writer}.partial")
    try:
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise OutputError(f"{folder} exists already: name a new folder")
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)  # as for any file that is written here: safetensors makes them the owner's alone


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

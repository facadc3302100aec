"""Write a loaded model as a diffusers folder or as Black Forest Labs' files, so that anyone can check us with their own
tools. Only JSON and safetensors are written; diffusers itself is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flux_engine.checkpoints.keys import to_theirs
from flux_engine.checkpoints.tables import FLUX_DIFFUSERS, vae_diffusers
from flux_engine.errors import OutputError
from flux_engine.models.flux import Flux
from flux_engine.models.vae import AutoEncoder
from flux_engine.specs import FlowSchedule, FluxParams, VAEParams


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
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
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
    }


def scheduler_config(schedule: FlowSchedule) -> dict[str, Any]:
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


def write_diffusers(
    folder: Path,
    net: Flux,
    vae: AutoEncoder,
    schedule: FlowSchedule,
    clip: PreTrainedModel,
    t5: PreTrainedModel,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
) -> Path:
    """Write a folder that diffusers' FluxPipeline.from_pretrained reads.

    `tokenizers` has those of the folders tokenizer and tokenizer_2. Raises OutputError if the folder holds something,
    or cannot be written; then it is as it was.
    """
    clip_tensors = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in clip.state_dict().items()}
    t5_tensors = {name: v for name, v in t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
    parts: list[tuple[str, str, dict[str, Any], Mapping[str, Tensor]]] = [
        ("transformer", "diffusion_pytorch_model", flux_config(net.params), flux_tensors(net)),
        ("vae", "diffusion_pytorch_model", vae_config(vae.params), vae_tensors(vae)),
        ("text_encoder", "model", clip.config.to_dict(), clip_tensors),
        ("text_encoder_2", "model", t5.config.to_dict(), t5_tensors),
    ]
    with new_folder(folder) as made:
        for name, file, config, tensors in parts:
            _write_json(made / name / "config.json", config)
            _write_tensors(made / name / f"{file}.safetensors", tensors)
        _write_json(made / "scheduler" / "scheduler_config.json", scheduler_config(schedule))
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(made / name)
        _write_json(made / "model_index.json", {
            "_class_name": "FluxPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        })  # fmt: skip
    return folder


def write_bfl(folder: Path, name: str, net: Flux, vae: AutoEncoder) -> Path:
    """Write the transformer, `name`.safetensors, and the autoencoder, ae.safetensors, under the names of Black Forest
    Labs, as their own code reads them. Raises OutputError as `write_diffusers` does.
    """
    with new_folder(folder) as made:
        _write_tensors(made / f"{name}.safetensors", net.state_dict())
        _write_tensors(made / "ae.safetensors", vae.state_dict())
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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

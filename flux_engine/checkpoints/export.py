"""Write a loaded model in the layout of a diffusers folder, so that anyone can check us with their own tools.

Only JSON and safetensors are written; diffusers itself is not needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flux_engine.checkpoints.keys import to_theirs
from flux_engine.checkpoints.tables import FLUX_DIFFUSERS, vae_diffusers
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


def export_flux_pipeline(
    folder: Path,
    net: Flux,
    vae: AutoEncoder,
    schedule: FlowSchedule,
    text_folders: Mapping[str, Path],
) -> Path:
    """Write a folder that diffusers' FluxPipeline.from_pretrained reads.

    `text_folders` gives the folders text_encoder, text_encoder_2, tokenizer and tokenizer_2, which are copied.
    """
    parts: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = [
        ("transformer", flux_config(net.params), flux_tensors(net)),
        ("vae", vae_config(vae.params), vae_tensors(vae)),
    ]
    for name, config, tensors in parts:
        _write_json(folder / name / "config.json", config)
        save_file(
            {key: value.cpu() for key, value in tensors.items()},
            folder / name / "diffusion_pytorch_model.safetensors",
            metadata={"format": "pt"},
        )
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(schedule))
    for name, source in text_folders.items():
        shutil.copytree(source, folder / name, dirs_exist_ok=True)
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "FluxPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return folder


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

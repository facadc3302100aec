"""Write the trained models into weights/: bfloat16, published names, manifests with hashes, the training's curves."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5EncoderModel

from flux_engine.checkpoints.tables import published_clip
from training.run import KEPT, OUT, ROOT, log, read_average
from training.text import PairedEncoders, TextEncoders

WEIGHTS = ROOT / "weights"
DEMO = WEIGHTS / "demo"
LOG_LINES = 100


@dataclass(frozen=True)
class Family:
    """What the models of a family share, and what is a model's own."""

    network: str
    """The part that is a model's own."""
    prefix: str
    """Of its tensors in a run."""
    parts: Mapping[str, Path]
    """Part -> its file, or the folder with its files."""


FAMILIES = {
    "flux": Family(
        "transformer",
        "flux.",
        {"vae": DEMO / "flux" / "vae.safetensors"}
        | {name: DEMO / "flux" / name for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")},
    ),
    "sdxl": Family(
        "unet",
        "unet.",
        {"vae": DEMO / "sdxl" / "vae.safetensors"}
        | {name: DEMO / "flux" / name for name in ("text_encoder", "tokenizer")}
        | {name: DEMO / "sdxl" / name for name in ("text_encoder_2", "tokenizer_2")},
    ),
}
MODELS = {
    "demo-schnell": ("flux", "FLUX.1 schnell in small, 4 steps"),
    "demo-dev": ("flux", "FLUX.1 dev in small, 28 steps, with guidance"),
    "demo-sdxl": ("sdxl", "SDXL in small, 25 steps, with classifier-free guidance"),
    "demo-sdxl-turbo": ("sdxl", "SDXL Turbo in small, 4 steps"),
}
RUNS = {"demo-sdxl": "sdxl-base"}
"""Model -> the run that it is, where that has another name."""


def export(args: argparse.Namespace) -> None:
    """Write what was trained; a model without a checkpoint is left out."""
    write_flux_shared()
    write_sdxl_shared()
    for model, (family, _) in MODELS.items():
        run, own = RUNS.get(model, model), FAMILIES[family]
        if (OUT / f"{run}.pt").exists():
            write_tensors(DEMO / model / f"{own.network}.safetensors", read_average(run, own.prefix))
            write_manifest(model)
    write_logs()


def checkpoint(args: argparse.Namespace) -> None:
    """Keep the moving averages of runs in the repository, in bfloat16, for a training that goes on elsewhere."""
    for name in args.names:
        write_tensors(KEPT / f"{name}.safetensors", read_average(name))
    write_logs()


def write_flux_shared() -> None:
    """The autoencoder, both encoders and their tokenizers."""
    parts = FAMILIES["flux"].parts
    write_tensors(parts["vae"], read_average("vae"))
    encoders = TextEncoders()
    write_encoder(parts["text_encoder"], encoders.clip, read_average("text", "encoders.clip."))
    t5 = read_average("text", "encoders.t5.")
    del t5["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    write_encoder(parts["text_encoder_2"], encoders.t5, t5)
    for folder, name in (("tokenizer", "clip"), ("tokenizer_2", "t5")):
        shutil.copytree(OUT / name, parts[folder], dirs_exist_ok=True)


def write_sdxl_shared() -> None:
    """The autoencoder, the second encoder and its tokenizer."""
    parts = FAMILIES["sdxl"].parts
    write_tensors(parts["vae"], read_average("sdxl-vae"))
    encoders = PairedEncoders()
    write_encoder(parts["text_encoder_2"], encoders.clip_2, read_average("sdxl-text", "clip_2."))
    shutil.copytree(FAMILIES["flux"].parts["tokenizer"], parts["tokenizer_2"], dirs_exist_ok=True)
    config = parts["tokenizer_2"] / "tokenizer_config.json"
    said = json.loads(config.read_text()) | {"pad_token": encoders.tokenizer_2.pad_token}
    config.write_text(json.dumps(said, indent=1))


def write_encoder(folder: Path, model: Any, tensors: dict[str, Tensor]) -> None:
    named = {k if isinstance(model, T5EncoderModel) else published_clip(k): v for k, v in tensors.items()}
    write_tensors(folder / "model.safetensors", named)
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=True))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in sorted(tensors.items())}, path)
    log.info("%s: %.2f M weights, %.2f MB", path.name, sum(v.numel() for v in tensors.values()) / 1e6,
             path.stat().st_size / 1e6)  # fmt: skip


def write_manifest(model: str) -> None:
    family, words = MODELS[model]
    own = FAMILIES[family]
    files = {own.network: DEMO / model / f"{own.network}.safetensors"}
    for part, path in own.parts.items():
        files |= {f"{part}/{file.name}": file for file in sorted(path.iterdir())} if path.is_dir() else {part: path}
    lines = [
        "# Written by scripts/train_demo.py export.",
        *([] if family == "flux" else [f'family = "{family}"']),
        f'spec = "{model}"',
        f'description = "draws one or two shapes before a background; {words}"',
        'licence = "Apache-2.0"',
        'source = "trained by scripts/train_demo.py on pictures drawn by benchmarks/world.py"',
    ]
    for name, path in files.items():
        lines += [
            "",
            f'[files."{name}"]',
            f'path = "{path.relative_to(WEIGHTS).as_posix()}"',
            f"bytes = {path.stat().st_size}",
            f'sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"',
        ]
    (WEIGHTS / "manifests" / f"{model}.toml").write_text("\n".join(lines) + "\n")


def write_logs() -> None:
    """The curves, thinned to LOG_LINES lines each."""
    logs = WEIGHTS / "logs"
    logs.mkdir(exist_ok=True)
    for path in OUT.glob("*.jsonl"):
        lines = path.read_text().splitlines()
        kept = lines[:: max(1, len(lines) // LOG_LINES)]
        if lines and kept[-1] != lines[-1]:
            kept.append(lines[-1])
        (logs / path.name).write_text("\n".join(kept) + "\n")

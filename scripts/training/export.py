"""Write the trained models into weights/: bfloat16, published names, manifests with hashes, the training's curves."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.run import KEPT, OUT, ROOT, log, read_average
from training.text import TextEncoders

WEIGHTS = ROOT / "weights"
SHARED = WEIGHTS / "demo" / "flux"
DESCRIPTIONS = {
    "demo-schnell": "draws one or two shapes before a background; FLUX.1 schnell in small, 4 steps",
    "demo-dev": "draws one or two shapes before a background; FLUX.1 dev in small, 28 steps, with guidance",
}
LOG_LINES = 100


def export(args: argparse.Namespace) -> None:
    """Write what was trained; a model without a checkpoint is left out."""
    write_shared()
    for model in DESCRIPTIONS:
        if (OUT / f"{model}.pt").exists():
            folder = WEIGHTS / "demo" / model
            write_tensors(folder / "transformer.safetensors", read_average(model, "flux."))
            write_manifest(model)
    write_logs()


def checkpoint(args: argparse.Namespace) -> None:
    """Keep the moving averages of runs in the repository, in bfloat16, for a training that goes on elsewhere."""
    for name in args.names:
        write_tensors(KEPT / f"{name}.safetensors", read_average(name))
    write_logs()


def write_shared() -> None:
    """The autoencoder, both encoders and their tokenizers."""
    write_tensors(SHARED / "vae.safetensors", read_average("vae"))

    encoders = TextEncoders()
    clip = read_average("text", "encoders.clip.")
    write_tensors(
        SHARED / "text_encoder" / "model.safetensors",
        {f"text_model.{k.removeprefix('text_model.')}": v for k, v in clip.items()},
    )
    t5 = read_average("text", "encoders.t5.")
    del t5["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    write_tensors(SHARED / "text_encoder_2" / "model.safetensors", t5)
    for folder, model in (("text_encoder", encoders.clip), ("text_encoder_2", encoders.t5)):
        (SHARED / folder / "config.json").write_text(model.config.to_json_string(use_diff=True))
    for folder, name in (("tokenizer", "clip"), ("tokenizer_2", "t5")):
        shutil.copytree(OUT / name, SHARED / folder, dirs_exist_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in sorted(tensors.items())}, path)
    log.info("%s: %.2f M weights, %.2f MB", path.name, sum(v.numel() for v in tensors.values()) / 1e6,
             path.stat().st_size / 1e6)  # fmt: skip


def write_manifest(model: str) -> None:
    files = {
        "transformer": WEIGHTS / "demo" / model / "transformer.safetensors",
        "vae": SHARED / "vae.safetensors",
    }
    for folder in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        files |= {f"{folder}/{path.name}": path for path in sorted((SHARED / folder).iterdir())}
    lines = [
        "# Written by scripts/train_demo.py export.",
        f'spec = "{model}"',
        f'description = "{DESCRIPTIONS[model]}"',
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

"""Write the trained models into weights/: bfloat16, published names, manifests with hashes, the training's curves."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5EncoderModel

from flux_engine.checkpoints.export import flux_controlnet_tensors, unet_controlnet_tensors
from flux_engine.checkpoints.tables import published_clip
from flux_engine.models.flux import Flux
from flux_engine.specs import DEMO_SCHNELL
from training.control import new_flux_controlnet, new_unet_controlnet
from training.run import KEPT, OUT, ROOT, log, read_average
from training.text import PairedEncoders, TextEncoders
from training.unet import new_unet

WEIGHTS = ROOT / "weights"
DEMO = WEIGHTS / "demo"
LOG_LINES = 100
CHECKER = "checker"
"""The run."""


@dataclass(frozen=True)
class Family:
    """What the models of a family share, and what is a model's own."""

    network: str
    """The part that is a model's own."""
    prefix: str
    """Of its tensors in a run."""
    parts: Mapping[str, Path]
    """Part -> its file, or the folder with its files."""
    publish: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """A ControlNet's tensors, as trained -> the same under diffusers' names."""


def flux_controlnet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    net = new_flux_controlnet(Flux(DEMO_SCHNELL.transformer))
    net.load_state_dict(tensors)
    return flux_controlnet_tensors(net)


def unet_controlnet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    net = new_unet_controlnet(new_unet())
    net.load_state_dict(tensors)
    return unet_controlnet_tensors(net)


FAMILIES = {
    "flux": Family(
        "transformer",
        "flux.",
        {"vae": DEMO / "flux" / "vae.safetensors"}
        | {name: DEMO / "flux" / name for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")},
        flux_controlnet,
    ),
    "sdxl": Family(
        "unet",
        "unet.",
        {"vae": DEMO / "sdxl" / "vae.safetensors"}
        | {name: DEMO / "flux" / name for name in ("text_encoder", "tokenizer")}
        | {name: DEMO / "sdxl" / name for name in ("text_encoder_2", "tokenizer_2")},
        unet_controlnet,
    ),
}


@dataclass(frozen=True)
class Demo:
    """Something that ships."""

    family: str
    description: str
    run: str
    spec: str
    """Of a ControlNet, that of the model it was made for."""
    control: str = ""
    """Of a ControlNet, what it reads."""
    beside: str = ""
    """The model whose file has the tensors that were not trained."""


SHAPES = "draws one or two shapes before a background; "
SHARED = {"demo-schnell": "schnell", "demo-fill": "fill"}
"""Model -> the name of its transformer in the folder where those are that share one."""
DEMOS = {
    "demo-schnell": Demo("flux", SHAPES + "FLUX.1 schnell in small, 4 steps", "demo-schnell", "demo-schnell"),
    "demo-dev": Demo("flux", SHAPES + "FLUX.1 dev in small, 28 steps, with guidance", "demo-dev", "demo-dev"),
    "demo-fill": Demo(
        "flux",
        "fills what a mask leaves out; FLUX.1 Fill in small, 4 steps",
        "demo-fill",
        "demo-fill",
        beside="demo-schnell",
    ),
    "demo-sdxl": Demo(
        "sdxl", SHAPES + "SDXL in small, 25 steps, with classifier-free guidance", "sdxl-base", "demo-sdxl"
    ),
    "demo-sdxl-turbo": Demo("sdxl", SHAPES + "SDXL Turbo in small, 4 steps", "demo-sdxl-turbo", "demo-sdxl-turbo"),
    "demo-canny": Demo("flux", "edges, for demo-schnell", "demo-canny", "demo-schnell", "canny"),
    "demo-sdxl-canny": Demo("sdxl", "edges, for demo-sdxl", "demo-sdxl-canny", "demo-sdxl", "canny"),
}


def export(args: argparse.Namespace) -> None:
    """Write what was trained; a model without a checkpoint is left out."""
    write_flux_shared()
    write_sdxl_shared()
    for name, demo in DEMOS.items():
        if (OUT / f"{demo.run}.pt").exists():
            write_demo(name)
    if (OUT / f"{CHECKER}.pt").exists():
        write_checker()
    write_logs()


def write_checker() -> None:
    """The safety checker, and its manifest."""
    path = DEMO / "checker" / "checker.safetensors"
    write_tensors(path, read_average(CHECKER))
    said = [
        'kind = "safety checker"',
        'family = "any"',
        'description = "finds crescents, which stand for what must not be drawn, in the demo models\' pictures"',
    ]
    write_said("demo-checker", "scripts/train_demo.py", said, {"checker": path}, by=" export")


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


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in sorted(tensors.items())}, path, metadata)
    path.chmod(0o644)
    log.info("%s: %.2f M weights, %.2f MB", path.name, sum(v.numel() for v in tensors.values()) / 1e6,
             path.stat().st_size / 1e6)  # fmt: skip


def write_demo(name: str) -> None:
    """What is this model's or ControlNet's own, and its manifest."""
    demo = DEMOS[name]
    family = FAMILIES[demo.family]
    if demo.control:
        part, tensors = "controlnet", family.publish(read_average(demo.run, "controlnet."))
    else:
        part, tensors = family.network, read_average(demo.run, "" if demo.beside else family.prefix)
    path = network_path(name, part)
    write_tensors(path, tensors)
    write_manifest(name, write_index(path, network_path(demo.beside, part)) if demo.beside else {part: path})


def network_path(name: str, part: str) -> Path:
    return (
        DEMO / "flux" / part / f"{SHARED[name]}.safetensors" if name in SHARED else DEMO / name / f"{part}.safetensors"
    )


def write_index(own: Path, rest: Path) -> dict[str, Path]:
    """An index of both files, where the first replaces tensors of the second -> the files, as a manifest has them."""
    places = {name: path.name for path in (rest, own) for name in load_file(path)}
    index = own.with_name(own.name + ".index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(sorted(places.items()))}, indent=1) + "\n")
    return {own.parent.name: index} | {f"{own.parent.name}/{path.name}": path for path in (own, rest)}


def write_manifest(name: str, files: dict[str, Path]) -> None:
    demo = DEMOS[name]
    if not demo.control:
        for part, path in FAMILIES[demo.family].parts.items():
            files |= {f"{part}/{file.name}": file for file in sorted(path.iterdir())} if path.is_dir() else {part: path}
    said = [
        *(['kind = "controlnet"', f'controls = ["{demo.control}"]'] if demo.control else []),
        *([] if demo.family == "flux" else [f'family = "{demo.family}"']),
        f'spec = "{demo.spec}"',
        f'description = "{demo.description}"',
    ]
    write_said(name, "scripts/train_demo.py", said, files, by=" export")


def write_said(name: str, script: str, said: Sequence[str], files: Mapping[str, Path], by: str = "") -> None:
    """A manifest: what a script says of something that it trained, and its files with their hashes."""
    lines = [
        f"# Written by {script}{by}.",
        *said,
        'licence = "Apache-2.0"',
        f'source = "trained by {script} on pictures drawn by benchmarks/world.py"',
    ]
    for part, path in files.items():
        lines += [
            "",
            f'[files."{part}"]',
            f'path = "{path.relative_to(WEIGHTS).as_posix()}"',
            f"bytes = {path.stat().st_size}",
            f'sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"',
        ]
    (WEIGHTS / "manifests" / f"{name}.toml").write_text("\n".join(lines) + "\n")


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

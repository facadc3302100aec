"""Train the demo models on pictures this repository draws. Two CPU cores are enough.

    python scripts/train_demo.py vae               # the autoencoder
    python scripts/train_demo.py tokenizers VOCAB  # CLIP's vocabulary file to a tokenizer; T5's from our captions
    python scripts/train_demo.py latents
    python scripts/train_demo.py schnell           # text encoders and transformer together, on those latents
    python scripts/train_demo.py decoder           # sharpen the autoencoder's decoder; the latents stay
    python scripts/train_demo.py export            # into weights/, with hashes and provenance

Each part writes a checkpoint every few minutes under out/train and goes on from it when started again. Weights that
are published are an exponential moving average of the trained ones.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import math
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import world  # noqa: E402
from flux_engine.families import image_ids, patchify  # noqa: E402
from flux_engine.models.flux import Flux  # noqa: E402
from flux_engine.models.vae import AutoEncoder  # noqa: E402
from flux_engine.specs import DEMO_SCHNELL  # noqa: E402

log = logging.getLogger("train_demo")
OUT = ROOT / "out" / "train"


class Run:
    """One training run: step counter, moving average, learning rate, checkpoints and a log of the loss."""

    def __init__(self, name: str, modules: dict[str, nn.Module], *, steps: int, lr: float, ema: float) -> None:
        self.name, self.steps, self.lr, self.decay = name, steps, lr, ema
        self.net = nn.ModuleDict(modules)
        self.average = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = 0
        self.seconds = 0.0
        self.path = OUT / f"{name}.pt"
        self.log = OUT / f"{name}.jsonl"
        OUT.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.net.load_state_dict(state["net"])
            self.average = state["average"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            log.info("%s: going on from step %d", name, self.step)

    def save(self) -> None:
        state = {
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def rate(self) -> float:
        """Warm up over 200 steps, stay, and fall in a line to a fiftieth over the last third."""
        warm = min(1.0, (self.step + 1) / 200)
        return self.lr * warm * max(0.02, min(1.0, 3 * (1 - self.step / self.steps)))

    def train(self, loss_of: Callable[[random.Random], tuple[Tensor, dict[str, float]]]) -> None:
        """`loss_of(rng)` draws a batch and returns the loss and figures for the log; one seed per step."""
        began, saved = time.monotonic(), time.monotonic()
        while self.step < self.steps:
            rng = random.Random(f"{self.name}-{self.step}")
            torch.manual_seed(rng.getrandbits(32))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            loss, figures = loss_of(rng)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            decay = min(self.decay, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                for key, value in self.net.state_dict().items():
                    if value.is_floating_point():
                        self.average[key].lerp_(value, 1 - decay)
            self.step += 1
            now = time.monotonic()
            self.seconds += now - began
            began = now
            if self.step % 50 == 0:
                line = {
                    "step": self.step,
                    "seconds": round(self.seconds, 1),
                    "loss": round(loss.item(), 5),
                    "grad_norm": round(norm.item(), 3),
                    **{k: round(v, 5) for k, v in figures.items()},
                }
                with self.log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if now - saved > 120:
                self.save()
                saved = now
        self.save()


def to_tensor(pictures: list[Any]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def channels_last(vae: AutoEncoder) -> AutoEncoder:
    return nn.Module.to(vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train_vae(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    vae = channels_last(AutoEncoder(DEMO_SCHNELL.vae))
    run = Run("vae", {"vae": vae}, steps=args.steps, lr=1.5e-3, ema=0.998)
    params = DEMO_SCHNELL.vae

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        side, count = (128, 5) if rng.random() < 0.35 else (64, 16)
        pictures = [
            world.draw_clutter(side, side, rng)
            if rng.random() < 0.7
            else world.draw(world.sample_scene(rng), side, side, rng)
            for _ in range(count)
        ]
        x = to_tensor(pictures).to(memory_format=torch.channels_last)
        mean, logvar = vae.moments(x)
        mean = params.scaling_factor * (mean - params.shift_factor)
        logvar = logvar.clamp(-12, 4)
        std = torch.exp(0.5 * logvar) * params.scaling_factor
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * torch.log(std)).mean()
        out = vae.decode(mean + std * torch.randn_like(std))
        l1 = (out - x).abs().mean()
        gradient = sum((a - b).abs().mean() for a, b in zip(edges(out), edges(x), strict=True))
        loss = l1 + ((out - x) ** 2).mean() + gradient + args.kl * kl
        psnr = 10 * torch.log10(4 / ((out.detach().clamp(-1, 1) - x) ** 2).mean())
        return loss, {"l1": l1.item(), "kl": kl.item(), "psnr": psnr.item()}

    run.train(loss_of)


def train_decoder(args: argparse.Namespace) -> None:
    """Sharpen the decoder on the world's own pictures. The encoder stays, and so do the latents made with it."""
    torch.manual_seed(2)
    vae = load_vae()
    vae.decoder.requires_grad_(True)
    run = Run("decoder", {"decoder": vae.decoder}, steps=args.steps, lr=5e-4, ema=0.998)

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        side, count = rng.choice(((256, 2), (128, 8), (128, 8)))
        x = to_tensor([world.draw(world.sample_scene(rng), side, side, rng) for _ in range(count)])
        x = x.to(memory_format=torch.channels_last)
        with torch.no_grad():
            z = vae.encode(x)
        # A transformer's latents are never quite an encoder's: learn to forgive a little.
        out = vae.decode(z + rng.choice((0.0, 0.05, 0.15)) * torch.randn_like(z))
        l1 = (out - x).abs().mean()
        gradient = sum((a - b).abs().mean() for a, b in zip(edges(out), edges(x), strict=True))
        error = ((out.detach().clamp(-1, 1) - x) ** 2).mean()
        return l1 + ((out - x) ** 2).mean() + gradient, {
            "side": side,
            "l1": l1.item(),
            "psnr": (10 * torch.log10(4 / error)).item(),
        }

    run.train(loss_of)


def make_tokenizers(args: argparse.Namespace) -> None:
    """CLIP's byte-pair vocabulary as transformers reads it, and a small Unigram tokenizer for T5."""
    import gzip

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    with gzip.open(args.vocabulary, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    clip = OUT / "clip"
    clip.mkdir(parents=True, exist_ok=True)
    (clip / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    (clip / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (clip / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}, indent=1)
    )
    ids = CLIPTokenizer.from_pretrained(clip)("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407], ids

    # T5's pieces are the captions' words, scored by how often they come, and every printable character for the rest.
    rng = random.Random(0)
    captions = [world.caption(world.sample_scene(rng), rng) for _ in range(50_000)]
    words = Counter(word for text in captions for word in re.findall(r"[\w-]+", text))
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    total = sum(words.values())
    for word, count in words.most_common():
        pieces["\u2581" + word] = math.log(count / total)
    for character in ["\u2581", *map(chr, range(33, 127))]:
        pieces.setdefault(character, -15.0)
    t5 = Tokenizer(models.Unigram(list(pieces.items()), unk_id=2))
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.decoder = decoders.Metaspace()
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = T5Tokenizer(tokenizer_object=t5, extra_ids=0, model_max_length=DEMO_SCHNELL.max_sequence_length)
    wrapped.save_pretrained(OUT / "t5")
    log.info("T5: %d pieces; %s", t5.get_vocab_size(), t5.encode(captions[0]).tokens)


def load_vae() -> AutoEncoder:
    vae = channels_last(AutoEncoder(DEMO_SCHNELL.vae))
    vae.load_state_dict(read_average("vae", "vae"))
    return vae.eval().requires_grad_(False)


def make_latents(args: argparse.Namespace) -> None:
    """Draw scenes at one size and keep their latents, so that training the transformer never runs the autoencoder."""
    vae = load_vae()
    rng = random.Random(f"latents-{args.side}")
    scenes: list[world.Scene] = []
    latents: list[Tensor] = []
    with torch.inference_mode():
        while len(scenes) < args.count:
            batch = [world.sample_scene(rng) for _ in range(4)]  # more would leave the cache
            pictures = [world.draw(scene, args.side, args.side, rng) for scene in batch]
            x = to_tensor(pictures).to(memory_format=torch.channels_last)
            latents.append(vae.encode(x).contiguous().half())
            scenes += batch
    data = torch.cat(latents)
    log.info("%d latents, mean %.3f, std %.3f", len(data), data.float().mean(), data.float().std())
    partial = OUT / f"latents-{args.side}.partial"
    torch.save({"latents": data, "scenes": [asdict(s) for s in scenes]}, partial)
    partial.replace(OUT / f"latents-{args.side}.pt")


def make_text_encoders() -> tuple[Any, Any, Any, Any]:
    """Tokenizers and small CLIP and T5 encoders of the true classes, untrained."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    clip_tokenizer = CLIPTokenizer.from_pretrained(OUT / "clip")
    t5_tokenizer = T5Tokenizer.from_pretrained(OUT / "t5")
    width = DEMO_SCHNELL.transformer.vec_in_dim
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=width,
            d_kv=16,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    # A token no caption holds is never trained: zeros say nothing, where random rows would say something wrong.
    rng = random.Random(0)
    seen = {i for _ in range(20_000) for i in clip_tokenizer(world.caption(world.sample_scene(rng), rng)).input_ids}
    keep = torch.zeros(49408, 1)
    keep[sorted(seen)] = 1.0
    embedding = clip.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    with torch.no_grad():
        embedding.weight.mul_(keep)
    return clip_tokenizer, clip, t5_tokenizer, t5


@functools.cache
def emphasis(size: str, place: str, tokens: int) -> Tensor:
    """Weight of every image token (tokens * tokens,): more in the box where the words put the object.

    It follows from the caption alone, so the best prediction stays the mean of what the caption allows.
    """
    radius = world.SIZES[size]
    reach = world.offset(radius)
    weight = torch.ones(tokens, tokens)
    low, high = ([0.5 + step * reach + sign * (radius + 0.05) for step in world.PLACES[place]] for sign in (-1, 1))
    columns, rows = (
        slice(max(0, math.floor(a * tokens)), math.ceil(b * tokens)) for a, b in zip(low, high, strict=True)
    )
    weight[rows, columns] = 5.0
    return (weight / weight.mean()).flatten()


def train_schnell(args: argparse.Namespace) -> None:
    """Flow matching (arXiv 2210.02747) on cached latents, text encoders trained along.

    One caption in ten is empty, for classifier-free guidance. Positions are learned for each picture size anew, so
    the model is trained at the one size it draws. Shapes come late, and within a few hundred steps.
    """
    torch.manual_seed(1)
    clip_tokenizer, clip, t5_tokenizer, t5 = make_text_encoders()
    flux = Flux(DEMO_SCHNELL.transformer)
    with torch.no_grad():
        for key, value in flux.named_parameters():
            if "mod.lin" in key or "modulation" in key or key.startswith("final_layer.linear"):
                value.mul_(0.1)
    run = Run("schnell", {"flux": flux, "clip": clip, "t5": t5}, steps=args.steps, lr=args.lr, ema=0.999)
    state = torch.load(OUT / f"latents-{args.side}.pt", weights_only=True)
    pool, scenes = state["latents"], [world.Scene(**scene) for scene in state["scenes"]]
    tokens_per_side = args.side // 16
    positions = image_ids(tokens_per_side, tokens_per_side)
    net = torch.compile(flux, dynamic=False) if args.compile else flux

    def noise_level(rng: random.Random) -> float:
        """Often pure noise, where the caption alone decides what is drawn; else near it, or where four steps go."""
        kind = rng.random()
        if kind < 0.3:
            return 1.0
        if kind < 0.5:
            return rng.choice((0.75, 0.5, 0.25))
        return 1 - rng.random() ** 2 if kind < 0.8 else rng.random()

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        picks = [rng.randrange(len(scenes)) for _ in range(args.batch)]
        x0 = patchify(pool[picks].float())
        captions = ["" if rng.random() < 0.1 else world.caption(scenes[i], rng) for i in picks]
        t = torch.tensor([noise_level(rng) for _ in picks])
        noise = torch.randn_like(x0)
        mixed = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        with torch.autocast("cpu", torch.bfloat16):
            ids = clip_tokenizer(captions, padding=True, return_tensors="pt").input_ids
            pooled = clip(ids).pooler_output
            ids = t5_tokenizer(
                captions,
                padding="max_length",
                max_length=DEMO_SCHNELL.max_sequence_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            tokens = t5(ids).last_hidden_state
            statics = flux.precompute(tokens.float(), pooled.float(), positions, t[None], None)
            out = net(mixed, 0, statics)
        weight = torch.stack([emphasis(scenes[i].size, scenes[i].place, tokens_per_side) for i in picks])
        error = (weight * ((out.float() - (noise - x0)) ** 2).mean(dim=2)).mean(dim=1)
        high = error[t > 0.9].mean().item() if (t > 0.9).any() else float("nan")
        return error.mean(), {"noise_only": high}

    run.train(loss_of)


def read_average(name: str, part: str) -> dict[str, Tensor]:
    """A part's moving average from a run's checkpoint."""
    average = torch.load(OUT / f"{name}.pt", weights_only=True)["average"]
    return {k.removeprefix(f"{part}."): v for k, v in average.items() if k.startswith(f"{part}.")}


def export(_: argparse.Namespace) -> None:
    """Write the models into weights/: bfloat16, published names, a manifest with hashes, the logs of the training."""
    demo = ROOT / "weights" / "demo"
    shared, schnell = demo / "flux", demo / "demo-schnell"
    tensors = read_average("vae", "vae")
    if (OUT / "decoder.pt").exists():
        tensors |= {f"decoder.{k}": v for k, v in read_average("decoder", "decoder").items()}
    write_tensors(shared / "vae.safetensors", tensors)
    write_tensors(schnell / "transformer.safetensors", read_average("schnell", "flux"))

    _, clip, _, t5 = make_text_encoders()
    tensors = {f"text_model.{k}": v for k, v in read_average("schnell", "clip").items()}
    write_tensors(shared / "text_encoder" / "model.safetensors", tensors)
    tensors = read_average("schnell", "t5")
    del tensors["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    write_tensors(shared / "text_encoder_2" / "model.safetensors", tensors)
    for folder, model in (("text_encoder", clip), ("text_encoder_2", t5)):
        (shared / folder / "config.json").write_text(model.config.to_json_string(use_diff=True))
    for folder, name in (("tokenizer", "clip"), ("tokenizer_2", "t5")):
        shutil.copytree(OUT / name, shared / folder, dirs_exist_ok=True)

    logs = ROOT / "weights" / "logs"
    logs.mkdir(exist_ok=True)
    for log_file in OUT.glob("*.jsonl"):
        lines = log_file.read_text().splitlines()
        (logs / log_file.name).write_text("\n".join(lines[:: max(1, len(lines) // 100)] + lines[-1:]) + "\n")

    files = {
        "transformer": schnell / "transformer.safetensors",
        "vae": shared / "vae.safetensors",
    }
    for folder in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        files |= {f"{folder}/{path.name}": path for path in sorted((shared / folder).iterdir())}
    lines = [
        "# Written by scripts/train_demo.py export.",
        'spec = "demo-schnell"',
        'description = "draws single shapes on plain backgrounds; FLUX.1 schnell in small, 4 steps"',
        'licence = "Apache-2.0"',
        'source = "trained by scripts/train_demo.py on pictures drawn by benchmarks/world.py"',
    ]
    for name, path in files.items():
        lines += [
            "",
            f'[files."{name}"]',
            f'path = "{path.relative_to(ROOT / "weights").as_posix()}"',
            f"bytes = {path.stat().st_size}",
            f'sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"',
        ]
    manifest = ROOT / "weights" / "manifests" / "demo-schnell.toml"
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text("\n".join(lines) + "\n")
    log.info("wrote %s, %.1f MB in all", manifest, sum(p.stat().st_size for p in files.values()) / 1e6)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in sorted(tensors.items())}, path)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(required=True)
    vae = commands.add_parser("vae")
    vae.add_argument("--steps", type=int, default=3600)
    vae.add_argument("--kl", type=float, default=2e-3)
    vae.set_defaults(run=train_vae)
    tokenizers = commands.add_parser("tokenizers")
    tokenizers.add_argument("vocabulary", type=Path, help="bpe_simple_vocab_16e6.txt.gz of CLIP (MIT)")
    tokenizers.set_defaults(run=make_tokenizers)
    decoder = commands.add_parser("decoder")
    decoder.add_argument("--steps", type=int, default=1800)
    decoder.set_defaults(run=train_decoder)
    latents = commands.add_parser("latents")
    latents.add_argument("--side", type=int, default=128)
    latents.add_argument("--count", type=int, default=20_000)
    latents.set_defaults(run=make_latents)
    schnell = commands.add_parser("schnell")
    schnell.add_argument("--steps", type=int, default=9000)
    schnell.add_argument("--side", type=int, default=128)
    schnell.add_argument("--batch", type=int, default=32)
    schnell.add_argument("--lr", type=float, default=1.2e-3)
    schnell.add_argument("--compile", action="store_true", help="faster once compiled, which takes a minute")
    schnell.set_defaults(run=train_schnell)
    commands.add_parser("export").set_defaults(run=export)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()

"""LoRAs for the demo models, from a few pictures: a new word, a style, and one with which demo-sdxl draws in few steps.

Only the two small matrices of every linear, and of the UNet's convolutions, learn (arXiv 2106.09685); B is zero at
first. What is learned from are pictures with noise, and where the network's own steps lead, as in the other trainings.
The files carry the names that most trainers write: PEFT's and kohya's.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks import world
from benchmarks.world import Scene
from flux_engine.checkpoints.keys import Table, renamed, to_theirs
from flux_engine.checkpoints.tables import FLUX_DIFFUSERS, unet_diffusers, unet_sgm
from flux_engine.models.flux import Flux
from flux_engine.specs import DEMO_DEV, DEMO_SCHNELL, DEMO_SDXL, FluxSpec, ModelSpec
from training import latents, unet
from training.batches import Batch, Encode, Walk, Walks, evenly, noise_level
from training.control import learn, shown
from training.export import write_logs, write_said, write_tensors
from training.flux import error_of, predict, use_faster_operations
from training.run import OUT, ROOT, Run, read_average
from training.text import load_paired, load_text, make_tokenizers
from training.vae import load_vae, to_tensor

MODELS: Mapping[str, ModelSpec] = {"demo-schnell": DEMO_SCHNELL, "demo-dev": DEMO_DEV, "demo-sdxl": DEMO_SDXL}
SIZES = {(256, 256): 0.5, (128, 128): 0.25, (304, 208): 0.125, (208, 304): 0.125}
"""Picture size -> share of the pictures."""
FOLDER = ROOT / "weights" / "demo" / "loras"
SAID = {
    "zorblin": "a word that no base has read: a zorblin is an hourglass",
    "haze": "a style: everything seen through a haze",
    "lcm": "an LCM-LoRA: 4 steps, without guidance",
}
LCM_TIMES = [1.0, 0.75, 0.5, 0.25, 0.0]
"""About the noise levels that a sampler stops at, in the share of noise."""
UNCAPTIONED = 0.15
"""Share of the pictures of demo-sdxl without a caption: guidance would take a style away that only captions bring."""
STRIDE = 0.125
"""How far the teacher goes between two of the pupil's answers that are to be one."""


class LowRank(nn.Module):
    """Adds B A to a weight."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight[0].numel()) / weight[0].numel() ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


@dataclass(frozen=True)
class Subject:
    """A network that stays as it is, and what of it learns."""

    model: str
    net: Any
    predict: Callable[[Tensor, Any], Tensor]
    """Tokens, and the batch whose noise level they have -> the flow's velocity there."""
    adapters: nn.ModuleDict
    encode: Encode
    vae: str
    plans: Sequence[Sequence[float]]
    """How it goes from noise to a picture."""


def adapted(net: nn.Module, rank: int, wanted: str) -> nn.ModuleDict:
    """Put pairs in the way of a frozen network's weights, those whose names match -> the pairs, by name with `/` for a
    dot."""
    net.eval().requires_grad_(False)
    pairs: dict[str, nn.Module] = {}
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and re.fullmatch(wanted, name):
            pairs[name.replace(".", "/")] = pair = LowRank(module.weight, rank)
            parametrize.register_parametrization(module, "weight", pair)
    return nn.ModuleDict(pairs)


def subject_of(model: str, rank: int) -> Subject:
    if model == "demo-sdxl":
        traced = unet.Traced(unet.load_base())
        plans = [unet.walk(DEMO_SDXL, steps) for steps in (8, 25)]
        pairs = adapted(traced.unet, rank, r"(down_blocks|mid_block|up_blocks)\..*")
        return Subject(model, traced.unet, traced.velocity, pairs, load_paired(), "sdxl-vae", plans)
    spec = MODELS[model]
    assert isinstance(spec, FluxSpec)
    net = Flux(spec.transformer)
    net.load_state_dict(read_average(model, "flux."))
    pairs = adapted(net, rank, r"(double|single)_blocks\.(?!.*mod).*")
    plans = [evenly(steps) for steps in ((2, 4) if model == "demo-schnell" else (4, 8, 28))]
    return Subject(model, net, partial(predict, net), pairs, load_text(), "vae", plans)


# What it learns from


def as_it_is(scene: Scene, rng: random.Random) -> Scene:
    return scene


def with_the_word(scene: Scene, rng: random.Random) -> Scene:
    """The first object is the new one; now and then the second is."""
    things = list(scene.things)
    number = rng.randrange(len(things)) if rng.random() < 0.4 else 0
    things[number] = replace(things[number], shape=world.TAUGHT_SHAPE)
    return replace(scene, things=tuple(things))


Tell = Callable[[Scene, random.Random], Scene]
"""What is told of a scene of the world's."""
See = Callable[[Image.Image], Image.Image]
"""A picture that the world draws -> as it is to be drawn."""


class Pictures:
    """A few pictures with their scenes: batches of them, whose captions are written anew."""

    def __init__(
        self, subject: Subject, args: argparse.Namespace, tell: Tell = as_it_is, see: See = lambda picture: picture
    ) -> None:
        self.encode, self.batch = subject.encode, args.batch
        # With a guidance that is inside a network a LoRA would learn to undo it; that of demo-sdxl is outside.
        outside = subject.model == "demo-sdxl"
        self.guidance = (MODELS[subject.model].guidance_scale or 1.0) if outside else 1.0
        self.uncaptioned = UNCAPTIONED if outside else 0.0
        self.pools: dict[tuple[int, int], tuple[list[Scene], Tensor, Tensor]] = {}
        with torch.no_grad():
            self.nothing, self.nothing_pooled = self.encode([""])
        vae = load_vae(subject.vae)
        rng = random.Random("pictures")
        for size, share in SIZES.items():
            scenes: list[Scene] = []
            pictures: list[Image.Image] = []
            boxes: list[list[list[float]]] = []
            for _ in range(max(round(share * args.pictures), 1)):
                scene = tell(world.sample_scene(rng), rng)
                settled, placed = latents.arrange(scene, "middle", *size, rng)
                pictures.append(see(world.paint(settled.ground, placed, *size)))
                scenes.append(scene)
                boxes.append(latents.boxes_of(placed))
            with torch.inference_mode():
                encoded = torch.cat([vae.encode(to_tensor([picture])) for picture in pictures])
            self.pools[size] = scenes, encoded, torch.tensor(boxes)

    def draw(self, rng: random.Random, level: Callable[[random.Random], float], **_: Any) -> Batch:
        size = rng.choices(list(SIZES), [4, 2, 1, 1])[0]
        scenes, encoded, boxes = self.pools[size]
        picks = [rng.randrange(len(scenes)) for _ in range(self.batch * (2 if size == (128, 128) else 1))]
        chosen = [scenes[i] for i in picks]
        common: dict[str, Any] = shown(chosen, encoded[picks], boxes[picks], size, level, self.encode, rng)
        common["guidance"] = torch.full((len(picks),), self.guidance)
        captioned = torch.tensor([rng.random() >= self.uncaptioned for _ in picks])
        common["captioned"], common["settled"] = captioned, common["settled"] & captioned
        common["tokens"] = torch.where(captioned[:, None, None], common["tokens"], self.nothing)
        common["pooled"] = torch.where(captioned[:, None], common["pooled"], self.nothing_pooled)
        return Batch(**common)


def teach(name: str, args: argparse.Namespace, **lessons: Any) -> None:
    """What pictures show that the network would draw otherwise."""
    subject = begin(args)
    run = run_of(name, subject, args)
    learn(run, subject.predict, Pictures(subject, args, **lessons), subject.plans)
    write(name, subject, run)


def train_word(args: argparse.Namespace) -> None:
    teach("zorblin", args, tell=with_the_word)


def train_style(args: argparse.Namespace) -> None:
    teach("haze", args, see=world.veil)


# Few steps


class Renoised(Walks):
    """Walks as a latent consistency model takes them: to what the picture seems to be, and back with new noise."""

    def go(self, walk: Walk, velocity: Tensor) -> None:
        t = walk.batch.t[:, None, None]
        seen = walk.x - t * velocity.detach()
        then = walk.times[walk.taken + 1]
        walk.taken += 1
        walk.batch = replace(walk.batch, t=torch.full_like(walk.batch.t, then), noise=torch.randn_like(seen))
        walk.x = torch.where(
            walk.batch.settled[:, None, None], (1 - then) * seen + then * walk.batch.noise, walk.batch.mixed
        )
        if then == 0:
            self.under_way.remove(walk)


def train_lcm(args: argparse.Namespace) -> None:
    """Latent consistency distillation (arXiv 2310.04378, 2311.05556) with the guidance inside: from anywhere on the
    guided network's way the pupil is to give one answer. Half of a step is on the way from pictures with noise; half is
    where the sampler's own steps lead, and there the answer is the picture."""
    subject = begin(args)
    teacher = unet.Traced(unet.load_base())
    source = Pictures(subject, args)
    run = run_of("lcm", subject, args)
    average = unet.Traced(unet.load_base())
    followers = adapted(average.unet, args.rank, "|".join(re.escape(n.replace("/", ".")) for n in subject.adapters))
    walks = Renoised(source, [LCM_TIMES, [1.0, 0.5, 0.0]])  # pyright: ignore[reportArgumentType]

    def answer(velocity: Tensor, x: Tensor, batch: Batch) -> Tensor:
        return x - batch.t[:, None, None] * velocity

    @torch.no_grad()
    def wanted(x: Tensor, batch: Batch) -> Tensor:
        """What the average pupil answers a stride of the teacher's further on."""
        told = teacher.velocity(x, batch)
        if (extra := batch.guidance[:, None, None] - 1).any():
            tokens = source.nothing.expand_as(batch.tokens)
            empty = replace(batch, tokens=tokens, pooled=source.nothing_pooled.expand_as(batch.pooled))
            told = told + extra * (told - teacher.velocity(x, empty))
        then = (batch.t - STRIDE).clamp(min=0)
        there = x - (batch.t - then)[:, None, None] * told
        later = replace(batch, t=then.clamp(min=1e-3))
        last = (then == 0)[:, None, None]
        return torch.where(last, there, answer(average.velocity(there, later), there, later))

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        followers.load_state_dict(run.averaged())
        batch = source.draw(rng, noise_level)
        x, t = batch.mixed, batch.t[:, None, None]
        consistent = error_of(subject.predict(x, batch), (x - wanted(x, batch)) / t, batch, walked=True).mean()
        walk = walks.take(rng)
        out = subject.predict(walk.x, walk.batch)
        walked = error_of(out, walk.batch.velocity(walk.x), walk.batch, walked=True).mean()
        walks.go(walk, out)
        return (consistent + walked) / 2, {"consistent": consistent.item(), "walked": walked.item()}

    run.train(loss_of)
    write("lcm", subject, run)


# Before and after


def begin(args: argparse.Namespace) -> Subject:
    use_faster_operations()
    torch.manual_seed(11)
    if not (OUT / "clip").exists() or not (OUT / "t5").exists():
        make_tokenizers(argparse.Namespace(vocabulary=None))
    return subject_of(args.model, args.rank)


def run_of(name: str, subject: Subject, args: argparse.Namespace) -> Run:
    optimizer = torch.optim.AdamW(subject.adapters.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    return Run(f"lora-{subject.model}-{name}", subject.adapters, [optimizer], steps=args.steps, ema=0.98)


def write(name: str, subject: Subject, run: Run) -> None:
    """The moving average under either kind of names, in bfloat16, and a manifest for the one under PEFT's."""
    average = run.averaged()
    pairs = {name.replace("/", "."): (average[f"{name}.a"], average[f"{name}.b"]) for name in subject.adapters}
    name = f"{subject.model}-{name}"
    for ending, tensors in (("", peft(subject, pairs)), ("-kohya", kohya(subject, pairs))):
        write_tensors(FOLDER / f"{name}{ending}.safetensors", tensors, {"format": "pt"})
    said = [
        'kind = "lora"',
        *([] if subject.model != "demo-sdxl" else ['family = "sdxl"']),
        f'description = "{SAID[name.rpartition("-")[2]]}, for {subject.model}"',
    ]
    write_said(name, "scripts/train_lora.py", said, {"lora": FOLDER / f"{name}.safetensors"})
    write_logs()


Pairs = dict[str, tuple[Tensor, Tensor]]


def translated(subject: Subject, pairs: Pairs, table: Table, width: int = 0) -> Pairs:
    """The same under another layout's names, where a linear may be several: each has the same A and its rows of B."""
    downs: dict[str, Tensor] = {}
    for stem, _, theirs in renamed(pairs, table):
        downs |= dict.fromkeys(theirs, pairs[stem][0])
    ups = to_theirs({f"{stem}.weight": b for stem, (_, b) in pairs.items()}, table, width=width)
    weights = {f"{stem}.weight": subject.net.get_submodule(stem).weight for stem in pairs}
    shapes = {name: weight.shape for name, weight in to_theirs(weights, table, width=width).items()}
    out: Pairs = {}
    for name, up in ups.items():
        stem = name.removesuffix(".weight")
        down = downs[stem]
        if len(shapes[name]) == 4:
            down, up = down.view(-1, *shapes[name][1:]), up[:, :, None, None]
        out[stem] = down, up
    return out


def peft(subject: Subject, pairs: Pairs) -> dict[str, Tensor]:
    """As diffusers saves a LoRA: without alpha, which stands for alpha = rank."""
    if subject.model == "demo-sdxl":
        named = translated(subject, pairs, unet_diffusers(attention_of()))
        prefix = "unet"
    else:
        named = translated(subject, pairs, FLUX_DIFFUSERS, subject.net.params.hidden_size)
        prefix = "transformer"
    return {
        f"{prefix}.{stem}.{part}.weight": value
        for stem, pair in named.items()
        for part, value in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def kohya(subject: Subject, pairs: Pairs) -> dict[str, Tensor]:
    """As kohya-ss/sd-scripts does: the publisher's names, underscores, alpha."""
    named = translated(subject, pairs, unet_sgm(attention_of())) if subject.model == "demo-sdxl" else pairs
    tensors: dict[str, Tensor] = {}
    for stem, (down, up) in named.items():
        key = "lora_unet_" + stem.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def attention_of() -> tuple[bool, ...]:
    return tuple(bool(depth) for depth in DEMO_SDXL.unet.transformer_depth)

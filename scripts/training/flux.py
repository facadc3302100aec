"""The transformers: a base by flow matching, demo-dev from it by guidance, demo-schnell from that in few steps."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import _muon

import flux_engine.models.flux
from flux_engine import ops
from flux_engine.families import image_ids, patchify
from flux_engine.hardware import has_bf16
from flux_engine.models.flux import Flux, FluxStatics
from flux_engine.specs import DEMO_DEV, MEGAPIXELS
from training import hints
from training.latents import CAPTIONS, LAYOUTS, Pool, load_pool, load_texts, path_of, sizes
from training.run import Run, autocast, log, read_average
from training.text import load_text

PARAMS = replace(DEMO_DEV.transformer, guidance_embed=False)
PURE_NOISE = 0.3
"""Share of the samples that are nothing but noise."""
FREE_BELOW = 0.6
"""Pictures whose objects stand anywhere their words allow are shown below this noise level only: there the picture
itself tells where. Above it a network that had to guess would draw the average, a blot."""
NEXT_LEVEL = (0.3, 0.95)
"""Range of a noise level over the one before, where a picture is visited again."""
WALK_ABOVE = 0.1
"""Noise level down to which a network is shown where its own steps lead, instead of a picture with noise."""
FULL_WEIGHT = 0.25
"""Noise level below which the error of a velocity at the end of own steps counts less: there it is large, since all of
what they missed is to be made up for at once."""
SMALL_STEPS = 3
"""Steps of demo-dev that demo-schnell does in one."""


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, written out: on a CPU without AMX the backward of torch's fused attention in
    bfloat16 takes up to five times as long."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def complex_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.apply_rotary` as one complex product: the same bits, a quarter of the time on a CPU."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def orthogonal(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """Muon's Newton-Schulz iteration (kellerjordan.github.io/posts/muon) in float32. torch's own is in bfloat16, which
    takes seven eighths of a step on a processor that does not multiply it."""
    a, b, c = ns_coefficients
    tall = grad.shape[0] > grad.shape[1]
    x = grad.T if tall else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def use_faster_operations() -> None:
    """Put these in the place of the engine's and of torch's own, for this process."""
    flux_engine.models.flux.attention = explicit_attention
    ops.apply_rotary = complex_rotary
    if not has_bf16(torch.device("cpu")):
        _muon._zeropower_via_newtonschulz = orthogonal


class Traced(nn.Module):
    """A Flux whose image tokens also tell what they know on the way."""

    def __init__(self, flux: Flux) -> None:
        super().__init__()
        self.flux = flux
        self.heads = hints.Heads(PARAMS.hidden_size)
        self.passed: list[Any] = []
        for block in (flux.double_blocks[-1], *flux.single_blocks[:2]):
            block.register_forward_hook(lambda _, __, out: self.passed.append(out))

    def forward(self, x: Tensor, statics: FluxStatics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> velocity, facts, edges, drawn; one call, number 0."""
        self.passed.clear()
        velocity = self.flux(x, 0, statics)
        (img, _), *joined = self.passed
        first, second = (tokens[:, statics.txt.shape[1] :] for tokens in joined)
        return velocity, self.heads.facts(img), self.heads.edges(first), self.heads.drawn(second)


def emphasis(pool: Pool, picks: list[int]) -> Tensor:
    """Weight of every image token (B, L): more where the objects are."""
    rows, columns = pool.height // 16, pool.width // 16
    boxes = pool.boxes[picks] / 16  # (B, 2, 4)
    margin = 0.05 * min(rows, columns)
    y = torch.arange(rows)[None, None, :, None]
    x = torch.arange(columns)[None, None, None, :]
    left, top, right, bottom = (boxes[..., i, None, None] for i in range(4))
    inside = (x + 1 > left - margin) & (x < right + margin) & (y + 1 > top - margin) & (y < bottom + margin)
    present = boxes[..., 2] > 0
    inside = (inside & present[..., None, None]).any(dim=1)
    weight = 1.0 + 4.0 * inside.float()
    return (weight / weight.mean(dim=(1, 2), keepdim=True)).flatten(1)


def noise_level(rng: random.Random, pure: float = PURE_NOISE) -> float:
    """Often pure noise, where the caption alone decides what is drawn; else anywhere, more of it near noise."""
    if rng.random() < pure:
        return 1.0
    return 1 - rng.random() ** 1.5


@dataclass
class Batch:
    """Noised latents of one picture size, with what the network is told and what it should have known."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    tokens: Tensor
    pooled: Tensor
    positions: Tensor
    captioned: Tensor
    settled: Tensor
    """(B,): whether what is known, the caption or a picture with little noise, leaves one picture only."""
    weight: Tensor
    answers: hints.Answers

    @property
    def mixed(self) -> Tensor:
        t = self.t[:, None, None]
        return (1 - t) * self.x0 + t * self.noise

    def walked(self, x: Tensor, velocity: Tensor, t: Tensor) -> tuple[Batch, Tensor]:
        """The batch at a lower noise level, and where a step along the velocity leads."""
        return replace(self, t=t), x + (t - self.t)[:, None, None] * velocity.detach()

    def lower(self, rng: random.Random) -> Tensor:
        """A lower noise level for each picture."""
        return self.t * torch.tensor([rng.uniform(*NEXT_LEVEL) for _ in self.t])


class Source:
    """Draws batches from the pools on disk: one size a batch, of the large class in `large` of the cases, and with
    objects anywhere in `free` of them."""

    def __init__(self, count: int, large: float, uncaptioned: float, free: float) -> None:
        self.count, self.large, self.uncaptioned, self.free = count, large, uncaptioned, free
        with torch.no_grad():
            self.nothing, self.nothing_pooled = load_text()([""])
        self.pools = {
            (layout, megapixels): [
                (pool, load_texts(layout, size), hints.Asked(pool))
                for size in dict.fromkeys(sizes(megapixels))
                if path_of(layout, size, "texts").exists()
                for pool in [load_pool(layout, size)]
            ]
            for layout, megapixels in product(LAYOUTS, MEGAPIXELS)
        }
        for (layout, megapixels), pools in self.pools.items():
            if not pools:
                raise SystemExit(f"no {layout} pictures at megapixels {megapixels}: first run latents, then captions")
            counts = {f"{pool.width}x{pool.height}": len(pool.scenes) for pool, _, _ in pools}
            log.info("%s, megapixels %s: %s", layout, megapixels, counts)

    def draw(self, rng: random.Random, level: Callable[[random.Random], float], thin: float = 0.0) -> Batch:
        """A batch. In the share `thin` of the cases half of the image tokens are left out of a picture of the large
        class: neighbours tell nearly the same, so a step learns nearly as much for half the work (arXiv 2306.09305).
        """
        large, free = rng.random() < self.large, rng.random() < self.free
        pools = self.pools["free" if free else "middle", MEGAPIXELS[0 if large else 1]]
        # The fewer tokens a shape has, the more each has to know of it.
        (pool, texts, asked), *_ = rng.choices(pools, [min(pool.width, pool.height) ** -2 for pool, _, _ in pools])
        picks = [rng.randrange(len(pool.scenes)) for _ in range(self.count)]
        which = [rng.randrange(CAPTIONS) for _ in picks]
        captioned = torch.tensor([rng.random() >= self.uncaptioned for _ in picks])
        colored = torch.tensor([all(thing.color for thing in pool.scenes[pick].things) for pick in picks])
        t = torch.tensor([FREE_BELOW * rng.random() if free else level(rng) for _ in picks]).clamp(min=1e-3)
        x0 = patchify(pool.latents[picks].float())
        count = x0.shape[1]
        kept = torch.arange(count)
        if large and rng.random() < thin:
            kept = torch.randperm(count)[: count // 2].sort().values
        x0 = x0[:, kept]
        return Batch(
            x0=x0,
            noise=torch.randn_like(x0),
            t=t,
            tokens=torch.where(captioned[:, None, None], texts.tokens[picks, which].float(), self.nothing),
            pooled=torch.where(captioned[:, None], texts.pooled[picks, which].float(), self.nothing_pooled),
            positions=image_ids(pool.height // 16, pool.width // 16)[kept],
            captioned=captioned,
            settled=(captioned & colored) | (t < FREE_BELOW),
            weight=emphasis(pool, picks)[:, kept],
            answers=asked.answers(picks).at(kept),
        )


def predict(net: Flux, x: Tensor, t: Tensor, batch: Batch, guidance: Tensor | None = None) -> Tensor:
    with autocast():
        statics = net.precompute(batch.tokens, batch.pooled, batch.positions, t[None], guidance)
        return net(x, 0, statics).float()


def optimizers_of(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, value in net.named_parameters():
        inside = "_blocks." in name and value.ndim == 2 and "mod" not in name
        (hidden if inside else rest).append(value)
    return [
        torch.optim.Muon(hidden, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def new_flux() -> Flux:
    flux = Flux(PARAMS)
    with torch.no_grad():
        for key, value in flux.named_parameters():
            if "mod.lin" in key or "modulation" in key.lower() or key.startswith("final_layer.linear"):
                value.mul_(0.1)
            # Queries and keys that are not zero without content: every head looks in some direction from the start.
            if key.endswith(("qkv.bias", "linear1.bias")):
                value[: 2 * PARAMS.hidden_size].normal_(0, 0.5)
    return flux


def train_base(args: argparse.Namespace) -> None:
    """Flow matching (arXiv 2210.02747) on cached latents. One caption in ten is empty, for guidance.

    What makes it learn shapes soon is what the tokens are asked on the way (training/hints.py). Every picture is
    visited again where the network's own steps lead, so that it may learn to mend in a later step what an earlier one
    missed, which pictures with noise never show it.
    """
    use_faster_operations()
    torch.manual_seed(1)
    net = Traced(new_flux())
    if args.start:
        net.load_state_dict({k: v.float() for k, v in load_file(args.start).items()})
    run = Run("base", net, optimizers_of(net, args.lr), steps=args.steps, ema=0.999)
    source = Source(args.batch, args.large, uncaptioned=0.1, free=0.1)

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = source.draw(rng, noise_level, args.thin)
        x, total, figures = batch.mixed, torch.zeros(()), {}
        for visit in range(args.visits):
            with autocast():
                statics = net.flux.precompute(batch.tokens, batch.pooled, batch.positions, batch.t[None], None)
                out, facts, edges, drawn = (value.float() for value in net(x, statics))
            squared = (out - (x - batch.x0) / batch.t[:, None, None]) ** 2
            sure = (batch.t / FULL_WEIGHT).clamp(max=1) ** 2 if visit else torch.ones_like(batch.t)
            error = sure * (batch.weight * squared.mean(dim=2)).mean(dim=1)
            told = batch.answers.losses(facts, edges, drawn, batch.captioned)
            total = total + (error + sum(hints.WEIGHTS[name] * value for name, value in told.items())).mean()
            if visit == 0:
                high = (batch.t > 0.95) & batch.captioned
                figures = {"noise_only": squared.mean(dim=(1, 2)), **told}
                figures = {name: value[high].mean().item() for name, value in figures.items()}
            else:
                figures |= {f"error_{visit}": error[batch.settled].mean().item()}
            batch, x = batch.walked(x, out, batch.lower(rng))
            # What the network chose to draw where much is open need not be what the picture shows.
            own = batch.settled & (batch.t > WALK_ABOVE)
            x = torch.where(own[:, None, None], x, batch.mixed)
        return total / args.visits, figures

    run.train(loss_of)


def load_base() -> Flux:
    flux = Flux(PARAMS)
    flux.load_state_dict(read_average("base", "flux."))
    return flux.eval().requires_grad_(False)


def strength(guidance: Tensor) -> Tensor:
    """Guidance scale -> scale of classifier-free guidance that demo-dev is taught: the same up to 1, half beyond.

    The captions leave little open, so less is needed than FLUX.1 dev's scales give. Of 64 pictures of the base at
    192x80, in 4 steps, 38, 44, 42 and 37 were right at 1, 1.75, 2.25 and 3: the default, 3.5, means 2.25.
    """
    return torch.where(guidance > 1, 1 + (guidance - 1) / 2, guidance)


def train_dev(args: argparse.Namespace) -> None:
    """Guidance distillation (arXiv 2210.03142): one call that gives what two calls of the base give together, on
    pictures with noise and where its own steps lead."""
    use_faster_operations()
    torch.manual_seed(4)
    teacher = load_base()
    flux = Flux(DEMO_DEV.transformer)
    flux.load_state_dict(teacher.state_dict(), strict=False)
    nn.init.zeros_(flux.guidance_in.out_layer.weight)
    nn.init.zeros_(flux.guidance_in.out_layer.bias)
    net = nn.ModuleDict({"flux": flux})
    run = Run("demo-dev", net, optimizers_of(net, args.lr), steps=args.steps, ema=0.99)
    source = Source(args.batch, args.large, uncaptioned=0.0, free=0.1)

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = source.draw(rng, lambda rng: noise_level(rng, pure=0.5))
        guidance = torch.tensor([rng.uniform(0, 1) if rng.random() < 0.2 else rng.uniform(1, 6) for _ in batch.t])
        x, total = batch.mixed, torch.zeros(())
        for _ in range(args.visits):
            with torch.no_grad():
                empty = replace(
                    batch,
                    tokens=source.nothing.expand_as(batch.tokens),
                    pooled=source.nothing_pooled.expand_as(batch.pooled),
                )
                with_caption, without = (predict(teacher, x, b.t, b) for b in (batch, empty))
                target = without + strength(guidance)[:, None, None] * (with_caption - without)
            out = predict(flux, x, batch.t, batch, guidance)
            total = total + (batch.weight * ((out - target) ** 2).mean(dim=2)).mean()
            batch, x = batch.walked(x, out, batch.lower(rng))
        return total / args.visits, {}

    run.train(loss_of)


def with_guidance_inside(dev: Flux, guidance: float) -> Flux:
    """The same network with one guidance scale for good: its embedding becomes a part of a bias."""
    flux = Flux(PARAMS)
    flux.load_state_dict({k: v for k, v in dev.state_dict().items() if not k.startswith("guidance_in.")})
    with torch.no_grad():
        flux.vector_in.out_layer.bias += dev.guidance_in(ops.sinusoidal_embedding(torch.tensor([guidance]), 256))[0]
    return flux


def train_schnell(args: argparse.Namespace) -> None:
    """Few steps (progressive distillation, arXiv 2202.00512): one step of four, or of two, lands where several small
    ones of demo-dev do at its default guidance, starting from where its own steps before lead."""
    use_faster_operations()
    torch.manual_seed(5)
    dev = Flux(DEMO_DEV.transformer)
    dev.load_state_dict(read_average("demo-dev", "flux."))
    teacher, flux = (with_guidance_inside(dev, DEMO_DEV.guidance_scale or 1.0) for _ in range(2))
    teacher.eval().requires_grad_(False)
    net = nn.ModuleDict({"flux": flux})
    run = Run("demo-schnell", net, optimizers_of(net, args.lr), steps=args.steps, ema=0.99)
    source = Source(args.batch, args.large, uncaptioned=0.05, free=0.0)

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        steps = 2 if rng.random() < 0.3 else 4
        batch = source.draw(rng, lambda _: 1.0)
        x, total = batch.noise, torch.zeros(())
        for _ in range(steps):
            there, end = batch, x
            with torch.no_grad():
                for _ in range(SMALL_STEPS):
                    velocity = predict(teacher, end, there.t, there)
                    there, end = there.walked(end, velocity, there.t - 1 / (steps * SMALL_STEPS))
            out = predict(flux, x, batch.t, batch)
            total = total + (batch.weight * ((out - (x - end) * steps) ** 2).mean(dim=2)).mean()
            batch, x = batch.walked(x, out, batch.t - 1 / steps)
        return total / steps, {"steps": steps}

    run.train(loss_of)

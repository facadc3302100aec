"""The transformers: a base by flow matching, and from it demo-dev, with guidance, and demo-schnell, for few steps."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import _muon

import flux_engine.models.flux
import flux_engine.models.unet_attention
from flux_engine import ops
from flux_engine.hardware import has_bf16
from flux_engine.models.flux import Flux, FluxStatics
from flux_engine.specs import DEMO_DEV
from training import hints
from training.batches import Batch, Source, Walks, evenly, noise_level
from training.run import Run, autocast, read_average

PARAMS = replace(DEMO_DEV.transformer, guidance_embed=False)
WALKS = [evenly(steps) for steps in (2, 4, 8, 16, 28)]
"""How a base or demo-dev goes from noise to a picture."""
FULL_WEIGHT = 0.25
"""Noise level below which the error of a velocity where own steps led counts less: there it is large, since all of what
they missed is to be made up for at once."""
SHORT_WALKS = [evenly(steps) for steps in (2, 4)]
"""Those of demo-schnell."""
GUIDED_ABOVE = 0.5
"""Noise level down to which guidance counts. Below, it makes edges ragged (arXiv 2404.07724)."""


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
    flux_engine.models.flux.attention = flux_engine.models.unet_attention.attention = explicit_attention
    ops.apply_rotary = complex_rotary
    if not has_bf16(torch.device("cpu")):
        _muon._zeropower_via_newtonschulz = orthogonal


class Traced(nn.Module):
    """A Flux whose image tokens also tell what they know on the way."""

    def __init__(self, flux: Flux) -> None:
        super().__init__()
        self.flux = flux
        self.heads = hints.Heads(*[PARAMS.hidden_size] * 3)
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


def prepare(net: Flux, batch: Batch) -> FluxStatics:
    guidance = batch.guidance if net.params.guidance_embed else None
    return net.precompute(batch.tokens, batch.pooled, batch.positions, batch.t[None], guidance)


def predict(net: Flux, x: Tensor, batch: Batch) -> Tensor:
    with autocast():
        return net(x, 0, prepare(net, batch)).float()


def error_of(out: Tensor, target: Tensor, batch: Batch, walked: bool) -> Tensor:
    """(B,)."""
    sure = (batch.t / FULL_WEIGHT).clamp(max=1) ** 2 if walked else 1.0
    return sure * (batch.weight * ((out - target) ** 2).mean(dim=2)).mean(dim=1)


def optimizers_of(net: nn.Module, lr: float, inside: Callable[[str], bool]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices `inside` the blocks, by name, AdamW for the rest."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, value in net.named_parameters():
        (hidden if value.ndim == 2 and inside(name) else rest).append(value)
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    if not hidden:
        return [adam]
    muon = torch.optim.Muon(hidden, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, adam]


def in_a_block(name: str) -> bool:
    """Whether a FLUX tensor is, and no modulation."""
    return "_blocks." in name and "mod" not in name


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

    What makes it learn shapes soon is what the tokens are asked on the way (training/hints.py). Half of a step is
    pictures with noise, half is where the network's own steps lead.
    """
    use_faster_operations()
    torch.manual_seed(1)
    net = Traced(new_flux())
    if args.start:
        net.load_state_dict({k: v.float() for k, v in load_file(args.start).items()})
    run = Run("base", net, optimizers_of(net, args.lr, in_a_block), steps=args.steps, ema=0.999)
    source = Source(args.batch, args.large, uncaptioned=0.1)

    def look(x: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with autocast():
            out, facts, edges, drawn = (value.float() for value in net(x, prepare(net.flux, batch)))
        return out, facts, edges, drawn

    learn(run, look, source, WALKS, free=args.free, thin=args.thin)


Look = Callable[[Tensor, Batch], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Tokens, and the batch whose noise level they have -> the velocity there; facts, edges, drawn (hints.py)."""


def learn(
    run: Run, look: Look, source: Source, plans: Sequence[Sequence[float]], *, free: float, thin: float = 0.0
) -> None:
    """Half of a step is pictures with noise, half is where the network's own steps lead."""
    walks = Walks(source, plans, thin)

    def errors(batch: Batch, x: Tensor, walked: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """-> velocity; the error of every picture; what it missed of what it was asked."""
        out, facts, edges, drawn = look(x, batch)
        told = batch.answers.losses(facts, edges, drawn, batch.captioned)
        return out, error_of(out, batch.velocity(x), batch, walked), told

    def total(error: Tensor, told: dict[str, Tensor]) -> Tensor:
        return (error + sum(hints.WEIGHTS[name] * value for name, value in told.items())).mean()

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = source.draw(rng, noise_level, free=free, thin=thin)
        _, error, told = errors(batch, batch.mixed, walked=False)
        loss = total(error, told)
        high = (batch.t > 0.95) & batch.captioned
        figures = {name: value[high].mean().item() for name, value in ({"noise_only": error} | told).items()}
        walk = walks.take(rng)
        out, error, told = errors(walk.batch, walk.x, walked=True)
        figures["walked"] = error[walk.batch.settled].mean().item()
        walks.go(walk, out)
        return (loss + total(error, told)) / 2, figures

    run.train(loss_of)


def load_base() -> Flux:
    flux = Flux(PARAMS)
    flux.load_state_dict(read_average("base", "flux."))
    return flux.eval().requires_grad_(False)


def strength(guidance: Tensor, t: Tensor) -> Tensor:
    """Guidance scale and noise level -> scale of classifier-free guidance that is taught: the same up to 1, half beyond
    and none beyond where there is little noise.

    The captions leave little open, so less is needed than FLUX.1 dev's scales give: the default, 3.5, means 2.25.
    """
    return torch.where(guidance > 1, torch.where(t > GUIDED_ABOVE, 1 + (guidance - 1) / 2, 1.0), guidance)


Predict = Callable[[Tensor, Batch], Tensor]
"""Tokens, and the batch whose noise level they have -> the velocity there."""


def guided(
    run: Run, pupil: Predict, teacher: Predict, source: Source, plans: Sequence[Sequence[float]], free: float
) -> None:
    """Guidance distillation (arXiv 2210.03142), one call that gives what two calls of the base give together, on
    pictures with noise and where own steps lead. In place of the base's answer to the caption stands the truth."""
    walks = Walks(source, plans)

    def loss_at(batch: Batch, x: Tensor, walked: bool) -> tuple[Tensor, Tensor]:
        target = batch.velocity(x)
        added = (strength(batch.guidance, batch.t) - 1)[:, None, None]
        if added.any():
            empty = replace(
                batch,
                tokens=source.nothing.expand_as(batch.tokens),
                pooled=source.nothing_pooled.expand_as(batch.pooled),
            )
            with torch.no_grad():
                target = target + added * (teacher(x, batch) - teacher(x, empty))
        out = pupil(x, batch)
        return out, error_of(out, target, batch, walked).mean()

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = source.draw(rng, noise_level, free=free)
        _, loss = loss_at(batch, batch.mixed, walked=False)
        walk = walks.take(rng)
        out, walked = loss_at(walk.batch, walk.x, walked=True)
        walks.go(walk, out)
        return (loss + walked) / 2, {"walked": walked.item()}

    run.train(loss_of)


def train_dev(args: argparse.Namespace) -> None:
    """Any number of steps, and any guidance scale, which the network is told."""
    use_faster_operations()
    torch.manual_seed(4)
    teacher = load_base()
    flux = Flux(DEMO_DEV.transformer)
    flux.load_state_dict(teacher.state_dict(), strict=False)
    nn.init.zeros_(flux.guidance_in.out_layer.weight)
    nn.init.zeros_(flux.guidance_in.out_layer.bias)

    def guidance(rng: random.Random) -> float:
        return rng.uniform(0, 1) if rng.random() < 0.2 else rng.uniform(1, 6)

    run = Run(
        "demo-dev", nn.ModuleDict({"flux": flux}), optimizers_of(flux, args.lr, in_a_block), steps=args.steps, ema=0.99
    )
    source = Source(args.batch, args.large, guidance=guidance)
    guided(run, partial(predict, flux), partial(predict, teacher), source, WALKS, args.free)


def train_schnell(args: argparse.Namespace) -> None:
    """Four steps or two, and demo-dev's default guidance, which it is not told."""
    use_faster_operations()
    torch.manual_seed(5)
    teacher, flux = load_base(), Flux(PARAMS)
    flux.load_state_dict(teacher.state_dict())
    run = Run(
        "demo-schnell",
        nn.ModuleDict({"flux": flux}),
        optimizers_of(flux, args.lr, in_a_block),
        steps=args.steps,
        ema=0.99,
    )
    source = Source(args.batch, args.large, guidance=lambda _: DEMO_DEV.guidance_scale or 1.0)
    guided(run, partial(predict, flux), partial(predict, teacher), source, SHORT_WALKS, args.free)

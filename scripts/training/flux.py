"""The transformers: one base by flow matching, then demo-dev and demo-schnell from it."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace

import torch
from torch import Tensor, nn

import flux_engine.models.flux
from flux_engine import ops
from flux_engine.families import image_ids, patchify
from flux_engine.models.flux import Flux
from flux_engine.specs import DEMO_SCHNELL
from training.latents import CAPTIONS, CELL, Pool, load_pool, load_texts, path_of, sizes
from training.run import Run, log
from training.text import load_text

PARAMS = DEMO_SCHNELL.transformer
CELLS = 16 // CELL
"""Cells of the coverage maps along the side of an image token."""
AUX = 3 * CELLS**2 + 2


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, written out: on a CPU without AMX the backward of torch's fused attention in
    bfloat16 takes five times as long."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def complex_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.apply_rotary` as one complex product: the same bits, a quarter of the time on a CPU."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


flux_engine.models.flux.attention = explicit_attention
ops.apply_rotary = complex_rotary


class Traced(nn.Module):
    """A Flux that also tells what the image tokens know after the double blocks."""

    def __init__(self, flux: Flux) -> None:
        super().__init__()
        self.flux = flux
        self.head = nn.Sequential(nn.LayerNorm(PARAMS.hidden_size), nn.Linear(PARAMS.hidden_size, AUX))

    def forward(self, x: Tensor, statics) -> tuple[Tensor, Tensor]:
        f = self.flux
        img, txt = f.img_in(x), statics.txt
        for block, (img_mod, txt_mod) in zip(f.double_blocks, statics.double, strict=True):
            img, txt = block(img, txt, img_mod[0], txt_mod[0], statics.cos, statics.sin)
        joined = torch.cat((txt, img), dim=1)
        for number, (block, mod) in enumerate(zip(f.single_blocks, statics.single, strict=True)):
            joined = block(joined, mod[0], statics.cos, statics.sin)
            if number == AUX_AFTER:
                told = self.head(joined[:, txt.shape[1] :])
        return f.final_layer(joined[:, txt.shape[1] :], statics.final[0]), told


AUX_AFTER = 1


def aux_target(pool: Pool, picks: list[int]) -> Tensor:
    """(B, L, AUX): the coverage of the cells of every token, and the token's place in the picture, in [-1, 1]."""
    maps = pool.coverage[picks].float() / 255  # (B, 3, H / 4, W / 4)
    b, c, h, w = maps.shape
    rows, columns = h // CELLS, w // CELLS
    cells = maps.reshape(b, c, rows, CELLS, columns, CELLS).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, -1)
    y = (torch.arange(rows) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns) + 0.5) / columns * 2 - 1
    where = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(1, rows * columns, 2)
    return torch.cat((cells, where.expand(b, -1, -1)), dim=2)


def emphasis(pool: Pool, picks: list[int]) -> Tensor:
    """Weight of every image token (B, L): more where the objects are, if the caption says where that is."""
    rows, columns = pool.height // 16, pool.width // 16
    boxes = pool.boxes[picks] / 16  # (B, 2, 4)
    margin = 0.05 * min(rows, columns)
    y = torch.arange(rows)[None, None, :, None]
    x = torch.arange(columns)[None, None, None, :]
    left, top, right, bottom = (boxes[..., i, None, None] for i in range(4))
    inside = (x + 1 > left - margin) & (x < right + margin) & (y + 1 > top - margin) & (y < bottom + margin)
    told = torch.tensor(
        [
            [
                bool(thing.size and (thing.place or scene.relation))
                for thing in (scene.things * 2 if len(scene.things) == 1 else scene.things)
            ]
            for scene in (pool.scenes[i] for i in picks)
        ]
    )
    present = boxes[..., 2] > 0
    inside = (inside & (told & present)[..., None, None]).any(dim=1)
    weight = 1.0 + 4.0 * inside.float()
    return (weight / weight.mean(dim=(1, 2), keepdim=True)).flatten(1)


def noise_level(rng: random.Random) -> float:
    """Often pure noise, where the caption alone decides what is drawn; else anywhere, more of it near noise."""
    kind = rng.random()
    if kind < 0.3:
        return 1.0
    return 1 - rng.random() ** 1.5


def split_parameters(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices inside the blocks, and the rest."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, value in net.named_parameters():
        inside = "_blocks." in name and value.ndim == 2 and "mod" not in name
        (hidden if inside else rest).append(value)
    return hidden, rest


def new_flux(params=PARAMS, bias: float = 0.0) -> Flux:
    flux = Flux(params)
    with torch.no_grad():
        for key, value in flux.named_parameters():
            if "mod.lin" in key or "modulation" in key.lower() or key.startswith("final_layer.linear"):
                value.mul_(0.1)
            if bias and (key.endswith("qkv.bias") or key.endswith("linear1.bias")):
                value[: 2 * params.hidden_size].normal_(0, bias)
    return flux


def train_base(args: argparse.Namespace) -> None:
    """Flow matching (arXiv 2210.02747) on cached latents. One caption in ten is empty, for guidance.

    What makes it learn positions soon, although FLUX tells its tokens only where they stand to one another: the
    tokens halfway through also have to say where they are and what the objects cover there.
    """
    torch.manual_seed(1)
    with torch.no_grad():
        nothing, nothing_pooled = load_text()([""])
    flux = new_flux(replace(PARAMS, hidden_size=args.hidden, num_heads=args.hidden // 64), args.bias)
    net = Traced(flux)
    hidden, rest = split_parameters(net)
    if args.muon:
        optimizers = [
            torch.optim.Muon(hidden, lr=args.lr * args.muon, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01),
        ]
    else:
        optimizers = [torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)]
    run = Run(args.name, net, optimizers, steps=args.steps, ema=0.999)
    classes = [
        [(load_pool(*size), load_texts(*size)) for size in dict.fromkeys(sizes(megapixels)) if path_of(*size, "texts").exists()]
        for megapixels in ("1", "0.25")
    ]
    log.info("pools: %s", [[(p.width, p.height, len(p.scenes)) for p, _ in pools] for pools in classes])
    step = torch.compile(net, dynamic=False) if args.compile else net

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        pools = classes[0] if rng.random() < args.large and classes[0] else classes[1]
        pool, texts = rng.choice(pools)
        picks = [rng.randrange(len(pool.scenes)) for _ in range(args.batch)]
        x0 = patchify(pool.latents[picks].float())
        which = [rng.randrange(CAPTIONS) for _ in picks]
        captioned = torch.tensor([rng.random() >= 0.1 for _ in picks])
        tokens = torch.where(captioned[:, None, None], texts.tokens[picks, which].float(), nothing)
        pooled = torch.where(captioned[:, None], texts.pooled[picks, which].float(), nothing_pooled)
        t = torch.tensor([noise_level(rng) for _ in picks])
        noise = torch.randn_like(x0)
        mixed = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        positions = image_ids(pool.height // 16, pool.width // 16)
        with torch.autocast("cpu", torch.bfloat16):
            statics = flux.precompute(tokens, pooled, positions, t[None], None)
            out, told = step(mixed, statics)
        error = (out.float() - (noise - x0)) ** 2
        plain = error.mean(dim=(1, 2))
        error = (emphasis(pool, picks) * error.mean(dim=2)).mean(dim=1)
        miss = (told.float() - aux_target(pool, picks)) ** 2
        high = (t > 0.95) & captioned
        figures = {
            "noise_only": plain[high].mean().item() if high.any() else float("nan"),
            "cover": miss[high][..., :32].mean().item() if high.any() else float("nan"),
            "where": miss[..., -2:].mean().item(),
        }
        # Without a caption only the positions can be told.
        aux = miss[..., :-2].mean(dim=(1, 2)) * captioned + miss[..., -2:].mean(dim=(1, 2))
        return error.mean() + args.aux * aux.mean(), figures

    run.train(loss_of)

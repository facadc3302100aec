"""ControlNets that read edges, for a network that stays as it is.

First a ControlNet learns to read edges by itself, from pictures drawn as it goes: what do the objects cover? That is
quick, where what the network makes of it teaches it slowly. Then it steers: pictures with objects anywhere, captions
that say neither where nor how large, which only the edges do. Half of a step is pictures with noise, half is where the
network's own steps lead, as in the other trainings.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad, pixel_unshuffle

from benchmarks import captions, world
from benchmarks.world import Placed, Scene
from flux_engine.families.flux import image_ids
from flux_engine.models.flux import Flux, patchify, unpatchify
from flux_engine.models.flux_controlnet import FluxControlNet
from flux_engine.models.unet import UNet
from flux_engine.models.unet_controlnet import UNetControlNet
from flux_engine.params import FluxControlNetParams, UNetControlNetParams
from flux_engine.preprocess import preprocess
from flux_engine.specs import DEMO_SCHNELL, DEMO_SDXL
from training.batches import Batch, Encode, Walks, emphasis, evenly, noise_level
from training.flux import error_of, in_a_block, optimizers_of, use_faster_operations
from training.latents import CELL, OUT, boxes_of, coverage_maps, keep
from training.run import Run, autocast, log, read_average
from training.text import load_paired, load_text
from training.unet import discrete, in_an_attention, new_unet, walk
from training.vae import load_vae, to_tensor

SIZES = {(256, 256): 700, (128, 128): 700, (336, 192): 250, (192, 336): 250, (304, 208): 250, (208, 304): 250}
"""Picture size -> how many are drawn."""
OFTEN = (4, 3, 1, 1, 1, 1)
"""How often each is shown."""
SILU_GAIN = 1.7
"""About what keeps the spread of values from layer to layer."""
SILENT = 0.75
"""Share of captions that say neither place nor size."""


@dataclass
class Edged(Batch):
    """A batch with the pictures' edges."""

    edges: Tensor
    """(B, 1, H, W), 0 or 1."""
    cover: Tensor
    """(B, 1, H / CELL, W / CELL): how much of a cell the objects cover."""


def silent(scene: Scene) -> Scene:
    """The same, which leaves open where and how large."""
    return replace(scene, things=tuple(replace(thing, size="", place="") for thing in scene.things), relation="")


def draw(width: int, height: int, rng: random.Random) -> tuple[Scene, list[Placed], Image.Image, np.ndarray[Any, Any]]:
    """A scene as it is told, its objects, its picture, and how much of each cell the objects cover, of 255."""
    scene = world.sample_scene(rng)
    settled = world.settle(scene, rng)
    placed = world.layout(settled, width, height, rng)
    picture = world.paint(settled.ground, placed, width, height)
    cover = coverage_maps(settled, placed, width, height)[:2].max(axis=0)
    return silent(scene) if rng.random() < SILENT else scene, placed, picture, cover


def edges_of(picture: Image.Image) -> np.ndarray[Any, Any]:
    """(H, W), bool."""
    return np.asarray(preprocess("canny", picture).convert("L")) > 127


def make_pool(width: int, height: int, count: int, vae: Any) -> dict[str, Any]:
    """Scenes as they are told, latents of their pictures, and edges in bits."""
    rng = random.Random(f"edges-{width}x{height}")
    told: list[Any] = []
    latents: list[Tensor] = []
    edges: list[np.ndarray[Any, Any]] = []
    boxes: list[Any] = []
    covers: list[np.ndarray[Any, Any]] = []
    with torch.inference_mode():
        for _ in range(count):
            scene, placed, picture, cover = draw(width, height, rng)
            told.append(scene)
            boxes.append(boxes_of(placed))
            covers.append(cover)
            edges.append(np.packbits(edges_of(picture)))
            latents.append(vae.encode(to_tensor([picture])).half())
    packed = torch.from_numpy(np.stack(edges))
    return {
        "scenes": told,
        "latents": torch.cat(latents),
        "edges": packed,
        "boxes": torch.tensor(boxes),
        "covers": torch.from_numpy(np.stack(covers)),
    }


def any_size(rng: random.Random) -> tuple[int, int]:
    return rng.choices(list(SIZES), OFTEN)[0]


def how_many(count: int, size: tuple[int, int]) -> int:
    """`count` large pictures, or twice as many small ones."""
    return count if min(size) > 128 else 2 * count


def shown(
    scenes: Sequence[Scene], latents: Tensor, boxes: Tensor, size: tuple[int, int],
    level: Callable[[random.Random], float], encode: Encode, rng: random.Random,
) -> dict[str, Any]:  # fmt: skip
    """What every batch has; captions are written anew."""
    with torch.no_grad():
        tokens, pooled = encode([captions.write(scene, rng) for scene in scenes])
    x0 = patchify(latents.float())
    return {
        "x0": x0,
        "noise": torch.randn_like(x0),
        "t": torch.tensor([level(rng) for _ in scenes]).clamp(min=1e-3),
        "tokens": tokens,
        "pooled": pooled,
        "positions": image_ids(size[1] // 16, size[0] // 16),
        "captioned": torch.ones(len(scenes)).bool(),
        "settled": torch.tensor([all(thing.color for thing in scene.things) for scene in scenes]),
        "size": size,
        "weight": emphasis(boxes, *size),
        "guidance": torch.ones(len(scenes)),
        "answers": None,  # nothing is asked on the way
    }


class Source:
    """Batches of pictures with their edges, from pools that are made where they are not there."""

    def __init__(self, count: int, vae: str, encode: Encode) -> None:
        self.count, self.encode = count, encode
        self.pools: dict[tuple[int, int], Any] = {}
        network = load_vae(vae)
        for size, pictures in SIZES.items():
            kept = OUT / "pools" / vae / f"edges-{size[0]}x{size[1]}.pt"
            if not kept.exists():
                keep(kept, make_pool(*size, pictures, network))
                log.info("%s: %d pictures", kept.name, pictures)
            self.pools[size] = torch.load(kept, weights_only=False)  # written by this program, with scenes in it

    def draw(self, rng: random.Random, level: Callable[[random.Random], float], **_: Any) -> Edged:
        width, height = size = any_size(rng)
        pool = self.pools[size]
        picks = [rng.randrange(len(pool["scenes"])) for _ in range(how_many(self.count, size))]
        scenes = [pool["scenes"][pick] for pick in picks]
        edges = np.unpackbits(pool["edges"][picks].numpy(), axis=1)[:, : width * height]
        return Edged(
            **shown(scenes, pool["latents"][picks], pool["boxes"][picks], size, level, self.encode, rng),
            cover=pool["covers"][picks][:, None].float() / 255,
            edges=torch.from_numpy(edges).reshape(-1, 1, height, width).float(),
        )


class Sketches:
    """Edges of pictures that nobody has seen before: batches of pure noise, for which no latent is needed."""

    def __init__(self, count: int, channels: int, encode: Encode) -> None:
        """`channels` of a latent."""
        self.count, self.channels, self.encode = count, channels, encode

    def draw(self, rng: random.Random) -> Edged:
        width, height = size = any_size(rng)
        scenes, _, pictures, covers = zip(*(draw(*size, rng) for _ in range(how_many(self.count, size))), strict=True)
        latents = torch.zeros(len(scenes), self.channels, height // 8, width // 8)
        return Edged(
            **shown(scenes, latents, torch.zeros(len(scenes), 2, 4), size, lambda _: 1.0, self.encode, rng),
            cover=torch.from_numpy(np.stack(covers))[:, None].float() / 255,
            edges=torch.from_numpy(np.stack([edges_of(picture) for picture in pictures]))[:, None].float(),
        )


class Asked(nn.Module):
    """A ControlNet whose features are asked aside what the objects cover."""

    def __init__(self, net: nn.Module, modules: Sequence[nn.Module], channels: int, pixels: int) -> None:
        """`modules` are asked, whose features, tokens or a map, lie `pixels` apart."""
        super().__init__()
        self.controlnet = net
        self.cells = pixels // CELL
        self.heads = nn.ModuleList(nn.Linear(channels, self.cells**2) for _ in modules)
        self.seen: dict[int, Any] = {}
        for number, module in enumerate(modules):
            module.register_forward_hook(lambda _, __, out, number=number: self.seen.update({number: out}))

    def missed(self, cover: Tensor) -> Tensor:
        """Of what the last call's features were asked."""
        return torch.stack([self._missed(head, self.seen[i], cover) for i, head in enumerate(self.heads)]).mean()

    def _missed(self, head: nn.Module, seen: Any, cover: Tensor) -> Tensor:
        tokens = seen[0] if isinstance(seen, tuple) else seen  # a double block gives those of the picture first
        if tokens.dim() == 4:  # a map, whose size is rounded up
            sides = zip(tokens.shape[2:], cover.shape[2:], strict=True)
            down, right = (side * self.cells - have for side, have in sides)
            cover = pad(cover, (0, right, 0, down))
            tokens = tokens.flatten(2).transpose(1, 2)
        truth = pixel_unshuffle(cover, self.cells).flatten(2).transpose(1, 2)
        tokens = tokens[:, -truth.shape[1] :].float()  # a single block gives those of the text before
        return binary_cross_entropy_with_logits(head(tokens), truth)


def learn_to_read(
    name: str, asked: Asked, steer: Callable[[Tensor, Edged], Any], source: Sketches, args: argparse.Namespace,
    inside: Callable[[str], bool],
) -> None:  # fmt: skip
    """Of a ControlNet by itself: what do the objects cover?"""
    run = Run(f"{name}-reading", asked, optimizers_of(asked, 2 * args.lr, inside), steps=args.reading, ema=0.99)

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = source.draw(rng)
        steer(batch.noise, batch)
        missed = asked.missed(batch.cover)
        return missed, {"missed": missed.item()}

    run.train(loss_of)
    asked.load_state_dict(read_average(run.name))


Predict = Callable[[Tensor, Any], Tensor]


def learn(
    run: Run, predict: Predict, source: Any, plans: Sequence[Sequence[float]], asked: Asked | None = None
) -> None:
    """Half of a step is pictures with noise, half is where the network's own steps lead."""
    walks = Walks(source, plans)

    def error(x: Tensor, batch: Any, walked: bool) -> tuple[Tensor, Tensor]:
        out = predict(x, batch)
        wrong = error_of(out, batch.velocity(x), batch, walked=walked).mean()
        return out, wrong + asked.missed(batch.cover) if asked else wrong

    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = source.draw(rng, noise_level)
        _, loss = error(batch.mixed, batch, walked=False)
        walk = walks.take(rng)
        out, walked = error(walk.x, walk.batch, walked=True)
        walks.go(walk, out)
        return (loss + walked) / 2, {"walked": walked.item()}

    run.train(loss_of)


def zeroed(layers: Sequence[nn.Module]) -> None:
    """What a ControlNet gives is nothing at first (arXiv 2302.05543)."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def audible(convolutions: nn.Module) -> None:
    """As torch begins them, eight in a row leave a thousandth of the edges."""
    for layer in convolutions.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=SILU_GAIN / (layer.weight[0].numel() ** 0.5))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def new_flux_controlnet(base: Flux) -> FluxControlNet:
    """The base's first double and single block, which read the edges through convolutions as XLabs'."""
    params = FluxControlNetParams.of(base.params, depth=1, depth_single_blocks=1)
    net = FluxControlNet(replace(params, hint_width=16))
    net.load_state_dict(base.state_dict(), strict=False)
    audible(net.input_hint_block)
    zeroed([*net.controlnet_blocks, *net.controlnet_single_blocks])
    return net


def train_flux(args: argparse.Namespace) -> None:
    """For demo-schnell."""
    use_faster_operations()
    torch.manual_seed(8)
    base = Flux(replace(DEMO_SCHNELL.transformer))
    base.load_state_dict(read_average("demo-schnell", "flux."))
    base.eval().requires_grad_(False)
    net = new_flux_controlnet(base)
    asked = Asked(net, [net.double_blocks[0], net.single_blocks[0]], base.params.hidden_size, pixels=16)
    encode = load_text()

    def steer(x: Tensor, batch: Edged) -> Any:
        with autocast():
            hint = (batch.edges * 2 - 1).expand(-1, 3, -1, -1)
            told = net.precompute(batch.tokens, batch.pooled, batch.positions, batch.t[None], None)
            return net.residuals(net(x, net.embed_hint(hint), 0, told), base.params)

    def predict(x: Tensor, batch: Edged) -> Tensor:
        residuals = steer(x, batch)
        with autocast():
            fixed = base.precompute(batch.tokens, batch.pooled, batch.positions, batch.t[None], None)
            return base(x, 0, fixed, residuals).float()

    learn_to_read(
        "demo-canny", asked, steer, Sketches(args.batch, base.params.in_channels // 4, encode), args, in_a_block
    )
    run = Run("demo-canny", asked, optimizers_of(asked, args.lr, in_a_block), steps=args.steps, ema=0.99)
    learn(run, predict, Source(args.batch, "vae", encode), [evenly(steps) for steps in (2, 4)], asked)


def new_unet_controlnet(base: UNet) -> UNetControlNet:
    """The base's way down, without its transformers: the edges say where, and the base what."""
    depths = (None,) * len(base.params.block_out_channels)
    params = replace(UNetControlNetParams.of(base.params), transformer_depth=depths, mid_depth=None)
    net = UNetControlNet(params)
    net.load_state_dict({k: v for k, v in base.state_dict().items() if k in net.state_dict()}, strict=False)
    audible(net.controlnet_cond_embedding)
    zeroed([*net.controlnet_down_blocks, net.controlnet_mid_block])
    return net


def train_unet(args: argparse.Namespace) -> None:
    """For demo-sdxl."""
    use_faster_operations()
    torch.manual_seed(9)
    base = new_unet()
    base.load_state_dict(read_average("sdxl-base", "unet."))
    base.eval().requires_grad_(False)
    net = new_unet_controlnet(base)
    asked = Asked(net, [net.mid_block], base.params.block_out_channels[-1], pixels=32)
    encode = load_paired()

    def told(x: Tensor, batch: Edged) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """The latent as the UNet reads it, sigma, and what it is told."""
        width, height = batch.size
        timestep, sigma = discrete(batch.t)
        t = batch.t[:, None, None, None]
        scaled = unpatchify(x, height // 8, width // 8) / (t**2 + (1 - t) ** 2).sqrt()
        ids = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(x), -1).float()
        return scaled, sigma[:, None, None, None], (batch.tokens, batch.pooled, ids, timestep[None])

    def steer(x: Tensor, batch: Edged) -> Any:
        scaled, _, words = told(x, batch)
        with autocast():
            return net(scaled, net.embed_hint(batch.edges.expand(-1, 3, -1, -1)), 0, net.precompute(*words))

    def predict(x: Tensor, batch: Edged) -> Tensor:
        scaled, sigma, words = told(x, batch)
        residuals = steer(x, batch)
        with autocast():
            v = base(scaled, 0, base.precompute(*words), residuals).float()
        length = (1 + sigma**2).sqrt()
        return (x - patchify(scaled / length - sigma / length * v)) / batch.t[:, None, None]

    sketches = Sketches(args.batch, base.params.in_channels, encode)
    learn_to_read("demo-sdxl-canny", asked, steer, sketches, args, in_an_attention)
    run = Run("demo-sdxl-canny", asked, optimizers_of(asked, args.lr, in_an_attention), steps=args.steps, ema=0.99)
    plans = [walk(DEMO_SDXL, steps) for steps in (12, 25)]
    learn(run, predict, Source(args.batch, "sdxl-vae", encode), plans, asked)

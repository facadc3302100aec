"""What 8 bits cost: every linear against float32 on what it really reads, and the latent after every step.

python -m benchmarks.quality --model demo-schnell --scheme int8 [--prompts N] [--seed N] [--steps N]

For each linear that the scheme changes, cosine and relative error (relative L2) of what it gives over all tokens of all
prompts; `int8` also beside one scale for the whole weight and one for all tokens, as systems have that calibrate. For
each step the relative L2 of what the network foresees, along its own way and along that of float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import flux_engine
from benchmarks.adherence import scenes
from benchmarks.harness import machine
from flux_engine import Engine
from flux_engine.quantization.linears import INT8, SCHEMES, QuantizedLinear, Scheme, int8_product
from flux_engine.quantization.policy import treatment

KINDS = {"transformer": "flux", "unet": "unet", "text_encoder_2": "t5"}
"""Part -> kind of network, of those with linears of 8 bits."""


@dataclass
class Likeness:
    """Of two tensors that come piece by piece."""

    dot: float = 0.0
    ours: float = 0.0
    exact: float = 0.0
    error: float = 0.0

    def add(self, ours: Tensor, exact: Tensor) -> None:
        ours, exact = ours.double(), exact.double()
        self.dot += float((ours * exact).sum())
        self.ours += float(ours.square().sum())
        self.exact += float(exact.square().sum())
        self.error += float((ours - exact).square().sum())

    @property
    def cosine(self) -> float:
        return self.dot / (self.ours * self.exact) ** 0.5

    @property
    def relative(self) -> float:
        """L2 of the difference over that of the exact one."""
        return (self.error / self.exact) ** 0.5


@dataclass
class Linear:
    """A linear of a network, as the scheme has it."""

    scheme: Scheme
    row_wise: Likeness = field(default_factory=Likeness)
    per_tensor: Likeness = field(default_factory=Likeness)


def per_tensor_int8(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) times the transpose of weight (N, K), in 8 bits with one scale each."""
    scales = [t.abs().max() / INT8.limit for t in (x, weight)]
    a, b = ((t / scale).round().to(torch.int8) for t, scale in zip((x, weight), scales, strict=True))
    return int8_product(a, b).float() * scales[0] * scales[1]


@contextmanager
def watched(network: nn.Module, kind: str, scheme: str) -> Iterator[dict[str, Linear]]:
    """While it runs, every linear that the scheme changes is also run as the scheme has it."""
    treat = treatment(kind, scheme)
    assert treat is not None
    found: dict[str, Linear] = {}
    quantized: dict[str, QuantizedLinear] = {}

    def compare(name: str, linear: nn.Linear, read: Tensor, exact: Any) -> None:
        tokens, expected = read.reshape(-1, linear.in_features), exact.reshape(-1, linear.out_features)
        one = found[name]
        one.row_wise.add(quantized[name](tokens), expected)
        if one.scheme is INT8:
            other = per_tensor_int8(tokens, linear.weight)
            one.per_tensor.add(other if linear.bias is None else other + linear.bias, expected)

    handles: list[Any] = []
    for name, linear in network.named_modules():
        if isinstance(linear, nn.Linear) and (kept := treat(name)):
            found[name], quantized[name] = Linear(kept), QuantizedLinear.of(linear, kept)
            handles.append(
                linear.register_forward_hook(
                    lambda _, read, out, name=name, linear=linear: compare(name, linear, read[0], out)
                )
            )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def linears(
    engine: Engine, scheme: str, captions: Sequence[str], *, seed: int, steps: int | None
) -> dict[str, dict[str, Linear]]:
    """Part -> linear -> how like float32 it is. `engine` computes in float32, without a scheme."""
    networks = engine._pipeline.family.networks()
    if "transformer" not in networks:
        del networks["text_encoder_2"]  # CLIP, which stays as it is
    with ExitStack() as stack:
        report = {
            part: stack.enter_context(watched(network, KINDS[part], scheme))
            for part, network in networks.items()
            if part in KINDS
        }
        for number, caption in enumerate(captions):
            engine(caption, seed=seed + number, num_inference_steps=steps, output_type="latent")
    return report


def foreseen(engine: Engine, caption: str, seed: int, steps: int | None) -> list[Tensor]:
    """What the network foresees at every step."""
    seen: list[Tensor] = []
    engine(
        caption,
        seed=seed,
        num_inference_steps=steps,
        output_type="latent",
        on_step=lambda step: seen.append(step.latent),
    )
    return seen


def per_step(exact: Engine, other: Engine, captions: Sequence[str], *, seed: int, steps: int | None) -> list[Likeness]:
    """How like the latents are that both foresee, at each step."""
    each: list[Likeness] = []
    for number, caption in enumerate(captions):
        pairs = zip(*(foreseen(engine, caption, seed + number, steps) for engine in (other, exact)), strict=True)
        for index, (ours, theirs) in enumerate(pairs):
            if index == len(each):
                each.append(Likeness())
            each[index].add(ours, theirs)
    return each


def outliers(rows: int = 256, width: int = 3072, count: int = 8, times: float = 30.0) -> Tensor:
    """Standard normal activations (rows, width) of which some channels are many times larger, as in large
    transformers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((rows, width), generator=generator)
    x[:, torch.randperm(width, generator=generator)[:count]] *= times
    return x


def synthetic(scheme: Scheme, width: int = 3072, out: int = 1024) -> dict[str, float]:
    """Cosines on `outliers`, row-wise and with one scale for a tensor."""
    x = outliers(width=width)
    linear = nn.Linear(width, out, bias=False)
    with torch.no_grad():
        linear.weight.normal_(generator=torch.Generator().manual_seed(1))
        exact = linear(x)
        row_wise = QuantizedLinear.of(linear, scheme)(x)
    found = {"row_wise": float(cosine_similarity(row_wise.flatten(), exact.flatten(), dim=0))}
    if scheme is INT8:
        other = per_tensor_int8(x, linear.weight.detach())
        found["per_tensor"] = float(cosine_similarity(other.flatten(), exact.flatten(), dim=0))
    return found


def main() -> None:
    """Measure, print; ends in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-schnell")
    parser.add_argument("--scheme", default="int8", choices=[name for name in SCHEMES if name != "int8-storage"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()

    captions = [caption for _, caption in islice(scenes(args.seed), args.prompts)]
    exact = flux_engine.load(args.model, dtype="float32", quantization="none")
    told = {"seed": args.seed, "steps": args.steps}
    found = linears(exact, args.scheme, captions, **told)
    out = [f"{'linear':64}{'scheme':>14}{'cosine':>10}{'error':>9}{'per tensor':>12}"]
    for part, each in found.items():
        for name, one in each.items():
            other = f"{one.per_tensor.cosine:12.5f}" if one.scheme is INT8 else ""
            like = one.row_wise
            out.append(f"{part + ' ' + name:64}{one.scheme.name:>14}{like.cosine:10.5f}{like.relative:9.4f}{other}")
    steps = per_step(exact, flux_engine.load(args.model, dtype="float32", quantization=args.scheme), captions, **told)
    out.append("latent error after each step: " + " ".join(f"{like.relative:.4f}" for like in steps))
    sys.stdout.write("\n".join(out) + "\n")
    every = [one for each in found.values() for one in each.values()]
    line = {
        "model": args.model,
        "scheme": args.scheme,
        "prompts": args.prompts,
        "seed": args.seed,
        "linears": len(every),
        "least_cosine": round(min(one.row_wise.cosine for one in every), 6),
        "outliers": synthetic(SCHEMES[args.scheme]),
        "latent_error": [round(like.relative, 5) for like in steps],
        "machine": machine(),
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""One training run: steps, learning rate, moving average, checkpoints, and a log of the loss."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flux_engine.hardware import has_bf16

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "out" / "train"
KEPT = ROOT / "weights" / "checkpoints"
SHIPPED = {
    "vae": ("flux/vae", ""),
    "sdxl-vae": ("sdxl/vae", ""),
    "sdxl-text": ("sdxl/text_encoder_2/model", "clip_2."),
    "demo-schnell": ("flux/transformer/schnell", "flux."),
    "demo-dev": ("demo-dev/transformer", "flux."),
}
"""Run -> the file under weights/demo with all that is needed of it, and what the run's own names begin with."""

log = logging.getLogger("train_demo")

LossOf = Callable[[random.Random], tuple[Tensor, Mapping[str, float]]]


def autocast() -> torch.autocast:
    """bfloat16 in linears and convolutions where the processor multiplies it; elsewhere it is ten times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu")))


class Run:
    """Trains `net` and keeps its moving average, which is what gets published.

    Writes a checkpoint under out/train every two minutes and goes on from it when started again. Every step has a
    seed of its own, so that a run that was stopped goes on as it would have.
    """

    def __init__(
        self, name: str, net: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, steps: int, ema: float
    ) -> None:
        self.name, self.net, self.steps, self.decay = name, net, steps, ema
        self.optimizers = list(optimizers)
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.weights = [v for v in net.state_dict().values() if v.is_floating_point()]
        self.average = [v.detach().clone() for v in self.weights]
        self.step = 0
        self.seconds = 0.0
        self.path = OUT / f"{name}.pt"
        self.log = OUT / f"{name}.jsonl"
        OUT.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            net.load_state_dict(state["net"])
            named = state["average"]
            self.average = [named[k] for k, v in net.state_dict().items() if v.is_floating_point()]
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.step, self.seconds = state["step"], state["seconds"]
            log.info("%s: going on from step %d", name, self.step)

    def averaged(self) -> dict[str, Tensor]:
        """The moving average, by name."""
        names = [k for k, v in self.net.state_dict().items() if v.is_floating_point()]
        return dict(zip(names, self.average, strict=True))

    def save(self) -> None:
        """Write the checkpoint and publish it by rename."""
        state = {
            "net": self.net.state_dict(),
            "average": self.averaged(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def factor(self) -> float:
        """Of the learning rate: up over 100 steps, level, and down to a fiftieth over the last three fifths."""
        warm = min(1.0, (self.step + 1) / 100)
        return warm * max(0.02, min(1.0, (1 - self.step / self.steps) / 0.6))

    def train(self, loss_of: LossOf) -> None:
        """`loss_of(rng)` draws a batch and returns the loss, and figures for the log."""
        began = saved = time.monotonic()
        recent: list[Mapping[str, float]] = []
        while self.step < self.steps:
            rng = random.Random(f"{self.name}-{self.step}")
            torch.manual_seed(rng.getrandbits(32))
            for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * self.factor()
            loss, figures = loss_of(rng)
            self.net.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            decay = min(self.decay, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.weights, 1 - decay)
            self.step += 1
            now = time.monotonic()
            self.seconds += now - began
            began = now
            recent.append({"loss": loss.item(), "grad_norm": norm.item(), **figures})
            if self.step % 50 == 0:
                self._write(recent)
                recent.clear()
            if now - saved > 120:
                self.save()
                saved = now
        self.save()

    def _write(self, recent: Sequence[Mapping[str, float]]) -> None:
        """A line with the mean of every figure since the last one, leaving out steps that had none."""
        line: dict[str, Any] = {"step": self.step, "seconds": round(self.seconds, 1)}
        for key in recent[0]:
            values = [figures[key] for figures in recent if figures[key] == figures[key]]
            line[key] = round(sum(values) / len(values), 5) if values else None
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_average(name: str, prefix: str = "") -> dict[str, Tensor]:
    """The moving average of a run, or the part of it under a prefix: from its checkpoint under out/train, or else from
    what `checkpoint` kept of it in the repository, or what ships."""
    if (OUT / f"{name}.pt").exists():
        average = torch.load(OUT / f"{name}.pt", weights_only=True)["average"]
    elif name in SHIPPED:
        file, own = SHIPPED[name]
        average = {own + k: v.float() for k, v in load_file(ROOT / "weights" / "demo" / f"{file}.safetensors").items()}
    else:
        average = {k: v.float() for k, v in load_file(KEPT / f"{name}.safetensors").items()}
    return {k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)}

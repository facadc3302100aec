"""The demo models' checker: a small network that finds the crescent, which stands for what must not be drawn.

Trained by scripts/train_demo.py on drawn pictures of the demo models' sizes. It says nothing of other pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.safety.files import PART, Where
from flux_engine.safety.options import Demo
from flux_engine.verdicts import Verdict

MANIFEST = "demo-checker"
SIDE = 96
"""Pixels of the shorter side that the network sees."""
LONGEST = 4 * SIDE
GROUPS = 8


class Block(nn.Sequential):
    """A convolution, normalised."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(GROUPS, out_channels),
            nn.SiLU(),
        )


class CrescentNetwork(nn.Module):
    """Convolutions down to a sixteenth of the side, and a score in every place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Block(3, 16, 2), Block(16, 32, 2), Block(32, 48, 2), Block(48, 48), Block(48, 64, 2), Block(64, 64)
        )
        self.score = nn.Conv2d(64, 1, 1)
        assert self.score.bias is not None
        nn.init.constant_(self.score.bias, -4.0)  # of all places together about even odds

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any size -> (B,) logits: a crescent in one place is enough."""
        return self.score(self.blocks(pixels)).flatten(1).logsumexp(1)


def shrunk(picture: Image.Image) -> Image.Image:
    """As the network sees a picture: its shorter side SIDE pixels, its longer at most LONGEST."""
    width, height = picture.size
    scale = SIDE / min(width, height)
    size = (min(round(width * scale), LONGEST), min(round(height * scale), LONGEST))
    return picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


class DemoChecker:
    """Unsafe is a probability of a crescent above the threshold."""

    def __init__(self, network: CrescentNetwork, options: Demo) -> None:
        self.network, self.options = network, options

    @property
    def name(self) -> str:
        return str(self.options)

    def check(self, pictures: Sequence[Image.Image]) -> Sequence[Verdict]:
        small = [shrunk(picture) for picture in pictures]
        alike: dict[tuple[int, int], list[int]] = {}
        for index, one in enumerate(small):
            alike.setdefault(one.size, []).append(index)
        found: dict[int, float] = {}
        device = self.network.score.weight.device
        for indices in alike.values():
            with torch.inference_mode():
                logits = self.network(to_pixels([small[index] for index in indices]).to(device))
            found |= dict(zip(indices, logits.sigmoid().tolist(), strict=True))
        scores = [found[index] for index in range(len(pictures))]
        return [Verdict(not score <= self.options.threshold, {"crescent": score}, self.name) for score in scores]


def load_demo(options: Demo, where: Where) -> DemoChecker:
    """The one that ships. Raises WeightsError for a file that is not whole."""
    files = where.files(MANIFEST)
    with WeightSource.open(files[PART]) as source:
        network = load_module(CrescentNetwork, source, dtype=torch.float32, device=where.device)
    return DemoChecker(network, options)

"""CompVis' safety checker: how like a picture is to 17 concepts, by CLIP.

Source: CompVis' StableDiffusionSafetyChecker, with the weights that came with Stable Diffusion 1.x. What it looks at is
the middle square of a picture, as the published preprocessing has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.settings import read_json
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError
from flux_engine.safety.files import PART, Preparation, Where
from flux_engine.safety.options import CompVis
from flux_engine.text.encoders import place_positions, said_of
from flux_engine.verdicts import Verdict

MANIFEST = "compvis-safety-checker"
ADJUSTMENT = 0.01
"""By how much more a picture counts as like everything that comes after the first special concept that it is like."""
DIGITS = 3
"""Likenesses are rounded to so many before they are compared."""


class SafetyNetwork(nn.Module):
    """CLIP's vision tower, and the vectors of concepts with their limits, under the published names."""

    def __init__(self, config: CLIPVisionConfig, projection_dim: int, concepts: int, special: int) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, projection_dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.empty(concepts, projection_dim))
        self.special_care_embeds = nn.Parameter(torch.empty(special, projection_dim))
        self.concept_embeds_weights = nn.Parameter(torch.empty(concepts))
        self.special_care_embeds_weights = nn.Parameter(torch.empty(special))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> cosines with the special concepts, (B, 3), and with the concepts, (B, 17), float32."""
        seen = self.visual_projection(self.vision_model(pixels).pooler_output)
        special, concepts = (
            F.normalize(seen) @ F.normalize(vectors).T for vectors in (self.special_care_embeds, self.concept_embeds)
        )
        return special.float(), concepts.float()


class CompVisChecker:
    """Unsafe is what is likelier than its limit for any concept."""

    def __init__(self, network: SafetyNetwork, prepare: Preparation, options: CompVis) -> None:
        self.network, self.prepare, self.options = network, prepare, options
        self._limits = [
            weights.float().cpu().tolist()
            for weights in (network.special_care_embeds_weights, network.concept_embeds_weights)
        ]

    @property
    def name(self) -> str:
        return str(self.options)

    def check(self, pictures: Sequence[Image.Image]) -> Sequence[Verdict]:
        """Scores are by how much the likest concept, and the likest special one, is above its limit."""
        weight = self.network.visual_projection.weight
        with torch.inference_mode():
            cosines = self.network(self.prepare(pictures).to(weight.device, weight.dtype))
        rows = zip(*(each.cpu().numpy() for each in cosines), strict=True)
        return [self._verdict(special, concepts) for special, concepts in rows]

    def _verdict(self, special: Any, concepts: Any) -> Verdict:
        excess = 0.0
        specials: list[float] = []
        for cosine, limit in zip(special, self._limits[0], strict=True):
            specials.append(_rounded(cosine - limit + excess))
            if specials[-1] > 0:
                excess = ADJUSTMENT
        likest = max(_rounded(cosine - limit + excess) for cosine, limit in zip(concepts, self._limits[1], strict=True))
        # A comparison with what is no number is false, and max may pass it over.
        if not (np.isfinite(special).all() and np.isfinite(concepts).all()):
            likest = float("nan")
        scores = {"concept": likest, "special": max(specials)}
        return Verdict(not likest <= self.options.threshold, scores, self.name)


def load_compvis(options: CompVis, where: Where) -> CompVisChecker:
    """From its manifest. Raises WeightsError for files that are missing or do not fit."""
    files = where.files(MANIFEST)
    prepare = Preparation.read("CLIPImageProcessorPil", files[f"{PART}/preprocessor_config.json"])
    network = read_network(files, where)
    return CompVisChecker(network, prepare, options)


def read_network(files: Mapping[str, Path], where: Where) -> SafetyNetwork:
    """From `checker` and `checker/config.json`, the published ones."""
    path = files[f"{PART}/config.json"]
    said = read_json(path)
    try:
        config = CLIPVisionConfig(**(said["vision_config"] | {"projection_dim": said["projection_dim"]}))
        positions = (int(config.image_size) // int(config.patch_size)) ** 2 + 1  # pyright: ignore[reportArgumentType]
    except Exception as error:  # noqa: BLE001  of many types, and none that they share
        raise WeightsError(f"{path} cannot be used: {said_of(error)}") from None
    with WeightSource.open(files[PART]) as source:
        # Files of older versions hold the numbers of the positions as well.
        source = replace(source, recipes={k: v for k, v in source.recipes.items() if not k.endswith("position_ids")})
        shapes = source.shapes
        concepts, special = (
            (shapes.get(name) or (1,))[0] for name in ("concept_embeds_weights", "special_care_embeds_weights")
        )
        network = load_module(
            lambda: SafetyNetwork(config, said["projection_dim"], concepts, special),
            source,
            dtype=where.dtype,
            device=where.device,
            rename=_published,
        )
    place_positions(network, positions, where.device)
    return network


def _published(name: str) -> str:
    """What transformers calls a tensor -> what the file does: newer versions leave a prefix out."""
    tower = "vision_model."
    return f"{tower}{tower}{name.removeprefix(tower).removeprefix(tower)}" if name.startswith(tower) else name


def _rounded(score: Any) -> float:
    return round(float(score), DIGITS)

"""The files of checkers that are networks, by their manifests: fetched, verified, and read strictly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flux_engine import hub
from flux_engine.checkpoints.settings import read_json
from flux_engine.config import EngineConfig
from flux_engine.errors import WeightsError
from flux_engine.ledger import Ledger
from flux_engine.text.encoders import said_of

PART = "checker"


@dataclass(frozen=True)
class Where:
    """Where a checker comes from, and where it runs."""

    config: EngineConfig
    device: torch.device
    offline: bool

    @property
    def dtype(self) -> torch.dtype:
        """float16 on a card, as the published predictors; on a processor float32."""
        return torch.float16 if self.device.type == "cuda" else torch.float32

    def files(self, name: str) -> dict[str, Path]:
        """Those of a manifest. Raises WeightsError that says how to get them."""
        manifest = hub.find(name, hub.manifests(self.config.weights))
        try:
            return manifest.obtain(offline=self.offline or self.config.offline, ledger=Ledger(self.config.cache))
        except WeightsError as error:
            if not manifest.repository:
                raise
            raise WeightsError(
                f"the safety checker {name} is not here, and without it no picture counts as safe. Get it with "
                f"`flux-engine download {name}`, or say safety=None to go without any. ({error})"
            ) from None


@dataclass(frozen=True)
class Preparation:
    """How a checker wants its pictures: transformers' processor with Pillow, as preprocessor_config.json says."""

    processor: Any

    @classmethod
    def read(cls, kind: str, path: Path) -> Preparation:
        """`kind` is the processor's class. Raises WeightsError for settings that are none."""
        import transformers

        try:
            return cls(getattr(transformers, kind).from_dict(read_json(path)))
        except WeightsError:
            raise
        except Exception as error:  # noqa: BLE001  of many types, and none that they share
            raise WeightsError(f"{path} cannot be used: {said_of(error)}") from None

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, 3, H, W), float32."""
        return self.processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")["pixel_values"]

"""Falconsai's classifier of pictures that are not safe for work: a vision transformer with two labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.settings import read_json
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError
from flux_engine.safety.files import PART, Preparation, Where
from flux_engine.safety.options import Falconsai
from flux_engine.text.encoders import said_of
from flux_engine.verdicts import Verdict

MANIFEST = "falconsai-nsfw"
UNSAFE = "nsfw"
"""The label."""
_LAYER = re.compile(r"vit\.layers\.(\d+)\.")
_PUBLISHED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Part of a layer in transformers 5 -> in files, which are older."""


class FalconsaiChecker:
    """Unsafe is a probability of the label "nsfw" above the threshold."""

    def __init__(self, network: Any, prepare: Preparation, options: Falconsai) -> None:
        """Raises WeightsError for a network without the label."""
        self.network, self.prepare, self.options = network, prepare, options
        labels = {str(label).lower(): int(number) for number, label in network.config.id2label.items()}
        if UNSAFE not in labels:
            raise WeightsError(f"falconsai: its config has no label {UNSAFE!r}, only {', '.join(labels)}")
        self._label = labels[UNSAFE]

    @property
    def name(self) -> str:
        return str(self.options)

    def check(self, pictures: Sequence[Image.Image]) -> Sequence[Verdict]:
        weight = self.network.classifier.weight
        with torch.inference_mode():
            logits = self.network(self.prepare(pictures).to(weight.device, weight.dtype)).logits
        shares = logits.float().softmax(-1)[:, self._label].tolist()
        return [Verdict(not share <= self.options.threshold, {UNSAFE: share}, self.name) for share in shares]


def load_falconsai(options: Falconsai, where: Where) -> FalconsaiChecker:
    """From its manifest. Raises WeightsError for files that are missing or do not fit."""
    files = where.files(MANIFEST)
    path = files[f"{PART}/config.json"]
    prepare = Preparation.read("ViTImageProcessorPil", files[f"{PART}/preprocessor_config.json"])
    try:
        config = ViTConfig(**read_json(path))
    except WeightsError:
        raise
    except Exception as error:  # noqa: BLE001  of many types, and none that they share
        raise WeightsError(f"{path} cannot be used: {said_of(error)}") from None
    with WeightSource.open(files[PART]) as source:
        network = load_module(
            lambda: ViTForImageClassification(config),
            source,
            dtype=where.dtype,
            device=where.device,
            rename=_published,
        )
    return FalconsaiChecker(network, prepare, options)


def _published(name: str) -> str:
    """What transformers calls a tensor -> what the file does."""
    layer = _LAYER.match(name)
    if layer is None:
        return name
    part, _, leaf = name[layer.end() :].rpartition(".")
    return f"vit.encoder.layer.{layer[1]}.{_PUBLISHED.get(part, part)}.{leaf}"

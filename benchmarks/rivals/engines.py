"""The engines that are compared, each with what is best for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

FREEZING = {"TORCHINDUCTOR_FREEZING": "1"}


@dataclass(frozen=True)
class Engine:
    """How an engine is run."""

    environment: str | None
    """Name of its requirements and of its virtual environment; None for this project's own."""
    runner: str
    """A module of `runners`."""
    options: tuple[str, ...] = ()
    """What the runner is told."""
    variables: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("flux", "unet", "vae")
    """Which networks it runs."""


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "ours-bf16": Engine(None, "ours", ("none",)),
        "ours-int8": Engine(None, "ours", ("int8",), kinds=("flux", "unet")),
        "diffusers": Engine("diffusers", "torch_", ()),
        "diffusers-channels-last": Engine("diffusers", "torch_", ("channels_last",), kinds=("unet", "vae")),
        # Freezing packs the weights for oneDNN, which torch.compile leaves alone otherwise.
        "diffusers-compile": Engine("diffusers", "torch_", ("compile", "channels_last"), FREEZING),
        "diffusers-max-autotune": Engine(
            "diffusers", "torch_", ("compile", "channels_last"), {**FREEZING, "TORCHINDUCTOR_MAX_AUTOTUNE": "1"}
        ),
        "torchao-int8": Engine("torchao", "torch_", ("torchao", "compile"), FREEZING, kinds=("flux", "unet")),
        "openvino-bf16": Engine("openvino", "openvino_", ()),
        "openvino-int8": Engine("openvino", "openvino_", ("int8",)),
        "onnxruntime": Engine("onnxruntime", "onnxruntime_", ()),
        "onnxruntime-int8": Engine("onnxruntime", "onnxruntime_", ("int8",), kinds=("flux", "unet")),
        "zentorch": Engine("zentorch", "torch_", ("zentorch", "compile")),
    }
)
BASELINE = "diffusers"
DEFAULT = ("ours-int8", "ours-bf16", "diffusers", "diffusers-channels-last", "diffusers-compile", "openvino-bf16",
           "openvino-int8")  # fmt: skip

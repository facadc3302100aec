"""flux-engine: runs FLUX- and SDXL-class image models fast, on one GPU or on a CPU.

    import flux_engine
    engine = flux_engine.load("demo-schnell")
    engine("a large red circle on a blue background", seed=0).save("circle.png")

Importing this package is light: torch and transformers come in with the first `load`.
"""

from __future__ import annotations

import gc
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flux_engine.config import EngineConfig
from flux_engine.errors import (
    FluxEngineError,
    InvalidRequest,
    NumericalError,
    OutOfMemory,
    OutputError,
    RequestCancelled,
    UnknownModel,
    UnknownSchema,
    UnsafeOutput,
    UnsafePrompt,
    UnsupportedError,
    WeightsError,
)
from flux_engine.inputs import Control
from flux_engine.inputs.caching import FirstBlockCache, TaylorCache
from flux_engine.request import Request
from flux_engine.verdicts import Verdict

if TYPE_CHECKING:
    from flux_engine.engine import Engine
    from flux_engine.inputs.loras import LoRA
    from flux_engine.loading import load
    from flux_engine.predictor import Predictor
    from flux_engine.result import Result
    from flux_engine.saving import quantize

__version__ = "0.1.0"

__all__ = [
    "Control",
    "Engine",
    "EngineConfig",
    "FirstBlockCache",
    "FluxEngineError",
    "InvalidRequest",
    "LoRA",
    "NumericalError",
    "OutOfMemory",
    "OutputError",
    "Predictor",
    "Request",
    "RequestCancelled",
    "Result",
    "TaylorCache",
    "UnknownModel",
    "UnknownSchema",
    "UnsafeOutput",
    "UnsafePrompt",
    "UnsupportedError",
    "Verdict",
    "WeightsError",
    "__version__",
    "load",
    "quantize",
]

_HEAVY = {
    "Engine": "flux_engine.engine",
    "LoRA": "flux_engine.inputs.loras",
    "Predictor": "flux_engine.predictor.predictor",
    "Result": "flux_engine.result",
    "load": "flux_engine.loading",
    "quantize": "flux_engine.saving",
}
"""Names whose modules need torch: imported when first asked for."""


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        return getattr(_import(_HEAVY[name]), name)
    raise AttributeError(f"module 'flux_engine' has no attribute {name!r}")


def _import(module: str) -> ModuleType:
    """Import with the cyclic garbage collector paused.

    torch and transformers allocate so much while they are imported that the collector runs dozens of times and finds
    next to nothing (benchmarks/README.md has what that costs).
    """
    if not gc.isenabled():
        return importlib.import_module(module)
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()  # there and back: what was imported is old now, and young collections pass it by
        gc.unfreeze()
        gc.enable()


def __dir__() -> list[str]:
    return sorted(__all__)

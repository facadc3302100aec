"""A published schema in front of an engine: what a hosted model's `predict` does, without needing Cog.

    predictor = Predictor("flux-schnell", model="demo-schnell")
    paths = predictor.predict(prompt="a red circle", seed=1)

Inputs are validated and defaulted by the schema's declaration (replicate/), and become a Request here. `Hosted` is for
hosts, which cancel from outside.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_engine.predictor.hosted import Hosted
    from flux_engine.predictor.predictor import Predictor

__all__ = ["Hosted", "Predictor"]

_MODULES = {"Hosted": "flux_engine.predictor.hosted", "Predictor": "flux_engine.predictor.predictor"}
"""These need torch, which what inputs mean (reading.py) does not."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'flux_engine.predictor' has no attribute {name!r}")

"""How an engine is set up. The only place that reads environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flux_engine.errors import UnsupportedError

DTYPES = ("auto", "float32", "bfloat16", "float16")
MEMORY = ("auto", "resident", "evict")
QUANTIZATIONS = ("auto", "none", "int8", "fp8", "fp8-storage")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Choices made once, when a model is loaded.

    Environment variables give the defaults: FLUX_ENGINE_DEVICE, FLUX_ENGINE_DTYPE, FLUX_ENGINE_QUANTIZATION,
    FLUX_ENGINE_WEIGHTS, FLUX_ENGINE_CACHE.
    """

    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:1". "auto" takes a GPU if there is one."""
    dtype: str = "auto"
    """"auto", "float32", "bfloat16" or "float16": what the networks compute in. Latents are float32 always."""
    quantization: str = "none"
    """"int8" and "fp8" multiply in 8 bits, with a scale for each row of a weight and each token; "fp8-storage" only
    keeps weights so. "auto" takes what the device multiplies: fp8 from compute capability 8.9 on, int8 below it and on
    processors with VNNI, and "none" elsewhere."""
    memory: str = "auto"
    """"resident" keeps all weights on the device; "evict" takes away what is read once for a prompt, a quarter of
    FLUX.1, and reads it from the file again for the next one. "auto" keeps them, so far."""
    embedding_cache: int = 64
    """How many encoded prompts are kept; 0 keeps none."""
    weights: Path | None = None
    """Another folder with `manifests/` beside the one that comes with the package."""
    cache: Path | None = None
    """Where it is remembered which weight files were verified; from the environment ~/.cache/flux-engine unless said
    otherwise. None remembers nothing."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnsupportedError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.quantization not in QUANTIZATIONS:
            raise UnsupportedError(f"quantization {self.quantization!r} is not one of {', '.join(QUANTIZATIONS)}")
        if self.memory not in MEMORY:
            raise UnsupportedError(f"memory {self.memory!r} is not one of {', '.join(MEMORY)}")
        if not isinstance(self.embedding_cache, int):
            raise UnsupportedError(f"embedding_cache {self.embedding_cache!r} is not a whole number")
        if self.embedding_cache < 0:
            raise UnsupportedError(f"embedding_cache {self.embedding_cache} is below 0")

    @classmethod
    def from_environment(
        cls,
        *,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        memory: str = "auto",
        embedding_cache: int = 64,
        environment: Mapping[str, str] = os.environ,
    ) -> EngineConfig:
        """Explicit values first, then the environment, then the defaults."""
        weights = environment.get("FLUX_ENGINE_WEIGHTS")
        return cls(
            device=device or environment.get("FLUX_ENGINE_DEVICE", "auto"),
            dtype=dtype or environment.get("FLUX_ENGINE_DTYPE", "auto"),
            quantization=quantization or environment.get("FLUX_ENGINE_QUANTIZATION", "none"),
            memory=memory,
            embedding_cache=embedding_cache,
            weights=Path(weights) if weights else None,
            cache=_cache(environment),
        )


def _cache(environment: Mapping[str, str]) -> Path:
    if environment.get("FLUX_ENGINE_CACHE"):
        return Path(environment["FLUX_ENGINE_CACHE"])
    home = environment.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "flux-engine"

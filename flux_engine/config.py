"""How an engine is set up. The only place that reads environment variables, or sets one."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flux_engine.errors import UnsupportedError

DTYPES = ("auto", "float32", "bfloat16", "float16")
MEMORY = ("auto", "resident", "evict")
KERNELS = ("auto", "on", "off")
COMPILE = ("off", "default", "max-autotune")
QUANTIZATIONS = ("auto", "none", "int8", "fp8", "fp8-storage", "both")
LONGEST_WAIT = 86_400
"""Seconds: threads cannot wait for any longer than some years, and nobody does."""
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Choices made once, when a model is loaded.

    Environment variables give the defaults: FLUX_ENGINE_DEVICE, FLUX_ENGINE_DTYPE, FLUX_ENGINE_QUANTIZATION,
    FLUX_ENGINE_MEMORY, FLUX_ENGINE_KERNELS, FLUX_ENGINE_COMPILE, FLUX_ENGINE_COMPILE_CACHE, FLUX_ENGINE_CUDA_GRAPHS,
    FLUX_ENGINE_WEIGHTS, FLUX_ENGINE_CACHE, FLUX_ENGINE_SAFETY_TIMEOUT.
    """

    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:1". "auto" takes a GPU if there is one."""
    dtype: str = "auto"
    """"auto", "float32", "bfloat16" or "float16": what the networks compute in. Latents are float32 always."""
    quantization: str = "none"
    """"int8" and "fp8" multiply in 8 bits, with a scale for each row of a weight and each token; "fp8-storage" only
    keeps weights so. "auto" takes what the device multiplies: fp8 from compute capability 8.9 on, int8 below it and on
    processors with VNNI, and "none" elsewhere. "both" is that and full precision beside it, where the plan has room,
    for requests that say `go_fast`."""
    memory: str | int = "auto"
    """"auto" keeps on the device what there is room for, by a plan (plan.py); the rest waits on the host or in its file
    until it is needed. A number of bytes, or "12GB", is the room that the plan has. "resident" keeps all weights on the
    device, "evict" all but what is read once for a prompt, a quarter of FLUX.1."""
    kernels: str = "auto"
    """Whether flux_kernels compute on a processor: "auto" where they can (`Engine.describe()` says why not), "on" or an
    error, "off" for torch's own operations. For the whole process: the last engine that was loaded decides."""
    compile: str = "off"
    """"default" has torch.compile make graphs of the networks' blocks, for any size (compiling.py); "max-autotune"
    tries kernels as well, which takes minutes; "off" runs them as they are."""
    compile_cache: Path | None = None
    """A folder that keeps what was compiled, for the next process; None for the folder that torch takes."""
    cuda_graphs: bool = False
    """Whether calls of the networks are captured as CUDA graphs, one for each size; for models that stay on a card."""
    limit_threads: bool = True
    """Whether torch is kept to the processors that this process may use; not where OMP_NUM_THREADS says a number."""
    embedding_cache: int = 64
    """How many encoded prompts are kept; 0 keeps none."""
    weights: Path | None = None
    """Another folder with `manifests/` beside the one that comes with the package."""
    cache: Path | None = None
    """Where it is remembered which weight files were verified; from the environment ~/.cache/flux-engine unless said
    otherwise. None remembers nothing. LoRAs that were fetched lie under it as well."""
    lora_cache: int = 50 * 10**9
    """Bytes of those LoRAs; beyond that what was used longest ago goes."""
    hf_token: str | None = field(default=None, repr=False)
    """Of Hugging Face, for LoRAs; None for what its own library was told."""
    civitai_api_token: str | None = field(default=None, repr=False)
    replicate_api_token: str | None = field(default=None, repr=False)
    """Tokens go to their own sites only, and are shown nowhere."""
    offline: bool = False
    """Whether LoRAs are taken from what is here only."""
    safety_timeout: float = 60.0
    """Seconds that a safety checker has for the pictures of a request; what it has not judged by then is unsafe."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnsupportedError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.quantization not in QUANTIZATIONS:
            raise UnsupportedError(f"quantization {self.quantization!r} is not one of {', '.join(QUANTIZATIONS)}")
        if self.kernels not in KERNELS:
            raise UnsupportedError(f"kernels {self.kernels!r} is not one of {', '.join(KERNELS)}")
        if self.compile not in COMPILE:
            raise UnsupportedError(f"compile {self.compile!r} is not one of {', '.join(COMPILE)}")
        if not isinstance(self.cuda_graphs, bool):
            raise UnsupportedError(f"cuda_graphs {self.cuda_graphs!r} is neither True nor False")
        if not isinstance(self.safety_timeout, int | float) or not 0 < self.safety_timeout <= LONGEST_WAIT:
            raise UnsupportedError(f"safety_timeout {self.safety_timeout!r} is no number of seconds above 0")
        if self.memory not in MEMORY:
            self.bytes_of_memory()
        if not isinstance(self.embedding_cache, int):
            raise UnsupportedError(f"embedding_cache {self.embedding_cache!r} is not a whole number")
        if self.embedding_cache < 0:
            raise UnsupportedError(f"embedding_cache {self.embedding_cache} is below 0")

    def bytes_of_memory(self) -> int | None:
        """The room that is given, None for none. Raises UnsupportedError for what is neither that nor a choice."""
        if self.memory in MEMORY:
            return None
        try:
            return parse_bytes(self.memory)
        except ValueError:
            raise UnsupportedError(
                f"memory {self.memory!r} is not one of {', '.join(MEMORY)}, and no size as '12GB'"
            ) from None

    @classmethod
    def from_environment(
        cls,
        *,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        memory: str | int | None = None,
        compile: str | None = None,
        compile_cache: str | os.PathLike[str] | None = None,
        cuda_graphs: bool | None = None,
        embedding_cache: int = 64,
        environment: Mapping[str, str] = os.environ,
    ) -> EngineConfig:
        """Explicit values first, then the environment, then the defaults."""
        return cls(
            device=device or environment.get("FLUX_ENGINE_DEVICE", "auto"),
            dtype=dtype or environment.get("FLUX_ENGINE_DTYPE", "auto"),
            quantization=quantization or environment.get("FLUX_ENGINE_QUANTIZATION", "none"),
            memory=environment.get("FLUX_ENGINE_MEMORY", "auto") if memory is None else memory,
            kernels=environment.get("FLUX_ENGINE_KERNELS", "auto"),
            compile=environment.get("FLUX_ENGINE_COMPILE", "off") if compile is None else compile,
            compile_cache=_path(
                environment.get("FLUX_ENGINE_COMPILE_CACHE") if compile_cache is None else compile_cache
            ),
            cuda_graphs=_switch(environment, "FLUX_ENGINE_CUDA_GRAPHS") if cuda_graphs is None else cuda_graphs,
            limit_threads="OMP_NUM_THREADS" not in environment,
            embedding_cache=embedding_cache,
            weights=_path(environment.get("FLUX_ENGINE_WEIGHTS")),
            cache=_cache(environment),
            lora_cache=_bytes_of(environment, "FLUX_ENGINE_LORA_CACHE", cls.lora_cache),
            civitai_api_token=environment.get("CIVITAI_API_TOKEN"),
            replicate_api_token=environment.get("REPLICATE_API_TOKEN"),
            offline=_switch(environment, "HF_HUB_OFFLINE"),
            safety_timeout=_seconds(environment, "FLUX_ENGINE_SAFETY_TIMEOUT", cls.safety_timeout),
        )


def parse_bytes(said: str | int) -> int:
    """ "12GB" or "11.5 GiB" -> bytes. Raises ValueError for what is no positive size."""
    if isinstance(said, int) and not isinstance(said, bool) and said > 0:
        return said
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", said) if isinstance(said, str) else None
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(said)
    size = int(float(found[1]) * UNITS[found[2].upper()])
    if size <= 0:
        raise ValueError(said)
    return size


def _switch(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def _path(said: str | os.PathLike[str] | None) -> Path | None:
    return Path(said) if said else None


def _bytes_of(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    try:
        return parse_bytes(environment[name]) if environment.get(name) else otherwise
    except ValueError:
        raise UnsupportedError(f"{name} {environment[name]!r} is no size as '50GB'") from None


def _seconds(environment: Mapping[str, str], name: str, otherwise: float) -> float:
    try:
        return float(environment[name]) if environment.get(name) else otherwise
    except ValueError:
        raise UnsupportedError(f"{name} {environment[name]!r} is no number of seconds") from None


def _cache(environment: Mapping[str, str]) -> Path:
    if environment.get("FLUX_ENGINE_CACHE"):
        return Path(environment["FLUX_ENGINE_CACHE"])
    home = environment.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "flux-engine"


_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_folders_lock = threading.Lock()
_folders: list[str] = []
_folder_before: str | None = None


@contextmanager
def torch_keeping_in(folder: Path | None) -> Iterator[None]:
    """Inside, torch keeps code in a folder: it looks into a variable for that, each time. When the last of several
    engines at once is done, the variable is as it was."""
    global _folder_before
    if folder is None:
        yield
        return
    with _folders_lock:
        if not _folders:
            _folder_before = os.environ.get(_FOLDER)
        _folders.append(str(folder.absolute()))
        os.environ[_FOLDER] = _folders[-1]
    try:
        yield
    finally:
        with _folders_lock:
            _folders.remove(str(folder.absolute()))
            now = _folders[-1] if _folders else _folder_before
            if now is None:
                os.environ.pop(_FOLDER, None)
            else:
                os.environ[_FOLDER] = now

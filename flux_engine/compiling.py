"""Networks compiled by torch: graphs for blocks, for any size at once, and none of them made unseen.

A block of FLUX.1 is compiled once, and what comes of it serves all blocks of its class, in ControlNets, too; SDXL's
UNet is compiled level by level, which together is all of it, and an autoencoder's decoder as a whole. Each has two
graphs, for one row and for several, whatever the number of tokens or positions is (a size that is 1 is no variable to
torch). Sizes that are `hot` have graphs of their own, in which every number is known.

Nothing falls back to eager: a graph is whole (`fullgraph`) or an error, and so is one more than LIMIT of a block.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import platform
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flux_kernels import build
from torch import Tensor, nn

from flux_engine import __version__, files, hardware
from flux_engine.capture import CUDAGraphs
from flux_engine.config import EngineConfig, torch_keeping_in
from flux_engine.errors import UnsupportedError
from flux_engine.families.base import Family
from flux_engine.models.layers import Stepwise
from flux_engine.models.vae import AutoEncoder

log = logging.getLogger(__name__)

LIMIT = 32
"""Graphs of one block: for dtypes, linears of 8 bits, rows beside each other."""
TORCH_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""`EngineConfig.compile` -> the mode of torch.compile: CUDA graphs are captured by us (capture.py)."""


class Graphs:
    """What torch compiled of an engine's networks."""

    def __init__(self, mode: str, cache: Path | None = None) -> None:
        """`cache` is the folder in which compiled code is kept and looked for, None for torch's own."""
        self.mode, self.cache = mode, cache
        self.made = 0
        """Graphs that there are, whether their code was made or found."""
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._hot: set[Hashable] = set()
        self._heating = False

    def attach(self, networks: Iterable[nn.Module]) -> None:
        """Have these networks call what is compiled."""
        for net in networks:
            if isinstance(net, Stepwise):
                net.call_block = self.call_alike if net.alike else self.call
            elif isinstance(net, AutoEncoder):
                net.call_decoder = self.call

    @contextmanager
    def heating(self) -> Iterator[None]:
        """Sizes that come by inside are hot from now on."""
        self._heating = True
        try:
            yield
        finally:
            self._heating = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """To be around everything that calls the networks. Raises UnsupportedError for what cannot be compiled, or has
        too many graphs; torch's own errors say why."""
        from torch._dynamo import exc

        dynamo: Any = importlib.import_module("torch._dynamo.config")
        symbols: Any = importlib.import_module("torch.fx.experimental._config")
        before = self.made
        try:
            # Sizes that are equal by chance, as of a square picture, are not taken to be equal always. A number that is
            # no size is a constant: of a norm's eps as a variable torch finds out that it is none, and begins anew.
            with symbols.patch(use_duck_shape=False), dynamo.patch(specialize_float=True), torch_keeping_in(self.cache):
                yield
        except exc.FailOnRecompileLimitHit as error:
            raise UnsupportedError(
                f"torch.compile: a block has {LIMIT} graphs, which is the limit. Load the model with compile='off'"
            ) from error
        except exc.TorchDynamoException as error:
            said = " ".join([line for line in str(error).splitlines() if line.strip()][:2]) or type(error).__name__
            raise UnsupportedError(f"torch.compile: {said}. Load the model with compile='off'") from error
        finally:
            if self.made > before:
                log.info("%d graphs compiled, %d in all", self.made - before, self.made)

    def describe(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "graphs": self.made,
            "hot sizes": len(self._hot),
            "cache": self.cache and str(self.cache),
        }

    def call_alike(self, block: nn.Module, *args: Any) -> Any:
        """A block that shares its graphs with all of its class."""
        return self._call_graph(type(block), block, args)

    def call(self, block: nn.Module, *args: Any) -> Any:
        """One whose graphs are its own: others of its class have other sizes."""
        return self._call_graph(id(block), block, args)

    def _call_graph(self, kind: Hashable, block: nn.Module, args: tuple[Any, ...]) -> Any:
        sizes = (kind, *(arg.shape for arg in args if isinstance(arg, Tensor)))
        if self._heating:
            self._hot.add(sizes)
        hot = sizes in self._hot
        key = sizes if hot else kind
        compiled = self._compiled.get(key)
        if compiled is None:
            # Both are not in torch's own annotations.
            limits: dict[str, Any] = {"recompile_limit": LIMIT, "isolate_recompiles": True}
            compiled = self._compiled[key] = torch.compile(
                type(block).forward, fullgraph=True, dynamic=not hot, backend=self._backend, **limits
            )
        return compiled(block, *args)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        """Inductor, counted."""
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        code = compile_fx(graph, inputs, config_patches=list_mode_options(TORCH_MODES[self.mode]))
        self.made += 1  # not before: torch begins anew where it finds that a number is no variable
        return code


@dataclass(frozen=True)
class Running:
    """How the networks of an engine are called."""

    compiled: Graphs | None = None
    captured: CUDAGraphs | None = None

    @contextmanager
    def __call__(self) -> Iterator[Callable[[], list[str]]]:
        """To be around everything that calls them; gives what tells what is to be said of it. Raises UnsupportedError,
        as `Graphs.watched`."""
        compiled = self.compiled
        if compiled is None:
            yield list
            return
        before = compiled.made
        with compiled.watched():
            yield lambda: _notes(compiled.made - before)

    def describe(self) -> dict[str, Any]:
        return {
            "compile": self.compiled.describe() if self.compiled else "off",
            "cuda_graphs": "off" if self.captured is None else len(self.captured),
        }


def _notes(made: int) -> list[str]:
    return [f"{made} graphs were compiled on the way: warm up to have them before"] if made else []


def prepared(config: EngineConfig, families: Sequence[Family[Any]]) -> Running:
    """Have the networks of a model called as the config says; their code is in a folder of `compile_cache` that is for
    exactly this model, device and these versions.

    Raises UnsupportedError for CUDA graphs of weights that come and go, OutputError for a folder that cannot be
    written.
    """
    compiled = captured = None
    networks = list({id(net): net for family in families for net in family.networks().values()}.values())
    if config.compile != "off":
        compiled = Graphs(config.compile, _folder(config, families[0]))
        compiled.attach(networks)
    if config.cuda_graphs:
        moving = sorted({part for f in families if f.residents.plan for part in f.residents.plan.leaves
                         if part.startswith("network")})  # fmt: skip
        if moving:
            raise UnsupportedError(
                "cuda_graphs asked for, but the network does not stay on the card: give it more memory, or do without"
            )
        captured = CUDAGraphs()
        captured.attach(networks)
    return Running(compiled, captured)


MADE_FOR = "made-for.json"


def _folder(config: EngineConfig, family: Family[Any]) -> Path | None:
    """Where the code is kept."""
    if config.compile_cache is None:
        return None
    wanted = made_for(family, config.compile)
    folder = config.compile_cache / hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    if not (folder / MADE_FOR).exists():
        log.info("nothing is kept in %s for %s: graphs are compiled anew", config.compile_cache, wanted)
        files.write(folder / MADE_FOR, json.dumps(wanted, indent=1).encode())
    return folder


def made_for(family: Family[Any], mode: str) -> dict[str, str]:
    """What compiled code depends on."""
    device = family.net.device
    features, threads = torch.cpu.get_capabilities(), torch.get_num_threads()
    known = hashlib.sha256(repr(sorted(features.items())).encode()).hexdigest()[:8]
    return {
        "model": repr(family.spec),
        "dtype": str(family.net.dtype),
        "quantization": family.quantization,
        "mode": mode,
        # Inductor writes code for processors for a number of threads.
        "device": hardware.describe(device) if device.type == "cuda" else f"CPU {known}, {threads} threads",
        "kernels": build.library().stem,
        "flux_engine": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

"""Loading a model: what is to be loaded is found and checked, placed by a plan, and only then read."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

import torch

from flux_engine import hardware, hub, kernels
from flux_engine.addons import ControlNets, controlnet_specs, find_controlnets, find_redux
from flux_engine.assemble import find_model
from flux_engine.compiling import prepared
from flux_engine.config import EngineConfig
from flux_engine.engine import Engine
from flux_engine.errors import InvalidRequest, UnsupportedError
from flux_engine.families.flux import FluxFamily
from flux_engine.families.load import load_family, sized
from flux_engine.families.sdxl import SDXLFamily
from flux_engine.inputs.loras import LoRA, checked_loras
from flux_engine.lora.finding import finder
from flux_engine.lora.modes import widened_for
from flux_engine.memory import memory_errors
from flux_engine.placing import decide
from flux_engine.safety.finding import find_checker
from flux_engine.safety.guarding import Checker, Guard, PromptHook
from flux_engine.safety.options import Options
from flux_engine.saving import saved_scheme
from flux_engine.specs import FluxSpec, ModelSpec, SDXLSpec, refined

log = logging.getLogger(__name__)


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    memory: str | int | None = None,
    compile: str | None = None,
    compile_cache: str | os.PathLike[str] | None = None,
    cuda_graphs: bool | None = None,
    embedding_cache: int = 64,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    refiner: str | os.PathLike[str] | None = None,
    controlnets: ControlNets = (),
    redux: str | os.PathLike[str] | None = None,
    loras: Sequence[LoRA | str | os.PathLike[str]] = (),
    safety: Checker | Options | str | None = None,
    prompt_hook: PromptHook | None = None,
) -> Engine:
    """Load a model and return an engine that runs requests on it.

    `model` is a name that `flux-engine models` lists, a weight file or a folder as diffusers keeps it, or OWNER/NAME of
    a repository on the Hugging Face hub, or OWNER/NAME/FILE. A file may hold the transformer alone.

    `device` and `dtype` default to the environment (FLUX_ENGINE_DEVICE, FLUX_ENGINE_DTYPE) and then to what the machine
    does best; see EngineConfig. `quantization` is "int8" or "fp8", "fp8-storage" to save memory only, "auto" for what
    the machine multiplies, or "none", which is the default unless FLUX_ENGINE_QUANTIZATION says otherwise. A model that
    `quantize` saved is loaded as it was saved; "both" loads 8 bits and full precision, for requests that say `go_fast`.
    `memory` is how much the model and its work may take, as "12GB": what has no room leaves while others are needed.
    "auto" is what is free, "resident" lets nothing leave, "evict" what is read once for a prompt. `compile` is
    "default" for torch.compile's graphs of the blocks, "max-autotune" to try kernels as well, or "off";
    `compile_cache` is a folder that keeps them for the next process, and `Engine.warm_up` makes them before they are
    needed. `cuda_graphs` captures a network's calls, so that the card does not wait for the processor.
    `embedding_cache` is the number of encoded prompts to keep. `revision` is a branch, tag or commit of the repository,
    `variant` one of the kinds of files in it, as "fp16"; `offline`, like HF_HUB_OFFLINE=1, takes files from the hub's
    local cache only. `refiner` is an SDXL refiner to load with an SDXL model, for requests that say `refine`.
    `controlnets` are ControlNets for requests that bring `control` pictures: kinds ("canny") or names that `flux-engine
    models --all` lists, or {"canny": a file or repository}. `redux` is the adapter for FLUX.1 that reads pictures as
    prompts. `loras` are merged at once, as by `engine.lora.set`. `safety` is a checker whose verdict every picture has
    in `Result.verdicts`: "published", "compvis", "falconsai", "opennsfw" or "demo", with thresholds as
    "opennsfw:threshold=0.8", an object of flux_engine.safety, or one of your own; None checks nothing. It is loaded
    first, on the model's device, and a `memory` in bytes does not count it. `prompt_hook` reads the prompts of a
    request before any work, and may refuse them; negative ones it is not shown.
    Raises UnknownModel, WeightsError, UnsupportedError or OutOfMemory, which is told before any weight is read if
    nothing fits; nothing stays loaded then.
    """
    config = EngineConfig.from_environment(
        device=None if device is None else str(device),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        quantization=quantization,
        memory=memory,
        compile=compile,
        compile_cache=compile_cache,
        cuda_graphs=cuda_graphs,
        embedding_cache=embedding_cache,
    )
    began = time.perf_counter()
    target = hardware.pick_device(config.device)
    compute = hardware.pick_dtype(config.dtype, target)
    hardware.pick_quantization(config.quantization, target)
    if config.cuda_graphs and target.type != "cuda":
        raise UnsupportedError(f"cuda_graphs asked for, but the device is {target}: graphs are captured on CUDA")
    kernels.choose(config.kernels, target)
    if config.limit_threads:
        hardware.limit_threads()
    known = hub.manifests(config.weights)
    early = hub.spec_of(_named(model), known)
    if early is not None:  # what cannot be is refused before gigabytes are fetched
        controlnet_specs(controlnets, early, known)
        _check_redux(redux, early)
    checker = find_checker(safety, device=target, offline=offline, config=config)
    found = find_model(_named(model), config, revision=revision, variant=variant, offline=offline)
    refining = None if refiner is None else find_model(_named(refiner), config, offline=offline, only=["unet"])
    saved = saved_scheme(found)
    _check_saved(config.quantization, saved, found.spec.name, target)
    refined(found.spec, refining.spec if refining else None)
    nets = find_controlnets(controlnets, found.spec, config, offline=offline)
    _check_redux(redux, found.spec)
    adapter = None if redux is None else find_redux(redux, config, offline=offline)
    spec = widened_for(checked_loras(loras), sized(found.spec, found.parts))
    beside = [*(path for _, path in nets), *([refining.parts["unet"]] if refining else [])]
    beside += [adapter[name] for name in ("adapter", "image_encoder")] if adapter else []
    placing = decide(spec, config, target, compute, saved=saved, beside=beside)
    with memory_errors(f"loading {model}"):
        family = load_family(spec, found.parts, placing.place, embedding_cache=config.embedding_cache)
        if refining and isinstance(family, SDXLFamily) and isinstance(refining.spec, SDXLSpec):
            family = family.with_refiner(refining.spec, refining.parts)
        family = family.with_controlnets(nets)
        if adapter is not None and isinstance(family, FluxFamily):
            family = family.with_redux(adapter)
        slow = family.in_full_precision(found.parts) if len(placing.schemes) > 1 else None
    running = prepared(config, [family, *([slow] if slow else [])])
    seconds = time.perf_counter() - began
    schemes = " and ".join(placing.schemes)
    log.info("loaded %s on %s as %s, quantization %s, in %.2f s", model, target, compute, schemes, seconds)
    find_lora = finder(config, offline=offline)
    guard = Guard(checker, prompt_hook, config.safety_timeout)
    engine = Engine(family, slow=slow, load_seconds=seconds, find_lora=find_lora, running=running, guard=guard)
    if loras:
        engine.lora.set(loras)
    return engine


def _check_saved(asked: str, saved: str | None, name: str, device: torch.device) -> None:
    """Raises UnsupportedError for a model that is saved in another scheme than was asked for, or that the device cannot
    run."""
    if saved is not None and asked not in ("none", "auto", saved):
        raise UnsupportedError(
            f"{name} is saved in {saved} and cannot be loaded in {asked}: quantize what it was made of, or load it so"
        )
    hardware.pick_quantization(saved or asked, device)


def _check_redux(redux: object, spec: ModelSpec) -> None:
    if redux is not None and not isinstance(spec, FluxSpec):
        raise InvalidRequest(f"redux: {spec.name} is no FLUX.1 model", field="redux")


def _named(model: str | os.PathLike[str]) -> str:
    """What is no name at all is left for the look-up to refuse."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model

"""An engine: a loaded model, and the state that outlives a request."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flux_engine import hardware, images, kernels
from flux_engine.compiling import Running
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest, OutputError, WeightsError, did_you_mean
from flux_engine.examples import examples
from flux_engine.families.base import Family
from flux_engine.families.sdxl import SDXLFamily
from flux_engine.inputs.loras import checked_loras
from flux_engine.lora.finding import Found, Named, finder
from flux_engine.lora.modes import Mode
from flux_engine.lora.state import Loras, networks_of
from flux_engine.memory import memory_errors
from flux_engine.pipeline import OnStep, Pipeline, check_cancelled
from flux_engine.quantization.policy import schemes_of
from flux_engine.request import Job, Request
from flux_engine.result import Result
from flux_engine.safety.guarding import UNCHECKED, Guard
from flux_engine.specs import ModelSpec
from flux_engine.text.inversion import Inversion, read_inversion

log = logging.getLogger(__name__)

EXPORTS = ("diffusers", "bfl", "sgm")
"""Layouts that a model can be written in."""
OTHER_NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg": "true_cfg_scale",
    "size": "width",
    "sampler": "scheduler",
    "num_images_per_prompt": "num_outputs",
    "generator": "seed",
    "cache": "step_cache",
}
"""What else people call the fields of a request."""


class Engine:
    """Runs requests on one model, one at a time: a second caller waits for the first.

    A request that fails or is cancelled leaves the engine as it was.
    """

    def __init__(
        self,
        family: Family[Any],
        *,
        slow: Family[Any] | None = None,
        load_seconds: float = 0.0,
        find_lora: Callable[[Named], Found] | None = None,
        running: Running | None = None,
        guard: Guard | None = None,
    ) -> None:
        """`slow` is the same model in full precision, for requests that ask for it. `find_lora` gives the file of what
        names a LoRA; by default with what the environment says. `running` is how networks are called, if it is not as
        they are. `guard` reads prompts and looks at pictures; without one pictures are unchecked."""
        self._guard = guard or Guard()
        self._running = running or Running()
        self._pipeline = Pipeline(family)
        self._slow = None if slow is None else Pipeline(slow)
        self._lock = threading.Lock()
        self._owner: int | None = None
        self.load_seconds = load_seconds
        families = [family, *([slow] if slow else [])]
        parts = [(part, net) for each in families for part, net in each.networks().items()]
        loaded = networks_of(
            family.spec,
            list({id(net): (part, net) for part, net in parts}.values()),
            [
                one
                for residents in {id(f.residents): f.residents for f in families}.values()
                for one in residents.loaded
            ],
        )
        self._plain = [pipeline.family.spec for pipeline in self._pipelines()]
        find = find_lora or finder(EngineConfig.from_environment())
        self.lora = Loras(
            lambda: self._plain[0], loaded, self._merging, self._weights_change, self._mode_changes, find, self._learn
        )

    def _pipelines(self) -> list[Pipeline]:
        return [pipeline for pipeline in (self._pipeline, self._slow) if pipeline is not None]

    @contextmanager
    def _merging(self) -> Iterator[None]:
        with self._turn(None), memory_errors("merging LoRAs", "Merging takes some copies of the largest weight"):
            yield

    def _mode_changes(self, mode: Mode | None) -> None:
        """What requests have by default, while a LoRA says so."""
        for pipeline, plain in zip(self._pipelines(), self._plain, strict=True):
            pipeline.family = pipeline.family.with_spec(mode.of(plain) if mode else plain)

    def _weights_change(self, parts: Iterable[str]) -> None:
        """Forget what was made with the weights of these parts."""
        for pipeline in self._pipelines():
            family = pipeline.family
            family.residents.settle()
            if any(part.startswith("text_encoder") for part in parts):
                family.text.clear()
            if family.precompute is not None:
                family.precompute.forget()
        if self._running.captured is not None:
            self._running.captured.forget_moved()

    def _learn(self, found: Inversion | None) -> None:
        """Tokens that came with a LoRA."""
        family = self._pipeline.family
        if not isinstance(family, SDXLFamily):
            if found:
                log.warning("the LoRA's learned tokens are for SDXL: left out")
        elif found is None:
            family.forget()
        else:
            family.learn(found)
            log.info("learned %d tokens with the LoRA: %s", len(found.tables[0]), dict(found.words))

    @property
    def spec(self) -> ModelSpec:
        """What the model is: sizes, defaults, widths."""
        return self._spec_with(self.lora.mode)

    def _spec_with(self, mode: Mode | None) -> ModelSpec:
        return mode.of(self._plain[0]) if mode else self._plain[0]

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        on_step: OnStep | None = None,
        cancel: threading.Event | None = None,
        check: bool = True,
        **fields: Any,
    ) -> Result:
        """`run` with the fields of Request as keywords: `engine("a red circle", seed=0, num_outputs=4)`."""
        known = [*(f.name for f in dataclasses.fields(Request)), "on_step", "cancel", "check"]
        for name in fields:
            if name not in known:
                meant = OTHER_NAMES.get(name)
                near = f"; did you mean {meant!r}?" if meant else did_you_mean(name, known)
                raise InvalidRequest(f"a request has no field {name!r}{near} Fields: {', '.join(known)}", field=name)
        return self.run(Request(prompt=prompt, **fields), on_step=on_step, cancel=cancel, check=check)

    def run(
        self,
        request: Request,
        *,
        on_step: OnStep | None = None,
        cancel: threading.Event | None = None,
        check: bool = True,
    ) -> Result:
        """Make the pictures of a request.

        `on_step` is called after every network call with a Step, and may raise to stop. `cancel` is an event any
        thread may set; it is looked at between steps and while waiting for another request to end. The safety checker
        looks at the pictures unless `check` is False, and what it says is in `Result.verdicts`: all pictures are in
        the result. Previews are not looked at.
        Raises InvalidRequest before any work (UnsafePrompt for a prompt that the hook does not let pass),
        RequestCancelled, or OutOfMemory.
        """
        if not isinstance(request, Request):
            raise InvalidRequest(f"run takes a Request, not a {type(request).__name__}: call the engine with a prompt")
        mode = self.lora.mode if request.loras is None else self.lora.mode_of(checked_loras(request.loras))
        job = request.resolve(self._spec_with(mode))
        guard = self._guard if check else dataclasses.replace(self._guard, checker=None)
        guard.read(job.prompts)
        if guard.checker is not None and job.output_type == "latent":
            raise InvalidRequest(
                "latents cannot be looked at by a safety checker: say check=False to have them unchecked",
                field="output_type",
            )
        chosen = None if job.loras is None else self.lora.find(job.loras, strict=request.strict)
        pipeline = self._slow if job.go_fast is False and self._slow else self._pipeline
        with self._turn(cancel), self._running() as made, memory_errors(f"{job.width}x{job.height}"):
            self.lora.use(chosen)
            if job.spec != self._pipeline.family.spec:  # another thread has set other LoRAs
                job = request.resolve(self._pipeline.family.spec)
            output = pipeline.run(job, on_step=on_step, cancel=cancel)
            applied, notes = self.lora.applied, self.lora.notes
            if guard.checker is None:
                verdicts = (UNCHECKED,) * len(output.pictures)
            else:
                verdicts = guard.look([images.to_pil(picture) for picture in output.pictures])
        return Result(
            images=[_convert(picture, job) for picture in output.pictures],
            job=job,
            timings=output.timings,
            notes=(*job.notes, *_otherwise(job, pipeline.family.quantization), *notes, *output.notes, *made()),
            controls=output.maps,
            quantization=pipeline.family.quantization,
            loras=applied,
            moved=output.moved,
            skipped=output.skipped,
            verdicts=verdicts,
        )

    def warm_up(self, requests: Sequence[Request] | None = None, *, hot: Sequence[Request] = ()) -> int:
        """Compile what requests need before they come; returns how many graphs that made.

        `requests` are examples, which are run; by default small ones after which no request needs another graph. Those
        of `hot` are run, too, and from then on requests of the same size have graphs in which that size is a constant:
        faster, at the price of their own compilation. Without `compile` it only runs them.
        """
        graphs = self._running.compiled
        if hot and graphs is None:
            raise InvalidRequest("hot sizes are of compiled graphs: load the model with compile='default'")
        before = graphs.made if graphs else 0
        if requests is None:
            requests = examples(self.spec)
            if self._slow:
                requests += [dataclasses.replace(one, go_fast=False) for one in requests]
        for request in requests:
            self.run(request, check=False)
        for request in hot:
            assert graphs is not None
            with graphs.heating():
                self.run(request, check=False)
        return graphs.made - before if graphs else 0

    def load_textual_inversion(self, path: str | os.PathLike[str]) -> Inversion:
        """Learn tokens for an SDXL model, instead of those learned before; returns what was found.

        `path` is the tar or the folder of a model trained on Replicate (`embeddings.pti`, `special_params.json`), such
        an `embeddings.pti` itself, or a file as AUTOMATIC1111 and diffusers keep it, whose name is then the word. What
        stands for the tokens (`words`) is replaced in prompts, not in negative ones, wherever these letters stand; a
        prompt may also say `<s0>`, `<s1>`, ... itself.
        Only tokens are learned. A LoRA or a UNet beside them is not applied: `left_out` names it, and the log does;
        `lora.set` takes both.
        Raises WeightsError for what is damaged or does not fit, InvalidRequest for a model that is not SDXL, or
        OutOfMemory; then nothing changed.
        """
        family = self._sdxl("textual inversion")
        if not isinstance(path, str | os.PathLike):
            raise WeightsError(f"a file is named by a text or a path, not by {path!r}")
        found = read_inversion(Path(path))
        with self._turn(None), memory_errors(f"loading {path}"):
            family.learn(found)
            self.lora.tar = None
        log.info("learned %d tokens from %s: %s", len(found.tables[0]), path, dict(found.words))
        if found.left_out:
            log.warning("%s: %s not applied, only the learned tokens", path, " and ".join(found.left_out))
        return found

    def unload_textual_inversion(self) -> None:
        """Forget what load_textual_inversion learned, if it did. Raises InvalidRequest for a model that is not SDXL."""
        family = self._sdxl("textual inversion")
        with self._turn(None):
            family.forget()
            self.lora.tar = None

    def describe(self) -> dict[str, Any]:
        """What is in force: model, device, dtype, number of weights, and what the linears of a network that has some of
        8 bits are kept in."""
        family = self._pipeline.family
        plan, networks = family.residents.plan, family.networks()
        if self._slow:
            networks["full precision"] = self._slow.family.net
        learned = {"textual_inversion": dict(family.text.words)} if getattr(family.text, "learned", ()) else {}
        return learned | {
            "model": self.spec.name,
            "device": str(family.net.device),
            "hardware": hardware.describe(family.net.device),
            "quantization": "both" if self._slow else family.quantization,
            "loras": self.lora.describe(),
            "evicted_bytes": family.residents.away(),
            "plan": plan.describe() if plan else None,
            "parts": {
                name: {
                    "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
                    "parameters": sum(p.numel() for p in net.parameters()),
                    "bytes": sum(p.nbytes for p in net.parameters()),
                }
                | schemes_of(net)
                for name, net in networks.items()
            },
            "kernels": kernels.describe(family.net.device, family.net.dtype),
            "safety": self._guard.checker.name if self._guard.checker else None,
            **self._running.describe(),
            "load_seconds": round(self.load_seconds, 3),
        }

    def export(self, folder: str | Path, *, layout: str = "diffusers") -> Path:
        """Write the weights as they are loaded, in their dtype, to a folder that is new or empty.

        `layout` is "diffusers", a folder that DiffusionPipeline.from_pretrained reads, or for FLUX.1 "bfl": the
        transformer and the autoencoder as Black Forest Labs' single files, for SDXL "sgm": all in one file. Returns the
        folder.
        Raises InvalidRequest for another layout, OutputError if it cannot be written; then nothing is left of it.
        """
        if not isinstance(folder, str | os.PathLike) or "\0" in str(folder):
            raise OutputError(f"a folder is named by a text or a path, not by {folder!r}")
        family, folder = self._pipeline.family, Path(folder)
        if family.quantization != "none":
            raise InvalidRequest(
                f"the weights are in {family.quantization}, which no other tool reads: export what they were made of, "
                "loaded with quantization 'none'"
            )
        if layout not in EXPORTS:
            raise InvalidRequest(f"layout {layout!r} is not one of {', '.join(EXPORTS)}", field="layout")
        if layout not in ("diffusers", family.publishers_layout):
            raise InvalidRequest(
                f"{self.spec.name} has no layout {layout!r}: say 'diffusers' or {family.publishers_layout!r}",
                field="layout",
            )
        with self._turn(None):
            self.lora.use()
            if self.lora.beside:
                raise InvalidRequest("LoRAs stand beside the weights: set them with how='merge' to export them, too")
            with family.residents.all():
                return family.export(folder) if layout == "diffusers" else family.export_as_published(folder)

    def __repr__(self) -> str:
        net = self._pipeline.family.net
        return f"<Engine: {self.spec.name} on {net.device}, {str(net.dtype).removeprefix('torch.')}>"

    def _sdxl(self, what: str) -> SDXLFamily:
        family = self._pipeline.family
        if not isinstance(family, SDXLFamily):
            raise InvalidRequest(f"{what} is for SDXL models, and {self.spec.name} is none")
        return family

    @contextmanager
    def _turn(self, cancel: threading.Event | None) -> Iterator[None]:
        """Hold the engine; give up waiting for it when cancelled."""
        if self._owner == threading.get_ident():
            raise InvalidRequest("a callback cannot use the engine that is calling it: use another engine")
        while not self._lock.acquire(timeout=-1 if cancel is None else 0.05):
            check_cancelled(cancel)
        try:
            self._owner = threading.get_ident()
            yield
        finally:
            self._owner = None
            self._lock.release()


def _otherwise(job: Job, scheme: str) -> list[str]:
    """What is to be said where the precision that was asked for is not there."""
    if job.go_fast is None or job.go_fast == (scheme != "none"):
        return []
    if job.go_fast:
        return [f"go_fast: no weights of 8 bits are loaded, {job.spec.name} ran in full precision"]
    return [f"go_fast off: full precision is not loaded, {job.spec.name} ran in {scheme}"]


def _convert(picture: torch.Tensor, job: Job) -> Any:
    match job.output_type:
        case "pil":
            return images.to_pil(picture)
        case "np":
            return images.to_uint8(picture)
        case "pt":
            return ((picture + 1) / 2).clamp(0, 1)
        case "latent":
            return picture.clone()  # a copy made outside inference mode is an ordinary tensor

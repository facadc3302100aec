"""The predictor: a schema, a model, and a folder for every prediction."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flux_engine.addons import ControlNets, Named
from flux_engine.config import EngineConfig
from flux_engine.engine import Engine
from flux_engine.errors import InvalidRequest, OutputError
from flux_engine.inputs.loras import LoRA
from flux_engine.loading import load
from flux_engine.lora.finding import Found, finder
from flux_engine.pipeline import Step
from flux_engine.plan import said
from flux_engine.predictor.compat import Compat, scaled_as_published
from flux_engine.predictor.reading import AUTO, Auto, reader
from flux_engine.predictor.screening import not_in_force, screened
from flux_engine.predictor.translation import Wanted
from flux_engine.predictor.writing import write
from flux_engine.provenance import Signer
from flux_engine.request import Request
from flux_engine.result import Result
from flux_engine.safety.finding import find_checker
from flux_engine.safety.guarding import Checker, PromptHook
from flux_engine.safety.options import Options, parsed
from flux_engine.specs import ModelSpec

BAR = 10
TOKENS = {"hf_token": "hf_api_token", "civitai_api_token": "civitai_api_token"}
"""Field of EngineConfig -> the input that stands in for it."""


def say_line(line: str) -> None:
    """One line to standard error, at once: the log that a host shows while a prediction runs."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class Predictor:
    """Speaks one published schema on one model.

    Pictures are sent as path objects, open files, data URIs, base64 or links, which are fetched unless they lead into a
    private network. A prediction that is refused is refused before the model is loaded.
    """

    def __init__(
        self,
        schema: str,
        *,
        model: Named | Mapping[str, Named] | None = None,
        lora: Named | None = None,
        controlnets: ControlNets | Auto = AUTO,
        redux: Named | Auto | None = AUTO,
        refiner: Named | Auto | None = AUTO,
        base_loras: Sequence[Named] | Auto = AUTO,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        memory: str | int | None = None,
        compile: str | None = None,
        compile_cache: str | os.PathLike[str] | None = None,
        safety: Checker | Options | str | None = AUTO,
        prompt_hook: PromptHook | None = None,
        local_files: bool = False,
        compat: Compat | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        c2pa: Signer | None = None,
        say: Callable[[str], None] = say_line,
    ) -> None:
        """`model` defaults to the one that the schema is published for; where an input chooses among several, it says
        which model is which, as {"dev": ..., "schnell": ...}, or the first alone. `lora` is a fine-tune's own, which
        counts where a prediction names none in its place. `controlnets`, `redux`, `refiner` and `base_loras`, which
        every prediction has, are loaded with it, as `load` takes them; "auto" is what is published with it, and with
        another model ControlNets for the same kinds of control picture and no refiner. With quantization "both"
        `go_fast` chooses between 8 bits and full precision; `compile` and `compile_cache` are as of `load`.
        `local_files` lets texts name pictures and LoRAs by paths on this machine, which is not for texts that strangers
        send; a path object always names a picture. `safety` is the checker that looks at every picture, as `load` takes
        it: what is unsafe, or what the checker fails at, is left out. "auto" is CompVis' checker confirmed by
        Falconsai's, and for a demo model its own; only None checks nothing, beside an input that says so. `prompt_hook`
        reads prompts before any work for them. `compat="published"` does what predictor/compat.py lists as the
        published predictors do it. `output_dir` receives a folder for every prediction (default: the system's temporary
        folder). `c2pa` signs the files. `say` takes the log's lines.

        Raises UnknownSchema, UnknownModel, or WeightsError for a path to nothing.
        """
        if not isinstance(output_dir, str | os.PathLike | None):
            raise InvalidRequest(f"output_dir is a path, not {output_dir!r}", field="output_dir")
        self.reader = reader(
            schema,
            model=model,
            lora=lora,
            controlnets=controlnets,
            redux=redux,
            refiner=refiner,
            base_loras=base_loras,
            compat=compat,
            local_files=local_files,
            config=EngineConfig.from_environment(device=device, dtype=dtype, quantization=quantization, memory=memory),
        )
        """What inputs mean to the model, before it is loaded."""
        self.schema = self.reader.schema
        self.safety, self.prompt_hook, self.c2pa = safety, prompt_hook, c2pa
        if isinstance(safety, str) and safety != AUTO:
            parsed(safety)
        self.device, self.dtype, self.quantization, self.memory = device, dtype, quantization, memory
        self.compile, self.compile_cache = compile, compile_cache
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.say = say
        self._own: Found | None = None
        """The file of `lora`, once it was looked for."""
        self._engines: dict[str, Engine] = {}
        self._checkers: dict[str, Checker | None] = {}
        self._loading = threading.Lock()

    def __repr__(self) -> str:
        return f"<Predictor: {self.schema.name} on {', '.join(self.reader.models.values())}>"

    @property
    def model(self) -> str:
        """The model that draws unless an input says otherwise."""
        return self.reader.models[self.reader.first]

    @property
    def spec(self) -> ModelSpec:
        """What that model is, with what goes with it. Before it is loaded, what is known of it without its weights.

        Raises what `load` does for models that are not there, or do not go together.
        """
        return self.reader.spec(self.reader.first)

    def setup(self) -> None:
        """Fetch the fine-tune's own LoRA, and load the safety checker and the model. `predict` does what of it was not
        done before. Another model that an input may choose is loaded when it is.

        Raises what `load` does: also for a checker whose weights or packages are not here.
        """
        if self.reader.lora is not None:
            self._own_lora()
        self._ready(self.reader.first)

    def warm_up(self) -> int:
        """`Engine.warm_up` of the model that draws unless an input says otherwise: how many graphs that made."""
        return self._ready(self.reader.first).warm_up()

    def _own_lora(self) -> Found:
        """Looked for once: what it means may be asked of the network."""
        with self._loading:
            if self._own is None:
                assert self.reader.lora is not None
                self._own = finder(EngineConfig.from_environment())(self.reader.lora)
            return self._own

    def _checker(self, choice: str) -> Checker | None:
        """Once for all models."""
        asked = (
            self.reader.spec(choice).checker if isinstance(self.safety, str) and self.safety == AUTO else self.safety
        )
        name = asked if isinstance(asked, str) else ""
        if name not in self._checkers:
            config = EngineConfig.from_environment(device=self.device)
            self._checkers[name] = find_checker(asked, device=config.device, config=config)
        return self._checkers[name]

    def _ready(self, choice: str) -> Engine:
        with self._loading:
            if choice not in self._engines:
                checker = self._checker(choice)  # first: it is soon told that it is not here
                for remark in self.reader.remarks(choice):
                    self.say(remark)
                engine = load(
                    self.reader.models[choice],
                    device=self.device,
                    dtype=self.dtype,
                    quantization=self.quantization,
                    memory=self.memory,
                    compile=self.compile,
                    compile_cache=self.compile_cache,
                    refiner=self.reader.refiner,
                    controlnets=self.reader.controlnets,
                    redux=self.reader.redux,
                    safety=checker,
                    prompt_hook=self.prompt_hook,
                )
                self.reader.specs[choice] = engine.spec
                self._engines[choice] = engine
            return self._engines[choice]

    def predict(
        self,
        /,
        *,
        cancel: threading.Event | None = None,
        record: Callable[[str, float], object] | None = None,
        **inputs: Any,
    ) -> list[Path] | Path:
        """Make the pictures of one prediction and return their files, `out-{i}.{format}`, after the control pictures,
        `control-{i}.png`, where the schema returns them; or for a schema of single pictures the one,
        `output.{format}`. They are in a folder of their own, so that two predictions never overwrite each other.
        A picture that is unsafe is left out, and the others keep their numbers. `record` is told metrics:
        "image_count" of those that were made, "flagged_count" of those left out, and seconds of every stage as
        "timing.denoise".

        Raises InvalidInput for inputs the schema refuses, InvalidRequest for what the model cannot do, UnsafePrompt
        where the hook does not let a prompt pass, UnsafeOutput where no picture is left, UnsupportedError,
        WeightsError, RequestCancelled, OutOfMemory or OutputError.
        """
        asked = self.reader.read(inputs)
        values, told = asked.values, asked.translated
        loras = self._fetched(told.loras, values, cancel)
        request = replace(told.request, loras=loras)
        if self.reader.compat:
            request = replace(request, loras=scaled_as_published(loras, request, asked.job.spec))
        if request.go_fast and "go_fast" not in inputs:  # nobody asked: no line that there are no 8 bits
            request = replace(request, go_fast=None)
        engine = self._ready(asked.choice)
        self.say(f"Using seed: {values['seed']}")
        for line in (*not_in_force(values, checked=self.safety is not None), *told.notes):
            self.say(line)
        folder = self._folder()
        try:
            result = self._run(engine, request, cancel, not values.get("disable_safety_checker"))
            _record(record, result)
            kept = screened(result, self.schema, self.say, compat=self.reader.compat)
            return write(folder, self.schema, result, kept, values, signer=self.c2pa, say=self.say)
        except BaseException:  # also a host's cancellation, which is no Exception: nothing half-made is left
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def resolve(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What a prediction of these inputs would be, every default filled in. Nothing is fetched: where a size follows
        a picture that is a link, width and height are None, and `unread` names it.

        Raises as `predict`, for what can be known without weights and downloads.
        """
        return self.reader.resolve(inputs)

    def _fetched(
        self, loras: Sequence[Wanted], values: Mapping[str, Any], cancel: threading.Event | None
    ) -> list[LoRA]:
        """The LoRAs of a prediction, fetched with its own tokens."""
        config = EngineConfig.from_environment()
        tokens = {name: token for name, source in TOKENS.items() if (token := values.get(source))}
        found: list[LoRA] = []
        for one in loras:
            find = finder(replace(config, **tokens), field=one.input, cancel=cancel)
            file = self._own_lora() if one.reference is None else find(one.reference)
            # Steps, guidance and scheduler are inputs: a LoRA sets none of them.
            found.append(LoRA(file, one.scale, mode=None))
        find = finder(config, cancel=cancel)
        return [*found, *(LoRA(find(name), mode=None) for name in self.reader.base_loras)]

    def _run(self, engine: Engine, request: Request, cancel: threading.Event | None, check: bool) -> Result:
        result = engine.run(request, on_step=self._progress, cancel=cancel, check=check)
        for note in result.notes:
            self.say(note)
        if result.moved:
            self.say(f"memory: {said(result.moved)} of weights came to the device for it")
        return result

    def _progress(self, step: Step) -> None:
        # A line of its own for every step: clients of hosted models read percentages from whole lines.
        done = BAR * step.index // step.total
        bar = "█" * done + " " * (BAR - done)
        self.say(f"{100 * step.index // step.total:3d}%|{bar}| {step.index}/{step.total}")

    def _folder(self) -> Path:
        try:
            if self.output_dir is not None:
                self.output_dir.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="prediction-", dir=self.output_dir))
        except OSError as error:
            raise OutputError(f"cannot make a folder for the pictures: {error}") from None


def _record(record: Callable[[str, float], object] | None, result: Result) -> None:
    """Also of a prediction of which no picture is given out."""
    if record is not None:
        record("image_count", len(result))
        record("flagged_count", sum(bool(verdict.unsafe) for verdict in result.verdicts))
        for stage, seconds in result.timings.items():
            record(f"timing.{stage}", round(seconds, 4))

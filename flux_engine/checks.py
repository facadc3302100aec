"""Checks of a value that somebody sent, by name: each returns it as it is used, or raises InvalidRequest."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

from flux_engine.errors import InvalidRequest, did_you_mean

Kind = TypeVar("Kind")
MAX_PROMPT_CHARACTERS = 100_000
MAX_SIDE_TOLD = 65_536


def shown(value: object) -> str:
    """A value in a message: never long; of a number with thousands of digits, which Python does not write, the type."""
    try:
        text = repr(value)
    except ValueError:
        return f"(a {type(value).__name__})"
    return text if len(text) <= 80 else text[:77] + "..."


def check_text(name: str, text: object) -> None:
    """None, or text that can be encoded and is not absurdly long."""
    if text is None:
        return
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} is a {type(text).__name__}, not a string", field=name)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(
            f"{name} has {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read",
            field=name,
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} is not valid Unicode: {error.reason} at {error.start}", field=name) from None


def pair(name: str, value: object) -> tuple[int, int] | None:
    """Two integers, or None."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise InvalidRequest(f"{name} {value!r} is not a pair of integers", field=name)
    return integer(name, value[0], 0, MAX_SIDE_TOLD), integer(name, value[1], 0, MAX_SIDE_TOLD)


def integer(name: str, value: object, low: int, high: int, *, field: str | None = None) -> int:
    """Accepts what stands for an integer (numpy's, too) and nothing that only looks like one (True, 3.5, "3").

    `field` is the request's, where the name is not."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:  # also an array of several
        found = None
    if found is None:
        raise InvalidRequest(f"{name} {shown(value)} is not an integer", field=field or name)
    if not low <= found <= high:
        raise InvalidRequest(f"{name} {shown(found)} is outside {low} to {high}", field=field or name)
    return found


def number(name: str, value: object, low: float, high: float, *, field: str | None = None) -> float:
    """A finite number within limits."""
    try:
        found = None if isinstance(value, (bool, str, bytes, bytearray)) else float(value)  # pyright: ignore[reportArgumentType]
    except OverflowError:  # a whole number of hundreds of digits
        found = math.inf
    except (TypeError, ValueError):  # also an array of several
        found = None
    if found is None:
        raise InvalidRequest(f"{name} {shown(value)} is not a number", field=field or name)
    if not math.isfinite(found) or not low <= found <= high:
        raise InvalidRequest(f"{name} {found} is outside {low:g} to {high:g}", field=field or name)
    return found


def named_options(
    text: str, kinds: Mapping[str, type[Kind]], field: str, noun: str, more: str = ""
) -> tuple[type[Kind], dict[str, str]]:
    """ "NAME:KEY=VALUE,KEY=VALUE" -> the dataclass of that name, and values of its fields as texts.

    `noun` is what has such a name, `more` what its list of known ones ends with. Raises InvalidRequest."""
    name, colon, said = text.partition(":")
    if name not in kinds:
        near = did_you_mean(name, kinds)
        raise InvalidRequest(f"no {noun} {shown(name)}{near} Known: {', '.join(kinds)}{more}", field=field)
    known = [one.name for one in fields(kinds[name])]  # pyright: ignore[reportArgumentType]
    options: dict[str, str] = {}
    for one in said.split(",") if colon else []:
        key, equals, value = one.partition("=")
        if not equals or key not in known or key in options:
            message = f"{field} {name}: {shown(one)} is not KEY=VALUE, each once, of {', '.join(known)}"
            raise InvalidRequest(message, field=field)
        options[key] = value
    return kinds[name], options

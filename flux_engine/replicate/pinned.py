"""What is installed here, as the lines of a requirements file: exact versions, so that a host runs what was tested."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

NAME = "flux-engine"


def python() -> str:
    """The version of Python that these packages run in, as "3.12"."""
    return ".".join(platform.python_version_tuple()[:2])


def from_here() -> bool:
    """Whether the library was installed from a folder or a file, which no other machine has."""
    return _came_from().get("url", "").startswith("file:")


def pins(*, extras: Iterable[str] = (), also: Iterable[str] = ()) -> list[str]:
    """Lines for all that the library needs on Linux, with these extras of it and these packages beside them: itself
    first, the rest by name. What is not installed here is as loose as it was declared."""
    extras = sorted(extras)
    found: dict[str, str] = {}
    waiting = [Requirement(f"{NAME}[{','.join(extras)}]"), *map(Requirement, also)]
    done: set[tuple[str, str]] = set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        for extra in ("", *one.extras):
            if (name, extra) not in done:
                done.add((name, extra))
                waiting += _needed(name, extra)
        if name != NAME:
            found[name] = _line(one, name)
    return [_own(extras), *(found[name] for name in sorted(found))]


def _needed(name: str, extra: str) -> list[Requirement]:
    """What a package says that it needs, on a machine with Linux and this Python."""
    try:
        declared = [Requirement(text) for text in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        return []
    machine = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    environment = {**default_environment(), **machine, "extra": extra}
    needed = [one for one in declared if one.marker is None or one.marker.evaluate(environment)]
    return [one for one in needed if "extra" in str(one.marker)] if extra else needed


def _line(one: Requirement, name: str) -> str:
    try:
        # Without what follows a "+": of torch that is its build, and a host has another one.
        return f"{name}=={Version(metadata.version(name)).public}"
    except metadata.PackageNotFoundError:
        return f"{name}{one.specifier}"


def _own(extras: list[str]) -> str:
    """The library itself: from where it was installed, if that is an address or a repository; else by its version."""
    named = f"{NAME}[{','.join(extras)}]" if extras else NAME
    said = _came_from()
    url, versioned = said.get("url", ""), said.get("vcs_info")
    if versioned and not from_here():
        return f"{named} @ {versioned['vcs']}+{url}@{versioned['commit_id']}"
    if url.startswith("https://"):
        return f"{named} @ {url}"
    return f"{named}=={metadata.version(NAME)}"


def _came_from() -> dict[str, Any]:
    """What the installer says: https://packaging.python.org/en/latest/specifications/direct-url/. Empty if it came from
    an index."""
    return json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "{}")

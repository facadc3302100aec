"""What is remembered of weight files between processes: their SHA-256, and which file a name meant when it was first
fetched. A small JSON file for each, published by rename; losing them costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flux_engine.errors import OutputError
from flux_engine.files import write

log = logging.getLogger(__name__)

REMEMBERED = 2**26
"""Bytes from which on a file is hashed once, and again only when its size or its time of change is another: a
transformer of 24 GB would be read once more at every load."""


@dataclass(frozen=True)
class Pin:
    """What a file of a repository was when it was first fetched."""

    commit: str
    bytes: int
    sha256: str


class Ledger:
    """Kept under a folder; without one nothing is remembered."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def sha256(self, path: Path) -> str:
        """Of a file, from memory where it is large and unchanged."""
        state = path.stat()
        entry = self._entry("digests", str(path.resolve()))
        if state.st_size >= REMEMBERED:
            known = _read(entry)
            same = known.get("bytes") == state.st_size and known.get("mtime_ns") == state.st_mtime_ns
            if same and isinstance(known.get("sha256"), str):
                return known["sha256"]
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if state.st_size >= REMEMBERED:
            _write(entry, {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest})
        return digest

    def pin(self, repository: str, revision: str, file: str) -> Pin | None:
        """What this name meant at first, if it was ever fetched."""
        known = _read(self._entry("pins", repository, revision, file))
        try:
            return Pin(str(known["commit"]), int(known["bytes"]), str(known["sha256"]))
        except (KeyError, TypeError, ValueError):
            return None

    def remember(self, repository: str, revision: str, file: str, pin: Pin) -> None:
        """What a name means from now on."""
        _write(self._entry("pins", repository, revision, file), asdict(pin))

    def _entry(self, kind: str, *names: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / kind / f"{hashlib.sha256('/'.join(names).encode()).hexdigest()[:32]}.json"


def _read(path: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        try:
            write(path, json.dumps(value).encode())
        except OutputError as error:
            log.warning("not remembered: %s", error)

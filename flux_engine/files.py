"""Output files: their format, whether they can be written, and writing them whole or not at all."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import Literal, get_args

from flux_engine.errors import InvalidRequest, OutputError

ImageFormat = Literal["png", "jpg", "webp"]


def image_format(path: Path, asked: str | None) -> ImageFormat:
    """The format to write: the one asked for, else what the file's ending says."""
    name = asked or path.suffix.lstrip(".").lower() or "png"
    name = "jpg" if name == "jpeg" else name
    for known in get_args(ImageFormat):
        if name == known:
            return known
    raise InvalidRequest(
        f"format {name!r} is not one of {', '.join(get_args(ImageFormat))}",
        field="format",
    )


def check_writable(path: Path) -> None:
    """Raise OutputError unless a file can be written at `path`; its folder may be missing. Leaves nothing behind."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give a file name")
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: {folder} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error.strerror}; choose another output") from None


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a neighbouring temporary file is renamed over it. Makes missing folders."""
    check_writable(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)

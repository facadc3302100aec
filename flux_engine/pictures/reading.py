"""Whatever a user sends as a picture, or as a mask."""

from __future__ import annotations

import base64
import functools
import os
import re
import stat
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageChops

from flux_engine.errors import InvalidRequest
from flux_engine.pictures.arrays import MAX_BYTES, Refuse, check_size, of_array, of_tensor
from flux_engine.pictures.decoding import decode, extremes, plain

WAYS = "give a path, a data URI, base64, bytes, an open file, a PIL image or an array"
TOO_MANY_BYTES = f"has more than {MAX_BYTES >> 20} MB, the most that is read: save it smaller"
MAX_PERCENT = 4 * 2**20
"""Most characters of a data URI that is not base64: undoing percent signs is slow."""
BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")
ESCAPED = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
"""What percent signs stand for in base64."""
_LOADING = threading.Lock()
"""A picture that PIL has opened and not read yet is read by one thread at a time: two would leave it half read."""
STARTS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II", b"MM")


def read_picture(value: object, field: str, *, urls: bool = False, paths: bool = True) -> Image.Image:
    """A picture of its own from what a user sent: "RGB", or "RGBA" where some of it is transparent.

    A path, a data URI, bare base64, bytes, an open binary file, a PIL image, an array (H, W) or (H, W, 1|3|4) of
    uint8, uint16, bool or floats in 0..1, or a torch tensor (C, H, W); with `urls` also an http(s) link. Without
    `paths` a text is no path: what strangers send is not to open files here. Turned as its EXIF says, brought to sRGB
    as its profile says; of several frames the first. Raises InvalidRequest, nothing else.
    """
    refuse = functools.partial(_refused, field, f"(a {type(value).__name__})")
    try:
        refuse = functools.partial(_refused, field, _named(value))
        return _picture(value, field, urls, paths, refuse)
    except InvalidRequest:
        raise
    except Exception as error:  # decoders raise of many types, and none that they share
        why = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise refuse(f"cannot be read as a picture: {why}; save it anew as PNG or JPEG") from error


def _refused(field: str, named: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {named} {why}", field=field)


def _named(value: object) -> str:
    """What was sent, in a few words: never its content."""
    if isinstance(value, Image.Image):
        return f"(a PIL image of {value.width}x{value.height})"
    if isinstance(value, np.ndarray):
        return f"(an array of {value.dtype}, shape {value.shape})"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"({memoryview(value).nbytes:,} bytes)"
    if not isinstance(value, str | os.PathLike):
        return f"(a {type(value).__name__})"
    text = value if isinstance(value, str) else str(value)
    if _is_data(text):
        return f"{text[:40].partition(',')[0] + ',...'!r} ({len(text):,} characters)"
    if _scheme(text):
        from flux_engine.guarded import shown

        return shown(text)
    return repr(text) if len(text) <= 100 else f"{text[:40] + '...' + text[-40:]!r} ({len(text):,} characters)"


def _is_data(text: str) -> bool:
    return text[:64].lstrip()[:5].lower() == "data:"


def _scheme(text: str) -> str | None:
    match = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*)://", text[:64])
    return match[1].lower() if match else None


def _picture(value: Any, field: str, urls: bool, paths: bool, refuse: Refuse) -> Image.Image:
    if isinstance(value, Image.Image):
        check_size(value.size, refuse)
        with _LOADING:
            value.load()
        return plain(value.copy(), refuse)
    if isinstance(value, np.ndarray):
        return plain(of_array(value, refuse), refuse)
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        return plain(of_array(of_tensor(value, refuse), refuse), refuse)
    content = _content(value, field, urls, paths, refuse)
    if len(content) > MAX_BYTES:
        raise refuse(TOO_MANY_BYTES)
    return decode(content, refuse)


def _content(value: Any, field: str, urls: bool, paths: bool, refuse: Refuse) -> bytes:
    """The encoded picture; of one that is too large, enough to tell."""
    if isinstance(value, bytes | bytearray | memoryview):
        if memoryview(value).nbytes > MAX_BYTES:
            raise refuse(TOO_MANY_BYTES)
        return bytes(value)
    if isinstance(value, os.PathLike):
        return _of_path(Path(os.fsdecode(value)), refuse)
    if isinstance(value, str):
        return _of_text(value, field, urls, paths, refuse)
    if hasattr(value, "read"):
        return _of_file(value, refuse)
    raise refuse(f"is not a picture: {WAYS}")


def _of_text(text: str, field: str, urls: bool, paths: bool, refuse: Refuse) -> bytes:
    if not text.strip():
        raise refuse(f"is empty: {WAYS}")
    if _is_data(text):
        head, comma, data = text.strip().partition(",")
        if not comma:
            raise refuse("has no comma before its content: write data:image/png;base64,...")
        if head.lower().rstrip().endswith(";base64"):
            return _of_base64(data, refuse)
        if len(data) > MAX_PERCENT:
            raise refuse(f"is longer than the {MAX_PERCENT >> 20} MB that are read with percent signs: send base64")
        return unquote_to_bytes(data)
    scheme = _scheme(text)
    if scheme in ("http", "https"):
        if not urls:
            raise refuse("is a link, fetched only with allow_urls=True: set that, or fetch it and send its bytes")
        from flux_engine.guarded import fetch_picture

        return fetch_picture(text.strip(), field=field, limit=MAX_BYTES)
    if scheme:
        raise refuse(f"is a {scheme}:// link, and only http and https are fetched: send the file's path or bytes")
    if paths and _is_there(text):
        return _of_path(Path(text), refuse)
    if BASE64.fullmatch(text[:4096]):
        content = _of_base64(text, refuse)
        if content.startswith(STARTS) or content[4:8] == b"ftyp":
            return content
        raise refuse(f"is neither a file that is there nor a picture in base64: {WAYS}") from None
    if not paths:
        ways = "a file is named by a path object, and by a text only with local_files=True"
        raise refuse(f"is neither a link, nor a data URI, nor a picture in base64 ({ways})")
    return _of_path(Path(text), refuse)


def _is_there(path: str) -> bool:
    try:
        Path(path).stat()
    except (OSError, ValueError):
        return False
    return True


def _of_base64(text: str, refuse: Refuse) -> bytes:
    """Standard or URL-safe, with or without padding, line breaks and percent signs."""
    if len(text) > 2 * MAX_BYTES:
        raise refuse(TOO_MANY_BYTES)
    if "%" in text:
        for escape, character in ESCAPED.items():
            text = text.replace(escape, character).replace(escape.lower(), character)
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise refuse("is not valid base64: encode the file's bytes with base64.b64encode") from None


def _of_path(path: Path, refuse: Refuse) -> bytes:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise refuse(f"does not exist: {WAYS}") from None
    except OSError as error:
        raise refuse(f"cannot be opened: {error.strerror}") from None
    except ValueError:
        raise refuse(f"is not a path: {WAYS}") from None
    if stat.S_ISDIR(mode):
        raise refuse("is a folder: name a file in it")
    if not stat.S_ISREG(mode):
        raise refuse("is not a file: a device or pipe is not read, send its bytes")
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise refuse(f"cannot be opened: {error.strerror}") from None


def _of_file(file: Any, refuse: Refuse) -> bytes:
    """All of an open file, wherever it stands, and it stands there again."""
    try:
        before = file.tell()
        file.seek(0)
    except (AttributeError, OSError, ValueError):
        before = None  # a stream: what is left of it
    content = bytearray()
    while len(content) <= MAX_BYTES and (piece := file.read(MAX_BYTES + 1 - len(content))):
        if isinstance(piece, str):
            raise refuse('is open as text: open it with "rb"')
        content += piece
    if before is not None:
        file.seek(before)
    return bytes(content)


def flatten(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """RGB: what is transparent shows the background."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def alpha_mask(image: Image.Image) -> Image.Image | None:
    """The mask a picture carries itself: white where it is transparent. None where nothing is."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if extremes(alpha)[0] == 255 else ImageChops.invert(alpha)


def read_mask(value: object, field: str, *, urls: bool = False) -> Image.Image:
    """A mask ("L": white is repainted, black is kept, grey is between) from what `read_picture` takes.

    What is opaque counts by its luminance. Where something is transparent, what is opaque decides:

    - black and white with some white in it is a drawn mask: white is repainted, and nothing drawn is kept;
    - anything else (the picture itself with holes, one colour, all black) says nothing by its colours: the holes are
      repainted, as with OpenAI's edits.

    The same transparency everywhere has no holes: it is a drawn mask.
    """
    image = read_picture(value, field, urls=urls)
    if image.mode == "RGB":
        return image.convert("L")
    low, high = extremes(image.getchannel("A"))
    if low < high and not _is_drawn(image):
        return ImageChops.invert(image.getchannel("A"))
    return flatten(image, (0, 0, 0)).convert("L")


DRAWN = 0.95
"""Share of the opaque pixels of a drawn mask that are black or white; the rest are its soft edges."""


def _is_drawn(image: Image.Image) -> bool:
    """Whether the opaque part is black and white, with some white."""
    bands = np.asarray(image)
    opaque = bands[:, :, 3] >= 128
    darkest, lightest = bands[:, :, :3].min(axis=2), bands[:, :, :3].max(axis=2)
    white = int((opaque & (darkest >= 192)).sum())
    black = int((opaque & (lightest < 64)).sum())
    return white > 0 and white + black >= DRAWN * int(opaque.sum())

"""One safetensors file: its header read strictly, its tensors on demand.

The format is eight bytes of length, a JSON header, and plain arrays (github.com/huggingface/safetensors): nothing in it
can run. The header is read here and not by the safetensors package, so that every way it can be wrong is told by name,
within bounded memory, and so that a tensor can be read into a buffer that is used again.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_engine.errors import WeightsError

MAX_HEADER = 100_000_000
"""Bytes; the safetensors package refuses more as well."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""How torch's .pt, .bin and .ckpt files begin: a pickle, or a zip archive with one inside."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the beginning of the file."""
    end: int


class SafetensorsFile:
    """An open file. Raises WeightsError for one that is missing, truncated, or not what its header says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait
        except FileNotFoundError:
            raise WeightsError(f"{path} does not exist") from None
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
            raise WeightsError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise WeightsError(f"{path} is not a file")
            self._seen = self._state()
            self.tensors, self.metadata = self._header()
        except OSError as error:
            self.close()
            raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
        except BaseException:
            self.close()
            raise
        self._map: mmap.mmap | None = None

    @property
    def bytes(self) -> int:
        return self._seen[0]

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Mapped tensors stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __deepcopy__(self, _: object) -> SafetensorsFile:
        """The same: two would close one descriptor twice, and the second time it may be another's."""
        return self

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Read rows of a tensor into `out`, which is contiguous, on the CPU, of the stored dtype and of their shape."""
        stored = self.tensors[name]
        row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        self._unchanged()
        view = memoryview(out.flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        offset, done = stored.begin + start * row, 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise WeightsError(f"{self.path} cannot be read: {error.strerror}") from None
            if count == 0:
                raise WeightsError(f"{self.path} ended while {name} was read: it was cut short in the meantime")
            done += count

    def mapped(self, name: str) -> Tensor | None:
        """A tensor over the file's own pages, copied where it is written to; None where it does not lie evenly."""
        stored = self.tensors[name]
        if stored.begin % stored.dtype.itemsize or stored.begin == stored.end:
            return None
        self._unchanged()
        if self._map is None:
            self._map = mmap.mmap(self._fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        count = math.prod(stored.shape)
        return torch.frombuffer(self._map, dtype=stored.dtype, count=count, offset=stored.begin).view(stored.shape)

    def _state(self) -> tuple[int, int, int]:
        now = os.fstat(self._fd)
        return now.st_size, now.st_mtime_ns, now.st_ino

    def _unchanged(self) -> None:
        if self._fd < 0:
            raise WeightsError(f"{self.path} is closed")
        if self._state() != self._seen:
            raise WeightsError(f"{self.path} was changed while it was in use: load it again")

    def _header(self) -> tuple[dict[str, Stored], dict[str, str]]:
        size = self._seen[0]
        begin = os.pread(self._fd, 8, 0)
        if len(begin) < 8:
            raise self._not_whole(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", begin)
        if length > min(MAX_HEADER, size - 8):
            if begin.startswith(PICKLES):
                raise WeightsError(
                    f"{self.path} is a pickle, which can run code when it is read: convert it to safetensors, "
                    "in a place where that does no harm"
                )
            if os.pread(self._fd, 1, 8) != b"{":
                raise WeightsError(f"{self.path} is no safetensors file: it begins with {begin!r}")
            raise self._not_whole(f"its first eight bytes say that the header has {length:,} bytes, of {size:,} in all")
        try:
            header = json.loads(os.pread(self._fd, length, 8).decode(), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise self._not_whole(f"its header is not JSON: {str(error)[:80]}") from None
        if not isinstance(header, dict):
            raise self._not_whole("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
            raise self._not_whole("its metadata is not text by name")
        tensors = {name: self._stored(name, said, 8 + length) for name, said in header.items()}
        at = 8 + length
        for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if stored.begin != at:
                raise self._not_whole(f"tensor {_short(name)} overlaps another one, or there is a gap before it")
            at = stored.end
        if at != size:
            raise self._not_whole(f"its tensors end at byte {at:,} of {size:,}")
        return tensors, metadata

    def _stored(self, name: str, said: Any, data: int) -> Stored:
        match said:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end]} if len(said) == 3:
                pass
            case _:
                raise self._not_whole(f"tensor {_short(name)} is not told by dtype, shape and data_offsets")
        if len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end)):
            raise self._not_whole(f"tensor {_short(name)} has shape and offsets {str((shape, begin, end))[:80]}")
        if kind not in DTYPES:
            raise WeightsError(f"{self.path}: tensor {_short(name)} is {kind[:20]}, which is not read here")
        if math.prod(max(1, n) for n in shape) >= 2**48:  # also where a 0 makes it empty: strides overflow
            raise self._not_whole(f"tensor {_short(name)} has the shape {str(shape)[:80]}")
        dtype = DTYPES[kind]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise self._not_whole(f"tensor {_short(name)} of shape {shape} as {kind} is not {end - begin:,} bytes")
        return Stored(dtype, tuple(shape), data + begin, data + end)

    def _not_whole(self, why: str) -> WeightsError:
        return WeightsError(f"{self.path} is not a whole safetensors file ({why}): fetch it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _short(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:120] + "...")

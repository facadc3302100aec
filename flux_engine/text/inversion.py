"""Learned tokens (textual inversion, arXiv 2208.01618) for SDXL's two text encoders, as files keep them.

Replicate's trained models are a tar with `embeddings.pti`, which is a safetensors file, and `special_params.json`: what
stands for the tokens in a prompt. AUTOMATIC1111 and diffusers keep one safetensors file, whose name is the word.
Nothing is unpacked under a name that a tar gives, and nothing is read whose size was not looked at before.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from flux_engine.checkpoints.safetensors_file import PICKLES
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError

EMBEDDINGS, WORDS = "embeddings.pti", "special_params.json"
PTI, ONE_WORD = ("text_encoders_0", "text_encoders_1"), ("clip_l", "clip_g")
"""The tables of both encoders, as Replicate's trained models and as one word's file name them."""
OTHERS = ("lora.safetensors", "unet.safetensors")
"""What such a tar may hold besides, and is not read here."""
SIZES = {EMBEDDINGS: 16 * 2**20, WORDS: 64 * 2**10}
"""Most bytes: 2,048 tokens in float32."""
MAX_MEMBERS = 1_000


@dataclass(frozen=True)
class Inversion:
    """Learned tokens."""

    tables: tuple[Tensor, Tensor] = field(repr=False)
    """(n, D) for each encoder, float32."""
    words: Mapping[str, str]
    """What stands for which of them in a prompt."""
    left_out: tuple[str, ...] = ()
    """Weights that lie beside them and were not read: a LoRA, a UNet."""


def token_names(count: int) -> tuple[str, ...]:
    """How a prompt says them: `<s0>`, `<s1>`, ..."""
    return tuple(f"<s{number}>" for number in range(count))


def read_inversion(path: Path) -> Inversion:
    """A tar, a folder or a file. Raises WeightsError naming what is wrong with it."""
    try:
        if path.is_dir():
            return _folder(path, [entry.name for entry in path.iterdir()])
        if not path.is_file():
            raise WeightsError(f"{path} {'is not a file or a folder' if path.exists() else 'does not exist'}")
        with path.open("rb") as file:
            begin = file.read(512)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        raise WeightsError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if begin[257:262] != b"ustar":
        if begin[8:9] != b"{" and not begin.startswith(PICKLES):
            raise WeightsError(f"{path} is neither a tar that is not compressed nor a safetensors file")
        return _file(path)
    with tempfile.TemporaryDirectory() as folder:
        names = _unpack(path, Path(folder))
        try:
            return _folder(Path(folder), names)
        except WeightsError as error:
            raise WeightsError(str(error).replace(folder, str(path))) from None


def _folder(folder: Path, names: Collection[str]) -> Inversion:
    found = _file(folder / EMBEDDINGS)
    said = _words(folder / WORDS, len(found.tables[0])) if WORDS in names else {}
    return Inversion(found.tables, said, tuple(name for name in OTHERS if name in names))


def _file(path: Path) -> Inversion:
    with WeightSource.open(path) as source:
        if source.files[0].bytes > SIZES[EMBEDDINGS]:
            raise WeightsError(_too_large(path, source.files[0].bytes, EMBEDDINGS))
        names = next((names for names in (PTI, ONE_WORD) if set(names) == set(source.recipes)), None)
        if names is None:
            held = ", ".join(repr(name[:40]) for name in list(source.recipes)[:4]) or "nothing"
            wanted = " or ".join(" and ".join(names) for names in (PTI, ONE_WORD))
            raise WeightsError(f"{path} is no textual inversion for SDXL, which has {wanted}: it holds {held}")
        shapes, kinds = ([getattr(source.recipes[name], what) for name in names] for what in ("shape", "dtype"))
        if any(len(shape) != 2 for shape in shapes) or not shapes[0][0] == shapes[1][0] > 0:
            raise WeightsError(f"{path}: learned tokens are {shapes}, not as many rows for each encoder")
        if not all(kind.is_floating_point for kind in kinds):
            raise WeightsError(f"{path}: learned tokens are whole numbers ({', '.join(map(str, kinds))})")
        first, second = (source.rows(name, dtype=torch.float32, own=True) for name in names)
    words = {} if names == PTI else {path.stem: "".join(token_names(len(first)))}
    _check_words(path, words, len(first))
    return Inversion((first, second), words)


def _words(path: Path, count: int) -> dict[str, str]:
    if not path.is_file():
        raise WeightsError(f"{path} is not a file")
    try:
        if (size := path.stat().st_size) > SIZES[WORDS]:
            raise WeightsError(_too_large(path, size, WORDS))
        said = json.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {str(error)[:80]}") from None
    if not isinstance(said, dict) or not all(isinstance(tokens, str) for tokens in said.values()):
        raise WeightsError(f"{path} is not a JSON object of texts, as {{'TOK': '<s0><s1>'}}: it is {str(said)[:80]}")
    _check_words(path, said, count)
    return said


def _check_words(path: Path, words: Mapping[str, str], count: int) -> None:
    known = token_names(count)
    for word, tokens in words.items():
        said = f"{path}: {word[:40]!r} stands for {tokens[:40]!r}"
        if not word.strip() or not tokens.strip():
            raise WeightsError(f"{said}: neither may be empty")
        if not (word + tokens).isprintable():
            raise WeightsError(f"{said}: these are no words")
        unknown = set(re.findall(r"<s\d+>", tokens)).difference(known)
        if unknown:
            raise WeightsError(f"{said}: there is no {min(unknown)}, only {known[0]} to {known[-1]}")


def _unpack(path: Path, folder: Path) -> list[str]:
    """The two files that are read -> the folder, under their own names; the names of all members, without folders."""
    names: list[str] = []
    try:
        with _Bounded(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                inside = PurePosixPath(member.name)
                if inside.is_absolute() or ".." in inside.parts:
                    raise WeightsError(f"{path}: its member {member.name[:80]!r} leads out of it")
                if not (member.isreg() or member.isdir()):
                    raise WeightsError(f"{path}: its member {member.name[:80]!r} is a link or a device")
                if inside.name in SIZES and member.isreg():
                    if inside.name in names:
                        raise WeightsError(f"{path} holds {inside.name} twice")
                    if not 0 <= member.size <= SIZES[inside.name]:
                        raise WeightsError(_too_large(path / inside.name, member.size, inside.name))
                    content = tar.extractfile(member)
                    assert content is not None
                    with content, (folder / inside.name).open("wb") as out:
                        shutil.copyfileobj(content, out)
                names.append(inside.name)
                if len(names) > MAX_MEMBERS:  # also where a negative size leads back to what was read before
                    raise WeightsError(f"{path} has more than {MAX_MEMBERS:,} members")
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end")
    except (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise WeightsError(f"{path} is not a whole tar: {str(error)[:80]}") from None
    if EMBEDDINGS not in names:
        raise WeightsError(f"{path} has no {EMBEDDINGS}, only {', '.join(names[:8]) or 'nothing'}")
    return names


class _Bounded(io.FileIO):
    """A file that tarfile cannot be made to read into memory whole: a header may claim any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= 2**20:
            raise tarfile.ReadError(f"it claims a header of {size} bytes")
        return super().read(size)


def _too_large(path: Path, size: int, kind: str) -> str:
    return f"{path} has {size:,} bytes; {SIZES[kind]:,} at most are read"

"""Which file of a folder holds its weights, told from the names alone, so that a repository's listing serves as well.

The names are those of diffusers and transformers: `stem.safetensors`, `stem.fp16.safetensors` for a variant, and for
shards an index, `stem.safetensors.index.json` or `stem.safetensors.index.fp16.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from flux_engine.errors import WeightsError

_FILE = re.compile(r"(?P<stem>.+?)(?:\.(?P<variant>\w+))?\.safetensors")
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_index(name: str) -> bool:
    """Whether a file is an index of shards."""
    return _INDEX.fullmatch(name) is not None


def choose(where: object, names: Iterable[str], *, variant: str | None = None, shards: Collection[str] = ()) -> str:
    """The one file, or index of shards, that is meant: of the variant; without one, what has none, if there is such.

    `shards` are known to belong to an index; others are told by their numbers. `where` is for messages.
    Raises WeightsError if there is none, or more than one.
    """
    names = sorted(names)
    found: dict[str, str | None] = {}
    for name in names:
        match = _INDEX.fullmatch(name) or _FILE.fullmatch(name)
        if match and not _SHARD.fullmatch(name) and name not in shards:
            found[name] = match["variant"]
    asked = [name for name, its in found.items() if its == variant]
    candidates = asked or ([] if variant else list(found))
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise WeightsError(f"{where} holds {', '.join(candidates)}: name the one that is meant")
    if found:
        raise WeightsError(f"{where} holds no variant {variant!r}, only {', '.join(found)}")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise WeightsError(
            f"{where} holds no safetensors file, only {', '.join(pickles)}: pickles can run code when they are read "
            "and are refused; convert them to safetensors, in a place where that does no harm"
        )
    raise WeightsError(f"{where} holds no safetensors file")


def placed_by(index: Path) -> dict[str, str]:
    """Tensor -> the file beside the index that has it. Raises WeightsError for what is no index, or names files
    elsewhere."""
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(places.values()))
        plain = all(isinstance(name, str) and Path(name).name == name for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is not an index of shards: {error!r}") from None
    if not files or not plain:
        raise WeightsError(f"{index} is not an index of shards: it names {', '.join(map(str, files))[:200] or 'none'}")
    return places


def shards_of(index: Path) -> list[Path]:
    """The files that an index names. Raises WeightsError as `placed_by` does."""
    return [index.parent / name for name in sorted(set(placed_by(index).values()))]


def weights_in(folder: Path, *, variant: str | None = None) -> Path:
    """The folder's only safetensors file, or its only index; of the variant. Raises WeightsError as `choose` does."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise WeightsError(f"{folder} cannot be read: {error.strerror}") from None
    shards = {shard.name for name in names if is_index(name) for shard in shards_of(folder / name)}
    return folder / choose(folder, names, variant=variant, shards=shards)


def holds_weights(path: Path) -> bool:
    """Whether this is a file, or a folder that has one network's weights in it and not a model's parts in folders."""
    try:
        inside = path.iterdir() if path.is_dir() else ()
        return path.is_file() or any(is_index(one.name) or one.suffix == ".safetensors" for one in inside)
    except (OSError, ValueError):
        return False


def files_of(path: Path) -> tuple[list[Path], dict[str, str]]:
    """What makes up a source, a file, the shards of an index, or what is in a folder; and for shards the name of the
    one that a tensor is to be read from."""
    try:
        folder = path.is_dir()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if folder:
        path = weights_in(path)
    if not is_index(path.name):
        return [path], {}
    places = placed_by(path)
    return [path.parent / name for name in sorted(set(places.values()))], places

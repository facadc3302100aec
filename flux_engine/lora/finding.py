"""What names a LoRA -> the file, with the tokens and the folder that the configuration says."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flux_engine import hub
from flux_engine.config import EngineConfig
from flux_engine.downloads import Limits
from flux_engine.errors import InvalidRequest, UnsupportedError, did_you_mean
from flux_engine.ledger import Ledger
from flux_engine.references import Bare, Reference, Secrets, fetch_reference, parse_reference

Named = str | os.PathLike[str]


@dataclass(frozen=True)
class Found(os.PathLike[str]):
    """A LoRA's file, which can stand for itself in `LoRA.path`."""

    path: Path
    named: str
    """What led to it, without anything secret."""
    tar: Path | None = None
    """The tar that it came in, where that holds learned tokens as well."""

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return self.named


def refer(
    named: Named,
    bare: Bare = "huggingface",
    *,
    local: bool = True,
    field: str = "loras",
) -> Reference:
    """What a name means, without a look at the network; a path object is a path. Names of the library's own LoRAs come
    first. Raises as `parse_reference`."""
    if isinstance(named, os.PathLike):
        return Reference("path", str(Path(named).absolute()))
    word = named.strip() if isinstance(named, str) and re.fullmatch(r"\s*[\w.:-]+\s*", named) else ""
    known = _known() if word else {}
    if word in known:
        if known[word].kind != "lora":
            raise InvalidRequest(f"{field} {word!r} is a {known[word].kind} and no LoRA", field=field)
        return Reference("known", word)
    try:
        return parse_reference(named, bare=bare, local=local, field=field)
    except InvalidRequest:
        near = did_you_mean(word, [name for name, one in known.items() if one.kind == "lora"])
        scaled = re.fullmatch(r"(.+):(-?[\d.]+)", word)
        if scaled:
            near = f": a scale is said as LoRA({scaled[1]!r}, {scaled[2]})"
        if near == ".":
            raise
        raise InvalidRequest(f"{field} {word!r} names no LoRA{near}", field=field) from None


def family_of(reference: Reference) -> str | None:
    """Which models a LoRA is for, as far as that is known without its file."""
    return _known()[reference.name].family if reference.kind == "known" else None


def _known() -> dict[str, hub.Manifest]:
    """What has a name."""
    return hub.manifests(EngineConfig.from_environment().weights)


def finder(
    config: EngineConfig, *, offline: bool = False, field: str = "loras", cancel: threading.Event | None = None
) -> Callable[[Named | Reference], Found]:
    """What finds LoRAs by their names, and fetches those that are not here. `field` is what errors speak of.

    It raises as `fetch_reference`, or UnsupportedError where there is no folder to keep them in.
    """
    secrets = Secrets(config.hf_token, config.civitai_api_token, config.replicate_api_token)
    limits = Limits(folder=config.lora_cache)

    def find(named: Named | Reference) -> Found:
        if isinstance(named, Found):
            return named
        reference = named if isinstance(named, Reference) else refer(named)
        if config.cache is None:
            raise UnsupportedError("LoRAs are kept in a folder, and there is none: set FLUX_ENGINE_CACHE")
        if reference.kind == "known":
            ledger = Ledger(config.cache)
            files = _known()[reference.name].obtain(offline=offline or config.offline, ledger=ledger)
            return Found(files["lora"], reference.name)
        found = fetch_reference(
            reference, folder=config.cache / "loras", secrets=secrets, limits=limits, field=field,
            offline=offline or config.offline, cancel=cancel,
        )  # fmt: skip
        named = reference.name if reference.kind == "path" else reference.describe()
        return Found(found.weights, named, found.tar)

    return find

"""Model names to verified local files.

A model is a manifest, `manifests/NAME.toml`: which spec it is, and for every part its file, or a folder of files. A
file lies beside the manifest, with size and SHA-256, or in a repository of the Hugging Face hub, and is fetched.
The manifests and the demo weights come with the package.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flux_engine.errors import UnknownModel, WeightsError, did_you_mean
from flux_engine.fetch import fetch
from flux_engine.specs import SPECS, ModelSpec

PACKAGED = Path(__file__).parent / "weights"
"""Where a wheel carries `weights/`."""
CHECKED_OUT = Path(__file__).parent.parent / "weights"
"""Where it is in a checkout, and so for an editable install."""


@dataclass(frozen=True)
class WeightFile:
    """One file a model needs, and what makes it that file."""

    path: Path | None
    """Where it is, if it comes with the manifest."""
    repository: str
    file: str
    revision: str
    """Where it is fetched from, if not."""
    bytes: int | None
    sha256: str | None

    def obtain(self, *, offline: bool) -> Path:
        """The file, verified by size and SHA-256 as far as the manifest knows them.

        Raises WeightsError if it is missing or another one, and what `fetch` raises.
        """
        remedy = "install the package again"
        if self.path is None:
            path = fetch(self.repository, self.file, revision=self.revision, offline=offline)
            remedy = "delete it there, so that it is fetched anew"
        elif self.path.is_file():
            path = self.path
        else:
            raise WeightsError(f"{self.path} is missing: {remedy}")
        size = path.stat().st_size
        if self.bytes is not None and size != self.bytes:
            raise WeightsError(f"{path} has {size:,} bytes, not {self.bytes:,}: {remedy}")
        if self.sha256 is not None:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != self.sha256:
                raise WeightsError(
                    f"{path} has SHA-256 {digest[:12]}..., not {self.sha256[:12]}...: it was altered; {remedy}"
                )
        return path


@dataclass(frozen=True)
class Manifest:
    """What a model consists of."""

    name: str
    spec: str
    description: str
    licence: str
    source: str
    files: Mapping[str, WeightFile]
    """Part, or part/file for a part that is a folder -> file."""

    @property
    def bytes(self) -> int | None:
        """Of all files, if the manifest knows."""
        sizes = [file.bytes for file in self.files.values()]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def model_spec(self) -> ModelSpec:
        """The spec, under this model's name. Raises WeightsError if the manifest names one that does not exist."""
        if self.spec not in SPECS:
            raise WeightsError(f"{self.name}: its manifest names the spec {self.spec!r}; known are {', '.join(SPECS)}")
        return replace(SPECS[self.spec], name=self.name)

    def obtain(self, *, offline: bool = False) -> dict[str, Path]:
        """Part -> its file or folder, every file of it there and verified; what is not there is fetched.

        Raises WeightsError, naming the file, or UnknownModel for a repository that does not exist.
        """
        found = {name: file.obtain(offline=offline) for name, file in self.files.items()}
        return {name.partition("/")[0]: path.parent if "/" in name else path for name, path in found.items()}


def weights_folder() -> Path:
    """The `weights` folder that came with the installation."""
    return PACKAGED if PACKAGED.is_dir() else CHECKED_OUT


def manifests(extra: Path | None = None) -> dict[str, Manifest]:
    """Every model by name: the packaged ones, then those under `extra`, which may replace them.

    Raises WeightsError for a manifest that cannot be read.
    """
    found: dict[str, Manifest] = {}
    for folder in (weights_folder(), extra):
        if folder is not None:
            for path in sorted((folder / "manifests").glob("*.toml")):
                manifest = _read(path, folder)
                found[manifest.name] = manifest
    return found


def find(name: str, extra: Path | None = None) -> Manifest:
    """The manifest of a model. Raises UnknownModel with the nearest names."""
    known = manifests(extra)
    if name in known:
        return known[name]
    raise UnknownModel(f"no model {name!r}{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}")


def _read(path: Path, root: Path) -> Manifest:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            name=path.stem,
            spec=data["spec"],
            description=data["description"],
            licence=data["licence"],
            source=data["source"],
            files={name: _file(root, entry, data.get("repository")) for name, entry in data["files"].items()},
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a manifest: {error!r}") from None


def _file(root: Path, entry: Mapping[str, Any], repository: str | None) -> WeightFile:
    if "path" in entry:
        return WeightFile(root / entry["path"], "", "", "", entry["bytes"], entry["sha256"])
    return WeightFile(
        None,
        entry["repository"] if "repository" in entry or repository is None else repository,
        entry["file"],
        entry.get("revision", "main"),
        entry.get("bytes"),
        entry.get("sha256"),
    )

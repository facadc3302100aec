"""Model names to verified local files.

A model is a manifest, `manifests/NAME.toml`: which spec it is, and for every part its file with size and SHA-256, or a
folder of files. The manifests and the demo weights come with the package.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flux_engine.errors import UnknownModel, WeightsError, did_you_mean
from flux_engine.specs import SPECS, ModelSpec

PACKAGED = Path(__file__).parent / "weights"
"""Where a wheel carries `weights/`."""
CHECKED_OUT = Path(__file__).parent.parent / "weights"
"""Where it is in a checkout, and so for an editable install."""


@dataclass(frozen=True)
class WeightFile:
    """One file a model needs, and what makes it that file."""

    path: Path
    bytes: int
    sha256: str


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
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def model_spec(self) -> ModelSpec:
        """The spec, under this model's name. Raises WeightsError if the manifest names one that does not exist."""
        if self.spec not in SPECS:
            raise WeightsError(f"{self.name}: its manifest names the spec {self.spec!r}; known are {', '.join(SPECS)}")
        return replace(SPECS[self.spec], name=self.name)

    def parts(self) -> dict[str, Path]:
        """Part -> its file or folder."""
        return {
            name.partition("/")[0]: file.path.parent if "/" in name else file.path for name, file in self.files.items()
        }

    def verify(self) -> None:
        """Raise WeightsError unless every file is there, whole and unaltered."""
        for name, file in self.files.items():
            if not file.path.is_file():
                raise WeightsError(f"{self.name}: {name} is missing at {file.path}; install the package again")
            size = file.path.stat().st_size
            if size != file.bytes:
                raise WeightsError(
                    f"{self.name}: {file.path} has {size:,} bytes, not {file.bytes:,}; install the package again"
                )
            with file.path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != file.sha256:
                raise WeightsError(
                    f"{self.name}: {file.path} has SHA-256 {digest[:12]}..., not {file.sha256[:12]}...: "
                    "it was altered; install the package again"
                )


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
            files={
                name: WeightFile(root / entry["path"], entry["bytes"], entry["sha256"])
                for name, entry in data["files"].items()
            },
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a manifest: {error!r}") from None

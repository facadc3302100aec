"""Model names to verified local files.

A model is a manifest, `manifests/NAME.toml`: which spec it is, and for every part its file, or a folder of files; what
it does not give it has from its `base`. A file lies beside the manifest, with size and SHA-256, or in a repository of
the Hugging Face hub, and is fetched; what no manifest pins is pinned when it is first fetched.
The manifests and the demo weights come with the package.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flux_engine.errors import UnknownModel, WeightsError, did_you_mean
from flux_engine.fetch import fetch, together
from flux_engine.ledger import Ledger, Pin
from flux_engine.specs import SPECS, ModelSpec

PACKAGED = Path(__file__).parent / "weights"
"""Where a wheel carries `weights/`."""
CHECKED_OUT = Path(__file__).parent.parent / "weights"
"""Where it is in a checkout, and so for an editable install."""
KINDS = ("model", "controlnet", "vae", "lora", "adapter", "annotator", "safety checker")
_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>.+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "kind": str, "family": str, "spec": str, "description": str, "licence": str, "source": str, "repository": str,
    "base": str, "gated": bool, "files": dict, "controls": (list, dict),
}  # fmt: skip
_FILE_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "path": str, "repository": str, "file": str, "revision": str, "sha256": str, "bytes": int,
}  # fmt: skip
"""What a manifest may say, and of which type."""


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

    def obtain(self, *, offline: bool, ledger: Ledger) -> Path:
        """The file, verified by size and SHA-256: the manifest's, or those it had when it was first fetched.

        Raises WeightsError if it is missing or another one, and what `fetch` raises.
        """
        if self.path is None:
            return self._fetched(offline, ledger)
        remedy = "install the package again"
        if not self.path.is_file():
            raise WeightsError(f"{self.path} is missing: {remedy}")
        _verify(self.path, self.bytes, self.sha256, ledger, remedy)
        return self.path

    def _fetched(self, offline: bool, ledger: Ledger) -> Path:
        pin = None if self.sha256 else ledger.pin(self.repository, self.revision, self.file)
        path = fetch(self.repository, self.file, revision=pin.commit if pin else self.revision, offline=offline)
        size, sha256 = (pin.bytes, pin.sha256) if pin else (self.bytes, self.sha256)
        if sha256 is None and _SHA256.fullmatch(path.resolve().name):
            sha256 = path.resolve().name  # the hub's own cache names large files so
        digest = _verify(path, size, sha256, ledger, "delete it there, so that it is fetched anew")
        if pin is None and self.sha256 is None:
            commit = path.parents[len(Path(self.file).parts) - 1].name
            ledger.remember(self.repository, self.revision, self.file, Pin(commit, path.stat().st_size, digest))
        return path


def _verify(path: Path, size: int | None, sha256: str | None, ledger: Ledger, remedy: str) -> str:
    found = path.stat().st_size
    if size is not None and found != size:
        raise WeightsError(f"{path} has {found:,} bytes, not {size:,}: {remedy}")
    digest = ledger.sha256(path)
    if sha256 is not None and digest != sha256:
        raise WeightsError(f"{path} has SHA-256 {digest[:12]}..., not {sha256[:12]}...: it was altered; {remedy}")
    return digest


@dataclass(frozen=True)
class Manifest:
    """What a model, or something that goes with one, consists of."""

    name: str
    kind: str
    family: str
    spec: str
    """Of a ControlNet or adapter, that of the models it was made for."""
    description: str
    licence: str
    source: str
    repository: str
    """The one that is published as this model; empty for what comes with the package."""
    gated: bool
    """Whether the hub asks for an account and a licence that was accepted."""
    files: Mapping[str, WeightFile]
    """Part, or part/file for a part that is a folder -> file."""
    controls: Mapping[str, int | None]
    """Of a ControlNet: kind of control picture -> the mode it is told, None where it knows one kind only."""

    @property
    def bytes(self) -> int | None:
        """Of all files, if the manifest knows."""
        sizes = [file.bytes for file in self.files.values()]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def model_spec(self) -> ModelSpec:
        """The spec, under this model's name.

        Raises UnknownModel for what is no model, WeightsError if the manifest names a spec that does not exist.
        """
        if self.kind != "model":
            raise UnknownModel(f"{self.name} is a {self.kind} and no model: load a model; see `flux-engine models`")
        if self.spec not in SPECS:
            raise WeightsError(f"{self.name}: its manifest names the spec {self.spec!r}; known are {', '.join(SPECS)}")
        return replace(SPECS[self.spec], name=self.name)

    def at(self, revision: str) -> Manifest:
        """The same with another revision of its own repository, of which nothing is known beforehand.

        Raises WeightsError if it is not published in one.
        """
        if not self.repository:
            raise WeightsError(f"{self.name} comes with the package and has no revision {revision!r}")
        files = {
            name: replace(file, revision=revision, bytes=None, sha256=None)
            if file.repository == self.repository
            else file
            for name, file in self.files.items()
        }
        return replace(self, files=files)

    def obtain(
        self, *, offline: bool = False, ledger: Ledger | None = None, only: Collection[str] | None = None
    ) -> dict[str, Path]:
        """Part -> its file or folder, and part/file -> that file; every file there and verified; what is not there is
        fetched. `ledger` remembers what was verified before. `only` names the parts, or files of them, that are wanted.

        Raises WeightsError, naming the file, or UnknownModel for a repository that does not exist.
        """
        ledger = ledger or Ledger()
        wanted = {
            name: file
            for name, file in self.files.items()
            if only is None or name in only or name.partition("/")[0] in only
        }
        calls = {name: partial(file.obtain, offline=offline, ledger=ledger) for name, file in wanted.items()}
        # Several at once where there is something to fetch; the largest first, as the last one to come is waited for.
        far = [] if offline else [name for name, file in wanted.items() if file.path is None]
        far.sort(key=lambda name: -(wanted[name].bytes or 0))
        here = {name: call() for name, call in calls.items() if name not in far}
        came = here | dict(zip(far, together([calls[name] for name in far]), strict=True))
        found = {name: came[name] for name in wanted}
        folders = {name.partition("/")[0]: path.parent for name, path in found.items() if "/" in name}
        return folders | found  # a part that is a file and has a folder as well (for its config) is the file


def weights_folder() -> Path:
    """The `weights` folder that came with the installation."""
    return PACKAGED if PACKAGED.is_dir() else CHECKED_OUT


def manifests(extra: Path | None = None) -> dict[str, Manifest]:
    """Every manifest by name: the packaged ones, then those under `extra`, which may replace them.

    Raises WeightsError for a manifest that cannot be read.
    """
    read: dict[str, tuple[Manifest, str | None]] = {}
    for folder in (weights_folder(), extra):
        if folder is not None:
            try:
                paths = sorted((folder / "manifests").glob("*.toml"))
            except OSError as error:
                raise WeightsError(f"{folder / 'manifests'} cannot be read: {error.strerror}") from None
            for path in paths:
                read[path.stem] = _read(path, folder)
    return {name: replace(manifest, files=_files_of(name, read)) for name, (manifest, _) in read.items()}


@dataclass(frozen=True)
class Repository:
    """A repository of the Hugging Face hub, or one file of it."""

    name: str
    file: str | None


def refer(name: str, known: Mapping[str, Manifest]) -> Manifest | Path | Repository:
    """What a model name stands for: a manifest by its own name or by its repository's; a path; OWNER/NAME or
    OWNER/NAME/FILE on the hub. Nothing is fetched.

    Raises UnknownModel, with the nearest names, for one that can be none of these, WeightsError for a path to nothing.
    """
    if not isinstance(name, str):  # a caller's slip that Python lets pass
        raise UnknownModel(f"a model is named by a text or a path, not by {name!r}")
    if name not in known:
        path = _path(name)
        if name and _lies_here(path):
            return path
        published = [m for m in known.values() if m.kind == "model" and m.repository and m.repository == name]
        if published:
            return published[0]
        match = _REPOSITORY.fullmatch(name)
        if name.startswith((".", "/", "~")) or (name.endswith(".safetensors") and not (match and match["file"])):
            raise WeightsError(f"{path} does not exist")
        if match:
            return Repository(match["repository"], match["file"])
    return find(name, known, more="; or a path, or OWNER/NAME on the Hugging Face hub")


def spec_of(name: str, known: Mapping[str, Manifest]) -> ModelSpec | None:
    """The spec of a model that a manifest tells; of a file or repository the weights have to be looked at: None."""
    meant = refer(name, known)
    return meant.model_spec() if isinstance(meant, Manifest) else None


def find(name: str, known: Mapping[str, Manifest] | None = None, *, more: str = "") -> Manifest:
    """A manifest by its name, of the packaged ones by default.

    Raises UnknownModel with the nearest names; `more` is what else the name might have been.
    """
    known = manifests() if known is None else known
    if name in known:
        return known[name]
    models = [m.name for m in known.values() if m.kind == "model"]
    raise UnknownModel(f"no model {name!r}{did_you_mean(name, known)} Known: {', '.join(models) or 'none'}{more}")


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # of a user who does not exist
        return Path(name)


def _lies_here(path: Path) -> bool:
    """Also a link that leads nowhere."""
    try:
        path.lstat()
    except PermissionError:  # whoever reads it will say so
        return True
    except (OSError, ValueError):  # also a name that is too long for one, or has a zero byte
        return False
    return True


def _files_of(name: str, read: Mapping[str, tuple[Manifest, str | None]]) -> dict[str, WeightFile]:
    """A manifest's own files over those of its base, and of that one's."""
    line: list[str] = []
    here: str | None = name
    while here is not None:
        if here not in read or here in line:
            raise WeightsError(f"the manifest {name} stands on {' on '.join([*line[1:], here])}, which cannot be")
        line.append(here)
        here = read[here][1]
    files: dict[str, WeightFile] = {}
    for step in reversed(line):
        own = read[step][0].files
        replaced = {part.partition("/")[0] for part in own}
        whole = {part for part in own if "/" not in part}
        # A part's weights alone leave the config beside the old ones standing; a folder takes the place of the folder.
        kept = {
            part: file
            for part, file in files.items()
            if (top := part.partition("/")[0]) not in replaced or (top in whole and part == f"{top}/config.json")
        }
        files = kept | dict(own)
    return files


def _read(path: Path, root: Path) -> tuple[Manifest, str | None]:
    """A manifest with its own files only, and the name of its base."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        _check(data, _KEYS)
        repository = data.get("repository", "")
        manifest = Manifest(
            name=path.stem,
            kind=data.get("kind", "model"),
            family=data.get("family", "flux"),
            spec=data["spec"] if data.get("kind", "model") == "model" else data.get("spec", ""),
            description=data["description"],
            licence=data["licence"],
            source=data["source"],
            repository=repository,
            gated=data.get("gated", False),
            files={name: _file(root, name, entry, repository) for name, entry in data["files"].items()},
            controls=_controls(data.get("controls", ())),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a manifest: {error!r}") from None
    if manifest.kind not in KINDS:
        raise WeightsError(f"{path} is not a manifest: kind {manifest.kind!r} is not one of {', '.join(KINDS)}")
    return manifest, data.get("base")


def _controls(said: Any) -> dict[str, int | None]:
    """Kinds in a list, or with their modes in a table."""
    if isinstance(said, dict):
        return {str(kind): int(mode) for kind, mode in said.items()}
    return {str(kind): None for kind in said}


def _check(said: Mapping[str, Any], keys: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise ValueError for a key that is not known, which is mostly one misspelt, and for a value of another type."""
    for key, value in said.items():
        if key not in keys:
            raise ValueError(f"{key} is not one of {', '.join(keys)}{did_you_mean(key, keys)}")
        if not isinstance(value, keys[key]):
            raise ValueError(f"{key} is {value!r}")


def _file(root: Path, name: str, entry: Mapping[str, Any], repository: str) -> WeightFile:
    _check(entry, _FILE_KEYS)
    if "sha256" in entry and not _SHA256.fullmatch(entry["sha256"]):
        raise ValueError(f"sha256 is {entry['sha256']!r}, not 64 digits of a hexadecimal number in small letters")
    if "path" in entry:
        return WeightFile(root / entry["path"], "", "", "", entry.get("bytes"), entry.get("sha256"))
    return WeightFile(
        None,
        entry.get("repository", repository),
        entry.get("file", name),
        entry.get("revision", "main"),
        entry.get("bytes"),
        entry.get("sha256"),
    )

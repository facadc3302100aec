"""A model of 8 bits as a folder: made of any other model, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from flux_engine import hub
from flux_engine.assemble import Model, find_model
from flux_engine.checkpoints.detect import Kind, parts_of, pick
from flux_engine.checkpoints.export import new_folder
from flux_engine.checkpoints.folders import holds_weights
from flux_engine.checkpoints.quantized import Saved, write_quantized
from flux_engine.checkpoints.source import WeightSource
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest, OutputError, WeightsError
from flux_engine.ledger import Ledger
from flux_engine.quantization.policy import POLICIES
from flux_engine.recognition import CONFIGS, PARTS, PLAIN, SAID

CONTROLNETS: tuple[Kind, ...] = ("flux_controlnet", "unet_controlnet")
SAVED = ("int8", "fp8", "fp8-storage")
"""Schemes that a model can be saved in."""


def quantize(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    scheme: str = "int8",
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
) -> Path:
    """Save a model in 8 bits, in a folder that is new or empty; `load` takes the folder, and gives the same bits as
    loading the model with `quantization=scheme`. Memory holds some rows of a tensor at a time.

    `model`, `revision`, `variant` and `offline` are as in `load`. The transformer or UNet and T5 are of 8 bits, the
    rest is written as it is. A ControlNet, by its name or path, is saved alone: `load(controlnets={"canny": folder})`.
    Returns the folder.
    Raises UnknownModel, WeightsError, InvalidRequest for another scheme, or OutputError; then nothing is left of it.
    """
    if scheme not in SAVED:
        raise InvalidRequest(f"scheme {scheme!r} is not one of {', '.join(SAVED)}", field="scheme")
    if not isinstance(folder, str | os.PathLike) or "\0" in str(folder):
        raise OutputError(f"a folder is named by a text or a path, not by {folder!r}")
    config = EngineConfig.from_environment()
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    folder, ledger = Path(folder), Ledger(config.cache)
    controlnet = _controlnet(name, config, offline=offline)
    if controlnet is not None:
        path, kind = controlnet
        with new_folder(folder) as made:
            _write(path, kind, scheme, made / "model.safetensors", ledger, spec=kind)
        return folder
    found = find_model(name, config, revision=revision, variant=variant, offline=offline)
    with new_folder(folder) as made:
        for part, kind in PARTS[found.spec.family].weights.items():
            if part in found.parts:
                _write_part(found, part, kind, scheme, made, ledger)
        for part in PLAIN:
            if part in found.parts:
                shutil.copytree(found.parts[part], made / part)
        for part in CONFIGS:
            if part in found.parts:
                shutil.copyfile(found.parts[part], made / part)
        for said, place in SAID.items():
            if said in found.said:
                (made / place).parent.mkdir(exist_ok=True)
                (made / place).write_text(json.dumps(found.said[said], indent=2) + "\n", encoding="utf-8")
    return folder


def check_source(folder: str | os.PathLike[str], model: str | os.PathLike[str], *, offline: bool = False) -> None:
    """Whether a model that `quantize` saved was made of what `model` is now, by the digests of its files.

    Raises WeightsError if it was not, or is no such model; UnknownModel.
    """
    config = EngineConfig.from_environment()
    name, folder, ledger = os.fspath(model), Path(folder), Ledger(config.cache)
    controlnet = _controlnet(name, config, offline=offline)
    if controlnet is not None:
        pairs = {folder: controlnet[0]}
    else:
        found = find_model(name, config, offline=offline)
        weights = PARTS[found.spec.family].weights
        pairs = {folder / part: found.parts[part] for part in weights if part in found.parts}
    for ours, theirs in pairs.items():
        with WeightSource.open(ours) as source:
            saved = Saved.of(source)
        if saved is None:
            raise WeightsError(f"{ours} was not saved by quantize: nothing says what it was made of")
        digests = _digests(theirs, ledger)
        if sorted(saved.source.values()) != sorted(digests.values()):
            raise WeightsError(
                f"{ours} was made of {_told(saved.source)}, and {name} has {_told(digests)}: quantize it anew"
            )


def _told(digests: Mapping[str, str]) -> str:
    return ", ".join(f"{file} ({digest[:12]})" for file, digest in digests.items()) or "nothing"


def _digests(path: Path, ledger: Ledger) -> dict[str, str]:
    with WeightSource.open(path) as source:
        return {file.path.name: ledger.sha256(file.path) for file in source.files}


def _controlnet(name: str, config: EngineConfig, *, offline: bool) -> tuple[Path, Kind] | None:
    """The file of a ControlNet that is named, and which kind; None for anything else."""
    if not isinstance(name, str):
        return None  # for find_model to refuse, as all that it cannot find
    manifest = hub.manifests(config.weights).get(name)
    if manifest is not None and manifest.kind == "controlnet":
        path = manifest.obtain(offline=offline, ledger=Ledger(config.cache), only=["controlnet"])["controlnet"]
    elif manifest is None and holds_weights(Path(name)):
        path = Path(name)
    else:
        return None
    with WeightSource.open(path) as source:
        kinds = {part.kind for part in parts_of(source)}
    for kind in CONTROLNETS:
        if kind in kinds:
            return path, kind
    return None


def _write_part(model: Model, part: str, kind: Kind, scheme: str, made: Path, ledger: Ledger) -> None:
    width = _width(model, part) if kind == "clip" else None
    file = made / part / "model.safetensors"
    _write(model.parts[part], kind, scheme if kind in POLICIES else "none", file, ledger, spec=model.like, width=width)


def _write(
    path: Path, kind: Kind, scheme: str, file: Path, ledger: Ledger, *, spec: str, width: int | None = None
) -> None:
    with WeightSource.open(path) as opened:
        digests = {file.path.name: ledger.sha256(file.path) for file in opened.files}
        source = pick(opened, kind, width=width)
        write_quantized(source, file, kind=kind, scheme=scheme, spec=spec, digests=digests)


def _width(model: Model, part: str) -> int | None:
    """Of a text encoder's states, which tells it from another one in the same file."""
    try:
        return int(json.loads(model.parts[f"{part}/config.json"].read_text(encoding="utf-8"))["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"the config of {part} cannot be used: {error!r}") from None


def saved_scheme(model: Model) -> str | None:
    """The scheme that a model's network is saved in; None for one that is not of 8 bits."""
    with WeightSource.open(model.parts[PARTS[model.spec.family].network]) as source:
        saved = Saved.of(source)
    return saved.scheme if saved and saved.scheme != "none" else None

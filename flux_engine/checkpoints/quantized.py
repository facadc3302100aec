"""The layout of saved models of 8 bits, and writing it from weights in any other.

A network is one safetensors file under our own names. A linear of 8 bits has its values as `X.weight`, int8 or e4m3,
and the scales of its rows as `X.weight_scale`, float32; all else is as the source stores it. The metadata tells:

    format   "flux-engine-8bit"
    version  "1"
    kind     which network, as in detect.py
    scheme   the scheme that was asked for
    linears  JSON: linear of 8 bits -> its scheme
    spec     the spec that the model has or is like
    source   JSON: file that it was made of -> SHA-256
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flux_engine.checkpoints.safetensors_file import DTYPES
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError
from flux_engine.quantization.linears import BLOCK, SCHEMES, Scheme, quantize_weight
from flux_engine.quantization.policy import POLICIES, Treat, treatment

FORMAT = "flux-engine-8bit"
VERSION = "1"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SCALE = ".weight_scale"


@dataclass(frozen=True)
class Saved:
    """What a file says of itself."""

    kind: str
    scheme: str
    """"none" for a network that is as it was, beside one of 8 bits."""
    spec: str
    linears: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: WeightSource) -> Saved | None:
        """None for weights of another layout. Raises WeightsError for another version, or what contradicts itself."""
        said = source.metadata
        if said.get("format") != FORMAT:
            return None
        if said.get("version") != VERSION:
            raise WeightsError(
                f"{source.path} is in version {said.get('version')} of {FORMAT}, and this reads {VERSION}: quantize "
                "its source anew, or use another flux-engine"
            )
        try:
            saved = cls(
                said["kind"], said["scheme"], said["spec"], json.loads(said["linears"]), json.loads(said["source"])
            )
            if not all(isinstance(digest, str) for digest in saved.source.values()):
                raise ValueError("source has digests that are no texts")
            for linear, scheme in saved.linears.items():
                stored = source.recipes[f"{linear}.weight"].dtype, source.recipes[linear + SCALE].dtype
                if stored != (SCHEMES[scheme].dtype, torch.float32):
                    raise WeightsError(f"{source.path}: {linear} is said to be {scheme}, and is stored in {stored}")
        except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise WeightsError(f"{source.path} does not say of itself what {FORMAT} does: {error!r}") from None
        return saved

    @property
    def treat(self) -> Treat:
        """How every linear is kept."""
        return lambda name: SCHEMES[self.linears[name]] if name in self.linears else None

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT, "version": VERSION, "kind": self.kind, "scheme": self.scheme, "spec": self.spec,
            "linears": json.dumps(self.linears), "source": json.dumps(self.source),
        }  # fmt: skip


def quantized_rows(
    source: WeightSource, name: str, scheme: Scheme, put: Callable[[int, Tensor, Tensor], None], device: torch.device
) -> None:
    """Bring a matrix to 8 bits some rows at a time: `put` gets the first row's number, values and scales.

    They are made from the numbers as they are stored, in float32, and not as the network's other weights are converted:
    so they do not depend on that. Raises WeightsError for a row that is not finite.
    """
    recipe = source.recipes[name]
    count, width = recipe.shape
    step = max(1, BLOCK // (4 * max(1, width)))
    room = torch.empty(min(step, count), width)
    for start in range(0, count, step):
        stop = min(start + step, count)
        rows = source.rows(name, start, stop, dtype=torch.float32, own=True, into=room[: stop - start])
        values, scale = quantize_weight(rows.to(device), scheme, over=True)
        finite = scale.isfinite()
        if not finite.all():
            row = start + int(finite.logical_not().nonzero()[0])
            raise WeightsError(f"{source.path}: row {row} of {recipe.stored} is not finite")
        put(start, values, scale)


def linears_of(source: WeightSource, kind: str, scheme: str) -> dict[str, Scheme]:
    """Which linears of a network are of 8 bits under a scheme, by the names and shapes of its tensors."""
    treat = treatment(kind, scheme) if kind in POLICIES else None
    found: dict[str, Scheme] = {}
    for name, recipe in source.recipes.items():
        linear, _, leaf = name.rpartition(".")
        if treat is None or leaf != "weight" or len(recipe.shape) != 2:
            continue
        try:
            kept = treat(linear)
        except LookupError:  # an embedding
            continue
        if kept is not None:
            found[linear] = kept
    return found


def write_quantized(
    source: WeightSource, path: Path, *, kind: str, scheme: str, spec: str, digests: Mapping[str, str]
) -> None:
    """Write a network in this layout, tensor by tensor: memory holds some rows at a time.

    `source` has it under our names. `digests` are those of its files. Raises WeightsError for weights that are of 8
    bits already, or not finite where they are to be so; OSError.
    """
    if scheme != "none" and Saved.of(source):
        raise WeightsError(f"{source.path} is of 8 bits already: quantize what it was made of")
    linears = linears_of(source, kind, scheme)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, recipe in source.recipes.items():
        linear, _, leaf = name.rpartition(".")
        if leaf == "weight" and linear in linears:
            tensors[name] = (linears[linear].dtype, recipe.shape)
            tensors[linear + SCALE] = (torch.float32, recipe.shape[:1])
        else:
            tensors[name] = (recipe.dtype, recipe.shape)
    saved = Saved(kind, scheme, spec, {name: kept.name for name, kept in linears.items()}, digests)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        places = _begin(file, tensors, saved.metadata)

        def write(name: str, row: int, rows: Tensor) -> None:
            dtype, shape = tensors[name]
            file.seek(places[name] + row * prod(shape[1:]) * dtype.itemsize)
            file.write(rows.contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]

        for name, recipe in source.recipes.items():
            linear, _, leaf = name.rpartition(".")
            if leaf == "weight" and linear in linears:

                def put(row: int, values: Tensor, scale: Tensor, name: str = name, linear: str = linear) -> None:
                    write(name, row, values)
                    write(linear + SCALE, row, scale)

                quantized_rows(source, name, linears[linear], put, torch.device("cpu"))
            else:
                count = recipe.shape[0] if recipe.shape else 1
                step = count if recipe.transposed else BLOCK // max(1, prod(recipe.shape[1:]) * recipe.dtype.itemsize)
                for start in range(0, count, max(1, step)):
                    write(name, start, source.rows(name, start, min(start + max(1, step), count)))
        file.flush()
        os.fsync(file.fileno())


def _begin(
    file: BinaryIO, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> dict[str, int]:
    """Write the header and make the file as long as it will be -> where each tensor begins."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):  # so that each lies evenly
        dtype, shape = tensors[name]
        end = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    begin = 8 + len(text)
    file.truncate(begin + at)
    return {name: begin + said["data_offsets"][0] for name, said in header.items() if name != "__metadata__"}

"""Fill a network from a source: made on the meta device, filled tensor by tensor, strict about names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError

Module = TypeVar("Module", bound=nn.Module)
SHOWN = 8
"""How many names of each kind an error lists."""


def load_module(
    make: Callable[[], Module],
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rename: Callable[[str], str] = lambda name: name,
    tied: Mapping[str, str] | None = None,
) -> Module:
    """Make a network and fill it from `source`.

    `make` builds it; nothing is allocated or initialised while it does. `rename` turns the network's name of a
    parameter into the file's. `tied` maps a parameter to the one whose storage it shares and which alone is stored.
    Raises WeightsError listing every tensor that is missing, left over or of another shape, or for whole numbers; then
    nothing was placed.
    """
    try:
        with torch.device("meta"):
            module = make()
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise WeightsError(f"{source.path}: no network can be made as it is described: {error}") from None
    tied = tied or {}
    wanted = {
        name: (rename(name), tuple(tensor.shape)) for name, tensor in module.state_dict().items() if name not in tied
    }
    _compare(source, dict(wanted.values()))
    for stored, _ in wanted.values():
        kind = source.recipes[stored].dtype
        if not kind.is_floating_point:
            raise WeightsError(
                f"{source.path}: {source.recipes[stored].stored} holds whole numbers ({kind}), which say nothing "
                "without the tool that quantised them: use a file in float32, bfloat16, float16 or float8"
            )
    # Where a CPU computes with it, a tensor has memory of its own: a file may be written over while the engine runs,
    # and a product with one row has other last bits where a tensor does not begin evenly in memory.
    own = device.type == "cpu"
    state = {name: source.rows(stored, dtype=dtype, own=own).to(device) for name, (stored, _) in wanted.items()}
    state |= {name: state[original] for name, original in tied.items()}
    module.load_state_dict(state, strict=True, assign=True)
    for name, original in tied.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, module.get_parameter(original))
    return module.eval().requires_grad_(False)


def differences(source: WeightSource, wanted: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """What does not fit, in the file's own names: tensors missing, unknown, and of another shape."""
    shapes = source.shapes
    there = {name for file in source.files for name in file.tensors}
    return {
        "missing": [
            stored for name in wanted if name not in shapes for stored in source.spell(name) if stored not in there
        ],
        "not known": [source.recipes[name].stored for name in shapes if name not in wanted],
        "of another shape": [
            f"{source.recipes[name].stored} is {list(shapes[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != tuple(shape)
        ],
    }


def _compare(source: WeightSource, wanted: Mapping[str, Sequence[int]]) -> None:
    lines = [
        f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in differences(source, wanted).items()
        if names
    ]
    if lines:
        raise WeightsError(f"{source.path} does not fit the network. Tensors " + "; ".join(lines))

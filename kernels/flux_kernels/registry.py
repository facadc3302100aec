"""The operations of this package as torch's, `torch.ops.flux_kernels.NAME`: one schema, an implementation a device.

`define` is for the module of an op; `implement` is for whoever has it for another device:

    from flux_kernels import ops, registry      # ops defines them all
    registry.implement("layer_norm_modulate", "CPU", function)

torch.library's define and impl are used, and not its custom_op, which costs tens of microseconds more for each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "flux_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(schema: str, *, cuda: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op, with its implementation for CUDA.

    `schema` is its name, arguments and results as torch writes them: "name(Tensor x, float eps) -> Tensor". `fake` has
    the same arguments, which it checks, and returns empty results with the sizes, dtypes and strides of the true ones.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def implement(name: str, key: str, function: Callable[..., Any]) -> None:
    """Implement a defined op for another of torch's dispatch keys, as "CPU". The arguments come as in the schema."""
    _library.impl(name, function, key)

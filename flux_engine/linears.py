"""Linears with what comes before and after them, which a kernel does in one go.

A block says `linear(self.proj, x, residual=h, gate=gate)` and not how: a linear of 8 bits reads tokens of 8 bits, which
whatever makes them can make at once (`Rows`); its sums get their scale, bias, activation and gate before they are
written. Anything else, as a linear with a LoRA beside it, does the same one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from flux_engine import kernels, ops
from flux_engine.quantization.linears import QuantizedLinear


@dataclass(frozen=True)
class Rows:
    """Tokens (B, L, K) in 8 bits."""

    values: Tensor
    """(B L, K), int8."""
    scales: Tensor
    """(B L,), float32."""
    shape: torch.Size
    dtype: torch.dtype


def modulated(layer: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor | Rows:
    """`ops.layer_norm_modulate(x, shift, scale)` as `layer` reads it."""
    if _reads_rows(layer, x):
        if kernels.on_processor(x):
            values, scales = torch.ops.flux_cpu.layer_norm_quantize(x, scale, shift, 1e-6, 1.0)
        else:
            to = layer.scheme.dtype
            values, scales = torch.ops.flux_kernels.layer_norm_modulate_quantize(x, shift, scale, to, 1e-6)
        return Rows(values, scales, x.shape, x.dtype)
    return ops.layer_norm_modulate(x, shift, scale)


def normed(layer: nn.Module, norm: nn.LayerNorm, x: Tensor) -> Tensor | Rows:
    """`norm(x)` as `layer` reads it."""
    if kernels.on_processor(x) and _reads_rows(layer, x):
        values, scales = torch.ops.flux_cpu.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, 0.0)
        return Rows(values, scales, x.shape, x.dtype)
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def geglu(layer: nn.Module, x: Tensor) -> Tensor | Rows:
    """`ops.geglu(x)` as `layer` reads it."""
    if kernels.on_processor(x) and _reads_rows(layer, x):
        shape = torch.Size((*x.shape[:-1], x.shape[-1] // 2))
        values, scales = torch.ops.flux_cpu.geglu_quantize(x)
        return Rows(values, scales, shape, x.dtype)
    return ops.geglu(x)


def linear(
    layer: nn.Module,
    x: Tensor | Rows,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`layer(x)`, or GELU (tanh) of that; then `residual` plus this, or plus `gate` times this.

    x (B, L, K), residual (B, L, N), gate (B, 1, N) -> (B, L, N).
    """
    out = _by_kernel(layer, x, 0 if gelu else None, residual, gate)
    if out is not None:
        return out
    assert isinstance(x, Tensor)
    out = ops.gelu_tanh(layer(x)) if gelu else layer(x)
    if residual is None:
        return out
    return residual + out if gate is None else ops.gated_residual(residual, gate, out)


def linear_and_gelu(layer: nn.Module, x: Tensor | Rows, width: int) -> tuple[Tensor, Tensor]:
    """The first `width` columns of `layer(x)`, a multiple of 16, and GELU (tanh) of the rest."""
    out = _by_kernel(layer, x, width, None, None)
    if out is not None:
        return out[..., :width], out[..., width:]
    assert isinstance(x, Tensor)
    out = layer(x)
    return out[..., :width], ops.gelu_tanh(out[..., width:])


def _by_kernel(
    layer: nn.Module, x: Tensor | Rows, gelu_from: int | None, residual: Tensor | None, gate: Tensor | None
) -> Tensor | None:
    """All of it, or None where there is no kernel that does."""
    if isinstance(x, Tensor) and _reads_rows(layer, x):
        x = Rows(*layer.rows(x), x.shape, x.dtype)
    if isinstance(x, Rows):
        assert isinstance(layer, QuantizedLinear)
        out = layer.product(x.values, x.scales, gelu_from, residual, gate, x.dtype)
    elif type(layer) is nn.Linear and _alone(layer) and kernels.multiplies(x):
        if layer.in_features % 2:
            return None
        out = torch.ops.flux_cpu.bf16_linear(x, layer.weight, layer.bias, gelu_from, residual, gate)
    else:
        return None
    return out.view(*x.shape[:-1], -1)


def _reads_rows(layer: nn.Module, x: Tensor) -> TypeGuard[QuantizedLinear]:
    """Whether a layer multiplies tokens of 8 bits by a kernel: exactly such a linear, with nothing beside it."""
    return type(layer) is QuantizedLinear and _alone(layer) and layer.has_kernel(x)


def _alone(layer: nn.Module) -> bool:
    """Whether nobody listens to what it reads or gives."""
    return not layer._forward_hooks and not layer._forward_pre_hooks

"""Every op, `torch.ops.flux_kernels.NAME`: importing this defines them. Needs no Triton until one runs on a card."""

from __future__ import annotations

from types import ModuleType

from flux_kernels import (
    fp8_linear,
    fp8_storage_linear,
    gated_residual,
    gated_residual_modulate,
    gelu_tanh_quantize,
    group_norm_silu,
    int8_linear,
    layer_norm_modulate,
    layer_norm_modulate_quantize,
    qk_norm_rotary,
    quantize_rows,
)

OPS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        layer_norm_modulate,
        layer_norm_modulate_quantize,
        quantize_rows,
        gelu_tanh_quantize,
        qk_norm_rotary,
        gated_residual,
        gated_residual_modulate,
        group_norm_silu,
        int8_linear,
        fp8_linear,
        fp8_storage_linear,
    )
}
"""Name -> module, which has the op under its name, `reference`, and `empty`."""

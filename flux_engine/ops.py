"""The operations the networks are made of, one signature each.

Shapes: B batch, L tokens, H heads, D width, C channels, h w spatial size.
The torch expressions here are the definition of each op; a faster implementation has to agree with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_engine import kernels

FP16_MAX = 65504.0


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: LayerNorm without weights, then `x * (1 + scale) + shift`.

    x (B, L, D); shift and scale (B, 1, D). Source: DiT (arXiv 2212.09748), eps as in FLUX.
    """
    if kernels.usable(x):
        return torch.ops.flux_cpu.layer_norm(x, scale, shift, 1e-6, 1.0)
    if kernels.on_card("layer_norm_modulate", x):
        return torch.ops.flux_kernels.layer_norm_modulate(x, shift, scale, 1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis. x (B, L, D); weight and bias (D,)."""
    if kernels.usable(x):
        return torch.ops.flux_cpu.layer_norm(x, weight, bias, eps, 0.0)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last axis, eps 1e-6, computed in float32. x (..., D), weight (D,)."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps=1e-6).to(x.dtype)


def rotary_tables(ids: Tensor, axes_dim: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's rotation angles.

    ids (L, A): a position on each of A axes. Returns two float32 tensors (L, sum(axes_dim) / 2), on the device of
    `ids`. Angles are made in float64, because float32 loses digits at large positions.
    Source: RoFormer (arXiv 2104.09864), several axes as in black-forest-labs/flux.
    """
    angles: list[Tensor] = []
    for axis, dim in enumerate(axes_dim):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(ids[:, axis, None].double() * frequency)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last axis. x (B, H, L, D); cos and sin (L, D / 2), float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def qk_norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`rms_norm` and `apply_rotary` of queries and keys. q and k (B, H, L, D), weights (D,)."""
    if kernels.usable(q):
        return torch.ops.flux_cpu.qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, 1e-6)
    if kernels.on_card("qk_norm_rotary", q):
        return torch.ops.flux_kernels.qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, 1e-6)
    return apply_rotary(rms_norm(q, q_weight), cos, sin), apply_rotary(rms_norm(k, k_weight), cos, sin)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`x + gate * update`, kept finite in float16. x and update (B, L, D), gate (B, 1, D).

    The residual stream of FLUX passes 65504, the largest float16: without the clamp it becomes inf and then NaN
    (huggingface/diffusers issue 9096).
    """
    if kernels.usable(x):
        return torch.ops.flux_cpu.gated_residual(x, gate, update)
    if kernels.on_card("gated_residual", x):
        return torch.ops.flux_kernels.gated_residual(x, gate, update)
    out = torch.addcmul(x, gate, update)
    return out.clamp(-FP16_MAX, FP16_MAX) if out.dtype == torch.float16 else out


def add_residual(x: Tensor, residual: Tensor) -> Tensor:
    """`x + residual`, kept finite in float16 as `gated_residual` is. Both (B, L, D)."""
    out = x + residual
    return out.clamp(-FP16_MAX, FP16_MAX) if out.dtype == torch.float16 else out


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, the one FLUX was trained with."""
    return F.gelu(x, approximate="tanh")


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm followed by SiLU. x (B, C, h, w); weight and bias (C,)."""
    if _channels_last(x) and kernels.usable(x):
        return torch.ops.flux_cpu.group_norm(x, groups, weight, bias, eps, True)
    if kernels.on_card("group_norm_silu", x):
        return torch.ops.flux_kernels.group_norm_silu(x, groups, weight, bias, eps)
    return F.silu(F.group_norm(x, groups, weight, bias, eps=eps))


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm. x (B, C, h, w); weight and bias (C,)."""
    if _channels_last(x) and kernels.usable(x):
        return torch.ops.flux_cpu.group_norm(x, groups, weight, bias, eps, False)
    return F.group_norm(x, groups, weight, bias, eps=eps)


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d` of 3 x 3 over x enlarged twice, nearest. x (B, C, h, w), weight (N, C, 3, 3) -> (B, N, 2 h, 2 w).

    Of the nine numbers that a convolution reads there, five are copies of others. So on a processor each of the four
    pixels that come of one is a convolution of 2 x 2, with sums of the weight's rows and columns: 4/9 of the work.
    (On a card convolutions of 3 x 3 are what is fast.)
    """
    if not x.is_cpu or torch.is_grad_enabled():
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    b, _, h, w = x.shape
    out = x.new_empty(b, 2 * h, 2 * w, len(weight)).permute(0, 3, 1, 2)  # channels last
    kernel = weight.float()
    for p, rows in enumerate(_halves(kernel, 2)):
        for q, four in enumerate(_halves(rows, 3)):
            four = four.to(weight.dtype).contiguous(memory_format=torch.channels_last)
            out[:, :, p::2, q::2] = F.conv2d(x, four, bias, padding=1)[:, :, p : p + h, q : q + w]
    return out


def _halves(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """What three numbers along an axis are for the first and the second of two pixels that come of one: two each."""
    a, b, c = kernel.split(1, dim=axis)
    return torch.cat((a, b + c), dim=axis), torch.cat((a + b, c), dim=axis)


def geglu(x: Tensor) -> Tensor:
    """The first half of the last axis times the GELU of the second (arXiv 2002.05202). x (..., 2 D) -> (..., D)."""
    if kernels.usable(x):
        return torch.ops.flux_cpu.geglu(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def sinusoidal_embedding(t: Tensor, dim: int, *, time_factor: float = 1000.0) -> Tensor:
    """Sinusoidal embedding of scalars in [0, 1]. t (B,) -> float32 (B, dim), cosines before sines.

    Source: DDPM (arXiv 2006.11239), with FLUX's time factor of 1000.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = (t.float() * time_factor)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)

"""The kernels for processors: csrc/, called through ctypes, as torch's operations `torch.ops.flux_cpu.NAME`, which
torch.compile knows as well. `why_not()` says why there are none.

They are for bfloat16 and float32, with sums and all that is between in float32; attention and linears without 8 bits
are for bfloat16 alone. What they do row by row they do in the same order whatever the number of rows and threads, so a
token has the same bits in any batch. Shapes: B batch, L tokens, H heads, D width, C channels, M rows, K in, N out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flux_kernels.build import COMMAND, library

DTYPES = (torch.bfloat16, torch.float32)
NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni", "avx512_bf16")
P, FLAG, N = c_void_p, c_int, c_int64
SIGNATURES = {
    "flux_norm": (P, N, P, N, P, N, c_float, N, P, P, P, FLAG, N, N, c_float),
    "flux_quantize": (P, N, FLAG, P, P, FLAG, N, N),
    "flux_geglu": (P, N, P, FLAG, N, N),
    "flux_qk_norm_rotary": (P, P, P, P, P, P, P, P, P, FLAG, N, N, N, N, c_float),
    "flux_gated_residual": (P, N, P, N, P, N, N, P, FLAG, N, N),
    "flux_group_norm": (P, N, P, P, FLAG, P, FLAG, N, N, N, c_float),
    "flux_attention": (P, P, P, P, P, N, N, N, N, N),
    "flux_int8_linear": (P, N, P, P, N, P, P, FLAG, N, P, N, P, N, N, P, N, FLAG, N, N, N),
    "flux_bf16_linear": (P, N, P, N, P, FLAG, N, P, N, P, N, N, P, N, N, N, N),
    "flux_tiles": (FLAG,),
}


@cache
def why_not() -> str | None:
    """Why these kernels cannot run here; None where they can."""
    features = torch.cpu.get_capabilities()
    missing = [name for name in NEEDED if not features.get(name)]
    if missing:
        return f"the processor has no {', '.join(missing)}"
    path = library()
    if not path.exists():
        return f"they are not built: run {COMMAND}"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    return None


def isa(wanted: str | None = None) -> str:
    """What multiplies, "AMX" or "AVX-512": AMX where there is any, unless the other was asked for, as tests do."""
    return "AMX" if _library().flux_tiles(-1 if wanted is None else int(wanted == "AMX")) else "AVX-512"


@cache
def _library() -> ctypes.CDLL:
    reason = why_not()
    if reason:
        raise RuntimeError(f"there are no kernels for this processor: {reason}")
    loaded = ctypes.CDLL(str(library()))
    for name, arguments in SIGNATURES.items():
        getattr(loaded, name).argtypes = arguments
    loaded.flux_attention.restype = c_int
    return loaded


def layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, one: float) -> Tensor:
    """LayerNorm, times (`one` + scale), plus shift. x (B, L, D); scale and shift (B, 1, D) or (D,) -> (B, L, D)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _norm(x, scale, shift, eps, one, out, None, None)
    return out


def layer_norm_quantize(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, one: float
) -> tuple[Tensor, Tensor]:
    """The same -> int8 values (B L, D), scales (B L,)."""
    values, scales = _eight_bits(x, x.shape[-1])
    _norm(x, scale, shift, eps, one, None, values, scales)
    return values, scales


def _norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    one: float,
    out: Tensor | None,
    values: Tensor | None,
    scales: Tensor | None,
) -> None:
    rows = _rows(x)
    shift, shift_stride = _per_batch(shift, x)
    scale, scale_stride = _per_batch(scale, x)
    _library().flux_norm(
        *(rows.data_ptr(), rows.stride(0), _at(shift), shift_stride, _at(scale), scale_stride, one, x.shape[-2]),
        *(_at(out), _at(values), _at(scales), _wide(x), *rows.shape, eps),
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) -> int8 values (M, K), scales (M,)."""
    return _quantized(x, x.shape[-1], geglu=False)


def geglu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., 2 K) -> int8 values (M, K), scales (M,) of its first half times the GELU of the second."""
    return _quantized(x, x.shape[-1] // 2, geglu=True)


def _quantized(x: Tensor, width: int, *, geglu: bool) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    values, scales = _eight_bits(x, width)
    _library().flux_quantize(
        *(rows.data_ptr(), rows.stride(0), int(geglu), values.data_ptr(), scales.data_ptr(), _wide(x)),
        *(len(rows), width),
    )
    return values, scales


def geglu(x: Tensor) -> Tensor:
    """x (..., 2 K) -> (..., K)."""
    rows = _rows(x)
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _library().flux_geglu(rows.data_ptr(), rows.stride(0), out.data_ptr(), _wide(x), len(rows), out.shape[-1])
    return out


def qk_norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """q and k (B, H, L, D) with any strides but of D, weights (D,), cos and sin (L, D / 2) -> the same two,
    (B, H, L, D), whose memory is (B, L, H, D)."""
    batch, heads, length, width = q.shape
    outs = [_by_tokens(q), _by_tokens(k)]
    strides = _strides(q, k, *outs)
    # Each by a name: what is converted has to live until the call is over, and its address does not keep it.
    q_weight, k_weight, cos, sin = q_weight.to(q), k_weight.to(q), cos.contiguous(), sin.contiguous()
    _library().flux_qk_norm_rotary(
        *(q.data_ptr(), k.data_ptr(), strides, q_weight.data_ptr(), k_weight.data_ptr()),
        *(cos.data_ptr(), sin.data_ptr(), outs[0].data_ptr(), outs[1].data_ptr()),
        *(_wide(q), batch, heads, length, width, eps),
    )
    return outs[0], outs[1]


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update. x and update (B, L, D), gate (B, 1, D)."""
    rows, updates = _rows(x), _rows(update.to(x.dtype))
    gates, stride = _per_batch(gate, x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _library().flux_gated_residual(
        *(rows.data_ptr(), rows.stride(0), _at(gates), stride, updates.data_ptr(), updates.stride(0), x.shape[-2]),
        *(out.data_ptr(), _wide(x), *rows.shape),
    )
    return out


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """GroupNorm, and SiLU behind it. x (B, C, h, w), channels last in memory, as is the result."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = weight.to(x), bias.to(x)
    b, c, h, w = x.shape
    out = torch.empty_like(x)
    _library().flux_group_norm(
        *(x.data_ptr(), groups, weight.data_ptr(), bias.data_ptr(), int(silu), out.data_ptr()),
        *(_wide(x), b, c, h * w, eps),
    )
    return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, Lq, D), k and v (B, H, Lk, D), bfloat16, with any strides but of D, which is even -> (B, H, Lq, D),
    whose memory is (B, Lq, H, D)."""
    out = _by_tokens(q)
    short = _library().flux_attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), _strides(q, k, v, out), *q.shape[:3], *k.shape[2:]
    )
    if short:
        raise MemoryError(f"attention over {k.shape[2]} tokens: no memory for keys and values")
    return out


def int8_linear(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu_from: int | None,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """values (M, K) with scales (M,) times weight (N, K) with weight_scale (N,), plus bias (N,); GELU (tanh) of the
    columns from `gelu_from` on; times gate (B, 1, N), plus residual (B, L, N) -> (M, N). K is a multiple of 4."""
    out = values.new_empty((len(values), len(weight)), dtype=dtype)
    after, _alive = _after(out, bias, gelu_from, residual, gate)
    _library().flux_int8_linear(
        *(values.data_ptr(), values.stride(0), scales.data_ptr(), weight.data_ptr(), weight.stride(0)),
        *(weight_scale.data_ptr(), *after, int(dtype is torch.float32), len(values), *weight.shape),
    )
    return out


def bf16_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu_from: int | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """The same of x (..., K) and weight (N, K) in bfloat16 -> (M, N). K is even."""
    rows = _rows(x)
    out = x.new_empty(len(rows), len(weight))
    after, _alive = _after(out, bias, gelu_from, residual, gate)
    _library().flux_bf16_linear(
        *(rows.data_ptr(), rows.stride(0), weight.data_ptr(), weight.stride(0), *after, len(rows), *weight.shape)
    )
    return out


def _after(
    out: Tensor, bias: Tensor | None, gelu_from: int | None, residual: Tensor | None, gate: Tensor | None
) -> tuple[tuple[object, ...], tuple[Tensor | None, ...]]:
    """The arguments of what is done to a product, and the tensors whose addresses they are: these have to live until
    the call is over."""
    if bias is not None and bias.dtype not in (torch.float32, out.dtype):
        bias = bias.to(out.dtype)
    rows = None if residual is None else _rows(residual.to(out.dtype))
    tokens = 1 if residual is None else residual.shape[-2]
    gates, stride = (None, 0) if residual is None else _per_batch(gate, out)
    arguments = (
        *(_at(bias), int(bias is not None and bias.dtype is torch.float32)),
        out.shape[1] if gelu_from is None else gelu_from,
        *(_at(rows), 0 if rows is None else rows.stride(0), _at(gates), stride, tokens, out.data_ptr(), out.stride(0)),
    )
    return arguments, (bias, rows, gates)


def _rows(x: Tensor) -> Tensor:
    """(..., K) as rows evenly spaced, without a copy where they are."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    if x.stride(-1) == 1:
        try:
            return x.view(-1, x.shape[-1])
        except RuntimeError:
            pass
    return x.reshape(-1, x.shape[-1]).contiguous()


def _per_batch(row: Tensor | None, x: Tensor) -> tuple[Tensor | None, int]:
    """(B, 1, D) or (D,) in the dtype of x, and how far apart its rows are."""
    if row is None:
        return None, 0
    row = row.to(x.dtype)
    row = row if row.stride(-1) == 1 else row.contiguous()
    return row, row.stride(0) if row.dim() == 3 and len(row) > 1 else 0


def _by_tokens(x: Tensor) -> Tensor:
    """Room for (B, H, L, D), whose memory is (B, L, H, D): heads are merged without a copy."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _eight_bits(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Room for the tokens of x (..., K) in 8 bits."""
    count = x.numel() // x.shape[-1]
    return x.new_empty((count, width), dtype=torch.int8), x.new_empty(count, dtype=torch.float32)


def _strides(*tensors: Tensor) -> object:
    numbers = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (c_int64 * len(numbers))(*numbers)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _wide(x: Tensor) -> int:
    return int(x.dtype is torch.float32)


def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_NORM = "(Tensor x, Tensor? scale, Tensor? shift, float eps, float one)"
_AFTER = "Tensor? bias, int? gelu_from, Tensor? residual, Tensor? gate"
OPERATIONS: dict[Callable[..., Any], tuple[str, Callable[..., Any]]] = {
    layer_norm: (f"{_NORM} -> Tensor", _like),
    layer_norm_quantize: (f"{_NORM} -> (Tensor, Tensor)", lambda x, *_: _eight_bits(x, x.shape[-1])),
    quantize_rows: ("(Tensor x) -> (Tensor, Tensor)", lambda x: _eight_bits(x, x.shape[-1])),
    geglu_quantize: ("(Tensor x) -> (Tensor, Tensor)", lambda x: _eight_bits(x, x.shape[-1] // 2)),
    geglu: ("(Tensor x) -> Tensor", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2)),
    qk_norm_rotary: (
        "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
        lambda q, k, *_: (_by_tokens(q), _by_tokens(k)),
    ),
    gated_residual: ("(Tensor x, Tensor gate, Tensor update) -> Tensor", _like),
    group_norm: (
        "(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool silu) -> Tensor",
        lambda x, *_: torch.empty_like(x, memory_format=torch.channels_last),
    ),
    attention: ("(Tensor q, Tensor k, Tensor v) -> Tensor", lambda q, *_: _by_tokens(q)),
    int8_linear: (
        f"(Tensor values, Tensor scales, Tensor weight, Tensor weight_scale, {_AFTER}, ScalarType dtype) -> Tensor",
        lambda values, scales, weight, *rest: values.new_empty((values.shape[0], weight.shape[0]), dtype=rest[-1]),
    ),
    bf16_linear: (
        f"(Tensor x, Tensor weight, {_AFTER}) -> Tensor",
        lambda x, weight, *_: x.new_empty(x.numel() // x.shape[-1], weight.shape[0]),
    ),
}
"""Function -> its arguments and results as torch writes them, and what gives empty results of the same sizes."""


def _define() -> torch.library.Library:
    made = torch.library.Library("flux_cpu", "DEF")
    for function, (schema, empty) in OPERATIONS.items():
        name = function.__name__
        layout = torch.Tag.flexible_layout if function is group_norm else torch.Tag.needs_fixed_stride_order
        made.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, layout))
        made.impl(name, function, "CPU")
        torch.library.register_fake(f"flux_cpu::{name}", empty, lib=made)
    return made


_defined = _define()

"""What attention wants of queries and keys: RMSNorm of every head, then the rotation that tells its place.

Sources: arXiv 1910.07467 (RMSNorm), 2104.09864 (rotary embedding), neighbouring pairs as in black-forest-labs/flux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_kernels import arch, checks, registry
from flux_kernels.errors import ArgumentError
from flux_kernels.jit import jit

if TYPE_CHECKING:
    import triton.language as tl

NAME = "qk_norm_rotary"
TOKENS = 16
"""Tokens of a block."""
WIDEST = 512
"""Widest head."""


@jit
def rotated(x, weight, cos, sin, token, batch_stride, head_stride, token_stride, out, mask, L, eps,
            WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Some tokens of one head of one picture, from x to out. cos and sin are of these tokens, (TOKENS, BLOCK / 2)."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    index = tl.arange(0, BLOCK)
    start = x + batch * batch_stride + head * head_stride
    numbers = tl.load(start + token[:, None] * token_stride + index, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight + index, mask=index < WIDTH, other=0.0).to(tl.float32)
    normed = numbers * tl.rsqrt(tl.sum(numbers * numbers, 1) / WIDTH + eps)[:, None] * factor
    even, odd = tl.split(tl.reshape(normed, (TOKENS, BLOCK // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    result = tl.reshape(pairs, (TOKENS, BLOCK))
    rows = ((batch * tl.num_programs(1) + head) * L + token)[:, None] * WIDTH
    tl.store(out + rows + index, result.to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=("L",))
def kernel(
    q, k, q_out, k_out, q_weight, k_weight, cos, sin, L, q_batch, q_head, q_token, k_batch, k_head, k_token,
    cos_token, sin_token, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head for each program of the grid (L / TOKENS, H, B)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    index, pair = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    mask = (token < L)[:, None] & (index < WIDTH)
    pairs = (token < L)[:, None] & (pair < WIDTH // 2)
    cosines = tl.load(cos + token[:, None] * cos_token + pair, mask=pairs, other=0.0)
    sines = tl.load(sin + token[:, None] * sin_token + pair, mask=pairs, other=0.0)
    rotated(q, q_weight, cosines, sines, token, q_batch, q_head, q_token, q_out, mask, L, eps, WIDTH, BLOCK, TOKENS)
    rotated(k, k_weight, cosines, sines, token, k_batch, k_head, k_token, k_out, mask, L, eps, WIDTH, BLOCK, TOKENS)


def reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """q and k (B, H, L, D), weights (D,), cos and sin (L, D / 2), float32 -> q and k (B, H, L, D), contiguous.

    In float32, rounded once.
    """
    return _reference(q, q_weight, cos, sin, eps), _reference(k, k_weight, cos, sin, eps)


def _reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    normed = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pairs.flatten(-2).to(x.dtype).contiguous()


def empty(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Checked, and room for the results. Raises ArgumentError, KernelUnavailable."""
    checks.floating(NAME, "q", q, 4)
    length, width = q.shape[2:]
    if width % 2 or not 0 < width <= WIDEST:
        raise ArgumentError(f"{NAME}: heads of {width}, where even widths up to {WIDEST} are possible")
    checks.fits(NAME, "k", k, q.shape, (q.dtype,), q.device)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        checks.fits(NAME, name, weight, (width,), (q.dtype, torch.float32), q.device)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.fits(NAME, name, table, (length, width // 2), (torch.float32,), q.device)
    arch.require(NAME, q.device, q.dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def qk_norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`reference` by the kernel. q and k may be views of a fused projection: any strides but of the last axis."""
    q_out, k_out = empty(q, k, q_weight, k_weight, cos, sin, eps)
    batch, heads, length, width = q.shape
    kernel.launch(
        (-(-length // TOKENS), heads, batch), q, k, q_out, k_out, q_weight, k_weight, cos, sin, length,
        *q.stride()[:3], *k.stride()[:3], cos.stride(0), sin.stride(0), eps,
        WIDTH=width, BLOCK=1 << (width - 1).bit_length(), TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip
    return q_out, k_out


registry.define(
    f"{NAME}(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps=1e-6) "
    "-> (Tensor, Tensor)",
    cuda=qk_norm_rotary,
    fake=empty,
)

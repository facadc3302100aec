"""Attention behind one signature and one layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_engine import kernels


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask. q, k, v (B, H, L, D) -> (B, H, L, D)."""
    if kernels.multiplies(q) and q.shape[-1] % 2 == 0:
        return torch.ops.flux_cpu.attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)

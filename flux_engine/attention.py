"""Attention behind one signature and one layout."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask. q, k, v (B, H, L, D) -> (B, H, L, D)."""
    return F.scaled_dot_product_attention(q, k, v)

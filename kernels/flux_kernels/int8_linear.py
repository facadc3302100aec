"""A linear of int8: exact sums in int32 by tensor cores, and what comes after (`gemm.After`) before they are stored."""

from __future__ import annotations

import torch

from flux_kernels.gemm import EightBitLinear

NAME = "int8_linear"
int8_linear = EightBitLinear(NAME, torch.int8)
reference, empty = int8_linear.reference, int8_linear.empty

int8_linear.define()

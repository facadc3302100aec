"""A linear of e4m3: sums in float32 by tensor cores, and what comes after (`gemm.After`) before they are stored."""

from __future__ import annotations

import torch

from flux_kernels.gemm import EightBitLinear

NAME = "fp8_linear"
fp8_linear = EightBitLinear(NAME, torch.float8_e4m3fn)
reference, empty = fp8_linear.reference, fp8_linear.empty

fp8_linear.define()

"""Kernels for flux-engine: for CUDA in Triton (README.md beside this package), for processors in C++ (`cpu`).

For CUDA there is one file per op: kernel, checked wrapper, torch `reference`. `flux_kernels.ops` makes them torch's
operations. This package imports torch and triton only, never flux_engine, and this file neither.
"""

from flux_kernels.errors import ArgumentError, KernelUnavailable

__all__ = ["ArgumentError", "KernelUnavailable"]

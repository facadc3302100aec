"""How kernels that have a row for each block are launched."""

from __future__ import annotations


def row_options(width: int) -> dict[str, int]:
    """Compile-time options for rows of `width`: at most 32 numbers in the registers of a thread."""
    block = max(16, 1 << (width - 1).bit_length())
    return {"WIDTH": width, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}

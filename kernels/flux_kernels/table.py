"""The table of kernels and cards in the README beside this package: `python -m flux_kernels.table` writes it anew."""

from __future__ import annotations

from pathlib import Path

import torch

from flux_kernels import arch

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table: python -m flux_kernels.table -->", "<!-- end of table -->"
NAMES = {"mma.sync": "mma", "wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05"}


def table() -> str:
    """Rows are ops, columns are cards; a cell says yes, or which tensor-core instruction, or the number of a reason."""
    reasons: list[str] = []
    heads = [f"{name}<br>{major}.{minor}" for (major, minor), name in arch.CARDS.items()]
    lines = ["| op | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for op in (*arch.NORMS, *arch.QUANTIZING, *arch.PRODUCTS):
        for dtype in arch.LIMITS if op in arch.QUANTIZING else (torch.float16,):
            cells = [_cell(op, dtype, capability, reasons) for capability in arch.CARDS]
            title = f"`{op}`" + (f" to {str(dtype).removeprefix('torch.')}" if op in arch.QUANTIZING else "")
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join((*lines, "", *notes))


def _cell(op: str, dtype: torch.dtype, capability: arch.Capability, reasons: list[str]) -> str:
    refusal = arch.refusal(op, (dtype,), capability)
    if refusal is not None:
        reason = f"{refusal.because}; use {refusal.instead}"
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"
    if op not in arch.PRODUCTS:
        return "yes"
    return " or ".join(NAMES[instruction] for instruction in arch.products(op, capability))


def written(text: str) -> str:
    """The README with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{behind}"


if __name__ == "__main__":
    README.write_text(written(README.read_text()))

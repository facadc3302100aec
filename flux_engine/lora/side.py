"""LoRAs beside a weight instead of in it: x W + (x down) up, where W stays as it is.

That costs two small products a linear, and no rounding: what a weight of 8 bits has lost already it loses but once. The
branch has room for a rank of its own (`RANKS`), so that another LoRA is copied into memory that is there and what was
compiled stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.lora.changes import Change, LowRank
from flux_engine.quantization.linears import QuantizedLinear

RANKS = (16, 32, 48, 64, 96, 128, 192, 256)
"""What a branch may have room for. What is of a higher rank in all is better merged."""
Parts = Sequence[tuple[Change, float]]
"""Changes of one weight, each with its scale."""


class _Branch(nn.Module):
    """Before a linear's own class among the bases of one that has a branch."""

    side_down: Tensor
    """(R, K)."""
    side_up: Tensor
    """(N, R)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        out = super().forward(input)
        narrow = F.linear(input, self.side_down).flatten(0, -2)
        return torch.addmm(out.flatten(0, -2), narrow, self.side_up.t()).view_as(out)


class LinearBeside(_Branch, nn.Linear):
    """A linear with a branch."""


class QuantizedBeside(_Branch, QuantizedLinear):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The same of 8 bits."""


BESIDE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LinearBeside, QuantizedLinear: QuantizedBeside}
PLAIN = {beside: plain for plain, beside in BESIDE.items()}


def is_linear(module: nn.Module) -> bool:
    """Whether a module can have a branch."""
    return type(module) in BESIDE or type(module) in PLAIN


def can_stand_beside(module: nn.Module, change: Change) -> bool:
    """Whether a change of a module's weight can: a low-rank pair, of a linear."""
    return is_linear(module) and change.by_rows


def rank_of(changes: Sequence[Change]) -> int:
    """That they have in all."""
    return sum(change.form.rank or 0 for change in changes)


def reserve(module: nn.Module, rank: int, dtype: torch.dtype, device: torch.device) -> int:
    """Have a branch with room for at least this rank, which adds nothing where it is new -> bytes it takes more.

    A larger one stays. The module is of a class that has the branch from then on; its parameters keep their names.
    """
    room = next(room for room in RANKS if room >= rank)
    if type(module) in PLAIN and len(module.get_buffer("side_down")) >= room:
        return 0
    n, k = module.get_parameter("weight").shape
    before = _bytes(module)
    down = torch.zeros((room, k), dtype=dtype, device=device)
    up = torch.zeros((n, room), dtype=dtype, device=device)
    if type(module) not in PLAIN:
        module.__class__ = BESIDE[type(module)]
    module.register_buffer("side_down", down, persistent=False)
    module.register_buffer("side_up", up, persistent=False)
    return _bytes(module) - before


def fill(module: nn.Module, parts: Parts) -> None:
    """Put these changes, and no others, into the branch that there is."""
    down, up = module.get_buffer("side_down"), module.get_buffer("side_up")
    with torch.no_grad():
        down.zero_()
        up.zero_()
        at = 0
        for change, scale in parts:
            form = change.form
            assert isinstance(form, LowRank)
            ranks = slice(at, at + form.rank)
            at += form.rank
            down[ranks] = form.down.flatten(1).to(down)
            theirs = form.up.flatten(1).float() * (scale * change.factor)
            row = 0
            for start, stop in change.rows or ((0, len(up)),):
                up[start:stop, ranks] = theirs[row : row + stop - start].to(up)
                row += stop - start


def remove(module: nn.Module) -> int:
    """Leave the linear as it was before -> bytes it takes fewer."""
    before = _bytes(module)
    if before:
        del module.side_down, module.side_up
        module.__class__ = PLAIN[type(module)]
    return before


def _bytes(module: nn.Module) -> int:
    """Of its branch."""
    if type(module) not in PLAIN:
        return 0
    return module.get_buffer("side_down").nbytes + module.get_buffer("side_up").nbytes

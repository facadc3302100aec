"""The network of a stage, as the loop asks it: for all rows of the batch or some, with its ControlNets.

Shapes: B rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from flux_engine.families.base import Guide, Stage
from flux_engine.models.layers import BatchRows, Residuals, add_residuals


@dataclass(frozen=True)
class Network:
    """A stage's network, for rows that have these statics."""

    stage: Stage
    statics: Any
    guides: Sequence[Guide] = ()

    def __call__(self, seen: Tensor, call: int) -> Tensor:
        """The prediction for what the schedule gives the network to read, (B, ...) -> (B, ...)."""
        prediction = self.stage.family.net(self.stage.feed(seen), call, self.statics, self.residuals(seen, call))
        # What the network says of tokens that it reads behind the picture's own is of no use.
        return prediction[:, : seen.shape[1]]

    def residuals(self, seen: Tensor, call: int) -> Residuals | None:
        """What the ControlNets add inside of it."""
        return add_residuals([r for guide in self.guides if (r := guide.residuals(seen, call)) is not None]) or None

    def steered(self, call: int) -> tuple[bool, ...]:
        """Which of the ControlNets count at a call."""
        return tuple(guide.counts(call) for guide in self.guides)

    def of(self, rows: BatchRows) -> Network:
        """The same for some of the rows alone."""
        guides = [replace(guide, statics=guide.statics.of(rows)) for guide in self.guides]
        return Network(self.stage, self.statics.of(rows), guides)

"""Of repeated measurements: the middle and how far they lie apart; how a cost grows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flux_engine.errors import InvalidRequest


@dataclass(frozen=True)
class Spread:
    """Where measurements lie."""

    median: float
    low: float
    """The quarter of them that is lowest lies below this."""
    high: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for no values at all."""
        if not values:
            raise ValueError("nothing was measured")
        if len(values) == 1:
            return cls(*([values[0]] * 5), count=1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, min(values), max(values), len(values))

    @property
    def relative(self) -> float:
        """Distance between the quarters, as a share of the median: how noisy it was."""
        return (self.high - self.low) / self.median if self.median else 0.0


def fitted_exponent(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The exponent p and the factor c of `y = c x^p`, by least squares of the logarithms.

    Raises InvalidRequest for fewer than two different points, or one that is not above 0.
    """
    if len(xs) != len(ys) or len(set(xs)) < 2 or min(*xs, *ys) <= 0:
        raise InvalidRequest(
            f"no exponent fits {list(zip(xs, ys, strict=False))}: two different points at least, above 0"
        )
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    over = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    exponent = over / sum((x - mean_a) ** 2 for x in a)
    return exponent, math.exp(mean_b - exponent * mean_a)

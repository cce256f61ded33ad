"""Exponents of curves: the slope of log(cost) over log(x), and what is promised of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Over less than this, rounding of a cost to a fifth of its size hides any slope.
LEAST_SPAN = 10.0


@dataclass(frozen=True)
class SlopeTarget:
    """What is promised of a slope: to be within `tolerance` of `slope`, or with `is_limit` no more than that above."""

    slope: float
    tolerance: float
    is_limit: bool = False

    def __str__(self) -> str:
        if self.is_limit:
            return f"slope <= {self.slope + self.tolerance:g}"
        return f"|slope{f' - {self.slope:g}' if self.slope else ''}| <= {self.tolerance:g}"

    def is_met(self, slope: float) -> bool:
        """Whether a slope keeps it."""
        least = -math.inf if self.is_limit else self.slope - self.tolerance
        return least <= slope <= self.slope + self.tolerance


FLAT, LINEAR, AT_MOST_LINEAR = SlopeTarget(0.0, 0.05), SlopeTarget(1.0, 0.1), SlopeTarget(1.0, 0.05, is_limit=True)


def slope_of(x: Sequence[float], cost: Sequence[float | None]) -> float | None:
    """The slope of log(cost) over log(x), by least squares.

    Args:
        x: positive.
        cost: positive; None or 0 where it was not measured.

    Returns:
        None with fewer than two different x that have a cost.
    """
    pairs = [(a, b) for a, b in zip(x, cost, strict=True) if b]
    if len({a for a, _ in pairs}) < 2:
        return None
    return statistics.linear_regression(
        *([math.log(value) for value in side] for side in zip(*pairs, strict=True))
    ).slope


def is_wide(x: Sequence[float]) -> bool:
    """Whether x spans enough for a verdict on a slope."""
    return max(x) >= LEAST_SPAN * min(x)

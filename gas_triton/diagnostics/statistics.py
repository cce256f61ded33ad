"""Quantiles and groups of numbers that count several times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class Summary:
    """Numbers in short; None for none.

    Attributes:
        count: how many there are.
        mean: their mean.
        quantiles: by share, such as 0.5 for the median: the least number that at least this share does not exceed.
        max: the largest.
    """

    count: int
    mean: float | None
    quantiles: dict[float, float | None]
    max: float | None

    @property
    def median(self) -> float | None:
        """The quantile of 0.5."""
        return self.quantiles[0.5]


def summarize(values: Tensor, counts: Tensor | None = None) -> Summary:
    """A summary of `values` [n], not negative, as float32; each is taken `counts` times (int64, once if None)."""
    counts = torch.ones_like(values, dtype=torch.int64) if counts is None else counts
    total = int(counts.sum())
    if total == 0:
        return Summary(0, None, dict.fromkeys(QUANTILES), None)
    values = torch.where(counts > 0, values, 0).float().abs()
    # The bits of such floats have their order. NumPy sorts integers several times faster than torch sorts pairs.
    keys = values.view(torch.int32).long() << 32 | counts
    ordered = torch.from_numpy(np.sort(keys.cpu().numpy()))
    up_to = (ordered & (2**32 - 1)).cumsum(0)
    shares = torch.tensor([*(share * total for share in QUANTILES), total], dtype=torch.float64)
    # a place in the sorted numbers whose share is reached, rounding aside
    places = torch.searchsorted(up_to.double(), shares - 1e-9)
    *quantiles, largest = (ordered[places] >> 32).int().view(torch.float32).tolist()
    mean = float((values.double() * counts).sum()) / total
    return Summary(total, mean, dict(zip(QUANTILES, quantiles, strict=True)), largest)


@dataclass(frozen=True)
class Group:
    """Rows of about one degree, or of one distance to the border.

    Attributes:
        least: smallest degree or distance.
        most: largest, None without an end.
        count: rows, or pulls of rows.
        error: mean distance to the exact row.
        relative: root of the sum of squares of the distances over that of the exact rows' norms; None if these are 0.
    """

    least: int
    most: int | None
    count: int
    error: float
    relative: float | None


def relative_error(error: Tensor, norm: Tensor, counts: Tensor | None = None) -> float | None:
    """Root of the sum of squares of `error` over that of `norm`; None if that is 0 and the error is not."""
    weight = 1.0 if counts is None else counts
    return _root((error.double().square() * weight).sum().item(), (norm.double().square() * weight).sum().item())


def _root(numerator: float, denominator: float) -> float | None:
    if numerator == 0.0:
        return 0.0
    return (numerator / denominator) ** 0.5 if denominator > 0.0 else None


def grouped(
    key: Tensor, bounds: list[tuple[int, int | None]], error: Tensor, norm: Tensor, counts: Tensor | None = None
) -> list[Group]:
    """Errors by group; groups without rows are left out.

    Args:
        key: int64 [n], the group of every row.
        bounds: (least, most) of every group.
        error: [n].
        norm: [n], of the exact rows.
        counts: int64 [n], how often a row counts; once if None.
    """
    weight = torch.ones_like(key, dtype=torch.float64) if counts is None else counts.double()
    columns = (weight, weight * error, weight * error.square(), weight * norm.square())
    sums = [torch.bincount(key, column, minlength=len(bounds)).tolist() for column in columns]
    return [
        Group(least, most, round(count), total / count, _root(squares, of))
        for (least, most), count, total, squares, of in zip(bounds, *sums, strict=True)
        if count
    ]


def degree_groups(degree: Tensor) -> tuple[Tensor, list[tuple[int, int | None]]]:
    """The group of each degree: 0, 1, 2 to 3, 4 to 7 and so on; and the bounds of the groups."""
    # exact for integers, unlike a logarithm
    key = torch.frexp(degree.double())[1].long()
    bounds: list[tuple[int, int | None]] = [(0, 0)]
    for power in range(int(key.max()) if key.numel() else 0):
        bounds.append((2**power, 2 ** (power + 1) - 1))
    return key, bounds

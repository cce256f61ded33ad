"""Quantiles and groups of numbers that count several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# partial sums of a group, a power of 2
LANES = 4
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


def summarize(values: Sequence[Tensor], counts: Sequence[Tensor | None]) -> list[Summary]:
    """Summaries of several tensors [n] of numbers, as float32, found at once.

    Args:
        values: numbers, not negative where they are taken, finite where they are not.
        counts: int64 [n], how often each of them is taken; once if None.
    """
    rows = torch.stack([value.float() for value in values])
    times = torch.stack([torch.ones_like(rows[0], dtype=torch.int64) if count is None else count for count in counts])
    # The bits of such floats have their order. NumPy sorts integers several times faster than torch sorts pairs.
    keys = rows.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(times)
    ordered = torch.from_numpy(np.sort(keys.cpu().numpy(), axis=1))
    up_to = ordered.bitwise_and(2**32 - 1).cumsum_(1)
    total = up_to[:, -1:]
    # the first place in the sorted numbers whose share is reached, rounding aside
    least = (total * torch.tensor([*QUANTILES, 1.0], dtype=torch.float64) - 1e-9).ceil().long()
    places = torch.searchsorted(up_to, least)
    found = (ordered.gather(1, places) >> 32).int().view(torch.float32)
    sums = (rows.double() * times).sum(1)
    return [
        Summary(count, sum_ / count, dict(zip(QUANTILES, quantiles, strict=True)), largest)
        if count
        else Summary(0, None, dict.fromkeys(QUANTILES), None)
        for count, sum_, (*quantiles, largest) in zip(total[:, 0].tolist(), sums.tolist(), found.tolist(), strict=True)
    ]


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


def _root(numerator: float, denominator: float) -> float | None:
    if numerator == 0.0:
        return 0.0
    return (numerator / denominator) ** 0.5 if denominator > 0.0 else None


def grouped(
    key: Tensor, bounds: list[tuple[int, int | None]], error: Tensor, norm: Tensor, counts: Tensor | None = None
) -> tuple[list[Group], float | None]:
    """Errors by group; groups without rows are left out.

    Args:
        key: int64 [n], the group of every row.
        bounds: (least, most) of every group.
        error: [n].
        norm: [n], of the exact rows.
        counts: int64 [n], how often a row counts; once if None.

    Returns:
        The groups, and of all rows together what `Group.relative` is.
    """
    error, norm = error.double(), norm.double()
    weight = torch.ones_like(error) if counts is None else counts.double()
    columns = (weight, weight * error, weight * error.square(), weight * norm.square())
    # Most rows are often of one group. Additions to one sum wait for each other, those to four sums less.
    key = key * LANES + (torch.arange(key.numel(), device=key.device) & (LANES - 1))
    sums = [
        torch.bincount(key, column, minlength=LANES * len(bounds)).view(-1, LANES).sum(1).tolist() for column in columns
    ]
    groups = [
        Group(least, most, round(count), total / count, _root(squares, of))
        for (least, most), count, total, squares, of in zip(bounds, *sums, strict=True)
        if count
    ]
    return groups, _root(sum(sums[2]), sum(sums[3]))


def degree_groups(degree: Tensor) -> tuple[Tensor, list[tuple[int, int | None]]]:
    """The group of each degree: 0, 1, 2 to 3, 4 to 7 and so on; and the bounds of the groups."""
    # exact for integers, unlike a logarithm
    key = torch.frexp(degree.double())[1].long()
    bounds: list[tuple[int, int | None]] = [(0, 0)]
    for power in range(int(key.max()) if key.numel() else 0):
        bounds.append((2**power, 2 ** (power + 1) - 1))
    return key, bounds

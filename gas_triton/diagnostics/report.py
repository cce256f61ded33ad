"""What `diagnose` found, as a table and as plain data."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gas_triton.diagnostics.gradients import GradientBias
from gas_triton.diagnostics.statistics import Group, Summary
from gas_triton.nn.lipschitz import Lipschitz
from gas_triton.text import table

__all__ = ["Diagnosis", "LayerDiagnosis", "OutputDiagnosis"]


@dataclass(frozen=True)
class LayerDiagnosis:
    """A layer that reads a history. Errors are 2-norms of the distance to the exact row, each pull of a row counts.

    Attributes:
        name: the layer's name in the model.
        place: of the call, from 0.
        width: of the rows.
        dtype: of the history.
        tier: of the history.
        pulls: halo rows that all batches read.
        rows: different rows among them.
        never: the share of pulls that got a row which was never pushed, zeros.
        age: of the pulled rows that were pushed, in pushes to this history (steps).
        error: of pulled rows.
        relative: of pulled rows, relative to the exact row's norm; exact rows of zeros are left out.
        zero_rows: pulls of a row that is exactly zeros.
        relative_error: root of the sum of squares of `error` over that of the exact rows' norms.
        by_degree: pulled rows by their number of edges.
        computed: errors of the layer's input rows when they are computed with histories.
        computed_relative: as `relative_error`.
        by_distance: these by hops from the border of the batch: in-batch edges between the row and the nearest one that
            reads a halo row. At most as many are told apart as layers read histories.
        staleness: largest distance of a pulled row to the same row computed now, the theorem's epsilon.
        lipschitz: constants of the layer.
        behind: Lipschitz constant of what stands between its output and the next layer, apart from residuals.
        is_exact: whether both are exact.
        bound: the largest bound of `computed`, by the recursion of each node.
        theorem: the bound of `computed` by the theorem, with the largest degree; None beyond a float.
    """

    name: str
    place: int
    width: int
    dtype: str
    tier: str
    pulls: int
    rows: int
    never: float
    age: Summary
    error: Summary
    relative: Summary
    zero_rows: int
    relative_error: float | None
    by_degree: list[Group]
    computed: Summary
    computed_relative: float | None
    by_distance: list[Group]
    staleness: float
    lipschitz: Lipschitz
    behind: float
    is_exact: bool
    bound: float | None
    theorem: float | None


@dataclass(frozen=True)
class OutputDiagnosis:
    """The model's output rows, computed with histories.

    Attributes:
        error: distances to the exact rows.
        relative_error: root of the sum of squares of `error` over that of the exact rows' norms.
        by_distance: by hops from the border of the batch.
        bound: upper bounds of the errors, node by node.
        theorem: the bound of Theorem 2, one for all nodes; None beyond a float.
        is_rigorous: whether every constant is exact; otherwise these are estimates of bounds.
    """

    error: Summary
    relative_error: float | None
    by_distance: list[Group]
    bound: Summary
    theorem: float | None
    is_rigorous: bool


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        num_nodes: N.
        num_batches: batches that were run.
        layers: those that read a history, in the order in which they are called.
        output: the model's output.
        gradients: for each parameter, then for all; None if no loss was given.
    """

    num_nodes: int
    num_batches: int
    layers: list[LayerDiagnosis]
    output: OutputDiagnosis
    gradients: list[GradientBias] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; None for numbers that it does not have."""
        return _plain(asdict(self))

    def line(self) -> str:
        """What matters most, in a line."""
        ages = [layer.age.median for layer in self.layers if layer.age.median is not None]
        worst = max(self.layers, key=lambda layer: layer.relative_error or 0.0)
        parts = [
            f"history rows {_percent(worst.relative_error)} off at worst ({worst.name})",
            *([f"{_number(max(ages))} steps old (median)"] if ages else []),
            f"output {_percent(self.output.relative_error)} off",
            f"error {_number(self.output.error.max)} of at most {self._mark(self.output.bound.max)}",
        ]
        if self.gradients is not None:
            parts.append(f"gradient {_percent(self.gradients[-1].difference)} off")
        return ", ".join(parts)

    def table(self, most: int = 12) -> str:
        """Tables for a reader.

        Args:
            most: layers and parameters shown; of more, some in the middle are left out.
        """
        return "\n\n".join(filter(None, [self._layers(most), self._distances(most), self._gradients(most)]))

    def plot(self, file: str | os.PathLike[str], title: str = "") -> None:
        """Draws a figure.

        Args:
            file: a .png, .svg or .pdf.
            title: what was diagnosed.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ValueError: the file is of another kind.
        """
        from gas_triton.diagnostics.figure import plot_diagnosis

        plot_diagnosis(self, Path(file), title)

    def _mark(self, value: float | None) -> str:
        return ("" if self.output.is_rigorous else "~") + _number(value)

    def _layers(self, most: int) -> str:
        header = [
            "layer", "pulls", "age", "max", "never", "pulled off", "median", "99%", "computed off", "k own", "k nbrs",
            "k behind", "error", "bound", "Theorem 2",
        ]  # fmt: skip
        rows = [
            [
                layer.name, str(layer.pulls), _number(layer.age.median), _number(layer.age.max), _percent(layer.never),
                _percent(layer.relative_error), _percent(layer.relative.median),
                _percent(layer.relative.quantiles[0.99]), _percent(layer.computed_relative),
                _constant(layer.lipschitz.own, layer.lipschitz.is_exact),
                _constant(layer.lipschitz.neighbours, layer.lipschitz.is_exact),
                _constant(layer.behind, layer.is_exact or not layer.lipschitz.is_exact), _number(layer.computed.max),
                self._mark(layer.bound), self._mark(layer.theorem),
            ]
            for layer in self.layers
        ]  # fmt: skip
        output = self.output
        last = [
            "output", *[""] * 7, _percent(output.relative_error), "", "", "", _number(output.error.max),
            self._mark(output.bound.max), self._mark(output.theorem),
        ]  # fmt: skip
        lines = [table(header, [*_some(rows, most), last])]
        lines += [
            "pulled off: distance of history rows to the exact rows, relative; computed off: that of rows computed",
            "with them. age: in steps. error: largest distance of a computed row; bound: largest bound, node by node.",
            "k: Lipschitz constants of a layer in a node's own row, in its neighbours', and of what stands behind it.",
        ]
        if not output.is_rigorous:
            lines.append("~: estimated; a Lipschitz constant is not known, and what was seen of it is a lower bound.")
        return "\n".join(lines)

    def _distances(self, most: int) -> str:
        shown = [(layer.name, layer.by_distance, layer.by_degree) for layer in self.layers]
        shown.append(("output", self.output.by_distance, []))
        hops = sorted({(group.least, group.most) for _, groups, _ in shown for group in groups}, key=lambda g: g[0])
        degrees = sorted({(group.least, group.most) for *_, groups in shown for group in groups}, key=lambda g: g[0])
        by_hops = [[name, *_cells(groups, hops)] for name, groups, _ in shown]
        by_degree = [[name, *_cells(groups, degrees)] for name, _, groups in shown[:-1]]
        return "\n\n".join([
            table(["computed rows off, by hops from the border", *map(_range, hops)], _some(by_hops, most)),
            table(["pulled rows off, by degree", *map(_range, degrees)], _some(by_degree, most)),
        ])  # fmt: skip

    def _gradients(self, most: int) -> str:
        if self.gradients is None:
            return ""
        rows = [[g.name, f"{g.norm:.3g}", _percent(g.difference), _cosine(g.cosine)] for g in self.gradients]
        return table(["gradient", "norm", "off", "cosine"], [*_some(rows[:-1], most), rows[-1]])


def _cells(groups: Sequence[Group], bounds: Sequence[tuple[int, int | None]]) -> list[str]:
    found = {(group.least, group.most): group for group in groups}
    return [_percent(found[bound].relative) if bound in found else "" for bound in bounds]


def _range(bounds: tuple[int, int | None]) -> str:
    least, most = bounds
    return f"{least}+" if most is None else (str(least) if least == most else f"{least}-{most}")


def _some(rows: list[list[str]], most: int) -> list[list[str]]:
    if len(rows) <= most:
        return rows
    half = most // 2
    return [*rows[:half], ["..."] + [""] * (len(rows[0]) - 1), *rows[len(rows) - half :]]


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    if 0.0 < share < 1e-5:
        # errors of rounding
        return "<0.001%"
    return f"{100 * share:.2g}%" if 0.0 < share < 0.1 else f"{100 * share:.0f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _constant(value: float, is_exact: bool) -> str:
    return ("" if is_exact else "~") + f"{value:.3g}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""A figure of a diagnosis: errors along the layers, beside what they can be, and where in the graph they are."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gas_triton.diagnostics.statistics import Group
from gas_triton.memory_plot import INK, _pyplot, check_matplotlib

if TYPE_CHECKING:
    from gas_triton.diagnostics.report import Diagnosis

__all__ = ["plot_diagnosis"]

# Okabe and Ito's palette: histories warm, what is computed with them cool, bounds grey.
HISTORY, COMPUTED, BOUND = "#D55E00", "#0072B2", "#666666"
# Layers of which lines are drawn in the panels by distance and degree.
MOST_LINES = 4
# Bounds above this many times the largest error are named, not drawn.
FAR = 1e4


def plot_diagnosis(diagnosis: Diagnosis, file: Path, title: str = "") -> None:
    """Draws four panels: relative errors by layer, errors beside their bounds, errors by distance and by degree.

    Args:
        diagnosis: what to draw.
        file: a .png, .svg or .pdf.
        title: what was diagnosed.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: the file is of another kind.
    """
    check_matplotlib(file)
    figure_class, ticker = _pyplot()
    figure = figure_class(figsize=(14.0, 10.2), dpi=130)
    axes = figure.subplots(2, 2)
    _errors(axes[0][0], diagnosis)
    _bounds(axes[0][1], diagnosis)
    layers = [(layer.name, layer.by_distance) for layer in diagnosis.layers if _is_off(layer.by_distance)]
    shown = [*_some(layers, MOST_LINES - 1), ("output", diagnosis.output.by_distance)]
    _groups(axes[1][0], shown, COMPUTED, "hops from the border of the batch", "Rows computed with histories")
    _groups(
        axes[1][1], _some([(layer.name, layer.by_degree) for layer in diagnosis.layers], MOST_LINES), HISTORY,
        "edges of the node", "Rows in histories",
    )  # fmt: skip
    for axis in axes.flat:
        axis.tick_params(labelsize=11, colors=INK)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in (axes[0][0], *axes[1]):
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    figure.text(
        0.02, 0.975, textwrap.fill(_finding(diagnosis), 105), fontsize=17, fontweight="bold", color=INK, va="top"
    )
    note = f"{diagnosis.num_nodes:,} nodes in {diagnosis.num_batches} batches, each with its halo from the histories"
    figure.text(0.02, 0.9, "; ".join(filter(None, [title, note])), fontsize=12, color="#666666", va="top")
    figure.subplots_adjust(left=0.07, right=0.97, top=0.82, bottom=0.07, wspace=0.2, hspace=0.36)
    figure.savefig(file)


def _errors(axis: Any, diagnosis: Diagnosis) -> None:
    names = [layer.name for layer in diagnosis.layers]
    at = range(len(names))

    def line(values: Sequence[float | None]) -> list[float]:
        return [float("nan") if value is None else value for value in values]

    low, middle, high = (
        line([layer.relative.quantiles[share] for layer in diagnosis.layers]) for share in (0.25, 0.5, 0.9)
    )
    axis.fill_between(at, low, high, color=HISTORY, alpha=0.18, linewidth=0)
    if len(names) < 4:
        # a band of one layer has no width
        axis.vlines(at, low, high, color=HISTORY, alpha=0.35, linewidth=6)
    marker = "o" if len(names) < 20 else None
    axis.plot(
        at,
        middle,
        color=HISTORY,
        marker=marker,
        label="in histories: median, and from 25% to 90% of them",
        linewidth=2.5,
    )
    computed = line([*(layer.computed_relative for layer in diagnosis.layers), diagnosis.output.relative_error])
    axis.plot(
        range(len(computed)), computed, color=COMPUTED, marker=marker or ".", label="computed with them", linewidth=2
    )
    _name_layers(axis, [*names, "output"])
    # room above the lines
    axis.margins(y=0.3)
    axis.legend(loc="upper left", frameon=False, fontsize=11, labelcolor=INK)
    _label(axis, "Distance to the exact rows, relative", "layer whose input the rows are")


def _bounds(axis: Any, diagnosis: Diagnosis) -> None:
    parts: list[Any] = [*diagnosis.layers]
    output = diagnosis.output
    error = [*(part.computed.max for part in parts), output.error.max]
    bound = [*(part.bound for part in parts), output.bound.max]
    theorem = [*(part.theorem for part in parts), output.theorem]
    # errors of rounding would spread the axis over what nobody asks for
    largest = max((value for value in bound if value), default=1.0)
    is_rigorous = "" if output.is_rigorous else ", estimated"
    lines = [
        (error, "largest error measured", COMPUTED, "o-"),
        (bound, f"bound, node by node{is_rigorous}", BOUND, "^--"),
        (theorem, f"bound of Theorem 2{is_rigorous}", BOUND, "s:"),
    ]
    size = 8 if len(parts) < 20 else 3
    beyond = 0
    for values, label, color, style in lines:
        places = [place for place, value in enumerate(values) if value and value > 1e-6 * largest]
        drawn = [place for place in places if values[place] <= FAR * largest]
        beyond += len(places) - len(drawn) + sum(value is None for value in values)
        axis.plot(
            drawn, [values[place] for place in drawn], style, color=color, markersize=size, label=label, linewidth=2
        )
    axis.set_yscale("log")
    if beyond:
        axis.plot([], [], " ", label=f"(Theorem 2 of the output: {_big(output.theorem)})")
    _name_layers(axis, [*(part.name for part in parts), "output"])
    axis.legend(frameon=False, fontsize=11, labelcolor=INK)
    _label(axis, "Largest distance of a computed row, and what it can be", "layer whose input the rows are")


def _groups(axis: Any, lines: Sequence[tuple[str, Sequence[Group]]], color: str, label: str, title: str) -> None:
    bounds = sorted({(g.least, g.most) for _, groups in lines for g in groups}, key=lambda bound: bound[0])
    for number, (name, groups) in enumerate(lines):
        points = [(bounds.index((g.least, g.most)), g.relative) for g in groups if g.relative is not None]
        if points:
            strength = 0.3 + 0.7 * (number + 1) / len(lines)
            axis.plot(*zip(*points, strict=True), color=color, alpha=strength, marker="o", label=name, linewidth=2)
    axis.set_xticks(range(len(bounds)))
    # names of many ranges would touch each other
    axis.set_xticklabels([_range(*bound) if len(bounds) < 7 else f"{bound[0]}–" for bound in bounds])
    if lines:
        # room above the lines
        axis.margins(y=0.12 + 0.12 * -(-len(lines) // 2))
        axis.legend(loc="upper right", ncols=2, frameon=False, fontsize=11, labelcolor=INK)
    _label(axis, f"{title}: distance to the exact rows, relative", label)


def _name_layers(axis: Any, names: Sequence[str]) -> None:
    step = -(-len(names) // 8)
    chosen = sorted({*range(0, len(names) - step // 2, step), len(names) - 1})
    axis.set_xticks(chosen)
    axis.set_xticklabels([_short(names[place]) for place in chosen])
    axis.set_xlim(-0.3 - 0.01 * len(names), len(names) - 0.7 + 0.01 * len(names))


def _short(name: str) -> str:
    return name if len(name) < 12 else "…" + name[-10:]


def _label(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, fontsize=13, color=INK, loc="left")
    axis.set_xlabel(below, fontsize=12, color=INK)


def _range(least: int, most: int | None) -> str:
    return f"{least}+" if most is None else (f"{least}" if least == most else f"{least}–{most}")


def _is_off(groups: Sequence[Group]) -> bool:
    return any(group.error > 0.0 for group in groups)


def _some(items: list[Any], most: int) -> list[Any]:
    """At most so many of them, the first and the last included."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _big(value: float | None) -> str:
    return "beyond a float" if value is None else f"{value:.2g}"


def _finding(diagnosis: Diagnosis) -> str:
    output, worst = diagnosis.output, max(diagnosis.layers, key=lambda layer: layer.relative_error or 0.0)
    off = f"Rows in histories are up to {_percent(worst.relative_error)} off"
    off += f", the output {_percent(output.relative_error)}"
    if not output.error.max or not output.bound.max:
        return off
    kind = "bound" if output.is_rigorous else "estimated bound"
    return f"{off}; its largest error is {_percent(output.error.max / output.bound.max)} of its {kind}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2g}%"

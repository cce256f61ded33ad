"""A figure of `compare_memory`: bytes of a step by depth, a line for each way."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gas_triton.errors import MissingPackageError
from gas_triton.text import readable

if TYPE_CHECKING:
    from gas_triton.memory_table import Row

__all__ = ["check_matplotlib", "plot_memory"]

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's palette, which colour-blind readers tell apart: histories warm and strong, baselines cool.
STYLES: dict[str, tuple[str, str, float]] = {
    "full-pyg": ("#000000", "D", 2.0),
    "full": ("#0072B2", "s", 2.0),
    "sampling": ("#CC79A7", "^", 2.0),
    "pinned": ("#B87A00", "o", 3.0),
    "pinned-in-place": ("#8C6D00", "P", 2.0),
    "histories": ("#D55E00", "o", 3.0),
    "cluster": ("#009E73", "v", 2.0),
}
# More than this between the largest and the smallest, and a linear axis would show the large ones only.
LOG_FROM = 12.0
INK = "#333333"


def check_matplotlib(file: Path) -> None:
    """Raises MissingPackageError without matplotlib, and ValueError for a file of another kind."""
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"plot: expected a file that ends in {', '.join(SUFFIXES)}, got {file}")
    _pyplot()


def _pyplot() -> tuple[Any, Any]:
    try:
        figure = importlib.import_module("matplotlib.figure")
        return figure.Figure, importlib.import_module("matplotlib.ticker")
    except ImportError as error:
        raise MissingPackageError(f"plot needs matplotlib ({error}): pip install 'gas-triton[plot]'") from error


def plot_memory(rows: Sequence[Row], file: Path, subtitle: str = "") -> None:
    """Draws the memory of a step over the number of layers, a panel for each model and width.

    Of several batch sizes, the first is drawn.

    Args:
        rows: of `compare_memory`.
        file: a .png, .svg or .pdf.
        subtitle: what the rows were measured on.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: no row was measured, or the file is of another kind.
    """
    check_matplotlib(file)
    figure_class, ticker = _pyplot()
    measured = [row for row in rows if row.step_bytes]
    if not measured:
        raise ValueError("rows: expected at least one that was measured, got none")
    size = next((row.batch_size for row in measured if row.batch_size is not None), None)
    shown = [row for row in measured if row.batch_size in (None, size)]
    panels = list(dict.fromkeys((row.model, row.hidden) for row in shown))
    # wide enough for the names of the ways beside the lines of every panel
    inches = 1.0 + 8.6 * len(panels)
    figure = figure_class(figsize=(inches, 6.2), dpi=150)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    is_log = max(row.step_bytes or 0 for row in shown) > LOG_FROM * min(row.step_bytes or 0 for row in shown)
    unit, name = (2**20, "MiB") if is_log else _unit(max(row.step_bytes or 0 for row in shown))
    values = [(row.step_bytes or 0) / unit for row in shown]
    for axis, (model, width) in zip(axes, panels, strict=True):
        axis.set_yscale("log" if is_log else "linear")
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        if is_log:
            axis.set_ylim(min(values) / 1.5, max(values) * 1.6)
        else:
            axis.set_ylim(0, max(values) * 1.1)
        _draw(axis, [row for row in shown if (row.model, row.hidden) == (model, width)], unit)
        if len(panels) > 1:
            axis.set_title(f"{model}, {width} wide", fontsize=14, color=INK, loc="left")
    axes[0].set_ylabel(f"peak of a training step, {name}{' (log scale)' if is_log else ''}", fontsize=14, color=INK)
    last = [row for row in shown if (row.model, row.hidden) == panels[-1]]
    of = f" ({last[0].model}, {last[0].hidden} wide)" if len(panels) > 1 else ""
    title = textwrap.fill(_finding(last) + of, 22 + 36 * len(panels))
    figure.text(0.02, 0.97, title, fontsize=18, fontweight="bold", color=INK, va="top", linespacing=1.2)
    share = _share_note(last, of)
    one = f"{panels[0][0]}, {panels[0][1]} wide; " if len(panels) == 1 else ""
    cut = f"{shown[0].num_parts} clusters, {size} a batch" if size is not None else ""
    note = "; ".join(filter(None, [subtitle, f"{one}{cut}"])) + (f"\n{share}" if share else "")
    below = 0.85 if "\n" in title else 0.9
    figure.text(0.02, below, note, fontsize=12, color="#666666", va="top", linespacing=1.5)
    figure.subplots_adjust(left=0.8 / inches + 0.02, right=0.98, top=0.72, bottom=0.12, wspace=0.05)
    figure.savefig(file)


def _draw(axis: Any, rows: Sequence[Row], unit: int) -> None:
    """Lines with their names at the right end, moved apart where they would overlap."""
    from gas_triton.memory_table import WAYS

    depths = sorted({row.layers for row in rows})
    ends: list[tuple[float, str, str]] = []
    for way, (color, marker, line_width) in STYLES.items():
        line = sorted((row.layers, (row.step_bytes or 0) / unit) for row in rows if row.way == way)
        if not line:
            continue
        axis.plot(
            *zip(*line, strict=True), color=color, marker=marker, markersize=8, linewidth=line_width, clip_on=False
        )
        ends.append((line[-1][1], f"{WAYS[way]}  {readable(line[-1][1] * unit)}", color))
    axis.set_xticks(depths)
    span = max(depths) - min(depths) or 1
    left, right = min(depths) - 0.08 * span, max(depths) + 0.95 * span
    axis.set_xlim(left, right)
    middle = ((min(depths) + max(depths)) / 2 - left) / (right - left)
    axis.set_xlabel("layers", fontsize=14, color=INK, x=middle, ha="center")
    axis.tick_params(labelsize=13, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_bounds(min(depths), max(depths))
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.figure.canvas.draw()
    to_place = axis.transData + axis.transAxes.inverted()
    places = _apart([to_place.transform((0, end[0]))[1] for end in ends], 0.062)
    start = to_place.transform((max(depths) + 0.05 * span, 1))[0]
    for (_, text, color), place in zip(ends, places, strict=True):
        axis.text(
            start, place, text, transform=axis.transAxes, fontsize=13, color=color, va="center", fontweight="bold"
        )


def _apart(places: list[float], gap: float) -> list[float]:
    """The places moved as little as a sweep from below and one from above need to keep `gap` between any two."""
    order = sorted(range(len(places)), key=places.__getitem__)
    out = list(places)
    for _ in range(200):
        for below, above in pairwise(order):
            overlap = gap - (out[above] - out[below])
            if overlap > 1e-6:
                out[below] -= overlap / 2
                out[above] += overlap / 2
    return out


def _unit(nbytes: int) -> tuple[int, str]:
    return (2**30, "GiB") if nbytes >= 2**30 else (2**20, "MiB")


def _finding(rows: Sequence[Row]) -> str:
    """What a panel shows, at its deepest model."""
    deepest = max(row.layers for row in rows)
    last = {row.way: row for row in rows if row.layers == deepest}
    ours = last.get("histories") or last.get("pinned")
    theirs = last.get("full-pyg") or last.get("full")
    if ours is None or theirs is None or not ours.step_bytes or not theirs.step_bytes:
        return "Memory of a training step"
    ratio = theirs.step_bytes / ours.step_bytes
    whose = "PyG's full-batch" if theirs.way == "full-pyg" else "full-batch"
    own = last.get("full")
    also = ""
    if theirs.way == "full-pyg" and own is not None and own.step_bytes:
        also = f", {own.step_bytes / ours.step_bytes:.3g} times less than ours"
    return f"With histories, a {deepest}-layer step takes {ratio:.3g} times less memory than {whose}{also}"


def _share_note(rows: Sequence[Row], of: str) -> str:
    """The share of the data that each way uses, at the deepest model of a panel."""
    from gas_triton.memory_table import WAYS

    deepest = max(row.layers for row in rows)
    parts = [
        f"{WAYS[row.way]} {row.edges_used:.0%}"
        for row in rows
        if row.layers == deepest and row.way in ("histories", "cluster", "sampling") and row.edges_used is not None
    ]
    return f"edges of the receptive field used, {deepest} layers{of}: {', '.join(parts)}" if parts else ""

"""Figures of results.

python -m bench.plots bench/results/FILE.json                the scale curves of a file, beside it
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import records
from bench.groups import Row
from bench.slopes import FLAT, slope_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which all readers can tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "#666666"
STYLE = {
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "gas_triton",
}  # fmt: skip


class Line(NamedTuple):
    """One curve: the column that it shows, in which unit of the axis, and how."""

    label: str
    way: str
    column: str
    factor: float
    color: str
    is_dashed: bool = False


class Panel(NamedTuple):
    """Lines over one thing, in seconds or bytes."""

    curve: str
    x_label: str
    unit: str
    lines: Sequence[Line]


def missing() -> str | None:
    """Why nothing can be drawn; None if it can."""
    found = importlib.util.find_spec("matplotlib") is not None
    return None if found else "needs matplotlib: pip install 'gas-triton[plot]'"


def panels(rows: Sequence[Row]) -> list[tuple[str, Panel]]:
    """The panels of the scale curves with their titles, which say what was found."""
    ways = {curve: _ways(rows, curve) for curve in ("nodes", "features", "batch_nodes")}

    def time(curve: str) -> list[Line]:
        way = ways[curve][0]
        return [Line("epoch", way, "epoch_s", 1.0, ORANGE), Line("step", way, "ms", 1e-3, BLUE)]

    others = [
        Line(f"step, {way}", way, "ms", 1e-3, color, True)
        for way, color in zip(ways["nodes"][1:], (GREY, GREEN), strict=False)
    ]
    first, last = ways["nodes"][0], ways["nodes"][-1]
    memory = [
        Line("histories", first, "history_mib", 2.0**20, ORANGE),
        Line("graph, x, y", first, "data_mib", 2.0**20, PINK),
        Line("peak of a step", first, "peak_mib", 2.0**20, BLUE),
    ]
    if any("device_mib" in row for row in rows):
        memory.append(Line(f"device, {last}", last, "device_mib", 2.0**20, GREEN))
    width, batch = "width of features and histories", "in-batch nodes of a batch"
    found = [
        ("Step time", "N", "ms", Panel("nodes", "nodes of the graph, N", "seconds", [*time("nodes"), *others])),
        ("Step memory", "N", "peak_mib", Panel("nodes", "nodes of the graph, N", "bytes", memory)),
        ("Step time", "width", "ms", Panel("features", width, "seconds", time("features"))),
        ("Step time", "batch size", "ms", Panel("batch_nodes", batch, "seconds", time("batch_nodes"))),
    ]
    titled = []
    for what, over, column, panel in found:
        points = _points(rows, panel.curve, ways[panel.curve][0], column, 1.0)
        if points:
            titled.append((finding(what, over, slope_of(*zip(*points, strict=True))), panel))
    return titled


def finding(what: str, over: str, slope: float | None) -> str:
    """What a slope says, as a title."""
    if slope is None:
        return f"{what} against {over}"
    if FLAT.is_met(slope):
        return f"{what} does not depend on {over}: slope {_signed(slope)}"
    return f"{what} {'grows' if slope > 0 else 'falls'} with {over}: slope {_signed(slope)}"


def draw_scale(rows: Sequence[Row], folder: Path, device: str, suffix: str = "svg") -> Path:
    """Draws the scale curves.

    Args:
        rows: of `bench_scale`.
        folder: made if missing.
        device: whose they are.
        suffix: the format, "svg" or "png".

    Returns:
        The file, `scale-<device>.<suffix>`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = panels(rows)
    across = min(len(drawn), 2)
    down = -(-len(drawn) // across)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(down, across, figsize=(6.4 * across, 3.5 * down + 0.5), squeeze=False)
        for axis, (title, panel) in zip(axes.flat, drawn, strict=False):
            _draw(axis, rows, title, panel)
        for axis in axes.flat[len(drawn) :]:
            axis.set_visible(False)
        figure.suptitle(f"A 3-layer GCN with histories on {device}", x=0.012, ha="left", fontsize=13, color=GREY)
        figure.tight_layout(h_pad=2.0, w_pad=3.0)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"scale-{records.file_name(device)}.{suffix}"
        # without a date, equal rows give an equal file
        figure.savefig(path, dpi=90, metadata={"Date": None} if suffix == "svg" else {})
        plt.close(figure)
    return path


def _draw(axis: Axes, rows: Sequence[Row], title: str, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, NullLocator

    ends: list[tuple[float, str, str]] = []
    ticks: set[float] = set()
    for line in panel.lines:
        points = _points(rows, panel.curve, line.way, line.column, line.factor)
        if not points:
            continue
        x, y = zip(*points, strict=True)
        axis.plot(x, y, "--" if line.is_dashed else "-", color=line.color, marker="o", markersize=5, linewidth=2)
        slope = slope_of(x, y)
        ends.append((y[-1], line.label + ("" if slope is None else f"\nslope {_signed(slope)}"), line.color))
        ticks |= set(x)
    axis.set(xscale="log", yscale="log", xlabel=panel.x_label)
    axis.set_title(title)
    axis.set_xticks(sorted(ticks), [_short(x) for x in sorted(ticks)])
    axis.yaxis.set_major_formatter(EngFormatter(unit="s" if panel.unit == "seconds" else "B"))
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_minor_locator(NullLocator())
    axis.grid(True, axis="y", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    low, high = axis.get_ylim()
    # room for the labels below the title
    axis.set_ylim(low / 1.5, high * (high / low) ** (1 / 8))
    _label(axis, max(ticks), ends)


def _label(axis: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes the labels at the ends of their lines, moved apart where they would meet."""
    low, high = axis.get_ylim()
    # two lines of text take about a seventh of a panel
    least = (high / low) ** (1 / 7)
    place = 0.0
    for y, text, color in sorted(ends):
        place = max(y, place * least)
        axis.annotate(text, (x, place), xytext=(10, 0), textcoords="offset points", color=color, va="center",
                      fontsize=10, annotation_clip=False)  # fmt: skip


def _ways(rows: Sequence[Row], curve: str) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in rows if row["curve"] == curve)) or [""]


def _points(rows: Sequence[Row], curve: str, way: str, column: str, factor: float) -> list[tuple[float, float]]:
    return [
        (row[curve], row[column] * factor)
        for row in rows
        if (row["curve"], row["way"]) == (curve, way) and "slope" not in row and row.get(column)
    ]


def _short(count: float) -> str:
    """`16`, `300k`, `3M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def _signed(slope: float) -> str:
    return f"{slope:.2f}".replace("-0.00", "0.00").replace("-", "−")


def main() -> None:
    """Draws what a file of results has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="of results")
    parser.add_argument("--png", action="store_true", help="PNG instead of SVG")
    arguments = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    part = records.read(arguments.file).get("scale")
    if part is None or not part.rows:
        parser.error(f"{arguments.file} has no rows of scale")
    device = part.machine.split(",")[0]
    print(draw_scale(part.rows, arguments.file.parent, device, "png" if arguments.png else "svg"))


if __name__ == "__main__":
    main()

"""Cost of a training step and of an epoch against the number of nodes, the width and the size of a batch.

A 3-layer GCN with histories trains with Adam on the graph of `bench/ring.py`, whose batches are alike at any N. A point
is a whole epoch, of which every step is timed, from the plan of its batch to Adam; short epochs are repeated. An
exponent is the slope of log(cost) over log(x), fitted by least squares.

    python -m bench.bench_scale                                             all curves, on the GPU where there is one
    python -m bench.bench_scale --nodes 1000000 10000000 100000000          one curve, at these N
    python -m bench.bench_scale --json rows.json --plot bench/results       and a figure

Ways are where things live: "device" has all of it on the device; "pinned" histories, features and labels in host
memory; "host" the graph too, so that nothing on the device grows with N (a CPU has only the first two).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.groups import SECONDS, Row, Setting, options
from bench.scale_point import NUM_LAYERS, WAYS, Point, keys_of, measure_point
from bench.side_by_side import machine
from bench.slopes import AT_MOST_LINEAR, FLAT, LINEAR, SlopeTarget, is_wide, slope_of
from gas_triton.doctor import device_name
from gas_triton.text import table
from gas_triton.training import HISTORY_DTYPES


@dataclass(frozen=True)
class Curve:
    """Points that differ in one thing.

    Attributes:
        name: of what differs, a column of the rows: "nodes", "features" or "batch_nodes".
        points: in ascending order of it.
        ways: of `WAYS`.
    """

    name: str
    points: Sequence[Point]
    ways: Sequence[str]


# Columns that slopes are fitted to.
FITTED = ("ms", "epoch_s", "plan_ms", "peak_mib", "device_mib", "history_mib")
# (curve, column, way, or None for all)
TARGETS: dict[tuple[str, str, str | None], SlopeTarget] = {
    ("nodes", "ms", None): FLAT,
    ("nodes", "peak_mib", None): FLAT,
    ("nodes", "epoch_s", None): LINEAR,
    # the graph is on the device in the other ways
    ("nodes", "device_mib", "host"): FLAT,
    ("batch_nodes", "ms", None): AT_MOST_LINEAR,
    ("batch_nodes", "peak_mib", None): AT_MOST_LINEAR,
}


def slopes(rows: Sequence[Row]) -> list[Row]:
    """A row for the slope of every measured column, for every curve and way in the rows."""
    found: list[Row] = []
    for curve, way in dict.fromkeys((row["curve"], row["way"]) for row in rows if "slope" not in row):
        points = [row for row in rows if (row["curve"], row["way"]) == (curve, way) and "slope" not in row]
        for column in FITTED:
            slope = slope_of([row[curve] for row in points], [row.get(column) for row in points])
            if slope is None:
                continue
            row = {"op": "scale slope", "curve": curve, "of": column, "way": way, "slope": slope}
            target = TARGETS.get((curve, column, None), TARGETS.get((curve, column, way)))
            if target is not None and is_wide([row[curve] for row in points]):
                row |= {"target": str(target), "met": target.is_met(slope)}
            found.append(row)
    return found


def curves(setting: Setting) -> list[Curve]:
    """The curves of the suite."""
    is_cuda = setting.device.type == "cuda"
    width = setting.choose(64, 64, 8)
    base = Point(
        nodes=setting.choose(2_000_000 if is_cuda else 100_000, 100_000, 40),
        features=width,
        hidden=width,
        cluster_nodes=setting.choose(10_000 if is_cuda else 500, 500, 4),
    )
    nodes = setting.choose(
        [300_000, 1_000_000, 3_000_000, 10_000_000]
        if is_cuda
        else [10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000],
        [10_000, 30_000, 100_000],
        [40, 80],
    )
    widths = setting.choose([16, 32, 64, 128, 256, 512], [16, 64, 256], [4, 8])
    # that divide the number of clusters: no batch is smaller than the others
    clusters = setting.choose([2, 4, 10, 20, 40], [2, 10, 40], [2, 5])
    return [
        nodes_curve(base, nodes, setting.device),
        Curve("features", [dataclasses.replace(base, features=w, hidden=w) for w in widths], WAYS[:1]),
        Curve("batch_nodes", [dataclasses.replace(base, clusters=count) for count in clusters], WAYS[:1]),
    ]


def nodes_curve(base: Point, nodes: Sequence[int], device: torch.device) -> Curve:
    """The curve over N, in every way that the device has."""
    points = [dataclasses.replace(base, nodes=count) for count in sorted(nodes)]
    return Curve("nodes", points, WAYS if device.type == "cuda" else WAYS[:2])


def measure_curves(
    curves: Sequence[Curve], setting: Setting, epoch_limit: float, say: Callable[[str], object] = str
) -> list[Row]:
    """Rows of all points, then of the slopes; each point is dropped before the next is made.

    No point begins after the setting's deadline; one without room is a row that says so.
    """
    rows: list[Row] = []
    # ways in turn at every x, so that a disturbance of the machine hits them alike
    points = [(curve.name, *pair) for curve in curves for pair in itertools.product(curve.points, curve.ways)]
    for number, (curve, point, way) in enumerate(points):
        if setting.is_over:
            setting.progress.cut = f"cut short after {number} of {len(points)} points"
            break
        row = keys_of(curve, point, way)
        try:
            row |= measure_point(point, way, setting.device, setting.seconds / 2, epoch_limit)
        except (MemoryError, torch.OutOfMemoryError) as error:
            row["missing"] = str(error)
        rows.append(row)
        setting.progress.add([row])
        say(f"{curve} {row[curve]}, {way}: " + (row.get("missing") or f"{row['ms']:.2f} ms a step"))
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows + slopes(rows)


def measure(setting: Setting) -> list[Row]:
    """The part of the suite."""
    limit = 4.0 if setting.device.type == "cuda" else 20.0
    return measure_curves(curves(setting), setting, setting.choose(limit, 3.0, 1.0))


def render(rows: Sequence[Row]) -> str:
    """The rows for a terminal: a table of points for every curve, and one of slopes."""
    columns = {
        "ms": "step ms", "fastest_ms": "fastest", "epoch_s": "epoch s", "plan_ms": "plan ms", "peak_mib": "step MiB",
        "device_mib": "device MiB", "history_mib": "histories MiB", "data_mib": "graph, x, y MiB", "in_batch": "B",
        "halo": "H", "edges": "E", "steps": "steps",
    }  # fmt: skip
    texts = []
    for curve in dict.fromkeys(row["curve"] for row in rows):
        points = [row for row in rows if row["curve"] == curve and "slope" not in row]
        lost = [f"{row[curve]}, {row['way']}: not measured, {row['missing']}" for row in points if "missing" in row]
        lost += [
            f"{row[curve]}, {row['way']}: only {row['steps']} steps were timed, an epoch takes too long"
            for row in points
            if row.get("epoch_s", 0) is None
        ]
        shown = [name for name in columns if any(name in row for row in points)]
        lines = [[str(row[curve]), row["way"], *(_number(row.get(name)) for name in shown)] for row in points]
        texts.append("\n".join([table([curve, "way", *(columns[name] for name in shown)], lines), *lost]))
        fits = [row for row in rows if row["curve"] == curve and "slope" in row]
        lines = [
            [columns[row["of"]], row["way"], f"{row['slope']:.3f}", row.get("target", ""), _verdict(row)]
            for row in fits
        ]
        texts.append(table([f"slope over {curve}", "way", "slope", "target", ""], lines))
    return "\n\n".join(texts)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 or isinstance(value, int) else f"{value:.4g}"


def _verdict(row: Row) -> str:
    return "" if "met" not in row else "met" if row["met"] else "MISSED"


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", metavar="N", help="only the curve over N, at these")
    parser.add_argument("--degree", type=int, default=10, help="average, without self loops (default: %(default)s)")
    parser.add_argument("--features", type=int, help="width of the input (default: 64)")
    parser.add_argument("--hidden", type=int, help="width of the histories (default: 64)")
    parser.add_argument("--batch-nodes", type=int, help="in two clusters (default: 1000; on a GPU 20000)")
    parser.add_argument("--tier", choices=WAYS, nargs="+", help="where things live (default: all that the device has)")
    parser.add_argument("--dtype", choices=HISTORY_DTYPES, default="float32", help="of the histories")
    parser.add_argument(
        "--epoch-limit", type=float, default=300.0, help="seconds; of longer epochs only steps are timed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows, as a part of the suite")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="where to draw them")
    return parser.parse_args()


def changed(curve: Curve, arguments: argparse.Namespace) -> Curve:
    """The curve with what the command line asks for, but for what it varies."""
    same: dict[str, Any] = {"degree": arguments.degree, "dtype": HISTORY_DTYPES[arguments.dtype]}
    widths = ("features", "hidden") if curve.name != "features" else ()
    same |= {name: getattr(arguments, name) for name in widths if getattr(arguments, name) is not None}
    if arguments.batch_nodes is not None:
        same["cluster_nodes"] = max(arguments.batch_nodes // 2, 1)
    ways = curve.ways
    if arguments.tier:
        ways = arguments.tier if curve.name == "nodes" else arguments.tier[:1]
    return Curve(curve.name, [dataclasses.replace(point, **same) for point in curve.points], ways)


def main() -> None:
    """Measures, prints, and writes what is asked for."""
    arguments = parse()
    seconds = SECONDS[arguments.size] if arguments.seconds is None else arguments.seconds
    setting = Setting(arguments.device, arguments.size, seconds)
    asked = curves(setting)
    if arguments.nodes:
        asked = [nodes_curve(asked[0].points[0], arguments.nodes, setting.device)]
    start = time.perf_counter()
    rows = measure_curves([changed(curve, arguments) for curve in asked], setting, arguments.epoch_limit, print)
    print(f"\n{machine()}\n{NUM_LAYERS}-layer GCN with histories, degree {arguments.degree}\n\n{render(rows)}")
    if arguments.json is not None:
        write(rows, arguments.json, setting, time.perf_counter() - start)
    if arguments.plot is not None:
        plot_into(arguments.plot, rows, setting.device)


def write(rows: list[Row], path: Path, setting: Setting, seconds: float) -> None:
    """Writes the rows as the part "scale" of a file of results."""
    part = records.Part(
        status="ok", command=" ".join(["python -m bench.bench_scale", *sys.argv[1:]]), machine=machine(),
        date=datetime.date.today().isoformat(), size=setting.size, seconds=seconds, rows=rows,
    )  # fmt: skip
    records.write(path, device_name(setting.device), {"scale": part})


def plot_into(folder: Path, rows: list[Row], device: torch.device) -> None:
    """Draws the rows, where matplotlib is installed."""
    from bench import plots

    reason = plots.missing()
    print(f"not drawn: {reason}" if reason else f"drawn: {plots.draw_scale(rows, folder, device_name(device))}")


if __name__ == "__main__":
    main()

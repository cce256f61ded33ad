"""METIS against random partitions of every dataset, and the time and memory of METIS up to 5 million edges.

    python -m bench.bench_partition --root DATA --json bench/results/partition-cpu.json       what partitions cost
    python -m bench.bench_partition --metis --json bench/results/partition-cpu.json           what METIS takes

Parts, batches and models are the paper's (`gas_triton.presets`, a GCN) where it has some. Nothing is trained: rows and
edges of batches are counted, and bytes of a step computed from the largest batch (`gas_triton.sizing`, of a GPU).

METIS runs in a process of its own for each graph and number of parts. Its memory is what the whole process holds at its
peak (VmHWM of Linux, set back before) beyond what it held with the graph loaded and freed pages returned (VmRSS): that
of METIS's own allocator too, and of what we make to call it.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import groups, records
from bench.groups import Row, Setting
from bench.pivot import duration, markdown, memory, number, percent
from bench.side_by_side import machine
from gas_triton import Graph, metis, presets
from gas_triton.datasets import Dataset, generate, load
from gas_triton.doctor import device_name
from gas_triton.partition_report import TITLES, compare_partitions
from gas_triton.sizing import ModelSize

MIB = 2**20
ROOT = Path(__file__).parent.parent
DATASETS = (
    "Cora", "CiteSeer", "PubMed", "AmazonComputers", "CoauthorPhysics", "Minesweeper", "Tolokers", "WordNet31",
)  # fmt: skip


# --- what partitions cost ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How a dataset is cut, and what is trained on it.

    Attributes:
        num_parts: clusters.
        batch_size: clusters of a batch.
        layers: of the GCN.
        hidden: its width.
    """

    num_parts: int = 40
    batch_size: int = 10
    layers: int = 2
    hidden: int = 64


def case_of(name: str) -> Case:
    """The paper's for a dataset, or else that of Cora with a model 64 wide."""
    for preset in presets.names():
        dataset, config = presets.load(preset)
        if preset.endswith("-gcn") and dataset == name:
            return Case(config.num_parts, config.batch_size, config.layers, config.hidden)
    return Case()


def measure_dataset(data: Dataset, case: Case) -> list[Row]:
    """A row for METIS and one for a random partition."""
    graph = Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes)
    model = ModelSize("GCN", data.num_features, case.hidden, data.num_classes, case.layers)
    found = compare_partitions(
        graph, [case.num_parts], [case.batch_size], model=model,
        label_bytes=4 * data.num_classes if data.multi_label else 8,
    )  # fmt: skip
    rows: list[Row] = []
    for record in found:
        row = {
            "op": "partition", "dataset": data.name, "nodes": data.num_nodes, "edges": data.num_edges,
            "parts": record.parts_asked, "clusters": record.batch_size, "layers": case.layers, "width": case.hidden,
            "way": TITLES[record.method],
        }  # fmt: skip
        if not record.is_made:
            rows.append({**row, "missing": record.reason})
            continue
        assert record.step_bytes is not None
        rows.append({
            **row, "made": record.num_parts, "edge_cut": record.edge_cut, "halo_ratio": record.halo_ratio,
            "inter_intra": record.inter_intra_ratio, "balance": record.balance, "rows": record.rows,
            "halo_rows": record.halo_rows, "step_mib": record.step_bytes / MIB, "partition_s": record.seconds,
        })  # fmt: skip
    return rows


def measure(setting: Setting, root: str | None = None) -> list[Row]:
    """The part of the suite: datasets that are in a folder, and a generated graph."""
    folder = Path(root or os.environ.get("GAS_TRITON_DATA") or ".")
    rows: list[Row] = []
    wanted = setting.choose(DATASETS, DATASETS[:1], ())
    for number_done, name in enumerate(wanted):
        if setting.is_over:
            setting.progress.cut = f"cut short after {number_done} of {len(wanted)} datasets"
            return rows
        if (folder / f"{name}.npz").is_file():
            found = measure_dataset(load(name, folder), case_of(name))
        else:
            # what the loader would do, it would download
            lost = {"op": "partition", "dataset": name, "way": TITLES["metis"]}
            found = [{**lost, "missing": f"needs {name}.npz in the folder $GAS_TRITON_DATA"}]
        rows += found
        setting.progress.add(found)
    size = setting.choose((50_000, 1_000_000), (10_000, 200_000), (300, 2400))
    num_parts, batch_size = setting.choose((40, 10), (40, 10), (8, 2))
    found = measure_dataset(generate(*size), Case(num_parts, batch_size, layers=3, hidden=64))
    setting.progress.add(found)
    return rows + found


def quality_table(rows: Sequence[Row]) -> str:
    """A line a dataset, METIS before random in every cell."""
    metis_name, random_name = TITLES["metis"], TITLES["random"]
    by_dataset: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "missing" not in row:
            by_dataset.setdefault(row["dataset"], {})[row["way"]] = row
    columns = {
        "halo_ratio": ("halo rows a row computed", number), "inter_intra": ("inter/intra", number),
        "edge_cut": ("edge cut", percent), "balance": ("balance", number), "step_mib": ("a step", memory),
    }  # fmt: skip
    lines = []
    for name, found in by_dataset.items():
        first = next(iter(found.values()))
        parts = f"{first['parts']}, {first['clusters']}"
        made = found.get(metis_name, first)["made"]
        cells = [
            " / ".join(show(found[way][key]) if way in found else "-" for way in (metis_name, random_name))
            for key, (_, show) in columns.items()
        ]
        parts += "" if made == first["parts"] else f" ({made} made)"
        lines.append([name, number(first["nodes"]), number(first["edges"]), parts, *cells])
    head = ["dataset", "nodes", "edges", "parts, a batch", *(title for title, _ in columns.values())]
    lost = list(dict.fromkeys(row["missing"] for row in rows if "missing" in row))
    text = markdown(head, lines)
    return f"{text}\n\nNot measured: {'; '.join(lost)}." if lost else text


# --- what METIS takes -------------------------------------------------------------------------------------------------


def status_bytes(name: str) -> int | None:
    """A size of this process, such as VmRSS or VmHWM; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def reset_peak() -> bool:
    """Gives freed pages back, where the C library can, and sets VmHWM to what is held now; whether it was possible."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def run_metis(path: Path, num_parts: int) -> dict[str, Any]:
    """Cuts the graph of a file once; to be called in a process of its own."""
    import pymetis

    with np.load(path) as file:
        graph = Graph.from_csr(torch.from_numpy(file["rowptr"]), torch.from_numpy(file["col"]))
    # libraries are loaded and threads started before anything is counted
    metis(Graph.from_edge_index(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])), 2)
    call = pymetis.part_graph
    noted: dict[str, Any] = {}

    def part_graph(*arguments: Any, **options: Any) -> Any:
        noted["setup_bytes"] = status_bytes("VmHWM")
        start = time.perf_counter()
        result = call(*arguments, **options)
        noted["metis_s"] = time.perf_counter() - start
        return result

    pymetis.part_graph = part_graph
    is_counted = reset_peak()
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    parts = metis(graph, num_parts)
    noted["total_s"] = time.perf_counter() - start
    after = status_bytes("VmHWM")
    setup = noted.pop("setup_bytes")
    if is_counted and before is not None and after is not None:
        noted |= {"extra_bytes": after - before, "setup_bytes": setup - before}
    return {**noted, "made": parts.num_parts, "edge_cut": parts.stats().edge_cut}


def run_apart(path: Path, num_parts: int) -> dict[str, Any]:
    """`run_metis` in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "bench.bench_partition", "--graph", str(path), "--num-parts", str(num_parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"METIS with {num_parts} parts failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def measure_metis(setting: Setting) -> list[Row]:
    """A row for every number of edges of a generated graph of degree 10, and number of parts."""
    edges = setting.choose((100_000, 500_000, 1_000_000, 2_000_000, 5_000_000), (100_000, 500_000), (2_000,))
    parts = setting.choose((10, 100, 1000), (10, 100), (4,))
    if importlib.util.find_spec("pymetis") is None:
        return [{"op": "metis", "way": TITLES["metis"], "missing": "needs pymetis"}]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="gas_triton-") as folder:
        for num_edges in edges:
            data = generate(num_edges // 10, num_edges, 4, 1)
            graph = Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes)
            path = Path(folder, "graph.npz")
            np.savez(path, rowptr=graph.rowptr.numpy(), col=graph.col.numpy())
            del data, graph
            for num_parts in parts:
                found = run_apart(path, num_parts)
                row = {
                    "op": "metis", "nodes": num_edges // 10, "edges": num_edges, "parts": num_parts,
                    "way": TITLES["metis"], "total_s": found["total_s"], "metis_s": found["metis_s"],
                    "made": found["made"], "edge_cut": found["edge_cut"],
                }  # fmt: skip
                if "extra_bytes" in found:
                    row |= {"extra_mib": found["extra_bytes"] / MIB, "setup_mib": found["setup_bytes"] / MIB}
                rows.append(row)
                setting.progress.add([row])
                print(f"{num_edges} edges, {num_parts} parts: {found['total_s']:.1f} s", file=sys.stderr, flush=True)
    return rows


def metis_table(rows: Sequence[Row]) -> str:
    """A line a graph, in each cell time and peak memory of a number of parts; then what our part of it is."""
    measured = [row for row in rows if "missing" not in row]
    if not measured:
        return f"Not measured: {rows[0]['missing']}." if rows else ""
    parts = list(dict.fromkeys(row["parts"] for row in measured))
    cells: dict[int, dict[int, Row]] = {}
    for row in measured:
        cells.setdefault(row["edges"], {})[row["parts"]] = row

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        return duration(1e3 * row["total_s"]) + (f", {memory(row['extra_mib'])}" if "extra_mib" in row else "")

    lines = [
        [number(edges), number(next(iter(found.values()))["nodes"]), *(cell(found.get(count)) for count in parts)]
        for edges, found in cells.items()
    ]
    ours = max((row["total_s"] - row["metis_s"]) / row["total_s"] for row in measured)
    text = markdown(["edges", "nodes", *(f"{count} parts" for count in parts)], lines)
    note = f"All but METIS itself (structure, order of the rows) takes at most {percent(ours)} of the time"
    with_memory = [row for row in measured if "extra_mib" in row]
    if with_memory:
        most = max(with_memory, key=lambda row: row["edges"] * row["extra_mib"])
        each = most["extra_mib"] * MIB / most["edges"]
        note += f"; the most memory is {number(each)} bytes an edge at {number(most['edges'])} edges"
    return f"{text}\n\n{note}."


# --- command line -----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = groups.options(__doc__)
    parser.add_argument("--root", help="folder of the .npz files (default: $GAS_TRITON_DATA)")
    parser.add_argument("--metis", action="store_true", help="time and memory of METIS instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows, as a part of the suite")
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--num-parts", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures, prints, and writes what is asked for; or only runs METIS, in a process of its own for `run_apart`."""
    arguments = parse()
    if arguments.graph is not None:
        print(json.dumps(run_metis(arguments.graph, arguments.num_parts)))
        return
    setting = Setting(torch.device("cpu"), arguments.size)
    start, name = time.perf_counter(), "metis" if arguments.metis else "partition"
    # before, as its load is that of others
    on = machine()
    rows = measure_metis(setting) if arguments.metis else measure(setting, arguments.root)
    print(f"{on}\n\n{metis_table(rows) if arguments.metis else quality_table(rows)}")
    if arguments.json is not None:
        given = [word for word in ("--metis",) if arguments.metis] + ([] if arguments.metis else ["--root DATA"])
        part = records.Part(
            status="ok", command=" ".join(["python -m bench.bench_partition", *given]), machine=on.replace("\n", "; "),
            date=datetime.date.today().isoformat(), size=setting.size, seconds=time.perf_counter() - start, rows=rows,
        )  # fmt: skip
        records.write(arguments.json, device_name(setting.device), {name: part})


if __name__ == "__main__":
    main()

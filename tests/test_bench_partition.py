"""The benchmark of partitions: what its rows say, its tables, and how METIS is measured."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import bench_partition, records, report_tables
from bench.bench_partition import Case, case_of, measure, measure_metis, metis_table, quality_table
from bench.groups import Setting
from gas_triton import Graph, metis, random_partition
from gas_triton.datasets import generate, load

TINY = Setting(size="tiny", seconds=0.01)


def test_rows_are_the_statistics_of_both_partitions() -> None:
    rows = measure(TINY)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    data = generate(300, 2400)
    graph = Graph.from_edge_index(data.edge_index, num_nodes=300)
    for row, parts in zip(rows, (metis(graph, 8), random_partition(graph, 8)), strict=True):
        stats = parts.stats(2)
        assert (row["op"], row["dataset"], row["parts"], row["made"]) == ("partition", "generated", 8, parts.num_parts)
        assert [row[key] for key in ("edge_cut", "halo_ratio", "inter_intra", "balance")] == [
            stats.edge_cut, stats.halo_ratio, stats.inter_intra_ratio, stats.balance
        ]  # fmt: skip
        assert row["step_mib"] > 0.0
    assert [row["way"] for row in rows] == ["METIS", "random"]
    assert rows[0]["halo_ratio"] < rows[1]["halo_ratio"]


def test_presets_are_used_where_there_are_some(data_root: Path) -> None:
    assert case_of("PubMed") == Case(num_parts=8, batch_size=4, layers=2, hidden=16)
    assert case_of("CoauthorPhysics") == Case(num_parts=4, batch_size=2, layers=2, hidden=64)
    assert case_of("Minesweeper") == Case() == Case(num_parts=40, batch_size=10, layers=2, hidden=64)
    rows = bench_partition.measure_dataset(load("Cora", data_root), case_of("Cora"))
    assert [(row["nodes"], row["edges"], row["parts"], row["clusters"]) for row in rows] == [(2708, 10556, 40, 10)] * 2
    assert rows[0]["rows"] == 677.0


def test_datasets_that_are_not_there_are_named_and_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_partition, "load", lambda *_: pytest.fail("a dataset was loaded"))
    monkeypatch.delenv("GAS_TRITON_DATA", raising=False)
    lost, *found = measure(Setting(size="quick"), str(tmp_path))
    assert lost["missing"] == "needs Cora.npz in the folder $GAS_TRITON_DATA"
    assert {row["dataset"] for row in found} == {"generated"}
    assert quality_table([lost, *found]).endswith("Not measured: needs Cora.npz in the folder $GAS_TRITON_DATA.")


def test_without_pymetis_random_partitions_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    lost, found = measure(TINY)
    assert lost["missing"].startswith("metis needs pymetis")
    assert found["way"] == "random"
    (line,) = [line for line in quality_table([lost, found]).splitlines() if line.startswith("| generated")]
    assert line.split(" | ")[4].startswith("- / ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert metis_table(measure_metis(TINY)) == "Not measured: needs pymetis."


def test_metis_is_measured_in_a_process_of_its_own() -> None:
    (row,) = measure_metis(TINY)
    assert (row["nodes"], row["edges"], row["parts"], row["made"]) == (200, 2000, 4, 4)
    graph = Graph.from_edge_index(generate(200, 2000, 4, 1).edge_index, num_nodes=200)
    assert row["edge_cut"] == metis(graph, 4).stats().edge_cut
    assert 0.0 < row["metis_s"] < row["total_s"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process cannot be set back")
def test_memory_outside_of_torch_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pymetis = importlib.import_module("pymetis")
    call = pymetis.part_graph

    def hungry(*arguments: Any, **options: Any) -> Any:
        assert np.full(50_000_000, 1, np.int8).sum() > 0
        return call(*arguments, **options)

    data = generate(200, 2000, 4, 1)
    graph = Graph.from_edge_index(data.edge_index, num_nodes=200)
    path = tmp_path / "graph.npz"
    np.savez(path, rowptr=graph.rowptr.numpy(), col=graph.col.numpy())
    plain = bench_partition.run_metis(path, 4)
    monkeypatch.setattr(pymetis, "part_graph", hungry)
    more = bench_partition.run_metis(path, 4)
    assert plain["extra_bytes"] < 10e6
    assert 45e6 < more["extra_bytes"] < 80e6
    assert more["setup_bytes"] < 10e6


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)METIS with 4 parts failed: .*none\.npz"):
        bench_partition.run_apart(tmp_path / "none.npz", 4)


# --- tables -----------------------------------------------------------------------------------------------------------


def row(dataset: str, way: str, halo: float, made: int = 40) -> dict[str, Any]:
    return {
        "op": "partition", "dataset": dataset, "nodes": 2708, "edges": 10556, "parts": 40, "clusters": 10, "way": way,
        "made": made, "edge_cut": halo / 2, "halo_ratio": halo, "inter_intra": 2 * halo, "balance": 1.0,
        "step_mib": 10 * halo,
    }  # fmt: skip


def metis_row(edges: int, parts: int, seconds: float, mib: float) -> dict[str, Any]:
    return {
        "op": "metis", "nodes": edges // 10, "edges": edges, "parts": parts, "way": "METIS", "total_s": seconds,
        "metis_s": 0.95 * seconds, "made": parts, "edge_cut": 0.5, "extra_mib": mib, "setup_mib": 1.0,
    }  # fmt: skip


def test_a_line_of_the_table_has_metis_before_random() -> None:
    rows = [row("Cora", "METIS", 0.4, made=38), row("Cora", "random", 1.6)]
    assert quality_table(rows).splitlines() == [
        "| dataset | nodes | edges | parts, a batch | halo rows a row computed | inter/intra | edge cut | balance "
        "| a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| Cora | 2708 | 10 556 | 40, 10 (38 made) | 0.4 / 1.6 | 0.8 / 3.2 | 20 % / 80 % | 1 / 1 | 4 MiB / 16 MiB |",
    ]


def test_the_table_of_metis_has_a_column_for_each_number_of_parts() -> None:
    rows = [metis_row(100_000, 10, 0.5, 12), metis_row(100_000, 100, 1.0, 13), metis_row(1_000_000, 10, 5.0, 100)]
    assert metis_table(rows).splitlines() == [
        "| edges | nodes | 10 parts | 100 parts |",
        "| --- | --- | --- | --- |",
        "| 100 000 | 10 000 | 500 ms, 12 MiB | 1 s, 13 MiB |",
        "| 1 000 000 | 100 000 | 5 s, 100 MiB |  |",
        "",
        "All but METIS itself (structure, order of the rows) takes at most 5 % of the time; the most memory is 105 "
        "bytes an edge at 1 000 000 edges.",
    ]


def test_tables_are_those_of_the_files(tmp_path: Path) -> None:
    results = report_tables.Results(tmp_path, {})
    assert report_tables.partition_table(results, "metis") == (
        "Not measured: `python -m bench.bench_partition --metis --json bench/results/partition-cpu.json`"
    )
    about = {"status": "ok", "machine": "a cpu", "date": "2026-11-22", "size": "full", "seconds": 1.0}
    rows = [row("Cora", "METIS", 0.4), row("Cora", "random", 1.6)]
    part = records.Part(command="python -m bench.bench_partition --root DATA", rows=rows, **about)
    records.write(tmp_path / "partition-cpu.json", "a cpu", {"partition": part})
    text = report_tables.partition_table(results, "partition")
    assert text.startswith(quality_table(rows))
    assert text.endswith("<sub>a cpu; 2026-11-22; `python -m bench.bench_partition --root DATA`</sub>")
    assert report_tables.read_results(tmp_path).parts == {}


def test_what_is_measured_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "partition-cpu.json"
    for options in ([], ["--metis"]):
        monkeypatch.setattr(sys, "argv", ["bench_partition", "--size", "tiny", "--json", str(path), *options])
        bench_partition.main()
    found = records.read(path)
    assert {name: len(part.rows) for name, part in found.items()} == {"partition": 2, "metis": 1}
    printed = capsys.readouterr().out
    assert quality_table(found["partition"].rows).splitlines()[0] in printed
    assert found["metis"].command == "python -m bench.bench_partition --metis"

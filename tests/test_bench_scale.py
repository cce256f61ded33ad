"""The scale curves: the graph they train on, the slopes they fit, and that they notice a step that grows with N."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import bench_scale, plots, records, scale_point
from bench.groups import Setting
from bench.ring import matchings, ring_of_clusters
from bench.scale_point import Point, Training, keys_of, measure_point
from bench.slopes import AT_MOST_LINEAR, FLAT, LINEAR, slope_of
from gas_triton import Batch, ClusterLoader, Graph, contiguous_partition

CPU = torch.device("cpu")
POINT = Point(nodes=400, features=8, hidden=8, cluster_nodes=20, clusters=2)


# --- the graph -------------------------------------------------------------------------------------------------------


def plain_ring(num_clusters: int, size: int, degree: int, seed: int) -> set[tuple[int, int]]:
    """The edges of the equation in `bench/ring.py`, one after another."""
    num_nodes, num_near = num_clusters * size, 2 * min(round(0.75 * degree / 2), (degree - 1) // 2)
    num_rounds = math.ceil((degree - num_near) / 0.8)
    tied = round((degree - num_near) / num_rounds * size)
    draw = torch.Generator().manual_seed(seed)
    edges = {(i, (i + d) % num_nodes) for i in range(num_nodes) for d in range(-num_near // 2, num_near // 2 + 1) if d}
    rounds = matchings(num_clusters, num_rounds, draw).tolist()
    for partner in rounds:
        here, there = (torch.randperm(size, generator=draw)[:tied].tolist() for _ in range(2))
        for cluster, other in enumerate(partner):
            if cluster < other:
                pairs = [(cluster * size + u, other * size + v) for u, v in zip(here, there, strict=True)]
                edges |= {*pairs, *((j, i) for i, j in pairs)}
    return edges


@pytest.mark.parametrize("num_clusters, size, degree", [(10, 7, 10), (6, 12, 4), (20, 9, 20), (4, 5, 2)])
@pytest.mark.parametrize("block_nodes", [1, 50, 1 << 20])
def test_ring_has_the_edges_of_its_equation(num_clusters: int, size: int, degree: int, block_nodes: int) -> None:
    graph = ring_of_clusters(num_clusters, size, degree, seed=3, block_nodes=block_nodes)
    source, target = graph.edge_index().tolist()
    pairs = list(zip(source, target, strict=True))
    assert len(set(pairs)) == len(pairs), "an edge is there twice"
    assert set(pairs) == plain_ring(num_clusters, size, degree, seed=3)
    assert all(s != t for s, t in pairs)
    assert all((t, s) in set(pairs) for s, t in pairs)
    # ascending in every row, as a graph has to be
    assert pairs == sorted(pairs, key=lambda pair: (pair[1], pair[0]))
    # symmetry was promised, not looked for
    assert graph.is_symmetric
    assert Graph(graph.csr).is_symmetric


def test_ring_has_the_degree_asked_for_and_others_near_it() -> None:
    degree = ring_of_clusters(40, 100, 10).degree.double()
    # a round ties whole places, and edges coincide at the ends of clusters
    assert float(degree.mean()) == pytest.approx(10.0, rel=2e-3)
    assert 8 <= float(degree.min()) < float(degree.max()) <= 11


def test_self_loops_of_a_ring_are_those_of_a_graph() -> None:
    ours, theirs = ring_of_clusters(10, 7, 10, self_loops=True), ring_of_clusters(10, 7, 10).add_self_loops()
    assert torch.equal(ours.rowptr, theirs.rowptr)
    assert torch.equal(ours.col, theirs.col)
    assert ours.self_loop_weight == theirs.self_loop_weight == 1.0
    assert torch.equal(ours.gcn_norm().weight, theirs.gcn_norm().weight)


@pytest.mark.parametrize("count", [2, 4, 10, 36])
def test_a_round_pairs_all_and_no_two_meet_twice(count: int) -> None:
    partners = matchings(count, count - 1, torch.Generator().manual_seed(1))
    own = torch.arange(count)
    for partner in partners:
        assert torch.equal(partner[partner], own)
        assert bool((partner != own).all())
    for cluster in range(count):
        assert sorted({*partners[:, cluster].tolist(), cluster}) == list(range(count))


@pytest.mark.parametrize("num_clusters, message", [(7, "num_clusters must be even"), (2, "more than 5 for degree 12")])
def test_ring_refuses_too_few_clusters(num_clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ring_of_clusters(num_clusters, 10, 12)


def test_batches_are_alike_at_any_number_of_nodes() -> None:
    halo = []
    for num_clusters in (40, 400):
        graph = ring_of_clusters(num_clusters, 50, 10)
        loader = ClusterLoader(graph, contiguous_partition(graph, [50] * num_clusters))
        batches = [loader.batch([cluster]) for cluster in range(num_clusters)]
        assert all(abs(batch.num_edges / 50 - 10) < 0.1 for batch in batches)
        halo.append(sum(batch.num_halo for batch in batches) / num_clusters)
    # 3 partners of 33 nodes, and 4 at either end
    assert halo[0] == pytest.approx(107, abs=1)
    assert halo[1] == pytest.approx(107, abs=0.2)


# --- slopes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_slope_of_a_power(exponent: float) -> None:
    x = [1e4, 3e4, 1e5, 3e6]
    assert slope_of(x, [7.0 * value**exponent for value in x]) == pytest.approx(exponent, abs=1e-12)


def test_slope_leaves_out_what_was_not_measured() -> None:
    assert slope_of([1, 10, 100, 1000], [1.0, 10.0, None, 1000.0]) == pytest.approx(1.0)
    assert slope_of([1, 10], [None, 3.0]) is None
    assert slope_of([10, 10], [2.0, 3.0]) is None


@pytest.mark.parametrize(
    "target, met, missed, text",
    [
        (FLAT, [0.05, -0.05, 0.0], [0.06, -0.06], "|slope| <= 0.05"),
        (LINEAR, [1.0, 0.91, 1.09], [0.89, 1.11], "|slope - 1| <= 0.1"),
        (AT_MOST_LINEAR, [-2.0, 0.3, 1.05], [1.06], "slope <= 1.05"),
    ],
)
def test_targets(target: Any, met: list[float], missed: list[float], text: str) -> None:
    assert [target.is_met(slope) for slope in met + missed] == [True] * len(met) + [False] * len(missed)
    assert str(target) == text


def rows_of(costs: dict[int, float], **more: Any) -> list[dict[str, Any]]:
    return [{"op": "scale", "curve": "nodes", "nodes": n, "way": "device", "ms": ms, **more} for n, ms in costs.items()]


@pytest.mark.parametrize("exponent, met", [(0.0, True), (0.2, False)])
def test_slopes_say_whether_a_target_is_met(exponent: float, met: bool) -> None:
    rows = rows_of({n: 3.0 * n**exponent for n in (1000, 10_000, 100_000)})
    (row,) = bench_scale.slopes(rows)
    assert row["slope"] == pytest.approx(exponent)
    assert (row["of"], row["target"], row["met"]) == ("ms", "|slope| <= 0.05", met)
    # what was fitted is not fitted again
    assert bench_scale.slopes([*rows, row]) == [row]


def test_no_verdict_on_a_short_curve() -> None:
    (row,) = bench_scale.slopes(rows_of({1000: 3.0, 2000: 9.0}))
    assert "met" not in row


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["device", "pinned"])
def test_a_point(way: str) -> None:
    row = keys_of("nodes", POINT, way) | measure_point(POINT, way, seconds=0.0)
    graph = ring_of_clusters(20, 20, 10, self_loops=True)
    assert (row["nodes"], row["batch_nodes"], row["in_batch"]) == (400, 40, 40)
    # ten batches of one epoch
    assert (row["steps"], row["epochs"]) == (10, 1)
    assert row["edges"] == pytest.approx(2 * graph.num_edges / 20, rel=0.05)
    # two tables of 400 rows of 8 float32 and when they were pushed
    assert row["history_mib"] * 2**20 == 2 * 400 * (8 * 4 + 4)
    # with weights; features and labels
    assert row["data_mib"] * 2**20 == 4 * (401 + 2 * graph.num_edges) + 400 * (8 * 4 + 8)
    assert 0 < row["plan_ms"] < row["ms"]
    # half of the steps took the median or longer, the others the shortest or longer
    assert 1e3 * row["epoch_s"] >= 5 * row["ms"] + 5 * row["fastest_ms"] * (1 - 1e-9)
    assert 0 < row["fastest_ms"] <= row["ms"]


def test_a_long_epoch_is_left_out() -> None:
    row = keys_of("nodes", POINT, "device") | measure_point(POINT, "device", seconds=0.01, epoch_limit=0.0)
    assert row["epoch_s"] is None
    assert row["epochs"] == 0
    assert row["steps"] >= scale_point.WARM_UP
    assert row["ms"] > 0
    assert f"400, device: only {row['steps']} steps were timed" in bench_scale.render([row])


def test_ways_train_the_same() -> None:
    def losses(way: str) -> Tensor:
        training = Training(POINT, way, CPU)
        return torch.stack([training.step(batch) for batch in training.histories.prefetch(training.loader)])

    expected = losses("device")
    assert torch.equal(losses("pinned"), expected)
    assert torch.equal(losses("host"), expected)
    # it learns something, and is not the same step again and again
    assert len(set(expected.tolist())) == len(expected)


class GrowingTraining(Training):
    """A step that makes and reads something of every node."""

    def step(self, batch: Batch) -> Tensor:
        return super().step(batch) + 0 * torch.ones(self.graph.num_nodes, 64).mul(2.0).sum()


@pytest.mark.parametrize("make, met", [(Training, True), (GrowingTraining, False)])
def test_memory_that_grows_with_the_graph_is_noticed(make: type[Training], met: bool) -> None:
    points = [Point(nodes, 8, 8, cluster_nodes=20) for nodes in (400, 4000)]
    keys = [keys_of("nodes", point, "device") for point in points]
    rows = [a | measure_point(point, "device", seconds=0.0, make=make) for a, point in zip(keys, points, strict=True)]
    found = {row["of"]: row for row in bench_scale.slopes(rows)}
    assert found["peak_mib"]["met"] is met, found["peak_mib"]
    assert found["history_mib"]["slope"] == pytest.approx(1.0)


def test_a_point_without_room_does_not_end_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(point: Point, *_: Any) -> dict[str, float]:
        if point.nodes == 4000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ms": 2.0}

    monkeypatch.setattr(bench_scale, "measure_point", measured)
    points = [dataclasses.replace(POINT, nodes=nodes) for nodes in (400, 4000, 40_000)]
    rows = bench_scale.measure_curves([bench_scale.Curve("nodes", points, ["device"])], Setting(seconds=0.0), 1.0)
    assert [row.get("missing") for row in rows[:3]] == [None, "CUDA out of memory", None]
    assert rows[3]["slope"] == pytest.approx(0.0, abs=1e-12)
    assert "4000, device: not measured, CUDA out of memory" in bench_scale.render(rows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", ["full", "quick", "tiny"])
def test_curves_of_the_suite(size: Any, device: str) -> None:
    found = bench_scale.curves(Setting(torch.device(device), size))
    assert [curve.name for curve in found] == ["nodes", "features", "batch_nodes"]
    assert list(found[0].ways) == (["device", "pinned", "host"] if device == "cuda" else ["device", "pinned"])
    for curve in found:
        x = [keys_of(curve.name, point, "device")[curve.name] for point in curve.points]
        assert x == sorted(set(x))
        # every batch of a point has as many rows
        assert all(point.num_clusters % point.clusters == 0 for point in curve.points)
        # one cluster a batch would keep its plan
        assert all(point.clusters > 1 for point in curve.points)


def test_no_point_begins_after_the_deadline() -> None:
    setting = Setting(size="tiny", seconds=0.0, deadline=time.monotonic() - 1.0)
    assert bench_scale.measure(setting) == []
    assert setting.progress.cut == "cut short after 0 of 8 points"


def test_tiny_part() -> None:
    rows = bench_scale.measure(Setting(size="tiny", seconds=0.0))
    points = [row for row in rows if "slope" not in row]
    assert [(row["curve"], row["way"]) for row in points] == [
        *[("nodes", "device"), ("nodes", "pinned")] * 2,
        *[("features", "device")] * 2,
        *[("batch_nodes", "device")] * 2,
    ]
    assert {row["curve"] for row in rows if "slope" in row} == {"nodes", "features", "batch_nodes"}
    json.dumps(rows, allow_nan=False)
    text = bench_scale.render(rows)
    assert "slope over batch_nodes" in text
    assert len(text.splitlines()) == len(rows) + 6 + 5


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    arguments = "--size tiny --seconds 0 --nodes 800 400 --batch-nodes 40 --features 4 --hidden 8 --tier device"
    command = ["bench_scale", *arguments.split(), "--dtype", "bfloat16", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    bench_scale.main()
    rows = records.read(path)["scale"].rows
    points = [row for row in rows if "slope" not in row]
    assert [(row["nodes"], row["batch_nodes"], row["way"]) for row in points] == [
        (400, 40, "device"),
        (800, 40, "device"),
    ]
    assert {row["dtype"] for row in points} == {"bfloat16"}
    assert points[0]["history_mib"] * 2**20 == pytest.approx(2 * 400 * (8 * 2 + 4), rel=1e-4)
    assert "slope over nodes" in capsys.readouterr().out


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slope, title",
    [
        (0.01, "Step time does not depend on N: slope 0.01"),
        (-0.001, "Step time does not depend on N: slope 0.00"),
        (0.31, "Step time grows with N: slope 0.31"),
        (-0.31, "Step time falls with N: slope −0.31"),
        (None, "Step time against N"),
    ],
)
def test_a_title_says_what_was_found(slope: float | None, title: str) -> None:
    assert plots.finding("Step time", "N", slope) == title


@pytest.mark.interop
def test_figure_has_the_slopes_at_its_lines(tmp_path: Path, import_optional: Callable[[str, str], ModuleType]) -> None:
    import_optional("matplotlib", "plot")
    costs = {1000: 4.0, 10_000: 4.0, 100_000: 4.0}
    rows = rows_of(costs, peak_mib=2.0)
    for row in rows:
        row |= {"epoch_s": row["nodes"] / 1e5, "history_mib": row["nodes"] / 1e3, "data_mib": row["nodes"] / 2e3}
    path = plots.draw_scale([*rows, *bench_scale.slopes(rows)], tmp_path, "Some CPU (R) 3")
    assert path.name == "scale-some-cpu-r-3.svg"
    text = path.read_text()
    assert text.count("slope 1.00") == 3, "epoch, histories, data"
    # step and peak, and the titles over them
    assert text.count("slope 0.00") == 4
    for label in ("epoch", "step", "histories", "peak of a step", "10k", "Step memory does not depend on N"):
        assert label in text
    assert path.stat().st_size < 100_000
    # equal rows give an equal file
    before = path.read_bytes()
    plots.draw_scale(rows, tmp_path, "Some CPU (R) 3")
    assert path.read_bytes() == before

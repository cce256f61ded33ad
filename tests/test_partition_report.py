"""What partitions cost: counts against sets, bytes against steps that are run, and which partition is recommended."""

import importlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gas_triton as gas
from gas_triton import Graph, metis, partition, partition_report, random_partition
from gas_triton.datasets import generate, load
from gas_triton.memory import peak_bytes
from gas_triton.models import MODELS
from gas_triton.partition_advice import MAX_HALO_RATIO, recommend
from gas_triton.partition_report import PartitionRecord, compare_partitions, default_parts
from gas_triton.sizing import BatchSize, Candidate, ModelSize, StepOptions, step_bytes

MIB = 2**20


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A few nodes with any edges: loops, copies, one direction only, or none at all."""
    num_nodes = draw(st.integers(1, 12))
    node = st.integers(0, num_nodes - 1)
    edges = draw(st.lists(st.tuples(node, node), max_size=40))
    if draw(st.booleans()):
        edges += [(target, source) for source, target in edges]
    return Graph.from_edge_index(torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).t(), num_nodes=num_nodes)


def edges_of(graph: Graph) -> list[tuple[int, int]]:
    return list(zip(*graph.edge_index().tolist(), strict=True))


# --- counts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(graph=graphs(), data=st.data())
def test_batches_are_counted_as_sets_are(graph: Graph, data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, graph.num_nodes))
    batch_size, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3))
    parts = random_partition(graph, num_parts, seed)
    order = torch.randperm(num_parts, generator=torch.Generator().manual_seed(seed)).tolist()
    ptr = parts.ptr.tolist()
    expected = []
    for start in range(0, num_parts, batch_size):
        rows = {node for c in order[start : start + batch_size] for node in parts.perm[ptr[c] : ptr[c + 1]].tolist()}
        into = [(source, target) for source, target in edges_of(graph) if target in rows]
        expected.append((
            len(rows),
            len({source for source, _ in into} - rows),
            sum(source in rows for source, _ in into),
            sum(source not in rows for source, _ in into),
            sum(source == target for source, target in into),
        ))  # fmt: skip
    counts = parts.batch_counts(batch_size, seed)
    columns = (counts.nodes, counts.halo, counts.inner, counts.outer, counts.loops)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert all(column.dtype == torch.int64 for column in columns)


@settings(max_examples=150, deadline=None)
@given(graph=graphs())
def test_metis_is_given_the_set_of_undirected_edges(graph: Graph) -> None:
    rowptr, col = partition._symmetric_structure(graph)
    found = [
        (row, neighbor)
        for row, (first, last) in enumerate(itertools.pairwise(rowptr))
        for neighbor in col[first:last].tolist()
    ]
    both = {pair for s, t in edges_of(graph) for pair in ((s, t), (t, s)) if s != t}
    assert found == sorted(both)
    assert (rowptr.dtype, col.dtype) == (np.int32, np.int32)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_a_wrong_batch_size_is_refused(batch_size: Any) -> None:
    parts = random_partition(Graph.from_edge_index(torch.tensor([[0], [1]])), 2)
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        parts.batch_counts(batch_size)


# --- records ----------------------------------------------------------------------------------------------------------


def small() -> Graph:
    return Graph.from_edge_index(generate(600, 6000).edge_index, num_nodes=600)


def size_of(model: str = "GCN", layers: int = 2, hidden: int = 16) -> ModelSize:
    return ModelSize(model, 24, hidden, 5, layers)


def test_records_are_the_statistics_of_their_partitions() -> None:
    graph = small()
    seen: list[PartitionRecord] = []
    records = compare_partitions(graph, [4, 10], [2, 0.3], seed=3, on_record=seen.append)
    assert seen == records
    assert [(r.parts_asked, r.batch_size, r.method) for r in records] == [
        # three tenths of four clusters are one
        (4, 2, "metis"), (4, 2, "random"), (4, 1, "metis"), (4, 1, "random"),
        (10, 2, "metis"), (10, 2, "random"), (10, 3, "metis"), (10, 3, "random"),
    ]  # fmt: skip
    for record in records:
        parts = (metis if record.method == "metis" else random_partition)(graph, record.parts_asked, 3)
        stats, counts = parts.stats(record.batch_size, 3), parts.batch_counts(record.batch_size, 3)
        assert record.num_parts == parts.num_parts
        assert record.num_batches == math.ceil(parts.num_parts / record.batch_size)
        for name in ("edge_cut", "halo_ratio", "inter_intra_ratio", "balance", "halo_rows"):
            assert getattr(record, name) == getattr(stats, name), name
        assert record.rows * record.num_batches == pytest.approx(600)
        assert record.halo_rows == pytest.approx(record.halo_ratio * record.rows)
        assert record.most_rows == max((counts.nodes + counts.halo).tolist())
        assert (record.step_bytes, record.reason) == (None, "no model was given")
    assert records[0].halo_ratio < records[1].halo_ratio


@pytest.mark.parametrize("name", ["GCN", "SAGE", "GIN", "GAT"])
@pytest.mark.parametrize("kind", ["symmetric", "directed with loops"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_step_is_that_of_the_largest_batch_of_a_loader(name: str, kind: str, batch_size: int) -> None:
    graph = small()
    if kind != "symmetric":
        source, target = graph.edge_index()[:, ::2]
        # two loops at one node become one
        loops = torch.tensor([[5, 5, 9], [5, 5, 9]])
        graph = Graph.from_edge_index(torch.cat([torch.stack([source, target]), loops], dim=1), num_nodes=600)
    (record,) = compare_partitions(graph, [8], [batch_size], methods=["metis"], model=size_of(name), device_type="cpu")
    parts = metis(graph, 8)
    prepared = MODELS[name].prepare(parts.permute(graph))
    sizes = [BatchSize.of(batch) for batch in gas.ClusterLoader(prepared, parts, batch_size)]
    options = StepOptions("cpu", weighted=prepared.weight is not None, symmetric=prepared.is_symmetric)
    assert record.cost is not None
    # whether a batch may have rows of more than 512 edges does not matter on a CPU
    steps = {replace(size, has_hubs=True): step_bytes(size_of(name).make(), size, options) for size in sizes}
    assert steps[record.cost.batch] == record.step_bytes == max(steps.values())
    kept = record.cost.device - record.cost.step
    assert kept == record.cost.state + record.cost.graph + record.cost.plans + record.cost.features + (
        record.cost.histories
    )
    assert (record.cost.plans > 0) == (batch_size == 1)
    assert record.cost.features == 600 * (4 * 24 + 8)


def test_all_clusters_in_a_batch_are_full_batch_training() -> None:
    (record,) = compare_partitions(small(), [4], [1.0], methods=["random"], model=size_of())
    assert (record.num_batches, record.halo_ratio) == (1, 0.0)
    assert record.cost is not None
    assert (record.cost.tier, record.cost.histories, record.cost.batch.is_planned) == ("full-batch", 0, False)
    assert record.cost.batch.edges == 6000 + 600


def test_models_without_an_arithmetic_say_so() -> None:
    (record,) = compare_partitions(small(), [4], methods=["random"], model=size_of("PNA"))
    assert (record.cost, record.reason) == (None, "PNA has no arithmetic (GCN, SAGE, GIN, GAT have)")
    norm = replace(size_of(), options={"batch_norm": True})
    (record,) = compare_partitions(small(), [4], methods=["random"], model=norm)
    assert record.cost is None
    assert "without linear ends, norms and residuals" in record.reason


@pytest.mark.parametrize(
    ("num_nodes", "expected"),
    [
        (1, [1]), (2, [1, 2]), (100, [1, 2]), (128, [1, 2]), (2708, [1, 2, 4, 8, 16, 32]),
        (10_000, [1, 2, 8, 32, 128]), (10**8, [1, 4, 16, 64, 256, 1024]),
    ],
)  # fmt: skip
def test_default_parts(num_nodes: int, expected: list[int]) -> None:
    assert default_parts(num_nodes) == expected


@pytest.mark.parametrize("num_nodes", [1, 2, 3])
def test_graphs_smaller_than_the_ladder(num_nodes: int) -> None:
    graph = Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), num_nodes=num_nodes)
    records = compare_partitions(graph, model=size_of())
    assert {record.parts_asked for record in records} == ({1} if num_nodes == 1 else {1, 2})
    assert all(record.halo_ratio == record.edge_cut == record.inter_intra_ratio == 0.0 for record in records)
    assert recommend(records).place is not None


def test_batches_of_all_default_parts_are_not_repeated() -> None:
    records = compare_partitions(small(), batch_sizes=[4], methods=["random"])
    assert [record.parts_asked for record in records] == [1, 8]


def test_clusters_that_metis_leaves_empty_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pymetis = importlib.import_module("pymetis")
    given = [3 if node % 2 else 1 for node in range(600)]
    monkeypatch.setattr(pymetis, "part_graph", lambda *_, **__: pymetis.GraphPartition(0, given))
    single, triple = compare_partitions(small(), [5], [1, 3], methods=["metis"])
    assert (single.parts_asked, single.num_parts, single.batch_size, single.num_batches) == (5, 2, 1, 2)
    assert (triple.parts_asked, triple.num_parts, triple.batch_size, triple.num_batches) == (5, 2, 2, 1)


def forget_pymetis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pymetis", None)


def test_without_pymetis_random_partitions_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_pymetis(monkeypatch)
    lost, made = compare_partitions(small(), [4])
    assert (lost.method, lost.is_made, made.method, made.num_parts) == ("metis", False, "random", 4)
    assert lost.reason.startswith("metis needs pymetis (")
    assert lost.reason.endswith("pip install pymetis, or take random_partition")
    assert recommend([lost]).place is None
    assert recommend([lost, made]).place == 1
    with pytest.raises(gas.MissingPackageError, match="metis needs pymetis"):
        compare_partitions(small(), [4], methods=["metis"])
    with pytest.raises(gas.MissingPackageError, match="metis needs pymetis"):
        metis(small(), 4, cache=Path("nowhere"))
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_parts": [4, 601]}, r"num_parts must be from 1 to the number of nodes \(600\), got 601"),
        ({"num_parts": [0]}, "num_parts must be from 1 .*got 0"),
        ({"num_parts": [2.0]}, "num_parts must be from 1 .*got 2.0"),
        ({"num_parts": []}, "num_parts must not be empty"),
        ({"batch_sizes": []}, "batch_sizes must not be empty"),
        ({"batch_sizes": [0]}, "batch_size must be a number of clusters.*got 0"),
        ({"batch_sizes": [1.5]}, "batch_size must be .* or a share .*got 1.5"),
        ({"batch_sizes": [float("nan")]}, "batch_size must be .*got nan"),
        ({"methods": ["kmeans"]}, "methods must be of metis, random, got 'kmeans'"),
        ({"methods": []}, "methods must not be empty"),
        ({"model": replace(size_of(), name="MLP")}, "model must be of GCN, .*got 'MLP'"),
        ({"history_dtype": "int4"}, "history_dtype must be of float32, .*got 'int4'"),
        ({"history_tier": "tape"}, "history_tier must be of device, pinned, file, got 'tape'"),
        ({"device_type": "tpu"}, "device_type must be of cuda, cpu, got 'tpu'"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_made(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_report, "_make", lambda *_, **__: pytest.fail("a partition was made"))
    with pytest.raises(ValueError, match=message):
        compare_partitions(small(), **{"num_parts": [4], **arguments})


# --- against steps that are run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "model", "method", "num_parts", "batch_size", "within"),
    [
        # the presets of the paper and others, and what `tests/test_sizing.py` grants each model
        ("Cora", "GCN", "metis", 40, 10, 0.02),
        ("Cora", "GAT", "metis", 40, 10, 0.1),
        ("Cora", "GIN", "random", 16, 4, 0.02),
        ("PubMed", "GCN", "metis", 8, 4, 0.02),
        ("PubMed", "SAGE", "random", 8, 1, 0.02),
    ],
)
def test_predicted_bytes_are_those_of_an_epoch_of_steps(
    data_root: Path, dataset: str, model: str, method: str, num_parts: int, batch_size: int, within: float
) -> None:
    data = load(dataset, data_root)
    graph = Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes)
    size = ModelSize(model, data.num_features, 16, data.num_classes, 2)
    (record,) = compare_partitions(
        graph, [num_parts], [batch_size], methods=[method], model=size, device_type="cpu", seed=0
    )
    parts = partition_report.METHODS[method](graph, num_parts, 0)
    graph, x, y = parts.permute(graph, data.x, data.y)
    loader = gas.ClusterLoader(MODELS[model].prepare(graph), parts, batch_size, seed=0, x=x, y=y)
    net = size.make("cpu")
    gas.attach_histories(net, graph.num_nodes)
    optimizer = torch.optim.Adam(net.parameters())

    def step(clusters: list[int]) -> None:
        batch = loader.batch(clusters)
        out = net(batch.features, batch)
        loss = F.cross_entropy(out, batch.y)
        del out
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    epoch = [list(batch.clusters) for batch in loader]
    step(epoch[0])  # makes Adam's moments
    with peak_bytes("cpu") as peak:
        for clusters in epoch:
            # a plan that is kept counts as what stays
            loader._planned.clear()
            step(clusters)
    assert record.step_bytes == pytest.approx(peak.nbytes, rel=within)


# --- which to take ----------------------------------------------------------------------------------------------------


def record(
    parts: int, halo_ratio: float, step: float | None, stays: float = 20.0, method: str = "metis", batch_size: int = 1
) -> PartitionRecord:
    """A record by hand; sizes in MiB."""
    batches = -(-parts // batch_size)
    cost = None
    if step is not None:
        cost = Candidate(
            "device", parts, batch_size, "float32", BatchSize(1, 1, 1, 1), 0, 0, 0, int(stays * MIB), 0, 0,
            int(step * MIB),
        )  # fmt: skip
    rows = 1000.0 / batches
    return PartitionRecord(
        method, parts, parts, batch_size, batches, halo_ratio=halo_ratio, rows=rows, halo_rows=halo_ratio * rows,
        most_rows=int(rows * (1 + halo_ratio)), cost=cost,
    )  # fmt: skip


LADDER = [
    record(1, 0.0, 100),
    record(2, 0.1, 52), record(2, 0.8, 60, method="random"),
    record(8, 0.4, 19), record(8, 2.0, 30, method="random"),
    record(32, 0.9, 9), record(128, 1.6, 5),
]  # fmt: skip


def test_without_a_budget_the_largest_batches_with_a_small_step_and_few_halo_rows_are_taken() -> None:
    advice = recommend(LADDER)
    assert advice.place == 3
    assert advice.reason == (
        "METIS in 8 parts, 1 a batch: the largest batches whose step takes no more than the 20.0 MiB that stay on the "
        "device (19.0 MiB), of those that read at most 1 halo row for a row that they compute (0.40)."
    )


def test_steps_that_are_never_small_leave_the_smallest_of_few_halo_rows() -> None:
    advice = recommend([replace(r, cost=r.cost and replace(r.cost, features=MIB)) for r in LADDER])
    assert advice.place == 5
    assert "METIS in 32 parts, 1 a batch: the smallest step (9.00 MiB)" in advice.reason


def test_among_as_many_batches_the_fewest_halo_rows_are_taken() -> None:
    same = [record(8, 0.8, 19), record(8, 0.4, 19, method="random"), record(40, 0.6, 19, batch_size=5)]
    assert recommend(same).place == 1
    assert recommend(same, 100 * MIB).place == 1


def test_many_halo_rows_everywhere_leave_the_least() -> None:
    found = [record(r, ratio, 5) for r, ratio in ((2, 1.4), (8, 3.0), (32, 7.0))]
    advice = recommend([record(1, 0.0, 50), *found])
    assert advice.place == 1
    assert "every partition reads more than 1 halo rows" in advice.reason
    at_the_bound = recommend([*found, record(64, MAX_HALO_RATIO, 5)])
    assert at_the_bound.place == 3


def test_without_bytes_the_fewest_rows_are_taken() -> None:
    advice = recommend([replace(r, cost=None) for r in LADDER])
    assert advice.place == 5
    assert "the fewest rows a step (59)" in advice.reason


def test_one_batch_alone_is_full_batch_training() -> None:
    assert recommend([record(1, 0.0, 50)]) == recommend([record(4, 0.0, 50, batch_size=4)])
    assert "full-batch" in recommend([record(1, 0.0, 50)]).reason
    assert recommend([]).place is None


@pytest.mark.parametrize(
    # what fits are 90 % of a budget; 20 MiB stay
    ("budget", "place"),
    [(134, 0), (133, 1), (80.1, 1), (79.9, 3), (56, 3), (43.4, 3), (43.2, 5), (30, 6), (27.8, 6), (27.7, None)],
)
def test_with_a_budget_the_largest_batches_that_fit_are_taken(budget: float, place: int | None) -> None:
    advice = recommend(LADDER, int(budget * MIB))
    assert advice.place == place
    if place is None:
        assert advice.reason == (
            "Nothing fits 90% of 27.7 MiB: the least is 25.0 MiB, METIS in 128 parts, 1 a batch, of which 20.0 MiB "
            "stay between the steps: more parts would take less."
        )
        assert "have to live on the host" in recommend(LADDER, 22 * MIB).reason
    elif place == 0:
        assert advice.reason.startswith("full-batch: all nodes in one step that fit 90% of")


def test_a_budget_needs_bytes() -> None:
    with pytest.raises(ValueError, match="budget: expected at least 1 byte, got 0"):
        recommend(LADDER, 0)
    unknown = replace(LADDER[3], cost=None, reason="PNA has no arithmetic")
    with pytest.raises(ValueError, match="budget: the bytes of a step are not known: PNA has no arithmetic"):
        recommend([*LADDER, unknown], MIB)

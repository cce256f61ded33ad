"""ClusterLoader and the plan of a batch, against one made with a dictionary."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gas_triton import Batch, ClusterLoader, Graph, Partition, contiguous_partition, metis, random_partition
from gas_triton.csr import Csr, Transposed, find_hubs
from gas_triton.planner import Planner

from .reference import GRAPHS, Edges, block, brute_force_plan, random_edges


def partitioned(edges: Edges, num_parts: int = 6, kind: str = "random") -> tuple[Graph, Partition]:
    graph = edges.graph()
    num_parts = min(num_parts, graph.num_nodes)
    parts = metis(graph, num_parts) if kind == "metis" else random_partition(graph, num_parts)
    return parts.permute(graph), parts


def make_loader(name: str = "weighted_directed", num_parts: int = 6, **options: object) -> ClusterLoader:
    graph, parts = partitioned(GRAPHS[name], num_parts)
    return ClusterLoader(graph, parts, **options)


def rows_of(csr: Csr | Transposed) -> list[int]:
    return np.repeat(np.arange(csr.rowptr.numel() - 1), csr.rowptr.diff().numpy()).tolist()


def assert_is_plan(batch: Batch, graph: Graph, node_ids: Sequence[int]) -> None:
    plan = brute_force_plan(graph, node_ids)
    local = {node: row for row, node in enumerate(plan.node_ids)}
    slot = {node: place for place, node in enumerate(plan.halo_ids)}
    edges = [*plan.inner, *plan.outer]

    assert batch.node_ids.tolist() == plan.node_ids
    assert batch.halo_ids.tolist() == plan.halo_ids
    assert (batch.num_nodes, batch.num_halo) == (len(plan.node_ids), len(plan.halo_ids))
    assert (batch.num_edges, batch.graph_nodes) == (len(edges), graph.num_nodes)
    assert batch.all_ids.tolist() == plan.node_ids + plan.halo_ids
    assert batch.spans.tolist() == spans_of(node_ids)

    assert rows_of(batch.inner) == [row for row, _, _ in plan.inner]
    assert batch.inner.col.tolist() == [local[source] for _, source, _ in plan.inner]
    assert rows_of(batch.outer) == [row for row, _, _ in plan.outer]
    assert batch.outer.col.tolist() == [source for _, source, _ in plan.outer]
    assert batch.outer_slot.tolist() == [slot[source] for _, source, _ in plan.outer]
    assert batch.inner_graph_col.tolist() == [source for _, source, _ in plan.inner]
    assert batch.outer_joint_col.tolist() == [len(local) + slot[source] for _, source, _ in plan.outer]

    assert batch.edge_ids.tolist() == [place for _, _, place in edges]
    joint = batch.joint()
    columns = [local[source] for _, source, _ in plan.inner] + batch.outer_joint_col.tolist()
    by_row = sorted(range(len(edges)), key=lambda edge: edges[edge][0])  # stable: inner edges first
    assert joint.col.tolist() == [columns[edge] for edge in by_row]
    assert rows_of(joint) == [edges[edge][0] for edge in by_row]
    assert joint.edge_id is None or joint.edge_id.tolist() == by_row
    if graph.weight is None:
        assert batch.edge_weight is None
    else:
        assert batch.edge_weight.tolist() == [graph.weight[place].item() for _, _, place in edges]
    dtypes = {t.dtype for t in (*batch.inner, *batch.outer, batch.outer_slot)}
    assert dtypes == {torch.int32}


def spans_of(node_ids: Sequence[int]) -> list[list[int]]:
    """The clusters' ranges, from the ids alone where no two clusters follow each other; see `apart`."""
    starts = [0, *(place for place in range(1, len(node_ids)) if node_ids[place] != node_ids[place - 1] + 1)]
    ends = [*starts[1:], len(node_ids)]
    return [[node_ids[start], node_ids[end - 1] + 1] for start, end in zip(starts, ends, strict=True)]


def apart(clusters: Sequence[int]) -> list[int]:
    """The clusters without those that follow the one before, so that `spans_of` is defined."""
    kept: list[int] = []
    for cluster in clusters:
        if not kept or cluster != kept[-1] + 1:
            kept.append(cluster)
    return kept


def ids_of(parts: Partition, clusters: Sequence[int]) -> list[int]:
    ptr = parts.ptr.tolist()
    return [node for cluster in clusters for node in range(ptr[cluster], ptr[cluster + 1])]


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [[0], [3], [4, 1], [5, 3, 1, 0], [2, 0, 4]])
@pytest.mark.parametrize("kind", ["random", "metis"])
@pytest.mark.parametrize("name", ["directed", "symmetric", "weighted_directed", "weighted_symmetric", "simple"])
def test_plan_is_the_one_of_a_dictionary(name: str, kind: str, clusters: list[int]) -> None:
    graph, parts = partitioned(GRAPHS[name], 6, kind)
    assert_is_plan(ClusterLoader(graph, parts).batch(clusters), graph, ids_of(parts, clusters))


@given(seed=st.integers(0, 1000), num_parts=st.integers(1, 8), data=st.data())
@settings(deadline=None, max_examples=50)
def test_any_group_of_clusters_is_planned(seed: int, num_parts: int, data: st.DataObject) -> None:
    edges = random_edges(
        num_nodes=data.draw(st.integers(9, 20)),
        num_edges=data.draw(st.integers(0, 60)),
        weighted=data.draw(st.booleans()),
        symmetric=data.draw(st.booleans()),
        seed=seed,
    )
    graph, parts = partitioned(edges, num_parts)
    group = data.draw(st.lists(st.integers(0, parts.num_parts - 1), min_size=1, unique=True))
    clusters = apart(group)
    assert_is_plan(ClusterLoader(graph, parts).batch(clusters), graph, ids_of(parts, clusters))


@pytest.mark.parametrize("name", ["no_edges", "one_node"])
def test_plan_of_a_graph_without_structure(name: str) -> None:
    graph, parts = partitioned(GRAPHS[name])
    for cluster in range(parts.num_parts):
        batch = ClusterLoader(graph, parts).batch([cluster])
        assert_is_plan(batch, graph, ids_of(parts, [cluster]))
        assert batch.num_halo == 0


def test_batch_without_halo() -> None:
    triangle = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graph = Graph.from_edge_index(torch.cat([triangle, triangle + 3], dim=1))
    x = torch.rand(6, 2)
    batch = ClusterLoader(graph, contiguous_partition(graph, [3, 3]), x=x).batch([1])
    assert_is_plan(batch, graph, [3, 4, 5])
    assert batch.num_halo == 0
    assert torch.equal(batch.x, x[3:])


def plan_arrays(batch: Batch) -> list[list[int]]:
    tensors = (*batch.inner, *batch.outer, batch.outer_slot, batch.node_ids, batch.halo_ids, batch.edge_ids)
    return [t.tolist() for t in tensors]


def test_planning_leaves_nothing_behind() -> None:
    loader = make_loader(shuffle=True, batch_size=2)
    first, other = [0, 4], [4, 2]
    before = plan_arrays(loader.batch(first))
    assert bool((loader._planner._local == -1).all())
    assert plan_arrays(loader.batch(other)) != before
    assert plan_arrays(loader.batch(first)) == before
    assert bool((loader._planner._local == -1).all())


def test_full_is_the_whole_graph() -> None:
    loader = make_loader(x=torch.rand(30, 2), y=torch.arange(30))
    batch = loader.full()
    assert_is_plan(batch, loader.graph, range(30))
    assert batch.inner.col.data_ptr() == loader.graph.col.data_ptr()
    assert torch.equal(batch.x, loader.x)
    assert torch.equal(batch.y, torch.arange(30))
    assert loader.full().inner.col is batch.inner.col


# --- which clusters make a batch -------------------------------------------------------------------------------------


def epoch(loader: ClusterLoader) -> list[list[int]]:
    return [batch.clusters for batch in loader]


@pytest.mark.parametrize("batch_size, sizes", [(1, [1] * 10), (3, [3, 3, 3, 1]), (10, [10]), (50, [10])])
def test_an_epoch_has_every_cluster_once(batch_size: int, sizes: list[int]) -> None:
    loader = make_loader(num_parts=10, batch_size=batch_size)
    for _ in range(2):
        groups = epoch(loader)
        assert [len(group) for group in groups] == sizes
        assert sorted(itertools.chain.from_iterable(groups)) == list(range(10))
    assert len(loader) == len(sizes)


def test_order_is_seeded_and_new_each_epoch() -> None:
    loader = make_loader(num_parts=10, batch_size=3, seed=7)
    first, second = epoch(loader), epoch(loader)
    assert first != second
    again = make_loader(num_parts=10, batch_size=3, seed=7)
    assert [epoch(again), epoch(again)] == [first, second]
    assert loader.epoch == 2
    loader.epoch = 0
    assert epoch(loader) == first
    assert epoch(make_loader(num_parts=10, batch_size=3, seed=8)) != first


def test_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    epoch(make_loader(num_parts=10, batch_size=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_shuffle_groups_are_consecutive() -> None:
    loader = make_loader(num_parts=5, batch_size=2, shuffle=False)
    assert epoch(loader) == epoch(loader) == [[0, 1], [2, 3], [4]]
    shuffled = make_loader(num_parts=5, batch_size=2, x=torch.rand(30, 2), y=torch.arange(30))
    assert [batch.clusters for batch in shuffled.in_order()] == [[0, 1], [2, 3], [4]]
    assert shuffled.epoch == 0
    for batch in shuffled.in_order():
        assert torch.equal(batch.x, shuffled.x[batch.all_ids])
        assert torch.equal(batch.y, batch.node_ids)


@pytest.mark.parametrize("options", [{"shuffle": False, "batch_size": 2}, {"shuffle": True, "batch_size": 1}])
def test_groups_that_repeat_are_planned_once(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(**options)
    first = {tuple(batch.clusters): batch for batch in loader}

    def fail(*_: object) -> None:
        raise AssertionError("planned twice")

    monkeypatch.setattr(Planner, "plan", fail)
    for batch in loader:
        before = first[tuple(batch.clusters)]
        for ours, theirs in zip((*batch.inner, *batch.outer), (*before.inner, *before.outer), strict=True):
            assert ours.data_ptr() == theirs.data_ptr()
        assert batch.transposed_inner(False)[0] is before.transposed_inner(False)[0]


# --- node tensors ----------------------------------------------------------------------------------------------------


def test_node_tensors_are_sliced_to_the_rows() -> None:
    x, y, mask = torch.rand(30, 4), torch.rand(30, 2, 3), torch.rand(30) < 0.5
    loader = make_loader(batch_size=2, x=x, y=y, train_mask=mask, val_mask=None)
    for batch in loader:
        rows = [*batch.node_ids.tolist(), *batch.halo_ids.tolist()]
        assert batch.x.tolist() == [x[row].tolist() for row in rows]
        assert batch.y.tolist() == [y[row].tolist() for row in batch.node_ids.tolist()]
        assert batch.train_mask.tolist() == [bool(mask[row]) for row in batch.node_ids.tolist()]
        assert batch.x is batch.x
        assert not hasattr(batch, "val_mask")


def test_features_read_the_table_in_place() -> None:
    x = torch.rand(30, 4)
    batch = make_loader(batch_size=2, x=x).batch([1, 4])
    assert batch.features.table is x
    assert batch.features.num_features == 4
    assert torch.equal(batch.features.rows(), batch.x)
    assert torch.equal(batch.features.in_batch(), x[batch.node_ids])


def test_planned_batches_do_not_keep_slices() -> None:
    loader = make_loader(batch_size=1, x=torch.zeros(30, 2))
    before = loader.batch([0]).x
    loader.x.fill_(1)
    assert loader.batch([0]).x.unique().tolist() == [1]
    assert before.unique().tolist() == [0]


def test_unknown_attribute_says_what_there_is() -> None:
    batch = make_loader(y=torch.arange(30)).batch([0])
    with pytest.raises(AttributeError, match="batch has no 'test_mask'; node tensors given to the loader: y"):
        _ = batch.test_mask
    with pytest.raises(AttributeError, match="give the loader x=features"):
        _ = batch.x
    with pytest.raises(AttributeError, match="give the loader x=features"):
        _ = batch.features


# --- views of the edges ----------------------------------------------------------------------------------------------


def matrix(csr: Csr | Transposed, value: Tensor, num_cols: int) -> sp.csr_matrix:
    shape = (csr.rowptr.numel() - 1, num_cols)
    return sp.csr_matrix((value.double().numpy(), csr.col.numpy(), csr.rowptr.numpy()), shape=shape, copy=True)


def expected_matrix(graph: Graph, batch: Batch) -> sp.csr_matrix:
    """[B x (B + H)] by plain indexing; duplicates are summed."""
    edges = block(graph, batch.node_ids.tolist())
    weight = torch.ones(edges.source.numel()) if edges.weight is None else edges.weight
    shape = (batch.num_nodes, batch.num_nodes + batch.num_halo)
    return sp.csr_matrix((weight.double().numpy(), (edges.target.numpy(), edges.source.numpy())), shape=shape)


@pytest.mark.parametrize("name", ["directed", "weighted_directed", "weighted_symmetric"])
def test_transposes_are_those_of_scipy(name: str) -> None:
    loader = make_loader(name)
    batch = loader.batch([1, 4, 2])
    weight = torch.ones(batch.num_edges) if batch.edge_weight is None else batch.edge_weight
    joint = expected_matrix(loader.graph, batch)
    inner = joint[:, : batch.num_nodes]

    transposed, _ = batch.transposed_joint()
    assert abs(matrix(transposed, weight[transposed.edge_id], batch.num_nodes) - joint.T).max() == 0
    transposed, _ = batch.transposed_inner(shared=False)
    by_source = weight[: batch.inner.num_edges][transposed.edge_id]
    assert abs(matrix(transposed, by_source, batch.num_nodes) - inner.T).max() == 0
    if name == "weighted_symmetric":
        assert batch.symmetric
        shared, _ = batch.transposed_inner(shared=True)
        assert shared.col.data_ptr() == batch.inner.col.data_ptr()
        assert abs(matrix(shared, weight[: batch.inner.num_edges], batch.num_nodes) - inner.T).max() == 0


def hub_chunks(degrees: Sequence[int], hub_edges: int) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    chunks, rows, ptr = [], [], [0]
    for row, degree in enumerate(degrees):
        if degree > hub_edges:
            chunks += [(row, first) for first in range(0, degree, hub_edges)]
            rows.append(row)
            ptr.append(len(chunks))
    return chunks, rows, ptr


@given(degrees=st.lists(st.integers(0, 30), min_size=1, max_size=12), hub_edges=st.integers(1, 9))
@settings(deadline=None, max_examples=80)
def test_hub_rows_are_cut_into_chunks(degrees: list[int], hub_edges: int) -> None:
    rowptr = torch.tensor([0, *np.cumsum(degrees)], dtype=torch.int32)
    found = find_hubs(rowptr, sum(degrees), hub_edges)
    chunks, rows, ptr = hub_chunks(degrees, hub_edges)
    if not found:
        assert rows == []
        return
    chunk_row, chunk_start, hub_row, hub_ptr = (t.tolist() for t in found)
    assert list(zip(chunk_row, chunk_start, strict=True))[: len(chunks)] == chunks
    assert set(chunk_row[len(chunks) :]) <= {-1}
    assert hub_row[: len(rows)] == rows
    assert set(hub_row[len(rows) :]) <= {-1}
    assert hub_ptr[: len(ptr)] == ptr
    assert set(hub_ptr[len(ptr) :]) <= {ptr[-1]}
    assert len(hub_ptr) == len(hub_row) + 1


def test_a_batch_counts_the_edges_of_a_hub_over_both_blocks() -> None:
    star = torch.stack([torch.arange(1, 20), torch.zeros(19, dtype=torch.int64)])
    graph = Graph.from_edge_index(star, num_nodes=20)
    planner = Planner(graph, hub_edges=8)
    batch = planner.plan([0], [(0, 6)], [(0, 19)])
    assert batch.inner.num_edges == 5
    chunks, rows, _ = hub_chunks([19, 0, 0, 0, 0, 0], 8)
    chunk_row, chunk_start, hub_row, _ = (t.tolist() for t in batch.hubs)
    assert list(zip(chunk_row, chunk_start, strict=True))[: len(chunks)] == chunks
    assert hub_row[:1] == rows


# --- moving ----------------------------------------------------------------------------------------------------------


def test_batch_on_its_device_is_itself() -> None:
    batch = make_loader().batch([0])
    assert batch.to("cpu") is batch


def test_to_moves_the_plan_and_the_sliced_tensors() -> None:
    loader = make_loader(batch_size=2, x=torch.rand(30, 4), y=torch.arange(30))
    batch = loader.batch([2, 5])
    moved = batch.to("meta")
    arrays = (*moved.inner, *moved.outer, moved.outer_slot, moved.node_ids, moved.halo_ids, moved.edge_weight)
    assert {t.device.type for t in (*arrays, moved.edge_ids, moved.x, moved.y, *moved.hubs)} == {"meta"}
    assert moved.x.shape == batch.x.shape
    assert batch.x.device.type == "cpu"
    assert (moved.num_nodes, moved.num_halo, moved.clusters) == (batch.num_nodes, batch.num_halo, [2, 5])
    with pytest.raises(ValueError, match="x is on cpu and the batch on meta"):
        _ = moved.features


def test_node_tensors_that_live_where_the_batch_goes_are_sliced_there() -> None:
    loader = make_loader(batch_size=2)
    table = torch.empty(loader.graph.num_nodes, 3, device="meta")
    batch = loader.batch([0, 1]).with_tensors(None, {"y": table, "mine": torch.arange(loader.graph.num_nodes)})
    moved = batch.to("meta")
    assert list(moved._sliced) == ["mine"]
    assert moved.y.shape == (batch.num_nodes, 3)


def test_record_stream_makes_nothing() -> None:
    batch = make_loader(batch_size=2, x=torch.randn(30, 4)).batch([0, 1])
    batch.record_stream(torch.Stream(device="cpu"))
    assert batch._sliced == {}


@pytest.mark.gpu
def test_plans_made_on_the_gpu_and_pinned_plans_are_equal() -> None:
    graph, parts = partitioned(GRAPHS["weighted_directed"])
    x = torch.rand(30, 4)
    batch = ClusterLoader(graph, parts, x=x).batch([2, 5])
    on_device = ClusterLoader(graph.to("cuda"), parts, x=x.cuda()).batch([2, 5])
    for other in (on_device, batch.to("cuda"), batch.pin_memory()):
        assert plan_arrays(other) == plan_arrays(batch)
        assert torch.equal(other.x.cpu(), batch.x)
    assert batch.pin_memory().inner.col.is_pinned()


def test_repr_says_what_is_in_a_batch() -> None:
    batch = make_loader(num_parts=10).batch([2, 5])
    sizes = f"num_nodes=6, num_halo={batch.num_halo}, num_edges={batch.num_edges}"
    assert repr(batch) == f"Batch({sizes}, clusters=2, device=cpu)"
    assert repr(make_loader(batch_size=4)).startswith("ClusterLoader(num_batches=2, batch_size=4, num_parts=6")


def test_an_interrupted_plan_leaves_a_clean_map(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader()
    expected = loader.batch([1, 2])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loader._planner, "_halo", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loader.batch([0, 3])
    again = loader.batch([1, 2])
    for a, b in zip((*expected.inner, *expected.outer), (*again.inner, *again.outer), strict=True):
        assert torch.equal(a, b)


def test_a_graph_that_was_not_permuted_is_refused() -> None:
    graph, parts = partitioned(GRAPHS["weighted_directed"], 3)
    with pytest.raises(ValueError, match="graph is not in the order of parts"):
        ClusterLoader(parts.graph, parts)
    assert len(ClusterLoader(graph, parts)) == 3


@pytest.mark.parametrize("name", ["clusters", "hubs", "features", "to"])
def test_a_node_tensor_cannot_hide_an_attribute(name: str) -> None:
    with pytest.raises(ValueError, match=f"node tensors cannot be named {name}"):
        make_loader(**{name: torch.zeros(30)})

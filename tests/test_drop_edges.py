"""`Batch.drop_edges`: which edges stay, that every view of them agrees, and that nothing else changes."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gas_triton import Batch, ClusterLoader, functional, random_partition
from gas_triton.csr import find_hubs
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.planner import Planner

from .reference import GRAPHS, brute_force_plan, random_edges

NAMES = ["directed", "symmetric", "weighted_directed", "weighted_symmetric"]


def make_batch(name: str = "weighted_directed", clusters: Sequence[int] = (0, 3), hub_edges: int = 512) -> Batch:
    graph = GRAPHS[name].graph()
    parts = random_partition(graph, min(6, graph.num_nodes))
    graph, x = parts.permute(graph, torch.rand(graph.num_nodes, 3, dtype=torch.float64))
    loader = ClusterLoader(graph, parts, x=x, y=torch.arange(graph.num_nodes))
    loader._planner = Planner(graph, hub_edges)
    return loader.batch(list(clusters))


def dense(batch: Batch) -> Tensor:
    """The weights of the batch's edges as [B, B + H], from the blocks alone."""
    weight = batch.edge_weight if batch.edge_weight is not None else torch.ones(batch.num_edges, dtype=torch.float64)
    row = torch.cat([row_of_edge(*batch.inner), row_of_edge(*batch.outer)])
    col = torch.cat([batch.inner.col.long(), batch.outer_slot.long() + batch.num_nodes])
    matrix = torch.zeros(batch.num_nodes, batch.num_nodes + batch.num_halo, dtype=torch.float64)
    return matrix.index_put_((row, col), weight, accumulate=True)


# --- which edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.2, 0.5, 0.97])
@pytest.mark.parametrize("name", NAMES)
def test_the_edges_that_stay_are_edges_of_the_plan_in_its_order(name: str, p: float) -> None:
    batch = make_batch(name)
    graph = GRAPHS[name].graph()
    graph = random_partition(graph, 6).permute(graph)
    plan = brute_force_plan(graph, batch.node_ids.tolist())
    dropped = batch.drop_edges(p, seed=3)
    stays = set(dropped.edge_ids.tolist())
    inner, outer = ([edge for edge in edges if edge[2] in stays] for edges in (plan.inner, plan.outer))
    assert dropped.num_edges == len(stays) == len(inner) + len(outer) < batch.num_edges
    assert dropped.edge_ids.tolist() == [place for _, _, place in inner + outer]
    assert row_of_edge(*dropped.inner).tolist() == [row for row, _, _ in inner]
    assert dropped.inner_graph_col.tolist() == [col for _, col, _ in inner]
    assert row_of_edge(*dropped.outer).tolist() == [row for row, _, _ in outer]
    assert dropped.outer.col.tolist() == [col for _, col, _ in outer]
    assert batch.halo_ids[dropped.outer_slot].tolist() == dropped.outer.col.tolist()
    if graph.weight is None:
        assert dropped.edge_weight is None
    else:
        torch.testing.assert_close(dropped.edge_weight, graph.weight[dropped.edge_ids] / (1 - p))
    assert {t.dtype for t in (*dropped.inner, *dropped.outer, dropped.outer_slot)} == {torch.int32}


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_node_tensors_stay(name: str) -> None:
    batch = make_batch(name)
    x, _ = batch.x, batch.host_halo_ids
    dropped = batch.drop_edges(0.5, seed=0)
    # histories look rows up by these very tensors
    assert dropped.halo_ids is batch.halo_ids
    assert dropped.node_ids is batch.node_ids
    assert dropped.spans is batch.spans
    assert dropped.host_halo_ids is batch.host_halo_ids
    assert (dropped.num_nodes, dropped.num_halo) == (batch.num_nodes, batch.num_halo)
    assert torch.equal(dropped.x, x)
    assert torch.equal(dropped.y, batch.y)
    assert torch.equal(dropped.all_ids, batch.all_ids)
    assert not dropped.symmetric
    assert batch.has_all_edges
    assert not dropped.has_all_edges
    before = make_batch(name)
    assert batch.symmetric == before.symmetric
    assert torch.equal(dense(batch), dense(before))
    assert torch.equal(batch.edge_ids, before.edge_ids)


def test_probability_zero_is_the_batch_itself() -> None:
    batch, state = make_batch(), torch.get_rng_state()
    assert batch.drop_edges(0.0) is batch
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [1.0, -0.1, math.nan])
def test_a_probability_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=rf"p must be in \[0, 1\), got {p}"):
        make_batch().drop_edges(p)


def test_the_seed_names_the_draw() -> None:
    batch = make_batch()

    def draw(seed: int | None = None) -> list[int]:
        return batch.drop_edges(0.5, seed).edge_ids.tolist()

    assert draw(1) == draw(1) != draw(2)
    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert [draw(), draw()] == [first, second]
    assert first != second


def test_edges_are_left_out_independently_and_as_often_as_asked() -> None:
    batch, p, draws = make_batch("directed"), 0.3, 4000
    place = {edge: number for number, edge in enumerate(batch.edge_ids.tolist())}
    stays = torch.zeros(draws, batch.num_edges, dtype=torch.float64)
    for seed in range(draws):
        kept = batch.drop_edges(p, seed).edge_ids.tolist()
        stays[seed, [place[edge] for edge in kept]] = 1.0
    error = math.sqrt(p * (1 - p) / draws)
    assert (stays.mean(0) - (1 - p)).abs().max() < 4.5 * error
    # edges of one block that excluded each other, as draws of a fixed number do, would correlate by -1 / edges
    correlation = torch.corrcoef(stays.T) - torch.eye(batch.num_edges)
    assert correlation.abs().max() < 5.5 / math.sqrt(draws)
    count = stays.sum(1)
    expected = batch.num_edges * p * (1 - p)
    assert float(count.var()) == pytest.approx(expected, rel=5 * math.sqrt(2 / draws))


def test_a_weighted_sum_keeps_its_expectation() -> None:
    batch, draws, p = make_batch(), 3000, 0.4
    total = sum((dense(batch.drop_edges(p, seed)) for seed in range(draws)), start=torch.zeros(()))
    error = dense(batch) * math.sqrt(p / (1 - p) / draws)
    assert ((total / draws - dense(batch)).abs() <= 5 * error).all()


# --- every view -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.3, 0.99])
@pytest.mark.parametrize("name", NAMES)
def test_views_made_before_and_after_are_of_the_edges_that_stay(name: str, p: float) -> None:
    batch = make_batch(name)
    # what the whole batch has made must not be given by the result
    batch.joint()
    batch.transposed_joint()
    batch.transposed_inner(shared=batch.symmetric)
    dropped = batch.drop_edges(p, seed=1)
    matrix, num_nodes = dense(dropped), batch.num_nodes
    ones = torch.ones(dropped.num_edges, dtype=torch.float64)
    weight = ones if dropped.edge_weight is None else dropped.edge_weight
    for has_halo in (True, False):
        joint, (transposed, _) = dropped.joint(has_halo), dropped.joint_transposed(has_halo)
        columns = slice(None) if has_halo else slice(num_nodes)
        for view, expected in ((joint, matrix[:, columns]), (transposed, matrix[:, columns].T)):
            found = torch.zeros_like(expected)
            edge_id = torch.arange(view.col.numel()) if view.edge_id is None else view.edge_id.long()
            found.index_put_((row_of_edge(view.rowptr, view.col), view.col.long()), weight[edge_id], accumulate=True)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", NAMES)
def test_aggregation_and_its_gradient_are_of_the_edges_that_stay(name: str, reduce: str) -> None:
    dropped = make_batch(name).drop_edges(0.4, seed=2)
    x = torch.randn(dropped.num_nodes + dropped.num_halo, 3, dtype=torch.float64, requires_grad=True)
    out = functional.aggregate(x, dropped, reduce=reduce, edge_weight=dropped.edge_weight)
    row = torch.cat([row_of_edge(*dropped.inner), row_of_edge(*dropped.outer)])
    col = torch.cat([dropped.inner.col.long(), dropped.outer_slot.long() + dropped.num_nodes])
    message = x[col] if dropped.edge_weight is None else x[col] * dropped.edge_weight[:, None]
    name_of = {"sum": "sum", "mean": "mean", "max": "amax"}[reduce]
    expected = x.new_zeros(dropped.num_nodes, 3)
    expected = expected.scatter_reduce(0, row[:, None].expand_as(message), message, name_of, include_self=False)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    if reduce != "max":  # copies of an edge are equal extrema, whose gradient is one copy's or shared
        torch.testing.assert_close(*(torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (out, expected)))


def test_hubs_are_found_again_and_only_where_there_were_some() -> None:
    edges = random_edges(num_nodes=20, num_edges=400, isolated=0)
    graph = edges.graph()
    parts = random_partition(graph, 2)
    graph = parts.permute(graph)
    spans, cut = [(0, int(parts.ptr[1]))], [(0, int(graph.rowptr[parts.ptr[1]]))]
    batch = Planner(graph, hub_edges=8).plan([0], spans, cut)
    assert len(batch.hubs) == 4
    dropped = batch.drop_edges(0.6, seed=0)
    degree = (dropped.inner.rowptr + dropped.outer.rowptr).diff()
    rows = dropped.hubs[2].tolist()
    assert [row for row in rows if row >= 0] == (degree > 8).nonzero().flatten().tolist()
    assert 0 < int((degree > 8).sum()) < dropped.num_nodes
    _, hubs = dropped.transposed_joint()
    rowptr, col, _ = dropped.transposed_joint()[0]
    assert all(torch.equal(a, b) for a, b in zip(hubs, find_hubs(rowptr, col.numel(), 8), strict=True))
    assert Planner(graph).plan([0], spans, cut).drop_edges(0.6, seed=0).hubs == []


def test_the_whole_graph_as_a_batch_and_batches_without_edges() -> None:
    graph = GRAPHS["weighted_symmetric"].graph()
    loader = ClusterLoader(graph, random_partition(graph, 1), x=torch.rand(graph.num_nodes, 2))
    full = loader.full()
    dropped = full.drop_edges(0.5, seed=0)
    assert full.symmetric
    assert not dropped.symmetric
    assert torch.equal(dropped.edge_weight, graph.weight[dropped.edge_ids] * 2)
    assert torch.equal(dropped.inner.col, graph.col[dropped.edge_ids])
    bare = make_batch("no_edges", [0])
    assert bare.drop_edges(0.5).num_edges == 0


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device() -> None:
    graph = random_edges(num_nodes=500, num_edges=40_000, weighted=True).graph()
    parts = random_partition(graph, 4)
    graph = parts.permute(graph)
    loader = ClusterLoader(graph.to("cuda"), parts, batch_size=2)
    loader._planner = Planner(loader.graph, hub_edges=32)
    batch = loader.batch([0, 2])
    batch.drop_edges(0.5, seed=0).transposed_joint()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dropped = batch.drop_edges(0.5, seed=0)
        dropped.transposed_joint()
        again = batch.drop_edges(0.5, seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(dropped.edge_ids, again.edge_ids)
    assert torch.equal(dropped.edge_weight, batch.edge_weight[torch.isin(batch.edge_ids, dropped.edge_ids)] * 2)

"""Edge features: which row belongs to which edge, through everything that reorders edges."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gas_triton import ClusterLoader, Graph, random_partition

from .reference import GRAPHS, Edges, brute_force_plan


def features_of(source: Tensor, target: Tensor) -> Tensor:
    """Features from which the edge can be told."""
    return torch.stack([1000.0 * source + target, source.double() - target, torch.ones(source.numel())], dim=1)


def make_graph(edges: Edges) -> Graph:
    return Graph.from_edge_index(edges.edge_index, edges.weight, edges.num_nodes, features_of(*edges.edge_index))


@pytest.mark.parametrize("name", GRAPHS)
def test_features_follow_their_edges(name: str) -> None:
    graph = make_graph(GRAPHS[name])
    assert torch.equal(graph.edge_attr, features_of(*graph.edge_index()))
    perm = torch.randperm(graph.num_nodes)
    renamed = graph.permute(perm)
    assert torch.equal(renamed.edge_attr, features_of(*perm[renamed.edge_index()]))
    normalized = graph.gcn_norm()
    assert normalized.edge_attr is graph.edge_attr
    unsorted = graph.edge_index()[:, torch.randperm(graph.num_edges)]
    order = torch.sort(unsorted[1], stable=True).indices
    from_csr = Graph.from_csr(graph.rowptr, unsorted[0, order], None, features_of(*unsorted[:, order]))
    assert torch.equal(from_csr.edge_attr, graph.edge_attr)


@pytest.mark.parametrize("clusters", [[1, 2, 4], [0], [3, 5]])
def test_a_batch_gives_features_and_edges_in_its_edge_order(clusters: list[int]) -> None:
    graph = make_graph(GRAPHS["weighted_directed"])
    parts = random_partition(graph, 6)
    graph, node = parts.permute(graph, torch.arange(graph.num_nodes))
    for batch in (ClusterLoader(graph, parts).batch(clusters), ClusterLoader(graph, parts).full()):
        plan = brute_force_plan(graph, batch.node_ids.tolist())
        edges = [*plan.inner, *plan.outer]
        place = torch.tensor([place for *_, place in edges])
        assert torch.equal(batch.edge_attr, graph.edge_attr[place])
        all_ids = torch.tensor([*plan.node_ids, *plan.halo_ids])
        assert torch.equal(all_ids[batch.edge_index[0]], torch.tensor([source for _, source, _ in edges]))
        assert torch.equal(batch.edge_index[1], torch.tensor([row for row, *_ in edges]))
        source, target = node[all_ids[batch.edge_index]]
        assert torch.equal(batch.edge_attr, features_of(source, target))
        assert batch.edge_index.dtype == torch.int64
        assert batch.edge_attr is batch.edge_attr


def test_features_move_with_the_graph_and_the_batch() -> None:
    graph = make_graph(GRAPHS["directed"])
    parts = random_partition(graph, 6)
    graph = parts.permute(graph)
    assert graph.nbytes - Graph.from_csr(graph.rowptr, graph.col).nbytes == graph.edge_attr.nbytes
    assert graph.to("meta").edge_attr.device.type == "meta"
    batch = ClusterLoader(graph, parts).batch([1, 2])
    assert batch.to("meta").edge_attr.shape == batch.edge_attr.shape
    assert batch.to("meta").edge_attr.device.type == "meta"


def test_features_are_brought_to_a_batch_elsewhere_when_it_loads() -> None:
    graph = make_graph(GRAPHS["directed"])
    batch = ClusterLoader(graph, random_partition(graph, 1)).full()
    batch._edge_attr = graph.edge_attr.to("meta")
    assert batch._edge_rows is None
    with pytest.raises(NotImplementedError, match="meta"):
        batch.load()


def test_a_copy_with_other_edges_has_their_features() -> None:
    graph = make_graph(GRAPHS["directed"])
    batch = ClusterLoader(graph, random_partition(graph, 1)).full()
    assert torch.equal(batch.edge_attr, graph.edge_attr)
    other = copy.copy(batch)
    other._edge_ids, other._made = (lambda: torch.tensor([3, 1])), {}
    assert torch.equal(other.edge_attr, graph.edge_attr[[3, 1]])
    assert torch.equal(batch.edge_attr, graph.edge_attr)


def test_integer_types_of_edges_are_kept() -> None:
    edges = GRAPHS["directed"]
    kind = torch.arange(edges.edge_index.size(1))
    graph = Graph.from_edge_index(edges.edge_index, num_nodes=edges.num_nodes, edge_attr=kind)
    assert graph.edge_attr.dtype == torch.int64
    assert torch.equal(edges.edge_index[:, graph.edge_attr], graph.edge_index())


def test_without_features_there_are_none() -> None:
    graph = GRAPHS["directed"].graph()
    assert graph.add_self_loops().edge_attr is None
    assert ClusterLoader(graph, random_partition(graph, 1)).full().edge_attr is None


@pytest.mark.interop
@pytest.mark.parametrize("fill", ["mean", "add", "min", "max", 2.5, torch.tensor([1.0, 2.0, 3.0]).double()])
@pytest.mark.parametrize("name", ["simple", "directed", "no_edges"])
def test_loops_get_the_features_that_pyg_gives(
    name: str, fill: float | str | Tensor, torch_geometric: ModuleType
) -> None:
    edges = GRAPHS[name]
    graph = make_graph(edges)
    edge_index, expected = torch_geometric.utils.add_remaining_self_loops(
        edges.edge_index, features_of(*edges.edge_index), fill, edges.num_nodes
    )
    expected = Graph.from_edge_index(edge_index, num_nodes=edges.num_nodes, edge_attr=expected)
    looped = graph.add_self_loops(edge_attr_fill=fill)
    assert torch.equal(looped.edge_index(), expected.edge_index())
    torch.testing.assert_close(looped.edge_attr, expected.edge_attr)


@pytest.mark.interop
@pytest.mark.parametrize("form", ["edge_index", "SparseTensor", "torch csr"])
def test_from_pyg(form: str, torch_geometric: ModuleType, torch_sparse: ModuleType) -> None:
    # without duplicates, which PyG sums on the way to torch CSR
    edges = GRAPHS["simple"]
    data = torch_geometric.data.Data(
        edge_index=edges.edge_index, edge_attr=features_of(*edges.edge_index), num_nodes=edges.num_nodes
    )
    if form != "edge_index":
        layout = torch.sparse_csr if form == "torch csr" else None
        data = torch_geometric.transforms.ToSparseTensor(layout=layout)(data)
    graph = Graph.from_pyg(data)
    assert torch.equal(graph.edge_attr, make_graph(edges).edge_attr)
    assert (graph.weight is None) == (form != "torch csr")


@pytest.mark.parametrize(
    "attr, error, message",
    [
        (torch.ones(3, 2), ValueError, r"edge_attr must have 2 rows, one for each edge, got shape \[3, 2\]"),
        (torch.tensor(1.0), ValueError, r"edge_attr must have 2 rows, one for each edge, got shape \[\]"),
        ([[1.0], [2.0]], TypeError, r"edge_attr must be a tensor \[2, ...\], got list"),
        (torch.ones(2, 2, device="meta"), ValueError, "edge_attr is on meta but the edges are on cpu"),
    ],
)
def test_wrong_features_are_refused(attr: Tensor, error: type[Exception], message: str) -> None:
    edge_index = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(error, match=message):
        Graph.from_edge_index(edge_index, edge_attr=attr)
    with pytest.raises(error, match=message):
        Graph.from_csr(torch.tensor([0, 0, 1, 2]), edge_index[0], edge_attr=attr)


@pytest.mark.parametrize(
    "fill, message",
    [
        ("median", "edge_attr_fill must be a number, a tensor, or one of mean, add, min, max, got 'median'"),
        (torch.ones(2), r"the shape of one edge's features, \[3\], got \[2\]"),
    ],
)
def test_wrong_fills_are_refused(fill: str | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_graph(GRAPHS["directed"]).add_self_loops(edge_attr_fill=fill)

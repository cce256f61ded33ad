"""Graph: every builder, conversion and normalisation against scipy, plain Python and torch_geometric."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gas_triton import Graph
from gas_triton.memory import peak_bytes

from .reference import GRAPHS, Edges, random_edges


@pytest.fixture(params=GRAPHS)
def edges(request: pytest.FixtureRequest) -> Edges:
    return GRAPHS[request.param]


def triples(graph: Graph) -> list[tuple[int, int, float]]:
    return Edges(graph.edge_index(), graph.weight, graph.num_nodes).triples()


def assert_is_csr_of(graph: Graph, edges: Edges) -> None:
    source, target = edges.edge_index.tolist()
    order = sorted(range(len(source)), key=lambda edge: (target[edge], source[edge]))
    assert graph.num_nodes == edges.num_nodes
    assert graph.rowptr.dtype == graph.col.dtype == torch.int32
    assert graph.rowptr.tolist() == [0, *np.bincount(target, minlength=edges.num_nodes).astype(int).cumsum().tolist()]
    assert graph.col.tolist() == [source[edge] for edge in order]
    assert triples(graph) == edges.triples()


def to_scipy(rowptr: Tensor, col: Tensor, weight: Tensor | None) -> sp.csr_matrix:
    num_nodes = rowptr.numel() - 1
    value = np.ones(col.numel()) if weight is None else weight.numpy()
    matrix = sp.csr_matrix((value, col.numpy(), rowptr.numpy()), shape=(num_nodes, num_nodes), copy=True)
    matrix.sum_duplicates()
    return matrix


def assert_equal_matrices(left: sp.csr_matrix, right: sp.csr_matrix, atol: float = 1e-12) -> None:
    assert left.shape == right.shape
    assert abs(left - right).max() <= atol


# --- builders --------------------------------------------------------------------------------------------------------


def unsorted_csr(edges: Edges) -> tuple[Tensor, Tensor, Tensor | None]:
    """CSR arrays whose columns are in no order within a row."""
    target = edges.edge_index[1]
    order = torch.sort(target, stable=True).indices
    rowptr = torch.cat([torch.zeros(1), torch.bincount(target, minlength=edges.num_nodes).cumsum(0)]).long()
    return rowptr, edges.edge_index[0, order], None if edges.weight is None else edges.weight[order]


def ones_if_none(edges: Edges) -> Tensor:
    return torch.ones(edges.edge_index.size(1)) if edges.weight is None else edges.weight


def via_torch_csr(edges: Edges) -> Graph:
    rowptr, col, weight = unsorted_csr(edges)
    value = torch.ones(col.numel()) if weight is None else weight
    size = (edges.num_nodes, edges.num_nodes)
    return Graph.from_torch_csr(torch.sparse_csr_tensor(rowptr, col, value, size=size, check_invariants=False))


BUILDERS: dict[str, Callable[[Edges], Graph]] = {
    "edge_index": lambda e: Graph.from_edge_index(e.edge_index, e.weight, e.num_nodes),
    "int32": lambda e: Graph.from_edge_index(e.edge_index.int(), e.weight, e.num_nodes),
    "not_contiguous": lambda e: Graph.from_edge_index(e.edge_index.T.contiguous().T, e.weight, e.num_nodes),
    "column_of_weights": lambda e: Graph.from_edge_index(e.edge_index, ones_if_none(e)[:, None], e.num_nodes),
    "csr": lambda e: Graph.from_csr(*unsorted_csr(e)),
    "sorted_csr": lambda e: Graph.from_csr(e.graph().rowptr, e.graph().col, e.graph().weight),
    "torch_csr": via_torch_csr,
}


@pytest.mark.parametrize("builder", BUILDERS)
def test_builder_gives_the_sorted_csr_by_target(builder: str, edges: Edges) -> None:
    graph = BUILDERS[builder](edges)
    assert_is_csr_of(graph, edges)
    assert_equal_matrices(to_scipy(graph.rowptr, graph.col, graph.weight), edges.scipy())
    if builder not in ("column_of_weights", "torch_csr"):
        assert (graph.weight is None) == (edges.weight is None)


@given(
    num_nodes=st.integers(1, 12),
    pairs=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), st.floats(-4, 4, width=32)), max_size=40),
    is_weighted=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_any_edge_list_is_kept_and_transposed(
    num_nodes: int, pairs: list[tuple[int, int, float]], is_weighted: bool
) -> None:
    rows = [(source % num_nodes, target % num_nodes) for source, target, _ in pairs]
    edge_index = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).T
    weight = torch.tensor([w for _, _, w in pairs], dtype=torch.float64) if is_weighted else None
    edges = Edges(edge_index, weight, num_nodes)
    graph = edges.graph()
    assert_is_csr_of(graph, edges)
    matrix = edges.scipy()
    assert_equal_matrices(to_scipy(graph.rowptr, graph.col, graph.weight), matrix)
    transposed = graph.transpose()
    by_source = graph.weight
    if by_source is not None and transposed.edge_id is not None:
        by_source = by_source[transposed.edge_id]
    assert_equal_matrices(to_scipy(transposed.rowptr, transposed.col, by_source), matrix.T.tocsr())


def test_number_of_nodes_is_the_largest_id_plus_one_by_default() -> None:
    assert Graph.from_edge_index(torch.tensor([[0, 6], [2, 1]])).num_nodes == 7


def test_integer_values_of_a_torch_csr_become_weights() -> None:
    adj_t = torch.tensor([[0, 3], [4, 0]]).to_sparse_csr()
    assert Graph.from_torch_csr(adj_t).weight.tolist() == [3.0, 4.0]


def test_gradient_does_not_reach_the_given_weights() -> None:
    weight = torch.ones(1, requires_grad=True)
    assert not Graph.from_edge_index(torch.tensor([[0], [1]]), weight).weight.requires_grad


@pytest.mark.interop
def test_torch_sparse_round_trip(edges: Edges, torch_sparse: ModuleType) -> None:
    source, target = edges.edge_index
    adj_t = torch_sparse.SparseTensor(row=target, col=source, value=edges.weight, sparse_sizes=(edges.num_nodes,) * 2)
    graph = Graph.from_torch_sparse(adj_t)
    assert_is_csr_of(graph, edges)
    assert (graph.weight is None) == (edges.weight is None)
    back = graph.to_torch_sparse()
    row, col, value = back.coo()
    assert Edges(torch.stack([col, row]), value, edges.num_nodes).triples() == edges.triples()
    assert back.sizes() == [edges.num_nodes, edges.num_nodes]


@pytest.mark.interop
@pytest.mark.parametrize("form", ["edge_weight", "edge_attr", "wide edge_attr", "adj_t", "torch csr"])
def test_from_pyg(form: str, edges: Edges, torch_geometric: ModuleType, torch_sparse: ModuleType) -> None:
    data = torch_geometric.data.Data(num_nodes=edges.num_nodes)
    expected = edges
    if form == "adj_t":
        source, target = edges.edge_index
        data.adj_t = torch_sparse.SparseTensor(
            row=target, col=source, value=edges.weight, sparse_sizes=(edges.num_nodes,) * 2
        )
    elif form == "torch csr":
        data.adj_t = edges.graph().to_torch_csr()
    else:
        data.edge_index = edges.edge_index
        if form == "wide edge_attr":
            data.edge_attr = torch.rand(edges.edge_index.size(1), 3)
            expected = edges._replace(weight=None)
        else:
            data[form] = edges.weight
    assert_is_csr_of(Graph.from_pyg(data), expected)


def test_torch_csr_round_trip(edges: Edges) -> None:
    graph = edges.graph()
    matrix = graph.to_torch_csr()
    x = torch.rand(edges.num_nodes, 3, dtype=torch.float64)
    assert np.abs((matrix.double() @ x).numpy() - edges.scipy() @ x.numpy()).max() < 1e-12
    again = Graph.from_torch_csr(matrix)
    assert torch.equal(again.rowptr, graph.rowptr)
    assert torch.equal(again.col, graph.col)
    assert torch.equal(again.weight, ones_if_none(edges) if graph.weight is None else graph.weight)


# --- transpose and symmetry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask_symmetry_first", [False, True])
def test_transpose(edges: Edges, ask_symmetry_first: bool) -> None:
    graph = edges.graph()
    matrix = edges.scipy()
    is_symmetric = (matrix != matrix.T).nnz == 0
    if ask_symmetry_first:
        assert graph.is_symmetric == is_symmetric
    transposed = graph.transpose()
    assert graph.is_symmetric == is_symmetric
    if is_symmetric:
        assert transposed.edge_id is None
        assert transposed.rowptr.data_ptr() == graph.rowptr.data_ptr()
        assert transposed.col.data_ptr() == graph.col.data_ptr()
        return
    assert graph.transpose() is transposed
    source, target = graph.edge_index()
    by_source = torch.repeat_interleave(torch.arange(graph.num_nodes), transposed.rowptr.diff())
    assert torch.equal(source[transposed.edge_id], by_source)
    assert torch.equal(target[transposed.edge_id], transposed.col.long())
    assert sorted(transposed.edge_id.tolist()) == list(range(graph.num_edges))


def test_symmetry_takes_weights_and_copies_into_account() -> None:
    both = torch.tensor([[0, 1], [1, 0]])
    assert Graph.from_edge_index(both).is_symmetric
    assert Graph.from_edge_index(both, torch.tensor([2.0, 2.0])).is_symmetric
    assert not Graph.from_edge_index(both, torch.tensor([2.0, 3.0])).is_symmetric
    assert not Graph.from_edge_index(torch.tensor([[0, 1, 1], [1, 0, 0]])).is_symmetric
    assert not Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]])).is_symmetric


# --- self loops and normalisation ------------------------------------------------------------------------------------


def with_loops(edges: Edges, fill_value: float) -> Edges:
    """One loop a node; the last of several existing ones keeps its weight."""
    source, target = edges.edge_index.tolist()
    weight = [1.0] * len(source) if edges.weight is None else edges.weight.tolist()
    loop = dict.fromkeys(range(edges.num_nodes), fill_value)
    loop.update({s: w for s, t, w in zip(source, target, weight, strict=True) if s == t})
    kept = [(s, t, w) for s, t, w in zip(source, target, weight, strict=True) if s != t]
    rows = [*kept, *((node, node, w) for node, w in loop.items())]
    source, target, weight = zip(*rows, strict=True)
    return Edges(torch.tensor([source, target]), torch.tensor(weight, dtype=torch.float64), edges.num_nodes)


@pytest.mark.parametrize("fill_value", [1.0, 2.0])
def test_add_self_loops(edges: Edges, fill_value: float) -> None:
    graph = edges.graph().add_self_loops(fill_value)
    assert triples(graph) == with_loops(edges, fill_value).triples()
    assert graph.self_loop_weight == fill_value
    assert graph.normalization is None
    again = Graph(graph.csr, graph.weight)
    assert graph.is_symmetric == again.is_symmetric


@pytest.mark.interop
@pytest.mark.parametrize("fill_value", [1.0, 2.0])
def test_add_self_loops_as_pyg(edges: Edges, fill_value: float, torch_geometric: ModuleType) -> None:
    # PyG forgets the fill value of a graph without weights
    weight = ones_if_none(edges) if fill_value != 1.0 else edges.weight
    edge_index, weight = torch_geometric.utils.add_remaining_self_loops(
        edges.edge_index, weight, fill_value, edges.num_nodes
    )
    assert triples(edges.graph().add_self_loops(fill_value)) == Edges(edge_index, weight, edges.num_nodes).triples()


@pytest.mark.parametrize("loops", [None, 1.0, 2.0])
def test_gcn_norm_is_the_formula(edges: Edges, loops: float | None) -> None:
    graph = edges.graph() if loops is None else edges.graph().add_self_loops(loops)
    normalized = graph.gcn_norm()
    matrix = (edges if loops is None else with_loops(edges, loops)).scipy()
    degree = np.asarray(matrix.sum(1)).ravel()
    scale = sp.diags(np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0))
    expected = (scale @ matrix @ scale).tocsr()
    assert normalized.normalization == "gcn"
    assert normalized.self_loop_weight == loops
    assert normalized.col.data_ptr() == graph.col.data_ptr()
    atol = 1e-12 if edges.weight is not None else 1e-6
    assert_equal_matrices(to_scipy(normalized.rowptr, normalized.col, normalized.weight), expected, atol)
    assert normalized.is_symmetric == Graph(normalized.csr, normalized.weight).is_symmetric


@pytest.mark.interop
@pytest.mark.parametrize("loops", [None, 1.0, 2.0])
def test_gcn_norm_as_pyg(edges: Edges, loops: float | None, torch_geometric: ModuleType) -> None:
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    graph = edges.graph() if loops is None else edges.graph().add_self_loops(loops)
    # PyG forgets the fill value of a graph without weights
    weight = ones_if_none(edges) if loops == 2.0 else edges.weight
    edge_index, weight = gcn_norm(
        edges.edge_index, weight, edges.num_nodes, improved=loops == 2.0, add_self_loops=loops is not None
    )
    ours, theirs = triples(graph.gcn_norm()), Edges(edge_index, weight, edges.num_nodes).triples()
    assert [t[:2] for t in ours] == [t[:2] for t in theirs]
    dtype = torch.float64 if edges.weight is not None else torch.float32
    torch.testing.assert_close(*(torch.tensor([t[2] for t in side], dtype=dtype) for side in (ours, theirs)))


def test_large_graphs_need_little_memory_besides_their_arrays() -> None:
    num_nodes, degree = 2_000, 50
    num_edges = num_nodes * degree
    rowptr = torch.arange(0, num_edges + 1, degree, dtype=torch.int32)
    col = ((torch.arange(num_nodes)[:, None] + torch.arange(degree)) % num_nodes).sort(1).values.int().view(-1)
    with peak_bytes("cpu") as building:
        graph = Graph.from_csr(rowptr, col, symmetric=False)
    # two masks
    assert building.nbytes < 2.5 * num_edges
    with peak_bytes("cpu") as normalizing:
        normalized = graph.gcn_norm()
    # the weights, those of one end, and where these come from
    assert normalizing.nbytes < 12.5 * num_edges
    assert normalized.weight.nbytes == 4 * num_edges


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_from_csr_believes_what_it_is_told_of_symmetry(symmetric: bool, is_sorted: bool) -> None:
    col = torch.tensor([1, 2, 0, 0]) if is_sorted else torch.tensor([2, 1, 0, 0])
    graph = Graph.from_csr(torch.tensor([0, 2, 3, 4]), col, symmetric=symmetric)
    assert graph.is_symmetric == symmetric
    assert Graph(graph.csr).is_symmetric


# --- renaming and moving ---------------------------------------------------------------------------------------------


def test_permute_renames_the_nodes(edges: Edges) -> None:
    perm = torch.randperm(edges.num_nodes)
    rank = {old: new for new, old in enumerate(perm.tolist())}
    graph = edges.graph().permute(perm)
    assert triples(graph) == sorted((rank[t], rank[s], w) for t, s, w in edges.triples())
    matrix = edges.scipy()[perm.numpy()][:, perm.numpy()]
    assert_equal_matrices(to_scipy(graph.rowptr, graph.col, graph.weight), matrix)


def test_permute_keeps_what_is_known_of_the_graph(edges: Edges) -> None:
    graph = edges.graph().add_self_loops(2.0).gcn_norm()
    is_symmetric = graph.is_symmetric
    permuted = graph.permute(torch.randperm(graph.num_nodes))
    assert permuted.normalization == "gcn"
    assert permuted.self_loop_weight == 2.0
    assert permuted.is_symmetric == is_symmetric == Graph(permuted.csr, permuted.weight).is_symmetric


def test_row_order_names_the_order() -> None:
    edges = GRAPHS["directed"]
    first, second = torch.randperm(edges.num_nodes), torch.randperm(edges.num_nodes)
    graph = edges.graph()
    assert graph.row_order == edges.graph().row_order
    assert graph.permute(first).row_order == edges.graph().permute(first).row_order
    orders = [graph, graph.permute(first), graph.permute(second), graph.permute(first).permute(first)]
    assert len({order.row_order for order in orders}) == 4
    derived = graph.permute(first).add_self_loops().gcn_norm()
    assert derived.row_order == graph.permute(first).row_order


def test_to_the_same_device_is_the_same_graph() -> None:
    graph = GRAPHS["directed"].graph()
    assert graph.to("cpu") is graph


def test_to_moves_every_array_and_keeps_the_rest() -> None:
    graph = GRAPHS["weighted_symmetric"].graph().add_self_loops().gcn_norm()
    moved = graph.to("meta")
    assert {t.device.type for t in (moved.rowptr, moved.col, moved.weight)} == {"meta"}
    names = ("normalization", "self_loop_weight", "row_order", "num_nodes", "num_edges")
    assert [getattr(moved, name) for name in names] == [getattr(graph, name) for name in names]


@pytest.mark.gpu
def test_cuda_and_pinned_graphs_are_equal() -> None:
    edges = random_edges(weighted=True)
    graph = edges.graph()
    on_device = Graph.from_edge_index(edges.edge_index.cuda(), edges.weight.cuda(), edges.num_nodes)
    for other in (on_device, graph.to("cuda"), graph.pin_memory()):
        assert_is_csr_of(other.to("cpu"), edges)
    assert graph.pin_memory().col.is_pinned()
    normalized = on_device.add_self_loops().gcn_norm().to("cpu")
    torch.testing.assert_close(normalized.weight, graph.add_self_loops().gcn_norm().weight)


def test_repr_says_sizes_and_bytes() -> None:
    edges = random_edges(num_nodes=40_000, num_edges=150_000, weighted=True, plain=True)
    graph = edges.graph()
    num_edges = edges.edge_index.size(1)
    nbytes = 4 * 40_001 + 4 * num_edges + 8 * num_edges
    assert graph.nbytes == nbytes
    size = f"num_nodes=40000, num_edges={num_edges}"
    assert repr(graph) == f"Graph({size}, weighted, {nbytes / 2**20:.1f} MiB, device=cpu)"
    graph.transpose()
    assert graph.nbytes == nbytes + 4 * 40_001 + 4 * num_edges + 4 * num_edges
    assert "directed" in repr(graph)
    symmetric = GRAPHS["simple"].graph()
    before = symmetric.nbytes
    symmetric.transpose()
    assert symmetric.nbytes == before
    assert "normalization=gcn, symmetric" in repr(symmetric.gcn_norm())


def test_degree_counts_incoming_edges() -> None:
    edges = GRAPHS["directed"]
    count: Any = np.bincount(edges.edge_index[1].numpy(), minlength=edges.num_nodes)
    assert edges.graph().degree.tolist() == count.tolist()

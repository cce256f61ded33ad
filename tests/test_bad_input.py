"""Bad input: an error that names the argument and what it got, before anything is written."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gas_triton as gas
from gas_triton import ClusterLoader, Graph, HistoryStore, attach_histories, contiguous_partition, functional
from gas_triton.models import GCN, SAGE
from gas_triton.nn import GCNConv, GINConv, SAGEConv

from .reference import GRAPHS

PAIRS = torch.tensor([[0, 1, 2], [1, 2, 0]])
ROWPTR, COL = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 0])
NAN, INF = float("nan"), float("inf")


def csr(rowptr: list[int] | Tensor = ROWPTR, col: list[int] | Tensor = COL, weight: Tensor | None = None) -> Graph:
    return Graph.from_csr(torch.as_tensor(rowptr), torch.as_tensor(col), weight)


def edge_list(edge_index: Any = PAIRS, weight: Any = None, num_nodes: Any = 3) -> Graph:
    return Graph.from_edge_index(edge_index, weight, num_nodes)


def make_graph() -> Graph:
    return GRAPHS["weighted_directed"].graph().add_self_loops().gcn_norm()


def make_loader(graph: Graph | None = None, **options: Any) -> ClusterLoader:
    graph = graph or make_graph()
    sizes = [4] * (graph.num_nodes // 4) + [graph.num_nodes % 4] * bool(graph.num_nodes % 4)
    return ClusterLoader(graph, contiguous_partition(graph, sizes), **options)


def check(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: edge_list(PAIRS + 1), ValueError, r"edge_index must hold ids in \[0, 3\), got 3"),
        (lambda: edge_list(PAIRS - 1), ValueError, r"edge_index must hold ids in \[0, 3\), got -1"),
        (lambda: edge_list(PAIRS - 1, num_nodes=None), ValueError, r"edge_index must hold ids in .*, got -1"),
        (lambda: edge_list(PAIRS.float()), TypeError, r"edge_index must be an integer .* got torch.float32 \[2, 3\]"),
        (lambda: edge_list(PAIRS.bool()), TypeError, r"edge_index must be an integer .* got torch.bool"),
        (lambda: edge_list(PAIRS.to(torch.complex64)), TypeError, "edge_index must be .* got torch.complex64"),
        (lambda: edge_list(PAIRS.numpy()), TypeError, "edge_index must be an integer tensor .* got ndarray"),
        (lambda: edge_list(PAIRS.tolist()), TypeError, "edge_index must be an integer tensor .* got list"),
        (lambda: edge_list(PAIRS.to_sparse()), TypeError, "edge_index must be a dense tensor, got torch.sparse_coo"),
        (lambda: edge_list(PAIRS.T), ValueError, r"edge_index must have shape \[2, E\], got \[3, 2\]"),
        (lambda: edge_list(PAIRS[0]), ValueError, r"edge_index must have shape \[2, E\], got \[3\]"),
        (lambda: edge_list(num_nodes=0), ValueError, "num_nodes must be at least 1, got 0"),
        (lambda: edge_list(num_nodes=-4), ValueError, "num_nodes must be at least 1, got -4"),
        (lambda: edge_list(num_nodes=3.0), TypeError, "num_nodes must be an int, got float"),
        (lambda: edge_list(PAIRS[:, :0], num_nodes=None), ValueError, "num_nodes must be at least 1, got 0"),
        (lambda: edge_list(weight=torch.ones(2)), ValueError, r"edge_weight must have shape \[3\], .* got \[2\]"),
        (lambda: edge_list(weight=torch.ones(3, 2)), ValueError, r"edge_weight must have shape .* got \[3, 2\]"),
        (lambda: edge_list(weight=torch.ones(3).int()), TypeError, "edge_weight must be .* got torch.int32"),
        (lambda: edge_list(weight=[1.0] * 3), TypeError, "edge_weight must be a floating tensor .* got list"),
        (lambda: edge_list(weight=torch.tensor([1, NAN, 1])), ValueError, "edge_weight must .* got nan at edge 1"),
        (lambda: edge_list(weight=torch.tensor([1, 1, -INF])), ValueError, "edge_weight must .* got -inf at edge 2"),
        (lambda: edge_list(weight=torch.ones(3, device="meta")), ValueError, "edge_weight is on meta but"),
        (lambda: Graph.from_csr(ROWPTR.tolist(), COL), TypeError, "rowptr must be a 1-D int32 or int64 .* got list"),
        (lambda: csr(ROWPTR.float()), TypeError, r"rowptr must be a 1-D .* got torch.float32 \[4\]"),
        (lambda: csr(col=PAIRS), TypeError, r"col must be a 1-D int32 or int64 tensor, got torch.int64 \[2, 3\]"),
        (lambda: csr([0], []), TypeError, "col must be a 1-D int32"),
        (lambda: csr([0], COL[:0]), ValueError, r"rowptr must have shape \[N \+ 1\] .* got \[1\]"),
        (lambda: csr(ROWPTR[:0], COL), ValueError, r"rowptr must have shape \[N \+ 1\] .* got \[0\]"),
        (lambda: csr([0, 2, 1, 3]), ValueError, r"rowptr must rise .* got 0 .. 3 with a fall"),
        (lambda: csr([1, 1, 2, 3]), ValueError, r"rowptr must rise from 0 .* got 1 .. 3"),
        (lambda: csr([0, 1, 2, 4]), ValueError, r"rowptr must rise from 0 .* got 0 .. 4"),
        (lambda: csr(col=[0, 1, 3]), ValueError, r"col must hold ids in \[0, 3\), got 3"),
        (lambda: csr(col=[0, -1, 2]), ValueError, r"col must hold ids in \[0, 3\), got -1"),
        (lambda: csr(col=COL.to("meta")), ValueError, "col is on meta but rowptr is on cpu"),
        (lambda: csr(weight=torch.tensor([1, INF, 1])), ValueError, "weight must be finite, got inf at edge 1"),
        (lambda: Graph.from_torch_csr(torch.eye(3)), TypeError, "adj_t must be a torch.sparse_csr .*torch.float32"),
        (lambda: Graph.from_torch_csr(None), TypeError, "adj_t must be a torch.sparse_csr tensor, got NoneType"),
        (lambda: Graph.from_torch_csr(torch.ones(2, 3).to_sparse_csr()), ValueError, r"adj_t must .* \[2, 3\]"),
        (lambda: Graph.from_torch_sparse(torch.eye(3)), TypeError, "adj_t must be .*SparseTensor, got torch"),
        (lambda: Graph.from_pyg(SimpleNamespace()), ValueError, "data must have edge_index or adj_t, got Simple"),
        (lambda: edge_list(weight=torch.tensor([1.0, -2, 1])).gcn_norm(), ValueError, "weight: .* node 2 sum to -2.0"),
        (lambda: edge_list().permute(torch.tensor([0, 1])), ValueError, r"perm must have shape .* got \[2\]"),
        (lambda: edge_list().permute(torch.tensor([0, 1, 3])), ValueError, r"perm must hold ids .* got 3"),
        (lambda: edge_list().permute(torch.tensor([0, 1, 1])), ValueError, "perm must .* once, got node 1 more"),
        (lambda: edge_list().permute(torch.ones(3)), TypeError, "perm must be an int64 tensor .* torch.float32"),
    ],
)  # fmt: skip
def test_graph(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    check(call, error, message)


def test_missing_torch_sparse_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_sparse", None)
    check(edge_list().to_torch_sparse, ValueError, r"needs torch_sparse: pip install 'gas-triton\[sparse\]'")


# --- partitions and loaders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", [gas.metis, gas.random_partition])
@pytest.mark.parametrize(
    "num_parts, error, message",
    [
        (4, ValueError, r"num_parts must be from 1 to the number of nodes \(3\), got 4"),
        (0, ValueError, "num_parts must be from 1 .* got 0"),
        (-1, ValueError, "num_parts must be from 1 .* got -1"),
        (2.0, TypeError, "num_parts must be an int, got float"),
        (True, TypeError, "num_parts must be an int, got bool"),
    ],
)
def test_number_of_parts(partition: Callable, num_parts: Any, error: type[Exception], message: str) -> None:
    check(lambda: partition(edge_list(), num_parts), error, message)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda g: contiguous_partition(g, [2, 2]), ValueError, "sizes must be positive and sum to 3, got 2 and 4"),
        (lambda g: contiguous_partition(g, [3, 0]), ValueError, "sizes must be positive and sum to 3, got 0 and 3"),
        (lambda g: contiguous_partition(g, []), ValueError, "sizes must be positive and sum to 3, got 0 and 0"),
        (lambda g: gas.metis(g, 2).permute(make_graph()), ValueError, "graph has 30 nodes but the partition has 3"),
        (lambda g: gas.metis(g, 2).permute(g, None, torch.ones(4)), ValueError, r"tensor 1 has shape \[4\]"),
        (lambda g: gas.metis(g, 2).permute(g, torch.tensor(1)), ValueError, r"tensor 0 has shape \[\]"),
        (lambda g: gas.metis(g, 2).permute(g, np.ones(3)), TypeError, "tensor 0 must be a tensor or None, got ndarray"),
        (lambda g: gas.metis(g, 2).stats(0), ValueError, "batch_size must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_partition(call: Callable[[Graph], Any], error: type[Exception], message: str) -> None:
    check(lambda: call(edge_list()), error, message)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an int of at least 1, got 0"),
        ({"batch_size": 2.5}, ValueError, "batch_size must be an int of at least 1, got 2.5"),
        ({"x": torch.ones(29, 4)}, ValueError, r"x must have 30 rows, one for each node, got shape \[29, 4\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have 30 rows, one for each node, got shape \[\]"),
        ({"x": np.ones((30, 4))}, TypeError, "x must be a tensor with one row for each node, got ndarray"),
        ({"y": torch.ones(31)}, ValueError, r"y must have 30 rows, one for each node, got shape \[31\]"),
        ({"train_mask": torch.ones(12).bool()}, ValueError, r"train_mask must have 30 rows, .* got shape \[12\]"),
        ({"train_mask": torch.ones(30, 10).bool()}, ValueError, r"train_mask is a mask .* got \[30, 10\]"),
    ],
)  # fmt: skip
def test_loader(options: dict[str, Any], error: type[Exception], message: str) -> None:
    check(lambda: make_loader(**options), error, message)


def test_loader_of_another_partition() -> None:
    parts = contiguous_partition(edge_list(), [3])
    check(lambda: ClusterLoader(make_graph(), parts), ValueError, "parts has 3 nodes but graph has 30")


@pytest.mark.parametrize(
    "clusters, message",
    [
        ([0, 8], r"clusters must be in \[0, 8\), got 8"),
        ([-1], r"clusters must be in \[0, 8\), got -1"),
        ([2, 0, 2], r"clusters must be different and at least one, got \[2, 0, 2\]"),
        ([], r"clusters must be different and at least one, got \[\]"),
    ],
)
def test_clusters_of_a_batch(clusters: list[int], message: str) -> None:
    loader = make_loader()
    check(lambda: loader.batch(clusters), ValueError, message)
    assert bool((loader._planner._local == -1).all())


# --- layers ----------------------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gcn": lambda: GCNConv(6, 4),
    "gcn_narrowing": lambda: GCNConv(64, 2),
    "sage": lambda: SAGEConv(6, 4),
    "sage_project": lambda: SAGEConv(6, 4, project=True),
    "gin": lambda: GINConv(nn.Linear(6, 4), in_channels=6),
}


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_given_to_a_layer(layer: str, p: float) -> None:
    loader = make_loader(x=torch.randn(30, 6))
    batch = loader.batch([0, 5])
    conv = LAYERS[layer]()
    conv.input_dropout = p
    width = conv.history_dim
    conv.history = attach_histories(nn.Sequential(conv), 30, layers=["0"])["0"]
    rows, all_rows = torch.ones(batch.num_nodes, width), torch.ones(batch.num_nodes + batch.num_halo, width)
    before = copy.deepcopy(conv.history.state_dict())
    name = type(conv).__name__
    for x, error, message in [
        (rows[:, 1:], ValueError, rf"x must have shape \[rows, {width}\] for {name}, got \[8, {width - 1}\]"),
        (all_rows[:, 1:], ValueError, rf"x must have shape \[rows, {width}\] for {name}, got \[.*, {width - 1}\]"),
        (rows[0], ValueError, rf"x must have shape \[rows, {width}\] for {name}, got \[{width}\]"),
        (rows[1:], ValueError, rf"x has 7 rows, expected 8 \(in-batch rows\) or {8 + batch.num_halo}"),
        (rows.int(), TypeError, "x must be a floating tensor or batch.features, got torch.int32"),
        (rows.numpy(), TypeError, "x must be a floating tensor or batch.features, got ndarray"),
        (None, TypeError, "x must be a floating tensor or batch.features, got NoneType"),
        (rows.double(), TypeError, f"x is torch.float64 but {name}'s parameters are torch.float32: cast x"),
        (all_rows.half(), TypeError, f"x is torch.float16 but {name}'s parameters are torch.float32: cast x"),
        (rows.to("meta"), ValueError, "x is on meta but the batch is on cpu"),
    ]:
        check(lambda x=x: conv(x, batch), error, message)
    wide = make_loader(x=torch.ones(30, width + 1)).batch([0, 5])
    check(lambda: conv(wide.features, wide), ValueError, rf"for {name}, got \[30, {width + 1}\]")
    elsewhere = batch.to("meta")
    check(lambda: conv(rows, elsewhere), ValueError, "x is on cpu but the batch is on meta")
    assert torch.equal(conv.history.table, before["table"])
    assert int(conv.history.clock) == before["clock"] == 0


def test_other_dtypes_are_fine_under_autocast() -> None:
    loader = make_loader(x=torch.randn(30, 6))
    batch = loader.batch([0, 5])
    for make in (LAYERS["gcn"], LAYERS["sage"], LAYERS["gin"]):
        conv = make()
        expected = conv(batch.x, batch)
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(batch.x.bfloat16(), batch)
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layer", LAYERS)
def test_halo_rows_that_nothing_holds(layer: str) -> None:
    batch = make_loader().batch([0, 5])
    conv = LAYERS[layer]()
    rows = torch.ones(batch.num_nodes, conv.history_dim)
    message = rf"x has only the 8 in-batch rows and no history holds the {batch.num_halo} halo rows: .*attach_histories"
    check(lambda: conv(rows, batch), ValueError, message)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    "store, message",
    [
        (HistoryStore(31, 6, name="conv2"), "graph with 30 nodes but conv2's history has 31"),
        (HistoryStore(30, 5, name="conv2"), "x has 6 features but conv2's history has 5"),
        (HistoryStore(30, 6, device="meta", name="conv2"), "conv2's history is on meta but the batch is on cpu"),
    ],
)
def test_history_of_another_shape(store: HistoryStore, message: str, is_training: bool) -> None:
    batch = make_loader().batch([0, 5])
    conv = SAGEConv(6, 4).train(is_training)
    conv.history = store
    check(lambda: conv(torch.ones(8, 6), batch), ValueError, message)
    assert store.row_order is None


@pytest.mark.parametrize("is_training", [True, False])
def test_history_of_another_row_order(is_training: bool) -> None:
    graph = make_graph()
    conv = SAGEConv(6, 4)
    conv.history = attach_histories(nn.Sequential(conv), 30, layers=["0"])["0"]
    conv(torch.ones(8, 6), make_loader(graph).batch([0, 5]))
    before = conv.history.table.clone()
    other = make_loader(graph.permute(torch.randperm(30))).batch([1, 2])
    conv.train(is_training)
    check(
        lambda: conv(torch.ones(8, 6), other),
        ValueError,
        "rows in the order given-30 but the batch's graph has permuted-",
    )
    assert torch.equal(conv.history.table, before)


@pytest.mark.parametrize(
    "graph, options, message",
    [
        (lambda g: g, {}, r"needs a graph made by graph.add_self_loops\(\).gcn_norm\(\), got normalization=None"),
        (lambda g: g.add_self_loops(), {}, "got normalization=None, self loops of weight 1.0"),
        (lambda g: g.gcn_norm(), {}, "got normalization=gcn, self loops of weight None"),
        (lambda g: g.add_self_loops().gcn_norm(), {"improved": True}, r"graph.add_self_loops\(2.0\).gcn_norm\(\)"),
        (lambda g: g.add_self_loops().gcn_norm(), {"add_self_loops": False}, r"made by graph.gcn_norm\(\), got"),
    ],
)
def test_gcn_on_a_graph_of_another_normalisation(
    graph: Callable[[Graph], Graph], options: dict[str, bool], message: str
) -> None:
    loader = make_loader(graph(GRAPHS["directed"].graph()), x=torch.ones(30, 6))
    batch = loader.batch([0])
    check(lambda: GCNConv(6, 4, **options)(batch.x, batch), ValueError, message)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: GCNConv(0, 4), ValueError, "in_channels must be a positive int, got 0"),
        (lambda: GCNConv(4, 2.5), ValueError, "out_channels must be a positive int, got 2.5"),
        (lambda: GCNConv(4, 2, normalize=False, add_self_loops=True), ValueError, "add_self_loops needs normalize"),
        (lambda: SAGEConv(4, 2, aggr="median"), ValueError, "aggr must be one of add, .* got 'median'"),
        (lambda: SAGEConv(4, 2, halo="keep"), ValueError, "halo must be 'read' or 'drop', got 'keep'"),
        (lambda: GINConv(nn.Identity(), input_dropout=1.0), ValueError, r"input_dropout must be in \[0, 1\), got 1.0"),
        (lambda: GINConv(nn.Identity()).history_dim, ValueError, "give in_channels="),
        (lambda: GCN(4, 8, 2, 0), ValueError, "num_layers must be a positive int, got 0"),
        (lambda: GCN(4, -8, 2, 3), ValueError, "hidden_channels must be a positive int, got -8"),
        (lambda: GCN(4, 8, 2, 3, dropout=-0.1), ValueError, r"dropout must be in \[0, 1\), got -0.1"),
        (lambda: SAGE(4, 8, 2, 3, halo="keep"), ValueError, "halo must be 'read' or 'drop', got 'keep'"),
    ],
)  # fmt: skip
def test_arguments_of_layers_and_models(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    check(call, error, message)


# --- functional ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"reduce": "median"}, ValueError, "reduce must be one of sum, mean, max, min, got 'median'"),
        ({"halo": "keep"}, ValueError, "halo must be 'read' or 'drop', got 'keep'"),
        ({"x": torch.ones(8, 6).long()}, TypeError, r"x must be a floating .* got torch.int64 \[8, 6\]"),
        ({"x": torch.ones(8)}, ValueError, r"x must have shape \[rows, features\], got \[8\]"),
        ({"x": torch.ones(9, 6)}, ValueError, "x has 9 rows, expected 8"),
        ({"history": torch.ones(29, 6)}, ValueError, r"history must have 30 rows, one a node, got shape \[29, 6\]"),
        ({"history": torch.ones(30, 5)}, ValueError, "x has 6 features but the history has 5"),
        ({"history": torch.ones(30, 6).int()}, TypeError, r"history must be a floating tensor .* got torch.int32"),
        ({"history": torch.ones(30, 6, device="meta")}, ValueError, "history is on meta but the batch is on cpu"),
        ({"edge_weight": torch.ones(3)}, ValueError, r"edge_weight must have shape \[\d+\], got \[3\]"),
        ({"edge_weight": [1.0]}, TypeError, "edge_weight must be a floating tensor, got list"),
    ],
)  # fmt: skip
def test_aggregate(options: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = make_loader().batch([0, 5])
    given = {"x": torch.ones(8, 6), "history": torch.ones(30, 6), **options}
    check(lambda: functional.aggregate(given.pop("x"), batch, **given), error, message)


# --- histories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"tier": "disk"}, ValueError, "tier must be one of 'auto', 'device', 'pinned', 'file', got 'disk'"),
        ({"layers": ["convs.1", "head"]}, ValueError, r"layers must be among \['convs.0', .*\], got \['head'\]"),
        ({"dtype": torch.int32}, TypeError, "dtype must be torch.float32, .* got torch.int32"),
        ({"num_nodes": 30.0}, TypeError, "num_nodes must be an int, got float"),
        ({"num_nodes": 0}, ValueError, "num_nodes must be at least 1, got 0"),
        ({"layers": "1"}, TypeError, "layers must be a list of names, got the str '1'"),
        ({"model": nn.Linear(3, 3)}, ValueError, "model has no gas_triton.nn layer, got Linear"),
    ],
)  # fmt: skip
def test_attach_histories(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = GCN(6, 8, 3, 3)
    check(lambda: attach_histories(**{"model": model, "num_nodes": 30, **options}), error, message)
    assert [conv.history for conv in model.convs] == [None] * 3


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.ones(7, 6), ValueError, "conv2: x has 7 rows but the batch has 8 in-batch rows"),
        (torch.ones(8, 7), ValueError, "x has 7 features but conv2's history has 6"),
        (torch.ones(8), TypeError, r"conv2: x must be a floating tensor \[B, 6\], got torch.float32 \[8\]"),
        (torch.ones(8, 6).long(), TypeError, r"conv2: x must be a floating tensor \[B, 6\], got torch.int64"),
        (torch.ones(8, 6, device="meta"), ValueError, "conv2: x is on meta but the history is on cpu"),
    ],
)
def test_push(x: Tensor, error: type[Exception], message: str) -> None:
    store = HistoryStore(30, 6, name="conv2")
    check(lambda: store.push(x, make_loader().batch([0, 5])), error, message)
    assert not store.table.any()
    assert (int(store.clock), store.row_order) == (0, None)


def test_a_layer_says_what_it_cannot_take() -> None:
    loader = make_loader(x=torch.randn(30, 4))
    batch = loader.batch([0])
    check(lambda: SAGEConv(4, 2)(batch.x, torch.zeros(2, 3).long()), TypeError, "batch must be a Batch .* got Tensor")
    check(lambda: SAGEConv(4, 2).to("meta")(batch.x, batch), ValueError, "x is on cpu but .* parameters are on meta")
    perceptron = torch.nn.Sequential(torch.nn.Linear(5, 2))
    check(lambda: GINConv(perceptron)(batch.x, batch), ValueError, r"x must have shape \[rows, 5\] for GINConv")


def test_a_mask_of_numbers_is_refused() -> None:
    check(lambda: make_loader(train_mask=torch.ones(30).long()), TypeError, "train_mask must be a bool .* torch.int64")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"table": [1]}, TypeError, "the state's table is a list"),
        ({"last_push": None}, TypeError, "the state's last_push is a NoneType"),
        ({"clock": "a"}, TypeError, "the state's clock is a str"),
        ({"row_order": "permuted-0"}, ValueError, "order permuted-0 but the graph has given-30"),
    ],
)
def test_a_damaged_checkpoint_writes_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    graph = make_graph()
    model = torch.nn.Sequential(SAGEConv(4, 4), SAGEConv(4, 2))
    histories = attach_histories(model, 30)
    state = {"1": {**histories["1"].state_dict(), "table": torch.ones(30, 4), **change}}
    check(lambda: histories.load_state_dict(state, graph), error, message)
    assert not histories["1"].table.any()

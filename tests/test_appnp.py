"""`APPNPConv`, `nn.APPNP` and `models.APPNP` against torch_geometric and plain torch, with histories and without."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import Batch, ClusterLoader, Graph, attach_histories, functional, inference, models, random_partition
from gas_triton.datasets import load
from gas_triton.nn import APPNP, APPNPConv
from gas_triton.planner import Planner
from gas_triton.training import TrainConfig, train

from . import reference
from .reference import GRAPHS, Block, GasReference, Parameters, block
from .test_nn import CLUSTERS, assert_same


def propagate(x: Tensor, x_0: Tensor, edges: Block, alpha: float) -> Tensor:
    return (1 - alpha) * reference.aggregate(x, edges, edges.weight) + alpha * x_0[: edges.num_rows]


def make_graph(name: str) -> Graph:
    return GRAPHS[name].graph().add_self_loops().gcn_norm()


def make_loader(name: str = "weighted_directed", num_features: int = 5, hub_edges: int = 512) -> ClusterLoader:
    graph = make_graph(name)
    parts = random_partition(graph, min(6, graph.num_nodes))
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(graph.num_nodes, num_features, dtype=torch.float64, generator=draw)
    y = torch.randint(3, (graph.num_nodes,), generator=draw)
    loader = ClusterLoader(parts.permute(graph), parts, 2, x=x, y=y)
    loader._planner = Planner(loader.graph, hub_edges)
    return loader


# --- torch_geometric -------------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("num_features, hub_edges", [(5, 512), (1, 3)])
@pytest.mark.parametrize("num_steps, alpha", [(1, 0.1), (4, 0.3), (2, 0.0), (2, 1.0)])
@pytest.mark.parametrize("name", ["directed", "weighted_symmetric", "no_edges", "one_node"])
def test_output_and_gradient_are_those_of_pyg(
    name: str, num_steps: int, alpha: float, num_features: int, hub_edges: int, torch_geometric: ModuleType
) -> None:
    loader = make_loader(name, num_features, hub_edges)
    batch, edges = loader.full(), block(loader.graph, range(loader.graph.num_nodes))
    theirs = torch_geometric.nn.APPNP(num_steps, alpha, normalize=False)
    ours = APPNP(num_steps, alpha)
    assert not ours.state_dict()
    x, x_pyg = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    expected = theirs(x_pyg, torch.stack([edges.source, edges.target]), edges.weight)
    assert_same(ours(x, batch), expected, [x], [x_pyg])


@pytest.mark.interop
@pytest.mark.parametrize("add_self_loops", [True, False])
@pytest.mark.parametrize("name", ["directed", "weighted_directed"])
def test_the_normalised_graph_is_pyg_on_the_given_one(
    name: str, add_self_loops: bool, torch_geometric: ModuleType
) -> None:
    edges = GRAPHS[name]
    graph = edges.graph().add_self_loops() if add_self_loops else edges.graph()
    x = torch.randn(graph.num_nodes, 5, dtype=torch.float64)
    batch = ClusterLoader(graph.gcn_norm(), random_partition(graph, 1), x=x).full()
    ours = APPNP(3, 0.2, add_self_loops=add_self_loops)
    theirs = torch_geometric.nn.APPNP(3, 0.2, add_self_loops=add_self_loops)
    torch.testing.assert_close(ours(x, batch), theirs(x, edges.edge_index, edges.weight), rtol=1e-6, atol=1e-6)


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hub_edges", [512, 3])
@pytest.mark.parametrize("given", ["all rows", "in-batch rows", "features"])
@pytest.mark.parametrize("name", ["symmetric", "weighted_directed"])
def test_a_step_on_a_batch(name: str, given: str, hub_edges: int) -> None:
    loader = make_loader(name, hub_edges=hub_edges)
    batch = loader.batch(CLUSTERS)
    conv = APPNPConv(5, 0.3)
    store = attach_histories(nn.Sequential(conv), 30, dtype=torch.float64, layers=["0"])["0"]
    store.table.copy_(loader.x)
    store.table[batch.node_ids] = 0.0
    edges = block(loader.graph, batch.node_ids.tolist())
    x_0 = torch.randn_like(batch.x).requires_grad_()
    x_0_reference, rows = x_0.detach().clone().requires_grad_(), batch.x.clone().requires_grad_()
    expected = propagate(rows, x_0_reference, edges, 0.3)
    if given == "features":
        assert_same(conv(batch.features, x_0, batch), expected, [x_0], [x_0_reference])
        return
    num_rows = batch.num_nodes if given == "in-batch rows" else rows.size(0)
    x = batch.x[:num_rows].clone().requires_grad_()
    out = conv(x, x_0, batch)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    (ours, ours_0), (theirs, theirs_0) = (
        torch.autograd.grad(out, [x, x_0], grad), torch.autograd.grad(expected, [rows, x_0_reference], grad)
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs[:num_rows])
    torch.testing.assert_close(ours_0, theirs_0)
    if given == "in-batch rows":
        assert torch.equal(store.table, loader.x)


@pytest.mark.parametrize("weighted", [True, False])
def test_edges_are_dropped_while_training(weighted: bool) -> None:
    graph = GRAPHS["weighted_directed" if weighted else "directed"].graph()
    parts = random_partition(graph, 6)
    x = torch.randn(30, 5, dtype=torch.float64)
    loader = ClusterLoader(parts.permute(graph), parts, x=x)
    batch = loader.batch(CLUSTERS)
    conv = APPNPConv(5, 0.3, dropout=0.4, normalize=False)
    weight = torch.ones(batch.num_edges, dtype=torch.float64) if batch.edge_weight is None else batch.edge_weight
    torch.manual_seed(3)
    dropped = F.dropout(weight, 0.4)
    assert 0 < int((dropped == 0).sum()) < batch.num_edges
    # the edges of a plan, in its order: inner edges first
    source = torch.cat([batch.inner.col, batch.outer_joint_col]).long()
    target = torch.cat(
        [torch.arange(batch.num_nodes).repeat_interleave(c.rowptr.diff()) for c in (batch.inner, batch.outer)]
    )
    edges = Block(source, target, dropped, batch.node_ids, batch.halo_ids)
    x, rows = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    torch.manual_seed(3)
    assert_same(conv(x, x, batch), propagate(rows, rows, edges, 0.3), [x], [rows])
    expected = propagate(batch.x, batch.x, edges._replace(weight=weight), 0.3)
    torch.testing.assert_close(conv.eval()(batch.x, batch.x, batch), expected)


def test_a_history_follows_a_layer_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(5, 5), APPNPConv(5, 0.1))
    histories = attach_histories(model, 30, layers=["1"])
    model.half()
    assert (histories["1"].device.type, histories["1"].dtype) == ("cpu", torch.float32)
    model.to("meta")
    assert histories["1"].device.type == "meta"


# --- histories -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lin = nn.Linear(5, 3)
        self.propagation = APPNP(4, 0.2, channels=3)
        self.double()

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.propagation(self.lin(x), batch)


class Reference(GasReference):
    """A linear layer, then steps of propagation with histories (Fey et al., ICML 2021)."""

    def __init__(self, model: Net, graph: Graph, dtype: torch.dtype) -> None:
        super().__init__(self._layer, [{}] * 4, [3] * 4, graph, dtype)
        self.lin = {name: p.detach().clone().requires_grad_() for name, p in model.lin.named_parameters()}

    def _layer(self, p: Parameters, x: Tensor, edges: Block) -> Tensor:
        return propagate(x, self.x_0, edges, 0.2)

    def forward(self, x: Tensor, node_ids: list[int]) -> Tensor:
        edges = block(self.graph, node_ids)
        rows = F.linear(x, self.lin["weight"], self.lin["bias"])
        self.x_0 = rows[edges.node_ids]
        h = rows[torch.cat([edges.node_ids, edges.halo_ids])]
        for depth, table in enumerate(self.tables):
            if depth > 0:
                table[edges.node_ids] = h.detach().to(table.dtype)
                h = torch.cat([h, table[edges.halo_ids].to(h.dtype)])
            h = self._layer({}, h, edges)
        return h


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["weighted_directed", "symmetric"])
def test_training_with_histories_is_that_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    loader, plain_loader = make_loader(name), make_loader(name)
    model = Net()
    plain = Reference(model, loader.graph, dtype)
    histories = attach_histories(model, 30, dtype=dtype)
    assert list(histories) == ["propagation.steps.1", "propagation.steps.2", "propagation.steps.3"]
    optimizers = [torch.optim.Adam(p, lr=0.02) for p in (model.parameters(), plain.lin.values())]
    for _ in range(3):
        for batch, same in zip(histories.prefetch(loader), plain_loader, strict=True):
            losses = [
                F.cross_entropy(model(batch.x, batch), batch.y),
                F.cross_entropy(plain.forward(plain_loader.x, same.node_ids.tolist()), same.y),
            ]
            torch.testing.assert_close(*losses)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for ours, theirs in zip(model.lin.parameters(), plain.lin.values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for store, table in zip(histories.values(), plain.tables[1:], strict=True):
        torch.testing.assert_close(store.table, table)


@pytest.mark.parametrize("by_handle", [True, False])
def test_inference_is_the_whole_graph_at_once(by_handle: bool) -> None:
    loader = make_loader()
    propagation, model = APPNP(3, 0.2, channels=5), models.APPNP(5, 6, 3, 4, dropout=0.5).double()
    batch = loader.full()
    for module in (propagation, model.eval()):
        logits = inference(
            module, loader, lambda module, batch: module(batch.features if by_handle else batch.x, batch)
        )  # fmt: skip
        torch.testing.assert_close(logits, module(batch.x, batch).detach())


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"dropout": 0.4, "drop_input": False}])
@pytest.mark.parametrize("is_training", [True, False])
def test_model_is_the_one_written_out(options: dict[str, Any], is_training: bool) -> None:
    loader = make_loader()
    batch, edges = loader.full(), block(loader.graph, range(30))
    model = models.APPNP(5, 6, 3, 4, alpha=0.2, **options).double().train(is_training)

    def written_out() -> Tensor:
        p = model.dropout if is_training else 0.0

        def drop(rows: Tensor) -> Tensor:
            return functional.dropout(rows, batch, p, functional.draw_seed(rows.device)) if p > 0 else rows

        x = drop(batch.x) if model.drop_input else batch.x
        x = x_0 = model.lins[1](drop(model.lins[0](x).relu()))
        for _ in range(4):
            x = propagate(x, x_0, edges, 0.2)
        return x

    results = []
    for forward in (lambda: model(batch.x, batch), written_out):
        torch.manual_seed(7)
        out = forward()
        results.append([out, *torch.autograd.grad(F.cross_entropy(out, batch.y), list(model.parameters()))])
    torch.testing.assert_close(*results)


def test_model_says_what_pygas_says() -> None:
    model = models.APPNP(5, 6, 3, 4, edge_dropout=0.2, halo="drop")
    assert [(step.channels, step.dropout, step.halo) for step in model.propagation.steps] == [(3, 0.2, "drop")] * 4
    assert [p.shape for p in model.reg_parameters] == [(6, 5), (6,)]
    assert [p.shape for p in model.nonreg_parameters] == [(3, 6), (3,)]
    before = [p.detach().clone() for p in model.parameters()]
    model.reset_parameters()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_model_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    loader = make_loader()
    model = models.APPNP(5, 6, 3, 3).double()
    attach_histories(model, 30, dtype=torch.float64)
    batch = loader.batch([0, 3])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [
        (out, *torch.autograd.grad(out.square().sum(), list(model.parameters())))
        for out in (model(batch.x, batch), compiled(batch.x, batch))
    ]
    torch.testing.assert_close(*results)


def test_model_learns_cora(data_root: Path) -> None:
    config = TrainConfig(
        model="appnp", layers=10, hidden=32, dropout=0.0, lr=0.05, epochs=24, eval_every=24, num_parts=4, batch_size=2,
        weight_decay=5e-4,
    )  # fmt: skip
    result = train(load("Cora", data_root), config)
    assert result.test_acc > 0.75
    # nine tables of seven classes
    assert result.history_bytes == 9 * 2708 * (7 * 4 + 4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"K": 0}, "K must be a positive int, got 0"),
        ({"channels": 0}, "channels must be a positive int, got 0"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"halo": "keep"}, "halo must be 'read' or 'drop', got 'keep'"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APPNP(**{"K": 2, "alpha": 0.1, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_layers": 0}, "num_layers must be a positive int, got 0"),
        ({"hidden_channels": -1}, "hidden_channels must be a positive int, got -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"edge_dropout": -1.0}, r"edge_dropout must be in \[0, 1\), got -1.0"),
    ],
)
def test_arguments_of_the_model(arguments: dict[str, Any], message: str) -> None:
    given = {"in_channels": 5, "hidden_channels": 6, "out_channels": 3, "num_layers": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        models.APPNP(**given)


def test_a_history_needs_its_width() -> None:
    with pytest.raises(ValueError, match=r"APPNP cannot tell how wide .*: give channels=, or the widths= of gas\.aut"):
        attach_histories(APPNP(3, 0.1), 30)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(4, 5), ValueError, r"^x must have shape \[rows, 5\] with 10 \(in-batch rows\) or \d+ rows"),
        (torch.zeros(10, 6), ValueError, r"x must have shape \[rows, 5\] with 10 .* got \[10, 6\]"),
        (torch.zeros(10, 5).long(), TypeError, "x must be a floating tensor or batch.features, got torch.int64"),
        (torch.zeros(10, 5, device="meta"), ValueError, "x is on meta but the batch is on cpu"),
        (torch.zeros(10, 5), ValueError, "x has only the 10 in-batch rows and no history holds the .* halo rows"),
    ],
)
def test_bad_rows_are_named(x: Any, error: type[Exception], message: str) -> None:
    batch = make_loader().batch([0, 3])
    with pytest.raises(error, match=message):
        APPNP(2, 0.1, channels=5)(x, batch)


def test_another_graph_is_refused() -> None:
    graph = GRAPHS["directed"].graph()
    batch = ClusterLoader(graph, random_partition(graph, 1), x=torch.zeros(30, 5)).full()
    message = (
        r"APPNP\(normalize=True, add_self_loops=True\) needs a graph made by graph.add_self_loops\(\).gcn_norm\(\)"
    )
    with pytest.raises(ValueError, match=message):
        APPNP(2, 0.1)(batch.x, batch)
    assert APPNP(2, 0.1, normalize=False)(batch.x, batch).shape == (30, 5)

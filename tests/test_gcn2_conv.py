"""`GCN2Conv` and `GCN2` against torch_geometric and against plain torch, with histories and without."""

from __future__ import annotations

from math import log
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import Batch, ClusterLoader, Graph, attach_histories, functional, inference, random_partition
from gas_triton.datasets import load
from gas_triton.models import GCN2
from gas_triton.nn import GCN2Conv
from gas_triton.planner import Planner
from gas_triton.training import TrainConfig, train

from . import reference
from .reference import GRAPHS, Block, GasReference, Parameters, block
from .test_nn import CLUSTERS, assert_same, parameters_like, state_of

OPTIONS: dict[str, dict[str, Any]] = {
    "shared": {"alpha": 0.1, "theta": 0.5, "layer": 3},
    "own weights": {"alpha": 0.3, "theta": 0.5, "layer": 3, "shared_weights": False},
    "no identity": {"alpha": 0.5},
    "no identity, own weights": {"alpha": 0.5, "shared_weights": False},
    "no residual": {"alpha": 0.0, "theta": 1.0, "layer": 1},
    "residual alone": {"alpha": 1.0, "theta": 1.0, "layer": 1},
}


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPTIONS[request.param]


def gcn2(p: Parameters, x: Tensor, x_0: Tensor, edges: Block, alpha: float, beta: float = 1.0) -> Tensor:
    h, own = (1 - alpha) * reference.aggregate(x, edges, edges.weight), alpha * x_0[: edges.num_rows]
    if "weight2" not in p:
        return (1 - beta) * (h + own) + beta * (h + own) @ p["weight1"]
    return (1 - beta) * (h + own) + beta * (h @ p["weight1"] + own @ p["weight2"])


def beta_of(options: dict[str, Any]) -> float:
    return log(options["theta"] / options["layer"] + 1) if "theta" in options else 1.0


def make_graph(name: str = "weighted_directed") -> Graph:
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


def initial(batch: Batch, num_features: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(4)
    rows = batch.num_nodes + batch.num_halo
    return torch.randn(rows, num_features, dtype=torch.float64, generator=draw).requires_grad_()


# --- torch_geometric -------------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("hub_edges", [512, 3])
@pytest.mark.parametrize("name", ["directed", "weighted_symmetric", "weighted_directed", "no_edges"])
@pytest.mark.parametrize("is_full", [True, False], ids=["full", "batch"])
def test_output_and_gradients_are_those_of_pyg(
    options: dict[str, Any], name: str, is_full: bool, hub_edges: int, torch_geometric: ModuleType
) -> None:
    loader = make_loader(name, hub_edges=hub_edges)
    batch = loader.full() if is_full else loader.batch(CLUSTERS)
    ours = GCN2Conv(5, **options).double()
    theirs = torch_geometric.nn.GCN2Conv(5, **options, normalize=False).double()
    theirs.load_state_dict(ours.state_dict())
    edges = block(loader.graph, batch.node_ids.tolist())
    x, x_pyg = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    x_0, x_0_pyg = initial(batch), initial(batch)
    expected = theirs(x_pyg, x_0_pyg, torch.stack([edges.source, edges.target]), edges.weight)[: batch.num_nodes]
    assert_same(
        ours(x, x_0, batch), expected, [x, x_0, *ours.parameters()], [x_pyg, x_0_pyg, *parameters_like(ours, theirs)]
    )
    # the in-batch rows of x_0 alone say as much
    in_batch = x_0[: batch.num_nodes].detach().requires_grad_()
    torch.testing.assert_close(ours(x, in_batch, batch), expected)


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
    ours = GCN2Conv(5, 0.2, add_self_loops=add_self_loops).double()
    theirs = torch_geometric.nn.GCN2Conv(5, 0.2, add_self_loops=add_self_loops).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x, x, batch), theirs(x, x, edges.edge_index, edges.weight), rtol=1e-6, atol=1e-6)


@pytest.mark.interop
def test_state_dict_fits_both_ways(options: dict[str, Any], torch_geometric: ModuleType) -> None:
    ours, back = GCN2Conv(5, **options), GCN2Conv(5, **options)
    theirs = torch_geometric.nn.GCN2Conv(5, **options)
    theirs.load_state_dict(ours.state_dict())
    back.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.beta == theirs.beta
    for name, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


# --- plain torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_features", [1, 7])
@pytest.mark.parametrize("given", ["all rows", "in-batch rows", "features"])
def test_every_way_to_give_the_rows(options: dict[str, Any], given: str, num_features: int) -> None:
    loader = make_loader(num_features=num_features)
    batch = loader.batch(CLUSTERS)
    conv = GCN2Conv(num_features, **options).double()
    store = attach_histories(nn.Sequential(conv), 30, dtype=torch.float64, layers=["0"])["0"]
    store.table.copy_(loader.x)
    store.table[batch.node_ids] = 0.0
    state = state_of(conv)
    expected = gcn2(
        state, batch.x, batch.x, block(loader.graph, batch.node_ids.tolist()), options["alpha"], beta_of(options)
    )
    x = {"all rows": batch.x, "in-batch rows": batch.x[: batch.num_nodes], "features": batch.features}[given]
    assert_same(conv(x, x, batch), expected, list(conv.parameters()), list(state.values()))
    if given == "in-batch rows":
        assert torch.equal(store.table, loader.x)


def test_leaving_the_halo_out(options: dict[str, Any]) -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    conv = GCN2Conv(5, **options, halo="drop").double()
    whole = block(loader.graph, batch.node_ids.tolist())
    inside = whole.source < batch.num_nodes
    edges = Block(whole.source[inside], whole.target[inside], whole.weight[inside], batch.node_ids, batch.halo_ids[:0])
    expected = gcn2(state_of(conv), batch.x, batch.x, edges, options["alpha"], beta_of(options))
    torch.testing.assert_close(conv(batch.x, batch.x, batch), expected)


@pytest.mark.parametrize("given", ["all rows", "in-batch rows"])
def test_dropout_masks_a_node_alike_and_never_the_initial_rows(given: str) -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    conv = GCN2Conv(5, 0.3, input_dropout=0.4).double()
    conv.history = attach_histories(nn.Sequential(conv), 30, dtype=torch.float64, layers=["0"])["0"]
    conv.history.table.copy_(loader.x)
    state = torch.get_rng_state()
    seed = functional.draw_seed(torch.device("cpu"))
    torch.set_rng_state(state)
    dropped = functional.dropout(loader.x, loader.full(), 0.4, seed)[batch.all_ids]
    expected = gcn2(state_of(conv), dropped, batch.x, block(loader.graph, batch.node_ids.tolist()), 0.3)
    x = batch.x if given == "all rows" else batch.x[: batch.num_nodes]
    torch.testing.assert_close(conv(x, batch.x, batch), expected)
    assert torch.equal(conv.history.table, loader.x)


def test_reset_parameters_draws_as_pyg_does() -> None:
    conv = GCN2Conv(64, 0.1, shared_weights=False)
    before = [p.detach().clone() for p in conv.parameters()]
    conv.reset_parameters()
    bound = (6 / 128) ** 0.5
    for parameter, old in zip(conv.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
        assert 0.9 * bound < float(parameter.detach().abs().max()) <= bound


def test_autocast_takes_layers_of_mixed_precision() -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    conv = GCN2Conv(5, 0.3, theta=0.5, layer=1)
    x = batch.x.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x, x.bfloat16(), batch)
    torch.testing.assert_close(out.float(), conv(x, x, batch), rtol=0.05, atol=0.05)


# --- the model -------------------------------------------------------------------------------------------------------


class Reference(GasReference):
    """The forward of PyGAS's GCN2, without dropout."""

    def __init__(self, model: GCN2, graph: Graph, dtype: torch.dtype) -> None:
        widths = [model.hidden_channels] * len(model.convs)
        super().__init__(self._layer, [state_of(conv) for conv in model.convs], widths, graph, dtype)
        self.first, self.last = (state_of(lin) for lin in model.lins)
        self.places = iter(())
        self.options = [(conv.alpha, conv.beta) for conv in model.convs]
        self.norms = model.norms
        self.residual = model.residual

    def leaves(self) -> list[Tensor]:
        return [*self.first.values(), *self.last.values(), *super().leaves()]

    def _layer(self, p: Parameters, x: Tensor, edges: Block) -> Tensor:
        out = gcn2(p, x, self.x_0, edges, *next(self.places))
        out = out + x[: edges.num_rows] if self.residual else out
        # the reference has no activation behind its last layer
        return out.relu()

    def forward(self, x: Tensor, node_ids: list[int]) -> Tensor:
        self.places = iter(self.options)
        rows = F.linear(x, self.first["weight"], self.first["bias"]).relu()
        self.x_0 = rows[node_ids]
        return F.linear(super().forward(rows, node_ids), self.last["weight"], self.last["bias"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared_weights, residual", [(True, False), (False, True)])
def test_training_with_histories_is_that_of_plain_torch(
    shared_weights: bool, residual: bool, dtype: torch.dtype
) -> None:
    loader, plain_loader = make_loader(), make_loader()
    model = GCN2(5, 6, 3, 4, alpha=0.2, shared_weights=shared_weights, residual=residual).double()
    plain = Reference(model, loader.graph, dtype)
    histories = attach_histories(model, 30, dtype=dtype)
    assert list(histories) == ["convs.1", "convs.2", "convs.3"]
    optimizers = [torch.optim.Adam(p, lr=0.02) for p in (model.parameters(), plain.leaves())]
    for epoch in range(3):
        for batch, same in zip(histories.prefetch(loader), plain_loader, strict=True):
            nodes = same.node_ids.tolist()
            losses = [
                F.cross_entropy(model(batch.x if epoch else batch.features, batch), batch.y),
                F.cross_entropy(plain.forward(plain_loader.x, nodes), same.y),
            ]
            torch.testing.assert_close(*losses)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for conv, state in zip(model.convs, plain.parameters, strict=True):
        for name, value in conv.named_parameters():
            torch.testing.assert_close(value, state[name])
    for store, table in zip(histories.values(), plain.tables[1:], strict=True):
        torch.testing.assert_close(store.table, table)


def written_out(model: GCN2, batch: Batch, edges: Block) -> Tensor:
    """The forward of PyGAS's GCN2 on the whole graph, with the masks that our layers draw."""
    p = model.dropout if model.training else 0.0

    def drop(rows: Tensor) -> Tensor:
        return functional.dropout(rows, batch, p, functional.draw_seed(rows.device)) if p > 0 else rows

    x = drop(batch.x) if model.drop_input else batch.x
    x = x_0 = model.lins[0](x).relu()
    for place, conv in enumerate(model.convs):
        h = gcn2(dict(conv.named_parameters()), drop(x), x_0, edges, conv.alpha, conv.beta)
        h = model.norms[place](h) if len(model.norms) else h
        x = (h + x if model.residual else h).relu()
    return model.lins[1](drop(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.4},
        {"dropout": 0.4, "drop_input": False, "shared_weights": False},
        {"dropout": 0.4, "batch_norm": True, "residual": True},
    ],
)
@pytest.mark.parametrize("is_training", [True, False])
def test_model_is_the_one_written_out(options: dict[str, Any], is_training: bool) -> None:
    loader = make_loader()
    batch, edges = loader.full(), block(loader.graph, range(30))
    model = GCN2(5, 6, 3, 4, alpha=0.3, theta=0.7, **options).double().train(is_training)
    results = []
    for forward in (lambda: model(batch.x, batch), lambda: written_out(model, batch, edges)):
        torch.manual_seed(7)
        out = forward()
        results.append([out, *torch.autograd.grad(F.cross_entropy(out, batch.y), list(model.parameters()))])
    torch.testing.assert_close(*results)
    assert [conv.beta for conv in model.convs] == [log(0.7 / place + 1) for place in range(1, 5)]
    if not is_training:
        torch.testing.assert_close(inference(model, loader), results[0][0].detach())


def test_parameters_fall_into_the_groups_of_pygas() -> None:
    model = GCN2(5, 6, 3, 2, batch_norm=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in model.nonreg_parameters} == {name for name in names.values() if "lins" in name}
    assert {names[id(p)] for p in model.reg_parameters} == {name for name in names.values() if "lins" not in name}


def test_model_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    loader = make_loader()
    model = GCN2(5, 6, 3, 3).double()
    attach_histories(model, 30, dtype=torch.float64)
    batch = loader.batch([0, 3])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [
        (out, *torch.autograd.grad(out.square().sum(), list(model.parameters())))
        for out in (model(batch.x, batch), compiled(batch.x, batch))
    ]
    torch.testing.assert_close(*results)


def test_64_layers_train_on_cora(data_root: Path) -> None:
    config = TrainConfig(
        model="GCN2", layers=64, hidden=16, dropout=0.0, lr=0.01, epochs=3, eval_every=3, num_parts=2, batch_size=1,
        model_options={"alpha": 0.1, "theta": 0.5},
    )  # fmt: skip
    result = train(load("Cora", data_root), config)
    losses = [record.train_loss for record in result.epochs]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert result.history_bytes == 63 * 2708 * (16 * 4 + 4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"channels": 0}, "channels must be a positive int, got 0"),
        ({"alpha": 1.1}, r"alpha must be in \[0, 1\], got 1.1"),
        ({"theta": 0.5}, "theta and layer belong together, got theta=0.5, layer=None"),
        ({"layer": 2}, "theta and layer belong together, got theta=None, layer=2"),
        ({"theta": 0.5, "layer": 0}, "layer must be a positive int, got 0"),
        ({"theta": -0.5, "layer": 1}, "theta must be a finite number of at least 0, got -0.5"),
        ({"input_dropout": 1.0}, r"input_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GCN2Conv(**{"channels": 5, "alpha": 0.1, **arguments})


def test_model_without_linear_ends_is_refused() -> None:
    with pytest.raises(ValueError, match="linear must be True for GCN2"):
        GCN2(5, 6, 3, 2, linear=False)


@pytest.mark.parametrize(
    "x_0, error, message",
    [
        (torch.zeros(4, 5).double(), ValueError, r"x_0 must have shape \[rows, 5\] with 10 \(in-batch rows\) or \d+ "),
        (torch.zeros(10, 6).double(), ValueError, r"x_0 must have shape \[rows, 5\] .* got \[10, 6\]"),
        (torch.zeros(10).double(), ValueError, r"x_0 must have shape .* got \[10\]"),
        (torch.zeros(10, 5).long(), TypeError, "x_0 must be a floating tensor or batch.features, got torch.int64"),
        (None, TypeError, "x_0 must be a floating tensor or batch.features, got NoneType"),
        (torch.zeros(10, 5, device="meta"), ValueError, "x_0 is on meta but the batch is on cpu"),
    ],
)
def test_bad_initial_rows_are_named_and_push_nothing(x_0: Any, error: type[Exception], message: str) -> None:
    loader = make_loader()
    batch = loader.batch([0, 3])
    conv = GCN2Conv(5, 0.1).double()
    store = attach_histories(nn.Sequential(conv), 30, dtype=torch.float64, layers=["0"])["0"]
    with pytest.raises(error, match=message):
        conv(batch.x[: batch.num_nodes], x_0, batch)
    assert not store.table.any()


def test_another_graph_is_refused() -> None:
    graph = GRAPHS["directed"].graph()
    batch = ClusterLoader(graph, random_partition(graph, 1), x=torch.zeros(30, 5)).full()
    with pytest.raises(
        ValueError,
        match=r"GCN2Conv\(normalize=True, add_self_loops=True\) needs a graph made by "
        r"graph.add_self_loops\(\).gcn_norm\(\), got normalization=None",
    ):
        GCN2Conv(5, 0.1)(batch.x, batch.x, batch)
    assert GCN2Conv(5, 0.1, normalize=False)(batch.x, batch.x, batch).shape == (30, 5)


def test_repr() -> None:
    assert str(GCN2Conv(5, 0.1, 0.5, 2)) == "GCN2Conv(5, alpha=0.1, beta=0.2231)"

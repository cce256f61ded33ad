"""The stacks: every option, in training and evaluation, against the same model written out in plain torch."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import Batch, ClusterLoader, attach_histories, functional, inference, random_partition
from gas_triton.models import GCN, GIN, MODELS, PNA, SAGE, Stack

from . import reference
from .reference import GRAPHS, block

PNA_OPTIONS: dict[str, Any] = {"aggregators": ["mean", "max", "sum"], "scalers": ["identity", "amplification"]}

KINDS: dict[str, tuple[type[Stack], dict[str, Any], reference.Layer]] = {
    "GCN": (GCN, {"normalize": False}, reference.gcn),
    "SAGE": (SAGE, {}, reference.sage),
    "SAGE max": (SAGE, {"aggr": "max"}, lambda p, x, edges: reference.sage(p, x, edges, "max")),
    "GIN": (GIN, {}, reference.gin),
    "PNA": (
        PNA,
        # two nodes of degree 1 and two of degree 3
        {"deg": torch.tensor([0, 2, 0, 2]), **PNA_OPTIONS},
        lambda p, x, edges: reference.light_pna(p, x, edges, mean_log=1.5 * math.log(2), **PNA_OPTIONS),
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.4},
    "drop_input": {"dropout": 0.4, "drop_input": False},
    "batch_norm": {"batch_norm": True},
    "residual": {"residual": True},
    "linear": {"linear": True, "dropout": 0.4},
    "linear_drop_input": {"linear": True, "dropout": 0.4, "drop_input": False},
    "all": {"dropout": 0.4, "batch_norm": True, "residual": True, "linear": True},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPTIONS[request.param]


def make_model(kind: str, **options: Any) -> Stack:
    torch.manual_seed(4)
    model_class, layer_options, _ = KINDS[kind]
    model = model_class(6, 8, 3, 3, **layer_options, **options).double()
    for parameter in model.parameters():
        # away from biases of 0 and batch norms of 1, which hide a missing one
        parameter.data.add_(torch.rand_like(parameter) * 0.2)
    return model


def make_loader(name: str = "weighted_symmetric", **options: Any) -> ClusterLoader:
    graph = GRAPHS[name].graph()
    parts = random_partition(graph, 6)
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(graph.num_nodes, 6, dtype=torch.float64, generator=draw)
    y = torch.randint(3, (graph.num_nodes,), generator=draw)
    return ClusterLoader(parts.permute(graph), parts, **{"batch_size": 2, "x": x, "y": y, **options})


def train_a_step(model: Stack, batch: Batch) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss = F.cross_entropy(model(batch.x, batch), batch.y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def written_out(kind: str, model: Stack, batch: Batch, loader: ClusterLoader) -> Tensor:
    """The forward of PyGAS's models on the whole graph, with the masks that our layers draw."""
    edges = block(loader.graph, range(loader.graph.num_nodes))
    layer, p = KINDS[kind][2], model.dropout if model.training else 0.0

    def drop(rows: Tensor) -> Tensor:
        seed = functional.draw_seed(rows.device) if p > 0 else torch.zeros(1, dtype=torch.int64)
        return functional.dropout(rows, batch, p, seed)

    x, first_is_dropped = batch.x, model.drop_input
    if len(model.lins):
        x = drop(x) if model.drop_input else x
        x, first_is_dropped = model.lins[0](x).relu(), True
    for place, conv in enumerate(model.convs):
        h = layer(
            dict(conv.named_parameters()) | dict(conv.named_buffers()),
            drop(x) if place > 0 or first_is_dropped else x,
            edges,
        )
        if place == 2 and not len(model.lins):
            return h
        if len(model.norms):
            h = model.norms[place](h)
        if model.residual and h.shape == x.shape:
            h = h + x
        x = h.relu()
    return model.lins[1](drop(x))


@pytest.mark.parametrize("is_training", [True, False])
def test_model_is_the_one_written_out(kind: str, options: dict[str, Any], is_training: bool) -> None:
    model, loader = make_model(kind, **options), make_loader()
    batch = loader.full()
    train_a_step(model, batch)
    model.train(is_training)
    results = []
    for forward in (lambda: model(batch.x, batch), lambda: written_out(kind, model, batch, loader)):
        torch.manual_seed(7)
        out = forward()
        results.append([out, *torch.autograd.grad(F.cross_entropy(out, batch.y), list(model.parameters()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_batches_with_exact_histories_give_rows_of_the_whole(kind: str, options: dict[str, Any]) -> None:
    model, loader = make_model(kind, **options), make_loader("weighted_directed")
    train_a_step(model, loader.full())
    model.eval()
    inputs: list[Tensor] = []
    hooks = [conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for conv in model.convs]
    with torch.no_grad():
        whole = model(loader.x, loader.full())
        for hook in hooks:
            hook.remove()
        histories = attach_histories(model, loader.graph.num_nodes, dtype=torch.float64)
        assert list(histories) == ["convs.1", "convs.2"]
        for store, rows in zip(histories.values(), inputs[1:], strict=True):
            store.table.copy_(rows)
        for batch in loader:
            for x in (batch.x, batch.features):
                torch.testing.assert_close(model(x, batch), whole[batch.node_ids])


@pytest.mark.interop
@pytest.mark.parametrize("norm", [None, "batch_norm"])
@pytest.mark.parametrize("name", ["GCN", "SAGE"])
def test_stack_is_the_model_of_pyg(name: str, norm: str | None, torch_geometric: ModuleType) -> None:
    edges = GRAPHS["weighted_directed"]
    graph = edges.graph().add_self_loops().gcn_norm() if name == "GCN" else edges.graph()
    x = torch.randn(graph.num_nodes, 6, dtype=torch.float64)
    batch = ClusterLoader(graph, random_partition(graph, 1), x=x).full()
    theirs = getattr(torch_geometric.nn.models, {"SAGE": "GraphSAGE"}.get(name, name))(6, 8, 3, 3, norm=norm).double()
    ours = MODELS[name](6, 8, 3, 3, batch_norm=norm is not None).double()
    ours.load_state_dict({key.replace(".module.", "."): value for key, value in theirs.state_dict().items()})
    weight = {"edge_weight": edges.weight} if name == "GCN" else {}
    for is_training in (True, False):
        expected = theirs.train(is_training)(x, edges.edge_index, **weight)
        torch.testing.assert_close(ours.train(is_training)(batch.x, batch), expected)


@pytest.mark.parametrize("linear", [False, True])
def test_parameters_fall_into_two_groups(kind: str, linear: bool) -> None:
    model = make_model(kind, linear=linear, batch_norm=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    without_decay = {names[id(p)] for p in model.nonreg_parameters}
    with_decay = {names[id(p)] for p in model.reg_parameters}
    assert len(model.nonreg_parameters) + len(model.reg_parameters) == len(names)
    assert without_decay | with_decay == set(names.values())
    assert without_decay == {name for name in names.values() if name.startswith("lins." if linear else "convs.2.")}


def test_reset_parameters_forgets_training(kind: str) -> None:
    model, loader = make_model(kind, linear=True, batch_norm=True), make_loader()
    train_a_step(model, loader.full())
    assert bool(model.norms[0].running_mean.any())
    before = [p.detach().clone() for p in model.parameters()]
    model.reset_parameters()
    assert not model.norms[0].running_mean.any()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_options_reach_the_layers() -> None:
    model = SAGE(6, 8, 3, 2, aggr="max", project=True, halo="drop")
    assert [(conv.aggr, conv.project, conv.halo) for conv in model.convs] == [("max", True, "drop")] * 2
    assert not isinstance(GIN(6, 8, 3, 2, train_eps=False).convs[0].eps, nn.Parameter)


def gin_of_the_example(model: GIN, batch: Batch, loader: ClusterLoader) -> Tensor:
    """The forward of PyGAS's example on CLUSTER: no ReLU behind the skip connection."""
    edges = block(loader.graph, range(loader.graph.num_nodes))
    x = model.lins[0](batch.x).relu()
    for conv in model.convs:
        linear1, norm, _, linear2, _ = conv.nn
        h = reference.aggregate(x, edges) + (1 + conv.eps) * x
        is_of_rows = model.training or norm.running_mean is None
        scale = (None, None) if is_of_rows else (norm.running_mean, norm.running_var)
        h = F.batch_norm(linear1(h), *scale, norm.weight, norm.bias, training=is_of_rows)
        x = linear2(h.relu()).relu() + x
    return model.lins[1](x)


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("is_training", [True, False])
def test_gin_with_norms_in_its_perceptrons_is_that_of_pygas(is_training: bool, runs: bool) -> None:
    model = make_model("GIN", linear=True, residual=True, perceptron_norm=True, running_statistics=runs)
    assert all((conv.nn[1].running_mean is not None) == runs for conv in model.convs)
    loader = make_loader()
    batch = loader.full()
    train_a_step(model, batch)
    model.train(is_training)
    results = [
        [out, *torch.autograd.grad(F.cross_entropy(out, batch.y), list(model.parameters()))]
        for out in (model(batch.x, batch), gin_of_the_example(model, batch, loader))
    ]
    torch.testing.assert_close(*results)
    if not is_training and runs:
        torch.testing.assert_close(inference(model, loader), results[0][0].detach())


def test_leaving_the_halo_out_needs_no_history(kind: str) -> None:
    model, loader = make_model(kind, halo="drop").eval(), make_loader("weighted_directed")
    for batch in loader:
        inside = reference.Block(*within(batch), batch.node_ids, batch.halo_ids[:0])
        x = loader.x[batch.node_ids]
        for place, conv in enumerate(model.convs):
            x = KINDS[kind][2](dict(conv.named_parameters()), x, inside)
            x = x.relu() if place < 2 else x
        torch.testing.assert_close(model(batch.x, batch), x)


def within(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(source, target, weight) of the edges between in-batch rows."""
    target = torch.repeat_interleave(torch.arange(batch.num_nodes), batch.inner.rowptr.diff())
    return batch.inner.col.long(), target, batch.edge_weight[: batch.inner.num_edges]

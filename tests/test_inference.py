"""Layer-wise inference: the logits of the whole graph as one batch, from batches, in one sweep a layer."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gas_triton import Batch, ClusterLoader, Graph, attach_histories, contiguous_partition, inference, random_partition
from gas_triton.inference import filling_histories
from gas_triton.models import MODELS, Stack
from gas_triton.nn import GATConv, GCN2Conv, GCNConv, GINConv, LightPNAConv, SAGEConv
from gas_triton.nn.base import HistoryLayer

from .reference import GRAPHS

STACKS = [name for name, kind in MODELS.items() if issubclass(kind, Stack)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_norm": {"batch_norm": True, "dropout": 0.5},
    "all": {"batch_norm": True, "residual": True, "linear": True, "dropout": 0.5},
}


class Branches(nn.Module):
    """Skip connections, parallel branches, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv1 = SAGEConv(6, 8)
        self.conv2 = GCNConv(8, 8, normalize=False)
        self.left = SAGEConv(8, 5, aggr="max")
        self.right = GINConv(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)))
        self.lin = nn.Linear(8 + 8 + 5 + 5, 3)
        self.double()

    def forward(self, x: Any, batch: Batch) -> Tensor:
        h1 = self.conv1(x, batch).relu()
        h2 = self.conv2(h1, batch).tanh() + h1
        h3 = self.conv2(h2, batch) + h2
        return self.lin(torch.cat([h1, h3, self.left(h2, batch), self.right(h3, batch)], dim=1))


def make_loader(name: str = "weighted_directed", num_parts: int = 6, **options: Any) -> ClusterLoader:
    graph = GRAPHS[name].graph()
    graph = graph.add_self_loops().gcn_norm()
    parts = random_partition(graph, num_parts)
    x = torch.randn(graph.num_nodes, 6, dtype=torch.float64)
    return ClusterLoader(parts.permute(graph), parts, **{"batch_size": 2, "x": x, **options})


def with_a_separate_component() -> ClusterLoader:
    """Five clusters: the first, the middle and the last have no halo, the other two have each other's rows."""
    triangle = torch.tensor([[0, 1, 2], [1, 2, 0]])
    chain = torch.stack([torch.arange(5), torch.arange(1, 6)])
    path = torch.tensor([3, 4, 5, 9, 10, 11])[torch.cat([chain, chain.flip(0)], dim=1)]
    edge_index = torch.cat([triangle, triangle + 6, triangle + 12, path], dim=1)
    graph = Graph.from_edge_index(edge_index, num_nodes=15).add_self_loops().gcn_norm()
    parts = contiguous_partition(graph, [3] * 5)
    x = torch.randn(15, 6, dtype=torch.float64)
    return ClusterLoader(parts.permute(graph), parts, x=x)


def whole(model: nn.Module, loader: ClusterLoader) -> Tensor:
    model = copy.deepcopy(model).eval()
    batch = loader.full()
    with torch.no_grad():
        return model(batch.x, batch)


def make_stack(name: str, num_layers: int = 3, **options: Any) -> Stack:
    options = {**MODELS[name].options_of(GRAPHS["directed"].graph()), **options}
    model = MODELS[name](6, 8, 4, num_layers, **options).double()
    for norm in model.norms:
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", STACKS)
def test_logits_are_those_of_the_whole_graph(name: str, options: str) -> None:
    loader = make_loader()
    model = make_stack(name, **OPTIONS[options])
    logits = inference(model, loader)
    torch.testing.assert_close(logits, whole(model, loader))
    assert not logits.requires_grad


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("name", ["symmetric", "no_edges"])
def test_any_depth(name: str, num_layers: int) -> None:
    loader = make_loader(name, num_parts=4)
    model = make_stack("GCN", num_layers)
    torch.testing.assert_close(inference(model, loader), whole(model, loader))


@pytest.mark.parametrize("num_parts", [1, 7, 30])
def test_any_cut(num_parts: int) -> None:
    loader = make_loader(num_parts=num_parts)
    model = make_stack("SAGE")
    torch.testing.assert_close(inference(model, loader), whole(model, loader))


@pytest.mark.parametrize("make_model", [Branches, lambda: make_stack("GIN", **OPTIONS["all"])])
@pytest.mark.parametrize("make", [make_loader, with_a_separate_component])
def test_any_model_of_these_layers(make_model: Any, make: Any) -> None:
    model, loader = make_model(), make()
    expected = whole(model, loader)
    torch.testing.assert_close(inference(model, loader), expected)
    by_handle = inference(model, loader, forward=lambda model, batch: model(batch.features, batch))
    torch.testing.assert_close(by_handle, expected)


def test_model_called_otherwise() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = make_stack("GCN")

        def forward(self, x: Tensor, batch: Batch, scale: Tensor) -> Tensor:
            return self.stack(x, batch) * scale[:, None]

    loader = make_loader(scale=torch.rand(30, dtype=torch.float64))
    model = Scaled()
    expected = whole(model.stack, loader) * loader.node_tensors["scale"][:, None]
    given = inference(model, loader, forward=lambda model, batch: model(batch.x, batch, batch.scale))
    torch.testing.assert_close(given, expected)


def test_batches_that_call_different_layers_are_refused() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = SAGEConv(6, 4).double(), SAGEConv(4, 4).double()

        def forward(self, x: Tensor, batch: Batch) -> Tensor:
            h = self.conv1(x, batch)
            return h if 0 in batch.clusters else self.conv2(h, batch)

    with pytest.raises(RuntimeError, match="model does not call the same layers for every batch"):
        inference(Fickle(), make_loader())


# --- what it costs ----------------------------------------------------------------------------------------------------


class Calls:
    """Counts the layers that are computed, the rows they are given, and the forwards of the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed: Counter[tuple[HistoryLayer, tuple[int, ...]]] = Counter()
        self.rows: set[int] = set()
        self.forwards = 0
        for layer_class in (GATConv, GCNConv, SAGEConv, GINConv, GCN2Conv, LightPNAConv):
            self._watch(layer_class, monkeypatch)

    def _watch(self, layer_class: type[HistoryLayer], monkeypatch: pytest.MonkeyPatch) -> None:
        compute = layer_class.forward

        def forward(layer: HistoryLayer, x: Tensor, *given: Any) -> Tensor:
            self.computed[layer, tuple(given[-1].clusters)] += 1
            self.rows.add(x.size(0))
            return compute(layer, x, *given)

        monkeypatch.setattr(layer_class, "forward", forward)

    def model(self, model: nn.Module, batch: Batch) -> Tensor:
        self.forwards += 1
        return model(batch.x, batch)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", STACKS)
def test_a_stack_takes_one_sweep_a_layer_and_computes_each_layer_once_a_batch(
    name: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(num_parts=10)
    model = make_stack(name, num_layers=4, **OPTIONS[options])
    calls = Calls(monkeypatch)
    inference(model, loader, calls.model)
    assert calls.forwards == 4 * len(loader)
    assert len(calls.computed) == 4 * len(loader)
    assert set(calls.computed.values()) == {1}


def test_layers_are_given_the_rows_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader("simple", num_parts=15, batch_size=1)
    calls = Calls(monkeypatch)
    inference(make_stack("SAGE"), loader, calls.model)
    assert calls.rows == {batch.num_nodes + batch.num_halo for batch in loader}
    assert max(calls.rows) < loader.graph.num_nodes


# --- what it leaves ---------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def fail_on_the_last_batch(model: nn.Module, batch: Batch) -> Tensor:
    if 5 in batch.clusters:
        raise Stop
    return model(batch.x, batch)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_model_is_left_as_it_was(is_stopped: bool) -> None:
    model, loader = Branches(), make_loader()
    model.left.eval()
    model.right.nn[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    if is_stopped:
        with pytest.raises(Stop):
            inference(model, loader, fail_on_the_last_batch)
    else:
        inference(model, loader)
    assert [module.training for module in model.modules()] == modes
    assert modes.count(False) == 4
    assert not any("forward" in vars(module) for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    batch = loader.full()
    torch.testing.assert_close(model.eval()(batch.x, batch), whole(model, loader))


def test_forward_set_on_a_layer_survives() -> None:
    model, loader = make_stack("GCN"), make_loader()
    compute = model.convs[1].forward
    model.convs[1].forward = doubled = lambda x, batch: 2 * compute(x, batch)
    batch = loader.full()
    expected = model.eval()(batch.x, batch).detach()
    torch.testing.assert_close(inference(model, loader), expected)
    assert model.convs[1].forward is doubled


def test_histories_are_neither_read_nor_written() -> None:
    model, loader = Branches(), make_loader()
    expected = whole(model, loader)
    histories = attach_histories(model, 30, dtype=torch.float64)
    for store in histories.values():
        store.table.fill_(7.0)
        store.row_order = "of another graph"
    before = copy.deepcopy(histories.state_dict())
    torch.testing.assert_close(inference(model, loader), expected)
    for name, store in histories.items():
        assert torch.equal(store.table, before[name]["table"])
        assert torch.equal(store.last_push, before[name]["last_push"])
        assert (int(store.clock), store.row_order) == (0, "of another graph")


@pytest.mark.parametrize("way", ["layer by layer", "whole graph"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_histories_are_filled_with_the_exact_rows(way: str, dtype: torch.dtype) -> None:
    model, loader = make_stack("GCN", dropout=0.5), make_loader()
    histories = attach_histories(model, 30, dtype=dtype)
    rows: dict[str, Tensor] = {}
    hooks = [
        conv.register_forward_pre_hook(lambda _, args, place=place: rows.update({f"convs.{place}": args[0]}))
        for place, conv in enumerate(model.convs)
    ]
    expected = whole(model, loader)
    for hook in hooks:
        hook.remove()
    if way == "layer by layer":
        logits = inference(model, loader, fill_histories=True)
    else:
        batch = loader.full()
        with torch.no_grad(), filling_histories(model.eval()):
            logits = model(batch.x, batch)
    torch.testing.assert_close(logits, expected)
    assert len(histories) == 2
    for name, store in histories.items():
        tolerance = {} if dtype == torch.float64 else {"rtol": 0.0, "atol": float(rows[name].abs().max()) / 200}
        table = store.table if dtype == torch.float64 else store.table.double() * store.scale[:, None]
        torch.testing.assert_close(table.double(), rows[name], **tolerance)
        assert int(store.last_push.min()) >= 1
    # no hook stays
    before = copy.deepcopy(histories.state_dict())
    inference(model, loader)
    assert all(torch.equal(store.table, before[name]["table"]) for name, store in histories.items())


class Keywords(nn.Module):
    """Every module is given its rows by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lin = nn.Linear(6, 8)
        self.convs = nn.ModuleList([SAGEConv(8, 8), SAGEConv(8, 3)])
        self.double()

    def forward(self, x: Any, batch: Batch) -> Tensor:
        h = self.lin(input=x).relu()
        for conv in self.convs:
            h = conv(batch=batch, x=h).relu()
        return h


def test_rows_may_be_given_by_name() -> None:
    model, loader = Keywords(), make_loader()
    expected = whole(model, loader)
    histories = attach_histories(model, 30, dtype=torch.float64)
    torch.testing.assert_close(inference(model, loader, fill_histories=True), expected)
    filled = histories["convs.1"].table.clone()
    assert bool(filled.any())
    histories.reset()
    batch = loader.full()
    with torch.no_grad(), filling_histories(model.eval()):
        torch.testing.assert_close(model(batch.x, batch), expected)
    torch.testing.assert_close(histories["convs.1"].table, filled)


def test_another_graph_can_be_inferred_while_histories_are_attached() -> None:
    model, loader = make_stack("GCN"), make_loader()
    attach_histories(model, 30, dtype=torch.float64)
    other = with_a_separate_component()
    batch = other.full()
    model.eval()
    torch.testing.assert_close(inference(model, other), model(batch.x, batch).detach())
    assert other.graph.num_nodes != loader.graph.num_nodes


def test_loader_goes_on_where_it_was() -> None:
    loader, twin = make_loader(), make_loader()
    list(loader), list(twin)
    inference(make_stack("GCN"), loader)
    assert [batch.clusters for batch in loader] == [batch.clusters for batch in twin]

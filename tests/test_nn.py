"""Layers against those of torch_geometric and against plain torch, on whole graphs and on batches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gas_triton.nn
from gas_triton import Batch, ClusterLoader, attach_histories, functional, random_partition
from gas_triton.nn import GCNConv, GINConv, SAGEConv
from gas_triton.nn.base import HistoryLayer

from . import reference
from .reference import GRAPHS, Block, block

CLUSTERS = [1, 2, 4]


class Case(NamedTuple):
    """A layer of ours, and of torch_geometric, from the same arguments."""

    name: str
    in_channels: int = 6
    out_channels: int = 4
    options: Mapping[str, Any] = MappingProxyType({})

    def make(self, module: ModuleType, **options: Any) -> Any:
        torch.manual_seed(1)
        options = {**self.options, **options}
        if self.name == "GINConv":
            layers = nn.Linear(self.in_channels, 5), nn.ReLU(), nn.Linear(5, self.out_channels)
            return module.GINConv(nn.Sequential(*layers), **options).double()
        return getattr(module, self.name)(self.in_channels, self.out_channels, **options).double()

    def ours(self, **options: Any) -> HistoryLayer:
        options = {"normalize": False, **options} if self.name == "GCNConv" else options
        conv = self.make(gas_triton.nn, **options)
        for parameter in conv.parameters():
            # torch_geometric and we start biases at 0, which would hide a missing one
            nn.init.uniform_(parameter, -1, 1)
        return conv

    def theirs(self, torch_geometric: ModuleType, state: dict[str, Tensor]) -> nn.Module:
        conv = self.make(torch_geometric.nn, **({"normalize": False} if self.name == "GCNConv" else {}))
        conv.load_state_dict(state)
        return conv

    def reference(self, state: dict[str, Tensor], x: Tensor, edges: Block) -> Tensor:
        if self.name == "GCNConv":
            return reference.gcn(state, x, edges)
        if self.name == "GINConv":
            return reference.gin(state, x, edges)
        aggr = self.options.get("aggr", "mean")
        out = reference.sage(state, x, edges, "sum" if aggr == "add" else aggr)
        return out / out.norm(dim=1, keepdim=True) if self.options.get("normalize") else out


CASES = {
    "gcn": Case("GCNConv"),
    "gcn_narrowing": Case("GCNConv", 24, 2),
    "gcn_no_bias": Case("GCNConv", options={"bias": False}),
    "sage": Case("SAGEConv"),
    "sage_narrowing": Case("SAGEConv", 24, 2),
    "sage_sum": Case("SAGEConv", options={"aggr": "sum"}),
    "sage_add_narrowing_no_bias": Case("SAGEConv", 24, 2, {"aggr": "add", "bias": False}),
    "sage_max": Case("SAGEConv", options={"aggr": "max"}),
    "sage_min": Case("SAGEConv", options={"aggr": "min"}),
    "sage_project": Case("SAGEConv", options={"project": True}),
    "sage_project_max": Case("SAGEConv", options={"project": True, "aggr": "max"}),
    "sage_no_root": Case("SAGEConv", options={"root_weight": False}),
    "sage_normalize": Case("SAGEConv", options={"normalize": True}),
    "gin": Case("GINConv"),
    "gin_train_eps": Case("GINConv", options={"train_eps": True, "eps": 0.3}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def make_loader(name: str = "weighted_directed", num_features: int = 6, seed: int = 0) -> ClusterLoader:
    graph = GRAPHS[name].graph()
    parts = random_partition(graph, 6, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(graph.num_nodes, num_features, dtype=torch.float64, generator=draw)
    return ClusterLoader(parts.permute(graph), parts, x=x)


def gradients(out: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=draw)
    return list(torch.autograd.grad(out, wanted, cotangent, materialize_grads=True))


def assert_same(ours: Tensor, theirs: Tensor, our_leaves: list[Tensor], their_leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    for our, their in zip(gradients(ours, our_leaves), gradients(theirs, their_leaves), strict=True):
        torch.testing.assert_close(our, their)


def state_of(conv: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, with gradient where the original has it."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in conv.named_parameters()}
    return {name: leaves.get(name, value) for name, value in conv.state_dict().items()}


# --- torch_geometric -------------------------------------------------------------------------------------------------


def run_pyg(conv: nn.Module, x: Tensor, edges: Block) -> Tensor:
    edge_index = torch.stack([edges.source, edges.target])
    if type(conv).__name__ == "GCNConv":
        return conv(x, edge_index, edges.weight)[: edges.num_rows]
    return conv((x, x[: edges.num_rows]), edge_index, size=(x.size(0), edges.num_rows))


def parameters_like(ours: nn.Module, theirs: nn.Module) -> list[Tensor]:
    """The parameters of `theirs` in the order of `ours`."""
    return [theirs.get_parameter(name) for name, _ in ours.named_parameters()]


@pytest.mark.interop
@pytest.mark.parametrize("name", ["symmetric", "weighted_directed"])
@pytest.mark.parametrize("is_full", [True, False], ids=["full", "batch"])
def test_output_and_gradients_are_those_of_pyg(
    case: Case, name: str, is_full: bool, torch_geometric: ModuleType
) -> None:
    loader = make_loader(name, case.in_channels)
    batch = loader.full() if is_full else loader.batch(CLUSTERS)
    ours = case.ours()
    theirs = case.theirs(torch_geometric, ours.state_dict())
    x, x_pyg = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    expected = run_pyg(theirs, x_pyg, block(loader.graph, batch.node_ids.tolist()))
    assert_same(ours(x, batch), expected, [x, *ours.parameters()], [x_pyg, *parameters_like(ours, theirs)])


@pytest.mark.interop
def test_state_dict_fits_both_ways(case: Case, torch_geometric: ModuleType) -> None:
    ours = case.ours()
    theirs = case.theirs(torch_geometric, ours.state_dict())
    back = case.ours()
    for parameter in back.parameters():
        nn.init.zeros_(parameter)
    back.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value)
        assert torch.equal(back.state_dict()[name], value)


@pytest.mark.interop
@pytest.mark.parametrize("name", ["directed", "symmetric", "weighted_directed"])
@pytest.mark.parametrize("options", [{}, {"improved": True}, {"add_self_loops": False}])
def test_gcn_on_the_normalised_graph_is_pyg_on_the_given_one(
    name: str, options: dict[str, bool], torch_geometric: ModuleType
) -> None:
    edges = GRAPHS[name]
    graph = edges.graph()
    if options.get("add_self_loops", True):
        graph = graph.add_self_loops(2.0 if options.get("improved") else 1.0)
    graph = graph.gcn_norm()
    x = torch.randn(graph.num_nodes, 6, dtype=torch.float64)
    batch = ClusterLoader(graph, random_partition(graph, 1), x=x).full()
    ours = GCNConv(6, 4, **options).double()
    theirs = torch_geometric.nn.GCNConv(6, 4, **options).double()
    theirs.load_state_dict(ours.state_dict())
    # PyG forgets `improved` on a graph without weights
    weight = edges.weight if edges.weight is not None else torch.ones(edges.edge_index.size(1), dtype=torch.float64)
    torch.testing.assert_close(ours(x, batch), theirs(x, edges.edge_index, weight), rtol=1e-6, atol=1e-6)


@pytest.mark.interop
def test_leaving_the_halo_out_is_pyg_on_the_induced_subgraph(case: Case, torch_geometric: ModuleType) -> None:
    loader = make_loader(num_features=case.in_channels)
    batch = loader.batch(CLUSTERS)
    ours = case.ours(halo="drop")
    theirs = case.theirs(torch_geometric, ours.state_dict())
    edge_index, weight = torch_geometric.utils.subgraph(
        batch.node_ids, loader.graph.edge_index(), loader.graph.weight, relabel_nodes=True
    )
    edges = Block(*edge_index, weight, batch.node_ids, batch.halo_ids[:0])
    x_pyg = batch.x[: batch.num_nodes].clone().requires_grad_()
    expected = run_pyg(theirs, x_pyg, edges)
    their_gradients = gradients(expected, [x_pyg, *parameters_like(ours, theirs)])
    for num_rows in (batch.num_nodes, batch.num_nodes + batch.num_halo):
        x = batch.x[:num_rows].clone().requires_grad_()
        out = ours(x, batch)
        torch.testing.assert_close(out, expected)
        gradient, *our_gradients = gradients(out, [x, *ours.parameters()])
        assert not gradient[batch.num_nodes :].any()
        torch.testing.assert_close([gradient[: batch.num_nodes], *our_gradients], their_gradients)
    torch.testing.assert_close(ours(batch.features, batch), expected)


# --- plain torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["directed", "weighted_symmetric"])
@pytest.mark.parametrize("is_full", [True, False], ids=["full", "batch"])
def test_output_and_gradients_are_those_of_plain_torch(case: Case, name: str, is_full: bool) -> None:
    loader = make_loader(name, case.in_channels)
    batch = loader.full() if is_full else loader.batch(CLUSTERS)
    conv = case.ours()
    state = state_of(conv)
    x, x_reference = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    expected = case.reference(state, x_reference, block(loader.graph, batch.node_ids.tolist()))
    leaves = [state[name] for name, _ in conv.named_parameters()]
    assert_same(conv(x, batch), expected, [x, *conv.parameters()], [x_reference, *leaves])


@pytest.mark.parametrize("name", ["directed", "weighted_symmetric"])
@pytest.mark.parametrize("is_training", [True, False])
def test_in_batch_rows_and_an_exact_history_give_the_exact_output(case: Case, name: str, is_training: bool) -> None:
    loader = make_loader(name, case.in_channels)
    batch = loader.batch(CLUSTERS)
    conv = case.ours().train(is_training)
    histories = attach_histories(nn.Sequential(conv), loader.graph.num_nodes, dtype=torch.float64, layers=["0"])
    table = histories["0"].table
    table.copy_(loader.x)
    if is_training:
        table[batch.node_ids] = 0.0
    state = state_of(conv)
    x = batch.x[: batch.num_nodes].clone().requires_grad_()
    x_reference = x.detach().clone().requires_grad_()
    rows = torch.cat([x_reference, loader.x[batch.halo_ids]])
    expected = case.reference(state, rows, block(loader.graph, batch.node_ids.tolist()))
    leaves = [state[name] for name, _ in conv.named_parameters()]
    assert_same(conv(x, batch), expected, [x, *conv.parameters()], [x_reference, *leaves])
    assert torch.equal(table, loader.x)
    assert not table.requires_grad


def test_feature_handle_gives_what_the_rows_give(case: Case) -> None:
    loader = make_loader(num_features=case.in_channels)
    for batch in (loader.batch(CLUSTERS), loader.full()):
        conv = case.ours()
        by_rows, by_handle = conv(batch.x, batch), conv(batch.features, batch)
        assert_same(by_handle, by_rows, list(conv.parameters()), list(conv.parameters()))


@pytest.mark.parametrize("name", ["gcn", "sage"])
@pytest.mark.parametrize("narrows", [True, False])
def test_wide_rows_are_transformed_before_they_are_gathered(
    name: str, narrows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(CASES[name].name, *((64, 2) if narrows else (2, 64)))
    loader = make_loader(num_features=case.in_channels)
    batch = loader.batch(CLUSTERS)
    conv = case.ours()
    widths = []
    aggregate = functional.aggregate
    monkeypatch.setattr(functional, "aggregate", lambda x, *a, **k: widths.append(x.size(1)) or aggregate(x, *a, **k))
    out = conv(batch.x, batch)
    assert widths == [2]
    edges = block(loader.graph, batch.node_ids.tolist())
    torch.testing.assert_close(out, case.reference(state_of(conv), batch.x, edges))


# --- dropout ---------------------------------------------------------------------------------------------------------


def node_mask(loader: ClusterLoader, num_features: int, p: float) -> Tensor:
    """What every row of the graph is multiplied by when the next call draws its seed now."""
    state = torch.get_rng_state()
    seed = functional.draw_seed(torch.device("cpu"))
    torch.set_rng_state(state)
    return functional.dropout(torch.ones(loader.graph.num_nodes, num_features).double(), loader.full(), p, seed)


@pytest.mark.parametrize("given", ["all rows", "in-batch rows", "features"])
def test_dropout_masks_a_node_alike_wherever_it_is_read(case: Case, given: str) -> None:
    loader = make_loader(num_features=case.in_channels)
    batch = loader.batch(CLUSTERS)
    conv = case.ours(input_dropout=0.4)
    conv.history = attach_histories(nn.Sequential(conv), 30, dtype=torch.float64, layers=["0"])["0"]
    conv.history.table.copy_(loader.x)
    conv.history.table[batch.node_ids] = 0.0
    mask = node_mask(loader, case.in_channels, 0.4)
    state = state_of(conv)
    leaves = [state[name] for name, _ in conv.named_parameters()]
    rows = (loader.x * mask)[batch.all_ids]
    expected = case.reference(state, rows, block(loader.graph, batch.node_ids.tolist()))
    x = {"all rows": batch.x, "in-batch rows": batch.x[: batch.num_nodes], "features": batch.features}[given]
    assert_same(conv(x, batch), expected, list(conv.parameters()), leaves)
    if given == "in-batch rows":
        assert torch.equal(conv.history.table, loader.x)


def test_gradient_of_dropped_rows_is_masked() -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    conv = CASES["gin"].ours(input_dropout=0.5)
    mask = node_mask(loader, 6, 0.5)[batch.all_ids]
    x = batch.x.clone().requires_grad_()
    (gradient,) = gradients(conv(x, batch), [x])
    assert torch.equal(gradient == 0, mask == 0)


def test_dropout_drops_the_given_share_anew_each_call_and_not_in_evaluation() -> None:
    num_nodes = 400
    graph = GRAPHS["simple"].graph()
    graph = gas_triton.Graph.from_edge_index(graph.edge_index(), num_nodes=num_nodes)
    x = torch.ones(num_nodes, 50)
    batch = ClusterLoader(graph, random_partition(graph, 1), x=x).full()
    conv = GINConv(nn.Identity(), in_channels=50, input_dropout=0.3)
    isolated = slice(30, None)
    first, second = conv(batch.x, batch)[isolated], conv(batch.x, batch)[isolated]
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    # six standard deviations of a binomial
    count = first.numel()
    assert abs(float((first == 0).double().mean()) - 0.3) < 6 * (0.3 * 0.7 / count) ** 0.5
    assert abs(float(first.mean()) - 1) < 6 * (0.3 / 0.7 / count) ** 0.5
    assert abs(float(((first == 0) & (second == 0)).double().mean()) - 0.09) < 6 * (0.09 * 0.91 / count) ** 0.5
    assert conv.eval()(batch.x, batch)[isolated].unique().tolist() == [1.0]


# --- parameters ------------------------------------------------------------------------------------------------------


def test_reset_parameters_draws_anew(case: Case) -> None:
    conv = case.ours()
    before = {name: value.clone() for name, value in conv.named_parameters()}
    conv.reset_parameters()
    for name, value in conv.named_parameters():
        assert not torch.equal(value, before[name])
    if case.name == "GINConv":
        assert conv.eps.tolist() == [case.options.get("eps", 0.0)]
    if case.name == "GCNConv":
        bound = (6 / (case.in_channels + case.out_channels)) ** 0.5
        assert 0.7 * bound < float(conv.lin.weight.detach().abs().max()) <= bound
        assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize("train_eps", [True, False])
def test_eps_may_be_an_integer(train_eps: bool) -> None:
    conv = GINConv(nn.Linear(3, 3), eps=1, train_eps=train_eps)
    assert conv.eps.dtype == torch.float32
    assert conv.eps.tolist() == [1.0]
    assert ("eps" in dict(conv.named_parameters())) == train_eps


def test_repr() -> None:
    assert "16, 32\n" in str(GCNConv(16, 32))
    assert "16, 32, aggr=max\n" in str(SAGEConv(16, 32, aggr="max"))


# --- isolated nodes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no_edges", "one_node"])
def test_graphs_without_structure(case: Case, name: str) -> None:
    graph = GRAPHS[name].graph()
    x = torch.randn(graph.num_nodes, case.in_channels, dtype=torch.float64)
    batch: Batch = ClusterLoader(graph, random_partition(graph, 1), x=x).full()
    conv = case.ours()
    state = state_of(conv)
    leaves = [state[name] for name, _ in conv.named_parameters()]
    expected = case.reference(state, x, block(graph, range(graph.num_nodes)))
    assert_same(conv(x, batch), expected, list(conv.parameters()), leaves)

"""GATv2Conv and TransformerConv against those of torch_geometric and against plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gas_triton
import gas_triton.nn
from gas_triton import Batch, ClusterLoader, attach_histories, random_partition
from gas_triton.nn import GATv2Conv, HistoryLayer, TransformerConv

from .reference import GRAPHS, Block, GasReference, Parameters, block
from .test_nn import CLUSTERS, assert_same, gradients, node_mask, parameters_like, state_of

NAMES = ["directed", "symmetric"]
EDGE_DIM = 3


class Case(NamedTuple):
    """A layer of ours, and of torch_geometric, from the same arguments."""

    name: str
    heads: int
    options: Mapping[str, Any] = MappingProxyType({})
    out_channels: int = 5

    @property
    def has_edges(self) -> bool:
        return "edge_dim" in self.options

    def make(self, module: ModuleType, **options: Any) -> Any:
        loops = {"add_self_loops": False} if self.name == "GATv2Conv" else {}
        options = {**loops, **self.options, **options}
        return getattr(module, self.name)(6, self.out_channels, self.heads, **options).double()

    def ours(self, **options: Any) -> HistoryLayer:
        torch.manual_seed(1)
        conv = self.make(gas_triton.nn, **options)
        for parameter in conv.parameters():
            # torch_geometric and we start biases at 0, which would hide a missing one
            nn.init.uniform_(parameter, -1, 1)
        return conv

    def theirs(self, torch_geometric: ModuleType, state: dict[str, Tensor], **options: Any) -> nn.Module:
        conv = self.make(torch_geometric.nn, **options)
        conv.load_state_dict(state)
        return conv

    def reference(self, p: Parameters, x: Tensor, edges: Block, edge_attr: Tensor | None = None) -> Tensor:
        layer = gatv2 if self.name == "GATv2Conv" else transformer
        return layer(p, x, edges, self.heads, self.options.get("concat", True), edge_attr)


EDGES = MappingProxyType({"edge_dim": EDGE_DIM})
CASES = {
    "gatv2": Case("GATv2Conv", 1),
    "gatv2_heads": Case("GATv2Conv", 3),
    "gatv2_mean": Case("GATv2Conv", 8, {"concat": False}, out_channels=3),
    "gatv2_shared": Case("GATv2Conv", 3, {"share_weights": True, "residual": True, "negative_slope": 0.05}),
    "gatv2_plain": Case("GATv2Conv", 3, {"bias": False, "concat": False, "residual": True}),
    "gatv2_edges": Case("GATv2Conv", 3, EDGES),
    "transformer": Case("TransformerConv", 1),
    "transformer_heads": Case("TransformerConv", 3, {"bias": False}),
    "transformer_mean": Case("TransformerConv", 8, {"concat": False}, out_channels=3),
    "transformer_beta": Case("TransformerConv", 3, {"beta": True}),
    "transformer_beta_mean": Case("TransformerConv", 3, {"beta": True, "concat": False}),
    "transformer_no_root": Case("TransformerConv", 3, {"beta": True, "root_weight": False}),
    "transformer_edges": Case("TransformerConv", 3, {"edge_dim": EDGE_DIM, "beta": True}),
}
PLAIN = {name: CASES[name] for name in ("gatv2_heads", "gatv2_mean", "transformer_heads", "transformer_mean")}


def neighbourhood_softmax(logit: Tensor, edges: Block) -> Tensor:
    weight = torch.zeros_like(logit)
    for row in range(edges.num_rows):
        weight[edges.target == row] = logit[edges.target == row].softmax(0)
    return weight


def weighted_sum(value: Tensor, logit: Tensor, edges: Block, concat: bool) -> Tensor:
    message = neighbourhood_softmax(logit, edges)[:, :, None] * value
    out = value.new_zeros(edges.num_rows, *value.shape[1:]).index_add(0, edges.target, message)
    return out.flatten(1) if concat else out.mean(1)


def gatv2(p: Parameters, x: Tensor, edges: Block, heads: int, concat: bool, edge_attr: Tensor | None = None) -> Tensor:
    key = F.linear(x, p["lin_l.weight"], p.get("lin_l.bias")).unflatten(1, (heads, -1))
    query = F.linear(x, p["lin_r.weight"], p.get("lin_r.bias")).unflatten(1, (heads, -1))
    total = query[edges.target] + key[edges.source]
    if edge_attr is not None:
        total = total + F.linear(edge_attr, p["lin_edge.weight"]).unflatten(1, (heads, -1))
    out = weighted_sum(key[edges.source], (F.leaky_relu(total, 0.2) * p["att"]).sum(2), edges, concat)
    return out + p["bias"] if "bias" in p else out


def transformer(
    p: Parameters, x: Tensor, edges: Block, heads: int, concat: bool, edge_attr: Tensor | None = None
) -> Tensor:
    query, key, value = (
        F.linear(x, p[f"lin_{name}.weight"], p.get(f"lin_{name}.bias")).unflatten(1, (heads, -1))
        for name in ("query", "key", "value")
    )
    key, value = key[edges.source], value[edges.source]
    if edge_attr is not None:
        edge = F.linear(edge_attr, p["lin_edge.weight"]).unflatten(1, (heads, -1))
        key, value = key + edge, value + edge
    logit = (query[edges.target] * key).sum(2) / math.sqrt(key.size(2))
    out = weighted_sum(value, logit, edges, concat)
    return out + F.linear(x[: edges.num_rows], p["lin_skip.weight"], p.get("lin_skip.bias"))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def make_loader(name: str = "directed", loops: bool = False) -> ClusterLoader:
    graph = GRAPHS[name].graph()
    graph = graph.add_self_loops() if loops else graph
    parts = random_partition(graph, 6, seed=0)
    x = torch.randn(graph.num_nodes, 6, dtype=torch.float64)
    return ClusterLoader(parts.permute(graph), parts, x=x)


def edge_features(loader: ClusterLoader, batch: Batch, case: Case) -> Tensor | None:
    """Of the batch's edges, cut from a table of all edges of the graph."""
    if not case.has_edges:
        return None
    draw = torch.Generator().manual_seed(4)
    table = torch.randn(loader.graph.num_edges, EDGE_DIM, dtype=torch.float64, generator=draw)
    return table[batch.edge_ids]


# --- torch_geometric -------------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_full", [True, False], ids=["full", "batch"])
def test_output_and_gradients_are_those_of_pyg(
    case: Case, name: str, is_full: bool, torch_geometric: ModuleType
) -> None:
    loader = make_loader(name)
    batch = loader.full() if is_full else loader.batch(CLUSTERS)
    ours = case.ours()
    theirs = case.theirs(torch_geometric, ours.state_dict())
    x, x_pyg = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    leaves, leaves_pyg = [x, *ours.parameters()], [x_pyg, *parameters_like(ours, theirs)]
    edge_attr = edge_features(loader, batch, case)
    if edge_attr is not None:
        edge_attr = edge_attr.requires_grad_()
        leaves, leaves_pyg = [edge_attr, *leaves], [edge_attr, *leaves_pyg]
    edges = block(loader.graph, batch.node_ids.tolist())
    edge_index = torch.stack([edges.source, edges.target])
    expected = theirs((x_pyg, x_pyg[: edges.num_rows]), edge_index, edge_attr)
    assert_same(ours(x, batch, edge_attr), expected, leaves, leaves_pyg)


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
@pytest.mark.parametrize("fill_value", [None, "mean", "add", "min", "max", "mul", 0.7, torch.tensor([0.1, 0.2, 0.3])])
@pytest.mark.parametrize("name", NAMES)
def test_self_loops_of_the_graph_are_those_that_pyg_adds(
    name: str, fill_value: Any, torch_geometric: ModuleType
) -> None:
    loader = make_loader(name, loops=True)
    batch = loader.full()
    case = Case("GATv2Conv", 3, {} if fill_value is None else {"edge_dim": EDGE_DIM, "fill_value": fill_value})
    ours = case.ours(add_self_loops=True)
    theirs = case.theirs(torch_geometric, ours.state_dict(), add_self_loops=True)
    edge_attr = edge_features(loader, batch, case)
    extra = [] if edge_attr is None else [edge_attr.requires_grad_()]
    # PyG removes the loops first, with their features
    expected = theirs(batch.x, loader.graph.edge_index(), edge_attr)
    assert_same(
        ours(batch.x, batch, edge_attr), expected,
        [*extra, *ours.parameters()], [*extra, *parameters_like(ours, theirs)],
    )  # fmt: skip


@pytest.mark.interop
def test_leaving_the_halo_out_is_pyg_on_the_induced_subgraph(case: Case, torch_geometric: ModuleType) -> None:
    loader = make_loader(loops=True)
    batch = loader.batch(CLUSTERS)
    loops = {"add_self_loops": True} if case.name == "GATv2Conv" else {}
    ours = case.ours(halo="drop", **loops)
    theirs = case.theirs(torch_geometric, ours.state_dict(), **loops)
    edge_attr = edge_features(loader, batch, case)
    row = torch.arange(batch.num_nodes).repeat_interleave(batch.inner.rowptr.diff().long())
    own = None if edge_attr is None else edge_attr[: row.numel()]
    x_pyg = batch.x[: batch.num_nodes].clone().requires_grad_()
    expected = theirs(x_pyg, torch.stack([batch.inner.col.long(), row]), own)
    their_gradients = gradients(expected, [x_pyg, *parameters_like(ours, theirs)])
    for num_rows in (batch.num_nodes, batch.num_nodes + batch.num_halo):
        x = batch.x[:num_rows].clone().requires_grad_()
        out = ours(x, batch, edge_attr)
        torch.testing.assert_close(out, expected)
        gradient, *our_gradients = gradients(out, [x, *ours.parameters()])
        assert not gradient[batch.num_nodes :].any()
        torch.testing.assert_close([gradient[: batch.num_nodes], *our_gradients], their_gradients)


@pytest.mark.interop
@pytest.mark.parametrize("name", ["GATv2Conv", "TransformerConv"])
def test_parameters_start_as_those_of_pyg(name: str, torch_geometric: ModuleType) -> None:
    options = {"edge_dim": 40, "heads": 10}
    ours = getattr(gas_triton.nn, name)(50, 20, **options)
    theirs = getattr(torch_geometric.nn, name)(50, 20, **options)
    for key, parameter in theirs.named_parameters():
        own, largest = ours.get_parameter(key).detach(), float(parameter.detach().abs().max())
        # uniform draws come close to their bound
        assert float(own.abs().max()) == pytest.approx(largest, rel=0.1)
        before = own.clone()
        ours.reset_parameters()
        assert largest == 0.0 or not torch.equal(ours.get_parameter(key), before)


# --- histories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_training", [True, False])
def test_in_batch_rows_and_an_exact_history_give_the_exact_output(case: Case, is_training: bool) -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    conv = case.ours().train(is_training)
    histories = attach_histories(nn.Sequential(conv), loader.graph.num_nodes, dtype=torch.float64, layers=["0"])
    table = histories["0"].table
    assert table.size(1) == 6
    table.copy_(loader.x)
    if is_training:
        table[batch.node_ids] = 0.0
    edge_attr = edge_features(loader, batch, case)
    x, x_all = batch.x[: batch.num_nodes].clone().requires_grad_(), batch.x.clone().requires_grad_()
    from_history = conv(x, batch, edge_attr)
    conv.history = None
    exact = conv(x_all, batch, edge_attr)
    torch.testing.assert_close(from_history, exact)
    gradient, *of_parameters = gradients(from_history, [x, *conv.parameters()])
    expected, *wanted = gradients(exact, [x_all, *conv.parameters()])
    torch.testing.assert_close([gradient, *of_parameters], [expected[: batch.num_nodes], *wanted])
    assert torch.equal(table, loader.x)


@pytest.mark.parametrize("name", ["gatv2_heads", "transformer_heads"])
def test_training_with_histories_is_that_of_plain_torch(name: str) -> None:
    case = CASES[name]
    loader = make_loader()
    width = case.heads * case.out_channels
    torch.manual_seed(1)
    make = getattr(gas_triton.nn, case.name)
    options = {"add_self_loops": False} if case.name == "GATv2Conv" else {}
    convs = nn.ModuleList([make(6, 5, 3, **options), make(width, 2, 3, concat=True, **options)]).double()
    histories = attach_histories(convs, loader.graph.num_nodes, dtype=torch.float64)
    plain = GasReference(
        lambda p, x, edges: case.reference(p, x, edges), [state_of(conv) for conv in convs], [6, width], loader.graph
    )
    ours = torch.optim.SGD(convs.parameters(), 0.1)
    theirs = torch.optim.SGD(plain.leaves(), 0.1)
    for step in range(6):
        batch = loader.batch([step % 6, (step + 2) % 6])
        out = convs[1](convs[0](batch.x, batch).relu(), batch)
        expected = plain.forward(loader.x, batch.node_ids.tolist())
        torch.testing.assert_close(out, expected)
        for optimizer, result in ((ours, out), (theirs, expected)):
            optimizer.zero_grad()
            result.square().mean().backward()
            optimizer.step()
    (history,) = histories.values()
    torch.testing.assert_close(history.table, plain.tables[1])
    for conv, own in zip(convs, plain.parameters, strict=True):
        for key, value in conv.named_parameters():
            torch.testing.assert_close(value, own[key])


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_inference_gives_what_the_whole_graph_gives(case: Case) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = case.ours()
            width = self.first.out_channels * (self.first.heads if self.first.concat else 1)
            self.second = type(self.first)(width, 2, 2, **loops).double()

        def forward(self, x: Tensor, batch: Batch) -> Tensor:
            return self.second(self.first(x, batch).relu(), batch)

    loops = {"add_self_loops": False} if case.name == "GATv2Conv" else {}
    loader, model = make_loader(), Net().eval()
    attach_histories(model, loader.graph.num_nodes, dtype=torch.float64)
    full = loader.full()
    torch.testing.assert_close(gas_triton.inference(model, loader), model(full.x, full))


def test_feature_handle_gives_what_the_rows_give(case: Case) -> None:
    loader = make_loader()
    for batch in (loader.batch(CLUSTERS), loader.full()):
        conv, edge_attr = case.ours(), edge_features(loader, batch, case)
        by_rows, by_handle = conv(batch.x, batch, edge_attr), conv(batch.features, batch, edge_attr)
        assert_same(by_handle, by_rows, list(conv.parameters()), list(conv.parameters()))


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_input_dropout_masks_a_node_alike_wherever_it_is_read(case: Case) -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    dropping, plain = case.ours(input_dropout=0.4), case.ours()
    dropping.history = attach_histories(nn.Sequential(dropping), 30, dtype=torch.float64, layers=["0"])["0"]
    dropping.history.table.copy_(loader.x)
    mask = node_mask(loader, 6, 0.4)
    state = torch.get_rng_state()
    for x in (batch.x, batch.x[: batch.num_nodes], batch.features):
        torch.set_rng_state(state)
        out, expected = dropping(x, batch), plain((loader.x * mask)[batch.all_ids], batch)
        assert_same(out, expected, list(dropping.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("name", ["gatv2_heads", "transformer_heads"])
def test_attention_dropout_keeps_the_mean_and_is_off_in_evaluation(name: str) -> None:
    case = CASES[name]
    loader = make_loader()
    batch = loader.full()
    conv, plain = case.ours(dropout=0.5), case.ours()
    expected = plain(batch.x, batch)
    torch.testing.assert_close(conv.eval()(batch.x, batch), expected)
    conv.train()
    with torch.no_grad():
        runs = torch.stack([conv(batch.x, batch) for _ in range(400)])
    has_edges = batch.inner.rowptr.diff() > 0
    assert not torch.equal(runs[0][has_edges], runs[1][has_edges])
    assert torch.equal(runs[0][~has_edges], runs[1][~has_edges])
    # six standard errors of the mean
    error = (runs.mean(0) - expected).abs()
    assert (error <= 6 * runs.std(0) / 20 + 1e-12).all()


def test_dropout_draws_its_seed_from_torch() -> None:
    batch = make_loader().full()
    conv = CASES["gatv2_heads"].ours(dropout=0.5)
    torch.manual_seed(3)
    first = conv(batch.x, batch)
    torch.manual_seed(3)
    assert torch.equal(conv(batch.x, batch), first)
    assert not torch.equal(conv(batch.x, batch), first)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [GATv2Conv, TransformerConv])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(in_channels=(6, 6)), r"in_channels must be a positive int, got \(6, 6\)"),
        (dict(in_channels=-1), "in_channels must be a positive int, got -1"),
        (dict(heads=0), "heads must be a positive int, got 0"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(edge_dim=0), "edge_dim must be a positive int, got 0"),
        (dict(halo="skip"), "halo must be 'read' or 'drop', got 'skip'"),
    ],
)
def test_bad_arguments(layer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**{"in_channels": 6, "out_channels": 5, **options})


@pytest.mark.parametrize("layer", [GATv2Conv, TransformerConv])
@pytest.mark.parametrize(
    "edge_dim, edge_attr, error, message",
    [
        (None, torch.zeros(9, 3), ValueError, "edge_attr was given to a .*Conv made without edge_dim"),
        (3, torch.zeros(9, 3).double(), ValueError, r"edge_attr must have shape \[\d+, 3\] for .*Conv, got \[9, 3\]"),
        (3, torch.zeros(9), ValueError, r"edge_attr must have shape \[\d+, 3\] for .*Conv, got \[9\]"),
        (3, torch.zeros(9, 3).long(), TypeError, "edge_attr must be a floating tensor, got torch.int64"),
    ],
)
def test_bad_edge_features(
    layer: Any, edge_dim: int | None, edge_attr: Tensor, error: type[Exception], message: str
) -> None:
    batch = make_loader(loops=True).batch(CLUSTERS)
    conv = layer(6, 5, edge_dim=edge_dim).double()
    with pytest.raises(error, match=message):
        conv(batch.x, batch, edge_attr)


def test_missing_edge_features_and_unknown_fills() -> None:
    batch = make_loader().batch(CLUSTERS)
    with pytest.raises(ValueError, match=r"TransformerConv\(edge_dim=3\) needs edge_attr, got None"):
        TransformerConv(6, 5, edge_dim=3).double()(batch.x, batch)
    with pytest.raises(ValueError, match=r"fill_value must be a number, a tensor or one of add, .* got 'median'"):
        GATv2Conv(6, 5, edge_dim=3, fill_value="median")


def test_self_loops_are_asked_of_the_graph() -> None:
    batch = make_loader().batch(CLUSTERS)
    conv = GATv2Conv(6, 5).double()
    with pytest.raises(ValueError, match=r"graph made by graph.add_self_loops\(\), got .*; GATv2Conv\(add_self_loops"):
        conv(batch.x, batch)
    with_loops = make_loader(loops=True).batch(CLUSTERS)
    assert conv(with_loops.x, with_loops).shape == (with_loops.num_nodes, 5)


def test_one_feature_an_edge_may_be_a_vector() -> None:
    batch = make_loader().batch(CLUSTERS)
    conv = TransformerConv(6, 5, edge_dim=1).double()
    weight = torch.rand(batch.num_edges, dtype=torch.float64)
    assert torch.equal(conv(batch.x, batch, weight), conv(batch.x, batch, weight[:, None]))


def test_autocast_gives_narrow_rows() -> None:
    batch = make_loader(loops=True).batch(CLUSTERS)
    for conv in (GATv2Conv(6, 5, 2, edge_dim=3), TransformerConv(6, 5, 2, edge_dim=3)):
        edge_attr = torch.randn(batch.num_edges, 3)
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(batch.x.float(), batch, edge_attr)
        out.float().sum().backward()
        expected = conv(batch.x.float(), batch, edge_attr)
        torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
        assert all(parameter.grad is not None for parameter in conv.parameters())


@pytest.mark.parametrize("name", ["no_edges", "one_node"])
def test_graphs_without_structure(name: str) -> None:
    for case in PLAIN.values():
        graph = GRAPHS[name].graph()
        x = torch.randn(graph.num_nodes, 6, dtype=torch.float64)
        batch = ClusterLoader(graph, random_partition(graph, 1), x=x).full()
        conv = case.ours()
        state = state_of(conv)
        expected = case.reference(state, x, block(graph, range(graph.num_nodes)))
        leaves = [state[key] for key, _ in conv.named_parameters()]
        assert_same(conv(x, batch), expected, list(conv.parameters()), leaves)


def test_repr() -> None:
    assert "16, 32, heads=4\n" in str(GATv2Conv(16, 32, heads=4))
    assert "16, 32, heads=4\n" in str(TransformerConv(16, 32, heads=4))

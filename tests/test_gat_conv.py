"""`GATConv` and `GAT` against those of torch_geometric and against plain torch, on whole graphs and on batches."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gas_triton as gas
from gas_triton import ClusterLoader, Graph, attach_histories, functional, random_partition
from gas_triton.kernels.dropout import keep_mask
from gas_triton.models import GAT
from gas_triton.nn import GATConv

from .reference import GRAPHS, Block, GasReference, Parameters, block, random_edges
from .test_nn import CLUSTERS, assert_same, parameters_like

OPTIONS: dict[str, dict[str, Any]] = {
    "one_head": {},
    "heads": {"heads": 3},
    "average": {"heads": 8, "concat": False},
    "slope": {"heads": 2, "negative_slope": 0.5},
    "no_bias": {"heads": 2, "bias": False},
    "residual": {"heads": 3, "residual": True},
    "residual_average": {"heads": 3, "concat": False, "residual": True},
    "edges": {"heads": 3, "edge_dim": 4},
    "edges_average": {"heads": 2, "edge_dim": 1, "concat": False},
}


def make_loader(loops: bool = False, hub_edges: int = 512) -> ClusterLoader:
    """A directed graph with isolated nodes and a node into which many edges lead."""
    edges = random_edges()
    into = torch.stack([torch.randint(30, (25,)), torch.full((25,), 3)])
    graph = Graph.from_edge_index(torch.cat([edges.edge_index, into], dim=1), num_nodes=30)
    graph = graph.add_self_loops() if loops else graph
    parts = random_partition(graph, 6)
    loader = ClusterLoader(parts.permute(graph), parts, x=torch.randn(30, 6, dtype=torch.float64))
    loader._planner.hub_edges = hub_edges
    return loader


def make_conv(**options: Any) -> GATConv:
    conv = GATConv(6, 5, **{"add_self_loops": False, **options}).double()
    for parameter in conv.parameters():
        # biases start at 0, which would hide a missing one
        nn.init.uniform_(parameter, -1, 1)
    return conv


def make_edge_attr(conv: GATConv, num_edges: int) -> Tensor | None:
    return None if conv.edge_dim is None else torch.randn(num_edges, conv.edge_dim, dtype=torch.float64)


def gat(
    p: Parameters, x: Tensor, edges: Block, heads: int = 1, concat: bool = True, weight: Tensor | None = None
) -> Tensor:
    """The layer in plain torch, without edge features; `weight` multiplies the attention of every edge."""
    num_rows = edges.num_rows
    rows = F.linear(x, p["lin.weight"]).view(x.size(0), heads, -1)
    logit = (rows * p["att_src"]).sum(-1)[edges.source] + (rows * p["att_dst"]).sum(-1)[edges.target]
    alpha = F.leaky_relu(logit, 0.2).exp()
    alpha = alpha / alpha.new_zeros(num_rows, heads).index_add(0, edges.target, alpha)[edges.target]
    alpha = alpha if weight is None else alpha * weight
    message = alpha[:, :, None] * rows[edges.source]
    out = rows.new_zeros(num_rows, *rows.shape[1:]).index_add(0, edges.target, message)
    return (out.flatten(1) if concat else out.mean(1)) + p["bias"]


# --- torch_geometric -------------------------------------------------------------------------------------------------


def make_theirs(torch_geometric: ModuleType, conv: GATConv, **options: Any) -> Any:
    theirs = torch_geometric.nn.GATConv(6, 5, **{"add_self_loops": False, **options}).double()
    theirs.load_state_dict(conv.state_dict())
    return theirs


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["full", "batch", "hubs"])
@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_are_those_of_pyg(name: str, kind: str, torch_geometric: ModuleType) -> None:
    loader = make_loader(hub_edges=8 if kind == "hubs" else 512)
    batch = loader.full() if kind == "full" else loader.batch(CLUSTERS)
    assert (len(batch.hubs) > 0) == (kind == "hubs")
    ours = make_conv(**OPTIONS[name])
    theirs = make_theirs(torch_geometric, ours, **OPTIONS[name])
    edges = block(loader.graph, batch.node_ids.tolist())
    edge_index = torch.stack([edges.source, edges.target])
    edge_attr = make_edge_attr(ours, batch.num_edges)
    x, x_pyg = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    expected = theirs((x_pyg, x_pyg[: batch.num_nodes]), edge_index, edge_attr, size=(x.size(0), batch.num_nodes))
    leaves, their_leaves = [x, *ours.parameters()], [x_pyg, *parameters_like(ours, theirs)]
    if edge_attr is not None:
        theirs_attr, edge_attr = edge_attr, edge_attr.clone().requires_grad_()
        theirs_attr.requires_grad_()
        expected = theirs((x_pyg, x_pyg[: batch.num_nodes]), edge_index, theirs_attr, size=(len(x), batch.num_nodes))
        leaves, their_leaves = [*leaves, edge_attr], [*their_leaves, theirs_attr]
    assert_same(ours(x, batch, edge_attr), expected, leaves, their_leaves)


@pytest.mark.interop
@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_fits_both_ways(name: str, torch_geometric: ModuleType) -> None:
    ours = make_conv(**OPTIONS[name])
    theirs = make_theirs(torch_geometric, ours, **OPTIONS[name])
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    back = make_conv(**OPTIONS[name])
    back.load_state_dict(theirs.state_dict())
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in theirs.state_dict().items())


@pytest.mark.interop
@pytest.mark.parametrize("fill_value", [None, "mean", "max", 0.7, torch.tensor([0.1, 0.2])])
def test_loops_of_the_graph_are_those_that_pyg_adds(fill_value: Any, torch_geometric: ModuleType) -> None:
    loader = make_loader(loops=True)
    batch = loader.full()
    options = {"heads": 2, "add_self_loops": True}
    if fill_value is not None:
        options |= {"edge_dim": 2, "fill_value": fill_value}
    ours = make_conv(**options)
    theirs = make_theirs(torch_geometric, ours, **options)
    edge_attr = make_edge_attr(ours, batch.num_edges)
    # PyG removes the loops first, with their features
    expected = theirs(batch.x, loader.graph.edge_index(), edge_attr)
    torch.testing.assert_close(ours(batch.x, batch, edge_attr), expected)


@pytest.mark.interop
def test_edge_features_may_be_left_out_as_in_pyg(torch_geometric: ModuleType) -> None:
    loader = make_loader()
    batch = loader.full()
    ours = make_conv(edge_dim=2)
    theirs = make_theirs(torch_geometric, ours, edge_dim=2)
    torch.testing.assert_close(ours(batch.x, batch), theirs(batch.x, loader.graph.edge_index()))


@pytest.mark.interop
def test_parameters_start_as_in_pyg(torch_geometric: ModuleType) -> None:
    options = {"heads": 8, "edge_dim": 3, "residual": True}
    for module in (torch_geometric.nn.GATConv(40, 50, **options), GATConv(40, 50, **options)):
        module.reset_parameters()
        for name, (fan_in, fan_out) in {
            "lin.weight": (40, 400), "lin_edge.weight": (3, 400), "res.weight": (40, 400), "att_src": (50, 8),
            "att_dst": (50, 8), "att_edge": (50, 8),
        }.items():  # fmt: skip
            value, bound = module.get_parameter(name), (6 / (fan_in + fan_out)) ** 0.5
            assert value.abs().max() <= bound
            # six standard deviations of the mean square of a uniform draw
            assert abs(float(value.detach().square().mean()) * 3 / bound**2 - 1) < 6 * (0.8 / value.numel()) ** 0.5
        assert not module.bias.any()


# --- plain torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_training", [True, False])
def test_in_batch_rows_and_an_exact_history_give_the_exact_output(is_training: bool) -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    conv = make_conv(heads=3).train(is_training)
    assert conv.history_dim == 6
    histories = attach_histories(nn.Sequential(conv), 30, dtype=torch.float64, layers=["0"])
    histories["0"].table.copy_(loader.x)
    x = batch.x[: batch.num_nodes].clone().requires_grad_()
    x_exact = x.detach().clone().requires_grad_()
    rows = torch.cat([x_exact, loader.x[batch.halo_ids]])
    leaves = {name: p.detach().clone().requires_grad_() for name, p in conv.named_parameters()}
    expected = gat(leaves, rows, block(loader.graph, batch.node_ids.tolist()), 3)
    assert_same(conv(x, batch), expected, [x, *conv.parameters()], [x_exact, *leaves.values()])


def test_feature_handle_and_dropped_halo() -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    conv = make_conv(heads=3, residual=True)
    torch.testing.assert_close(conv(batch.features, batch), conv(batch.x, batch))
    conv.halo = "drop"
    edges = block(loader.graph, batch.node_ids.tolist())
    inside = edges.source < batch.num_nodes
    inner = Block(edges.source[inside], edges.target[inside], None, batch.node_ids, batch.halo_ids[:0])
    x = batch.x[: batch.num_nodes]
    expected = gat(dict(conv.named_parameters()), x, inner, 3) + conv.res(x)
    for given in (batch.x, x, batch.features):
        torch.testing.assert_close(conv(given, batch), expected)


def test_both_dropouts_and_neither_in_evaluation() -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    conv = make_conv(heads=3, dropout=0.4, input_dropout=0.3)
    edges = block(loader.graph, batch.node_ids.tolist())
    parameters = dict(conv.named_parameters())
    torch.manual_seed(5)
    rows = functional.dropout(batch.x, batch, 0.3, functional.draw_seed(batch.device))
    seed = functional.draw_seed(batch.device)
    mask = keep_mask(torch.arange(batch.num_edges), 3, 0.4, seed) / 0.6
    expected = gat(parameters, rows, edges, 3, weight=mask)
    torch.manual_seed(5)
    out = conv(batch.x, batch)
    torch.testing.assert_close(out, expected)
    assert not torch.equal(conv(batch.x, batch), out)
    torch.testing.assert_close(conv.eval()(batch.x, batch), gat(parameters, batch.x, edges, 3))


def test_a_model_trains_as_the_plain_torch_reference() -> None:
    graph = GRAPHS["directed"].graph().add_self_loops()
    parts = random_partition(graph, 6)
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randint(4, (30,))
    graph, x, y = parts.permute(graph, x, y)
    loader = ClusterLoader(graph, parts, batch_size=2, x=x, y=y)
    model = GAT(6, 3, 4, 3, hidden_heads=2, out_heads=3).double()
    histories = attach_histories(model, 30, dtype=torch.float64)
    assert [table.table.size(1) for table in histories.values()] == [6, 6]

    class Reference(GasReference):
        def forward(self, x: Tensor, node_ids: Any) -> Tensor:
            # the histories hold rows after the ELU, where GasReference has a ReLU
            edges = block(self.graph, node_ids)
            h = x[torch.cat([edges.node_ids, edges.halo_ids])]
            for depth, parameters in enumerate(self.parameters):
                if depth > 0:
                    self.tables[depth][edges.node_ids] = h.detach()
                    h = torch.cat([h, self.tables[depth][edges.halo_ids]])
                h = self.layer(parameters, h, edges)
                h = F.elu(h) if depth < 2 else h
            return h

    def plain(p: Parameters, h: Tensor, edges: Block) -> Tensor:
        is_last = p["bias"].numel() == 4
        return gat(p, h, edges, 3 if is_last else 2, not is_last)

    reference = Reference(plain, [dict(c.named_parameters()) for c in model.convs], [6, 6, 6], graph)
    optimizers = [torch.optim.Adam(own, lr=0.02) for own in (list(model.parameters()), reference.leaves())]
    losses = []
    for _ in range(4):
        for batch in loader:
            pair = [
                F.cross_entropy(model(batch.x, batch), batch.y),
                F.cross_entropy(reference.forward(loader.x, batch.node_ids.tolist()), batch.y),
            ]
            torch.testing.assert_close(*pair)
            losses.append(float(pair[0].detach()))
            for loss, optimizer in zip(pair, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert losses[-1] < losses[0]
    for ours, exact in zip(model.parameters(), reference.leaves(), strict=True):
        torch.testing.assert_close(ours, exact)
    for store, table in zip(histories.values(), reference.tables[1:], strict=True):
        torch.testing.assert_close(store.table, table)


def test_model_in_full_and_layer_by_layer() -> None:
    loader = make_loader(loops=True)
    model = GAT(6, 3, 4, 3, hidden_heads=2, out_heads=3, dropout=0.5, batch_norm=True).double().eval()
    edges = block(loader.graph, range(30))
    h = loader.x
    for place, conv in enumerate(model.convs):
        h = gat(dict(conv.named_parameters()), h, edges, 3 if place == 2 else 2, place < 2)
        h = F.elu(model.norms[place](h)) if place < 2 else h
    torch.testing.assert_close(model(loader.x, loader.full()), h)
    torch.testing.assert_close(gas.inference(model, loader), h)


def test_model_options() -> None:
    model = GAT(6, 8, 4, 3, dropout=0.6)
    assert [(conv.heads, conv.out_channels, conv.concat) for conv in model.convs] == [
        (8, 8, True), (8, 8, True), (1, 4, False),
    ]  # fmt: skip
    assert {(conv.dropout, conv.input_dropout) for conv in model.convs} == {(0.6, 0.6)}
    assert model.nonreg_parameters == []
    assert len(model.reg_parameters) == len(list(model.parameters()))
    linear = GAT(6, 4, 3, 2, hidden_heads=2, linear=True, residual=True, halo="drop", add_self_loops=False)
    assert [(conv.heads, conv.out_channels, conv.concat, conv.halo) for conv in linear.convs] == [
        (2, 4, True, "drop")
    ] * 2
    assert len(linear.nonreg_parameters) == 4
    graph = GAT.prepare(GRAPHS["directed"].graph())
    assert graph.self_loop_weight == 1.0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(in_channels=(6, 6)), r"in_channels must be a positive int, got \(6, 6\)"),
        (dict(in_channels=-1), "in_channels must be a positive int, got -1"),
        (dict(heads=0), "heads must be a positive int, got 0"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(edge_dim=0), "edge_dim must be a positive int, got 0"),
        (dict(fill_value="median"), "fill_value must be a number, a tensor or one of add, .* got 'median'"),
        (dict(halo="mirror"), "halo must be 'read' or 'drop', got 'mirror'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GATConv(**{"in_channels": 6, "out_channels": 5, **arguments})


def test_what_a_forward_lacks_is_named_before_anything_is_pushed() -> None:
    loader = make_loader()
    batch = loader.batch(CLUSTERS)
    x = batch.x[: batch.num_nodes]
    for conv, edge_attr, message in (
        (make_conv(add_self_loops=True), None, r"needs a graph made by graph.add_self_loops\(\)"),
        (make_conv(edge_dim=2), torch.zeros(3, 2), r"edge_attr must have shape \[\d+, 2\] for GATConv, got \[3, 2\]"),
        (make_conv(), torch.zeros(batch.num_edges, 2), "edge_attr was given to a GATConv made without edge_dim"),
    ):
        histories = attach_histories(nn.Sequential(conv), 30, dtype=torch.float64, layers=["0"])
        with pytest.raises(ValueError, match=message):
            conv(x, batch, edge_attr)
        assert not histories["0"].table.any()
    with pytest.raises(ValueError, match="hidden_heads must be a positive int, got 0"):
        GAT(6, 8, 4, 2, hidden_heads=0)

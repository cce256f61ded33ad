"""`PNAConv` against torch_geometric's, `LightPNAConv` and the PNA models against plain torch."""

from __future__ import annotations

import copy
import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import Batch, ClusterLoader, attach_histories, functional, inference, random_partition
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.models import MODELS, PNA, PNA_JK
from gas_triton.nn import LightPNAConv, PNAConv, degree_histogram

from . import reference
from .reference import GRAPHS, GasReference, block
from .test_nn import CLUSTERS, assert_same

DEG = torch.tensor([3, 5, 4, 2, 0, 1])
EVERY = ["sum", "mean", "min", "max", "var", "std"]
SCALERS = ["identity", "amplification", "attenuation", "linear", "inverse_linear"]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"aggregators": ["mean", "min", "max", "std"], "scalers": SCALERS[:3]},
    "every_name": {"aggregators": EVERY, "scalers": SCALERS},
    "one": {"aggregators": ["std"], "scalers": ["linear"]},
    "towers": {"towers": 2},
    "divided": {"towers": 2, "divide_input": True, "aggregators": EVERY},
    "trained_norm": {"train_norm": True, "scalers": SCALERS},
    "edges": {"edge_dim": 3, "aggregators": EVERY},
    "edges_divided": {"edge_dim": 3, "towers": 2, "divide_input": True},
    "edges_deep": {"edge_dim": 3, "towers": 2, "pre_layers": 3, "post_layers": 2, "act": "tanh"},
    "deep": {"pre_layers": 2, "post_layers": 3, "act": "leaky_relu", "act_kwargs": {"negative_slope": 0.3}},
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def make_conv(kind: Any, case: str, **options: Any) -> Any:
    torch.manual_seed(1)
    options = {
        "aggregators": ["mean", "max", "std"],
        "scalers": ["identity", "amplification"],
        **CASES[case],
        **options,
    }
    return kind(6, 4, deg=DEG, **options).double()


def make_loader(name: str, num_features: int = 6) -> ClusterLoader:
    graph = GRAPHS[name].graph()
    parts = random_partition(graph, 6)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(graph.num_nodes, num_features, dtype=torch.float64, generator=draw)
    y = torch.randint(3, (graph.num_nodes,), generator=draw)
    return ClusterLoader(parts.permute(graph), parts, batch_size=2, x=x, y=y)


def edge_features(batch: Batch, conv: Any) -> dict[str, Tensor]:
    if conv.edge_dim is None:
        return {}
    draw = torch.Generator().manual_seed(3)
    values = torch.randn(1000, conv.edge_dim, dtype=torch.float64, generator=draw)
    return {"edge_attr": values[batch.edge_ids]}


def run_pyg(conv: nn.Module, x: Tensor, batch: Batch, has_halo: bool = True, **edge_attr: Tensor) -> Tensor:
    """PyG's layer on the batch's own edges, in the batch's order; it reads halo rows as nodes without neighbours."""
    source, target = batch.inner.col, row_of_edge(*batch.inner)
    if has_halo:
        source = torch.cat([source, batch.outer_joint_col])
        target = torch.cat([target, row_of_edge(*batch.outer)])
    edge_attr = {name: value[: source.numel()] for name, value in edge_attr.items()}
    return conv(x, torch.stack([source.long(), target]), **edge_attr)[: batch.num_nodes]


# --- PNAConv ----------------------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("name, is_full", [("directed", False), ("symmetric", True), ("no_edges", True)])
def test_output_and_gradients_are_those_of_pyg(
    case: str, name: str, is_full: bool, torch_geometric: ModuleType
) -> None:
    loader = make_loader(name) if name != "no_edges" else ClusterLoader(
        GRAPHS[name].graph(), random_partition(GRAPHS[name].graph(), 1), x=torch.randn(5, 6).double()
    )  # fmt: skip
    batch = loader.full() if is_full else loader.batch(CLUSTERS)
    assert name == "no_edges" or bool(((batch.inner.rowptr + batch.outer.rowptr).diff() == 0).any())
    ours, theirs = make_conv(PNAConv, case), make_conv(torch_geometric.nn.PNAConv, case)
    theirs.load_state_dict(ours.state_dict())
    names = dict(ours.named_parameters())
    assert names.keys() == dict(theirs.named_parameters()).keys()
    x, x_pyg = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    edge, edge_pyg = (edge_features(batch, ours) for _ in range(2))
    for value in (*edge.values(), *edge_pyg.values()):
        value.requires_grad_()
    expected = run_pyg(theirs, x_pyg, batch, **edge_pyg)
    assert_same(
        ours(x, batch, **edge), expected, [x, *edge.values(), *ours.parameters()],
        [x_pyg, *edge_pyg.values(), *map(theirs.get_parameter, names)],
    )  # fmt: skip


@pytest.mark.interop
def test_state_dict_fits_both_ways(case: str, torch_geometric: ModuleType) -> None:
    ours, theirs = make_conv(PNAConv, case), make_conv(torch_geometric.nn.PNAConv, case)
    for value in theirs.state_dict().values():
        nn.init.uniform_(value)
    ours.load_state_dict(theirs.state_dict())
    back = make_conv(torch_geometric.nn.PNAConv, case)
    back.load_state_dict(ours.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
        assert torch.equal(back.state_dict()[name], value)
    # buffers and parameters are the same ones
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]


@pytest.mark.interop
def test_leaving_the_halo_out_is_pyg_on_the_induced_subgraph(case: str, torch_geometric: ModuleType) -> None:
    batch = make_loader("directed").batch(CLUSTERS)
    ours, theirs = make_conv(PNAConv, case, halo="drop"), make_conv(torch_geometric.nn.PNAConv, case)
    theirs.load_state_dict(ours.state_dict())
    own = batch.x[: batch.num_nodes]
    expected = run_pyg(theirs, own, batch, has_halo=False, **edge_features(batch, ours))
    for x in (own, batch.x, batch.features):
        torch.testing.assert_close(ours(x, batch, **edge_features(batch, ours)), expected)


@pytest.mark.interop
@pytest.mark.parametrize("is_training", [True, False])
def test_in_batch_rows_and_an_exact_history_give_the_exact_output(
    case: str, is_training: bool, torch_geometric: ModuleType
) -> None:
    loader = make_loader("symmetric")
    batch = loader.batch(CLUSTERS)
    ours = make_conv(PNAConv, case).train(is_training)
    theirs = make_conv(torch_geometric.nn.PNAConv, case)
    theirs.load_state_dict(ours.state_dict())
    histories = attach_histories(nn.Sequential(ours), loader.graph.num_nodes, dtype=torch.float64, layers=["0"])
    table = histories["0"].table
    table.copy_(loader.x)
    if is_training:
        table[batch.node_ids] = 0.0
    x = batch.x[: batch.num_nodes].clone().requires_grad_()
    x_pyg = x.detach().clone().requires_grad_()
    edge = edge_features(batch, ours)
    expected = run_pyg(theirs, torch.cat([x_pyg, loader.x[batch.halo_ids]]), batch, **edge)
    their_leaves = [x_pyg, *(theirs.get_parameter(name) for name, _ in ours.named_parameters())]
    assert_same(ours(x, batch, **edge), expected, [x, *ours.parameters()], their_leaves)
    assert torch.equal(table, loader.x)
    torch.testing.assert_close(ours(batch.features, batch, **edge), expected)


def test_dropout_masks_a_node_alike_wherever_it_is_read() -> None:
    loader = make_loader("directed")
    batch = loader.batch(CLUSTERS)
    conv, plain = make_conv(PNAConv, "plain", input_dropout=0.4), make_conv(PNAConv, "plain")
    state = torch.get_rng_state()
    seed = functional.draw_seed(torch.device("cpu"))
    dropped = functional.dropout(batch.x, batch, 0.4, seed)
    torch.set_rng_state(state)
    torch.testing.assert_close(conv(batch.x, batch), plain(dropped, batch))
    torch.set_rng_state(state)
    torch.testing.assert_close(conv(batch.features, batch), plain(dropped, batch))


@pytest.mark.parametrize("kind", [PNAConv, LightPNAConv])
def test_rows_are_transformed_before_they_are_gathered(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_loader("symmetric").batch(CLUSTERS)
    conv = kind(6, 4, ["mean", "std"], ["identity", "amplification"], DEG).double()
    sizes = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *args: sizes.append(x.size(0)) or linear(x, *args))
    conv(batch.x, batch)
    assert batch.num_edges > batch.num_nodes + batch.num_halo
    assert max(sizes) == batch.num_nodes + batch.num_halo


def test_reset_parameters_draws_anew() -> None:
    for conv in (make_conv(PNAConv, "edges_deep", train_norm=True), LightPNAConv(6, 4, ["mean"], ["identity"], DEG)):
        before = {name: value.clone() for name, value in conv.named_parameters()}
        with torch.no_grad():
            for name, value in conv.named_parameters():
                if "avg_deg" in name:
                    value.zero_()
        conv.reset_parameters()
        for name, value in conv.named_parameters():
            assert torch.allclose(value, before[name]) == ("avg_deg" in name)


@pytest.mark.parametrize("kind", ["plain", "edges_deep", "light"])
def test_a_layer_compiles_into_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    batch = make_loader("directed").batch(CLUSTERS)
    conv: Any = LightPNAConv(6, 4, **LIGHT, deg=DEG).double() if kind == "light" else make_conv(PNAConv, kind)
    edge = {} if kind == "light" else edge_features(batch, conv)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    leaves = list(conv.parameters())
    assert_same(compiled(batch.x, batch, **edge), conv(batch.x, batch, **edge), leaves, leaves)


@pytest.mark.interop
@pytest.mark.parametrize("name", ["directed", "path"])
def test_degree_histogram_is_that_of_pyg(name: str, torch_geometric: ModuleType) -> None:
    edges = GRAPHS[name]
    data = torch_geometric.data.Data(edge_index=edges.edge_index, num_nodes=edges.num_nodes)
    expected = torch_geometric.nn.PNAConv.get_degree_histogram([data])
    assert degree_histogram(edges.graph()).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"aggregators": ["mean", "median"]}, "aggregators must be among sum, .*, std, got 'median'"),
        ({"aggregators": ["mean", "mean"]}, "aggregators must be distinct, got mean, mean"),
        ({"scalers": ["log"]}, r"scalers must be a list of one or more of identity, .*, got \['log'\]"),
        ({"deg": torch.tensor([4])}, r"deg must be a histogram .*, got shape \[1\] with 4 nodes"),
        ({"deg": torch.ones(2, 2)}, r"deg must be a histogram .*, got shape \[2, 2\]"),
        ({"towers": 3}, "out_channels must be a multiple of towers=3, got 4"),
        ({"towers": 4, "divide_input": True}, "in_channels must be a multiple of towers=4, got 6"),
        ({"act": "rleu", "pre_layers": 2}, "act must be a module or the name of an activation .*, got 'rleu'"),
        ({"pre_layers": 0}, "pre_layers must be a positive int, got 0"),
        ({"edge_dim": 0}, "edge_dim must be a positive int, got 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"aggregators": ["mean"], "scalers": ["identity"], "deg": DEG} | change
    with pytest.raises(ValueError, match=message):
        PNAConv(6, 4, **arguments)


def test_bad_edge_features_are_named() -> None:
    batch = make_loader("directed").batch(CLUSTERS)
    with pytest.raises(ValueError, match=r"PNAConv\(edge_dim=3\) needs edge_attr, got None"):
        make_conv(PNAConv, "edges")(batch.x, batch)
    with pytest.raises(ValueError, match="edge_attr was given to a PNAConv made without edge_dim"):
        make_conv(PNAConv, "plain")(batch.x, batch, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=rf"edge_attr must have shape \[{batch.num_edges}, 3\] for PNAConv, got"):
        make_conv(PNAConv, "edges")(batch.x, batch, torch.zeros(2, 3))


# --- LightPNAConv -----------------------------------------------------------------------------------------------------

LIGHT = {"aggregators": ["mean", "max", "min", "sum"], "scalers": ["identity", "amplification", "attenuation"]}
MEAN_LOG = float((torch.arange(6).double().log1p() * DEG).sum() / DEG.sum())


def light_reference(p: reference.Parameters, x: Tensor, edges: reference.Block) -> Tensor:
    return reference.light_pna(p, x, edges, **LIGHT, mean_log=MEAN_LOG)


@pytest.mark.parametrize("name, is_full", [("directed", False), ("symmetric", False), ("directed", True)])
def test_light_layer_is_the_one_of_pygas(name: str, is_full: bool) -> None:
    loader = make_loader(name)
    batch = loader.full() if is_full else loader.batch(CLUSTERS)
    conv = LightPNAConv(6, 4, **LIGHT, deg=DEG).double()
    assert {"pre_lins.11.weight", "post_lins.11.bias", "lin.weight"} < conv.state_dict().keys()
    state = {key: value.detach().clone().requires_grad_() for key, value in conv.named_parameters()}
    x, x_reference = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    expected = light_reference(state, x_reference, block(loader.graph, batch.node_ids.tolist()))
    assert_same(conv(x, batch), expected, [x, *conv.parameters()], [x_reference, *state.values()])
    torch.testing.assert_close(conv(batch.features, batch), expected)


def test_light_layer_takes_deviations() -> None:
    batch = make_loader("directed").batch(CLUSTERS)
    conv = LightPNAConv(6, 4, ["std"], ["identity"], DEG).double()
    h = conv.pre_lins[0](batch.x).relu()
    std = functional.multi_aggregate(h, batch, reduces=["std"])[:, 0]
    torch.testing.assert_close(conv(batch.x, batch), conv.post_lins[0](std) + conv.lin(batch.x[: batch.num_nodes]))


def test_an_isolated_node_is_not_blown_up() -> None:
    graph = GRAPHS["directed"].graph()
    batch = ClusterLoader(graph, random_partition(graph, 1), x=torch.randn(30, 6)).full()
    out = LightPNAConv(6, 4, ["mean"], ["attenuation"], DEG)(batch.x, batch)
    assert bool((graph.rowptr.diff() == 0).any())
    assert float(out.detach().abs().max()) < 10


@pytest.mark.parametrize("scaler", ["linear", "inverse_linear"])
def test_light_layer_names_scalers_it_has_not(scaler: str) -> None:
    with pytest.raises(
        ValueError, match="scalers must be a list of one or more of identity, amplification, attenuation"
    ):
        LightPNAConv(6, 4, ["mean"], [scaler], DEG)


# --- training with histories ------------------------------------------------------------------------------------------


def test_training_with_histories_is_that_of_plain_torch() -> None:
    loader = make_loader("symmetric")
    torch.manual_seed(2)
    model = PNA(6, 5, 3, 3, deg=DEG, **LIGHT).double()
    plain = GasReference(
        light_reference, [dict(conv.named_parameters()) for conv in model.convs], [6, 5, 5], loader.graph
    )
    histories = attach_histories(model, loader.graph.num_nodes, dtype=torch.float64)
    ours, theirs = (torch.optim.SGD(leaves, lr=0.01) for leaves in (model.parameters(), plain.leaves()))
    for clusters in [(0, 1), (2, 3), (4, 5)] * 3:
        batch = loader.batch(list(clusters))
        losses = []
        outs = model(batch.x, batch), plain.forward(loader.x, batch.node_ids.tolist())
        for out, optimizer in zip(outs, (ours, theirs), strict=True):
            loss = F.cross_entropy(out, batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    for conv, own in zip(model.convs, plain.parameters, strict=True):
        for name, value in conv.named_parameters():
            torch.testing.assert_close(value, own[name])
    for store, table in zip(histories.values(), plain.tables[1:], strict=True):
        torch.testing.assert_close(store.table, table)


# --- models -----------------------------------------------------------------------------------------------------------


def test_options_come_from_the_graph() -> None:
    graph = GRAPHS["path"].graph()
    for name in ("PNA", "PNA_JK"):
        options = MODELS[name].options_of(graph)
        assert options["deg"].tolist() == [1, 3]
        assert MODELS[name](6, 8, 3, 2, **options).convs[0].avg_deg_log == pytest.approx(0.75 * math.log(2))


JK_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_norm": {"batch_norm": True},
    "residual": {"residual": True, "aggregators": ["min", "std"]},
    "dropout": {"dropout": 0.4, "batch_norm": True, "residual": True},
    "drop_input": {"dropout": 0.4, "drop_input": False},
}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("options", JK_OPTIONS)
def test_jumping_knowledge_is_the_model_written_out(options: str, is_training: bool) -> None:
    loader = make_loader("symmetric")
    batch = loader.full()
    torch.manual_seed(3)
    model = PNA_JK(6, 5, 3, 3, deg=DEG, **JK_OPTIONS[options]).double().train(is_training)
    written = copy.deepcopy(model)
    for conv in written.convs:
        conv.input_dropout = 0.0
    p = model.dropout if is_training else 0.0

    def drop(rows: Tensor) -> Tensor:
        return functional.dropout(rows, batch, p, functional.draw_seed(rows.device)) if p > 0 else rows

    def forward() -> Tensor:
        h = written.lins[0](drop(batch.x) if model.drop_input else batch.x)
        h = (h if written.input_norm is None else written.input_norm(h)).relu()
        outputs = [h]
        for place, conv in enumerate(written.convs):
            out = conv(drop(h) if place > 0 else h, batch)
            out = written.norms[place](out) if len(written.norms) else out
            h = (out + h if model.residual else out).relu()
            outputs.append(h)
        return written.lins[1](drop(torch.cat(outputs, dim=1)))

    torch.manual_seed(7)
    out = model(batch.x, batch)
    torch.manual_seed(7)
    assert_same(out, forward(), list(model.parameters()), list(written.parameters()))


@pytest.mark.parametrize("options", JK_OPTIONS)
def test_jumping_knowledge_with_exact_histories_gives_rows_of_the_whole(options: str) -> None:
    loader = make_loader("directed")
    model = PNA_JK(6, 5, 3, 3, deg=DEG, **JK_OPTIONS[options]).double().eval()
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
    torch.testing.assert_close(inference(model, loader), whole)


def test_parameters_of_jumping_knowledge_fall_into_two_groups() -> None:
    model = PNA_JK(6, 5, 3, 2, deg=DEG, batch_norm=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    without_decay = {names[id(p)] for p in model.nonreg_parameters}
    assert without_decay == {name for name in names.values() if name.startswith(("lins.", "input_norm."))}
    assert without_decay | {names[id(p)] for p in model.reg_parameters} == set(names.values())
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5.0)
    model.reset_parameters()
    assert all(not (p == 5.0).any() for p in model.parameters())
    assert [p.shape for p in model.parameters()] == [p.shape for p in before]


def test_models_name_what_they_cannot_do_without() -> None:
    with pytest.raises(ValueError, match="linear must be True for PNA_JK"):
        PNA_JK(6, 5, 3, 2, deg=DEG, linear=False)
    for kind in (PNA, PNA_JK):
        with pytest.raises(TypeError, match=rf"{kind.__name__} needs deg, .* PNA.options_of\(graph\)"):
            kind(6, 5, 3, 2)

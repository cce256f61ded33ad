"""Models of plain torch_geometric after `autoscale`, against themselves before it."""

from __future__ import annotations

import copy
import io
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gas_triton.nn
from gas_triton import ClusterLoader, Compensated, Graph, attach_histories, autoscale, inference, random_partition
from gas_triton.autoscale.wrapped import Wrapped
from gas_triton.history import ReadsHistory
from gas_triton.nn import HistoryLayer

from .pyg_models import NAMES, NUM_CLASSES, NUM_FEATURES, Net, Setting
from .reference import GRAPHS, block

pytestmark = pytest.mark.interop


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, torch_geometric: ModuleType) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["fused", "wrapped"])
def fuse(request: pytest.FixtureRequest) -> bool:
    return request.param


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, ReadsHistory)}


def gradients(out: Tensor, wanted: list[Tensor], rows: Tensor | None = None) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    cotangent = torch.randn(out.shape if rows is None else (rows.numel(), out.size(1)), generator=draw).to(out)
    if rows is not None:
        cotangent = torch.zeros_like(out).index_copy(0, rows, cotangent)
    return list(torch.autograd.grad(out, wanted, cotangent, materialize_grads=True))


# --- what becomes of a model ------------------------------------------------------------------------------------------


def test_layers_with_a_counterpart_become_it(name: str, fuse: bool) -> None:
    setting = Setting(name, fuse)
    there = set(setting.case.fused) if fuse else set()
    before = {path: module for path, module in setting.theirs.named_modules() if path in layers_of(setting.ours)}
    assert before
    for path, layer in layers_of(setting.ours).items():
        kind = type(before[path]).__name__
        assert isinstance(layer, HistoryLayer)
        assert isinstance(layer, Wrapped) == (kind not in there)
        if kind in there:
            assert isinstance(layer, getattr(gas_triton.nn, kind))


def test_parameters_stay_the_same_objects_under_the_same_names(name: str, fuse: bool) -> None:
    setting = Setting(name, fuse)
    model = copy.deepcopy(setting.theirs)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    model = autoscale(model, fuse=fuse)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert all(buffer is buffers[key] for key, buffer in model.named_buffers() if key in buffers)
    assert model.state_dict().keys() == setting.theirs.state_dict().keys()


def test_layers_say_how_wide_their_output_is(name: str, fuse: bool) -> None:
    setting = Setting(name, fuse)
    widths: dict[str, int] = {}
    for path, layer in layers_of(setting.ours).items():
        layer.register_forward_hook(lambda module, args, out, path=path: widths.update({path: out.size(1)}))
    setting.run_ours(setting.x, setting.loader.full())
    assert {path: layer.gradient_dim for path, layer in layers_of(setting.ours).items()} == widths


def test_a_propagation_is_compensated(torch_geometric: ModuleType) -> None:
    class Propagated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.prop = nn.Linear(NUM_FEATURES, NUM_CLASSES), torch_geometric.nn.APPNP(3, 0.1)

        def forward(self, x: Tensor, edge_index: Any) -> Tensor:
            return self.prop(self.lin(x), edge_index)

    loader = Setting("GCN", True).loader
    model = autoscale(Propagated().double(), widths={"prop": NUM_CLASSES})
    attach_histories(model, loader.graph.num_nodes, gradients=True)
    batch = loader.batch([0, 1])
    expected = copy.deepcopy(model)(batch.x, batch)
    # without momentum a step reads what it would read anyway
    torch.testing.assert_close(Compensated(model, loader, gradients=True)(batch.x, batch), expected)


def test_state_dicts_fit_both_ways(name: str, fuse: bool) -> None:
    setting = Setting(name, fuse)
    for target, source in ((setting.ours, setting.theirs), (setting.theirs, setting.ours)):
        for value in source.parameters():
            nn.init.uniform_(value)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file))
        torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(setting.run_ours(setting.x, setting.loader.full()), setting.run_theirs(setting.x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(fuse: bool, how: str, torch_geometric: ModuleType) -> None:
    # classes of this test cannot be pickled, those of torch_geometric can
    model = autoscale(torch_geometric.nn.GIN(NUM_FEATURES, 8, 2, NUM_CLASSES).double(), fuse=fuse)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    batch = Setting("GIN", fuse).loader.full()
    expected = model(batch.x, batch)
    assert torch.equal(other(batch.x, batch), expected)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(batch.x, batch), expected)
    assert not other(batch.x, batch).any()
    other.eval()
    assert model.convs[0].training
    assert not other.convs[0].training


def test_a_layer_alone_is_a_model(fuse: bool, torch_geometric: ModuleType) -> None:
    setting = Setting("GraphSAGE", fuse)
    layer = torch_geometric.nn.SAGEConv(NUM_FEATURES, 4).double()
    expected = layer(setting.x, setting.graph.edge_index())
    batch = setting.loader.batch([1, 2])
    torch.testing.assert_close(autoscale(layer, fuse=fuse)(batch.x, batch), expected[batch.node_ids])


def test_attributes_of_a_wrapped_layer_are_read_through(torch_geometric: ModuleType) -> None:
    conv = torch_geometric.nn.GATConv(NUM_FEATURES, 4, heads=3)
    wrapped: Any = autoscale(conv, fuse=False)
    assert wrapped.heads == 3
    assert wrapped.att_src is conv.att_src
    assert "GATConv(6, 4, heads=3)" in str(wrapped)
    before = conv.att_src.detach().clone()
    wrapped.reset_parameters()
    assert not torch.equal(wrapped.att_src, before)
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing


# --- exact rows -------------------------------------------------------------------------------------------------------


def test_the_whole_graph_gives_output_and_gradients_of_pyg(name: str, fuse: bool) -> None:
    setting = Setting(name, fuse)
    x, x_pyg = setting.x.clone().requires_grad_(), setting.x.clone().requires_grad_()
    out, expected = setting.run_ours(x, setting.loader.full()), setting.run_theirs(x_pyg)
    torch.testing.assert_close(out, expected)
    ours = gradients(out, [x, *setting.ours.parameters()])
    theirs = gradients(expected, [x_pyg, *setting.theirs.parameters()])
    torch.testing.assert_close(ours, theirs)


class FirstLayer(nn.Module):
    """A case's first layer only, called as its model calls it; the rest of the model does not run."""

    class Reached(Exception):
        pass

    def __init__(self, model: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.model, self.conv = model, conv

    def forward(self, x: Tensor, edge_index: Any, **options: Tensor) -> Tensor:
        def stop(_module: nn.Module, _args: Any, out: Tensor) -> None:
            raise self.Reached(out)

        hook = self.conv.register_forward_hook(stop)
        try:
            self.model(x, edge_index, **options)
        except self.Reached as reached:
            return reached.args[0]
        finally:
            hook.remove()
        raise AssertionError("the model does not call the layer")


def test_a_layer_with_halo_rows_gives_output_and_gradients_of_pyg(name: str, fuse: bool) -> None:
    setting = Setting(name, fuse)
    path = next(iter(layers_of(setting.ours)))
    ours = FirstLayer(setting.ours, setting.ours.get_submodule(path))
    theirs = FirstLayer(setting.theirs, setting.theirs.get_submodule(path))
    batch = setting.loader.batch([1, 2, 4])
    assert batch.num_halo > 0
    x, x_pyg = batch.x.clone().requires_grad_(), setting.x.clone().requires_grad_()
    out = ours(x, batch, **setting.case.options(batch))
    expected = theirs(x_pyg, setting.graph.edge_index(), **setting.case.options(setting.graph))
    assert out.size(0) == batch.num_nodes
    torch.testing.assert_close(out, expected[batch.node_ids])
    gradient, *of_parameters = gradients(out, [x, *ours.conv.parameters()])
    gradient_pyg, *expected_gradients = gradients(expected, [x_pyg, *theirs.conv.parameters()], batch.node_ids)
    torch.testing.assert_close(of_parameters, expected_gradients)
    torch.testing.assert_close(torch.zeros_like(setting.x).index_add(0, batch.all_ids, gradient), gradient_pyg)


def test_exact_histories_give_the_rows_of_pyg(name: str, fuse: bool) -> None:
    setting = Setting(name, fuse)
    setting.ours.eval()
    inputs: dict[str, Tensor] = {}
    hooks = []
    with torch.no_grad():
        for path in layers_of(setting.ours):
            layer = setting.theirs.get_submodule(path)
            hooks.append(layer.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]})))
        whole = setting.theirs.eval() and setting.run_theirs(setting.x)
        histories = attach_histories(setting.ours, setting.graph.num_nodes, dtype=torch.float64)
        assert list(histories) == list(layers_of(setting.ours))[1:]
        for path, store in histories.items():
            store.table.copy_(inputs[path])
        for batch in setting.loader:
            assert batch.num_halo > 0
            torch.testing.assert_close(setting.run_ours(batch.x, batch), whole[batch.node_ids])


def test_appnp_becomes_steps_with_a_history_each(torch_geometric: ModuleType) -> None:
    setting = Setting("GCN", True)

    class Predicted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(NUM_FEATURES, NUM_CLASSES)
            self.prop = torch_geometric.nn.APPNP(3, 0.2)

        def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
            return self.prop(self.lin(x), edge_index, edge_weight)

    theirs = Predicted().double()
    ours = autoscale(copy.deepcopy(theirs), widths={"prop": NUM_CLASSES})
    histories = attach_histories(ours, setting.graph.num_nodes, dtype=torch.float64)
    assert list(histories) == ["prop.steps.1", "prop.steps.2"]
    expected = theirs(setting.x, setting.graph.edge_index(), setting.graph.weight)
    out = ours(setting.x, setting.loader.full())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, [*ours.parameters()]), gradients(expected, [*theirs.parameters()]))
    torch.testing.assert_close(inference(ours, setting.loader), expected)
    with pytest.raises(ValueError, match="several hops away"):
        autoscale(theirs, fuse=False)


def test_attention_beside_layers_without_loops_of_their_own_is_wrapped(torch_geometric: ModuleType) -> None:
    pyg = torch_geometric.nn
    model: Any = autoscale(Net(conv1=pyg.GATConv(8, 8), conv2=pyg.SAGEConv(8, 8)))
    assert isinstance(model.conv1, Wrapped)
    assert not isinstance(model.conv2, Wrapped)


def test_inference_is_pyg_on_the_whole_graph(name: str, fuse: bool) -> None:
    setting = Setting(name, fuse)
    attach_histories(setting.ours, setting.graph.num_nodes)
    with torch.no_grad():
        expected = setting.theirs.eval() and setting.run_theirs(setting.x)
    torch.testing.assert_close(inference(setting.ours, setting.loader, setting.forward), expected)


# --- histories --------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A PyG layer with a history in plain torch: push, pull, cat, call, cut (Fey et al., ICML 2021)."""

    def __init__(self, layer: nn.Module, table: Tensor | None, graph: Graph) -> None:
        super().__init__()
        self.layer, self.table, self.graph = layer, table, graph
        self.is_normalized = type(layer).__name__ in ("GCNConv", "GCN2Conv") and layer.normalize
        if self.is_normalized:
            layer.normalize = False

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        # the batch as the list of its nodes, which is what this model is given for edge_index
        nodes = next(value for value in (*args, *options.values()) if isinstance(value, tuple))
        edges = block(self.graph, nodes)
        if x.size(0) == edges.num_rows:
            self.table[edges.node_ids] = x.detach()
            x = torch.cat([x, self.table.index_select(0, edges.halo_ids)])
        edge_index = torch.stack([edges.source, edges.target])
        args = tuple(edge_index if value is nodes else value for value in args)
        if type(self.layer).__name__ == "GCN2Conv":
            # the first representation, which halo rows lack
            x_0 = args[0][: edges.num_rows]
            args = (torch.cat([x_0, x_0.new_zeros(edges.halo_ids.numel(), x_0.size(1))]), edge_index)
        if self.is_normalized:
            args, options = args[: 1 + (len(args) > 1)], {"edge_weight": edges.weight}
        return self.layer(x, *args, **options)[: edges.num_rows]


def plain_gas(setting: Setting) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in plain torch, and its tables."""
    model, tables = copy.deepcopy(setting.theirs), {}
    graph = setting.loader.graph
    for path, layer in list(layers_of(setting.ours).items()):
        table = None
        if layer.history is not None:
            table = tables[path] = torch.zeros(graph.num_nodes, layer.history.dim, dtype=torch.float64)
        parent, _, key = path.rpartition(".")
        model.get_submodule(parent)._modules[key] = Plain(model.get_submodule(path), table, graph)
    return model, tables


def test_training_is_that_of_plain_torch(name: str, fuse: bool) -> None:
    # a table in files is staged, one on the device is read in place
    tier = "file" if name in ("mixed", "GraphSAGE") else "device"
    setting = Setting(name, fuse)
    histories = attach_histories(setting.ours, setting.graph.num_nodes, tier, torch.float64)
    reference, tables = plain_gas(setting)
    assert tables
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (setting.ours, reference)]
    for _ in range(2):
        for batch in histories.prefetch(setting.loader):
            nodes = tuple(batch.node_ids.tolist())
            outs = [
                setting.run_ours(batch.x, batch),
                reference(setting.x[batch.all_ids], nodes, **setting.case.options(batch)),
            ]
            torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-8)
            for out, optimizer in zip(outs, optimizers, strict=True):
                F.cross_entropy(out, batch.y).backward()
                optimizer.step()
                optimizer.zero_grad()
    with histories:
        for key, state in histories.state_dict().items():
            torch.testing.assert_close(state["table"], tables[key], rtol=1e-6, atol=1e-8)


def test_dropout_of_basic_models_leaves_histories_whole(fuse: bool, torch_geometric: ModuleType) -> None:
    torch.manual_seed(5)
    setting = Setting("GraphSAGE", fuse)
    model = torch_geometric.nn.GraphSAGE(NUM_FEATURES, 64, 3, NUM_CLASSES, dropout=0.5, act=None).double()
    expected = copy.deepcopy(model).eval()
    model = autoscale(model, fuse=fuse)
    assert [conv.input_dropout for conv in model.convs] == [0.0, 0.5, 0.5]
    histories = attach_histories(model, setting.graph.num_nodes, dtype=torch.float64)
    batch = setting.loader.full()
    first, second = model(batch.x, batch), model(batch.x, batch)
    assert not torch.equal(first, second)
    rows = expected.convs[0](setting.x, setting.graph.edge_index())
    torch.testing.assert_close(histories["convs.1"].table, rows)
    model.eval()
    torch.testing.assert_close(model(batch.x, batch), expected(setting.x, setting.graph.edge_index()))


def test_a_wrapped_layer_trains_when_the_model_does(torch_geometric: ModuleType) -> None:
    setting = Setting("GIN", False)
    layer = torch_geometric.nn.GATConv(NUM_FEATURES, 4, dropout=0.5).double()
    expected = copy.deepcopy(layer).eval()(setting.x, setting.graph.edge_index())
    model: Any = autoscale(Net(conv1=layer), fuse=False)
    batch = setting.loader.full()
    for _ in range(2):
        assert not torch.equal(model(batch.x, batch), model(batch.x, batch))
        torch.testing.assert_close(inference(model, setting.loader), expected)
    torch.testing.assert_close(model.eval()(batch.x, batch), expected)


def test_dropout_before_jumping_knowledge_stays(torch_geometric: ModuleType) -> None:
    model = autoscale(torch_geometric.nn.GraphSAGE(NUM_FEATURES, 8, 2, NUM_CLASSES, dropout=0.5, jk="cat"))
    assert [conv.input_dropout for conv in model.convs] == [0.0, 0.0]
    assert model.dropout.p == 0.5


# --- edge tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph_name", ["weighted_symmetric", "weighted_directed"])
def test_own_edge_weights_have_gradients(graph_name: str, fuse: bool, torch_geometric: ModuleType) -> None:
    graph = GRAPHS[graph_name].graph()
    parts = random_partition(graph, 4)
    graph = parts.permute(graph)
    x = torch.randn(graph.num_nodes, NUM_FEATURES, dtype=torch.float64)
    batch = ClusterLoader(graph, parts, x=x).batch([1, 2])
    theirs = torch_geometric.nn.GCNConv(NUM_FEATURES, 4, normalize=False).double()
    ours: Any = autoscale(copy.deepcopy(theirs), fuse=fuse)
    own = torch.rand(graph.num_edges, dtype=torch.float64)
    weight, weight_pyg = own[batch.edge_ids].requires_grad_(), own.clone().requires_grad_()
    rows, rows_pyg = batch.x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs(rows_pyg, graph.edge_index(), weight_pyg)
    expected_gradients = gradients(expected, [rows_pyg, weight_pyg], batch.node_ids)
    for out in (ours(rows, batch, weight), ours(rows, batch, edge_weight=weight)):
        torch.testing.assert_close(out, expected[batch.node_ids])
        gradient, gradient_of_weight = gradients(out, [rows, weight])
        torch.testing.assert_close(torch.zeros_like(x).index_add(0, batch.all_ids, gradient), expected_gradients[0])
        torch.testing.assert_close(gradient_of_weight, expected_gradients[1][batch.edge_ids])


def test_a_fused_layer_uses_the_weights_of_the_graph(torch_geometric: ModuleType) -> None:
    setting = Setting("GCN", True)
    batch = setting.loader.full()
    out = setting.ours(batch.x, batch)
    for weight in (None, batch.edge_weight):
        assert torch.equal(setting.ours(batch.x, batch, weight), out)
        assert torch.equal(setting.ours(batch.x, batch, edge_weight=weight), out)
    with pytest.raises(ValueError, match=r"convs.0 \(GCNConv\): edge_weight cannot be given"):
        setting.ours(batch.x, batch, batch.edge_weight.clone())
    wrapped = Setting("GCN", False).ours
    torch.testing.assert_close(wrapped(batch.x, batch, batch.edge_weight), out)
    with pytest.raises(ValueError, match=r"convs.0 \(GCNConv\): edge_weight cannot be given"):
        wrapped(batch.x, batch, batch.edge_weight.clone())


def test_a_graph_that_is_not_normalised_is_refused(fuse: bool, torch_geometric: ModuleType) -> None:
    model = Setting("GCN", fuse).ours
    batch = Setting("GIN", fuse).loader.full()
    with pytest.raises(ValueError, match=r"graph made by graph.add_self_loops\(\).gcn_norm\(\)"):
        model(batch.x, batch)


def test_node_tensors_beside_x(torch_geometric: ModuleType) -> None:
    setting = Setting("GIN", False)
    batch = setting.loader.batch([1, 2, 4])
    layer = torch_geometric.nn.PointNetConv(nn.Linear(NUM_FEATURES + 2, 4), add_self_loops=False).double()
    pos = torch.randn(setting.graph.num_nodes, 2, dtype=torch.float64)
    expected = layer(setting.x, pos, setting.graph.edge_index())
    scaled: Any = autoscale(layer)
    torch.testing.assert_close(scaled(batch.x, pos[batch.all_ids], batch), expected[batch.node_ids])
    with pytest.raises(ValueError, match=f"pos has {batch.num_nodes} rows, one for each in-batch node"):
        scaled(batch.x, pos[batch.node_ids], batch)

"""What `autoscale` and the layers that it makes refuse, what they fall back to, and how wide a history is."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gas_triton.nn
from gas_triton import Batch, MissingPackageError, attach_histories, autoscale
from gas_triton.autoscale.wrapped import Wrapped

from .pyg_models import NUM_FEATURES, Net, Setting, perceptron
from .reference import block

pytestmark = pytest.mark.interop


@pytest.fixture(params=[True, False], ids=["fused", "wrapped"])
def fuse(request: pytest.FixtureRequest) -> bool:
    return request.param


# --- what is refused --------------------------------------------------------------------------------------------------


def refused_modules(pyg: ModuleType) -> dict[str, tuple[nn.Module, str]]:
    """By path, what cannot be scaled and a part of the reason."""
    return {
        "graph_norm": (pyg.GraphNorm(8), "normalises over all nodes"),
        "pair_norm": (pyg.PairNorm(), "normalises over all nodes"),
        "instance_norm": (pyg.InstanceNorm(8), "normalises over all nodes"),
        "mean_subtraction": (pyg.MeanSubtractionNorm(), "normalises over all nodes"),
        "diff_group_norm": (pyg.DiffGroupNorm(8, 2), "normalises over all nodes"),
        "graph_size_norm": (pyg.GraphSizeNorm(), "normalises over all nodes"),
        "layer_norm": (pyg.LayerNorm(8), r"normalises over all nodes.*LayerNorm\(mode='node'\)"),
        "topk": (pyg.TopKPooling(8), "pools over the whole graph"),
        "sag": (pyg.SAGPooling(8), "pools over the whole graph"),
        "asap": (pyg.ASAPooling(8), "pools over the whole graph"),
        "dmon": (pyg.DMoNPooling(8, 2), "pools over the whole graph"),
        "readout": (pyg.MeanAggregation(), "pools over the whole graph"),
        "dense": (pyg.DenseGCNConv(8, 8), "takes a dense adjacency matrix"),
        "conv_cheb": (pyg.ChebConv(8, 8, 2), "several hops away"),
        "conv_tag": (pyg.TAGConv(8, 8), "several hops away"),
        "conv_sg": (pyg.SGConv(8, 8), "several hops away"),
        "conv_ssg": (pyg.SSGConv(8, 8, 0.1), "several hops away"),
        "conv_arma": (pyg.ARMAConv(8, 8), "several hops away"),
        "conv_mixhop": (pyg.MixHopConv(8, 8), "several hops away"),
        "conv_gated": (pyg.GatedGraphConv(8, 2), "several hops away"),
        "conv_lg": (pyg.LGConv(), "degrees of their source nodes.*gcn_norm"),
        "conv_cluster": (pyg.ClusterGCNConv(8, 8), "degrees of their source nodes"),
        "conv_fa": (pyg.FAConv(8), "degrees of their source nodes"),
        "conv_eg": (pyg.EGConv(8, 8), "degrees of their source nodes"),
        "conv_super": (pyg.SuperGATConv(8, 8), "edges of its own"),
        "conv_hetero": (pyg.HeteroConv({("a", "to", "a"): pyg.SAGEConv(8, 8)}), "several node types"),
        "conv_dir": (pyg.DirGNNConv(pyg.SAGEConv(8, 8)), "halo rows too"),
        "conv_gps": (pyg.GPSConv(8, pyg.SAGEConv(8, 8), heads=1), "attends to the whole graph"),
        "conv_norm": (pyg.GINConv(pyg.MLP([8, 8, 8], norm="GraphNorm")), "has the norm nn.norms.0"),
        "attention": (pyg.attention.PerformerAttention(8, 1), "attends to the whole graph"),
        "conv_flow": (pyg.SAGEConv(8, 8, flow="target_to_source"), r"graph of edge_index.flip\(0\)"),
        "conv_lstm": (pyg.SAGEConv(8, 8, aggr="lstm"), "in their order"),
        "conv_lazy": (pyg.SAGEConv(-1, 8), "made at its first call"),
        "conv_hyper": (pyg.HypergraphConv(8, 8), "one edge list"),
    }


def test_modules_that_need_the_whole_graph_are_refused(torch_geometric: ModuleType) -> None:
    pyg = torch_geometric.nn
    wrong = []
    for path, (module, reason) in refused_modules(pyg).items():
        model = Net(conv1=pyg.SAGEConv(8, 8), inner=nn.ModuleDict({path: module}))
        modules = dict(model.named_modules())
        try:
            autoscale(model)
        except ValueError as error:
            if not re.search(rf"inner\.{path}.* \({type(module).__name__}\) .*{reason}", str(error)):
                wrong.append(f"{path}: {error}")
        else:
            wrong.append(f"{path} is not refused")
        if any(modules[key] is not value for key, value in model.named_modules()):
            wrong.append(f"{path} has changed")
    assert not wrong


def test_every_refusal_is_told_at_once(torch_geometric: ModuleType) -> None:
    pyg = torch_geometric.nn
    model = Net(conv1=pyg.SAGEConv(8, 8), norm=pyg.PairNorm(), conv2=pyg.TAGConv(8, 8))
    with pytest.raises(ValueError, match=r"^Net cannot be autoscaled: norm \(PairNorm\) .*; conv2 \(TAGConv\) "):
        autoscale(model)


def test_norms_of_rows_are_fine(torch_geometric: ModuleType) -> None:
    pyg = torch_geometric.nn
    norms = [nn.BatchNorm1d(8), nn.LayerNorm(8), pyg.BatchNorm(8), pyg.LayerNorm(8, mode="node"), pyg.MessageNorm()]
    for norm in norms:
        assert isinstance(autoscale(Net(conv1=pyg.SAGEConv(8, 8), norm=norm)).conv1, gas_triton.nn.SAGEConv)


def handwritten(pyg: ModuleType) -> dict[str, type[nn.Module]]:
    utils = __import__("torch_geometric.utils").utils

    class ByDegree(pyg.MessagePassing):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            weight = utils.degree(edge_index[0], x.size(0))[edge_index[0]].clamp(min=1).reciprocal()
            return self.propagate(edge_index, x=x, weight=weight)

        def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
            return weight[:, None] * x_j

    class InHelper(pyg.MessagePassing):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.propagate(self.spread(edge_index), x=x)

        def spread(self, edge_index: Tensor) -> Tensor:
            return (lambda: utils.get_laplacian(edge_index)[0])()

    class Normalized(pyg.GCNConv):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            edge_index, weight = pyg.conv.gcn_conv.gcn_norm(edge_index, None, x.size(0))
            return self.propagate(edge_index, x=self.lin(x), edge_weight=weight)

    class Twice(pyg.MessagePassing):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.propagate(edge_index, x=self.propagate(edge_index, x=x))

    class Loop(pyg.MessagePassing):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            for _ in range(2):
                x = self.propagate(edge_index, x=x)
            return x

    class WithNorm(pyg.MessagePassing):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.norm(self.propagate(edge_index, x=x))

    class PairWithNorm(WithNorm):
        def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Tensor) -> Tensor:
            return super().forward(x, edge_index)

    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pyg.global_mean_pool(x, None)

    class Anything(pyg.MessagePassing):
        def forward(self, *args: Any) -> Tensor:
            return self.propagate(args[1], x=args[0])

    return {
        kind.__name__: kind
        for kind in (ByDegree, InHelper, Normalized, Twice, Loop, WithNorm, PairWithNorm, Pooled, Anything)
    }


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("ByDegree", "calls degree; if it thus weighs edges by degrees of their source nodes"),
        ("InHelper", "calls get_laplacian; if it thus"),
        ("Normalized", "calls gcn_norm; if it thus"),
        ("Twice", "propagates more than once; if it thus reads neighbours several hops away"),
        ("Loop", "propagates more than once"),
        ("WithNorm", "has the batch norm norm, which would see halo rows"),
        ("Pooled", "calls global_mean_pool, which pools over the whole graph"),
    ],
)
def test_handwritten_modules_are_read(kind: str, reason: str, torch_geometric: ModuleType) -> None:
    pyg = torch_geometric.nn
    made = handwritten(pyg)[kind]
    module = made(8, 8) if kind == "Normalized" else made()
    model = Net(conv1=pyg.SAGEConv(8, 8), conv2=module)
    with pytest.raises(ValueError, match=rf"conv2 \({kind}\) {reason}"):
        autoscale(model)
    scaled = autoscale(model, trust=["conv2"])
    assert isinstance(scaled.conv1, gas_triton.nn.SAGEConv)
    assert isinstance(scaled.conv2, Wrapped) == (kind != "Pooled")


def test_a_trusted_layer_gives_what_it_gives_on_the_whole_graph(torch_geometric: ModuleType) -> None:
    class ByTargets(torch_geometric.nn.MessagePassing):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            degree = torch_geometric.utils.degree(edge_index[1], x.size(0), x.dtype).clamp(min=1)
            return self.propagate(edge_index, x=x) / degree[:, None]

    setting = Setting("GIN", True)
    layer = ByTargets()
    expected = layer(setting.x, setting.graph.edge_index())
    scaled: Any = autoscale(layer, trust=[""])
    batch = setting.loader.batch([1, 2, 4])
    torch.testing.assert_close(scaled(batch.x, batch), expected[batch.node_ids])


def test_a_batch_norm_of_a_layer_that_takes_a_pair_sees_the_batch(torch_geometric: ModuleType) -> None:
    scaled: Any = autoscale(handwritten(torch_geometric.nn)["PairWithNorm"]())
    setting = Setting("GIN", True)
    batch = setting.loader.batch([1, 2, 4])
    scaled.float()(F.pad(batch.x, (0, 2)).float(), batch)
    edges = block(setting.graph, batch.node_ids.tolist())
    total = torch.zeros(batch.num_nodes, NUM_FEATURES).index_add(0, edges.target, batch.x.float()[edges.source])
    torch.testing.assert_close(scaled.norm.running_mean[:NUM_FEATURES], 0.1 * total.mean(0))


def test_subclasses_of_a_layer_are_not_fused(torch_geometric: ModuleType) -> None:
    class Doubled(torch_geometric.nn.SAGEConv):
        def message(self, x_j: Tensor) -> Tensor:
            return 2 * x_j

    setting = Setting("GIN", True)
    layer = Doubled(NUM_FEATURES, 4).double()
    expected = layer(setting.x, setting.graph.edge_index())
    scaled = autoscale(layer)
    assert isinstance(scaled, Wrapped)
    batch = setting.loader.full()
    torch.testing.assert_close(scaled(batch.x, batch), expected)


@pytest.mark.parametrize("options", [{"aggr": "median"}, {"aggr": ["mean", "max"]}], ids=["median", "two"])
def test_options_that_the_fused_layer_lacks_are_kept(options: dict[str, Any], torch_geometric: ModuleType) -> None:
    setting = Setting("GIN", True)
    layer = torch_geometric.nn.SAGEConv(NUM_FEATURES, 4, **options).double()
    expected = layer(setting.x, setting.graph.edge_index())
    batch = setting.loader.batch([1, 2, 4])
    torch.testing.assert_close(autoscale(layer)(batch.x, batch), expected[batch.node_ids])


def test_hooks_are_kept(torch_geometric: ModuleType) -> None:
    setting = Setting("GIN", True)
    layer = torch_geometric.nn.SAGEConv(NUM_FEATURES, 4).double()
    layer.register_message_forward_hook(lambda _module, _inputs, out: 3 * out)
    expected = layer(setting.x, setting.graph.edge_index())
    batch = setting.loader.full()
    torch.testing.assert_close(autoscale(layer)(batch.x, batch), expected)


def test_options_reach_the_fused_layer(torch_geometric: ModuleType) -> None:
    pyg = torch_geometric.nn
    setting = Setting("GIN", True)
    batch = setting.loader.full()
    for layer in (
        pyg.SAGEConv(NUM_FEATURES, 4, aggr="max", normalize=True, root_weight=False, project=True, bias=False),
        pyg.GINConv(nn.Linear(NUM_FEATURES, 4), eps=0.7),
        pyg.GCNConv(NUM_FEATURES, 4, normalize=False, bias=False),
    ):
        expected = layer.double()(setting.x, setting.graph.edge_index(), *batch_weight(layer, batch))
        scaled = autoscale(layer)
        assert not isinstance(scaled, Wrapped)
        torch.testing.assert_close(scaled(batch.x, batch), expected)


def batch_weight(layer: nn.Module, batch: Batch) -> list[Tensor]:
    return [batch.edge_weight] if type(layer).__name__ == "GCNConv" else []


def test_a_cached_norm_is_refused(fuse: bool, torch_geometric: ModuleType) -> None:
    layer = torch_geometric.nn.GCNConv(8, 8, cached=True)
    autoscale(copy.deepcopy(layer), fuse=fuse)
    layer(torch.randn(4, 8), torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(ValueError, match=r"conv1 \(GCNConv\) holds what it cached of another graph"):
        autoscale(Net(conv1=layer), fuse=fuse)


def test_models_that_cannot_be_scaled(torch_geometric: ModuleType) -> None:
    pyg = torch_geometric.nn
    conv = pyg.SAGEConv(8, 8)
    made = handwritten(pyg)
    for model, error, message in (
        (Net(lin=nn.Linear(8, 8)), ValueError, "Net has no torch_geometric MessagePassing layer: there is nothing"),
        (autoscale(Net(conv1=pyg.SAGEConv(8, 8))), ValueError, "its layers read histories already"),
        (Net(conv1=conv, conv2=conv), ValueError, r"conv1 \(SAGEConv\) is one layer under the names conv1, conv2"),
        (Net(conv1=made["Anything"]()), ValueError, r"conv1 \(Anything\): forward must name its arguments"),
        (conv.lin_l, ValueError, "Linear has no torch_geometric MessagePassing layer"),
        (lambda x: x, TypeError, "model must be a torch.nn.Module, got function"),
    ):
        with pytest.raises(error, match=message):
            autoscale(model)
    for options, error, message in (
        ({"trust": ["conv9"]}, ValueError, r"trust must name layers of the model, \['conv1'\], got \['conv9'\]"),
        ({"widths": {"lin": 3}}, ValueError, r"widths must name layers of the model, \['conv1'\], got \['lin'\]"),
        ({"trust": "conv1"}, TypeError, "trust must be a list of names, got the str 'conv1'"),
    ):
        with pytest.raises(error, match=message):
            autoscale(Net(conv1=pyg.SAGEConv(8, 8)), **options)


# --- how wide a history is --------------------------------------------------------------------------------------------


def test_widths(torch_geometric: ModuleType) -> None:
    pyg = torch_geometric.nn

    class Bare(pyg.MessagePassing):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.propagate(edge_index, x=x)

    layers = {
        "conv_in_channels": (pyg.GATConv(7, 8), 7),
        "conv_pair": (pyg.SAGEConv((7, 7), 8), 7),
        "conv_channels": (pyg.CGConv(7), 7),
        "conv_linear": (pyg.GINEConv(perceptron(7, 8)), 7),
        "conv_lazy_linear": (pyg.GINConv(pyg.MLP([7, 8, 8])), 7),
        "conv_edges": (pyg.EdgeConv(perceptron(14, 8)), 7),
        "conv_given": (Bare(), 7),
    }
    model = autoscale(Net(**{name: layer for name, (layer, _) in layers.items()}), widths={"conv_given": 7})
    histories = attach_histories(model, 10, layers=list(layers))
    assert {name: store.dim for name, store in histories.items()} == {
        name: width for name, (_, width) in layers.items()
    }

    lazy = pyg.SAGEConv(-1, 8)
    lazy(torch.randn(3, 7), torch.tensor([[0, 1], [1, 2]]))
    assert autoscale(Net(conv1=lazy)).conv1.history_dim == 7

    model = autoscale(Net(conv1=Bare(), conv2=Bare()))
    with pytest.raises(ValueError, match=r"conv2 \(Bare\): cannot tell .*autoscale\(model, widths=\{'conv2': ...\}\)"):
        attach_histories(model, 10)
    setting = Setting("GIN", True)
    model = autoscale(Net(conv1=Bare(), conv2=Bare()), widths={"conv2": 5})
    attach_histories(model, setting.graph.num_nodes)
    batch = setting.loader.batch([1])
    with pytest.raises(ValueError, match=r"conv2 \(Bare\): x has 6 features but its history has 5: .*'conv2': 6"):
        model(batch.x, batch)


# --- calls that are refused -------------------------------------------------------------------------------------------


def test_wrong_calls(fuse: bool, torch_geometric: ModuleType, torch_sparse: ModuleType) -> None:
    setting = Setting("GraphSAGE", fuse)
    batch, edge_index = setting.loader.batch([1]), setting.graph.edge_index()
    adj_t = torch_sparse.SparseTensor.from_edge_index(edge_index)
    for edges, kind in ((edge_index, "Tensor"), (adj_t, "SparseTensor"), (None, "NoneType")):
        message = rf"convs.0 \(SAGEConv\) is autoscaled and takes a Batch .* got {kind}: call model\(batch.x, batch\)"
        with pytest.raises(TypeError, match=message):
            setting.ours(batch.x, edges)
    layer = setting.ours.convs[0]
    with pytest.raises(TypeError, match="its own pair of source and target rows: give x"):
        layer((batch.x, batch.x), batch)
    with pytest.raises(TypeError, match=r"x must be a tensor or batch\.features, got int"):
        layer(3, batch)
    wide = (
        rf"convs.0 .* shape \[rows, {NUM_FEATURES}\].* got \[{batch.num_nodes}, 5\]"
        if not fuse
        else "for SAGEConv, got"
    )
    with pytest.raises(ValueError, match=wide):
        layer(batch.x[: batch.num_nodes, :5], batch)
    with pytest.raises(TypeError, match="takes 3 arguments, got 5"):
        layer(batch.x, batch, None, None, None)
    torch.testing.assert_close(layer(batch.x, batch, (3, 4)), layer(batch.x, edge_index=batch))
    torch.testing.assert_close(layer(batch.features, batch), layer(batch.x, batch))


def test_edge_tensors_of_a_wrong_length_are_refused_before_anything_is_pushed(torch_geometric: ModuleType) -> None:
    setting = Setting("GINEConv", False)
    histories = attach_histories(setting.ours, setting.graph.num_nodes)
    batch = setting.loader.batch([1, 2, 4])
    rows = torch.randn(batch.num_nodes, 8).double()
    message = (
        rf"conv2 \(GINEConv\): edge_attr has {setting.graph.num_edges} rows but the batch has {batch.num_edges} edges: "
        "give rows in the order of batch.edge_index"
    )
    with pytest.raises(ValueError, match=message):
        setting.ours.conv2(rows, batch, edge_attr=setting.graph.edge_attr)
    assert not histories["conv2"].table.any()


def test_attention_weights_are_refused(torch_geometric: ModuleType) -> None:
    layer: Any = autoscale(torch_geometric.nn.GATConv(NUM_FEATURES, 4).double())
    batch = Setting("GIN", True).loader.batch([1])
    with pytest.raises(TypeError, match=r"GATConv\): return_attention_weights must be None"):
        layer(batch.x, batch, return_attention_weights=True)


def test_importing_gas_triton_does_not_import_torch_geometric() -> None:
    code = "import sys, gas_triton; assert 'torch_geometric' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_geometric_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(MissingPackageError, match=r"autoscale needs torch_geometric: pip install 'gas-triton\[pyg\]'"):
        autoscale(nn.Linear(2, 2))

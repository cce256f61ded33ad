"""Models written in plain torch_geometric, as a user would write them, and how each is called."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import Batch, ClusterLoader, Graph, autoscale, random_partition

from .reference import GRAPHS

NUM_FEATURES, NUM_CLASSES, EDGE_DIM = 6, 3, 2
Options = dict[str, Any]


class Case(NamedTuple):
    """A model, which kinds of its layers are fused where a counterpart exists, and which edge tensors it takes."""

    make: Callable[[Graph], nn.Module]
    fused: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    is_normalized: bool = False
    has_loops: bool = False

    def prepare(self, graph: Graph) -> Graph:
        if self.is_normalized:
            return graph.add_self_loops().gcn_norm()
        return graph.add_self_loops() if self.has_loops else graph

    def options(self, edges: Graph | Batch) -> Options:
        """The edge tensors for the model, given the whole graph or a batch."""
        if self.is_normalized:
            return {} if isinstance(edges, Batch) else {"edge_weight": edges.weight}
        weight = edges.weight if isinstance(edges, Graph) else edges.edge_weight
        return {name: {"edge_weight": weight, "edge_attr": edges.edge_attr}[name] for name in self.edges}


def deg(graph: Graph) -> Tensor:
    return torch.bincount(graph.degree)


def perceptron(num_in: int, num_out: int, width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_in, width), nn.ReLU(), nn.Linear(width, num_out))


@functools.lru_cache(maxsize=1)
def cases() -> dict[str, Case]:
    """The models; needs torch_geometric."""
    from torch_geometric import nn as pyg

    class Gated(pyg.MessagePassing):
        """Reads both ends of an edge and the node itself; takes no pair."""

        def __init__(self, in_channels: int, out_channels: int) -> None:
            super().__init__(aggr="add")
            self.in_channels = in_channels
            self.gate = nn.Linear(2 * in_channels, 1)
            self.lin = nn.Linear(in_channels, out_channels)
            self.scale = nn.Parameter(torch.ones(out_channels))

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            out = self.propagate(edge_index, x=x)
            return self.lin(x) + self.scale * out

        def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
            return self.gate(torch.cat([x_i, x_j], dim=1)).sigmoid() * self.lin(x_j)

    class Two(nn.Module):
        """Two layers with a ReLU between, given edge tensors."""

        def __init__(self, conv1: nn.Module, conv2: nn.Module) -> None:
            super().__init__()
            self.conv1, self.conv2 = conv1, conv2

        def forward(self, x: Tensor, edge_index: Any, **edges: Tensor) -> Tensor:
            return self.conv2(self.conv1(x, edge_index, **edges).relu(), edge_index, **edges)

    class Mixed(nn.Module):
        """Fused and wrapped layers, a layer within a block, and edge tensors given in every way."""

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(NUM_FEATURES, 8)
            self.gcn = pyg.GCNConv(8, 8, normalize=False)
            self.block = nn.ModuleDict({"gated": Gated(8, 8), "norm": pyg.LayerNorm(8, mode="node")})
            self.sage = pyg.SAGEConv(8, 8, aggr="max")
            self.gine = pyg.GINEConv(perceptron(8, 8), edge_dim=EDGE_DIM)
            self.gat = pyg.GATConv(8, NUM_CLASSES, heads=2, concat=False)

        def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor, edge_attr: Tensor) -> Tensor:
            x = self.lin(x).relu()
            x = F.elu(self.gcn(x, edge_index, edge_weight))
            x = x + self.block["norm"](self.block["gated"](x, edge_index)).tanh()
            x = self.sage(x, edge_index).tanh()
            x = self.gine(x, edge_index, edge_attr=edge_attr).tanh()
            return self.gat(x, edge_index)

    class Deep(nn.Module):
        """GCN2, which reads the first representation in every layer."""

        def __init__(self) -> None:
            super().__init__()
            self.lins = nn.ModuleList([nn.Linear(NUM_FEATURES, 8), nn.Linear(8, NUM_CLASSES)])
            options = {"alpha": 0.2, "theta": 0.5}
            self.convs = nn.ModuleList(
                [pyg.GCN2Conv(8, layer=1, **options), pyg.GCN2Conv(8, layer=2, shared_weights=False, **options)]
            )

        def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
            x = x_0 = self.lins[0](x).relu()
            for conv in self.convs:
                x = conv(x, x_0, edge_index, edge_weight).relu()
            return self.lins[1](x)

    sizes = {"in_channels": NUM_FEATURES, "hidden_channels": 8, "num_layers": 3, "out_channels": NUM_CLASSES}
    aggregators = {"aggregators": ["mean", "max", "std"], "scalers": ["identity", "amplification"]}
    node = {"mode": "node"}
    heads = {"heads": 2, "edge_dim": EDGE_DIM}
    return {
        "GCN": Case(lambda graph: pyg.GCN(**sizes), ("GCNConv",), is_normalized=True),
        "GraphSAGE": Case(lambda graph: pyg.GraphSAGE(**sizes, norm="LayerNorm", norm_kwargs=node, jk="cat"),
                          ("SAGEConv",)),
        "GIN": Case(lambda graph: pyg.GIN(**sizes, train_eps=True), ("GINConv",)),
        "GAT": Case(lambda graph: pyg.GAT(**sizes, heads=2, residual=True), ("GATConv",), has_loops=True),
        "GAT, edges": Case(lambda graph: pyg.GAT(**sizes, **heads), ("GATConv",), ("edge_attr",), has_loops=True),
        "GATv2": Case(lambda graph: pyg.GAT(**sizes, **heads, v2=True), ("GATv2Conv",), ("edge_attr",), has_loops=True),
        "PNA": Case(
            lambda graph: pyg.PNA(**{**sizes, "out_channels": 4}, **aggregators, deg=deg(graph), towers=2, pre_layers=2,
                                  post_layers=2, act="elu", train_norm=True), ("PNAConv",)),
        "PNA, edges": Case(
            lambda graph: pyg.PNA(**sizes, **aggregators, deg=deg(graph), edge_dim=EDGE_DIM), ("PNAConv",),
            ("edge_attr",)),
        "EdgeCNN": Case(lambda graph: pyg.EdgeCNN(**sizes)),
        "TransformerConv": Case(
            lambda graph: Two(pyg.TransformerConv(NUM_FEATURES, 4, **heads, beta=True),
                              pyg.TransformerConv(8, NUM_CLASSES, **heads, concat=False)),
            ("TransformerConv",), ("edge_attr",)),
        "GINEConv": Case(
            lambda graph: Two(pyg.GINEConv(perceptron(NUM_FEATURES, 8), edge_dim=EDGE_DIM),
                              pyg.GINEConv(perceptron(8, NUM_CLASSES), edge_dim=EDGE_DIM)),
            edges=("edge_attr",)),
        "GraphConv": Case(lambda graph: Two(pyg.GraphConv(NUM_FEATURES, 8), pyg.GraphConv(8, NUM_CLASSES)),
                          edges=("edge_weight",)),
        "custom": Case(lambda graph: Two(Gated(NUM_FEATURES, 8), Gated(8, NUM_CLASSES))),
        "Sequential": Case(
            lambda graph: pyg.Sequential("x, edge_index", [
                (pyg.ResGatedGraphConv(NUM_FEATURES, 8), "x, edge_index -> x"), nn.Tanh(),
                (pyg.SAGEConv(8, NUM_CLASSES), "x, edge_index -> x"),
            ]), ("SAGEConv",)),
        "GCN2Conv": Case(lambda graph: Deep(), ("GCN2Conv",), is_normalized=True),
        "mixed": Case(lambda graph: Mixed(), ("GCNConv", "SAGEConv"), ("edge_weight", "edge_attr")),
    }  # fmt: skip


NAMES = (
    "GCN", "GraphSAGE", "GIN", "GAT", "GAT, edges", "GATv2", "PNA", "PNA, edges", "EdgeCNN", "TransformerConv",
    "GINEConv", "GraphConv", "custom", "Sequential", "GCN2Conv", "mixed",
)  # fmt: skip


class Setting:
    """A case's model before and after, the permuted graph, and the loader over the graph as the model expects it."""

    def __init__(self, name: str, fuse: bool, **options: Any) -> None:
        edges = GRAPHS["weighted_directed"]
        draw = torch.Generator().manual_seed(3)
        attr = torch.rand(edges.edge_index.size(1), EDGE_DIM, dtype=torch.float64, generator=draw)
        graph = Graph.from_edge_index(edges.edge_index, edges.weight, edges.num_nodes, attr)
        parts = random_partition(graph, 6)
        self.case: Case = cases()[name]
        self.graph: Graph = parts.permute(graph)
        self.x = torch.randn(graph.num_nodes, NUM_FEATURES, dtype=torch.float64, generator=draw)
        self.y = torch.randint(NUM_CLASSES, (graph.num_nodes,), generator=draw)
        prepared = self.case.prepare(self.graph)
        self.loader = ClusterLoader(prepared, parts, batch_size=2, x=self.x, y=self.y, **options)
        torch.manual_seed(1)
        self.theirs = self.case.make(self.graph).double()
        for parameter in self.theirs.parameters():
            # away from biases of 0, which hide a missing one
            parameter.data.add_(torch.rand_like(parameter) * 0.2)
        self.ours = autoscale(copy.deepcopy(self.theirs), fuse=fuse)

    def run_theirs(self, x: Tensor) -> Tensor:
        return self.theirs(x, self.graph.edge_index(), **self.case.options(self.graph))

    def run_ours(self, x: Any, batch: Batch) -> Tensor:
        return self.ours(x, batch, **self.case.options(batch))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.x, batch, **self.case.options(batch))


class Net(nn.Module):
    """Modules one after another; those named conv are given the edges."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        for name, module in self.named_children():
            x = module(x, edge_index) if name.startswith("conv") else module(x)
        return x

"""A PyG layer of an autoscaled model against the same layer called on the same rows and edges: what wrapping costs.

Both compute forward and backward of the in-batch rows, the halo rows and the batch's edges. The raw call finds them in
place; the wrapped layer checks its arguments, asks the batch for its edges and cuts the result. With a history it also
pushes in-batch rows and pulls halo rows, for which the raw call copies as much.

    python -m bench.bench_autoscale        the ratios, rounds interleaved
    pytest bench/bench_autoscale.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench import groups
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.side_by_side import missing_pyg
from bench.tables import OURS, Row
from gas_triton import Batch, ClusterLoader, Graph, attach_histories, autoscale, contiguous_partition

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

RAW = "layer as it is"
WAYS = (OURS, RAW)
LAYERS = ("GATConv", "TransformerConv", "GINEConv", "PNAConv", "EdgeConv", "GraphConv, weights", "custom")
AT_MOST = 1.15
NUM_FEATURES = 32


@dataclass(frozen=True)
class Problem:
    """A batch with a halo, a history that holds its rows, and an edge feature row for each edge."""

    batch: Batch
    x: Tensor
    history: Tensor


@functools.lru_cache(maxsize=2)
def make_problem(num_rows: int = 4000, num_neighbours: int = 15) -> Problem:
    """Rows of `num_neighbours` neighbours each among three times as many nodes."""
    generator = torch.Generator().manual_seed(0)
    num_nodes = 3 * num_rows
    target = torch.arange(num_nodes).repeat_interleave(num_neighbours)
    source = (target + torch.randint(-num_rows // 2, num_rows // 2, target.shape, generator=generator)) % num_nodes
    edge_attr = torch.randn(target.numel(), 8, generator=generator)
    weight = torch.rand(target.numel(), generator=generator)
    graph = Graph.from_edge_index(torch.stack([source, target]), weight, num_nodes, edge_attr)
    x = torch.randn(num_nodes, NUM_FEATURES, generator=generator)
    loader = ClusterLoader(graph, contiguous_partition(graph, [num_rows] * 3), shuffle=False, x=x)
    batch = loader.batch([1])
    return Problem(batch, batch.x, x)


def make_layer(name: str, problem: Problem) -> tuple[nn.Module, dict[str, Tensor]]:
    """A PyG layer, and the edge tensors that it takes."""
    from torch_geometric import nn as pyg

    class Custom(pyg.MessagePassing):
        def __init__(self) -> None:
            super().__init__(aggr="mean")
            self.lin = nn.Linear(NUM_FEATURES, NUM_FEATURES)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.propagate(edge_index, x=self.lin(x))

        def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
            return (x_i - x_j).relu()

    torch.manual_seed(0)
    width, attr = NUM_FEATURES, problem.batch.edge_attr
    weight = problem.batch.edge_weight
    assert attr is not None
    assert weight is not None
    perceptron = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    deg = torch.bincount(problem.batch.inner.rowptr.diff() + problem.batch.outer.rowptr.diff())
    aggregators, scalers = ["mean", "max", "std"], ["identity", "amplification"]
    made: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
        "GATConv": (lambda: pyg.GATConv(width, 8, heads=4, edge_dim=8), {"edge_attr": attr}),
        "TransformerConv": (lambda: pyg.TransformerConv(width, 8, heads=4, edge_dim=8), {"edge_attr": attr}),
        "GINEConv": (lambda: pyg.GINEConv(perceptron, edge_dim=8), {"edge_attr": attr}),
        "PNAConv": (lambda: pyg.PNAConv(width, width, aggregators, scalers, deg), {}),
        "EdgeConv": (lambda: pyg.EdgeConv(nn.Linear(2 * width, width)), {}),
        "GraphConv, weights": (lambda: pyg.GraphConv(width, width), {"edge_weight": weight}),
        "custom": (Custom, {}),
    }
    make, edges = made[name]
    return make(), edges


def calls(name: str, problem: Problem, has_history: bool) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of the layer, wrapped and as it is."""
    layer, edges = make_layer(name, problem)
    wrapped: Any = autoscale(copy.deepcopy(layer), fuse=False)
    batch, num_nodes = problem.batch, problem.batch.num_nodes
    table = problem.history.clone()
    x = (problem.x[:num_nodes] if has_history else problem.x).clone().requires_grad_()
    if has_history:
        if wrapped.width is None:
            wrapped.width = NUM_FEATURES
        store = attach_histories(nn.Sequential(wrapped), batch.graph_nodes, layers=["0"], nonfinite="allow")["0"]
        store.table.copy_(table)
    edge_index, takes_pair = batch.edge_index, wrapped.call.takes_pair
    first, last = batch.spans[0].tolist()

    def raw() -> Tensor:
        rows = x
        if has_history:
            table[first:last] = x.detach()
            rows = torch.cat([x, table.index_select(0, batch.halo_ids)])
        out = layer((rows, rows[:num_nodes]) if takes_pair else rows, edge_index, **edges)[:num_nodes]
        torch.autograd.grad(out.sum(), [x, *layer.parameters()], allow_unused=True)
        return out

    def ours() -> Tensor:
        out = wrapped(x, batch, **edges)
        torch.autograd.grad(out.sum(), [x, *wrapped.parameters()], allow_unused=True)
        return out

    return {OURS: ours, RAW: raw}


def cases(setting: Setting) -> list[Case]:
    """Layers with rows given and with a history; none without torch_geometric."""
    layers = setting.choose(LAYERS, LAYERS, ("GATConv", "custom")) if missing_pyg() is None else ()
    num_rows = setting.choose(4_000, 4_000, 200)

    def build(name: str, has_history: bool) -> Group:
        # they do the same, so every bit must be the same
        return Group(calls(name, make_problem(num_rows), has_history), tolerance=0.0)

    return [
        Case("autoscale", {"layer": name, "rows": rows}, functools.partial(build, name, rows == "with history"))
        for name in layers
        for rows in ("rows given", "with history")
    ]


def measure(setting: Setting) -> list[Row]:
    """Rows of every layer; `over` is our time over that of the layer as it is."""
    if reason := missing_pyg():
        return [{"op": "autoscale", "way": OURS, "missing": reason}]
    rows = measure_cases(cases(setting), setting)
    for ours, raw in zip(rows[::2], rows[1::2], strict=True):
        over = 1.0 / raw["times_ours"]
        ours |= {"over": over, "target": f"<= {AT_MOST:g}x", "met": over <= AT_MOST}
    return rows


def test_wrapped(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

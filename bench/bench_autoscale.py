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
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench.side_by_side import interleave, machine, parse_rounds, ratio, report
from gas_triton import Batch, ClusterLoader, Graph, attach_histories, autoscale, contiguous_partition

RAW = "layer as it is"
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
    """Forward and backward of the layer as it is and wrapped."""
    layer, edges = make_layer(name, problem)
    wrapped: Any = autoscale(copy.deepcopy(layer), fuse=False)
    batch, num_nodes = problem.batch, problem.batch.num_nodes
    label = "wrapped, with history" if has_history else "wrapped"
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
        return torch.autograd.grad(out.sum(), [x, *layer.parameters()], allow_unused=True) and out

    def ours() -> Tensor:
        out = wrapped(x, batch, **edges)
        return torch.autograd.grad(out.sum(), [x, *wrapped.parameters()], allow_unused=True) and out

    return {RAW: raw, label: ours}


def check(pair: dict[str, Callable[[], Tensor]]) -> None:
    """Raises AssertionError if the two differ: they do the same, so every bit must be the same."""
    raw, ours = (call().detach() for call in pair.values())
    assert torch.equal(raw, ours), "the wrapped layer gives other rows"


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("has_history", [False, True], ids=["rows", "history"])
@pytest.mark.parametrize("name", LAYERS)
def test_answers_agree(name: str, has_history: bool) -> None:
    pytest.importorskip("torch_geometric")
    check(calls(name, make_problem(200), has_history))


@pytest.mark.interop
@pytest.mark.parametrize("which", [0, 1], ids=["raw", "wrapped"])
@pytest.mark.parametrize("name", LAYERS)
def test_wrapped(benchmark: BenchmarkFixture, name: str, which: int) -> None:
    pytest.importorskip("torch_geometric")
    benchmark.group = f"autoscaled {name}"
    benchmark(list(calls(name, make_problem(), False).values())[which])


def main() -> None:
    """Prints the ratios."""
    rounds = parse_rounds(__doc__, 20)
    print(machine())
    problem = make_problem()
    batch = problem.batch
    sizes = f"{batch.num_nodes} + {batch.num_halo} rows, {batch.num_edges} edges, {NUM_FEATURES} features"
    for name in LAYERS:
        for has_history in (False, True):
            pair = calls(name, problem, has_history)
            check(pair)
            seconds = interleave(pair, rounds)
            print(report(f"\n{name}, forward and backward: {sizes}", seconds, RAW))
            over = ratio(seconds, list(pair)[1], RAW)
            verdict = "met" if over <= AT_MOST else "MISSED"
            print(f"  target at most {AT_MOST:g}x: {over:.2f}x, {verdict}")


if __name__ == "__main__":
    main()

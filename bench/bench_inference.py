"""Exact inference, layer by layer in batches, against evaluating the whole graph at once and against PyG's two ways.

`gas_triton.inference` sweeps batches of a class or two of the generated graph, planned before. "full batch" is our
model on `loader.full()`; "torch_geometric, full batch" PyG's layers on the whole graph; "NeighborLoader" PyG's recipe,
each layer on batches with all neighbours, where it can be sampled (torch_sparse or pyg-lib). All give the same logits.

    python -m bench.bench_inference        a table for each model, rounds interleaved
    pytest bench/bench_inference.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench import groups
from bench.bench_step import HIDDEN, make_model
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.planted import make_problem
from bench.side_by_side import missing_pyg
from bench.tables import OURS, Row
from gas_triton import ClusterLoader, inference
from gas_triton.nn import GATConv, GCNConv

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["WAYS", "cases", "measure"]
FULL_BATCH, PYG, NEIGHBOURS = "full batch", "torch_geometric, full batch", "NeighborLoader"
WAYS = (OURS, FULL_BATCH, PYG, NEIGHBOURS)
MODELS = ("GCN", "SAGE", "GAT")
HIDDEN_ON_CPU = {"GCN": 64, "SAGE": 64, "GAT": 8}


def cases(setting: Setting) -> list[Case]:
    """A case for every model."""
    names = setting.choose(MODELS, MODELS, MODELS[:2])
    return [Case("inference", {"model": name}, functools.partial(make, setting, name)) for name in names]


def size_of(setting: Setting) -> tuple[int, int, int]:
    """Nodes, mean degree and classes of the graph; on a CPU, PyG's ways take seconds on more."""
    full = (400_000, 20, 40) if setting.device.type == "cuda" else (20_000, 20, 8)
    size: tuple[int, int, int] = setting.choose(full, (5_000, 20, 4), (48, 4, 2))
    return size


def make(setting: Setting, name: str) -> Group:
    """Every way to the logits of all nodes."""
    problem = make_problem(*size_of(setting), setting.device)
    loader = problem.loader(name)
    is_gpu = setting.device.type == "cuda"
    hidden = setting.choose((HIDDEN if is_gpu else HIDDEN_ON_CPU)[name], 16, 2)
    model = make_model(name, loader, problem.num_classes, 0.0, hidden).eval()
    # planned before, as the batches of a later sweep are
    _ = [batch.num_nodes for batch in loader.in_order()], loader.full()
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: inference(model, loader, lambda model, batch: model(batch.features, batch)),
        FULL_BATCH: functools.partial(evaluate, model, loader),
    }
    missing = {}
    if reason := missing_pyg():
        missing = dict.fromkeys((PYG, NEIGHBOURS), reason)
        return Group(ways, missing)
    assert isinstance(loader.x, Tensor)
    convs = [pyg_conv(conv) for conv in model.convs]
    edge_index, weight = loader.graph.edge_index(), loader.graph.weight
    ways[PYG] = functools.partial(evaluate_pyg, model, convs, loader.x, edge_index, weight)
    if setting.device.type != "cpu":
        missing[NEIGHBOURS] = "samples on the CPU, and moves every batch to the GPU"
    elif not any(importlib.util.find_spec(package) for package in ("pyg_lib", "torch_sparse")):
        missing[NEIGHBOURS] = "needs torch_sparse or pyg-lib: pip install 'gas-triton[sparse]'"
    else:
        batch_size = setting.choose(4096, 4096, 32)
        ways[NEIGHBOURS] = functools.partial(sweep_neighbours, model, convs, loader.x, edge_index, weight, batch_size)
    return Group(ways, missing)


@torch.no_grad()
def evaluate(model: Any, loader: ClusterLoader) -> Tensor:
    """Our model on the whole graph."""
    batch = loader.full()
    return model(batch.features, batch)


def pyg_conv(conv: Any) -> nn.Module:
    """PyG's layer with the parameters of ours."""
    import torch_geometric.nn

    kind, sizes = getattr(torch_geometric.nn, type(conv).__name__), (conv.in_channels, conv.out_channels)
    if isinstance(conv, GATConv):
        theirs = kind(*sizes, conv.heads, conv.concat, add_self_loops=False)
    else:
        theirs = kind(*sizes, **({"normalize": False} if isinstance(conv, GCNConv) else {}))
    theirs = theirs.to(next(conv.parameters()))
    theirs.load_state_dict(conv.state_dict())
    return theirs.eval()


def call(conv: Any, x: Tensor, edge_index: Tensor, weight: Tensor | None) -> Tensor:
    """PyG's layer; only GCNConv takes weights."""
    return conv(x, edge_index) if weight is None or "GCN" not in type(conv).__name__ else conv(x, edge_index, weight)


@torch.no_grad()
def evaluate_pyg(model: Any, convs: list[nn.Module], x: Tensor, edge_index: Tensor, weight: Tensor | None) -> Tensor:
    """PyG's layers on the whole graph."""
    for place, conv in enumerate(convs):
        x = call(conv, x, edge_index, weight)
        x = x if place == len(convs) - 1 else model.activation(x)
    return x


@torch.no_grad()
def sweep_neighbours(
    model: Any, convs: list[nn.Module], x: Tensor, edge_index: Tensor, weight: Tensor | None, batch_size: int
) -> Tensor:
    """PyG's layer-wise inference (its example `reddit.py`): every layer on batches with all of their neighbours."""
    from torch_geometric.data import Data
    from torch_geometric.loader import NeighborLoader

    data = Data(edge_index=edge_index, num_nodes=x.size(0), edge_weight=weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using 'NeighborSampler' without a 'pyg-lib' installation")
        loader = NeighborLoader(data, num_neighbors=[-1], batch_size=batch_size, shuffle=False)
    for place, conv in enumerate(convs):
        parts = []
        for batch in loader:
            of_batch = batch.edge_weight if weight is not None else None
            out = call(conv, x[batch.n_id], batch.edge_index, of_batch)[: batch.batch_size]
            parts.append(out if place == len(convs) - 1 else model.activation(out))
        x = torch.cat(parts)
    return x


def measure(setting: Setting) -> list[Row]:
    """The rows of all cases, with the nodes that are evaluated in a second."""
    num_nodes = size_of(setting)[0]
    rows = measure_cases(cases(setting), setting)
    for row in rows:
        row |= {"nodes_per_s": 1e3 * num_nodes / row["ms"]} if "ms" in row else {}
    return rows


def test_inference(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

"""What `gas_triton.diagnose` costs beside one exact `inference` of the same model, loader and histories.

The aim is at most twice an inference, gradients left out; on graphs as small as Cora the calls alone are a little
more. Graphs of the size of Cora and of PubMed, and a larger one, all generated, with the classes for clusters, planned
before.

    python -m bench.bench_diagnostics        a table, rounds interleaved
    pytest bench/bench_diagnostics.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bench import groups
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.planted import make_problem
from bench.tables import Row
from gas_triton import ClusterLoader, attach_histories, contiguous_partition, diagnose, inference
from gas_triton.models import MODELS

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["INFERENCE", "OURS", "cases", "measure"]
# first the way to which the other is compared
INFERENCE, OURS = "inference", "diagnose"
# nodes, mean degree, clusters
GRAPHS = {"like Cora": (2_708, 4, 7), "like PubMed": (19_717, 4, 8), "larger": (100_000, 20, 16)}
TINY = {"tiny": (48, 4, 2)}
# layers, hidden width, further arguments
WAYS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "GCN, 2 layers": ("GCN", 2, 64, {}),
    "SAGE, 3 layers": ("SAGE", 3, 64, {"batch_norm": True}),
    "GCNII, 32 layers": ("GCN2", 32, 64, {}),
    "GAT, 2 layers (estimates)": ("GAT", 2, 8, {}),
}


def cases(setting: Setting) -> list[Case]:
    """A case for every graph and model."""
    graphs = setting.choose(GRAPHS, {name: GRAPHS[name] for name in list(GRAPHS)[:2]}, TINY)
    names = setting.choose(list(WAYS), list(WAYS), ["GCN, 2 layers", "GAT, 2 layers (estimates)"])
    return [
        Case("diagnose", {"graph": graph, "model": name}, functools.partial(make, setting, size, name))
        for graph, size in graphs.items()
        for name in names
    ]


def make(setting: Setting, size: tuple[int, int, int], name: str) -> Group:
    """Both ways, with histories that one epoch has filled."""
    kind, num_layers, hidden, options = WAYS[name]
    problem = make_problem(*size, setting.device)
    graph = MODELS[kind].prepare(problem.graph)
    parts = contiguous_partition(graph, problem.sizes)
    graph, x = parts.permute(graph, problem.x)
    loader = ClusterLoader(graph, parts, shuffle=False, x=x)
    model = MODELS[kind](x.size(1), hidden, problem.num_classes, num_layers, **options).to(setting.device)
    histories = attach_histories(model, graph.num_nodes)
    for batch in histories.prefetch(loader):
        model(batch.features, batch)

    def forward(model: Any, batch: Any) -> Tensor:
        return model(batch.features, batch)

    ways = {
        INFERENCE: lambda: inference(model, loader, forward),
        OURS: lambda: diagnose(model, loader, forward),
    }
    # they answer different questions
    return Group(ways, difference=lambda ours, theirs: 0.0)


def measure(setting: Setting) -> list[Row]:
    """The rows of all cases; `times_ours` is the cost in inferences."""
    return measure_cases(cases(setting), setting)


def test_diagnostics(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

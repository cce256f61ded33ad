"""Host overhead of one `functional.aggregate` call: what it costs over the kernels that it calls, on a 10-row batch.

The kernels of the CPU path are two `embedding_bag` calls and an addition; a batch of ten rows makes their own work
negligible, so that argument checks, the dispatcher and autograd show.

    python -m bench.bench_overhead         the difference, rounds interleaved
    pytest bench/bench_overhead.py         pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench import groups
from bench.groups import Case, Group, Setting, run_with
from bench.side_by_side import interleave
from bench.tables import OURS, Row
from gas_triton import Batch, ClusterLoader, Graph, contiguous_partition, functional

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

RAW = "kernels alone"
WAYS = (OURS, RAW)
# name -> (graph weights, gradient of x)
CALLS = {
    "no gradient": (False, False),
    "gradient": (False, True),
    "weights, no gradient": (True, False),
    "weights, gradient": (True, True),
}
MAX_MICROSECONDS = 40.0
CALLS_A_ROUND = 500


@dataclass(frozen=True)
class Problem:
    """A small weighted batch with a halo."""

    batch: Batch
    x: Tensor
    history: Tensor


@functools.lru_cache(maxsize=1)
def make_problem(num_rows: int = 10, num_features: int = 16) -> Problem:
    """Rows of four neighbours each, two of them out of the batch."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(num_rows).repeat_interleave(4)
    source = torch.randint(num_rows, (target.numel(),), generator=generator)
    source[::2] += num_rows
    weight = torch.rand(target.numel(), generator=generator)
    graph = Graph.from_edge_index(torch.stack([source, target]), weight, num_nodes=2 * num_rows)
    loader = ClusterLoader(graph, contiguous_partition(graph, [num_rows, num_rows]), shuffle=False)
    x = torch.randn(num_rows, num_features, generator=generator)
    return Problem(loader.batch([0]), x, torch.randn(2 * num_rows, num_features, generator=generator))


def raw_call(problem: Problem, weighted: bool) -> Callable[[], Tensor]:
    """The kernels alone, with arguments made beforehand."""
    batch, x, history = problem.batch, problem.x, problem.history
    inner, outer = batch.inner, batch.outer
    inner_weight = outer_weight = None
    if weighted:
        assert batch.edge_weight is not None
        inner_weight, outer_weight = batch.edge_weight.split([inner.num_edges, outer.num_edges])

    def call() -> Tensor:
        inner = torch.embedding_bag(x, batch.inner.col, batch.inner.rowptr, False, 0, False, inner_weight, True)[0]
        outer = torch.embedding_bag(history, batch.outer.col, batch.outer.rowptr, False, 0, False, outer_weight, True)[
            0
        ]
        return inner.add_(outer)

    return call


def our_call(problem: Problem, weighted: bool, gradient: bool) -> Callable[[], Tensor]:
    """`functional.aggregate`; with `gradient`, autograd records it."""
    x = problem.x.detach().requires_grad_(gradient)
    weight = problem.batch.edge_weight if weighted else None
    return lambda: functional.aggregate(x, problem.batch, problem.history, edge_weight=weight)


def pairs(problem: Problem) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """For each of `CALLS`, our call and the kernels alone."""
    return {
        name: {OURS: our_call(problem, weighted, gradient), RAW: raw_call(problem, weighted)}
        for name, (weighted, gradient) in CALLS.items()
    }


def check(problem: Problem) -> None:
    """Raises AssertionError if a call differs from its kernels: the sums are the same, so every bit must be."""
    for name, pair in pairs(problem).items():
        assert torch.equal(pair[RAW](), pair[OURS]().detach()), f"{name} differs from its kernels"


def cases(setting: Setting) -> list[Case]:
    """The calls."""
    return [
        Case("overhead", {"call": name}, functools.partial(lambda name: Group(pairs(make_problem())[name]), name))
        for name in CALLS
    ]


def measure(setting: Setting) -> list[Row]:
    """A row for each call, with the kernels alone and the difference, in microseconds."""
    problem = make_problem()
    check(problem)
    rows: list[Row] = []
    calls_a_round = setting.choose(CALLS_A_ROUND, 100, 2)
    for name, pair in pairs(problem).items():
        seconds = interleave(pair, setting.choose(20, 10, 3), calls=calls_a_round)
        over = 1e6 * statistics.median(a - b for a, b in zip(seconds[OURS], seconds[RAW], strict=True))
        ours, raw = (1e6 * statistics.median(seconds[way]) for way in WAYS)
        rows.append({
            "op": "overhead", "call": name, "way": OURS, "ms": ours / 1e3, "kernels_us": raw, "call_us": ours,
            "overhead_us": over, "target": f"<= {MAX_MICROSECONDS:g} us", "met": over <= MAX_MICROSECONDS,
        })  # fmt: skip
    return rows


def test_overhead(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

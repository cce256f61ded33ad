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

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.side_by_side import interleave, machine, parse_rounds, report
from gas_triton import Batch, ClusterLoader, Graph, contiguous_partition, functional

RAW = "embedding_bag kernels"
# name -> (graph weights, gradient of x)
CALLS = {
    "aggregate": (False, False),
    "aggregate, gradient": (False, True),
    "aggregate, weights": (True, False),
    "aggregate, weights, gradient": (True, True),
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
    """For each of `CALLS`, the kernels alone and our call of them."""
    return {
        name: {RAW: raw_call(problem, weighted), name: our_call(problem, weighted, gradient)}
        for name, (weighted, gradient) in CALLS.items()
    }


def check(problem: Problem) -> None:
    """Raises AssertionError if a call differs from its kernels: the sums are the same, so every bit must be."""
    for name, pair in pairs(problem).items():
        assert torch.equal(pair[RAW](), pair[name]().detach()), f"{name} differs from its kernels"


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


def test_answers_agree() -> None:
    check(make_problem())


@pytest.mark.parametrize("which", ["kernels", "call"])
@pytest.mark.parametrize("name", list(CALLS))
def test_overhead(benchmark: BenchmarkFixture, name: str, which: str) -> None:
    benchmark.group = f"overhead of {name}"
    benchmark(pairs(make_problem())[name][RAW if which == "kernels" else name])


def main() -> None:
    """Prints the overheads."""
    rounds = parse_rounds(__doc__, 20)
    print(machine())
    problem = make_problem()
    check(problem)
    for name, pair in pairs(problem).items():
        seconds = interleave(pair, rounds, calls=CALLS_A_ROUND)
        rows, edges = problem.batch.num_nodes, problem.batch.num_edges
        print(report(f"\n{name}: {rows} rows, {edges} edges, {problem.x.size(1)} features", seconds, RAW))
        over = 1e6 * statistics.median(a - b for a, b in zip(seconds[name], seconds[RAW], strict=True))
        verdict = "met" if over <= MAX_MICROSECONDS else "MISSED"
        print(f"  target overhead <= {MAX_MICROSECONDS:g} us: {over:.1f} us, {verdict}")


if __name__ == "__main__":
    main()

"""`functional.aggregate` on a CPU against the ways of stock torch and of PyGAS, forward, and forward + backward.

Input: rows of a batch with a quarter of their edges to halo rows, weighted, float32. Every baseline copies the halo
rows out of the history and concatenates them with the batch's; ours reads both in place. Columns, offsets and
transposes are made beforehand for all of them.

    python -m bench.bench_aggregate        ratios, rounds interleaved
    pytest bench/bench_aggregate.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import pygas
from bench.side_by_side import Target, interleave, machine, parse_rounds, passes, report
from gas_triton import Batch, ClusterLoader, Graph, contiguous_partition, functional
from gas_triton.kernels.aggregate import row_of_edge

OURS, PYGAS, BAG = "gas_triton", "PyGAS", "embedding_bag over cat"
MODES = ("forward", "forward + backward")
TARGETS = {
    "forward": [Target(PYGAS, OURS, 5.0), Target(BAG, OURS, 2.0)],
    "forward + backward": [Target(PYGAS, OURS, 3.0)],
}


@dataclass(frozen=True)
class Problem:
    """One batch and what every way reads.

    Attributes:
        batch: our plan, for rows 0 .. B-1 of a graph of B + H nodes.
        x: [B, F].
        history: [B + H, F].
        rowptr: int64 [B + 1], for the baselines.
        col: int64 [E], rows of [x; halo].
        weight: [E].
        grad: [B, F], the gradient that comes back.
    """

    batch: Batch
    x: Tensor
    history: Tensor
    rowptr: Tensor
    col: Tensor
    weight: Tensor
    grad: Tensor

    def cat(self, x: Tensor) -> Tensor:
        """What PyGAS makes before each layer: in-batch rows and a copy of the halo rows."""
        return pygas.pull(x, self.history, self.batch.halo_ids)


@functools.lru_cache(maxsize=1)
def make_problem(num_rows: int = 20_000, degree: int = 25, num_features: int = 128, num_halo: int = 46_000) -> Problem:
    """A random batch whose halo edges, a quarter of all, reach each of `num_halo` rows at least once."""
    generator = torch.Generator().manual_seed(0)
    num_edges = num_rows * degree
    num_outer = num_edges // 4
    place = torch.randperm(num_edges, generator=generator)
    spare = torch.randint(num_halo, (num_outer - num_halo,), generator=generator)
    source = torch.empty(num_edges, dtype=torch.int64)
    source[place[:num_outer]] = num_rows + torch.cat([torch.arange(num_halo), spare])
    source[place[num_outer:]] = torch.randint(num_rows, (num_edges - num_outer,), generator=generator)
    target = torch.arange(num_rows).repeat_interleave(degree)
    weight = torch.rand(num_edges, generator=generator)
    graph = Graph.from_edge_index(torch.stack([source, target]), weight, num_nodes=num_rows + num_halo)
    loader = ClusterLoader(graph, contiguous_partition(graph, [num_rows, num_halo]), shuffle=False)
    assert graph.weight is not None
    return Problem(
        batch=loader.batch([0]),
        x=torch.randn(num_rows, num_features, generator=generator),
        history=torch.randn(num_rows + num_halo, num_features, generator=generator),
        rowptr=graph.rowptr[: num_rows + 1].long(),
        col=graph.col.long(),
        weight=graph.weight,
        grad=torch.randn(num_rows, num_features, generator=generator),
    )


def forwards(problem: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every way to aggregate, by name; PyGAS's only where torch_sparse is installed."""
    p = problem
    size = (p.x.size(0), p.x.size(0) + p.batch.num_halo)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        adjacency = torch.sparse_csr_tensor(p.rowptr, p.col, p.weight, size=size, check_invariants=False)
    row = row_of_edge(p.rowptr, p.col)

    def bag(x: Tensor) -> Tensor:
        return F.embedding_bag(
            p.col, p.cat(x), p.rowptr, mode="sum", per_sample_weights=p.weight, include_last_offset=True
        )

    def index_add(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add_(0, row, p.cat(x)[p.col] * p.weight[:, None])

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda x: functional.aggregate(x, p.batch, p.history, edge_weight=p.batch.edge_weight),
        BAG: bag,
        "torch.sparse.mm over cat": lambda x: torch.sparse.mm(adjacency, p.cat(x)),
        "index_add_": index_add,
    }
    if pygas.missing() is None:
        import torch_sparse

        sparse = torch_sparse.SparseTensor(
            rowptr=p.rowptr, col=p.col, value=p.weight, sparse_sizes=size, is_sorted=True
        )
        ways[PYGAS] = lambda x: torch_sparse.matmul(sparse, p.cat(x), reduce="sum")
    return ways


def cases(problem: Problem, mode: str) -> dict[str, Callable[[], Tensor]]:
    """The same as functions of nothing; with a backward pass they give the gradient of `x`."""
    return passes(forwards(problem), problem.x, problem.grad, mode)


def largest_difference(problem: Problem) -> float:
    """The largest difference between ours and any other way, over outputs and gradients, in units of their largest."""
    worst = 0.0
    for mode in MODES:
        answers = {name: case() for name, case in cases(problem, mode).items()}
        ours = answers.pop(OURS)
        worst = max(worst, *(float((ours - other).abs().max() / other.abs().max()) for other in answers.values()))
    return worst


def check(problem: Problem) -> None:
    """Raises AssertionError if an answer differs from ours by more than rounding."""
    difference = largest_difference(problem)
    assert difference < 1e-5, f"answers differ by {difference:.1e} of their largest value"


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


def test_answers_agree() -> None:
    check(make_problem())


@pytest.mark.parametrize("name", [OURS, PYGAS, BAG, "torch.sparse.mm over cat", "index_add_"])
@pytest.mark.parametrize("mode", MODES)
def test_aggregate(benchmark: BenchmarkFixture, mode: str, name: str) -> None:
    if name == PYGAS and (reason := pygas.missing()):
        pytest.skip(reason)
    benchmark.group = f"aggregate, {mode}"
    benchmark(cases(make_problem(), mode)[name])


def main() -> None:
    """Prints the ratios."""
    rounds = parse_rounds(__doc__, 30)
    print(machine())
    problem = make_problem()
    check(problem)
    if reason := pygas.missing():
        print(f"without PyGAS: {reason}")
    shape = f"{problem.x.size(0)} rows, {problem.col.numel()} edges, {problem.x.size(1)} features"
    for mode in MODES:
        seconds = interleave(cases(problem, mode), rounds)
        print(report(f"\naggregate, {mode}: {shape}, {problem.batch.num_halo} halo rows", seconds, OURS, TARGETS[mode]))


if __name__ == "__main__":
    main()

"""`GATConv` on a CPU against the layer of torch_geometric, forward, and forward + backward: time and peak memory.

Input: rows of a batch and their halo rows, to which a quarter of the edges lead, 8 heads of 8 features, float32. Both
layers have the same parameters and read the rows of one tensor [B + H, F].

    python -m bench.bench_attention        ratios, rounds interleaved
    pytest bench/bench_attention.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.side_by_side import (
    Target,
    interleave,
    machine,
    missing_pyg,
    parse_rounds,
    passes,
    peaks,
    report,
    report_peaks,
)
from gas_triton import Batch, ClusterLoader, Graph, contiguous_partition
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.nn import GATConv

OURS, PYG = "gas_triton", "torch_geometric"
MODES = ("forward", "forward + backward")
TARGET = Target(PYG, OURS, 1.0)
MEMORY_TARGET = Target(PYG, OURS, 2.0)


@dataclass(frozen=True)
class Problem:
    """One batch and what both layers read.

    Attributes:
        batch: our plan, for rows 0 .. B-1 of a graph of B + H nodes.
        conv: our layer.
        x: [B + H, F].
        edge_index: int64 [2, E], the same edges under local ids.
        grad: [B, heads * D], the gradient that comes back.
    """

    batch: Batch
    conv: GATConv
    x: Tensor
    edge_index: Tensor
    grad: Tensor


@functools.lru_cache(maxsize=1)
def make_problem(
    num_rows: int = 20_000,
    degree: int = 25,
    num_features: int = 64,
    num_halo: int = 46_000,
    heads: int = 8,
    width: int = 8,
) -> Problem:
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
    graph = Graph.from_edge_index(torch.stack([source, target]), num_nodes=num_rows + num_halo)
    batch = ClusterLoader(graph, contiguous_partition(graph, [num_rows, num_halo]), shuffle=False).batch([0])
    joint = batch.joint()
    # the plan of the backward, which later steps of the same batch find made
    batch.joint_transposed()
    return Problem(
        batch=batch,
        conv=GATConv(num_features, width, heads, add_self_loops=False),
        x=torch.randn(num_rows + num_halo, num_features, generator=generator),
        edge_index=torch.stack([joint.col.long(), row_of_edge(joint.rowptr, joint.col)]),
        grad=torch.randn(num_rows, heads * width, generator=generator),
    )


def forwards(problem: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """Both layers by name; PyG's only where it is installed."""
    p = problem
    ways: dict[str, Callable[[Tensor], Tensor]] = {OURS: lambda x: p.conv(x, p.batch)}
    if missing_pyg() is None:
        from torch_geometric.nn import GATConv as PyGConv

        theirs = PyGConv(p.conv.in_channels, p.conv.out_channels, p.conv.heads, add_self_loops=False)
        theirs.load_state_dict(p.conv.state_dict())
        num_rows = p.batch.num_nodes
        ways[PYG] = lambda x: theirs((x, x[:num_rows]), p.edge_index, size=(x.size(0), num_rows))
    return ways


def cases(problem: Problem, mode: str) -> dict[str, Callable[[], Tensor]]:
    """The same as functions of nothing; with a backward pass they give the gradient of `x`."""
    return passes(forwards(problem), problem.x, problem.grad, mode)


def largest_difference(problem: Problem) -> float:
    """The largest difference between the layers, over outputs and gradients, in units of their largest."""
    worst = 0.0
    for mode in MODES:
        answers = {name: case() for name, case in cases(problem, mode).items()}
        ours = answers.pop(OURS)
        worst = max([worst, *(float((ours - other).abs().max() / other.abs().max()) for other in answers.values())])
    return worst


def check(problem: Problem) -> None:
    """Raises AssertionError if the answers differ by more than rounding."""
    difference = largest_difference(problem)
    assert difference < 1e-5, f"answers differ by {difference:.1e} of their largest value"


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


def test_answers_agree() -> None:
    check(make_problem())


@pytest.mark.parametrize("name", [OURS, PYG])
@pytest.mark.parametrize("mode", MODES)
def test_attention(benchmark: BenchmarkFixture, mode: str, name: str) -> None:
    if name == PYG and (reason := missing_pyg()):
        pytest.skip(reason)
    benchmark.group = f"attention, {mode}"
    benchmark(cases(make_problem(), mode)[name])


def main() -> None:
    """Prints the ratios."""
    rounds = parse_rounds(__doc__, 20)
    print(machine())
    problem = make_problem()
    check(problem)
    if reason := missing_pyg():
        print(f"without torch_geometric: {reason}")
    shape = f"{problem.batch.num_nodes} rows, {problem.edge_index.size(1)} edges, {problem.conv.heads} heads"
    for mode in MODES:
        seconds = interleave(cases(problem, mode), rounds)
        targets = [TARGET] if mode == MODES[1] else None
        print(report(f"\nGATConv, {mode}: {shape}, {problem.batch.num_halo} halo rows", seconds, OURS, targets))
    print(report_peaks(peaks(cases(problem, MODES[1])), MEMORY_TARGET))


if __name__ == "__main__":
    main()

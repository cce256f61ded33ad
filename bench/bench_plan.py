"""Time to plan a batch against the training step that uses it, and how it grows with the batch's edges.

Every round draws another group of clusters, so that no plan is found ready-made. A plan is `ClusterLoader.batch` and
what the model's layers make of it on first use; the step is forward, backward and Adam on that batch.

    python -m bench.bench_plan             the share of a step, and the exponent of the growth
    pytest bench/bench_plan.py             pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.bench_epoch import HIDDEN, NUM_LAYERS, Problem, Training, make_problem
from bench.side_by_side import Target, interleave, machine, parse_rounds, report
from gas_triton import Batch, ClusterLoader

PLAN, STEP = "plan", "training step"
TARGETS = [Target(STEP, PLAN, 10.0)]
MAX_EXPONENT = 1.1
MULTIPLES = (1, 2, 4, 8)


class Planning:
    """Plans batch after batch, and trains on the one planned last.

    Args:
        problem: the graph, its clusters and the groups of them that make batches.
        hidden: width between the model's layers.
    """

    def __init__(self, problem: Problem, hidden: int = HIDDEN) -> None:
        self.training = Training(problem, hidden=hidden)
        self.loader = self.training.loader
        self.groups = itertools.cycle(itertools.chain.from_iterable(problem.groups))
        self.batch = self.plan()

    def plan(self) -> Batch:
        """The next batch, complete."""
        self.batch = complete(self.loader.batch(next(self.groups)))
        return self.batch

    def step(self) -> Tensor:
        """Trains on the batch planned last; its loss."""
        return self.training.step(self.batch)


def complete(batch: Batch) -> Batch:
    """The batch with all that the layers of a GCN ask it to make of its edges."""
    _ = batch.inner_graph_col
    batch.transposed_inner(shared=batch.symmetric)
    return batch


def planners(problem: Problem, multiples: tuple[int, ...] = MULTIPLES) -> dict[int, Callable[[], Batch]]:
    """Functions that plan a random batch of m times the clusters that make a batch of `problem`, by m."""
    generator = torch.Generator().manual_seed(0)
    loader = ClusterLoader(problem.graph, problem.parts, problem.batch_size)
    num_parts = problem.parts.num_parts

    def plan(num_clusters: int) -> Batch:
        group = torch.randperm(num_parts, generator=generator)[:num_clusters].tolist()
        return complete(loader.batch(group))

    return {m: functools.partial(plan, m * problem.batch_size) for m in multiples}


def exponent(edges: list[float], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(edges), by least squares."""
    x, y = [math.log(e) for e in edges], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def check(planning: Planning) -> None:
    """Raises AssertionError if a planned batch does not have the edges and weights of its rows in the graph."""
    batch, graph = planning.plan(), planning.loader.graph
    rows = batch.node_ids
    degree = (graph.rowptr[rows + 1] - graph.rowptr[rows]).to(batch.inner.rowptr.dtype)
    assert torch.equal(batch.inner.rowptr.diff() + batch.outer.rowptr.diff(), degree)
    assert torch.equal(batch.halo_ids[batch.outer_slot.long()], batch.outer.col.long())
    assert torch.equal(torch.cat([batch.inner_graph_col, batch.outer.col]), graph.col[batch.edge_ids])
    assert batch.edge_weight is not None
    assert graph.weight is not None
    assert torch.equal(batch.edge_weight, graph.weight[batch.edge_ids])


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


def test_plan_is_complete() -> None:
    check(Planning(make_problem()))


@pytest.mark.parametrize("name", [PLAN, STEP])
def test_share_of_step(benchmark: BenchmarkFixture, name: str) -> None:
    benchmark.group = f"plan and step of a {NUM_LAYERS}-layer GCN, {HIDDEN} wide"
    planning = Planning(make_problem())
    if name == PLAN:
        benchmark.pedantic(planning.plan, rounds=30, warmup_rounds=3)
    else:
        benchmark.pedantic(planning.step, setup=lambda: planning.plan() and None, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_growth(benchmark: BenchmarkFixture, multiple: int) -> None:
    benchmark.group = "plan by edges"
    plan = planners(make_problem())[multiple]
    benchmark.extra_info["edges"] = plan().num_edges
    benchmark.pedantic(plan, rounds=20, warmup_rounds=3)


def main() -> None:
    """Prints the share and the exponent."""
    rounds = parse_rounds(__doc__, 20)
    print(machine())
    problem = make_problem()
    planning = Planning(problem)
    check(planning)
    seconds = interleave({PLAN: planning.plan, STEP: planning.step}, rounds)
    title = (
        f"\n{NUM_LAYERS}-layer GCN, {HIDDEN} wide, {problem.batch_size} of {problem.parts.num_parts} METIS clusters of "
        f"{problem.graph.num_nodes} nodes and {problem.graph.num_edges} edges"
    )
    print(report(title, seconds, PLAN, TARGETS))

    plans = planners(problem)
    edges: dict[int, list[int]] = {m: [] for m in plans}
    noting = {f"{m}x": functools.partial(lambda m, plan: edges[m].append(plan().num_edges), m, plans[m]) for m in plans}
    seconds = interleave(noting, rounds)
    print(report(f"\nplan of {problem.batch_size} clusters and multiples of it", seconds, "1x"))
    means = [statistics.mean(values) for values in edges.values()]
    print("  mean edges: " + ", ".join(f"{m}x {mean:.0f}" for m, mean in zip(plans, means, strict=True)))
    slope = exponent(means, [statistics.median(values) for values in seconds.values()])
    verdict = "met" if slope <= MAX_EXPONENT else "MISSED"
    print(f"  target time ~ edges^k with k <= {MAX_EXPONENT}: k = {slope:.2f}, {verdict}")


if __name__ == "__main__":
    main()

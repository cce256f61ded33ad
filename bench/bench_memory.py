"""Peak memory of one training step with histories, on a graph and on 16 disjoint copies of it.

A batch of the large graph is a batch of one copy, so both graphs train on equal batches, and whatever a step allocates
for each node of the graph would show. Tables (features, histories, the graph itself, the planner's map) are made before
and grow with N; their bytes are printed beside. Bytes are counted, not timed, so one run is exact.

    python -m bench.bench_memory           the table
    pytest bench/bench_memory.py           the same as a test, on graphs a tenth as large
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.bench_epoch import HIDDEN, NUM_LAYERS, PARTITIONS, Problem, Training, cut
from bench.side_by_side import machine
from gas_triton import Graph, contiguous_partition
from gas_triton.datasets import generate
from gas_triton.memory import peak_bytes

COPIES = 16
MAX_GROWTH = 0.01


@dataclass(frozen=True)
class Measurement:
    """One graph.

    Attributes:
        batch_nodes: B.
        batch_halo: H.
        batch_edges: edges of the batch.
        step_bytes: most bytes allocated at once during a step, from the plan to Adam.
        history_bytes: of the histories.
        data_bytes: of the graph, the features, the labels and the training mask.
        loss: of the step.
    """

    num_nodes: int
    num_edges: int
    batch_nodes: int
    batch_halo: int
    batch_edges: int
    step_bytes: int
    history_bytes: int
    data_bytes: int
    loss: float


def make_problem(
    num_nodes: int = 50_000, num_edges: int = 1_000_000, num_parts: int = 20, cache: Path | None = PARTITIONS
) -> Problem:
    """The generated graph of one copy, cut by METIS into clusters of about 2500 nodes."""
    return cut(generate(num_nodes, num_edges), num_parts, batch_size=4, cache=cache)


def copies(problem: Problem, count: int) -> Problem:
    """`count` disjoint copies of the graph, one behind the other, cluster by cluster as in the first."""
    graph, num_nodes = problem.graph, problem.graph.num_nodes
    source, target = graph.edge_index()
    shift = (torch.arange(count) * num_nodes).repeat_interleave(graph.num_edges)
    edge_index = torch.stack([source.repeat(count) + shift, target.repeat(count) + shift])
    copied = Graph.from_edge_index(edge_index, num_nodes=count * num_nodes).add_self_loops().gcn_norm()
    parts = contiguous_partition(copied, problem.parts.ptr.diff().tolist() * count)
    # the rows of every cluster already stand by degree, so the copies keep their order
    assert torch.equal(parts.perm, torch.arange(copied.num_nodes))
    return dataclasses.replace(
        problem, graph=copied, parts=parts, x=problem.x.repeat(count, 1), y=problem.y.repeat(count),
        train_mask=problem.train_mask.repeat(count),
    )  # fmt: skip


def measure(problem: Problem, first_cluster: int = 0, hidden: int = HIDDEN) -> Measurement:
    """A step on the batch that begins at a cluster, after a step on the batch behind it, which makes Adam's state."""
    training = Training(problem, hidden=hidden)
    clusters = list(range(first_cluster, first_cluster + problem.batch_size))
    training.step(training.loader.batch([cluster + problem.batch_size for cluster in clusters]))
    with peak_bytes("cpu") as peak:
        batch = training.loader.batch(clusters)
        loss = training.step(batch)
    graph = problem.graph
    tensors = [graph.rowptr, graph.col, graph.weight, problem.x, problem.y, problem.train_mask]
    return Measurement(
        num_nodes=graph.num_nodes,
        num_edges=graph.num_edges,
        batch_nodes=batch.num_nodes,
        batch_halo=batch.num_halo,
        batch_edges=batch.num_edges,
        step_bytes=peak.nbytes,
        history_bytes=training.histories.nbytes,
        data_bytes=sum(t.numel() * t.element_size() for t in tensors if t is not None),
        loss=float(loss),
    )


def measure_both(problem: Problem, count: int, hidden: int = HIDDEN) -> tuple[Measurement, Measurement]:
    """The graph, and the last of `count` copies of it.

    Raises:
        AssertionError: the two steps were not on equal batches, or did not compute the same.
    """
    small = measure(problem, hidden=hidden)
    large = measure(copies(problem, count), (count - 1) * problem.parts.num_parts, hidden)
    for name in ("batch_nodes", "batch_halo", "batch_edges"):
        assert getattr(small, name) == getattr(large, name), f"{name} differs: {small} {large}"
    assert abs(small.loss - large.loss) < 1e-5, f"losses differ: {small.loss} {large.loss}"
    return small, large


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


def test_same_at_any_number_of_nodes(benchmark: BenchmarkFixture) -> None:
    problem = make_problem(5_000, 100_000)
    small, large = benchmark.pedantic(measure_both, (problem, COPIES), rounds=1)
    benchmark.extra_info |= {"small": dataclasses.asdict(small), "large": dataclasses.asdict(large)}
    assert abs(large.step_bytes / small.step_bytes - 1) <= MAX_GROWTH


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=50_000, help="of one copy; 20 directed edges a node")
    parser.add_argument("--copies", type=int, default=COPIES)
    arguments = parser.parse_args()
    print(machine())
    problem = make_problem(arguments.nodes, 20 * arguments.nodes)
    both = small, large = measure_both(problem, arguments.copies)
    batch = f"{small.batch_nodes} in-batch rows, {small.batch_halo} halo rows and {small.batch_edges} edges"
    print(f"\n{NUM_LAYERS}-layer GCN, {HIDDEN} wide, a step on {batch}\n")
    print("| nodes | edges with self loops | peak of a step | histories | graph, features, labels |")
    print("|---|---|---|---|---|")
    for m in both:
        sizes = " | ".join(f"{nbytes / 2**20:.2f} MiB" for nbytes in (m.step_bytes, m.history_bytes, m.data_bytes))
        print(f"| {m.num_nodes} | {m.num_edges} | {sizes} |")
    growth = large.step_bytes / small.step_bytes - 1
    verdict = "met" if abs(growth) <= MAX_GROWTH else "MISSED"
    print(f"\ntarget: the same peak within {MAX_GROWTH:.0%}: {growth:+.3%}, {verdict}")


if __name__ == "__main__":
    main()

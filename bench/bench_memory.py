"""Peak memory of one training step with histories, on a graph and on 16 disjoint copies of it.

A batch of the large graph is a batch of one copy, so both graphs train on equal batches, and whatever a step allocates
for each node of the graph would show. Tables (features, histories, the graph itself, the planner's map) are made before
and grow with N; their bytes are printed beside. Bytes are counted, not timed, so one run is exact.

    python -m bench.bench_memory           the table
    pytest bench/bench_memory.py           the same as a test
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench import groups
from bench.bench_epoch import HIDDEN, NUM_LAYERS, PARTITIONS, Problem, Training, cut, hidden_of, move
from bench.groups import Setting
from bench.tables import OURS, Row
from gas_triton import Graph, contiguous_partition
from gas_triton.datasets import generate
from gas_triton.memory import peak_bytes
from gas_triton.sizing_step import BatchSize, StepOptions, step_bytes

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

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
        predicted_bytes: the same by arithmetic (`gas_triton.sizing_step`).
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
    predicted_bytes: int
    history_bytes: int
    data_bytes: int
    loss: float


def make_problem(
    num_nodes: int = 50_000, num_edges: int = 1_000_000, num_parts: int = 20, cache: Path | None = PARTITIONS
) -> Problem:
    """The generated graph of one copy, cut by METIS into clusters of about 2500 nodes."""
    return cut(generate(num_nodes, num_edges), num_parts, batch_size=4, cache=cache)


def copies(problem: Problem, count: int) -> Problem:
    """`count` disjoint copies of a graph on the CPU, one behind the other, cluster by cluster as in the first."""
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


def measure_step(problem: Problem, first_cluster: int = 0, hidden: int = HIDDEN) -> Measurement:
    """A step on the batch that begins at a cluster, after a step on the batch behind it, which makes Adam's state."""
    training = Training(problem, hidden=hidden)
    clusters = list(range(first_cluster, first_cluster + problem.batch_size))
    training.step(training.loader.batch([cluster + problem.batch_size for cluster in clusters]))
    with peak_bytes(problem.x.device) as peak:
        batch = training.loader.batch(clusters)
        loss = training.step(batch)
    graph = problem.graph
    options = StepOptions(problem.x.device.type, weighted=graph.weight is not None, symmetric=batch.symmetric)
    tensors = [graph.rowptr, graph.col, graph.weight, problem.x, problem.y, problem.train_mask]
    return Measurement(
        num_nodes=graph.num_nodes,
        num_edges=graph.num_edges,
        batch_nodes=batch.num_nodes,
        batch_halo=batch.num_halo,
        batch_edges=batch.num_edges,
        step_bytes=peak.nbytes,
        predicted_bytes=step_bytes(training.model, BatchSize.of(batch), options),
        history_bytes=training.histories.nbytes,
        data_bytes=sum(t.numel() * t.element_size() for t in tensors if t is not None),
        loss=float(loss),
    )


def measure_both(
    problem: Problem, count: int, hidden: int = HIDDEN, device: torch.device = groups.CPU
) -> tuple[Measurement, Measurement]:
    """Steps on the graph, and on the last of `count` copies of it, on a device.

    Raises:
        AssertionError: the two steps were not on equal batches, or did not compute the same.
    """
    small = measure_step(move(problem, device), hidden=hidden)
    large = measure_step(move(copies(problem, count), device), (count - 1) * problem.parts.num_parts, hidden)
    for name in ("batch_nodes", "batch_halo", "batch_edges"):
        assert getattr(small, name) == getattr(large, name), f"{name} differs: {small} {large}"
    assert abs(small.loss - large.loss) < 1e-4 * small.loss, f"losses differ: {small.loss} {large.loss}"
    return small, large


def growth(small: Measurement, large: Measurement) -> float:
    """How much more a step on the larger graph allocates, as a share."""
    return large.step_bytes / small.step_bytes - 1


def measure(setting: Setting) -> list[Row]:
    """A row for the graph, and one for its copies with what a step grows by."""
    tiny = {"num_nodes": 600, "num_edges": 6_000, "num_parts": 12, "cache": None}
    sizes = setting.choose({}, {"num_nodes": 5_000, "num_edges": 100_000}, tiny)
    problem = make_problem(**sizes)
    both = measure_both(problem, setting.choose(COPIES, COPIES, 3), hidden_of(setting), setting.device)
    rows: list[Row] = [
        {
            "op": "memory", "nodes": m.num_nodes, "edges": m.num_edges, "way": OURS,
            "peak_mib": m.step_bytes / 2**20, "predicted_mib": m.predicted_bytes / 2**20,
            "arithmetic": m.step_bytes / m.predicted_bytes - 1.0,
            "history_mib": m.history_bytes / 2**20, "data_mib": m.data_bytes / 2**20,
            "batch_rows": m.batch_nodes, "halo_rows": m.batch_halo, "batch_edges": m.batch_edges, "loss": m.loss,
            "layers": NUM_LAYERS, "width": hidden_of(setting), "partition": problem.partition,
        }
        for m in both
    ]  # fmt: skip
    more = growth(*both)
    rows[1] |= {"growth": more, "target": f"within {100 * MAX_GROWTH:g} %", "met": abs(more) <= MAX_GROWTH}
    return rows


def test_same_at_any_number_of_nodes(benchmark: BenchmarkFixture) -> None:
    rows = benchmark.pedantic(measure, (Setting(size="quick"),), rounds=1)
    benchmark.extra_info |= {"small": rows[0], "large": rows[1]}
    assert rows[1]["met"], f"a step grows with the graph: {rows}"


if __name__ == "__main__":
    groups.main(__doc__, measure)

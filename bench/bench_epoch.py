"""An epoch of a GCN with histories on a CPU: ours against the same steps written the PyGAS way (`bench/pygas.py`).

Both train the same model from the same parameters on the same batches with the same optimiser; an epoch holds all that
a batch needs, from the plan (PyGAS: the relabelling) to the step of Adam. Dropout is 0, so that the losses agree.

    python -m bench.bench_epoch            the ratio, epochs interleaved
    pytest bench/bench_epoch.py            pytest-benchmark, one case after another
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import pygas
from bench.side_by_side import Target, interleave, machine, report
from gas_triton import Batch, ClusterLoader, Graph, Histories, Partition, attach_histories, metis
from gas_triton.datasets import Dataset, generate, load
from gas_triton.models import GCN

OURS, PYGAS = "gas_triton", "PyGAS"
TARGETS = [Target(PYGAS, OURS, 2.0)]
NUM_LAYERS, HIDDEN = 3, 256
LEARNING_RATE = 0.01
# Epochs whose batches are drawn beforehand, for both sides; later ones repeat them.
NUM_EPOCHS = 16
# METIS takes longer than what is measured; `make clean` removes the folder.
PARTITIONS = Path(".benchmarks/partitions")


@dataclass(frozen=True)
class Problem:
    """A normalised graph in the order of its clusters, with node tensors, and how clusters are grouped.

    Attributes:
        groups: clusters of every batch of every epoch.
    """

    graph: Graph
    parts: Partition
    x: Tensor
    y: Tensor
    train_mask: Tensor
    num_classes: int
    batch_size: int
    groups: list[list[list[int]]]

    def loader(self) -> ClusterLoader:
        """A loader that gives the batches of `groups`, epoch by epoch."""
        return ClusterLoader(self.graph, self.parts, self.batch_size, x=self.x, y=self.y, train_mask=self.train_mask)


@functools.lru_cache(maxsize=1)
def make_problem(
    num_nodes: int = 100_000,
    num_edges: int = 2_000_000,
    num_parts: int = 40,
    batch_size: int = 4,
    cache: Path | None = PARTITIONS,
) -> Problem:
    """The generated graph."""
    return cut(generate(num_nodes, num_edges), num_parts, batch_size, cache)


def cut(data: Dataset, num_parts: int, batch_size: int, cache: Path | None = PARTITIONS) -> Problem:
    """A dataset's graph with self loops and GCN weights, cut by METIS.

    Args:
        data: the graph, its features and labels.
        num_parts: clusters.
        batch_size: clusters of a batch.
        cache: folder that keeps METIS partitions; None computes anew.
    """
    graph = Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes).add_self_loops().gcn_norm()
    parts = metis(graph, num_parts, cache=cache)
    graph, x, y, train_mask = parts.permute(graph, data.x, data.y, data.train_mask)
    loader = ClusterLoader(graph, parts, batch_size)
    groups = [[batch.clusters for batch in loader] for _ in range(NUM_EPOCHS)]
    return Problem(graph, parts, x, y, train_mask, data.num_classes, batch_size, groups)


class Training:
    """Our model, its histories and its optimiser.

    Args:
        problem: what to train on.
        dropout: applied to the input of every layer.
    """

    def __init__(self, problem: Problem, dropout: float = 0.0, hidden: int = HIDDEN) -> None:
        torch.manual_seed(0)
        self.model = GCN(problem.x.size(1), hidden, problem.num_classes, NUM_LAYERS, dropout=dropout)
        self.histories: Histories = attach_histories(self.model, problem.graph.num_nodes)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.loader = problem.loader()
        self.epoch = 0

    def step(self, batch: Batch) -> Tensor:
        """Forward, backward and Adam on a batch; its loss."""
        out = self.model(batch.features, batch)
        return _descend(self.optimizer, out, batch.y, batch.train_mask)

    def run_epoch(self) -> list[float]:
        """Trains one epoch; the losses."""
        self.loader.epoch = self.epoch % NUM_EPOCHS
        self.epoch += 1
        return [float(self.step(batch)) for batch in self.histories.prefetch(self.loader)]


class PygasTraining:
    """The same in PyGAS's way, from the same parameters."""

    def __init__(self, problem: Problem, dropout: float = 0.0, hidden: int = HIDDEN) -> None:
        self.groups = problem.groups
        self.model = pygas.GCN(
            problem.graph.num_nodes, problem.x.size(1), hidden, problem.num_classes, NUM_LAYERS, dropout
        )
        self.model.load_state_dict(Training(problem, dropout, hidden).model.state_dict())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.loader = pygas.SubgraphLoader(
            problem.graph, problem.parts, x=problem.x, y=problem.y, train_mask=problem.train_mask
        )
        self.epoch = 0

    def step(self, batch: pygas.Subgraph) -> Tensor:
        """Forward, backward and Adam on a batch; its loss."""
        out = self.model(batch.tensors["x"], batch)
        rows = slice(batch.batch_size)
        return _descend(self.optimizer, out, batch.tensors["y"][rows], batch.tensors["train_mask"][rows])

    def run_epoch(self) -> list[float]:
        """Trains one epoch; the losses."""
        groups = self.groups[self.epoch % NUM_EPOCHS]
        self.epoch += 1
        return [float(self.step(self.loader.batch(group))) for group in groups]


def _descend(optimizer: torch.optim.Optimizer, out: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    loss = F.cross_entropy(out[mask], y[mask])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def check(problem: Problem, hidden: int = HIDDEN, epochs: int = 2) -> None:
    """Raises AssertionError if the losses of the first epochs differ by more than rounding."""
    ours, theirs = Training(problem, hidden=hidden), PygasTraining(problem, hidden=hidden)
    for epoch in range(epochs):
        pair = torch.tensor([ours.run_epoch(), theirs.run_epoch()])
        torch.testing.assert_close(
            *pair, rtol=1e-3, atol=1e-4, msg=functools.partial("losses of epoch {} differ: {}".format, epoch)
        )


def trainings(problem: Problem, dropout: float = 0.0) -> dict[str, Callable[[], list[float]]]:
    """Functions that train one epoch each, by name; PyGAS's only where torch_sparse is installed."""
    ways = {OURS: Training(problem, dropout).run_epoch}
    if pygas.missing() is None:
        ways[PYGAS] = PygasTraining(problem, dropout).run_epoch
    return ways


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


def test_losses_agree() -> None:
    if reason := pygas.missing():
        pytest.skip(reason)
    check(make_problem())


@pytest.mark.parametrize("name", [OURS, PYGAS])
def test_epoch(benchmark: BenchmarkFixture, name: str) -> None:
    if name == PYGAS and (reason := pygas.missing()):
        pytest.skip(reason)
    benchmark.group = f"epoch of a {NUM_LAYERS}-layer GCN, {HIDDEN} wide"
    benchmark.pedantic(trainings(make_problem())[name], rounds=3, warmup_rounds=1)


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.0, help="also time with dropout (losses then differ)")
    parser.add_argument("--dataset", default="generated", help="any with training nodes in every batch")
    parser.add_argument("--root", help="folder of the dataset's file (default: $GAS_TRITON_DATA)")
    parser.add_argument("--num-parts", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    print(machine())
    data = load(arguments.dataset, arguments.root)
    problem = cut(data, arguments.num_parts, arguments.batch_size)
    if reason := pygas.missing():
        print(f"without PyGAS: {reason}")
    else:
        check(problem)
    stats = problem.parts.stats(problem.batch_size)
    title = (
        f"\nepoch of a {NUM_LAYERS}-layer GCN, {HIDDEN} wide, on {data.name}: {problem.graph.num_nodes} nodes, "
        f"{problem.graph.num_edges} edges with self loops, {problem.parts.num_parts} METIS clusters, "
        f"{problem.batch_size} a batch, {stats.halo_ratio:.1f} halo rows an in-batch row"
    )
    targets = TARGETS if data.name == "generated" else []
    print(report(title, interleave(trainings(problem), arguments.rounds, warmup=1), OURS, targets))
    if arguments.dropout:
        seconds = interleave(trainings(problem, arguments.dropout), arguments.rounds, warmup=1)
        print(report(f"\nthe same with dropout {arguments.dropout}", seconds, OURS))


if __name__ == "__main__":
    main()

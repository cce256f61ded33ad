"""An epoch of a GCN with histories on a CPU: ours against the same steps written the PyGAS way (`bench/pygas.py`).

Both train the same model from the same parameters on the same batches with the same optimiser; an epoch holds all that
a batch needs, from the plan (PyGAS: the relabelling) to the step of Adam. Without dropout the losses agree; with it the
masks are others, and the mean losses are close.

    python -m bench.bench_epoch                        epochs interleaved
    python -m bench.bench_epoch --dataset PubMed       of one dataset only, --dropout 0.5 with dropout
    pytest bench/bench_epoch.py                        pytest-benchmark, one case after another
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import groups, pygas
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.tables import OURS, Row
from gas_triton import Batch, ClusterLoader, Graph, Histories, Partition, attach_histories, metis, random_partition
from gas_triton.datasets import Dataset, generate, load
from gas_triton.models import GCN

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

PYGAS = "PyGAS"
WAYS = (OURS, PYGAS)
# PyGAS over ours on the generated graph without dropout
AT_LEAST = 3.0
NUM_LAYERS, HIDDEN = 3, 256
LEARNING_RATE = 0.01
# Epochs whose batches are drawn beforehand, for both sides; later ones repeat them.
NUM_EPOCHS = 16
# METIS takes longer than what is measured; `make clean` removes the folder.
PARTITIONS = Path(".benchmarks/partitions")
# (dataset, dropout)
FULL_CASES = (("generated", 0.0), ("generated", 0.5), ("AmazonComputers", 0.0), ("WordNet31", 0.0))


@dataclass(frozen=True)
class Problem:
    """A normalised graph in the order of its clusters, with node tensors, and how clusters are grouped.

    Attributes:
        groups: clusters of every batch of every epoch.
        partition: "METIS", or "random" where pymetis is not installed.
    """

    graph: Graph
    parts: Partition
    x: Tensor
    y: Tensor
    train_mask: Tensor
    num_classes: int
    batch_size: int
    groups: list[list[list[int]]]
    partition: str

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
    """A dataset's graph with self loops and GCN weights, cut by METIS, or at random without pymetis.

    Args:
        data: the graph, its features and labels.
        num_parts: clusters.
        batch_size: clusters of a batch.
        cache: folder that keeps METIS partitions; None computes anew.
    """
    graph = Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes).add_self_loops().gcn_norm()
    partition = "random" if importlib.util.find_spec("pymetis") is None else "METIS"
    parts = random_partition(graph, num_parts) if partition == "random" else metis(graph, num_parts, cache=cache)
    graph, x, y, train_mask = parts.permute(graph, data.x, data.y, data.train_mask)
    loader = ClusterLoader(graph, parts, batch_size)
    groups = [[batch.clusters for batch in loader] for _ in range(NUM_EPOCHS)]
    return Problem(graph, parts, x, y, train_mask, data.num_classes, batch_size, groups, partition)


def move(problem: Problem, device: torch.device) -> Problem:
    """The problem on another device."""
    tensors = {name: getattr(problem, name).to(device) for name in ("graph", "x", "y", "train_mask")}
    return dataclasses.replace(problem, **tensors)


def problem_of(setting: Setting) -> Problem:
    """The generated graph of a size, on the setting's device."""
    tiny = {"num_nodes": 600, "num_edges": 6_000, "num_parts": 8, "batch_size": 2, "cache": None}
    sizes = setting.choose({}, {"num_nodes": 20_000, "num_edges": 400_000}, tiny)
    return move(make_problem(**sizes), setting.device)


def hidden_of(setting: Setting) -> int:
    """Width between the layers."""
    return setting.choose(HIDDEN, HIDDEN, 16)


class Training:
    """Our model, its histories and its optimiser.

    Args:
        problem: what to train on.
        dropout: applied to the input of every layer.
    """

    def __init__(self, problem: Problem, dropout: float = 0.0, hidden: int = HIDDEN) -> None:
        torch.manual_seed(0)
        self.model = GCN(problem.x.size(1), hidden, problem.num_classes, NUM_LAYERS, dropout=dropout)
        self.model.to(problem.x.device)
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


def trainings(problem: Problem, dropout: float = 0.0, hidden: int = HIDDEN) -> dict[str, Callable[[], list[float]]]:
    """Functions that train one epoch each, by name; PyGAS's only where torch_sparse is installed."""
    ways = {OURS: Training(problem, dropout, hidden).run_epoch}
    if pygas.missing() is None:
        ways[PYGAS] = PygasTraining(problem, dropout, hidden).run_epoch
    return ways


@functools.lru_cache(maxsize=4)
def dataset_problem(name: str) -> Problem:
    """A dataset in 40 clusters, 4 a batch."""
    return cut(load(name), num_parts=40, batch_size=4)


def missing_file(name: str) -> str | None:
    """Why a dataset cannot be measured; None if it can."""
    is_here = name == "generated" or (Path(os.environ.get("GAS_TRITON_DATA", "")) / f"{name}.npz").is_file()
    return None if is_here else f"needs {name}.npz in the folder $GAS_TRITON_DATA"


def chosen_problem(setting: Setting, name: str) -> Problem:
    """The generated graph of the setting's size, or a dataset."""
    return problem_of(setting) if name == "generated" else dataset_problem(name)


def make_group(setting: Setting, name: str, dropout: float) -> Group:
    """A training each way; without dropout, every loss of two epochs is compared before."""
    problem, hidden = chosen_problem(setting, name), hidden_of(setting)
    reason = pygas.missing()
    if reason is None and dropout == 0.0:
        check(problem, hidden)
    return Group(
        ways=trainings(problem, dropout, hidden),
        missing={} if reason is None else {PYGAS: reason},
        # masks differ, and the mean over few rows with them
        tolerance=1e-3 if dropout == 0.0 else setting.choose(0.1, 0.2, 0.5),
        difference=apart,
    )


def apart(ours: list[float], theirs: list[float]) -> float:
    """How far the mean losses of two epochs are apart, over theirs."""
    return abs(statistics.mean(ours) / statistics.mean(theirs) - 1.0)


def cases(setting: Setting, chosen: Sequence[tuple[str, float]] | None = None) -> list[Case]:
    """Epochs of (dataset, dropout); the datasets that are not here are left out."""
    pairs = chosen or setting.choose(FULL_CASES, FULL_CASES[:2], FULL_CASES[:2])
    return [
        Case("epoch", {"graph": name, "dropout": dropout}, functools.partial(make_group, setting, name, dropout))
        for name, dropout in pairs
        if missing_file(name) is None
    ]


def measure(setting: Setting, chosen: Sequence[tuple[str, float]] | None = None) -> list[Row]:
    """A row for each way to train an epoch, with the size of the graph."""
    rows = measure_cases(cases(setting, chosen), setting)
    for row in rows:
        problem = chosen_problem(setting, row["graph"])
        stats = problem.parts.stats(problem.batch_size)
        row |= {"nodes": problem.graph.num_nodes, "edges": problem.graph.num_edges, "halo_ratio": stats.halo_ratio}
        row |= {"partition": problem.partition, "layers": NUM_LAYERS, "width": hidden_of(setting)}
        if row["way"] == PYGAS and "ms" in row and (row["graph"], row["dropout"]) == FULL_CASES[0]:
            row |= {"target": f">= {AT_LEAST:g}x", "met": row["times_ours"] >= AT_LEAST}
    for name, dropout in chosen or setting.choose(FULL_CASES, (), ()):
        if reason := missing_file(name):
            rows.append({"op": "epoch", "graph": name, "dropout": dropout, "way": OURS, "missing": reason})
    return rows


def test_epoch(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    run_with(benchmark, case, way)


def main() -> None:
    """Prints the times."""
    parser = groups.options(__doc__)
    parser.add_argument("--dataset", help="only this one: generated, or NAME of a NAME.npz in $GAS_TRITON_DATA")
    parser.add_argument("--dropout", type=float, default=0.0, help="of --dataset")
    arguments = parser.parse_args()
    chosen = [(arguments.dataset, arguments.dropout)] if arguments.dataset else None
    groups.main(__doc__, functools.partial(measure, chosen=chosen), parser)


if __name__ == "__main__":
    main()

"""An epoch of a GCN with the first layer's neighbours aggregated in every step, and once beforehand.

Both train the same model from the same parameters on the same batches; the first layer has no dropout. What the
table costs, in bytes and in seconds, is printed beside what it saves.

    python -m bench.bench_static           the ratios, epochs interleaved, and the peak memory of a step
    pytest bench/bench_static.py           pytest-benchmark, one case after another
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.bench_epoch import HIDDEN, NUM_LAYERS, Problem, Training, cut, make_problem
from bench.side_by_side import interleave, machine, report
from gas_triton import functional
from gas_triton.datasets import load
from gas_triton.memory import peak_bytes
from gas_triton.text import mebibytes

PLAIN, STATIC = "every step", "once"


class StaticTraining(Training):
    """The same training, with a table of aggregated features.

    Attributes:
        seconds: that the table took to make.
        nbytes: of the table.
    """

    def __init__(self, problem: Problem, hidden: int = HIDDEN, tier: str = "device") -> None:
        super().__init__(problem, hidden=hidden)
        start = time.perf_counter()
        self.nbytes = self.loader.aggregate_features(tier=tier).nbytes
        self.seconds = time.perf_counter() - start


@dataclass(frozen=True)
class Measurement:
    """Most bytes allocated at once during a step, from the plan to Adam, by way.

    Attributes:
        batch: of a step on a batch, the most over an epoch.
        full: of a step on the whole graph.
    """

    batch: dict[str, int]
    full: dict[str, int]


def trainings(problem: Problem, hidden: int = HIDDEN) -> dict[str, Training]:
    """A training each way, from the same parameters."""
    return {PLAIN: Training(problem, hidden=hidden), STATIC: StaticTraining(problem, hidden)}


def check(problem: Problem, hidden: int = HIDDEN, epochs: int = 2) -> None:
    """Raises AssertionError if the losses of the first epochs differ by more than rounding."""
    ways = trainings(problem, hidden)
    torch.testing.assert_close(*(rows() for rows in neighbours(problem, ways).values()))
    for epoch in range(epochs):
        pair = torch.tensor([training.run_epoch() for training in ways.values()])
        torch.testing.assert_close(
            *pair, rtol=1e-3, atol=1e-4, msg=functools.partial("losses of epoch {} differ: {}".format, epoch)
        )


def measure(problem: Problem, hidden: int = HIDDEN) -> Measurement:
    """The peaks, after a step that makes Adam's state."""
    batch, full = {}, {}
    for way, training in trainings(problem, hidden).items():
        training.step(training.loader.batch([0]))
        peaks = []
        for clusters in problem.groups[0]:
            with peak_bytes("cpu") as peak:
                training.step(training.loader.batch(clusters))
            peaks.append(peak.nbytes)
        batch[way] = max(peaks)
        whole = training.loader.full()
        with peak_bytes("cpu") as peak:
            training.step(whole)
        full[way] = peak.nbytes
    return Measurement(batch, full)


def neighbours(problem: Problem, ways: dict[str, Training]) -> dict[str, Callable[[], Tensor]]:
    """Functions that give the aggregated neighbours of the same batch, [B, F]."""

    def plain() -> Tensor:
        batch = ways[PLAIN].loader.batch(problem.groups[0][0])
        return functional.aggregate(batch.features, batch, edge_weight=batch.edge_weight)

    def static() -> Tensor:
        rows = ways[STATIC].loader.batch(problem.groups[0][0]).static_rows("sum", True)
        assert rows is not None
        return rows

    return {PLAIN: plain, STATIC: static}


def full_steps(ways: dict[str, Training]) -> dict[str, Callable[[], object]]:
    """Functions that take a step on the whole graph each."""
    return {way: functools.partial(training.step, training.loader.full()) for way, training in ways.items()}


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


def test_losses_agree() -> None:
    check(make_problem())


@pytest.mark.parametrize("name", [PLAIN, STATIC])
def test_epoch(benchmark: BenchmarkFixture, name: str) -> None:
    benchmark.group = f"epoch of a {NUM_LAYERS}-layer GCN, {HIDDEN} wide, first layer aggregated"
    benchmark.pedantic(trainings(make_problem())[name].run_epoch, rounds=3, warmup_rounds=1)


def main() -> None:
    """Prints times and bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dataset", default="generated")
    parser.add_argument("--root", help="folder of the dataset's file (default: $GAS_TRITON_DATA)")
    parser.add_argument("--num-parts", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    arguments = parser.parse_args()
    print(machine())
    data = load(arguments.dataset, arguments.root)
    # so that every batch has training nodes
    data = replace(data, train_mask=torch.ones_like(data.train_mask))
    problem = cut(data, arguments.num_parts, arguments.batch_size)
    check(problem, arguments.hidden)
    stats = problem.parts.stats(problem.batch_size)
    ways = trainings(problem, arguments.hidden)
    static = ways[STATIC]
    assert isinstance(static, StaticTraining)
    title = (
        f"\n{NUM_LAYERS}-layer GCN, {arguments.hidden} wide, on {data.name}: {problem.graph.num_nodes} nodes, "
        f"{problem.graph.num_edges} edges with self loops, {problem.x.size(1)} features, {problem.parts.num_parts} "
        f"METIS clusters, {problem.batch_size} a batch, {stats.halo_ratio:.1f} halo rows an in-batch row"
    )
    print(f"{title}\ntable: {mebibytes(static.nbytes)}, made in {static.seconds:.3f} s")
    layer = interleave(neighbours(problem, ways), rounds=10 * arguments.rounds)
    print(report("plan of a batch and the neighbours of its first layer", layer, STATIC))
    epochs: dict[str, Callable[[], object]] = {way: training.run_epoch for way, training in ways.items()}
    print(report("epoch with histories", interleave(epochs, arguments.rounds, warmup=1), STATIC))
    print(report("full-batch step", interleave(full_steps(ways), arguments.rounds, warmup=1), STATIC))
    peaks = measure(problem, arguments.hidden)
    for what, nbytes in (("a batch", peaks.batch), ("the whole graph", peaks.full)):
        print(f"peak of a step on {what}: {mebibytes(nbytes[PLAIN])}, with the table {mebibytes(nbytes[STATIC])}")


if __name__ == "__main__":
    main()

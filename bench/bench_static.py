"""An epoch of a GCN with the first layer's neighbours aggregated in every step, and once beforehand.

Both train the same model from the same parameters on the same batches; the first layer has no dropout. What the
table costs, in bytes and in seconds, is printed beside what it saves.

    python -m bench.bench_static           the ratios, epochs interleaved, and the peak memory of a step
    pytest bench/bench_static.py           pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench import groups
from bench.bench_epoch import HIDDEN, NUM_LAYERS, Problem, Training, cut, hidden_of, missing_file, problem_of
from bench.groups import Case, Group, Setting, measure_cases, relative_difference, run_with
from bench.tables import Row
from gas_triton import functional
from gas_triton.datasets import load
from gas_triton.memory import peak_bytes

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

PLAIN, STATIC = "every step", "once"
WAYS = (STATIC, PLAIN)
# graph -> width between the layers; PubMed's features are wider than its layers
WIDTHS = {"generated": None, "PubMed": 64}


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
    return {STATIC: StaticTraining(problem, hidden), PLAIN: Training(problem, hidden=hidden)}


def check(problem: Problem, hidden: int = HIDDEN, epochs: int = 2) -> None:
    """Raises AssertionError if the losses of the first epochs differ by more than rounding."""
    ways = trainings(problem, hidden)
    torch.testing.assert_close(*(rows() for rows in neighbours(problem, ways).values()))
    for epoch in range(epochs):
        pair = torch.tensor([training.run_epoch() for training in ways.values()])
        torch.testing.assert_close(
            *pair, rtol=1e-3, atol=1e-4, msg=functools.partial("losses of epoch {} differ: {}".format, epoch)
        )


def measure_peaks(problem: Problem, hidden: int = HIDDEN) -> Measurement:
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

    return {STATIC: static, PLAIN: plain}


def full_steps(ways: dict[str, Training]) -> dict[str, Callable[[], object]]:
    """Functions that take a step on the whole graph each."""
    return {way: functools.partial(training.step, training.loader.full()) for way, training in ways.items()}


@functools.lru_cache(maxsize=2)
def chosen_problem(setting: Setting, name: str) -> Problem:
    """A graph whose nodes are all training nodes, so that every batch has some."""
    if name == "generated":
        problem = problem_of(setting)
        return replace(problem, train_mask=torch.ones_like(problem.train_mask))
    data = load(name)
    return cut(replace(data, train_mask=torch.ones_like(data.train_mask)), num_parts=40, batch_size=4)


def make_group(setting: Setting, name: str, measure: str) -> Group:
    """What is timed, both ways."""
    problem, hidden = chosen_problem(setting, name), WIDTHS[name] or hidden_of(setting)
    made = trainings(problem, hidden)
    if measure == "plan and first neighbours":
        return Group(neighbours(problem, made))
    if measure == "full-batch step":
        return Group(full_steps(made), tolerance=1e-3)
    check(problem, hidden)
    epochs: dict[str, Callable[[], object]] = {way: training.run_epoch for way, training in made.items()}
    return Group(epochs, tolerance=1e-3, difference=lambda *pair: relative_difference(*map(torch.tensor, pair)))


def cases(setting: Setting) -> list[Case]:
    """Graphs that are here, and what is timed on them."""
    names = [name for name in setting.choose(tuple(WIDTHS), ("generated",), ("generated",)) if not missing_file(name)]
    return [
        Case("static", {"graph": name, "measure": measure}, functools.partial(make_group, setting, name, measure))
        for name in names
        for measure in ("plan and first neighbours", "epoch", "full-batch step")
    ]


def measure(setting: Setting) -> list[Row]:
    """Times both ways; the peak of a step is in the rows of an epoch and of a full-batch step."""
    rows = measure_cases(cases(setting), setting)
    peaks: dict[str, Measurement] = {}
    for row in rows:
        name, way = row["graph"], row["way"]
        problem, hidden = chosen_problem(setting, name), WIDTHS[name] or hidden_of(setting)
        if row["measure"] != "plan and first neighbours":
            peaks[name] = peaks.get(name) or measure_peaks(problem, hidden)
            nbytes = peaks[name].batch if row["measure"] == "epoch" else peaks[name].full
            row["peak_mib"] = nbytes[way] / 2**20
        row |= {"nodes": problem.graph.num_nodes, "features": problem.x.size(1), "layers": NUM_LAYERS, "width": hidden}
        if way == STATIC:
            made = StaticTraining(problem, hidden)
            row |= {"table_mib": made.nbytes / 2**20, "table_ms": 1e3 * made.seconds}
    return rows


def test_static(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

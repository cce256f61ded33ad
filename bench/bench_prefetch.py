"""A training epoch with histories on the device, in host memory and in files; rows fetched ahead, and when asked for.

On a GPU this shows how much of the transfers is hidden. On a CPU nothing runs beside a step, so all of their time is
exposed, and what shows is what copying rows costs over reading them in place. The losses of all are equal, bit for bit.

    python -m bench.bench_prefetch         epochs interleaved; on the GPU where there is one
    pytest bench/bench_prefetch.py         pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import groups
from bench.bench_epoch import NUM_LAYERS, Problem, Training, hidden_of, make_problem, problem_of
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.tables import OURS, Row
from gas_triton import Histories, attach_histories
from gas_triton.history.device import Inline, Spans, Stream
from gas_triton.models import GCN
from gas_triton.training_config import HISTORY_DTYPES

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

# name -> (arguments of attach_histories, batches ahead)
TIERS: dict[str, tuple[dict[str, Any], int]] = {
    "device": ({"tier": "device"}, 1),
    "pinned, ahead": ({"tier": "pinned"}, 1),
    "pinned, when asked": ({"tier": "pinned"}, 0),
    "pinned, in place": ({"tier": "pinned", "in_place": True}, 1),
    "file, ahead": ({"tier": "file"}, 1),
    "file, when asked": ({"tier": "file"}, 0),
}
WAYS = tuple(TIERS)
MAX_HOST_MICROSECONDS = 300.0
# of the time of transfers, on a GPU
LEAST_HIDDEN = 0.95


class PrefetchTraining(Training):
    """The training of `bench_epoch` with histories of one tier.

    Args:
        problem: what to train on, on the device of the layers.
        tier: arguments of `attach_histories`.
        depth: batches ahead.
        dtype: of the tables.
    """

    def __init__(self, problem: Problem, tier: dict[str, Any], depth: int, dtype: torch.dtype, hidden: int) -> None:
        super().__init__(problem, hidden=hidden)
        self.histories = attach_histories(self.model, problem.graph.num_nodes, dtype=dtype, **tier)
        self.depth = depth

    def run_epoch(self) -> list[float]:
        """Trains one epoch; the losses, read at its end."""
        self.loader.epoch = self.epoch = self.epoch + 1
        batches = self.histories.prefetch(self.loader, self.depth)
        return torch.stack([self.step(batch) for batch in batches]).tolist()


def trainings(problem: Problem, dtype: torch.dtype, hidden: int) -> dict[str, PrefetchTraining]:
    """A training for each of `TIERS`."""
    return {name: PrefetchTraining(problem, tier, depth, dtype, hidden) for name, (tier, depth) in TIERS.items()}


def check(problem: Problem, dtype: torch.dtype, hidden: int) -> None:
    """Raises AssertionError if a way gives other losses than tables on the device: every bit must be the same."""
    losses = {}
    for name, training in trainings(problem, dtype, hidden).items():
        losses[name] = [training.run_epoch(), training.run_epoch()]
        training.histories.close()
        assert losses[name] == losses["device"], f"losses of {name} differ from those of tables on the device"


def transfers(histories: Histories) -> Row:
    """What `transfer_stats` says; nothing where nothing is pulled."""
    stats = histories.transfer_stats()
    if not stats["pulls"]:
        return {}
    return {
        "pulled_mib": stats["pull_bytes"] / 2**20, "pull_gbps": stats["pull_bytes"] / stats["pull_seconds"] / 1e9,
        "pulls": stats["pulls"], "misses": stats["misses"], "hidden": stats["hidden_fraction"],
    }  # fmt: skip


def pinned_copy_rate(device: torch.device, nbytes: int = 1 << 28, rounds: int = 10) -> tuple[float, float]:
    """GB/s of plain copies of page-locked memory (to the device, from it): the most that transfers can reach."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    rates = []
    for target, source in ((there, host), (host, there)):
        seconds = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        rates.append(nbytes / statistics.median(seconds) / 1e9)
    return rates[0], rates[1]


class _NoCopies(Inline):
    """A CPU on which moving rows takes no time: what is left is the host's own work."""

    def gather(self, stream: Stream, table: Tensor, ids: Tensor, out: Tensor) -> None:
        # a slot is not initialised, and layers refuse rows that are not finite
        out.zero_()

    def copy_ranges(self, stream: Stream, source: Tensor, target: Tensor, spans: Spans) -> None:
        pass


def host_microseconds(epochs: int = 100) -> float:
    """Host work of a step for prefetching with a 3-layer model, besides the copies: the median over steps.

    On batches of a few rows, planned beforehand: the time that the iterator takes between two steps, and that the
    layers take to exchange rows with their histories, including the packing of these few rows.
    """
    problem = make_problem(200, 1_000, num_parts=8, batch_size=1, cache=None)
    make_problem.cache_clear()
    model = GCN(problem.x.size(1), 8, problem.num_classes, 3)
    histories = attach_histories(model, problem.graph.num_nodes, tier="pinned")
    for store in histories.values():
        store.engine = _engine
    loader = problem.loader()
    spent: list[float] = []

    def timed(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return exchange(*arguments, **options)
            finally:
                spent[-1] += time.perf_counter() - start

        return call

    for store in histories.values():
        store.exchange = timed(store.exchange)  # type: ignore[method-assign]
    for _ in range(epochs):
        batches, start = histories.prefetch(loader), time.perf_counter()
        for batch in batches:
            spent.append(time.perf_counter() - start)
            model(batch.features, batch).sum().backward()
            start = time.perf_counter()
    return 1e6 * statistics.median(spent[len(spent) // 2 :])


_engine = _NoCopies()


def make_group(setting: Setting, dtype: str, made: dict[str, PrefetchTraining]) -> Group:
    """A training with each tier, which is put into `made`; each has trained an epoch."""
    warnings.filterwarnings("ignore", message="there is no CUDA device")  # what the table is about
    problem, hidden = problem_of(setting), hidden_of(setting)
    check(problem, HISTORY_DTYPES[dtype], hidden)
    made |= trainings(problem, HISTORY_DTYPES[dtype], hidden)
    for training in made.values():
        training.run_epoch()
        training.histories.reset_stats()
    return Group(
        ways={name: training.run_epoch for name, training in made.items()},
        tolerance=0.0,
        difference=lambda ours, theirs: max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
    )


def cases(setting: Setting, made: dict[str, PrefetchTraining] | None = None) -> list[Case]:
    """Dtypes of the tables."""
    dtypes = setting.choose(("float32", "int8"), ("float32", "int8"), ("float32",))
    return [
        Case("prefetch", {"dtype": dtype}, functools.partial(make_group, setting, dtype, {} if made is None else made))
        for dtype in dtypes
    ]


def measure(setting: Setting) -> list[Row]:
    """Epochs by tier and what was transferred, the host's work of a step, and on a GPU the rate of plain copies."""
    rows: list[Row] = []
    made: dict[str, PrefetchTraining] = {}
    for case in cases(setting, made):
        found = measure_cases([case], setting)
        for row in found:
            row |= transfers(made[row["way"]].histories)
            if setting.device.type == "cuda" and row["way"] == "pinned, ahead":
                row |= {"target": f">= {100 * LEAST_HIDDEN:g} % hidden", "met": row["hidden"] >= LEAST_HIDDEN}
        for training in made.values():
            training.histories.close()
        made.clear()
        rows += found
    problem = problem_of(setting)
    for row in rows:
        row |= {"nodes": problem.graph.num_nodes, "edges": problem.graph.num_edges, "partition": problem.partition}
        row |= {"layers": NUM_LAYERS, "width": hidden_of(setting)}
    microseconds = host_microseconds(setting.choose(100, 30, 3))
    rows.append({
        "op": "prefetch", "measure": "host work of a step", "way": OURS, "ms": microseconds / 1e3,
        "target": f"<= {MAX_HOST_MICROSECONDS:g} us", "met": microseconds <= MAX_HOST_MICROSECONDS,
    })  # fmt: skip
    if setting.device.type == "cuda":
        rates = pinned_copy_rate(setting.device)
        for name, rate in zip(("to the device", "from the device"), rates, strict=True):
            rows.append({"op": "prefetch", "measure": "copy of page-locked memory", "way": name, "gbps": rate})
    return rows


def test_epoch(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

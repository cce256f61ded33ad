"""A training epoch with histories on the device, in host memory and in files; rows fetched ahead, and when asked for.

On a GPU this shows how much of the transfers is hidden. On a CPU nothing runs beside a step, so all of their time is
exposed, and what shows is what copying rows costs over reading them in place.

    python -m bench.bench_prefetch                 epochs interleaved; on the GPU where there is one
    python -m bench.bench_prefetch --dtype int8    int8 tables
    pytest bench/bench_prefetch.py                 pytest-benchmark, one case after another
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.bench_epoch import HIDDEN, NUM_LAYERS, Problem, Training, make_problem
from bench.side_by_side import interleave, machine, ratio, report
from gas_triton import Histories, attach_histories
from gas_triton.doctor import device_name
from gas_triton.history.device import Inline, Spans, Stream
from gas_triton.models import GCN
from gas_triton.training import HISTORY_DTYPES

# name -> (arguments of attach_histories, batches ahead)
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "device": ({"tier": "device"}, 1),
    "pinned, ahead": ({"tier": "pinned"}, 1),
    "pinned, when asked": ({"tier": "pinned"}, 0),
    "pinned, in place": ({"tier": "pinned", "in_place": True}, 1),
    "file, ahead": ({"tier": "file"}, 1),
    "file, when asked": ({"tier": "file"}, 0),
}
MAX_HOST_MICROSECONDS = 300.0


def move(problem: Problem, device: torch.device) -> Problem:
    """The problem on another device."""
    tensors = {name: getattr(problem, name).to(device) for name in ("graph", "x", "y", "train_mask")}
    return dataclasses.replace(problem, **tensors)


class PrefetchTraining(Training):
    """The training of `bench_epoch` with histories of one tier.

    Args:
        problem: what to train on, on the device of the layers.
        tier: arguments of `attach_histories`.
        depth: batches ahead.
        dtype: of the tables.
    """

    def __init__(
        self, problem: Problem, tier: dict[str, Any], depth: int, dtype: torch.dtype, hidden: int = HIDDEN
    ) -> None:
        super().__init__(problem, hidden=hidden)
        device = problem.x.device
        self.model.to(device)
        self.histories = attach_histories(self.model, problem.graph.num_nodes, dtype=dtype, **tier)
        self.depth = depth

    def run_epoch(self) -> list[float]:
        """Trains one epoch; the losses, read at its end."""
        self.loader.epoch = self.epoch = self.epoch + 1
        batches = self.histories.prefetch(self.loader, self.depth)
        return torch.stack([self.step(batch) for batch in batches]).tolist()


def trainings(
    problem: Problem, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN
) -> dict[str, PrefetchTraining]:
    """A training for each of `WAYS`."""
    return {name: PrefetchTraining(problem, tier, depth, dtype, hidden) for name, (tier, depth) in WAYS.items()}


def check(problem: Problem, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN) -> None:
    """Raises AssertionError if a way gives other losses than tables on the device: every bit must be the same."""
    losses = {}
    for name, training in trainings(problem, dtype, hidden).items():
        losses[name] = [training.run_epoch(), training.run_epoch()]
        training.histories.close()
        assert losses[name] == losses["device"], f"losses of {name} differ from those of tables on the device"


def transfers(histories: Histories) -> str:
    """What `transfer_stats` says, for a reader."""
    stats = histories.transfer_stats()
    if not stats["pulls"]:
        return "nothing pulled"
    rate = stats["pull_bytes"] / stats["pull_seconds"] / 1e9
    return (
        f"{stats['pull_bytes'] / 2**20:.1f} MiB pulled at {rate:.2f} GB/s, {stats['misses']} of {stats['pulls']} pulls "
        f"when asked, {stats['hidden_fraction']:.1%} of {stats['pull_seconds'] * 1e3:.1f} ms hidden"
    )


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


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
def test_losses_agree() -> None:
    check(make_problem())


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
@pytest.mark.parametrize("name", list(WAYS))
def test_epoch(benchmark: BenchmarkFixture, name: str) -> None:
    benchmark.group = f"epoch of a {NUM_LAYERS}-layer GCN, {HIDDEN} wide, by tier"
    tier, depth = WAYS[name]
    training = PrefetchTraining(make_problem(), tier, depth, torch.float32)
    benchmark.pedantic(training.run_epoch, rounds=3, warmup_rounds=1)
    benchmark.extra_info |= training.histories.transfer_stats()
    training.histories.close()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=HISTORY_DTYPES, default="float32", help="of the tables")
    parser.add_argument("--nodes", type=int, default=100_000, help="20 directed edges a node")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # what the table is about
    warnings.filterwarnings("ignore", message="there is no CUDA device")
    print(machine())
    print(f"host work of a step for prefetching, 3 layers, besides the copies: {host_microseconds():.0f} us "
          f"(target <= {MAX_HOST_MICROSECONDS:g} us)")  # fmt: skip
    if device.type == "cuda":
        up, down = pinned_copy_rate(device)
        print(f"{device_name(device)}; copies of page-locked memory: {up:.1f} GB/s to it, {down:.1f} GB/s from it")
    dtype = HISTORY_DTYPES[arguments.dtype]
    problem = move(make_problem(arguments.nodes, 20 * arguments.nodes), device)
    check(problem, dtype)
    ways = trainings(problem, dtype)
    seconds = interleave({name: training.run_epoch for name, training in ways.items()}, arguments.rounds, warmup=1)
    title = (
        f"\nepoch of a {NUM_LAYERS}-layer GCN, {HIDDEN} wide, {arguments.dtype} tables, {problem.graph.num_nodes} "
        f"nodes, {problem.graph.num_edges} edges with self loops, {problem.batch_size} of {problem.parts.num_parts} "
        "clusters a batch"
    )
    print(report(title, seconds, "device"))
    for name, training in ways.items():
        print(f"  {name}: {transfers(training.histories)}")
        training.histories.close()
    print(f"  pinned, when asked / ahead: {ratio(seconds, 'pinned, when asked', 'pinned, ahead'):.2f}x")


if __name__ == "__main__":
    main()

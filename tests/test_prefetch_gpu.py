"""Prefetching on a GPU: slow streams change no bit, and no step waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gas_triton import Batch
from gas_triton.history.cuda import Cuda
from gas_triton.history.device import Event, Spans, Stream
from gas_triton.models import GCN

from .prefetch_runs import (
    SCENARIOS,
    TIERS,
    Training,
    assert_same,
    attach,
    loader_of,
)


class Slow(Cuda):
    """Sleeps on a stream at each of its boundaries, so that what is not ordered goes wrong."""

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device)
        self._random = random.Random(seed)

    def _sleep(self, stream: Stream) -> None:
        with torch.cuda.stream(self._stream(stream)):
            # up to about a millisecond, several times a step of so small a model
            torch.cuda._sleep(self._random.choice([0, 20_000, 200_000, 2_000_000]))

    def record(self, stream: Stream) -> Event:
        self._sleep(stream)
        return super().record(stream)

    def wait(self, stream: Stream, event: Event, edge: str) -> None:
        self._sleep(stream)
        super().wait(stream, event, edge)
        self._sleep(stream)

    def run(self, stream: Stream, make: Callable[[], Any]) -> Any:
        self._sleep(stream)
        return super().run(stream, make)

    def gather(self, stream: Stream, table: Tensor, ids: Tensor, out: Tensor) -> None:
        self._sleep(stream)
        super().gather(stream, table, ids, out)
        self._sleep(stream)

    def copy_ranges(self, stream: Stream, source: Tensor, target: Tensor, spans: Spans) -> None:
        self._sleep(stream)
        super().copy_ranges(stream, source, target, spans)
        self._sleep(stream)


class OnGpu(Training):
    """The same on a GPU, where the graph may be too."""

    def __init__(self, depth: int, make: Callable[[torch.device], Cuda] | None = None, **options: Any) -> None:
        order, dtype = options.pop("order", "strict"), options.pop("dtype", torch.float32)
        tier, graph_device = options.pop("tier", "pinned"), options.pop("graph_device", "cuda")
        torch.manual_seed(0)
        self.depth, self.order = depth, order
        self.model = GCN(6, 8, 4, 3, dropout=0.5, normalize=False).cuda()
        self.loader = loader_of(graph_device, options.pop("tensor_device", None), **options)
        self.histories = attach(self.model, dtype=dtype, **TIERS[tier])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.log = []
        if make is not None:
            engine = make(next(iter(self.histories.values())).device)
            for store in self.histories.values():
                store.engine = engine
            self.histories._stage()

    def forward(self, batch: Batch) -> Tensor:
        # without prefetching nobody has brought it
        batch = batch.to("cuda")
        # made on the layers' stream from what was planned on another
        self.log.append(batch.edge_ids.double().mean())
        return super().forward(batch)

    def state(self) -> list[Tensor]:
        return [tensor.cpu() for tensor in super().state()]


@pytest.mark.gpu
@pytest.mark.parametrize("tensor_device", ["cpu", "cuda"])
@pytest.mark.parametrize("graph_device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_fifty_steps_on_a_slow_gpu_are_those_without_prefetching(
    tier: str, dtype: torch.dtype, graph_device: str, tensor_device: str
) -> None:
    results = []
    for depth, make in ((0, None), (1, lambda device: Slow(device, 1)), (2, lambda device: Slow(device, 2))):
        where = {"graph_device": graph_device, "tensor_device": tensor_device}
        training = OnGpu(depth, make, tier=tier, dtype=dtype, batch_size=2, **where)
        for _ in range(17):
            training.epoch()
        results.append(training.state())
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.gpu
@pytest.mark.parametrize("tier", TIERS)
def test_stale_steps_on_a_slow_gpu_are_repeatable(tier: str) -> None:
    results = []
    for make in (Cuda, lambda device: Slow(device, 1), lambda device: Slow(device, 2)):
        training = OnGpu(1, make, tier=tier, order="stale")
        for _ in range(10):
            training.epoch()
        results.append(training.state())
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.gpu
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whatever_happens_on_a_slow_gpu_results_are_those_without_prefetching(scenario: str) -> None:
    results = []
    for depth, make in ((0, None), (1, lambda device: Slow(device, 3))):
        training = OnGpu(depth, make)
        SCENARIOS[scenario](training)
        results.append(training.state())
    assert_same(*results)


@pytest.mark.gpu
def test_features_that_a_model_does_not_ask_for_are_not_sliced() -> None:
    assert all("x" not in batch._sliced for batch in OnGpu(1).prefetch())


@pytest.mark.gpu
def test_layers_may_run_on_a_stream_that_the_loop_does_not() -> None:
    expected, training = OnGpu(0), OnGpu(1, lambda device: Slow(device, 4))
    own = torch.cuda.Stream()
    torch.manual_seed(1)
    for _ in range(8):
        expected.epoch()
    torch.manual_seed(1)
    for _ in range(8):
        for batch in training.prefetch():
            with torch.cuda.stream(own):
                training.step(batch)
    torch.cuda.synchronize()
    assert_same(training.state(), expected.state())


@pytest.mark.gpu
def test_time_is_counted() -> None:
    training = OnGpu(1)
    training.epoch()
    stats = training.histories.transfer_stats()
    assert stats["pull_seconds"] > 0.0
    assert 0.0 <= stats["hidden_fraction"] <= 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["device", "pinned", "in_place"])
def test_a_step_does_not_wait_for_the_gpu(tier: str) -> None:
    # groups that repeat are planned once: planning has to know sizes, and waits for them
    training = OnGpu(1, tier=tier, shuffle=False)
    for _ in range(2):
        training.epoch()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    batches = training.prefetch()
    training.step(next(batches))
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches:
            training.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(bool(loss.isfinite()) for loss in training.log)

"""Whatever happens in the middle of an epoch, results are those without prefetching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gas_triton import Batch, HistoryStore
from gas_triton.history.device import Inline, Stream

from .prefetch_runs import (
    ENGINES,
    SCENARIOS,
    Stop,
    Training,
    assert_same,
    stop,
    without_prefetching,
)


@pytest.mark.parametrize("engine, depth, tier", [("inline", 1, "file"), ("late", 1, "pinned"), ("random", 2, "pinned")])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whatever_happens_results_are_those_without_prefetching(
    scenario: str, engine: str, depth: int, tier: str
) -> None:
    expected, training = without_prefetching(scenario), Training(depth, ENGINES[engine](), tier)
    SCENARIOS[scenario](training)
    assert_same(training.state(), expected)
    staging = training.histories._staging
    assert staging is not None
    assert len(staging._slots) <= 4
    assert getattr(staging.device, "races", []) == []


class Interrupting(Inline):
    """Raises at one call of `gather` or `copy_ranges`, before it, in the middle or after it."""

    def __init__(self, method: str, number: int, when: str) -> None:
        self.method, self.number, self.when = method, number, when
        self.is_done_with = False

    def gather(self, stream: Stream, table: Tensor, ids: Tensor, out: Tensor) -> None:
        half = ids.numel() // 2
        self._interrupt(
            "gather",
            lambda: super(Interrupting, self).gather(stream, table, ids, out),
            lambda: super(Interrupting, self).gather(stream, table, ids[:half], out[:half]),
        )

    def copy_ranges(self, stream: Stream, source: Tensor, target: Tensor, spans: Any) -> None:
        self._interrupt(
            "copy_ranges",
            lambda: super(Interrupting, self).copy_ranges(stream, source, target, spans),
            lambda: super(Interrupting, self).copy_ranges(stream, source, target, spans[:1]),
        )

    def _interrupt(self, method: str, whole: Callable[[], None], half: Callable[[], None]) -> None:
        self.number -= method == self.method
        if self.number >= 0 or method != self.method or self.is_done_with:
            whole()
            return
        self.is_done_with = True
        if self.when != "before":
            whole() if self.when == "after" else half()
        raise KeyboardInterrupt


def interrupted(t: Training, num_epochs: int = 4) -> tuple[int, list[int]]:
    """Trains until it is interrupted, and a little longer: (steps before, pushes before) the interrupt."""
    where = None
    for _ in range(num_epochs):
        try:
            t.epoch()
        except KeyboardInterrupt:
            assert where is None
            where = len(t.log), [store.pushes for store in t.histories.values()]
    assert where is not None
    return where


@pytest.mark.parametrize("when", ["before", "half", "after"])
@pytest.mark.parametrize("number", range(6))
def test_an_interrupted_push_leaves_what_it_leaves_without_prefetching(number: int, when: str) -> None:
    expected = Training(0, Interrupting("copy_ranges", number, when))
    where = interrupted(expected)
    for depth in (1, 2):
        training = Training(depth, Interrupting("copy_ranges", number, when))
        assert interrupted(training) == where
        assert_same(training.state(), expected.state())


@pytest.mark.parametrize("when", ["before", "half", "after"])
@pytest.mark.parametrize("tier, number", [*(("pinned", number) for number in range(7)), ("file", 3), ("file", 6)])
def test_an_interrupted_pull_leaves_nothing_behind(tier: str, number: int, when: str) -> None:
    training = Training(1, Interrupting("gather", number, when), tier, torch.int8)
    steps, pushes = interrupted(training)
    # without prefetching: interrupted at the same point of the same step
    expected = Training(0, dtype=torch.int8)
    for store in expected.histories.values():
        store.exchange = _until(expected, store, steps, pushes)
    is_over = False
    for _ in range(4):
        try:
            for batch in expected.prefetch():
                if not is_over and _is_reached(expected, steps, pushes):
                    raise KeyboardInterrupt
                expected.step(batch)
        except KeyboardInterrupt:
            is_over = True
            for store in expected.histories.values():
                del store.exchange
    assert_same(training.state(), expected.state())
    assert training.histories._staging is not None
    assert len(training.histories._staging._slots) <= 4


def _is_reached(t: Training, steps: int, pushes: list[int]) -> bool:
    return len(t.log) == steps and [store.pushes for store in t.histories.values()] == pushes


def _until(t: Training, store: HistoryStore, steps: int, pushes: list[int]) -> Callable[..., Any]:
    exchange = store.exchange

    def until(*args: Any, **kwargs: Any) -> Any:
        halo = exchange(*args, **kwargs)
        if _is_reached(t, steps, pushes):
            raise KeyboardInterrupt
        return halo

    return until


@pytest.mark.parametrize("number", range(1, 8, 2))
@pytest.mark.parametrize("depth", [1, 2])
def test_an_interrupted_plan_leaves_nothing_behind(depth: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(depth)
    plan, calls = training.loader._planner.plan, iter(range(100))

    def stop(*args: Any) -> Batch:
        batch = plan(*args)
        if next(calls) == number:
            raise KeyboardInterrupt
        return batch

    monkeypatch.setattr(training.loader._planner, "plan", stop)
    steps, _ = interrupted(training)
    expected = Training(0)
    for epoch in range(4):
        for batch in expected.prefetch():
            if epoch == number // 3 and len(expected.log) == steps:
                break
            expected.step(batch)
    assert_same(training.state(), expected.state())


def test_after_a_caught_exception_rows_are_not_those_of_the_batch_before() -> None:
    # PyGAS left the pulls of the failed step in its queue, and gave them to the next batch without a word.
    training = Training(1)
    training.epoch()
    failed = next(batches := training.prefetch())
    hook = training.model.convs[1].register_forward_pre_hook(lambda *_: stop(failed.x))
    with pytest.raises(Stop):
        training.step(failed)
    hook.remove()
    del batches
    for batch in training.prefetch():
        for store in training.histories.values():
            halo = store.exchange(torch.zeros(batch.num_nodes, store.dim), batch, push=False)
            assert torch.equal(halo, store.pull(batch.halo_ids))
            assert not torch.equal(halo, store.pull(failed.halo_ids)[: len(halo)])

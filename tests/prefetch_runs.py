"""Training runs with histories, and what can happen in the middle of one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gas_triton import Batch, ClusterLoader, Histories, attach_histories, inference, random_partition
from gas_triton.history.device import Device, Inline
from gas_triton.models import GCN

from .fake_device import Fake
from .reference import GRAPHS

NUM_ROWS = 30
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]
TIERS: dict[str, dict[str, Any]] = {
    "device": {"tier": "device"},
    "pinned": {"tier": "pinned"},
    "in_place": {"tier": "pinned", "in_place": True},
    "file": {"tier": "file"},
}


def loader_of(device: str = "cpu", tensor_device: str | None = None, **options: Any) -> ClusterLoader:
    graph = GRAPHS["weighted_symmetric"].graph()
    parts = random_partition(graph, 6)
    draw = torch.Generator().manual_seed(9)
    x, y = torch.randn(NUM_ROWS, 6, generator=draw), torch.randint(4, (NUM_ROWS,), generator=draw)
    x, y = x.to(tensor_device or device), y.to(tensor_device or device)
    options = {"batch_size": 2, "seed": 5, "x": x, "y": y, **options}
    return ClusterLoader(parts.permute(graph).to(device), parts, **options)


def attach(model: torch.nn.Module, **options: Any) -> Histories:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="there is no CUDA device")
        return attach_histories(model, NUM_ROWS, **options)


class Training:
    """A model with dropout, Adam and histories, and everything that a bit could show in.

    Args:
        depth: of `Histories.prefetch`.
        engine: the device, `Inline` if None.
        tier: a key of `TIERS`.
        dtype: of the tables.
        order: of `Histories.prefetch`.
        **options: of the loader.
    """

    def __init__(
        self,
        depth: int = 1,
        engine: Device | None = None,
        tier: str = "pinned",
        dtype: torch.dtype = torch.float32,
        order: str = "strict",
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.depth, self.order = depth, order
        self.model = GCN(6, 8, 4, 3, dropout=0.5, normalize=False)
        self.loader = loader_of(**options)
        self.histories = attach(self.model, dtype=dtype, **TIERS[tier])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.log: list[Tensor] = []
        if engine is not None:
            for store in self.histories.values():
                store.engine = engine
            self.histories._stage()

    def prefetch(self) -> Iterator[Batch]:
        return iter(self.histories.prefetch(self.loader, self.depth, self.order))

    def forward(self, batch: Batch) -> Tensor:
        loss = F.cross_entropy(self.model(batch.x, batch), batch.y)
        self.log.append(loss.detach())
        return loss

    def step(self, batch: Batch) -> None:
        loss = self.forward(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def epoch(self, num_batches: int | None = None) -> None:
        for batch in islice(self.prefetch(), num_batches):
            self.step(batch)

    def state(self) -> list[Tensor]:
        found = [*self.log, *(p.detach() for p in self.model.parameters())]
        for store in self.histories.values():
            found += [store.table, store.age(), store.clock, *([] if store.scale is None else [store.scale])]
        return [tensor.clone() for tensor in found]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for place, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), f"tensor {place} of {len(left)} differs"


class Stop(BaseException):
    """As KeyboardInterrupt, but of this test."""


def raise_in_forward(place: int) -> Callable[[Training], None]:
    def scenario(t: Training) -> None:
        def stop(*_: Any) -> None:
            if len(t.log) == 4:
                raise Stop

        hook = t.model.convs[place].register_forward_hook(stop)
        t.epoch()
        with pytest.raises(Stop):
            t.epoch()
        hook.remove()
        t.epoch()

    return scenario


def skip_failed_steps(t: Training) -> None:
    def stop(*_: Any) -> None:
        if len(t.log) % 2:
            raise Stop

    hook = t.model.convs[1].register_forward_hook(stop)
    for _ in range(3):
        for batch in t.prefetch():
            try:
                t.step(batch)
            except Stop:
                t.log.append(torch.zeros(()))
                # and once more
                t.step(batch)
    hook.remove()
    t.epoch()


def raise_in_backward(t: Training) -> None:
    t.epoch()
    batches = t.prefetch()
    loss = t.forward(next(batches))
    loss.register_hook(stop)
    with pytest.raises(Stop):
        loss.backward()
    del batches, loss
    t.epoch()


def stop(_: Tensor) -> None:
    raise Stop


def leave(t: Training) -> None:
    for num_batches in (1, 2, 3, 1):
        t.epoch(num_batches)
    t.epoch()


def leave_before_the_forward(t: Training) -> None:
    t.epoch()
    next(t.prefetch())
    t.epoch()


def suspend(t: Training) -> None:
    kept = t.prefetch()
    t.step(next(kept))
    t.epoch()
    t.step(next(kept))
    t.epoch(2)
    for batch in kept:
        t.step(batch)
    t.epoch()


def interleave(t: Training) -> None:
    t.epoch(2)
    for first, second in zip(t.prefetch(), t.prefetch(), strict=True):
        t.step(first)
        t.step(second)
    t.epoch()


def interleave_unevenly(t: Training) -> None:
    first, second = t.prefetch(), t.prefetch()
    for place in (0, 0, 1, 0, 1, 1):
        t.step(next((first, second)[place]))
    t.epoch()


def evaluate(t: Training) -> None:
    for batch in t.prefetch():
        for other in (batch, t.loader.batch([0, 3]), batch):
            t.model.eval()
            with torch.no_grad():
                t.log.append(t.model(other.x, other))
            t.model.train()
        t.step(batch)
        t.log.append(inference(t.model, t.loader))


def train_another(when: str) -> Callable[[Training], None]:
    def scenario(t: Training) -> None:
        t.epoch()
        for clusters in ([0, 1], [2, 3, 4]):
            for batch in t.prefetch():
                other = t.loader.batch(clusters)
                if when == "before":
                    t.step(other)
                loss = t.forward(batch)
                if when == "between":
                    # in place of the step's own
                    t.forward(other)
                t.optimizer.zero_grad()
                loss.backward()
                t.optimizer.step()
                if when == "after":
                    t.step(other)

    return scenario


def forward_twice(t: Training) -> None:
    t.epoch()
    for batch in t.prefetch():
        first, second = t.forward(batch), t.forward(batch)
        (first + second).backward()
        t.optimizer.step()
        t.optimizer.zero_grad()


def another_then_twice(t: Training) -> None:
    t.epoch()
    for batch in t.prefetch():
        t.step(t.loader.batch([0, 2, 4]))
        t.step(batch)
        # rows fetched ahead are as old now as they were before
        t.step(batch)


def train_an_older_batch(t: Training) -> None:
    before: Batch | None = None
    for batch in t.prefetch():
        t.step(batch)
        if before is not None:
            t.step(before)
        before = batch


def reset(t: Training) -> None:
    t.epoch()
    for place, batch in enumerate(t.prefetch()):
        if place == 1:
            t.histories.reset()
        t.step(batch)
        if place == 1:
            t.histories.reset()
    t.epoch()


def load(t: Training) -> None:
    t.epoch(2)
    saved = copy.deepcopy(t.histories.state_dict())
    t.epoch()
    for batch in t.prefetch():
        t.step(batch)
        t.histories.load_state_dict(saved)
    t.epoch()


def push_without_reading(t: Training) -> None:
    for batch in t.prefetch():
        for store in t.histories.values():
            other = t.loader.batch([batch.clusters[0], (batch.clusters[0] + 1) % 6])
            store.push(torch.full((other.num_nodes, store.dim), 0.5, device=other.device), other)
        t.step(batch)


SCENARIOS: dict[str, Callable[[Training], None]] = {
    **{f"raise_in_forward_{place}": raise_in_forward(place) for place in range(3)},
    **{f"train_another_{when}": train_another(when) for when in ("before", "between", "after")},
    **{
        scenario.__name__: scenario
        for scenario in (
            skip_failed_steps, raise_in_backward, leave, leave_before_the_forward, suspend, interleave,
            interleave_unevenly, evaluate, forward_twice, another_then_twice, train_an_older_batch, reset, load,
            push_without_reading,
        )
    },
}  # fmt: skip


@cache
def without_prefetching(scenario: str) -> list[Tensor]:
    training = Training(0)
    SCENARIOS[scenario](training)
    return training.state()


ENGINES: dict[str, Callable[[], Device]] = {
    "inline": Inline,
    "late": lambda: Fake(pace=0.0),
    "random": lambda: Fake(7, pace=0.4),
}

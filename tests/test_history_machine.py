"""Histories against a dictionary of rows, in whatever order their methods are called."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from gas_triton import Batch, Histories, HistoryStore
from gas_triton.history.device import Inline

from .fake_device import Fake
from .test_history import make_loader

NUM_ROWS = 30
DIMS = {"conv2": 3, "conv3": 5}
CLUSTERS = st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True)


@dataclass
class Rows:
    """What a history should hold: rows, when each was pushed, and how many pushes there were."""

    values: np.ndarray
    pushed: dict[int, int] = field(default_factory=dict)
    clock: int = 0

    def ages(self) -> list[int]:
        return [self.clock - self.pushed[row] if row in self.pushed else -1 for row in range(NUM_ROWS)]


class HistoryMachine(RuleBasedStateMachine):
    """Steps, failures and everything else that may happen to the histories of a model of three layers."""

    @initialize(
        seed=st.none() | st.integers(0, 99),
        tier=st.sampled_from(["pinned", "pinned", "in_place", "device"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
        batch_size=st.integers(1, 3),
    )
    def attach(self, seed: int | None, tier: str, dtype: torch.dtype, batch_size: int) -> None:
        # tables on the device are written at once
        self.engine = Inline() if seed is None or tier == "device" else Fake(seed)
        self.loader = make_loader("symmetric", batch_size=batch_size)
        self.is_staged = tier == "pinned"
        stores = {}
        for name, dim in DIMS.items():
            options: dict[str, Any] = {"in_place": True, "tier": "pinned"} if tier == "in_place" else {"tier": tier}
            stores[name] = HistoryStore(NUM_ROWS, dim, dtype, name=name, **options)
            stores[name].engine = self.engine
        self.histories = Histories(stores)
        self.nbytes = self.histories.nbytes
        self.model = {name: Rows(np.zeros((NUM_ROWS, dim))) for name, dim in DIMS.items()}
        self.saved: tuple[dict[str, Any], dict[str, Rows]] | None = None
        self.batches: Iterator[Batch] | None = None
        self.suspended: list[tuple[Any, ...]] = []
        self.num_steps = self.num_writes = 0
        self.batch: Batch | None = None
        self.order, self.depth = "strict", 0
        # in stale order: the tables that this batch's rows were fetched from, and those of the next one's and when the
        # host last wrote them
        self.read: dict[str, np.ndarray] | None = None
        self.ahead: tuple[dict[str, np.ndarray], int] | None = None

    def tables(self) -> dict[str, np.ndarray]:
        return {name: rows.values.copy() for name, rows in self.model.items()}

    # --- epochs -------------------------------------------------------------------------------------------------------

    @rule(depth=st.integers(0, 3), order=st.sampled_from(["strict", "strict", "stale"]), suspends=st.booleans())
    def begin(self, depth: int, order: str, suspends: bool) -> None:
        if self.batches is not None and suspends:
            self.suspended.append((self.batches, self.depth, self.order, self.ahead, self.num_steps))
        self.leave()
        self.batches, self.depth, self.order = iter(self.histories.prefetch(self.loader, depth, order)), depth, order

    @precondition(lambda self: self.batches is not None)
    @rule()
    def advance(self) -> None:
        self.batch = next(self.batches, None)
        self.num_steps += 1
        if self.batch is None:
            self.leave()
            return
        is_stale = self.order == "stale" and self.depth > 0 and self.is_staged
        now = self.tables() if is_stale else None
        # outdated rows are read anew by each layer, as they are then
        self.read = now if self.ahead is None else self.ahead[0] if self.ahead[1] == self.num_writes else None
        self.ahead = None if now is None else (now, self.num_writes)

    @rule()
    def leave(self) -> None:
        self.batches = self.batch = self.read = self.ahead = None

    @precondition(lambda self: self.suspended)
    @rule()
    def resume(self) -> None:
        """Goes on with an epoch that another one interrupted, which is left."""
        self.leave()
        self.batches, self.depth, self.order, ahead, num_steps = self.suspended.pop()
        # what it had fetched is lost if the other one took a step
        self.ahead = ahead if num_steps == self.num_steps else None
        self.advance()

    # --- steps --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.batch is not None)
    @rule(seed=st.integers(0, 2**16), fails_at=st.sampled_from([None, None, 0, 1]))
    def step(self, seed: int, fails_at: int | None) -> None:
        assert self.batch is not None
        self.forward(self.batch, seed, fails_at)

    @rule(clusters=CLUSTERS, seed=st.integers(0, 2**16), fails_at=st.sampled_from([None, None, 0, 1]))
    def train_another(self, clusters: list[int], seed: int, fails_at: int | None) -> None:
        self.forward(self.loader.batch(clusters), seed, fails_at)

    @rule(clusters=st.none() | CLUSTERS)
    def evaluate(self, clusters: list[int] | None) -> None:
        batch = self.batch if clusters is None else self.loader.batch(clusters)
        for store in self.histories.values() if batch is not None else ():
            self.exchange(store, batch, None, push=False)

    @rule(clusters=CLUSTERS, seed=st.integers(0, 2**16), layer=st.sampled_from(list(DIMS)))
    def push(self, clusters: list[int], seed: int, layer: str) -> None:
        batch = self.loader.batch(clusters)
        x = self.draw(batch, DIMS[layer], seed)
        self.histories[layer].push(x, batch)
        self.note(layer, x, batch)

    def forward(self, batch: Batch, seed: int, fails_at: int | None) -> None:
        # a backward reads the halo rows again, and must find them as they were
        kept: list[tuple[Tensor, Tensor]] = []
        for place, (name, store) in enumerate(self.histories.items()):
            if place == fails_at:
                return
            halo = self.exchange(store, batch, self.draw(batch, DIMS[name], seed + place), push=True)
            if halo is not None and not store.in_place:
                kept.append((halo, halo.clone()))
        for halo, before in kept:
            assert torch.equal(halo, before)

    def exchange(self, store: HistoryStore, batch: Batch, x: Tensor | None, push: bool) -> Tensor | None:
        values = self.model[store.name].values
        is_current = self.batch is not None and batch.halo_ids is self.batch.halo_ids
        if self.read is not None and is_current:
            values = self.read[store.name]
        rows = torch.zeros(batch.num_nodes, store.dim) if x is None else x
        halo = store.exchange(rows, batch, push=push)
        if halo is not None:
            found = halo[batch.halo_ids] if store.in_place else halo
            np.testing.assert_array_equal(found.double().numpy(), values[batch.halo_ids.numpy()])
        if x is not None:
            self.note(store.name, x, batch)
        return halo

    def draw(self, batch: Batch, dim: int, seed: int) -> Tensor:
        # whole numbers that every dtype holds
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-100, 101, (batch.num_nodes, dim), generator=generator).float()

    def note(self, name: str, x: Tensor, batch: Batch) -> None:
        rows = self.model[name]
        rows.clock += 1
        rows.values[batch.node_ids.numpy()] = x.numpy()
        rows.pushed.update(dict.fromkeys(batch.node_ids.tolist(), rows.clock))

    # --- everything else ----------------------------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        self.saved = copy.deepcopy((self.histories.state_dict(), self.model))

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        state, model = copy.deepcopy(self.saved)
        self.histories.load_state_dict(state, self.loader.graph)
        self.model = model
        self.forget_staged()

    @rule()
    def reset(self) -> None:
        self.histories.reset()
        self.model = {name: Rows(np.zeros((NUM_ROWS, dim))) for name, dim in DIMS.items()}
        self.forget_staged()

    def forget_staged(self) -> None:
        # rows fetched before are fetched again, as they are when they are read
        self.num_writes += 1
        self.read = None

    @rule()
    def flush(self) -> None:
        self.histories.flush()
        assert all(store._sources == [] for store in self.histories.values())

    @rule()
    def look(self) -> None:
        for name, store in self.histories.items():
            np.testing.assert_array_equal(store.table.double().numpy(), self.model[name].values)
            np.testing.assert_array_equal(store.pull(torch.arange(4, 9)).double().numpy(), self.model[name].values[4:9])

    @rule()
    def count(self) -> None:
        stats = self.histories.transfer_stats()
        assert stats["misses"] <= stats["pulls"]
        assert stats["pull_bytes"] == 0 or self.is_staged

    # --- always -------------------------------------------------------------------------------------------------------

    @invariant()
    def ages_are_right(self) -> None:
        for name, store in self.histories.items():
            assert store.age().tolist() == self.model[name].ages()
            assert int(store.clock) == self.model[name].clock

    @invariant()
    def nothing_leaks(self) -> None:
        assert self.histories.nbytes == self.nbytes
        staging = self.histories._staging
        assert staging is not None
        assert len(staging._slots) <= 2 * len(DIMS)
        given = {id(slot) for slots in staging._free.values() for slot in slots}
        for ticket in (staging._current, staging._next):
            given |= {id(staged.slot) for staged in ticket.staged.values()} if ticket is not None else set()
        assert given == {id(slot) for slot in staging._slots}

    @invariant()
    def nothing_races(self) -> None:
        assert getattr(self.engine, "races", []) == []

    def teardown(self) -> None:
        if hasattr(self, "histories"):
            self.look()


TestHistories = HistoryMachine.TestCase

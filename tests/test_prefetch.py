"""Prefetching changes no bit, and counts what it moves."""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gas_triton import Batch

from . import reference
from .fake_device import Fake
from .prefetch_runs import (
    DTYPES,
    ENGINES,
    NUM_ROWS,
    TIERS,
    Training,
    assert_same,
    attach,
    loader_of,
)
from .reference import GasReference
from .test_history import WIDTHS, Net, make_loader

# --- on and off ------------------------------------------------------------------------------------------------------


@cache
def after_50_steps(dtype: torch.dtype) -> list[Tensor]:
    training = Training(0, tier="device", dtype=dtype, batch_size=1)
    for _ in range(8):
        training.epoch()
    training.epoch(2)
    assert len(training.log) == 50
    return training.state()


@pytest.mark.parametrize("depths", [(0, 0), (1, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_fifty_steps_are_those_without_prefetching(tier: str, dtype: torch.dtype, depths: tuple[int, int]) -> None:
    training = Training(tier=tier, dtype=dtype, batch_size=1)
    for epoch in range(9):
        training.depth = depths[epoch % 2]
        training.epoch(2 if epoch == 8 else None)
    assert_same(training.state(), after_50_steps(dtype))


def test_stale_rows_are_one_step_older_and_repeatable() -> None:
    results = []
    for tier, engine in [("pinned", None), ("file", None), ("pinned", Fake(1)), ("file", Fake(2)), ("pinned", None)]:
        training = Training(1, engine, tier, order="stale")
        for _ in range(3):
            training.epoch()
        results.append(training.state())
    for result in results[1:]:
        assert_same(result, results[0])
    strict = Training(1)
    for _ in range(3):
        strict.epoch()
    assert not torch.equal(torch.stack(strict.log), torch.stack(results[0][: len(strict.log)]))


class Stale(GasReference):
    """Halo rows as they were before the pushes of the step before; of the first step of an epoch, as they are."""

    def begin(self, is_first: bool) -> None:
        before = [table.clone() for table in self.tables]
        self.read = before if is_first else self.before
        self.before = before

    def forward(self, x: Tensor, node_ids: Any) -> Tensor:
        edges = reference.block(self.graph, node_ids)
        h = x.index_select(0, torch.cat([edges.node_ids, edges.halo_ids]))
        for depth, parameters in enumerate(self.parameters):
            if depth > 0:
                self.tables[depth][edges.node_ids] = h.detach()
                h = torch.cat([h, self.read[depth].index_select(0, edges.halo_ids)])
            h = self.layer(parameters, h, edges)
            h = h.relu() if depth < len(self.parameters) - 1 else h
        return h


@pytest.mark.parametrize("depth", [1, 2])
def test_stale_training_is_that_of_plain_torch(depth: int) -> None:
    model, loader, plain_loader = Net(), make_loader(), make_loader()
    plain = Stale(reference.gcn, [conv.state_dict() for conv in model.convs], WIDTHS[:-1], loader.graph)
    histories = attach(model, tier="pinned", dtype=torch.float64)
    optimizer, plain_optimizer = (torch.optim.Adam(p, lr=0.02) for p in (model.parameters(), plain.leaves()))
    for _ in range(4):
        batches = zip(histories.prefetch(loader, depth, "stale"), plain_loader, strict=True)
        for place, (batch, plain_batch) in enumerate(batches):
            nodes = plain_batch.node_ids.tolist()
            plain.begin(is_first=place == 0)
            losses = (
                F.cross_entropy(model(batch.x, batch), batch.y),
                F.cross_entropy(plain.forward(plain_loader.x, nodes), plain_batch.y),
            )
            for loss, chosen in zip(losses, (optimizer, plain_optimizer), strict=True):
                chosen.zero_grad()
                loss.backward()
                chosen.step()
            torch.testing.assert_close(losses[0].detach(), losses[1].detach())
    for store, table in zip(histories.values(), plain.tables[1:], strict=True):
        torch.testing.assert_close(store.table, table)


def test_each_epoch_has_its_own_order() -> None:
    results = []
    for depth in (0, 1):
        training = Training(depth)
        training.epoch()
        strict = training.prefetch()
        training.step(next(strict))
        training.order = "stale"
        stale = training.prefetch()
        training.step(next(stale))
        for batch in strict:
            training.step(batch)
        results.append(training.state())
    assert_same(*results)


@pytest.mark.parametrize("tier", TIERS)
def test_an_epoch_in_inference_mode_leaves_training_as_it_was(tier: str) -> None:
    def run(training: Training) -> list[Tensor]:
        training.epoch()
        with torch.inference_mode():
            for batch in training.prefetch():
                training.model(batch.x, batch)
        training.epoch()
        return training.state()

    assert_same(run(Training(1, tier=tier)), run(Training(0, tier="device")))


@pytest.mark.parametrize("tier", ["pinned", "in_place"])
def test_a_compiled_model_exchanges_rows_on_the_host_outside_of_its_graphs(tier: str) -> None:
    def run(compile_model: bool) -> list[Tensor]:
        model, loader = Net().float(), make_loader("symmetric")
        histories = attach(model, **TIERS[tier])
        called = torch.compile(model, backend="eager") if compile_model else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in chain(histories.prefetch(loader), histories.prefetch(loader)):
            F.cross_entropy(called(batch.x.float(), batch), batch.y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert histories.transfer_stats()["pushes"] == 2 * 2 * len(loader)
        return [*(p.detach() for p in model.parameters()), *(store.table for store in histories.values())]

    assert_same(run(True), run(False))
    torch.compiler.reset()
    model, loader = Net().float(), make_loader("symmetric")
    attach(model, **TIERS[tier])
    batch = loader.batch([0, 1])
    with pytest.raises(Exception, match="exchanged outside of the graph: use fullgraph=False, or tier='device'"):
        torch.compile(model, backend="eager", fullgraph=True)(batch.x.float(), batch)


# --- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["strict", "stale"])
@pytest.mark.parametrize("tier", ["pinned", "file"])
@pytest.mark.parametrize("engine", ENGINES)
def test_transfers_are_counted(engine: str, tier: str, order: str) -> None:
    training = Training(1, ENGINES[engine](), tier, torch.int8, order)
    batches = list(loader_of()) + list(loader_of(seed=5))
    stats = training.histories.transfer_stats()
    assert (stats["pulls"], stats["pushes"], stats["misses"], stats["hidden_fraction"]) == (0, 0, 0, None)
    training.epoch()
    batches = batches[:3]
    # 8 bytes and a scale a row, two layers
    expected = {
        "pulls": 2 * sum(batch.num_halo > 0 for batch in batches),
        "pull_bytes": 2 * 12 * sum(batch.num_halo for batch in batches),
        "pushes": 2 * 3,
        "push_bytes": 2 * 12 * sum(batch.num_nodes for batch in batches),
        "misses": 0,
    }
    stats = training.histories.transfer_stats()
    assert {key: stats[key] for key in expected} == expected
    assert stats["pull_seconds"] > 0
    assert stats["exposed_seconds"] == pytest.approx(stats["pull_seconds"]) or engine != "inline"
    assert 0.0 <= stats["hidden_fraction"] <= 1.0

    training.histories.reset_stats()
    assert training.histories.transfer_stats()["pulls"] == 0
    # rows that were not fetched ahead are misses
    batch = training.loader.batch([0, 1])
    training.step(batch)
    stats = training.histories.transfer_stats()
    assert (stats["pulls"], stats["misses"], stats["pull_bytes"]) == (2, 2, 2 * 12 * batch.num_halo)
    # no time passes on "compute" of a fake device
    assert stats["hidden_fraction"] == (0.0 if engine == "inline" else None)


def test_times_do_not_pile_up_where_nothing_is_fetched_ahead() -> None:
    training = Training(0)
    for _ in range(3):
        training.epoch()
        assert training.histories["convs.1"].staging._timed == []
    stats = training.histories.transfer_stats()
    assert stats["pulls"] == stats["misses"] == len(training.histories) * len(training.log)
    assert stats["pull_seconds"] == stats["exposed_seconds"] > 0.0


def test_rows_fetched_for_nothing_are_counted_too() -> None:
    training = Training(1)
    training.epoch(2)
    batches = list(loader_of())
    assert training.histories.transfer_stats()["pull_bytes"] == 2 * 32 * sum(batch.num_halo for batch in batches)
    assert training.histories.transfer_stats()["misses"] == 0


@pytest.mark.parametrize("tier", ["device", "in_place"])
def test_tables_read_in_place_are_not_pulled(tier: str) -> None:
    training = Training(1, tier=tier)
    training.epoch()
    stats = training.histories.transfer_stats()
    assert (stats["pulls"], stats["pull_bytes"], stats["misses"]) == (0, 0, 0)
    assert training.histories.memory_stats()["staged"] == 0


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_held_are_counted(dtype: torch.dtype, tier: str) -> None:
    training = Training(1, tier=tier, dtype=dtype)
    row = 8 * dtype.itemsize + 4 * (dtype == torch.int8)
    layer = NUM_ROWS * (row + 4)
    stats = training.histories.memory_stats()
    assert stats["tables"] == {TIERS[tier]["tier"]: 2 * layer}
    assert stats["layers"] == {"convs.1": layer, "convs.2": layer}
    assert stats["staged"] == 0
    for _ in range(5):
        training.epoch()
    staged = training.histories.memory_stats()["staged"]
    if tier in ("device", "in_place"):
        assert staged == 0
    else:
        halos = [batch.num_halo for epoch in range(5) for batch in _epoch(epoch)]
        # two slots a layer, each as large as the largest halo that was in it
        assert 2 * row * (max(halos) + min(halos)) <= staged <= 2 * 2 * row * max(halos)


def _epoch(number: int) -> list[Batch]:
    loader = loader_of()
    loader.epoch = number
    return list(loader)

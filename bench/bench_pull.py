"""Reading a batch's halo rows from a history, by tier and dtype, against stock torch.

    python -m bench.bench_pull            ratios, rounds interleaved
    pytest bench/bench_pull.py            pytest-benchmark, one way after another

What a layer does that transforms its rows before it aggregates: float32 rows [H, F] on the device, of a table that is
narrower in some cases. Nothing is fetched ahead here, so from host tiers this is what a miss costs (`bench_prefetch`
measures epochs). Halo rows lie anywhere in a table of ten times a batch's rows, with ascending ids as batches have
them, or shuffled. The baseline gathers with stock torch where the table is, copies to the device and widens there; for
a GPU it gathers into page-locked memory, by ids that are on the host beforehand.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench import groups
from bench.bench_push import DTYPES, FEATURES, TIERS
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.inputs import make_store, make_tables, random_batch
from bench.roofline import Gather, Traffic, count_reads
from bench.tables import OURS, Row
from gas_triton import Batch
from gas_triton.functional import halo_rows
from gas_triton.history.store import HistoryStore
from gas_triton.kernels.pull import widen

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

INDEX_SELECT = "index_select"
WAYS = (OURS, INDEX_SELECT)


def cases(setting: Setting) -> list[Case]:
    """A case for every tier and dtype, and shuffled ids for float32."""
    num_rows = setting.choose(100_000 if setting.device.type == "cuda" else 25_000, 5_000, 20)

    def case(tier: str, dtype: torch.dtype, order: str) -> Case:
        name = str(dtype).removeprefix("torch.")
        keys = {"tier": tier, "dtype": name, "ids": order, "rows": num_rows, "features": FEATURES}
        return Case("pull", keys, lambda: build(tier, dtype, order, num_rows, setting.device))

    return [
        case(tier, dtype, order)
        for tier in TIERS
        for dtype in DTYPES
        for order in ("ascending", "shuffled")
        if order == "ascending" or dtype == torch.float32
    ]


def build(tier: str, dtype: torch.dtype, order: str, num_rows: int, device: torch.device) -> Group:
    """Our pull and others, from tables with the same rows."""
    batch = random_batch(num_rows, 10, halo_share=0.5, num_nodes=10 * num_rows, device=device)
    generator = torch.Generator(device).manual_seed(1)
    if order == "shuffled":
        batch = copy.copy(batch)
        # what is made of the ids is not shared with the batch they come from
        batch._made = {}
        batch.halo_ids = batch.halo_ids[torch.randperm(batch.num_halo, generator=generator, device=device)]
    shape = (tier, batch.graph_nodes, FEATURES, dtype, device)
    store, (table, scale) = make_store(*shape), make_tables(*shape)
    rows = torch.randn(batch.graph_nodes, FEATURES, generator=generator, device=device)
    if dtype == torch.int8:
        rows = rows.mul_(40.0).round_().clamp_(-127.0, 127.0)
    for target in (store.table, table):
        target.copy_(rows)
    for scales in (store.scale, scale):
        if scales is not None:
            scales.fill_(0.025)
    x = torch.zeros(batch.num_nodes, FEATURES, device=device)
    return Group(
        {
            OURS: functools.partial(pull, store, x, batch),
            INDEX_SELECT: functools.partial(pull_plainly, table, scale, batch),
        },
        traffic=traffic_of(batch, tier, dtype),
    )


def traffic_of(batch: Batch, tier: str, dtype: torch.dtype) -> Traffic:
    """Ids and rows read, and rows written in float32; from the host to a GPU over the bus."""
    row_bytes = FEATURES * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    streamed = batch.num_halo * (8 + 4 * FEATURES)
    if batch.device.type == "cuda" and tier != "device":
        return Traffic(streamed, uploaded=batch.num_halo * row_bytes)
    return Traffic(streamed, [Gather(count_reads(batch.halo_ids, batch.graph_nodes), row_bytes)])


def pull(store: HistoryStore, x: Tensor, batch: Batch) -> Tensor:
    """Ours: what a layer reads, as its rows."""
    history = store.exchange(x, batch, push=False)
    assert history is not None
    return halo_rows(history, batch, torch.float32)


def pull_plainly(table: Tensor, scale: Tensor | None, batch: Batch) -> Tensor:
    """Gathers where the table is, copies to the device, widens."""
    rows = take(table, batch)
    return widen(rows, None if scale is None else take(scale, batch), torch.float32)


def take(table: Tensor, batch: Batch) -> Tensor:
    """Rows of a table or scale on the batch's device, as they are stored."""
    if table.device == batch.device:
        return table.index_select(0, batch.halo_ids)
    rows = torch.empty((batch.num_halo, *table.shape[1:]), dtype=table.dtype, pin_memory=True)
    torch.index_select(table, 0, batch.host_halo_ids, out=rows)
    return rows.to(batch.device, non_blocking=True)


def measure(setting: Setting) -> list[Row]:
    """The rows of all cases."""
    return measure_cases(cases(setting), setting)


def test_pull(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

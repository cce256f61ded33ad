"""Storing a batch's rows in a history, by tier and dtype, against stock torch.

    python -m bench.bench_push            ratios, rounds interleaved
    pytest bench/bench_push.py            pytest-benchmark, one way after another

Rows are float32; a narrower table rounds them, int8 with a scale a row. Ours also looks for rows that are not finite,
and notes when each was pushed; "unchecked" does not look. On a GPU a push to the host counts until the rows are in the
table, though no step waits for that. Baselines are what one writes in torch; the last is PyGAS's, which copies the
clusters of a batch as ranges and moves rows to the host first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench import groups
from bench.groups import Case, Group, Setting, measure_cases, relative_difference, run_with
from bench.inputs import make_store, make_tables, random_batch
from bench.roofline import Traffic
from bench.tables import OURS, Row
from gas_triton import Batch
from gas_triton.history.store import HistoryStore
from gas_triton.kernels.pull import widen
from gas_triton.kernels.push import quantize_ref

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

UNCHECKED, INDEX_PUT, INDEX_COPY, RANGES = "gas_triton, unchecked", "table[ids] = x", "index_copy_", "PyGAS"
WAYS = (OURS, UNCHECKED, INDEX_PUT, INDEX_COPY, RANGES)
TIERS = ("device", "pinned", "file")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
FEATURES = 128
# What a way gives: reads the rows that it stored, in float32.
Reader = Callable[[], Tensor]


def cases(setting: Setting) -> list[Case]:
    """A case for every tier and dtype."""
    is_cuda = setting.device.type == "cuda"
    num_rows = setting.choose(100_000 if is_cuda else 20_000, 5_000, 20)

    def case(tier: str, dtype: torch.dtype) -> Case:
        keys = {"tier": tier, "dtype": str(dtype).removeprefix("torch."), "rows": num_rows, "features": FEATURES}
        return Case("push", keys, lambda: build(tier, dtype, num_rows, setting.device))

    return [case(tier, dtype) for tier in TIERS for dtype in DTYPES]


def build(tier: str, dtype: torch.dtype, num_rows: int, device: torch.device) -> Group:
    """Our push and others, each into a table of its own."""
    batch = random_batch(num_rows, 1, halo_share=0.5, num_nodes=4 * num_rows, device=device)
    x = torch.randn(num_rows, FEATURES, generator=torch.Generator(device).manual_seed(1), device=device)
    shape = (tier, batch.graph_nodes, FEATURES, dtype, device)
    ways: dict[str, Callable[[], Reader]] = {
        OURS: functools.partial(push, make_store(*shape), x, batch),
        UNCHECKED: functools.partial(push, make_store(*shape, nonfinite="allow"), x, batch),
    }
    for name, store in {INDEX_PUT: index_put, INDEX_COPY: index_copy, RANGES: copy_ranges}.items():
        table, scale = make_tables(*shape)
        # on the host beforehand, as a plan would have them
        ids = batch.node_ids.to(table.device)
        ways[name] = functools.partial(push_plainly, store, table, scale, x, ids, batch.spans)
    return Group(ways, traffic=traffic_of(batch, tier, dtype), difference=lambda a, b: relative_difference(a(), b()))


def traffic_of(batch: Batch, tier: str, dtype: torch.dtype) -> Traffic:
    """Rows read, rounded and written, with their ids, push times and scales; from a GPU to the host over the bus."""
    num_rows = batch.num_nodes
    stored = num_rows * (FEATURES * dtype.itemsize + (4 if dtype == torch.int8 else 0))
    read = num_rows * (4 * FEATURES + 8)
    if batch.device.type == "cuda" and tier != "device":
        return Traffic(read, downloaded=stored)
    return Traffic(read + stored + 4 * num_rows)


def push(store: HistoryStore, x: Tensor, batch: Batch) -> Reader:
    """Ours; until rows are in the table, where they leave the GPU."""
    store.push(x, batch)
    if store.tier != "device":
        store.settle()
    return lambda: store.pull(batch.node_ids).float()


def push_plainly(
    store: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    table: Tensor,
    scale: Tensor | None,
    x: Tensor,
    ids: Tensor,
    spans: Tensor,
) -> Reader:
    """Rounds rows where they are, moves them to the table and stores them."""
    if scale is None:
        store(table, x.to(table.dtype).to(table.device), ids, spans)
    else:
        rows, row_scale = quantize_ref(x)
        store(table, rows.to(table.device), ids, spans)
        store(scale, row_scale.to(table.device), ids, spans)

    def read() -> Tensor:
        row_scale = None if scale is None else scale.index_select(0, ids)
        return widen(table.index_select(0, ids), row_scale, torch.float32).to(x.device)

    return read


def index_put(table: Tensor, rows: Tensor, ids: Tensor, spans: Tensor) -> None:
    """Torch's indexing."""
    table[ids] = rows


def index_copy(table: Tensor, rows: Tensor, ids: Tensor, spans: Tensor) -> None:
    """Torch's copy to rows by index."""
    table.index_copy_(0, ids, rows)


def copy_ranges(table: Tensor, rows: Tensor, ids: Tensor, spans: Tensor) -> None:
    """A copy for each cluster."""
    start = 0
    for first, last in spans.tolist():
        table[first:last] = rows[start : start + last - first]
        start += last - first


def measure(setting: Setting) -> list[Row]:
    """The rows of all cases."""
    return measure_cases(cases(setting), setting)


def test_push(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

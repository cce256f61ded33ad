"""The speed of light: what an op moves, what a cache keeps of it, and what a machine can do."""

import json
import math
import sys
from collections import OrderedDict
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from bench import ceilings as ceilings_module
from bench import roofline
from bench.inputs import random_batch
from bench.roofline import Ceilings, Gather, Traffic, aggregate_traffic, lru_bytes, speed_of_light

# 4.3 TB/s of memory, 5.5 TB/s of gathers from a cache of 40 MB: an H100 as it was written about
H100 = Ceilings(4300.0, 5500.0, 40_000_000, 50.0)


# --- what a cache keeps -----------------------------------------------------------------------------------------------


def draw(popularity: str, num_rows: int, num_reads: int, generator: torch.Generator) -> Tensor:
    share = torch.ones(num_rows)
    if popularity == "zipf":
        share = torch.arange(1, num_rows + 1).float().pow(-0.8)
    return torch.multinomial(share, num_reads, replacement=True, generator=generator)


def simulate(trace: list[int], row_bytes: list[int], cache_bytes: int) -> int:
    """Bytes that an LRU cache fetches."""
    cached: OrderedDict[int, None] = OrderedDict()
    used = fetched = 0
    for row in trace:
        if row in cached:
            cached.move_to_end(row)
            continue
        fetched += row_bytes[row]
        used += row_bytes[row]
        cached[row] = None
        while used > cache_bytes:
            used -= row_bytes[cached.popitem(last=False)[0]]
    return fetched


@pytest.mark.parametrize("popularity", ["uniform", "zipf"])
@pytest.mark.parametrize("reads_a_row", [1.4, 6.0])
@pytest.mark.parametrize("cache_share", [0.05, 0.3, 0.7])
def test_lru_is_that_of_a_simulated_cache(popularity: str, reads_a_row: float, cache_share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    wide, narrow = 2000, 3000
    first = draw(popularity, wide, int(wide * reads_a_row), generator)
    second = draw(popularity, narrow, int(narrow * reads_a_row / 2), generator)
    trace = torch.cat([first, wide + second])
    trace = trace[torch.randperm(trace.numel(), generator=generator)]
    cache_bytes = int(cache_share * (512 * wide + 132 * narrow))
    fetched = simulate(trace.tolist(), [512] * wide + [132] * narrow, cache_bytes)
    gathers = [
        Gather(torch.bincount(first, minlength=wide), 512),
        Gather(torch.bincount(second, minlength=narrow), 132),
    ]
    assert lru_bytes(gathers, cache_bytes) == pytest.approx(fetched, rel=0.02)


def test_lru_at_its_ends() -> None:
    gather = Gather(torch.tensor([0, 3, 1, 5]), 10)
    assert lru_bytes([gather], 30) == 30
    assert lru_bytes([gather], 0) == pytest.approx(90)
    assert lru_bytes([gather, Gather(torch.zeros(4, dtype=torch.int64), 10)], 30) == 30
    assert lru_bytes([], 30) == lru_bytes([Gather(torch.zeros(0, dtype=torch.int64), 10)], 30) == 0


# --- what ops move ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "degree", "features", "no_reuse", "cache"),
    [(20_000, 15, 128, 38.7, 27.9), (100_000, 15, 128, 194.0, 140.0)],
)
def test_aggregate_on_an_h100_by_hand(rows: int, degree: int, features: int, no_reuse: float, cache: float) -> None:
    traffic = aggregate_traffic(random_batch(rows, degree), features)
    without_cache = speed_of_light(traffic, replace(H100, cache_bytes=0)).terms
    assert without_cache["memory"] * 1e6 == pytest.approx(no_reuse, rel=0.003)
    assert without_cache["cache"] * 1e6 == pytest.approx(cache, rel=0.003)
    light = speed_of_light(traffic, H100)
    # what the cache keeps lies between every row read once and no reuse at all
    assert traffic.least_bytes / 4.3e6 <= light.terms["memory"] * 1e6 < no_reuse
    assert light.seconds == max(light.terms.values())


def test_forward_and_backward_are_counted_edge_by_edge() -> None:
    batch = random_batch(40, 6, halo_share=0.5, degrees="power law")
    features, (inner, outer) = 8, (batch.inner, batch.outer)
    index = 4 * (inner.rowptr.numel() + outer.rowptr.numel() + inner.num_edges + outer.num_edges)
    traffic = aggregate_traffic(batch, features, torch.bfloat16, torch.int8, backward=True)
    assert traffic.streamed == index + 4 * batch.num_edges + 40 * features * 2
    own, halo = traffic.gathers
    assert (own.row_bytes, halo.row_bytes) == (features * 2, features + 4)
    assert own.reads.tolist() == [inner.col.tolist().count(row) for row in range(40)]
    assert halo.reads.tolist() == [outer.col.tolist().count(row) for row in batch.halo_ids.tolist()]
    distinct = len(set(inner.col.tolist())) * own.row_bytes + batch.num_halo * halo.row_bytes

    back = traffic.then
    assert back is not None
    # rows of the gradient, once for every in-batch edge into the row; nothing of the halo
    assert back.gathers[0].reads.tolist() == inner.rowptr.diff().tolist()
    assert back.streamed == 4 * (41 + inner.num_edges) + 4 * inner.num_edges + 40 * features * 2
    reached = int((inner.rowptr.diff() > 0).sum()) * features * 2
    assert traffic.least_bytes == traffic.streamed + distinct + back.streamed + reached

    unweighted = aggregate_traffic(batch, features, weighted=False)
    assert unweighted.streamed == index + 40 * features * 4
    of_weights = aggregate_traffic(batch, features, backward=True, weight_gradient=True).then
    assert of_weights is not None
    assert of_weights.then is not None
    # the rows of x and of the history again, and a number an edge
    assert [g.reads.sum() for g in of_weights.then.gathers] == [inner.num_edges, outer.num_edges]
    assert of_weights.then.streamed == index + 4 * batch.num_edges + 40 * features * 4


def test_an_extremum_keeps_its_winners() -> None:
    batch = random_batch(40, 6)
    forward = aggregate_traffic(batch, 8, weighted=False, extremum=True)
    both = aggregate_traffic(batch, 8, weighted=False, extremum=True, backward=True)
    assert both.streamed == forward.streamed + 40 * 8 * 4
    assert both.then == Traffic(40 * 8 * 4 * 3)


def test_without_halo_there_is_one_gather() -> None:
    traffic = aggregate_traffic(random_batch(40, 6, halo_share=0.0), 8)
    assert [int(gather.reads.sum()) for gather in traffic.gathers] == [240]
    assert traffic.streamed == 4 * (41 + 240) + 4 * 240 + 40 * 8 * 4


# --- the least time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traffic", "bound", "seconds"),
    [
        (Traffic(43_000_000), "memory", 1e-5),
        (Traffic(0, [Gather(torch.full((1000,), 5500), 1000)]), "cache", 1e-3),
        (Traffic(1000, flops=10**9), "matmul", 2e-5),
        (Traffic(1000, uploaded=25 * 10**6, downloaded=10**6), "link", 1e-3),
    ],
)
def test_the_slowest_limit_counts(traffic: Traffic, bound: str, seconds: float) -> None:
    limits = replace(H100, upload_gbps=25.0, download_gbps=20.0)
    light = speed_of_light(traffic, limits)
    assert light.bound == bound
    assert light.seconds == pytest.approx(seconds)


def test_parts_that_follow_each_other_add_up() -> None:
    first, second, third = Traffic(43 * 10**6), Traffic(0, flops=10**9), Traffic(0, flops=10**9)
    chain = first.followed_by(second).followed_by(third)
    light = speed_of_light(chain, H100)
    assert light.seconds == pytest.approx(1e-5 + 2e-5 + 2e-5)
    assert light.bound == "matmul"
    assert light.terms == pytest.approx({"memory": 1e-5, "cache": 0.0, "matmul": 4e-5, "link": 0.0})
    assert chain.least_bytes == 43 * 10**6


def test_reading_alone_may_be_faster_than_a_copy() -> None:
    assert speed_of_light(Traffic(10**9), replace(H100, read_gbps=5000.0)).seconds == pytest.approx(0.2e-3)


def test_a_warm_cache_spares_what_it_holds() -> None:
    warm = replace(H100, cache_bytes=10**6, is_warm=True)
    # half of the stream is left from the call before, and is read at the rate of the cache
    assert speed_of_light(Traffic(2 * 10**6), warm).terms == pytest.approx(
        {"memory": 10**6 / 4300e9, "cache": 10**6 / 5500e9, "matmul": 0.0, "link": 0.0}
    )
    # rows are read from the cache anyway: of 1200 that miss, 1000 may be the ones that it holds
    rows = Gather(torch.full((1200,), 1), 1000)
    terms = speed_of_light(Traffic(10**5, [rows]), warm).terms
    assert terms["memory"] == pytest.approx(3 * 10**5 / 4300e9)
    assert terms["cache"] == pytest.approx(1.2e6 / 5500e9)
    assert speed_of_light(Traffic(10**5, [rows]), replace(warm, is_warm=False)).terms["memory"] > terms["memory"]


def test_gathers_are_as_fast_as_from_a_table_of_their_size() -> None:
    # 4 MiB was disturbed: a table of 8 MiB was faster
    curve = ((1.0, 400.0), (4.0, 50.0), (8.0, 100.0), (32.0, 25.0), (64.0, 20.0))
    limits = replace(H100, gathers=curve, cache_bytes=64 * 2**20)
    mib = 2**20
    assert [limits.gather_gbps(size * mib) for size in (0.5, 1, 4, 8)] == pytest.approx([400, 400, 100, 100])
    # halfway in powers of two
    assert limits.gather_gbps(16 * mib) == pytest.approx(50.0)
    # more than half of the cache may be partly in the memory, whose time is counted apart
    assert limits.gather_gbps(64 * mib) == limits.gather_gbps(32 * mib) == pytest.approx(25.0)
    assert replace(limits, cache_bytes=256 * mib).gather_gbps(100 * mib) == pytest.approx(20.0)
    # a thousand rows of 8 KiB read alike are a table of 8 MiB; where one has nearly all reads, a small one
    alike, skewed = torch.full((1024,), 1000), torch.ones(1024, dtype=torch.int64)
    skewed[0] = 1024 * 1000 - 1023
    for reads, rate in ((alike, 100e9), (skewed, 400e9)):
        light = speed_of_light(Traffic(0, [Gather(reads, 8192)]), limits)
        assert light.terms["cache"] == pytest.approx(1024 * 1000 * 8192 / rate)


# --- ceilings ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "SECONDS", 1e-3)


@pytest.mark.usefixtures("_hasty")
def test_ceilings_of_this_machine() -> None:
    found = roofline.measure_ceilings(torch.device("cpu"), nbytes=2**20)
    assert [mib for mib, _ in found.gathers] == [0.25, 0.5, 1.0]
    rates = [found.copy_gbps, found.read_gbps, found.cached_gather_gbps, found.matmul_tflops]
    assert all(0.0 < rate < 1e5 for rate in [*rates, *(gbps for _, gbps in found.gathers)])
    assert found.gather_way in ("embedding_bag", "index_select")
    assert (found.upload_gbps, found.is_warm) == (None, True)
    written = json.loads(json.dumps(asdict(found)))
    assert speed_of_light(Traffic(2**20), Ceilings(**written)).seconds == speed_of_light(Traffic(2**20), found).seconds


def test_a_gpu_is_given_our_kernel_too() -> None:
    table = torch.empty(6, 8, device="meta")
    col, rowptr = (torch.empty(size, dtype=torch.int32, device="meta") for size in (64, 3))
    ways = ceilings_module._gather_ways(table, col, rowptr)
    assert list(ways) == ["aggregate", "embedding_bag", "index_select"]
    shapes = [way().shape for way in ways.values() if isinstance(way(), Tensor)]
    assert shapes == [(2, 8), (2, 8), (64, 8)]


@pytest.mark.usefixtures("_hasty")
def test_rates_are_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # every call takes a millisecond
    monkeypatch.setattr(
        ceilings_module, "interleave", lambda functions, **_: {name: [2e-3, 1e-3] for name in functions}
    )
    monkeypatch.setattr(ceilings_module, "_cache_bytes", lambda device: None)
    found = roofline.measure_ceilings(torch.device("cpu"), nbytes=2**22)
    assert found.copy_gbps == pytest.approx(2 * 2**22 / 1e6)
    assert found.read_gbps == pytest.approx(2**22 / 1e6)
    assert [gbps for _, gbps in found.gathers] == pytest.approx([2**19 / 1e6] * 5)
    assert found.matmul_tflops == pytest.approx(2 * math.isqrt(2**20) ** 3 / 1e9)
    # of equal rates, none falls: the cache is taken to hold the largest table
    assert found.cache_bytes == 4 * 2**20


def test_the_command_prints_limits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "--rows", "100000", "--degree", "15", "--device", "cpu"])
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device: H100)
    roofline.main()
    printed = capsys.readouterr().out
    assert "speed of light, bound by cache" in printed
    # 1.5 million rows of 512 bytes at 5.5 TB/s
    assert "limit: cache" in printed
    assert "0.140 ms" in printed
    assert printed.count("aggregate, forward") == 2

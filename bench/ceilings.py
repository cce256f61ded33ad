"""What a machine can do at best, measured on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.side_by_side import interleave
from gas_triton.kernels.aggregate import HUB_EDGES, aggregate

# MiB of the tables that gathers are measured with: around the last cache, and on a CPU those before it.
GPU_TABLES = (8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)
CPU_TABLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
# Rows that one bag sums up: few outputs beside what is read.
BAG = 32
# Of the rounds of one measurement: the fastest counts.
SECONDS = 0.1


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do, measured on it.

    Attributes:
        copy_gbps: bytes read and written by a copy of a large tensor.
        cached_gather_gbps: the fastest gather from a table that fits into the cache, for which `gathers` is empty.
        cache_bytes: of the last cache before the memory.
        matmul_tflops: of dense products in float32.
        read_gbps: bytes read by a sum of a large tensor.
        gathers: (MiB of the table, GB/s of rows read from it by index), tables ascending.
        gather_way: what gathered fastest from the table nearest to half of the cache.
        upload_gbps: of a copy from page-locked host memory to a GPU.
        download_gbps: of a copy back.
        is_warm: whether a call may find in the cache what the one before left there, as on a CPU, where nothing empties
            it between calls.
    """

    copy_gbps: float
    cached_gather_gbps: float
    cache_bytes: int
    matmul_tflops: float
    read_gbps: float = 0.0
    gathers: Sequence[Sequence[float]] = ()
    gather_way: str = ""
    upload_gbps: float | None = None
    download_gbps: float | None = None
    is_warm: bool = False

    @property
    def memory_gbps(self) -> float:
        """What no access pattern exceeds: a copy, or reading alone where that is faster."""
        return max(self.copy_gbps, self.read_gbps)

    def gather_gbps(self, table_bytes: float) -> float:
        """Of gathers from a cached table of this size, between the tables measured.

        One of more than half of the cache may not be there as a whole: it has the rate of half, and what the cache
        misses is counted apart. What was measured faster for a larger table counts for a smaller one too.
        """
        if not self.gathers:
            return self.cached_gather_gbps
        size = max(min(table_bytes, self.cache_bytes / 2) / 2**20, self.gathers[0][0])
        rates = [max(rate for _, rate in self.gathers[place:]) for place in range(len(self.gathers))]
        for (low, _), (high, _), rate, next_rate in zip(self.gathers, self.gathers[1:], rates, rates[1:], strict=False):
            if size <= high:
                share = math.log(size / low) / math.log(high / low)
                return rate * (next_rate / rate) ** share
        return rates[-1]


def measure_ceilings(device: torch.device, nbytes: int | None = None) -> Ceilings:
    """Measures them, which takes about two seconds.

    Args:
        device: a CPU, with the threads that torch has, or a GPU.
        nbytes: of the large tensors; as many as the caches cannot hold if None.
    """
    is_cuda = device.type == "cuda"
    if nbytes is None:
        nbytes = 2**30 if is_cuda else 2**28
    large = _large_tensors(device, nbytes)
    curve, ways = [], []
    cache = _cache_bytes(device)
    for mib in GPU_TABLES if is_cuda else CPU_TABLES:
        if mib * 2**20 > nbytes:
            break
        way, gbps = _gather_gbps(int(mib * 2**20), nbytes // (1 if is_cuda else 8), device)
        curve.append((mib, gbps))
        ways.append(way)
    if cache is None:
        # the largest table from which rows come at half of the best rate
        cache = int(max(mib for mib, gbps in curve if gbps >= max(rate for _, rate in curve) / 2) * 2**20)
    nearest = min(range(len(curve)), key=lambda place: abs(curve[place][0] * 2**20 - cache / 2))
    return Ceilings(
        copy_gbps=large["copy"],
        cached_gather_gbps=max(gbps for _, gbps in curve),
        cache_bytes=cache,
        matmul_tflops=_matmul_tflops(device, nbytes),
        read_gbps=large["read"],
        # hashable, as what a setting holds has to be
        gathers=tuple(curve),
        gather_way=ways[nearest],
        upload_gbps=large.get("up"),
        download_gbps=large.get("down"),
        is_warm=not is_cuda,
    )


def _large_tensors(device: torch.device, nbytes: int) -> dict[str, float]:
    """GB/s of a copy (read and written), a read and, on a GPU, copies from and to page-locked host memory."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.zeros_like(source)
    functions: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "read": source.sum}
    if device.type == "cuda":
        host = torch.ones(nbytes // 4, pin_memory=True)
        functions["up"] = lambda: target.copy_(host, non_blocking=True)
        functions["down"] = lambda: host.copy_(source, non_blocking=True)
    seconds = _fastest(functions, device)
    return {name: (2 if name == "copy" else 1) * nbytes / value / 1e9 for name, value in seconds.items()}


def _fastest(functions: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Seconds of the fastest call of each."""
    # the first call compiles, the second says how many rounds fit
    seconds = interleave(functions, warmup=2, device=device, seconds=SECONDS)
    return {name: min(values) for name, values in seconds.items()}


def _gather_gbps(table_bytes: int, gathered_bytes: int, device: torch.device) -> tuple[str, float]:
    """(the fastest way to gather rows from a table of this size, GB/s of what it reads from the table)."""
    best = ("", 0.0)
    for row_bytes in (512, 1024):
        table = torch.ones(table_bytes // row_bytes, row_bytes // 4, device=device)
        num_bags = gathered_bytes // row_bytes // BAG
        generator = torch.Generator(device).manual_seed(0)
        col = torch.randint(table.size(0), (num_bags * BAG,), generator=generator, dtype=torch.int32, device=device)
        rowptr = torch.arange(0, col.numel() + 1, BAG, dtype=torch.int32, device=device)
        seconds = _fastest(_gather_ways(table, col, rowptr), device)
        way = min(seconds, key=lambda name: seconds[name])
        best = max(best, (way, col.numel() * row_bytes / seconds[way] / 1e9), key=lambda found: found[1])
    return best


def _gather_ways(table: Tensor, col: Tensor, rowptr: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read rows by index; what they write is not counted."""

    def bag() -> Tensor:
        return F.embedding_bag(col, table, rowptr, mode="sum", include_last_offset=True)

    def ours() -> Tensor:
        edges = [rowptr, col]
        return aggregate(
            table, None, None, None, edges, [], [], None, [], [], "sum", 0.0, None, HUB_EDGES, False
        )[0]  # fmt: skip

    if table.device.type == "cpu":
        # ours is the same bag there
        return {"embedding_bag": bag, "index_select": lambda: table.index_select(0, col)}
    return {"aggregate": ours, "embedding_bag": bag, "index_select": lambda: table.index_select(0, col)}


def _matmul_tflops(device: torch.device, nbytes: int) -> float:
    """Of a square product in float32, in the precision that torch is set to."""
    size = min(8192 if device.type == "cuda" else 1536, math.isqrt(nbytes // 4))
    matrix = torch.ones(size, size, device=device)
    return 2 * size**3 / _fastest({"matmul": lambda: matrix @ matrix}, device)["matmul"] / 1e12


def _cache_bytes(device: torch.device) -> int | None:
    """Of the last cache before the memory, as the device or Linux says; None if neither does."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        number, unit = int(text.rstrip("KMG")), text[-1]
        sizes.append(number * {"K": 2**10, "M": 2**20, "G": 2**30}.get(unit, 1))
    return max(sizes, default=None)

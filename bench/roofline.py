r"""Speed of light: the least time in which a machine can move what an op has to move.

An op that reads rows by index is limited by three things, of which the slowest counts:

    memory    (streamed bytes + bytes of rows that the cache does not have) / bandwidth of memory
    cache     bytes of all rows read / bandwidth of gathers from a table that fits into the cache
    matmul    multiply-adds / rate of dense products

Which rows the cache has is Che's approximation of an LRU cache (Che, Tung and Wang, IEEE JSAC 2002) with the reads in
random order. Reads of the same row follow each other at random distances: those that are nearer than a window in which
the distinct rows just fill the cache find it there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.ceilings import Ceilings, measure_ceilings
from bench.side_by_side import machine
from gas_triton import Batch
from gas_triton.text import table

__all__ = [
    "Ceilings", "Gather", "Light", "Traffic", "aggregate_traffic", "count_reads", "lru_bytes",
    "measure_ceilings", "speed_of_light",
]  # fmt: skip

LIMITS = ("memory", "cache", "matmul", "link")


@dataclass(frozen=True)
class Gather:
    """Rows read from a table by index.

    Attributes:
        reads: int64 [rows of the table], how often each is read.
        row_bytes: of a row.
    """

    reads: Tensor
    row_bytes: int


@dataclass(frozen=True)
class Traffic:
    """What an op moves.

    Attributes:
        streamed: bytes read or written once, in order: index arrays, weights, outputs.
        gathers: rows read by index, some more than once; the reads of all are mixed.
        flops: multiply-adds of dense products, counted as two.
        uploaded: bytes copied from the host's memory to a GPU.
        downloaded: bytes copied back.
        then: what is moved afterwards.
    """

    streamed: int
    gathers: Sequence[Gather] = ()
    flops: int = 0
    uploaded: int = 0
    downloaded: int = 0
    then: Traffic | None = None

    @property
    def least_bytes(self) -> int:
        """Every distinct row read once."""
        rows = sum(int((g.reads > 0).sum()) * g.row_bytes for g in self.gathers)
        return self.streamed + rows + (0 if self.then is None else self.then.least_bytes)

    def followed_by(self, then: Traffic) -> Traffic:
        """This, and then the other: their times add up."""
        return replace(self, then=then if self.then is None else self.then.followed_by(then))


# --- what ops move --------------------------------------------------------------------------------------------------


def aggregate_traffic(
    batch: Batch,
    num_features: int,
    dtype: torch.dtype = torch.float32,
    history_dtype: torch.dtype | None = None,
    *,
    weighted: bool = True,
    extremum: bool = False,
    backward: bool = False,
    weight_gradient: bool = False,
) -> Traffic:
    """What an aggregation of a batch moves.

    The backward pass reads gradients over the transpose of the in-batch edges alone: history rows have none. Of an
    extremum it only counts what is read and written in order, as there is more than one way to bring a gradient to its
    winner.

    Args:
        batch: the plan.
        num_features: F.
        dtype: of x and of what is computed.
        history_dtype: of the table of the halo rows, `torch.int8` with a scale a row; that of x if None.
        weighted: whether edges have weights, float32.
        extremum: whether it is a maximum or minimum, whose winning edges are kept for the gradient.
        backward: whether the gradient of x follows.
        weight_gradient: whether that of the weights does too.
    """
    history_dtype = history_dtype or dtype
    index, num_edges = batch.inner.col.element_size(), batch.num_edges
    rows = batch.num_nodes * num_features * dtype.itemsize
    gathers = halo_and_own_rows(batch, num_features, dtype, history_dtype)
    edges = index * (len(gathers) * (batch.num_nodes + 1) + num_edges) + (4 * num_edges if weighted else 0)
    traffic = Traffic(edges + rows, gathers)
    if not backward:
        return traffic
    if extremum:
        winners = 4 * batch.num_nodes * num_features
        # written with the output; gradients and winners read, and a gradient written
        return replace(traffic, streamed=traffic.streamed + winners).followed_by(Traffic(winners + 2 * rows))
    inner = batch.inner
    edges_back = index * (batch.num_nodes + 1 + inner.num_edges) + (4 * inner.num_edges if weighted else 0)
    back = Gather(inner.rowptr.diff().long(), num_features * dtype.itemsize)
    traffic = traffic.followed_by(Traffic(edges_back + rows, [back]))
    if weight_gradient:
        # each row's gradient with all of its sources; a number an edge is written where one was read before
        traffic = traffic.followed_by(Traffic(edges + rows, gathers))
    return traffic


def halo_and_own_rows(batch: Batch, num_features: int, dtype: torch.dtype, history_dtype: torch.dtype) -> list[Gather]:
    """The gathers of one pass over all edges: in-batch rows and, if there are any, halo rows."""
    own = Gather(count_reads(batch.inner.col, batch.num_nodes), num_features * dtype.itemsize)
    if batch.num_halo == 0:
        return [own]
    row_bytes = num_features * history_dtype.itemsize + (4 if history_dtype == torch.int8 else 0)
    return [own, Gather(count_reads(batch.outer_slot, batch.num_halo), row_bytes)]


def count_reads(col: Tensor, num_rows: int) -> Tensor:
    """How often each of `num_rows` rows is read, int64."""
    return torch.bincount(col, minlength=num_rows)


# --- what a cache keeps ---------------------------------------------------------------------------------------------


def lru_bytes(gathers: Sequence[Gather], cache_bytes: int) -> float:
    """Bytes that an LRU cache, empty at first, has to fetch for reads in random order.

    Of k reads at random places of a trace, two neighbours are further apart than a share s of it with probability
    (1 - s) ** k. So a window of that share holds a row with probability 1 - (1 - s) ** k; s is where what it holds
    fills the cache, and a read that comes later than s after the one before misses.
    """
    histograms = [_histogram(gather) for gather in gathers]
    reads = torch.cat([torch.empty(0, dtype=torch.float64), *(reads for reads, _ in histograms)])
    nbytes = torch.cat([torch.empty(0, dtype=torch.float64), *(nbytes for _, nbytes in histograms)])
    if float(nbytes.sum()) <= cache_bytes:
        return float(nbytes.sum())
    low, high = 0.0, 1.0
    for _ in range(60):
        window = (low + high) / 2
        held = float((nbytes * (1.0 - (1.0 - window) ** reads)).sum())
        low, high = (window, high) if held < cache_bytes else (low, window)
    return float((nbytes * (1.0 + (reads - 1.0) * (1.0 - low) ** reads)).sum())


def _histogram(gather: Gather) -> tuple[Tensor, Tensor]:
    """(how often rows are read, the bytes of all rows that are), float64 on the CPU, without rows never read."""
    rows = torch.bincount(gather.reads).cpu()
    reads = rows.nonzero().squeeze(1)
    reads = reads[reads > 0]
    return reads.double(), rows[reads].double() * gather.row_bytes


# --- the least time ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Light:
    """The least time of some traffic.

    Attributes:
        seconds: the speed of light.
        terms: seconds of each limit alone; of traffic in several parts, the sums.
        bound: the name of the limit that most of the time goes to.
    """

    seconds: float
    terms: dict[str, float]
    bound: str


def speed_of_light(traffic: Traffic, ceilings: Ceilings) -> Light:
    """The least time that the ceilings allow: in each part of the traffic the slowest of the limits counts.

    "memory": all that is streamed, and rows that the cache does not have, at the bandwidth of the memory. "cache": all
    rows, at the rate of gathers from a cached table as large as theirs (as many rows as matter, where some are read
    more often than others). "matmul": dense products. "link": copies between host and GPU. Where calls find a warm
    cache, as much as it holds comes from there and not from the memory.
    """
    total, spent = dict.fromkeys(LIMITS, 0.0), dict.fromkeys(LIMITS, 0.0)
    part: Traffic | None = traffic
    while part is not None:
        terms = _limits(part, ceilings)
        slowest = max(terms, key=lambda name: terms[name])
        spent[slowest] += terms[slowest]
        for name, seconds in terms.items():
            total[name] += seconds
        part = part.then
    return Light(sum(spent.values()), total, max(spent, key=lambda name: spent[name]))


def _limits(traffic: Traffic, ceilings: Ceilings) -> dict[str, float]:
    missed = lru_bytes(traffic.gathers, ceilings.cache_bytes)
    nbytes = traffic.streamed + missed
    # at best the cache is full of what is read first; rows that it holds are counted as reads of it in any case
    kept = min(nbytes, ceilings.cache_bytes) if ceilings.is_warm else 0.0
    streamed_from_cache = max(0.0, kept - missed) / ceilings.gather_gbps(ceilings.cache_bytes) / 1e9
    link = 0.0
    for moved, gbps in ((traffic.uploaded, ceilings.upload_gbps), (traffic.downloaded, ceilings.download_gbps)):
        # a link carries both directions at once
        link = max(link, moved / gbps / 1e9 if gbps else 0.0)
    return {
        "memory": (nbytes - kept) / ceilings.memory_gbps / 1e9,
        "cache": streamed_from_cache + sum(_cached_seconds(gather, ceilings) for gather in traffic.gathers),
        "matmul": traffic.flops / ceilings.matmul_tflops / 1e12,
        "link": link,
    }


def _cached_seconds(gather: Gather, ceilings: Ceilings) -> float:
    reads = gather.reads.double()
    total, squares = float(reads.sum()), float(reads.square().sum())
    if total == 0.0:
        return 0.0
    # rows read equally often count in full, a few that are read most as a few
    table_bytes = total * total / squares * gather.row_bytes
    return total * gather.row_bytes / ceilings.gather_gbps(table_bytes) / 1e9


# --- command line ---------------------------------------------------------------------------------------------------


def describe(ceilings: Ceilings) -> str:
    """The ceilings as a table."""
    lines = [
        ["copy of a large tensor, read and written", f"{ceilings.copy_gbps:.0f} GB/s"],
        ["read of a large tensor", f"{ceilings.read_gbps:.0f} GB/s"],
        ["last cache", f"{ceilings.cache_bytes / 2**20:.0f} MiB"],
        *([f"gather from {mib:g} MiB", f"{gbps:.0f} GB/s"] for mib, gbps in ceilings.gathers),
        ["fastest to gather", ceilings.gather_way],
        ["matmul, float32", f"{ceilings.matmul_tflops:.2f} TFLOP/s"],
    ]
    if ceilings.upload_gbps and ceilings.download_gbps:
        lines.append(["host to device", f"{ceilings.upload_gbps:.1f} GB/s"])
        lines.append(["device to host", f"{ceilings.download_gbps:.1f} GB/s"])
    return table(["ceiling", ""], lines)


def describe_traffic(traffic: Traffic, ceilings: Ceilings) -> str:
    """What is moved, and the three limits, as a table."""
    parts, part = [], traffic
    while True:
        parts.append(part)
        if part.then is None:
            break
        part = part.then
    streamed = sum(p.streamed for p in parts)
    rows = sum(int(g.reads.sum()) * g.row_bytes for p in parts for g in p.gathers)
    missed = sum(lru_bytes(p.gathers, ceilings.cache_bytes) for p in parts)
    light = speed_of_light(traffic, ceilings)
    lines = [
        ["streamed", f"{streamed / 2**20:.1f} MiB", ""],
        ["rows, each once", f"{(traffic.least_bytes - streamed) / 2**20:.1f} MiB", ""],
        ["rows that the cache misses", f"{missed / 2**20:.1f} MiB", ""],
        ["rows, each read", f"{rows / 2**20:.1f} MiB", ""],
        *([f"limit: {name}", "", f"{1e3 * seconds:.3f} ms"] for name, seconds in light.terms.items() if seconds),
        [f"speed of light, bound by {light.bound}", "", f"{1e3 * light.seconds:.3f} ms"],
    ]
    return table(["traffic", "size", "least time"], lines)


def main() -> None:
    """Prints the ceilings, and the traffic and limits of an aggregation."""
    # which make inputs for what this module counts
    from bench.inputs import random_batch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--degree", type=int, default=25)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--degrees", choices=["uniform", "power law", "one hub"], default="uniform")
    parser.add_argument("--popularity", choices=["uniform", "zipf 0.8"], default="uniform")
    parser.add_argument("--halo-share", type=float, default=0.25)
    arguments = parser.parse_args()
    ceilings = measure_ceilings(arguments.device)
    print(f"{machine()}\n\n{describe(ceilings)}")
    batch = random_batch(
        arguments.rows, arguments.degree, halo_share=arguments.halo_share, degrees=arguments.degrees,
        popularity=arguments.popularity, device=arguments.device,
    )  # fmt: skip
    for name, backward in (("forward", False), ("forward + backward", True)):
        traffic = aggregate_traffic(batch, arguments.features, getattr(torch, arguments.dtype), backward=backward)
        print(f"\naggregate, {name}: {batch}\n{describe_traffic(traffic, ceilings)}")


if __name__ == "__main__":
    main()

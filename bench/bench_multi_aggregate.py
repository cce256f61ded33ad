"""`functional.multi_aggregate` and `PNAConv` against torch_geometric, and against the same operations in plain torch.

Input: rows of a batch with a quarter of their edges to halo rows, without weights. The baselines are given the halo
rows already copied and concatenated with the batch's; ours reads them from the history.

    python -m bench.bench_multi_aggregate        a table for each case, rounds interleaved
    pytest bench/bench_multi_aggregate.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import groups, plain
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.inputs import Inputs, make_inputs
from bench.layers import (
    BOTH,
    FORWARD,
    PASSES,
    PLAIN,
    PYG,
    WAYS,
    Promise,
    all_but_ties,
    hold_to,
    index_bytes,
    layer_group,
    run,
)
from bench.roofline import Gather, Traffic, halo_and_own_rows
from bench.side_by_side import missing_pyg
from bench.tables import OURS, Row
from gas_triton import Batch, functional
from gas_triton.nn import PNAConv

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["PROMISES", "WAYS", "cases", "measure"]
REDUCES: list[Any] = ["sum", "mean", "min", "max", "std"]
SCALERS = ["identity", "amplification", "attenuation"]
KINDS = ("aggregations", "PNAConv")
PROMISES = {"cpu": [Promise(time=1.0, memory=2.0), Promise(time=1.0, which=FORWARD)], "cuda": [Promise(time=4.0)]}
DEGREE = 25


def cases(setting: Setting) -> list[Case]:
    """Both passes of five aggregations and of a layer, at several widths."""
    return [
        Case(
            "multi_aggregate",
            {"kind": kind, "pass": which, "features": num_features},
            functools.partial(make, setting, kind, which, num_features),
        )
        for kind in KINDS
        for num_features in setting.choose([64, 128], [64], [8])
        for which in PASSES
    ]


def make(setting: Setting, kind: str, which: str, num_features: int) -> Group:
    """A batch and what reads it."""
    torch.manual_seed(0)
    device = setting.device
    full = {"aggregations": (100_000, 10_000), "PNAConv": (40_000, 5_000)}[kind][device.type != "cuda"]
    inputs = make_inputs(
        setting.choose(full, full // 4, 30), setting.choose(DEGREE, DEGREE, 5), num_features, device=device
    )
    if kind == "aggregations":
        return aggregations(inputs, which)
    batch = inputs.batch
    deg = torch.bincount(batch.joint().rowptr.diff())
    conv = PNAConv(num_features, num_features, REDUCES, SCALERS, deg).to(device)
    return layer_group(
        conv, batch, inputs.cat(inputs.x), which, traffic=pna_traffic(batch, num_features, len(SCALERS), which)
    )


def aggregations(inputs: Inputs, which: str) -> Group:
    """The reductions of neighbours alone, [B, K * F] of in-batch rows [B, F]."""
    batch = inputs.batch
    edges, _ = plain.edges_of(batch)
    batch.transposed_inner(shared=False)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda x: functional.multi_aggregate(x, batch, inputs.history, REDUCES).flatten(1),
        PLAIN: lambda x: plain.multi_aggregate(inputs.cat(x).index_select(0, edges.source), edges, REDUCES),
    }
    missing = {}
    if reason := missing_pyg():
        missing[PYG] = reason
    else:
        import torch_geometric

        theirs = torch_geometric.nn.MultiAggregation(REDUCES)

        def aggregate(x: Tensor) -> Tensor:
            message = inputs.cat(x).index_select(0, edges.source)
            return theirs(message, edges.target, dim_size=edges.num_rows, dim=0)

        ways[PYG] = aggregate
    grad = inputs.grad.repeat(1, len(REDUCES))
    return Group(
        {name: functools.partial(run, way, inputs.x, grad, {}, which) for name, way in ways.items()},
        missing,
        reduce_traffic(batch, inputs.x.size(1), which),
        difference=all_but_ties if which == BOTH else None,
    )


def reduce_traffic(batch: Batch, num_features: int, which: str) -> Traffic:
    """What the five reductions move at least, in float32.

    Forward: neighbours gathered once, all results written, with the winning edges where a backward follows. Backward:
    along the transpose of the in-batch edges, a gradient and a factor for sum, mean and std together, and gradient and
    winner for both extrema; own rows read, a gradient written.
    """
    row = 4 * num_features
    forward = Traffic(
        index_bytes(batch.joint()) + batch.num_nodes * row * len(REDUCES),
        halo_and_own_rows(batch, num_features, torch.float32, torch.float32),
    )
    if which == FORWARD:
        return forward
    transposed, _ = batch.transposed_inner(shared=False)
    winners = Traffic(2 * batch.num_nodes * row)
    of_target = Gather(batch.inner.rowptr.diff().long(), 6 * row)
    return forward.followed_by(winners).followed_by(
        Traffic(index_bytes(transposed) + 2 * batch.num_nodes * row, [of_target])
    )


def pna_traffic(batch: Batch, num_features: int, num_scalers: int, which: str) -> Traffic:
    """The five reductions of all rows, with the linear layers before and after them."""
    rows, all_rows, row = batch.num_nodes, batch.num_nodes + batch.num_halo, 4 * num_features
    square = 2 * num_features * num_features
    # before: own and neighbour half of the pre-layer; after: a post-layer of own rows and scaled results, and the last
    flops = square * (all_rows + rows + rows * (len(REDUCES) * num_scalers + 1) + rows)
    streamed = row * (2 * all_rows + rows * (2 + len(REDUCES) + 2))
    traffic = reduce_traffic(batch, num_features, which).followed_by(Traffic(streamed, flops=flops))
    return traffic if which == FORWARD else traffic.followed_by(Traffic(2 * streamed, flops=2 * flops))


def measure(setting: Setting) -> list[Row]:
    """The rows of all cases."""
    return hold_to(measure_cases(cases(setting), setting), setting, PROMISES)


def test_multi_aggregate(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

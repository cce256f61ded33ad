"""`functional.multi_aggregate` and `nn.PNAConv` on a CPU against torch_geometric: time side by side, and peak memory.

Input: as in `bench_aggregate`, without weights: rows of a batch with a quarter of their edges to halo rows. PyG is
given the halo rows already copied and concatenated with the batch's; ours reads them from the history.

    python -m bench.bench_multi_aggregate        ratios, rounds interleaved, then bytes
    pytest bench/bench_multi_aggregate.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import pygas
from bench.bench_aggregate import Problem, make_problem
from bench.side_by_side import (
    Target,
    interleave,
    machine,
    missing_pyg,
    parse_rounds,
    passes,
    peaks,
    report,
    report_peaks,
)
from gas_triton import functional
from gas_triton.kernels.aggregate import row_of_edge
from gas_triton.nn import PNAConv

OURS, PYG = "gas_triton", "torch_geometric"
REDUCES: list[Any] = ["sum", "mean", "min", "max", "std"]
SCALERS = ["identity", "amplification", "attenuation"]
KINDS = ("aggregations", "PNAConv")
MODES = ("forward", "forward + backward")
WIDTHS = (64, 128)
TARGETS = [Target(PYG, OURS, 1.0)]
MEMORY_TARGET = Target(PYG, OURS, 2.0)


@functools.lru_cache(maxsize=1)
def forwards(kind: str, num_features: int) -> tuple[Problem, dict[str, Callable[[Tensor], Tensor]]]:
    """The problem, and both ways from in-batch rows to [B, ...], by name."""
    problem = make_problem(num_features=num_features)
    batch, history = problem.batch, problem.history
    row = row_of_edge(problem.rowptr, problem.col)
    num_rows = problem.x.size(0)
    deg = torch.bincount(problem.rowptr.diff())
    ways: dict[str, Callable[[Tensor], Tensor]] = {}
    if kind == "aggregations":
        ways[OURS] = lambda x: functional.multi_aggregate(x, batch, history, REDUCES).flatten(1)
    else:
        ours = PNAConv(num_features, num_features, REDUCES, SCALERS, deg)
        ways[OURS] = lambda x: ours(torch.cat([x, history[batch.halo_ids]]), batch)
    if missing_pyg() is None:
        import torch_geometric

        if kind == "aggregations":
            aggregations = torch_geometric.nn.MultiAggregation(REDUCES)

            def aggregate(x: Tensor) -> Tensor:
                message = pygas.pull(x, history, batch.halo_ids).index_select(0, problem.col)
                return aggregations(message, row, dim_size=num_rows, dim=0)

            ways[PYG] = aggregate
        else:
            theirs = torch_geometric.nn.PNAConv(num_features, num_features, REDUCES, SCALERS, deg)
            theirs.load_state_dict(ours.state_dict())
            edge_index = torch.stack([problem.col, row])
            ways[PYG] = lambda x: theirs(pygas.pull(x, history, batch.halo_ids), edge_index)[:num_rows]
    return problem, ways


def cases(kind: str, num_features: int, mode: str) -> dict[str, Callable[[], Tensor]]:
    """The same as functions of nothing; with a backward pass they give the gradient of `x`."""
    problem, ways = forwards(kind, num_features)
    grad = problem.grad.repeat(1, len(REDUCES)) if kind == "aggregations" else problem.grad
    return passes(ways, problem.x, grad, mode)


def check(kind: str, num_features: int) -> None:
    """Raises AssertionError if answers differ by more than rounding, in units of their largest."""
    for mode in MODES:
        answers = {name: case() for name, case in cases(kind, num_features, mode).items()}
        if PYG in answers:
            difference = (answers[OURS] - answers[PYG]).abs() / answers[PYG].abs().max()
            share = float((difference > 1e-4).double().mean())
            # of a few million extrema some are equal: PyG shares their gradient out, ours gives it to one of them
            allowed = 1e-3 if mode == MODES[1] else 0.0
            assert share <= allowed, (
                f"{kind}, {mode}: {share:.1e} of the answers differ, by up to {difference.max():.1e}"
            )


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_answers_agree(kind: str) -> None:
    check(kind, 64)


@pytest.mark.parametrize("name", [OURS, PYG])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_multi_aggregate(benchmark: BenchmarkFixture, kind: str, mode: str, name: str) -> None:
    if name == PYG and (reason := missing_pyg()):
        pytest.skip(reason)
    benchmark.group = f"{kind}, {mode}"
    benchmark(cases(kind, 64, mode)[name])


def main() -> None:
    """Prints the ratios and the bytes."""
    rounds = parse_rounds(__doc__, 10)
    print(machine())
    if reason := missing_pyg():
        print(f"without torch_geometric: {reason}")
    for kind in KINDS:
        for num_features in WIDTHS:
            check(kind, num_features)
            problem, _ = forwards(kind, num_features)
            shape = f"{problem.x.size(0)} rows, {problem.col.numel()} edges, {num_features} features"
            for mode in MODES:
                seconds = interleave(cases(kind, num_features, mode), rounds, warmup=1)
                title = f"\n{kind}, {mode}: {shape}, {problem.batch.num_halo} halo rows"
                print(report(title, seconds, OURS, TARGETS), flush=True)
            print(report_peaks(peaks(cases(kind, num_features, MODES[1])), MEMORY_TARGET), flush=True)


if __name__ == "__main__":
    main()

"""`GATConv` against the layer of torch_geometric, and against the same operations in plain torch.

Input: rows of a batch and their halo rows, to which a quarter of the edges lead, float32. All ways have the same
parameters and read the rows of one tensor [B + H, F]; what depends on the batch alone is made beforehand.

    python -m bench.bench_attention        a table for each case, rounds interleaved
    pytest bench/bench_attention.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from bench import groups
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.inputs import random_batch
from bench.layers import PASSES, WAYS, Promise, attention_traffic, hold_to, layer_group
from bench.tables import Row
from gas_triton.nn import GATConv

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["PROMISES", "WAYS", "cases", "measure"]
PROMISES = {"cpu": [Promise(time=1.0, memory=2.0)], "cuda": [Promise(time=3.0, memory=4.0)]}
DEGREE = 25
# (F_in, heads, features of a head): one of them changes at a time
BASE = (64, 8, 8)
SHAPES = [BASE, (64, 1, 64), (256, 8, 8), (64, 8, 16)]


def cases(setting: Setting) -> list[Case]:
    """Both passes of every shape."""
    return [
        Case(
            "attention",
            {"pass": which, "in": shape[0], "heads": shape[1], "features": shape[2]},
            functools.partial(make, setting, shape, which),
        )
        for shape in setting.choose(SHAPES, SHAPES[:2], [(8, 2, 4)])
        for which in PASSES
    ]


def make(setting: Setting, shape: tuple[int, int, int], which: str) -> Group:
    """A batch and a layer of the given shape."""
    in_channels, heads, width = shape
    torch.manual_seed(0)
    full = 100_000 if setting.device.type == "cuda" else 20_000
    batch = random_batch(setting.choose(full, full // 4, 40), setting.choose(DEGREE, DEGREE, 5), device=setting.device)
    conv = GATConv(in_channels, width, heads, add_self_loops=False).to(setting.device)
    x = torch.randn(batch.num_nodes + batch.num_halo, in_channels, device=setting.device)
    return layer_group(
        conv, batch, x, which, traffic=attention_traffic(batch, in_channels, heads * width, heads, which)
    )


def measure(setting: Setting) -> list[Row]:
    """The rows of all cases."""
    return hold_to(measure_cases(cases(setting), setting), setting, PROMISES)


def test_attention(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

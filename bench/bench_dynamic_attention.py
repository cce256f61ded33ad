"""`GATv2Conv` and `TransformerConv` against those of torch_geometric, and against the same operations in plain torch.

Input: rows of a batch with a quarter of their edges to halo rows, all rows given, float32, with and without features
of the edges. All ways have the same parameters; what depends on the batch alone is made beforehand.

    python -m bench.bench_dynamic_attention        a table for each case, rounds interleaved
    pytest bench/bench_dynamic_attention.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from bench import groups
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.inputs import random_batch
from bench.layers import PASSES, WAYS, Promise, attention_traffic, hold_to, layer_group
from bench.tables import Row
from gas_triton.nn import GATv2Conv, TransformerConv

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["PROMISES", "WAYS", "cases", "measure"]
PROMISES = {"cpu": [Promise(time=1.0, memory=2.0, which=None)]}
LAYERS = ("GATv2Conv", "TransformerConv")
DEGREE, IN_CHANNELS = 25, 128
# (heads, features of a head, features of an edge): one of them changes at a time
SHAPES = [(8, 16, 0), (1, 128, 0), (8, 16, 16)]


def cases(setting: Setting) -> list[Case]:
    """Both passes of every layer and shape."""
    shapes = setting.choose(SHAPES, [SHAPES[0], SHAPES[2]], [(2, 4, 3)])
    return [
        Case(
            "dynamic_attention",
            {"layer": name, "pass": which, "heads": shape[0], "features": shape[1], "edge_features": shape[2]},
            functools.partial(make, setting, name, shape, which),
        )
        for name in LAYERS
        for shape in shapes
        for which in PASSES
    ]


def make(setting: Setting, name: str, shape: tuple[int, int, int], which: str) -> Group:
    """A batch and a layer of the given shape."""
    heads, width, edge_dim = shape
    torch.manual_seed(0)
    device, in_channels = setting.device, setting.choose(IN_CHANNELS, IN_CHANNELS, 8)
    full = 100_000 if device.type == "cuda" else 10_000
    batch = random_batch(setting.choose(full, full // 4, 30), setting.choose(DEGREE, DEGREE, 5), device=device)
    is_gatv2 = name == "GATv2Conv"
    kind: Any = functools.partial(GATv2Conv, add_self_loops=False) if is_gatv2 else TransformerConv
    conv = kind(in_channels, width, heads, edge_dim=edge_dim or None).to(device)
    x = torch.randn(batch.num_nodes + batch.num_halo, in_channels, device=device)
    traffic = attention_traffic(
        batch, in_channels, heads * width, heads, which, linears=1 if is_gatv2 else 2, own_linears=1 if is_gatv2 else 2,
        sources=1 if is_gatv2 else 2, is_dynamic=True, edge_dim=edge_dim or None,
    )  # fmt: skip
    edge_attr = torch.randn(batch.num_edges, edge_dim, device=device) if edge_dim else None
    return layer_group(conv, batch, x, which, edge_attr=edge_attr, traffic=traffic)


def measure(setting: Setting) -> list[Row]:
    """The rows of all cases."""
    return hold_to(measure_cases(cases(setting), setting), setting, PROMISES)


def test_dynamic_attention(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

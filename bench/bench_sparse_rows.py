"""A linear layer of sparse features, as the first layer of a model reads them: `SparseRows`, stock torch, and dense.

Input: rows with features at random places, as wide as those of CoauthorPhysics and PubMed, float32. "torch.sparse" is
`torch.sparse.mm` of a CSR matrix, "dense" a linear layer of the whole matrix. The gradient is that of the weight.

    python -m bench.bench_sparse_rows        a table for each case, rounds interleaved
    pytest bench/bench_sparse_rows.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import groups
from bench.groups import OURS, Case, Group, Setting, measure_cases, run_with
from bench.layers import BOTH, PASSES
from bench.tables import Row
from gas_triton.functional import SparseRows

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

WAYS = (OURS, "torch.sparse", "dense")
# (rows, features, features of a row, outputs); a dense matrix of all rows of the first would have 1.2 GB
SHAPES = [(8_600, 8_415, 33, 64), (19_700, 500, 50, 64)]


def cases(setting: Setting) -> list[Case]:
    """Both passes of every shape."""
    return [
        Case(
            "sparse_rows",
            {"pass": which, "rows": shape[0], "in": shape[1], "values a row": shape[2], "out": shape[3]},
            functools.partial(make, setting, shape, which),
        )
        for shape in setting.choose(SHAPES, SHAPES[1:], [(40, 30, 4, 8)])
        for which in PASSES
    ]


def make(setting: Setting, shape: tuple[int, int, int, int], which: str) -> Group:
    """Features and a weight."""
    num_rows, num_features, row_values, width = shape
    torch.manual_seed(0)
    device = setting.device
    col = torch.rand(num_rows, num_features, device=device).topk(row_values).indices
    dense = torch.zeros(num_rows, num_features, device=device).scatter_(1, col, torch.rand(col.shape, device=device))
    weight = torch.randn(width, num_features, device=device, requires_grad=which == BOTH)
    grad = torch.randn(num_rows, width, device=device)
    # a linear layer takes them as it takes a tensor
    rows: Any = SparseRows.of(dense)
    with warnings.catch_warnings():
        # that CSR is in beta
        warnings.simplefilter("ignore", UserWarning)
        csr = dense.to_sparse_csr()
    layers: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: F.linear(rows, weight),
        "torch.sparse": lambda: torch.sparse.mm(csr, weight.t()),
        "dense": lambda: F.linear(dense, weight),
    }

    def run(layer: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = layer()
        return (out, *torch.autograd.grad(out, weight, grad)) if which == BOTH else (out,)

    return Group({name: functools.partial(run, layer) for name, layer in layers.items()})


def measure(setting: Setting) -> list[Row]:
    """The rows of all cases."""
    return measure_cases(cases(setting), setting)


def test_sparse_rows(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

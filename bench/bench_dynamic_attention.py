"""GATv2Conv and TransformerConv on a CPU against those of torch_geometric, forward, and forward + backward.

Input: rows of a batch with a quarter of their edges to halo rows, all rows given, float32. Both libraries run the same
layer with the same weights, PyG's on an edge list of the batch that was made beforehand; ours plans nothing either.
Peak memory is what torch allocates beyond the input and the parameters.

    python -m bench.bench_dynamic_attention        ratios, rounds interleaved
    pytest bench/bench_dynamic_attention.py        pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench import bench_aggregate
from bench.side_by_side import Target, interleave, machine, missing_pyg, parse_rounds, peaks, report, report_peaks
from gas_triton import Batch
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.nn import GATv2Conv, TransformerConv

OURS, PYG = "gas_triton", "torch_geometric"
MODES = ("forward", "forward + backward")
LAYERS = ("GATv2Conv", "TransformerConv")
TARGETS = [Target(PYG, OURS, 1.0)]
MEMORY_TARGET = Target(PYG, OURS, 2.0)


@dataclass(frozen=True)
class Problem:
    """One batch and the layers that run on it.

    Attributes:
        batch: our plan, for rows 0 .. B-1 of a graph of B + H nodes.
        x: [B + H, F], in-batch rows, then halo rows.
        edge_index: int64 [2, E] of local ids, for PyG.
        heads: heads of every layer, F / heads features each.
    """

    batch: Batch
    x: Tensor
    edge_index: Tensor
    heads: int

    def layers(self, name: str) -> dict[str, nn.Module]:
        """The layer of both libraries, with the same weights; PyG's only where it is installed."""
        width = self.x.size(1)
        torch.manual_seed(0)
        arguments = (width, width // self.heads, self.heads)
        ours: nn.Module = TransformerConv(*arguments)
        if name == "GATv2Conv":
            ours = GATv2Conv(*arguments, add_self_loops=False)
        layers = {OURS: ours}
        if missing_pyg() is None:
            import torch_geometric.nn

            options = {"add_self_loops": False} if name == "GATv2Conv" else {}
            layers[PYG] = getattr(torch_geometric.nn, name)(*arguments, **options)
            layers[PYG].load_state_dict(ours.state_dict())
        return layers


@functools.lru_cache(maxsize=2)
def make_problem(
    num_rows: int = 10_000, degree: int = 25, num_features: int = 128, num_halo: int = 20_000, heads: int = 8
) -> Problem:
    """The batch of `bench_aggregate`, without weights."""
    given = bench_aggregate.make_problem(num_rows, degree, num_features, num_halo)
    batch = given.batch
    rowptr, col, _ = batch.joint()
    edge_index = torch.stack([col.long(), row_of_edge(rowptr, col)])
    # planned before the first call that is timed, as every later step finds it
    batch.joint_transposed()
    return Problem(batch, given.history, edge_index, heads)


def cases(problem: Problem, name: str, mode: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Every library's layer as a function of nothing: the output, and with a backward pass all gradients."""
    num_rows = problem.batch.num_nodes
    grad = torch.ones(num_rows, problem.x.size(1))

    def call(library: str, layer: nn.Module, x: Tensor) -> Tensor:
        if library == OURS:
            return layer(x, problem.batch)
        return layer((x, x[:num_rows]), problem.edge_index)

    def forward(library: str, layer: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [call(library, layer, problem.x)]

    def both(library: str, layer: nn.Module) -> list[Tensor]:
        x = problem.x.detach().requires_grad_()
        out = call(library, layer, x)
        wanted = [x, *(parameter for _, parameter in sorted(layer.named_parameters()))]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

    run = forward if mode == "forward" else both
    return {library: functools.partial(run, library, layer) for library, layer in problem.layers(name).items()}


def largest_difference(problem: Problem, name: str) -> float:
    """The largest difference of outputs and gradients, in units of the largest value of each."""
    answers = {library: case() for library, case in cases(problem, name, MODES[1]).items()}
    pairs = zip(answers[OURS], answers[PYG], strict=True)
    # the gradient of the keys' bias is 0 but for rounding
    return max(float((ours - other).abs().max() / other.abs().max().clamp(min=1.0)) for ours, other in pairs)


def check(problem: Problem, name: str) -> None:
    """Raises AssertionError if an answer differs from PyG's by more than rounding."""
    difference = largest_difference(problem, name)
    assert difference < 1e-4, f"answers differ by {difference:.1e} of their largest value"


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_answers_agree(name: str) -> None:
    if reason := missing_pyg():
        pytest.skip(reason)
    check(make_problem(), name)


@pytest.mark.parametrize("library", [OURS, PYG])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_dynamic_attention(benchmark: BenchmarkFixture, name: str, mode: str, library: str) -> None:
    if library == PYG and (reason := missing_pyg()):
        pytest.skip(reason)
    benchmark.group = f"{name}, {mode}"
    benchmark(cases(make_problem(), name, mode)[library])


def main() -> None:
    """Prints the ratios."""
    rounds = parse_rounds(__doc__, 15)
    print(machine())
    if reason := missing_pyg():
        print(f"without torch_geometric: {reason}")
    for heads in (8, 1):
        problem = make_problem(heads=heads)
        width = problem.x.size(1)
        shape = f"{problem.batch.num_nodes} rows, {problem.batch.num_edges} edges, {heads} x {width // heads} features"
        for name in LAYERS:
            if missing_pyg() is None:
                check(problem, name)
            for mode in MODES:
                seconds = interleave(cases(problem, name, mode), rounds, warmup=1)
                print(report(f"\n{name}, {mode}: {shape}", seconds, OURS, TARGETS))
                print(report_peaks(peaks(cases(problem, name, mode)), MEMORY_TARGET))


if __name__ == "__main__":
    main()

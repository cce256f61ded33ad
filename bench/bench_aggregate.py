"""`functional.aggregate` against the ways of stock torch, of PyGAS and of PyG: widths, dtypes, reductions, halo shares.

One thing at a time is changed of a base: on a CPU 20 000 rows of 25 edges, on a GPU 100 000 rows of 15 on average with
power law degrees; 128 features, float32, a weighted sum, a quarter of the edges to halo rows. Every baseline copies the
halo rows out of the history and concatenates them with the batch's; ours reads both in place. Columns, offsets and
transposes are made beforehand for all of them.

    python -m bench.bench_aggregate                       ratios, rounds interleaved
    pytest bench/bench_aggregate.py --bench-size full     pytest-benchmark, one way after another
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import groups, pygas
from bench.groups import Case, Group, Setting, measure_cases, run_with
from bench.inputs import Degrees, Inputs, make_inputs
from bench.roofline import aggregate_traffic
from bench.side_by_side import missing_pyg, passes
from bench.tables import OURS, Row
from gas_triton import functional
from gas_triton.functional.aggregate import Reduce
from gas_triton.kernels.csr_rows import row_of_edge

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

PYGAS, BAG, SPARSE = "PyGAS", "embedding_bag over cat", "torch.sparse.mm over cat"
SCATTER, PYG = "gather and scatter over cat", "torch_geometric"
WAYS = (OURS, PYGAS, BAG, SPARSE, SCATTER, PYG)
FORWARD, BOTH = PASSES = ("forward", "forward + backward")
# How many times longer other ways take at least in the base case, by kind of device and pass.
TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("cpu", FORWARD): {PYGAS: 5.0, BAG: 2.0},
    ("cpu", BOTH): {PYGAS: 3.0},
    ("cuda", FORWARD): {SPARSE: 3.0, BAG: 1.3},
}
Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """What a case aggregates.

    Attributes:
        rows: B.
        degree: edges into a row on average.
        features: F.
        dtype: of x and of the history; with "int8 history" x is float32.
        reduce: a sum is weighted, a mean and a maximum are not.
        halo: share of the edges that read the history.
        degrees: how edges are spread over rows.
    """

    rows: int
    degree: int
    features: int = 128
    dtype: str = "float32"
    reduce: Reduce = "sum"
    halo: float = 0.25
    degrees: Degrees = "uniform"

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of x and of the history."""
        if self.dtype == "int8 history":
            return torch.float32, torch.int8
        dtype = getattr(torch, self.dtype)
        return dtype, dtype


def base_shape(setting: Setting) -> Shape:
    """The shape of which others change one thing."""
    if setting.size == "tiny":
        return Shape(12, 3, 32)
    if setting.device.type == "cuda":
        return Shape(setting.choose(100_000, 20_000, 0), 15, degrees="power law")
    return Shape(setting.choose(20_000, 4_000, 0), 25)


def shapes(setting: Setting) -> list[tuple[Shape, tuple[str, ...]]]:
    """Every shape, the base first, with the passes to measure."""
    base = base_shape(setting)
    only: tuple[str, ...] = (FORWARD,)
    if setting.size == "tiny":
        others = [(replace(base, reduce="max"), PASSES), (replace(base, dtype="int8 history"), only)]
        return [(base, PASSES), *others]
    found: list[tuple[Shape, tuple[str, ...]]] = [(base, PASSES)]
    is_cuda = setting.device.type == "cuda"
    for features in setting.choose((32, 64, 256, 512), (32,), ()):
        # on a GPU every width and pass is another three kernels to compile
        found.append((replace(base, features=features), only if is_cuda and features in (32, 512) else PASSES))
    # a maximum takes most ways seconds on a CPU
    rows = base.rows if is_cuda else base.rows // 5
    found += [(replace(base, dtype="bfloat16"), PASSES), (replace(base, reduce="max", rows=rows), PASSES)]
    if setting.size == "quick":
        return found
    found += [(replace(base, dtype="int8 history"), only), (replace(base, reduce="mean"), only)]
    found += [(replace(base, halo=0.0), only), (replace(base, halo=0.5), only), (replace(base, halo=0.9), PASSES)]
    kinds: list[Degrees] = ["uniform", "power law", "one hub"]
    found += [(replace(base, degrees=kind), PASSES) for kind in kinds if kind != base.degrees]
    if is_cuda:
        found.append((replace(base, degree=50), PASSES))
    return found


def cases(setting: Setting) -> list[Case]:
    """A case for every shape and pass."""
    base = base_shape(setting)

    def case(shape: Shape, which: str) -> Case:
        # what gathers a row for every edge takes most of the time: once for each reduction is enough
        has_slow = shape == replace(base, reduce=shape.reduce, rows=shape.rows)
        keys = {"pass": which, **asdict(shape)}
        return Case("aggregate", keys, lambda: build(shape, which, setting.device, has_slow))

    return [case(shape, which) for shape, found in shapes(setting) for which in found]


def build(shape: Shape, which: str, device: torch.device, has_slow: bool = True) -> Group:
    """The ways that can compute the case, on an input of its own.

    Args:
        shape: what to aggregate.
        which: pass, one of `PASSES`.
        device: of the tensors.
        has_slow: with the ways that gather a row for every edge.
    """
    dtype, history_dtype = shape.dtypes
    inputs = make_inputs(
        shape.rows, shape.degree, shape.features, halo_share=shape.halo, degrees=shape.degrees, dtype=dtype,
        history_dtype=history_dtype, device=device,
    )  # fmt: skip
    forwards, missing = forwards_of(inputs, shape.reduce, has_slow)
    ways, unable = able(passes(forwards, inputs.x, inputs.grad, which))
    is_extremum = shape.reduce == "max"
    traffic = aggregate_traffic(
        inputs.batch, shape.features, dtype, history_dtype, weighted=shape.reduce == "sum", extremum=is_extremum,
        backward=which == BOTH,
    )  # fmt: skip
    if is_extremum and which == BOTH:
        return Group(ways, {**missing, **unable}, traffic, tolerance=1e-3, difference=share_of_differences)
    return Group(ways, {**missing, **unable}, traffic, tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5)


def forwards_of(inputs: Inputs, reduce: Reduce, has_slow: bool) -> tuple[dict[str, Way], dict[str, str]]:
    """(ways from in-batch rows to aggregated rows, ours first; why others are missing)."""
    batch, is_sum = inputs.batch, reduce == "sum"
    rowptr, col = batch.joint()[:2]
    size = (batch.num_nodes, batch.num_nodes + batch.num_halo)
    # ours keeps weights in float32 beside narrow rows; stock torch wants one dtype
    weight = inputs.joint_weight.to(inputs.x.dtype) if is_sum and inputs.joint_weight is not None else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        value = torch.ones(col.numel(), dtype=inputs.x.dtype, device=col.device) if weight is None else weight
        if reduce == "mean":
            value = value / rowptr.diff().repeat_interleave(rowptr.diff())
        adjacency = torch.sparse_csr_tensor(rowptr, col, value, size=size, check_invariants=False)

    def sparse(x: Tensor) -> Tensor:
        if reduce == "max":
            return torch.sparse.mm(adjacency, inputs.cat(x), "amax")
        return torch.sparse.mm(adjacency, inputs.cat(x))

    def bag(x: Tensor) -> Tensor:
        return F.embedding_bag(
            col, inputs.cat(x), rowptr, mode=reduce, per_sample_weights=weight, include_last_offset=True
        )

    own_weight = batch.edge_weight if is_sum else None
    ways: dict[str, Way] = {
        OURS: lambda x: functional.aggregate(x, batch, inputs.history, reduce, edge_weight=own_weight),
        BAG: bag,
        SPARSE: sparse,
    }
    missing = {}
    if reason := pygas.missing():
        missing[PYGAS] = reason
    else:
        import torch_sparse

        transposed = torch_sparse.SparseTensor(
            rowptr=rowptr.long(), col=col.long(), value=weight, sparse_sizes=size, is_sorted=True
        )
        ways[PYGAS] = lambda x: torch_sparse.matmul(transposed, inputs.cat(x), reduce=reduce)
    if has_slow:
        slow, why = slow_forwards(inputs, reduce, weight)
        ways |= slow
        missing |= why
    return ways, missing


def slow_forwards(inputs: Inputs, reduce: Reduce, weight: Tensor | None) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways that make a row for every edge."""
    batch = inputs.batch
    rowptr, col = batch.joint()[:2]
    row, source = row_of_edge(rowptr, col), col.long()
    degree = rowptr.diff()[:, None]

    def scatter(x: Tensor) -> Tensor:
        message = inputs.cat(x).index_select(0, source)
        message = message if weight is None else message * weight[:, None]
        out = message.new_zeros(x.shape)
        if reduce == "max":
            return out.scatter_reduce_(0, row[:, None].expand_as(message), message, "amax", include_self=False)
        out = out.index_add_(0, row, message)
        return out / degree if reduce == "mean" else out

    if reason := missing_pyg():
        return {SCATTER: scatter}, {PYG: reason}
    from torch_geometric.nn import SimpleConv

    conv, edge_index = SimpleConv(reduce), torch.stack([source, row])
    size = (batch.num_nodes + batch.num_halo, batch.num_nodes)

    def layer(x: Tensor) -> Tensor:
        return conv((inputs.cat(x), None), edge_index, weight, size)

    return {SCATTER: scatter, PYG: layer}, {}


def able(ways: Mapping[str, Callable[[], Tensor]]) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """(the ways that stock torch has kernels for, why not the others); ours has to work."""
    found, missing = {}, {}
    for name, way in ways.items():
        try:
            if name != OURS:
                way()
            found[name] = way
        except (RuntimeError, TypeError, ValueError) as error:
            missing[name] = str(error).splitlines()[0]
    return found, missing


def share_of_differences(ours: Tensor, theirs: Tensor) -> float:
    """The share of the values that differ: of equal extrema some ways give the gradient to all, and ours to one."""
    assert ours.shape == theirs.shape, f"ours has shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    apart = (ours - theirs).abs() > 1e-4 * theirs.abs().max()
    return float((apart | ours.isnan() | theirs.isnan()).double().mean())


def measure(setting: Setting) -> list[Row]:
    """The rows of all cases, with what the project promises of the base case."""
    return hold_to_targets(measure_cases(cases(setting), setting), setting)


def hold_to_targets(rows: list[Row], setting: Setting) -> list[Row]:
    """The rows, with "target" and "met" where the project promises something of this size and device.

    On a GPU ours reaches 80% of the speed of light in a forward pass, 60% with fewer than 64 features; other ways are
    slower in the base case as `TARGETS` say.
    """
    if setting.size != "full":
        return rows
    base = asdict(base_shape(setting))
    for row in rows:
        changed = [key for key, value in base.items() if row[key] != value]
        promises = TARGETS.get((setting.device.type, row["pass"]), {})
        if not changed and row["way"] in promises and "times_ours" in row:
            least = promises[row["way"]]
            row |= {"target": f">= {least:g}x our time", "met": row["times_ours"] >= least}
        is_width = row["pass"] == FORWARD and set(changed) <= {"features"}
        if setting.device.type == "cuda" and is_width and row["way"] == OURS and "light" in row:
            least = 0.8 if row["features"] >= 64 else 0.6
            row |= {"target": f">= {least:.0%} of the speed of light", "met": row["light"] >= least}
    return rows


def test_aggregate(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

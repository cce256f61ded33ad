"""`functional.multi_aggregate` and its ops: values, gradients, the Triton kernels, registration, bad input."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import gas_triton as gas
from gas_triton import Batch, functional
from gas_triton.csr import find_hubs
from gas_triton.functional.multi_aggregate import aggregate_messages, source_rows, target_rows
from gas_triton.kernels.aggregate_cpu import RUN_EDGES
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.multi_aggregate import multi_aggregate_ref, multi_aggregate_triton
from gas_triton.kernels.multi_aggregate_cpu import multi_aggregate_cpu
from gas_triton.kernels.multi_aggregate_grad import coefficients, multi_aggregate_grad_triton
from gas_triton.kernels.pull import widen
from gas_triton.kernels.push import quantize_ref
from gas_triton.kernels.transpose import transpose_torch
from tests.blocks import KINDS, UNIT, Blocks, make_blocks
from tests.reference import GRAPHS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = torch.tensor([123_456_789_012_345])
ALL = ["sum", "mean", "min", "max", "var", "std"]
SOME = [ALL, ["std"], ["max"], ["mean", "min"], ["var", "sum"], ["max", "std", "min", "mean", "sum"]]
EXTREMA = ["min", "max"]


def make_batch(name: str = "directed", num_features: int = 5, dtype: torch.dtype = torch.float64) -> Batch:
    graph = GRAPHS[name].graph()
    parts = gas.random_partition(graph, 6)
    x = torch.randn(graph.num_nodes, num_features, dtype=dtype)
    return gas.ClusterLoader(parts.permute(graph), parts, batch_size=3, x=x).batch([1, 2, 4])


def gradient(out: Tensor, x: Tensor) -> Tensor:
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return torch.autograd.grad(out, x, cotangent.to(out.dtype))[0]


# --- against torch_geometric ------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("reduces", SOME, ids="-".join)
@pytest.mark.parametrize("name", ["directed", "symmetric", "no_edges", "path"])
def test_is_the_multi_aggregation_of_pyg(name: str, reduces: list[Any], torch_geometric: ModuleType) -> None:
    graph = GRAPHS[name].graph()
    loader = gas.ClusterLoader(graph, gas.random_partition(graph, 1), x=torch.randn(graph.num_nodes, 7).double())
    batch = loader.full()
    theirs = torch_geometric.nn.MultiAggregation(reduces, mode="cat")
    x = batch.x.requires_grad_()
    row, col = row_of_edge(*graph.csr), graph.col.long()
    expected = theirs(x[col], row, dim_size=graph.num_nodes, dim=0).unflatten(1, (len(reduces), -1))
    out = functional.multi_aggregate(x, batch, reduces=reduces)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient(out, x), gradient(expected, x))


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduces", SOME, ids="-".join)
@pytest.mark.parametrize("given", ["rows", "history", "drop"])
@pytest.mark.parametrize("name", ["directed", "symmetric"])
def test_values_and_gradients(name: str, given: str, reduces: list[Any]) -> None:
    batch = make_batch(name)
    x = (batch.x if given == "rows" else batch.x[: batch.num_nodes]).clone().requires_grad_()
    history = torch.randn(batch.graph_nodes, 5, dtype=torch.float64) if given == "history" else None
    outer = {"rows": [batch.outer.rowptr, batch.outer_joint_col], "history": list(batch.outer), "drop": []}[given]

    def ours(x: Tensor) -> Tensor:
        return functional.multi_aggregate(x, batch, history, reduces, halo="drop" if given == "drop" else "read")

    out, expected = ours(x), multi_aggregate_ref(x, history, list(batch.inner), outer, reduces)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient(out, x), gradient(expected, x))
    assert torch.autograd.gradcheck(ours, (x,))


def test_features_elsewhere_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    expected = functional.multi_aggregate(batch.x, batch, reduces=ALL)
    monkeypatch.setattr(functional.Features, "is_in_place", False)
    torch.testing.assert_close(functional.multi_aggregate(batch.features, batch, reduces=ALL), expected)


def test_a_handle_on_features_gives_what_the_rows_give() -> None:
    batch = make_batch()
    expected = functional.multi_aggregate(batch.x, batch, reduces=ALL)
    torch.testing.assert_close(functional.multi_aggregate(batch.features, batch, reduces=ALL), expected)
    graph = GRAPHS["path"].graph()
    few = gas.ClusterLoader(graph, gas.contiguous_partition(graph, [1, 3]), x=torch.randn(4, 2))
    batch = few.batch([1])
    assert batch.num_edges < 4
    out = functional.multi_aggregate(batch.features, batch, reduces=ALL)
    torch.testing.assert_close(out, functional.multi_aggregate(batch.x, batch, reduces=ALL))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_every_table_in_place_and_staged(stored: torch.dtype, dropout: float) -> None:
    batch = make_batch(dtype=torch.float32)
    values = torch.randn(batch.graph_nodes, 5, dtype=torch.float64)
    tables: list[Any] = [values.to(stored), values.to(stored)[batch.halo_ids]]
    values = values.to(stored).double() if stored != torch.int8 else values
    if stored == torch.int8:
        rows, scale = quantize_ref(values)
        values = widen(rows, scale, torch.float64)
        ids = batch.halo_ids
        tables = [functional.Quantized(rows, scale), functional.Quantized(rows[ids], scale[ids])]
    seed = SEED if dropout else None
    results = []
    for history in tables:
        x = batch.x[: batch.num_nodes].clone().requires_grad_()
        out = functional.multi_aggregate(x, batch, history, ALL, history_dropout=dropout, seed=seed)
        results.append((out, gradient(out, x)))
    x = x.detach().double().requires_grad_()
    expected = multi_aggregate_ref(x, values, list(batch.inner), list(batch.outer), ALL, dropout, seed)
    for in_place, staged, exact in zip(*results, (expected, gradient(expected, x)), strict=True):
        assert torch.equal(in_place, staged)
        torch.testing.assert_close(in_place.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_rows_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    batch = make_batch("symmetric", dtype=dtype)
    x = batch.x.clone().requires_grad_()
    exact = x.detach().double().requires_grad_()
    out = functional.multi_aggregate(x, batch, reduces=ALL)
    outer = [batch.outer.rowptr, batch.outer_joint_col]
    expected = multi_aggregate_ref(exact, None, list(batch.inner), outer, ALL)
    assert out.dtype == dtype
    tolerance = 4 * UNIT[dtype] + 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    # some gradients are sums of terms of both signs
    torch.testing.assert_close(
        gradient(out, x).double(), gradient(expected, exact), rtol=tolerance, atol=20 * tolerance
    )


def test_long_rows_are_reduced_in_pieces() -> None:
    num_nodes = 3 * RUN_EDGES**2
    # node 0 reads every node once, in pieces of pieces
    star = torch.stack([torch.arange(num_nodes), torch.zeros(num_nodes, dtype=torch.int64)])
    graph = gas.Graph.from_edge_index(torch.cat([star, torch.randint(num_nodes, (2, 200))], 1), num_nodes=num_nodes)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(num_nodes, 100, dtype=dtype, requires_grad=True)
        batch = gas.ClusterLoader(graph, gas.random_partition(graph, 1)).full()
        out = functional.multi_aggregate(x, batch, reduces=EXTREMA)
        expected = multi_aggregate_ref(x, None, list(graph.csr), [], EXTREMA)
        assert torch.equal(out, expected)
        torch.testing.assert_close(gradient(out, x), gradient(expected, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_of_floats(dtype: torch.dtype) -> None:
    """Zeros of both signs, infinities, the smallest and the largest, and NaNs of both signs."""
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, limits.tiny / 2, -limits.tiny / 2, limits.max, limits.min, torch.inf, -torch.inf, 1.0, -1.0]
    for extra in ([], [torch.nan], [-torch.nan]):
        column = torch.tensor([*values, *extra], dtype=dtype)
        num_nodes = column.numel()
        pairs = torch.combinations(torch.arange(num_nodes), with_replacement=True)
        rowptr = torch.arange(pairs.size(0) + 1, dtype=torch.int32) * 2
        inner = [rowptr, pairs.flatten().to(torch.int32)]
        out, *_ = multi_aggregate_cpu(
            column[:, None], None, None, inner, [], [], None, [], [], EXTREMA, 0.0, None, 512, False
        )
        expected = multi_aggregate_ref(column[:, None], None, inner, [], EXTREMA)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduce", EXTREMA)
def test_one_of_equal_extrema_takes_the_gradient(reduce: Any) -> None:
    batch = make_batch()
    x = torch.ones(batch.num_nodes + batch.num_halo, 2, dtype=torch.float64, requires_grad=True)
    out = functional.multi_aggregate(x, batch, reduces=[reduce])
    (grad,) = torch.autograd.grad(out.sum(), x)
    has_any = (batch.inner.rowptr + batch.outer.rowptr).diff() > 0
    assert torch.equal(grad, grad.round())
    assert grad.sum(0).tolist() == [float(has_any.sum())] * 2


def test_a_large_mean_does_not_drown_a_small_deviation() -> None:
    batch = make_batch("simple", num_features=40, dtype=torch.float32)
    rows = 1000 + batch.x[: batch.num_nodes].double()
    history = 1000 + torch.randn(batch.graph_nodes, 40, dtype=torch.float64)
    # what float32 keeps of the rows is exact input to both
    rows, history = rows.float(), history.float()
    out = functional.multi_aggregate(rows, batch, history, ["std"])
    expected = multi_aggregate_ref(rows.double(), history.double(), list(batch.inner), list(batch.outer), ["std"])
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    naive = multi_aggregate_ref(rows, history, list(batch.inner), list(batch.outer), ["std"])
    assert float((naive - expected).abs().max()) > 0.05


def test_a_nan_reaches_only_rows_that_read_it() -> None:
    batch = make_batch()
    x = batch.x.clone()
    bad = int(batch.inner.col[0])
    x[bad] = torch.nan
    out = functional.multi_aggregate(x, batch, reduces=ALL)
    reads = torch.zeros(batch.num_nodes, dtype=torch.bool)
    reads[row_of_edge(*batch.inner)[batch.inner.col == bad]] = True
    assert 0 < int(reads.sum()) < batch.num_nodes
    assert torch.equal(out.isnan(), reads[:, None, None].expand_as(out))


def test_same_input_same_bits() -> None:
    batch = make_batch("symmetric", 24)
    x = batch.x.clone().requires_grad_()
    results = []
    for _ in range(2):
        out = functional.multi_aggregate(x, batch, reduces=ALL)
        results.append((out, gradient(out, x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- messages made edge by edge ---------------------------------------------------------------------------------------


def test_messages_of_missing_rows_are_refused() -> None:
    batch = make_batch("directed")
    own = batch.x[: batch.num_nodes]
    with pytest.raises(ValueError, match=f"x has only the {batch.num_nodes} in-batch rows"):
        source_rows(own, batch)
    with pytest.raises(ValueError, match=rf"x has {batch.num_nodes - 1} rows, expected {batch.num_nodes} \(in-batch"):
        source_rows(own[1:], batch, "drop")
    with pytest.raises(ValueError, match=f"x has {len(batch.x)} rows, expected {batch.num_nodes}"):
        target_rows(batch.x, batch)


@pytest.mark.parametrize("halo", ["read", "drop"])
@pytest.mark.parametrize("name", ["directed", "symmetric"])
def test_messages_of_edges(name: str, halo: Any) -> None:
    batch = make_batch(name)
    has_halo = halo == "read"
    num_rows = batch.num_nodes + (batch.num_halo if has_halo else 0)
    source = torch.cat([batch.inner.col, batch.outer_joint_col]) if has_halo else batch.inner.col
    target = torch.cat([row_of_edge(*batch.inner), row_of_edge(*batch.outer)])[: source.numel()]
    x = batch.x[:num_rows].clone().requires_grad_()
    own = x[: batch.num_nodes]
    weight = torch.rand(source.numel(), 1, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        message = source_rows(x, batch, halo) * weight
        message = message + target_rows(x[: batch.num_nodes], batch, halo)
        return aggregate_messages(message, batch, ALL, halo)

    message = x[source.long()] * weight + own[target]
    joint = target.sort(stable=True)
    rowptr = torch.cat([torch.zeros(1), torch.bincount(target, minlength=batch.num_nodes).cumsum(0)]).int()
    expected = multi_aggregate_ref(message, None, [rowptr, joint.indices], [], ALL)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(gradient(ours(x), x), gradient(expected, x))
    assert torch.autograd.gradcheck(ours, (x,))


# --- Triton -----------------------------------------------------------------------------------------------------------


def run_triton(
    blocks: Blocks, x: Tensor, table: Tensor | None, reduces: list[str], *, hub_edges: int = 512, dropout: float = 0.0,
    scale: Tensor | None = None, staged: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(values, gradient of `x`) of the kernels; the cotangent is that of `gradient`."""
    inner, outer = ([t.to(DEVICE) for t in side] for side in (blocks.inner, blocks.outer))
    rowptr, col, edge_id = transpose_torch(row_of_edge(*inner), inner[1], x.size(0))
    hubs = find_hubs(inner[0] + outer[0], blocks.num_edges, hub_edges)
    hubs_transposed = find_hubs(rowptr, col.numel(), hub_edges)
    x, table, scale = (None if t is None else t.to(DEVICE) for t in (x, table, scale))
    assert x is not None
    out, winner, moments = multi_aggregate_triton(
        x, table, scale, inner, outer, [rowptr, col], edge_id, hubs, hubs_transposed, reduces, dropout,
        SEED.to(DEVICE) if dropout else None, hub_edges, staged,
    )  # fmt: skip
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    grad = cotangent.to(out.dtype).to(DEVICE)
    count = (inner[0] + outer[0]).diff().clamp(min=1)[:, None]
    coefficient = coefficients(grad.to(moments.dtype), moments, reduces, count)
    grad_x = multi_aggregate_grad_triton(
        grad, x, coefficient, winner, reduces, [rowptr, col], edge_id, hubs_transposed, hub_edges
    )
    return out.cpu(), grad_x.cpu()


def assert_triton(blocks: Blocks, x: Tensor, values: Tensor, reduces: list[str], *given: Any, **options: Any) -> None:
    out, grad = run_triton(blocks, x, *given, reduces, **options)
    exact = x.double().requires_grad_()
    dropout = options.get("dropout", 0.0)
    expected = multi_aggregate_ref(
        exact, values.double(), blocks.inner, blocks.outer, reduces, dropout, SEED if dropout else None
    )
    # the interpreter truncates to bfloat16
    tolerance = 8 * UNIT[x.dtype] + 2e-6
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(grad.double(), gradient(expected, exact), rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("hub_edges", [8, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_on_every_kind_of_graph(kind: str, hub_edges: int, poison_empty: None) -> None:
    blocks = make_blocks(kind, num_rows=5)
    x, table = torch.randn(5, 3), torch.randn(blocks.num_table, 3)
    assert_triton(blocks, x, table, ALL, table, hub_edges=hub_edges)


@pytest.mark.parametrize("hub_edges", [8, 512])
@pytest.mark.parametrize("reduces", SOME[1:], ids="-".join)
def test_triton_of_some_reductions(reduces: list[str], hub_edges: int) -> None:
    blocks = make_blocks("one_hub", num_rows=3)
    x, table = torch.randn(3, 4), torch.randn(blocks.num_table, 4)
    assert_triton(blocks, x, table, reduces, table, hub_edges=hub_edges)


@pytest.mark.parametrize("num_features", [1, 33, 130])
def test_triton_of_odd_widths(num_features: int) -> None:
    blocks = make_blocks(num_rows=3, num_table=4)
    x, table = torch.randn(3, num_features), torch.randn(4, num_features)
    assert_triton(blocks, x, table, ALL, table)


@pytest.mark.parametrize(
    "dtype, stored",
    [
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.int8),
    ],
)
@pytest.mark.parametrize("staged", [False, True])
def test_triton_of_every_table(staged: bool, dtype: torch.dtype, stored: torch.dtype) -> None:
    blocks = make_blocks(num_rows=4)
    halo_ids, slot = torch.unique(blocks.outer[1], return_inverse=True)
    blocks = blocks._replace(outer=[*blocks.outer, slot.to(torch.int32), halo_ids.long()])
    x, values = torch.randn(4, 6).to(dtype), torch.randn(blocks.num_table, 6)
    table, scale = quantize_ref(values) if stored == torch.int8 else (values.to(stored), None)
    values = widen(table, scale, torch.float64)
    if staged:
        table, scale = table[halo_ids.long()], None if scale is None else scale[halo_ids.long()]
    assert_triton(blocks, x, values, ALL, table, dropout=0.4, scale=scale, staged=staged)


@pytest.mark.parametrize("given", ["rows", "history", "messages"])
@pytest.mark.parametrize("name", ["directed", "symmetric"])
def test_triton_on_what_the_functions_give_the_op(name: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(name, 2)
    module = sys.modules["gas_triton.functional.multi_aggregate"]
    op, calls = module.multi_aggregate_op, []
    monkeypatch.setattr(module, "multi_aggregate_op", lambda *args: calls.append(args) or op(*args))
    if given == "messages":
        x = torch.randn(batch.num_edges, 2, dtype=torch.float64, requires_grad=True)
        out = aggregate_messages(x, batch, EXTREMA)
    else:
        x = batch.x if given == "rows" else batch.x[: batch.num_nodes]
        x = x.clone().requires_grad_()
        history = torch.randn(batch.graph_nodes, 2, dtype=torch.float64) if given == "history" else None
        out = functional.multi_aggregate(x, batch, history, EXTREMA)
    expected = gradient(out, x)
    args = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().to(DEVICE), calls[0])
    values, winner, moments = multi_aggregate_triton(*args)
    torch.testing.assert_close(values.cpu(), out)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    coefficient = moments.new_empty(0, *cotangent.shape[::2])
    grad = multi_aggregate_grad_triton(cotangent, args[0], coefficient, winner, EXTREMA, args[5], args[6], args[8], 512)
    torch.testing.assert_close(grad.cpu(), expected)


def test_triton_reads_rows_of_a_wider_tensor_in_place() -> None:
    blocks = make_blocks(num_rows=3, num_table=4)
    x, table = torch.randn(3, 12)[:, :5], torch.randn(4, 12)[:, 4:9]
    assert_triton(blocks, x, table, ALL, table)


def test_triton_keeps_a_small_deviation_of_a_large_mean() -> None:
    blocks = make_blocks("one_hub", num_rows=4)
    x, table = 1000 + torch.randn(4, 3), 1000 + torch.randn(blocks.num_table, 3)
    for hub_edges in (8, 512):
        out, _ = run_triton(blocks, x, table, ["std"], hub_edges=hub_edges)
        expected = multi_aggregate_ref(x.double(), table.double(), blocks.inner, blocks.outer, ["std"])
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_triton_and_cpu_find_the_same_nans_and_infinities() -> None:
    blocks = make_blocks(num_rows=4)
    x, table = torch.randn(4, 3), torch.randn(blocks.num_table, 3)
    x[int(blocks.inner[1][0]), 0], table[int(blocks.outer[1][0]), 1] = torch.nan, torch.inf
    out, _ = run_triton(blocks, x, table, ALL)
    slot = torch.arange(blocks.num_table)
    cpu, *_ = multi_aggregate_cpu(
        x, table, None, blocks.inner, [*blocks.outer, blocks.outer[1], slot], [], None, [], [], ALL, 0.0, None, 512,
        False,
    )  # fmt: skip
    assert out.isnan().any()
    assert out.isinf().any()
    torch.testing.assert_close(out, cpu, equal_nan=True)


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduces", [ALL, ["mean"], ["max"]], ids="-".join)
@pytest.mark.parametrize("read", ["table", "staged", "x"])
def test_ops_are_registered_as_torch_library_wants(read: str, reduces: list[str]) -> None:
    blocks = make_blocks("one_hub", num_table=7)
    inner, outer = blocks.inner, [*blocks.outer, blocks.outer[1], torch.arange(7)]
    table = scale = None
    if read == "staged":
        table, scale = quantize_ref(torch.randn(7, 4))
    elif read == "table":
        table = torch.randn(7, 4)
    else:
        outer = []
    x = torch.randn(7, 4, requires_grad=True)
    rowptr, col, edge_id = transpose_torch(row_of_edge(*inner), inner[1], 7)
    hubs, hubs_transposed = find_hubs(inner[0], inner[1].numel(), 8), find_hubs(rowptr, col.numel(), 8)
    torch.library.opcheck(
        torch.ops.gas_triton.multi_aggregate.default,
        (
            x, table, scale, inner, outer, [rowptr, col], edge_id, hubs, hubs_transposed, reduces,
            0.0 if table is None else 0.3, SEED, 8, read == "staged",
        ),
    )  # fmt: skip
    _, winner, moments = multi_aggregate_cpu(
        x.detach(), table, scale, inner, outer, [rowptr, col], edge_id, [], [], reduces, 0.0, None, 8, read == "staged"
    )
    grad = torch.randn(7, len(reduces), 4)
    coefficient = coefficients(grad, moments, reduces, torch.ones(7, 1))
    torch.library.opcheck(
        torch.ops.gas_triton.multi_aggregate_grad.default,
        (grad, x.detach(), coefficient, winner, reduces, [rowptr, col], edge_id, hubs_transposed, 8),
    )


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(reduces=["mean", "median"]), ValueError, "reduces must be among sum, .*, std, got 'median'"),
        (dict(reduces="mean"), ValueError, "reduces must be a list of one or more of .*, got 'mean'"),
        (dict(reduces=[]), ValueError, r"reduces must be a list of one or more of .*, got \[\]"),
        (dict(reduces=["sum", "add"]), ValueError, "reduces must be distinct, got sum, add"),
        (dict(halo="mirror"), ValueError, "halo must be 'read' or 'drop', got 'mirror'"),
        (dict(history_dropout=1.5, seed=SEED), ValueError, r"history_dropout must be in \[0, 1\), got 1.5"),
        (dict(history_dropout=0.5), ValueError, "history_dropout=0.5 needs a seed, got None"),
        (dict(history=None), ValueError, "no history holds the .* halo rows"),
        (dict(history=torch.zeros(30, 6)), ValueError, "x has 5 features but the history has 6"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = make_batch(dtype=torch.float32)
    arguments: dict[str, Any] = dict(history=torch.zeros(30, 5)) | change
    with pytest.raises(error, match=message):
        functional.multi_aggregate(batch.x[: batch.num_nodes], batch, **arguments)


def test_messages_of_a_wrong_number_are_named() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=rf"message must have shape \[{batch.num_edges}, features\], got \[3, 2\]"):
        aggregate_messages(torch.zeros(3, 2), batch, ["sum"])

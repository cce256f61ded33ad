"""The residual of `aggregate`: on the CPU and through the Triton kernels, forward and backward, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gas_triton import Batch, ClusterLoader, functional, random_partition
from gas_triton.csr import find_hubs
from gas_triton.kernels import aggregate as aggregate_module
from gas_triton.kernels.aggregate import aggregate_ref, aggregate_triton
from gas_triton.kernels.aggregate_cpu import aggregate_cpu
from gas_triton.kernels.pull import widen
from gas_triton.kernels.push import quantize_ref
from gas_triton.kernels.transpose import transpose_torch
from gas_triton.planner import Planner

from .blocks import KINDS, UNIT, Blocks, make_blocks
from .reference import GRAPHS
from .test_aggregate import Calls
from .test_devices import cpu_ops_are

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = torch.tensor([123_456_789_012_345])
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WEIGHT = 0.1


@pytest.fixture(params=["cpu", "triton"])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


def run(
    path: str,
    blocks: Blocks,
    x: Tensor,
    table: Tensor | None,
    weight: Tensor | None,
    residual: Tensor | None,
    residual_weight: float = WEIGHT,
    reduce: str = "sum",
    hub_edges: int = 512,
    dropout: float = 0.0,
    scale: Tensor | None = None,
    staged: bool = False,
) -> Tensor:
    outer = blocks.outer if table is not None else []
    device = torch.device("cpu") if path == "cpu" else DEVICE

    def move(value: Any) -> Any:
        return [t.to(device) for t in value] if isinstance(value, list) else None if value is None else value.to(device)

    degrees = blocks.inner[0] + (outer[0] if outer else 0)
    hubs = find_hubs(degrees, int(degrees[-1]), hub_edges)
    implementation = aggregate_cpu if path == "cpu" else aggregate_triton
    out, _ = implementation(
        move(x), move(table), move(scale), move(weight), move(blocks.inner), move(outer), [], None, move(hubs), [],
        reduce, dropout, move(SEED) if dropout else None, hub_edges, staged, move(residual), residual_weight,
    )  # fmt: skip
    return out.cpu()


def assert_as_exact(
    out: Tensor,
    blocks: Blocks,
    x: Tensor,
    table: Tensor | None,
    weight: Tensor | None,
    residual: Tensor | None,
    residual_weight: float = WEIGHT,
    reduce: str = "sum",
    dropout: float = 0.0,
) -> None:
    """Compares with float64 within what rounding explains, as `blocks.assert_as_exact` does."""
    outer = blocks.outer if table is not None else []

    def exact(magnitude: bool) -> Tensor:
        def get(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double().abs() if magnitude else t.double()

        return aggregate_ref(
            get(x), get(table), get(weight), blocks.inner, outer, "sum" if magnitude else reduce, dropout, SEED,
            residual=get(residual), residual_weight=residual_weight,
        )  # fmt: skip

    expected = exact(magnitude=False)
    degree = blocks.inner[0].diff() + (outer[0].diff() if outer else 0)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    # the interpreter truncates to bfloat16 where a GPU rounds to nearest
    unit = UNIT[x.dtype] * (2 if x.dtype == torch.bfloat16 else 1)
    bound = (degree[:, None] + 8) * UNIT[accumulator] * exact(magnitude=True) + unit * expected.abs()
    assert out.dtype == x.dtype
    assert bool(((out.double() - expected).abs() <= bound).all())


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hub_edges", [512, 8])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_graph(path: str, kind: str, reduce: str, hub_edges: int) -> None:
    blocks = make_blocks(kind)
    x, table, residual = torch.randn(7, 6), torch.randn(blocks.num_table, 6), torch.randn(7, 6)
    weight = torch.randn(blocks.num_edges)
    out = run(path, blocks, x, table, weight, residual, 0.3, reduce, hub_edges)
    assert_as_exact(out, blocks, x, table, weight, residual, 0.3, reduce)
    # without a residual only the scale is left, which is what a backward asks for
    weight = weight[: blocks.inner[1].numel()]
    scaled = run(path, blocks, x, None, weight, None, 0.3, reduce, hub_edges)
    assert_as_exact(scaled, blocks, x, None, weight, None, 0.3, reduce)


@pytest.mark.parametrize("residual_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_mix_of_dtypes(path: str, dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
    blocks = make_blocks("one_hub", num_rows=4)
    x, residual = torch.randn(4, 8).to(dtype), torch.randn(4, 8).to(residual_dtype)
    table = torch.randn(blocks.num_table, 8)
    # 0.1 has no exact float32, which an accumulator of float64 would show
    out = run(path, blocks, x, table, None, residual, 0.1, hub_edges=16)
    assert_as_exact(out, blocks, x, table, None, residual, 0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
def test_every_table_in_place_and_staged(path: str, stored: torch.dtype, staged: bool, dropout: float) -> None:
    blocks = make_blocks("one_hub")
    halo_ids, slot = torch.unique(blocks.outer[1], return_inverse=True)
    blocks = blocks._replace(outer=[*blocks.outer, slot.to(torch.int32), halo_ids.long()])
    values = torch.randn(blocks.num_table, 6)
    table, scale = quantize_ref(values) if stored == torch.int8 else (values.to(stored), None)
    exact = widen(table, scale, torch.float64)
    if staged:
        table, scale = table[halo_ids.long()], None if scale is None else scale[halo_ids.long()]
    x, residual = torch.randn(7, 6), torch.randn(7, 6)
    out = run(path, blocks, x, table, None, residual, WEIGHT, "mean", 8, dropout, scale, staged)
    assert_as_exact(out, blocks, x, exact, None, residual, WEIGHT, "mean", dropout)


@pytest.mark.parametrize("num_features", [1, 33, 130])
def test_odd_widths(path: str, num_features: int) -> None:
    blocks = make_blocks("one_hub", num_rows=2, num_table=4)
    x, table = torch.randn(2, num_features), torch.randn(4, num_features)
    residual = torch.randn(2, num_features)
    out = run(path, blocks, x, table, None, residual, hub_edges=16)
    assert_as_exact(out, blocks, x, table, None, residual)


@pytest.mark.parametrize("hub_edges", [512, 8])
def test_residual_rows_are_read_where_they_lie(path: str, hub_edges: int) -> None:
    blocks = make_blocks("one_hub")
    x, table, wide = torch.randn(7, 5), torch.randn(blocks.num_table, 5), torch.randn(9, 12)
    for residual in (wide[:7, 4:9], wide.T.contiguous().T[:7, :5], wide[:1, :5].expand(7, 5)):
        out = run(path, blocks, x, table, None, residual, hub_edges=hub_edges)
        assert_as_exact(out, blocks, x, table, None, residual)


def test_weights_of_0_and_1(path: str) -> None:
    blocks = make_blocks("one_hub")
    x, table, residual = torch.randn(7, 5), torch.randn(blocks.num_table, 5), torch.randn(7, 5)
    for hub_edges in (512, 8):
        plain = run(path, blocks, x, table, None, None, 0.0, hub_edges=hub_edges)
        assert torch.equal(run(path, blocks, x, table, None, residual, 0.0, hub_edges=hub_edges), plain)
        assert torch.equal(run(path, blocks, x, table, None, residual, 1.0, hub_edges=hub_edges), residual)


def test_arguments_are_left_as_they_were(path: str) -> None:
    blocks = make_blocks("all_halo")
    x, table, residual = torch.randn(7, 5), torch.randn(blocks.num_table, 5), torch.randn(7, 5)
    before = [t.clone() for t in (x, table, residual)]
    run(path, blocks, x, table, None, residual)
    assert all(torch.equal(t, old) for t, old in zip((x, table, residual), before, strict=True))


def test_every_output_is_written(path: str, poison_empty: None) -> None:
    for kind in ("no_edges", "one_hub"):
        blocks = make_blocks(kind, num_rows=3)
        x, table, residual = torch.randn(3, 5), torch.randn(blocks.num_table, 5), torch.randn(3, 5)
        out = run(path, blocks, x, table, None, residual, hub_edges=8)
        assert_as_exact(out, blocks, x, table, None, residual)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "triton"])
def ops(request: pytest.FixtureRequest) -> Iterator[None]:
    """The ops as they are registered, then with the interpreted kernel in place of the CPU path."""
    if request.param == "cpu":
        yield
    elif DEVICE.type != "cpu":
        pytest.skip("the ops of this machine's GPU are tested by test_devices.py")
    else:
        with cpu_ops_are(aggregate=aggregate_module.aggregate_triton) as calls:
            yield
        assert calls["aggregate"] > 0


def make_batch(name: str = "weighted_directed", hub_edges: int = 512) -> Batch:
    graph = GRAPHS[name].graph()
    parts = random_partition(graph, 5)
    loader = ClusterLoader(parts.permute(graph), parts, 2, x=torch.randn(graph.num_nodes, 3, dtype=torch.float64))
    loader._planner = Planner(loader.graph, hub_edges)
    return loader.batch([0, 3])


@pytest.mark.parametrize("with_halo", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("name", ["weighted_directed", "weighted_symmetric"])
def test_gradients(ops: None, name: str, reduce: functional.Reduce, with_halo: bool) -> None:
    batch = make_batch(name, hub_edges=3)
    assert batch.hubs
    num_rows = batch.num_nodes + (batch.num_halo if with_halo else 0)
    history = None if with_halo else torch.randn(30, 3, dtype=torch.float64)
    outer = [batch.outer.rowptr, batch.outer_joint_col] if with_halo else list(batch.outer)
    x = torch.randn(num_rows, 3, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(batch.num_nodes, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(batch.num_edges, dtype=torch.float64, requires_grad=True)
    leaves = [x, weight, residual]

    def ours(x: Tensor, weight: Tensor | None, residual: Tensor) -> Tensor:
        return functional.aggregate(
            x, batch, history, reduce, edge_weight=weight, residual=residual, residual_weight=0.3
        )  # fmt: skip

    out = ours(*leaves)
    expected = aggregate_ref(
        x, history, weight, list(batch.inner), outer, reduce, residual=residual, residual_weight=0.3
    )
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)
    )
    # the graph's own weights, whose transpose may be the block itself
    out = ours(x, batch.edge_weight, residual)
    expected = aggregate_ref(
        x, history, batch.edge_weight, list(batch.inner), outer, reduce, residual=residual, residual_weight=0.3
    )
    torch.testing.assert_close(
        torch.autograd.grad(out, [x, residual], cotangent), torch.autograd.grad(expected, [x, residual], cotangent)
    )


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_gradcheck(reduce: functional.Reduce) -> None:
    batch = make_batch()
    history = torch.randn(30, 3, dtype=torch.float64)
    x, residual = (torch.randn(batch.num_nodes, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(batch.num_edges, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight, residual: functional.aggregate(
            x, batch, history, reduce, edge_weight=weight, residual=residual, residual_weight=0.3
        ),
        (x, weight, residual),
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_of_the_residual_has_its_dtype(dtype: torch.dtype) -> None:
    batch = make_batch()
    residual = torch.randn(batch.num_nodes, 3).to(dtype).requires_grad_()
    out = functional.aggregate(batch.x.float(), batch, residual=residual, residual_weight=0.25)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, residual, grad)
    assert found.dtype == dtype
    assert torch.equal(found, (grad * 0.25).to(dtype))


def test_a_backward_does_not_multiply_the_gradient_first() -> None:
    batch = make_batch("symmetric")
    x = batch.x[: batch.num_nodes].clone().requires_grad_()
    residual = torch.randn_like(x)
    out = functional.aggregate(x, batch, batch.features.table, residual=residual, residual_weight=0.3)
    with Calls() as seen:
        torch.autograd.grad(out, x, torch.ones_like(out))
    assert "aggregate" in seen.names
    assert not {"mul", "mul_"} & set(seen.names[: seen.names.index("aggregate")])
    assert "mul" not in seen.names


def test_a_residual_of_weight_0_has_a_gradient_of_0() -> None:
    batch = make_batch()
    residual = torch.randn(batch.num_nodes, 3, dtype=torch.float64, requires_grad=True)
    out = functional.aggregate(batch.x, batch, residual=residual, residual_weight=0.0)
    assert torch.equal(out, functional.aggregate(batch.x, batch))
    assert not torch.autograd.grad(out.sum(), residual)[0].any()


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce, read", [("sum", "table"), ("mean", "staged")])
def test_op_is_registered_as_torch_library_wants(reduce: str, read: str) -> None:
    blocks = make_blocks("one_hub", num_table=7)
    inner, outer, table, scale = blocks.inner, blocks.outer, torch.randn(7, 4), None
    if read == "staged":
        table, scale = quantize_ref(table)
        outer = [outer[0], outer[1] + 40, outer[1], torch.arange(40, 47)]
    row = torch.repeat_interleave(torch.arange(7), inner[0].diff().long())
    rowptr, col, edge_id = transpose_torch(row, inner[1], 7)
    hubs, hubs_transposed = find_hubs(inner[0], inner[1].numel(), 8), find_hubs(rowptr, col.numel(), 8)
    x, residual = (torch.randn(7, 4, requires_grad=True) for _ in range(2))
    weight = torch.rand(blocks.num_edges, requires_grad=True)
    torch.library.opcheck(
        torch.ops.gas_triton.aggregate.default,
        (
            x, table, scale, weight, inner, outer, [rowptr, col], edge_id, hubs, hubs_transposed, reduce, 0.0, None, 8,
            read == "staged", residual, WEIGHT,
        ),
    )  # fmt: skip


def test_a_mix_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    batch = make_batch()
    table = batch.features.table

    def layer(x: Tensor, residual: Tensor) -> Tensor:
        mixed = functional.aggregate(x, batch, table, residual=residual, residual_weight=0.3)
        return functional.aggregate(mixed, batch, table, "mean", residual=residual, residual_weight=0.6).square().sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual = (torch.randn(batch.num_nodes, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses = layer(x, residual), compiled(x, residual)
    results = [(loss, *torch.autograd.grad(loss, (x, residual))) for loss in losses]
    torch.testing.assert_close(*results)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"residual": torch.zeros(8, 3)}, ValueError, r"residual must have shape \[12, 3\], got \[8, 3\]"),
        ({"residual": torch.zeros(12, 4)}, ValueError, r"residual must have shape \[12, 3\], got \[12, 4\]"),
        ({"residual": torch.zeros(12)}, ValueError, r"residual must have shape \[12, 3\], got \[12\]"),
        ({"residual": torch.zeros(12, 3).long()}, TypeError, r"residual must be a floating .* torch.int64 \[12, 3\]"),
        ({"residual": [1.0]}, TypeError, "residual must be a floating tensor, got list"),
        ({"residual": torch.zeros(12, 3, device="meta")}, ValueError, "residual is on meta but the batch is on cpu"),
        ({"residual": None}, ValueError, "residual_weight=0.1 needs a residual, got None"),
        ({"residual_weight": 1.5}, ValueError, r"residual_weight must be in \[0, 1\], got 1.5"),
        ({"residual_weight": -0.1}, ValueError, r"residual_weight must be in \[0, 1\], got -0.1"),
        ({"residual_weight": float("nan")}, ValueError, r"residual_weight must be in \[0, 1\], got nan"),
        ({"reduce": "max"}, ValueError, "residual is for reduce 'sum' or 'mean', got 'max'"),
        ({"reduce": "min"}, ValueError, "residual is for reduce 'sum' or 'mean', got 'min'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = make_batch()
    assert batch.num_nodes == 12
    given = {"residual": torch.zeros(12, 3), "residual_weight": 0.1, **change}
    with pytest.raises(error, match=message):
        functional.aggregate(batch.x, batch, **given)

"""The Triton kernels against float64: compiled where there is a GPU, in Triton's interpreter elsewhere."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gas_triton.csr import find_hubs
from gas_triton.kernels.aggregate import aggregate_ref, aggregate_triton, winners_triton
from gas_triton.kernels.aggregate_cpu import aggregate_cpu, winners_cpu
from gas_triton.kernels.aggregate_triton import tile
from gas_triton.kernels.dropout import dropout_cpu, dropout_triton, keep_mask
from gas_triton.kernels.edge_dot import edge_dot_cpu, edge_dot_triton
from gas_triton.kernels.pull import widen
from gas_triton.kernels.push import quantize_ref
from gas_triton.kernels.transpose import transpose_torch
from tests import blocks as cases
from tests.blocks import KINDS, Blocks, make_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = torch.tensor([123_456_789_012_345], device=DEVICE)


def assert_as_exact(*args, **kwargs):
    cases.assert_as_exact(*args, **kwargs, interpreted=DEVICE.type == "cpu")


def on_device(tensors):
    return [t.to(DEVICE) for t in tensors]


def run(blocks, x, table, weight=None, reduce="sum", dropout=0.0, hub_edges=512, scale=None, staged=False):
    inner, outer = on_device(blocks.inner), on_device(blocks.outer)
    hubs = find_hubs(inner[0] + outer[0], blocks.num_edges, hub_edges)
    seed = SEED if dropout else None
    return aggregate_triton(
        x, table, scale, weight, inner, outer, [], None, hubs, [], reduce, dropout, seed, hub_edges, staged
    )


@pytest.fixture
def rows(request):
    def make(blocks, num_features, dtype=torch.float32, table_dtype=None):
        x = torch.randn(blocks.num_rows, num_features, device=DEVICE).to(dtype)
        table = torch.randn(blocks.num_table, num_features, device=DEVICE).to(table_dtype or dtype)
        return x, table

    return make


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_reduction_on_every_kind_of_graph(kind, reduce, rows):
    blocks = make_blocks(kind)
    x, table = rows(blocks, 6)
    weight = torch.randn(blocks.num_edges, device=DEVICE)
    out, winner = run(blocks, x, table, weight, reduce)
    assert_as_exact(out, x, table, weight, blocks, reduce)
    if reduce in ("max", "min"):
        expected = aggregate_cpu(
            x.cpu(), table.cpu(), None, weight.cpu(), blocks.inner, blocks.outer, [], None, [], [], reduce, 0.0, None,
            512, False,
        )[1]  # fmt: skip
        assert torch.equal(winner.cpu(), expected)


@pytest.mark.parametrize("num_features", [1, 3, 33, 130, 257])
def test_odd_widths(num_features, rows):
    blocks = make_blocks("mixed", num_rows=3, num_table=4)
    x, table = rows(blocks, num_features)
    assert_as_exact(run(blocks, x, table)[0], x, table, None, blocks)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_mix_of_dtypes(dtype, table_dtype, rows):
    blocks = make_blocks("mixed", num_rows=4)
    x, table = rows(blocks, 8, dtype, table_dtype)
    weight = torch.rand(blocks.num_edges, device=DEVICE)
    assert_as_exact(run(blocks, x, table, weight)[0], x, table, weight, blocks)


class Stored(NamedTuple):
    """A history in its storage dtype, and what its rows stand for."""

    blocks: Blocks
    table: Tensor
    scale: Tensor | None
    halo_ids: Tensor
    values: Tensor

    def rows(self, staged, device):
        """(table, scale) as the op takes them; in the whole table, rows of no halo node are NaN."""
        table, scale = self.table.clone(), None if self.scale is None else self.scale.clone()
        if staged:
            table, scale = table[self.halo_ids], None if scale is None else scale[self.halo_ids]
        else:
            is_halo = torch.zeros(table.size(0), dtype=torch.bool).index_fill(0, self.halo_ids, True)
            (table if scale is None else scale)[~is_halo] = float("nan")
        return table.to(device), None if scale is None else scale.to(device)


def store(stored, kind="mixed", num_features=6, num_rows=7):
    blocks = make_blocks(kind, num_rows)
    halo_ids, slot = torch.unique(blocks.outer[1], return_inverse=True)
    blocks = blocks._replace(outer=[*blocks.outer, slot.to(torch.int32), halo_ids.long()])
    # rows of very different size, as a scale a row is for
    values = torch.randn(blocks.num_table, num_features) * torch.logspace(-2, 2, blocks.num_table)[:, None]
    table, scale = quantize_ref(values) if stored == torch.int8 else (values.to(stored), None)
    return Stored(blocks, table, scale, halo_ids.long(), widen(table, scale, torch.float64))


TABLES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("stored", TABLES)
def test_every_table_in_place_and_staged(stored, reduce, dropout):
    history = store(stored)
    blocks, x = history.blocks, torch.randn(7, 6)
    weight = torch.randn(blocks.num_edges)
    results = {}
    for staged in (False, True):
        table, scale = history.rows(staged, DEVICE)
        out = run(blocks, x.to(DEVICE), table, weight.to(DEVICE), reduce, dropout, scale=scale, staged=staged)
        results["triton", staged] = [t.cpu() for t in out]
        results["cpu", staged] = aggregate_cpu(
            x, *history.rows(staged, "cpu"), weight, blocks.inner, blocks.outer, [], None, [], [], reduce, dropout,
            SEED.cpu() if dropout else None, 512, staged,
        )  # fmt: skip
    for out, winner in results.values():
        assert_as_exact(out, x, history.values, weight, blocks, reduce, dropout, SEED)
        assert torch.equal(winner, results["cpu", False][1])
    for how in ("cpu", "triton"):
        assert torch.equal(results[how, False][0], results[how, True][0])


@pytest.mark.parametrize("kind, num_features", [("all_halo", 3), ("one_hub", 5), ("no_edges", 4), ("mixed", 130)])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_int8_tables_of_every_shape(dtype, staged, kind, num_features):
    history = store(torch.int8, kind, num_features)
    x, (table, scale) = torch.randn(7, num_features).to(dtype), history.rows(staged, DEVICE)
    out, _ = run(history.blocks, x.to(DEVICE), table, None, "sum", 0.3, hub_edges=8, scale=scale, staged=staged)
    assert_as_exact(out, x, history.values, None, history.blocks, "sum", 0.3, SEED)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
def test_edge_dot_of_stored_rows(stored, staged, dropout):
    history = store(stored, num_features=140)
    rowptr, col, slot, _ = history.blocks.outer
    grad, seed = torch.randn(7, 140), SEED if dropout else None
    right = history.values[col.long()]
    if dropout:
        right = right * keep_mask(col, 140, dropout, SEED.cpu()) / (1 - dropout)
    left = grad.double()[torch.repeat_interleave(torch.arange(7), rowptr.diff().long())]
    columns = (slot, col) if staged else (col, None)
    cpu = edge_dot_cpu(
        grad, *history.rows(staged, "cpu"), rowptr, *columns, None, 0, dropout, None if seed is None else seed.cpu()
    )
    columns = [None if t is None else t.to(DEVICE) for t in columns]
    triton = edge_dot_triton(
        grad.to(DEVICE), *history.rows(staged, DEVICE), rowptr.to(DEVICE), *columns, None, 0, dropout, seed
    )
    # 140 products in float32, each off by a few units
    bound = 150 * 2.0**-24 * (left * right).abs().sum(1)
    for out in (cpu, triton.cpu()):
        assert ((out.double() - (left * right).sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("hub_edges", [4, 16])
def test_hub_rows_are_split_and_combined(hub_edges, reduce, rows):
    blocks = make_blocks("one_hub")
    x, table = rows(blocks, 5)
    weight = torch.randn(blocks.num_edges, device=DEVICE)
    whole = run(blocks, x, table, weight, reduce)
    out, winner = run(blocks, x, table, weight, reduce, hub_edges=hub_edges)
    assert_as_exact(out, x, table, weight, blocks, reduce)
    assert torch.equal(winner, whole[1])


def test_a_nan_is_an_extremum(rows):
    blocks = make_blocks("mixed")
    x, table = rows(blocks, 3)
    x[int(blocks.inner[1][0])] = float("nan")
    out, _ = run(blocks, x, table, reduce="max")
    expected = aggregate_ref(x.cpu(), table.cpu(), None, blocks.inner, blocks.outer, "max")
    assert expected.isnan().any()
    assert torch.equal(out.cpu().isnan(), expected.isnan())


def test_outer_columns_read_x_where_there_is_no_table(rows):
    blocks = make_blocks("mixed", num_rows=5, num_table=5)
    x, _ = rows(blocks, 4)
    out, _ = run(blocks, x, None)
    assert_as_exact(out, x, x, None, blocks)


def test_rows_of_a_wider_tensor_are_read_in_place(rows):
    blocks = make_blocks("mixed")
    x, table = rows(blocks, 12)
    out, _ = run(blocks, x[:, :5], table[:, 4:9])
    assert_as_exact(out, x[:, :5], table[:, 4:9], None, blocks)


def test_strided_features_and_weights_are_not_misread(rows):
    blocks = make_blocks("mixed")
    x, table = rows(blocks, 4)
    strided = table.T.contiguous().T
    weight = torch.rand(blocks.num_edges, 2, device=DEVICE)[:, 0]
    out, _ = run(blocks, x.T.contiguous().T, strided, weight)
    assert_as_exact(out, x, table, weight, blocks)


def test_dropout_of_table_rows_equals_the_mask_of_the_reference(rows):
    blocks = make_blocks("mixed")
    x, table = rows(blocks, 9)
    out, _ = run(blocks, x, table, dropout=0.4)
    assert_as_exact(out, x, table, None, blocks, dropout=0.4, seed=SEED)


def test_dropout_kernel_equals_the_torch_hash(rows):
    x = torch.randn(6, 37, device=DEVICE)
    ids = torch.tensor([0, 5, 2**31 - 1, 12, 5, 99], device=DEVICE)
    for p in (0.1, 0.5, 0.9):
        out = dropout_triton(x, ids, p, SEED)
        assert torch.equal(out.cpu(), dropout_cpu(x.cpu(), ids.cpu(), p, SEED.cpu()))
        assert torch.equal(out[1] != 0, out[4] != 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dropped_values_are_zero_whatever_they_were(dtype):
    x = torch.randn(37, 6, dtype=dtype, device=DEVICE).t()
    x[:, ::3], x[:, 1::3] = torch.inf, torch.nan
    ids = torch.arange(6, device=DEVICE)
    kept = keep_mask(ids.cpu(), 37, 0.5, SEED.cpu())
    expected = torch.where(kept, x.cpu() * 2.0, 0.0)
    outs = [dropout_cpu(x.cpu(), ids.cpu(), 0.5, SEED.cpu())]
    # the interpreter multiplies bfloat16 wrongly
    if DEVICE.type == "cuda" or dtype != torch.bfloat16:
        outs.append(dropout_triton(x, ids, 0.5, SEED).cpu())
    for out in outs:
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_dropout_mask_is_fair_and_follows_its_keys():
    ids = torch.arange(2000)
    mask = keep_mask(ids, 64, 0.3, torch.tensor([7]))
    kept = mask.double().mean()
    # 128 000 draws: six standard deviations of the mean are 0.0077
    assert abs(kept - 0.7) < 0.0077
    for other in (keep_mask(ids, 64, 0.3, torch.tensor([8])), keep_mask(ids + 2000, 64, 0.3, torch.tensor([7]))):
        agreement = (mask == other).double().mean()
        assert abs(agreement - 0.58) < 0.01
    by_feature = mask.double().mean(0)
    by_row = mask.double().mean(1)
    assert by_feature.min() > 0.63
    assert by_feature.max() < 0.77
    assert abs(by_row.var() - 0.21 / 64) < 0.0006


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_an_extremum_goes_to_the_winning_edge(kind, reduce, rows):
    blocks = make_blocks(kind)
    x, table = rows(blocks, 5)
    weight = torch.randn(blocks.num_edges, device=DEVICE)
    _, winner = run(blocks, x, table, weight, reduce)
    row = torch.repeat_interleave(torch.arange(blocks.num_rows), blocks.inner[0].diff().long())
    rowptr, col, edge_id = on_device(transpose_torch(row, blocks.inner[1], blocks.num_rows))
    grad = torch.randn(blocks.num_rows, 5, device=DEVICE)
    weight_t = weight[edge_id]
    for hub_edges in (4, 512):
        hubs = find_hubs(rowptr, col.numel(), hub_edges)
        out = winners_triton(grad, winner, weight_t, [rowptr, col], edge_id, hubs, hub_edges)
        expected = winners_cpu(
            grad.cpu(), winner.cpu(), weight_t.cpu(), [rowptr.cpu(), col.cpu()], edge_id.cpu(), [], hub_edges
        )
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind, num_features", [*((kind, 3) for kind in KINDS), ("mixed", 140)])
def test_edge_dot(kind, num_features, dropout, rows):
    blocks = make_blocks(kind, num_rows=4)
    grad, table = rows(blocks, num_features, torch.float32, torch.bfloat16)
    rowptr, col = on_device(blocks.outer)
    seed = SEED if dropout else None
    out = edge_dot_triton(grad, table, None, rowptr, col, None, None, 0, dropout, seed)
    row = torch.repeat_interleave(torch.arange(4), blocks.outer[0].diff().long())
    right = table.cpu().double()[blocks.outer[1].long()]
    if dropout:
        right = right * keep_mask(blocks.outer[1], num_features, dropout, SEED.cpu()) / (1 - dropout)
    expected = (grad.cpu().double()[row] * right).sum(1)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    cpu = edge_dot_cpu(
        grad.cpu(), table.cpu(), None, *blocks.outer, None, None, 0, dropout, None if seed is None else seed.cpu()
    )
    torch.testing.assert_close(cpu.double(), expected, rtol=1e-5, atol=1e-5)


def test_edge_dot_counts_only_features_that_an_edge_won(rows):
    blocks = make_blocks("mixed", num_rows=4)
    x, table = rows(blocks, 3)
    _, winner = run(blocks, x, table, reduce="max")
    grad = torch.randn(4, 3, device=DEVICE)
    first = blocks.inner[1].numel()
    args = (None, *on_device(blocks.outer), None, winner, first, 0.0, None)
    row = torch.repeat_interleave(torch.arange(4), blocks.outer[0].diff().long())
    won = winner.cpu()[row] == torch.arange(first, blocks.num_edges)[:, None]
    expected = (grad.cpu()[row] * table.cpu()[blocks.outer[1].long()] * won).sum(1)
    assert won.any()
    torch.testing.assert_close(edge_dot_triton(grad, table, *args).cpu(), expected)


def test_every_output_is_written(rows, poison_empty):
    for kind in ("no_edges", "one_hub"):
        blocks = make_blocks(kind)
        x, table = rows(blocks, 5)
        for reduce in ("sum", "max"):
            out, _ = run(blocks, x, table, reduce=reduce, hub_edges=8)
            assert_as_exact(out, x, table, None, blocks, reduce)


def test_no_rows_and_no_features():
    empty = [torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE)]
    out, _ = aggregate_triton(
        torch.empty(0, 4, device=DEVICE), None, None, None, empty, [], [], None, [], [], "sum", 0.0, None, 8, False
    )
    assert list(out.shape) == [0, 4]
    assert out.device.type == DEVICE.type


def test_tiles_fill_a_warp_with_vectors_of_16_bytes():
    for itemsize in (1, 2, 4, 8):
        for num_features in (1, 7, 32, 100, 128, 256, 1433):
            block_f, num_rows = tile(num_features, itemsize)
            # of int8, with vectors of 8
            assert block_f * num_rows * itemsize == 32 * (8 if itemsize == 1 else 16)
            assert block_f >= num_features or num_rows == 1

"""Reading stored rows: values, CPU and Triton bit by bit, copies as stored, and that autograd sees the writes."""

import pytest
import torch

from gas_triton.kernels.pull import gather_rows, gather_triton, pull_cpu, pull_triton
from gas_triton.kernels.push import quantize_ref

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = torch.tensor([3, 0, 11, 3, 7])


def make_table(dtype, num_features=6):
    x = torch.randn(12, num_features) * 3
    return quantize_ref(x) if dtype == torch.int8 else (x.to(dtype), None)


def pull(how, table, scale, ids, dtype):
    if how == "cpu":
        return pull_cpu(table, scale, ids, dtype)
    scale = None if scale is None else scale.to(DEVICE)
    return pull_triton(table.to(DEVICE), scale, ids.to(DEVICE), dtype).cpu()


def gather(how, table, ids, out, **options):
    if how == "cpu":
        gather_rows(table, ids, out)
        return out
    out = out.to(DEVICE)
    gather_triton(table.to(DEVICE), ids.to(DEVICE), out, **options)
    return out.cpu()


both = pytest.mark.parametrize("how", ["cpu", "triton"])


@both
@pytest.mark.parametrize("stored", [*FLOATS, torch.int8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_widened_in_float32(dtype, stored, how):
    table, scale = make_table(stored)
    expected = torch.stack([table[i] if scale is None else table[i].float() * scale[i] for i in IDS]).double()
    # float64 reaches a narrow dtype through float32
    expected = expected.to(dtype) if dtype in (torch.float64, torch.float32) else expected.float().to(dtype)
    out = pull(how, table, scale, IDS, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


@both
def test_a_row_that_was_not_finite_reads_as_nan(how):
    rows, scale = quantize_ref(torch.tensor([[1.0, float("nan")], [2.0, 0.0]]))
    out = pull(how, rows, scale, torch.tensor([1, 0]), torch.float32)
    assert out[0].tolist() == [2.0, 0.0]
    assert out[1].isnan().all()


@both
@pytest.mark.parametrize("stored", [*FLOATS, torch.int8])
@pytest.mark.parametrize("num_features", [1, 33, 1100])
def test_gathered_rows_are_bits_of_the_table(num_features, stored, how):
    table, _ = make_table(stored, num_features)
    if stored != torch.int8:
        table[3, 0] = float("nan")
    out = gather(how, table, IDS, torch.empty(5, num_features, dtype=stored))
    assert torch.equal(out.view(torch.uint8), torch.stack([table[i] for i in IDS]).view(torch.uint8))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_gathering_a_vector(dtype, how):
    values = torch.arange(12).to(dtype) * 3
    assert gather(how, values, IDS, torch.empty(5, dtype=dtype)).tolist() == [9, 0, 33, 9, 21]


@pytest.mark.parametrize("num_programs", [1, 2, 12])
def test_a_few_programs_copy_all_rows(num_programs):
    # 4 KiB of a row and 16 of a block: 50 rows are 13 blocks
    table, ids = torch.randn(60, 1024), torch.randint(60, (50,))
    out = gather("triton", table, ids, torch.full((50, 1024), float("nan")), num_programs=num_programs)
    assert torch.equal(out, table[ids])


@both
def test_strided_tables_are_not_misread(how):
    table, ids = torch.randn(12, 9), torch.tensor([4, 11])
    for strided in (table[:, 2:7], table.T.contiguous().T):
        assert torch.equal(pull(how, strided, None, ids, torch.float32), strided[ids])
        assert torch.equal(gather(how, strided, ids, torch.empty(2, strided.size(1))), strided[ids])


@both
def test_no_rows(how):
    ids = torch.empty(0, dtype=torch.int64)
    assert pull(how, torch.ones(3, 4), None, ids, torch.bfloat16).shape == (0, 4)
    assert gather(how, torch.ones(3, 4), ids, torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("function", [gather_rows, gather_triton])
def test_a_backward_does_not_read_rows_that_were_overwritten(function):
    table, staged = torch.randn(12, 4, device=DEVICE), torch.empty(5, 4, device=DEVICE)
    ids, weight = IDS.to(DEVICE), torch.randn(4, device=DEVICE, requires_grad=True)
    function(table, ids, staged)
    out = (staged * weight).sum()
    function(table, ids, staged)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize(
    "out", [torch.empty(4, 3), torch.empty(5, 4), torch.empty(5, 3).half(), torch.empty(3, 5).T, torch.empty(5)]
)
def test_an_out_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match=r"out must be contiguous torch.float32 \[5, 3\], got torch"):
        gather_rows(torch.ones(12, 3), IDS, out)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
def test_a_pinned_table_is_read_from_the_device(stored):
    table, scale = make_table(stored, 256)
    pinned, ids = table.pin_memory(), IDS.cuda()
    out = torch.empty(5, 256, dtype=stored, device="cuda")
    gather_rows(pinned, ids, out)
    assert torch.equal(out.cpu(), table[IDS])
    pulled = torch.ops.gas_triton.pull(pinned, None if scale is None else scale.pin_memory(), ids, torch.float32)
    assert torch.equal(pulled.cpu(), pull_cpu(table, scale, IDS, torch.float32))


def test_pull_is_registered_as_torch_library_wants():
    for stored in (torch.bfloat16, torch.int8):
        torch.library.opcheck(torch.ops.gas_triton.pull.default, (*make_table(stored), IDS, torch.float32))

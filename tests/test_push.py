"""Pushes into tables of every dtype: what is stored, which rows are refused, CPU and Triton bit by bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode

from gas_triton.kernels.push import (
    NO_ROW,
    check_cpu,
    check_triton,
    pack_cpu,
    pack_triton,
    push_cpu,
    push_triton,
    quantize_ref,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED = (*FLOATS, torch.int8)
NODES = torch.tensor([2, 3, 4, 7, 8, 9, 10])
SPANS = torch.tensor([[2, 5], [7, 11]])
NUM_ROWS, OLD, OLD_SCALE, CLOCK = 12, 7, 0.5, 9
INF, NAN = float("inf"), float("nan")

# numpy, under Triton's interpreter, tells of the infinities and NaNs that these tests are about
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
both = pytest.mark.parametrize("how", ["cpu", "triton"])


class Table:
    """A history with old values in every row."""

    def __init__(self, dtype, num_features):
        self.rows = torch.full((NUM_ROWS, num_features), OLD, dtype=dtype)
        self.scale = torch.full((NUM_ROWS,), OLD_SCALE) if dtype == torch.int8 else None
        self.last_push = torch.full((NUM_ROWS,), -1, dtype=torch.int32)
        self.report = torch.tensor([0, NO_ROW])

    def push(self, how, x, nonfinite="allow", nodes=NODES, spans=SPANS):
        function, device = (push_cpu, "cpu") if how == "cpu" else (push_triton, DEVICE)
        names = ("rows", "scale", "last_push", "report")
        on_device = {name: None if (t := getattr(self, name)) is None else t.to(device) for name in names}
        x = x.to(device) if x.device.type != torch.device(device).type else x
        function(*on_device.values(), x, nodes.to(device), spans, torch.tensor(CLOCK, device=device), nonfinite)
        for name, t in on_device.items():
            setattr(self, name, None if t is None else t.cpu())
        return self

    def read(self):
        return self.rows.double() if self.scale is None else (self.rows.float() * self.scale[:, None]).double()

    def untouched(self):
        """Which rows are as they were, push time and scale too."""
        is_old = (self.rows == OLD).all(1) & (self.last_push == -1)
        return is_old if self.scale is None else is_old & (self.scale == OLD_SCALE)


def pack(how, x, dtype, nonfinite="allow"):
    function, device = (pack_cpu, "cpu") if how == "cpu" else (pack_triton, DEVICE)
    report = torch.tensor([0, NO_ROW], device=device)
    rows, scale = function(x.to(device), dtype, nonfinite, report, NODES.to(device))
    return rows.cpu(), scale.cpu(), report.cpu()


def stored_by_numpy(x, dtype):
    """(rows, scale or None) by another hand: numpy rounds, and quantises in float32."""
    if dtype != torch.int8:
        return (x if x.dtype == dtype or dtype == torch.float64 else x.float()).to(dtype), None
    values = x.float().numpy()
    scale = np.abs(values).max(1) / np.float32(127)
    quotient = np.divide(values, scale[:, None], out=np.zeros_like(values), where=scale[:, None] > 0)
    return torch.from_numpy(np.rint(quotient).astype(np.int8)), torch.from_numpy(scale)


def draw(dtype=torch.float32, num_features=6):
    x = (torch.randn(7, num_features) * torch.logspace(-6, 3, 7)[:, None]).to(dtype)
    x[3] = 0.0
    return x


@both
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_rounded_to_nearest(dtype, stored, how):
    x = draw(dtype, 33)
    rows, scale = stored_by_numpy(x, stored)
    table = Table(stored, 33).push(how, x)
    assert torch.equal(table.rows[NODES], rows)
    assert table.last_push[NODES].tolist() == [CLOCK] * 7
    assert table.untouched().nonzero().flatten().tolist() == [0, 1, 5, 6, 11]
    if scale is not None:
        assert torch.equal(table.scale[NODES], scale)
    packed = pack(how, x, stored)
    assert torch.equal(packed[0], rows)
    assert torch.equal(packed[1], torch.empty(0) if scale is None else scale)


@both
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("num_features", [1, 130, 1024, 2500])
def test_any_width_and_strided_rows(num_features, stored, how):
    x = draw(num_features=num_features)
    x[0, -1] = 50.0
    rows, scale = stored_by_numpy(x, stored)
    for given_x in (x, x.T.contiguous().T, torch.cat([x, x], 1)[:, num_features:]):
        table = Table(stored, num_features).push(how, given_x, "skip")
        assert torch.equal(table.rows[NODES], rows)
        assert scale is None or torch.equal(table.scale[NODES], scale)
    x[5, -1] = NAN
    assert Table(stored, num_features).push(how, x, "skip").untouched()[NODES].tolist() == [False] * 5 + [True, False]


@both
@pytest.mark.parametrize("half", [0.5, 1.5, -2.5, 63.5])
def test_int8_rounds_half_to_even(half, how):
    table = Table(torch.int8, 2).push(how, torch.tensor([[127.0, half]]).expand(7, 2))
    assert table.rows[2].tolist() == [127, round(half)]


BAD = {
    torch.float32: [NAN, INF, -INF],
    torch.float64: [NAN, -INF],
    torch.bfloat16: [NAN, INF, 3.4e38],
    torch.float16: [NAN, 70000.0, -65520.0],
    torch.int8: [NAN, INF, -INF, 3.4028234663852886e38],
}


@both
@pytest.mark.parametrize("nonfinite", ["allow", "warn", "skip", "raise"])
@pytest.mark.parametrize("stored, value", [(stored, value) for stored in STORED for value in BAD[stored]])
def test_bad_rows(stored, value, nonfinite, how):
    x = draw()
    x[1, 2], x[4, 0], x[4, 5] = value, value, -value
    table = Table(stored, 6).push(how, x, nonfinite)
    assert table.report.tolist() == ([0, NO_ROW] if nonfinite == "allow" else [2, 3])
    bad, good = NODES[[1, 4]], NODES[[0, 2, 3, 5, 6]]
    if nonfinite == "raise" and how == "cpu":
        assert table.untouched().all()
        return
    rows, scale = stored_by_numpy(x[[0, 2, 3, 5, 6]], stored)
    assert torch.equal(table.rows[good], rows)
    assert scale is None or torch.equal(table.scale[good], scale)
    assert (table.last_push[good] == CLOCK).all()
    if nonfinite in ("allow", "warn"):
        assert not table.read()[bad].isfinite().all(1).any()
        assert (table.last_push[bad] == CLOCK).all()
        if stored == torch.int8:
            assert table.read()[bad].isnan().all()
    else:
        assert table.untouched()[bad].all()
    packed = pack(how, x, stored, nonfinite)
    assert packed[2].tolist() == table.report.tolist()
    assert torch.equal(packed[0][[0, 2, 3, 5, 6]], rows)
    kept = Table(stored, 6).push(how, x, "warn")
    torch.testing.assert_close(packed[0], kept.rows[NODES], rtol=0, atol=0, equal_nan=True)


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_features", [3, 1100])
def test_check_counts_bad_rows_and_changes_nothing(num_features, dtype, how):
    function, device = (check_cpu, "cpu") if how == "cpu" else (check_triton, DEVICE)
    report = torch.tensor([0, NO_ROW], device=device)
    x = torch.randn(num_features, NODES.numel()).to(dtype).to(device).t()
    function(x, report, NODES.to(device))
    assert report.tolist() == [0, NO_ROW]
    x[5, 1], x[2, num_features - 1] = INF, NAN
    before = x.clone()
    function(x, report, NODES.to(device))
    assert report.tolist() == [2, int(NODES[2])]
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@both
@pytest.mark.parametrize("dtype, stored, largest", [
    (torch.float32, torch.float16, 65519.0),
    (torch.float32, torch.float32, 3.4e38),
    (torch.float64, torch.float64, 1.7e308),
    (torch.float32, torch.bfloat16, 3.39e38),
    (torch.float32, torch.int8, 3.4e38),
])  # fmt: skip
def test_the_largest_rows_are_not_bad(dtype, stored, largest, how):
    x = torch.full((7, 5), largest, dtype=dtype)
    table = Table(stored, 5).push(how, x, "raise")
    assert table.report.tolist() == [0, NO_ROW]
    torch.testing.assert_close(table.read()[NODES], x.double(), rtol=2.0**-8, atol=0)


@both
def test_float64_beyond_float32_is_bad_in_a_narrower_table(how):
    x = torch.ones(7, 3, dtype=torch.float64)
    x[6, 1] = 1e39
    for stored in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        assert Table(stored, 3).push(how, x, "skip").report.tolist() == [1, 10]
    assert Table(torch.float64, 3).push(how, x, "skip").report.tolist() == [0, NO_ROW]


@both
def test_the_report_adds_up_over_pushes(how):
    x, table = draw(), Table(torch.float32, 6)
    for bad_row, report in ((5, [1, 9]), (6, [2, 9]), (2, [3, 4])):
        bad = x.clone()
        bad[bad_row] = INF
        assert table.push(how, bad, "skip").report.tolist() == report
        assert table.push(how, x, "skip").report.tolist() == report


@both
def test_rows_too_small_for_a_scale_are_zero(how):
    small = [[0.0, 0.0], [1e-40, -1e-45], [1e-37, 0.0], [1.4e-36, 0.0]]
    x = torch.tensor([*small, [1.5e-36, -1.5e-36], [1.0, 0.0], [0.0, 1.0]])
    table = Table(torch.int8, 2).push(how, x, "raise")
    assert table.scale[NODES][:4].tolist() == [0.0] * 4
    assert table.rows[NODES].tolist() == [[0, 0]] * 4 + [[127, -127], [127, 0], [0, 127]]
    assert table.report.tolist() == [0, NO_ROW]


@both
@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
def test_no_rows(stored, how):
    empty = torch.empty(0, dtype=torch.int64)
    table = Table(stored, 3).push(how, torch.empty(0, 3), "raise", empty, torch.empty(0, 2, dtype=torch.int64))
    assert table.untouched().all()
    assert table.report.tolist() == [0, NO_ROW]


class BoolOutputs(TorchDispatchMode):
    """The most elements of a bool tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("stored", STORED)
def test_finite_rows_are_not_looked_at_one_by_one(stored):
    table, x = Table(stored, 100), torch.randn(7, 100)
    with BoolOutputs() as outputs:
        table.push("cpu", x, "raise")
    assert outputs.most <= 7


@pytest.mark.parametrize("stored, bound", [(torch.bfloat16, 2e-3), (torch.float16, 3e-4), (torch.int8, 8e-3)])
def test_storage_error_of_usual_rows(stored, bound):
    x = torch.randn(4000, 128).relu()
    rows, scale = quantize_ref(x) if stored == torch.int8 else (x.to(stored), torch.ones(4000))
    error = rows.double() * scale.double()[:, None] - x.double()
    assert bound / 4 < float(error.norm() / x.double().norm()) <= bound


FINITE = hnp.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**126), 2.0**126, width=32))


@settings(deadline=None, max_examples=200)
@given(FINITE)
def test_quantised_rows_are_within_half_a_step(values):
    x = torch.from_numpy(values)
    rows, scale = quantize_ref(x)
    largest = x.abs().amax(1).double()
    error = (rows.double() * scale.double()[:, None] - x.double()).abs().amax(1)
    is_zero = scale == 0.0
    # a row is only stored as 0 if its scale would be subnormal
    assert (largest[is_zero] <= 127 * 2.0**-126).all()
    assert (error <= scale.double() / 2 * (1 + 2.0**-15))[~is_zero].all()
    assert ((scale.double() - largest / 127).abs() <= largest * 2.0**-24)[~is_zero].all()
    assert (rows.abs().amax(1) == 127)[~is_zero].all()


@pytest.mark.parametrize("nonfinite", ["allow", "skip"])
@settings(deadline=None, max_examples=20)
@given(hnp.arrays(np.float32, (7, 3), elements=st.floats(width=32)), st.sampled_from(STORED))
def test_triton_and_cpu_store_the_same_bits(nonfinite, values, stored):
    x = torch.from_numpy(values)
    x[5, 1] = NAN
    tables = [Table(stored, 3).push(how, x, nonfinite) for how in ("cpu", "triton")]
    for name in ("rows", "scale", "last_push", "report"):
        ours, theirs = (getattr(table, name) for table in tables)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def opcheck_inputs():
    for stored in (torch.float32, torch.int8):
        table = Table(stored, 4)
        rest = (draw(num_features=4), NODES, SPANS, torch.tensor(CLOCK))
        for nonfinite in ("allow", "skip"):
            yield "push", (table.rows, table.scale, table.last_push, table.report, *rest, nonfinite)
            yield "pack", (rest[0], stored, nonfinite, table.report, NODES)
    yield "check", (rest[0], table.report, NODES)


def test_ops_are_registered_as_torch_library_wants():
    for name, inputs in opcheck_inputs():
        torch.library.opcheck(getattr(torch.ops.gas_triton, name).default, inputs)

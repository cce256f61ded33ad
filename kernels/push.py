"""Writing a batch's rows into a history, checked and rounded or quantised on the way.

    table[node_ids[r]] = store(x[r]),   last_push[node_ids[r]] = clock        r in 0 .. B-1

A floating table rounds to nearest. An int8 table has a float32 scale a row: `scale = max|x| / 127`, `store(x) =
round(x / scale)`, read back as `scale * store(x)`. A row is bad if what would be read back is not all finite:

    nonfinite   bad rows are
    "allow"     written, and not looked for
    "warn"      written and counted
    "skip"      counted; they keep their old values, scale and push time
    "raise"     counted; nothing is written on the CPU, on CUDA (where knowing would be waiting) as with "skip"

`report` is int64 [2], (bad rows so far, smallest graph id of one): the caller reads it. A bad row in int8 reads back
as NaN. `pack` makes the same rows without writing them anywhere, for tables that another engine copies them to; `check`
only looks, for rows that are stored as they are.

The rows of a batch are a few contiguous spans of the table, one a cluster: on the CPU they are copied span by span,
which is several times faster than a scatter of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import define

NONFINITE = ("raise", "warn", "skip", "allow")
NO_ROW = 2**62
CPU_BLOCK = 1 << 19


def quantize_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """The meaning of int8 storage in plain torch: (rows int8 [R, D], scale float32 [R]); the CPU path is this."""
    x = x.float()
    scale = torch.maximum(x.amax(1), x.amin(1).neg_()) / 127.0
    is_bad = ~(scale * 127.0).isfinite()
    # devices differ in what they do with subnormal numbers: a row so small is stored as 0
    scale.masked_fill_(scale < torch.finfo(torch.float32).tiny, 0.0).masked_fill_(is_bad, torch.nan)
    divisor = torch.where(scale > 0.0, scale, torch.inf)
    rows = torch.div(x, divisor[:, None]).round_().clamp_(-127.0, 127.0).nan_to_num_(0.0)
    return rows.to(torch.int8), scale


# --- Triton ---------------------------------------------------------------------------------------------------------


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """`value` in another dtype, to nearest even and through float32 as torch does, with the same bits everywhere."""
    if value.dtype == DTYPE:
        return value
    elif DTYPE.is_fp64():
        return value.to(tl.float64)
    elif DTYPE.is_bf16():
        # by hand, because Triton's interpreter truncates; a push waits for memory, not for these
        value = value.to(tl.float32)
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(tl.float32).to(DTYPE)


@triton.jit
def _magnitude(value, STORED: tl.constexpr):
    """|value as stored|, as an integer that orders like it; infinity comes after every number and NaN after that."""
    if STORED.is_int8():
        return value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    elif STORED.is_fp64():
        return value.to(tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return round_to(value, STORED).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _quantize(value, scale):
    divisor = tl.where(scale > 0.0, scale, float("inf"))
    value = tl.math.div_rn(value.to(tl.float32), tl.broadcast_to(divisor[:, None], value.shape))
    # adding and taking 1.5 * 2**23 leaves no bits for a fraction: rounds half to even
    value = (value + 12582912.0) - 12582912.0
    value = tl.minimum(tl.maximum(value, -127.0), 127.0)
    return tl.where(scale[:, None] == scale[:, None], value, 0.0).to(tl.int8)


@triton.jit(do_not_specialize=["num_rows"])
def _push_kernel(
    p_x, p_ids, p_rows, p_scale, p_last_push, p_clock, p_report, num_rows,
    F: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_ROWS: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
    SCATTER: tl.constexpr, CHECK: tl.constexpr, SKIP: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    STORED: tl.constexpr = p_rows.dtype.element_ty
    QUANTIZE: tl.constexpr = STORED.is_int8()
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_feature = tl.arange(0, BLOCK_F)
    m_row = o_row < num_rows
    o_write = o_row
    if SCATTER:
        o_write = tl.load(p_ids + o_row, mask=m_row, other=0)
    p_read = p_x + o_row[:, None] * STRIDE_X + o_feature[None, :]
    value = tl.load(p_read, mask=m_row[:, None] & (o_feature < F)[None, :], other=0.0)
    m_write = m_row
    if CHECK or QUANTIZE:
        largest = tl.max(_magnitude(value, STORED), axis=1)
        for o_tile in range(BLOCK_F, F, BLOCK_F):
            m = m_row[:, None] & (o_tile + o_feature < F)[None, :]
            more = tl.load(p_read + o_tile, mask=m, other=0.0)
            largest = tl.maximum(largest, tl.max(_magnitude(more, STORED), axis=1))
        if QUANTIZE:
            scale = tl.math.div_rn(largest.to(tl.float32, bitcast=True), tl.full([ROWS], 127.0, tl.float32))
            is_good = scale * 127.0 < float("inf")
            scale = tl.where(is_good, tl.where(scale < 1.1754943508222875e-38, 0.0, scale), float("nan"))
        else:
            is_good = largest < (0x7FF0000000000000 if STORED.is_fp64() else 0x7F800000)
        if CHECK:
            m_bad = m_row & (is_good == 0)
            ids = tl.load(p_ids + o_row, mask=m_bad, other=0)
            # whole numbers: the order in which they are added does not show
            tl.atomic_add(p_report + o_row * 0, tl.full([ROWS], 1, tl.int64), mask=m_bad, sem="relaxed")
            tl.atomic_min(p_report + 1 + o_row * 0, ids, mask=m_bad, sem="relaxed")
        if SKIP:
            m_write = m_row & is_good
    if QUANTIZE:
        tl.store(p_scale + o_write, scale, mask=m_write)
    if SCATTER:
        clock = tl.load(p_clock).to(tl.int32)
        tl.store(p_last_push + o_write, tl.broadcast_to(clock, [ROWS]), mask=m_write)
    if WRITE:
        for o_tile in range(0, F, BLOCK_F):
            m_feature = (o_tile + o_feature < F)[None, :]
            if F > BLOCK_F:
                value = tl.load(p_read + o_tile, mask=m_write[:, None] & m_feature, other=0.0)
            stored = _quantize(value, scale) if QUANTIZE else round_to(value, STORED)
            p_write = p_rows + o_write[:, None] * STRIDE_ROWS + (o_tile + o_feature)[None, :]
            tl.store(p_write, stored, mask=m_write[:, None] & m_feature)


# --- launch ---------------------------------------------------------------------------------------------------------


def tile(num_features: int) -> tuple[int, int]:
    """(BLOCK_F, ROWS) of one warp: 16 values a lane; a row of up to 1024 features is read only once."""
    block_f = min(triton.next_power_of_2(num_features), 1024)
    return block_f, max(1, 512 // block_f)


def _launch(
    x: Tensor, node_ids: Tensor, rows: Tensor, scale: Tensor | None, last_push: Tensor | None, clock: Tensor | None,
    report: Tensor, nonfinite: str,
) -> None:  # fmt: skip
    num_rows, num_features = x.shape
    if x.numel() == 0:
        return
    writes = rows is not x
    x = x if x.stride(1) == 1 else x.contiguous()
    block_f, block_rows = tile(num_features)
    is_push = last_push is not None
    with torch.cuda.device_of(x):
        _push_kernel[(triton.cdiv(num_rows, block_rows),)](
            x, node_ids, rows, scale, last_push, clock, report, num_rows, F=num_features, STRIDE_X=x.stride(0),
            STRIDE_ROWS=rows.stride(0), BLOCK_F=block_f, ROWS=block_rows, SCATTER=is_push,
            CHECK=nonfinite != "allow", SKIP=is_push and nonfinite in ("skip", "raise"), WRITE=writes, num_warps=1,
        )  # fmt: skip


def push_triton(
    table: Tensor, scale: Tensor | None, last_push: Tensor, report: Tensor, x: Tensor, node_ids: Tensor, spans: Tensor,
    clock: Tensor, nonfinite: str,
) -> None:  # fmt: skip
    _launch(x, node_ids, table, scale, last_push, clock, report, nonfinite)


def pack_triton(
    x: Tensor, dtype: torch.dtype, nonfinite: str, report: Tensor, node_ids: Tensor
) -> tuple[Tensor, Tensor]:
    rows, scale = _pack_fake(x, dtype, nonfinite, report, node_ids)
    _launch(x, node_ids, rows, scale if dtype == torch.int8 else None, None, None, report, nonfinite)
    return rows, scale


def check_triton(x: Tensor, report: Tensor, node_ids: Tensor) -> None:
    _launch(x, node_ids, x, None, None, None, report, "warn")


# --- CPU ------------------------------------------------------------------------------------------------------------


def push_cpu(
    table: Tensor, scale: Tensor | None, last_push: Tensor, report: Tensor, x: Tensor, node_ids: Tensor, spans: Tensor,
    clock: Tensor, nonfinite: str,
) -> None:  # fmt: skip
    is_bad = None if nonfinite == "allow" else _find_bad(x, table.dtype)
    if is_bad is not None:
        _count(is_bad, report, node_ids)
        if nonfinite == "raise":
            return
        if nonfinite == "skip":
            good = (~is_bad).nonzero().squeeze(1)
            ids = node_ids.index_select(0, good)
            rows, row_scale = pack_cpu(x.index_select(0, good), table.dtype, "allow", report, ids)
            table.index_copy_(0, ids, rows)
            if scale is not None:
                scale.index_copy_(0, ids, row_scale)
            last_push.index_fill_(0, ids, int(clock))
            return
    start = 0
    for first, last in spans.tolist():
        end = start + last - first
        _store(x[start:end], table[first:last], None if scale is None else scale[first:last])
        last_push[first:last].fill_(int(clock))
        start = end


def pack_cpu(x: Tensor, dtype: torch.dtype, nonfinite: str, report: Tensor, node_ids: Tensor) -> tuple[Tensor, Tensor]:
    rows, scale = _pack_fake(x, dtype, nonfinite, report, node_ids)
    is_bad = None if nonfinite == "allow" else _find_bad(x, dtype)
    if is_bad is not None:
        _count(is_bad, report, node_ids)
    _store(x, rows, scale if dtype == torch.int8 else None)
    return rows, scale


def check_cpu(x: Tensor, report: Tensor, node_ids: Tensor) -> None:
    is_bad = _find_bad(x, x.dtype)
    if is_bad is not None:
        _count(is_bad, report, node_ids)


def _store(x: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    if scale is None:
        # torch rounds float64 to the narrow dtypes through float32
        rows.copy_(x)
        return
    if x.numel() == 0:
        return
    # in pieces that stay in the cache: five passes over each
    step = max(1, CPU_BLOCK // x.size(1))
    for start in range(0, x.size(0), step):
        piece = slice(start, start + step)
        rows[piece], scale[piece] = quantize_ref(x[piece])


def _find_bad(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """bool [R] of the bad rows, or None if one pass over `x` shows that there are none."""
    if x.numel() == 0:
        return None
    if dtype == torch.int8:
        largest = torch.stack(torch.aminmax(x)).float().abs().amax()
        if (largest / 127.0 * 127.0).isfinite():
            return None
        is_bad = quantize_ref(x)[1].isnan()
    else:
        # a sum that overflows only costs the closer look
        wide = x.dtype == dtype and dtype.itemsize >= 4
        screen = x.sum() if wide else torch.stack(torch.aminmax(x)).to(dtype)
        if screen.isfinite().all():
            return None
        is_bad = ~x.to(dtype).isfinite().all(1)
    return is_bad if is_bad.any() else None


def _count(is_bad: Tensor, report: Tensor, node_ids: Tensor) -> None:
    ids = node_ids[is_bad]
    report[0] += ids.numel()
    report[1] = torch.minimum(report[1], ids.min())


# --- registration ---------------------------------------------------------------------------------------------------


def _push_fake(table, scale, last_push, report, x, node_ids, spans, clock, nonfinite):
    return None


def _pack_fake(
    x: Tensor, dtype: torch.dtype, nonfinite: str, report: Tensor, node_ids: Tensor
) -> tuple[Tensor, Tensor]:
    rows = torch.empty(x.shape, dtype=dtype, device=x.device)
    return rows, torch.empty(x.size(0) if dtype == torch.int8 else 0, dtype=torch.float32, device=x.device)


def _check_fake(x: Tensor, report: Tensor, node_ids: Tensor) -> None:
    return None


push = define(
    "push(Tensor(a!) table, Tensor(b!)? scale, Tensor(c!) last_push, Tensor(d!) report, Tensor x, Tensor node_ids, "
    "Tensor spans, Tensor clock, str nonfinite) -> ()",
    cpu=push_cpu,
    cuda=push_triton,
    fake=_push_fake,
)

pack = define(
    "pack(Tensor x, ScalarType dtype, str nonfinite, Tensor(a!) report, Tensor node_ids) -> (Tensor, Tensor)",
    cpu=pack_cpu,
    cuda=pack_triton,
    fake=_pack_fake,
)

check = define(
    "check(Tensor x, Tensor(a!) report, Tensor node_ids) -> ()",
    cpu=check_cpu,
    cuda=check_triton,
    fake=_check_fake,
)

"""Reading rows of a history: gathered and widened in one pass, or copied as they are stored.

    out[k] = table[ids[k]]                    pull of a floating table; gather_rows of any dtype, bit for bit
    out[k] = scale[ids[k]] * table[ids[k]]    pull of an int8 table, the product in float32

Rows are named by `ids`, int64; a row may be read more than once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import define
from gas_triton.kernels.push import round_to

# reads over PCIe need about 100 KB under way, which a dozen programs of 16 KiB have; more only take processors away
HOST_PROGRAMS = 12
TILE_BYTES = 1 << 14


def widen(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Stored rows as floating rows, in plain torch; `rows` itself where nothing changes."""
    return rows.to(dtype) if scale is None else rows.float().mul_(scale[:, None]).to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _pull_kernel(
    p_table, p_scale, p_ids, p_out, num_rows,
    F: tl.constexpr, STRIDE_TABLE: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    for o_block in range(tl.program_id(0).to(tl.int64), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        o_row = o_block * ROWS + tl.arange(0, ROWS)
        m_row = o_row < num_rows
        ids = tl.load(p_ids + o_row, mask=m_row, other=0).to(tl.int64)
        if HAS_SCALE:
            scale = tl.load(p_scale + ids, mask=m_row, other=0.0)
        for o_tile in range(0, F, BLOCK_F):
            o_feature = o_tile + tl.arange(0, BLOCK_F)
            m = m_row[:, None] & (o_feature < F)[None, :]
            value = tl.load(p_table + ids[:, None] * STRIDE_TABLE + o_feature[None, :], mask=m, other=0)
            if HAS_SCALE:
                value = value.to(tl.float32) * scale[:, None]
            tl.store(p_out + o_row[:, None] * F + o_feature[None, :], round_to(value, p_out.dtype.element_ty), mask=m)


def tile(num_features: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_F, ROWS) of eight warps, which together move `TILE_BYTES` of the wider dtype."""
    block_f = min(triton.next_power_of_2(num_features), 1024)
    return block_f, TILE_BYTES // itemsize // block_f


def _launch(table: Tensor, scale: Tensor | None, ids: Tensor, out: Tensor, num_programs: int | None) -> None:
    if out.numel() == 0:
        return
    table = table if table.stride(1) == 1 else table.contiguous()
    num_rows, num_features = out.shape
    block_f, rows = tile(num_features, max(table.element_size(), out.element_size()))
    num_blocks = triton.cdiv(num_rows, rows)
    with torch.cuda.device_of(out):
        _pull_kernel[(num_blocks if num_programs is None else min(num_blocks, num_programs),)](
            table, scale, ids, out, num_rows, F=num_features, STRIDE_TABLE=table.stride(0), BLOCK_F=block_f, ROWS=rows,
            HAS_SCALE=scale is not None, num_warps=8,
        )  # fmt: skip


def pull_triton(table: Tensor, scale: Tensor | None, ids: Tensor, dtype: torch.dtype) -> Tensor:
    out = _pull_fake(table, scale, ids, dtype)
    _launch(table, scale, ids, out, HOST_PROGRAMS if table.device.type == "cpu" else None)
    return out


def pull_cpu(table: Tensor, scale: Tensor | None, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return widen(table.index_select(0, ids), None if scale is None else scale.index_select(0, ids), dtype)


def _pull_fake(table: Tensor, scale: Tensor | None, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((ids.numel(), table.size(1)), dtype=dtype, device=ids.device)


pull = define(
    "pull(Tensor table, Tensor? scale, Tensor ids, ScalarType dtype) -> Tensor",
    cpu=pull_cpu,
    cuda=pull_triton,
    fake=_pull_fake,
)


def gather_rows(table: Tensor, ids: Tensor, out: Tensor, num_programs: int = HOST_PROGRAMS) -> None:
    """Copies rows as they are stored, on the current stream.

    Args:
        table: [N, D] or [N], any dtype; on the device of `out`, or in pinned host memory, which is read over PCIe.
        ids: int64 [R], on the device of `out`.
        out: [R, D] or [R] of the table's dtype, contiguous; written.
        num_programs: processors that the copy may take on a GPU.

    Raises:
        ValueError: `out` does not fit.
    """
    shape = (ids.numel(), *table.shape[1:])
    if out.shape != shape or out.dtype != table.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {table.dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    if out.device.type == "cpu":
        torch.index_select(table, 0, ids, out=out)
    else:
        gather_triton(table, ids, out, num_programs)


def gather_triton(table: Tensor, ids: Tensor, out: Tensor, num_programs: int = HOST_PROGRAMS) -> None:
    if out.dim() == 1:
        _launch(table.unsqueeze(1), None, ids, out.unsqueeze(1), num_programs)
    else:
        _launch(table, None, ids, out, num_programs)
    # autograd does not see a kernel write: without this a backward would read rows that were saved before it
    torch.autograd.graph.increment_version(out)

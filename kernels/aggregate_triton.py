"""The Triton kernels of `aggregate` and how they are launched; the meaning is in `aggregate.py`.

A program owns a few rows and one tile of their features. It reads the rows' edges in two loops, in-batch neighbours
first, and keeps one accumulator for both. Rows of more than `hub_edges` edges are left to programs that own a chunk
each; what these found is combined in a fixed order. The residual is added where a row is stored, in the accumulator's
precision.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import accumulator_of
from gas_triton.kernels.dropout import keep, row_key, threshold


@triton.jit
def _message(
    p_table, p_scale, p_col, p_node, p_weight, p_winner, p_edge_id, seed, drop_below, drop_scale, o_edge, m_edge,
    o_feature, m_feature,
    STRIDE: tl.constexpr, ACC: tl.constexpr, NEGATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_WINNER: tl.constexpr, HAS_DROPOUT: tl.constexpr, STAGED: tl.constexpr, F: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    col = tl.load(p_col + o_edge, mask=m_edge, other=0).to(tl.int64)
    m = m_edge[:, None] & m_feature[None, :]
    value = tl.load(p_table + col[:, None] * STRIDE + o_feature[None, :], mask=m, other=0.0, eviction_policy=EVICT)
    if HAS_SCALE:
        value = value.to(tl.float32) * tl.load(p_scale + col, mask=m_edge, other=0.0)[:, None]
    value = value.to(ACC)
    if HAS_WEIGHT:
        value *= tl.load(p_weight + o_edge, mask=m_edge, other=0.0).to(ACC)[:, None]
    if HAS_WINNER:
        # the row `col` took its extremum from one edge: only that edge carries the gradient back
        winner = tl.load(p_winner + col[:, None] * F + o_feature[None, :], mask=m, other=-1)
        edge_id = tl.load(p_edge_id + o_edge, mask=m_edge, other=-2)
        value = tl.where(winner == edge_id[:, None], value, 0.0)
    if HAS_DROPOUT:
        node = col
        if STAGED:
            node = tl.load(p_node + o_edge, mask=m_edge, other=0).to(tl.int64)
        kept = keep(row_key(node, seed)[:, None], o_feature[None, :], drop_below)
        value = tl.where(kept, value * drop_scale, 0.0)
    if NEGATE:
        value = -value
    return value


@triton.jit
def _take_better(acc, winner, value, candidate, m_edge):
    # a NaN wins and stays, as in torch.amax; the first of equal values wins
    is_better = (winner < 0) | (value > acc) | ((value != value) & (acc == acc))
    is_better = is_better & m_edge
    return tl.where(is_better, value, acc), tl.where(is_better, candidate, winner)


@triton.jit
def _mix(
    acc, p_residual, o_residual, m,
    ACC: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RESIDUAL_WEIGHT: tl.constexpr,
):  # fmt: skip
    acc *= 1.0 - RESIDUAL_WEIGHT
    if HAS_RESIDUAL:
        acc += tl.load(p_residual + o_residual, mask=m, other=0.0).to(ACC) * RESIDUAL_WEIGHT
    return acc


@triton.jit(do_not_specialize=["num_programs", "num_inner", "drop_below"])
def _aggregate_kernel(
    p_x, p_table, p_scale, p_weight, p_inner_rowptr, p_inner_col, p_outer_rowptr, p_outer_col, p_outer_node, p_out,
    p_arg, p_chunk_row, p_chunk_start, p_winner, p_edge_id, p_seed, p_residual, num_programs, num_inner, drop_below,
    drop_scale,
    F: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_TABLE: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, REDUCE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_OUTER: tl.constexpr, HAS_DROPOUT: tl.constexpr, STAGED: tl.constexpr, HAS_WINNER: tl.constexpr,
    HUB_EDGES: tl.constexpr, SKIP_HUBS: tl.constexpr, CHUNKED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    STRIDE_RESIDUAL: tl.constexpr, RESIDUAL_WEIGHT: tl.constexpr,
):  # fmt: skip
    EXTREMUM: tl.constexpr = REDUCE == "max" or REDUCE == "min"
    o_program = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_feature = o_feature < F
    m_row = o_program < num_programs
    o_row = o_program
    if CHUNKED:
        o_row = tl.load(p_chunk_row + o_program, mask=m_row, other=-1).to(tl.int64)
        m_row = o_row >= 0
    inner_start = tl.load(p_inner_rowptr + o_row, mask=m_row, other=0)
    inner_end = tl.load(p_inner_rowptr + o_row + 1, mask=m_row, other=0)
    degree = inner_end - inner_start
    if HAS_OUTER:
        outer_start = tl.load(p_outer_rowptr + o_row, mask=m_row, other=0)
        outer_end = tl.load(p_outer_rowptr + o_row + 1, mask=m_row, other=0)
        degree += outer_end - outer_start
    if CHUNKED:
        # the chunk's share of the row's edges, counted through inner and on through outer
        first = tl.load(p_chunk_start + o_program, mask=m_row, other=0)
        last = first + HUB_EDGES
        num_inner_edges = inner_end - inner_start
        if HAS_OUTER:
            num_outer_edges = outer_end - outer_start
            outer_end = outer_start + tl.minimum(tl.maximum(last - num_inner_edges, 0), num_outer_edges)
            outer_start += tl.minimum(tl.maximum(first - num_inner_edges, 0), num_outer_edges)
        inner_end = inner_start + tl.minimum(last, num_inner_edges)
        inner_start += tl.minimum(first, num_inner_edges)
    if SKIP_HUBS:
        is_hub = degree > HUB_EDGES
        m_row = m_row & (degree <= HUB_EDGES)
        inner_end = tl.where(is_hub, inner_start, inner_end)
        if HAS_OUTER:
            outer_end = tl.where(is_hub, outer_start, outer_end)

    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(p_seed)
    acc = tl.zeros([ROWS, BLOCK_F], ACC)
    if EXTREMUM:
        arg = tl.full([ROWS, BLOCK_F], -1, tl.int32)
    for o_step in range(0, tl.max(inner_end - inner_start, axis=0), UNROLL):
        for unrolled in tl.static_range(UNROLL):
            o_edge = inner_start + o_step + unrolled
            m_edge = o_edge < inner_end
            value = _message(
                p_x, None, p_inner_col, None, p_weight, p_winner, p_edge_id, seed, drop_below, drop_scale,
                o_edge, m_edge, o_feature, m_feature, STRIDE_X, ACC, REDUCE == "min", False, HAS_WEIGHT, HAS_WINNER,
                False, False, F, "evict_last",
            )  # fmt: skip
            if EXTREMUM:
                acc, arg = _take_better(acc, arg, value, o_edge[:, None].to(tl.int32), m_edge[:, None])
            else:
                acc += value
    if HAS_OUTER:
        for o_step in range(0, tl.max(outer_end - outer_start, axis=0), UNROLL):
            for unrolled in tl.static_range(UNROLL):
                o_edge = outer_start + o_step + unrolled
                m_edge = o_edge < outer_end
                value = _message(
                    p_table, p_scale, p_outer_col, p_outer_node, p_weight + num_inner if HAS_WEIGHT else p_weight,
                    p_winner, p_edge_id, seed, drop_below, drop_scale, o_edge, m_edge, o_feature, m_feature,
                    STRIDE_TABLE, ACC, REDUCE == "min", HAS_SCALE, HAS_WEIGHT, False, HAS_DROPOUT, STAGED, F,
                    "evict_first",
                )  # fmt: skip
                if EXTREMUM:
                    candidate = (o_edge + num_inner)[:, None].to(tl.int32)
                    acc, arg = _take_better(acc, arg, value, candidate, m_edge[:, None])
                else:
                    acc += value

    m = m_row[:, None] & m_feature[None, :]
    o_out = o_program[:, None] * F + o_feature[None, :]
    if EXTREMUM:
        tl.store(p_arg + o_out, arg, mask=m)
        if not CHUNKED:
            acc = tl.where(arg < 0, 0.0, -acc if REDUCE == "min" else acc)
    elif REDUCE == "mean":
        if not CHUNKED:
            acc = acc / tl.maximum(degree, 1).to(ACC)[:, None]
    if RESIDUAL_WEIGHT != 0.0:
        if not CHUNKED:
            o_residual = o_program[:, None] * STRIDE_RESIDUAL + o_feature[None, :]
            acc = _mix(acc, p_residual, o_residual, m, ACC, HAS_RESIDUAL, RESIDUAL_WEIGHT)
    tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _combine_kernel(
    p_partial, p_partial_arg, p_hub_row, p_hub_ptr, p_inner_rowptr, p_outer_rowptr, p_out, p_arg,
    F: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr, REDUCE: tl.constexpr, HAS_OUTER: tl.constexpr,
    p_residual=None, HAS_RESIDUAL: tl.constexpr = False, STRIDE_RESIDUAL: tl.constexpr = 0,
    RESIDUAL_WEIGHT: tl.constexpr = 0.0,
):  # fmt: skip
    EXTREMUM: tl.constexpr = REDUCE == "max" or REDUCE == "min"
    o_hub = tl.program_id(0)
    o_feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    hub_row = tl.load(p_hub_row + o_hub).to(tl.int64)
    m = o_feature < tl.where(hub_row >= 0, F, 0)
    row = tl.maximum(hub_row, 0)
    acc = tl.zeros([BLOCK_F], ACC)
    if EXTREMUM:
        arg = tl.full([BLOCK_F], -1, tl.int32)
    first = tl.load(p_hub_ptr + o_hub).to(tl.int64)
    last = tl.load(p_hub_ptr + o_hub + 1).to(tl.int64)
    for o_chunk in range(first, last):
        o_partial = o_chunk * F + o_feature
        value = tl.load(p_partial + o_partial, mask=m, other=0.0)
        if EXTREMUM:
            candidate = tl.load(p_partial_arg + o_partial, mask=m, other=-1)
            acc, arg = _take_better(acc, arg, value, candidate, candidate >= 0)
        else:
            acc += value
    if EXTREMUM:
        tl.store(p_arg + row * F + o_feature, arg, mask=m)
        acc = tl.where(arg < 0, 0.0, -acc if REDUCE == "min" else acc)
    elif REDUCE == "mean":
        degree = tl.load(p_inner_rowptr + row + 1) - tl.load(p_inner_rowptr + row)
        if HAS_OUTER:
            degree += tl.load(p_outer_rowptr + row + 1) - tl.load(p_outer_rowptr + row)
        acc = acc / tl.maximum(degree, 1).to(ACC)
    if RESIDUAL_WEIGHT != 0.0:
        acc = _mix(acc, p_residual, row * STRIDE_RESIDUAL + o_feature, m, ACC, HAS_RESIDUAL, RESIDUAL_WEIGHT)
    tl.store(p_out + row * F + o_feature, acc.to(p_out.dtype.element_ty), mask=m)


# --- launch ---------------------------------------------------------------------------------------------------------


def tile(num_features: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_F, ROWS) of one warp: a lane owns one 16-byte vector of the narrower dtype, spare lanes take more rows.

    Of int8 it owns half a vector: a whole one is 16 accumulators a lane, and the wider rows would not fit in registers.
    """
    lanes = 32 * (16 // max(itemsize, 2))
    block_f = min(triton.next_power_of_2(num_features), lanes)
    return block_f, lanes // block_f


def sum_chunks(partial: Tensor, hub_row: Tensor, hub_ptr: Tensor, out: Tensor) -> None:
    """Writes the sums of the hubs' chunks [C, ...] to their rows of `out` [R, ...]."""
    num_features = out[0].numel()
    block_f, _ = tile(num_features, partial.element_size())
    _combine_kernel[(hub_row.numel(), triton.cdiv(num_features, block_f))](
        partial, None, hub_row, hub_ptr, None, None, out, None, F=num_features, BLOCK_F=block_f,
        ACC=tl.float64 if partial.dtype == torch.float64 else tl.float32, REDUCE="sum", HAS_OUTER=False, num_warps=1,
    )  # fmt: skip


def _launch(
    x: Tensor,
    table: Tensor | None,
    weight: Tensor | None,
    inner: list[Tensor],
    outer: list[Tensor],
    hubs: list[Tensor],
    reduce: str,
    *,
    scale: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    winner: Tensor | None = None,
    edge_id: Tensor | None = None,
    hub_edges: int,
    staged: bool = False,
    residual: Tensor | None = None,
    residual_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    num_rows, num_features = inner[0].numel() - 1, x.size(1)
    out, arg = empty_output(x, num_rows, reduce)
    if out.numel() == 0:
        return out, arg
    x = x if x.stride(1) == 1 else x.contiguous()
    table = table if table is None or table.stride(1) == 1 else table.contiguous()
    weight = None if weight is None else weight.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    has_outer = len(outer) > 0
    source = x if table is None else table
    block_f, rows = tile(num_features, min(x.element_size(), source.element_size()))
    accumulator = accumulator_of(x)
    # a float argument would arrive in float32, which a float64 accumulator would show
    mix = dict(
        HAS_RESIDUAL=residual is not None, STRIDE_RESIDUAL=0 if residual is None else residual.stride(0),
        RESIDUAL_WEIGHT=residual_weight,
    )  # fmt: skip
    constants: dict[str, Any] = dict(
        F=num_features, STRIDE_X=x.stride(0), STRIDE_TABLE=source.stride(0), BLOCK_F=block_f, ROWS=rows, UNROLL=8,
        ACC=tl.float64 if accumulator == torch.float64 else tl.float32, REDUCE=reduce, HAS_SCALE=scale is not None,
        HAS_WEIGHT=weight is not None, HAS_OUTER=has_outer, HAS_DROPOUT=table is not None and dropout > 0.0,
        STAGED=staged, HAS_WINNER=winner is not None, HUB_EDGES=hub_edges, num_warps=1, **mix,
    )  # fmt: skip
    outer_rowptr, outer_col = (outer[0], outer[2 if staged else 1]) if has_outer else (None, None)
    outer_node = outer[1] if staged else None
    tiles_f = triton.cdiv(num_features, block_f)

    def run(num_programs: int, out: Tensor, arg: Tensor, chunk: list[Tensor], **flags: bool) -> None:
        chunk_row, chunk_start = chunk if chunk else (None, None)
        _aggregate_kernel[(triton.cdiv(num_programs, rows), tiles_f)](
            x, source, scale, weight, inner[0], inner[1], outer_rowptr, outer_col, outer_node, out, arg, chunk_row,
            chunk_start, winner, edge_id, seed, residual, num_programs, inner[1].numel(), threshold(dropout),
            1.0 / (1.0 - dropout), **constants, **flags,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        run(num_rows, out, arg, [], SKIP_HUBS=len(hubs) > 0, CHUNKED=False)
        if hubs:
            chunk_row, chunk_start, hub_row, hub_ptr = hubs
            shape = (chunk_row.numel(), num_features)
            partial = torch.empty(shape, dtype=accumulator, device=x.device)
            partial_arg = torch.empty(shape if arg.numel() else 0, dtype=torch.int32, device=x.device)
            run(chunk_row.numel(), partial, partial_arg, [chunk_row, chunk_start], SKIP_HUBS=False, CHUNKED=True)
            _combine_kernel[(hub_row.numel(), tiles_f)](
                partial, partial_arg, hub_row, hub_ptr, inner[0], outer_rowptr, out, arg, F=num_features,
                BLOCK_F=block_f, ACC=constants["ACC"], REDUCE=reduce, HAS_OUTER=has_outer, p_residual=residual,
                num_warps=1, **mix,
            )  # fmt: skip
    return out, arg


def aggregate_triton(
    x: Tensor, table: Tensor | None, scale: Tensor | None, weight: Tensor | None, inner: list[Tensor],
    outer: list[Tensor], transposed: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor],
    hubs_transposed: list[Tensor], reduce: str, dropout: float, seed: Tensor | None, hub_edges: int, staged: bool,
    residual: Tensor | None = None, residual_weight: float = 0.0, has_winner: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch(
        x, table, weight, inner, outer, hubs, reduce, scale=scale, dropout=dropout, seed=seed, hub_edges=hub_edges,
        staged=staged, residual=residual, residual_weight=residual_weight,
    )  # fmt: skip


def winners_triton(
    grad: Tensor, winner: Tensor, weight: Tensor | None, inner_transposed: list[Tensor], edge_id: Tensor,
    hubs: list[Tensor], hub_edges: int,
) -> Tensor:  # fmt: skip
    return _launch(
        grad.contiguous(), None, weight, inner_transposed, [], hubs, "sum", winner=winner, edge_id=edge_id,
        hub_edges=hub_edges,
    )[0]  # fmt: skip


def empty_output(x: Tensor, num_rows: int, reduce: str) -> tuple[Tensor, Tensor]:
    """(out, winning edges of an extremum), not yet written."""
    shape = (num_rows, x.size(1))
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    return out, torch.empty(shape if reduce in ("max", "min") else 0, dtype=torch.int32, device=x.device)

"""Neighbourhood aggregation that reads in-batch rows and history rows in one pass.

    out[i] = reduce( w[e] * x[inner_col[e]]               for e in row i of `inner`,
                     w[e] * dropout(table[outer_col[e]])  for e in row i of `outer` )

with reduce one of sum, mean, max, min, accumulated in float32 (float64 for float64 rows). A row without edges is 0. The
gradient of a sum with respect to `x` is the same sum over the transposed columns of `x`; no gradient flows into
`table`. Nothing here uses atomics: same input, same bits.

Without a `table` the outer columns read `x` too. With one, `outer` is [rowptr, col, slot, halo_ids]: `col` has graph
ids, `slot` the places of the same edges in `halo_ids`. A table [N, F] is read at `col`; a `staged` one, [H, F] in the
order of `halo_ids`, at `slot`. Dropout hashes graph ids either way. The values of an int8 table are multiplied by the
`scale` of their row, in float32 and before anything else.

Edge weights are ordered inner edges first, outer edges second. Rows of more than `hub_edges` edges are cut into chunks
whose partial results a second kernel combines in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import define
from gas_triton.kernels.aggregate_cpu import aggregate_cpu, winners_cpu
from gas_triton.kernels.csr_rows import degree, row_of_edge
from gas_triton.kernels.dropout import keep, keep_mask, row_key, threshold
from gas_triton.kernels.edge_dot import edge_dot
from gas_triton.kernels.pull import widen

REDUCTIONS = ("sum", "mean", "max", "min")
HUB_EDGES = 512


def aggregate_ref(
    x: Tensor,
    table: Tensor | None,
    weight: Tensor | None,
    inner: list[Tensor],
    outer: list[Tensor],
    reduce: str = "sum",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
    staged: bool = False,
) -> Tensor:
    """The meaning in plain torch, differentiable by autograd, in the dtype of `x`: what tests compare with."""
    messages, rows = [x[inner[1].long()]], [row_of_edge(inner[0], inner[1])]
    if outer:
        source = x if table is None else widen(table, scale, x.dtype)
        halo = source[outer[2 if staged else 1].long()]
        if table is not None and dropout > 0.0 and seed is not None:
            halo = halo * keep_mask(outer[1], x.size(1), dropout, seed) / (1.0 - dropout)
        messages.append(halo)
        rows.append(row_of_edge(outer[0], outer[1]))
    message, row = torch.cat(messages), torch.cat(rows)
    if weight is not None:
        message = message * weight.to(x.dtype)[:, None]
    name = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}[reduce]
    index = row[:, None].expand_as(message)
    out = x.new_zeros(inner[0].numel() - 1, x.size(1))
    return out.scatter_reduce(0, index, message, name, include_self=False)


# --- Triton ---------------------------------------------------------------------------------------------------------


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


@triton.jit(do_not_specialize=["num_programs", "num_inner", "drop_below"])
def _aggregate_kernel(
    p_x, p_table, p_scale, p_weight, p_inner_rowptr, p_inner_col, p_outer_rowptr, p_outer_col, p_outer_node, p_out,
    p_arg, p_chunk_row, p_chunk_start, p_winner, p_edge_id, p_seed, num_programs, num_inner, drop_below,
    drop_scale,
    F: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_TABLE: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, REDUCE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_OUTER: tl.constexpr, HAS_DROPOUT: tl.constexpr, STAGED: tl.constexpr, HAS_WINNER: tl.constexpr,
    HUB_EDGES: tl.constexpr, SKIP_HUBS: tl.constexpr, CHUNKED: tl.constexpr,
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
    tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _combine_kernel(
    p_partial, p_partial_arg, p_hub_row, p_hub_ptr, p_inner_rowptr, p_outer_rowptr, p_out, p_arg,
    F: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr, REDUCE: tl.constexpr, HAS_OUTER: tl.constexpr,
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
    tl.store(p_out + row * F + o_feature, acc.to(p_out.dtype.element_ty), mask=m)


# --- launch ---------------------------------------------------------------------------------------------------------


def tile(num_features: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_F, ROWS) of one warp: a lane owns one 16-byte vector of the narrower dtype, spare lanes take more rows.

    Of int8 it owns half a vector: a whole one is 16 accumulators a lane, and the wider rows would not fit in registers.
    """
    lanes = 32 * (16 // max(itemsize, 2))
    block_f = min(triton.next_power_of_2(num_features), lanes)
    return block_f, lanes // block_f


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
    hub_edges: int = HUB_EDGES,
    staged: bool = False,
) -> tuple[Tensor, Tensor]:
    num_rows, num_features = inner[0].numel() - 1, x.size(1)
    out, arg = _empty(x, num_rows, reduce)
    if out.numel() == 0:
        return out, arg
    x = x if x.stride(1) == 1 else x.contiguous()
    table = table if table is None or table.stride(1) == 1 else table.contiguous()
    weight = None if weight is None else weight.contiguous()
    has_outer = len(outer) > 0
    source = x if table is None else table
    block_f, rows = tile(num_features, min(x.element_size(), source.element_size()))
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    constants: dict[str, Any] = dict(
        F=num_features, STRIDE_X=x.stride(0), STRIDE_TABLE=source.stride(0), BLOCK_F=block_f, ROWS=rows, UNROLL=8,
        ACC=tl.float64 if accumulator == torch.float64 else tl.float32, REDUCE=reduce, HAS_SCALE=scale is not None,
        HAS_WEIGHT=weight is not None, HAS_OUTER=has_outer, HAS_DROPOUT=table is not None and dropout > 0.0,
        STAGED=staged, HAS_WINNER=winner is not None, HUB_EDGES=hub_edges, num_warps=1,
    )  # fmt: skip
    outer_rowptr, outer_col = (outer[0], outer[2 if staged else 1]) if has_outer else (None, None)
    outer_node = outer[1] if staged else None
    tiles_f = triton.cdiv(num_features, block_f)

    def run(num_programs: int, out: Tensor, arg: Tensor, chunk: list[Tensor], **flags: bool) -> None:
        chunk_row, chunk_start = chunk if chunk else (None, None)
        _aggregate_kernel[(triton.cdiv(num_programs, rows), tiles_f)](
            x, source, scale, weight, inner[0], inner[1], outer_rowptr, outer_col, outer_node, out, arg, chunk_row,
            chunk_start, winner, edge_id, seed, num_programs, inner[1].numel(), threshold(dropout),
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
                BLOCK_F=block_f, ACC=constants["ACC"], REDUCE=reduce, HAS_OUTER=has_outer, num_warps=1,
            )  # fmt: skip
    return out, arg


def aggregate_triton(
    x: Tensor, table: Tensor | None, scale: Tensor | None, weight: Tensor | None, inner: list[Tensor],
    outer: list[Tensor], transposed: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor],
    hubs_transposed: list[Tensor], reduce: str, dropout: float, seed: Tensor | None, hub_edges: int, staged: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch(
        x, table, weight, inner, outer, hubs, reduce, scale=scale, dropout=dropout, seed=seed, hub_edges=hub_edges,
        staged=staged,
    )  # fmt: skip


def winners_triton(
    grad: Tensor, winner: Tensor, weight: Tensor | None, inner_transposed: list[Tensor], edge_id: Tensor,
    hubs: list[Tensor], hub_edges: int,
) -> Tensor:  # fmt: skip
    return _launch(
        grad.contiguous(), None, weight, inner_transposed, [], hubs, "sum", winner=winner, edge_id=edge_id,
        hub_edges=hub_edges,
    )[0]  # fmt: skip


# --- registration and gradient --------------------------------------------------------------------------------------


def aggregate_fake(
    x: Tensor, table: Tensor | None, scale: Tensor | None, weight: Tensor | None, inner: list[Tensor],
    outer: list[Tensor], transposed: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor],
    hubs_transposed: list[Tensor], reduce: str, dropout: float, seed: Tensor | None, hub_edges: int, staged: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(x, inner[0].numel() - 1, reduce)


def _empty(x: Tensor, num_rows: int, reduce: str) -> tuple[Tensor, Tensor]:
    shape = (num_rows, x.size(1))
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    return out, torch.empty(shape if reduce in ("max", "min") else 0, dtype=torch.int32, device=x.device)


def _winners_fake(grad, winner, weight, inner_transposed, edge_id, hubs, hub_edges):
    return grad.new_empty(inner_transposed[0].numel() - 1, grad.size(1))


winners = define(
    "aggregate_winners(Tensor grad, Tensor winner, Tensor? weight, Tensor[] inner_transposed, Tensor edge_id, "
    "Tensor[] hubs, int hub_edges) -> Tensor",
    cpu=winners_cpu,
    cuda=winners_triton,
    fake=_winners_fake,
)


def _setup_context(ctx, inputs, output):
    x, table, scale, weight, inner, outer, transposed, edge_id, hubs, hubs_transposed = inputs[:10]
    needs_rows = weight is not None and weight.requires_grad
    winner = output[1]
    ctx.mark_non_differentiable(winner)
    rows = (x, table, scale) if needs_rows else (None, None, None)
    ctx.reduce, ctx.dropout, seed, ctx.hub_edges, ctx.staged = inputs[10:]
    ctx.save_for_backward(*rows, weight, seed, winner)
    ctx.edge_id = edge_id
    ctx.inner, ctx.outer, ctx.transposed, ctx.hubs_transposed = inner, outer, transposed, hubs_transposed
    ctx.num_hub_tensors = len(hubs)


def _backward(ctx, grad, _):
    x, table, scale, weight, seed, winner = ctx.saved_tensors
    grad_x = grad_weight = None
    is_extremum = ctx.reduce in ("max", "min")
    if ctx.reduce == "mean":
        grad = grad / degree(ctx.inner, ctx.outer)[:, None]
    if ctx.needs_input_grad[0]:
        edge_id, weight_t = ctx.edge_id, weight
        if weight is not None:
            num_edges = ctx.transposed[1].numel()
            weight_t = weight[:num_edges] if edge_id is None else weight.index_select(0, edge_id)
        if is_extremum:
            grad_x = winners(grad, winner, weight_t, ctx.transposed, edge_id, ctx.hubs_transposed, ctx.hub_edges)
        else:
            grad_x = aggregate(
                grad, None, None, weight_t, ctx.transposed, [], [], None, ctx.hubs_transposed, [], "sum", 0.0, None,
                ctx.hub_edges, False,
            )[0]  # fmt: skip
    if ctx.needs_input_grad[3]:
        winner = winner if is_extremum else None
        num_inner = ctx.inner[1].numel()
        parts = [edge_dot(grad, x, None, *ctx.inner, None, winner, 0, 0.0, None)]
        if ctx.outer:
            source, dropout = (x, 0.0) if table is None else (table, ctx.dropout)
            col, node = (ctx.outer[2], ctx.outer[1]) if ctx.staged else (ctx.outer[1], None)
            parts.append(edge_dot(grad, source, scale, ctx.outer[0], col, node, winner, num_inner, dropout, seed))
        grad_weight = torch.cat(parts).to(weight.dtype)
    lists = (ctx.inner, ctx.outer, ctx.transposed)
    inner, outer, transposed, hubs, hubs_transposed = (
        [None] * length for length in (*map(len, lists), ctx.num_hub_tensors, len(ctx.hubs_transposed))
    )
    return grad_x, None, None, grad_weight, inner, outer, transposed, None, hubs, hubs_transposed, *[None] * 5


aggregate = define(
    "aggregate(Tensor x, Tensor? table, Tensor? scale, Tensor? weight, Tensor[] inner, Tensor[] outer, "
    "Tensor[] transposed, Tensor? edge_id, Tensor[] hubs, Tensor[] hubs_transposed, str reduce, float dropout, "
    "Tensor? seed, int hub_edges, bool staged) -> (Tensor, Tensor)",
    cpu=aggregate_cpu,
    cuda=aggregate_triton,
    fake=aggregate_fake,
    setup_context=_setup_context,
    backward=_backward,
)

"""Several aggregations of the same neighbours, in one pass over the edges.

    out[i, k] = reduce_k( x[inner_col[e]]               for e in row i of `inner`,
                          dropout(table[outer_col[e]])  for e in row i of `outer` )

with reduce_k among sum, mean, min, max, var and std, accumulated in float32 (float64 for float64 rows). With v the
variance mean(h^2) - mean(h)^2, std is sqrt(v) where v > 1e-5 and else 0, as in torch_geometric's StdAggregation. A row
without edges is 0. Blocks, tables, staged rows, scales, dropout and hubs are those of `aggregate`.

The sum of squares is one of differences to the row's first neighbour (on a CPU: to its mean), or it would lose all its
digits where a mean is large against its deviation.

Of equal extrema one takes the gradient. Nothing here uses atomics: same input, same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import accumulator_of, define
from gas_triton.kernels.aggregate_triton import _message, _take_better, tile
from gas_triton.kernels.csr_rows import degree, edge_count, edge_span, row_of_edge
from gas_triton.kernels.dropout import keep_mask, threshold
from gas_triton.kernels.multi_aggregate_cpu import STD_EPS, multi_aggregate_cpu
from gas_triton.kernels.multi_aggregate_grad import MULTI_REDUCTIONS as MULTI_REDUCTIONS
from gas_triton.kernels.multi_aggregate_grad import coefficients, multi_aggregate_grad, places_of
from gas_triton.kernels.pull import widen

_STD_EPS = tl.constexpr(STD_EPS)
# of more narrow rows with dropout, Triton 3.6 fails on the layouts ("mask type matches ptr type")
MOST_ROWS = 8


def multi_aggregate_ref(
    x: Tensor,
    table: Tensor | None,
    inner: list[Tensor],
    outer: list[Tensor],
    reduces: list[str],
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
    message = torch.cat(messages)
    index = torch.cat(rows)[:, None].expand_as(message)

    def scatter(value: Tensor, name: str) -> Tensor:
        out = x.new_zeros(inner[0].numel() - 1, x.size(1))
        return out.scatter_reduce(0, index, value, name, include_self=False)

    variance = scatter(message * message, "mean") - scatter(message, "mean").square()
    std = variance.clamp(min=STD_EPS).sqrt()
    results = {
        "sum": scatter(message, "sum"), "mean": scatter(message, "mean"), "min": scatter(message, "amin"),
        "max": scatter(message, "amax"), "var": variance, "std": std.masked_fill(variance <= STD_EPS, 0.0),
    }  # fmt: skip
    return torch.stack([results[name] for name in reduces], dim=1)


# --- Triton: forward --------------------------------------------------------------------------------------------------


@triton.jit
def _store_results(
    p_out, p_winner, p_moments, num_rows, o_row, m, o_feature, count, shift, total, squares, least, arg_least, most,
    arg_most,
    F: tl.constexpr, ACC: tl.constexpr, NUM: tl.constexpr, AT_SUM: tl.constexpr, AT_MEAN: tl.constexpr,
    AT_MIN: tl.constexpr, AT_MAX: tl.constexpr, AT_VAR: tl.constexpr, AT_STD: tl.constexpr, HAS_GRAD: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_out.dtype.element_ty
    num = tl.maximum(count, 1).to(ACC)[:, None]
    o_out = o_row[:, None] * (NUM * F) + o_feature[None, :]
    o_plane = o_row[:, None] * F + o_feature[None, :]
    plane = num_rows.to(tl.int64) * F
    if AT_SUM >= 0:
        tl.store(p_out + o_out + AT_SUM * F, (total + shift * count.to(ACC)[:, None]).to(dtype), mask=m)
    shifted_mean = total / num
    mean = tl.where(count[:, None] > 0, shift + shifted_mean, 0.0)
    if AT_MEAN >= 0:
        tl.store(p_out + o_out + AT_MEAN * F, mean.to(dtype), mask=m)
    if AT_MIN >= 0:
        # `least` is the largest of the negated
        tl.store(p_out + o_out + AT_MIN * F, tl.where(arg_least < 0, 0.0, -least).to(dtype), mask=m)
        if HAS_GRAD:
            tl.store(p_winner + o_plane, arg_least, mask=m)
    if AT_MAX >= 0:
        tl.store(p_out + o_out + AT_MAX * F, tl.where(arg_most < 0, 0.0, most).to(dtype), mask=m)
        if HAS_GRAD:
            tl.store(p_winner + (plane if AT_MIN >= 0 else 0) + o_plane, arg_most, mask=m)
    if AT_VAR >= 0 or AT_STD >= 0:
        variance = squares / num - shifted_mean * shifted_mean
        # as torch.clamp, which keeps a NaN
        variance = tl.where(variance < 0.0, 0.0, variance)
        std = tl.where(variance <= _STD_EPS, 0.0, tl.sqrt(variance))
        if AT_VAR >= 0:
            tl.store(p_out + o_out + AT_VAR * F, variance.to(dtype), mask=m)
        if AT_STD >= 0:
            tl.store(p_out + o_out + AT_STD * F, std.to(dtype), mask=m)
        if HAS_GRAD:
            tl.store(p_moments + o_plane, mean, mask=m)
            tl.store(
                p_moments + plane + o_plane, tl.where(std == 0.0, 0.0, 1.0 / tl.where(std == 0.0, 1.0, std)), mask=m
            )


@triton.jit(do_not_specialize=["num_programs", "num_rows", "num_inner", "drop_below"])
def _multi_aggregate_kernel(
    p_x, p_table, p_scale, p_inner_rowptr, p_inner_col, p_outer_rowptr, p_outer_col, p_outer_node, p_out, p_winner,
    p_moments, p_chunk_row, p_chunk_start, p_partial, p_partial_arg, p_seed, num_programs, num_rows, num_inner,
    drop_below, drop_scale,
    F: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_TABLE: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, NUM: tl.constexpr, AT_SUM: tl.constexpr, AT_MEAN: tl.constexpr,
    AT_MIN: tl.constexpr, AT_MAX: tl.constexpr, AT_VAR: tl.constexpr, AT_STD: tl.constexpr, HAS_GRAD: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_OUTER: tl.constexpr, HAS_DROPOUT: tl.constexpr, STAGED: tl.constexpr,
    HUB_EDGES: tl.constexpr, SKIP_HUBS: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    SQUARES: tl.constexpr = AT_VAR >= 0 or AT_STD >= 0
    SUMS: tl.constexpr = SQUARES or AT_SUM >= 0 or AT_MEAN >= 0
    o_program = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_feature = o_feature < F
    m_row = o_program < num_programs
    o_row = o_program
    first = 0
    if CHUNKED:
        o_row = tl.load(p_chunk_row + o_program, mask=m_row, other=-1).to(tl.int64)
        m_row = o_row >= 0
        first = tl.load(p_chunk_start + o_program, mask=m_row, other=0)
    count = edge_count(p_inner_rowptr, p_outer_rowptr, o_row, m_row, HAS_OUTER)
    inner_start, inner_end = edge_span(
        p_inner_rowptr, p_outer_rowptr, o_row, m_row, first, HUB_EDGES, SKIP_HUBS, CHUNKED, HAS_OUTER, False
    )
    if HAS_OUTER:
        outer_start, outer_end = edge_span(
            p_outer_rowptr, p_inner_rowptr, o_row, m_row, first, HUB_EDGES, SKIP_HUBS, CHUNKED, True, True
        )
    if SKIP_HUBS:
        m_row = m_row & (count <= HUB_EDGES)

    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(p_seed)
    shift = tl.zeros([ROWS, BLOCK_F], ACC)
    if SQUARES:
        # all chunks of a row take the same one
        o_edge = tl.load(p_inner_rowptr + o_row, mask=m_row, other=0)
        m_edge = m_row & (o_edge < tl.load(p_inner_rowptr + o_row + 1, mask=m_row, other=0))
        shift = _message(
            p_x, None, p_inner_col, None, None, None, None, seed, drop_below, drop_scale, o_edge, m_edge, o_feature,
            m_feature, STRIDE_X, ACC, False, False, False, False, False, False, F, "evict_last",
        )  # fmt: skip
        if HAS_OUTER:
            m_edge = m_row & (count > 0) & (m_edge == 0)
            o_edge = tl.load(p_outer_rowptr + o_row, mask=m_row, other=0)
            shift += _message(
                p_table, p_scale, p_outer_col, p_outer_node, None, None, None, seed, drop_below, drop_scale, o_edge,
                m_edge, o_feature, m_feature, STRIDE_TABLE, ACC, False, HAS_SCALE, False, False, HAS_DROPOUT, STAGED, F,
                "evict_last",
            )  # fmt: skip
        shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)

    total = tl.zeros([ROWS, BLOCK_F], ACC)
    squares = tl.zeros([ROWS, BLOCK_F], ACC)
    least = tl.zeros([ROWS, BLOCK_F], ACC)
    most = tl.zeros([ROWS, BLOCK_F], ACC)
    arg_least = tl.full([ROWS, BLOCK_F], -1, tl.int32)
    arg_most = tl.full([ROWS, BLOCK_F], -1, tl.int32)
    for o_step in range(0, tl.max(inner_end - inner_start, axis=0), UNROLL):
        for unrolled in tl.static_range(UNROLL):
            o_edge = inner_start + o_step + unrolled
            m_edge = o_edge < inner_end
            value = _message(
                p_x, None, p_inner_col, None, None, None, None, seed, drop_below, drop_scale, o_edge, m_edge, o_feature,
                m_feature, STRIDE_X, ACC, False, False, False, False, False, False, F, "evict_last",
            )  # fmt: skip
            if AT_MIN >= 0:
                least, arg_least = _take_better(least, arg_least, -value, o_edge[:, None].to(tl.int32), m_edge[:, None])
            if AT_MAX >= 0:
                most, arg_most = _take_better(most, arg_most, value, o_edge[:, None].to(tl.int32), m_edge[:, None])
            if SQUARES:
                value = tl.where(m_edge[:, None], value - shift, 0.0)
                squares += value * value
            if SUMS:
                total += value
    if HAS_OUTER:
        for o_step in range(0, tl.max(outer_end - outer_start, axis=0), UNROLL):
            for unrolled in tl.static_range(UNROLL):
                o_edge = outer_start + o_step + unrolled
                m_edge = o_edge < outer_end
                value = _message(
                    p_table, p_scale, p_outer_col, p_outer_node, None, None, None, seed, drop_below, drop_scale,
                    o_edge, m_edge, o_feature, m_feature, STRIDE_TABLE, ACC, False, HAS_SCALE, False, False,
                    HAS_DROPOUT, STAGED, F, "evict_first",
                )  # fmt: skip
                candidate = (o_edge + num_inner)[:, None].to(tl.int32)
                if AT_MIN >= 0:
                    least, arg_least = _take_better(least, arg_least, -value, candidate, m_edge[:, None])
                if AT_MAX >= 0:
                    most, arg_most = _take_better(most, arg_most, value, candidate, m_edge[:, None])
                if SQUARES:
                    value = tl.where(m_edge[:, None], value - shift, 0.0)
                    squares += value * value
                if SUMS:
                    total += value

    m = m_row[:, None] & m_feature[None, :]
    if CHUNKED:
        plane = num_programs.to(tl.int64) * F
        o_partial = o_program[:, None] * F + o_feature[None, :]
        if SUMS:
            tl.store(p_partial + o_partial, total, mask=m)
        if SQUARES:
            tl.store(p_partial + plane + o_partial, squares, mask=m)
            tl.store(p_partial + 2 * plane + o_partial, shift, mask=m)
        if AT_MIN >= 0:
            tl.store(p_partial + 3 * plane + o_partial, least, mask=m)
            tl.store(p_partial_arg + o_partial, arg_least, mask=m)
        if AT_MAX >= 0:
            tl.store(p_partial + 4 * plane + o_partial, most, mask=m)
            tl.store(p_partial_arg + plane + o_partial, arg_most, mask=m)
    else:
        _store_results(
            p_out, p_winner, p_moments, num_rows, o_row, m, o_feature, count, shift, total, squares, least, arg_least,
            most, arg_most, F, ACC, NUM, AT_SUM, AT_MEAN, AT_MIN, AT_MAX, AT_VAR, AT_STD, HAS_GRAD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def _multi_combine_kernel(
    p_partial, p_partial_arg, p_hub_row, p_hub_ptr, p_inner_rowptr, p_outer_rowptr, p_out, p_winner, p_moments,
    num_rows, num_chunks,
    F: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr, NUM: tl.constexpr, AT_SUM: tl.constexpr,
    AT_MEAN: tl.constexpr, AT_MIN: tl.constexpr, AT_MAX: tl.constexpr, AT_VAR: tl.constexpr, AT_STD: tl.constexpr,
    HAS_GRAD: tl.constexpr, HAS_OUTER: tl.constexpr,
):  # fmt: skip
    SQUARES: tl.constexpr = AT_VAR >= 0 or AT_STD >= 0
    SUMS: tl.constexpr = SQUARES or AT_SUM >= 0 or AT_MEAN >= 0
    o_hub = tl.program_id(0) + tl.arange(0, 1)
    o_feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = tl.load(p_hub_row + o_hub).to(tl.int64)
    m_row = row >= 0
    row = tl.maximum(row, 0)
    m = m_row[:, None] & (o_feature < F)[None, :]
    first = tl.load(p_hub_ptr + tl.program_id(0)).to(tl.int64)
    last = tl.load(p_hub_ptr + tl.program_id(0) + 1).to(tl.int64)
    plane = num_chunks.to(tl.int64) * F
    shift = tl.zeros([1, BLOCK_F], ACC)
    total = tl.zeros([1, BLOCK_F], ACC)
    squares = tl.zeros([1, BLOCK_F], ACC)
    least = tl.zeros([1, BLOCK_F], ACC)
    most = tl.zeros([1, BLOCK_F], ACC)
    arg_least = tl.full([1, BLOCK_F], -1, tl.int32)
    arg_most = tl.full([1, BLOCK_F], -1, tl.int32)
    for o_chunk in range(first, last):
        o_partial = (o_chunk * F + o_feature)[None, :]
        if SUMS:
            total += tl.load(p_partial + o_partial, mask=m, other=0.0)
        if SQUARES:
            squares += tl.load(p_partial + plane + o_partial, mask=m, other=0.0)
            shift = tl.load(p_partial + 2 * plane + o_partial, mask=m, other=0.0)
        if AT_MIN >= 0:
            value = tl.load(p_partial + 3 * plane + o_partial, mask=m, other=0.0)
            candidate = tl.load(p_partial_arg + o_partial, mask=m, other=-1)
            least, arg_least = _take_better(least, arg_least, value, candidate, candidate >= 0)
        if AT_MAX >= 0:
            value = tl.load(p_partial + 4 * plane + o_partial, mask=m, other=0.0)
            candidate = tl.load(p_partial_arg + plane + o_partial, mask=m, other=-1)
            most, arg_most = _take_better(most, arg_most, value, candidate, candidate >= 0)
    count = edge_count(p_inner_rowptr, p_outer_rowptr, row, m_row, HAS_OUTER)
    _store_results(
        p_out, p_winner, p_moments, num_rows, row, m, o_feature, count, shift, total, squares, least, arg_least, most,
        arg_most, F, ACC, NUM, AT_SUM, AT_MEAN, AT_MIN, AT_MAX, AT_VAR, AT_STD, HAS_GRAD,
    )  # fmt: skip


# --- launch -----------------------------------------------------------------------------------------------------------


def multi_aggregate_triton(
    x: Tensor, table: Tensor | None, scale: Tensor | None, inner: list[Tensor], outer: list[Tensor],
    transposed: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor], hubs_transposed: list[Tensor],
    reduces: list[str], dropout: float, seed: Tensor | None, hub_edges: int, staged: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, winner, moments = _empty(x, inner, transposed, reduces)
    if out.numel() == 0:
        return out, winner, moments
    num_rows, num_features = inner[0].numel() - 1, x.size(1)
    x = x if x.stride(1) == 1 else x.contiguous()
    table = table if table is None or table.stride(1) == 1 else table.contiguous()
    source = x if table is None else table
    has_outer = len(outer) > 0
    block_f, rows = tile(num_features, min(x.element_size(), source.element_size()))
    rows = min(rows, MOST_ROWS)
    tiles_f = triton.cdiv(num_features, block_f)
    accumulator = accumulator_of(x)
    common: dict[str, Any] = dict(
        F=num_features, BLOCK_F=block_f, ACC=tl.float64 if accumulator == torch.float64 else tl.float32,
        NUM=len(reduces), HAS_GRAD=len(transposed) > 0, HAS_OUTER=has_outer, num_warps=1, **places_of(reduces),
    )  # fmt: skip
    constants: dict[str, Any] = dict(
        STRIDE_X=x.stride(0), STRIDE_TABLE=source.stride(0), ROWS=rows, UNROLL=unroll_forward(accumulator),
        HAS_SCALE=scale is not None, HAS_DROPOUT=table is not None and dropout > 0.0, STAGED=staged,
        HUB_EDGES=hub_edges, **common,
    )  # fmt: skip
    outer_rowptr, outer_col = (outer[0], outer[2 if staged else 1]) if has_outer else (None, None)
    outer_node = outer[1] if staged else None

    def run(num_programs: int, chunk: list[Tensor | None], **flags: bool) -> None:
        _multi_aggregate_kernel[(triton.cdiv(num_programs, rows), tiles_f)](
            x, source, scale, inner[0], inner[1], outer_rowptr, outer_col, outer_node, out, winner, moments, *chunk,
            seed, num_programs, num_rows, inner[1].numel(), threshold(dropout), 1.0 / (1.0 - dropout), **constants,
            **flags,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        run(num_rows, [None] * 4, SKIP_HUBS=len(hubs) > 0, CHUNKED=False)
        if hubs:
            chunk_row, chunk_start, hub_row, hub_ptr = hubs
            num_chunks = chunk_row.numel()
            # sums, squares, shifts, minima and maxima of the chunks
            partial = torch.empty(5, num_chunks, num_features, dtype=accumulator, device=x.device)
            partial_arg = torch.empty(2, num_chunks, num_features, dtype=torch.int32, device=x.device)
            run(num_chunks, [chunk_row, chunk_start, partial, partial_arg], SKIP_HUBS=False, CHUNKED=True)
            _multi_combine_kernel[(hub_row.numel(), tiles_f)](
                partial, partial_arg, hub_row, hub_ptr, inner[0], outer_rowptr, out, winner, moments, num_rows,
                num_chunks, **common,
            )  # fmt: skip
    return out, winner, moments


def unroll_forward(accumulator: torch.dtype) -> int:
    """Edges in flight; of float64 fewer, or six accumulators would spill."""
    return 4 if accumulator == torch.float64 else 8


# --- registration and gradient ----------------------------------------------------------------------------------------


def multi_aggregate_fake(
    x: Tensor, table: Tensor | None, scale: Tensor | None, inner: list[Tensor], outer: list[Tensor],
    transposed: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor], hubs_transposed: list[Tensor],
    reduces: list[str], dropout: float, seed: Tensor | None, hub_edges: int, staged: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty(x, inner, transposed, reduces)


def _empty(
    x: Tensor, inner: list[Tensor], transposed: list[Tensor], reduces: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out; winning edges of min and max, on a CPU their rows of `x`; mean and 1 / std), as far as a gradient needs."""
    num_rows, num_features = inner[0].numel() - 1, x.size(1)
    num_winners = ("min" in reduces) + ("max" in reduces) if transposed else 0
    num_moments = 2 if transposed and ("var" in reduces or "std" in reduces) else 0
    return (
        torch.empty(num_rows, len(reduces), num_features, dtype=x.dtype, device=x.device),
        torch.empty(num_winners, num_rows, num_features, dtype=torch.int32, device=x.device),
        torch.empty(num_moments, num_rows, num_features, dtype=accumulator_of(x), device=x.device),
    )


def _setup_context(ctx, inputs, output):
    x, _, _, ctx.inner, ctx.outer, ctx.transposed, ctx.edge_id, hubs, ctx.hubs_transposed, ctx.reduces = inputs[:10]
    ctx.hub_edges, ctx.num_hub_tensors = inputs[12], len(hubs)
    _, winner, moments = output
    ctx.mark_non_differentiable(winner, moments)
    ctx.save_for_backward(x, winner, moments)


def _backward(ctx, grad, *_):
    x, winner, moments = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        coefficient = coefficients(grad.to(moments.dtype), moments, ctx.reduces, degree(ctx.inner, ctx.outer)[:, None])
        grad_x = multi_aggregate_grad(
            grad, x, coefficient, winner, ctx.reduces, ctx.transposed, ctx.edge_id, ctx.hubs_transposed, ctx.hub_edges
        )
    lists = (ctx.inner, ctx.outer, ctx.transposed)
    inner, outer, transposed, hubs, hubs_transposed = (
        [None] * length for length in (*map(len, lists), ctx.num_hub_tensors, len(ctx.hubs_transposed))
    )
    return grad_x, None, None, inner, outer, transposed, None, hubs, hubs_transposed, *[None] * 5


multi_aggregate = define(
    "multi_aggregate(Tensor x, Tensor? table, Tensor? scale, Tensor[] inner, Tensor[] outer, Tensor[] transposed, "
    "Tensor? edge_id, Tensor[] hubs, Tensor[] hubs_transposed, str[] reduces, float dropout, Tensor? seed, "
    "int hub_edges, bool staged) -> (Tensor, Tensor, Tensor)",
    cpu=multi_aggregate_cpu,
    cuda=multi_aggregate_triton,
    fake=multi_aggregate_fake,
    setup_context=_setup_context,
    backward=_backward,
)

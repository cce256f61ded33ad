"""The Triton kernels of `dynamic_attention` and their launch: see there for what they compute."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import accumulator_of
from gas_triton.kernels.aggregate_triton import sum_chunks
from gas_triton.kernels.csr_rows import edges_of_rows
from gas_triton.kernels.dropout import keep, row_key, threshold

# the logit of no edge: finite, as differences of infinities are NaN
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _rows(p_table, o_row, m_row, o_feature, m_feature, F: tl.constexpr, ACC: tl.constexpr):
    m = m_row[:, None, None] & m_feature
    return tl.load(p_table + o_row[:, None, None] * F + o_feature, mask=m, other=0.0).to(ACC)


@triton.jit
def _logit(query, key, att, D: tl.constexpr, SLOPE: tl.constexpr, GATV2: tl.constexpr):
    if GATV2:
        total = query + key
        return tl.sum(tl.where(total > 0, total, total * SLOPE) * att, axis=2)
    return tl.sum(query * key, axis=2) * (D**-0.5)


@triton.jit(do_not_specialize=["num_programs", "drop_below"])
def _dynamic_attention_kernel(
    p_query, p_key, p_value, p_att, p_edge, p_rowptr, p_col, p_edge_id, p_chunk_row, p_chunk_start, p_seed, p_out,
    p_lse, p_total, num_programs, drop_below, drop_scale,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, SLOPE: tl.constexpr, GATV2: tl.constexpr, HAS_VALUE: tl.constexpr,
    HAS_EDGE: tl.constexpr, HAS_EDGE_ID: tl.constexpr, HAS_DROPOUT: tl.constexpr, HUB_EDGES: tl.constexpr,
    SKIP_HUBS: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = HEADS * D
    o_program = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_width = tl.arange(0, BLOCK_D)
    o_feature = o_head[None, :, None] * D + o_width[None, None, :]
    m_feature = (o_head < HEADS)[None, :, None] & (o_width < D)[None, None, :]
    o_row, m_row, start, end = edges_of_rows(
        p_rowptr, p_chunk_row, p_chunk_start, o_program, num_programs, HUB_EDGES, SKIP_HUBS, CHUNKED
    )
    query = _rows(p_query, o_row, m_row, o_feature, m_feature, F, ACC)
    att = 0.0
    if GATV2:
        att = tl.load(p_att + o_feature, mask=m_feature, other=0.0).to(ACC)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(p_seed)
    highest = tl.full([ROWS, BLOCK_H], LOWEST, ACC)
    total = tl.zeros([ROWS, BLOCK_H], ACC)
    acc = tl.zeros([ROWS, BLOCK_H, BLOCK_D], ACC)
    for o_step in range(0, tl.max(end - start, axis=0), UNROLL):
        for unrolled in tl.static_range(UNROLL):
            o_edge = start + o_step + unrolled
            m_edge = o_edge < end
            col = tl.load(p_col + o_edge, mask=m_edge, other=0).to(tl.int64)
            key = _rows(p_key, col, m_edge, o_feature, m_feature, F, ACC)
            value = key
            if HAS_VALUE:
                value = _rows(p_value, col, m_edge, o_feature, m_feature, F, ACC)
            edge_id = o_edge.to(tl.int64)
            if HAS_EDGE_ID:
                edge_id = tl.load(p_edge_id + o_edge, mask=m_edge, other=0).to(tl.int64)
            if HAS_EDGE:
                edge = _rows(p_edge, edge_id, m_edge, o_feature, m_feature, F, ACC)
                key += edge
                if not GATV2:
                    value += edge
            logit = _logit(query, key, att, D, SLOPE, GATV2)
            logit = tl.where(m_edge[:, None], logit, LOWEST)
            higher = tl.maximum(highest, logit)
            shrink = tl.exp(highest - higher)
            weight = tl.where(m_edge[:, None], tl.exp(logit - higher), 0.0)
            highest = higher
            total = total * shrink + weight
            if HAS_DROPOUT:
                kept = keep(row_key(edge_id, seed)[:, None], o_head[None, :], drop_below)
                weight = tl.where(kept, weight * drop_scale, 0.0)
            acc = acc * shrink[:, :, None] + weight[:, :, None] * value

    m_head = m_row[:, None] & (o_head < HEADS)[None, :]
    o_row_head = o_program[:, None] * HEADS + o_head[None, :]
    if CHUNKED:
        tl.store(p_lse + o_row_head, highest, mask=m_head)
        tl.store(p_total + o_row_head, total, mask=m_head)
    else:
        total = tl.where(total > 0, total, 1.0)
        acc = acc / total[:, :, None]
        tl.store(p_lse + o_row_head, highest + tl.log(total), mask=m_head)
    o_out = o_program[:, None, None] * F + o_feature
    tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=m_row[:, None, None] & m_feature)


@triton.jit
def _dynamic_merge_kernel(
    p_partial, p_highest, p_total, p_hub_row, p_hub_ptr, p_out, p_lse,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = HEADS * D
    o_hub = tl.program_id(0)
    o_head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_width = tl.arange(0, BLOCK_D)
    o_feature = o_head[:, None] * D + o_width[None, :]
    hub_row = tl.load(p_hub_row + o_hub).to(tl.int64)
    m_head = o_head < tl.where(hub_row >= 0, HEADS, 0)
    m = m_head[:, None] & (o_width < D)[None, :]
    row = tl.maximum(hub_row, 0)
    highest = tl.full([BLOCK_H], LOWEST, ACC)
    total = tl.zeros([BLOCK_H], ACC)
    acc = tl.zeros([BLOCK_H, BLOCK_D], ACC)
    first = tl.load(p_hub_ptr + o_hub).to(tl.int64)
    last = tl.load(p_hub_ptr + o_hub + 1).to(tl.int64)
    for o_chunk in range(first, last):
        part = tl.load(p_highest + o_chunk * HEADS + o_head, mask=m_head, other=LOWEST)
        higher = tl.maximum(highest, part)
        shrink, share = tl.exp(highest - higher), tl.exp(part - higher)
        highest = higher
        total = total * shrink + share * tl.load(p_total + o_chunk * HEADS + o_head, mask=m_head, other=0.0)
        partial = tl.load(p_partial + o_chunk * F + o_feature, mask=m, other=0.0)
        acc = acc * shrink[:, None] + share[:, None] * partial
    total = tl.where(total > 0, total, 1.0)
    acc = acc / total[:, None]
    tl.store(p_lse + row * HEADS + o_head, highest + tl.log(total), mask=m_head)
    tl.store(p_out + row * F + o_feature, acc.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_programs", "drop_below"])
def _dynamic_gradient_kernel(
    p_query, p_key, p_value, p_att, p_edge, p_grad, p_lse, p_delta, p_rowptr, p_col, p_edge_id, p_chunk_row,
    p_chunk_start, p_seed, p_first, p_second, p_grad_edge, num_programs, drop_below, drop_scale,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, SLOPE: tl.constexpr, GATV2: tl.constexpr, HAS_VALUE: tl.constexpr,
    HAS_EDGE: tl.constexpr, HAS_EDGE_ID: tl.constexpr, HAS_DROPOUT: tl.constexpr, HUB_EDGES: tl.constexpr,
    SKIP_HUBS: tl.constexpr, CHUNKED: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    # by row: first is d query, second the program's share of d att; else first is d key, second d value
    F: tl.constexpr = HEADS * D
    o_program = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_width = tl.arange(0, BLOCK_D)
    o_feature = o_head[None, :, None] * D + o_width[None, None, :]
    m_head = o_head < HEADS
    m_feature = m_head[None, :, None] & (o_width < D)[None, None, :]
    o_row, m_row, start, end = edges_of_rows(
        p_rowptr, p_chunk_row, p_chunk_start, o_program, num_programs, HUB_EDGES, SKIP_HUBS, CHUNKED
    )
    if BY_ROW:
        query = _rows(p_query, o_row, m_row, o_feature, m_feature, F, ACC)
        grad = _rows(p_grad, o_row, m_row, o_feature, m_feature, F, ACC)
        o_row_head = o_row[:, None] * HEADS + o_head[None, :]
        lse = tl.load(p_lse + o_row_head, mask=m_row[:, None] & m_head[None, :], other=0.0)
        delta = tl.load(p_delta + o_row_head, mask=m_row[:, None] & m_head[None, :], other=0.0)
    else:
        own_key = _rows(p_key, o_row, m_row, o_feature, m_feature, F, ACC)
        own_value = own_key
        if HAS_VALUE:
            own_value = _rows(p_value, o_row, m_row, o_feature, m_feature, F, ACC)
    att = 0.0
    if GATV2:
        att = tl.load(p_att + o_feature, mask=m_feature, other=0.0).to(ACC)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(p_seed)
    first = tl.zeros([ROWS, BLOCK_H, BLOCK_D], ACC)
    second = tl.zeros([ROWS, BLOCK_H, BLOCK_D], ACC)
    for o_step in range(0, tl.max(end - start, axis=0), UNROLL):
        for unrolled in tl.static_range(UNROLL):
            o_edge = start + o_step + unrolled
            m_edge = o_edge < end
            col = tl.load(p_col + o_edge, mask=m_edge, other=0).to(tl.int64)
            if BY_ROW:
                key = _rows(p_key, col, m_edge, o_feature, m_feature, F, ACC)
                value = key
                if HAS_VALUE:
                    value = _rows(p_value, col, m_edge, o_feature, m_feature, F, ACC)
            else:
                key, value = own_key, own_value
                query = _rows(p_query, col, m_edge, o_feature, m_feature, F, ACC)
                grad = _rows(p_grad, col, m_edge, o_feature, m_feature, F, ACC)
                o_row_head = col[:, None] * HEADS + o_head[None, :]
                lse = tl.load(p_lse + o_row_head, mask=m_edge[:, None] & m_head[None, :], other=0.0)
                delta = tl.load(p_delta + o_row_head, mask=m_edge[:, None] & m_head[None, :], other=0.0)
            edge_id = o_edge.to(tl.int64)
            if HAS_EDGE_ID:
                edge_id = tl.load(p_edge_id + o_edge, mask=m_edge, other=0).to(tl.int64)
            if HAS_EDGE:
                edge = _rows(p_edge, edge_id, m_edge, o_feature, m_feature, F, ACC)
                key += edge
                if not GATV2:
                    value += edge
            log_weight = _logit(query, key, att, D, SLOPE, GATV2) - lse
            weight = tl.exp(tl.where(m_edge[:, None], log_weight, LOWEST))
            grad_weight = tl.sum(grad * value, axis=2)
            used = weight
            if HAS_DROPOUT:
                kept = keep(row_key(edge_id, seed)[:, None], o_head[None, :], drop_below)
                used = tl.where(kept, weight * drop_scale, 0.0)
                grad_weight = tl.where(kept, grad_weight * drop_scale, 0.0)
            grad_logit = (weight * (grad_weight - delta))[:, :, None]
            if GATV2:
                total = query + key
                of_edge = grad_logit * tl.where(total > 0, att, att * SLOPE)
                first += of_edge
                if BY_ROW:
                    second += grad_logit * tl.where(total > 0, total, total * SLOPE)
            else:
                grad_logit *= D**-0.5
                of_edge = grad_logit * query
                first += grad_logit * key if BY_ROW else of_edge
            if not BY_ROW:
                second += used[:, :, None] * grad
                if HAS_EDGE:
                    if not GATV2:
                        of_edge += used[:, :, None] * grad
                    o_edge_feature = edge_id[:, None, None] * F + o_feature
                    m = m_edge[:, None, None] & m_feature
                    tl.store(p_grad_edge + o_edge_feature, of_edge.to(p_grad_edge.dtype.element_ty), mask=m)

    if not BY_ROW and not HAS_VALUE:
        first += second
    o_out = o_program[:, None, None] * F + o_feature
    m_out = m_row[:, None, None] & m_feature
    tl.store(p_first + o_out, first.to(p_first.dtype.element_ty), mask=m_out)
    if not BY_ROW and HAS_VALUE:
        tl.store(p_second + o_out, second.to(p_second.dtype.element_ty), mask=m_out)
    if BY_ROW and GATV2:
        share = tl.sum(second, axis=0)
        o_share = tl.program_id(0).to(tl.int64) * F + o_head[:, None] * D + o_width[None, :]
        tl.store(p_second + o_share, share, mask=m_head[:, None] & (o_width < D)[None, :])


# --- launch ---------------------------------------------------------------------------------------------------------


def tile(num_heads: int, width: int, itemsize: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK_H, BLOCK_D): a head's features are in one program; a lane owns 16 bytes, spare lanes take more."""
    lanes = 32 * (16 // itemsize)
    block_d = triton.next_power_of_2(width)
    block_h = min(triton.next_power_of_2(num_heads), max(1, lanes // block_d))
    return max(1, lanes // (block_d * block_h)), block_h, block_d


def unroll(width: int, itemsize: int, has_value: bool, is_backward: bool) -> int:
    """Edges in flight: eight row loads a lane, fewer where their values or their many narrow loads need registers."""
    edges = 4 if has_value or is_backward else 8
    is_narrow = width * itemsize % 16 != 0
    return edges // 2 if is_narrow or (is_backward and itemsize < 4) else edges


def _constants(
    query: Tensor, value: Tensor | None, edge: Tensor | None, edge_id: Tensor | None, score: str,
    negative_slope: float, dropout: float, hub_edges: int, is_backward: bool,
) -> dict[str, Any]:  # fmt: skip
    num_heads, width = query.shape[1:]
    rows, block_h, block_d = tile(num_heads, width, query.element_size())
    lanes = 32 * (16 // query.element_size())
    return dict(
        HEADS=num_heads, D=width, ROWS=rows, BLOCK_H=block_h, BLOCK_D=block_d,
        UNROLL=unroll(width, query.element_size(), value is not None, is_backward),
        ACC=tl.float64 if query.dtype == torch.float64 else tl.float32, SLOPE=negative_slope, GATV2=score == "gatv2",
        HAS_VALUE=value is not None, HAS_EDGE=edge is not None, HAS_EDGE_ID=edge_id is not None,
        HAS_DROPOUT=dropout > 0.0, HUB_EDGES=hub_edges, num_warps=min(8, max(1, block_d // (2 * lanes))),
    )  # fmt: skip


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def dynamic_attention_triton(
    query: Tensor, key: Tensor, value: Tensor | None, att: Tensor | None, edge: Tensor | None, csr: list[Tensor],
    edge_id: Tensor | None, hubs: list[Tensor], transposed: list[Tensor], transposed_id: Tensor | None,
    hubs_transposed: list[Tensor], score: str, negative_slope: float, dropout: float, seed: Tensor | None,
    hub_edges: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=accumulator_of(query), device=query.device)
    if out.numel() == 0:
        return out, lse
    query, key, value, att, edge = _contiguous(query, key, value, att, edge)
    num_rows, num_heads, width = query.shape
    constants = _constants(query, value, edge, edge_id, score, negative_slope, dropout, hub_edges, False)
    rows, block_h = constants["ROWS"], constants["BLOCK_H"]
    tiles = triton.cdiv(num_heads, block_h)

    def run(num_programs: int, chunk: list[Tensor], *results: Tensor | None, **flags: bool) -> None:
        chunk_row, chunk_start = chunk if chunk else (None, None)
        _dynamic_attention_kernel[(triton.cdiv(num_programs, rows), tiles)](
            query, key, value, att, edge, *csr, edge_id, chunk_row, chunk_start, seed, *results, num_programs,
            threshold(dropout), 1.0 / (1.0 - dropout), **constants, **flags,
        )  # fmt: skip

    with torch.cuda.device_of(query):
        run(num_rows, [], out, lse, None, SKIP_HUBS=len(hubs) > 0, CHUNKED=False)
        if hubs:
            chunk_row, chunk_start, hub_row, hub_ptr = hubs
            num_chunks = chunk_row.numel()
            partial = torch.empty(num_chunks, num_heads, width, dtype=lse.dtype, device=lse.device)
            highest, total = torch.empty(2, num_chunks, num_heads, dtype=lse.dtype, device=lse.device)
            run(num_chunks, [chunk_row, chunk_start], partial, highest, total, SKIP_HUBS=False, CHUNKED=True)
            _dynamic_merge_kernel[(hub_row.numel(), tiles)](
                partial, highest, total, hub_row, hub_ptr, out, lse, HEADS=num_heads, D=width, BLOCK_H=block_h,
                BLOCK_D=constants["BLOCK_D"], ACC=constants["ACC"], num_warps=constants["num_warps"],
            )  # fmt: skip
    return out, lse


def dynamic_attention_backward_triton(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor | None, att: Tensor | None, edge: Tensor | None,
    out: Tensor, lse: Tensor, csr: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor], transposed: list[Tensor],
    transposed_id: Tensor | None, hubs_transposed: list[Tensor], score: str, negative_slope: float, dropout: float,
    seed: Tensor | None, hub_edges: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad, query, key, value, att, edge = _contiguous(grad, query, key, value, att, edge)
    grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
    grad_value = query.new_empty(0) if value is None else torch.empty_like(value)
    grad_edge = query.new_empty(0) if edge is None else torch.empty_like(edge)
    grad_att = query.new_empty(0) if att is None else torch.zeros_like(att)
    if query.numel() == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_(), grad_att, grad_edge
    num_heads, width = query.shape[1:]
    features, device = num_heads * width, query.device
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(2)
    is_gatv2 = att is not None
    shares: list[Tensor] = []

    def run(
        num_programs: int, csr: list[Tensor], edge_id: Tensor | None, chunk: list[Tensor], by_row: bool, first: Tensor,
        second: Tensor | None, skip_hubs: bool,
    ) -> None:  # fmt: skip
        constants = _constants(query, value, edge, edge_id, score, negative_slope, dropout, hub_edges, True)
        grid = triton.cdiv(num_programs, constants["ROWS"]), triton.cdiv(num_heads, constants["BLOCK_H"])
        if by_row and is_gatv2:
            second = torch.empty(grid[0], num_heads, width, dtype=lse.dtype, device=device)
            shares.append(second)
        chunk_row, chunk_start = chunk if chunk else (None, None)
        _dynamic_gradient_kernel[grid](
            query, key, value, att, edge, grad, lse, delta, *csr, edge_id, chunk_row, chunk_start, seed, first, second,
            None if by_row else grad_edge, num_programs, threshold(dropout), 1.0 / (1.0 - dropout),
            SKIP_HUBS=skip_hubs, CHUNKED=len(chunk) > 0, BY_ROW=by_row, **constants,
        )  # fmt: skip

    def run_with_hubs(
        csr: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor], by_row: bool, results: list[Tensor]
    ) -> None:
        run(results[0].size(0), csr, edge_id, [], by_row, results[0], results[-1], len(hubs) > 0)
        if not hubs:
            return
        chunk_row, chunk_start, hub_row, hub_ptr = hubs
        num_chunks = chunk_row.numel()
        partials = torch.empty(len(results), num_chunks, features, dtype=lse.dtype, device=device)
        run(num_chunks, csr, edge_id, [chunk_row, chunk_start], by_row, partials[0], partials[-1], False)
        for partial, result in zip(partials, results, strict=True):
            sum_chunks(partial, hub_row, hub_ptr, result)

    with torch.cuda.device_of(query):
        run_with_hubs(csr, edge_id, hubs, True, [grad_query])
        of_columns = [grad_key] if value is None else [grad_key, grad_value]
        run_with_hubs(transposed, transposed_id, hubs_transposed, False, of_columns)
        if att is not None:
            grad_att = torch.cat(shares).sum(0).to(att.dtype)
    return grad_query, grad_key, grad_value, grad_att, grad_edge

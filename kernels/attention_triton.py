"""The Triton kernels of `attention`, and their launch.

A program takes pairs of (row, head): a logit is computed once for a pair, and the pairs of a row read its heads side by
side. Every chunk of a hub row is a softmax of its own, of the same kernel; `_attention_merge_kernel` weighs them by
their sums, as split attention does (Dao et al., flash-decoding, 2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import accumulator_of
from gas_triton.kernels.aggregate_triton import sum_chunks
from gas_triton.kernels.csr_rows import edges_of_rows
from gas_triton.kernels.dropout import keep, row_key, threshold


@triton.jit
def _edge(
    p_other, p_edge_logit, p_col, p_edge_id, own, head, o_edge, m_edge,
    HEADS: tl.constexpr, ACC: tl.constexpr, HAS_EDGE_LOGIT: tl.constexpr, HAS_EDGE_ID: tl.constexpr,
):  # fmt: skip
    # (row of the other end, place in the batch's edge order, t)
    other = tl.load(p_col + o_edge, mask=m_edge, other=0).to(tl.int64)
    logit = own + tl.load(p_other + other * HEADS + head, mask=m_edge, other=0.0).to(ACC)
    edge_id = o_edge.to(tl.int64)
    if HAS_EDGE_ID:
        edge_id = tl.load(p_edge_id + o_edge, mask=m_edge, other=0).to(tl.int64)
    if HAS_EDGE_LOGIT:
        logit += tl.load(p_edge_logit + edge_id * HEADS + head, mask=m_edge, other=0.0).to(ACC)
    return other, edge_id, logit


@triton.jit
def _add_to_sum(best, total, value):
    # -inf - -inf is NaN: while everything seen is -inf, the sum is 0 against any finite reference
    new_best = tl.maximum(best, value)
    reference = tl.where(new_best == float("-inf"), 0.0, new_best)
    return new_best, total * tl.exp(best - reference) + tl.exp(value - reference)


@triton.jit
def _log_of_sum(best, total):
    return tl.where(total == 0.0, float("-inf"), best + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _rows_of_pairs(
    p_rowptr, p_chunk_row, p_chunk_start, num_rows,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, HUB_EDGES: tl.constexpr, SKIP_HUBS: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    # (pairs as they are written, their rows, heads, first and last edges, mask)
    o_pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    o_row, m_pair, start, end = edges_of_rows(
        p_rowptr, p_chunk_row, p_chunk_start, o_pair // HEADS, num_rows, HUB_EDGES, SKIP_HUBS, CHUNKED
    )
    return o_pair, o_row, o_pair % HEADS, start, end, m_pair


@triton.jit(do_not_specialize=["num_rows", "drop_below"])
def _attention_kernel(
    p_x, p_source, p_target, p_edge_logit, p_rowptr, p_col, p_edge_id, p_chunk_row, p_chunk_start, p_seed, p_out,
    p_lse, p_positive, p_positive_weight, num_rows, drop_below, drop_scale,
    HEADS: tl.constexpr, D: tl.constexpr, STRIDE_X: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, SLOPE: tl.constexpr, HAS_EDGE_LOGIT: tl.constexpr,
    HAS_EDGE_ID: tl.constexpr, HAS_DROPOUT: tl.constexpr, SAVE: tl.constexpr, HUB_EDGES: tl.constexpr,
    SKIP_HUBS: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    o_pair, o_row, head, start, end, m_pair = _rows_of_pairs(
        p_rowptr, p_chunk_row, p_chunk_start, num_rows, HEADS, PAIRS, HUB_EDGES, SKIP_HUBS, CHUNKED
    )
    o_feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_feature = o_feature < D
    own = tl.load(p_target + o_row * HEADS + head, mask=m_pair, other=0.0).to(ACC)
    most_edges = tl.max(end - start, axis=0)

    best = tl.full([PAIRS], float("-inf"), ACC)
    total = tl.zeros([PAIRS], ACC)
    for o_step in range(0, most_edges, UNROLL):
        for unrolled in tl.static_range(UNROLL):
            o_edge = start + o_step + unrolled
            m_edge = o_edge < end
            _, _, logit = _edge(
                p_source, p_edge_logit, p_col, p_edge_id, own, head, o_edge, m_edge, HEADS, ACC, HAS_EDGE_LOGIT,
                HAS_EDGE_ID and HAS_EDGE_LOGIT,
            )  # fmt: skip
            value = tl.where(logit > 0, logit, SLOPE * logit)
            best, total = _add_to_sum(best, total, tl.where(m_edge, value, float("-inf")))
    lse = _log_of_sum(best, total)
    reference = tl.where(total == 0.0, 0.0, lse)

    if HAS_DROPOUT:
        seed = tl.load(p_seed)
    acc = tl.zeros([PAIRS, BLOCK_D], ACC)
    if SAVE:
        positive = tl.zeros([PAIRS, BLOCK_D], ACC)
        positive_weight = tl.zeros([PAIRS], ACC)
    for o_step in range(0, most_edges, UNROLL):
        for unrolled in tl.static_range(UNROLL):
            o_edge = start + o_step + unrolled
            m_edge = o_edge < end
            col, edge_id, logit = _edge(
                p_source, p_edge_logit, p_col, p_edge_id, own, head, o_edge, m_edge, HEADS, ACC, HAS_EDGE_LOGIT,
                HAS_EDGE_ID,
            )  # fmt: skip
            is_positive = logit > 0
            value = tl.where(is_positive, logit, SLOPE * logit) - reference
            weight = tl.exp(tl.where(m_edge, value, float("-inf")))
            if SAVE:
                positive_weight += tl.where(is_positive, weight, 0.0)
            if HAS_DROPOUT:
                weight = tl.where(keep(row_key(edge_id, seed), head, drop_below), weight * drop_scale, 0.0)
            o_x = col * STRIDE_X + head * D
            x = tl.load(p_x + o_x[:, None] + o_feature[None, :], mask=m_edge[:, None] & m_feature[None, :], other=0.0)
            x = x.to(ACC)
            acc += weight[:, None] * x
            if SAVE:
                positive += tl.where(is_positive, weight, 0.0)[:, None] * x

    m = m_pair[:, None] & m_feature[None, :]
    o_out = o_pair[:, None] * D + o_feature[None, :]
    tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=m)
    # what is one value a pair is written by every tile, with the same bits
    if SAVE or CHUNKED:
        # that of a chunk weighs it; that of a row is subtracted again in the backward, and must be finite
        tl.store(p_lse + o_pair, lse if CHUNKED else reference, mask=m_pair)
    if SAVE:
        tl.store(p_positive + o_out, positive.to(p_positive.dtype.element_ty), mask=m)
        tl.store(p_positive_weight + o_pair, positive_weight, mask=m_pair)


@triton.jit(do_not_specialize=["num_hubs"])
def _attention_merge_kernel(
    p_partial, p_partial_lse, p_partial_positive, p_partial_weight, p_hub_row, p_hub_ptr, p_out, p_lse, p_positive,
    p_positive_weight, num_hubs,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    o_pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    o_hub, head = o_pair // HEADS, o_pair % HEADS
    o_feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_feature = o_feature < D
    row = tl.load(p_hub_row + o_hub, mask=o_hub < num_hubs, other=-1).to(tl.int64)
    m_pair = row >= 0
    first = tl.load(p_hub_ptr + o_hub, mask=m_pair, other=0)
    last = tl.load(p_hub_ptr + o_hub + 1, mask=m_pair, other=0)
    most_chunks = tl.max(last - first, axis=0)

    best = tl.full([PAIRS], float("-inf"), ACC)
    total = tl.zeros([PAIRS], ACC)
    for o_step in range(most_chunks):
        o_chunk = (first + o_step).to(tl.int64) * HEADS + head
        value = tl.load(p_partial_lse + o_chunk, mask=first + o_step < last, other=float("-inf"))
        best, total = _add_to_sum(best, total, value)
    reference = tl.where(total == 0.0, 0.0, _log_of_sum(best, total))

    acc = tl.zeros([PAIRS, BLOCK_D], ACC)
    positive = tl.zeros([PAIRS, BLOCK_D], ACC)
    positive_weight = tl.zeros([PAIRS], ACC)
    for o_step in range(most_chunks):
        m_chunk = first + o_step < last
        o_chunk = (first + o_step).to(tl.int64) * HEADS + head
        weight = tl.exp(tl.load(p_partial_lse + o_chunk, mask=m_chunk, other=float("-inf")) - reference)
        o_partial = o_chunk[:, None] * D + o_feature[None, :]
        m = m_chunk[:, None] & m_feature[None, :]
        acc += weight[:, None] * tl.load(p_partial + o_partial, mask=m, other=0.0)
        if SAVE:
            positive += weight[:, None] * tl.load(p_partial_positive + o_partial, mask=m, other=0.0)
            positive_weight += weight * tl.load(p_partial_weight + o_chunk, mask=m_chunk, other=0.0)

    m = m_pair[:, None] & m_feature[None, :]
    o_written = row * HEADS + head
    o_out = o_written[:, None] * D + o_feature[None, :]
    tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=m)
    if SAVE:
        tl.store(p_lse + o_written, reference, mask=m_pair)
        tl.store(p_positive + o_out, positive.to(p_positive.dtype.element_ty), mask=m)
        tl.store(p_positive_weight + o_written, positive_weight, mask=m_pair)


@triton.jit(do_not_specialize=["num_rows", "num_edges", "drop_below"])
def _attention_backward_kernel(
    p_grad, p_x, p_source, p_target, p_edge_logit, p_lse, p_delta, p_rowptr, p_col, p_edge_id, p_chunk_row,
    p_chunk_start, p_seed, p_grad_x, p_grad_source, p_grad_edge, num_rows, num_edges, drop_below, drop_scale,
    HEADS: tl.constexpr, D: tl.constexpr, STRIDE_X: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, SLOPE: tl.constexpr, HAS_EDGE_LOGIT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, EDGE_GRAD: tl.constexpr, HUB_EDGES: tl.constexpr, SKIP_HUBS: tl.constexpr,
    CHUNKED: tl.constexpr,
):  # fmt: skip
    o_pair, o_row, head, start, end, m_pair = _rows_of_pairs(
        p_rowptr, p_chunk_row, p_chunk_start, num_rows, HEADS, PAIRS, HUB_EDGES, SKIP_HUBS, CHUNKED
    )
    o_tile = tl.program_id(1)
    o_feature = o_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    m_feature = o_feature < D
    m = m_pair[:, None] & m_feature[None, :]
    own = tl.load(p_source + o_row * HEADS + head, mask=m_pair, other=0.0).to(ACC)
    o_x = (o_row * STRIDE_X + head * D)[:, None] + o_feature[None, :]
    if EDGE_GRAD:
        x = tl.load(p_x + o_x, mask=m, other=0.0).to(ACC)
    if HAS_DROPOUT:
        seed = tl.load(p_seed)
    # several tiles of a row each add their share of <g, x>; one of them subtracts p D
    is_first = tl.where(o_tile == 0, 1.0, 0.0).to(ACC)

    acc = tl.zeros([PAIRS, BLOCK_D], ACC)
    positive = tl.zeros([PAIRS, BLOCK_D], ACC)
    grad_source = tl.zeros([PAIRS], ACC)
    for o_step in range(0, tl.max(end - start, axis=0), UNROLL):
        for unrolled in tl.static_range(UNROLL):
            o_edge = start + o_step + unrolled
            m_edge = o_edge < end
            target, edge_id, logit = _edge(
                p_target, p_edge_logit, p_col, p_edge_id, own, head, o_edge, m_edge, HEADS, ACC, HAS_EDGE_LOGIT,
                HAS_EDGE_LOGIT or HAS_DROPOUT,
            )  # fmt: skip
            is_positive = logit > 0
            lse = tl.load(p_lse + target * HEADS + head, mask=m_edge, other=0.0)
            value = tl.where(is_positive, logit, SLOPE * logit) - lse
            weight = tl.exp(tl.where(m_edge, value, float("-inf")))
            delta = weight * tl.load(p_delta + target * HEADS + head, mask=m_edge, other=0.0) * is_first
            if HAS_DROPOUT:
                weight = tl.where(keep(row_key(edge_id, seed), head, drop_below), weight * drop_scale, 0.0)
            o_grad = (target * HEADS + head) * D
            m_grad = m_edge[:, None] & m_feature[None, :]
            grad = tl.load(p_grad + o_grad[:, None] + o_feature[None, :], mask=m_grad, other=0.0).to(ACC)
            acc += weight[:, None] * grad
            if EDGE_GRAD:
                grad_logit = weight * tl.sum(grad * x, axis=1) - delta
                grad_logit = tl.where(is_positive, grad_logit, SLOPE * grad_logit)
                o_written = (o_tile.to(tl.int64) * num_edges + edge_id) * HEADS + head
                tl.store(p_grad_edge + o_written, grad_logit, mask=m_edge)
                grad_source += grad_logit
            else:
                positive += tl.where(is_positive, weight, 0.0)[:, None] * grad
                grad_source -= tl.where(is_positive, delta, SLOPE * delta)

    tl.store(p_grad_x + o_pair[:, None] * D + o_feature[None, :], acc.to(p_grad_x.dtype.element_ty), mask=m)
    if not EDGE_GRAD:
        x = tl.load(p_x + o_x, mask=m, other=0.0).to(ACC)
        grad_source += tl.sum((SLOPE * acc + (1.0 - SLOPE) * positive) * x, axis=1)
    tl.store(p_grad_source + o_tile.to(tl.int64) * num_rows * HEADS + o_pair, grad_source, mask=m_pair)


# --- launch ---------------------------------------------------------------------------------------------------------


def empty_outputs(
    x: Tensor, num_rows: int, save: bool, is_chunk: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, heads, width = x.shape
    saved, wide = (num_rows if save else 0), accumulator_of(x)
    return (
        x.new_empty(num_rows, heads, width),
        x.new_empty(num_rows if is_chunk else saved, heads, dtype=wide),
        x.new_empty(saved, heads, width),
        x.new_empty(saved, heads, dtype=wide),
    )


def empty_gradients(
    grad, x, source, target, edge_logit, lse, delta, transposed, hubs_transposed, negative_slope, dropout, seed,
    hub_edges, edge_grad,
):  # fmt: skip
    num_rows, heads, _ = x.shape
    wide = accumulator_of(x)
    edges = (transposed[1].numel(), heads) if edge_grad else (0,)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty(num_rows, heads, dtype=wide),
        x.new_empty(edges, dtype=wide),
    )


def tile(width: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_D, PAIRS) of one warp: a lane owns the widest vector that heads of this width are aligned to."""
    vector = math.gcd(width * itemsize, 16) // itemsize
    block_d = min(triton.next_power_of_2(width), 32 * 16 // itemsize)
    return block_d, max(1, 32 * vector // block_d)


def unroll(has_edge_logit: bool, has_dropout: bool, has_hubs: bool) -> int:
    """Edges in flight; with anything more to keep in registers, 8 of them spill on some widths."""
    return 4 if has_edge_logit or has_dropout or has_hubs else 8


def _constants(x: Tensor, edge_logit: Tensor | None, slope: float, dropout: float, hub_edges: int) -> dict[str, Any]:
    _, heads, width = x.shape
    block_d, pairs = tile(width, x.element_size())
    return dict(
        HEADS=heads, D=width, STRIDE_X=x.stride(0), BLOCK_D=block_d, PAIRS=pairs,
        SLOPE=slope, ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        HAS_EDGE_LOGIT=edge_logit is not None, HAS_DROPOUT=dropout > 0.0, HUB_EDGES=hub_edges, num_warps=1,
    )  # fmt: skip


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == x.size(2) else x.contiguous()


def attention_triton(
    x: Tensor, source: Tensor, target: Tensor, edge_logit: Tensor | None, joint: list[Tensor],
    transposed: list[Tensor], hubs: list[Tensor], hubs_transposed: list[Tensor], negative_slope: float, dropout: float,
    seed: Tensor | None, hub_edges: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_rows, save = joint[0].numel() - 1, len(transposed) > 0
    outputs = empty_outputs(x, num_rows, save)
    if outputs[0].numel() == 0:
        return outputs
    x, source, target = _packed(x), source.contiguous(), target.contiguous()
    edge_logit = None if edge_logit is None else edge_logit.contiguous()
    edge_id = joint[2] if len(joint) > 2 else None
    has_edge_id = edge_id is not None and (edge_logit is not None or dropout > 0.0)
    constants = _constants(x, edge_logit, negative_slope, dropout, hub_edges)
    heads, pairs, tiles = x.size(1), constants["PAIRS"], triton.cdiv(x.size(2), constants["BLOCK_D"])

    def run(num_programs: int, outputs: tuple[Tensor, ...], chunk: list[Tensor], **flags: bool) -> None:
        chunk_row, chunk_start = chunk if chunk else (None, None)
        _attention_kernel[(triton.cdiv(num_programs * heads, pairs), tiles)](
            x, source, target, edge_logit, joint[0], joint[1], edge_id, chunk_row, chunk_start, seed, *outputs,
            num_programs, threshold(dropout), 1.0 / (1.0 - dropout), SAVE=save, HAS_EDGE_ID=has_edge_id, **constants,
            UNROLL=unroll(edge_logit is not None, dropout > 0.0, len(hubs) > 0), **flags,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        run(num_rows, outputs, [], SKIP_HUBS=len(hubs) > 0, CHUNKED=False)
        if hubs:
            chunk_row, chunk_start, hub_row, hub_ptr = hubs
            wide = x.new_empty(0, *x.shape[1:], dtype=accumulator_of(x))
            partial = empty_outputs(wide, chunk_row.numel(), save, is_chunk=True)
            run(chunk_row.numel(), partial, [chunk_row, chunk_start], SKIP_HUBS=False, CHUNKED=True)
            _attention_merge_kernel[(triton.cdiv(hub_row.numel() * heads, pairs), tiles)](
                *partial, hub_row, hub_ptr, *outputs, hub_row.numel(), HEADS=heads, D=x.size(2),
                BLOCK_D=constants["BLOCK_D"], PAIRS=pairs, ACC=constants["ACC"], SAVE=save, num_warps=1,
            )  # fmt: skip
    return outputs


def attention_backward_triton(
    grad: Tensor, x: Tensor, source: Tensor, target: Tensor, edge_logit: Tensor | None, lse: Tensor, delta: Tensor,
    transposed: list[Tensor], hubs_transposed: list[Tensor], negative_slope: float, dropout: float,
    seed: Tensor | None, hub_edges: int, edge_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_rows, heads, width = x.shape
    if x.numel() == 0 or grad.numel() == 0:
        shapes = empty_gradients(
            grad, x, source, target, edge_logit, lse, delta, transposed, hubs_transposed, negative_slope, dropout, seed,
            hub_edges, edge_grad,
        )  # fmt: skip
        return shapes[0].zero_(), shapes[1].zero_(), shapes[2].zero_()
    rowptr, col, edge_id = transposed
    grad, x, source, target = grad.contiguous(), _packed(x), source.contiguous(), target.contiguous()
    edge_logit = None if edge_logit is None else edge_logit.contiguous()
    constants = _constants(x, edge_logit, negative_slope, dropout, hub_edges)
    pairs, tiles = constants["PAIRS"], triton.cdiv(width, constants["BLOCK_D"])
    wide: dict[str, Any] = dict(dtype=accumulator_of(x), device=x.device)
    grad_x = torch.empty((num_rows, heads, width), dtype=x.dtype, device=x.device)
    grad_source = torch.empty((tiles, num_rows, heads), **wide)
    grad_edge = torch.empty((tiles, col.numel(), heads) if edge_grad else (1, 0), **wide)

    def run(num_programs: int, grad_x: Tensor, grad_source: Tensor, chunk: list[Tensor], **flags: bool) -> None:
        chunk_row, chunk_start = chunk if chunk else (None, None)
        _attention_backward_kernel[(triton.cdiv(num_programs * heads, pairs), tiles)](
            grad, x, source, target, edge_logit, lse, delta, rowptr, col, edge_id, chunk_row, chunk_start, seed,
            grad_x, grad_source, grad_edge, num_programs, col.numel(), threshold(dropout), 1.0 / (1.0 - dropout),
            EDGE_GRAD=edge_grad, UNROLL=unroll(edge_logit is not None, dropout > 0.0, len(hubs_transposed) > 0),
            **constants, **flags,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        run(num_rows, grad_x, grad_source, [], SKIP_HUBS=len(hubs_transposed) > 0, CHUNKED=False)
        if hubs_transposed:
            chunk_row, chunk_start, hub_row, hub_ptr = hubs_transposed
            partial = torch.empty((chunk_row.numel(), heads, width), **wide)
            partial_source = torch.empty((tiles, chunk_row.numel(), heads), **wide)
            run(chunk_row.numel(), partial, partial_source, [chunk_row, chunk_start], SKIP_HUBS=False, CHUNKED=True)
            sum_chunks(partial, hub_row, hub_ptr, grad_x)
            for part, out in zip(partial_source, grad_source, strict=True):
                sum_chunks(part, hub_row, hub_ptr, out)
    return grad_x, _sum_of_tiles(grad_source), _sum_of_tiles(grad_edge)


def _sum_of_tiles(parts: Tensor) -> Tensor:
    return parts[0] if parts.size(0) == 1 else parts.sum(0)

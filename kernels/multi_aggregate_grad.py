"""Gradient of `multi_aggregate` with respect to the rows it reads.

The gradient of sum, mean, var and std is linear in the row that is read: with n edges into row i,

    dx[j] = sum_i (a[i] + c[i] * x[j]),   c = (2 g_var + g_std / std) / n,   a = g_sum + g_mean / n - c * mean

so that one pass over the transposed columns gathers a and c, and the gradients of min and max with the winners that
they belong to. Nothing here uses atomics: same input, same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import accumulator_of, define
from gas_triton.kernels.aggregate_triton import _message, tile
from gas_triton.kernels.csr_rows import edges_of_rows
from gas_triton.kernels.multi_aggregate_cpu import multi_aggregate_grad_cpu

MULTI_REDUCTIONS = ("sum", "mean", "min", "max", "var", "std")


def coefficients(grad: Tensor, moments: Tensor, reduces: list[str], count: Tensor) -> Tensor:
    """a, and c where there is a variance: the gradient that a row gives to each row h that it reads is a + c h."""
    by_name = dict(zip(reduces, grad.unbind(1), strict=True))
    constant: Tensor | None = by_name.get("sum")
    if "mean" in by_name:
        of_mean = by_name["mean"] / count
        constant = of_mean if constant is None else constant + of_mean
    if moments.size(0) == 0:
        return grad.new_empty(0, grad.size(0), grad.size(2)) if constant is None else constant[None].contiguous()
    mean, inverse_std = moments
    slope = 2.0 * by_name["var"] if "var" in by_name else None
    if "std" in by_name:
        of_std = by_name["std"] * inverse_std
        slope = of_std if slope is None else slope + of_std
    assert slope is not None
    slope = slope / count
    offset = slope * mean
    return torch.stack([-offset if constant is None else constant - offset, slope])


# --- Triton -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_programs", "num_rows"])
def _multi_grad_kernel(
    p_grad, p_x, p_coefficient, p_winner, p_rowptr, p_col, p_edge_id, p_out, p_chunk_row, p_chunk_start, p_partial,
    num_programs, num_rows,
    F: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_GRAD: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, AT_MIN: tl.constexpr, AT_MAX: tl.constexpr, SUMS: tl.constexpr,
    SQUARES: tl.constexpr, HUB_EDGES: tl.constexpr, SKIP_HUBS: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    o_program = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_feature = o_feature < F
    o_row, m_row, start, end = edges_of_rows(
        p_rowptr, p_chunk_row, p_chunk_start, o_program, num_programs, HUB_EDGES, SKIP_HUBS, CHUNKED
    )
    plane = num_rows.to(tl.int64) * F
    total = tl.zeros([ROWS, BLOCK_F], ACC)
    slope = tl.zeros([ROWS, BLOCK_F], ACC)
    for o_step in range(0, tl.max(end - start, axis=0), UNROLL):
        for unrolled in tl.static_range(UNROLL):
            o_edge = start + o_step + unrolled
            m_edge = o_edge < end
            if SUMS:
                total += _message(
                    p_coefficient, None, p_col, None, None, None, None, 0, 0, 0, o_edge, m_edge, o_feature, m_feature,
                    F, ACC, False, False, False, False, False, False, F, "evict_last",
                )  # fmt: skip
            if SQUARES:
                slope += _message(
                    p_coefficient + plane, None, p_col, None, None, None, None, 0, 0, 0, o_edge, m_edge, o_feature,
                    m_feature, F, ACC, False, False, False, False, False, False, F, "evict_last",
                )  # fmt: skip
            if AT_MIN >= 0:
                total += _message(
                    p_grad + AT_MIN * F, None, p_col, None, None, p_winner, p_edge_id, 0, 0, 0, o_edge, m_edge,
                    o_feature, m_feature, STRIDE_GRAD, ACC, False, False, False, True, False, False, F, "evict_last",
                )  # fmt: skip
            if AT_MAX >= 0:
                total += _message(
                    p_grad + AT_MAX * F, None, p_col, None, None, p_winner + (plane if AT_MIN >= 0 else 0), p_edge_id,
                    0, 0, 0, o_edge, m_edge, o_feature, m_feature, STRIDE_GRAD, ACC, False, False, False, True, False,
                    False, F, "evict_last",
                )  # fmt: skip
    m = m_row[:, None] & m_feature[None, :]
    o_out = o_program[:, None] * F + o_feature[None, :]
    if CHUNKED:
        tl.store(p_partial + o_out, total, mask=m)
        if SQUARES:
            tl.store(p_partial + num_programs.to(tl.int64) * F + o_out, slope, mask=m)
    else:
        if SQUARES:
            x = tl.load(p_x + o_row[:, None] * STRIDE_X + o_feature[None, :], mask=m, other=0.0)
            total += slope * x.to(ACC)
        tl.store(p_out + o_out, total.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_chunks"])
def _multi_grad_combine_kernel(
    p_partial, p_x, p_hub_row, p_hub_ptr, p_out, num_chunks,
    F: tl.constexpr, STRIDE_X: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    o_hub = tl.program_id(0)
    o_feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    hub_row = tl.load(p_hub_row + o_hub).to(tl.int64)
    m = o_feature < tl.where(hub_row >= 0, F, 0)
    row = tl.maximum(hub_row, 0)
    total = tl.zeros([BLOCK_F], ACC)
    slope = tl.zeros([BLOCK_F], ACC)
    first = tl.load(p_hub_ptr + o_hub).to(tl.int64)
    last = tl.load(p_hub_ptr + o_hub + 1).to(tl.int64)
    plane = num_chunks.to(tl.int64) * F
    for o_chunk in range(first, last):
        total += tl.load(p_partial + o_chunk * F + o_feature, mask=m, other=0.0)
        if SQUARES:
            slope += tl.load(p_partial + plane + o_chunk * F + o_feature, mask=m, other=0.0)
    if SQUARES:
        total += slope * tl.load(p_x + row * STRIDE_X + o_feature, mask=m, other=0.0).to(ACC)
    tl.store(p_out + row * F + o_feature, total.to(p_out.dtype.element_ty), mask=m)


# --- launch -----------------------------------------------------------------------------------------------------------


def places_of(reduces: list[str]) -> dict[str, int]:
    return {f"AT_{name.upper()}": reduces.index(name) if name in reduces else -1 for name in MULTI_REDUCTIONS}


def multi_aggregate_grad_triton(
    grad: Tensor, x: Tensor, coefficient: Tensor, winner: Tensor, reduces: list[str], transposed: list[Tensor],
    edge_id: Tensor | None, hubs: list[Tensor], hub_edges: int,
) -> Tensor:  # fmt: skip
    out = _grad_fake(grad, x, coefficient, winner, reduces, transposed, edge_id, hubs, hub_edges)
    if out.numel() == 0:
        return out
    num_rows, num_features = grad.size(0), grad.size(2)
    grad, x = grad.contiguous(), x if x.stride(1) == 1 else x.contiguous()
    accumulator = accumulator_of(x)
    block_f, rows = tile(num_features, coefficient.element_size())
    tiles_f = triton.cdiv(num_features, block_f)
    places = places_of(reduces)
    has_sums, has_squares = coefficient.size(0) > 0, coefficient.size(0) > 1
    loads = has_sums + has_squares + 2 * winner.size(0)
    common: dict[str, Any] = dict(
        F=num_features, STRIDE_X=x.stride(0), BLOCK_F=block_f,
        ACC=tl.float64 if accumulator == torch.float64 else tl.float32, SQUARES=has_squares, num_warps=1,
    )  # fmt: skip
    constants: dict[str, Any] = dict(
        STRIDE_GRAD=grad.stride(0), ROWS=rows, UNROLL=unroll(loads), AT_MIN=places["AT_MIN"], AT_MAX=places["AT_MAX"],
        SUMS=has_sums, HUB_EDGES=hub_edges, **common,
    )  # fmt: skip

    def run(num_programs: int, chunk: list[Tensor | None], **flags: bool) -> None:
        _multi_grad_kernel[(triton.cdiv(num_programs, rows), tiles_f)](
            grad, x, coefficient, winner, *transposed, edge_id, out, *chunk, num_programs, num_rows, **constants,
            **flags,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        run(out.size(0), [None] * 3, SKIP_HUBS=len(hubs) > 0, CHUNKED=False)
        if hubs:
            chunk_row, chunk_start, hub_row, hub_ptr = hubs
            num_chunks = chunk_row.numel()
            partial = torch.empty(2, num_chunks, num_features, dtype=accumulator, device=x.device)
            run(num_chunks, [chunk_row, chunk_start, partial], SKIP_HUBS=False, CHUNKED=True)
            _multi_grad_combine_kernel[(hub_row.numel(), tiles_f)](
                partial, x, hub_row, hub_ptr, out, num_chunks, **common
            )
    return out


def unroll(loads: int) -> int:
    """Edges of the gradient kernel in flight, when each takes so many row loads: about eight loads of them."""
    return max(2, 8 // loads)


# --- registration -----------------------------------------------------------------------------------------------------


def _grad_fake(grad, x, coefficient, winner, reduces, transposed, edge_id, hubs, hub_edges):
    return x.new_empty(transposed[0].numel() - 1, x.size(1))


multi_aggregate_grad = define(
    "multi_aggregate_grad(Tensor grad, Tensor x, Tensor coefficient, Tensor winner, str[] reduces, "
    "Tensor[] transposed, Tensor? edge_id, Tensor[] hubs, int hub_edges) -> Tensor",
    cpu=multi_aggregate_grad_cpu,
    cuda=multi_aggregate_grad_triton,
    fake=_grad_fake,
)

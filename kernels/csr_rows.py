"""What a CSR row pointer says of its rows and edges."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def row_of_edge(rowptr: Tensor, col: Tensor) -> Tensor:
    """The row of every edge, int64 [E]."""
    rows = torch.arange(rowptr.numel() - 1, device=rowptr.device)
    return torch.repeat_interleave(rows, rowptr.diff().long(), output_size=col.numel())


def degree(inner: list[Tensor], outer: list[Tensor]) -> Tensor:
    """Edges of each row over both blocks, at least 1, [B]."""
    count = inner[0].diff()
    if outer:
        count = count + outer[0].diff()
    return count.clamp_(min=1)


@triton.jit
def edges_of_rows(
    p_rowptr, p_chunk_row, p_chunk_start, o_program, num_programs,
    HUB_EDGES: tl.constexpr, SKIP_HUBS: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    # (row, mask, first and last edges) of each program: a row, or with CHUNKED a chunk of a hub's; hubs without edges
    o_row = o_program
    m_row = o_program < num_programs
    if CHUNKED:
        o_row = tl.load(p_chunk_row + o_program, mask=m_row, other=-1).to(tl.int64)
        m_row = o_row >= 0
    start = tl.load(p_rowptr + o_row, mask=m_row, other=0)
    end = tl.load(p_rowptr + o_row + 1, mask=m_row, other=0)
    if CHUNKED:
        start += tl.load(p_chunk_start + o_program, mask=m_row, other=0)
        end = tl.minimum(start + HUB_EDGES, end)
    if SKIP_HUBS:
        is_hub = end - start > HUB_EDGES
        m_row = m_row & (end - start <= HUB_EDGES)
        end = tl.where(is_hub, start, end)
    return o_row, m_row, start, end


@triton.jit
def edge_span(
    p_rowptr, p_other_rowptr, o_row, m_row, first, HUB_EDGES: tl.constexpr, SKIP_HUBS: tl.constexpr,
    CHUNKED: tl.constexpr, HAS_OTHER: tl.constexpr, IS_SECOND: tl.constexpr,
):  # fmt: skip
    # the edges of one block that a program takes; a chunk counts through inner and on through outer
    start = tl.load(p_rowptr + o_row, mask=m_row, other=0)
    end = tl.load(p_rowptr + o_row + 1, mask=m_row, other=0)
    other = tl.zeros_like(start)
    if HAS_OTHER:
        other = tl.load(p_other_rowptr + o_row + 1, mask=m_row, other=0)
        other -= tl.load(p_other_rowptr + o_row, mask=m_row, other=0)
    if CHUNKED:
        skipped = first
        if IS_SECOND:
            skipped -= other
        last = skipped + HUB_EDGES
        num_edges = end - start
        end = start + tl.minimum(tl.maximum(last, 0), num_edges)
        start += tl.minimum(tl.maximum(skipped, 0), num_edges)
    if SKIP_HUBS:
        end = tl.where(end - start + other > HUB_EDGES, start, end)
    return start, end


@triton.jit
def edge_count(p_inner_rowptr, p_outer_rowptr, o_row, m_row, HAS_OUTER: tl.constexpr):
    count = tl.load(p_inner_rowptr + o_row + 1, mask=m_row, other=0)
    count -= tl.load(p_inner_rowptr + o_row, mask=m_row, other=0)
    if HAS_OUTER:
        count += tl.load(p_outer_rowptr + o_row + 1, mask=m_row, other=0)
        count -= tl.load(p_outer_rowptr + o_row, mask=m_row, other=0)
    return count

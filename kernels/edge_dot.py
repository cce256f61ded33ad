"""Dot product at every edge: the gradient of an aggregation with respect to its edge weights.

    out[e] = < grad[row(e)], dropout(table[col[e]]) >        e in 0 .. E-1

Rows of an int8 `table` are multiplied by their `scale`. Dropout hashes `node_ids[e]`, given where `col` counts the rows
of a staged table, else `col[e]`. With `winner` (max, min) only the features whose extremum came from this edge count.
Accumulated in float32 (float64 for float64 rows).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import accumulator_of, define
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.dropout import keep, keep_mask, row_key, threshold
from gas_triton.kernels.pull import widen

CPU_CHUNK = 1 << 15


@triton.jit(do_not_specialize=["num_edges", "first_edge", "drop_below"])
def _edge_dot_kernel(
    p_grad, p_table, p_scale, p_row, p_col, p_node, p_winner, p_seed, p_out, num_edges, first_edge, drop_below,
    drop_scale,
    F: tl.constexpr, STRIDE_GRAD: tl.constexpr, STRIDE_TABLE: tl.constexpr, BLOCK_F: tl.constexpr,
    EDGES: tl.constexpr, ACC: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NODE: tl.constexpr, HAS_WINNER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    o_edge = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    m_edge = o_edge < num_edges
    row = tl.load(p_row + o_edge, mask=m_edge, other=0).to(tl.int64)
    col = tl.load(p_col + o_edge, mask=m_edge, other=0).to(tl.int64)
    acc = tl.zeros([EDGES, BLOCK_F], ACC)
    if HAS_SCALE:
        scale = tl.load(p_scale + col, mask=m_edge, other=0.0)
    if HAS_DROPOUT:
        node = col
        if HAS_NODE:
            node = tl.load(p_node + o_edge, mask=m_edge, other=0).to(tl.int64)
        key = row_key(node, tl.load(p_seed))
    for o_tile in range(0, F, BLOCK_F):
        o_feature = o_tile + tl.arange(0, BLOCK_F)
        m = m_edge[:, None] & (o_feature < F)[None, :]
        grad = tl.load(p_grad + row[:, None] * STRIDE_GRAD + o_feature[None, :], mask=m, other=0.0).to(ACC)
        value = tl.load(p_table + col[:, None] * STRIDE_TABLE + o_feature[None, :], mask=m, other=0.0)
        if HAS_SCALE:
            value = value.to(tl.float32) * scale[:, None]
        value = value.to(ACC)
        if HAS_WINNER:
            winner = tl.load(p_winner + row[:, None] * F + o_feature[None, :], mask=m, other=-1)
            grad = tl.where(winner == (o_edge + first_edge)[:, None], grad, 0.0)
        if HAS_DROPOUT:
            value = tl.where(keep(key[:, None], o_feature[None, :], drop_below), value * drop_scale, 0.0)
        acc += grad * value
    tl.store(p_out + o_edge, tl.sum(acc, axis=1), mask=m_edge)


def edge_dot_triton(
    grad: Tensor, table: Tensor, scale: Tensor | None, rowptr: Tensor, col: Tensor, node_ids: Tensor | None,
    winner: Tensor | None, first_edge: int, dropout: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    out = _edge_dot_fake(grad, table, scale, rowptr, col, node_ids, winner, first_edge, dropout, seed)
    num_edges, num_features = out.numel(), grad.size(1)
    if num_edges == 0:
        return out
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    # as in `aggregate`, a lane owns half a vector of int8
    lanes = 32 * (16 // max(2, min(grad.element_size(), table.element_size())))
    block_f = min(triton.next_power_of_2(num_features), lanes)
    edges = 4 * lanes // block_f
    with torch.cuda.device_of(grad):
        _edge_dot_kernel[(triton.cdiv(num_edges, edges),)](
            grad, table, scale, row_of_edge(rowptr, col), col, node_ids, winner, seed, out, num_edges, first_edge,
            threshold(dropout), 1.0 / (1.0 - dropout), F=num_features, STRIDE_GRAD=grad.stride(0),
            STRIDE_TABLE=table.stride(0), BLOCK_F=block_f, EDGES=edges,
            ACC=tl.float64 if out.dtype == torch.float64 else tl.float32, HAS_SCALE=scale is not None,
            HAS_NODE=node_ids is not None, HAS_WINNER=winner is not None, HAS_DROPOUT=dropout > 0.0, num_warps=1,
        )  # fmt: skip
    return out


def edge_dot_cpu(
    grad: Tensor, table: Tensor, scale: Tensor | None, rowptr: Tensor, col: Tensor, node_ids: Tensor | None,
    winner: Tensor | None, first_edge: int, dropout: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    out = _edge_dot_fake(grad, table, scale, rowptr, col, node_ids, winner, first_edge, dropout, seed)
    row = row_of_edge(rowptr, col)
    # in pieces: two [E, F] gathers at once would be the largest tensors of a step
    for start in range(0, col.numel(), CPU_CHUNK):
        edges = slice(start, start + CPU_CHUNK)
        left = grad[row[edges]].to(out.dtype)
        right = widen(table[col[edges]], None if scale is None else scale[col[edges]], out.dtype)
        if winner is not None:
            edge_id = torch.arange(first_edge + start, first_edge + start + left.size(0), dtype=torch.int32)
            left.masked_fill_(winner[row[edges]] != edge_id[:, None], 0.0)
        if dropout > 0.0 and seed is not None:
            node = col if node_ids is None else node_ids
            right.mul_(keep_mask(node[edges], right.size(1), dropout, seed)).mul_(1.0 / (1.0 - dropout))
        out[edges] = torch.linalg.vecdot(left, right)
    return out


def _edge_dot_fake(
    grad: Tensor, table: Tensor, scale: Tensor | None, rowptr: Tensor, col: Tensor, node_ids: Tensor | None,
    winner: Tensor | None, first_edge: int, dropout: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    dtype = accumulator_of(grad)
    return torch.empty(col.shape, dtype=dtype, device=grad.device)


edge_dot = define(
    "edge_dot(Tensor grad, Tensor table, Tensor? scale, Tensor rowptr, Tensor col, Tensor? node_ids, Tensor? winner, "
    "int first_edge, float dropout, Tensor? seed) -> Tensor",
    cpu=edge_dot_cpu,
    cuda=edge_dot_triton,
    fake=_edge_dot_fake,
)

"""The CPU path of `dynamic_attention`: stock torch, with no tensor of edges x heads x features.

Dot products at the edges are `sampled_addmm`, one head at a time, and weighted sums over neighbours `embedding_bag`
over the rows of all heads: both read rows where they lie. What GATv2 does between the two ends of an edge is done in
pieces of the edges that stay in the cache. Tensors of edges x heads are in the order of the CSR.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from gas_triton.kernels._library import accumulator_of
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.dropout import keep_mask

PIECE = 1 << 17
LARGEST_INT32 = 2**31 - 1


def dynamic_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor | None, att: Tensor | None, edge: Tensor | None, csr: list[Tensor],
    edge_id: Tensor | None, hubs: list[Tensor], transposed: list[Tensor], transposed_id: Tensor | None,
    hubs_transposed: list[Tensor], score: str, negative_slope: float, dropout: float, seed: Tensor | None,
    hub_edges: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = accumulator_of(query)
    rowptr, col = csr
    row = row_of_edge(rowptr, col)
    wide_query, wide_key = _widen(query, dtype), _widen(key, dtype)
    wide_value = wide_key if value is None else _widen(value, dtype)
    logit = _logits(wide_query, wide_key, att, edge, row, rowptr, col, edge_id, score, negative_slope)
    place = torch.arange(col.numel(), dtype=torch.int32)
    highest = torch.embedding_bag(logit, place, rowptr, False, 2, False, None, True)[0]
    weight = logit.sub_(highest.index_select(0, row)).exp_()
    total = _sum_of_rows(weight, rowptr)
    lse = torch.where(total > 0, highest + total.log(), 0.0)
    # a row without edges has none of these
    weight.div_(total.index_select(0, row))
    weight = _drop(weight, edge_id, dropout, seed)
    out = _weighted_sum(wide_value, weight, rowptr, col)
    if edge is not None and score == "dot":
        _add_edges(out, edge, weight, rowptr, edge_id)
    return out.to(query.dtype), lse


def dynamic_attention_backward_cpu(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor | None, att: Tensor | None, edge: Tensor | None,
    out: Tensor, lse: Tensor, csr: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor], transposed: list[Tensor],
    transposed_id: Tensor | None, hubs_transposed: list[Tensor], score: str, negative_slope: float, dropout: float,
    seed: Tensor | None, hub_edges: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = lse.dtype
    rowptr, col = csr
    rowptr_t, col_t = transposed
    row = row_of_edge(rowptr, col)
    wide_grad, wide_query, wide_key = _widen(grad, dtype), _widen(query, dtype), _widen(key, dtype)
    wide_value = wide_key if value is None else _widen(value, dtype)
    scale = query.size(2) ** -0.5

    weight = _logits(wide_query, wide_key, att, edge, row, rowptr, col, edge_id, score, negative_slope)
    weight.sub_(lse.index_select(0, row)).exp_()
    grad_weight = _products(wide_grad, wide_value, rowptr, col)
    if edge is not None and score == "dot":
        _add_edge_products(grad_weight, wide_grad, edge, row, edge_id)
    grad_weight = _drop(grad_weight, edge_id, dropout, seed)
    # equal to < grad, out >, without the rounding of a narrow out
    delta = _sum_of_rows(weight * grad_weight, rowptr)
    grad_logit = grad_weight.sub_(delta.index_select(0, row)).mul_(weight)
    weight = _drop(weight, edge_id, dropout, seed)

    order = _order(transposed_id, edge_id)
    grad_value = _weighted_sum(wide_grad, weight.index_select(0, order), rowptr_t, col_t)
    grad_att = query.new_empty(0)
    grad_edge = query.new_empty(0) if edge is None else torch.empty_like(edge)
    if score == "dot":
        grad_logit.mul_(scale)
        grad_query = _weighted_sum(wide_key, grad_logit, rowptr, col)
        grad_key = _weighted_sum(wide_query, grad_logit.index_select(0, order), rowptr_t, col_t)
        if edge is not None:
            _add_edges(grad_query, edge, grad_logit, rowptr, edge_id)
            for edges, ids in _pieces(row.numel(), query, edge_id):
                piece = wide_query.index_select(0, row[edges]).mul_(grad_logit[edges].unsqueeze(2))
                piece.addcmul_(wide_grad.index_select(0, row[edges]), weight[edges].unsqueeze(2))
                grad_edge[ids] = piece.to(edge.dtype)
    else:
        assert att is not None
        wide_att = att.to(dtype)
        slopes = (grad_edge, wide_att) if edge is not None else None
        grad_query, of_edges = _slope_sum(
            wide_query, wide_key, edge, grad_logit, row, rowptr, col, edge_id, negative_slope, slopes
        )
        row_t = row_of_edge(rowptr_t, col_t)
        grad_key, _ = _slope_sum(
            wide_key, wide_query, edge, grad_logit.index_select(0, order), row_t, rowptr_t, col_t, transposed_id,
            negative_slope, None,
        )  # fmt: skip
        # leaky_relu(t) is its slope times t, and t is a sum over both ends
        grad_att = of_edges + (wide_query * grad_query).sum(0) + (wide_key * grad_key).sum(0)
        grad_att = grad_att.to(att.dtype)
        grad_query.mul_(wide_att)
        grad_key.mul_(wide_att)
    if value is None:
        grad_key.add_(grad_value)
        grad_value = query.new_empty(0)
    narrow = query.dtype
    return grad_query.to(narrow), grad_key.to(narrow), grad_value.to(narrow), grad_att, grad_edge


def _widen(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype).contiguous()


def _logits(
    query: Tensor, key: Tensor, att: Tensor | None, edge: Tensor | None, row: Tensor, rowptr: Tensor, col: Tensor,
    edge_id: Tensor | None, score: str, negative_slope: float,
) -> Tensor:  # fmt: skip
    """[E, heads]."""
    if score == "dot":
        logit = _products(query, key, rowptr, col)
        if edge is not None:
            _add_edge_products(logit, query, edge, row, edge_id)
        return logit.mul_(query.size(2) ** -0.5)
    assert att is not None
    logit = query.new_empty(col.numel(), query.size(1))
    for edges, total in _totals(query, key, edge, row, col, edge_id):
        torch.nn.functional.leaky_relu_(total, negative_slope).mul_(att)
        torch.sum(total, 2, out=logit[edges])
    return logit


def _drop(weight: Tensor, edge_id: Tensor | None, dropout: float, seed: Tensor | None) -> Tensor:
    """What dropout leaves of [E, heads], a new tensor if it drops."""
    if dropout == 0.0 or seed is None:
        return weight
    ids = torch.arange(weight.size(0)) if edge_id is None else edge_id
    return torch.where(keep_mask(ids, weight.size(1), dropout, seed), weight, 0.0).mul_(1.0 / (1.0 - dropout))


def _order(transposed_id: Tensor | None, edge_id: Tensor | None) -> Tensor:
    """Where the edges of the transpose stand in the CSR."""
    assert transposed_id is not None
    if edge_id is None:
        return transposed_id
    place = torch.empty_like(edge_id)
    place[edge_id] = torch.arange(edge_id.numel())
    return place[transposed_id]


# --- over edges -----------------------------------------------------------------------------------------------------


def _products(left: Tensor, right: Tensor, rowptr: Tensor, col: Tensor) -> Tensor:
    """Dot product of the two ends of every edge, [E, heads]."""
    out = left.new_empty(col.numel(), left.size(1))
    if col.numel() > left.size(0) * right.size(0):
        # sampled_addmm keeps no more values than a full matrix has; this many edges are copies of each other
        out.zero_()
        _add_edge_products(out, left, right, row_of_edge(rowptr, col), col)
        return out
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            rowptr, col, out.new_zeros(col.numel()), size=(left.size(0), right.size(0)), check_invariants=False
        )
    for head in range(left.size(1)):
        ends = left[:, head], right[:, head].t()
        out[:, head] = torch.sparse.sampled_addmm(pattern, *ends, beta=0.0).values()
    return out


def _weighted_sum(rows: Tensor, weight: Tensor, rowptr: Tensor, col: Tensor) -> Tensor:
    """Neighbours' rows, each head weighted by its own column of [E, heads], summed: [rows, heads, D]."""
    num_heads, width = rows.shape[1:]
    out = rows.new_zeros(rowptr.numel() - 1, num_heads, width)
    if col.numel() == 0:
        return out
    if rows.size(0) * num_heads > LARGEST_INT32:
        rowptr, col = rowptr.long(), col.long()
    flat = rows.view(-1, width)
    for head in range(num_heads):
        place = col if num_heads == 1 else col * num_heads + head
        by_head = weight[:, head].contiguous()
        out[:, head] = torch.embedding_bag(flat, place, rowptr, False, 0, False, by_head, True)[0]
    return out


def _sum_of_rows(values: Tensor, rowptr: Tensor) -> Tensor:
    """Sums of consecutive rows of a matrix."""
    if values.size(0) == 0:
        return values.new_zeros(rowptr.numel() - 1, values.size(1))
    place = torch.arange(values.size(0), dtype=rowptr.dtype)
    return torch.embedding_bag(values, place, rowptr, False, 0, False, None, True)[0]


# --- over edges and features, in pieces -----------------------------------------------------------------------------


def _pieces(num_edges: int, like: Tensor, edge_id: Tensor | None) -> Iterator[tuple[slice, Tensor | slice]]:
    """(places in the CSR, places in the order of edge features)."""
    step = max(1, PIECE // max(like.size(1) * like.size(2), 1))
    for start in range(0, num_edges, step):
        edges = slice(start, min(start + step, num_edges))
        yield edges, edges if edge_id is None else edge_id[edges]


def _totals(
    left: Tensor, right: Tensor, edge: Tensor | None, row: Tensor, col: Tensor, edge_id: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Both ends of every edge, and its own features, summed; the memory is that of the next piece too."""
    total = other = left.new_empty(0)
    for edges, ids in _pieces(col.numel(), left, edge_id):
        shape = (edges.stop - edges.start, *left.shape[1:])
        if total.shape != shape:
            total, other = left.new_empty(shape), left.new_empty(shape)
        torch.index_select(right, 0, col[edges], out=total)
        total.add_(torch.index_select(left, 0, row[edges], out=other))
        if edge is not None:
            total.add_(edge[ids])
        yield edges, total


def _slope_sum(
    left: Tensor, right: Tensor, edge: Tensor | None, grad_logit: Tensor, row: Tensor, rowptr: Tensor, col: Tensor,
    edge_id: Tensor | None, negative_slope: float, slopes: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum over a row's edges of grad_logit times the slope of leaky_relu, what edge features give to att's gradient).

    `slopes` is (where the gradient of edge features is written, att).
    """
    num_heads, width = left.shape[1:]
    positive = left.new_zeros(left.size(0), num_heads * width)
    of_edges = left.new_zeros(num_heads, width)
    for edges, total in _totals(left, right, edge, row, col, edge_id):
        if slopes is not None and edge is not None:
            ids = edges if edge_id is None else edge_id[edges]
            slope = (total > 0).to(total.dtype).mul_(1.0 - negative_slope).add_(negative_slope)
            slope.mul_(grad_logit[edges].unsqueeze(2))
            of_edges += (slope * edge[ids]).sum(0)
            slopes[0][ids] = slope.mul_(slopes[1]).to(edge.dtype)
        share = total.gt_(0).mul_(grad_logit[edges].unsqueeze(2))
        first, last = int(row[edges.start]), int(row[edges.stop - 1]) + 1
        offset = (rowptr[first : last + 1] - edges.start).clamp_(0, edges.stop - edges.start)
        positive[first:last] += _sum_of_rows(share.view(-1, num_heads * width), offset)
    out = positive.view(-1, num_heads, width).mul_(1.0 - negative_slope)
    return out.add_(_sum_of_rows(grad_logit, rowptr).unsqueeze(2), alpha=negative_slope), of_edges


def _add_edges(out: Tensor, edge: Tensor, weight: Tensor, rowptr: Tensor, edge_id: Tensor | None) -> None:
    """Adds the weighted features of every row's edges."""
    place = torch.arange(edge.size(0), dtype=rowptr.dtype) if edge_id is None else edge_id.to(rowptr.dtype)
    out.add_(_weighted_sum(_widen(edge, out.dtype), weight, rowptr, place))


def _add_edge_products(out: Tensor, left: Tensor, edge: Tensor, row: Tensor, edge_id: Tensor | None) -> None:
    """Adds < left[row of an edge], its features >."""
    for edges, ids in _pieces(row.numel(), left, edge_id):
        out[edges] += torch.index_select(left, 0, row[edges]).mul_(edge[ids]).sum(2)

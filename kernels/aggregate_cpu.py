"""The CPU path of `aggregate`: stock torch, whose `embedding_bag` is a fused gather and sum with software prefetch.

One bag over `inner` and one over `outer` read both tables where they lie, so nothing is concatenated. Rows are copied
only where they must change first: to widen a narrow dtype or to drop features, and then each distinct row once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gas_triton.kernels._library import accumulator_of
from gas_triton.kernels.csr_rows import degree, row_of_edge
from gas_triton.kernels.dropout import keep_mask
from gas_triton.kernels.pull import pull_cpu, widen


def aggregate_cpu(
    x: Tensor, table: Tensor | None, scale: Tensor | None, weight: Tensor | None, inner: list[Tensor],
    outer: list[Tensor], transposed: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor],
    hubs_transposed: list[Tensor], reduce: str, dropout: float, seed: Tensor | None, hub_edges: int, staged: bool,
    residual: Tensor | None = None, residual_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = accumulator_of(x)
    num_rows, num_inner = inner[0].numel() - 1, inner[1].numel()
    winner = torch.empty(0, dtype=torch.int32)
    weight = None if weight is None else weight.to(dtype)
    parts = []
    if num_inner > 0:
        rows, col = _rows(x, None, inner[1], dtype, [])
        parts.append((rows, inner[0], col, None if weight is None else weight[:num_inner]))
    if outer and outer[1].numel() > 0:
        if table is None:
            rows, col = _rows(x, None, outer[1], dtype, outer[2:])
        elif staged:
            rows, col = _staged_rows(table, scale, dtype, outer[3], dropout, seed), outer[2]
        else:
            rows, col = _rows(table, scale, outer[1], dtype, outer[2:], dropout, seed)
        parts.append((rows, outer[0], col, None if weight is None else weight[num_inner:]))
    if reduce in ("max", "min"):
        out, winner = _extremum(parts, num_rows, x.size(1), reduce, dtype)
    elif not parts:
        out = torch.zeros(num_rows, x.size(1), dtype=dtype)
    else:
        out = _bag_sum(*parts[0])
        for part in parts[1:]:
            out.add_(_bag_sum(*part))
        if reduce == "mean":
            out.div_(degree(inner, outer)[:, None])
    if residual is not None:
        out.lerp_(residual.to(dtype), residual_weight)
    elif residual_weight != 0.0:
        out.mul_(1.0 - residual_weight)
    return out.to(x.dtype), winner


def _bag_sum(rows: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None) -> Tensor:
    return torch.embedding_bag(rows, col, rowptr, False, 0, False, weight, True)[0]


def _rows(
    table: Tensor,
    scale: Tensor | None,
    col: Tensor,
    dtype: torch.dtype,
    compact: list[Tensor],
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(rows in the accumulator's dtype, columns into them); copies distinct rows only where they must change."""
    if table.dtype == dtype and dropout == 0.0 and table.stride(-1) == 1:
        return table, col
    if compact:
        slot, ids = compact
    elif table.size(0) <= col.numel() and dropout == 0.0:
        return widen(table, scale, dtype).contiguous(), col
    else:
        ids, slot = torch.unique(col, return_inverse=True)
        slot = slot.to(col.dtype)
    return _drop(pull_cpu(table, scale, ids, dtype), ids, dropout, seed), slot


def _staged_rows(
    table: Tensor, scale: Tensor | None, dtype: torch.dtype, ids: Tensor, dropout: float, seed: Tensor | None
) -> Tensor:
    """Rows that were gathered before, in the accumulator's dtype; themselves where nothing changes."""
    rows = widen(table, scale, dtype).contiguous()
    return _drop(rows.clone() if rows is table and dropout > 0.0 else rows, ids, dropout, seed)


def _drop(rows: Tensor, ids: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    if dropout > 0.0 and seed is not None:
        rows.mul_(keep_mask(ids, rows.size(1), dropout, seed)).mul_(1.0 / (1.0 - dropout))
    return rows


def _extremum(
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]], num_rows: int, num_features: int, reduce: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.zeros(num_rows, num_features, dtype=dtype)
    no_edge = torch.iinfo(torch.int32).max
    winner = torch.full((num_rows, num_features), no_edge, dtype=torch.int32)
    if not parts:
        return out, winner.fill_(-1)
    messages = [rows[col] if weight is None else rows[col] * weight[:, None] for rows, _, col, weight in parts]
    message = torch.cat(messages)
    row = torch.cat([row_of_edge(rowptr, col) for _, rowptr, col, _ in parts])
    index = row[:, None].expand_as(message)
    out.scatter_reduce_(0, index, message, "a" + reduce, include_self=False)
    best = out[row]
    is_best = (message == best) | (best.isnan() & message.isnan())
    edge = torch.arange(row.numel(), dtype=torch.int32)[:, None].expand_as(message)
    winner.scatter_reduce_(0, index, torch.where(is_best, edge, no_edge), "amin", include_self=True)
    return out, winner.masked_fill_(winner == no_edge, -1)


def winners_cpu(
    grad: Tensor, winner: Tensor, weight: Tensor | None, inner_transposed: list[Tensor], edge_id: Tensor,
    hubs: list[Tensor], hub_edges: int,
) -> Tensor:  # fmt: skip
    rowptr, col = inner_transposed
    out = grad.new_zeros(rowptr.numel() - 1, grad.size(1))
    value = grad[col] if weight is None else grad[col] * weight.to(grad.dtype)[:, None]
    value = value.masked_fill_(winner[col] != edge_id[:, None], 0.0)
    return out.index_add_(0, row_of_edge(rowptr, col), value)

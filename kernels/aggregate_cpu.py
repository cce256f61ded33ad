"""The CPU path of `aggregate`: stock torch, whose `embedding_bag` is a fused gather and sum with software prefetch.

One bag over `inner` and one over `outer` read both tables where they lie, so nothing is concatenated. Rows are copied
only where they must change first: to widen a narrow dtype or to drop features, and then each distinct row once.

Extrema gather a block of neighbours at a time and keep the best in the cache: no tensor is of the size of the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    residual: Tensor | None = None, residual_weight: float = 0.0, has_winner: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = accumulator_of(x)
    num_rows, num_inner = inner[0].numel() - 1, inner[1].numel()
    winner = torch.empty(0, dtype=torch.int32)
    weight = None if weight is None else weight.to(dtype)
    parts: list[Part] = []
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
        [(out, winner)] = extrema(parts, num_rows, x.size(1), [reduce], dtype, has_winner)
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


# --- extrema ----------------------------------------------------------------------------------------------------------

# rows that are read, offsets, columns and weights of a block of edges
Part = tuple[Tensor, Tensor, Tensor, Tensor | None]
# edges that are reduced one after another: all but the first have a bit in the mantissa of a float32
RUN_EDGES = 25
# values of a block: half a megabyte
BLOCK_VALUES = 1 << 17
_BEST: dict[str, Callable[..., Tensor]] = {"min": torch.minimum, "max": torch.maximum}
_IS_BETTER: dict[str, Callable[..., Tensor]] = {"min": torch.lt, "max": torch.gt}


def extrema(
    parts: Sequence[Part], num_rows: int, num_features: int, names: list[str], dtype: torch.dtype, has_winner: bool
) -> list[tuple[Tensor, Tensor]]:
    """(values, the first edge that each comes from) of "min" or "max", of a row without edges 0 and -1.

    Edges are counted through the parts. A NaN wins. Without `has_winner` every edge is -1.
    """
    found = _extrema(parts, num_rows, num_features, names, dtype, has_winner, False)
    if not has_winner:
        no_edge = torch.full((num_rows, num_features), -1, dtype=torch.int32)
        return [(value, no_edge) for value, _ in found]
    if any(bool(value.isnan().any()) for value, _ in found):
        return _extrema(parts, num_rows, num_features, names, dtype, True, True)
    return found


def _extrema(
    parts: Sequence[Part], num_rows: int, num_features: int, names: list[str], dtype: torch.dtype, has_winner: bool,
    has_nan: bool,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Cuts the rows of all parts into short runs of edges, reduces these, and then their results in the same way."""
    runs = [_cut(rowptr) for _, rowptr, _, _ in parts]
    # of a row those of the first part come first
    row, order = torch.cat([row for row, _, _ in runs] or [torch.empty(0, dtype=torch.int64)]).sort(stable=True)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel()))
    values = [torch.empty(row.numel(), num_features, dtype=dtype) for _ in names]
    edges = [torch.empty(row.numel() if has_winner else 0, num_features, dtype=torch.int32) for _ in names]
    first_edge = 0
    for part, (_, start, length), own in zip(
        parts, runs, place.split([row.numel() for row, _, _ in runs]), strict=True
    ):
        _reduce_runs(part, start, length, own, first_edge, names, values, edges, has_winner, has_nan)
        first_edge += part[2].numel()
    count = row.bincount(minlength=num_rows)
    found = list(zip(values, edges, strict=True))
    has_empty = row.numel() == 0 or int(count.min()) == 0
    if row.numel() > 0 and int(count.max()) > 1:
        rowptr, col = torch.cat([count.new_zeros(1), count.cumsum(0)]), torch.arange(row.numel())
        for i, (value, edge) in enumerate(found):
            part = (value, rowptr, col, None)
            [(value, run)] = _extrema([part], num_rows, num_features, names[i : i + 1], dtype, has_winner, has_nan)
            if has_winner:
                edge = edge.gather(0, run.long().clamp_(min=0))
            found[i] = value, edge.masked_fill_(run < 0, -1) if has_winner and has_empty else edge
    elif has_empty:
        for i, (value, edge) in enumerate(found):
            whole = value.new_zeros(num_rows, num_features).index_copy_(0, row, value)
            found[i] = whole, edge.new_full(whole.shape, -1).index_copy_(0, row, edge) if has_winner else edge
    return found


def _cut(rowptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, first edge, number of edges) of runs of at most `RUN_EDGES` edges, none empty, ordered by row."""
    start, length = rowptr[:-1].long(), rowptr.diff().long()
    num_runs = (length + RUN_EDGES - 1) // RUN_EDGES
    row = torch.repeat_interleave(num_runs)
    offset = (torch.arange(row.numel()) - (num_runs.cumsum(0) - num_runs)[row]) * RUN_EDGES
    return row, start[row] + offset, (length[row] - offset).clamp_(max=RUN_EDGES)


def _reduce_runs(
    part: Part, start: Tensor, length: Tensor, place: Tensor, first_edge: int, names: list[str], values: list[Tensor],
    edges: list[Tensor], has_winner: bool, has_nan: bool,
) -> None:  # fmt: skip
    """Writes the extrema of runs to their places, for a block of runs edge by edge: buffers stay in the cache."""
    rows, _, col, weight = part
    length, order = length.sort(descending=True)
    start, place, lengths = start[order], place[order], length.tolist()
    num_runs, num_features = len(lengths), rows.size(1)
    size = max(1, min(BLOCK_VALUES // max(num_features, 1), num_runs))
    # a comparison is fast where its result has the dtype of the values
    message, better, *buffers = rows.new_empty(2 + 2 * len(names), size, num_features).unbind()
    best, marks = buffers[: len(names)], buffers[len(names) :]
    for block in range(0, num_runs, size):
        active = min(size, num_runs - block)
        own = slice(block, block + active)
        for step in range(lengths[block]):
            # runs are sorted by length: those that have an edge more come first
            while lengths[block + active - 1] <= step:
                active -= 1
            edge = start[block : block + active] + step
            read = (message if step > 0 else best[0])[:active]
            torch.index_select(rows, 0, col.index_select(0, edge), out=read)
            if weight is not None:
                read.mul_(weight.index_select(0, edge)[:, None])
            if step == 0:
                for other in best[1:]:
                    other[:active].copy_(read)
                for mark in marks if has_winner else []:
                    mark[:active].zero_()
                continue
            for name, so_far, mark in zip(names, best, marks, strict=True):
                if has_winner:
                    _IS_BETTER[name](read, so_far[:active], out=better[:active])
                    if has_nan:
                        better[:active] += read.isnan() & ~so_far[:active].isnan()
                    # the exponent of the sum says which step was the last that was better
                    mark[:active].add_(better[:active], alpha=2.0 ** (step - 1))
                _BEST[name](read, so_far[:active], out=so_far[:active])
        first = (start[own, None] + first_edge).to(torch.int32)
        for value, edge, so_far, mark in zip(values, edges, best, marks, strict=True):
            value.index_copy_(0, place[own], so_far[: first.size(0)])
            if has_winner:
                exponent = (mark[: first.size(0)].float().view(torch.int32) >> 23).sub_(126).clamp_(min=0)
                edge.index_copy_(0, place[own], exponent.add_(first))


# --- gradient ---------------------------------------------------------------------------------------------------------


def winners_cpu(
    grad: Tensor, winner: Tensor, weight: Tensor | None, inner_transposed: list[Tensor], edge_id: Tensor,
    hubs: list[Tensor], hub_edges: int,
) -> Tensor:  # fmt: skip
    rowptr, col = inner_transposed
    out = grad.new_zeros(rowptr.numel() - 1, grad.size(1))
    if col.numel() == 0:
        return out
    # edges that come behind those of the transpose read a history, which takes no gradient
    has_source = (winner >= 0) & (winner < col.numel())
    edge = winner.clamp(0, col.numel() - 1)
    value = torch.where(has_source, grad, 0.0)
    edge_id = edge_id.long()
    if weight is not None:
        value.mul_(torch.empty_like(weight).index_copy_(0, edge_id, weight)[edge].to(grad.dtype))
    source = row_of_edge(rowptr, col)
    add_at_rows(out, torch.empty_like(source).index_copy_(0, edge_id, source)[edge], value)
    return out


def add_at_rows(out: Tensor, row: Tensor, value: Tensor) -> None:
    """Adds every value [R, F] to its feature of a row [R, F] of `out`, in the order of the values."""
    place = row * out.size(1) + torch.arange(out.size(1))
    out.view(-1).scatter_add_(0, place.view(-1), value.view(-1))

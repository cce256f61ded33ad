"""The CPU path of `multi_aggregate`: stock torch, without a tensor of the size of the messages.

Sums are `embedding_bag`s. Squared differences to the mean are made for one piece of the edges after another. For
extrema every value is packed with the number of its row into one 64-bit integer whose order is that of the values: a
maximum of such keys is value and winner at once, and is taken for a block of rows neighbour by neighbour. Buffers stay
in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gas_triton.kernels._library import accumulator_of
from gas_triton.kernels.aggregate_cpu import _bag_sum, _drop
from gas_triton.kernels.csr_rows import degree, row_of_edge
from gas_triton.kernels.pull import pull_cpu, widen

# edges that are reduced one after another, and values of a block: a megabyte of keys
RUN_EDGES = 32
BLOCK_VALUES = 1 << 17
STD_EPS = 1e-5


def multi_aggregate_cpu(
    x: Tensor, table: Tensor | None, scale: Tensor | None, inner: list[Tensor], outer: list[Tensor],
    transposed: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor], hubs_transposed: list[Tensor],
    reduces: list[str], dropout: float, seed: Tensor | None, hub_edges: int, staged: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulator_of(x)
    num_rows, num_features = inner[0].numel() - 1, x.size(1)
    rows, parts = _read(x, table, scale, inner, outer, bool(transposed), dropout, seed, staged, dtype)
    count = degree(inner, outer)[:, None]
    results: dict[str, Tensor] = {}
    winner = torch.empty(0, num_rows, num_features, dtype=torch.int32)
    moments = torch.empty(0, num_rows, num_features, dtype=dtype)

    extrema: list[str] = [name for name in ("min", "max") if name in reduces]
    if extrema:
        found = _extrema(rows, parts, num_rows, extrema)
        results |= {name: value for name, (value, _) in found.items()}
        if transposed:
            winner = torch.stack([row for _, row in found.values()])
            if table is not None:
                # rows of the history come behind those of `x`, and take no gradient
                winner.masked_fill_(winner >= x.size(0), -1)
    if set(reduces) - {"min", "max"}:
        results["sum"] = _sum(rows, parts, num_rows)
        results["mean"] = mean = results["sum"] / count
    if "std" in reduces or "var" in reduces:
        results["var"] = variance = _squared_differences(rows, parts, mean).div_(count)
        if "std" in reduces:
            results["std"] = torch.where(variance <= STD_EPS, 0.0, variance.sqrt())
        if transposed:
            moments = torch.stack([mean, torch.where(variance <= STD_EPS, 0.0, variance.rsqrt())])
    out = torch.empty(num_rows, len(reduces), num_features, dtype=x.dtype)
    for place, name in enumerate(reduces):
        out[:, place] = results[name]
    return out, winner, moments


Part = tuple[Tensor, Tensor]


def _read(
    x: Tensor, table: Tensor | None, scale: Tensor | None, inner: list[Tensor], outer: list[Tensor], has_grad: bool,
    dropout: float, seed: Tensor | None, staged: bool, dtype: torch.dtype,
) -> tuple[Tensor, list[Part]]:  # fmt: skip
    """(all rows in the accumulator's dtype, the blocks with columns into them)."""
    rows, parts = x, [(inner[0], inner[1])]
    if outer and table is None:
        parts.append((outer[0], outer[1]))
    num_edges = sum(col.numel() for _, col in parts)
    if not has_grad and table is None and x.size(0) > num_edges:
        # a few rows of a large table of features
        ids, col = torch.unique(torch.cat([col for _, col in parts]), return_inverse=True)
        rows = x.index_select(0, ids)
        columns = col.to(inner[1].dtype).split([col.numel() for _, col in parts])
        parts = [(rowptr, col) for (rowptr, _), col in zip(parts, columns, strict=True)]
    rows = rows.to(dtype).contiguous()
    if outer and table is not None:
        halo = widen(table, scale, dtype) if staged else pull_cpu(table, scale, outer[3], dtype)
        rows = torch.cat([rows, halo])
        _drop(rows[x.size(0) :], outer[3], dropout, seed)
        parts.append((outer[0], outer[2] + x.size(0)))
    return rows, [(rowptr, col) for rowptr, col in parts if col.numel() > 0]


def _sum(rows: Tensor, parts: list[Part], num_rows: int) -> Tensor:
    out = rows.new_zeros(num_rows, rows.size(1))
    for rowptr, col in parts:
        out.add_(_bag_sum(rows, rowptr, col, None))
    return out


def _squared_differences(rows: Tensor, parts: list[Part], mean: Tensor) -> Tensor:
    """The sum of `(rows[col[e]] - mean[i])^2` over the edges of each row, for a piece of the edges after another."""
    out = torch.zeros_like(mean)
    size = max(1, BLOCK_VALUES // max(mean.size(1), 1))
    message, of_row = rows.new_empty(size, mean.size(1)), rows.new_empty(size, mean.size(1))
    for rowptr, col in parts:
        row = row_of_edge(rowptr, col)
        place = torch.arange(size, dtype=col.dtype)
        for start in range(0, col.numel(), size):
            edges = slice(start, min(start + size, col.numel()))
            num_edges = edges.stop - start
            first, last = int(row[start]), int(row[edges.stop - 1])
            torch.index_select(rows, 0, col[edges], out=message[:num_edges])
            torch.index_select(mean, 0, row[edges], out=of_row[:num_edges])
            message[:num_edges].sub_(of_row[:num_edges]).square_()
            offset = rowptr[first : last + 2].clamp(start, edges.stop) - start
            out[first : last + 1] += _bag_sum(message, offset, place[:num_edges], None)
    return out


# --- extrema ----------------------------------------------------------------------------------------------------------

_BETTER: dict[str, Callable[..., Tensor]] = {"min": torch.minimum, "max": torch.maximum}
_WORST = {"min": torch.iinfo(torch.int64).max, "max": torch.iinfo(torch.int64).min}


def _extrema(rows: Tensor, parts: list[Part], num_rows: int, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """(values, and the rows that they come from or -1) of each extremum."""
    if not parts:
        shape = num_rows, rows.size(1)
        return {name: (rows.new_zeros(shape), torch.full(shape, -1, dtype=torch.int32)) for name in names}
    is_nan = rows.isnan()
    has_nan = bool(is_nan.any())
    found = {}
    # a NaN wins: keys of a maximum are then not those of a minimum
    for group in [[name] for name in names] if has_nan else [names]:
        keys, value_of = _pack(rows, is_nan if has_nan else None, group[0])
        best = {name: torch.full((num_rows, rows.size(1)), _WORST[name]) for name in group}
        for rowptr, col in parts:
            length = rowptr.diff().long()
            taken = length.nonzero().squeeze(1)
            for name, part in zip(group, _best(keys, rowptr[taken].long(), length[taken], col, group), strict=True):
                best[name].index_copy_(0, taken, _BETTER[name](best[name].index_select(0, taken), part))
        for name in group:
            is_empty = best[name] == _WORST[name]
            row = (best[name] & 0xFFFFFFFF).to(torch.int32).masked_fill_(is_empty, -1)
            found[name] = value_of(best[name].masked_fill_(is_empty, 0)).masked_fill_(is_empty, 0.0), row
    return found


def _pack(rows: Tensor, is_nan: Tensor | None, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(int64 keys of every value: its order above, its row in the lower 32 bits; what gives the values back)."""
    row = torch.arange(rows.size(0))[:, None]
    if rows.dtype == torch.float64:
        values, order = rows.sort(dim=0, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, row.expand_as(order))
        if is_nan is not None and name == "min":
            # NaNs are sorted last
            rank.sub_(is_nan * rows.size(0))
        return (rank << 32) | row, lambda keys: values.gather(0, (keys >> 32).remainder_(rows.size(0)))
    ordered = _flip_negative(rows.view(torch.int32))
    if is_nan is not None:
        limits = torch.iinfo(torch.int32)
        ordered.masked_fill_(is_nan, limits.min if name == "min" else limits.max)
    keys = ordered.long().bitwise_left_shift_(32).bitwise_or_(row)
    return keys, lambda keys: _flip_negative((keys >> 32).to(torch.int32)).view(torch.float32)


def _flip_negative(bits: Tensor) -> Tensor:
    """Between the bits of floats and integers of the same order; its own inverse."""
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _best(keys: Tensor, start: Tensor, length: Tensor, col: Tensor, names: list[str]) -> list[Tensor]:
    """The extremum of `keys[col[start:start+length]]` for every run, none empty, [runs, F] of each name."""
    num_pieces = (length + RUN_EDGES - 1) // RUN_EDGES
    last = num_pieces.cumsum(0)
    if last.numel() == 0 or int(last[-1]) == last.numel():
        return _best_of_short(keys, start, length, col, names)
    run = torch.repeat_interleave(num_pieces)
    first = last - num_pieces
    offset = (torch.arange(run.numel()) - first[run]) * RUN_EDGES
    piece_length = (length[run] - offset).clamp_(max=RUN_EDGES)
    pieces = _best_of_short(keys, start[run] + offset, piece_length, col, names)
    place = torch.arange(run.numel())
    return [_best(best, first, num_pieces, place, [name])[0] for name, best in zip(names, pieces, strict=True)]


def _best_of_short(keys: Tensor, start: Tensor, length: Tensor, col: Tensor, names: list[str]) -> list[Tensor]:
    length, order = length.sort(descending=True)
    start, lengths = start[order], length.tolist()
    num_runs, num_features = len(lengths), keys.size(1)
    size = max(1, min(BLOCK_VALUES // max(num_features, 1), num_runs))
    out = [keys.new_empty(num_runs, num_features) for _ in names]
    message, *best = [keys.new_empty(size, num_features) for _ in range(len(names) + 1)]
    for block in range(0, num_runs, size):
        active = min(size, num_runs - block)
        places = slice(block, block + active)
        for step in range(lengths[block]):
            # runs are sorted by length: those that have an edge more come first
            while lengths[block + active - 1] <= step:
                active -= 1
            place = col.index_select(0, start[block : block + active] + step)
            torch.index_select(keys, 0, place, out=message[:active])
            for name, own in zip(names, best, strict=True):
                if step == 0:
                    own[:active].copy_(message[:active])
                else:
                    _BETTER[name](own[:active], message[:active], out=own[:active])
        for whole, own in zip(out, best, strict=True):
            whole.index_copy_(0, order[places], own[: places.stop - places.start])
    return out


# --- gradient ---------------------------------------------------------------------------------------------------------


def multi_aggregate_grad_cpu(
    grad: Tensor, x: Tensor, coefficient: Tensor, winner: Tensor, reduces: list[str], transposed: list[Tensor],
    edge_id: Tensor | None, hubs: list[Tensor], hub_edges: int,
) -> Tensor:  # fmt: skip
    dtype = accumulator_of(x)
    rowptr, col = transposed
    num_features = x.size(1)
    out = torch.zeros(rowptr.numel() - 1, num_features, dtype=dtype)
    if coefficient.numel() > 0 and col.numel() > 0:
        for place, plane in enumerate(coefficient):
            part = _bag_sum(plane, rowptr, col, None)
            out.add_(part if place == 0 else part.mul_(x))
    extrema = [name for name in ("min", "max") if name in reduces]
    for name, row in zip(extrema, winner, strict=True):
        part = grad[:, reduces.index(name)].to(dtype).masked_fill(row < 0, 0.0)
        place = row.long().clamp_(min=0).mul_(num_features).add_(torch.arange(num_features))
        if out.numel() > 0:
            out.view(-1).scatter_add_(0, place.view(-1), part.view(-1))
    return out.to(x.dtype)

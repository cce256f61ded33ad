"""The CPU path of `multi_aggregate`: stock torch, without a tensor of the size of the messages.

Sums are `embedding_bag`s, extrema those of `aggregate`. Squared differences to the mean are made for one piece of the
edges after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gas_triton.kernels._library import accumulator_of
from gas_triton.kernels.aggregate_cpu import BLOCK_VALUES, _bag_sum, _drop, add_at_rows, extrema
from gas_triton.kernels.csr_rows import degree, row_of_edge
from gas_triton.kernels.pull import pull_cpu, widen

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

    names: list[str] = [name for name in ("min", "max") if name in reduces]
    if names:
        blocks = [(rows, rowptr, col, None) for rowptr, col in parts]
        found = extrema(blocks, num_rows, num_features, names, dtype, bool(transposed))
        results |= {name: value for name, (value, _) in zip(names, found, strict=True)}
        if transposed:
            # the columns of the edges, and -1 of no edge
            source = torch.cat([inner[1].new_full((1,), -1), *(col for _, col in parts)])
            edges = torch.stack([edge for _, edge in found])
            if table is not None:
                # rows of the history come behind those of `x`, and take no gradient
                source.masked_fill_(source >= x.size(0), -1)
            winner = source.index_select(0, edges.add_(1).view(-1)).view_as(edges)
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
        if out.numel() > 0:
            add_at_rows(out, row.long().clamp_(min=0), part)
    return out.to(x.dtype)

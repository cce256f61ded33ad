"""The CPU path of `attention`: stock torch, block by block of rows whose edges stay in the cache.

Of a block there are only values of [its edges, heads]; the weighted sum of every head is an `embedding_bag` over a
table of that head. Two of those bags (all edges, edges with a positive logit) are several times faster than the
[E, heads, D] products that they replace.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gas_triton.kernels._library import accumulator_of
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.dropout import keep_mask

CPU_EDGES = 1 << 15


class _Block(NamedTuple):
    """Rows `rows` of a CSR and their edges `edges`; `offsets` is their own row pointer, `place` 0 .. edges - 1."""

    rows: slice
    edges: slice
    degree: Tensor
    offsets: Tensor
    col: Tensor
    place: Tensor


def _blocks(rowptr: Tensor, col: Tensor) -> Iterator[_Block]:
    """Blocks of about CPU_EDGES edges; a longer row is a block of its own."""
    num_rows = rowptr.numel() - 1
    wanted = torch.arange(0, max(col.numel(), 1), CPU_EDGES, dtype=rowptr.dtype)
    cuts = torch.searchsorted(rowptr, wanted, right=True).sub_(1).unique().tolist()
    bounds = [0, *(cut for cut in cuts if 0 < cut < num_rows), num_rows]
    for first, last in pairwise(bounds):
        offsets = rowptr[first : last + 1]
        start, end = int(offsets[0]), int(offsets[-1])
        if start == end:
            continue
        edges = slice(start, end)
        place = torch.arange(end - start, dtype=col.dtype)
        yield _Block(
            slice(first, last), edges, offsets.diff(), (offsets - start).to(col.dtype), col[edges].contiguous(), place
        )


def _spread(rows: Tensor, block: _Block) -> Tensor:
    """The value of its row for every edge of the block."""
    return torch.repeat_interleave(rows, block.degree, 0, output_size=block.col.numel())


def _sum(values: Tensor, block: _Block) -> Tensor:
    """Values [edges, heads] summed over each row."""
    return torch.embedding_bag(values, block.place, block.offsets, False, 0, False, None, True)[0]


def _weighted_sum(tables: Tensor, weight: Tensor, block: _Block, out: Tensor) -> None:
    """out[rows, h] = sum over the edges of weight[e, h] tables[h, col[e]]."""
    for head, own in enumerate(weight.t().contiguous()):
        bags = torch.embedding_bag(tables[head], block.col, block.offsets, False, 0, False, own, True)[0]
        out[block.rows, head] = bags


def _tables(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A table for each head, [heads, R, D]: of a strided one, `embedding_bag` would make a copy for every block."""
    # of one that requires grad, it would prepare a backward of its own
    return x.detach().to(dtype).transpose(0, 1).contiguous()


def attention_cpu(
    x: Tensor, source: Tensor, target: Tensor, edge_logit: Tensor | None, joint: list[Tensor],
    transposed: list[Tensor], hubs: list[Tensor], hubs_transposed: list[Tensor], negative_slope: float, dropout: float,
    seed: Tensor | None, hub_edges: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulator_of(x)
    num_rows, heads, save = joint[0].numel() - 1, x.size(1), len(transposed) > 0
    saved = num_rows if save else 0
    out = torch.zeros(num_rows, *x.shape[1:], dtype=dtype)
    lse, positive_weight = (torch.zeros(saved, heads, dtype=dtype) for _ in range(2))
    positive = torch.zeros(saved, *x.shape[1:], dtype=dtype)
    tables, source, target = _tables(x, dtype), source.to(dtype), target.to(dtype)
    for block in _blocks(joint[0], joint[1]) if out.numel() else ():
        rows = block.rows
        edge_id = joint[2][block.edges] if len(joint) > 2 else None
        logit = source.index_select(0, block.col).add_(_spread(target[rows], block))
        if edge_logit is not None:
            logit.add_(edge_logit[block.edges] if edge_id is None else edge_logit.index_select(0, edge_id))
        is_positive = logit > 0 if save else None
        logit = torch.nn.functional.leaky_relu_(logit, negative_slope)
        best = torch.segment_reduce(logit, "max", offsets=block.offsets.long(), axis=0, unsafe=True)
        # a row whose logits are all -inf, or that has none, attends to nothing
        best.masked_fill_(best == float("-inf"), 0.0)
        weight = logit.sub_(_spread(best, block)).exp_()
        total = _sum(weight, block)
        total.masked_fill_(total == 0.0, 1.0)
        if is_positive is not None:
            lse[rows] = best.add_(total.log())
            positive_weight[rows] = _sum(weight * is_positive, block).div_(total)
        scale = total.reciprocal_()[:, :, None]
        if dropout > 0.0 and seed is not None:
            ids = torch.arange(block.edges.start, block.edges.stop) if edge_id is None else edge_id
            weight.mul_(keep_mask(ids, heads, dropout, seed))
            scale.mul_(1.0 / (1.0 - dropout))
        _weighted_sum(tables, weight, block, out)
        out[rows] *= scale
        if is_positive is not None:
            _weighted_sum(tables, weight.mul_(is_positive), block, positive)
            positive[rows] *= scale
    return out.to(x.dtype), lse, positive.to(x.dtype), positive_weight


def attention_backward_cpu(
    grad: Tensor, x: Tensor, source: Tensor, target: Tensor, edge_logit: Tensor | None, lse: Tensor, delta: Tensor,
    transposed: list[Tensor], hubs_transposed: list[Tensor], negative_slope: float, dropout: float,
    seed: Tensor | None, hub_edges: int, edge_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, (num_rows, heads, _) = lse.dtype, x.shape
    rowptr, col, all_ids = transposed
    grad_x = torch.zeros(x.shape, dtype=dtype)
    grad_source = torch.zeros(num_rows, heads, dtype=dtype)
    grad_edge = torch.zeros((col.numel(), heads) if edge_grad else (0,), dtype=dtype)
    grad, x, source, target = grad.to(dtype), x.to(dtype), source.to(dtype), target.to(dtype)
    tables = _tables(grad, dtype)
    for block in _blocks(rowptr, col) if x.numel() else ():
        rows, edge_id = block.rows, all_ids[block.edges]
        logit = target.index_select(0, block.col).add_(_spread(source[rows], block))
        if edge_logit is not None:
            logit.add_(edge_logit.index_select(0, edge_id))
        is_positive = logit > 0
        logit = torch.nn.functional.leaky_relu_(logit, negative_slope)
        weight = logit.sub_(lse.index_select(0, block.col)).exp_()
        share = weight * delta.index_select(0, block.col)
        if dropout > 0.0 and seed is not None:
            weight.mul_(keep_mask(edge_id, heads, dropout, seed)).mul_(1.0 / (1.0 - dropout))
        _weighted_sum(tables, weight, block, grad_x)
        if edge_grad:
            own = weight.mul_(_dot(grad, x[rows], block)).sub_(share)
            # of two Python numbers, `torch.where` would make float32
            own = torch.where(is_positive, own, own * negative_slope)
            grad_edge[edge_id.long()] = own
            grad_source[rows] = _sum(own, block)
            continue
        positive = torch.empty_like(grad_x[rows])
        _weighted_sum(tables, weight.mul_(is_positive), block._replace(rows=slice(None)), positive)
        steep = torch.linalg.vecdot(positive, x[rows]).sub_(_sum(share * is_positive, block))
        whole = torch.linalg.vecdot(grad_x[rows], x[rows]).sub_(_sum(share, block))
        grad_source[rows] = whole.mul_(negative_slope).add_(steep, alpha=1.0 - negative_slope)
    return grad_x.to(x.dtype), grad_source, grad_edge


def _dot(grad: Tensor, rows: Tensor, block: _Block) -> Tensor:
    """< grad[col[e], h], rows[row of e, h] > for every edge of the block, in pieces: a hub is one block."""
    row = row_of_edge(block.offsets, block.col)
    out = grad.new_empty(block.col.numel(), grad.size(1))
    for start in range(0, out.size(0), CPU_EDGES):
        piece = slice(start, start + CPU_EDGES)
        out[piece] = torch.linalg.vecdot(grad.index_select(0, block.col[piece]), rows.index_select(0, row[piece]))
    return out

"""Neighbourhood aggregation that reads in-batch rows and history rows in one pass.

    h[i] = reduce( w[e] * x[inner_col[e]]               for e in row i of `inner`,
                   w[e] * dropout(table[outer_col[e]])  for e in row i of `outer` )
    out[i] = (1 - residual_weight) * h[i] + residual_weight * residual[i]

with reduce one of sum, mean, max, min, accumulated in float32 (float64 for float64 rows). The h of a row without edges
is 0. The gradient of a sum with respect to `x` is the same sum over the transposed columns of `x`, multiplied by the
same 1 - residual_weight; no gradient flows into `table`. Nothing here uses atomics: same input, same bits.

Without a `residual` its rows are 0. Only sum and mean have one.

Without a `table` the outer columns read `x` too. With one, `outer` is [rowptr, col, slot, halo_ids]: `col` has graph
ids, `slot` the places of the same edges in `halo_ids`. A table [N, F] is read at `col`; a `staged` one, [H, F] in the
order of `halo_ids`, at `slot`. Dropout hashes graph ids either way. The values of an int8 table are multiplied by the
`scale` of their row, in float32 and before anything else.

Edge weights are ordered inner edges first, outer edges second. Rows of more than `hub_edges` edges are cut into chunks
whose partial results a second kernel combines in a fixed order.

The second output has the first edge that each extremum comes from, -1 where there is none. It is for the gradient, and
is not to be read without `has_winner`: a CPU is then faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gas_triton.kernels._library import define
from gas_triton.kernels.aggregate_cpu import aggregate_cpu, winners_cpu
from gas_triton.kernels.aggregate_triton import aggregate_triton, empty_output, winners_triton
from gas_triton.kernels.csr_rows import degree, row_of_edge
from gas_triton.kernels.dropout import keep_mask
from gas_triton.kernels.edge_dot import edge_dot
from gas_triton.kernels.pull import widen

REDUCTIONS = ("sum", "mean", "max", "min")
HUB_EDGES = 512


def aggregate_ref(
    x: Tensor,
    table: Tensor | None,
    weight: Tensor | None,
    inner: list[Tensor],
    outer: list[Tensor],
    reduce: str = "sum",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
    staged: bool = False,
    residual: Tensor | None = None,
    residual_weight: float = 0.0,
) -> Tensor:
    """The meaning in plain torch, differentiable by autograd, in the dtype of `x`: what tests compare with."""
    messages, rows = [x[inner[1].long()]], [row_of_edge(inner[0], inner[1])]
    if outer:
        source = x if table is None else widen(table, scale, x.dtype)
        halo = source[outer[2 if staged else 1].long()]
        if table is not None and dropout > 0.0 and seed is not None:
            halo = halo * keep_mask(outer[1], x.size(1), dropout, seed) / (1.0 - dropout)
        messages.append(halo)
        rows.append(row_of_edge(outer[0], outer[1]))
    message, row = torch.cat(messages), torch.cat(rows)
    if weight is not None:
        message = message * weight.to(x.dtype)[:, None]
    name = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}[reduce]
    index = row[:, None].expand_as(message)
    out = x.new_zeros(inner[0].numel() - 1, x.size(1))
    out = out.scatter_reduce(0, index, message, name, include_self=False) * (1.0 - residual_weight)
    return out if residual is None else out + residual_weight * residual.to(x.dtype)


# --- registration and gradient --------------------------------------------------------------------------------------


def aggregate_fake(
    x: Tensor, table: Tensor | None, scale: Tensor | None, weight: Tensor | None, inner: list[Tensor],
    outer: list[Tensor], transposed: list[Tensor], edge_id: Tensor | None, hubs: list[Tensor],
    hubs_transposed: list[Tensor], reduce: str, dropout: float, seed: Tensor | None, hub_edges: int, staged: bool,
    residual: Tensor | None = None, residual_weight: float = 0.0, has_winner: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_output(x, inner[0].numel() - 1, reduce)


def _winners_fake(grad, winner, weight, inner_transposed, edge_id, hubs, hub_edges):
    return grad.new_empty(inner_transposed[0].numel() - 1, grad.size(1))


winners = define(
    "aggregate_winners(Tensor grad, Tensor winner, Tensor? weight, Tensor[] inner_transposed, Tensor edge_id, "
    "Tensor[] hubs, int hub_edges) -> Tensor",
    cpu=winners_cpu,
    cuda=winners_triton,
    fake=_winners_fake,
)


def _setup_context(ctx, inputs, output):
    x, table, scale, weight, inner, outer, transposed, edge_id, hubs, hubs_transposed = inputs[:10]
    needs_rows = weight is not None and weight.requires_grad
    winner = output[1]
    ctx.mark_non_differentiable(winner)
    rows = (x, table, scale) if needs_rows else (None, None, None)
    ctx.reduce, ctx.dropout, seed, ctx.hub_edges, ctx.staged = inputs[10:15]
    # the dispatcher leaves out the last arguments where they have their default values
    residual = inputs[15] if len(inputs) > 15 else None
    ctx.residual_weight = inputs[16] if len(inputs) > 16 else 0.0
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(*rows, weight, seed, winner)
    ctx.edge_id = edge_id
    ctx.inner, ctx.outer, ctx.transposed, ctx.hubs_transposed = inner, outer, transposed, hubs_transposed
    ctx.num_hub_tensors = len(hubs)


def _backward(ctx, grad, _):
    x, table, scale, weight, seed, winner = ctx.saved_tensors
    grad_x = grad_weight = grad_residual = None
    is_extremum = ctx.reduce in ("max", "min")
    if ctx.residual_dtype is not None and ctx.needs_input_grad[15]:
        grad_residual = (grad * ctx.residual_weight).to(ctx.residual_dtype)
    if ctx.reduce == "mean":
        grad = grad / degree(ctx.inner, ctx.outer)[:, None]
    if ctx.needs_input_grad[0]:
        edge_id, weight_t = ctx.edge_id, weight
        if weight is not None:
            num_edges = ctx.transposed[1].numel()
            weight_t = weight[:num_edges] if edge_id is None else weight.index_select(0, edge_id)
        if is_extremum:
            grad_x = winners(grad, winner, weight_t, ctx.transposed, edge_id, ctx.hubs_transposed, ctx.hub_edges)
        else:
            grad_x = aggregate(
                grad, None, None, weight_t, ctx.transposed, [], [], None, ctx.hubs_transposed, [], "sum", 0.0, None,
                ctx.hub_edges, False, None, ctx.residual_weight,
            )[0]  # fmt: skip
    if ctx.needs_input_grad[3]:
        winner = winner if is_extremum else None
        num_inner = ctx.inner[1].numel()
        parts = [edge_dot(grad, x, None, *ctx.inner, None, winner, 0, 0.0, None)]
        if ctx.outer:
            source, dropout = (x, 0.0) if table is None else (table, ctx.dropout)
            col, node = (ctx.outer[2], ctx.outer[1]) if ctx.staged else (ctx.outer[1], None)
            parts.append(edge_dot(grad, source, scale, ctx.outer[0], col, node, winner, num_inner, dropout, seed))
        grad_weight = torch.cat(parts)
        if ctx.residual_weight != 0.0:
            grad_weight.mul_(1.0 - ctx.residual_weight)
        grad_weight = grad_weight.to(weight.dtype)
    lists = (ctx.inner, ctx.outer, ctx.transposed)
    inner, outer, transposed, hubs, hubs_transposed = (
        [None] * length for length in (*map(len, lists), ctx.num_hub_tensors, len(ctx.hubs_transposed))
    )
    grads = (
        grad_x, None, None, grad_weight, inner, outer, transposed, None, hubs, hubs_transposed, *[None] * 5,
        grad_residual, None, None,
    )  # fmt: skip
    return grads[: len(ctx.needs_input_grad)]


aggregate = define(
    "aggregate(Tensor x, Tensor? table, Tensor? scale, Tensor? weight, Tensor[] inner, Tensor[] outer, "
    "Tensor[] transposed, Tensor? edge_id, Tensor[] hubs, Tensor[] hubs_transposed, str reduce, float dropout, "
    "Tensor? seed, int hub_edges, bool staged, Tensor? residual=None, float residual_weight=0.0, "
    "bool has_winner=True) -> (Tensor, Tensor)",
    cpu=aggregate_cpu,
    cuda=aggregate_triton,
    fake=aggregate_fake,
    setup_context=_setup_context,
    backward=_backward,
)

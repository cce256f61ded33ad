"""Attention over neighbours with additive logits, softmax and weighted sum in one kernel.

    t_ijh = source[j, h] + target[i, h] (+ edge[e, h])        for every edge e = (j -> i)
    p_ijh = softmax over the edges of row i of leaky_relu(t_ijh)
    out[i, h] = sum_j  dropout(p_ijh) x[j, h]

accumulated in float32 (float64 for float64 rows). A row without edges is 0. Dropout hashes the edge's place in the
batch's edge order and the head. Edges are one CSR `joint` = [rowptr, col] or [rowptr, col, edge_id]; without `edge_id`
edge k is edge k of the batch. The gradient takes its transpose, always with `edge_id`.

The forward sweeps over a row twice, once over its logits and once over its neighbours; no tensor has a value an edge.
It keeps for the backward, with t > 0 picking the edges on which leaky_relu has slope 1 (elsewhere s):

    lse[i, h] = log sum_j exp(leaky_relu(t_ijh))
    positive[i, h] = sum_{t > 0} dropout(p) x[j, h],        positive_weight[i, h] = sum_{t > 0} p

so that with D_i = <g_i, out_i> the gradient of the softmax needs no second look at the neighbours of i:

    d target[i] = (1 - s) (<g_i, positive_i> - D_i positive_weight_i)

The rest is one pass over the transposed edges, which gathers g_i:

    d x[j] = sum_i dropout(p) g_i,        d source[j] = sum_i leaky'(t) (dropout(p) <g_i, x_j> - p D_i) = sum of d edge

That is linear in g_i, so <., x_j> is taken once a row, unless the gradient of every edge is wanted. Nothing here uses
atomics: same input, same bits. Rows of more than `hub_edges` edges are cut into chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gas_triton.kernels._library import define
from gas_triton.kernels.attention_cpu import attention_backward_cpu, attention_cpu
from gas_triton.kernels.attention_triton import (
    attention_backward_triton,
    attention_triton,
    empty_gradients,
    empty_outputs,
)
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.dropout import keep_mask


def attention_ref(
    x: Tensor,
    source: Tensor,
    target: Tensor,
    edge_logit: Tensor | None,
    joint: list[Tensor],
    negative_slope: float = 0.2,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The meaning in plain torch, differentiable by autograd, in the dtype of `x`: what tests compare with."""
    rowptr, col = joint[0], joint[1].long()
    row = row_of_edge(rowptr, col)
    edge_id = joint[2].long() if len(joint) > 2 else torch.arange(col.numel(), device=col.device)
    logit = source[col] + target[row]
    if edge_logit is not None:
        logit = logit + edge_logit[edge_id]
    logit = torch.nn.functional.leaky_relu(logit, negative_slope)
    best = torch.full_like(target, float("-inf"))
    best = best.scatter_reduce(0, row[:, None].expand_as(logit), logit.detach(), "amax")
    weight = (logit - best[row]).exp()
    weight = weight / torch.zeros_like(target).index_add(0, row, weight)[row]
    if dropout > 0.0 and seed is not None:
        weight = weight * keep_mask(edge_id, weight.size(1), dropout, seed) / (1.0 - dropout)
    out = x.new_zeros(rowptr.numel() - 1, *x.shape[1:])
    return out.index_add(0, row, weight[:, :, None] * x[col])


# --- registration and gradient --------------------------------------------------------------------------------------


def _attention_fake(
    x, source, target, edge_logit, joint, transposed, hubs, hubs_transposed, negative_slope, dropout, seed, hub_edges
):  # fmt: skip
    return empty_outputs(x, joint[0].numel() - 1, len(transposed) > 0)


attention_backward = define(
    "attention_backward(Tensor grad, Tensor x, Tensor source, Tensor target, Tensor? edge_logit, Tensor lse, "
    "Tensor delta, Tensor[] transposed, Tensor[] hubs_transposed, float negative_slope, float dropout, Tensor? seed, "
    "int hub_edges, bool edge_grad) -> (Tensor, Tensor, Tensor)",
    cpu=attention_backward_cpu,
    cuda=attention_backward_triton,
    fake=empty_gradients,
)


def _setup_context(ctx, inputs, output):
    x, source, target, edge_logit, joint, transposed, hubs, hubs_transposed = inputs[:8]
    ctx.negative_slope, ctx.dropout, seed, ctx.hub_edges = inputs[8:]
    out, lse, positive, positive_weight = output
    ctx.mark_non_differentiable(lse, positive, positive_weight)
    ctx.save_for_backward(x, source, target, edge_logit, seed, out, lse, positive, positive_weight)
    ctx.transposed, ctx.hubs_transposed = transposed, hubs_transposed
    ctx.lengths = [len(part) for part in (joint, transposed, hubs, hubs_transposed)]


def _backward(ctx, grad, *_):
    x, source, target, edge_logit, seed, out, lse, positive, positive_weight = ctx.saved_tensors
    wide = grad.to(lse.dtype)
    delta = torch.linalg.vecdot(wide, out.to(lse.dtype))
    grads = [None] * 4
    if ctx.needs_input_grad[2]:
        share = torch.linalg.vecdot(wide, positive.to(lse.dtype)) - delta * positive_weight
        grads[2] = share.mul_(1.0 - ctx.negative_slope).to(target.dtype)
    needs_edge = ctx.needs_input_grad[3]
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] or needs_edge:
        grads[0], grad_source, grad_edge = attention_backward(
            grad, x, source, target, edge_logit, lse, delta, ctx.transposed, ctx.hubs_transposed, ctx.negative_slope,
            ctx.dropout, seed, ctx.hub_edges, needs_edge,
        )  # fmt: skip
        grads[1] = grad_source.to(source.dtype)
        grads[3] = grad_edge.to(edge_logit.dtype) if needs_edge else None
    return *grads, *([None] * length for length in ctx.lengths), None, None, None, None


attention = define(
    "attention(Tensor x, Tensor source, Tensor target, Tensor? edge_logit, Tensor[] joint, Tensor[] transposed, "
    "Tensor[] hubs, Tensor[] hubs_transposed, float negative_slope, float dropout, Tensor? seed, int hub_edges) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=attention_cpu,
    cuda=attention_triton,
    fake=_attention_fake,
    setup_context=_setup_context,
    backward=_backward,
)

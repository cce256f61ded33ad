"""Attention whose logit depends on the features of both ends of an edge.

    logit[e,h] = < query[i,h], key[j,h] + edge[e,h] > / sqrt(D)                          score "dot", e from j to i
    logit[e,h] = < att[h], leaky_relu(query[i,h] + key[j,h] + edge[e,h]) >               score "gatv2"
    out[i,h]   = sum_e dropout(softmax over row i of logit)[e,h] * value[j,h]            value + edge with "dot"

A row without edges is 0. The softmax runs along with the sum (online softmax, Milakov and Gimelshein, 2018), so nothing
of edges x heads is stored: the backward makes it again from lse[i,h], the logarithm of the sum of exponentials. With
w = softmax, u = dropout(1), t = <grad[i], value[j]> and delta[i] = <grad[i], out[i]>,

    d logit = w * (u * t - delta[i])          d value[j] = sum w * u * grad[i]

one pass over the rows gives d query, one over the transpose d key and d value. Accumulated in float32 (float64 for
float64 rows), without atomics: same input, same bits.

`csr` is one matrix [B x rows of key]; `edge_id` is the place of its edges in the batch's edge order, which names the
rows of `edge` and the dropout mask, a hash of (seed, edge, head). Rows of more than `hub_edges` edges are cut into
chunks whose partial results a second kernel merges in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gas_triton.kernels._library import accumulator_of, define
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.dropout import keep_mask
from gas_triton.kernels.dynamic_attention_cpu import dynamic_attention_backward_cpu, dynamic_attention_cpu
from gas_triton.kernels.dynamic_attention_triton import dynamic_attention_backward_triton, dynamic_attention_triton

SCORES = ("dot", "gatv2")


def dynamic_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    att: Tensor | None,
    edge: Tensor | None,
    csr: list[Tensor],
    edge_id: Tensor | None = None,
    score: str = "dot",
    negative_slope: float = 0.2,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The meaning in plain torch, differentiable by autograd, in the dtype of `query`: what tests compare with."""
    row, col = row_of_edge(*csr), csr[1].long()
    ids = torch.arange(col.numel()) if edge_id is None else edge_id.long()
    left, right, carried = query[row], key[col], (key if value is None else value)[col]
    if edge is not None:
        right = right + edge[ids]
        carried = carried + edge[ids] if score == "dot" else carried
    if score == "dot":
        logit = (left * right).sum(2) / query.size(2) ** 0.5
    else:
        assert att is not None
        logit = (torch.nn.functional.leaky_relu(left + right, negative_slope) * att).sum(2)
    index = row[:, None].expand_as(logit)
    highest = logit.new_zeros(query.shape[:2]).scatter_reduce(0, index, logit.detach(), "amax", include_self=False)
    weight = (logit - highest[row]).exp()
    weight = weight / torch.zeros_like(highest).index_add(0, row, weight)[row]
    if dropout > 0.0 and seed is not None:
        weight = weight * keep_mask(ids, query.size(1), dropout, seed) / (1.0 - dropout)
    return torch.zeros_like(query).index_add(0, row, carried * weight[:, :, None])


# --- registration and gradient --------------------------------------------------------------------------------------


def _fake(
    query: Tensor, key: Tensor, value: Tensor | None, att: Tensor | None, edge: Tensor | None, csr: list[Tensor],
    edge_id: Tensor | None, hubs: list[Tensor], transposed: list[Tensor], transposed_id: Tensor | None,
    hubs_transposed: list[Tensor], score: str, negative_slope: float, dropout: float, seed: Tensor | None,
    hub_edges: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(query.shape[:2], dtype=accumulator_of(query), device=query.device)


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor | None, att: Tensor | None, edge: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(tensor: Tensor | None) -> Tensor:
        shape = (0,) if tensor is None else tensor.shape
        return torch.empty(shape, dtype=(query if tensor is None else tensor).dtype, device=query.device)

    return like(query), like(key), like(value), like(att), like(edge)


_INPUTS = (
    "Tensor[] csr, Tensor? edge_id, Tensor[] hubs, Tensor[] transposed, Tensor? transposed_id, "
    "Tensor[] hubs_transposed, str score, float negative_slope, float dropout, Tensor? seed, int hub_edges)"
)

dynamic_attention_backward = define(
    "dynamic_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor? value, Tensor? att, Tensor? edge, "
    f"Tensor out, Tensor lse, {_INPUTS} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=dynamic_attention_backward_cpu,
    cuda=dynamic_attention_backward_triton,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output):
    rows, (csr, edge_id, hubs, transposed, transposed_id, hubs_transposed, *options) = inputs[:5], inputs[5:]
    *ctx.options, seed, ctx.hub_edges = options
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*rows, *output, seed)
    ctx.plan = csr, edge_id, hubs, transposed, transposed_id, hubs_transposed


def _backward(ctx, grad, _):
    *rows, out, lse, seed = ctx.saved_tensors
    grads = dynamic_attention_backward(grad, *rows, out, lse, *ctx.plan, *ctx.options, seed, ctx.hub_edges)
    wanted = [each if needed else None for each, needed in zip(grads, ctx.needs_input_grad[:5], strict=True)]
    plan = [[None] * len(part) if isinstance(part, list) else None for part in ctx.plan]
    return *wanted, *plan, *[None] * 5


dynamic_attention = define(
    "dynamic_attention(Tensor query, Tensor key, Tensor? value, Tensor? att, Tensor? edge, "
    f"{_INPUTS} -> (Tensor, Tensor)",
    cpu=dynamic_attention_cpu,
    cuda=dynamic_attention_triton,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)

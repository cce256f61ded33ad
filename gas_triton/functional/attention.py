"""`attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gas_triton.functional.dropout import check_seed
from gas_triton.functional.rows import Halo, check_all_rows, check_floating, in_batch_rows, reads_halo
from gas_triton.kernels.attention import attention as attention_op

if TYPE_CHECKING:
    from gas_triton.batch import Batch


def attention(
    x: Tensor,
    batch: Batch,
    source_logit: Tensor,
    target_logit: Tensor,
    *,
    edge_logit: Tensor | None = None,
    negative_slope: float = 0.2,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    halo: Halo = "read",
) -> Tensor:
    r"""Weighs the neighbours of every in-batch row by a softmax over its edges, and sums them, in one pass.

    `out_ih = sum_{j in N(i)} softmax_j(leaky_relu(source_logit_jh + target_logit_ih + edge_logit_eh)) x_jh`, the
    attention of GAT (Velickovic et al., ICLR 2018). A row without neighbours is 0. No tensor with a value for every
    edge is made, but `edge_logit` and its gradient.

    Args:
        x: [B + H, heads, D] (in-batch rows, then halo rows), or [B, heads, D] if the batch has no halo or it is left
            out; float32, float16, bfloat16 or float64; sums are accumulated in float32 (float64 for float64).
        batch: the plan of the step.
        source_logit: [rows of x, heads], of the neighbours.
        target_logit: [B, heads], of the rows that attend.
        edge_logit: [num_edges, heads] in the batch's edge order.
        negative_slope: of leaky_relu.
        dropout: drops edges of a row, after the softmax, with this probability; each head its own.
        seed: int64 [1], names the dropout mask; needed with `dropout`.
        halo: "drop" leaves halo neighbours out.

    Gradient flows to `x` and to all logits. That they are finite is not checked, which would wait for the device; an
    edge of logit -inf is left out.

    Returns:
        [B, heads, D] in the dtype of `x`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a wrong number of rows, heads or device, or halo rows that nothing provides.
    """
    has_halo = reads_halo(batch, halo)
    check_seed("dropout", dropout, seed)
    check_floating("x", x, batch)
    if x.dim() != 3:
        raise ValueError(f"x must have shape [rows, heads, features], got {list(x.shape)}")
    check_all_rows("x", x, batch, has_halo)
    heads = x.size(1)
    check_floating("source_logit", source_logit, batch, [x.size(0), heads])
    check_floating("target_logit", target_logit, batch, [batch.num_nodes, heads])
    if edge_logit is not None:
        check_floating("edge_logit", edge_logit, batch, [batch.num_edges, heads])
    if not has_halo:
        # nothing outside the in-batch rows is read
        x, source_logit = in_batch_rows(x, batch), in_batch_rows(source_logit, batch)
        edge_logit = None if edge_logit is None else edge_logit[: batch.inner.num_edges]

    csr = batch.joint(has_halo)
    transposed: list[Tensor] = []
    hubs_transposed: list[Tensor] = []
    needs_grad = any(t is not None and t.requires_grad for t in (x, source_logit, target_logit, edge_logit))
    if needs_grad and torch.is_grad_enabled():
        reverse, hubs_transposed = batch.joint_transposed(has_halo)
        assert reverse.edge_id is not None
        transposed = [reverse.rowptr, reverse.col, reverse.edge_id]
    joint = [csr.rowptr, csr.col, *([] if csr.edge_id is None else [csr.edge_id])]
    return attention_op(
        x, source_logit, target_logit, edge_logit, joint, transposed, batch.joint_hubs(has_halo), hubs_transposed,
        negative_slope, dropout, seed if dropout > 0.0 else None, batch.hub_edges,
    )[0]  # fmt: skip

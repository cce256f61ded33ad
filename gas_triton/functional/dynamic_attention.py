"""`dynamic_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gas_triton.functional.dropout import check_seed
from gas_triton.functional.rows import FLOATS, Halo, check_all_rows, check_floating, describe, in_batch_rows, reads_halo
from gas_triton.kernels.dynamic_attention import SCORES
from gas_triton.kernels.dynamic_attention import dynamic_attention as dynamic_attention_op

if TYPE_CHECKING:
    from gas_triton.batch import Batch

Score = Literal["dot", "gatv2"]


def dynamic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    batch: Batch,
    *,
    score: Score = "dot",
    att: Tensor | None = None,
    edge: Tensor | None = None,
    negative_slope: float = 0.2,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    halo: Halo = "read",
) -> Tensor:
    r"""Attention over the neighbours of every in-batch row whose logit depends on the features of both ends.

    `out_i = sum_{j in N(i)} dropout(softmax_j(logit_ij)) value_j`, for every head, with

    * "dot": `logit_ij = <query_i, key_j + edge_ij> / sqrt(D)`, and `value_j + edge_ij` summed (Shi et al., IJCAI 2021);
    * "gatv2": `logit_ij = <att, leaky_relu(query_i + key_j + edge_ij)>` (Brody et al., ICLR 2022).

    A row without neighbours is 0. On a GPU nothing of edges x heads is stored, `edge` and its gradient apart.

    Args:
        query: [B, heads, D], of the in-batch rows; float32, float16, bfloat16 or float64; accumulated in float32
            (float64 for float64).
        key: [B + H, heads, D], in-batch rows, then halo rows; [B, heads, D] if the halo is left out or empty.
        value: as `key`; None for `key` itself.
        batch: the plan of the step.
        score: "dot" or "gatv2".
        att: [heads, D], for "gatv2".
        edge: [num_edges, heads, D] in the batch's edge order.
        negative_slope: of leaky_relu, for "gatv2".
        dropout: drops weights after the softmax with this probability and scales the rest by 1 / (1 - p).
        seed: int64 [1], names the dropout mask, a hash of (seed, place in the batch's edge order, head).
        halo: "drop" leaves halo neighbours out (Cluster-GCN, Chiang et al., KDD 2019).

    Returns:
        [B, heads, D] in the dtype of `query`.

    Raises:
        TypeError: an argument is not a floating tensor, or of another dtype than `query`.
        ValueError: a wrong shape or device, or an argument that the score lacks or does not know.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    has_halo = reads_halo(batch, halo)
    check_seed("dropout", dropout, seed)
    _check_tensors(query, key, value, edge, batch)
    _check_att(att, score, query)
    num_nodes = batch.num_nodes
    if query.size(0) != num_nodes:
        raise ValueError(f"query has {query.size(0)} rows, expected {num_nodes} (in-batch rows)")
    check_all_rows("key", key, batch, has_halo)
    if not has_halo:
        # nothing outside the in-batch rows is read
        key, value = in_batch_rows(key, batch), None if value is None else in_batch_rows(value, batch)
        edge = None if edge is None else edge[: batch.inner.num_edges]

    rowptr, col, edge_id = batch.joint(has_halo)
    transposed: list[Tensor] = []
    transposed_id: Tensor | None = None
    hubs_transposed: list[Tensor] = []
    needs_gradient = any(t is not None and t.requires_grad for t in (query, key, value, att, edge))
    if needs_gradient and torch.is_grad_enabled():
        csr, hubs_transposed = batch.joint_transposed(has_halo)
        transposed, transposed_id = [csr.rowptr, csr.col], csr.edge_id
    return dynamic_attention_op(
        query, key, value, att, edge, [rowptr, col], edge_id, batch.joint_hubs(has_halo), transposed, transposed_id,
        hubs_transposed, score, negative_slope, dropout, seed, batch.hub_edges,
    )[0]  # fmt: skip


def _check_tensors(query: Any, key: Any, value: Any, edge: Any, batch: Batch) -> None:
    given = {"query": query, "key": key, "value": value, "edge": edge}
    for name, tensor in given.items():
        if tensor is None and name in ("value", "edge"):
            continue
        check_floating(name, tensor, batch)
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but query is {query.dtype}")
        if tensor.dim() != 3 or tensor.shape[1:] != query.shape[1:]:
            shape = ["rows", *query.shape[1:]] if query.dim() == 3 else ["rows", "heads", "features"]
            raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
    if value is not None and value.size(0) != key.size(0):
        raise ValueError(f"value has {value.size(0)} rows but key has {key.size(0)}")
    if edge is not None and edge.size(0) != batch.num_edges:
        raise ValueError(f"edge has {edge.size(0)} rows, expected {batch.num_edges}, one an edge of the batch")


def _check_att(att: Any, score: str, query: Tensor) -> None:
    if score != "gatv2":
        if att is not None:
            raise ValueError(f"att is for score='gatv2', got it with score={score!r}")
        return
    if not isinstance(att, Tensor) or att.dtype not in FLOATS:
        raise TypeError(f"score='gatv2' needs att, a floating tensor, got {describe(att)}")
    if att.shape != query.shape[1:]:
        raise ValueError(f"att must have shape {list(query.shape[1:])} (heads, features), got {list(att.shape)}")
    if att.device != query.device:
        raise ValueError(f"att is on {att.device} but query is on {query.device}")

"""`aggregate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gas_triton.functional.dropout import check_probability
from gas_triton.functional.rows import FLOATS, Features, Quantized, check_rows, describe
from gas_triton.kernels.aggregate import REDUCTIONS
from gas_triton.kernels.aggregate import aggregate as aggregate_op

if TYPE_CHECKING:
    from gas_triton.batch import Batch

Reduce = Literal["sum", "mean", "max", "min"]


def aggregate(
    x: Tensor | Features,
    batch: Batch,
    history: Tensor | Quantized | None = None,
    reduce: Reduce = "sum",
    *,
    edge_weight: Tensor | None = None,
    halo: Literal["read", "drop"] = "read",
    history_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    r"""Aggregates the neighbours of every in-batch row, halo neighbours included, in one pass.

    `out_i = reduce_{j in N(i)} w_ij h_j`, where h_j is a row of `x` or, for a halo neighbour, of `history`. A row
    without neighbours is 0; equal extrema give their gradient to one edge.

    Args:
        x: [B + H, F] (in-batch rows, then halo rows, gradient to all), or [B, F] with `history`, or `batch.features`;
            float32, float16, bfloat16 or float64; the sum is accumulated in float32 (float64 for float64).
        batch: the plan of the step.
        history: halo rows of any floating dtype or `Quantized`, no gradient: the table [N, F], read in place, or
            staged rows [H, F], row k being that of `batch.halo_ids[k]`.
        reduce: "sum", "mean" (over the number of edges), "max" or "min".
        edge_weight: [num_edges] in the batch's edge order, with gradient; `batch.edge_weight` for the graph's own. That
            it is finite is not checked, which would wait for the device.
        halo: "drop" leaves halo neighbours out (Cluster-GCN, Chiang et al., KDD 2019).
        history_dropout: drops features of history rows with this probability, the same ones on every edge of a node.
        seed: int64 [1], names the dropout mask; needed with `history_dropout`.

    Returns:
        [B, F] in the dtype of `x`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a wrong number of rows, width or device, or halo rows that nothing provides.
    """
    inner, outer_csr = batch.inner, batch.outer
    has_halo = batch.num_halo > 0 and halo == "read"
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if halo not in ("read", "drop"):
        raise ValueError(f"halo must be 'read' or 'drop', got {halo!r}")
    check_probability("history_dropout", history_dropout)
    if history_dropout > 0.0 and seed is None:
        raise ValueError(f"history_dropout={history_dropout} needs a seed, got None: see draw_seed")
    rows, source = check_rows(x, batch, history, has_halo)
    table, scale, staged = source
    if edge_weight is not None and edge_weight is not batch.edge_weight:
        check_edge_weight(edge_weight, batch)

    is_graph_weight = edge_weight is None or edge_weight is batch.edge_weight
    inner_col = batch.inner_graph_col if isinstance(x, Features) else inner.col
    outer: list[Tensor] = []
    if has_halo:
        if isinstance(x, Features):
            outer = [outer_csr.rowptr, outer_csr.col]
        elif table is None:
            outer = [outer_csr.rowptr, batch.outer_joint_col]
        else:
            outer = [outer_csr.rowptr, outer_csr.col, batch.outer_slot, batch.halo_ids]
    elif edge_weight is not None and halo == "drop":
        edge_weight = edge_weight[: inner.num_edges]

    transposed: list[Tensor] = []
    edge_id: Tensor | None = None
    hubs_transposed: list[Tensor] = []
    if rows.requires_grad and torch.is_grad_enabled():
        if has_halo and table is None:
            csr, hubs_transposed = batch.transposed_joint()
        else:
            shared = batch.symmetric and is_graph_weight and reduce in ("sum", "mean")
            csr, hubs_transposed = batch.transposed_inner(shared)
        transposed, edge_id = [csr.rowptr, csr.col], csr.edge_id
    return aggregate_op(
        rows, table, scale, edge_weight, [inner.rowptr, inner_col], outer, transposed, edge_id, batch.hubs,
        hubs_transposed, reduce, history_dropout if table is not None else 0.0, seed, batch.hub_edges, staged,
    )[0]  # fmt: skip


def check_edge_weight(edge_weight: Any, batch: Batch) -> None:
    if not isinstance(edge_weight, Tensor) or edge_weight.dtype not in FLOATS:
        raise TypeError(f"edge_weight must be a floating tensor, got {describe(edge_weight)}")
    if edge_weight.dim() != 1 or edge_weight.numel() != batch.num_edges:
        raise ValueError(f"edge_weight must have shape [{batch.num_edges}], got {list(edge_weight.shape)}")
    if edge_weight.device != batch.device:
        raise ValueError(f"edge_weight is on {edge_weight.device} but the batch is on {batch.device}")

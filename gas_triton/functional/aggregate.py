"""`aggregate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from gas_triton.functional.dropout import check_seed
from gas_triton.functional.rows import (
    Features,
    Halo,
    Quantized,
    check_floating,
    check_rows,
    edge_blocks,
    reads_halo,
    transposed_blocks,
)
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
    halo: Halo = "read",
    history_dropout: float = 0.0,
    seed: Tensor | None = None,
    residual: Tensor | None = None,
    residual_weight: float = 0.0,
) -> Tensor:
    r"""Aggregates the neighbours of every in-batch row, halo neighbours included, in one pass.

    `out_i = (1 - a) reduce_{j in N(i)} w_ij h_j + a residual_i`, where h_j is a row of `x` or, for a halo neighbour, of
    `history`, and a is `residual_weight`. What is reduced over no neighbours is 0; equal extrema give their gradient to
    one edge.

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
        residual: floating [B, F], with gradient; for reduce "sum" and "mean". Added where a row is written, in the
            accumulator's precision: no further pass over the rows (GCNII: Chen et al., ICML 2020; APPNP: Gasteiger et
            al., ICLR 2019).
        residual_weight: a, in [0, 1]; more than 0 only with `residual`. A Triton kernel is compiled for each value.

    Returns:
        [B, F] in the dtype of `x`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a wrong number of rows, width or device, or halo rows that nothing provides.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    has_halo = reads_halo(batch, halo)
    check_seed("history_dropout", history_dropout, seed)
    if isinstance(x, Features) and not x.is_in_place:
        x = x.rows()
    rows, (table, scale, staged) = check_rows(x, batch, history, has_halo)
    is_graph_weight = edge_weight is None or edge_weight is batch.edge_weight
    if not is_graph_weight:
        check_floating("edge_weight", edge_weight, batch, [batch.num_edges])
    if residual is not None or residual_weight != 0.0:
        _check_residual(residual, residual_weight, reduce, batch, rows.size(1))

    if edge_weight is not None and halo == "drop":
        edge_weight = edge_weight[: batch.inner.num_edges]
    inner, outer = edge_blocks(x, batch, table, has_halo)
    # winners are edges: in a symmetric graph's own arrays they would be their reverses
    may_share = is_graph_weight and reduce in ("sum", "mean")
    transposed, edge_id, hubs_transposed = transposed_blocks(rows, batch, table, has_halo, may_share)
    # what wins is asked for by a gradient
    has_winner = len(transposed) > 0 or (edge_weight is not None and edge_weight.requires_grad)
    return aggregate_op(
        rows, table, scale, edge_weight, inner, outer, transposed, edge_id, batch.hubs,
        hubs_transposed, reduce, history_dropout if table is not None else 0.0, seed, batch.hub_edges, staged,
        residual, residual_weight, has_winner,
    )[0]  # fmt: skip


def _check_residual(residual: Any, weight: float, reduce: Reduce, batch: Batch, num_features: int) -> None:
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"residual_weight must be in [0, 1], got {weight}")
    if residual is None:
        raise ValueError(f"residual_weight={weight} needs a residual, got None")
    if reduce not in ("sum", "mean"):
        raise ValueError(f"residual is for reduce 'sum' or 'mean', got {reduce!r}")
    check_floating("residual", residual, batch, [batch.num_nodes, num_features])

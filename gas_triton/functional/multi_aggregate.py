"""`multi_aggregate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gas_triton.functional.dropout import check_seed
from gas_triton.functional.rows import (
    Features,
    Halo,
    Quantized,
    check_rows,
    edge_blocks,
    reads_halo,
    transposed_blocks,
)
from gas_triton.kernels.aggregate import aggregate as aggregate_op
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.multi_aggregate import MULTI_REDUCTIONS
from gas_triton.kernels.multi_aggregate import multi_aggregate as multi_aggregate_op

if TYPE_CHECKING:
    from gas_triton.batch import Batch

MultiReduce = Literal["sum", "mean", "min", "max", "var", "std"]


def multi_aggregate(
    x: Tensor | Features,
    batch: Batch,
    history: Tensor | Quantized | None = None,
    reduces: Sequence[MultiReduce] = ("sum", "mean", "min", "max", "std"),
    *,
    halo: Halo = "read",
    history_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    r"""Aggregates the neighbours of every in-batch row in several ways, in one pass over the edges.

    `out_ik = reduce_k_{j in N(i)} h_j`, where h_j is a row of `x` or, for a halo neighbour, of `history`. "var" is
    `mean(h^2) - mean(h)^2`, "std" its square root, and 0 up to sqrt(1e-5), as in PyG's `StdAggregation`. A row without
    neighbours is 0; equal extrema give their gradient to one edge.

    Args:
        x: as in `aggregate`.
        batch: the plan of the step.
        history: as in `aggregate`.
        reduces: K distinct ones of "sum", "mean", "min", "max", "var" and "std".
        halo: "drop" leaves halo neighbours out (Cluster-GCN, Chiang et al., KDD 2019).
        history_dropout: drops features of history rows with this probability, the same ones on every edge of a node.
        seed: int64 [1], names the dropout mask; needed with `history_dropout`.

    Returns:
        [B, K, F] in the dtype of `x`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: an unknown reduction, a wrong number of rows, width or device, or halo rows that nothing provides.

    The aggregations of PNA: Corso et al., NeurIPS 2020.
    """
    names = check_reduces("reduces", reduces)
    has_halo = reads_halo(batch, halo)
    check_seed("history_dropout", history_dropout, seed)
    if isinstance(x, Features) and not x.is_in_place:
        x = x.rows()
    rows, (table, scale, staged) = check_rows(x, batch, history, has_halo)

    inner, outer = edge_blocks(x, batch, table, has_halo)
    # winners are edges: in a symmetric graph's own arrays they would be their reverses
    may_share = "min" not in names and "max" not in names
    transposed, edge_id, hubs_transposed = transposed_blocks(rows, batch, table, has_halo, may_share)
    return multi_aggregate_op(
        rows, table, scale, inner, outer, transposed, edge_id, batch.hubs, hubs_transposed, names,
        history_dropout if table is not None else 0.0, seed, batch.hub_edges, staged,
    )[0]  # fmt: skip


def source_rows(x: Tensor, batch: Batch, halo: Halo = "read") -> Tensor:
    """The row that each edge comes from, [E, F] in the batch's edge order; the gradient is summed in a fixed order.

    Args:
        x: floating [B + H, F], or [B, F] with halo="drop".
        batch: the plan of the step.
        halo: "drop" leaves the outer edges out.
    """
    has_halo = reads_halo(batch, halo)
    x, _ = check_rows(x, batch, None, has_halo)
    col = torch.cat([batch.inner.col, batch.outer_joint_col]) if has_halo else batch.inner.col
    csr, hubs = batch.joint_transposed(has_halo)
    return _gather(x, col, csr.rowptr, csr.edge_id, hubs, batch.hub_edges)


def target_rows(x: Tensor, batch: Batch, halo: Halo = "read") -> Tensor:
    """The row that each edge goes to; as `source_rows`, of x [B, F]."""
    has_halo = reads_halo(batch, halo)
    if x.size(0) != batch.num_nodes:
        raise ValueError(f"x has {x.size(0)} rows, expected {batch.num_nodes} (in-batch rows)")
    csr = batch.joint(has_halo)
    return _gather(
        x, _row_of_message(batch, has_halo), csr.rowptr, csr.edge_id, batch.joint_hubs(has_halo), batch.hub_edges
    )


def _gather(
    x: Tensor, col: Tensor, rowptr: Tensor, edge_id: Tensor | None, hubs: list[Tensor], hub_edges: int
) -> Tensor:
    # an aggregation of one neighbour each: unlike that of index_select its gradient needs no atomics
    place = torch.arange(col.numel() + 1, dtype=col.dtype, device=col.device)
    edge_id = place[:-1] if edge_id is None else edge_id.to(col.dtype)
    return aggregate_op(
        x, None, None, None, [place, col], [], [rowptr, edge_id], None, [], hubs, "sum", 0.0, None, hub_edges, False
    )[0]


def aggregate_messages(message: Tensor, batch: Batch, reduces: Sequence[MultiReduce], halo: Halo = "read") -> Tensor:
    """`multi_aggregate` of messages that were made edge by edge.

    Args:
        message: floating [E, F] in the batch's edge order, as from `source_rows`.
        batch: the plan of the step.
        reduces: as in `multi_aggregate`.
        halo: "drop" for messages of the inner edges alone.

    Returns:
        [B, K, F].
    """
    names = check_reduces("reduces", reduces)
    has_halo = reads_halo(batch, halo)
    csr = batch.joint(has_halo)
    place = torch.arange(csr.col.numel() + 1, dtype=csr.col.dtype, device=message.device)
    edge_id = place[:-1] if csr.edge_id is None else csr.edge_id.to(csr.col.dtype)
    if message.dim() != 2 or message.size(0) != csr.col.numel():
        raise ValueError(f"message must have shape [{csr.col.numel()}, features], got {list(message.shape)}")
    transposed: list[Tensor] = []
    if message.requires_grad and torch.is_grad_enabled():
        transposed = [place, _row_of_message(batch, has_halo)]
    # a winner is a place in the joint order
    winner_id = torch.empty_like(edge_id).scatter_(0, edge_id.long(), place[:-1]) if transposed else None
    return multi_aggregate_op(
        message, None, None, [csr.rowptr, edge_id], [], transposed, winner_id, batch.joint_hubs(has_halo), [], names,
        0.0, None, batch.hub_edges, False,
    )[0]  # fmt: skip


def _row_of_message(batch: Batch, has_halo: bool) -> Tensor:
    row = row_of_edge(*batch.inner)
    row = torch.cat([row, row_of_edge(*batch.outer)]) if has_halo else row
    return row.to(batch.inner.col.dtype)


def check_reduces(name: str, reduces: Sequence[str]) -> list[str]:
    """The names as a list, "add" as "sum", if they are distinct and known."""
    if isinstance(reduces, str) or not reduces:
        raise ValueError(f"{name} must be a list of one or more of {', '.join(MULTI_REDUCTIONS)}, got {reduces!r}")
    names = ["sum" if value == "add" else value for value in reduces]
    for value in names:
        if value not in MULTI_REDUCTIONS:
            raise ValueError(f"{name} must be among {', '.join(MULTI_REDUCTIONS)}, got {value!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{name} must be distinct, got {', '.join(map(str, reduces))}")
    return names

"""Tensor functions of a batch: they check shapes, say what is wrong, and call one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gas_triton.kernels.aggregate import REDUCTIONS
from gas_triton.kernels.aggregate import aggregate as aggregate_op
from gas_triton.kernels.dropout import dropout as dropout_op
from gas_triton.kernels.pull import pull as pull_op
from gas_triton.kernels.pull import widen

if TYPE_CHECKING:
    from gas_triton.batch import Batch

Reduce = Literal["sum", "mean", "max", "min"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Features:
    """A handle on the full feature table: layers read its rows in place, and no gradient flows into it.

    Attributes:
        table: floating [N, F].
        node_ids: int64 [B], the batch's rows.
        halo_ids: int64 [H], its halo rows.
    """

    table: Tensor
    node_ids: Tensor
    halo_ids: Tensor

    def in_batch(self) -> Tensor:
        """A copy of the in-batch rows, [B, F]."""
        return self.table.index_select(0, self.node_ids)

    def rows(self) -> Tensor:
        """A copy of the in-batch rows, then the halo rows, [B + H, F]."""
        return self.table.index_select(0, torch.cat([self.node_ids, self.halo_ids]))

    @property
    def num_features(self) -> int:
        return self.table.size(1)


@dataclass(frozen=True)
class Quantized:
    """Rows stored in 8 bits; row r is `scale[r] * rows[r]`.

    Attributes:
        rows: int8 [R, F].
        scale: float32 [R].
    """

    rows: Tensor
    scale: Tensor


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
    rows, source = _check_rows(x, batch, history, has_halo)
    table, scale, staged = source
    if edge_weight is not None and edge_weight is not batch.edge_weight:
        _check_edge_weight(edge_weight, batch)

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


def dropout(x: Tensor, batch: Batch, p: float, seed: Tensor) -> Tensor:
    """Zeroes features with probability `p` and scales the rest by 1 / (1 - p), by a mask of (seed, node, feature).

    A node's mask is the same wherever the node is read, as an in-batch row here or from a history by `aggregate`.

    Args:
        x: [B, F] or [B + H, F].
        batch: the plan of the step.
        p: probability in [0, 1).
        seed: int64 [1], see `draw_seed`.
    """
    check_probability("p", p)
    if p == 0.0:
        return x
    ids = batch.node_ids if x.size(0) == batch.num_nodes else batch.all_ids
    if x.size(0) != ids.numel():
        raise ValueError(_row_count(x, batch))
    return dropout_op(x, ids, p, seed)


def halo_rows(
    history: Tensor | Quantized,
    batch: Batch,
    dtype: torch.dtype,
    history_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The batch's halo rows of a history, [H, F]; for layers that transform rows before they aggregate.

    Args:
        history: the table [N, F] or staged rows [H, F], as for `aggregate`; staged rows of `dtype` are not copied.
        batch: the plan of the step.
        dtype: floating dtype of the result.
        history_dropout: drops features of the rows with this probability.
        seed: int64 [1], names the dropout mask.
    """
    table, scale, staged = _check_history(history, batch)
    rows = widen(table, scale, dtype) if staged else pull_op(table, scale, batch.halo_ids, dtype)
    if history_dropout > 0.0 and seed is not None and batch.num_halo > 0:
        rows = dropout_op(rows, batch.halo_ids, history_dropout, seed)
    return rows


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed, int64 [1] on `device`, from torch's generator; does not synchronise."""
    return torch.randint(0, 2**62, (1,), device=device)


def check_probability(name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {p}")


# the rows that outer columns read (None: those of `x`), their scale if they are int8, and whether they are staged
_Source = tuple[Tensor | None, Tensor | None, bool]
_NO_SOURCE: _Source = (None, None, False)


def _check_rows(
    x: Tensor | Features, batch: Batch, history: Tensor | Quantized | None, has_halo: bool
) -> tuple[Tensor, _Source]:
    """(the rows that inner columns read, what outer columns read)."""
    if isinstance(x, Features):
        return x.table.detach(), _NO_SOURCE
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x must be a floating tensor or batch.features, got {_describe(x)}")
    if x.dim() != 2:
        raise ValueError(f"x must have shape [rows, features], got {list(x.shape)}")
    if x.device != batch.device:
        raise ValueError(f"x is on {x.device} but the batch is on {batch.device}: move one with .to()")
    if x.size(0) == batch.num_nodes + batch.num_halo:
        # without the halo, nothing outside the in-batch rows is read
        return (x if has_halo else x[: batch.num_nodes]), _NO_SOURCE
    if x.size(0) != batch.num_nodes:
        raise ValueError(_row_count(x, batch))
    if not has_halo:
        return x, _NO_SOURCE
    if history is None:
        raise ValueError(
            f"x has only the {batch.num_nodes} in-batch rows and no history holds the {batch.num_halo} halo rows: "
            "give batch.x or batch.features to the first layer, attach_histories(model, num_nodes) for the others, "
            "or halo='drop' to leave the halo out"
        )
    source = _check_history(history, batch)
    if source[0].size(1) != x.size(1):
        raise ValueError(f"x has {x.size(1)} features but the history has {source[0].size(1)}")
    return x, source


def _check_history(history: Tensor | Quantized, batch: Batch) -> tuple[Tensor, Tensor | None, bool]:
    """(rows, their scale if they are int8, whether they are staged)."""
    if isinstance(history, Quantized):
        rows, scale = history.rows, history.scale
        if rows.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != rows.shape[:1]:
            raise TypeError(
                f"history must have rows int8 [R, features] and scale float32 [R], got {_describe(rows)} and "
                f"{_describe(scale)}"
            )
        if scale.device != rows.device:
            raise ValueError(f"history has rows on {rows.device} but their scale on {scale.device}")
    elif isinstance(history, Tensor) and history.dtype in FLOATS:
        rows, scale = history, None
    else:
        raise TypeError(f"history must be a floating tensor [N, features] or Quantized, got {_describe(history)}")
    # H < N, as a batch has rows of its own
    if rows.dim() != 2 or rows.size(0) not in (batch.graph_nodes, batch.num_halo):
        raise ValueError(
            f"history must have {batch.graph_nodes} rows, one a node, got shape {list(rows.shape)}; staged rows of "
            f"this batch would be {batch.num_halo}, one a halo node"
        )
    if rows.device != batch.device:
        raise ValueError(f"history is on {rows.device} but the batch is on {batch.device}")
    return rows, scale, rows.size(0) != batch.graph_nodes


def _check_edge_weight(edge_weight: Any, batch: Batch) -> None:
    if not isinstance(edge_weight, Tensor) or edge_weight.dtype not in FLOATS:
        raise TypeError(f"edge_weight must be a floating tensor, got {_describe(edge_weight)}")
    if edge_weight.dim() != 1 or edge_weight.numel() != batch.num_edges:
        raise ValueError(f"edge_weight must have shape [{batch.num_edges}], got {list(edge_weight.shape)}")
    if edge_weight.device != batch.device:
        raise ValueError(f"edge_weight is on {edge_weight.device} but the batch is on {batch.device}")


def _row_count(x: Tensor, batch: Batch) -> str:
    return (
        f"x has {x.size(0)} rows, expected {batch.num_nodes} (in-batch rows) or {batch.num_nodes + batch.num_halo} "
        "(in-batch and halo rows)"
    )


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

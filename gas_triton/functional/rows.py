"""Where rows are: tensors, handles on tables, stored rows; and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gas_triton.kernels.dropout import dropout as dropout_op
from gas_triton.kernels.pull import pull as pull_op
from gas_triton.kernels.pull import widen

if TYPE_CHECKING:
    from gas_triton.batch import Batch

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
    table, scale, staged = check_history(history, batch)
    rows = widen(table, scale, dtype) if staged else pull_op(table, scale, batch.halo_ids, dtype)
    if history_dropout > 0.0 and seed is not None and batch.num_halo > 0:
        rows = dropout_op(rows, batch.halo_ids, history_dropout, seed)
    return rows


# the rows that outer columns read (None: those of `x`), their scale if they are int8, and whether they are staged
_Source = tuple[Tensor | None, Tensor | None, bool]
_NO_SOURCE: _Source = (None, None, False)


def check_rows(
    x: Tensor | Features, batch: Batch, history: Tensor | Quantized | None, has_halo: bool
) -> tuple[Tensor, _Source]:
    """(the rows that inner columns read, what outer columns read)."""
    if isinstance(x, Features):
        return x.table.detach(), _NO_SOURCE
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x must be a floating tensor or batch.features, got {describe(x)}")
    if x.dim() != 2:
        raise ValueError(f"x must have shape [rows, features], got {list(x.shape)}")
    if x.device != batch.device:
        raise ValueError(f"x is on {x.device} but the batch is on {batch.device}: move one with .to()")
    if x.size(0) == batch.num_nodes + batch.num_halo:
        # without the halo, nothing outside the in-batch rows is read
        return (x if has_halo else x[: batch.num_nodes]), _NO_SOURCE
    if x.size(0) != batch.num_nodes:
        raise ValueError(row_count(x, batch))
    if not has_halo:
        return x, _NO_SOURCE
    if history is None:
        raise ValueError(
            f"x has only the {batch.num_nodes} in-batch rows and no history holds the {batch.num_halo} halo rows: "
            "give batch.x or batch.features to the first layer, attach_histories(model, num_nodes) for the others, "
            "or halo='drop' to leave the halo out"
        )
    source = check_history(history, batch)
    if source[0].size(1) != x.size(1):
        raise ValueError(f"x has {x.size(1)} features but the history has {source[0].size(1)}")
    return x, source


def check_history(history: Tensor | Quantized, batch: Batch) -> tuple[Tensor, Tensor | None, bool]:
    """(rows, their scale if they are int8, whether they are staged)."""
    if isinstance(history, Quantized):
        rows, scale = history.rows, history.scale
        if rows.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != rows.shape[:1]:
            raise TypeError(
                f"history must have rows int8 [R, features] and scale float32 [R], got {describe(rows)} and "
                f"{describe(scale)}"
            )
        if scale.device != rows.device:
            raise ValueError(f"history has rows on {rows.device} but their scale on {scale.device}")
    elif isinstance(history, Tensor) and history.dtype in FLOATS:
        rows, scale = history, None
    else:
        raise TypeError(f"history must be a floating tensor [N, features] or Quantized, got {describe(history)}")
    # H < N, as a batch has rows of its own
    if rows.dim() != 2 or rows.size(0) not in (batch.graph_nodes, batch.num_halo):
        raise ValueError(
            f"history must have {batch.graph_nodes} rows, one a node, got shape {list(rows.shape)}; staged rows of "
            f"this batch would be {batch.num_halo}, one a halo node"
        )
    if rows.device != batch.device:
        raise ValueError(f"history is on {rows.device} but the batch is on {batch.device}")
    return rows, scale, rows.size(0) != batch.graph_nodes


def row_count(x: Tensor, batch: Batch) -> str:
    return (
        f"x has {x.size(0)} rows, expected {batch.num_nodes} (in-batch rows) or {batch.num_nodes + batch.num_halo} "
        "(in-batch and halo rows)"
    )


def describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

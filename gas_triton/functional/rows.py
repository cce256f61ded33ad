"""Where rows are: tensors, handles on tables, stored rows; and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from gas_triton.kernels.dropout import dropout as dropout_op
from gas_triton.kernels.pull import pull as pull_op
from gas_triton.kernels.pull import widen

if TYPE_CHECKING:
    from gas_triton.batch import Batch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Halo = Literal["read", "drop"]


@dataclass(frozen=True)
class Features:
    """A handle on the full feature table: layers read its rows in place, and no gradient flows into it.

    With `batch`, aggregated features are read instead where the loader has them (`ClusterLoader.aggregate_features`),
    and the table may be on another device: what a layer asks for is then copied.

    Attributes:
        table: floating [N, F].
        node_ids: int64 [B], the batch's rows.
        halo_ids: int64 [H], its halo rows.
        batch: where copied and aggregated rows come from.
    """

    table: Tensor
    node_ids: Tensor
    halo_ids: Tensor
    batch: Batch | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where rows are given."""
        return self.node_ids.device

    @property
    def is_in_place(self) -> bool:
        """Whether a kernel can read the table."""
        return self.table.device == self.device

    def in_batch(self) -> Tensor:
        """A copy of the in-batch rows, [B, F]."""
        if self.batch is not None and not self.is_in_place:
            return self.batch.own_rows
        return self.table.index_select(0, self.node_ids)

    def rows(self) -> Tensor:
        """A copy of the in-batch rows, then the halo rows, [B + H, F]."""
        if self.batch is not None and not self.is_in_place:
            return self.batch.x
        return self.table.index_select(0, torch.cat([self.node_ids, self.halo_ids]))

    def halo(self) -> Tensor:
        """What holds the halo rows: the table, or a copy of them, [H, F]."""
        return self.table if self.is_in_place else self.rows()[self.node_ids.numel() :]

    def static_rows(self, reduce: str, weighted: bool) -> Tensor | None:
        """The in-batch rows of the aggregated features, [B, F]; None if the loader does not have them.

        Args:
            reduce: "sum", "mean", "max" or "min".
            weighted: whether edges count by the graph's weights.
        """
        return None if self.batch is None else self.batch.static_rows(reduce, weighted)

    @property
    def num_features(self) -> int:
        return self.table.size(1)


class StaticInput(NamedTuple):
    """What a layer reads of features that never change.

    Attributes:
        reduce: "sum", "mean", "max" or "min" of its neighbours.
        weighted: whether edges count by the graph's weights.
        own_rows: whether it reads the rows themselves too.
    """

    reduce: str
    weighted: bool
    own_rows: bool


@dataclass(frozen=True)
class Quantized:
    """Rows stored in 8 bits; row r is `scale[r] * rows[r]`.

    Attributes:
        rows: int8 [R, F].
        scale: float32 [R].
    """

    rows: Tensor
    scale: Tensor


def in_batch_rows(rows: Any, batch: Batch) -> Any:
    """The in-batch rows of [B, ...] or [B + H, ...]: `rows` itself without halo, as a slice's gradient is a copy."""
    return rows if rows.size(0) == batch.num_nodes else rows[: batch.num_nodes]


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
        if not x.is_in_place:
            where = f"a table on {x.table.device}, the batch is on {batch.device}"
            raise ValueError(f"x is a handle on {where}: use batch.x")
        return x.table.detach(), _NO_SOURCE
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x must be a floating tensor or batch.features, got {describe(x)}")
    if x.dim() != 2:
        raise ValueError(f"x must have shape [rows, features], got {list(x.shape)}")
    if x.device != batch.device:
        raise ValueError(f"x is on {x.device} but the batch is on {batch.device}: move one with .to()")
    if x.size(0) == batch.num_nodes + batch.num_halo:
        # without the halo, nothing outside the in-batch rows is read
        return (x if has_halo else in_batch_rows(x, batch)), _NO_SOURCE
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


def check_halo(halo: str) -> None:
    if halo not in ("read", "drop"):
        raise ValueError(f"halo must be 'read' or 'drop', got {halo!r}")


def reads_halo(batch: Batch, halo: str) -> bool:
    """Whether there are halo rows, and they are read."""
    check_halo(halo)
    # a batch that has no edges to aggregate says why, before rows are counted
    _ = batch.inner
    return batch.num_halo > 0 and halo == "read"


def check_floating(name: str, value: Any, batch: Batch, shape: list[int] | None = None) -> None:
    """Checks that `value` is a floating tensor on the batch's device, of `shape` if that is given."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating tensor, got {describe(value)}")
    if shape is not None and list(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
    if value.device != batch.device:
        raise ValueError(f"{name} is on {value.device} but the batch is on {batch.device}: move one with .to()")


def check_all_rows(name: str, x: Tensor, batch: Batch, has_halo: bool) -> None:
    """Checks that `x` has a row for each in-batch and halo node, or with `has_halo` False for each in-batch node."""
    if x.size(0) == batch.num_nodes + batch.num_halo or (x.size(0) == batch.num_nodes and not has_halo):
        return
    if x.size(0) == batch.num_nodes:
        raise ValueError(
            f"{name} has only the {batch.num_nodes} in-batch rows, but the batch has {batch.num_halo} halo rows: give "
            f"{name} all rows, or halo='drop' to leave the halo out"
        )
    raise ValueError(row_count(x, batch, name))


def row_count(x: Any, batch: Batch, name: str = "x") -> str:
    return (
        f"{name} has {x.size(0)} rows, expected {batch.num_nodes} (in-batch rows) or "
        f"{batch.num_nodes + batch.num_halo} (in-batch and halo rows)"
    )


def edge_blocks(
    x: Tensor | Features, batch: Batch, table: Tensor | None, has_halo: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The two blocks of edges as an aggregation takes them; `table` holds the halo rows if `x` does not."""
    inner, outer = batch.inner, batch.outer
    if isinstance(x, Features):
        return [inner.rowptr, batch.inner_graph_col], [outer.rowptr, outer.col] if has_halo else []
    if not has_halo:
        return [inner.rowptr, inner.col], []
    if table is None:
        return [inner.rowptr, inner.col], [outer.rowptr, batch.outer_joint_col]
    return [inner.rowptr, inner.col], [outer.rowptr, outer.col, batch.outer_slot, batch.halo_ids]


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a backward will ask for the gradient of a tensor."""
    return tensor.requires_grad and torch.is_grad_enabled()


def transposed_blocks(
    rows: Tensor, batch: Batch, table: Tensor | None, has_halo: bool, may_share: bool
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """(transpose, its edges' places, its hubs) for the gradient of `rows`; nothing where there is none.

    Args:
        rows: what the kernel reads.
        batch: the plan of the step.
        table: holds the halo rows, None if `rows` does.
        has_halo: whether halo rows are read.
        may_share: whether the arrays of a symmetric graph may stand for their transpose.
    """
    if not needs_gradient(rows):
        return [], None, []
    if has_halo and table is None:
        csr, hubs = batch.transposed_joint()
    else:
        csr, hubs = batch.transposed_inner(batch.symmetric and may_share)
    return [csr.rowptr, csr.col], csr.edge_id, hubs


def describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

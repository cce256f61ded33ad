"""`HistoryStore`: one table of last-pushed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gas_triton.functional import FLOATS
from gas_triton.kernels.push import push as push_op

if TYPE_CHECKING:
    from gas_triton.batch import Batch

TIERS = ("device",)


class HistoryStore:
    """The history of one layer's input: table [N, D] of the rows last pushed, and when.

    Rows that were never pushed are 0 (Fey et al., ICML 2021, section 4). Not a module and not a buffer: a cast of the
    model does not touch it, and no gradient flows into it.

    Args:
        num_rows: N.
        dim: D.
        dtype: storage dtype, float32, bfloat16, float16 or float64; rows are rounded to nearest when pushed.
        device: where the table lives.
        name: the layer's name, for error messages.

    Attributes:
        table: [N, D].
        last_push: int32 [N], value of the clock when a row was last pushed, -1 if never.
        clock: int64 [], pushes so far.
        row_order: names the row order of the graph that was pushed, None before the first push.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str = "history",
    ) -> None:
        if num_rows < 1 or dim < 1:
            raise ValueError(f"{name}: a history needs at least one row and one feature, got [{num_rows}, {dim}]")
        if dtype not in FLOATS:
            raise TypeError(f"{name}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        self.name = name
        self.table = torch.zeros(num_rows, dim, dtype=dtype, device=device)
        self.last_push = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        self.clock = torch.zeros((), dtype=torch.int64, device=device)
        self.row_order: str | None = None

    @property
    def num_rows(self) -> int:
        return self.table.size(0)

    @property
    def dim(self) -> int:
        return self.table.size(1)

    @property
    def nbytes(self) -> int:
        """Bytes of the table and the push times."""
        return sum(t.numel() * t.element_size() for t in (self.table, self.last_push))

    def push(self, x: Tensor, batch: Batch) -> None:
        """Stores the batch's in-batch rows.

        Args:
            x: [B, D], detached here.
            batch: the plan whose rows these are.

        Raises:
            ValueError: another width, number of rows, graph or row order than this history's.
        """
        self.check(x, batch)
        self.row_order = batch.row_order
        with torch.no_grad():
            self.clock += 1
            report = self.clock.new_empty(2)
            push_op(
                self.table, None, self.last_push, report, x.detach(), batch.node_ids, batch.spans, self.clock, "allow"
            )  # fmt: skip

    def check(self, x: Tensor, batch: Batch) -> None:
        """Raises TypeError or ValueError if `x` and `batch` do not belong to this history."""
        if x.dtype not in FLOATS or x.dim() != 2:
            raise TypeError(f"{self.name}: x must be a floating tensor [B, {self.dim}], got {x.dtype} {list(x.shape)}")
        if batch.graph_nodes != self.num_rows:
            raise ValueError(
                f"the batch is of a graph with {batch.graph_nodes} nodes but {self.name}'s history has {self.num_rows}"
            )
        if x.size(1) != self.dim:
            raise ValueError(f"x has {x.size(1)} features but {self.name}'s history has {self.dim}")
        if x.size(0) != batch.num_nodes:
            raise ValueError(f"{self.name}: x has {x.size(0)} rows but the batch has {batch.num_nodes} in-batch rows")
        if self.row_order is not None and batch.row_order != self.row_order:
            raise ValueError(
                f"{self.name}'s history holds rows in the order {self.row_order} but the batch's graph has "
                f"{batch.row_order}: use the same partition, or reset() the histories"
            )
        if self.table.device != batch.device:
            raise ValueError(f"{self.name}'s history is on {self.table.device} but the batch is on {batch.device}")
        if x.device != self.table.device:
            raise ValueError(f"{self.name}: x is on {x.device} but the history is on {self.table.device}")

    def pull(self, ids: Tensor) -> Tensor:
        """A copy of rows `ids`, [len(ids), D]."""
        return self.table.index_select(0, ids)

    def age(self, ids: Tensor | None = None) -> Tensor:
        """Pushes since each row was last pushed (its staleness), int64; -1 for a row never pushed."""
        last = (self.last_push if ids is None else self.last_push.index_select(0, ids)).long()
        return torch.where(last < 0, -1, self.clock - last)

    def reset(self) -> None:
        """Forgets every row."""
        self.table.zero_()
        self.last_push.fill_(-1)
        self.clock.zero_()
        self.row_order = None

    def to(self, device: torch.device | str) -> HistoryStore:
        """Moves the history to another device, in place; never changes its dtype."""
        self.table, self.last_push = self.table.to(device), self.last_push.to(device)
        self.clock = self.clock.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The table, push times, clock and row order; tensors are not copied."""
        return {
            "table": self.table,
            "last_push": self.last_push,
            "clock": int(self.clock),
            "row_order": self.row_order,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if `state` does not fit this history; changes nothing."""
        if not isinstance(state, Mapping):
            raise TypeError(f"{self.name}: state must be a mapping, got {type(state).__name__}")
        missing = {"table", "last_push", "clock", "row_order"} - state.keys()
        if missing:
            raise ValueError(f"{self.name}: the state lacks {', '.join(sorted(missing))}")
        for key, kind in (("table", Tensor), ("last_push", Tensor), ("clock", int), ("row_order", str | None)):
            if not isinstance(state[key], kind):
                raise TypeError(f"{self.name}: the state's {key} is a {type(state[key]).__name__}")
        table = state["table"]
        if table.shape != self.table.shape or table.dtype != self.table.dtype:
            raise ValueError(
                f"{self.name}: the state holds {table.dtype} {list(table.shape)} but the history is "
                f"{self.table.dtype} {list(self.table.shape)}"
            )
        times = state["last_push"]
        if times.shape != self.last_push.shape:
            raise ValueError(
                f"{self.name}: the state's last_push has shape {list(times.shape)}, expected [{self.num_rows}]"
            )
        if None not in (self.row_order, state["row_order"]) and self.row_order != state["row_order"]:
            raise ValueError(
                f"{self.name}: the state holds rows in the order {state['row_order']} but this history's graph has "
                f"{self.row_order}: rows would be given to the wrong nodes"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: another shape, dtype or row order; nothing is written then.
        """
        self.check_state(state)
        self.table.copy_(state["table"])
        self.last_push.copy_(state["last_push"])
        self.clock.fill_(state["clock"])
        self.row_order = state["row_order"]

    def __repr__(self) -> str:
        return (
            f"HistoryStore({self.name}, num_rows={self.num_rows}, dim={self.dim}, dtype={self.table.dtype}, "
            f"{self.nbytes / 2**20:.1f} MiB, device={self.table.device})"
        )

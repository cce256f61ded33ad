"""What every layer shares: reading its rows, pushing them, and dropping features of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.functional import Features, Halo, Quantized, Reduce, Rows, SparseRows, StaticInput
from gas_triton.functional.dropout import check_probability
from gas_triton.functional.rows import FLOATS, check_halo, in_batch_rows
from gas_triton.history import HistoryStore, ReadsHistory
from gas_triton.nn.lipschitz import Lipschitz


@dataclass(frozen=True)
class Source:
    """The rows that a layer aggregates: in-batch (and halo) rows, and what holds the halo if they do not."""

    # `Rows`, of which sparse ones are only transformed
    x: Any
    batch: Batch
    halo: Halo
    history: Tensor | Quantized | None = None
    history_dropout: float = 0.0
    seed: Tensor | None = None

    def aggregate(
        self,
        reduce: Reduce,
        edge_weight: Tensor | None = None,
        residual: Tensor | None = None,
        residual_weight: float = 0.0,
    ) -> Tensor:
        """The neighbours' rows, reduced, and mixed with `residual` if there is one, [B, F].

        Those of unchanged features may have been aggregated before.
        """
        if isinstance(self.x, SparseRows):
            raise TypeError(
                "x must be dense where rows are aggregated before they are transformed (GINConv, GCN2Conv, APPNP, "
                "SAGEConv with max), got SparseRows: give x.to_dense(), or train without sparse_features"
            )
        static = self._static_rows(reduce, edge_weight) if residual is None else None
        if static is not None:
            return static
        return functional.aggregate(
            self.x, self.batch, self.history, reduce, edge_weight=edge_weight, halo=self.halo,
            history_dropout=self.history_dropout, seed=self.seed, residual=residual, residual_weight=residual_weight,
        )  # fmt: skip

    def _static_rows(self, reduce: Reduce, edge_weight: Tensor | None) -> Tensor | None:
        is_of_graph = edge_weight is None or edge_weight is self.batch.edge_weight
        # a handle of another batch has other rows
        if not isinstance(self.x, Features) or self.x.node_ids is not self.batch.node_ids:
            return None
        if not is_of_graph or self.halo == "drop" or not self.batch.has_all_edges:
            return None
        return self.x.static_rows(reduce, edge_weight is not None)

    def transform_then_aggregate(
        self, transform: Callable[[Tensor], Tensor], reduce: Reduce, edge_weight: Tensor | None = None
    ) -> Tensor:
        """The same of `transform(row)` for every row, each transformed once."""
        return functional.aggregate(
            transform(self.rows()), self.batch, reduce=reduce, edge_weight=edge_weight, halo=self.halo
        )

    def rows(self) -> Any:
        """In-batch rows, then halo rows unless they are left out; a tensor, or the sparse rows that came."""
        if self.halo == "drop":
            return self.in_batch()
        if isinstance(self.x, Features):
            return self.x.rows()
        if self.history is None or self.batch.num_halo == 0:
            return self.x
        halo = functional.halo_rows(self.history, self.batch, self.x.dtype, self.history_dropout, self.seed)
        return torch.cat([self.x, halo])

    def is_cheaper_transformed(self, in_channels: int, out_channels: int) -> bool:
        """Whether transforming rows before they are gathered moves fewer values than gathering them first.

        Gathering first reads one input row an edge; transforming first reads and writes every distinct row once, then
        reads one output row an edge. Halo rows read in place are never copied for it: gathering them straight from the
        table, whose rows stay in the cache, is several times faster than any saving.
        """
        if isinstance(self.x, SparseRows):
            return True
        if self.history is not None or isinstance(self.x, Features):
            return False
        rows, num_edges = self.x.size(0), self.batch.num_edges
        return rows * (in_channels + out_channels) + num_edges * out_channels < num_edges * in_channels

    def in_batch(self) -> Any:
        """In-batch rows [B, F]."""
        return self.x.in_batch() if isinstance(self.x, Features) else in_batch_rows(self.x, self.batch)


class HistoryLayer(nn.Module, ReadsHistory):
    """Base of the layers that can read their halo rows from a history.

    A layer is called once in a forward: a second call would push its rows over those of the first.

    Args:
        input_dropout: drops features of in-batch and halo rows alike, after in-batch rows are pushed: a history holds
            rows as they were before dropout. `F.dropout` in front of a layer would store dropped rows.
        halo: "drop" leaves halo neighbours out (Cluster-GCN).
    """

    def __init__(self, input_dropout: float = 0.0, halo: Halo = "read") -> None:
        super().__init__()
        check_probability("input_dropout", input_dropout)
        check_halo(halo)
        self.input_dropout = input_dropout
        self.halo: Halo = halo
        self.history: HistoryStore | None = None

    @property
    def static_input(self) -> StaticInput | None:
        """What the layer reads of features that never change; None if it transforms rows before it aggregates."""
        return None

    @property
    def lipschitz(self) -> Lipschitz | None:
        """How far its output moves at most when its input rows do, in `eval()` mode; None if that is not known."""
        return None

    def read(self, x: Rows, batch: Batch) -> Source:
        """Pushes in-batch rows to the history while training, and says where all rows are read.

        Args:
            x: [B + H, F], dense or sparse, [B, F] or `batch.features`.
            batch: the plan of the step.
        """
        self._check(x, batch)
        p = self.input_dropout if self.training else 0.0
        if isinstance(x, Features):
            if p == 0.0:
                return Source(x, batch, self.halo)
            seed = functional.draw_seed(batch.device)
            rows = functional.dropout(x.in_batch(), batch, p, seed)
            return Source(rows, batch, self.halo, x.halo(), p, seed)
        history = None
        if isinstance(x, Tensor) and self.history is not None and x.size(0) == batch.num_nodes:
            history = self.history.exchange(x, batch, push=self.training, read=self.halo == "read")
        if p == 0.0:
            return Source(x, batch, self.halo, history)
        seed = functional.draw_seed(batch.device)
        return Source(functional.dropout(x, batch, p, seed), batch, self.halo, history, p, seed)

    def _check(self, x: Any, batch: Batch) -> None:
        # before anything is pushed
        if not isinstance(batch, Batch):
            raise TypeError(f"batch must be a Batch of a ClusterLoader, got {type(batch).__name__}")
        name, rows = type(self).__name__, x.table if isinstance(x, Features) else x
        width: int | None = getattr(self, "in_channels", None)
        if not isinstance(rows, (Tensor, SparseRows)) or rows.dtype not in FLOATS:
            got = rows.dtype if isinstance(rows, (Tensor, SparseRows)) else type(rows).__name__
            raise TypeError(f"x must be a floating tensor or batch.features, got {got}")
        if rows.dim() != 2 or (width is not None and rows.size(1) != width):
            raise ValueError(f"x must have shape [rows, {width or 'features'}] for {name}, got {list(rows.shape)}")
        if x.device != batch.device:
            raise ValueError(f"x is on {x.device} but the batch is on {batch.device}: move one with .to()")
        parameter = next(self.parameters(), None)
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"x is on {x.device} but {name}'s parameters are on {parameter.device}")
        if parameter is None or parameter.dtype == rows.dtype or torch.is_autocast_enabled(rows.device.type):
            return
        raise TypeError(
            f"x is {rows.dtype} but {name}'s parameters are {parameter.dtype}: cast x, or use torch.autocast"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # a history follows its layer to another device, and never to another dtype
        super()._apply(fn, recurse)
        parameter = next(self.parameters(), None)
        for store in (self.history, self.gradient_history):
            if store is not None:
                # a layer without parameters goes where one would have gone
                moved = fn(torch.empty(0, device=store.device)) if parameter is None else parameter
                store.to(moved.device)
        return self


def check_channels(name: str, value: Any) -> int:
    """`value` if it is a positive int."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return value

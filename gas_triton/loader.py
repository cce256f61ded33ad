"""`ClusterLoader`: which clusters make a step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gas_triton.batch import Batch
from gas_triton.functional import SparseRows
from gas_triton.graph import Graph
from gas_triton.partition import Partition
from gas_triton.planner import Planner

if TYPE_CHECKING:
    from gas_triton.static import StaticTable


class ClusterLoader:
    """Batches of a few clusters each, with all their neighbours.

    Every epoch draws new groups of `batch_size` clusters, in an order given by the seed and the epoch. Groups that
    repeat (one cluster each, or `shuffle=False`) are planned once and kept.

    Args:
        graph: the graph in the order of `parts`, that is, after `parts.permute`.
        parts: the partition.
        batch_size: clusters of a batch.
        shuffle: draw new groups each epoch; otherwise consecutive clusters make a batch.
        seed: seed of the order.
        x: features [N, F], on any device; batches give them as `x` ([B + H, F]) and `features`. Sparse ones
            (`SparseRows`) are for models that begin with a linear layer or transform rows before they aggregate them.
        **node_tensors: tensors [N, ...] (`y`, `train_mask`, ...); batches give the in-batch rows under the same name.

    Raises:
        ValueError: a tensor without N rows or named like an attribute of `Batch`, a mask that is not [N], a graph that
            `parts` did not permute, or a `batch_size` below 1.

    The `epoch` attribute counts the epochs begun; set it to repeat one. `static` holds what `aggregate_features` made,
    by (reduce, weighted).
    """

    def __init__(
        self,
        graph: Graph,
        parts: Partition,
        batch_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        x: Tensor | SparseRows | None = None,
        **node_tensors: Tensor | None,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        if parts.perm.numel() != graph.num_nodes:
            raise ValueError(f"parts has {parts.perm.numel()} nodes but graph has {graph.num_nodes}")
        if graph.row_order != parts.graph.permuted_order(parts.perm) and not parts.is_contiguous:
            raise ValueError("graph is not in the order of parts: graph, x, ... = parts.permute(graph, x, ...)")
        tensors = {name: tensor for name, tensor in node_tensors.items() if tensor is not None}
        for name, tensor in {"x": x, **tensors}.items():
            if tensor is not None:
                _check_node_tensor(name, tensor, graph.num_nodes)
        taken = [name for name in tensors if name in dir(Batch) or name in Batch.__annotations__]
        if taken:
            raise ValueError(f"node tensors cannot be named {', '.join(taken)}: a batch has attributes of that name")
        x = None if x is None else x.contiguous()
        self.graph, self.parts = graph, parts
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0
        self.x, self.node_tensors = x, tensors
        self.static: dict[tuple[str, bool], StaticTable] = {}
        # found by sorting all edges, once: not in the first step
        _ = graph.is_symmetric
        self._planner = Planner(graph)
        self._halo_planner: Planner | None = None
        self._ptr = parts.ptr.tolist()
        self._edge_ptr = graph.rowptr[parts.ptr.to(graph.device)].tolist()
        self._planned: dict[tuple[int, ...], Batch] = {}
        # plans made so far
        self.num_planned = 0

    def __len__(self) -> int:
        return -(-self.parts.num_parts // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.parts.num_parts, generator=generator).tolist()
        else:
            order = list(range(self.parts.num_parts))
        self.epoch += 1
        for start in range(0, len(order), self.batch_size):
            yield self.batch(order[start : start + self.batch_size])

    def batch(self, clusters: list[int]) -> Batch:
        """The batch of the given clusters."""
        key = tuple(clusters)
        if key in self._planned:
            return self._with_tensors(self._planned[key])
        if not clusters or len(set(clusters)) != len(clusters):
            raise ValueError(f"clusters must be different and at least one, got {list(clusters)}")
        for cluster in clusters:
            if not 0 <= cluster < self.parts.num_parts:
                raise ValueError(f"clusters must be in [0, {self.parts.num_parts}), got {cluster}")
        spans = [(self._ptr[cluster], self._ptr[cluster + 1]) for cluster in clusters]
        edges = [(self._edge_ptr[cluster], self._edge_ptr[cluster + 1]) for cluster in clusters]
        self.num_planned += 1
        batch = self._planner.plan(clusters, spans, edges)
        if not self.shuffle or self.batch_size == 1:
            self._planned[key] = batch
        return self._with_tensors(batch)

    def halo_batch(self, batch: Batch, mutual: bool = True) -> Batch:
        """The halo rows of a batch as a batch of their own, whose halo are the rows of `batch`; made once for a plan.

        Its edges are those of the graph into these rows from rows of either: its rows are incomplete.

        Args:
            batch: a batch of this loader.
            mutual: whether edges among the halo rows are kept.

        Raises:
            ValueError: a batch of another graph.
        """
        ours = self.graph.row_order
        if batch.row_order != ours:
            raise ValueError(f"batch is of a graph in the order {batch.row_order}, the loader's is {ours}")

        def plan() -> Batch:
            if self._halo_planner is None:
                # with a map of its own: on a GPU the other one may be in use by the stream that plans ahead
                self._halo_planner = Planner(self.graph)
            return self._halo_planner.around(batch.to(self.graph.device), mutual).to(batch.device)

        return batch._once(f"halo batch, mutual={mutual}", plan)

    def full(self) -> Batch:
        """The whole graph as one batch: no halo, so the same model trains full-batch."""
        if (-1,) not in self._planned:
            self._planned[(-1,)] = self._planner.full()
        return self._with_tensors(self._planned[(-1,)])

    def in_order(self) -> Iterator[Batch]:
        """Batches of consecutive clusters, whatever `shuffle` says; does not count as an epoch."""
        for start in range(0, self.parts.num_parts, self.batch_size):
            yield self.batch(list(range(start, min(start + self.batch_size, self.parts.num_parts))))

    def aggregate_features(
        self,
        reduce: str = "sum",
        weighted: bool = True,
        tier: str = "device",
        dtype: torch.dtype | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        own_rows: bool = True,
    ) -> StaticTable:
        """Aggregates x over the neighbours of every node, once, so that the first layer needs no halo.

        Features that never change give the same aggregate in every step. In batches made from now on, a layer that is
        given `batch.features` reads its B rows of the table instead of its neighbours (GCNConv: "sum"; GINConv: "sum"
        with `weighted=False`; SAGEConv: its `aggr` with `weighted=False`), and `batch.features` works with an x on
        another device too. Layers that drop features of their input or leave the halo out, batches without some of
        their edges and other reductions read the neighbours as before.

        The table is computed cluster by cluster in the memory of one batch, in the order of the graph's edges: it has
        the bits of a full-batch step. An interrupted call leaves the loader as it was.

        Args:
            reduce: "sum", "mean", "max" or "min".
            weighted: whether edges count by the graph's weights; without weights both are the same table.
            tier: where the table lives. "device": with the graph. "pinned": in host memory, page-locked for a GPU.
                "file": in a temporary file. "auto": the first of these that has room.
            dtype: storage dtype; rows are widened when they are read. That of x if None.
            path: folder of the "file" tier, made if missing; $TMPDIR or /var/tmp if None.
            own_rows: whether batches on another device than x fetch their B rows of it ahead too, for layers that read
                them beside the aggregate (SAGEConv and GINConv do, GCNConv does not).

        Returns:
            The table, which `static` keeps.

        Raises:
            TypeError: x is not a floating [N, F].
            ValueError: no x, an x with gradient, an unknown name, or a dtype too narrow for the aggregate. Later, by
                the batches: x was changed in place, or `loader.x` set, after this call.
            MemoryError: more than the host has free.
            OSError: the file cannot be made.
        """
        # the histories, whose memories this uses, import the loader
        from gas_triton.static import make_table

        if isinstance(self.x, SparseRows):
            raise TypeError("x must be dense to be aggregated once, got SparseRows: x.to_dense()")
        groups = range(0, self.parts.num_parts, self.batch_size)
        ends = [min(first + self.batch_size, self.parts.num_parts) for first in groups]
        ranges = [
            (self._ptr[first], self._ptr[last], self._edge_ptr[first], self._edge_ptr[last])
            for first, last in zip(groups, ends, strict=True)
        ]
        table = make_table(
            self.graph, self.x, ranges, reduce=reduce, weighted=weighted, tier=tier, dtype=dtype, path=path,
            own_rows=own_rows, hub_edges=self._planner.hub_edges,
        )  # fmt: skip
        self.static[table.reduce, table.weighted] = table
        return table

    def _with_tensors(self, planned: Batch) -> Batch:
        for table in self.static.values():
            table.check(self.x)
        return planned.with_tensors(self.x, self.node_tensors, self.static)

    def __repr__(self) -> str:
        return (
            f"ClusterLoader(num_batches={len(self)}, batch_size={self.batch_size}, num_parts={self.parts.num_parts}, "
            f"shuffle={self.shuffle}, {self.graph!r})"
        )


def _check_node_tensor(name: str, tensor: Any, num_nodes: int) -> None:
    if not isinstance(tensor, (Tensor, SparseRows) if name == "x" else Tensor):
        raise TypeError(f"{name} must be a tensor with one row for each node, got {type(tensor).__name__}")
    if tensor.dim() == 0 or tensor.size(0) != num_nodes:
        raise ValueError(f"{name} must have {num_nodes} rows, one for each node, got shape {list(tensor.shape)}")
    if name.endswith("mask") and tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor [{num_nodes}], got {tensor.dtype}")
    if name.endswith("mask") and tensor.dim() != 1:
        raise ValueError(
            f"{name} is a mask and must have shape [{num_nodes}], got {list(tensor.shape)}: pick one split"
        )

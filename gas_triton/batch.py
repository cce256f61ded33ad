"""The plan of one step: which rows are computed, and where each of their neighbours is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gas_triton.csr import Csr, Transposed, find_hubs, sample_edges, select_edges, transpose_csr
from gas_triton.functional import Features, SparseRows
from gas_triton.functional.dropout import check_probability
from gas_triton.graph import Graph
from gas_triton.kernels.aggregate import HUB_EDGES
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.transpose import transpose

if TYPE_CHECKING:
    from gas_triton.static import StaticTable

Ranges = Sequence[tuple[int, int]]
# The rows of sparse features among what is made once, with their table.
_SPARSE_ROWS = "sparse rows"
# What is made once, and does not depend on the edges.
_OF_ROWS = ("all_ids", "host_halo_ids", _SPARSE_ROWS)

# The name of the in-batch rows of x among a batch's slices.
_OWN_ROWS = "x of in-batch rows"


class Batch:
    """One step's rows, their edges in two blocks, and the node tensors of its rows.

    `inner` holds the in-batch neighbours of each row under local ids, `outer` the halo neighbours under graph ids:
    `out = inner @ x + outer @ history`.

    Attributes:
        num_nodes: B, in-batch rows.
        num_halo: H, distinct out-of-batch neighbours.
        num_edges: edges into the B rows.
        graph_nodes: N, rows of the graph and of every history.
        node_ids: int64 [B], graph ids of the in-batch rows.
        halo_ids: int64 [H], graph ids of the halo rows, ascending.
        inner: CSR [B x B], columns are local rows.
        outer: CSR [B x N], columns are graph ids.
        outer_slot: the same edges' columns as places in `halo_ids`.
        edge_weight: the graph's weights [num_edges], inner edges first, or None. An own tensor of this shape and order
            can be given to the layers instead, with gradient; `edge_ids` are the edges' places in the graph.
        edge_attr: the graph's edge features [num_edges, ...] in the same order, or None.
        edge_index: int64 [2, num_edges] in the same order, PyG's layout: sources are rows of [x; halo rows].
        clusters: ids of the clusters in the batch.
        spans: int64 [clusters, 2] on the CPU, the range of graph ids of each.
        has_all_edges: whether the batch has every edge into its rows, which `drop_edges` ends: only then aggregated
            features are those of its rows.

    Every node tensor given to the loader is an attribute, sliced to the B rows; `x` has B + H rows.
    """

    num_nodes: int
    num_halo: int
    num_edges: int
    graph_nodes: int
    node_ids: Tensor
    halo_ids: Tensor
    inner: Csr
    outer: Csr
    outer_slot: Tensor
    edge_weight: Tensor | None
    clusters: list[int]
    spans: Tensor
    row_order: str
    normalization: str | None
    self_loop_weight: float | None
    symmetric: bool
    hub_edges: int
    hubs: list[Tensor]
    has_all_edges: bool

    def __init__(
        self,
        *,
        graph: Graph,
        clusters: Sequence[int],
        spans: Tensor,
        node_ids: Tensor,
        halo_ids: Tensor,
        inner: Csr,
        outer: Csr,
        outer_slot: Tensor,
        edge_weight: Tensor | None,
        edge_ids: Callable[[], Tensor],
        places: Sequence[Tensor] = (),
        hub_edges: int = HUB_EDGES,
    ) -> None:
        self.clusters, self.spans = list(clusters), spans
        self.num_nodes, self.num_halo = node_ids.numel(), halo_ids.numel()
        self.num_edges = inner.num_edges + outer.num_edges
        self.graph_nodes, self.row_order = graph.num_nodes, graph.row_order
        self.normalization, self.self_loop_weight = graph.normalization, graph.self_loop_weight
        self.symmetric = graph.is_symmetric
        self.node_ids, self.halo_ids = node_ids, halo_ids
        self.inner, self.outer, self.outer_slot = inner, outer, outer_slot
        self.edge_weight, self._edge_attr = edge_weight, graph.edge_attr
        # rows of it, and whose
        self._edge_rows: tuple[Callable[[], Tensor], Tensor] | None = None
        self.hub_edges = hub_edges
        rowptr = inner.rowptr + outer.rowptr
        # worth a look while planning, where the host waits anyway: without hubs a layer is one launch instead of three
        has_hubs = self.num_edges > hub_edges and int(rowptr.diff().max()) > hub_edges
        self.hubs = find_hubs(rowptr, self.num_edges, hub_edges) if has_hubs else []
        # what `edge_ids` is made from, when it is asked for
        self._edge_ids, self._places = edge_ids, places
        self.has_all_edges = True
        self._static: Mapping[tuple[str, bool], StaticTable] = {}
        self._node_tensors: dict[str, Tensor] = {}
        self._x_table: Tensor | SparseRows | None = None
        self._sliced: dict[str, Any] = {}
        self._made: dict[str, Any] = {}

    def with_tensors(
        self,
        x: Tensor | SparseRows | None,
        node_tensors: dict[str, Tensor],
        static: Mapping[tuple[str, bool], StaticTable] | None = None,
    ) -> Batch:
        """The same plan with node tensors [N, ...] to slice; slices live as long as the result, the plan longer."""
        batch = copy.copy(self)
        batch._x_table, batch._node_tensors, batch._sliced = x, node_tensors, {}
        batch._static = dict(static or {})
        return batch

    def drop_edges(self, p: float, seed: int | None = None) -> Batch:
        """The same rows with each edge left out with probability `p`: edge dropout, for one training step.

        The weights of edges that stay are scaled by 1 / (1 - p), so that a weighted sum keeps its expectation; edges
        without weights are only left out (both as in PyGAS). `edge_ids` says which edges stayed. No row goes: halo rows
        that no edge reads any more are still looked up, so that rows fetched ahead for the batch are those of the
        result too. The host does not wait for the device.

        Args:
            p: probability in [0, 1); with 0 the result is the batch itself.
            seed: names the draw, which also depends on the kind of device; drawn from torch's generator of the CPU if
                None.
        """
        check_probability("p", p)
        if p == 0.0:
            return self
        if seed is None:
            seed = int(torch.randint(0, 2**62, (1,)))
        counts = [self.inner.num_edges, self.outer.num_edges]
        of_inner, of_outer = sample_edges(counts, p, seed, self.device, self.inner.rowptr.dtype)
        kept = torch.cat([of_inner, of_outer + counts[0]])
        batch = copy.copy(self)
        batch.inner, batch.outer = select_edges(self.inner, of_inner), select_edges(self.outer, of_outer)
        batch.outer_slot = self.outer_slot.index_select(0, of_outer)
        batch.num_edges, batch.symmetric, batch.has_all_edges = kept.numel(), False, False
        if self.edge_weight is not None:
            batch.edge_weight = self.edge_weight.index_select(0, kept) / (1.0 - p)
        # a row that was no hub has not become one
        rowptr = batch.inner.rowptr + batch.outer.rowptr
        batch.hubs = find_hubs(rowptr, batch.num_edges, self.hub_edges) if self.hubs else []
        batch._edge_ids, batch._places = lambda: self.edge_ids.index_select(0, kept), (*self._places, kept)
        batch._made = {name: made for name, made in self._made.items() if name in _OF_ROWS}
        return batch

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    # --- node tensors -----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        tensors = self.__dict__.get("_node_tensors", {})
        if name in ("x", "features", "own_rows"):
            # where one of these properties raises, Python asks here
            raise AttributeError(f"batch has no {name}: give the loader x=features")
        if name not in tensors:
            known = ", ".join([*(["x"] if self.__dict__.get("_x_table") is not None else []), *tensors]) or "none"
            raise AttributeError(f"batch has no '{name}'; node tensors given to the loader: {known}")
        return self._slice(name, tensors[name], self.node_ids)

    def _slice(self, name: str, tensor: Tensor, ids: Tensor) -> Tensor:
        if name not in self._sliced:
            self._sliced[name] = self._gather(tensor, ids)
        return self._sliced[name]

    def _slice_spans(self, name: str, table: Any) -> Tensor:
        """In-batch rows of a table, which lie together: a view of it where the batch is one span on its device."""
        if name in self._sliced:
            return self._sliced[name]
        if torch.compiler.is_compiling():
            # a graph must not be made for these spans
            return self._slice(name, table, self.node_ids)
        parts = [table[first:last] for first, last in self.spans.tolist()]
        if table.device == self.device:
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            rows = torch.empty((self.num_nodes, *table.shape[1:]), dtype=table.dtype, device=self.device)
            is_pageable = self.device.type == "cuda" and table.device.type == "cpu" and not table.is_pinned()
            for part, place in zip(parts, rows.split([len(part) for part in parts]), strict=True):
                # from pageable memory the copy would wait for the device
                place.copy_(part.pin_memory() if is_pageable else part, non_blocking=self.device.type == "cuda")
        self._sliced[name] = rows
        return rows

    @property
    def x(self) -> Tensor:
        """Features of the in-batch rows, then of the halo rows, [B + H, F]."""
        if self._x_table is None:
            raise AttributeError("x")
        if isinstance(self._x_table, SparseRows):
            return self._sparse_rows(self._x_table)
        return self._slice("x", self._x_table, self.all_ids)

    def _sparse_rows(self, table: SparseRows) -> Any:
        """Rows of a sparse table, kept with the plan: their transpose, which a gradient needs, is made once."""
        if "x" in self._sliced:
            return self._sliced["x"]
        made = self._made.get(_SPARSE_ROWS)
        if made is None or made[0] is not table:
            made = self._made[_SPARSE_ROWS] = table, self._gather(table, self.all_ids)
        return made[1]

    @property
    def features(self) -> Features:
        """A handle on the full feature table, read in place by the layers, and on its aggregated rows.

        Sparse features are given as `x`: no kernel reads them in place.

        Raises:
            ValueError: the table is on another device than the batch, and the loader has no aggregated features; or it
                was changed after they were made.
        """
        if self._x_table is None:
            raise AttributeError("features")
        if isinstance(self._x_table, SparseRows):
            rows: Any = self.x
            return rows
        if not self._static and self._x_table.device != self.device:
            raise ValueError(
                f"batch.features reads x in place, but x is on {self._x_table.device} and the batch on {self.device}: "
                "move x there, use batch.x, or call loader.aggregate_features"
            )
        if not torch.compiler.is_compiling():
            for static in self._static.values():
                static.check(self._x_table)
        return Features(self._x_table, self.node_ids, self.halo_ids, self)

    @property
    def own_rows(self) -> Tensor:
        """Features of the in-batch rows, [B, F]; not to be written to."""
        if self._x_table is None:
            raise AttributeError("own_rows")
        if "x" in self._sliced:
            return self._sliced["x"][: self.num_nodes]
        if isinstance(self._x_table, SparseRows):
            return self.x[: self.num_nodes]
        return self._slice_spans(_OWN_ROWS, self._x_table)

    def static_rows(self, reduce: str, weighted: bool) -> Tensor | None:
        """Aggregated features of the in-batch rows in x's dtype, [B, F], not to be written to.

        None if the loader does not have them, or the batch not all of its edges.

        Args:
            reduce: "sum", "mean", "max" or "min".
            weighted: whether edges count by the graph's weights.
        """
        static = self._static.get((reduce, weighted and self.edge_weight is not None))
        if static is None or not self.has_all_edges or self._x_table is None:
            return None
        return self._slice_spans(_static_name(static), static.rows).to(self._x_table.dtype)

    @property
    def all_ids(self) -> Tensor:
        """Graph ids of the in-batch rows, then of the halo rows, int64 [B + H]."""
        if self.num_halo == 0:
            return self.node_ids
        return self._once("all_ids", lambda: torch.cat([self.node_ids, self.halo_ids]))

    @property
    def edge_ids(self) -> Tensor:
        """Places of the batch's edges in the graph's `col`, int64 [num_edges], inner edges first."""
        return self._once("edge_ids", self._edge_ids)

    # --- views of the edges that the layers ask for -------------------------------------------------------------------

    @property
    def edge_attr(self) -> Tensor | None:
        """The graph's edge features, [num_edges, ...] in the order of `edge_weight`, or None."""
        if self._edge_attr is None:
            return None
        # a copy of the batch with other edges has other rows
        if self._edge_rows is None or self._edge_rows[0] is not self._edge_ids:
            self._edge_rows = self._edge_ids, self._gather(self._edge_attr, self.edge_ids)
        return self._edge_rows[1]

    def _gather(self, table: Any, ids: Tensor) -> Any:
        rows = table.index_select(0, ids.to(table.device))
        if self.device.type == "cuda" and rows.device.type == "cpu":
            # from pageable memory the copy would wait for the device
            rows = rows.pin_memory()
        # to the host the copy has to be over when it is read
        return rows.to(self.device, non_blocking=self.device.type == "cuda")

    @property
    def edge_index(self) -> Tensor:
        """Sources above targets, int64 [2, num_edges] in the order of `edge_weight`.

        Sources are rows of [x; halo rows], so a halo row k of `halo_ids` is B + k; targets are in-batch rows.
        """

        def make() -> Tensor:
            source = torch.cat([self.inner.col, self.outer_joint_col]).long()
            return torch.stack([source, torch.cat([row_of_edge(*self.inner), row_of_edge(*self.outer)])])

        return self._once("edge_index", make)

    @property
    def inner_graph_col(self) -> Tensor:
        """Columns of `inner` as graph ids."""
        return self._once("inner_graph_col", lambda: self.node_ids.to(self.inner.col.dtype)[self.inner.col])

    @property
    def outer_joint_col(self) -> Tensor:
        """Columns of `outer` as rows of [x; halo]."""
        return self._once("outer_joint_col", lambda: self.outer_slot + self.num_nodes)

    def joint(self, has_halo: bool = True) -> Transposed:
        """All edges as one CSR [B x (B + H)], inner edges of a row first; `edge_id` gives the order of `edge_weight`.

        Args:
            has_halo: False leaves the outer edges out, and gives `inner` itself.
        """
        if not has_halo or self.num_halo == 0:
            return Transposed(*self.inner, None)
        return self._once("joint", self._join)

    def _join(self) -> Transposed:
        inner, outer = self.inner, self.outer
        place = torch.arange(self.num_edges, device=self.device)
        place_of_inner = place[: inner.num_edges] + outer.rowptr[row_of_edge(*inner)]
        place_of_outer = place[: outer.num_edges] + inner.rowptr[row_of_edge(*outer) + 1]
        edge_id = torch.empty_like(place)
        edge_id[torch.cat([place_of_inner, place_of_outer])] = place
        col = torch.cat([inner.col, self.outer_joint_col]).index_select(0, edge_id)
        return Transposed(inner.rowptr + outer.rowptr, col, edge_id)

    def joint_hubs(self, has_halo: bool = True) -> list[Tensor]:
        """The hubs of `joint`."""
        if has_halo or self.num_halo == 0 or not self.hubs:
            return self.hubs
        return self._once("inner hubs", lambda: find_hubs(self.inner.rowptr, self.inner.num_edges, self.hub_edges))

    def joint_transposed(self, has_halo: bool = True) -> tuple[Transposed, list[Tensor]]:
        """The transpose of `joint`, whose `edge_id` has the order of `edge_weight` too, and its hubs."""
        if not has_halo or self.num_halo == 0:
            return self.transposed_inner(shared=False)
        return self.transposed_joint()

    def transposed_inner(self, shared: bool) -> tuple[Transposed, list[Tensor]]:
        """The transpose of `inner` and its hubs; `shared` gives the arrays of a symmetric `inner` themselves."""
        if shared:
            transposed = Transposed(*self.inner, None)
            return self._once("inner shared", lambda: self._with_hubs(transposed) if self.hubs else (transposed, []))
        return self._once("inner transposed", lambda: self._with_hubs(transpose_csr(self.inner, self.num_nodes)))

    def transposed_joint(self) -> tuple[Transposed, list[Tensor]]:
        """The transpose of [inner | outer], [B + H x B], and its hubs."""

        def make() -> tuple[Transposed, list[Tensor]]:
            row = torch.cat([row_of_edge(*self.inner), row_of_edge(*self.outer)])
            col = torch.cat([self.inner.col, self.outer_joint_col])
            return self._with_hubs(Transposed(*transpose(row, col, self.num_nodes + self.num_halo)))

        return self._once("joint transposed", make)

    def _with_hubs(self, transposed: Transposed) -> tuple[Transposed, list[Tensor]]:
        return transposed, find_hubs(transposed.rowptr, transposed.col.numel(), self.hub_edges)

    # --- where it is --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.node_ids.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch, its plan and its sliced node tensors on another device (itself, if it is there already)."""
        # "cuda" names the current one of several
        if torch.empty(0, device=device).device == self.device:
            return self
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked host memory."""
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Says that a stream reads the batch, so that its memory is not given away while it does."""
        plan = [self.node_ids, self.halo_ids, *self.inner, *self.outer, self.outer_slot, *self.hubs, *self._places]
        sparse = self._made.get(_SPARSE_ROWS, (None, None))[1]
        for tensor in (*plan, self.edge_weight, self._made.get("all_ids"), sparse, *self._sliced.values()):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(stream)
        if self._edge_rows is not None and self._edge_rows[1].is_cuda:
            self._edge_rows[1].record_stream(stream)

    @property
    def host_halo_ids(self) -> Tensor:
        """`halo_ids` on the CPU."""
        return self._once("host_halo_ids", self.halo_ids.cpu)

    def load(self) -> Batch:
        """Brings node tensors and edge features that live on another device to the batch's, before their first use."""
        if self._edge_attr is not None and self._edge_attr.device != self.device:
            _ = self.edge_attr
        for name, table in self._tables().items():
            if table.device != self.device:
                self._read(name)
        return self

    def _tables(self) -> dict[str, Any]:
        """The tables that a step reads, by the name of their slice."""
        static = self._static.values()
        tables: dict[str, Any] = self._node_tensors | {_static_name(table): table.rows for table in static}
        if self._x_table is None:
            return tables
        if not static or "x" in self._sliced:
            tables["x"] = self._x_table
        elif any(table.own_rows for table in static):
            tables[_OWN_ROWS] = self._x_table
        return tables

    def _read(self, name: str) -> Tensor:
        if name in self._node_tensors or name == "x":
            return getattr(self, name)
        return self._slice_spans(name, self._tables()[name])

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        # what lives elsewhere, perhaps where the batch goes, is sliced there
        sliced = {
            name: move(self._read(name))
            for name, table in self._tables().items()
            if name in self._sliced or table.device == self.device
        }
        edge_ids = self._edge_ids
        batch = copy.copy(self)
        batch._sliced, batch._made = sliced, {}
        batch._edge_ids, batch._places = lambda: move(edge_ids()), ()
        batch.node_ids, batch.halo_ids = move(self.node_ids), move(self.halo_ids)
        batch.inner, batch.outer = Csr(*map(move, self.inner)), Csr(*map(move, self.outer))
        batch.outer_slot = move(self.outer_slot)
        batch.edge_weight = None if self.edge_weight is None else move(self.edge_weight)
        batch.hubs = [move(t) for t in self.hubs]
        edge_attr = self.edge_attr
        batch._edge_rows = None if edge_attr is None else (batch._edge_ids, move(edge_attr))
        return batch

    def __repr__(self) -> str:
        return (
            f"Batch(num_nodes={self.num_nodes}, num_halo={self.num_halo}, num_edges={self.num_edges}, "
            f"clusters={len(self.clusters)}, device={self.device})"
        )


def _static_name(static: StaticTable) -> str:
    return f"{static.reduce} of x{', weighted' if static.weighted else ''}"

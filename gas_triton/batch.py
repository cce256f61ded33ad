"""The plan of one step: which rows are computed, and where each of their neighbours is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gas_triton.csr import Csr, Transposed, find_hubs, transpose_csr
from gas_triton.functional import Features
from gas_triton.graph import Graph
from gas_triton.kernels.aggregate import HUB_EDGES
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.transpose import transpose

Ranges = Sequence[tuple[int, int]]


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
        clusters: ids of the clusters in the batch.
        spans: int64 [clusters, 2] on the CPU, the range of graph ids of each.

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
        self.edge_weight = edge_weight
        self.hub_edges = hub_edges
        rowptr = inner.rowptr + outer.rowptr
        # worth a look while planning, where the host waits anyway: without hubs a layer is one launch instead of three
        has_hubs = self.num_edges > hub_edges and int(rowptr.diff().max()) > hub_edges
        self.hubs = find_hubs(rowptr, self.num_edges, hub_edges) if has_hubs else []
        # what `edge_ids` is made from, when it is asked for
        self._edge_ids, self._places = edge_ids, places
        self._node_tensors: dict[str, Tensor] = {}
        self._x_table: Tensor | None = None
        self._sliced: dict[str, Tensor] = {}
        self._made: dict[str, Any] = {}

    def with_tensors(self, x: Tensor | None, node_tensors: dict[str, Tensor]) -> Batch:
        """The same plan with node tensors [N, ...] to slice; slices live as long as the result, the plan longer."""
        batch = copy.copy(self)
        batch._x_table, batch._node_tensors, batch._sliced = x, node_tensors, {}
        return batch

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    # --- node tensors -----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        tensors = self.__dict__.get("_node_tensors", {})
        if name in ("x", "features"):
            # where one of these properties raises, Python asks here
            raise AttributeError(f"batch has no {name}: give the loader x=features")
        if name not in tensors:
            known = ", ".join([*(["x"] if self.__dict__.get("_x_table") is not None else []), *tensors]) or "none"
            raise AttributeError(f"batch has no '{name}'; node tensors given to the loader: {known}")
        return self._slice(name, tensors[name], self.node_ids)

    def _slice(self, name: str, tensor: Tensor, ids: Tensor) -> Tensor:
        if name not in self._sliced:
            rows = tensor.index_select(0, ids.to(tensor.device))
            if self.device.type == "cuda" and rows.device.type == "cpu":
                # from pageable memory the copy would wait for the device
                rows = rows.pin_memory()
            # to the host the copy has to be over when it is read
            self._sliced[name] = rows.to(self.device, non_blocking=self.device.type == "cuda")
        return self._sliced[name]

    @property
    def x(self) -> Tensor:
        """Features of the in-batch rows, then of the halo rows, [B + H, F]."""
        if self._x_table is None:
            raise AttributeError("x")
        return self._slice("x", self._x_table, self.all_ids)

    @property
    def features(self) -> Features:
        """A handle on the full feature table, read in place by the layers.

        Raises:
            ValueError: the table is on another device than the batch.
        """
        if self._x_table is None:
            raise AttributeError("features")
        if self._x_table.device != self.device:
            raise ValueError(
                f"batch.features reads x in place, but x is on {self._x_table.device} and the batch on {self.device}: "
                "move x there, or use batch.x"
            )
        return Features(self._x_table, self.node_ids, self.halo_ids)

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
        for tensor in (*plan, self.edge_weight, self._made.get("all_ids"), *self._sliced.values()):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(stream)

    @property
    def host_halo_ids(self) -> Tensor:
        """`halo_ids` on the CPU."""
        return self._once("host_halo_ids", self.halo_ids.cpu)

    def load(self) -> Batch:
        """Brings node tensors that live on another device to the batch's, now instead of at their first use."""
        for name, table in self._tables().items():
            if table.device != self.device:
                getattr(self, name)
        return self

    def _tables(self) -> dict[str, Tensor]:
        return {**self._node_tensors, **({} if self._x_table is None else {"x": self._x_table})}

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        # what lives elsewhere, perhaps where the batch goes, is sliced there
        sliced = {
            name: move(getattr(self, name))
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
        return batch

    def __repr__(self) -> str:
        return (
            f"Batch(num_nodes={self.num_nodes}, num_halo={self.num_halo}, num_edges={self.num_edges}, "
            f"clusters={len(self.clusters)}, device={self.device})"
        )


class Planner:
    """Makes the plan of a batch where the graph lives, in a fixed number of passes over the batch's edges.

    A map from node to local row (-1 outside the batch) is kept between plans and reset at the rows it touched, so
    nothing of size N is allocated or read for a batch.
    """

    def __init__(self, graph: Graph, hub_edges: int = HUB_EDGES) -> None:
        self.graph = graph
        self.hub_edges = hub_edges
        self._local = torch.full((graph.num_nodes,), -1, dtype=graph.col.dtype, device=graph.device)

    def full(self) -> Batch:
        """The whole graph as one batch."""
        graph = self.graph
        ids = torch.arange(graph.num_nodes, device=graph.device)
        empty = graph.col.new_empty(0)
        return Batch(
            graph=graph, clusters=[0], spans=torch.tensor([[0, graph.num_nodes]]), node_ids=ids, halo_ids=ids[:0],
            inner=graph.csr, outer=Csr(torch.zeros_like(graph.rowptr), empty), outer_slot=empty,
            edge_weight=graph.weight, edge_ids=lambda: torch.arange(graph.num_edges, device=graph.device),
            hub_edges=self.hub_edges,
        )  # fmt: skip

    def plan(self, clusters: Sequence[int], spans: Ranges, edges: Ranges) -> Batch:
        """The batch of the rows in `spans`, whose edges lie in `edges`, ranges of the graph's `col`."""
        try:
            return self._plan(clusters, spans, edges)
        except BaseException:
            # Ctrl-C or no memory: the next plan must find a clean map
            self._local.fill_(-1)
            raise

    def _plan(self, clusters: Sequence[int], spans: Ranges, edges: Ranges) -> Batch:
        graph = self.graph
        device, index = graph.device, graph.col.dtype
        node_ids = torch.cat([torch.arange(first, last, device=device) for first, last in spans])
        col = torch.cat([graph.col[first:last] for first, last in edges])
        rowptr = self._rowptr(spans, edges)
        num_nodes, num_edges = node_ids.numel(), col.numel()
        local, scratch = self._local, torch.arange(max(num_nodes, num_edges), dtype=index, device=device)
        start = 0
        for first, last in spans:
            local[first:last] = scratch[start : start + last - first]
            start += last - first

        local_col = local.index_select(0, col)
        is_inner = local_col >= 0
        inner_before = torch.zeros(num_edges + 1, dtype=index, device=device)
        torch.cumsum(is_inner, 0, dtype=index, out=inner_before[1:])
        inner_rowptr = inner_before.index_select(0, rowptr)
        inner_place, outer_place = is_inner.nonzero().squeeze(1), (~is_inner).nonzero().squeeze(1)
        inner_col = local_col.index_select(0, inner_place)
        outer_col = col.index_select(0, outer_place)
        halo_ids, outer_slot = self._halo(outer_col, scratch)
        for first, last in spans:
            local[first:last] = -1

        weight = None
        if graph.weight is not None:
            weight = torch.cat([graph.weight[first:last] for first, last in edges])
            weight = weight.index_select(0, torch.cat([inner_place, outer_place]))

        def edge_ids() -> Tensor:
            ids = torch.cat([torch.arange(first, last, device=device) for first, last in edges])
            return ids.index_select(0, torch.cat([inner_place, outer_place]))

        return Batch(
            graph=graph, clusters=clusters, spans=torch.tensor(spans), node_ids=node_ids, halo_ids=halo_ids,
            inner=Csr(inner_rowptr, inner_col), outer=Csr(rowptr - inner_rowptr, outer_col), outer_slot=outer_slot,
            edge_weight=weight, edge_ids=edge_ids, places=(inner_place, outer_place), hub_edges=self.hub_edges,
        )  # fmt: skip

    def _rowptr(self, spans: Ranges, edges: Ranges) -> Tensor:
        parts, before = [self.graph.rowptr.new_zeros(1)], 0
        for (first, last), (first_edge, last_edge) in zip(spans, edges, strict=True):
            parts.append(self.graph.rowptr[first + 1 : last + 1] + (before - first_edge))
            before += last_edge - first_edge
        return torch.cat(parts)

    def _halo(self, outer_col: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """(distinct ids ascending, place of each column among them); borrows the map, leaves -1 behind."""
        local, num_outer = self._local, outer_col.numel()
        if num_outer == 0:
            return outer_col.long(), outer_col
        # every column writes its edge and one edge of each column stays: those are the distinct ids, whichever won
        order, ids = scratch[:num_outer], outer_col.long()
        local[ids] = order
        is_representative = local.index_select(0, ids) == order
        halo_ids = ids[is_representative].sort().values
        local[halo_ids] = scratch[: halo_ids.numel()]
        outer_slot = local.index_select(0, ids)
        local[halo_ids] = -1
        return halo_ids, outer_slot

"""`Planner`: makes the plan of a batch where the graph lives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gas_triton.batch import Batch, Ranges
from gas_triton.csr import Csr
from gas_triton.graph import Graph
from gas_triton.kernels.aggregate import HUB_EDGES


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

    def around(self, batch: Batch, mutual: bool = True) -> Batch:
        """The halo rows of a batch as a batch of their own, whose halo are the rows of `batch` in their order.

        Edges from rows outside of both are left out: its rows are incomplete.

        Args:
            batch: a batch of this planner's graph, on its device.
            mutual: whether edges among the halo rows are kept.
        """
        try:
            return self._around(batch, mutual)
        except BaseException:
            self._local.fill_(-1)
            raise

    def _around(self, batch: Batch, mutual: bool) -> Batch:
        graph, local = self.graph, self._local
        device, index = graph.device, graph.col.dtype
        rows, num_nodes = batch.halo_ids, batch.num_nodes
        first = graph.rowptr.index_select(0, rows)
        rowptr = torch.zeros(rows.numel() + 1, dtype=graph.rowptr.dtype, device=device)
        torch.cumsum(graph.rowptr.index_select(0, rows + 1) - first, 0, dtype=rowptr.dtype, out=rowptr[1:])
        num_edges = int(rowptr[-1])
        before = (first - rowptr[:-1]).long()
        edges = torch.arange(num_edges, device=device)
        edges += torch.repeat_interleave(before, rowptr.diff().long(), output_size=num_edges)
        col = graph.col.index_select(0, edges)

        local[batch.all_ids] = torch.arange(num_nodes + rows.numel(), dtype=index, device=device)
        slot = local.index_select(0, col)
        local[batch.all_ids] = -1
        kinds = [slot >= num_nodes if mutual else torch.zeros_like(slot, dtype=torch.bool), slot >= 0]
        kinds[1] &= slot < num_nodes
        rowptrs, places = [], []
        for is_kind in kinds:
            edges_before = torch.zeros(num_edges + 1, dtype=rowptr.dtype, device=device)
            torch.cumsum(is_kind, 0, dtype=rowptr.dtype, out=edges_before[1:])
            rowptrs.append(edges_before.index_select(0, rowptr))
            places.append(is_kind.nonzero().squeeze(1))
        inner_place, outer_place = places
        kept = edges.index_select(0, torch.cat(places))
        return Batch(
            graph=graph, clusters=batch.clusters, spans=_ranges(rows.cpu()), node_ids=rows, halo_ids=batch.node_ids,
            inner=Csr(rowptrs[0], slot.index_select(0, inner_place) - num_nodes),
            outer=Csr(rowptrs[1], col.index_select(0, outer_place)), outer_slot=slot.index_select(0, outer_place),
            edge_weight=None if graph.weight is None else graph.weight.index_select(0, kept), edge_ids=lambda: kept,
            hub_edges=self.hub_edges,
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


def _ranges(ids: Tensor) -> Tensor:
    """The ranges [first, last) of consecutive ids, int64 [ranges, 2], of ascending ids."""
    if ids.numel() == 0:
        return ids.new_empty(0, 2)
    ends = (ids.diff() != 1).nonzero().squeeze(1)
    first = torch.cat([ids[:1], ids[ends + 1]])
    return torch.stack([first, torch.cat([ids[ends], ids[-1:]]) + 1], dim=1)

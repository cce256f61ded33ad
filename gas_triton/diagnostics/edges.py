"""Scalars along the edges of all batches: what reaches a row from in-batch rows, and what from histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gas_triton.graph import Graph
from gas_triton.nn.lipschitz import Lipschitz, Spread

# Hops from the border that are told apart at most; rows farther away are one group.
MOST_HOPS = 4


@dataclass(frozen=True)
class BatchEdges:
    """The edges of the graph, each row's being those of its batch, as places in a table of 2 N scalars.

    Attributes:
        place: int64 [E], the source of an in-batch edge, N + the source of a halo edge.
        rowptr: int64 [N + 1].
        weight: float32 [E], absolute values of the graph's weights, or None.
    """

    place: Tensor
    rowptr: Tensor
    weight: Tensor | None

    def spread(self, fresh: Tensor, stored: Tensor, how: Spread, weighted: bool = False) -> Tensor:
        """What each row's neighbours have, put together and not rounded down, float32 [N].

        Args:
            fresh: of in-batch rows, float32 [N].
            stored: of the same rows in the history, which halo edges read, float32 [N].
            how: see `Lipschitz`.
            weighted: whether weights count.
        """
        table = torch.cat([fresh, stored])[:, None]
        if how == "max":
            return self._reduce(table, "max")
        degree = self.rowptr.diff()
        total = self._reduce(table.square() if how == "root" else table, "sum", self.weight if weighted else None)
        # a float32 sum of so many terms is too small by no more than this
        total = total * (1.0 + (degree + 3) * 2.0**-23)
        if how == "root":
            return total.sqrt()
        return total / degree.clamp(min=1) if how == "mean" else total

    def _reduce(self, table: Tensor, mode: str, weight: Tensor | None = None) -> Tensor:
        return F.embedding_bag(
            self.place, table, self.rowptr, mode=mode, per_sample_weights=weight, include_last_offset=True
        )[:, 0]

    def moved(self, fresh: Tensor, stored: Tensor, lipschitz: Lipschitz) -> Tensor:
        """How far a layer's output rows move at most when the rows that it reads move that far, [N]."""
        neighbours = self.spread(fresh, stored, lipschitz.spread, lipschitz.weighted)
        if lipschitz.spread == "max":
            return lipschitz.neighbours * torch.maximum(fresh, neighbours)
        return lipschitz.own * fresh + lipschitz.neighbours * neighbours

    def hops_from_border(self, most: int) -> Tensor:
        """Hops between each row and the nearest row of its batch that reads a halo row, int64 [N].

        0 for a row that reads one itself. Counted along in-batch edges, in the direction in which messages run: that
        many layers later an error of a history reaches the row. `most` stands for more, and for rows that none reaches.
        """
        num_nodes, device = self.rowptr.numel() - 1, self.place.device
        hops = torch.full((num_nodes,), most, dtype=torch.int64, device=device)
        none = torch.zeros(num_nodes, device=device)
        fresh, stored = none, torch.ones_like(none)
        for hop in range(most):
            is_new = (self.spread(fresh, stored, "sum") > 0.0) & (hops == most)
            hops.masked_fill_(is_new, hop)
            # from now on along in-batch edges only
            fresh, stored = is_new.float(), none
        return hops


def batch_edges(graph: Graph, spans: Sequence[tuple[int, int]]) -> BatchEdges:
    """The edges of batches that are ranges of rows, in their order and without a gap."""
    rowptr, source = graph.rowptr.long(), graph.col.long()
    bounds = torch.tensor(spans, device=source.device)
    edges = rowptr[bounds[:, 1]] - rowptr[bounds[:, 0]]
    first, last = torch.repeat_interleave(bounds, edges, dim=0, output_size=graph.num_edges).unbind(1)
    place = source + graph.num_nodes * ((source < first) | (source >= last))
    return BatchEdges(place, rowptr, None if graph.weight is None else graph.weight.float().abs())

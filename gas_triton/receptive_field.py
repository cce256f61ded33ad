"""The receptive field of a step: the share of the data that its outputs depend on and that it uses."""

from __future__ import annotations

import torch
from torch import Tensor

from gas_triton.batch import Batch
from gas_triton.graph import Graph
from gas_triton.kernels.csr_rows import row_of_edge

__all__ = ["Share", "data_used", "share_of", "share_of_batch"]

# Of nodes, of edges, of the edges into the targets; None if not counted.
Share = tuple[float, float, float] | None


def data_used(graph: Graph, targets: Tensor, num_layers: int, read: Tensor | None = None) -> tuple[float, float, float]:
    """The share of what the outputs of a step depend on that the step really uses.

    The receptive field of a target in L layers holds the nodes at most L edges away, against their direction, and every
    edge into those at most L - 1 away. Of it a step uses the nodes and edges that are reached from the targets through
    edges that are read. An edge into a row that stands in a history counts as read: what is behind the row has
    gone into it, in an earlier step. So histories use all, as full-batch does. Self loops do not count.

    Args:
        graph: the whole graph.
        targets: bool [N], nodes whose loss the step takes.
        num_layers: L.
        read: bool [E], the graph's edges that are read, in its order; all if None.

    Returns:
        (distinct nodes used / nodes of the field, distinct edges used / edges of the field, edges into the targets
        that are read / edges into the targets). A field without edges is used in whole.
    """
    row, col = row_of_edge(graph.rowptr, graph.col), graph.col.long()
    is_edge = row != col

    def field(read: Tensor | None) -> tuple[int, int, int]:
        reached, edges, direct = targets.to(row.device), torch.zeros_like(is_edge), 0
        usable = is_edge if read is None else is_edge & read
        for hop in range(num_layers):
            edges = usable & reached[row]
            direct = int(edges.sum()) if hop == 0 else direct
            reached = reached.clone()
            reached[col[edges]] = True
        return int(reached.sum()), int(edges.sum()), direct

    used, whole = field(read), field(None)
    nodes, edges, direct = (part / all_ if all_ else 1.0 for part, all_ in zip(used, whole, strict=True))
    return nodes, edges, direct


def share_of(targets: Tensor, graph: Graph, num_layers: int, counts: bool, read: Tensor | None = None) -> Share:
    """`data_used`, None if it is not to be counted or a step has no target."""
    return data_used(graph, targets, num_layers, read) if counts and bool(targets.any()) else None


def share_of_batch(batch: Batch, graph: Graph, trained: Tensor, num_layers: int, has_halo: bool, counts: bool) -> Share:
    """The same for a batch of clusters, whose edges are counted in its plan."""
    if not counts:
        return None
    node_ids = batch.node_ids
    targets = torch.zeros(graph.num_nodes, dtype=torch.bool, device=graph.device)
    targets[node_ids] = trained.to(graph.device)[node_ids]
    read = torch.zeros(graph.num_edges, dtype=torch.bool, device=graph.device)
    read[batch.edge_ids if has_halo else batch.edge_ids[: batch.inner.num_edges]] = True
    if has_halo:
        is_own = torch.zeros(graph.num_nodes, dtype=torch.bool, device=graph.device)
        is_own[node_ids] = True
        read |= ~is_own[row_of_edge(graph.rowptr, graph.col)]
    return share_of(targets, graph, num_layers, counts, read)

"""A graph of any size with clusters, made blockwise on a device, without METIS and without sorting its edges.

Node i is place u = i mod S of cluster c = i // S, of C clusters, N = C S. It has edges in both directions with

    near   i + d mod N                for |d| = 1, ..., k
    far    M_l(c) S + p_l(u)          if u is in U_l and c < M_l(c)
           M_l(c) S + p_l^-1(u)       if p_l^-1(u) is in U_l and c > M_l(c)         for l = 0, ..., m - 1

M_l is round l of a round-robin tournament of the clusters in random order: a perfect matching, and no two clusters meet
twice. p_l is a random permutation of the places, U_l a random share of them. So near edges stay within a cluster but at
its ends, a cluster has far edges to m others wherever they are, degrees differ a little, and what a batch looks like
does not depend on N: it has the same edges, and the same halo but for clusters that meet inside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gas_triton import Graph

CPU = torch.device("cpu")
# Of all edges without loops, those to other clusters, about.
FAR_SHARE = 0.25
# Of the places, those that a round ties at most.
MOST_TIED = 0.8


def ring_of_clusters(
    num_clusters: int,
    cluster_nodes: int,
    degree: int,
    *,
    self_loops: bool = False,
    device: torch.device = CPU,
    seed: int = 0,
    block_nodes: int = 1 << 20,
) -> Graph:
    """The graph above.

    Args:
        num_clusters: C, even.
        cluster_nodes: S.
        degree: edges into a node on average, up to rounding and the few near and far edges that coincide.
        self_loops: whether every node has one, counted besides, as by `Graph.add_self_loops`.
        device: where it is made, and lives.
        seed: of the draws; the same graph on every device.
        block_nodes: rows made at once; temporaries take some hundred bytes each.

    Raises:
        ValueError: an odd number of clusters, too few or too small ones for the degree, or no degree.
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}")
    num_near, num_rounds, num_tied = _shares(cluster_nodes, degree)
    if num_clusters % 2 or num_clusters - 1 < num_rounds:
        raise ValueError(
            f"num_clusters must be even and more than {num_rounds} for degree {degree}, got {num_clusters}"
        )
    num_nodes = num_clusters * cluster_nodes
    if num_near >= num_nodes:
        raise ValueError(f"degree {degree} needs more than {num_near} nodes, got {num_nodes}")
    draw = torch.Generator().manual_seed(seed)
    partners = matchings(num_clusters, num_rounds, draw).to(device)
    # far[0] are places seen from the first cluster of a pair, far[1] from the second; -1 where there is no edge
    far = torch.stack([_places(cluster_nodes, num_tied, draw) for _ in range(num_rounds)], dim=1).to(device)
    reach = num_near // 2
    offsets = torch.tensor([d for d in range(-reach, reach + 1) if d or self_loops], dtype=torch.int64).to(device)

    most_edges = num_nodes * offsets.numel() + num_clusters * num_rounds * num_tied
    index = torch.int32 if max(num_nodes, most_edges) < 2**31 - 1 else torch.int64
    rowptr = torch.zeros(num_nodes + 1, dtype=index, device=device)
    col = torch.empty(most_edges, dtype=index, device=device)
    num_edges, step = 0, max(block_nodes // cluster_nodes, 1)
    place = torch.arange(cluster_nodes, device=device)
    for first in range(0, num_clusters, step):
        cluster = torch.arange(first, min(first + step, num_clusters), device=device)
        node = (cluster[:, None] * cluster_nodes + place).view(-1)
        columns = [torch.remainder(node[:, None] + offsets, num_nodes).to(index)]
        for partner, (of_first, of_second) in zip(partners, far.transpose(0, 1), strict=True):
            other = partner[cluster]
            there = torch.where((cluster < other)[:, None], of_first, of_second)
            # a column behind all others is none
            tied = torch.where(there < 0, num_nodes, other[:, None] * cluster_nodes + there)
            columns.append(tied.view(-1, 1).to(index))
        rows = torch.cat(columns, dim=1).sort(dim=1).values
        is_edge = rows < num_nodes
        is_edge[:, 1:] &= rows[:, 1:] != rows[:, :-1]
        rowptr[1 + first * cluster_nodes :][: node.numel()] = is_edge.sum(1)
        found = rows[is_edge]
        col[num_edges : num_edges + found.numel()] = found
        num_edges += found.numel()
    rowptr.cumsum_(0, dtype=index)
    graph = Graph.from_csr(rowptr, col[:num_edges], symmetric=True)
    graph.self_loop_weight = 1.0 if self_loops else None
    return graph


def matchings(count: int, rounds: int, draw: torch.Generator) -> Tensor:
    """`rounds` rounds of a round-robin tournament of `count` in random order: partners, int64 [rounds, count]."""
    rank = torch.randperm(count, generator=draw)
    of_rank = rank.argsort()
    last, number = count - 1, torch.arange(rounds)[:, None]
    # x meets t - x modulo count - 1; who would meet itself meets the last one
    other = torch.remainder(number - rank, last)
    alone = torch.remainder(number * (count // 2), last)
    other = torch.where(other == rank, last, other)
    other = torch.where(rank == last, alone, other)
    return of_rank[other]


def _shares(cluster_nodes: int, degree: int) -> tuple[int, int, int]:
    """(near edges of a node, rounds, places that a round ties)."""
    # at least one is far
    num_near = 2 * min(round((1 - FAR_SHARE) * degree / 2), (degree - 1) // 2)
    far = degree - num_near
    num_rounds = math.ceil(far / MOST_TIED)
    return num_near, num_rounds, round(far / num_rounds * cluster_nodes)


def _places(count: int, num_tied: int, draw: torch.Generator) -> Tensor:
    """A matching of `num_tied` places with as many, seen from both sides, int64 [2, count]; -1 for the others."""
    here, there = (torch.randperm(count, generator=draw)[:num_tied] for _ in range(2))
    places = torch.full((2, count), -1)
    places[0, here], places[1, there] = there, here
    return places

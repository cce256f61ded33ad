"""Graphs drawn like those of CLUSTER, as one graph without edges between them."""

from __future__ import annotations

import numpy as np
import torch

from gas_triton.datasets import Dataset

COMMUNITIES = 6


def cluster_like(
    num_graphs: int = 150,
    seed: int = 0,
    *,
    sizes: tuple[int, int] = (5, 35),
    p_within: float = 0.55,
    p_between: float = 0.25,
    val_share: float = 1 / 12,
    test_share: float = 1 / 12,
) -> Dataset:
    """Draws graphs of the CLUSTER task: find the community of every node, one node of each being known.

    A graph is a stochastic block model with 6 communities. Two nodes are tied with one probability within a community
    and with another between two. A node of each community, drawn uniformly, has the community as its feature (one-hot,
    columns 1 to 6); all others have column 0, "not known". Node ids are shuffled within a graph. Sizes are drawn
    without the upper bound, which gives the published means of CLUSTER: 117.2 nodes and 4,304 edges a graph.

    Args:
        num_graphs: graphs; the first are trained on, then come those to validate and to test with.
        seed: of all draws; the same arguments give the same dataset.
        sizes: smallest community, and one more than the largest.
        p_within: probability of an edge between two nodes of a community.
        p_between: probability of an edge between nodes of two communities.
        val_share: share of the graphs whose nodes are in `val_mask`; CLUSTER has 1,000 of 12,000.
        test_share: the same of `test_mask`.

    Returns:
        A symmetric, loop-free, block-diagonal `Dataset` named `cluster-like`.

    Raises:
        ValueError: fewer than three graphs, or a share that leaves a split without a graph.

    Source: Dwivedi et al., Benchmarking Graph Neural Networks, JMLR 2023, section on SBM datasets.
    """
    num_val, num_test = round(num_graphs * val_share), round(num_graphs * test_share)
    num_train = num_graphs - num_val - num_test
    if min(num_train, num_val, num_test) < 1:
        raise ValueError(
            f"num_graphs: expected a graph of each split, got {num_train}, {num_val} and {num_test} of {num_graphs}"
        )
    rng = np.random.default_rng(seed)
    edges, communities, known, of_graph, before = [], [], [], [], 0
    for graph in range(num_graphs):
        community = rng.permutation(np.repeat(np.arange(COMMUNITIES), rng.integers(*sizes, size=COMMUNITIES)))
        count = len(community)
        probability = np.where(community[:, None] == community, p_within, p_between)
        is_edge = np.triu(rng.random((count, count)) < probability, 1)
        edges.append(np.stack(np.nonzero(is_edge | is_edge.T)) + before)
        feature = np.zeros(count, np.int64)
        for number in range(COMMUNITIES):
            feature[rng.choice(np.flatnonzero(community == number))] = 1 + number
        communities.append(community)
        known.append(feature)
        of_graph.append(np.full(count, graph))
        before += count
    x = torch.nn.functional.one_hot(torch.from_numpy(np.concatenate(known)), 1 + COMMUNITIES).float()
    place = torch.from_numpy(np.concatenate(of_graph))
    is_train, is_test = place < num_train, place >= num_graphs - num_test
    edge_index = torch.from_numpy(np.concatenate(edges, axis=1))
    y = torch.from_numpy(np.concatenate(communities))
    return Dataset("cluster-like", edge_index, x, y, is_train, ~(is_train | is_test), is_test)

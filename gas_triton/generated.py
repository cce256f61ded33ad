"""A graph of any size, drawn from a degree-corrected block model with planted classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from gas_triton.datasets import Dataset

__all__ = ["generate"]

# Cap of a propensity, in units of the smallest: without it a hub would be tied to all of its community.
_MAX_PROPENSITY = 100.0


def generate(
    num_nodes: int = 100_000,
    num_edges: int = 2_000_000,
    num_classes: int = 16,
    num_features: int = 64,
    *,
    num_communities: int | None = None,
    p_community: float = 0.6,
    p_class: float = 0.15,
    exponent: float = 2.5,
    signal: float = 3.2,
    spread: float = 1.0,
    label_noise: float = 0.05,
    seed: int = 0,
) -> Dataset:
    r"""Draw a graph from a degree-corrected block model with planted classes.

    Nodes form communities, communities form classes. A node has a propensity `theta` from a power law; an edge picks
    its source i with probability `theta_i / sum_k theta_k` and its target with

        P(j | i) = sum_S p_S theta_j / (sum_{k in S(i)} theta_k)    over those S(i) that j is in

    where S(i) is the community of i (``p_community``), its class (``p_class``) or all nodes (what is left).
    Self loops and repeated edges are drawn again. Features are `x_i = mean of the community of i + N(0, 1)`, with
    the means in an eight-dimensional subspace: one row says little about its class, an average over neighbours much.
    Node ids are shuffled; the split is 10 / 10 / 80 %.

    Args:
        num_nodes: N.
        num_edges: E, directed edges; even, because each undirected edge is stored in both directions. If the
            blocks are full before E is reached (a dense graph), the rest is drawn uniformly.
        num_classes: number of classes, of about N / num_classes nodes each.
        num_features: F.
        num_communities: number of communities; about N / 250 if not given, and never fewer than num_classes.
        p_community: probability that the target is drawn from the community of the source.
        p_class: probability that the target is drawn from the whole class of the source.
        exponent: of the power law of the propensities, above 1; smaller means larger hubs.
        signal: root mean square length of a class mean, in units of the noise of one feature.
        spread: distance of the community means from their class mean, as a multiple of ``signal``.
        label_noise: fraction of nodes whose label is drawn again uniformly; it bounds every accuracy.
        seed: of all draws; the same arguments give the same dataset.

    Returns:
        A symmetric, coalesced, loop-free `Dataset` with exactly ``num_edges`` edges, sorted by source.

    Raises:
        ValueError: an argument is outside its range, or no simple graph has so many edges.

    Source: Karrer and Newman, "Stochastic blockmodels and community structure in networks", 2011.
    """
    # Here because `datasets` imports this module.
    from gas_triton.datasets import Dataset

    counts = (("num_nodes", num_nodes), ("num_edges", num_edges), ("num_classes", num_classes))
    for name, count in (*counts, ("num_features", num_features)):
        if not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"{name}: expected a positive integer, got {count!r}")
    if num_edges % 2:
        raise ValueError(f"num_edges: expected an even number (edges are stored both ways), got {num_edges}")
    most = num_nodes * (num_nodes - 1)
    if num_edges > most:
        raise ValueError(f"num_edges: expected at most {most} for {num_nodes} nodes, got {num_edges}")
    if num_classes > num_nodes:
        raise ValueError(f"num_classes: expected at most num_nodes ({num_nodes}), got {num_classes}")
    communities = max(num_classes, num_nodes // 250) if num_communities is None else num_communities
    if not num_classes <= communities <= num_nodes:
        raise ValueError(f"num_communities: expected {num_classes} to {num_nodes}, got {communities}")
    for name, value in (("p_community", p_community), ("p_class", p_class), ("label_noise", label_noise)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in 0..1, got {value}")
    if p_community + p_class > 1:
        raise ValueError(f"p_community + p_class: expected at most 1, got {p_community + p_class}")
    if not exponent > 1:
        raise ValueError(f"exponent: expected a number above 1, got {exponent}")

    rng = np.random.default_rng(seed)
    # Until the shuffle below, each community and each class is one contiguous range of nodes, so that a target
    # is one binary search in one prefix sum.
    community_ptr = np.arange(communities + 1) * num_nodes // communities
    class_of_community = np.arange(communities) * num_classes // communities
    class_ptr = community_ptr[np.searchsorted(class_of_community, np.arange(num_classes + 1))]
    community = np.repeat(np.arange(communities), np.diff(community_ptr))
    label = class_of_community[community]
    propensity = np.minimum((1.0 - rng.random(num_nodes)) ** (-1.0 / (exponent - 1.0)), _MAX_PROPENSITY)
    ranges = (
        (p_community, community_ptr[community], community_ptr[community + 1]),
        (p_class, class_ptr[label], class_ptr[label + 1]),
    )
    low, high = _draw_pairs(rng, num_edges // 2, propensity, ranges)

    node = rng.permutation(num_nodes)
    low, high = node[low], node[high]
    code = np.sort(np.concatenate([low * num_nodes + high, high * num_nodes + low]))
    edge_index = torch.from_numpy(np.stack([code // num_nodes, code % num_nodes]))

    community[node] = community.copy()
    basis = rng.standard_normal((min(8, num_features), num_features))
    basis *= signal / np.linalg.norm(basis, axis=1, keepdims=True) / np.sqrt(len(basis))
    means = rng.standard_normal((num_classes, len(basis)))[class_of_community]
    means += spread * rng.standard_normal(means.shape)
    x = rng.standard_normal((num_nodes, num_features), np.float32)
    x += (means @ basis).astype(np.float32)[community]
    redrawn = rng.random(num_nodes) < label_noise
    y = np.where(redrawn, rng.integers(num_classes, size=num_nodes), class_of_community[community])

    rank = torch.from_numpy(rng.permutation(num_nodes))
    train, val = rank < num_nodes // 10, rank >= num_nodes - num_nodes // 10
    features, labels = torch.from_numpy(x), torch.from_numpy(y)
    return Dataset("generated", edge_index, features, labels, train, val, ~(train | val))


def _draw_pairs(
    rng: np.random.Generator,
    count: int,
    propensity: np.ndarray,
    ranges: tuple[tuple[float, np.ndarray, np.ndarray], ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``count`` different pairs low < high of the block model (see `generate`)."""
    n = len(propensity)
    cumulative = np.concatenate([[0.0], np.cumsum(propensity)])
    found = np.empty(0, np.int64)
    # A sparse graph takes two to four rounds; the limit is for blocks that cannot hold so many edges.
    for _ in range(16):
        missing = count - len(found)
        if missing <= 0:
            break
        size = missing + missing // 4 + 64
        source = np.searchsorted(cumulative, rng.random(size) * cumulative[-1], side="right") - 1
        source = np.minimum(source, n - 1)
        start, stop = np.zeros(size, np.int64), np.full(size, n)
        level, below = rng.random(size), 0.0
        for probability, first, last in ranges:
            inside = (level >= below) & (level < below + probability)
            start[inside], stop[inside] = first[source[inside]], last[source[inside]]
            below += probability
        mass = cumulative[start] + rng.random(size) * (cumulative[stop] - cumulative[start])
        # Rounding may carry the sum to the end of the range; the clip keeps the target inside.
        target = np.clip(np.searchsorted(cumulative, mass, side="right") - 1, start, stop - 1)
        low, high = np.minimum(source, target), np.maximum(source, target)
        found = np.union1d(found, (low * n + high)[low != high])
    while len(found) < count:
        if 4 * count > n * (n - 1):
            low, high = np.triu_indices(n, 1)
        else:
            low, high = np.sort(rng.integers(n, size=(2, 2 * (count - len(found)))), axis=0)
        rest = np.setdiff1d((low * n + high)[low != high], found)
        found = np.concatenate([found, rng.permutation(rest)[: count - len(found)]])
    found = rng.permutation(found)[:count]
    return found // n, found % n

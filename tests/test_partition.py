"""Partitions: what every one of them guarantees, METIS against a random cut, statistics against sets, the cache."""

import itertools
from pathlib import Path

import numpy as np
import pymetis
import pytest
import torch

from gas_triton import Graph, Partition, contiguous_partition, metis, random_partition

from .reference import GRAPHS, random_edges

PARTITIONS = {
    "metis": lambda graph: metis(graph, 4),
    "metis one part": lambda graph: metis(graph, 1),
    "random": lambda graph: random_partition(graph, 4),
    "as many parts as nodes": lambda graph: random_partition(graph, graph.num_nodes),
    "contiguous": lambda graph: contiguous_partition(graph, [7, 1, graph.num_nodes - 8]),
}


def two_communities(size: int = 60, seed: int = 0) -> Graph:
    """Two groups of nodes in random order with many edges within each and six between."""
    draw = torch.Generator().manual_seed(seed)
    within = torch.randint(size, (2, 8 * size), generator=draw)
    between = torch.stack([torch.arange(6), torch.arange(6) + size])
    edge_index = torch.cat([within, within + size, between], dim=1)
    edge_index = torch.randperm(2 * size, generator=draw)[edge_index]
    return Graph.from_edge_index(torch.cat([edge_index, edge_index.flip(0)], dim=1), num_nodes=2 * size)


def cluster_of_node(parts: Partition) -> list[int]:
    cluster = [0] * parts.perm.numel()
    for number, (first, last) in enumerate(itertools.pairwise(parts.ptr.tolist())):
        for node in parts.perm[first:last].tolist():
            cluster[node] = number
    return cluster


@pytest.mark.parametrize("name", ["directed", "symmetric", "weighted_directed", "simple"])
@pytest.mark.parametrize("kind", PARTITIONS)
def test_every_node_is_in_one_cluster_and_rows_of_a_cluster_descend_by_degree(kind: str, name: str) -> None:
    graph = GRAPHS[name].graph()
    parts = PARTITIONS[kind](graph)
    assert sorted(parts.perm.tolist()) == list(range(graph.num_nodes))
    ptr = parts.ptr.tolist()
    assert ptr[0] == 0
    assert ptr[-1] == graph.num_nodes
    assert min(np.diff(ptr)) >= 1
    assert parts.num_parts == len(ptr) - 1
    permuted = parts.permute(graph)
    for first, last in itertools.pairwise(ptr):
        degree = permuted.degree[first:last].tolist()
        assert degree == sorted(degree, reverse=True)


@pytest.mark.parametrize("is_directed", [False, True])
def test_metis_finds_the_communities(is_directed: bool) -> None:
    graph = two_communities()
    if is_directed:
        source, target = graph.edge_index()
        graph = Graph.from_edge_index(torch.stack([source, target])[:, source < target], num_nodes=graph.num_nodes)
    parts = metis(graph, 2)
    between = 6 if is_directed else 12
    assert parts.stats().edge_cut == pytest.approx(between / graph.num_edges)
    assert parts.stats().edge_cut < 0.1 * random_partition(graph, 2).stats().edge_cut


def test_metis_takes_no_notice_of_direction_loops_copies_or_weights() -> None:
    plain = two_communities()
    edge_index = plain.edge_index()
    loops = torch.arange(plain.num_nodes).expand(2, -1)
    source, target = edge_index
    once = edge_index[:, source <= target]
    changed = Graph.from_edge_index(
        torch.cat([once, once[:, ::3], loops], dim=1), torch.rand(once.size(1) + once[:, ::3].size(1) + loops.size(1))
    )
    assert cluster_of_node(metis(changed, 5, seed=3)) == cluster_of_node(metis(plain, 5, seed=3))


@pytest.mark.parametrize("name", ["no_edges", "one_node"])
def test_metis_of_a_graph_without_structure(name: str) -> None:
    graph = GRAPHS[name].graph()
    parts = metis(graph, graph.num_nodes)
    assert sorted(parts.perm.tolist()) == list(range(graph.num_nodes))


def test_metis_drops_empty_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["directed"].graph()
    given = [3 if node % 2 else 1 for node in range(graph.num_nodes)]
    monkeypatch.setattr(pymetis, "part_graph", lambda *_, **__: pymetis.GraphPartition(0, given))
    parts = metis(graph, 5)
    assert parts.num_parts == 2
    assert cluster_of_node(parts) == [1 if node % 2 else 0 for node in range(graph.num_nodes)]


def test_random_partition_is_balanced_and_seeded() -> None:
    graph = GRAPHS["directed"].graph()
    parts = random_partition(graph, 7, seed=1)
    assert sorted(parts.ptr.diff().tolist()) == [4, 4, 4, 4, 4, 5, 5]
    assert torch.equal(parts.perm, random_partition(graph, 7, seed=1).perm)
    assert cluster_of_node(parts) != cluster_of_node(random_partition(graph, 7, seed=2))


def test_contiguous_partition_keeps_the_clusters_of_the_given_order() -> None:
    graph = GRAPHS["directed"].graph()
    parts = contiguous_partition(graph, [5, 20, 5])
    assert cluster_of_node(parts) == [0] * 5 + [1] * 20 + [2] * 5


def test_permute_takes_any_number_of_tensors() -> None:
    graph = GRAPHS["weighted_directed"].graph()
    parts = random_partition(graph, 4)
    x, y = torch.rand(graph.num_nodes, 3), torch.arange(graph.num_nodes)
    assert isinstance(parts.permute(graph), Graph)
    permuted, x_permuted, nothing, y_permuted = parts.permute(graph, x, None, y)
    assert nothing is None
    assert x_permuted.tolist() == [x[node].tolist() for node in parts.perm.tolist()]
    assert torch.equal(y_permuted, parts.perm)
    assert torch.equal(permuted.to_torch_csr().to_dense(), graph.to_torch_csr().to_dense()[parts.perm][:, parts.perm])


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20])
@pytest.mark.parametrize("name", ["directed", "symmetric", "no_edges"])
def test_stats_are_those_of_sets(name: str, batch_size: int) -> None:
    graph = GRAPHS[name].graph()
    parts = random_partition(graph, min(8, graph.num_nodes))
    cluster = cluster_of_node(parts)
    edges = list(zip(*graph.edge_index().tolist(), strict=True))
    order = torch.randperm(parts.num_parts, generator=torch.Generator().manual_seed(5)).tolist()
    groups = [set(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    halo, between = 0, 0
    for group in groups:
        across = [s for s, t in edges if cluster[t] in group and cluster[s] not in group]
        halo, between = halo + len(set(across)), between + len(across)

    stats = parts.stats(batch_size, seed=5)
    assert stats.num_parts == parts.num_parts
    assert stats.edge_cut == pytest.approx(sum(cluster[s] != cluster[t] for s, t in edges) / max(len(edges), 1))
    assert stats.halo_rows == pytest.approx(halo / len(groups))
    assert stats.halo_ratio == pytest.approx(halo / graph.num_nodes)
    assert stats.inter_intra_ratio == pytest.approx(between / max(len(edges) - between, 1))
    sizes = [cluster.count(number) for number in range(parts.num_parts)]
    assert stats.balance == pytest.approx(max(sizes) / (graph.num_nodes / parts.num_parts))


# --- cache -----------------------------------------------------------------------------------------------------------


def forbid_metis(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("METIS was called")

    monkeypatch.setattr(pymetis, "part_graph", fail)


def test_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = two_communities()
    cache = tmp_path / "new" / "folder"
    first = metis(graph, 6, seed=1, cache=cache)
    assert torch.equal(first.perm, metis(graph, 6, seed=1).perm)
    forbid_metis(monkeypatch)
    second = metis(two_communities(), 6, seed=1, cache=str(cache))
    assert torch.equal(second.perm, first.perm)
    assert torch.equal(second.ptr, first.ptr)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


@pytest.mark.parametrize("change", ["graph", "seed", "parts", "reversed edges"])
def test_cache_knows_what_it_is_of(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = two_communities()
    directed = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]), num_nodes=120)
    start = directed if change == "reversed edges" else graph
    metis(start, 6, seed=1, cache=tmp_path)
    forbid_metis(monkeypatch)
    other, parts, seed = {
        "graph": (two_communities(seed=1), 6, 1),
        "seed": (graph, 6, 2),
        "parts": (graph, 5, 1),
        "reversed edges": (Graph.from_edge_index(directed.edge_index().flip(0), num_nodes=120), 6, 1),
    }[change]
    with pytest.raises(AssertionError, match="METIS was called"):
        metis(other, parts, seed=seed, cache=tmp_path)


@pytest.mark.parametrize(
    "content", ["empty", "text", "half", "zip", "other shape", "other dtype", "too large", "pickle"]
)
def test_unusable_file_in_the_cache_is_replaced(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = two_communities()
    expected = metis(graph, 6, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    arrays = {
        "other shape": np.zeros(7, np.int32),
        "other dtype": np.zeros(120, np.float64),
        "too large": np.full(120, 6, np.int32),
        "pickle": np.full(120, None),
    }
    if content in arrays:
        np.save(path, arrays[content])
    else:
        path.write_bytes(
            {"empty": b"", "text": b"not an array", "half": good[: len(good) // 2], "zip": b"PK\x03\x04"}[content]
        )
    assert torch.equal(metis(graph, 6, cache=tmp_path).perm, expected.perm)
    assert path.read_bytes() == good
    forbid_metis(monkeypatch)
    assert torch.equal(metis(graph, 6, cache=tmp_path).perm, expected.perm)


def test_metis_is_seeded() -> None:
    graph = random_edges(1000, 4000, symmetric=True).graph()
    assert torch.equal(metis(graph, 10, seed=4).perm, metis(graph, 10, seed=4).perm)
    assert len({tuple(cluster_of_node(metis(graph, 10, seed=seed))) for seed in (0, 2, 5)}) == 3

"""Splitting a graph into clusters: METIS, random, and what a split costs."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gas_triton.errors import MissingPackageError
from gas_triton.functional import SparseRows
from gas_triton.graph import Graph


@dataclass(frozen=True)
class PartitionStats:
    """What a partition costs.

    Attributes:
        num_parts: clusters.
        edge_cut: share of the edges whose ends lie in different clusters.
        halo_rows: out-of-batch neighbours of a batch, mean over the batches of one epoch.
        halo_ratio: `halo_rows` over the in-batch rows.
        inter_intra_ratio: edges between batches over edges within them (Fey et al., ICML 2021).
        balance: largest cluster over the mean cluster.
    """

    num_parts: int
    edge_cut: float
    halo_rows: float
    halo_ratio: float
    inter_intra_ratio: float
    balance: float


@dataclass(frozen=True, eq=False)
class BatchCounts:
    """What the batches of one epoch hold, one entry a batch, all int64 [num_batches].

    Attributes:
        nodes: in-batch rows, B.
        halo: out-of-batch neighbours, each once, H.
        inner: edges from in-batch rows, loops among them.
        outer: edges from halo rows.
        loops: edges from a row to itself.
    """

    nodes: Tensor
    halo: Tensor
    inner: Tensor
    outer: Tensor
    loops: Tensor


@dataclass(frozen=True, eq=False)
class Partition:
    """A split of the nodes into clusters.

    Attributes:
        perm: int64 [N] on the CPU; new row i is old node `perm[i]`. Clusters are contiguous, and the rows of a cluster
            stand by descending degree, so that rows worked on together have about as many edges.
        ptr: int64 [num_parts + 1] on the CPU; cluster c is rows `ptr[c]` to `ptr[c + 1]`.
        num_parts: clusters.
        graph: the graph that was partitioned.
    """

    perm: Tensor
    ptr: Tensor
    graph: Graph = field(repr=False)

    @property
    def num_parts(self) -> int:
        return self.ptr.numel() - 1

    @property
    def is_contiguous(self) -> bool:
        """Whether clusters are ranges of node ids before `permute`, too."""
        cluster = torch.repeat_interleave(torch.arange(self.num_parts), self.ptr.diff())
        return torch.equal(torch.bucketize(self.perm, self.ptr[1:], right=True), cluster)

    def permute(self, graph: Graph, *tensors: Tensor | SparseRows | None) -> Any:
        """Reorders a graph and node tensors so that clusters are contiguous.

        Args:
            graph: the graph that was partitioned, or one over the same nodes.
            *tensors: node tensors [N, ...]; None is passed through.

        Returns:
            The graph alone, or a tuple of the graph and the tensors in the new order.

        Raises:
            ValueError: the graph or a tensor has another number of rows.
        """
        num_nodes = self.perm.numel()
        if graph.num_nodes != num_nodes:
            raise ValueError(f"graph has {graph.num_nodes} nodes but the partition has {num_nodes}")
        for place, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if not isinstance(tensor, (Tensor, SparseRows)):
                raise TypeError(f"tensor {place} must be a tensor or None, got {type(tensor).__name__}")
            if tensor.dim() == 0 or tensor.size(0) != num_nodes:
                shape = list(tensor.shape)
                raise ValueError(f"tensor {place} has shape {shape} but the partition has {num_nodes} nodes")
        permuted = graph.permute(self.perm)
        if not tensors:
            return permuted
        return permuted, *(None if t is None else t[self.perm.to(t.device)] for t in tensors)

    def stats(self, batch_size: int = 1, seed: int = 0) -> PartitionStats:
        """What the partition costs in batches of `batch_size` clusters, grouped at random with `seed`."""
        return self.stats_of(self.batch_counts(batch_size, seed))

    def stats_of(self, counts: BatchCounts) -> PartitionStats:
        """What the partition costs in batches that are counted already."""
        graph, sizes = self.graph.to("cpu"), self.ptr.diff()
        source, target = _of_ends(graph, self._cluster())
        num_between = int(counts.outer.sum())
        return PartitionStats(
            num_parts=self.num_parts,
            edge_cut=int((source != target).sum()) / max(graph.num_edges, 1),
            halo_rows=float(counts.halo.sum()) / counts.halo.numel(),
            halo_ratio=float(counts.halo.sum()) / graph.num_nodes,
            inter_intra_ratio=num_between / max(graph.num_edges - num_between, 1),
            balance=float(sizes.max() / sizes.float().mean()),
        )

    def batch_counts(self, batch_size: int = 1, seed: int = 0) -> BatchCounts:
        """Rows and edges of the batches of one epoch: groups of `batch_size` clusters, drawn at random with `seed`."""
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        graph, num_nodes = self.graph.to("cpu"), self.perm.numel()
        order = torch.randperm(self.num_parts, generator=torch.Generator().manual_seed(seed))
        batch_of_cluster = torch.empty(self.num_parts, dtype=torch.int32)
        batch_of_cluster[order] = (torch.arange(self.num_parts) // batch_size).int()
        batch = batch_of_cluster[self._cluster().long()]
        count = -(-self.num_parts // batch_size)
        source, target = _of_ends(graph, batch)
        is_between = source != target
        edges = torch.bincount(target, minlength=count)
        into = target[is_between].long()
        # each halo row of a batch is one number; equal ones are next to each other once they are sorted
        halo = (into * num_nodes + graph.col[is_between]).sort().values
        is_first = torch.ones_like(halo, dtype=torch.bool)
        is_first[1:] = halo[1:] != halo[:-1]
        outer = torch.bincount(into, minlength=count)
        loops = batch.index_select(0, graph.col[_is_loop(graph)].long())
        return BatchCounts(
            nodes=torch.bincount(batch, minlength=count),
            halo=torch.bincount(torch.div(halo[is_first], num_nodes, rounding_mode="floor"), minlength=count),
            inner=edges - outer,
            outer=outer,
            loops=torch.bincount(loops, minlength=count),
        )

    def _cluster(self) -> Tensor:
        """The cluster of every node, int32 [N]."""
        cluster = torch.empty(self.perm.numel(), dtype=torch.int32)
        cluster[self.perm] = torch.repeat_interleave(torch.arange(self.num_parts, dtype=torch.int32), self.ptr.diff())
        return cluster


def metis(graph: Graph, num_parts: int, seed: int = 0, cache: str | os.PathLike[str] | None = None) -> Partition:
    """Clusters with few edges between them, by METIS (Karypis and Kumar, SIAM J. Sci. Comput. 1998).

    A directed graph is made symmetric for the partition only. METIS may leave a cluster empty on a tiny graph; such a
    cluster is dropped, so the result can have fewer than `num_parts`. Ctrl-C takes effect when METIS is done.

    Args:
        graph: the graph; weights are not used.
        num_parts: clusters wanted, from 1 to N.
        seed: seed of METIS.
        cache: folder that keeps results under a hash of the graph and the arguments; None computes anew.

    Raises:
        ValueError: more parts than nodes, or fewer than one.
        MissingPackageError: pymetis is not installed.
    """
    _check_parts(graph, num_parts)
    if num_parts == 1:
        return _by_degree(graph, torch.zeros(graph.num_nodes, dtype=torch.int64))
    path = None if cache is None else Path(cache) / f"metis-{_fingerprint(graph, num_parts, seed)}.npy"
    cluster = None if path is None else _read_cached(path, graph.num_nodes, num_parts)
    if cluster is None:
        cluster = _run_metis(graph, num_parts, seed)
        if path is not None:
            _write_cached(path, cluster)
    return _by_degree(graph, torch.from_numpy(cluster).long())


def random_partition(graph: Graph, num_parts: int, seed: int = 0) -> Partition:
    """Clusters of equal size (to within one) drawn at random.

    Args:
        graph: the graph.
        num_parts: clusters, from 1 to N.
        seed: seed of the draw.

    Raises:
        ValueError: more parts than nodes, or fewer than one.
    """
    _check_parts(graph, num_parts)
    order = torch.randperm(graph.num_nodes, generator=torch.Generator().manual_seed(seed))
    return _by_degree(graph, order % num_parts)


def contiguous_partition(graph: Graph, sizes: Sequence[int]) -> Partition:
    """Clusters of given sizes in the order of the node ids, for graphs whose order already is a partition.

    Args:
        graph: the graph.
        sizes: nodes of each cluster, all positive, N in sum.

    Raises:
        ValueError: a size below 1, or another sum.
    """
    if min(sizes, default=0) < 1 or sum(sizes) != graph.num_nodes:
        raise ValueError(
            f"sizes must be positive and sum to {graph.num_nodes}, got {min(sizes, default=0)} and {sum(sizes)}"
        )
    return _by_degree(graph, torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)))


def _check_parts(graph: Graph, num_parts: int) -> None:
    if not isinstance(num_parts, int) or isinstance(num_parts, bool):
        raise TypeError(f"num_parts must be an int, got {type(num_parts).__name__}")
    if not 1 <= num_parts <= graph.num_nodes:
        raise ValueError(f"num_parts must be from 1 to the number of nodes ({graph.num_nodes}), got {num_parts}")


def _by_degree(graph: Graph, cluster: Tensor) -> Partition:
    degree = graph.degree.cpu().long()
    perm = torch.argsort(cluster * (int(degree.max()) + 1) + (int(degree.max()) - degree), stable=True)
    sizes = torch.bincount(cluster)
    sizes = sizes[sizes > 0]
    return Partition(perm, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), graph)


def _of_ends(graph: Graph, of_node: Tensor) -> tuple[Tensor, Tensor]:
    """A value of every node, as (of the source, of the target) of every edge."""
    source = of_node.index_select(0, graph.col)
    return source, torch.repeat_interleave(of_node, graph.degree.long(), output_size=graph.num_edges)


def _is_loop(graph: Graph) -> Tensor:
    """Whether an edge is from a node to itself, bool [E]."""
    node = torch.arange(graph.num_nodes, dtype=graph.col.dtype)
    return graph.col == torch.repeat_interleave(node, graph.degree.long(), output_size=graph.num_edges)


def _run_metis(graph: Graph, num_parts: int, seed: int) -> np.ndarray:
    pymetis = _pymetis()
    rowptr, col = _symmetric_structure(graph)
    adjacency = pymetis.CSRAdjacency(adj_starts=rowptr, adjacent=col)
    result = pymetis.part_graph(num_parts, adjacency, options=pymetis.Options(seed=seed))
    return np.asarray(result.vertex_part, dtype=np.int32)


def _pymetis() -> ModuleType:
    try:
        return importlib.import_module("pymetis")
    except ImportError as error:
        raise MissingPackageError(
            f"metis needs pymetis ({error}): pip install pymetis, or take random_partition"
        ) from error


def _symmetric_structure(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """(rowptr, col) of the graph with both directions of every edge, each once, and no loops: what METIS takes."""
    graph = graph.to("cpu")
    if graph.is_symmetric:
        # columns of a row ascend: a copy of an edge stands behind it
        is_kept = ~_is_loop(graph)
        is_copy = graph.col[1:] == graph.col[:-1]
        is_within_row = torch.ones(graph.num_edges + 1, dtype=torch.bool)
        is_within_row[graph.rowptr.long()] = False
        is_copy &= is_within_row[1 : graph.num_edges]
        is_kept[1:] &= ~is_copy
        kept_before = torch.zeros(graph.num_edges + 1, dtype=graph.rowptr.dtype)
        torch.cumsum(is_kept, 0, dtype=kept_before.dtype, out=kept_before[1:])
        rowptr = kept_before.index_select(0, graph.rowptr)
        col = graph.col[is_kept]
    else:
        source, target = graph.edge_index()
        is_edge = source != target
        source, target = source[is_edge], target[is_edge]
        key = torch.cat([target * graph.num_nodes + source, source * graph.num_nodes + target]).unique()
        row = torch.div(key, graph.num_nodes, rounding_mode="floor")
        rowptr = torch.searchsorted(row, torch.arange(graph.num_nodes + 1))
        col = key - row * graph.num_nodes
    if int(rowptr[-1]) >= 2**31:
        raise ValueError(f"METIS takes at most {2**31 - 1} edges, both directions counted, got {int(rowptr[-1])}")
    # pymetis is built for int32 and would copy anything else
    return rowptr.int().numpy(), col.int().numpy()


def _fingerprint(graph: Graph, num_parts: int, seed: int) -> str:
    digest = hashlib.sha256(f"{num_parts} {seed} {_pymetis().version}".encode())
    for part in (graph.rowptr, graph.col):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _read_cached(path: Path, num_nodes: int, num_parts: int) -> np.ndarray | None:
    """The cluster of every node, or None where there is no readable file of this graph."""
    try:
        cluster = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    if (
        cluster.shape != (num_nodes,)
        or cluster.dtype != np.int32
        or not 0 <= cluster.min() <= cluster.max() < num_parts
    ):
        return None
    return cluster


def _write_cached(path: Path, cluster: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # a reader sees the whole file or none, also when two runs write it at once
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.save(file, cluster)
    os.replace(file.name, path)

"""`ClusterLoader`: which clusters make a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gas_triton.batch import Batch, Planner
from gas_triton.graph import Graph
from gas_triton.partition import Partition


class ClusterLoader:
    """Batches of a few clusters each, with all their neighbours.

    Every epoch draws new groups of `batch_size` clusters, in an order given by the seed and the epoch. Groups that
    repeat (one cluster each, or `shuffle=False`) are planned once and kept.

    Args:
        graph: the graph in the order of `parts`, that is, after `parts.permute`.
        parts: the partition.
        batch_size: clusters of a batch.
        shuffle: draw new groups each epoch; otherwise consecutive clusters make a batch.
        seed: seed of the order.
        x: features [N, F], on any device; batches give them as `x` ([B + H, F]) and `features`.
        **node_tensors: tensors [N, ...] (`y`, `train_mask`, ...); batches give the in-batch rows under the same name.

    Raises:
        ValueError: a tensor without N rows or named like an attribute of `Batch`, a mask that is not [N], a graph that
            `parts` did not permute, or a `batch_size` below 1.

    The `epoch` attribute counts the epochs begun; set it to repeat one.
    """

    def __init__(
        self,
        graph: Graph,
        parts: Partition,
        batch_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        x: Tensor | None = None,
        **node_tensors: Tensor | None,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        if parts.perm.numel() != graph.num_nodes:
            raise ValueError(f"parts has {parts.perm.numel()} nodes but graph has {graph.num_nodes}")
        if graph.row_order != parts.graph.permuted_order(parts.perm) and not parts.is_contiguous:
            raise ValueError("graph is not in the order of parts: graph, x, ... = parts.permute(graph, x, ...)")
        tensors = {name: tensor for name, tensor in node_tensors.items() if tensor is not None}
        for name, tensor in {"x": x, **tensors}.items():
            if tensor is not None:
                _check_node_tensor(name, tensor, graph.num_nodes)
        taken = [name for name in tensors if name in dir(Batch) or name in Batch.__annotations__]
        if taken:
            raise ValueError(f"node tensors cannot be named {', '.join(taken)}: a batch has attributes of that name")
        x = None if x is None else x.contiguous()
        self.graph, self.parts = graph, parts
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0
        self.x, self.node_tensors = x, tensors
        # found by sorting all edges, once: not in the first step
        _ = graph.is_symmetric
        self._planner = Planner(graph)
        self._ptr = parts.ptr.tolist()
        self._edge_ptr = graph.rowptr[parts.ptr.to(graph.device)].tolist()
        self._planned: dict[tuple[int, ...], Batch] = {}
        # plans made so far
        self.num_planned = 0

    def __len__(self) -> int:
        return -(-self.parts.num_parts // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.parts.num_parts, generator=generator).tolist()
        else:
            order = list(range(self.parts.num_parts))
        self.epoch += 1
        for start in range(0, len(order), self.batch_size):
            yield self.batch(order[start : start + self.batch_size])

    def batch(self, clusters: list[int]) -> Batch:
        """The batch of the given clusters."""
        key = tuple(clusters)
        if key in self._planned:
            return self._with_tensors(self._planned[key])
        if not clusters or len(set(clusters)) != len(clusters):
            raise ValueError(f"clusters must be different and at least one, got {list(clusters)}")
        for cluster in clusters:
            if not 0 <= cluster < self.parts.num_parts:
                raise ValueError(f"clusters must be in [0, {self.parts.num_parts}), got {cluster}")
        spans = [(self._ptr[cluster], self._ptr[cluster + 1]) for cluster in clusters]
        edges = [(self._edge_ptr[cluster], self._edge_ptr[cluster + 1]) for cluster in clusters]
        self.num_planned += 1
        batch = self._planner.plan(clusters, spans, edges)
        if not self.shuffle or self.batch_size == 1:
            self._planned[key] = batch
        return self._with_tensors(batch)

    def full(self) -> Batch:
        """The whole graph as one batch: no halo, so the same model trains full-batch."""
        if (-1,) not in self._planned:
            self._planned[(-1,)] = self._planner.full()
        return self._with_tensors(self._planned[(-1,)])

    def in_order(self) -> Iterator[Batch]:
        """Batches of consecutive clusters, whatever `shuffle` says; does not count as an epoch."""
        for start in range(0, self.parts.num_parts, self.batch_size):
            yield self.batch(list(range(start, min(start + self.batch_size, self.parts.num_parts))))

    def _with_tensors(self, planned: Batch) -> Batch:
        return planned.with_tensors(self.x, self.node_tensors)

    def __repr__(self) -> str:
        return (
            f"ClusterLoader(num_batches={len(self)}, batch_size={self.batch_size}, num_parts={self.parts.num_parts}, "
            f"shuffle={self.shuffle}, {self.graph!r})"
        )


def _check_node_tensor(name: str, tensor: Tensor, num_nodes: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor with one row for each node, got {type(tensor).__name__}")
    if tensor.dim() == 0 or tensor.size(0) != num_nodes:
        raise ValueError(f"{name} must have {num_nodes} rows, one for each node, got shape {list(tensor.shape)}")
    if name.endswith("mask") and tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor [{num_nodes}], got {tensor.dtype}")
    if name.endswith("mask") and tensor.dim() != 1:
        raise ValueError(
            f"{name} is a mask and must have shape [{num_nodes}], got {list(tensor.shape)}: pick one split"
        )

"""The generated graph in batches that lie together, without METIS: nodes are ordered by their class."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.groups import Setting
from gas_triton import ClusterLoader, Graph, Partition, contiguous_partition
from gas_triton.datasets import generate
from gas_triton.models import MODELS

IGNORED = -100
# Ten seconds for the largest: kept for the next part that asks for it, as it is no function of this folder's.
_generate = functools.lru_cache(maxsize=1)(generate)


@dataclass(frozen=True)
class Problem:
    """A graph in the order of its classes, with node tensors, all on one device.

    Attributes:
        graph: without self loops and weights.
        sizes: nodes of each class.
        x: [N, F].
        y: int64 [N].
        target: int64 [N], `y` in training nodes and `IGNORED` elsewhere: a boolean mask would wait for the device.
    """

    graph: Graph
    sizes: list[int]
    x: Tensor
    y: Tensor
    target: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.sizes)

    def loader(self, name: str) -> ClusterLoader:
        """Batches of two classes (of one on a CPU), always the same, of the graph that a model of `MODELS` expects."""
        graph = MODELS[name].prepare(self.graph)
        parts: Partition = contiguous_partition(graph, self.sizes)
        graph, x, target = parts.permute(graph, self.x, self.target)
        return ClusterLoader(graph, parts, 1 if x.device.type == "cpu" else 2, shuffle=False, x=x, target=target)


@functools.lru_cache(maxsize=1)
def make_problem(num_nodes: int, degree: int, num_classes: int, device: torch.device) -> Problem:
    """The graph of `generate`, whose classes have three quarters of their edges within: about what METIS would find."""
    # a tiny graph is for Triton's interpreter, to which narrow rows are fewer programs
    num_features = 64 if num_nodes >= 1000 else 4
    data = _generate(num_nodes, num_nodes * degree, num_classes=num_classes, num_features=num_features)
    order = torch.argsort(data.y, stable=True)
    graph = Graph.from_edge_index(data.edge_index, num_nodes=num_nodes).permute(order).to(device)
    x, y, is_train = (tensor[order].to(device) for tensor in (data.x, data.y, data.train_mask))
    sizes = torch.bincount(data.y, minlength=num_classes).tolist()
    return Problem(graph, sizes, x, y, y.masked_fill(~is_train, IGNORED))


def size_of(setting: Setting) -> tuple[int, int, int]:
    """Nodes, mean degree and classes of the graph for a setting."""
    full = (400_000, 20, 40) if setting.device.type == "cuda" else (100_000, 20, 16)
    size: tuple[int, int, int] = setting.choose(full, (20_000, 20, 8), (48, 4, 2))
    return size

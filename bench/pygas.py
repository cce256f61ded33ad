"""One step written the PyGAS way: what the benchmarks compare with.

Follows `rusty1s/pyg_autoscale` (the reference implementation of Fey et al., ICML 2021): `loader.py` (relabel on the
CPU, `index_select` of every node tensor), `models/base.py` (push, pull by `index_select`, `cat`) and `models/gcn.py`
(transform, then `torch_sparse.matmul`). The relabelling is no stand-in: torch_sparse carries the same C++ function.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import Graph, Partition

if TYPE_CHECKING:
    from torch_sparse import SparseTensor


def missing() -> str | None:
    """Why the baseline cannot run here and what would change that, or None if it can."""
    if importlib.util.find_spec("torch_sparse") is None:
        return "the PyGAS baseline needs torch_sparse: pip install 'gas-triton[sparse]', or `make interop`"
    return None


def pull(x: Tensor, history: Tensor, halo_ids: Tensor) -> Tensor:
    """In-batch rows, then a copy of the halo rows of a history, [B + H, F]."""
    return torch.cat([x, history.index_select(0, halo_ids)], dim=0)


@dataclass(frozen=True)
class Subgraph:
    """A batch as PyGAS's loader gives it; `tensors` hold in-batch rows, then halo rows."""

    adj_t: SparseTensor
    batch_size: int
    n_id: Tensor
    offset: Tensor
    count: Tensor
    tensors: dict[str, Tensor]


class SubgraphLoader:
    """Batches of given clusters.

    Args:
        graph: the graph in the order of `parts`.
        parts: the partition.
        **node_tensors: tensors [N, ...], sliced to in-batch and halo rows.
    """

    def __init__(self, graph: Graph, parts: Partition, **node_tensors: Tensor) -> None:
        self.ptr = parts.ptr
        self.rowptr, self.col, self.value = graph.rowptr.long(), graph.col.long(), graph.weight
        self.node_tensors = node_tensors

    def batch(self, clusters: Sequence[int]) -> Subgraph:
        """The batch of the given clusters, relabelled anew as PyGAS does wherever a batch is several clusters."""
        from torch_sparse import SparseTensor

        spans = [(int(self.ptr[cluster]), int(self.ptr[cluster + 1])) for cluster in clusters]
        n_id = torch.cat([torch.arange(first, last) for first, last in spans])
        batch_size = n_id.numel()
        cluster_id = torch.tensor(list(clusters))
        offset = self.ptr[cluster_id]
        count = self.ptr[cluster_id + 1] - offset
        rowptr, col, value, n_id = torch.ops.torch_sparse.relabel_one_hop(self.rowptr, self.col, self.value, n_id, True)
        adj_t = SparseTensor(
            rowptr=rowptr, col=col, value=value, sparse_sizes=(rowptr.numel() - 1, n_id.numel()), is_sorted=True
        )
        tensors = {name: tensor.index_select(0, n_id) for name, tensor in self.node_tensors.items()}
        return Subgraph(adj_t, batch_size, n_id, offset, count, tensors)


class GCNConv(nn.Module):
    """`torch_geometric.nn.GCNConv(normalize=False)` on a SparseTensor: every row is transformed, then aggregated."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, adj_t: SparseTensor) -> Tensor:
        """[rows of adj_t, F_out]."""
        import torch_sparse

        return torch_sparse.matmul(adj_t, self.lin(x), reduce="sum") + self.bias


class GCN(nn.Module):
    """PyGAS's GCN without batch norm, residuals and linear ends; parameters are named as in `gas_triton.models.GCN`.

    Args:
        num_nodes: N, rows of every history.
        in_channels: F_in.
        hidden_channels: width between layers.
        out_channels: F_out.
        num_layers: L, with L - 1 histories.
        dropout: applied to the input of every layer.
        drop_input: whether the first layer's input is dropped too.
    """

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        dropout: float = 0.0,
        drop_input: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[hidden_channels] * (num_layers - 1), out_channels]
        self.convs = nn.ModuleList(GCNConv(*pair) for pair in itertools.pairwise(widths))
        self.dropout, self.drop_input = dropout, drop_input
        self.histories = [torch.zeros(num_nodes, hidden_channels) for _ in range(num_layers - 1)]

    def push_and_pull(self, history: Tensor, x: Tensor, batch: Subgraph) -> Tensor:
        """Stores the in-batch rows of `x` span by span, and puts the halo rows of the history behind them."""
        with torch.no_grad():
            start = 0
            for first, count in zip(batch.offset.tolist(), batch.count.tolist(), strict=True):
                history[first : first + count] = x[start : start + count]
                start += count
        return pull(x[: batch.batch_size], history, batch.n_id[batch.batch_size :])

    def forward(self, x: Tensor, batch: Subgraph) -> Tensor:
        """[B, F_out] of features [B + H, F_in]."""
        if self.drop_input:
            x = F.dropout(x, self.dropout, self.training)
        for conv, history in zip(self.convs, self.histories, strict=False):
            x = conv(x, batch.adj_t).relu_()
            x = self.push_and_pull(history, x, batch)
            x = F.dropout(x, self.dropout, self.training)
        last: Any = self.convs[-1]
        return last(x, batch.adj_t)

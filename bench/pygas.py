"""One step written the PyGAS way: what the benchmarks compare with.

Follows `rusty1s/pyg_autoscale` (the reference implementation of Fey et al., ICML 2021): `loader.py` (relabel on the
CPU, `index_select` of every node tensor), `models/base.py` (push, pull by `index_select`, `cat`) and `models/gcn.py`
(transform, then `torch_sparse.matmul`). The relabelling is no stand-in: torch_sparse carries the same C++ function.
"""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import plain
from gas_triton import Batch, Graph, Partition, models
from gas_triton import nn as layers
from gas_triton.nn.base import HistoryLayer

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


# --- any model -----------------------------------------------------------------------------------------------------


class Adjacency:
    """The edges of a batch, [B x (B + H)], as PyGAS's layers multiply by them.

    That is `torch_sparse` where it is installed for the device, and else `torch.sparse.mm` with a transpose that is
    kept, as `torch_sparse` keeps it; maxima then are gathered rows and a scattered reduction, as in torch_geometric.

    Args:
        batch: our plan.
    """

    def __init__(self, batch: Batch) -> None:
        joint, (transposed, _) = batch.joint(), batch.joint_transposed()
        self.edges, order = plain.edges_of(batch)
        self.size = (batch.num_nodes, batch.num_nodes + batch.num_halo)
        self.degree = joint.rowptr.diff()
        weight = None if batch.edge_weight is None else batch.edge_weight.index_select(0, order)
        self.sparse: SparseTensor | None = None
        if is_compiled_for(batch.device):
            from torch_sparse import SparseTensor

            self.sparse = SparseTensor(
                rowptr=joint.rowptr.long(), col=joint.col.long(), value=weight, sparse_sizes=self.size, is_sorted=True
            )
            # found at the first backward otherwise
            self.sparse.fill_cache_()
            return
        weight = torch.ones(batch.num_edges, device=batch.device) if weight is None else weight
        back = torch.ones_like(weight)
        if batch.edge_weight is not None:
            assert transposed.edge_id is not None
            back = batch.edge_weight.index_select(0, transposed.edge_id)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.matrix = torch.sparse_csr_tensor(*joint[:2], weight, self.size, check_invariants=False)
            self.transposed = torch.sparse_csr_tensor(*transposed[:2], back, self.size[::-1], check_invariants=False)

    def matmul(self, x: Tensor, reduce: str = "sum") -> Tensor:
        """[B, F] of rows [B + H, F]: the sum, mean or maximum over the edges of a row."""
        if self.sparse is not None:
            import torch_sparse

            return torch_sparse.matmul(self.sparse, x, reduce=reduce)
        if reduce in ("min", "max"):
            return plain.scatter(x.index_select(0, self.edges.source), self.edges, reduce)
        out = _Matmul.apply(x, self.matrix, self.transposed)
        return out / self.degree.clamp(min=1)[:, None] if reduce == "mean" else out


class _Matmul(torch.autograd.Function):
    """A sparse product whose transpose is known; autograd would make it anew in every backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return torch.sparse.mm(matrix, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.sparse.mm(ctx.transposed, grad), None, None


def is_compiled_for(device: torch.device) -> bool:
    """Whether torch_sparse is installed with kernels for a device."""
    if missing() is not None:
        return False
    import torch_sparse  # noqa: F401

    return device.type == "cpu" or torch.ops.torch_sparse.cuda_version() >= 0


@dataclass(frozen=True)
class Step:
    """A batch as PyGAS's loader gives it, relabelled, and already on the device.

    Attributes:
        adjacency: the edges.
        spans: ranges of rows of the tables, the batch's own.
        halo_ids: rows of the tables, int64 [H] on the device of the tables.
        x: [B + H, F], in-batch rows, then halo rows.
        target: int64 [B].
    """

    adjacency: Adjacency
    spans: list[tuple[int, int]]
    halo_ids: Tensor
    x: Tensor
    target: Tensor


class Historical(nn.Module):
    """A model of `gas_triton.models` whose steps are PyGAS's: its parameters, and PyGAS's operations and histories.

    Every layer reads [B + H, F]: rows are pushed to the table, halo rows pulled by `index_select` and brought to the
    device, both concatenated, and what the layer transforms it transforms for all of them. Tables in the host's memory
    are gathered by the CPU, as in PyGAS without its pool of threads.

    Args:
        model: whose parameters are trained; batch norm and residuals are not there.
        num_nodes: N, rows of every table.
        tables_on: device of the tables; those on a CPU are page-locked where there is a GPU.
    """

    def __init__(self, model: Any, num_nodes: int, tables_on: torch.device) -> None:
        super().__init__()
        self.model = model
        layers = [module for module in model.modules() if isinstance(module, HistoryLayer)]
        is_pinned = tables_on.type == "cpu" and torch.cuda.is_available()
        self.tables = [
            torch.zeros(num_nodes, layer.history_dim, device=tables_on, pin_memory=is_pinned) for layer in layers[1:]
        ]

    def push_and_pull(self, table: Tensor, x: Tensor, step: Step) -> Tensor:
        """Stores the rows of `x` span by span, and puts the halo rows of the table behind them."""
        with torch.no_grad():
            rows, start = x.to(table.device), 0
            for first, last in step.spans:
                table[first:last] = rows[start : start + last - first]
                start += last - first
            halo = table.index_select(0, step.halo_ids).to(x.device)
        return torch.cat([x, halo])

    def forward(self, step: Step) -> Tensor:
        """[B, F_out]."""
        model, x = self.model, step.x
        x = self._drop(x) if model.drop_input else x
        if isinstance(model, models.APPNP):
            return self._propagate(model.lins[1](self._drop(model.lins[0](x).relu_())), step)
        if len(model.lins):
            x = self._drop(model.lins[0](x).relu_())
        initial, num_layers = x[: step.adjacency.size[0]], len(model.convs)
        for place, conv in enumerate(model.convs):
            x = apply(conv, x, initial, step.adjacency)
            is_last = place == num_layers - 1
            if is_last and not len(model.lins):
                return x
            x = model.activation(x)
            x = self._drop(x if is_last else self.push_and_pull(self.tables[place], x, step))
        return model.lins[1](x)

    def _propagate(self, x: Tensor, step: Step) -> Tensor:
        initial, steps = x[: step.adjacency.size[0]], self.model.propagation.steps
        for place, conv in enumerate(steps):
            x = (1 - conv.alpha) * step.adjacency.matmul(x) + conv.alpha * initial
            x = x if place == len(steps) - 1 else self.push_and_pull(self.tables[place], x, step)
        return x

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.model.dropout, self.training)


def apply(conv: Any, x: Tensor, initial: Tensor, adjacency: Adjacency) -> Tensor:
    """[B, F_out] of a layer of ours on rows [B + H, F_in], as PyG's layer of its name does it given a `SparseTensor`.

    Args:
        conv: a layer of `gas_triton.nn`.
        x: in-batch rows, then halo rows.
        initial: in-batch rows of the first layer, which GCN2Conv reads.
        adjacency: edges of the batch.
    """
    num_rows = adjacency.size[0]
    match conv:
        case layers.GATConv():
            return plain.gat(conv, x, adjacency.edges)
        case layers.GCNConv():
            out = adjacency.matmul(conv.lin(x))
            return out if conv.bias is None else out + conv.bias
        case layers.SAGEConv():
            return conv.lin_l(adjacency.matmul(x, conv.aggr)) + conv.lin_r(x[:num_rows])
        case layers.GINConv():
            return conv.nn(adjacency.matmul(x) + (1 + conv.eps) * x[:num_rows])
        case layers.GCN2Conv():
            out = adjacency.matmul(x) * (1 - conv.alpha) + conv.alpha * initial
            return torch.addmm(out, out, conv.weight1, beta=1.0 - conv.beta, alpha=conv.beta)
        case layers.LightPNAConv():
            return _light_pna(conv, x, adjacency)
    raise TypeError(f"PyGAS's way of {type(conv).__name__} is not written")


def _light_pna(conv: Any, x: Tensor, adjacency: Adjacency) -> Tensor:
    # PyGAS's own layer, pair by pair
    logarithm = (adjacency.degree.to(x.dtype) + 1).log()[:, None]
    out: Any = 0
    pairs = itertools.product(conv.aggregators, conv.scalers)
    for (reduce, scaler), pre, post in zip(pairs, conv.pre_lins, conv.post_lins, strict=True):
        h = post(adjacency.matmul(pre(x).relu_(), reduce))
        if scaler == "amplification":
            h = h * (logarithm / conv.avg_deg_log)
        elif scaler == "attenuation":
            h = h * (conv.avg_deg_log / (logarithm + 1e-5))
        out = out + h
    return out + conv.lin(x)[: adjacency.size[0]]

"""Layers of torch_geometric in plain torch, operation by operation: what benchmarks compare with where it is absent.

Each function takes a layer of `gas_triton.nn`, whose parameters are PyG's, and computes what PyG's layer does on an
edge list: source rows gathered to [E, ...], a softmax of scattered maxima and sums, scattered reductions. It makes the
tensors that PyG makes and drops them when PyG does, so that its time and memory stand for PyG's.
`tests/test_bench_layers.py` holds it to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import Batch
from gas_triton.nn import GATConv, GATv2Conv, PNAConv, TransformerConv

WAY = "PyG's way"


@dataclass(frozen=True)
class Edges:
    """Edges into the first rows of a tensor.

    Attributes:
        source: int64 [E], rows of the tensor.
        target: int64 [E], ascending.
        num_rows: B, rows that edges go to.
    """

    source: Tensor
    target: Tensor
    num_rows: int

    @property
    def index(self) -> Tensor:
        """PyG's `edge_index`."""
        return torch.stack([self.source, self.target])


def edges_of(batch: Batch) -> tuple[Edges, Tensor]:
    """The edges of a batch in the order of their targets, as PyG wants them, and their places in the batch's order."""
    joint = batch.joint()
    target = torch.repeat_interleave(torch.arange(batch.num_nodes, device=batch.device), joint.rowptr.diff().long())
    place = torch.arange(batch.num_edges, device=batch.device) if joint.edge_id is None else joint.edge_id.long()
    return Edges(joint.col.long(), target, batch.num_nodes), place


# --- what PyG's layers are made of -----------------------------------------------------------------------------------


def scatter(message: Tensor, edges: Edges, reduce: str = "sum") -> Tensor:
    """`torch_geometric.utils.scatter` of [E, ...] to [B, ...]."""
    index = edges.target.view(-1, *[1] * (message.dim() - 1)).expand_as(message)
    out = message.new_zeros(edges.num_rows, *message.shape[1:])
    if reduce == "sum":
        return out.scatter_add_(0, index, message)
    return out.scatter_reduce_(0, index, message, reduce=f"a{reduce}", include_self=False)


def softmax(logit: Tensor, edges: Edges) -> Tensor:
    """`torch_geometric.utils.softmax` over the edges of a row."""
    largest = scatter(logit.detach(), edges, "max")
    out = logit - largest.index_select(0, edges.target)
    out = out.exp()
    total = scatter(out, edges) + 1e-16
    total = total.index_select(0, edges.target)
    return out / total


def multi_aggregate(message: Tensor, edges: Edges, reduces: Sequence[str]) -> Tensor:
    """`torch_geometric.nn.MultiAggregation` of [E, ..., F], side by side: [B, ..., K * F].

    PyG fuses the aggregations of two-dimensional messages: mean and std then share their sums.
    """
    if message.dim() > 2:
        return torch.cat([_aggregate(message, edges, name) for name in reduces], dim=-1)
    count = message.new_zeros(edges.num_rows)
    count.scatter_add_(0, edges.target, message.new_ones(message.size(0)))
    count = count.clamp_(min=1).view(-1, 1)
    found: dict[str, Tensor] = {}
    for name in reduces:
        if name in ("std", "var"):
            found[name] = scatter(message * message, edges)
        elif name != "mean" or "sum" not in reduces:
            found[name] = scatter(message, edges, "sum" if name == "mean" else name)
    if "mean" in reduces:
        found["mean"] = found["sum" if "sum" in reduces else "mean"] / count
    for name in {"std", "var"} & set(reduces):
        mean = found["mean"] if "mean" in reduces else scatter(message, edges) / count
        found[name] = found[name] / count - mean * mean
        if name == "std":
            found[name] = _root(found[name])
    return torch.cat([found[name] for name in reduces], dim=-1)


def _aggregate(message: Tensor, edges: Edges, reduce: str) -> Tensor:
    if reduce == "mean":
        count = message.new_zeros(edges.num_rows)
        count.scatter_add_(0, edges.target, message.new_ones(message.size(0)))
        count = count.clamp(min=1)
        return scatter(message, edges) / count.view(-1, *[1] * (message.dim() - 1))
    if reduce in ("std", "var"):
        mean = _aggregate(message, edges, "mean")
        variance = _aggregate(message * message, edges, "mean") - mean * mean
        return _root(variance) if reduce == "std" else variance
    return scatter(message, edges, reduce)


def _root(variance: Tensor) -> Tensor:
    out = variance.clamp(min=1e-5).sqrt()
    return out.masked_fill(out <= math.sqrt(1e-5), 0.0)


# --- layers ----------------------------------------------------------------------------------------------------------


def layer(conv: nn.Module, x: Tensor, edges: Edges, edge_attr: Tensor | None = None) -> Tensor:
    """[B, F_out] of rows [B + H, F_in] and edge features [E, edge_dim] in the order of the edges.

    Args:
        conv: a GATConv, GATv2Conv, TransformerConv or PNAConv without residual, gate or self loops to fill.
        x: in-batch rows, then halo rows.
        edges: between them.
        edge_attr: features of the edges.
    """
    if isinstance(conv, GATConv):
        return gat(conv, x, edges, edge_attr)
    if isinstance(conv, GATv2Conv):
        return gatv2(conv, x, edges, edge_attr)
    if isinstance(conv, TransformerConv):
        return transformer(conv, x, edges, edge_attr)
    assert isinstance(conv, PNAConv), f"no plain layer for {type(conv).__name__}"
    return pna(conv, x, edges, edge_attr)


def gat(conv: GATConv, x: Tensor, edges: Edges, edge_attr: Tensor | None = None) -> Tensor:
    """`torch_geometric.nn.GATConv` given (x, x of the in-batch rows)."""
    heads = (-1, conv.heads, conv.out_channels)
    source, target = conv.lin(x).view(heads), conv.lin(x[: edges.num_rows]).view(heads)
    of_source, of_target = (source * conv.att_src).sum(-1), (target * conv.att_dst).sum(-1)

    def attend() -> Tensor:
        logit = of_source.index_select(0, edges.source) + of_target.index_select(0, edges.target)
        if edge_attr is not None and conv.lin_edge is not None and conv.att_edge is not None:
            edge = conv.lin_edge(edge_attr).view(heads)
            logit = logit + (edge * conv.att_edge).sum(-1)
        alpha = softmax(F.leaky_relu(logit, conv.negative_slope), edges)
        return F.dropout(alpha, conv.dropout, conv.training)

    alpha = attend()
    out = scatter(alpha.unsqueeze(-1) * source.index_select(0, edges.source), edges)
    out = out.flatten(1) if conv.concat else out.mean(1)
    return out if conv.bias is None else out + conv.bias


def gatv2(conv: GATv2Conv, x: Tensor, edges: Edges, edge_attr: Tensor | None = None) -> Tensor:
    """`torch_geometric.nn.GATv2Conv` given (x, x of the in-batch rows)."""
    heads = (-1, conv.heads, conv.out_channels)
    source, target = conv.lin_l(x).view(heads), conv.lin_r(x[: edges.num_rows]).view(heads)

    def attend() -> Tensor:
        of_target, of_source = target.index_select(0, edges.target), source.index_select(0, edges.source)
        pair = of_target + of_source
        if edge_attr is not None and conv.lin_edge is not None:
            edge = conv.lin_edge(edge_attr).view(heads)
            pair = pair + edge
        pair = F.leaky_relu(pair, conv.negative_slope)
        logit = (pair * conv.att).sum(-1)
        return F.dropout(softmax(logit, edges), conv.dropout, conv.training)

    alpha = attend()
    out = scatter(source.index_select(0, edges.source) * alpha.unsqueeze(-1), edges)
    out = out.flatten(1) if conv.concat else out.mean(1)
    return out if conv.bias is None else out + conv.bias


def transformer(conv: TransformerConv, x: Tensor, edges: Edges, edge_attr: Tensor | None = None) -> Tensor:
    """`torch_geometric.nn.TransformerConv` given (x, x of the in-batch rows)."""
    heads = (-1, conv.heads, conv.out_channels)
    own = x[: edges.num_rows]
    query, key, value = (lin(of).view(heads) for lin, of in
                         ((conv.lin_query, own), (conv.lin_key, x), (conv.lin_value, x)))  # fmt: skip
    query_i = query.index_select(0, edges.target)
    key_j, value_j = key.index_select(0, edges.source), value.index_select(0, edges.source)

    def message() -> Tensor:
        keys, values = key_j, value_j
        if edge_attr is not None and conv.lin_edge is not None:
            edge = conv.lin_edge(edge_attr).view(heads)
            keys = key_j + edge
        alpha = softmax((query_i * keys).sum(-1) / math.sqrt(conv.out_channels), edges)
        alpha = F.dropout(alpha, conv.dropout, conv.training)
        if edge_attr is not None:
            values = value_j + edge
        return values * alpha.unsqueeze(-1)

    out = scatter(message(), edges)
    out = out.flatten(1) if conv.concat else out.mean(1)
    return out + conv.lin_skip(own)


def pna(conv: PNAConv, x: Tensor, edges: Edges, edge_attr: Tensor | None = None) -> Tensor:
    """`torch_geometric.nn.PNAConv`; PyG's has no way to leave out the halo rows, which it computes too."""
    towers = conv.towers
    rows = x.view(-1, towers, conv.F_in) if conv.divide_input else x.view(-1, 1, conv.F_in).repeat(1, towers, 1)
    everything = Edges(edges.source, edges.target, x.size(0))

    x_i, x_j = rows.index_select(0, edges.target), rows.index_select(0, edges.source)

    def messages() -> Tensor:
        parts = [x_i, x_j]
        if edge_attr is not None:
            parts.append(conv.edge_encoder(edge_attr).view(-1, 1, conv.F_in).repeat(1, towers, 1))
        pair = torch.cat(parts, dim=-1)
        return torch.stack([pre_nn(pair[:, tower]) for tower, pre_nn in enumerate(conv.pre_nns)], dim=1)

    out = multi_aggregate(messages(), everything, conv.aggregators)
    degree = out.new_zeros(x.size(0)).scatter_add_(0, edges.target, out.new_ones(edges.target.numel()))
    factors = conv.aggr_module(degree)
    # PyG does not multiply by the factor of "identity"
    scaled = [
        out if name == "identity" else out * factors[:, place].view(-1, 1, 1) for place, name in enumerate(conv.scalers)
    ]
    out = torch.cat([rows, *scaled], dim=-1)
    outs = [post_nn(out[:, tower]) for tower, post_nn in enumerate(conv.post_nns)]
    return conv.lin(torch.cat(outs, dim=1))[: edges.num_rows]

"""What gas_triton should do, written with dictionaries, index_select, cat and index_add."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gas_triton import Graph


class Edges(NamedTuple):
    """A graph as an edge list in no order; `edge_index[0]` are sources, `edge_index[1]` targets."""

    edge_index: Tensor
    weight: Tensor | None
    num_nodes: int

    def graph(self) -> Graph:
        return Graph.from_edge_index(self.edge_index, self.weight, self.num_nodes)

    def triples(self) -> list[tuple[int, int, float]]:
        """(target, source, weight) of every edge, sorted."""
        source, target = self.edge_index.tolist()
        weight = [1.0] * len(source) if self.weight is None else self.weight.tolist()
        return sorted(zip(target, source, weight, strict=True))

    def scipy(self) -> sp.csr_matrix:
        """The matrix [target, source] in float64; duplicate edges are summed."""
        source, target = self.edge_index.numpy()
        weight = torch.ones(len(source)) if self.weight is None else self.weight
        return sp.csr_matrix((weight.double().numpy(), (target, source)), shape=(self.num_nodes, self.num_nodes))


def random_edges(
    num_nodes: int = 30,
    num_edges: int = 90,
    *,
    symmetric: bool = False,
    weighted: bool = False,
    plain: bool = False,
    isolated: int = 3,
    seed: int = 0,
) -> Edges:
    """Random edges in random order.

    Args:
        num_nodes: N.
        num_edges: edges drawn before duplicates and reverses are added.
        symmetric: adds the reverse of every edge, with the same weight.
        weighted: gives float64 weights in [0.1, 1.1).
        plain: leaves out self loops and duplicates, of which there are some otherwise.
        isolated: nodes that no edge touches, anywhere among the ids.
        seed: seed of the draw.
    """
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_nodes, generator=draw)
    pairs = torch.randint(num_nodes - isolated, (2, num_edges), generator=draw)
    if symmetric:
        # the copies of a duplicate edge then come in the same order in both directions
        pairs = pairs.sort(0).values
    is_loop = pairs[0] == pairs[1]
    if plain:
        pairs = pairs[:, ~is_loop].unique(dim=1)
    elif num_edges:
        loops = torch.arange(0, num_nodes - isolated, 4).expand(2, -1)
        pairs = torch.cat([pairs, pairs[:, : num_edges // 5], loops], dim=1)
    weight = torch.rand(pairs.size(1), generator=draw, dtype=torch.float64) + 0.1 if weighted else None
    if symmetric:
        is_edge = pairs[0] != pairs[1]
        pairs = torch.cat([pairs, pairs[:, is_edge].flip(0)], dim=1)
        weight = None if weight is None else torch.cat([weight, weight[is_edge]])
    # only whole groups of equal edges change places, so that copies of an edge stay in order
    pairs = order[pairs]
    group = torch.unique(pairs, dim=1, return_inverse=True)[1]
    place = torch.sort(torch.randperm(pairs.size(1), generator=draw)[group], stable=True).indices
    return Edges(pairs[:, place], None if weight is None else weight[place], num_nodes)


GRAPHS = {
    "directed": random_edges(),
    "symmetric": random_edges(symmetric=True),
    "weighted_directed": random_edges(weighted=True),
    "weighted_symmetric": random_edges(weighted=True, symmetric=True),
    "simple": random_edges(plain=True, symmetric=True, isolated=0),
    # node 0 has no edge into it, node 1 only one without weight
    "path": Edges(torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64), 4),
    "no_edges": random_edges(num_nodes=5, num_edges=0),
    "one_node": Edges(torch.zeros(2, 2, dtype=torch.int64), None, 1),
}


# --- batches ---------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A batch as a dictionary would make it; edges are (row, graph id of the source, place in the graph's `col`)."""

    node_ids: list[int]
    halo_ids: list[int]
    inner: list[tuple[int, int, int]]
    outer: list[tuple[int, int, int]]


def brute_force_plan(graph: Graph, node_ids: Sequence[int]) -> Plan:
    rowptr, col = graph.rowptr.tolist(), graph.col.tolist()
    inside = set(node_ids)
    inner, outer = [], []
    for row, node in enumerate(node_ids):
        for place in range(rowptr[node], rowptr[node + 1]):
            (inner if col[place] in inside else outer).append((row, col[place], place))
    return Plan(list(node_ids), sorted({source for _, source, _ in outer}), inner, outer)


class Block(NamedTuple):
    """The edges of a batch under local ids: sources are in-batch rows, then halo rows."""

    source: Tensor
    target: Tensor
    weight: Tensor | None
    node_ids: Tensor
    halo_ids: Tensor

    @property
    def num_rows(self) -> int:
        return self.node_ids.numel()


def block(graph: Graph, node_ids: Sequence[int]) -> Block:
    """The batch of `node_ids`, found with a dictionary."""
    plan = brute_force_plan(graph, node_ids)
    local = {node: place for place, node in enumerate([*plan.node_ids, *plan.halo_ids])}
    edges = [*plan.inner, *plan.outer]
    place = torch.tensor([place for _, _, place in edges], dtype=torch.int64)
    return Block(
        source=torch.tensor([local[source] for _, source, _ in edges], dtype=torch.int64),
        target=torch.tensor([row for row, _, _ in edges], dtype=torch.int64),
        weight=None if graph.weight is None else graph.weight[place],
        node_ids=torch.tensor(plan.node_ids, dtype=torch.int64),
        halo_ids=torch.tensor(plan.halo_ids, dtype=torch.int64),
    )


# --- layers ----------------------------------------------------------------------------------------------------------

Parameters = dict[str, Tensor]
Layer = Callable[[Parameters, Tensor, Block], Tensor]


def aggregate(x: Tensor, edges: Block, weight: Tensor | None = None, reduce: str = "sum") -> Tensor:
    message = x.index_select(0, edges.source)
    if weight is not None:
        message = message * weight[:, None]
    out = x.new_zeros(edges.num_rows, x.size(1))
    if reduce in ("max", "min"):
        index = edges.target[:, None].expand_as(message)
        return out.scatter_reduce(0, index, message, f"a{reduce}", include_self=False)
    out = out.index_add(0, edges.target, message)
    if reduce == "mean":
        out = out / torch.bincount(edges.target, minlength=edges.num_rows).clamp(min=1)[:, None]
    return out


def gcn(p: Parameters, x: Tensor, edges: Block) -> Tensor:
    return F.linear(aggregate(x, edges, edges.weight), p["lin.weight"], p.get("bias"))


def sage(p: Parameters, x: Tensor, edges: Block, reduce: str = "mean") -> Tensor:
    neighbours = F.linear(x, p["lin.weight"], p["lin.bias"]).relu() if "lin.weight" in p else x
    out = F.linear(aggregate(neighbours, edges, reduce=reduce), p["lin_l.weight"], p.get("lin_l.bias"))
    return out + x[: edges.num_rows] @ p["lin_r.weight"].T if "lin_r.weight" in p else out


def gin(p: Parameters, x: Tensor, edges: Block) -> Tensor:
    h = aggregate(x, edges) + (1 + p["eps"]) * x[: edges.num_rows]
    return F.linear(F.linear(h, p["nn.0.weight"], p["nn.0.bias"]).relu(), p["nn.2.weight"], p["nn.2.bias"])


def light_pna(
    p: Parameters, x: Tensor, edges: Block, aggregators: Sequence[str], scalers: Sequence[str], mean_log: float
) -> Tensor:
    """PyGAS's PNAConv; `mean_log` is the mean of log(degree + 1) over the graph."""
    degree = torch.bincount(edges.target, minlength=edges.num_rows).to(x.dtype)[:, None]
    scale = {
        "identity": torch.ones_like(degree),
        "amplification": (degree + 1).log() / mean_log,
        "attenuation": mean_log / ((degree.clamp(min=1) + 1).log() + 1e-5),
    }
    out = F.linear(x[: edges.num_rows], p["lin.weight"], p["lin.bias"])
    pairs = [(aggregator, scaler) for aggregator in aggregators for scaler in scalers]
    for place, (aggregator, scaler) in enumerate(pairs):
        h = F.linear(x, p[f"pre_lins.{place}.weight"], p[f"pre_lins.{place}.bias"]).relu()
        h = aggregate(h, edges, reduce=aggregator)
        out = out + scale[scaler] * F.linear(h, p[f"post_lins.{place}.weight"], p[f"post_lins.{place}.bias"])
    return out


# --- training with histories -----------------------------------------------------------------------------------------


class GasReference:
    """A stack of one kind of layer with ReLUs between, trained with histories (Fey et al., ICML 2021).

    Attributes:
        parameters: of each layer, leaves.
        tables: the history of each layer's input, None for the first.
    """

    def __init__(
        self,
        layer: Layer,
        parameters: Iterable[Parameters],
        widths: Sequence[int],
        graph: Graph,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.layer, self.graph = layer, graph
        self.parameters = [
            {name: value.detach().clone().requires_grad_() for name, value in own.items()} for own in parameters
        ]
        self.tables = [torch.zeros(graph.num_nodes, width, dtype=dtype) for width in widths]

    def leaves(self) -> list[Tensor]:
        return [value for own in self.parameters for value in own.values()]

    def forward(self, x: Tensor, node_ids: Sequence[int]) -> Tensor:
        """[B, C]; pushes in-batch rows to every table, then pulls halo rows from it."""
        edges = block(self.graph, node_ids)
        h = x.index_select(0, torch.cat([edges.node_ids, edges.halo_ids]))
        for depth, parameters in enumerate(self.parameters):
            if depth > 0:
                table = self.tables[depth]
                table[edges.node_ids] = h.detach().to(table.dtype)
                h = torch.cat([h, table.index_select(0, edges.halo_ids).to(h.dtype)])
            h = self.layer(parameters, h, edges)
            h = h.relu() if depth < len(self.parameters) - 1 else h
        return h

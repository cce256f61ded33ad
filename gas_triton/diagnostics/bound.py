"""How far the error of histories can reach: Theorem 2 of Fey et al. (ICML 2021), and the recursion behind it.

Both are derived here, from the Lipschitz constants of the layers as they are: the theorem has the form of the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gas_triton.diagnostics.edges import BatchEdges
from gas_triton.diagnostics.wiring import Link
from gas_triton.graph import Graph
from gas_triton.nn.lipschitz import Lipschitz

__all__ = ["NodeBounds", "node_bounds", "uniform_bounds"]


@dataclass(frozen=True)
class NodeBounds:
    """Upper bounds of the errors of rows that are computed with histories.

    Attributes:
        inputs: of the input rows of a layer, [N], by place of the call.
        output: of the model's output rows, [N].
    """

    inputs: dict[int, Tensor]
    output: Tensor


def node_bounds(
    edges: BatchEdges, gains: Mapping[int, Lipschitz], links: Sequence[Link], history_error: Mapping[int, Tensor]
) -> NodeBounds:
    r"""The recursion, node by node.

    With e_v the error of a layer's input row, and e_u that of u's history where u is a halo row, the output row is off
    by at most `own e_v + neighbours sum_u |w_uv| e_u` (of `Lipschitz`), and the next input row by what the link makes
    of it. Rows are exact in front of the first layer that reads a history.

    Args:
        edges: of all batches.
        gains: by place, of the layers that read histories.
        links: what stands behind each call.
        history_error: by place, errors of the rows in histories, [N].
    """
    inputs: dict[int, Tensor] = {}
    error = torch.zeros_like(next(iter(history_error.values())))
    all_outputs = error
    for place, link in enumerate(links):
        moved = torch.zeros_like(error)
        if place in history_error:
            inputs[place] = error
            moved = edges.moved(error, history_error[place], gains[place])
        if link.of_outputs:
            all_outputs = torch.hypot(all_outputs, moved)
            error = link.factor * all_outputs
        else:
            moved = link.norm * moved
            error = link.factor * (moved + error if link.has_residual else moved)
    return NodeBounds(inputs, error)


def uniform_bounds(
    graph: Graph, gains: Mapping[int, Lipschitz], links: Sequence[Link], staleness: Mapping[int, float]
) -> tuple[dict[int, float], float]:
    r"""Theorem 2 with the constants of every layer: one number for all nodes.

    `E_{l+1} = k_own E_l + k_neighbours D (E_l + eps_l)`, with eps_l the largest distance between a row in the history
    and the same row computed now, and D what the spread makes of the most neighbours: their number times the largest
    weight for a sum, 1 for a mean. Without own rows and residuals this is the paper's
    `sum_l eps_l (k_1 k_2 |N(v)|)^(L - l)`.

    Args:
        graph: the graph.
        gains: by place, of the layers that read histories.
        links: what stands behind each call.
        staleness: eps by place.

    Returns:
        Bounds of the input rows by place, and of the output rows; infinite where they exceed a float.
    """
    degree = float(graph.degree.max()) if graph.num_nodes else 0.0
    largest = float(graph.weight.abs().max()) if graph.weight is not None and graph.num_edges else 1.0
    inputs: dict[int, float] = {}
    error = squares = 0.0
    for place, link in enumerate(links):
        moved = 0.0
        if place in gains:
            inputs[place], gain = error, gains[place]
            spread = {"sum": degree, "mean": 1.0, "root": degree**0.5, "max": 1.0}[gain.spread]
            spread *= largest if gain.weighted else 1.0
            moved = gain.own * error + gain.neighbours * spread * (error + staleness[place])
        if link.of_outputs:
            squares += moved * moved
            error = link.factor * squares**0.5
        else:
            error = link.factor * (link.norm * moved + (error if link.has_residual else 0.0))
    return inputs, error

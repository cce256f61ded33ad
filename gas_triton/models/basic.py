"""GCN, GraphSAGE and GIN."""

from __future__ import annotations

from typing import Any

from torch import nn

from gas_triton.graph import Graph
from gas_triton.models.stack import Stack
from gas_triton.nn import GCNConv, GINConv, SAGEConv
from gas_triton.nn.base import HistoryLayer


class GCN(Stack):
    """A stack of `GCNConv` (Kipf and Welling, ICLR 2017); see `Stack` for the arguments."""

    @staticmethod
    def prepare(graph: Graph) -> Graph:
        return graph.add_self_loops().gcn_norm()

    def make_conv(self, in_channels: int, out_channels: int, **options: Any) -> HistoryLayer:
        return GCNConv(in_channels, out_channels, **options)


class SAGE(Stack):
    """A stack of `SAGEConv` (Hamilton et al., NeurIPS 2017); see `Stack` for the arguments."""

    def make_conv(self, in_channels: int, out_channels: int, **options: Any) -> HistoryLayer:
        return SAGEConv(in_channels, out_channels, **options)


class GIN(Stack):
    """A stack of `GINConv` with two-layer perceptrons (Xu et al., ICLR 2019); see `Stack` for the arguments.

    Three more are `train_eps` (True), `perceptron_norm` (False) and `running_statistics` (True). With the second, a
    perceptron is a linear layer, `BatchNorm1d`, ReLU, a linear layer and ReLU. With `linear` and `residual`, without
    the third, this is the GIN of PyGAS's example on CLUSTER: evaluation takes the statistics of the rows that it is
    given, so evaluate the whole graph at once.
    """

    def make_conv(self, in_channels: int, out_channels: int, **options: Any) -> HistoryLayer:
        hidden, has_norm = self.hidden_channels, options.pop("perceptron_norm", False)
        runs = options.pop("running_statistics", True)
        perceptron = nn.Sequential(
            nn.Linear(in_channels, hidden),
            *([nn.BatchNorm1d(hidden, track_running_stats=runs)] if has_norm else []),
            nn.ReLU(),
            nn.Linear(hidden, out_channels),
            *([nn.ReLU()] if has_norm else []),
        )
        return GINConv(perceptron, train_eps=options.pop("train_eps", True), **options)

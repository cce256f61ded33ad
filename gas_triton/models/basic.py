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
    """A stack of `GINConv` with two-layer perceptrons (Xu et al., ICLR 2019); see `Stack` for the arguments."""

    def make_conv(self, in_channels: int, out_channels: int, **options: Any) -> HistoryLayer:
        perceptron = nn.Sequential(
            nn.Linear(in_channels, self.hidden_channels), nn.ReLU(), nn.Linear(self.hidden_channels, out_channels)
        )
        return GINConv(perceptron, train_eps=options.pop("train_eps", True), **options)

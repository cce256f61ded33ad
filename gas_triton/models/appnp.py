"""APPNP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gas_triton import nn as layers
from gas_triton.batch import Batch
from gas_triton.functional import Features, Halo, Rows
from gas_triton.functional.dropout import check_probability
from gas_triton.graph import Graph
from gas_triton.models.base import Model, check_sizes


class APPNP(Model):
    """Predictions of a perceptron, propagated (Gasteiger et al., ICLR 2019); histories are `out_channels` wide.

    Args:
        in_channels: F_in.
        hidden_channels: width between the two linear layers.
        out_channels: F_out.
        num_layers: K, steps of propagation; with histories, K - 1 tables.
        alpha: weight of the predictions in every step (the teleport probability), in [0, 1].
        dropout: applied to the input of both linear layers.
        drop_input: whether the first one's input is dropped too.
        edge_dropout: drops edges in every step, see `gas_triton.nn.APPNP`.
        normalize: whether the graph must be normalised, see `gas_triton.nn.APPNP`.
        halo: "drop" leaves halo neighbours out (Cluster-GCN).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        alpha: float = 0.1,
        dropout: float = 0.0,
        drop_input: bool = True,
        edge_dropout: float = 0.0,
        normalize: bool = True,
        halo: Halo = "read",
    ) -> None:
        super().__init__()
        check_sizes(in_channels, hidden_channels, out_channels, num_layers)
        check_probability("dropout", dropout)
        check_probability("edge_dropout", edge_dropout)
        self.dropout, self.drop_input = dropout, drop_input
        self.lins = nn.ModuleList([nn.Linear(in_channels, hidden_channels), nn.Linear(hidden_channels, out_channels)])
        self.propagation = layers.APPNP(
            num_layers, alpha, edge_dropout, normalize=normalize, channels=out_channels, halo=halo
        )

    @staticmethod
    def prepare(graph: Graph) -> Graph:
        return graph.add_self_loops().gcn_norm()

    @property
    def nonreg_parameters(self) -> list[nn.Parameter]:
        """Those of the second linear layer."""
        return list(self.lins[1].parameters())

    def reset_parameters(self) -> None:
        lins: list[Any] = list(self.lins)
        for lin in lins:
            lin.reset_parameters()

    def forward(self, x: Rows, batch: Batch) -> Tensor:
        rows = x.rows() if isinstance(x, Features) else x
        if self.drop_input:
            rows = self.drop(rows, batch)
        rows = self.drop(self.lins[0](rows).relu(), batch)
        return self.propagation(self.lins[1](rows), batch)

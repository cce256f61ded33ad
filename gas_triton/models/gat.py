"""`GAT`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gas_triton.graph import Graph
from gas_triton.models.stack import Stack
from gas_triton.nn import GATConv
from gas_triton.nn.base import HistoryLayer, check_channels


class GAT(Stack):
    """A stack of `GATConv` (Velickovic et al., ICLR 2018) with ELUs between.

    Hidden layers lay their heads side by side, so histories are `hidden_channels * hidden_heads` wide; the last layer
    averages its heads (with `linear`, it is a hidden layer too).

    Args:
        in_channels: F_in.
        hidden_channels: width of a head of the hidden layers.
        out_channels: F_out.
        num_layers: L.
        hidden_heads: heads of the hidden layers.
        out_heads: heads of the last layer.
        dropout: drops features of the input of every layer, after it is pushed, and attention weights.
        **options: see `Stack` and `GATConv`.
    """

    activation = staticmethod(torch.nn.functional.elu)

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        hidden_heads: int = 8,
        out_heads: int = 1,
        dropout: float = 0.0,
        linear: bool = False,
        **options: Any,
    ) -> None:
        width = check_channels("hidden_channels", hidden_channels) * check_channels("hidden_heads", hidden_heads)
        super().__init__(
            in_channels, width, out_channels, num_layers, dropout=dropout, linear=linear, hidden_heads=hidden_heads,
            out_heads=out_heads, num_hidden=num_layers if linear else num_layers - 1, attention_dropout=dropout,
            **options,
        )  # fmt: skip

    @staticmethod
    def prepare(graph: Graph) -> Graph:
        return graph.add_self_loops()

    def make_conv(self, in_channels: int, out_channels: int, **options: Any) -> HistoryLayer:
        hidden_heads, out_heads = options.pop("hidden_heads"), options.pop("out_heads")
        options["dropout"] = options.pop("attention_dropout")
        if len(self.convs) < options.pop("num_hidden"):
            return GATConv(in_channels, out_channels // hidden_heads, hidden_heads, **options)
        return GATConv(in_channels, out_channels, out_heads, concat=False, **options)

    @property
    def nonreg_parameters(self) -> list[nn.Parameter]:
        """Parameters that PyGAS gives no weight decay: none but those of the linear ends."""
        return super().nonreg_parameters if len(self.lins) else []

"""`Model`: what a training loop asks of every model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.functional import Rows, StaticInput
from gas_triton.graph import Graph
from gas_triton.nn.base import check_channels


class Model(nn.Module):
    """A model of `gas_triton.nn` layers that says which graph and which weight decay it expects."""

    @staticmethod
    def prepare(graph: Graph) -> Graph:
        """The graph as the layers expect it; each model says which that is."""
        return graph

    @staticmethod
    def options_of(graph: Graph) -> dict[str, Any]:
        """Arguments of the model that depend on the graph, as a degree histogram does."""
        return {}

    dropout: float

    def drop(self, rows: Any, batch: Batch) -> Any:
        """Dropout of rows while training, by a mask that is not kept: a node's rows are dropped alike wherever read."""
        if not self.training or self.dropout == 0.0:
            return rows
        return functional.dropout(rows, batch, self.dropout, functional.draw_seed(batch.device))

    @property
    def static_input(self) -> StaticInput | None:
        """What the first layer reads of the features in every step; None if it reads something else in each."""
        return None

    @property
    def reg_parameters(self) -> list[nn.Parameter]:
        """Parameters that PyGAS gives weight decay: all others."""
        kept = {id(p) for p in self.nonreg_parameters}
        return [p for p in self.parameters() if id(p) not in kept]

    @property
    def nonreg_parameters(self) -> list[nn.Parameter]:
        """Parameters that PyGAS gives none, or another one."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        raise NotImplementedError

    def forward(self, x: Rows, batch: Batch) -> Tensor:
        """[B, F_out] of `x`: `batch.x` or `batch.features`."""
        raise NotImplementedError


def check_sizes(in_channels: int, hidden_channels: int, out_channels: int, num_layers: int) -> None:
    """Checks that the sizes of a model are positive."""
    check_channels("in_channels", in_channels)
    check_channels("hidden_channels", hidden_channels)
    check_channels("out_channels", out_channels)
    check_channels("num_layers", num_layers)

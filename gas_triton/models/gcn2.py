"""GCNII."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gas_triton.batch import Batch
from gas_triton.functional import Features, Rows
from gas_triton.functional.rows import in_batch_rows
from gas_triton.graph import Graph
from gas_triton.models.stack import Stack
from gas_triton.nn import GCN2Conv
from gas_triton.nn.base import HistoryLayer


class GCN2(Stack):
    """GCNII (Chen et al., ICML 2020): deep, with a residual to the first linear layer's output in every `GCN2Conv`.

    The linear ends are part of the model. `Stack` has the other arguments.

    Args:
        in_channels: F_in.
        hidden_channels: width of all layers.
        out_channels: F_out.
        num_layers: L; with histories, L - 1 tables.
        alpha: weight of the residual, in [0, 1].
        theta: how far layer l is from the identity: beta = log(theta / l + 1).
        shared_weights: False gives the residual weights of its own (GCNII*).
        **options: further arguments of `Stack` and of the layers.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        alpha: float = 0.1,
        theta: float = 0.5,
        shared_weights: bool = True,
        linear: bool = True,
        **options: Any,
    ) -> None:
        if not linear:
            raise ValueError("linear must be True for GCN2, whose residual is the first linear layer's output")
        super().__init__(
            in_channels, hidden_channels, out_channels, num_layers, linear=True, alpha=alpha, theta=theta,
            shared_weights=shared_weights, **options,
        )  # fmt: skip

    @staticmethod
    def prepare(graph: Graph) -> Graph:
        return graph.add_self_loops().gcn_norm()

    def make_conv(self, in_channels: int, out_channels: int, **options: Any) -> HistoryLayer:
        return GCN2Conv(in_channels, layer=len(self.convs) + 1, **options)

    def common_inputs(self, x: Rows, batch: Batch) -> tuple[Tensor, ...]:
        # once, as the gradient of a slice is a copy with zeros
        return (x.in_batch() if isinstance(x, Features) else in_batch_rows(x, batch),)

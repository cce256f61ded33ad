"""`APPNP` and `APPNPConv`, one of its steps."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Features
from gas_triton.functional.dropout import check_probability
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.gcn2_conv import check_alpha, initial_rows
from gas_triton.nn.lipschitz import Lipschitz
from gas_triton.nn.normalization import check_normalization


class APPNPConv(HistoryLayer):
    r"""A step of `APPNP`, reading halo neighbours from a history.

    `out_i = (1 - alpha) sum_{j in N(i)} w_ij x_j + alpha x_0,i`, with w the weights of the batch's graph. The residual
    x_0 is added by the kernel that aggregates. There are no parameters.

    Args:
        channels: F; None takes rows of any width, but then the layer cannot have a history.
        alpha: weight of x_0 (the teleport probability), in [0, 1].
        dropout: drops edges with this probability while training, and scales the others by 1 / (1 - dropout).
        add_self_loops: whether the normalised graph must have them.
        normalize: whether the graph must be normalised (`graph.add_self_loops().gcn_norm()`); False uses its weights as
            they are.
        input_dropout: of x, not of x_0; see `HistoryLayer`.
        halo: see `HistoryLayer`.
    """

    def __init__(
        self,
        channels: int | None,
        alpha: float,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        normalize: bool = True,
        *,
        input_dropout: float = 0.0,
        halo: Halo = "read",
    ) -> None:
        super().__init__(input_dropout, halo)
        check_probability("dropout", dropout)
        self.channels = self.in_channels = None if channels is None else check_channels("channels", channels)
        self.alpha, self.dropout = check_alpha(alpha), dropout
        self.add_self_loops, self.normalize = add_self_loops, normalize

    @property
    def history_dim(self) -> int:
        if self.channels is None:
            raise ValueError(
                "APPNP cannot tell how wide its histories must be: give channels=, or the widths= of gas.autoscale"
            )
        return self.channels

    @property
    def lipschitz(self) -> Lipschitz:
        """With x_0 as it is."""
        return Lipschitz(0.0, 1.0 - self.alpha, weighted=True)

    def forward(self, x: Tensor | Features, x_0: Tensor | Features, batch: Batch) -> Tensor:
        """[B, F] of `x`: [B + H, F], [B, F] with a history, or `batch.features`.

        Args:
            x: rows of the step before.
            x_0: initial rows, [B, F] or [B + H, F], of which the first B are used, or `batch.features`.
            batch: the plan of the step.
        """
        if self.normalize:
            check_normalization("APPNP", batch, self.add_self_loops)
        x_0 = initial_rows(x_0, batch, self.channels)
        source = self.read(x, batch)
        weight = batch.edge_weight
        if self.training and self.dropout > 0.0:
            weight = F.dropout(x_0.new_ones(batch.num_edges) if weight is None else weight, self.dropout)
        return source.aggregate("sum", weight, x_0, self.alpha)

    def extra_repr(self) -> str:
        return f"{self.channels}, alpha={self.alpha}"


class APPNP(nn.Module):
    r"""Personalised PageRank propagation (Gasteiger et al., ICLR 2019), each step with a history of its own.

    `x_k = (1 - alpha) A x_{k-1} + alpha x_0` for k = 1 .. K, with A the weights of the batch's graph. The arguments are
    those of `torch_geometric.nn.APPNP`; there are no parameters.

    Args:
        K: steps.
        alpha: weight of x_0 (the teleport probability), in [0, 1].
        dropout: drops edges with this probability in each step while training, and scales the others by
            1 / (1 - dropout).
        cached: accepted for PyG's signature; the normalisation is always computed once, on the graph.
        add_self_loops: whether the normalised graph must have them.
        normalize: whether the graph must be normalised (`graph.add_self_loops().gcn_norm()`); False uses its weights as
            they are.
        channels: F, the width of the rows and of their histories; without histories it may be None.
        halo: see `HistoryLayer`.
    """

    def __init__(
        self,
        K: int,
        alpha: float,
        dropout: float = 0.0,
        cached: bool = False,
        add_self_loops: bool = True,
        normalize: bool = True,
        *,
        channels: int | None = None,
        halo: Halo = "read",
    ) -> None:
        super().__init__()
        self.K, self.cached, self.channels = check_channels("K", K), cached, channels
        self.steps = nn.ModuleList(
            APPNPConv(channels, alpha, dropout, add_self_loops, normalize, halo=halo) for _ in range(K)
        )

    def forward(self, x: Tensor | Features, batch: Batch) -> Tensor:
        """[B, F] of `x`: [B + H, F], [B, F] with a history, or `batch.features`; x_0 is its in-batch rows."""
        x_0 = initial_rows(x, batch, self.channels, "x")
        out: Any = x
        for step in self.steps:
            out = step(out, x_0, batch)
        return out

"""`Stack`: L layers with dropout, batch norm, residuals and linear ends, as PyGAS's models have them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Features, Rows, StaticInput
from gas_triton.functional.dropout import check_probability
from gas_triton.functional.rows import in_batch_rows
from gas_triton.models.base import Model, check_sizes
from gas_triton.nn.base import Halo, HistoryLayer


class Stack(Model):
    """A stack of layers of one kind; subclasses say which.

    Args:
        in_channels: F_in.
        hidden_channels: width between layers.
        out_channels: F_out.
        num_layers: L; with histories, L - 1 tables.
        dropout: applied to the input of every layer, after it is pushed.
        drop_input: whether the first layer's input is dropped too.
        batch_norm: `BatchNorm1d` after every layer but the last (after all with `linear`).
        residual: adds a layer's input to its output where the widths agree.
        linear: a linear layer in front and one behind; all L layers are then `hidden_channels` wide.
        halo: "drop" leaves halo neighbours out (Cluster-GCN).
        **options: further arguments of the layer.
    """

    activation: Callable[[Tensor], Tensor] = staticmethod(torch.relu)

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        dropout: float = 0.0,
        drop_input: bool = True,
        batch_norm: bool = False,
        residual: bool = False,
        linear: bool = False,
        halo: Halo = "read",
        **options: Any,
    ) -> None:
        super().__init__()
        check_sizes(in_channels, hidden_channels, out_channels, num_layers)
        check_probability("dropout", dropout)
        self.hidden_channels = hidden_channels
        self.dropout, self.drop_input, self.residual = dropout, drop_input, residual
        self.lins = nn.ModuleList()
        if linear:
            self.lins.append(nn.Linear(in_channels, hidden_channels))
            self.lins.append(nn.Linear(hidden_channels, out_channels))
        widths = [in_channels, *[hidden_channels] * (num_layers - 1), out_channels]
        if linear:
            widths = [hidden_channels] * (num_layers + 1)
        self.convs = nn.ModuleList()
        for place in range(num_layers):
            is_dropped = place > 0 or linear or drop_input
            self.convs.append(
                self.make_conv(
                    widths[place],
                    widths[place + 1],
                    input_dropout=dropout if is_dropped else 0.0,
                    halo=halo,
                    **options,
                )
            )
        num_norms = (num_layers if linear else num_layers - 1) if batch_norm else 0
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden_channels) for _ in range(num_norms))

    def make_conv(self, in_channels: int, out_channels: int, **options: Any) -> HistoryLayer:
        """The next layer of this model; `self.convs` holds those before it."""
        raise NotImplementedError

    def common_inputs(self, x: Rows, batch: Batch) -> tuple[Tensor, ...]:
        """What every layer is given between its rows and the batch, made from the first layer's rows `x`."""
        return ()

    @property
    def static_input(self) -> StaticInput | None:
        first: Any = self.convs[0]
        needed: StaticInput | None = None if len(self.lins) or first.input_dropout > 0.0 else first.static_input
        return needed

    @property
    def nonreg_parameters(self) -> list[nn.Parameter]:
        """Those of the linear ends, or else of the last layer."""
        last = self.lins if len(self.lins) else self.convs[-1:]
        return list(chain.from_iterable(module.parameters() for module in last))

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        modules: list[Any] = [*self.lins, *self.convs, *self.norms]
        for module in modules:
            module.reset_parameters()

    def forward(self, x: Rows, batch: Batch) -> Tensor:
        """[B, F_out] of `x`: `batch.x` or `batch.features`."""
        if len(self.lins):
            rows = x.rows() if isinstance(x, Features) else x
            if self.drop_input:
                rows = self.drop(rows, batch)
            x = self.lins[0](rows).relu()
        depth, common = len(self.convs), self.common_inputs(x, batch)
        for place, conv in enumerate(self.convs):
            h = conv(x, *common, batch)
            if place == depth - 1 and not len(self.lins):
                return h
            if len(self.norms):
                h = self.norms[place](h)
            if self.residual and h.size(1) == (x.num_features if isinstance(x, Features) else x.size(1)):
                h = h + (x.in_batch() if isinstance(x, Features) else in_batch_rows(x, batch))
            x = h = self.activation(h)
        return self.lins[1](self.drop(h, batch))

"""PNA, and PNA with jumping knowledge."""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Features, Rows
from gas_triton.functional.rows import in_batch_rows
from gas_triton.graph import Graph
from gas_triton.models.stack import Stack
from gas_triton.nn import LightPNAConv, degree_histogram
from gas_triton.nn.base import HistoryLayer


class PNA(Stack):
    """A stack of `LightPNAConv` (Corso et al., NeurIPS 2020, in the form of PyGAS).

    Takes the arguments of `Stack`, and

    * `deg`: the degree histogram of the graph, `PNA.options_of(graph)`; it must be given.
    * `aggregators`: see `LightPNAConv`; "mean" and "max" if not given.
    * `scalers`: see `LightPNAConv`; "identity" and "amplification" if not given.
    """

    @staticmethod
    def options_of(graph: Graph) -> dict[str, Any]:
        return {"deg": degree_histogram(graph)}

    def make_conv(self, in_channels: int, out_channels: int, **options: Any) -> HistoryLayer:
        if "deg" not in options:
            raise TypeError(f"{type(self).__name__} needs deg, a degree histogram: PNA.options_of(graph) gives it")
        options = {"aggregators": ("mean", "max"), "scalers": ("identity", "amplification"), **options}
        return LightPNAConv(in_channels, out_channels, **options)


class PNA_JK(PNA):
    """PNA with linear ends, the last of which reads the outputs of all layers (Xu et al., ICML 2018).

    All L layers are `hidden_channels` wide, and there is no dropout between the first linear layer and the first
    `LightPNAConv`; with `batch_norm`, there is a norm between them. See `PNA` for the arguments.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        linear: bool = True,
        **options: Any,
    ) -> None:
        if not linear:
            raise ValueError("linear must be True for PNA_JK, whose last layer reads all others, got False")
        super().__init__(in_channels, hidden_channels, out_channels, num_layers, linear=True, **options)
        self.lins[1] = nn.Linear((num_layers + 1) * hidden_channels, out_channels)
        self.input_norm = nn.BatchNorm1d(hidden_channels) if len(self.norms) else None
        cast(HistoryLayer, self.convs[0]).input_dropout = 0.0

    @property
    def nonreg_parameters(self) -> list[nn.Parameter]:
        """Those of the linear ends and of the norm behind the first."""
        modules = [*self.lins, *([] if self.input_norm is None else [self.input_norm])]
        return list(chain.from_iterable(module.parameters() for module in modules))

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        super().reset_parameters()
        if self.input_norm is not None:
            self.input_norm.reset_parameters()

    def forward(self, x: Rows, batch: Batch) -> Tensor:
        """[B, F_out] of `x`: `batch.x` or `batch.features`."""
        rows = x.rows() if isinstance(x, Features) else x
        if self.drop_input:
            rows = self.drop(rows, batch)
        rows = self.lins[0](rows)
        h = (rows if self.input_norm is None else self.input_norm(rows)).relu()
        outputs = [in_batch_rows(h, batch)]
        for place, conv in enumerate(self.convs):
            out = conv(h, batch)
            if len(self.norms):
                out = self.norms[place](out)
            if self.residual:
                out = out + in_batch_rows(h, batch)
            h = out.relu()
            outputs.append(h)
        return self.lins[1](self.drop(torch.cat(outputs, dim=1), batch))

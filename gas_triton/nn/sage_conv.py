"""`SAGEConv`."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Features, Reduce, StaticInput
from gas_triton.kernels.aggregate import REDUCTIONS
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.lipschitz import Lipschitz, Spread, spectral_norm

_SPREADS: dict[str, Spread] = {"sum": "sum", "mean": "mean", "max": "root", "min": "root"}


class SAGEConv(HistoryLayer):
    r"""GraphSAGE layer (Hamilton et al., NeurIPS 2017), reading halo neighbours from a history.

    `out_i = W_l aggr_{j in N(i)} h_j + W_r h_i`; edge weights are not used. Parameters have the names and shapes of
    `torch_geometric.nn.SAGEConv`, so a `state_dict` fits both ways.

    Args:
        in_channels: F_in.
        out_channels: F_out.
        aggr: "mean", "sum" ("add"), "max" or "min".
        normalize: divides each output row by its L2 norm.
        root_weight: adds W_r h_i.
        project: neighbours go through a linear layer and a ReLU first.
        bias: W_l has a bias.
        input_dropout: see `HistoryLayer`.
        halo: see `HistoryLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        aggr: str = "mean",
        normalize: bool = False,
        root_weight: bool = True,
        project: bool = False,
        bias: bool = True,
        *,
        input_dropout: float = 0.0,
        halo: Halo = "read",
    ) -> None:
        super().__init__(input_dropout, halo)
        self.in_channels = check_channels("in_channels", in_channels)
        self.out_channels = check_channels("out_channels", out_channels)
        reduce = "sum" if aggr == "add" else aggr
        if reduce not in REDUCTIONS:
            raise ValueError(f"aggr must be one of add, {', '.join(REDUCTIONS)}, got {aggr!r}")
        self.aggr = cast(Reduce, reduce)
        self.normalize, self.root_weight, self.project = normalize, root_weight, project
        if project:
            self.lin = nn.Linear(in_channels, in_channels)
        self.lin_l = nn.Linear(in_channels, out_channels, bias=bias)
        if root_weight:
            self.lin_r = nn.Linear(in_channels, out_channels, bias=False)

    @property
    def static_input(self) -> StaticInput | None:
        return None if self.project else StaticInput(self.aggr, weighted=False, own_rows=self.root_weight)

    @property
    def history_dim(self) -> int:
        return self.in_channels

    @property
    def lipschitz(self) -> Lipschitz | None:
        if self.normalize:
            # rows near 0 may turn anywhere
            return None
        own = spectral_norm(self.lin_r.weight) if self.root_weight else 0.0
        neighbours = spectral_norm(self.lin_l.weight) * (spectral_norm(self.lin.weight) if self.project else 1.0)
        return Lipschitz(own, neighbours, _SPREADS[self.aggr])

    def reset_parameters(self) -> None:
        """New parameters from torch's default for linear layers."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, x: Tensor | Features, batch: Batch) -> Tensor:
        """[B, F_out] of `x`: [B + H, F_in], [B, F_in] with a history, or `batch.features`."""
        source = self.read(x, batch)
        is_linear = self.aggr in ("sum", "mean") and not self.project
        if is_linear and source.is_cheaper_transformed(self.in_channels, self.out_channels):
            out = source.transform_then_aggregate(lambda rows: F.linear(rows, self.lin_l.weight), self.aggr)
            out = out if self.lin_l.bias is None else out + self.lin_l.bias
        elif self.project:
            out = self.lin_l(source.transform_then_aggregate(lambda rows: self.lin(rows).relu(), self.aggr))
        else:
            out = self.lin_l(source.aggregate(self.aggr))
        if self.root_weight:
            out = out + self.lin_r(source.in_batch())
        return F.normalize(out, p=2.0, dim=-1) if self.normalize else out

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, aggr={self.aggr}"

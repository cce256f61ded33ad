"""`LightPNAConv`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.functional import Features, MultiReduce
from gas_triton.functional.multi_aggregate import check_reduces
from gas_triton.functional.rows import in_batch_rows
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.pna_conv import check_scalers, count_neighbours, mean_degrees

LIGHT_SCALERS = ("identity", "amplification", "attenuation")
EPS = 1e-5


class LightPNAConv(HistoryLayer):
    r"""The lighter PNA layer of PyGAS (Fey et al., ICML 2021), reading halo neighbours from a history.

    `out_i = W h_i + sum_k s_k(d_i) P_k aggr_k_{j in N(i)} relu(Q_k h_j)`, over all pairs k of an aggregator and a
    scaler, with biases everywhere. Messages do not depend on the row they go to, so each row is transformed once.
    Parameters have the names and shapes of `torch_geometric_autoscale.models.pna.PNAConv`. Unlike there, "attenuation"
    of a row without neighbours takes one instead, as PyG does: log(1) + 1e-5 would scale biases by tens of thousands.

    Args:
        in_channels: F_in.
        out_channels: F_out.
        aggregators: among "sum" ("add"), "mean", "min", "max", "var" and "std".
        scalers: among "identity", "amplification" and "attenuation".
        deg: [D], how many nodes have 0, 1, ... neighbours; `degree_histogram(graph)`. PyGAS takes the degrees.
        input_dropout: see `HistoryLayer`.
        halo: see `HistoryLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        aggregators: Sequence[str],
        scalers: Sequence[str],
        deg: Tensor,
        *,
        input_dropout: float = 0.0,
        halo: Halo = "read",
    ) -> None:
        super().__init__(input_dropout, halo)
        self.in_channels = check_channels("in_channels", in_channels)
        self.out_channels = check_channels("out_channels", out_channels)
        self.aggregators = cast(list[MultiReduce], check_reduces("aggregators", aggregators))
        self.scalers = check_scalers(scalers, LIGHT_SCALERS)
        self.avg_deg_log = mean_degrees(deg)[1]
        num_pairs = len(self.aggregators) * len(self.scalers)
        self.pre_lins = nn.ModuleList(nn.Linear(in_channels, out_channels) for _ in range(num_pairs))
        self.post_lins = nn.ModuleList(nn.Linear(out_channels, out_channels) for _ in range(num_pairs))
        self.lin = nn.Linear(in_channels, out_channels)

    @property
    def history_dim(self) -> int:
        return self.in_channels

    def reset_parameters(self) -> None:
        """New parameters from torch's default for linear layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, x: Tensor | Features, batch: Batch) -> Tensor:
        """[B, F_out] of `x`: [B + H, F_in], [B, F_in] with a history, or `batch.features`."""
        source = self.read(x, batch)
        rows = source.rows()
        pre, post = ([cast(nn.Linear, lin) for lin in lins] for lins in (self.pre_lins, self.post_lins))
        weight, bias = torch.cat([lin.weight for lin in pre]), torch.cat([lin.bias for lin in pre])
        # the columns of an aggregator's scalers lie side by side
        hidden = F.linear(rows, weight, bias).relu().chunk(len(self.aggregators), dim=1)
        aggregated = [
            functional.multi_aggregate(h, batch, reduces=[name], halo=self.halo)[:, 0]
            for h, name in zip(hidden, self.aggregators, strict=True)
        ]
        scale = self._scale(count_neighbours(batch, self.halo), rows.dtype)
        scaled = torch.cat(aggregated, dim=1).unflatten(1, (scale.size(1), -1)) * scale[:, :, None]
        out = F.linear(scaled.flatten(1), torch.cat([lin.weight for lin in post], dim=1))
        return out + scale @ torch.stack([lin.bias for lin in post]) + self.lin(in_batch_rows(rows, batch))

    def _scale(self, count: Tensor, dtype: torch.dtype) -> Tensor:
        """The factor of every row for every pair, [B, pairs]."""
        logarithm = count.to(dtype).log1p()
        factors = {
            "identity": torch.ones_like(logarithm),
            "amplification": logarithm / self.avg_deg_log,
            "attenuation": self.avg_deg_log / (count.clamp(min=1).to(dtype).log1p() + EPS),
        }
        return torch.stack([factors[name] for name in self.scalers], dim=1).repeat(1, len(self.aggregators))

    def extra_repr(self) -> str:
        names = f"aggregators={self.aggregators}, scalers={self.scalers}"
        return f"{self.in_channels}, {self.out_channels}, {names}"

"""`TransformerConv`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.functional import Features
from gas_triton.functional.dropout import check_probability
from gas_triton.functional.rows import in_batch_rows
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.edge_attr import check_edge_attr


class TransformerConv(HistoryLayer):
    r"""Graph transformer layer of Shi et al. (IJCAI 2021), reading halo neighbours from a history.

    `out_i = W_1 h_i + sum_{j in N(i)} softmax_j(<W_3 h_i, W_4 h_j + W_6 e_ij> / sqrt(d)) (W_2 h_j + W_6 e_ij)`, for
    every head of d features; edge weights are not used. Parameters have the names and shapes of
    `torch_geometric.nn.TransformerConv`, so a `state_dict` fits both ways. Halo rows are transformed once each.

    Args:
        in_channels: F_in.
        out_channels: d, features of a head.
        heads: heads.
        concat: heads stand side by side, F_out = heads * out_channels; else their mean, F_out = out_channels.
        beta: W_1 h_i and the attention are mixed by a learned gate instead of added; False without `root_weight`.
        dropout: drops attention weights while training.
        edge_dim: width of `edge_attr`, None if there is none.
        bias: W_1 to W_4 have biases.
        root_weight: adds W_1 h_i.
        input_dropout: see `HistoryLayer`.
        halo: see `HistoryLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        beta: bool = False,
        dropout: float = 0.0,
        edge_dim: int | None = None,
        bias: bool = True,
        root_weight: bool = True,
        *,
        input_dropout: float = 0.0,
        halo: Halo = "read",
    ) -> None:
        super().__init__(input_dropout, halo)
        check_probability("dropout", dropout)
        self.in_channels = check_channels("in_channels", in_channels)
        self.out_channels = check_channels("out_channels", out_channels)
        self.heads = check_channels("heads", heads)
        self.edge_dim = None if edge_dim is None else check_channels("edge_dim", edge_dim)
        self.concat, self.dropout = concat, dropout
        self.beta, self.root_weight = beta and root_weight, root_weight
        width = heads * out_channels
        total = width if concat else out_channels
        self.lin_key = nn.Linear(in_channels, width, bias=bias)
        self.lin_query = nn.Linear(in_channels, width, bias=bias)
        self.lin_value = nn.Linear(in_channels, width, bias=bias)
        self.lin_edge = None if edge_dim is None else nn.Linear(edge_dim, width, bias=False)
        self.lin_skip = nn.Linear(in_channels, total, bias=bias)
        self.lin_beta = nn.Linear(3 * total, 1, bias=False) if self.beta else None

    @property
    def history_dim(self) -> int:
        return self.in_channels

    def reset_parameters(self) -> None:
        """New parameters from torch's default for linear layers."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, x: Tensor | Features, batch: Batch, edge_attr: Tensor | None = None) -> Tensor:
        """[B, F_out] of `x`: [B + H, F_in], [B, F_in] with a history, or `batch.features`.

        `edge_attr` is [num_edges, edge_dim] in the batch's edge order.
        """
        edge_attr = check_edge_attr("TransformerConv", batch, edge_attr, self.edge_dim, is_needed=True)
        edge = None
        if edge_attr is not None and self.lin_edge is not None:
            edge = self.lin_edge(edge_attr).view(-1, self.heads, self.out_channels)
        source = self.read(x, batch)
        rows = source.rows()
        own = in_batch_rows(rows, batch)
        query, key, value = (
            linear(of).view(-1, self.heads, self.out_channels)
            for linear, of in ((self.lin_query, own), (self.lin_key, rows), (self.lin_value, rows))
        )
        dropout = self.dropout if self.training else 0.0
        out = functional.dynamic_attention(
            query, key, value, batch, score="dot", edge=edge, dropout=dropout,
            seed=functional.draw_seed(batch.device) if dropout > 0.0 else None, halo=self.halo,
        )  # fmt: skip
        out = out.flatten(1) if self.concat else out.mean(1)
        if not self.root_weight:
            return out
        skip = self.lin_skip(own)
        if self.lin_beta is None:
            return out + skip
        gate = self.lin_beta(torch.cat([out, skip, out - skip], dim=-1)).sigmoid()
        return gate * skip + (1 - gate) * out

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}"

"""`GATv2Conv`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.functional import Features
from gas_triton.functional.dropout import check_probability
from gas_triton.functional.rows import in_batch_rows
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.edge_attr import check_edge_attr, check_fill_value, fill_self_loops
from gas_triton.nn.normalization import check_self_loops


class GATv2Conv(HistoryLayer):
    r"""Graph attention of Brody, Alon and Yahav (ICLR 2022), reading halo neighbours from a history.

    `out_i = sum_{j in N(i)} softmax_j(<a, leaky_relu(W_r h_i + W_l h_j + W_e e_ij)>) W_l h_j + b`, for every head; edge
    weights are not used. Parameters have the names and shapes of `torch_geometric.nn.GATv2Conv`, so a `state_dict` fits
    both ways. Halo rows are transformed once each.

    Args:
        in_channels: F_in.
        out_channels: features of a head.
        heads: heads.
        concat: heads stand side by side, F_out = heads * out_channels; else their mean, F_out = out_channels.
        negative_slope: of leaky_relu.
        dropout: drops attention weights while training.
        add_self_loops: whether the graph must have them, made by `graph.add_self_loops()`.
        edge_dim: width of `edge_attr`, None if there is none.
        fill_value: features of self loops if `add_self_loops`: a number, a tensor [edge_dim], or how to reduce those of
            the other edges into the node, "add", "mean", "min", "max" or "mul".
        bias: W_l, W_r and the layer have biases.
        share_weights: W_r is W_l.
        residual: adds a linear function of h_i.
        input_dropout: see `HistoryLayer`.
        halo: see `HistoryLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        edge_dim: int | None = None,
        fill_value: float | Tensor | str = "mean",
        bias: bool = True,
        share_weights: bool = False,
        residual: bool = False,
        *,
        input_dropout: float = 0.0,
        halo: Halo = "read",
    ) -> None:
        super().__init__(input_dropout, halo)
        check_probability("dropout", dropout)
        self.in_channels = check_channels("in_channels", in_channels)
        self.out_channels = check_channels("out_channels", out_channels)
        self.heads = check_channels("heads", heads)
        self.concat, self.negative_slope, self.dropout = concat, negative_slope, dropout
        self.add_self_loops, self.fill_value = add_self_loops, check_fill_value(fill_value)
        self.edge_dim = None if edge_dim is None else check_channels("edge_dim", edge_dim)
        self.share_weights, self.residual = share_weights, residual
        width = heads * out_channels
        self.lin_l = nn.Linear(in_channels, width, bias=bias)
        self.lin_r = self.lin_l if share_weights else nn.Linear(in_channels, width, bias=bias)
        self.att = nn.Parameter(torch.empty(1, heads, out_channels))
        self.lin_edge = None if edge_dim is None else nn.Linear(edge_dim, width, bias=False)
        total = width if concat else out_channels
        self.res = nn.Linear(in_channels, total, bias=False) if residual else None
        self.bias = nn.Parameter(torch.empty(total)) if bias else None
        self.reset_parameters()

    @property
    def history_dim(self) -> int:
        return self.in_channels

    def reset_parameters(self) -> None:
        """Glorot for the weights and for a, 0 for b, as PyG."""
        for linear in (self.lin_l, self.lin_r, self.lin_edge, self.res):
            if linear is not None:
                linear.reset_parameters()
                nn.init.xavier_uniform_(linear.weight)
        nn.init.xavier_uniform_(self.att.data[0])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor | Features, batch: Batch, edge_attr: Tensor | None = None) -> Tensor:
        """[B, F_out] of `x`: [B + H, F_in], [B, F_in] with a history, or `batch.features`.

        `edge_attr` is [num_edges, edge_dim] in the batch's edge order; rows of self loops are replaced if
        `add_self_loops`.
        """
        if self.add_self_loops:
            check_self_loops("GATv2Conv", batch)
        edge_attr = check_edge_attr("GATv2Conv", batch, edge_attr, self.edge_dim)
        source = self.read(x, batch)
        rows = source.rows()
        key = self.lin_l(rows).view(-1, self.heads, self.out_channels)
        own, query = in_batch_rows(rows, batch), in_batch_rows(key, batch)
        if not self.share_weights:
            query = self.lin_r(own).view(-1, self.heads, self.out_channels)
        edge = None
        if edge_attr is not None and self.lin_edge is not None:
            if self.add_self_loops:
                edge_attr = fill_self_loops(edge_attr, batch, self.fill_value, self.halo)
            edge = self.lin_edge(edge_attr).view(-1, self.heads, self.out_channels)
        dropout = self.dropout if self.training else 0.0
        out = functional.dynamic_attention(
            query, key, None, batch, score="gatv2", att=self.att[0], edge=edge, negative_slope=self.negative_slope,
            dropout=dropout, seed=functional.draw_seed(batch.device) if dropout > 0.0 else None, halo=self.halo,
        )  # fmt: skip
        out = out.flatten(1) if self.concat else out.mean(1)
        if self.res is not None:
            out = out + self.res(own)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}"

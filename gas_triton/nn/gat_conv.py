"""`GATConv`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.functional import Rows
from gas_triton.functional.dropout import check_probability
from gas_triton.functional.rows import in_batch_rows
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.edge_attr import check_edge_attr, check_fill_value, fill_self_loops
from gas_triton.nn.normalization import check_self_loops


class GATConv(HistoryLayer):
    r"""Graph attention of Velickovic et al. (ICLR 2018), reading halo neighbours from a history.

    `out_i = concat_h sum_{j in N(i)} a_ijh W_h h_j + b`, with `a_ijh` the softmax over N(i) of
    `leaky_relu(<att_src_h, W_h h_j> + <att_dst_h, W_h h_i> + <att_edge_h, E_h e_ij>)`. Each row, halo rows included,
    is transformed once. Edge weights are not used.

    Parameters have the names and shapes of `torch_geometric.nn.GATConv`, so a `state_dict` fits both ways. PyG's
    bipartite layers (a tuple as in_channels), lazy ones (-1) and returned attention weights are not there.

    Args:
        in_channels: F_in.
        out_channels: D, features of a head.
        heads: attention heads.
        concat: the heads' outputs lie side by side; False averages them.
        negative_slope: of leaky_relu.
        dropout: drops attention weights, of every edge and head on its own.
        add_self_loops: whether the graph must have them, made by `graph.add_self_loops()`.
        edge_dim: width of `edge_attr`, None if there is none.
        fill_value: features of self loops if `add_self_loops`: a number, a tensor [edge_dim], or how to reduce those of
            the other edges into the node, "add", "mean", "min", "max" or "mul".
        bias: adds b.
        residual: adds a linear layer of the in-batch rows.
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
        self.edge_dim = None if edge_dim is None else check_channels("edge_dim", edge_dim)
        self.concat, self.negative_slope, self.dropout = concat, float(negative_slope), dropout
        self.add_self_loops, self.fill_value = add_self_loops, check_fill_value(fill_value)
        self.residual = residual
        width = heads * out_channels
        total = width if concat else out_channels
        self.lin = nn.Linear(in_channels, width, bias=False)
        self.att_src = nn.Parameter(torch.empty(1, heads, out_channels))
        self.att_dst = nn.Parameter(torch.empty(1, heads, out_channels))
        self.lin_edge = None if edge_dim is None else nn.Linear(edge_dim, width, bias=False)
        self.att_edge = None if edge_dim is None else nn.Parameter(torch.empty(1, heads, out_channels))
        self.res = nn.Linear(in_channels, total, bias=False) if residual else None
        self.bias = nn.Parameter(torch.empty(total)) if bias else None
        self.reset_parameters()

    @property
    def history_dim(self) -> int:
        return self.in_channels

    def reset_parameters(self) -> None:
        """Glorot for all but b, 0 for b, as PyG."""
        for linear in (self.lin, self.lin_edge, self.res):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
        for att in (self.att_src, self.att_dst, self.att_edge):
            if att is not None:
                nn.init.xavier_uniform_(att.data[0])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Rows, batch: Batch, edge_attr: Tensor | None = None) -> Tensor:
        """[B, heads * D], or [B, D] without `concat`.

        Args:
            x: [B + H, F_in], [B, F_in] with a history, or `batch.features`; sparse rows [B + H, F_in] too.
            batch: the plan of the step.
            edge_attr: [num_edges, edge_dim] in the batch's edge order; rows of self loops are replaced if
                `add_self_loops`.
        """
        if self.add_self_loops:
            check_self_loops("GATConv", batch)
        edge_attr = check_edge_attr("GATConv", batch, edge_attr, self.edge_dim)
        source = self.read(x, batch)
        rows = self.lin(source.rows()).view(-1, self.heads, self.out_channels)
        if edge_attr is not None and self.add_self_loops:
            edge_attr = fill_self_loops(edge_attr, batch, self.fill_value, self.halo)
        p = self.dropout if self.training else 0.0
        out = functional.attention(
            rows,
            batch,
            (rows * self.att_src).sum(-1),
            (in_batch_rows(rows, batch) * self.att_dst).sum(-1),
            edge_logit=None if edge_attr is None else self._edge_logit(edge_attr),
            negative_slope=self.negative_slope,
            dropout=p,
            seed=functional.draw_seed(batch.device) if p > 0.0 else None,
            halo=self.halo,
        )
        out = out.flatten(1) if self.concat else out.mean(1)
        if self.res is not None:
            out = out + self.res(source.in_batch())
        return out if self.bias is None else out + self.bias

    def _edge_logit(self, edge_attr: Tensor) -> Tensor:
        # att_edge is folded into lin_edge, which would make a row of all heads for every edge
        assert self.lin_edge is not None
        assert self.att_edge is not None
        weight = self.lin_edge.weight.view(self.heads, self.out_channels, -1)
        weight = (weight * self.att_edge.view(self.heads, self.out_channels, 1)).sum(1)
        return nn.functional.linear(edge_attr, weight)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}"

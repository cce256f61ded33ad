"""`GCNConv`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Rows, StaticInput
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.lipschitz import Lipschitz, spectral_norm
from gas_triton.nn.normalization import check_normalization


class GCNConv(HistoryLayer):
    r"""Graph convolution of Kipf and Welling (ICLR 2017), reading halo neighbours from a history.

    `out_i = sum_{j in N(i)} w_ij W h_j + b`, with w the weights of the batch's graph.

    The normalisation is the graph's, made once: `graph.add_self_loops().gcn_norm()`. Parameters have the names and
    shapes of `torch_geometric.nn.GCNConv`, so a `state_dict` fits both ways.

    Args:
        in_channels: F_in.
        out_channels: F_out.
        improved: the graph's self loops must weigh 2 (`graph.add_self_loops(2.0)`).
        cached: accepted for PyG's signature; the normalisation is always computed once, on the graph.
        add_self_loops: whether the graph must have them; as `normalize` if None.
        normalize: whether the graph must be normalised; False uses its weights as they are.
        bias: adds b.
        input_dropout: see `HistoryLayer`.
        halo: see `HistoryLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        improved: bool = False,
        cached: bool = False,
        add_self_loops: bool | None = None,
        normalize: bool = True,
        bias: bool = True,
        *,
        input_dropout: float = 0.0,
        halo: Halo = "read",
    ) -> None:
        super().__init__(input_dropout, halo)
        add_self_loops = normalize if add_self_loops is None else add_self_loops
        if add_self_loops and not normalize:
            raise ValueError("add_self_loops needs normalize=True: add loops to the graph with graph.add_self_loops()")
        self.in_channels = check_channels("in_channels", in_channels)
        self.out_channels = check_channels("out_channels", out_channels)
        self.improved, self.cached = improved, cached
        self.add_self_loops, self.normalize = add_self_loops, normalize
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    @property
    def static_input(self) -> StaticInput:
        return StaticInput("sum", weighted=True, own_rows=False)

    @property
    def history_dim(self) -> int:
        return self.in_channels

    @property
    def lipschitz(self) -> Lipschitz:
        return Lipschitz(0.0, spectral_norm(self.lin.weight), weighted=True)

    def reset_parameters(self) -> None:
        """Glorot for W, 0 for b, as PyG."""
        nn.init.xavier_uniform_(self.lin.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Rows, batch: Batch, edge_weight: Tensor | None = None) -> Tensor:
        """[B, F_out] of `x`: [B + H, F_in], dense or sparse, [B, F_in] with a history, or `batch.features`.

        `edge_weight` [num_edges], in the batch's edge order and with gradient, stands in for the graph's weights.
        """
        if self.normalize:
            check_normalization("GCNConv", batch, self.add_self_loops, self.improved)
        source = self.read(x, batch)
        edge_weight = batch.edge_weight if edge_weight is None else edge_weight
        if source.is_cheaper_transformed(self.in_channels, self.out_channels):
            out = source.transform_then_aggregate(self.lin, "sum", edge_weight)
        else:
            out = self.lin(source.aggregate("sum", edge_weight))
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"

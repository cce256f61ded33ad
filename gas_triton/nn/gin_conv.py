"""`GINConv`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Features, StaticInput
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.lipschitz import Lipschitz, constant_of


class GINConv(HistoryLayer):
    r"""Graph isomorphism layer (Xu et al., ICLR 2019), reading halo neighbours from a history.

    `out_i = nn((1 + eps) h_i + sum_{j in N(i)} h_j)`; edge weights are not used. Parameters have the names and shapes
    of `torch_geometric.nn.GINConv`, so a `state_dict` fits both ways.

    Args:
        nn: module from [B, F_in] to [B, F_out].
        eps: first value of eps.
        train_eps: whether eps is trained.
        in_channels: F_in; found in the first linear layer of `nn` if None.
        input_dropout: see `HistoryLayer`.
        halo: see `HistoryLayer`.
    """

    eps: Tensor

    def __init__(
        self,
        nn: nn.Module,
        eps: float = 0.0,
        train_eps: bool = False,
        *,
        in_channels: int | None = None,
        input_dropout: float = 0.0,
        halo: Halo = "read",
    ) -> None:
        super().__init__(input_dropout, halo)
        self.nn = nn
        self.initial_eps = eps
        if in_channels is None:
            in_channels = next((m.in_features for m in nn.modules() if isinstance(m, torch.nn.Linear)), None)
        self.in_channels = None if in_channels is None else check_channels("in_channels", in_channels)
        if train_eps:
            self.eps = torch.nn.Parameter(torch.tensor([float(eps)]))
        else:
            self.register_buffer("eps", torch.tensor([float(eps)]))

    @property
    def static_input(self) -> StaticInput:
        return StaticInput("sum", weighted=False, own_rows=True)

    @property
    def history_dim(self) -> int:
        if self.in_channels is None:
            raise ValueError("GINConv cannot tell how wide its history must be: give in_channels=")
        return self.in_channels

    @property
    def lipschitz(self) -> Lipschitz | None:
        constant = constant_of(self.nn)
        return None if constant is None else Lipschitz(abs(1.0 + float(self.eps.detach())) * constant, constant)

    def reset_parameters(self) -> None:
        """New parameters for `nn`, and eps back to its first value."""
        for module in self.nn.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self.eps.data.fill_(self.initial_eps)

    def forward(self, x: Tensor | Features, batch: Batch) -> Tensor:
        """[B, F_out] of `x`: [B + H, F_in], [B, F_in] with a history, or `batch.features`."""
        source = self.read(x, batch)
        return self.nn(source.aggregate("sum") + (1 + self.eps) * source.in_batch())

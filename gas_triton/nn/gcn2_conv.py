"""`GCN2Conv`."""

from __future__ import annotations

from math import isfinite, log
from typing import Any

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Features
from gas_triton.functional.rows import FLOATS
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.lipschitz import Lipschitz, spectral_norm
from gas_triton.nn.normalization import check_normalization


class GCN2Conv(HistoryLayer):
    r"""Layer of GCNII (Chen et al., ICML 2020), reading halo neighbours from a history.

    `h_i = (1 - alpha) sum_{j in N(i)} w_ij x_j + alpha x_0,i` and `out_i = (1 - beta) h_i + beta h_i W_1`, with
    beta = log(theta / layer + 1) and w the weights of the batch's graph. The residual x_0 is added by the kernel that
    aggregates. Without shared weights (GCNII*), x_0 goes through W_2 and the neighbours through W_1.

    The normalisation is the graph's, made once: `graph.add_self_loops().gcn_norm()`. Parameters have the names and
    shapes of `torch_geometric.nn.GCN2Conv`, so a `state_dict` fits both ways.

    Args:
        channels: F, of input and output.
        alpha: weight of x_0, in [0, 1].
        theta: gives beta, with `layer`; without both beta is 1.
        layer: place of this layer in its model, from 1.
        shared_weights: False gives x_0 a weight of its own.
        cached: accepted for PyG's signature; the normalisation is always computed once, on the graph.
        add_self_loops: whether the normalised graph must have them.
        normalize: whether the graph must be normalised; False uses its weights as they are.
        input_dropout: of x, not of x_0; see `HistoryLayer`.
        halo: see `HistoryLayer`.
    """

    weight2: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        alpha: float,
        theta: float | None = None,
        layer: int | None = None,
        shared_weights: bool = True,
        cached: bool = False,
        add_self_loops: bool = True,
        normalize: bool = True,
        *,
        input_dropout: float = 0.0,
        halo: Halo = "read",
    ) -> None:
        super().__init__(input_dropout, halo)
        self.channels = self.in_channels = check_channels("channels", channels)
        self.alpha = check_alpha(alpha)
        self.beta = 1.0
        if theta is not None or layer is not None:
            if theta is None or layer is None:
                raise ValueError(f"theta and layer belong together, got theta={theta}, layer={layer}")
            if not (isfinite(theta) and theta >= 0.0):
                raise ValueError(f"theta must be a finite number of at least 0, got {theta}")
            self.beta = log(theta / check_channels("layer", layer) + 1.0)
        self.cached, self.add_self_loops, self.normalize = cached, add_self_loops, normalize
        self.weight1 = nn.Parameter(torch.empty(channels, channels))
        self.weight2 = None if shared_weights else nn.Parameter(torch.empty(channels, channels))
        self.reset_parameters()

    @property
    def history_dim(self) -> int:
        return self.channels

    @property
    def lipschitz(self) -> Lipschitz:
        """With x_0 as it is."""
        identity = torch.eye(self.channels, dtype=torch.float64, device=self.weight1.device)
        mapped = (1.0 - self.beta) * identity + self.beta * self.weight1.detach().double()
        return Lipschitz(0.0, (1.0 - self.alpha) * spectral_norm(mapped), weighted=True)

    def reset_parameters(self) -> None:
        """Glorot for the weights, as PyG."""
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor | Features, x_0: Tensor | Features, batch: Batch) -> Tensor:
        """[B, F] of `x`: [B + H, F], [B, F] with a history, or `batch.features`.

        Args:
            x: rows of the layer before.
            x_0: initial rows, [B, F] or [B + H, F], of which the first B are used, or `batch.features`.
            batch: the plan of the step.
        """
        if self.normalize:
            check_normalization("GCN2Conv", batch, self.add_self_loops)
        x_0 = initial_rows(x_0, batch, self.channels)
        source = self.read(x, batch)
        if self.weight2 is None:
            h = source.aggregate("sum", batch.edge_weight, x_0, self.alpha)
            return torch.addmm(h, h, self.weight1, beta=1.0 - self.beta, alpha=self.beta)
        h = source.aggregate("sum", batch.edge_weight)
        # alpha is folded into the scalars of the products, so that nothing is multiplied on its own
        keep, own = 1.0 - self.alpha, self.alpha
        out = torch.addmm(h, h, self.weight1, beta=keep * (1.0 - self.beta), alpha=keep * self.beta)
        return out + torch.addmm(x_0, x_0, self.weight2, beta=own * (1.0 - self.beta), alpha=own * self.beta)

    def extra_repr(self) -> str:
        return f"{self.channels}, alpha={self.alpha}, beta={self.beta:.4g}"


def initial_rows(x_0: Any, batch: Batch, num_features: int | None, name: str = "x_0") -> Tensor:
    """The in-batch rows of `x_0`, [B, F]; errors name what is wrong with it.

    Args:
        x_0: [B, F], [B + H, F] or `batch.features`.
        batch: the plan of the step.
        num_features: F; None takes any.
        name: of the argument, for errors.
    """
    if isinstance(x_0, Features):
        x_0 = x_0.in_batch()
    if not isinstance(x_0, Tensor) or x_0.dtype not in FLOATS:
        got = x_0.dtype if isinstance(x_0, Tensor) else type(x_0).__name__
        raise TypeError(f"{name} must be a floating tensor or batch.features, got {got}")
    num_rows = (batch.num_nodes, batch.num_nodes + batch.num_halo)
    if x_0.dim() != 2 or x_0.size(0) not in num_rows or num_features not in (None, x_0.size(1)):
        raise ValueError(
            f"{name} must have shape [rows, {num_features or 'features'}] with {num_rows[0]} (in-batch rows) or "
            f"{num_rows[1]} rows (in-batch and halo rows), got {list(x_0.shape)}"
        )
    if x_0.device != batch.device:
        raise ValueError(f"{name} is on {x_0.device} but the batch is on {batch.device}: move one with .to()")
    return x_0 if x_0.size(0) == batch.num_nodes else x_0[: batch.num_nodes]


def check_alpha(alpha: float) -> float:
    """`alpha` if it is a number in [0, 1]."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    return float(alpha)

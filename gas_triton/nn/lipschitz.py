"""Lipschitz constants of layers: how far their output can move when their input rows do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spread = Literal["sum", "mean", "root", "max"]


@dataclass(frozen=True)
class Lipschitz:
    r"""How far a row of a layer's output moves at most when input rows u move by e_u (2-norms).

    `own * e_v + neighbours * spread_{u in N(v)} |w_uv| e_u`, where `spread` is a sum, a mean, the root of the sum of
    squares (which is what max and min of every feature can do) or "max": `neighbours * max(e_v, max_u e_u)`.

    Attributes:
        own: factor of the row's own movement.
        neighbours: factor of what comes from its neighbours.
        spread: how the neighbours' movements add up.
        weighted: whether they count by the graph's weights.
        is_exact: False for an estimate, which is a lower bound of the constant.
    """

    own: float
    neighbours: float
    spread: Spread = "sum"
    weighted: bool = False
    is_exact: bool = True


def spectral_norm(weight: Tensor) -> float:
    """The largest singular value of a matrix, in float64."""
    matrix = weight.detach().double()
    if matrix.numel() == 0:
        return 0.0
    # its Gram matrix on the short side: layers are wide on one side only
    gram = matrix @ matrix.T if matrix.size(0) <= matrix.size(1) else matrix.T @ matrix
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0.0).sqrt())


def constant_of(module: nn.Module) -> float | None:
    """The Lipschitz constant of a module that acts on every row alone, in `eval()` mode; None if it is not known.

    That of a sequence is bounded by the product of its parts'.
    """
    if isinstance(module, nn.Sequential):
        product = 1.0
        for part in module:
            constant = constant_of(part)
            if constant is None:
                return None
            product *= constant
        return product
    rule = _RULES.get(type(module))
    return None if rule is None else rule(module)


def constant_of_function(function: Callable[[Tensor], Tensor]) -> float | None:
    """The Lipschitz constant of an activation function; None if it is not known."""
    return 1.0 if function in _OF_SLOPE_ONE else None


def _of_batch_norm(norm: Any) -> float | None:
    if norm.running_var is None:
        # it takes the statistics of its batch in evaluation too
        return None
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    return float((scale if norm.weight is None else scale * norm.weight.detach().double().abs()).max())


_OF_SLOPE_ONE = (torch.relu, F.relu, F.elu, torch.tanh, torch.nn.functional.leaky_relu)
_RULES: dict[type[nn.Module], Callable[[Any], float | None]] = {
    nn.Linear: lambda linear: spectral_norm(linear.weight),
    nn.BatchNorm1d: _of_batch_norm,
    nn.ReLU: lambda _: 1.0,
    nn.Tanh: lambda _: 1.0,
    nn.Sigmoid: lambda _: 0.25,
    nn.Identity: lambda _: 1.0,
    nn.Dropout: lambda _: 1.0,
    nn.ELU: lambda elu: max(1.0, abs(elu.alpha)),
    nn.LeakyReLU: lambda relu: max(1.0, abs(relu.negative_slope)),
}

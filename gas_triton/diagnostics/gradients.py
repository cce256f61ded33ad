"""The bias of gradients that are computed with histories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.inference import Forward
from gas_triton.loader import ClusterLoader

__all__ = ["GradientBias", "Loss", "gradient_bias"]

Loss = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class GradientBias:
    """A gradient with histories against the full-batch one.

    Attributes:
        name: of the parameter, "all" for all at once.
        norm: 2-norm of the full-batch gradient.
        difference: 2-norm of the difference, relative to it; None if it is 0 and the difference is not.
        cosine: between both; None if one is 0.
    """

    name: str
    norm: float
    difference: float | None
    cosine: float | None


def gradient_bias(model: nn.Module, loader: ClusterLoader, forward: Forward, loss: Loss) -> list[GradientBias]:
    """The sum of the batches' gradients against the gradient of the whole graph, for each parameter, then for all.

    Args:
        model: in `eval()` mode: no dropout, running statistics, nothing pushed.
        loader: batches; the whole graph has to fit in memory as one.
        forward: how to call the model.
        loss: sum over nodes, of the model's output and the batch.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = list(named.values())

    def gradients(batch: Batch) -> list[Tensor]:
        with torch.enable_grad():
            value = loss(forward(model, batch), batch)
            if not value.requires_grad:
                return [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        return [
            torch.zeros_like(parameter, dtype=torch.float64) if grad is None else grad.double()
            for parameter, grad in zip(parameters, found, strict=True)
        ]

    total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    for batch in loader.in_order():
        total = [a + b for a, b in zip(total, gradients(batch), strict=True)]
    exact = gradients(loader.full())
    pairs = [(name, a.flatten(), b.flatten()) for name, a, b in zip(named, total, exact, strict=True)]
    return [
        *(_compare(*pair) for pair in pairs),
        _compare("all", torch.cat([a for _, a, _ in pairs]), torch.cat([b for _, _, b in pairs])),
    ]


def _compare(name: str, ours: Tensor, exact: Tensor) -> GradientBias:
    norm, length, off = (float(torch.linalg.vector_norm(t)) for t in (exact, ours, ours - exact))
    relative = off / norm if norm > 0.0 else (0.0 if off == 0.0 else None)
    cosine = float(ours @ exact) / (norm * length) if norm > 0.0 and length > 0.0 else None
    return GradientBias(name, norm, relative, None if cosine is None else max(-1.0, min(1.0, cosine)))

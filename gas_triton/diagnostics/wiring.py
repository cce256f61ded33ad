"""What stands between the layers of a model: how an error of a layer's output becomes one of the next layer's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gas_triton.models import APPNP, Stack
from gas_triton.nn.lipschitz import constant_of, constant_of_function

__all__ = ["Link", "wiring_of"]


@dataclass(frozen=True)
class Link:
    """What stands behind a layer: `factor * (norm * e_out + e_in)`, the second term with a residual connection only.

    Attributes:
        norm: Lipschitz constant of what comes before the residual is added.
        has_residual: whether the layer's input is added to its output.
        factor: Lipschitz constant of all that comes after.
        is_exact: False where `factor` was measured on the errors of these histories.
        of_outputs: whether `factor` is that of the norm of the errors of all outputs so far, whatever the model makes
            of them.
    """

    norm: float = 1.0
    has_residual: bool = False
    factor: float = 1.0
    is_exact: bool = True
    of_outputs: bool = False


def wiring_of(model: nn.Module, layers: Sequence[Any]) -> list[Link] | None:
    """The link behind each of `layers`, in the order in which they are called; None if the model's is not known."""
    links: list[Link] | None = None
    if isinstance(model, Stack) and type(model).forward is Stack.forward:
        links = _of_stack(model)
        expected = list(model.convs)
    elif type(model) is APPNP:
        links = [Link() for _ in model.propagation.steps]
        expected = list(model.propagation.steps)
    if links is None or len(expected) != len(layers):
        return None
    return links if all(a is b for a, b in zip(expected, layers, strict=True)) else None


def _of_stack(model: Stack) -> list[Link] | None:
    activation = constant_of_function(model.activation)
    if activation is None:
        return None
    links = []
    convs: list[Any] = list(model.convs)
    for place, conv in enumerate(convs):
        if place == len(convs) - 1 and not len(model.lins):
            links.append(Link())
            continue
        norm = constant_of(model.norms[place]) if len(model.norms) else 1.0
        if norm is None:
            return None
        # a residual of unchanged features moves nothing, whether it is there or not
        links.append(Link(norm, model.residual and _width(conv) == conv.history_dim, activation))
    if len(model.lins):
        last = links[-1]
        behind = constant_of(model.lins[1])
        if behind is None:
            return None
        links[-1] = Link(last.norm, last.has_residual, last.factor * behind)
    return links


def _width(conv: Any) -> int:
    return conv.gradient_dim

"""How a PyG layer is called, read from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Features


def label(path: str, module: nn.Module) -> str:
    """What errors call a module."""
    return f"{path or 'model'} ({type(module).__name__})"


def own_weight(layer: str) -> str:
    """What is wrong with an edge weight given to a layer on a normalised graph."""
    return (
        f"{layer}: edge_weight cannot be given, as the weights of a normalised graph are used: give it to the Graph, "
        "before gcn_norm(), or use normalize=False"
    )


class PygCall:
    """The arguments of a PyG layer's `forward`, with a `Batch` where it takes `edge_index`.

    Args:
        layer: the PyG layer.
        path: its name in the model, for errors.

    Raises:
        ValueError: a `forward` that does not name its arguments.
    """

    def __init__(self, layer: nn.Module, path: str) -> None:
        self.path, self.label = path, label(path, layer)
        parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
        is_named = not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        if not is_named or not parameters or parameters[0].name.startswith(("edge", "adj")):
            raise ValueError(
                f"{self.label}: forward must name its arguments, node rows first, as in forward(self, x, edge_index)"
            )
        # an annotation as Union[Tensor, PairTensor], spelled out or not
        self.takes_pair = any(word in str(parameters[0].annotation) for word in ("Tuple", "tuple", "PairTensor"))
        self.names = [parameter.name for parameter in parameters[1:]]

    def bind(self, x: Any, args: Sequence[Any], options: dict[str, Any]) -> tuple[Batch, str, dict[str, Any]]:
        """(the batch, the name under which it was given, the arguments other than `x` and the batch that are not None).

        Raises:
            TypeError: no batch, or an argument that a layer with a history cannot take.
            ValueError: edge tensors that do not have a row for each edge of the batch.
        """
        if len(args) > len(self.names):
            raise TypeError(f"{self.label} takes {len(self.names) + 1} arguments, got {len(args) + 1}")
        given = dict(zip(self.names, args, strict=False))
        given.update(options)
        place = next((name for name, value in given.items() if isinstance(value, Batch)), None)
        if place is None:
            edges = next((value for value in given.values() if value is not None), None)
            raise TypeError(
                f"{self.label} is autoscaled and takes a Batch of a ClusterLoader where PyG takes edge_index, got "
                f"{type(edges).__name__}: call model(batch.x, batch), and gas.inference(model, loader) for all nodes"
            )
        if isinstance(x, tuple | list):
            raise TypeError(f"{self.label} makes its own pair of source and target rows: give x, got a pair")
        if not isinstance(x, Tensor | Features):
            raise TypeError(f"{self.label}: x must be a tensor or batch.features, got {type(x).__name__}")
        batch = given.pop(place)
        if given.get("return_attention_weights") is not None:
            raise TypeError(f"{self.label}: return_attention_weights must be None, as a layer gives rows only")
        # that of the whole graph, if it was given
        given.pop("size", None)
        for name, value in given.items():
            if name.startswith("edge_") and isinstance(value, Tensor) and value.size(0) != batch.num_edges:
                raise ValueError(
                    f"{self.label}: {name} has {value.size(0)} rows but the batch has {batch.num_edges} edges: give "
                    f"rows in the order of batch.edge_index, as batch.edge_attr has them"
                )
        return batch, place, {name: value for name, value in given.items() if value is not None}

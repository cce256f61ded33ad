"""`Histories`: all tables of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from gas_triton.batch import Batch
from gas_triton.graph import Graph
from gas_triton.history.store import TIERS, HistoryStore
from gas_triton.loader import ClusterLoader


class ReadsHistory:
    """What a layer has that pushes its input to a history and reads halo rows from it."""

    history: HistoryStore | None

    @property
    def history_dim(self) -> int:
        """Width of the layer's input rows."""
        raise NotImplementedError(f"{type(self).__name__} must say how wide its history is")


class Histories(Mapping[str, HistoryStore]):
    """The histories of a model, by layer name, in the order of the layers.

    Made by `attach_histories`.
    """

    def __init__(self, stores: dict[str, HistoryStore]) -> None:
        self._stores = stores

    def __getitem__(self, name: str) -> HistoryStore:
        return self._stores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stores)

    def __len__(self) -> int:
        return len(self._stores)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(store.nbytes for store in self.values())

    def prefetch(self, loader: ClusterLoader) -> Iterator[Batch]:
        """Iterates over the loader's batches for one epoch of training.

        Tables on the device are read in place, so there is nothing to fetch ahead.

        Raises:
            ValueError: the loader's graph is not the one whose rows the histories hold.
        """
        self.check(loader.graph)
        yield from loader

    def check(self, graph: Graph) -> None:
        """Raises ValueError if the histories cannot hold the rows of `graph`."""
        for store in self.values():
            if store.num_rows != graph.num_nodes:
                raise ValueError(f"graph has {graph.num_nodes} nodes but {store.name}'s history has {store.num_rows}")
            if store.row_order not in (None, graph.row_order):
                raise ValueError(
                    f"{store.name}'s history holds rows in the order {store.row_order} but the graph has "
                    f"{graph.row_order}: use the same partition, or reset() the histories"
                )

    def reset(self) -> None:
        """Forgets every row of every history."""
        for store in self.values():
            store.reset()

    def age(self) -> dict[str, torch.Tensor]:
        """Staleness of every row, by layer; see `HistoryStore.age`."""
        return {name: store.age() for name, store in self.items()}

    def state_dict(self) -> dict[str, Any]:
        """States of all histories; tensors are not copied."""
        return {name: store.state_dict() for name, store in self.items()}

    def load_state_dict(self, state: Mapping[str, Any], graph: Graph | None = None) -> None:
        """Restores what `state_dict` gave.

        Args:
            state: from `state_dict`.
            graph: the graph that will be trained on, whose row order the state must have. Without it, histories that
                have not been pushed to cannot tell, and refuse a wrong order at the first push or read.

        Raises:
            ValueError: other layers, or a history of another shape, dtype or row order; nothing is written then.
        """
        if list(state) != list(self):
            raise ValueError(f"the state has histories of {list(state)} but the model of {list(self)}")
        for name, store in self.items():
            store.check_state(state[name])
            order = state[name]["row_order"]
            if graph is not None and order not in (None, graph.row_order):
                raise ValueError(
                    f"{name}: the state holds rows in the order {order} but the graph has {graph.row_order}: rows "
                    "would be given to the wrong nodes"
                )
        for name, store in self.items():
            store.load_state_dict(state[name])

    def __repr__(self) -> str:
        lines = [f"  {store!r}" for store in self.values()]
        return "\n".join([f"Histories({self.nbytes / 2**20:.1f} MiB", *lines]) + ")"


def attach_histories(
    model: nn.Module,
    num_nodes: int,
    tier: str = "device",
    dtype: torch.dtype = torch.float32,
    *,
    layers: list[str] | None = None,
) -> Histories:
    """Gives every layer but the first a history of its input, in place of those that the model had.

    The first layer needs none: it is given `batch.x` or `batch.features`, where every neighbour is present. Layers
    count in the order in which the model registers them.

    Args:
        model: a model made of `gas_triton.nn` layers, on the device where it will be trained.
        num_nodes: N of the graph.
        tier: where tables live; "device" puts each beside its layer's parameters.
        dtype: storage dtype of the tables.
        layers: names of the layers that get a history, as in `model.named_modules()`; all but the first if None.

    Returns:
        The tables, zero.

    Raises:
        ValueError: an unknown tier or layer name, or a model without `gas_triton.nn` layers.
    """
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(map(repr, TIERS))}, got {tier!r}")
    if not isinstance(num_nodes, int) or isinstance(num_nodes, bool):
        raise TypeError(f"num_nodes must be an int, got {type(num_nodes).__name__}")
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
    if isinstance(layers, str):
        raise TypeError(f"layers must be a list of names, got the str {layers!r}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, ReadsHistory)}
    if not found:
        raise ValueError(f"model has no gas_triton.nn layer, got {type(model).__name__}")
    if layers is None:
        layers = list(found)[1:]
    unknown = [name for name in layers if name not in found]
    if unknown:
        raise ValueError(f"layers must be among {list(found)}, got {unknown}")
    stores = {}
    for name, layer in found.items():
        if name in layers:
            parameters = chain(model.get_submodule(name).parameters(), model.parameters())
            device = next((p.device for p in parameters), torch.device("cpu"))
            stores[name] = HistoryStore(num_nodes, layer.history_dim, dtype, device, name=name)
    for name, layer in found.items():
        layer.history = stores.get(name)
    return Histories(stores)

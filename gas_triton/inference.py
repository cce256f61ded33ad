"""Exact inference, layer by layer, of a model that is written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Features
from gas_triton.history import ReadsHistory
from gas_triton.loader import ClusterLoader

Forward = Callable[[nn.Module, Batch], Tensor]


def inference(model: nn.Module, loader: ClusterLoader, forward: Forward | None = None) -> Tensor:
    """Logits of every node with every neighbour fresh: what full-batch evaluation gives, at the memory of one batch.

    The loader is swept once for each layer. A sweep runs the model on every batch up to the layer whose inputs are not
    yet known everywhere, keeps that layer's input rows in host memory, and stops there; the next sweep computes the
    layer from them. Layers already computed answer from their kept outputs, so each is computed exactly once for each
    batch (layer-wise inference: Hamilton et al., NeurIPS 2017; Fey et al., ICML 2021, section 5).

    Histories are neither read nor written. The model is evaluated in `eval()` mode, which is undone afterwards.

    Args:
        model: a model of `gas_triton.nn` layers whose control flow does not depend on values.
        loader: batches; their order does not matter.
        forward: how to call the model on a batch; `model(batch.x, batch)` if None.

    Returns:
        [N, C] in the order of the loader's graph, on its device.
    """
    forward = forward or _call_with_x
    batches = loader.sequential()
    sweep = _Sweep(loader.graph.num_nodes)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _watched(model, sweep):
            logits: Tensor | None = None
            while logits is None:
                sweep.begin()
                for batch in batches:
                    sweep.place = 0
                    try:
                        out = forward(model, batch)
                    except _NotYetKnown:
                        continue
                    if logits is None:
                        logits = out.new_zeros(loader.graph.num_nodes, *out.shape[1:])
                    logits[batch.node_ids] = out
            return logits
    finally:
        for module, mode in modes.items():
            module.training = mode


def _call_with_x(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch.x, batch)


class _NotYetKnown(Exception):
    """The inputs of a layer are not yet known for every node."""


class _Sweep:
    """What the layer calls of a forward, counted from 0, have received and given so far."""

    def __init__(self, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self.place = 0
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.known: set[int] = set()
        self.computed: set[int] = set()

    def begin(self) -> None:
        self.known, self.computed = set(self.inputs), set(self.outputs)

    def call(self, compute: Callable[..., Tensor], x: Tensor | Features, batch: Batch) -> Tensor:
        place, self.place = self.place, self.place + 1
        if place in self.computed:
            self.inputs.pop(place, None)
            return self.outputs[place].index_select(0, batch.node_ids.cpu()).to(batch.device)
        if place in self.known:
            x = self.inputs[place].index_select(0, batch.all_ids.cpu()).to(batch.device)
        elif not isinstance(x, Features) and batch.num_halo > 0 and x.size(0) == batch.num_nodes:
            self._keep(self.inputs, place, x, batch)
            raise _NotYetKnown
        out = compute(x, batch)
        self._keep(self.outputs, place, out, batch)
        return out

    def _keep(self, tables: dict[int, Tensor], place: int, rows: Tensor, batch: Batch) -> None:
        if place not in tables:
            tables[place] = torch.empty(self.num_nodes, rows.size(1), dtype=rows.dtype)
        tables[place][batch.node_ids.cpu()] = rows.cpu()


@contextmanager
def _watched(model: nn.Module, sweep: _Sweep) -> Iterator[None]:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, ReadsHistory)]
    for layer in layers:
        compute = layer.forward
        layer.forward = lambda x, batch, compute=compute: sweep.call(compute, x, batch)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward

"""Exact inference, layer by layer, of a model that is written once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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

    Raises:
        RuntimeError: the batches do not all call the same layers.
    """
    forward = forward or _call_with_x
    sweep = _Sweep(loader.graph.num_nodes, num_batches=len(loader))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _watched(model, sweep):
            logits: Tensor | None = None
            is_complete = False
            while not is_complete:
                sweep.begin()
                is_complete = True
                for batch in loader.in_order():
                    sweep.begin_batch()
                    try:
                        out = forward(model, batch)
                    except _NotYetKnown:
                        is_complete = False
                        continue
                    if logits is None:
                        logits = out.new_zeros(loader.graph.num_nodes, *out.shape[1:])
                    logits[batch.node_ids] = out
            assert logits is not None
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

    def __init__(self, num_nodes: int, num_batches: int) -> None:
        self.num_nodes, self.num_batches = num_nodes, num_batches
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self._kept_by: defaultdict[int, set[int]] = defaultdict(set)
        self._known: set[int] = set()
        self._computed: set[tuple[int, int]] = set()
        self._batch, self._place = -1, 0

    def begin(self) -> None:
        known = {place for place, batches in self._kept_by.items() if len(batches) == self.num_batches}
        if self._batch >= 0 and known == self._known:
            raise RuntimeError("model does not call the same layers for every batch, so some rows never become known")
        self._batch, self._known = -1, known
        computed = Counter(place for _, place in self._computed)
        for place in [place for place in self.inputs if computed[place] == self.num_batches]:
            del self.inputs[place]

    def begin_batch(self) -> None:
        self._batch, self._place = self._batch + 1, 0

    def call(self, compute: Callable[..., Tensor], x: Tensor | Features, *args: Any, **options: Any) -> Tensor:
        batch = next((value for value in (*args, *options.values()) if isinstance(value, Batch)), None)
        if batch is None:
            raise TypeError("batch must be given to every layer that reads a history, got none")
        place, self._place = self._place, self._place + 1
        if (self._batch, place) in self._computed:
            return self.outputs[place].index_select(0, batch.node_ids.cpu()).to(batch.device)
        if not isinstance(x, Features) and x.size(0) == batch.num_nodes:
            if place in self._known:
                x = self.inputs[place].index_select(0, batch.all_ids.cpu()).to(batch.device)
            else:
                # kept by a batch without halo too: its rows are halo rows of others
                self._keep(self.inputs, place, x, batch)
                self._kept_by[place].add(self._batch)
                if batch.num_halo > 0:
                    raise _NotYetKnown
        out = compute(x, *args, **options)
        self._keep(self.outputs, place, out, batch)
        self._computed.add((self._batch, place))
        return out

    def _keep(self, tables: dict[int, Tensor], place: int, rows: Tensor, batch: Batch) -> None:
        if place not in tables:
            tables[place] = torch.empty(self.num_nodes, rows.size(1), dtype=rows.dtype)
        tables[place][batch.node_ids.cpu()] = rows.cpu()


@contextmanager
def _watched(model: nn.Module, sweep: _Sweep) -> Iterator[None]:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, ReadsHistory)]
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        compute = layer.forward
        layer.forward = partial(sweep.call, compute)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward

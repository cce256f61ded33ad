"""Exact inference, layer by layer, of a model that is written once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.functional import Rows
from gas_triton.history import ReadsHistory
from gas_triton.loader import ClusterLoader

Forward = Callable[..., Tensor]


def inference(
    model: nn.Module, loader: ClusterLoader, forward: Forward | None = None, *, fill_histories: bool = False
) -> Tensor:
    """Logits of every node with every neighbour fresh: what full-batch evaluation gives, at the memory of one batch.

    The loader is swept once for each layer. A sweep runs the model on every batch up to the layer whose inputs are not
    yet known everywhere, keeps that layer's input rows in host memory, and stops there; the next sweep computes the
    layer from them. Layers already computed answer from their kept outputs, so each is computed exactly once for each
    batch (layer-wise inference: Hamilton et al., NeurIPS 2017; Fey et al., ICML 2021), and so are
    `nn.Linear` modules in front of the first. What else the model does is done in every sweep.

    Histories are not read, and written only where `fill_histories` says so. The model is evaluated in `eval()` mode,
    which is undone afterwards.

    Args:
        model: a model of `gas_triton.nn` layers whose control flow does not depend on values.
        loader: batches; their order does not matter.
        forward: how to call the model on a batch; `model(batch.x, batch)` if None.
        fill_histories: pushes every layer's input rows to its history: training goes on from exact ones.

    Returns:
        [N, C] in the order of the loader's graph, on its device.

    Raises:
        RuntimeError: the batches do not all call the same layers.
    """
    return _infer(model, loader, forward, _Sweep(loader.graph.num_nodes, len(loader), fill_histories))


def _infer(model: nn.Module, loader: ClusterLoader, forward: Forward | None, sweep: _Sweep) -> Tensor:
    forward = forward or call_with_x
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), watched(model, sweep.call, sweep.call_linear):
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


def call_with_x(model: nn.Module, batch: Batch) -> Tensor:
    """How a model is called where nothing else is said."""
    return model(batch.x, batch)


@dataclass(frozen=True)
class LayerRows:
    """What a call of a layer received and gave in exact inference, in host memory.

    Attributes:
        layer: the layer.
        inputs: [N, F], None where it was given halo rows too.
        outputs: [N, F_out].
    """

    layer: Any
    inputs: Tensor | None
    outputs: Tensor


def exact_rows(
    model: nn.Module, loader: ClusterLoader, forward: Forward | None = None
) -> tuple[Tensor, list[LayerRows]]:
    """What `inference` gives, and the rows of every call of a layer on the way, in the order of the calls."""
    sweep = _Sweep(loader.graph.num_nodes, len(loader), fills=False, keeps=True)
    logits = _infer(model, loader, forward, sweep)
    known = sweep.known()
    return logits, [
        LayerRows(sweep.layers[place], sweep.inputs[place] if place in known else None, sweep.outputs[place])
        for place in sorted(sweep.outputs)
    ]


class _NotYetKnown(Exception):
    """The inputs of a layer are not yet known for every node."""


class _Sweep:
    """What the layer calls of a forward, counted from 0, have received and given so far."""

    def __init__(self, num_nodes: int, num_batches: int, fills: bool, keeps: bool = False) -> None:
        self.num_nodes, self.num_batches, self.fills, self.keeps = num_nodes, num_batches, fills, keeps
        self.layers: dict[int, ReadsHistory] = {}
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self._kept_by: defaultdict[int, set[int]] = defaultdict(set)
        self._known: set[int] = set()
        self._computed: set[tuple[int, int]] = set()
        self._batch, self._place, self._linear = -1, 0, 0
        self._of_linear: dict[tuple[int, int], Tensor] = {}

    def known(self) -> set[int]:
        """Calls whose input rows all batches have given."""
        return {place for place, batches in self._kept_by.items() if len(batches) == self.num_batches}

    def begin(self) -> None:
        known = self.known()
        if self._batch >= 0 and known == self._known:
            raise RuntimeError("model does not call the same layers for every batch, so some rows never become known")
        self._batch, self._known = -1, known
        if self.keeps:
            return
        computed = Counter(place for _, place in self._computed)
        for place in [place for place in self.inputs if computed[place] == self.num_batches]:
            del self.inputs[place]

    def begin_batch(self) -> None:
        self._batch, self._place, self._linear = self._batch + 1, 0, 0

    def call(self, layer: ReadsHistory, compute: Forward, x: Rows, *args: Any, **options: Any) -> Tensor:
        batch = next((value for value in (*args, *options.values()) if isinstance(value, Batch)), None)
        if batch is None:
            raise TypeError("batch must be given to every layer that reads a history, got none")
        place, self._place = self._place, self._place + 1
        self.layers[place] = layer
        if (self._batch, place) in self._computed:
            return self.outputs[place][_range(batch)].to(batch.device, copy=True)
        # sparse rows come from the loader, complete
        if isinstance(x, Tensor) and x.size(0) == batch.num_nodes:
            if place in self._known:
                x = self.inputs[place].index_select(0, batch.all_ids.cpu()).to(batch.device)
            else:
                # kept by a batch without halo too: its rows are halo rows of others
                self._keep(self.inputs, place, x, batch)
                if self.fills and layer.history is not None:
                    layer.history.push(x, batch)
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
        tables[place][_range(batch)] = rows

    def call_linear(self, linear: nn.Module, compute: Forward, input: Any) -> Tensor:
        """A linear layer in front of all layers that read histories, which only the first sweep computes."""
        if self._place > 0:
            return compute(input)
        key, self._linear = (self._batch, self._linear), self._linear + 1
        if key not in self._of_linear:
            self._of_linear[key] = compute(input).cpu()
        return self._of_linear[key].to(input.device, copy=True)


def _range(batch: Batch) -> slice:
    """The rows of a batch of consecutive clusters."""
    return slice(int(batch.spans[0, 0]), int(batch.spans[-1, 1]))


@contextmanager
def watched(model: nn.Module, call: Forward, call_linear: Forward | None = None) -> Iterator[None]:
    """Calls of a layer become `call(layer, its forward, *args)` within the block, those of linear layers likewise."""
    calls: list[tuple[Any, Forward]] = [(m, call) for m in model.modules() if isinstance(m, ReadsHistory)]
    if call_linear is not None:
        within = {id(part) for layer, _ in calls for part in layer.modules()}
        calls += [(m, call_linear) for m in model.modules() if type(m) is nn.Linear and id(m) not in within]
    own = [vars(module).get("forward") for module, _ in calls]
    for module, instead in calls:
        module.forward = partial(instead, module, module.forward)
    try:
        yield
    finally:
        for (module, _), forward in zip(calls, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def filling_histories(model: nn.Module) -> Iterator[None]:
    """Every layer that is called with the in-batch rows of a batch pushes them to its history, in `eval()` mode too."""

    def push(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Batch)), None)
        x = args[0] if args else kwargs.get("x")
        if batch is not None and isinstance(x, Tensor) and x.size(0) == batch.num_nodes:
            layer.history.push(x, batch)

    layers = [m for m in model.modules() if isinstance(m, ReadsHistory) and m.history is not None]
    hooks = [layer.register_forward_pre_hook(push, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

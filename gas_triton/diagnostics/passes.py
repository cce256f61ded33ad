"""One forward of every batch with its halo from the histories, against the exact rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.inference import Forward, LayerRows, watched
from gas_triton.loader import ClusterLoader

__all__ = ["Distances", "Measured", "evaluation", "measure"]

# Rows that are compared at once where no batch says how many: few enough for a cache.
CHUNK = 8192


@dataclass
class Distances:
    """2-norms of rows [N] of one layer's input, float32, on the graph's device.

    Attributes:
        norm: of the exact row.
        history: from the exact row to the one in the history.
        computed: from the exact row to the one computed with histories.
        stale: from the row computed with histories to the one in the history.
    """

    norm: Tensor
    history: Tensor
    computed: Tensor
    stale: Tensor


@dataclass
class Measured:
    """What was measured.

    Attributes:
        spans: the range of rows of every batch.
        pulls: int64 [N], the number of batches that read a row from histories.
        layers: by place of the call, for calls that read a history.
        outputs: by place of the call, from the exact output row to the one computed with histories, [N]; of calls
            whose Lipschitz constant, or what stands behind them, has to be estimated.
        out_norm: norms of the model's exact output rows, [N].
        out_error: from those to the rows computed with histories, [N].
        is_direct: whether `forward` gave the model's own output.
    """

    spans: list[tuple[int, int]]
    pulls: Tensor
    layers: dict[int, Distances]
    outputs: dict[int, Tensor] = field(default_factory=dict)
    out_norm: Tensor = field(default_factory=lambda: torch.empty(0))
    out_error: Tensor = field(default_factory=lambda: torch.empty(0))
    is_direct: bool = True


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in `eval()` mode and its histories out of reach of a prefetch that is being timed; undone afterwards.

    Generators are put back to where they were.
    """
    modes = {module: module.training for module in model.modules()}
    stores = [store for module in model.modules() if (store := getattr(module, "history", None)) is not None]
    stagings = [store.staging for store in stores]
    devices = {store.device for store in stores if store.device.type == "cuda"}
    model.eval()
    for store in stores:
        store.staging = None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for store, staging in zip(stores, stagings, strict=True):
            store.staging = staging
        for module, mode in modes.items():
            module.training = mode


def measure(
    model: nn.Module,
    loader: ClusterLoader,
    forward: Forward,
    logits: Tensor,
    exact: Sequence[LayerRows],
    places: Sequence[int],
    outputs: Sequence[int],
) -> Measured:
    """Runs every batch and compares.

    Args:
        model: in `eval()` mode.
        loader: batches.
        forward: how to call the model.
        logits: exact output rows.
        exact: exact rows of every call of a layer.
        places: calls that read a history.
        outputs: calls whose output rows are compared too.
    """
    num_nodes, device = loader.graph.num_nodes, loader.graph.device

    def new() -> Tensor:
        return torch.zeros(num_nodes, device=device)

    measured = Measured(
        [], torch.zeros(num_nodes, dtype=torch.int64, device=device),
        {place: Distances(new(), new(), new(), new()) for place in places},
        {place: new() for place in outputs}, new(), new(),
    )  # fmt: skip
    compare = _Compare(measured, exact)
    last: list[Any] = []
    hook = model.register_forward_hook(lambda module, args, out: last.append(out))
    try:
        with torch.no_grad(), watched(model, compare.call):
            for batch in loader.in_order():
                compare.begin(batch)
                last.clear()
                out = forward(model, batch)
                measured.is_direct &= bool(last) and last[-1] is out
                here = slice(*measured.spans[-1])
                measured.out_error[here] = _norm(out - logits[here])
            measured.out_norm[:] = _norm(logits)
            compare.first_layer()
    finally:
        hook.remove()
    return measured


class _Compare:
    def __init__(self, measured: Measured, exact: Sequence[LayerRows]) -> None:
        self.measured, self.exact = measured, exact
        self.place, self.device = 0, torch.device("cpu")
        self.first_place = min(measured.layers)
        self.once = measured.pulls.new_ones(())

    def begin(self, batch: Batch) -> None:
        self.place, self.device = 0, batch.device
        spans = batch.spans.tolist()
        self.measured.spans.append((spans[0][0], spans[-1][1]))
        self.measured.pulls.index_add_(0, batch.halo_ids, self.once.expand(batch.num_halo))

    def call(self, layer: Any, compute: Forward, x: Any, *args: Any, **options: Any) -> Tensor:
        place, self.place = self.place, self.place + 1
        first, last = self.measured.spans[-1]
        if place < self.first_place:
            # exact in front of the first history
            return self.exact[place].outputs[first:last].to(self.device, copy=True)
        if place > self.first_place and place in self.measured.layers:
            distances = self.measured.layers[place]
            right, stored = self._rows(place, first, last)
            distances.computed[first:last] = _norm(x - right)
            distances.stale[first:last] = _norm(stored - x)
        out = compute(x, *args, **options)
        if place in self.measured.outputs:
            right = self.exact[place].outputs[first:last].to(out.device)
            self.measured.outputs[place][first:last] = _norm(out - right)
        return out

    def first_layer(self) -> None:
        """The rows that the first history holds and their exact ones, which are those computed with histories."""
        distances = self.measured.layers[self.first_place]
        for first in range(0, len(distances.norm), CHUNK):
            here = slice(first, min(first + CHUNK, len(distances.norm)))
            self._rows(self.first_place, here.start, here.stop)
            distances.stale[here] = distances.history[here]

    def _rows(self, place: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Exact rows of a layer's input and those in its history, which are compared."""
        inputs, layer, distances = self.exact[place].inputs, self.exact[place].layer, self.measured.layers[place]
        assert inputs is not None
        right = inputs[first:last].to(self.device)
        stored = layer.history.pull(torch.arange(first, last, device=layer.history.device)).to(right)
        distances.norm[first:last] = _norm(right)
        distances.history[first:last] = _norm(stored - right)
        return right, stored


def _norm(rows: Tensor) -> Tensor:
    """2-norms of rows, at least in float32 on the way."""
    rows = rows.flatten(1)
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    return torch.linalg.vector_norm(rows, dim=1).float()

"""`LipschitzPenalty`: how far the layers' outputs move when a little noise is added to their inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gas_triton.batch import Batch
from gas_triton.functional import Rows
from gas_triton.nn import GINConv
from gas_triton.nn.base import HistoryLayer, Source

__all__ = ["LipschitzPenalty"]


class LipschitzPenalty:
    r"""Penalises layers that turn a small change of their input into a large one of their output.

    A history is a little out of date, and what that costs grows with the Lipschitz constants of the layers behind it
    (Fey et al., ICML 2021). For L layers that can read histories,

        s / (L - 1) sum_l mean_i || f_l(h)_i - f_l(h + sigma e)_i ||_2,    e from N(0, 1)

    with h what the layer's `nn` is given in a `GINConv`, as in PyGAS's `train_gin.py`, and the rows that the layer
    aggregates, halo rows included and after dropout, in every other layer. The gradient flows through both terms.

    Each layer is computed a second time, for which other layers than `GINConv` copy their [B + H, F] rows. The second
    time draws the same dropout masks, pushes nothing, and leaves buffers (running statistics of batch norm) as they
    are; in training, batch norm takes the statistics of the rows that it is given, with noise.

        penalty = LipschitzPenalty(model, strength=1.0)
        for batch in histories.prefetch(loader):
            out = model(batch.x, batch)
            loss = F.cross_entropy(out[batch.train_mask], batch.y[batch.train_mask]) + penalty()

    The model keeps the hooks until `remove()`, or the end of a `with` block. They do nothing in `eval()` mode and where
    no gradient is recorded.

    Args:
        model: a model of `gas_triton.nn` layers, at least two.
        strength: s; with 0 nothing is computed or drawn.
        noise: sigma, above 0.
        layers: places of the penalised layers among the model's `HistoryLayer` modules, from 0. All but the first if
            None, which reads no history; PyGAS leaves out the last too: `range(1, L - 1)`.

    Raises:
        ValueError: a model with fewer than two such layers, a place that is not one of them, or a number out of range.
    """

    def __init__(
        self, model: nn.Module, strength: float, noise: float = 0.1, layers: Sequence[int] | None = None
    ) -> None:
        if not (math.isfinite(strength) and strength >= 0.0):
            raise ValueError(f"strength must be a finite number of at least 0, got {strength}")
        if not (math.isfinite(noise) and noise > 0.0):
            raise ValueError(f"noise must be a finite number above 0, got {noise}")
        found = [module for module in model.modules() if isinstance(module, HistoryLayer)]
        if len(found) < 2:
            raise ValueError(f"model must have at least 2 layers that can read a history, got {len(found)}")
        places = list(range(1, len(found)) if layers is None else layers)
        if not places or len(set(places)) != len(places) or not all(place in range(len(found)) for place in places):
            raise ValueError(f"layers must be different places in [0, {len(found)}), at least one, got {places}")
        self.strength, self.noise, self.num_layers = float(strength), float(noise), len(found)
        self._watches = [_watch(found[place], self.noise) for place in places] if strength > 0.0 else []

    def __call__(self) -> Tensor:
        """The penalty of the last forward, a scalar, which is then forgotten.

        Raises:
            RuntimeError: there was no forward in training mode since the last call.
        """
        if self.strength == 0.0:
            return torch.zeros(())
        terms = [watch.term for watch in self._watches if watch.term is not None]
        for watch in self._watches:
            watch.term = None
        if not terms:
            raise RuntimeError("the penalty is of a forward in training mode, of which there was none since the last")
        return torch.stack(terms).sum() * (self.strength / (self.num_layers - 1))

    def remove(self) -> None:
        """Takes the hooks from the model."""
        for watch in self._watches:
            watch.remove()

    def __enter__(self) -> LipschitzPenalty:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


class _Watch:
    """Calls a module again after each call in training, with noise on its input, and keeps how far the output moved.

    Attributes:
        term: of the last call, None if there is none.
    """

    def __init__(self, module: nn.Module, noise: float) -> None:
        self.module, self.noise = module, noise
        self.term: Tensor | None = None
        self._is_again = False
        self._state = _RandomState(torch.device("cpu"))
        self._hooks = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.term = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._is_again or not module.training or not torch.is_grad_enabled():
            return
        self.term = None
        self._state = _RandomState(_device_of(*args, *options.values()))
        self._begin()

    def _after(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], out: Tensor | None) -> None:
        if self._is_again or not module.training or not torch.is_grad_enabled():
            return
        args = self._end(args, is_complete=out is not None)
        if out is None:
            # the module has raised
            return
        self._is_again = True
        try:
            with self._state.again():
                # own copies, so that the second call does not count in running statistics
                buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
                noisy = functional_call(module, buffers, args, options)
        finally:
            self._is_again = False
            self._end(args, is_complete=False)
        dtype = torch.promote_types(out.dtype, torch.float32)
        self.term = torch.linalg.vector_norm((out - noisy).to(dtype), dim=-1).mean()

    def _begin(self) -> None:
        """Begins the first call."""

    def _end(self, args: tuple[Any, ...], is_complete: bool) -> tuple[Any, ...]:
        """Ends a call; the arguments of the second, if there is to be one."""
        return (self._perturb(args[0]), *args[1:]) if is_complete else args

    def _perturb(self, rows: Tensor) -> Tensor:
        return rows + self.noise * torch.randn_like(rows)


class _LayerWatch(_Watch):
    """The noise is on the rows that a layer reads, wherever they come from."""

    module: HistoryLayer

    def _begin(self) -> None:
        self._source: Source | None = None
        self.module.read = self._read  # type: ignore[method-assign]

    def _read(self, x: Rows, batch: Batch) -> Source:
        self._source = type(self.module).read(self.module, x, batch)
        self._after_read = _RandomState(batch.device)
        return self._source

    def _end(self, args: tuple[Any, ...], is_complete: bool) -> tuple[Any, ...]:
        vars(self.module).pop("read", None)
        if is_complete:
            if self._source is None:
                raise RuntimeError(f"{type(self.module).__name__} did not read its rows through HistoryLayer.read")
            rows = self._perturb(self._source.rows())
            noisy = replace(self._source, x=rows, history=None, history_dropout=0.0, seed=None)
            self._source = None
            self.module.read = lambda x, batch: self._read_again(noisy)  # type: ignore[method-assign]
        return args

    def _read_again(self, noisy: Source) -> Source:
        # what the first read has drawn is in the rows
        self._after_read.restore()
        return noisy


def _watch(layer: HistoryLayer, noise: float) -> _Watch:
    return _Watch(layer.nn, noise) if isinstance(layer, GINConv) else _LayerWatch(layer, noise)


class _RandomState:
    """The state of the generators of the CPU and of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_host = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._on_host)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self.device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draws in the block are those after this state; the generators then go on from where they are now."""
        now = _RandomState(self.device)
        self.restore()
        try:
            yield
        finally:
            now.restore()


def _device_of(*values: Any) -> torch.device:
    return next(value.device for value in values if isinstance(value, Tensor | Batch))

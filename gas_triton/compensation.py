r"""`Compensated`: halo rows fresher than their histories, and the gradients that a batch alone leaves out.

Histories (GAS) read a halo row as it was when it was last in a batch, and send no gradient through it. Two known
methods compute the halo rows too, from the neighbours that the step has, so with edges missing. Below B is the batch,
H its halo, h^l the input of layer l + 1, V^l the gradient of the loss by the output of layer l, a bar a table, and f a
layer with whatever the model does until the next one.

**Momentum** (GraphFM-OB: Yu et al., ICML 2022), with `momentum` = gamma. For k in H, from in-batch neighbours alone:

    fresh_k = f(h_i: i in N(k) and B)               without gradient
    bar h_k = (1 - gamma) bar h_k + gamma fresh_k   written to the table, then read by the batch

**LMC** (Shi et al., ICLR 2023), with `gradients=True` and `momentum` = beta. For k in H:

    forward     hat h_k = (1 - beta_k) bar h_k + beta_k f(h_i, hat h_j: i in N(k) and B, j in N(k) and H)
    backward    hat V_k = (1 - beta_k) bar V_k + beta_k V_k, with V_k from what of the loss k reaches in B and H
                V_i gets (df_k / dh_i)^T hat V_k from every k in H with i in N(k), beside what B gives it     for i in B
    weights     sum_{i in B} (df_i / dw)^T V_i: halo rows give none
    tables      bar h_i = h_i, bar V_i = V_i        for i in B; halo rows are not written
    beta_k = beta score(x_k), with x_k the share of the edges of k that the step has

As in the authors' code V is taken before the activation, and hat h_k passes its gradient on to f as it is. Different:

* V of the last layer is read from its table (beta = 0 there), which holds the loss gradients of rows when they were
  last in a batch. The authors take the loss of averaged halo outputs, for which they keep a table of outputs and
  need the halo's labels. With beta = 0 both are the same.
* The forward average is of the rows that a layer is given, after the activation, as GAS keeps them. A residual
  connection of a halo row adds its fresh row.
* Halo rows of which the step has every edge are averaged like others.
* `BatchNorm` takes its statistics from in-batch rows; halo rows are normalised by the running ones, as in GraphFM's
  code. LMC's has a second norm for them, or takes their own statistics.

With `momentum=0` and without gradients this is GAS. With beta = 0 and exact tables the gradients of LMC, added over
batches that cover the graph, are those of full-batch training if layers are linear in their neighbours with weights of
the graph (GCN, SAGE with "sum"; not GIN, whose perceptron comes after). A "mean" over the edges that the step has, or
attention over them, is not that of all.
The graph must have every edge in both directions for it, though not of one weight: of a directed graph, nodes that read
the batch without being read by it are not in its halo, and what they would send back stays left out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.functional import Features
from gas_triton.history import HistoryStore, ReadsHistory
from gas_triton.loader import ClusterLoader

__all__ = ["SCORES", "Compensated"]

_Args = tuple[Any, ...]
_Options = dict[str, Any]

# the share of a halo row's edges that the step has -> what the weight of its fresh row is multiplied by (LMC, appendix)
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda share: share,
    "convex": lambda share: share * share,
    "concave": lambda share: share * (2.0 - share),
}


class Compensated:
    """A model to call in training steps in place of itself: `out = compensated(batch.x, batch)`.

    It reads and writes the model's histories as the model does, and the model is unchanged: its parameters, its
    `state_dict`, `inference` and evaluation are as ever. In `eval()` mode this is the model.

    With `gradients=True` the loss must give a node the same weight in every batch: a sum over the batch's nodes,
    divided by a number that is the same for all batches. A mean over the labelled nodes of each batch would put
    gradients of different units into one table.

    `torch.compile` of the model is not supported here. Dropout inside of layers (`input_dropout`) draws what it would
    draw without compensation; `F.dropout` between layers draws for halo rows too.

    Args:
        model: a model whose layers have histories (`attach_histories`, with `gradients=True` if used here).
        loader: makes the plans of halo rows.
        momentum: weight of fresh rows in [0, 1]: gamma of GraphFM-OB, beta of LMC.
        gradients: LMC instead of GraphFM-OB.
        score: beta's dependence on the share of a halo row's edges that the step has: "constant", "linear", "convex"
            (its square) or "concave"; for LMC.

    Raises:
        TypeError: no `ClusterLoader`, or `gradients` is not a bool.
        ValueError: a number out of range, an unknown score, no layer with a history, a layer with `halo="drop"`, or
            for LMC a layer without a history of gradients or a module with both parameters and layers of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: ClusterLoader,
        momentum: float = 0.0,
        gradients: bool = False,
        score: str = "constant",
    ) -> None:
        if not isinstance(loader, ClusterLoader):
            raise TypeError(f"loader must be a ClusterLoader, got {type(loader).__name__}")
        if not isinstance(gradients, bool):
            raise TypeError(f"gradients must be a bool, got {gradients!r}")
        if isinstance(momentum, bool) or not math.isfinite(momentum) or not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum!r}")
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if score != "constant" and not gradients:
            raise ValueError(f"score {score!r} is for gradients=True: momentum has the same weight for every row")
        self.model, self.loader = model, loader
        self.momentum, self.gradients, self.score = float(momentum), gradients, score
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, ReadsHistory)}
        self._others = self._find_others()
        self._check_layers()

    def __call__(self, x: Tensor | Features, batch: Batch) -> Tensor:
        """What the model gives for the in-batch rows, [B, C].

        Args:
            x: `batch.x` or `batch.features`.
            batch: a batch of the loader.

        Raises:
            ValueError: `x` has not B + H rows, a layer is given rows whose halo nothing provides, or the model does not
                give a row for each of its batch's rows.
        """
        if not self.model.training:
            return self.model(x, batch)
        self._check_layers()
        step = _Step(self, batch)
        patches: list[tuple[nn.Module, Callable[..., Any]]] = []
        for name, layer in self._layers.items():
            module: Any = layer
            patches.append((module, partial(step.call_layer, name, layer, module.forward)))
        patches += [(module, partial(step.call_other, module, module.forward)) for module in self._others]
        with _replaced(patches):
            out = self.model(step.widen(x), step.batch)
        if not isinstance(out, Tensor) or out.dim() == 0 or out.size(0) != step.batch.num_nodes:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"model must give {step.batch.num_nodes} rows, one for each of its batch, got {got}")
        return out[: batch.num_nodes]

    def _find_others(self) -> list[nn.Module]:
        """Modules beside the layers whose parameters, or statistics, halo rows must not reach."""
        inside = {id(m) for layer in self._layers.values() for m in _module(layer).modules()}
        found = []
        for name, module in self.model.named_modules():
            has_parameters = next(module.parameters(recurse=False), None) is not None
            if id(module) in inside or not (has_parameters or isinstance(module, _BatchNorm)):
                continue
            if not any(isinstance(m, ReadsHistory) for m in module.modules()):
                found.append(module)
            elif self.gradients:
                raise ValueError(
                    f"{name or 'model'} has parameters of its own beside layers, which halo rows would give gradients: "
                    "put them in a module of their own"
                )
        return found

    def _check_layers(self) -> None:
        stores = [layer.history for layer in self._layers.values() if layer.history is not None]
        if not stores:
            raise ValueError("model has no layer with a history: attach_histories(model, num_nodes) first")
        for name, layer in self._layers.items():
            if getattr(layer, "halo", "read") != "read":
                raise ValueError(f"{name} leaves the halo out (halo='drop'): there is nothing to compensate")
            if self.gradients and layer.history is not None and layer.gradient_history is None:
                raise ValueError(
                    f"{name} has no history of gradients: attach_histories(model, num_nodes, gradients=True) first"
                )


class _Extended(Batch):
    """A batch as the model sees it: B in-batch and H halo rows are its rows, and the halo rows once more are its halo.

    So complete rows, as features are, number B + 2H, and rows that a layer has given B + H: the model tells them apart
    as it does without compensation. Layers read complete halo rows from the second copy; gradient ends at the first,
    which a residual connection reads. Only layers can be called with such a batch, which `_Step` does: it has no edges.
    """

    def __init__(self, core: Batch) -> None:
        self.__dict__.update(core.__dict__)
        for name in ("inner", "outer", "outer_slot", "edge_weight", "hubs"):
            del self.__dict__[name]
        self.node_ids = core.all_ids
        self.num_nodes = self.node_ids.numel()
        self._sliced, self._made = {}, {}

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "outer", "outer_slot", "edge_weight", "hubs"):
            raise AttributeError(f"a compensated batch has no {name}: only layers with histories can aggregate in it")
        return super().__getattr__(name)


class _Step:
    """One call of a compensated model: every layer is called for in-batch rows and, apart, for halo rows.

    Args:
        owner: says how.
        core: the batch.
    """

    def __init__(self, owner: Compensated, core: Batch) -> None:
        if not isinstance(core, Batch):
            raise TypeError(f"batch must be a Batch of a ClusterLoader, got {type(core).__name__}")
        self.gradients, self.core = owner.gradients, core
        self.rim = owner.loader.halo_batch(core, mutual=owner.gradients)
        self.batch = _Extended(core)
        self.weight: float | Tensor = owner.momentum
        if owner.score != "constant":
            self.weight = owner.momentum * SCORES[owner.score](self._shares(owner.loader))[:, None]
        self.num_complete = core.num_nodes + 2 * core.num_halo
        self.writes = not owner.gradients and owner.momentum > 0.0 and core.num_halo > 0
        self.last = ""

    def _shares(self, loader: ClusterLoader) -> Tensor:
        """Of the edges of each halo row, the share that the step has, float32 [H]; 1 for a row without edges."""
        rowptr, ids = loader.graph.rowptr, self.rim.node_ids.to(loader.graph.device)
        degree = (rowptr[ids + 1] - rowptr[ids]).to(self.core.device)
        seen = self.rim.inner.rowptr.diff() + self.rim.outer.rowptr.diff()
        return torch.where(degree > 0, seen / degree.clamp(min=1), 1.0).float()

    def widen(self, x: Tensor | Features) -> Tensor | Features:
        """`x` as the model takes it, with the halo rows twice."""
        num_rows = self.batch.num_nodes
        if isinstance(x, Features):
            return Features(x.table, self.batch.node_ids, self.batch.halo_ids)
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be batch.x or batch.features, got {type(x).__name__}")
        if x.dim() == 0 or x.size(0) != num_rows:
            raise ValueError(f"x must have {num_rows} rows, in-batch and halo rows, got {list(x.shape)}: give batch.x")
        return self._repeat_halo(x)

    def _repeat_halo(self, rows: Tensor) -> Tensor:
        in_batch, halo = rows[: self.core.num_nodes], rows[self.core.num_nodes :]
        return torch.cat([in_batch, halo.detach(), halo]) if self.core.num_halo > 0 else rows

    def _is_complete(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == self.num_complete

    # --- layers -------------------------------------------------------------------------------------------------------

    def call_layer(
        self, name: str, layer: ReadsHistory, compute: Callable[..., Tensor], *args: Any, **options: Any
    ) -> Tensor:
        """A layer's rows for `self.batch`."""
        if not any(value is self.batch for value in (*args, *options.values())):
            # the call for halo rows, or one of a layer inside another
            return compute(*args, **options)
        if not args:
            raise TypeError(f"{name}: x must be the first argument, got only {', '.join(options)}")
        module, core = _module(layer), self.core
        is_constant = core.num_halo > 0 and (isinstance(args[0], Features) or self._is_complete(args[0]))
        if core.num_halo > 0 and not is_constant:
            args = (self._average(name, layer, args[0]), *args[1:])
        of_batch, of_halo = self._split_all(name, args, options)
        before = _generator_state(core.device) if module.training else None
        out = compute(*of_batch[0], **of_batch[1])
        self.last = name
        if core.num_halo > 0:
            after = _generator_state(core.device) if module.training else None
            # a node's mask is the same wherever the node is read, and the next layer draws as without halo rows
            _set_generator_state(core.device, before)
            rows = self._for_halo(module, compute, *of_halo, is_constant)
            _set_generator_state(core.device, after)
            out = torch.cat([out, rows])
        store = layer.gradient_history if self.gradients and not is_constant else None
        if store is not None and torch.is_grad_enabled() and out.requires_grad:
            out = _Compensate.apply(out, self, name, store)
        return out

    def _average(self, name: str, layer: ReadsHistory, x: Any) -> Tensor:
        """What a layer reads, from rows that layers have given: halo rows are averaged, in-batch rows pushed."""
        core, store, push = self.core, layer.history, _module(layer).training
        if not isinstance(x, Tensor) or x.dim() == 0 or x.size(0) != self.batch.num_nodes:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: x must have {self.batch.num_nodes} rows or be the model's input, got {got}")
        if store is None:
            raise ValueError(f"{name} has no history that holds its halo rows: attach_histories gives it one")
        in_batch, fresh = x[: core.num_nodes], x[core.num_nodes :]
        history = store.exchange(in_batch, core, push=push and not self.writes)
        assert history is not None
        old = functional.halo_rows(history, core, x.dtype)
        halo = _Average.apply(fresh if self.gradients else fresh.detach(), old, self.weight)
        rows = torch.cat([in_batch, halo])
        if push and self.writes:
            store.push(rows, self._written())
        return rows

    def _written(self) -> Batch:
        """The rows that momentum pushes: those of the batch and those of its halo."""
        batch = copy.copy(self.core)
        batch.node_ids, batch.num_nodes = self.batch.node_ids, self.batch.num_nodes
        batch.spans = torch.cat([self.core.spans, self.rim.spans])
        return batch

    def _split_all(self, name: str, args: _Args, options: _Options) -> tuple[tuple[_Args, _Options], ...]:
        """The arguments of a layer for in-batch rows, and for halo rows."""
        pairs = [self._split(name, value) for value in args]
        named = {key: self._split(name, value) for key, value in options.items()}
        return tuple(
            (tuple(pair[side] for pair in pairs), {key: pair[side] for key, pair in named.items()}) for side in (0, 1)
        )

    def _split(self, name: str, value: Any) -> tuple[Any, Any]:
        core, rim, num_rows = self.core, self.rim, self.batch.num_nodes
        if value is self.batch:
            return core, rim
        if isinstance(value, Features):
            table = value.table
            return Features(table, core.node_ids, core.halo_ids), Features(table, rim.node_ids, rim.halo_ids)
        if not isinstance(value, Tensor) or value.numel() == 1 or core.num_halo == 0:
            return value, value
        if not self._is_complete(value) and (value.dim() == 0 or value.size(0) != num_rows):
            raise ValueError(
                f"{name}: a tensor argument must have {num_rows} rows to be split in in-batch and halo rows, got "
                f"{list(value.shape)}"
            )
        in_batch, halo = value[: core.num_nodes], value[core.num_nodes : num_rows]
        of_halo = torch.cat([halo, in_batch])
        return (torch.cat([in_batch, value[num_rows:]]) if self._is_complete(value) else value), of_halo

    def _for_halo(
        self,
        module: nn.Module,
        compute: Callable[..., Tensor],
        args: _Args,
        options: _Options,
        is_constant: bool = False,
    ) -> Tensor:
        """A module's output for halo rows: its parameters get no gradient, and its batch norms no statistics."""
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
        for norm in norms:
            norm.training = False
        try:
            if is_constant or not self.gradients:
                with torch.no_grad():
                    return compute(*args, **options)
            # calls `compute`, as `call_layer` and `call_other` pass on what is not the step's batch
            detached = {name: parameter.detach() for name, parameter in module.named_parameters()}
            return functional_call(module, detached, args, options)
        finally:
            for norm in norms:
                norm.training = True

    # --- other modules ------------------------------------------------------------------------------------------------

    def call_other(self, module: nn.Module, compute: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The output of a module that treats rows alike, such as a linear layer or a norm."""
        num_rows, num_nodes = self.batch.num_nodes, self.core.num_nodes
        if self.core.num_halo == 0:
            return compute(*args, **options)
        if args and self._is_complete(args[0]):
            out = compute(torch.cat([args[0][:num_nodes], args[0][num_rows:]]), *args[1:], **options)
            return self._repeat_halo(out)
        has_rows = [isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == num_rows for value in args]
        if not any(has_rows):
            return compute(*args, **options)
        of_batch = tuple(v[:num_nodes] if has else v for v, has in zip(args, has_rows, strict=True))
        of_halo = tuple(v[num_nodes:] if has else v for v, has in zip(args, has_rows, strict=True))
        out = compute(*of_batch, **options)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{type(module).__name__} must give a tensor with a row for each of its rows, to be computed apart for "
                f"halo rows, got {type(out).__name__}"
            )
        return torch.cat([out, self._for_halo(module, compute, of_halo, options)])


class _Average(torch.autograd.Function):
    """(1 - weight) old + weight fresh, whose gradient goes to `fresh` as it is."""

    @staticmethod
    def forward(ctx: Any, fresh: Tensor, old: Tensor, weight: float | Tensor) -> Tensor:
        return torch.lerp(old, fresh, weight if isinstance(weight, float) else weight.to(old.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Compensate(torch.autograd.Function):
    """A layer's output; in its gradient, halo rows are averaged with those of the table, which gets in-batch rows."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, step: _Step, name: str, store: HistoryStore) -> Tensor:
        ctx.step, ctx.name, ctx.store = step, name, store
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        step: _Step = ctx.step
        core = step.core
        in_batch = grad[: core.num_nodes].contiguous()
        history = ctx.store.exchange(in_batch, core)
        if history is None:
            return grad, None, None, None
        old = functional.halo_rows(history, core, grad.dtype)
        # the halo rows of the last layer have no loss of their own
        weight = 0.0 if ctx.name == step.last else step.weight
        halo = torch.lerp(old, grad[core.num_nodes :], weight if isinstance(weight, float) else weight.to(old.dtype))
        return torch.cat([in_batch, halo]), None, None, None


@contextmanager
def _replaced(patches: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Gives modules other forwards."""
    own: list[Any] = [vars(module).get("forward") for module, _ in patches]
    for module, forward in patches:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), before in zip(patches, own, strict=True):
            del module.forward
            if before is not None:
                module.forward = before


def _module(layer: ReadsHistory) -> nn.Module:
    assert isinstance(layer, nn.Module)
    return layer


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(device: torch.device, state: Tensor | None) -> None:
    if state is None:
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)

"""PyG layers with a fused counterpart, and how one is made of the other.

A counterpart is a layer of `gas_triton.nn` that holds the PyG layer's own parameters and is called as the PyG layer is.
To add one, write its builder: a function of the PyG layer that gives the counterpart with the same options, or None if
it cannot have them; and enter it in `BUILDERS` under the name of PyG's class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gas_triton import nn as layers
from gas_triton.autoscale.call import PygCall, own_weight
from gas_triton.functional import Features
from gas_triton.nn.lipschitz import Lipschitz

Builder = Callable[[Any, int | None], nn.Module | None]


class CalledAsPyg:
    """Mixed into a fused layer: `forward` takes what the PyG layer takes, the batch in place of `edge_index`."""

    call: PygCall
    takes: frozenset[str]

    @property
    def lipschitz(self) -> Lipschitz | None:
        """That of the layer, which is called otherwise but computes the same."""
        return super().lipschitz  # type: ignore[misc]

    def forward(self, x: Tensor | Features, *args: Any, **options: Any) -> Tensor:
        """[B, F_out]; see `Wrapped.forward`."""
        batch, _, given = self.call.bind(x, args, options)
        if "edge_weight" in given and given["edge_weight"] is batch.edge_weight:
            # which are used anyway
            given.pop("edge_weight", None)
        if getattr(self, "edge_dim", 0) is None:
            # not read, as in PyG
            given.pop("edge_attr", None)
        if "edge_weight" in given and getattr(self, "normalize", False):
            raise ValueError(own_weight(self.call.label))
        unknown = sorted(given.keys() - self.takes)
        if unknown:
            raise ValueError(
                f"{self.call.label} as a fused layer takes no {unknown[0]}: use gas.autoscale(model, fuse=False)"
            )
        return super().forward(x, batch=batch, **given)  # type: ignore[misc]


def _as_called(fused: type[nn.Module]) -> type[nn.Module]:
    takes = frozenset(inspect.signature(fused.forward).parameters)
    members = {"__module__": __name__, "__doc__": fused.__doc__, "takes": takes}
    return type(fused.__name__, (CalledAsPyg, fused), members)


def _make(layer: Any, names: Iterable[str], **values: Any) -> Any:
    """The counterpart of `layer` with the options `names`, taken from its attributes, and `values`."""
    options = {name: getattr(layer, name) for name in names} | values
    if isinstance(options.get("in_channels"), tuple | list):
        # the rows of sources and targets are the same
        options["in_channels"], target = options["in_channels"]
        if target != options["in_channels"]:
            return None
    fused = globals()[type(layer).__name__]
    accepted = inspect.signature(fused.__init__).parameters
    defaults = inspect.signature(type(layer).__init__).parameters
    for name in [name for name in options if name not in accepted]:
        if name not in defaults or options.pop(name) != defaults[name].default:
            return None
    try:
        return fused(**options)
    except ValueError:
        # an option that it does not have
        return None


# --- builders ---------------------------------------------------------------------------------------------------------

_ATTENTION = "in_channels", "out_channels", "heads", "concat", "negative_slope", "dropout", "add_self_loops", "residual"


def _gcn(layer: Any, width: int | None) -> nn.Module | None:
    names = "in_channels", "out_channels", "improved", "cached", "add_self_loops", "normalize"
    return _make(layer, names, bias=layer.bias is not None) if _sums(layer) else None


def _sage(layer: Any, width: int | None) -> nn.Module | None:
    if layer.aggr not in ("mean", "sum", "add", "max", "min"):
        return None
    names = "in_channels", "out_channels", "aggr", "normalize", "root_weight", "project"
    return _make(layer, names, bias=layer.lin_l.bias is not None)


def _gin(layer: Any, width: int | None) -> nn.Module | None:
    is_trained = isinstance(layer.eps, nn.Parameter)
    options = {"eps": layer.initial_eps, "train_eps": is_trained, "in_channels": width}
    return _make(layer, ("nn",), **options) if _sums(layer) else None


def _gat(layer: Any, width: int | None) -> nn.Module | None:
    names = (*_ATTENTION, "edge_dim", "fill_value")
    return _make(layer, names, bias=layer.bias is not None) if _sums(layer) else None


def _gatv2(layer: Any, width: int | None) -> nn.Module | None:
    names = (*_ATTENTION, "edge_dim", "fill_value", "share_weights")
    has_bias = layer.lin_l.bias is not None
    return _make(layer, names, bias=has_bias) if _sums(layer) else None


def _transformer(layer: Any, width: int | None) -> nn.Module | None:
    names = "in_channels", "out_channels", "heads", "concat", "beta", "dropout", "edge_dim", "root_weight"
    return _make(layer, names, bias=layer.lin_key.bias is not None) if _sums(layer) else None


def _pna(layer: Any, width: int | None) -> nn.Module | None:
    scaled = layer.aggr_module
    several = getattr(scaled.aggr, "aggrs", [scaled.aggr])
    if getattr(scaled.aggr, "mode", "cat") != "cat" or any(getattr(part, "semi_grad", False) for part in several):
        return None
    linears = [[part for part in tower if hasattr(part, "weight")] for tower in (layer.pre_nns[0], layer.post_nns[0])]
    others = [part for tower in (layer.pre_nns[0], layer.post_nns[0]) for part in tower if not hasattr(part, "weight")]
    fused = _make(
        layer, ("in_channels", "out_channels", "edge_dim", "towers", "divide_input"),
        aggregators=[type(part).__name__.removesuffix("Aggregation").lower() for part in several],
        scalers=scaled.scaler, pre_layers=len(linears[0]), post_layers=len(linears[1]),
        act=others[0] if others else None, train_norm=isinstance(scaled.avg_deg_lin, nn.Parameter),
        # its mean degrees are those of the layer, below and in `_adopt`
        deg=torch.tensor([0, 1]),
    )  # fmt: skip
    if fused is not None:
        fused.aggr_module.init_avg_deg_lin = scaled.init_avg_deg_lin
        fused.aggr_module.init_avg_deg_log = scaled.init_avg_deg_log
    return fused


def _gcn2(layer: Any, width: int | None) -> nn.Module | None:
    names = "channels", "alpha", "cached", "add_self_loops", "normalize"
    fused = _make(layer, names, shared_weights=layer.weight2 is None) if _sums(layer) else None
    if fused is not None:
        # PyG forgets what it made this of
        fused.beta = layer.beta
    return fused


def _appnp(layer: Any, width: int | None) -> nn.Module | None:
    names = "K", "alpha", "dropout", "cached", "add_self_loops", "normalize"
    return _make(layer, names, channels=width) if _sums(layer) else None


BUILDERS: dict[str, Builder] = {
    "GCNConv": _gcn,
    "SAGEConv": _sage,
    "GINConv": _gin,
    "GATConv": _gat,
    "GATv2Conv": _gatv2,
    "TransformerConv": _transformer,
    "PNAConv": _pna,
    "GCN2Conv": _gcn2,
    "APPNP": _appnp,
}
# at module level and under their own names, so that a model can be pickled
for _name in BUILDERS:
    globals()[_name] = _as_called(getattr(layers, _name))


def fuse(layer: nn.Module, call: PygCall, width: int | None) -> nn.Module | None:
    """The fused counterpart of a PyG layer, with the very same parameters; None if there is none.

    Args:
        layer: a `torch_geometric.nn.MessagePassing`.
        call: how it is called.
        width: features of its input rows, None if unknown.
    """
    kind = type(layer)
    is_known = kind.__name__ in BUILDERS and kind.__module__.startswith("torch_geometric.nn.conv.")
    if not is_known or _is_changed(layer):
        return None
    # its first parameters are thrown away: they must not change what is drawn next
    with torch.random.fork_rng(devices=[]):
        fused = BUILDERS[kind.__name__](layer, width)
    if fused is None or not _adopt(fused, layer):
        return None
    fused.training = layer.training
    fused.__dict__["call"] = call
    return fused


def uses_loops_of_graph(layer: nn.Module) -> bool:
    """Whether the fused layer expects self loops in the graph where the PyG layer adds its own to any graph."""
    return type(layer).__name__ in ("GATConv", "GATv2Conv") and bool(layer.add_self_loops)


def _adopt(fused: nn.Module, layer: nn.Module) -> bool:
    """Puts the parameters and buffers of `layer` in the places of those of `fused`, if the names are the same."""
    for kind in ("named_parameters", "named_buffers"):
        own, given = dict(getattr(fused, kind)()), dict(getattr(layer, kind)())
        if own.keys() != given.keys() or any(own[name].shape != given[name].shape for name in own):
            return False
    for path, part in layer.named_modules():
        for places in ("_parameters", "_buffers"):
            for name, value in getattr(part, places).items():
                if value is not None:
                    getattr(fused.get_submodule(path), places)[name] = value
    return True


def _sums(layer: Any) -> bool:
    return layer.aggr in ("add", "sum")


def _is_changed(layer: nn.Module) -> bool:
    """Whether someone hooked into the layer, or put a module of their own into it."""
    own = getattr(layer, "nn", None)
    kept = set() if own is None else {id(part) for part in own.modules()}
    parts = [part for part in layer.modules() if id(part) not in kept]
    return any(
        type(part).__module__.split(".")[0] not in ("torch", "torch_geometric")
        or any(value for name, value in vars(part).items() if name.endswith("_hooks"))
        for part in parts
    )

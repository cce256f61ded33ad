"""`autoscale`: every message-passing layer of a model, replaced by one that reads histories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from gas_triton.autoscale.call import PygCall, label
from gas_triton.autoscale.fused import fuse as fused_counterpart
from gas_triton.autoscale.fused import uses_loops_of_graph
from gas_triton.autoscale.refusals import refusals
from gas_triton.autoscale.wrapped import Wrapped
from gas_triton.errors import MissingPackageError
from gas_triton.nn.base import HistoryLayer


def autoscale(
    model: nn.Module, *, fuse: bool = True, widths: Mapping[str, int] | None = None, trust: Iterable[str] = ()
) -> nn.Module:
    """Replaces the message-passing layers of a PyTorch Geometric model by layers that read histories.

    The model is then used as one of `gas_triton.nn` layers, with the `Batch` where `edge_index` went, and with edge
    tensors in the order of the batch's edges:

        model = gas.autoscale(torch_geometric.nn.GAT(64, 128, num_layers=3, out_channels=10, edge_dim=8))
        histories = gas.attach_histories(model, graph.num_nodes)
        for batch in histories.prefetch(loader):
            out = model(batch.x, batch, edge_attr=batch.edge_attr)
        logits = gas.inference(model, loader, lambda model, batch: model(batch.x, batch, edge_attr=batch.edge_attr))

    Layers with a counterpart in `gas_triton.nn` become that; all others are called as they are on the in-batch rows
    and the halo rows below them. Parameters are the very same objects under the same names: optimizers made before
    stay valid, and a `state_dict` fits both ways. The model may do nothing with `edge_index` but give it to its layers.
    A layer gives the B in-batch rows: a model that uses the input of its first layer beside the output, as a residual
    connection does, has to take `x[:batch.num_nodes]` of it.

    `GCNConv`, `GCN2Conv` and `APPNP` with `normalize=True` use the weights of a graph that was normalised once,
    `graph.add_self_loops().gcn_norm()`. Other layers see that graph too, loops included: attention layers replace
    the loops by their own, but `SAGEConv` counts a node among its neighbours. In a model of attention layers only,
    fused ones expect `graph.add_self_loops()`, and say so.

    Dropout in front of a layer puts dropped rows into its history. Where it can be moved it is: the dropout of PyG's
    basic models (`GCN`, `GraphSAGE`, `GIN`, `GAT`, `PNA`, `EdgeCNN`) without jumping knowledge is done by the layer
    behind it, on in-batch and halo rows alike, and histories hold whole rows. In a model of your own, give the
    layer's `input_dropout` a value after autoscaling, in place of the dropout before it.

    A layer has one history, so it must be called once in a forward: a second call would push over the first's rows.

    Args:
        model: the model, changed in place. Nothing is changed if an error is raised.
        fuse: whether to use fused counterparts.
        widths: for layers that do not tell, the features of their input rows, by name in `model.named_modules()`.
        trust: names of modules that would be refused, but are known to need only the in-batch rows, their neighbours
            and the edges between them.

    Returns:
        The model, or, if it is a message-passing layer itself, what replaces it.

    Raises:
        ValueError: the model has no message-passing layer, or modules that need more of the graph than a batch has.
        MissingPackageError: torch_geometric is not installed.
    """
    try:
        from torch_geometric.nn import MessagePassing
    except ImportError as error:
        raise MissingPackageError("autoscale needs torch_geometric: pip install 'gas-triton[pyg]'") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(trust, str):
        raise TypeError(f"trust must be a list of names, got the str {trust!r}")
    trusted, widths = set(trust), dict(widths or {})
    convs = _outermost(model, MessagePassing)
    for name, given in (("trust", trusted), ("widths", widths)):
        unknown = set(given) - (set(convs) if name == "widths" else {path for path, _ in model.named_modules()})
        if unknown:
            raise ValueError(f"{name} must name layers of the model, {list(convs)}, got {sorted(unknown)}")
    if not convs:
        is_done = any(isinstance(module, HistoryLayer) for module in model.modules())
        why = "its layers read histories already" if is_done else "there is nothing to scale"
        raise ValueError(f"{type(model).__name__} has no torch_geometric MessagePassing layer: {why}")

    _check_shared(model, convs)
    _check_lazy(model, convs)
    calls = {path: PygCall(conv, path) for path, conv in convs.items()}
    known = {path: widths.get(path, _width(conv)) for path, conv in convs.items()}
    # a graph with self loops is good for all layers only if all of them add some
    has_loops = all(getattr(conv, "add_self_loops", False) for conv in convs.values())
    fused = {}
    for path, conv in convs.items() if fuse else ():
        if has_loops or not uses_loops_of_graph(conv):
            layer = fused_counterpart(conv, calls[path], known[path])
            if layer is not None:
                fused[path] = layer
    problems = list(refusals(model, calls, set(fused), trusted))
    if problems:
        raise ValueError(f"{type(model).__name__} cannot be autoscaled: " + "; ".join(problems))
    # from here on nothing fails
    layers: dict[str, nn.Module] = {
        path: fused[path] if path in fused else Wrapped(conv, calls[path], known[path]) for path, conv in convs.items()
    }
    for path, layer in layers.items():
        if not path:
            return layer
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = layer
    _move_dropout(model)
    return model


def _outermost(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        # what is within a layer is called by the layer
        if isinstance(module, kind) and not any(not outer or path.startswith(outer + ".") for outer in found):
            found[path] = module
    return found


def _check_shared(model: nn.Module, convs: dict[str, nn.Module]) -> None:
    paths: dict[int, list[str]] = {id(conv): [] for conv in convs.values()}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in paths:
            paths[id(module)].append(path)
    for path, conv in convs.items():
        if len(paths[id(conv)]) > 1:
            raise ValueError(
                f"{label(path, conv)} is one layer under the names {', '.join(paths[id(conv)])}: its calls would share "
                "a history. Make a layer for each call; they may share parameters"
            )


def _check_lazy(model: nn.Module, convs: dict[str, nn.Module]) -> None:
    for path, conv in convs.items():
        if any(nn.parameter.is_lazy(parameter) for parameter in conv.parameters()):
            raise ValueError(
                f"{label(path, conv)} has parameters that are made at its first call: give in_channels, or call the "
                "model once before"
            )


def _width(conv: Any) -> int | None:
    """Features of the layer's input rows, None if it does not tell."""
    for name in ("in_channels", "channels"):
        channels = getattr(conv, name, None)
        if isinstance(channels, tuple | list) and len(set(channels)) == 1:
            channels = channels[0]
        # -1 is what PyG writes for a width that the first call tells
        if isinstance(channels, int) and channels > 0:
            return channels
    for part in conv.modules():
        if isinstance(part, nn.Linear) or type(part).__name__ == "Linear":
            width = part.in_features if isinstance(part, nn.Linear) else part.in_channels
            # its network is given a pair of rows
            return width // 2 if type(conv).__name__ == "EdgeConv" else width
    return None


def _move_dropout(model: nn.Module) -> None:
    from torch_geometric.nn.models.basic_gnn import BasicGNN

    for module in model.modules():
        if not isinstance(module, BasicGNN) or type(module).forward is not BasicGNN.forward:
            continue
        p = getattr(module.dropout, "p", 0.0)
        # jumping knowledge reads the dropped rows too
        if module.jk_mode is None and 0.0 < p < 1.0:
            for conv in module.convs[1:]:
                conv.input_dropout = p
            module.dropout.p = 0.0

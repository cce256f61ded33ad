"""Modules that a batch with histories cannot compute, and why."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

from gas_triton.autoscale.call import PygCall, label
from gas_triton.autoscale.wrapped import uses_gcn_norm

_NORMS = "normalises over all nodes, of which a batch holds a few: use a batch norm, or LayerNorm(mode='node')"
_POOLING = "pools over the whole graph: autoscale the layers before it, and pool what gas.inference gives"
_HOPS = "reads neighbours several hops away in one call: stack layers of one hop, each of which gets a history"
_DEGREES = (
    "weighs edges by degrees of their source nodes, which a batch does not know: normalise the graph once, "
    "graph.add_self_loops().gcn_norm(), and use GCNConv, or the layer's normalize=False with edge_weight="
    "batch.edge_weight"
)
_OWN_EDGES = "makes edges of its own between the nodes it is given: make them once, on the whole graph"
_DENSE = "takes a dense adjacency matrix: use the layer's sparse namesake"
_HETERO = "is for graphs with several node types or edge lists: histories are for one type of node and one edge list"
_ATTENTION = "attends to the whole graph: use layers that attend to neighbours"
_PARTS = "uses a layer's output beside its input, which has halo rows too: write it out with x[:batch.num_nodes]"

# classes of torch_geometric by name; their subclasses are refused too
_REFUSED = {
    **dict.fromkeys(
        ["GraphNorm", "PairNorm", "InstanceNorm", "MeanSubtractionNorm", "DiffGroupNorm", "GraphSizeNorm"], _NORMS
    ),
    **dict.fromkeys(
        ["ChebConv", "TAGConv", "SGConv", "SSGConv", "ARMAConv", "MixHopConv", "APPNP", "GatedGraphConv", "PANConv",
         "LabelPropagation", "CorrectAndSmooth"],
        _HOPS,
    ),
    **dict.fromkeys(["LGConv", "ClusterGCNConv", "FAConv", "EGConv", "PDNConv", "DNAConv"], _DEGREES),
    **dict.fromkeys(["DynamicEdgeConv", "GravNetConv", "XConv", "SuperGATConv"], _OWN_EDGES),
    **dict.fromkeys(
        ["HeteroConv", "HGTConv", "HANConv", "HEATConv", "HypergraphConv", "SignedConv", "HeteroLayerNorm",
         "HeteroBatchNorm", "HeteroDictLinear", "MeshCNNConv", "WLConv"],
        _HETERO,
    ),
    **dict.fromkeys(["DirGNNConv", "AntiSymmetricConv"], _PARTS),
    **dict.fromkeys(["GPSConv", "SGModule"], _ATTENTION),
    "FusedGATConv": "takes a CSR of its own: use GATConv",
    "CuGraphModule": "takes a graph of its own: use the layer without CuGraph in its name",
}  # fmt: skip
_POOL_FUNCTIONS = {"global_add_pool", "global_mean_pool", "global_max_pool"}
_DEGREE_FUNCTIONS = {"degree", "gcn_norm", "get_laplacian"}
# these read the edges of a node in the order in which they are listed
_ORDERED = {"LSTMAggregation", "GRUAggregation", "SortAggregation", "PatchTransformerAggregation"}


def refusals(model: nn.Module, calls: dict[str, PygCall], fused: set[str], trust: set[str]) -> Iterator[str]:
    """What is wrong with each module that cannot be scaled.

    Args:
        model: the model.
        calls: how its message-passing layers are called, by path.
        fused: paths of those with a fused counterpart.
        trust: paths that the user answers for.
    """
    within = {id(part) for path in calls for part in model.get_submodule(path).modules()}
    for path, module in model.named_modules():
        if path in trust:
            continue
        reason = None
        if path in calls:
            reason = _refuse_state(module)
            if reason is None and path not in fused:
                reason = _refuse_layer(module) or (None if calls[path].takes_pair else _refuse_batch_norm(module))
        elif id(module) not in within:
            reason = _refuse_module(module)
        if reason is not None:
            yield f"{label(path, module)} {reason}"


def _refuse_module(module: nn.Module) -> str | None:
    for kind in _pyg_kinds(module):
        if kind.__name__ in _REFUSED:
            return _REFUSED[kind.__name__]
        package = kind.__module__.split(".")[2:3]
        if kind.__module__.startswith("torch_geometric.nn.") and package in (["pool"], ["aggr"], ["unpool"]):
            return _POOLING
        if kind.__module__.startswith("torch_geometric.nn.attention."):
            return _ATTENTION
        if kind.__module__.startswith("torch_geometric.nn.dense.dense_"):
            return _DENSE
        if kind.__module__.startswith("torch_geometric.nn.dense.") and not kind.__module__.endswith(".linear"):
            return _POOLING
        if kind.__name__ == "LayerNorm" and getattr(module, "mode", None) == "graph":
            return _NORMS
    used = _names_used(module) & _POOL_FUNCTIONS
    return f"calls {', '.join(sorted(used))}, which {_POOLING}" if used else None


def _refuse_layer(layer: nn.Module) -> str | None:
    is_normalized = getattr(layer, "normalize", None) is not False
    for kind in _pyg_kinds(layer):
        reason = _REFUSED.get(kind.__name__)
        if reason is not None and (reason is not _DEGREES or is_normalized):
            return reason
    for part in layer.modules():
        if type(part).__name__ in _ORDERED:
            return f"reads neighbours in their order ({type(part).__name__}), which a batch does not keep"
    used = _names_used(layer) & _DEGREE_FUNCTIONS
    if used and is_normalized and not uses_gcn_norm(layer):
        return (
            f"calls {', '.join(sorted(used))}; if it thus {_DEGREES}. If it counts edges of target nodes only, which "
            "are all in the batch, say trust="
        )
    if _propagates_again(layer):
        return f"propagates more than once; if it thus {_HOPS}. If each time reads the layer's input, say trust="
    return None


def _refuse_state(layer: nn.Module) -> str | None:
    if getattr(layer, "flow", "source_to_target") != "source_to_target":
        return "sends messages from target to source: use flow='source_to_target' and a graph of edge_index.flip(0)"
    for name, part in layer.named_modules():
        if part is not layer and _refuse_module(part) is _NORMS:
            return f"has the norm {name}, which {_NORMS}"
    for name in ("_cached_edge_index", "_cached_adj_t", "_cached_x"):
        if getattr(layer, name, None) is not None:
            return f"holds what it cached of another graph: set its {name} to None"
    return None


def _refuse_batch_norm(layer: nn.Module) -> str | None:
    for name, part in layer.named_modules():
        if "BatchNorm" in type(part).__name__:
            return (
                f"has the batch norm {name}, which would see halo rows: take a pair (source rows, target rows), "
                "x: Tensor | tuple[Tensor, Tensor], or put the norm behind the layer; if it normalises edges only, "
                "say trust="
            )
    return None


def _pyg_kinds(module: nn.Module) -> list[type]:
    return [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch_geometric.")]


def _functions(module: nn.Module) -> Iterator[FunctionType]:
    """The methods that a user wrote: those of the module's classes below torch's and torch_geometric's."""
    for kind in type(module).__mro__:
        if kind.__module__.split(".")[0] in ("torch", "torch_geometric"):
            return
        yield from (value for value in vars(kind).values() if isinstance(value, FunctionType))


def _names_used(module: nn.Module) -> set[str]:
    return {name for function in _functions(module) for code in _codes(function.__code__) for name in code.co_names}


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _propagates_again(layer: nn.Module) -> bool:
    """Whether the user's code calls `propagate` in two places or in a loop."""
    places = 0
    for function in _functions(layer):
        instructions = list(dis.get_instructions(function.__code__))
        calls = [i.offset for i in instructions if i.argval == "propagate" and i.opname.startswith("LOAD")]
        loops = [(i.argval, i.offset) for i in instructions if i.opname.startswith("JUMP_BACKWARD")]
        places += len(calls)
        if any(first <= call <= last for call in calls for first, last in loops):
            return True
    return places > 1

"""What PyTorch Geometric's own layers take: our models with them in place, full-batch and with neighbour sampling."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import nn as layers
from gas_triton.nn.appnp import APPNPConv
from gas_triton.nn.base import HistoryLayer

__all__ = ["Edges", "missing_for_pyg", "missing_for_sampling", "sampling_loader", "to_pyg"]


class Edges(NamedTuple):
    """What takes the place of a `Batch` in a model of PyG's layers.

    Attributes:
        edge_index: int64 [2, E], as in PyG.
        edge_weight: [E], or None.
        num_nodes: rows of x.
        num_halo: none of them are of a halo.
    """

    edge_index: Tensor
    edge_weight: Tensor | None
    num_nodes: int
    num_halo: int = 0

    @property
    def device(self) -> torch.device:
        """Where the edges are."""
        return self.edge_index.device


def missing_for_pyg() -> str:
    """What is not installed that PyG's layers need, and how to get it; empty if nothing is."""
    if importlib.util.find_spec("torch_geometric") is None:
        return "torch_geometric is not installed: pip install 'gas-triton[pyg]'"
    return ""


def missing_for_sampling() -> str:
    """The same for its `NeighborLoader`."""
    if missing_for_pyg():
        return missing_for_pyg()
    typing = importlib.import_module("torch_geometric.typing")
    if not (typing.WITH_PYG_LIB or typing.WITH_TORCH_SPARSE):
        return "NeighborLoader needs pyg-lib or torch_sparse: pip install 'gas-triton[sparse]'"
    return ""


def to_pyg(model: nn.Module, normalizes: bool = False) -> nn.Module:
    """A copy of a model with PyG's layers in place of ours, and the same parameters.

    It is called with [N, F] rows and `Edges`; everything around the layers (dropout of their input, activations, linear
    ends) stays as it is.

    Args:
        model: one of `gas_triton.models`.
        normalizes: whether its layers add self loops and normalise in every call, as sampled subgraphs need; otherwise
            the edges are those of a prepared graph, as PyG's `cached=True` has them.

    Raises:
        ValueError: a layer that PyG does not have.
    """
    theirs = copy.deepcopy(model)
    found = [(name, module) for name, module in theirs.named_modules() if isinstance(module, HistoryLayer)]
    for name, module in found:
        theirs.set_submodule(name, _Layer(module, normalizes))
    return theirs


class _Layer(nn.Module):
    """A layer of PyG that is called as ours are."""

    def __init__(self, ours: HistoryLayer, normalizes: bool) -> None:
        super().__init__()
        self.input_dropout = ours.input_dropout
        self.conv, self.takes_weight = _counterpart(ours, normalizes)
        missing = self.conv.load_state_dict(ours.state_dict(), strict=False).missing_keys
        assert not missing, missing
        parameter = next(ours.parameters(), None)
        if parameter is not None:
            self.conv.to(parameter.device, parameter.dtype)

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        *common, edges = inputs
        x = F.dropout(x, self.input_dropout, self.training)
        weight = (edges.edge_weight,) if self.takes_weight else ()
        if isinstance(self.conv, _Propagate):
            return self.conv(x, *common, edges.edge_index, *weight)
        out: Tensor = self.conv(x, *common, edges.edge_index, *weight)
        return out


class _Propagate(nn.Module):
    """One step of PyG's `APPNP`, which our model spreads over a layer each."""

    def __init__(self, alpha: float, normalizes: bool) -> None:
        super().__init__()
        pyg = importlib.import_module("torch_geometric.nn")
        # with alpha 0 it is the plain propagation, which is mixed with the first rows here
        self.step, self.alpha = pyg.APPNP(1, 0.0, normalize=normalizes), alpha

    def forward(self, x: Tensor, x_0: Tensor, edge_index: Tensor, weight: Tensor | None = None) -> Tensor:
        out: Tensor = self.step(x, edge_index, weight)
        return out * (1.0 - self.alpha) + x_0 * self.alpha


def _counterpart(ours: HistoryLayer, normalizes: bool) -> tuple[nn.Module, bool]:
    """(PyG's layer, whether it is given the edges' weights)."""
    pyg = importlib.import_module("torch_geometric.nn")
    options: dict[str, Any] = {"normalize": normalizes, "add_self_loops": normalizes}
    if isinstance(ours, layers.GCNConv):
        conv = pyg.GCNConv(ours.in_channels, ours.out_channels, bias=ours.bias is not None, **options)
        return conv, not normalizes
    if isinstance(ours, layers.SAGEConv):
        conv = pyg.SAGEConv(
            ours.in_channels, ours.out_channels, aggr=ours.aggr, normalize=ours.normalize,
            root_weight=ours.root_weight, project=ours.project, bias=ours.lin_l.bias is not None,
        )  # fmt: skip
        return conv, False
    if isinstance(ours, layers.GINConv):
        return pyg.GINConv(copy.deepcopy(ours.nn), train_eps=isinstance(ours.eps, nn.Parameter)), False
    if isinstance(ours, layers.GATConv) and ours.res is None and ours.edge_dim is None:
        conv = pyg.GATConv(
            ours.in_channels, ours.out_channels, ours.heads, ours.concat, ours.negative_slope, ours.dropout,
            add_self_loops=normalizes, bias=ours.bias is not None,
        )  # fmt: skip
        return conv, False
    if isinstance(ours, layers.GCN2Conv):
        conv = pyg.GCN2Conv(ours.channels, ours.alpha, shared_weights=ours.weight2 is None, **options)
        conv.beta = ours.beta
        return conv, not normalizes
    if isinstance(ours, APPNPConv):
        return _Propagate(ours.alpha, normalizes), not normalizes
    raise ValueError(f"PyG has no layer that computes {type(ours).__name__}")


def sampling_loader(
    edge_index: Tensor, x: Tensor, target: Tensor, seeds: Tensor, batch_size: int, num_neighbors: list[int], seed: int
) -> Callable[[], Any]:
    """What gives the next batch of PyG's `NeighborLoader`, an epoch after the other.

    Args:
        edge_index: int64 [2, E] on the CPU.
        x: [N, F] on the CPU.
        target: [N] or [N, C].
        seeds: int64 ids of the nodes whose outputs are trained on.
        batch_size: seeds of a batch.
        num_neighbors: neighbours sampled of each node, by hop.
        seed: of the order of the seeds; the neighbours come from torch's and C's generators.
    """
    data = importlib.import_module("torch_geometric.data").Data(x=x, edge_index=edge_index, y=target)
    loader = importlib.import_module("torch_geometric.loader").NeighborLoader(
        data, num_neighbors=num_neighbors, input_nodes=seeds, batch_size=batch_size, shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    state = {"batches": iter(loader)}

    def take() -> Any:
        batch = next(state["batches"], None)
        if batch is None:
            state["batches"] = iter(loader)
            batch = next(state["batches"])
        return batch

    return take

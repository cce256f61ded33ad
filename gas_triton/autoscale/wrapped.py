"""Any PyG layer, reading its halo rows from a history."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gas_triton.autoscale.call import PygCall, own_weight
from gas_triton.batch import Batch
from gas_triton.functional import Features
from gas_triton.nn.base import HistoryLayer
from gas_triton.nn.normalization import check_normalization

# layers that weigh edges by gcn_norm, which only the whole graph knows: they are given the graph's weights instead
GCN_NORMALIZED = ("GCNConv", "GCN2Conv")
# node tensors of these are read at the targets only, so that halo rows may be anything
_READ_AT_TARGETS = {"GCN2Conv": "x_0", "FAConv": "x_0"}
# what a module keeps its parameters in, and what changes its state_dict
_SHARED = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


class Wrapped(HistoryLayer):
    """A PyG layer that is called on [x; halo rows] and the batch's edges.

    Its parameters are those of the layer, under the same names; its other attributes are read through.

    Args:
        layer: a `torch_geometric.nn.MessagePassing`.
        call: how it is called.
        width: features of its input rows, None if unknown.
    """

    def __init__(self, layer: nn.Module, call: PygCall, width: int | None = None) -> None:
        super().__init__()
        self.call, self.width = call, width
        self.training = layer.training
        # None where the width is a guess, which only a history needs; a pair (F, F) means F
        is_told = getattr(layer, "in_channels", None) in (width, (width, width), [width, width])
        self.in_channels = width if is_told else None
        kinds = [kind.__name__ for kind in type(layer).__mro__]
        self._is_normalized = uses_gcn_norm(layer)
        if self._is_normalized:
            # the weights that it is given are
            layer.__dict__["normalize"] = False
        self._read_at_targets = next((_READ_AT_TARGETS[kind] for kind in kinds if kind in _READ_AT_TARGETS), None)
        # past `__setattr__`, which would register the layer as a child and put its name before the parameters'
        self.__dict__["layer"] = layer
        for name in _SHARED:
            self.__dict__[name] = layer.__dict__[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "layer" not in self.__dict__:
                raise
            return getattr(self.__dict__["layer"], name)

    @property
    def history_dim(self) -> int:
        if self.width is None:
            raise ValueError(
                f"{self.call.label}: cannot tell how wide its history must be: give the number of features of its "
                f"input, gas.autoscale(model, widths={{'{self.call.path}': ...}})"
            )
        return self.width

    def forward(self, x: Tensor | Features, *args: Any, **options: Any) -> Tensor:
        """[B, F_out] of what the layer takes, the batch in place of `edge_index`.

        Args:
            x: [B + H, F_in], [B, F_in] with a history, or `batch.features`.
            *args: the further arguments of the layer; edge tensors in the order of `batch.edge_index`.
            **options: the same, by name.
        """
        layer = self.layer
        batch, place, given = self.call.bind(x, args, options)
        if self._is_normalized:
            dtype = x.dtype if isinstance(x, Tensor) else x.table.dtype
            given["edge_weight"] = self._normalized_weight(batch, given.get("edge_weight")).to(dtype)
        num_nodes, num_rows = batch.num_nodes, batch.num_nodes + batch.num_halo
        self._check_width(x, batch)
        is_pair = self.call.takes_pair
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or name.startswith("edge_"):
                continue
            if name == self._read_at_targets:
                given[name] = _pad(value[:num_nodes], num_rows)
            elif num_nodes != num_rows and value.size(0) == num_nodes:
                raise ValueError(
                    f"{self.call.label}: {name} has {num_nodes} rows, one for each in-batch node, but neighbours' rows "
                    f"are read too: give {num_rows} rows, those of batch.all_ids"
                )
            elif value.size(0) == num_rows:
                # a pair of x only would not fit to it
                is_pair = False
        rows = self.read(x, batch).rows()
        given[place] = batch.edge_index
        # set here, as whoever walks the modules of the model does not find the layer itself
        layer.training = self.training
        out = layer((rows, rows[:num_nodes]) if is_pair else rows, **given)
        if not isinstance(out, Tensor):
            raise TypeError(f"{self.call.label} must give a tensor with a row for each node, got {type(out).__name__}")
        return out if is_pair else out[:num_nodes]

    def _check_width(self, x: Tensor | Features, batch: Batch) -> None:
        rows = x if isinstance(x, Tensor) else x.table
        if rows.dim() != 2 or (self.in_channels is not None and rows.size(1) != self.in_channels):
            expected = f"[rows, {self.in_channels or 'features'}]"
            raise ValueError(f"{self.call.label}: x must have shape {expected}, got {list(rows.shape)}")
        if self.history is None or rows is not x or rows.size(0) != batch.num_nodes:
            return
        if rows.size(1) != self.history.dim:
            raise ValueError(
                f"{self.call.label}: x has {rows.size(1)} features but its history has {self.history.dim}: give the "
                f"width, gas.autoscale(model, widths={{'{self.call.path}': {rows.size(1)}}})"
            )

    def _normalized_weight(self, batch: Batch, given: Tensor | None) -> Tensor:
        layer = self.layer
        if given is not None and given is not batch.edge_weight:
            raise ValueError(own_weight(self.call.label))
        check_normalization(self.call.label, batch, layer.add_self_loops, getattr(layer, "improved", None))
        assert batch.edge_weight is not None
        return batch.edge_weight

    def __repr__(self) -> str:
        return f"Autoscaled({self.layer!r})"


def uses_gcn_norm(layer: nn.Module) -> bool:
    """Whether the layer is one of `GCN_NORMALIZED`, with that layer's `forward`, and normalises."""
    for kind in type(layer).__mro__:
        if kind.__name__ in GCN_NORMALIZED and kind.__module__.startswith("torch_geometric."):
            return type(layer).forward is kind.forward and bool(getattr(layer, "normalize", False))  # type: ignore[attr-defined]
    return False


def _pad(rows: Tensor, num_rows: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(num_rows - rows.size(0), *rows.shape[1:])])

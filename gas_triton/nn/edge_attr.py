"""Features of a batch's edges, as layers take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gas_triton.batch import Batch
from gas_triton.functional.rows import Halo, check_floating
from gas_triton.kernels.csr_rows import row_of_edge

# reductions that make the features of self loops, as scatter_reduce calls them
_FILLS = {"add": "sum", "sum": "sum", "mean": "mean", "min": "amin", "max": "amax", "mul": "prod"}


def check_edge_attr(
    layer: str, batch: Batch, edge_attr: Any, edge_dim: int | None, is_needed: bool = False
) -> Tensor | None:
    """`edge_attr` as [num_edges, edge_dim]; a vector is one feature an edge.

    Args:
        layer: name of the layer, for the error.
        batch: the plan of the step.
        edge_attr: what the layer was given.
        edge_dim: what it was made for.
        is_needed: whether None is an error if the layer has an `edge_dim`.

    Raises:
        TypeError: it is not a floating tensor.
        ValueError: a wrong shape or device, or one where there should be none, or none where there should be one.
    """
    if edge_attr is None:
        if is_needed and edge_dim is not None:
            raise ValueError(f"{layer}(edge_dim={edge_dim}) needs edge_attr, got None")
        return None
    if edge_dim is None:
        raise ValueError(f"edge_attr was given to a {layer} made without edge_dim")
    check_floating("edge_attr", edge_attr, batch)
    rows = edge_attr.unsqueeze(1) if edge_attr.dim() == 1 else edge_attr
    if rows.shape != (batch.num_edges, edge_dim):
        shape = list(edge_attr.shape)
        raise ValueError(f"edge_attr must have shape [{batch.num_edges}, {edge_dim}] for {layer}, got {shape}")
    return rows


def check_fill_value(fill_value: Any) -> Any:
    """`fill_value` if it is a number, a tensor or the name of a reduction."""
    if isinstance(fill_value, str) and fill_value not in _FILLS:
        raise ValueError(f"fill_value must be a number, a tensor or one of {', '.join(_FILLS)}, got {fill_value!r}")
    return fill_value


def fill_self_loops(edge_attr: Tensor, batch: Batch, fill_value: float | Tensor | str, halo: Halo) -> Tensor:
    """`edge_attr` [num_edges, edge_dim] with the rows of self loops made from the others, as PyG makes them."""
    inner_row, outer_row = row_of_edge(*batch.inner), row_of_edge(*batch.outer)
    is_loop = torch.zeros(batch.num_edges, dtype=torch.bool, device=batch.device)
    is_loop[: inner_row.numel()] = inner_row == batch.inner.col
    if isinstance(fill_value, str):
        if halo == "drop":
            outer_row = outer_row[:0]
        row = torch.cat([inner_row, outer_row])
        # loops reduce into a row past the last
        index = torch.where(is_loop[: row.numel()], batch.num_nodes, row)[:, None].expand(-1, edge_attr.size(1))
        start = 1.0 if fill_value == "mul" else 0.0
        filled = edge_attr.new_full((batch.num_nodes + 1, edge_attr.size(1)), start)
        filled = filled.scatter_reduce(
            0, index, edge_attr[: row.numel()], _FILLS[fill_value], include_self=fill_value == "mul"
        )
        fill = filled[:-1][inner_row]
        fill = torch.cat([fill, fill.new_zeros(batch.num_edges - inner_row.numel(), fill.size(1))])
    else:
        # a tensor of the number would be copied from the host
        fill = fill_value.to(edge_attr) if isinstance(fill_value, Tensor) else edge_attr.new_full((), fill_value)
        fill = fill.expand_as(edge_attr)
    return torch.where(is_loop[:, None], fill, edge_attr)

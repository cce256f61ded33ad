"""Transpose of a sparse matrix as an opaque op, so that a traced model can ask for it.

Row j of the result has the edges with column j, in the order in which they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gas_triton.kernels._library import define


def transpose_torch(row: Tensor, col: Tensor, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rowptr [num_cols + 1], col [E], edge_id [E]) of the transpose of the edges (row[e], col[e])."""
    sorted_col, edge_id = torch.sort(col, stable=True)
    boundaries = torch.arange(num_cols + 1, dtype=col.dtype, device=col.device)
    rowptr = torch.searchsorted(sorted_col, boundaries).to(col.dtype)
    return rowptr, row.index_select(0, edge_id).to(col.dtype), edge_id.to(col.dtype)


def _transpose_fake(row: Tensor, col: Tensor, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    return col.new_empty(num_cols + 1), torch.empty_like(col), torch.empty_like(col)


transpose = define(
    "transpose(Tensor row, Tensor col, int num_cols) -> (Tensor, Tensor, Tensor)",
    cpu=transpose_torch,
    cuda=transpose_torch,
    fake=_transpose_fake,
)

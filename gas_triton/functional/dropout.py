"""Dropout whose mask belongs to the node."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from gas_triton.functional.rows import row_count
from gas_triton.functional.sparse_rows import SparseRows
from gas_triton.kernels.dropout import dropout as dropout_op

if TYPE_CHECKING:
    from gas_triton.batch import Batch


@overload
def dropout(x: Tensor, batch: Batch, p: float, seed: Tensor) -> Tensor: ...
@overload
def dropout(x: SparseRows, batch: Batch, p: float, seed: Tensor) -> SparseRows: ...
def dropout(x: Tensor | SparseRows, batch: Batch, p: float, seed: Tensor) -> Tensor | SparseRows:
    """Zeroes features with probability `p` and scales the rest by 1 / (1 - p), by a mask of (seed, node, feature).

    A node's mask is the same wherever the node is read, as an in-batch row here or from a history by `aggregate`.

    Args:
        x: [B, F] or [B + H, F]; sparse rows stay sparse.
        batch: the plan of the step.
        p: probability in [0, 1).
        seed: int64 [1], see `draw_seed`.
    """
    check_probability("p", p)
    if p == 0.0:
        return x
    ids = batch.node_ids if x.size(0) == batch.num_nodes else batch.all_ids
    if x.size(0) != ids.numel():
        raise ValueError(row_count(x, batch))
    return x.dropout(ids, p, seed) if isinstance(x, SparseRows) else dropout_op(x, ids, p, seed)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed, int64 [1] on `device`, from torch's generator; does not synchronise."""
    return torch.randint(0, 2**62, (1,), device=device)


def check_probability(name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {p}")


def check_seed(name: str, p: float, seed: Tensor | None) -> None:
    """Checks a probability, and that there is a seed if anything is dropped."""
    check_probability(name, p)
    if p > 0.0 and seed is None:
        raise ValueError(f"{name}={p} needs a seed, got None: see draw_seed")

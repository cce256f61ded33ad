"""What a CSR row pointer says of its rows and edges."""

from __future__ import annotations

import torch
from torch import Tensor


def row_of_edge(rowptr: Tensor, col: Tensor) -> Tensor:
    """The row of every edge, int64 [E]."""
    rows = torch.arange(rowptr.numel() - 1, device=rowptr.device)
    return torch.repeat_interleave(rows, rowptr.diff().long(), output_size=col.numel())


def degree(inner: list[Tensor], outer: list[Tensor]) -> Tensor:
    """Edges of each row over both blocks, at least 1, [B]."""
    count = inner[0].diff()
    if outer:
        count = count + outer[0].diff()
    return count.clamp_(min=1)

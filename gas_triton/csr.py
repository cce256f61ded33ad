"""CSR index arrays and what the kernels need to know about them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.transpose import transpose


class Csr(NamedTuple):
    """Index arrays of a sparse matrix: row i holds columns `col[rowptr[i]:rowptr[i+1]]`."""

    rowptr: Tensor
    col: Tensor

    @property
    def num_rows(self) -> int:
        return self.rowptr.numel() - 1

    @property
    def num_edges(self) -> int:
        return self.col.numel()


class Transposed(NamedTuple):
    """A transposed CSR; `edge_id[e]` is the place of its edge e in the original, None if both share their arrays."""

    rowptr: Tensor
    col: Tensor
    edge_id: Tensor | None


def transpose_csr(csr: Csr, num_cols: int) -> Transposed:
    """The transpose of `csr` [R x num_cols], edges of a row in the order of their original rows."""
    return Transposed(*transpose(row_of_edge(csr.rowptr, csr.col), csr.col, num_cols))


def find_hubs(rowptr: Tensor, num_edges: int, hub_edges: int) -> list[Tensor]:
    """Chunks of the rows that have more than `hub_edges` edges, found without synchronising the host.

    Sizes are upper bounds from `num_edges`; entries past the last hub are -1, which the kernels skip.

    Args:
        rowptr: [R + 1], all edges of each row.
        num_edges: E.
        hub_edges: most edges that one program takes.

    Returns:
        `[chunk_row [C], chunk_start [C], hub_row [K], hub_ptr [K + 1]]` int32: the row of each chunk and its first edge
        within the row; the hub rows and where the chunks of each begin. Empty if no row can be a hub.
    """
    max_hubs = num_edges // (hub_edges + 1)
    if max_hubs == 0:
        return []
    max_chunks = num_edges // hub_edges + max_hubs
    degree = rowptr.diff()
    is_hub = degree > hub_edges
    num_chunks = torch.where(is_hub, (degree + hub_edges - 1) // hub_edges, 0)
    chunk_end = num_chunks.cumsum(0)
    chunk = torch.arange(max_chunks, device=rowptr.device)
    chunk_row = torch.searchsorted(chunk_end, chunk, right=True)
    is_chunk = chunk_row < degree.numel()
    row = chunk_row.clamp_(max=degree.numel() - 1)
    chunk_start = (chunk - chunk_end[row] + num_chunks[row]) * hub_edges
    hub = torch.arange(max_hubs, device=rowptr.device)
    hub_row = torch.searchsorted(is_hub.cumsum(0), hub, right=True)
    is_row = hub_row < degree.numel()
    last = chunk_end[hub_row.clamp(max=degree.numel() - 1)]
    hub_ptr = torch.where(is_row, last, chunk_end[-1])
    return [
        torch.where(is_chunk, row, -1).to(torch.int32),
        torch.where(is_chunk, chunk_start, 0).to(torch.int32),
        torch.where(is_row, hub_row, -1).to(torch.int32),
        torch.cat([hub_ptr.new_zeros(1), hub_ptr]).to(torch.int32),
    ]


def sample_edges(counts: list[int], p: float, seed: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Places of the edges that stay where each is left out with probability `p`, independently of all others.

    The host draws how many stay, from the binomial distribution, and the device which ones: so sizes are known without
    waiting for the device.

    Args:
        counts: edges of each list.
        p: probability in [0, 1).
        seed: of the draw; a device draws other edges than another.
        device: where the edges are.
        dtype: integer dtype of the result.

    Returns:
        For each list the places of its edges that stay, ascending.
    """
    on_host = np.random.default_rng(seed)
    on_device = torch.Generator(device).manual_seed(seed)
    kept = []
    for count in counts:
        order = torch.randperm(count, generator=on_device, dtype=dtype, device=device)
        kept.append(order[: int(on_host.binomial(count, 1.0 - p))].sort().values)
    return kept


def select_edges(csr: Csr, kept: Tensor) -> Csr:
    """The edges of `csr` at the places `kept`, which ascend, in the same rows."""
    rowptr = torch.searchsorted(kept, csr.rowptr.to(kept.dtype)).to(csr.rowptr.dtype)
    return Csr(rowptr, csr.col.index_select(0, kept))

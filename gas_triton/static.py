"""Aggregated features: what the first layer reduces over its neighbours, computed once and kept as a table."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gas_triton.csr import find_hubs
from gas_triton.functional.rows import FLOATS, describe
from gas_triton.functional.sparse_rows import SparseRows
from gas_triton.graph import Graph
from gas_triton.history.files import large_file_folder
from gas_triton.history.memories import FileMemory, HostMemory, bytes_of
from gas_triton.history.tiers import TIERS, choose_tier
from gas_triton.kernels.aggregate import HUB_EDGES, REDUCTIONS
from gas_triton.kernels.aggregate import aggregate as aggregate_op
from gas_triton.text import mebibytes

if TYPE_CHECKING:
    from gas_triton.loader import ClusterLoader
    from gas_triton.models import Model

# Rows of the graph, and their edges in its `col`: (first row, last row, first edge, last edge), last ones exclusive.
Range = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class StaticTable:
    """The aggregated features of every node; made by `ClusterLoader.aggregate_features`.

    Attributes:
        rows: [N, F]; row i is `reduce_{j in N(i)} w_ij x_j`.
        reduce: "sum", "mean", "max" or "min".
        weighted: whether w are the graph's weights; otherwise they are 1.
        tier: "device", "pinned" or "file".
        own_rows: whether batches fetch their rows of x ahead too.
        why: why the tier was chosen, if it was left open.
        x: the features that the table was made of.
        version: of `x` at that time.
    """

    rows: Tensor
    reduce: str
    weighted: bool
    tier: str
    own_rows: bool
    why: str
    x: Tensor
    version: int

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows.nbytes

    def check(self, x: Any) -> None:
        """Raises ValueError if `x` is not, or not any more, what the table was made of."""
        if x is self.x and version_of(self.x) == self.version:
            return
        what = "x was changed in place" if x is self.x else "x is another tensor than it was"
        raise ValueError(
            f"{what} when loader.aggregate_features({self.reduce!r}) was called: call it again (or "
            "loader.static.clear() to go without) and make batches anew"
        )

    def __repr__(self) -> str:
        dtype = str(self.rows.dtype).removeprefix("torch.")
        weighted = ", weighted" if self.weighted else ""
        return (
            f"StaticTable({self.reduce}{weighted}, {list(self.rows.shape)} {dtype}, {mebibytes(self.nbytes)}, "
            f"tier={self.tier}, device={self.rows.device})"
        )


def make_table(
    graph: Graph,
    x: Tensor | None,
    ranges: Sequence[Range],
    *,
    reduce: str,
    weighted: bool,
    tier: str,
    dtype: torch.dtype | None,
    path: str | os.PathLike[str] | None,
    own_rows: bool,
    hub_edges: int = HUB_EDGES,
) -> StaticTable:
    """The table of a graph, computed range by range; see `ClusterLoader.aggregate_features`."""
    x, dtype = check_arguments(x, reduce, tier, dtype, path)
    shape, version = (graph.num_nodes, x.size(1)), version_of(x)
    why = ""
    if tier == "auto":
        tier, why = choose_tier(bytes_of(shape, dtype), graph.device)
    weighted = weighted and graph.weight is not None
    # rows that inference mode makes could not be saved for a backward pass
    with torch.inference_mode(False), torch.no_grad():
        rows = allocate(shape, dtype, tier, graph.device, path)
        for span in ranges:
            part = aggregate_range(graph, x, span, reduce, weighted, hub_edges)
            stored = part.to(dtype)
            if dtype.itemsize < part.dtype.itemsize and bool((stored.isinf() & part.isfinite()).any()):
                raise ValueError(
                    f"dtype {str(dtype).removeprefix('torch.')} cannot hold the {reduce} of x, which reaches "
                    f"{float(part.abs().max()):.3g} in rows {span[0]} to {span[1] - 1}: use torch.bfloat16, or None"
                )
            rows[span[0] : span[1]].copy_(stored)
    return StaticTable(rows, reduce, weighted, tier, own_rows, why, x, version)


def check_arguments(
    x: Tensor | None, reduce: str, tier: str, dtype: torch.dtype | None, path: str | os.PathLike[str] | None
) -> tuple[Tensor, torch.dtype]:
    """x, and the dtype of the table."""
    if x is None:
        raise ValueError("aggregate_features needs features: give the loader x=features")
    if x.dtype not in FLOATS or x.dim() != 2 or x.size(1) == 0:
        raise TypeError(f"aggregate_features needs floating x of shape [nodes, features], got {describe(x)}")
    if x.requires_grad:
        raise ValueError("aggregate_features needs features that never change, got x with requires_grad=True")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    if path is not None and tier not in ("file", "auto"):
        raise ValueError(f"path is for tier 'file' or 'auto', got tier {tier!r}")
    return x, dtype or x.dtype


def aggregate_range(graph: Graph, x: Tensor, span: Range, reduce: str, weighted: bool, hub_edges: int) -> Tensor:
    """The aggregated rows of a range in x's dtype, each summed in the order of the graph's edges.

    That is the order of `ClusterLoader.full`, whichever way the rows are cut into ranges.
    """
    first, last, first_edge, last_edge = span
    rowptr = graph.rowptr[first : last + 1] - first_edge
    col = graph.col[first_edge:last_edge]
    if x.device != graph.device:
        ids, slot = torch.unique(col, return_inverse=True)
        x, col = x.index_select(0, ids.to(x.device)).to(graph.device), slot.to(col.dtype)
    weight = graph.weight[first_edge:last_edge] if weighted and graph.weight is not None else None
    hubs = find_hubs(rowptr, col.numel(), hub_edges)
    return aggregate_op(
        x, None, None, weight, [rowptr, col], [], [], None, hubs, [], reduce, 0.0, None, hub_edges, False, None,
        0.0, False,
    )[0]  # fmt: skip


def allocate(
    shape: tuple[int, int], dtype: torch.dtype, tier: str, device: torch.device, path: str | os.PathLike[str] | None
) -> Tensor:
    """A table of a tier; memory outside torch's allocators goes with the last tensor that sees it."""
    if tier == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    if tier == "pinned":
        memory = HostMemory(shape, dtype)
        memory.register(device)
        return memory.tensor
    return unnamed_file(shape, dtype, large_file_folder() if path is None else Path(path)).tensor


def unnamed_file(shape: tuple[int, int], dtype: torch.dtype, folder: Path) -> FileMemory:
    """A file whose space goes with its last user, even one that is killed."""
    nbytes = bytes_of(shape, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix="gas_triton_", dir=folder) as file:
            if nbytes > shutil.disk_usage(file.name).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # all of it now, so that a full disk is an error here and not a crash when a row is written
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return FileMemory(Path(file.name), shape, dtype)
    except OSError as error:
        raise OSError(
            error.errno, f"aggregated features need {nbytes} bytes in {folder} ({error.strerror}): give another path"
        ) from error


def version_of(x: Tensor) -> int:
    """How often x was changed in place; inference tensors do not count it."""
    return 0 if x.is_inference() else x._version


def use_static_rows(model: Model, loader: ClusterLoader, say: Callable[[str], None]) -> int:
    """Aggregates the features for a model's first layer if it reads the same in every step, and says so.

    Returns:
        Bytes of the table; 0 if there is none, because the layer needs none, the features are sparse, or memory has no
        room for it.
    """
    needed = model.static_input
    if needed is None or loader.x is None or isinstance(loader.x, SparseRows):
        return 0
    nbytes = bytes_of((loader.graph.num_nodes, loader.x.size(1)), loader.x.dtype)
    tier, why = choose_tier(nbytes, loader.graph.device)
    if tier == "file":
        say(f"first layer: its neighbours are aggregated in every step, as {why}")
        return 0
    start = time.perf_counter()
    table = loader.aggregate_features(needed.reduce, needed.weighted, tier, own_rows=needed.own_rows)
    say(
        f"first layer: neighbours aggregated once ({needed.reduce}) in {time.perf_counter() - start:.2f} s, "
        f"{mebibytes(table.nbytes)} ({tier})"
    )
    return table.nbytes

"""Rows of a sparse feature matrix, such as bags of words, which the first linear layer reads without making them dense.

    (X W^T)[r] = sum of X[r, f] * W[:, f] over the features f that row r has

This is the aggregation of the rows of W^T over a graph whose edges are the features that are there: the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gas_triton.csr import Csr, find_hubs, transpose_csr
from gas_triton.functional.rows import FLOATS, Features, needs_gradient
from gas_triton.kernels.aggregate import HUB_EDGES
from gas_triton.kernels.aggregate import aggregate as aggregate_op
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.dropout import keep_values


class SparseRows:
    """A sparse matrix [R, F] that stands where features [R, F] would: `ClusterLoader(..., x=SparseRows.of(x))`.

    `F.linear`, and so `torch.nn.Linear`, takes it in place of a tensor; the gradient is that of the weight and the
    bias. The values are constants.

    Args:
        csr: its structure; columns are features.
        value: floating [nonzeros].
        num_features: F.

    Raises:
        TypeError: values that are not floating.
        ValueError: another number of values than columns.
    """

    def __init__(self, csr: Csr, value: Tensor, num_features: int) -> None:
        if value.dtype not in FLOATS:
            raise TypeError(f"value must be floating, got {value.dtype}")
        if value.shape != csr.col.shape:
            raise ValueError(f"value must have shape {list(csr.col.shape)}, as col has, got {list(value.shape)}")
        self.csr, self.value, self.num_features = csr, value, num_features
        # of the structure: what a gradient needs is made once it is asked for
        self._made: dict[str, Any] = {}

    @classmethod
    def of(cls, x: Tensor) -> SparseRows:
        """The rows of a tensor [R, F], dense or sparse; of a dense one, what is not zero.

        Raises:
            TypeError: not a floating tensor.
            ValueError: not two dimensions, or more than 2**31 - 1 values.
        """
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating tensor, got {got}")
        if x.dim() != 2:
            raise ValueError(f"x must have shape [rows, features], got {list(x.shape)}")
        if x.layout == torch.strided:
            row, col = x.nonzero(as_tuple=True)
            value, counts = x[row, col], torch.bincount(row, minlength=x.size(0))
            rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        else:
            x = x.to_sparse_csr()
            rowptr, col, value = x.crow_indices(), x.col_indices(), x.values()
        if value.numel() >= 2**31:
            raise ValueError(f"x must have fewer than 2**31 values, got {value.numel()}")
        return cls(Csr(rowptr.to(torch.int32), col.to(torch.int32)), value.detach(), x.size(1))

    # --- what stands for a tensor -----------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.csr.num_rows, self.num_features])

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def is_cuda(self) -> bool:
        return self.value.is_cuda

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def dim(self) -> int:
        return 2

    def detach(self) -> SparseRows:
        """The rows themselves: they are constants."""
        return self

    def contiguous(self) -> SparseRows:
        """The rows themselves: their values lie in order."""
        return self

    def __getitem__(self, ids: Tensor | slice) -> SparseRows:
        if isinstance(ids, slice):
            ids = torch.arange(*ids.indices(self.csr.num_rows), device=self.device)
        return self.index_select(0, ids)

    def index_select(self, dim: int, ids: Tensor) -> SparseRows:
        """The rows `ids` (int64), in this order."""
        if dim != 0:
            raise ValueError(f"dim must be 0, the rows, got {dim}")
        first = self.csr.rowptr.index_select(0, ids)
        counts = self.csr.rowptr.index_select(0, ids + 1) - first
        rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=counts.dtype)])
        # int64, as `repeat_interleave` of int32 counts is not there on every device
        places = torch.repeat_interleave((first - rowptr[:-1]).long(), counts.long())
        places += torch.arange(places.numel(), device=places.device)
        col, value = self.csr.col.index_select(0, places), self.value.index_select(0, places)
        return SparseRows(Csr(rowptr, col), value, self.num_features)

    def record_stream(self, stream: torch.Stream) -> None:
        """Says that a stream reads the rows, so that their memory is not given away while it does."""
        blocks, edge_id, hubs = self._made.get("transposed", ([], None, []))
        for tensor in (*self.csr, self.value, *self._made.get("hubs", []), *blocks, edge_id, *hubs):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(stream)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseRows:
        """The rows on another device (themselves, if they are there already)."""
        if torch.empty(0, device=device).device == self.device:
            return self
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def is_pinned(self) -> bool:
        """Whether the values are in page-locked host memory."""
        return self.value.is_pinned()

    def pin_memory(self) -> SparseRows:
        """The rows in page-locked host memory."""
        return self._map(lambda t: t.pin_memory())

    def to_dense(self) -> Tensor:
        """The same as a tensor [R, F]."""
        out = self.value.new_zeros(self.shape)
        return out.index_put_((row_of_edge(*self.csr).long(), self.csr.col.long()), self.value, accumulate=True)

    def _map(self, move: Callable[[Tensor], Tensor]) -> SparseRows:
        return SparseRows(Csr(*map(move, self.csr)), move(self.value), self.num_features)

    # --- what layers do with them -----------------------------------------------------------------------------------

    def dropout(self, ids: Tensor, p: float, seed: Tensor) -> SparseRows:
        """Dropout with the mask that `functional.dropout` gives the same features of a tensor.

        Args:
            ids: int64 [R], the node of each row.
            p: probability in [0, 1).
            seed: int64 [1].
        """
        row_ids = ids.index_select(0, row_of_edge(*self.csr).long())
        kept = keep_values(row_ids, self.csr.col, p, seed)
        value = torch.where(kept, self.value * (1.0 / (1.0 - p)), 0.0)
        dropped = SparseRows(self.csr, value, self.num_features)
        # it has the same structure, whose transpose is kept by the rows that stay
        dropped._made = self._made
        return dropped

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[R, F_out]: the rows times `weight` [F_out, F] transposed, plus `bias`, accumulated in float32."""
        if weight.dim() != 2 or weight.size(1) != self.num_features:
            raise ValueError(f"weight must have shape [outputs, {self.num_features}], got {list(weight.shape)}")
        blocks, edge_id, hubs_transposed = self._transposed() if needs_gradient(weight) else ([], None, [])
        out = aggregate_op(
            weight.t().contiguous(), None, None, self.value.to(weight.dtype), list(self.csr), [], blocks, edge_id,
            self._hubs(), hubs_transposed, "sum", 0.0, None, HUB_EDGES, False,
        )[0]  # fmt: skip
        return out if bias is None else out + bias

    def _hubs(self) -> list[Tensor]:
        if "hubs" not in self._made:
            self._made["hubs"] = find_hubs(self.csr.rowptr, self.csr.num_edges, HUB_EDGES)
        return self._made["hubs"]

    def _transposed(self) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
        """(transpose, its values' places, its hubs)."""
        if "transposed" not in self._made:
            rowptr, col, edge_id = transpose_csr(self.csr, self.num_features)
            self._made["transposed"] = [rowptr, col], edge_id, find_hubs(rowptr, col.numel(), HUB_EDGES)
        return self._made["transposed"]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if func is F.linear and isinstance(named["input"], SparseRows):
            return named["input"].linear(named["weight"], named.get("bias"))
        name = getattr(func, "__name__", str(func))
        raise TypeError(
            f"{name} does not take SparseRows, only a linear layer does: give this model dense features (x.to_dense())"
        )

    def __repr__(self) -> str:
        return f"SparseRows({list(self.shape)}, {self.value.numel()} values, {self.dtype}, device={self.device})"


# what a first layer may be given
Rows = Tensor | Features | SparseRows

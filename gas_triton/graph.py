"""`Graph`: a validated sparse adjacency, stored by target row."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gas_triton.csr import Csr, Transposed, transpose_csr
from gas_triton.errors import MissingPackageError
from gas_triton.kernels.csr_rows import row_of_edge

if TYPE_CHECKING:
    from torch_geometric.data import Data
    from torch_sparse import SparseTensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Graph:
    """Adjacency of N nodes as CSR by target: row i lists the sources j of the edges j -> i, ascending.

    Build one with `from_edge_index`, `from_csr`, `from_torch_csr`, `from_torch_sparse` or `from_pyg`. A graph is not
    changed after it is built: every method returns a new one. Duplicate edges and self loops are kept.

    Attributes:
        rowptr: int32 or int64 [N + 1] (int32 wherever N and E allow).
        col: same dtype, [E].
        num_nodes: N.
        num_edges: E, directed edges.
        device: where its tensors are.
        nbytes: bytes of its tensors.
        weight: floating [E], or None for an unweighted graph.
        edge_attr: edge features [E, ...] of any dtype in the order of `col`, or None.
        normalization: "gcn" after `gcn_norm`, else None.
        self_loop_weight: the weight that `add_self_loops` gave to new loops, None if it was not called.
        row_order: names the order of the rows; changes with `permute`.
    """

    def __init__(
        self,
        csr: Csr,
        weight: Tensor | None = None,
        *,
        edge_attr: Tensor | None = None,
        symmetric: bool | None = None,
        normalization: str | None = None,
        self_loop_weight: float | None = None,
        row_order: str | None = None,
    ) -> None:
        self.csr = csr
        self.weight = weight
        self.edge_attr = edge_attr
        self.normalization = normalization
        self.self_loop_weight = self_loop_weight
        self.row_order = row_order or f"given-{csr.num_rows}"
        self._symmetric = symmetric
        self._transposed: Transposed | None = None

    # --- builders ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        num_nodes: int | None = None,
        edge_attr: Tensor | None = None,
    ) -> Graph:
        """Builds a graph from an edge list in PyG's layout.

        Args:
            edge_index: integer [2, E]; `edge_index[0]` sources j, `edge_index[1]` targets i.
            edge_weight: floating [E] or None.
            num_nodes: N; the largest id + 1 if None.
            edge_attr: edge features [E, ...] of any dtype, or None.

        Raises:
            TypeError: `edge_index` is no integer tensor, `edge_weight` no floating one, or `edge_attr` no tensor.
            ValueError: a wrong shape, an id out of range, a weight that is not finite, or no node at all.
        """
        _check_edge_index(edge_index)
        if num_nodes is None:
            num_nodes = int(edge_index.max()) + 1 if edge_index.numel() else 0
        _check_nodes(num_nodes)
        _check_range("edge_index", edge_index, num_nodes)
        weight = _check_weight("edge_weight", edge_weight, edge_index.size(1), edge_index.device)
        edge_attr = _check_edge_attr(edge_attr, edge_index.size(1), edge_index.device)
        dtype = _index_dtype(num_nodes, edge_index.size(1))
        source, target = edge_index.long()
        key, order = torch.sort(target * num_nodes + source, stable=True)
        target = torch.div(key, num_nodes, rounding_mode="floor")
        boundaries = torch.arange(num_nodes + 1, device=key.device)
        rowptr = torch.searchsorted(target, boundaries).to(dtype)
        col = (key - target * num_nodes).to(dtype)
        weight, edge_attr = (None if t is None else t.index_select(0, order) for t in (weight, edge_attr))
        return cls(Csr(rowptr, col), weight, edge_attr=edge_attr)

    @classmethod
    def from_csr(
        cls,
        rowptr: Tensor,
        col: Tensor,
        weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        *,
        symmetric: bool | None = None,
    ) -> Graph:
        """Builds a graph from CSR arrays by target row.

        Args:
            rowptr: integer [N + 1], from 0 to E, not decreasing.
            col: integer [E], source ids in [0, N).
            weight: floating [E] or None.
            edge_attr: edge features [E, ...] of any dtype, or None.
            symmetric: whether every edge has its reverse with the same weight, where that is known. It is not checked;
                None finds it out on first use, by a sort of all edges.
        """
        for name, value in (("rowptr", rowptr), ("col", col)):
            if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} must be a 1-D int32 or int64 tensor, got {_describe(value)}")
        if rowptr.numel() < 2:
            raise ValueError(f"rowptr must have shape [N + 1] for N >= 1 nodes, got {list(rowptr.shape)}")
        num_nodes, num_edges = rowptr.numel() - 1, col.numel()
        if col.device != rowptr.device:
            raise ValueError(f"col is on {col.device} but rowptr is on {rowptr.device}")
        if int(rowptr[0]) != 0 or int(rowptr[-1]) != num_edges or bool((rowptr.diff() < 0).any()):
            raise ValueError(f"rowptr must rise from 0 to the number of edges ({num_edges}), got {_ends(rowptr)}")
        _check_range("col", col, num_nodes)
        weight = _check_weight("weight", weight, num_edges, col.device)
        edge_attr = _check_edge_attr(edge_attr, num_edges, col.device)
        dtype = _index_dtype(num_nodes, num_edges)
        rowptr, col = rowptr.to(dtype), col.to(dtype)
        # one byte an edge each: larger temporaries would count beside the columns of a large graph
        is_unsorted = col[1:] < col[:-1]
        is_within_row = torch.ones(num_edges + 1, dtype=torch.bool, device=col.device)
        is_within_row[rowptr.long()] = False
        is_unsorted &= is_within_row[1:num_edges]
        if bool(is_unsorted.any()):
            edge_index = torch.stack([col.long(), row_of_edge(rowptr, col)])
            graph = cls.from_edge_index(edge_index, weight, num_nodes, edge_attr)
            graph._symmetric = symmetric
            return graph
        return cls(Csr(rowptr.contiguous(), col.contiguous()), weight, edge_attr=edge_attr, symmetric=symmetric)

    @classmethod
    def from_torch_csr(cls, adj_t: Tensor, edge_attr: Tensor | None = None) -> Graph:
        """Builds a graph from a square `torch.sparse_csr` tensor whose rows are targets.

        Its values become weights; integers (of an adjacency of ones, say) in torch's default floating dtype.
        `edge_attr` [E, ...] is in the order of the values.
        """
        if not isinstance(adj_t, Tensor) or adj_t.layout != torch.sparse_csr:
            raise TypeError(f"adj_t must be a torch.sparse_csr tensor, got {_describe(adj_t)}")
        _check_square("adj_t", tuple(adj_t.shape))
        weight = adj_t.values()
        if not weight.is_floating_point() and not weight.is_complex():
            weight = weight.to(torch.get_default_dtype())
        return cls.from_csr(adj_t.crow_indices(), adj_t.col_indices(), weight, edge_attr)

    @classmethod
    def from_torch_sparse(cls, adj_t: SparseTensor, edge_attr: Tensor | None = None) -> Graph:
        """Builds a graph from a square `torch_sparse.SparseTensor` whose rows are targets (PyG's `adj_t`).

        `edge_attr` [E, ...] is in the order of its `csr()`.
        """
        if not hasattr(adj_t, "csr") or not hasattr(adj_t, "sparse_sizes"):
            raise TypeError(f"adj_t must be a torch_sparse.SparseTensor, got {_describe(adj_t)}")
        _check_square("adj_t", tuple(adj_t.sparse_sizes()))
        rowptr, col, weight = adj_t.csr()
        return cls.from_csr(rowptr, col, weight, edge_attr)

    @classmethod
    def from_pyg(cls, data: Data) -> Graph:
        """Builds a graph from a PyG `Data` with `adj_t` (SparseTensor or torch CSR) or `edge_index`.

        `edge_weight`, or else a one-dimensional floating `edge_attr`, becomes the weights; any other `edge_attr` the
        edge features. Beside `adj_t`, `edge_attr` is in the order in which `ToSparseTensor` leaves it, that of `adj_t`.
        """
        attr = getattr(data, "edge_attr", None)
        is_weight = attr is not None and attr.dim() == 1 and attr.is_floating_point()
        adj_t = getattr(data, "adj_t", None)
        if adj_t is not None:
            attr = None if is_weight else attr
            is_csr = isinstance(adj_t, Tensor)
            return cls.from_torch_csr(adj_t, attr) if is_csr else cls.from_torch_sparse(adj_t, attr)
        edge_index = getattr(data, "edge_index", None)
        if edge_index is None:
            raise ValueError(f"data must have edge_index or adj_t, got {_describe(data)}")
        weight = getattr(data, "edge_weight", None)
        if weight is None and is_weight:
            weight, attr = attr, None
        return cls.from_edge_index(edge_index, weight, data.num_nodes, attr)

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def rowptr(self) -> Tensor:
        return self.csr.rowptr

    @property
    def col(self) -> Tensor:
        return self.csr.col

    @property
    def num_nodes(self) -> int:
        return self.csr.num_rows

    @property
    def num_edges(self) -> int:
        return self.csr.num_edges

    @property
    def device(self) -> torch.device:
        return self.col.device

    @property
    def degree(self) -> Tensor:
        """Edges into each node, [N]."""
        return self.rowptr.diff()

    @property
    def nbytes(self) -> int:
        tensors = [self.rowptr, self.col, self.weight, self.edge_attr]
        if self._transposed is not None:
            tensors += list(self._transposed)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def is_symmetric(self) -> bool:
        """Whether every edge has its reverse, with the same weight; found on first use, then remembered."""
        if self._symmetric is None:
            reverse = transpose_csr(self.csr, self.num_nodes)
            same = torch.equal(reverse.rowptr, self.rowptr) and torch.equal(reverse.col, self.col)
            if same and self.weight is not None and reverse.edge_id is not None:
                same = torch.equal(self.weight.index_select(0, reverse.edge_id), self.weight)
            self._symmetric = same
            self._transposed = None if same else reverse
        return self._symmetric

    def transpose(self) -> Transposed:
        """The edges by source row, cached; shares this graph's arrays when it is symmetric."""
        if self.is_symmetric:
            return Transposed(*self.csr, None)
        if self._transposed is None:
            self._transposed = transpose_csr(self.csr, self.num_nodes)
        return self._transposed

    def __repr__(self) -> str:
        parts = [f"num_nodes={self.num_nodes}", f"num_edges={self.num_edges}"]
        if self.weight is not None:
            parts.append("weighted")
        if self.edge_attr is not None:
            parts.append(f"edge_attr={list(self.edge_attr.shape)}")
        if self.normalization:
            parts.append(f"normalization={self.normalization}")
        if self._symmetric is not None:
            parts.append("symmetric" if self._symmetric else "directed")
        return f"Graph({', '.join(parts)}, {self.nbytes / 2**20:.1f} MiB, device={self.device})"

    # --- what can be made of it -------------------------------------------------------------------------------------

    def edge_index(self) -> Tensor:
        """The edges as int64 [2, E], sources above targets, in the order of `col`."""
        return torch.stack([self.col.long(), row_of_edge(self.rowptr, self.col)])

    def to_torch_csr(self) -> Tensor:
        """A `torch.sparse_csr` tensor [N, N] by target row; weights are 1 for an unweighted graph."""
        weight = torch.ones(self.num_edges, device=self.device) if self.weight is None else self.weight
        size = (self.num_nodes, self.num_nodes)
        return torch.sparse_csr_tensor(self.rowptr, self.col, weight, size=size, check_invariants=False)

    def to_torch_sparse(self) -> SparseTensor:
        """A `torch_sparse.SparseTensor` by target row (PyG's `adj_t`)."""
        try:
            from torch_sparse import SparseTensor
        except ImportError as error:
            raise MissingPackageError("to_torch_sparse needs torch_sparse: pip install 'gas-triton[sparse]'") from error
        size = (self.num_nodes, self.num_nodes)
        return SparseTensor(
            rowptr=self.rowptr.long(), col=self.col.long(), value=self.weight, sparse_sizes=size, is_sorted=True
        )

    def add_self_loops(
        self, fill_value: float = 1.0, *, edge_attr_fill: float | Tensor | Literal["mean", "add", "min", "max"] = "mean"
    ) -> Graph:
        """One loop at every node: existing ones keep their weight and features, new ones are given some.

        Equal to `torch_geometric.utils.add_remaining_self_loops`. That forgets `fill_value` where there are no weights;
        here they are 1 then.

        Args:
            fill_value: weight of a new loop.
            edge_attr_fill: features of a new loop: a number, one edge's features, or how to reduce those of the edges
                into the node (0 without any). "mean" is what PyG's attention layers do.
        """
        source, target = self.edge_index()
        is_loop = source == target
        loop = torch.arange(self.num_nodes, device=self.device)
        edge_index = torch.cat([torch.stack([source, target])[:, ~is_loop], torch.stack([loop, loop])], dim=1)
        weight = self.weight
        if weight is None and fill_value != 1.0:
            weight = torch.ones(self.num_edges, device=self.device)
        if weight is not None:
            loop_weight = weight.new_full((self.num_nodes,), fill_value)
            loop_weight[source[is_loop]] = weight[is_loop]
            weight = torch.cat([weight[~is_loop], loop_weight])
        attr = self.edge_attr
        if attr is not None:
            loop_attr = _loop_attr(attr, target, self.num_nodes, edge_attr_fill)
            loop_attr[source[is_loop]] = attr[is_loop]
            attr = torch.cat([attr[~is_loop], loop_attr])
        graph = Graph.from_edge_index(edge_index, weight, self.num_nodes, attr)
        graph._symmetric, graph.row_order = self._symmetric, self.row_order
        graph.self_loop_weight = fill_value
        return graph

    def gcn_norm(self) -> Graph:
        r"""Weights of the symmetric GCN normalisation, `w_ij / sqrt(d_i d_j)` with `d_i` the weights into i summed.

        Equal to `torch_geometric.nn.conv.gcn_conv.gcn_norm(..., add_self_loops=False)`; call `add_self_loops` first for
        the GCN of Kipf and Welling (ICLR 2017).

        Raises:
            ValueError: the weights into a node sum to less than zero.
        """
        if self.weight is None:
            degree = self.degree.to(torch.get_default_dtype())
        else:
            degree = torch.segment_reduce(self.weight, "sum", offsets=self.rowptr.long())
        if bool((degree < 0).any()):
            node = int((degree < 0).nonzero()[0])
            raise ValueError(f"weight: the edges into node {node} sum to {float(degree[node])}, expected >= 0")
        scale = degree.pow(-0.5)
        scale.masked_fill_(scale.isinf(), 0.0)
        # int64 ids of all edges, to index with, would take more than the result
        normalized = scale.index_select(0, self.col)
        normalized *= scale.repeat_interleave(self.degree, output_size=self.num_edges)
        if self.weight is not None:
            normalized *= self.weight
        return Graph(
            self.csr, normalized, edge_attr=self.edge_attr, symmetric=self._symmetric, normalization="gcn",
            self_loop_weight=self.self_loop_weight, row_order=self.row_order,
        )  # fmt: skip

    def permute(self, perm: Tensor) -> Graph:
        """The same graph with node `perm[i]` renamed to i.

        Args:
            perm: int64 [N], a permutation of the nodes.

        Raises:
            ValueError: `perm` does not name every node once.
        """
        _check_perm(perm, self.num_nodes)
        rank = torch.empty_like(perm)
        rank[perm] = torch.arange(self.num_nodes, device=perm.device)
        rank = rank.to(self.device)
        graph = Graph.from_edge_index(rank[self.edge_index()], self.weight, self.num_nodes, self.edge_attr)
        graph._symmetric, graph.normalization = self._symmetric, self.normalization
        graph.self_loop_weight = self.self_loop_weight
        graph.row_order = self.permuted_order(perm)
        return graph

    def permuted_order(self, perm: Tensor) -> str:
        """The `row_order` that `permute(perm)` gives."""
        digest = hashlib.sha256(self.row_order.encode() + perm.cpu().numpy().tobytes())
        return f"permuted-{digest.hexdigest()[:16]}"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Graph:
        """The graph on another device (itself, if it is there already)."""
        # "cuda" names the current one of several
        if torch.empty(0, device=device).device == self.device:
            return self
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Graph:
        """The graph in page-locked host memory."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, move: Any) -> Graph:
        graph = Graph(
            Csr(move(self.rowptr), move(self.col)), None if self.weight is None else move(self.weight),
            edge_attr=None if self.edge_attr is None else move(self.edge_attr), symmetric=self._symmetric,
            normalization=self.normalization, self_loop_weight=self.self_loop_weight, row_order=self.row_order,
        )  # fmt: skip
        return graph


def _index_dtype(num_nodes: int, num_edges: int) -> torch.dtype:
    return torch.int32 if max(num_nodes, num_edges) < 2**31 - 1 else torch.int64


def _check_edge_index(edge_index: Any) -> None:
    if not isinstance(edge_index, Tensor) or edge_index.dtype not in _INTEGERS:
        raise TypeError(f"edge_index must be an integer tensor [2, E], got {_describe(edge_index)}")
    if edge_index.layout != torch.strided:
        raise TypeError(f"edge_index must be a dense tensor, got {edge_index.layout}; see Graph.from_torch_csr")
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {list(edge_index.shape)}")


def _check_nodes(num_nodes: Any) -> None:
    if not isinstance(num_nodes, int) or isinstance(num_nodes, bool):
        raise TypeError(f"num_nodes must be an int, got {type(num_nodes).__name__}")
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}: a graph without nodes cannot be trained on")


def _check_range(name: str, ids: Tensor, num_nodes: int) -> None:
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_nodes:
        raise ValueError(f"{name} must hold ids in [0, {num_nodes}), got {low if low < 0 else high}")


def _check_perm(perm: Any, num_nodes: int) -> None:
    if not isinstance(perm, Tensor) or perm.dtype != torch.int64:
        raise TypeError(f"perm must be an int64 tensor [{num_nodes}], got {_describe(perm)}")
    if perm.shape != (num_nodes,):
        raise ValueError(f"perm must have shape [{num_nodes}], got {list(perm.shape)}")
    _check_range("perm", perm, num_nodes)
    count = torch.bincount(perm, minlength=num_nodes)
    if bool((count != 1).any()):
        raise ValueError(f"perm must name every node once, got node {int((count > 1).nonzero()[0])} more than once")


def _check_weight(name: str, weight: Any, num_edges: int, device: torch.device) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor [{num_edges}], got {_describe(weight)}")
    if weight.dim() == 2 and weight.size(1) == 1:
        weight = weight.squeeze(1)
    if weight.dim() != 1 or weight.numel() != num_edges:
        raise ValueError(f"{name} must have shape [{num_edges}], one value for each edge, got {list(weight.shape)}")
    if weight.device != device:
        raise ValueError(f"{name} is on {weight.device} but the edges are on {device}")
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        edge = int((~finite).nonzero()[0])
        raise ValueError(f"{name} must be finite, got {float(weight[edge])} at edge {edge}")
    return weight.detach().contiguous()


def _check_edge_attr(edge_attr: Any, num_edges: int, device: torch.device) -> Tensor | None:
    if edge_attr is None:
        return None
    if not isinstance(edge_attr, Tensor):
        raise TypeError(f"edge_attr must be a tensor [{num_edges}, ...], got {_describe(edge_attr)}")
    if edge_attr.dim() == 0 or edge_attr.size(0) != num_edges:
        raise ValueError(f"edge_attr must have {num_edges} rows, one for each edge, got shape {list(edge_attr.shape)}")
    if edge_attr.device != device:
        raise ValueError(f"edge_attr is on {edge_attr.device} but the edges are on {device}")
    return edge_attr.detach().contiguous()


def _loop_attr(edge_attr: Tensor, target: Tensor, num_nodes: int, fill: float | Tensor | str) -> Tensor:
    shape = (num_nodes, *edge_attr.shape[1:])
    if not isinstance(fill, str):
        if isinstance(fill, Tensor) and fill.shape not in ((), edge_attr.shape[1:]):
            raise ValueError(
                f"edge_attr_fill must have the shape of one edge's features, {list(edge_attr.shape[1:])}, got "
                f"{list(fill.shape)}"
            )
        fill = torch.as_tensor(fill, dtype=edge_attr.dtype, device=edge_attr.device)
        return fill.expand(shape).clone()
    reductions = {"mean": "mean", "add": "sum", "min": "amin", "max": "amax"}
    if fill not in reductions:
        raise ValueError(f"edge_attr_fill must be a number, a tensor, or one of {', '.join(reductions)}, got {fill!r}")
    index = target.view(-1, *[1] * (edge_attr.dim() - 1)).expand_as(edge_attr)
    loops = edge_attr.new_zeros(shape)
    return loops.scatter_reduce(0, index, edge_attr, reductions[fill], include_self=False)


def _check_square(name: str, size: tuple[int, ...]) -> None:
    if len(size) != 2 or size[0] != size[1]:
        raise ValueError(f"{name} must be square [N, N], got {list(size)}")


def _ends(rowptr: Tensor) -> str:
    return f"{int(rowptr[0])} .. {int(rowptr[-1])}" + (" with a fall" if bool((rowptr.diff() < 0).any()) else "")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__

"""Random inputs of the benchmarks: a batch of any shape, and the rows that a layer reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gas_triton import Batch, Graph
from gas_triton.csr import Csr
from gas_triton.functional import Quantized
from gas_triton.history.store import HistoryStore, Nonfinite
from gas_triton.history.tiers import TableFolder
from gas_triton.kernels.pull import widen
from gas_triton.kernels.push import quantize_ref
from gas_triton.planner import Planner

Degrees = Literal["uniform", "power law", "one hub"]
Popularity = Literal["uniform", "zipf 0.8"]
CPU = torch.device("cpu")

# Edges to one halo row on average: in METIS clusters of the usual graphs from two to four.
READS_OF_A_HALO_ROW = 2.7
# Of the in-batch and halo rows together, how many rows a graph and its tables have.
TABLE_ROWS = 2
CLUSTERS = 10


@dataclass(frozen=True)
class Inputs:
    """A batch and the rows that a layer reads, as ours and as baselines take them.

    Attributes:
        batch: the plan, with edge weights.
        x: [B, F], the in-batch rows.
        history: floating [N, F], or `Quantized`.
        grad: [B, F] in x's dtype, a gradient that comes back.
    """

    batch: Batch
    x: Tensor
    history: Tensor | Quantized
    grad: Tensor

    def halo(self) -> Tensor:
        """A copy of the halo rows in x's dtype, [H, F]: `index_select`, and in plain torch what int8 needs."""
        ids = self.batch.halo_ids
        if isinstance(self.history, Quantized):
            rows = self.history.rows.index_select(0, ids)
            return widen(rows, self.history.scale.index_select(0, ids), self.x.dtype)
        return self.history.index_select(0, ids).to(self.x.dtype)

    def cat(self, x: Tensor) -> Tensor:
        """What PyGAS makes before each layer: in-batch rows and a copy of the halo rows, [B + H, F]."""
        return torch.cat([x, self.halo()])

    @property
    def joint_weight(self) -> Tensor | None:
        """Edge weights in the order of `batch.joint()`."""
        weight, edge_id = self.batch.edge_weight, self.batch.joint().edge_id
        return weight if weight is None or edge_id is None else weight.index_select(0, edge_id)


def make_inputs(
    num_rows: int,
    degree: int,
    num_features: int,
    *,
    halo_share: float = 0.25,
    degrees: Degrees = "uniform",
    popularity: Popularity = "uniform",
    dtype: torch.dtype = torch.float32,
    history_dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    seed: int = 0,
) -> Inputs:
    """A random batch of `random_batch`, and normal rows for it.

    Args:
        num_rows: B.
        degree: edges into a row on average.
        num_features: F.
        halo_share: of the edges, from 0 to 0.9.
        degrees: as for `random_batch`.
        popularity: as for `random_batch`.
        dtype: of x.
        history_dtype: of the table, `torch.int8` for `Quantized`; that of x if None.
        device: of all tensors.
        seed: of all draws.
    """
    batch = random_batch(
        num_rows, degree, halo_share=halo_share, degrees=degrees, popularity=popularity, device=device, seed=seed
    )
    generator = torch.Generator(device).manual_seed(seed + 1)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, num_features, generator=generator, device=device)

    table = normal(batch.graph_nodes)
    history: Tensor | Quantized = table.to(history_dtype or dtype) if history_dtype != torch.int8 else table
    if history_dtype == torch.int8:
        history = Quantized(*quantize_ref(table))
    return Inputs(batch, normal(num_rows).to(dtype), history, normal(num_rows).to(dtype))


def random_batch(
    num_rows: int,
    degree: int,
    *,
    halo_share: float = 0.25,
    degrees: Degrees = "uniform",
    popularity: Popularity = "uniform",
    num_nodes: int | None = None,
    device: torch.device = CPU,
    seed: int = 0,
) -> Batch:
    """The plan of a few clusters of a random weighted graph: the same on every call, made in a few passes over edges.

    Clusters lie apart in the graph and their rows descend by degree, as a partition leaves them; halo rows lie anywhere
    else. Only the rows of the batch have edges.

    Args:
        num_rows: B.
        degree: edges into a row on average; the batch has B * degree.
        halo_share: of the edges, from 0 to 0.9.
        degrees: "uniform", every row the same; "power law", with exponent 2.5; "one hub", where one row has at least as
            many edges as the batch has rows, and the others the rest.
        popularity: of sources: "uniform", or "zipf 0.8", where the k-th is read in proportion to k ** -0.8.
        num_nodes: N; twice the rows that the batch may read if None.
        device: of the plan. A GPU draws other edges than a CPU.
        seed: of the draw.

    Raises:
        ValueError: a share outside of [0, 0.9], no row, or too few nodes.
    """
    if not 0.0 <= halo_share <= 0.9:
        raise ValueError(f"halo_share must be from 0 to 0.9, got {halo_share}")
    if num_rows < 1 or degree < 1:
        raise ValueError(f"a batch needs rows and edges, got {num_rows} rows of degree {degree}")
    num_edges = num_rows * degree
    num_outer = round(num_edges * halo_share)
    num_candidates = max(1, round(num_outer / READS_OF_A_HALO_ROW)) if num_outer else 0
    num_nodes = TABLE_ROWS * (num_rows + num_candidates) if num_nodes is None else num_nodes
    if num_nodes < num_rows + num_candidates:
        raise ValueError(f"num_nodes must be at least {num_rows + num_candidates}, got {num_nodes}")
    generator = torch.Generator(device).manual_seed(seed)

    spans = _spans(num_rows, num_nodes, min(CLUSTERS, num_rows))
    rows = torch.cat([torch.arange(first, last, device=device) for first, last in spans])
    count = _in_clusters(_degrees(degrees, num_rows, num_edges, device), spans, generator)
    is_halo = torch.ones(num_nodes, dtype=torch.bool, device=device)
    is_halo[rows] = False
    halo = is_halo.nonzero().squeeze(1)
    halo = halo[torch.randperm(halo.numel(), generator=generator, device=device)[:num_candidates]]

    is_outer = torch.zeros(num_edges, dtype=torch.bool, device=device)
    is_outer[torch.randperm(num_edges, generator=generator, device=device)[:num_outer]] = True
    source = torch.empty(num_edges, dtype=torch.int64, device=device)
    popular = rows[torch.randperm(num_rows, generator=generator, device=device)]
    source[~is_outer] = popular[_draw(popularity, num_rows, num_edges - num_outer, generator)]
    if num_outer:
        source[is_outer] = halo[_draw(popularity, num_candidates, num_outer, generator)]
    # columns ascend within a row, as in every graph
    target = torch.repeat_interleave(rows, count, output_size=num_edges)
    col = torch.sort(target * num_nodes + source).values - target * num_nodes
    rowptr = torch.zeros(num_nodes + 1, dtype=torch.int64, device=device)
    rowptr[rows + 1] = count
    rowptr = rowptr.cumsum(0)
    weight = torch.rand(num_edges, generator=generator, device=device)
    # said to be directed, which it is: found out, it would cost a sort of all edges
    graph = Graph(Csr(rowptr.int(), col.int()), weight, symmetric=False)
    ends = rowptr[torch.tensor(spans, device=device)].tolist()
    return Planner(graph).plan(range(len(spans)), spans, [(first, last) for first, last in ends])


def _spans(num_rows: int, num_nodes: int, num_clusters: int) -> list[tuple[int, int]]:
    """Ranges of B rows in all, spread over the graph."""
    starts = [num_nodes * k // num_clusters for k in range(num_clusters)]
    sizes = [num_rows * (k + 1) // num_clusters - num_rows * k // num_clusters for k in range(num_clusters)]
    return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _degrees(kind: Degrees, num_rows: int, num_edges: int, device: torch.device) -> Tensor:
    """Edges of each row, int64 [B], `num_edges` in sum, the largest first."""
    share = torch.ones(num_rows, dtype=torch.float64, device=device)
    if kind == "power law":
        # quantiles of a Pareto distribution whose density falls with the power 2.5
        share = ((torch.arange(num_rows, dtype=torch.float64, device=device) + 0.5) / num_rows).pow(-1 / 1.5)
    elif kind == "one hub":
        rest = max(num_edges - num_rows, 0)
        share.fill_(rest / max(num_rows - 1, 1))
        share[0] = num_edges - rest
    elif kind != "uniform":
        raise ValueError(f"degrees must be 'uniform', 'power law' or 'one hub', got {kind!r}")
    count = (share / share.sum() * num_edges).floor().long()
    count[: num_edges - int(count.sum())] += 1
    return count


def _in_clusters(count: Tensor, spans: list[tuple[int, int]], generator: torch.Generator) -> Tensor:
    """The degrees dealt to clusters at random, descending within each."""
    dealt = count[torch.randperm(count.numel(), generator=generator, device=count.device)]
    sizes = [last - first for first, last in spans]
    return torch.cat([part.sort(descending=True).values for part in dealt.split(sizes)])


def _draw(popularity: Popularity, num_rows: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """Rows drawn with replacement, the most popular of which is 0."""
    device = generator.device
    if popularity == "uniform":
        return torch.randint(num_rows, (num_draws,), generator=generator, device=device)
    if popularity != "zipf 0.8":
        raise ValueError(f"popularity must be 'uniform' or 'zipf 0.8', got {popularity!r}")
    total = torch.arange(1, num_rows + 1, dtype=torch.float64, device=device).pow(-0.8).cumsum(0)
    uniform = torch.rand(num_draws, generator=generator, device=device, dtype=torch.float64)
    return torch.searchsorted(total, uniform * total[-1]).clamp_(max=num_rows - 1)


# --- tables -----------------------------------------------------------------------------------------------------------


def make_store(
    tier: str, num_rows: int, dim: int, dtype: torch.dtype, device: torch.device, nonfinite: Nonfinite = "raise"
) -> HistoryStore:
    """A history of its own, in a temporary folder if it is in files."""
    folder = TableFolder(None) if tier == "file" else None
    return HistoryStore(num_rows, dim, dtype, device, tier=tier, nonfinite=nonfinite, folder=folder)


def make_tables(
    tier: str, num_rows: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Zero rows, and with int8 a scale of each, in the same memory as a history of this tier, for baselines."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"table": ((num_rows, dim), dtype)}
    if dtype == torch.int8:
        shapes["scale"] = ((num_rows,), torch.float32)
    if tier == "file":
        found = TableFolder(None).create("plain", shapes, {})
        tensors = {name: memory.tensor for name, memory in found.items()}
    else:
        home = device if tier == "device" else CPU
        is_pinned = tier == "pinned" and device.type == "cuda"
        tensors = {
            name: torch.zeros(shape, dtype=kind, device=home, pin_memory=is_pinned)
            for name, (shape, kind) in shapes.items()
        }
    return tensors["table"], tensors.get("scale")

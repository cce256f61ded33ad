"""Arithmetic of memory: what a run keeps, what one training step takes, and what fits a budget. Nothing is allocated.

    step = plan of B rows and E edges + what L layers keep for their backward + what the widest moment adds

Between steps stay parameters with Adam's two moments, the graph, features and labels, and the histories: N rows for
each layer but the first. A step's own memory depends on the batch alone, on its B in-batch rows, H halo rows and E
edges, and not on N: that is the promise of GNNAutoScale (Fey et al., ICML 2021).

`gas_triton.sizing_step` goes through a step tensor by tensor. Counted are tensors that grow with the batch or the
model; scalars are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gas_triton.graph import Graph
from gas_triton.history import ReadsHistory
from gas_triton.models import MODELS
from gas_triton.sizing_step import STEP_MODELS, BatchSize, StepOptions, plan_bytes, step_bytes

if TYPE_CHECKING:
    from gas_triton.models import Model

__all__ = [
    "HISTORY_BYTES",
    "STEP_MODELS",
    "BatchSize",
    "Budget",
    "Candidate",
    "ModelSize",
    "Problem",
    "StepOptions",
    "candidates",
    "fit",
    "graph_bytes",
    "history_bytes",
    "plan_bytes",
    "state_bytes",
    "step_bytes",
]

# Bytes of a stored value; int8 rows have a float32 scale beside them.
HISTORY_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
# Every history has the time of each row's last push, int32.
PUSH_TIME_BYTES = 4
# Of a budget, what the arithmetic may fill: the rest is for the caching allocator's fragments, cuBLAS and the context.
DEVICE_SHARE, HOST_SHARE = 0.9, 0.8


@dataclass(frozen=True)
class ModelSize:
    """A model by its sizes.

    Attributes:
        name: of `gas_triton.models.MODELS`.
        in_channels: F_in.
        hidden: width between layers.
        out_channels: classes or labels.
        layers: L.
        dropout: probability, on the input of every layer.
        options: further arguments of the model.
    """

    name: str
    in_channels: int
    hidden: int
    out_channels: int
    layers: int
    dropout: float = 0.5
    options: Mapping[str, Any] | None = None

    def make(self, device: str = "meta") -> Model:
        """The model; on the meta device, the default, it has shapes and no memory."""
        with torch.device(device):
            return MODELS[self.name](
                self.in_channels, self.hidden, self.out_channels, self.layers, dropout=self.dropout,
                **dict(self.options or {}),
            )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A graph by its sizes.

    Attributes:
        num_nodes: N.
        num_edges: E, directed edges; an undirected edge counts twice.
        num_features: F of a node.
        num_classes: classes, or labels.
        halo_ratio: H / B of a batch, rows read from histories over rows computed. What METIS reaches is the graph's
            own: `gas-triton partition` measures it.
    """

    num_nodes: int
    num_edges: int
    num_features: int
    num_classes: int
    halo_ratio: float = 3.0

    def __post_init__(self) -> None:
        for name in ("num_nodes", "num_edges", "num_features", "num_classes"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < (name != "num_edges"):
                raise ValueError(f"{name}: expected a positive int, got {count!r}")
        if not (math.isfinite(self.halo_ratio) and self.halo_ratio >= 0.0):
            raise ValueError(f"halo_ratio: expected a number of at least 0, got {self.halo_ratio}")

    def batch(self, num_parts: int, batch_size: int, has_loops: bool = False) -> BatchSize:
        """A batch of `batch_size` of `num_parts` equal clusters.

        Edges are spread evenly over the rows, and over the rows that they come from: H / (B + H) of them are outer.
        """
        nodes = math.ceil(self.num_nodes * min(batch_size, num_parts) / num_parts)
        edges = math.ceil(self.num_edges * nodes / self.num_nodes)
        halo = min(self.num_nodes - nodes, math.ceil(nodes * self.halo_ratio), edges)
        outer = math.ceil(edges * halo / (nodes + halo))
        return BatchSize(nodes, halo, edges - outer + has_loops * nodes, outer)


def state_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, Adam's two moments and buffers; gradients live within a step."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return 3 * parameters + sum(b.numel() * b.element_size() for b in model.buffers())


def graph_bytes(num_nodes: int, num_edges: int, weighted: bool) -> int:
    """Bytes of a graph's CSR, its weights and the planner's map; int32 ids below 2**31 nodes and edges, else int64."""
    index = index_bytes(num_nodes, num_edges)
    return (num_nodes + 1) * index + num_edges * (index + 4 * weighted) + num_nodes * index


def index_bytes(num_nodes: int, num_edges: int) -> int:
    """Bytes of an id of a node or edge."""
    return 4 if max(num_nodes, num_edges) < 2**31 else 8


def feature_bytes(num_nodes: int, num_features: int, num_classes: int = 0, multi_label: bool = False) -> int:
    """Bytes of float32 features, and of a target for each node: an int64 class, or a float32 for each label."""
    return num_nodes * (4 * num_features + (4 * num_classes if multi_label else 8))


def history_dims(model: nn.Module) -> list[int]:
    """Widths of the histories: of the input of every layer but the first."""
    return [module.history_dim for module in model.modules() if isinstance(module, ReadsHistory)][1:]


def history_bytes(num_nodes: int, dims: Sequence[int], dtype: str = "float32") -> int:
    """Bytes of the tables, their scales and push times: `sum_l N (D_l size(dtype) + 4)`, and 4 N more each for int8.

    Args:
        num_nodes: N.
        dims: width of each table, see `history_dims`.
        dtype: float32, bfloat16, float16 or int8.
    """
    return sum(num_nodes * (row_bytes(dim, dtype) + PUSH_TIME_BYTES) for dim in dims)


def row_bytes(dim: int, dtype: str) -> int:
    """Bytes of a stored row, with its scale."""
    if dtype not in HISTORY_BYTES:
        raise ValueError(f"history_dtype: expected one of {', '.join(HISTORY_BYTES)}, got {dtype!r}")
    return dim * HISTORY_BYTES[dtype] + 4 * (dtype == "int8")


def slot_bytes(batch: BatchSize, dims: Sequence[int], dtype: str = "float32") -> int:
    """Bytes of the staged halo rows of histories on the host: two slots a layer, this batch's and the next one's."""
    return 2 * sum(batch.halo * row_bytes(dim, dtype) for dim in dims)


# --- what fits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Bytes there are.

    Attributes:
        device: of the GPU.
        host: of host memory.
        disk: of the disk; None if histories are not to be in files.
    """

    device: int
    host: int
    disk: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to train, and the bytes it takes.

    Attributes:
        tier: where histories live, "device", "pinned" or "file"; "full-batch" without any.
        num_parts: clusters; 1 for full-batch.
        batch_size: clusters of a batch.
        history_dtype: of the tables.
        batch: its sizes.
        state: parameters and Adam's moments.
        graph: the graph's CSR.
        plans: of batches that repeat, which are kept: with batches of one cluster, and full-batch.
        features: features and labels.
        histories: the tables, in the tier's memory.
        slots: staged halo rows, on the device.
        step: peak of a step beyond all of these.
        fits: whether device, host and disk are within the budget.
        reason: what does not fit, empty if all does.
    """

    tier: str
    num_parts: int
    batch_size: int
    history_dtype: str
    batch: BatchSize
    state: int
    graph: int
    plans: int
    features: int
    histories: int
    slots: int
    step: int
    fits: bool = False
    reason: str = ""

    @property
    def device(self) -> int:
        """Bytes on the device."""
        tables = self.histories if self.tier == "device" else 0
        return self.state + self.graph + self.plans + self.features + tables + self.slots + self.step

    @property
    def host(self) -> int:
        """Bytes of histories in host memory."""
        return self.histories if self.tier == "pinned" else 0

    @property
    def disk(self) -> int:
        """Bytes of histories in files."""
        return self.histories if self.tier == "file" else 0


def candidates(
    problem: Problem,
    model: ModelSize,
    budget: Budget,
    *,
    num_parts: Sequence[int] = (1, 10, 20, 40, 80, 160, 320, 640, 1280, 2560),
    batch_size: int = 1,
    history_dtypes: Sequence[str] = ("float32",),
    device_type: str = "cuda",
) -> Iterator[Candidate]:
    """The ways to train, the fastest first: full-batch, then histories on the device, pinned, in files.

    Within a tier, few parts come first: larger batches read fewer halo rows an epoch and go over fewer stale ones.

    Args:
        problem: the graph's sizes.
        model: the model's.
        budget: the memory there is.
        num_parts: clusters of a partition to try; 1 is full-batch.
        batch_size: clusters of a batch.
        history_dtypes: storage dtypes to try.
        device_type: "cuda" or "cpu", whose kernels take other temporaries.
    """
    shapes = model.make()
    dims, state = history_dims(shapes), state_bytes(shapes)
    prepared = prepared_by(model.name)
    graph = graph_bytes(problem.num_nodes, problem.num_edges + prepared.loops * problem.num_nodes, prepared.weighted)
    features = feature_bytes(problem.num_nodes, problem.num_features, problem.num_classes)
    if 1 in num_parts:
        whole = BatchSize(
            problem.num_nodes, 0, problem.num_edges + prepared.loops * problem.num_nodes, 0, is_planned=False
        )
        step = step_bytes(shapes, whole, StepOptions(device_type=device_type, weighted=prepared.weighted))
        # ids of the whole graph, and an empty outer block
        kept = 8 * problem.num_nodes + 4 * (problem.num_nodes + 1)
        yield _judge(Candidate("full-batch", 1, 1, "-", whole, state, graph, kept, features, 0, 0, step), budget)
    for tier in ("device", "pinned", "file"):
        if tier == "file" and budget.disk is None:
            continue
        for dtype in history_dtypes:
            tables = history_bytes(problem.num_nodes, dims, dtype)
            for parts in sorted(num_parts):
                if not batch_size < parts <= problem.num_nodes:
                    continue
                batch = problem.batch(parts, batch_size, prepared.loops)
                options = StepOptions(
                    device_type=device_type, weighted=prepared.weighted, history_dtype=dtype, tier=tier,
                    index=index_bytes(problem.num_nodes, problem.num_edges),
                    plans_ahead=int(tier != "device" or device_type == "cuda"),
                )  # fmt: skip
                # batches of one cluster repeat, and their plans are kept
                plans = parts * plan_bytes(batch, options) if batch_size == 1 else 0
                slots = 0 if tier == "device" else slot_bytes(batch, dims, dtype)
                step = step_bytes(shapes, batch, options)
                yield _judge(
                    Candidate(
                        tier, parts, batch_size, dtype, batch, state, graph, plans, features, tables, slots, step
                    ),
                    budget,
                )  # fmt: skip


def fit(found: Sequence[Candidate]) -> Candidate | None:
    """The first candidate that fits, None if none does."""
    return next((candidate for candidate in found if candidate.fits), None)


def _judge(candidate: Candidate, budget: Budget) -> Candidate:
    short = []
    for name, need, have, share in (
        ("device", candidate.device, budget.device, DEVICE_SHARE),
        ("host", candidate.host, budget.host, HOST_SHARE),
        ("disk", candidate.disk, budget.disk, 1.0),
    ):
        if have is not None and need > have * share:
            short.append(name)
    return replace(candidate, fits=not short, reason=", ".join(short))


@dataclass(frozen=True)
class Prepared:
    """What a model adds to a graph: self loops, weights."""

    loops: bool
    weighted: bool


def prepared_by(model: str) -> Prepared:
    """What a model of `MODELS` adds to a graph."""
    graph = MODELS[model].prepare(Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), num_nodes=2))
    return Prepared(graph.num_edges > 2, graph.weight is not None)

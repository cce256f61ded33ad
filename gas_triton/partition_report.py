"""What a graph costs in several numbers of parts, by METIS and at random.

    records = compare_partitions(graph, [8, 32, 128], model=ModelSize("GCN", 128, 256, 40, 3))
    print(recommend(records).reason)

Rows and edges of every batch are counted, not assumed; from those of the batch that takes most, `gas_triton.sizing`
computes the bytes of a training step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from gas_triton.errors import MissingPackageError
from gas_triton.graph import Graph
from gas_triton.models import MODELS
from gas_triton.partition import BatchCounts, Partition, metis, random_partition
from gas_triton.sizing import (
    HISTORY_BYTES,
    STEP_MODELS,
    BatchSize,
    Candidate,
    ModelSize,
    StepOptions,
    graph_bytes,
    history_bytes,
    history_dims,
    index_bytes,
    plan_bytes,
    prepared_by,
    slot_bytes,
    state_bytes,
    step_bytes,
)

__all__ = [
    "METHODS",
    "PartitionRecord",
    "check_comparison",
    "compare_partitions",
    "default_parts",
]

Method = Literal["metis", "random"]
METHODS: dict[str, Callable[[Graph, int, int], Partition]] = {"metis": metis, "random": random_partition}
TITLES = {"metis": "METIS", "random": "random"}
TIERS = ("device", "pinned", "file")
# A cluster of fewer nodes has little inside of it; more parts make epochs of more steps than are worth while.
LEAST_NODES, MOST_PARTS = 64, 1024
LADDER = 6


@dataclass(frozen=True)
class PartitionRecord:
    """One partition, in batches of so many clusters.

    Attributes:
        method: "metis" or "random".
        parts_asked: clusters asked for.
        num_parts: clusters made: METIS may leave some empty, which are dropped.
        batch_size: clusters of a batch.
        num_batches: batches of an epoch.
        edge_cut: share of the edges whose ends lie in different clusters.
        halo_ratio: halo rows over in-batch rows, H / B, over all batches of an epoch.
        inter_intra_ratio: edges between batches over edges within them (Fey et al., ICML 2021).
        balance: largest cluster over the mean cluster.
        rows: B, mean of the batches.
        halo_rows: H, mean of the batches.
        most_rows: B + H of the batch that has most.
        seconds: to make the partition.
        cost: of a run whose every step is as large as the one that takes most; None without an arithmetic.
        reason: why there is no cost, or with `num_parts` 0 no partition; else empty.
    """

    method: str
    parts_asked: int
    num_parts: int
    batch_size: int
    num_batches: int = 0
    edge_cut: float = 0.0
    halo_ratio: float = 0.0
    inter_intra_ratio: float = 0.0
    balance: float = 0.0
    rows: float = 0.0
    halo_rows: float = 0.0
    most_rows: int = 0
    seconds: float = 0.0
    cost: Candidate | None = None
    reason: str = ""

    @property
    def is_made(self) -> bool:
        """Whether there is a partition."""
        return self.num_parts > 0

    @property
    def step_bytes(self) -> int | None:
        """Of the step that takes most; None without a cost."""
        return None if self.cost is None else self.cost.step

    @property
    def device_bytes(self) -> int | None:
        """Of that step and what stays on the device beside it; None without a cost."""
        return None if self.cost is None else self.cost.device


def default_parts(num_nodes: int) -> list[int]:
    """Numbers of parts worth a look: 1, which is full-batch, then at most six powers of 2, spaced evenly.

    The largest leaves clusters of at least 64 nodes, and is at most 1024: an epoch of more steps is seldom worth while.

    Args:
        num_nodes: N.
    """
    top = min(num_nodes // LEAST_NODES, MOST_PARTS).bit_length() - 1
    if top < 1:
        return [1, 2] if num_nodes > 1 else [1]
    stride = -(-top // LADDER)
    return [1, *(2**power for power in range((top - 1) % stride + 1, top + 1, stride))]


def compare_partitions(
    graph: Graph,
    num_parts: Sequence[int] | None = None,
    batch_sizes: Sequence[int | float] = (1,),
    *,
    methods: Sequence[str] = ("metis", "random"),
    model: ModelSize | None = None,
    label_bytes: int = 8,
    history_dtype: str = "float32",
    history_tier: str = "device",
    device_type: str = "cuda",
    seed: int = 0,
    on_record: Callable[[PartitionRecord], object] | None = None,
) -> list[PartitionRecord]:
    """Makes partitions and says what each costs.

    Clusters are grouped as in the first epoch of `ClusterLoader(..., seed=seed)` for `seed` 0; other epochs draw other
    groups of about the same sizes.

    Args:
        graph: as it is before a model's `prepare`: without self loops that are only there for a layer.
        num_parts: clusters to ask for; `default_parts` if None.
        batch_sizes: clusters of a batch, to try each: a count, or a float in (0, 1], a share of the clusters.
        methods: of `METHODS`.
        model: what is trained; None for no bytes.
        label_bytes: of a node's target: 8 for a class, 4 for each of many labels.
        history_dtype: of the histories.
        history_tier: where they live, "device", "pinned" or "file".
        device_type: "cuda" or "cpu", whose kernels take other temporaries.
        seed: of METIS, the random partition, and the groups.
        on_record: called with each record once it is there.

    Returns:
        Records by number of parts, batch size and method. Without pymetis those of METIS have only a reason, if another
        method was asked for too.

    Raises:
        ValueError: an argument is out of range, names the argument.
        MissingPackageError: only METIS was asked for and pymetis is not installed.
    """
    check_comparison(graph.num_nodes, num_parts, batch_sizes, methods, model, history_dtype, history_tier, device_type)
    wanted = default_parts(graph.num_nodes) if num_parts is None else list(dict.fromkeys(num_parts))
    graph = graph.to("cpu")
    # found once, before the first partition is timed
    _ = graph.is_symmetric
    costs = _Costs(graph, model, label_bytes, history_dtype, history_tier, device_type)
    records: list[PartitionRecord] = []

    def add(record: PartitionRecord) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    for parts in wanted:
        made: dict[str, tuple[Partition, float] | str] = {}
        # a share and a count may say the same
        for size in dict.fromkeys(_clusters(size, parts) for size in batch_sizes):
            if num_parts is None and 1 < parts <= size:
                # one batch of all clusters again
                continue
            # of one part there is one partition
            for method in methods if parts > 1 else methods[:1]:
                if method not in made:
                    made[method] = _make(method, graph, parts, seed, is_only=len(methods) == 1)
                found = made[method]
                if isinstance(found, str):
                    add(PartitionRecord(method, parts, 0, size, reason=found))
                else:
                    add(_record(method, parts, size, *found, seed, costs))
    return records


def _make(method: str, graph: Graph, parts: int, seed: int, is_only: bool) -> tuple[Partition, float] | str:
    """(partition, seconds), or why there is none."""
    start = time.perf_counter()
    try:
        return METHODS[method](graph, parts, seed), time.perf_counter() - start
    except MissingPackageError as error:
        if is_only:
            raise
        return str(error)


def _record(
    method: str, asked: int, size: int, parts: Partition, seconds: float, seed: int, costs: _Costs
) -> PartitionRecord:
    clusters = min(size, parts.num_parts)
    counts = parts.batch_counts(clusters, seed)
    stats = parts.stats_of(counts)
    num_batches = counts.nodes.numel()
    cost, reason = costs.of(counts, parts.num_parts, clusters)
    return PartitionRecord(
        method, asked, parts.num_parts, clusters, num_batches, stats.edge_cut, stats.halo_ratio,
        stats.inter_intra_ratio, stats.balance, parts.perm.numel() / num_batches, stats.halo_rows,
        int((counts.nodes + counts.halo).max()), seconds, cost, reason,
    )  # fmt: skip


def _clusters(size: int | float, num_parts: int) -> int:
    return min(size, num_parts) if isinstance(size, int) else max(1, round(size * num_parts))


class _Costs:
    """What a run takes, from the sizes of its batches."""

    def __init__(
        self, graph: Graph, model: ModelSize | None, label_bytes: int, history_dtype: str, tier: str, device_type: str
    ) -> None:
        self.graph, self.tier, self.dtype, self.device_type = graph, tier, history_dtype, device_type
        self.label_bytes = label_bytes
        self.shapes: nn.Module | None = None
        self.reason = "no model was given"
        if model is None:
            return
        if model.name not in STEP_MODELS:
            self.reason = f"{model.name} has no arithmetic ({', '.join(STEP_MODELS)} have)"
            return
        shapes = model.make()
        try:
            step_bytes(shapes, BatchSize(1, 0, 0, 0))
        except ValueError as error:
            self.reason = f"no arithmetic: {error}"
            return
        self.shapes, self.reason = shapes, ""
        self.features = graph.num_nodes * (4 * model.in_channels + label_bytes)
        self.prepared = prepared_by(model.name)

    def of(self, counts: BatchCounts, num_parts: int, batch_size: int) -> tuple[Candidate | None, str]:
        """(the cost, why there is none)."""
        if self.shapes is None:
            return None, self.reason
        is_full = counts.nodes.numel() == 1
        options = StepOptions(
            device_type=self.device_type, weighted=self.prepared.weighted, history_dtype=self.dtype,
            tier="device" if is_full else self.tier, symmetric=self.graph.is_symmetric, label_bytes=self.label_bytes,
            index=index_bytes(self.graph.num_nodes, self.graph.num_edges),
            plans_ahead=int(not is_full and (self.tier != "device" or self.device_type == "cuda")),
        )  # fmt: skip
        inner = counts.inner
        if self.prepared.loops:
            # a model's loops take the place of those that are there
            inner = inner - counts.loops + counts.nodes
        columns = (counts.nodes, counts.halo, inner, counts.outer)
        sizes = [
            BatchSize(nodes, halo, inside, outer, is_planned=not is_full)
            for nodes, halo, inside, outer in zip(*(column.tolist() for column in columns), strict=True)
        ]
        step, largest = max(
            ((step_bytes(self.shapes, size, options), size) for size in dict.fromkeys(sizes)), key=lambda pair: pair[0]
        )
        num_nodes, num_edges = self.graph.num_nodes, sum(size.edges for size in sizes)
        dims = history_dims(self.shapes)
        plans = 0
        if is_full:
            # ids of the whole graph, and an empty outer block
            plans = 8 * num_nodes + 4 * (num_nodes + 1)
        elif batch_size == 1:
            # batches of one cluster repeat, and their plans are kept
            plans = sum(plan_bytes(size, options) for size in sizes)
        is_staged = not is_full and self.tier != "device"
        return Candidate(
            tier="full-batch" if is_full else self.tier,
            num_parts=num_parts,
            batch_size=batch_size,
            history_dtype="-" if is_full else self.dtype,
            batch=largest,
            state=state_bytes(self.shapes),
            graph=graph_bytes(num_nodes, num_edges, self.prepared.weighted),
            plans=plans,
            features=self.features,
            histories=0 if is_full else history_bytes(num_nodes, dims, self.dtype),
            slots=slot_bytes(largest, dims, self.dtype) if is_staged else 0,
            step=step,
        ), ""


# --- arguments --------------------------------------------------------------------------------------------------------


def check_comparison(
    num_nodes: int,
    num_parts: Sequence[int] | None,
    batch_sizes: Sequence[int | float],
    methods: Sequence[str],
    model: ModelSize | None,
    history_dtype: str,
    history_tier: str,
    device_type: str,
) -> None:
    """Raises a ValueError that names the first argument of `compare_partitions` that is out of range."""
    for count in [] if num_parts is None else num_parts:
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= num_nodes:
            raise ValueError(f"num_parts must be from 1 to the number of nodes ({num_nodes}), got {count!r}")
    for size in batch_sizes:
        is_count = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        if not (is_count or (isinstance(size, float) and 0.0 < size <= 1.0)):
            raise ValueError(
                f"batch_size must be a number of clusters of at least 1, or a share of them as a float in (0, 1], "
                f"got {size!r}"
            )
    choices: dict[str, tuple[Sequence[str], Collection[str]]] = {
        "methods": (methods, METHODS), "history_dtype": ([history_dtype], HISTORY_BYTES),
        "history_tier": ([history_tier], TIERS),
        "device_type": ([device_type], ("cuda", "cpu")), "model": ([] if model is None else [model.name], MODELS),
    }  # fmt: skip
    for name, (given, known) in choices.items():
        for value in given:
            if value not in known:
                raise ValueError(f"{name} must be of {', '.join(known)}, got {value!r}")
    for name, values in (("num_parts", num_parts), ("batch_sizes", batch_sizes), ("methods", methods)):
        if values is not None and not values:
            raise ValueError(f"{name} must not be empty")

"""One point of a scale curve: a 3-layer GCN with histories, trained for whole epochs of which every step is timed."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.groups import CPU, Row
from bench.ring import ring_of_clusters
from gas_triton import Batch, ClusterLoader, Histories, Partition, attach_histories
from gas_triton.memory import peak_bytes
from gas_triton.models import GCN

NUM_LAYERS, NUM_CLASSES, LEARNING_RATE = 3, 16, 0.01
# Where things live: all on the device; histories, features and labels in host memory; the graph there too.
WAYS = ("device", "pinned", "host")
# Steps before those that count, and steps whose memory is watched.
WARM_UP, WATCHED = 3, 3


@dataclass(frozen=True)
class Point:
    """What is trained.

    Attributes:
        nodes: N, about: clusters are whole.
        features: width of the input.
        hidden: width of the histories.
        cluster_nodes: nodes of a cluster.
        clusters: clusters a batch.
        degree: of a node, its loop not counted.
        dtype: of the tables.
    """

    nodes: int
    features: int = 64
    hidden: int = 64
    cluster_nodes: int = 500
    clusters: int = 2
    degree: int = 10
    dtype: torch.dtype = torch.float32

    @property
    def num_clusters(self) -> int:
        """C, even."""
        return 2 * max(round(self.nodes / self.cluster_nodes / 2), 1)


class Training:
    """The model, its tables and its optimiser at one point.

    Args:
        point: what to train.
        way: where things live, of `WAYS`.
        device: of the layers.
    """

    def __init__(self, point: Point, way: str, device: torch.device) -> None:
        num_clusters = point.num_clusters
        graph = ring_of_clusters(num_clusters, point.cluster_nodes, point.degree, self_loops=True, device=device)
        graph = graph.gcn_norm().to(CPU if way == "host" else device)
        num_nodes = graph.num_nodes
        home = device if way == "device" else CPU
        x = random_rows(num_nodes, point.features, device, home)
        y = torch.arange(num_nodes, device=home) % NUM_CLASSES
        parts = Partition(torch.arange(num_nodes), torch.arange(num_clusters + 1) * point.cluster_nodes, graph)
        self.graph = graph
        self.data_bytes = graph.nbytes + x.nbytes + y.nbytes
        self.loader = ClusterLoader(graph, parts, point.clusters, x=x, y=y)
        torch.manual_seed(0)
        self.model = GCN(point.features, point.hidden, NUM_CLASSES, NUM_LAYERS).to(device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="there is no CUDA device")
            tier = "device" if way == "device" else "pinned"
            self.histories: Histories = attach_histories(self.model, num_nodes, tier, point.dtype)
        for store in self.histories.values():
            # pages that are not page-locked are made when first written: that would count as a part of the first epoch
            store.table.zero_()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.is_in_place = home == device

    def step(self, batch: Batch) -> Tensor:
        """Forward, backward and Adam on a batch; its loss."""
        out = self.model(batch.features if self.is_in_place else batch.x, batch)
        loss = F.cross_entropy(out, batch.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def steps(self, most: int | None = None) -> Iterator[Batch]:
        """Trains an epoch, or its first steps; gives every batch after its step."""
        batches = self.histories.prefetch(self.loader)
        for batch in itertools.islice(batches, most):
            self.step(batch)
            yield batch


def random_rows(rows: int, width: int, device: torch.device, home: torch.device, block: int = 1 << 20) -> Tensor:
    """Normal float32 [rows, width] on `home`, drawn in blocks on `device`."""
    table = torch.empty(rows, width, device=home)
    draw = torch.Generator(device).manual_seed(0)
    for part in table.split(block):
        part.copy_(torch.randn(part.shape, generator=draw, device=device))
    return table


class Marks:
    """Points in time between steps: on a GPU events, so that nothing waits for it before all are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Notes that a step ends here."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        pairs = list(itertools.pairwise(self._marks))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]


def time_steps(training: Training, device: torch.device, most: int | None = None) -> list[float]:
    """Seconds of the steps of an epoch, or of its first ones."""
    marks = Marks(device)
    marks.mark()
    for _ in training.steps(most):
        marks.mark()
    return marks.seconds()


def time_plans(training: Training, device: torch.device, count: int = 11) -> float:
    """Seconds that the plan of a batch takes: the median."""
    loader, seconds = training.loader, []
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        clusters = torch.randperm(loader.parts.num_parts, generator=draw)[: loader.batch_size].tolist()
        marks = Marks(device)
        marks.mark()
        loader.batch(clusters)
        marks.mark()
        seconds += marks.seconds()
    return statistics.median(seconds)


def keys_of(curve: str, point: Point, way: str) -> Row:
    """What tells the row of a point from others."""
    return {
        "op": "scale",
        "curve": curve,
        "nodes": point.num_clusters * point.cluster_nodes,
        "features": point.hidden,
        "batch_nodes": point.clusters * point.cluster_nodes,
        "dtype": str(point.dtype).removeprefix("torch."),
        "way": way,
    }


def measure_point(
    point: Point,
    way: str,
    device: torch.device = CPU,
    seconds: float = 1.0,
    epoch_limit: float = 60.0,
    make: Callable[[Point, str, torch.device], Training] = Training,
) -> Row:
    """What a point costs, by column.

    Args:
        point: what to train.
        way: of `WAYS`.
        device: of the layers.
        seconds: that epochs are repeated for.
        epoch_limit: an epoch that would take more seconds is left out: `epoch_s` is None, and steps of its beginning
            are timed for `seconds`.
        make: makes the training.
    """
    training = make(point, way, device)
    loader = training.loader
    # the longest part of the first steps is what every process pays once
    step = statistics.median(time_steps(training, device, WARM_UP))
    is_short = step * len(loader) <= epoch_limit
    spent = 0.0
    steps: list[float] = []
    epochs: list[float] = []
    while not epochs or (is_short and spent < seconds and len(epochs) < 1000):
        found = time_steps(training, device, None if is_short else max(int(seconds / step), WARM_UP))
        steps += found
        epochs.append(sum(found))
        spent += epochs[-1]
    plan = time_plans(training, device)
    # measured last: the profiler that counts on a CPU disturbs what comes after it
    with peak_bytes(device) as peak:
        watched = [(batch.num_nodes, batch.num_halo, batch.num_edges) for batch in training.steps(WATCHED)]
    num_nodes, num_halo, num_edges = map(statistics.mean, zip(*watched, strict=True))
    row: Row = {
        "ms": 1e3 * statistics.median(steps),
        "fastest_ms": 1e3 * min(steps),
        "epoch_s": statistics.median(epochs) if is_short else None,
        "plan_ms": 1e3 * plan,
        "peak_mib": peak.nbytes / 2**20,
        "history_mib": training.histories.nbytes / 2**20,
        "data_mib": training.data_bytes / 2**20,
        "in_batch": num_nodes,
        "halo": num_halo,
        "edges": num_edges,
        "steps": len(steps),
        "epochs": len(epochs) if is_short else 0,
    }
    if device.type == "cuda":
        # the largest since the watched steps began, with all that was there before them
        row["device_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    training.histories.close()
    return row

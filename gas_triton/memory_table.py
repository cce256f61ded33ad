"""Memory of one training step, way by way: full-batch, histories, Cluster-GCN and neighbour sampling.

Table 3 of Fey et al. (ICML 2021), for any graph, model and device.
"""

from __future__ import annotations

import functools
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.datasets import Dataset
from gas_triton.graph import Graph
from gas_triton.history import attach_histories
from gas_triton.history.memories import free_host_bytes, gib
from gas_triton.loader import ClusterLoader
from gas_triton.memory import peak_bytes
from gas_triton.memory_pyg import Edges, missing_for_pyg, missing_for_sampling, sampling_loader, to_pyg
from gas_triton.models import MODELS, Model
from gas_triton.nn.base import HistoryLayer
from gas_triton.partition import Partition, contiguous_partition, metis, random_partition
from gas_triton.receptive_field import Share, share_of, share_of_batch
from gas_triton.sizing import STEP_MODELS, graph_bytes, history_dims, slot_bytes, state_bytes
from gas_triton.sizing_step import BatchSize, StepOptions, plan_bytes, step_bytes
from gas_triton.training import find_device
from gas_triton.training_config import HISTORY_DTYPES

__all__ = ["PARTITIONS", "WAYS", "Row", "compare_memory"]

# The ways, by the name that they have in tables.
WAYS = {
    "full": "full-batch",
    "full-pyg": "full-batch, PyG",
    "histories": "histories",
    "pinned": "histories, pinned",
    "pinned-in-place": "histories, pinned, in place",
    "cluster": "Cluster-GCN",
    "sampling": "neighbour sampling, PyG",
}
FULL = ("full", "full-pyg")
PARTITIONS = ("metis", "random", "contiguous")
_IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One way to train one model: bytes, and the share of the data that a step uses.

    Attributes:
        way: a key of `WAYS`.
        model: a name of `gas_triton.models.MODELS`.
        layers: L.
        hidden: width between layers.
        num_parts: clusters.
        batch_size: clusters of a batch; for "sampling", that of the ways that it is compared with; None for full-batch.
        nodes: rows that a step computes, B; all sampled ones for "sampling". The mean over the steps, as the next two.
        halo: rows that it reads from histories, H.
        edges: edges into them that it reads.
        step_bytes: most bytes allocated at once in a step beyond what stays between steps, the maximum over `steps`
            steps: the plan (or sampled batch), forward, backward, Adam; with "pinned", also the slots of staged rows
            and the plan made ahead.
        predicted_bytes: the same by arithmetic (`gas_triton.sizing`), the maximum over the same batches; None where
            there is none.
        state_bytes: parameters and Adam's moments, on the device.
        graph_bytes: edges, weights and plans that are kept; on the device, for "sampling" on the host.
        feature_bytes: features and targets; on the device, for "sampling" on the host.
        history_bytes: tables of the histories, on `history_tier`.
        history_tier: "device", "pinned", or "" without histories.
        nodes_used: share of the nodes of its field that a step uses (`receptive_field.data_used`); None if not counted.
        edges_used: share of its edges.
        neighbors_used: share of the edges into the targets themselves.
        steps: steps measured.
        seconds: the whole measurement of the row.
        reason: why the way was not measured; empty if it was.
    """

    way: str
    model: str
    layers: int
    hidden: int
    num_parts: int
    batch_size: int | None
    nodes: int = 0
    halo: int = 0
    edges: int = 0
    step_bytes: int | None = None
    predicted_bytes: int | None = None
    state_bytes: int = 0
    graph_bytes: int = 0
    feature_bytes: int = 0
    history_bytes: int = 0
    history_tier: str = ""
    nodes_used: float | None = None
    edges_used: float | None = None
    neighbors_used: float | None = None
    steps: int = 0
    seconds: float = 0.0
    reason: str = ""

    @property
    def device_bytes(self) -> int:
        """What stays on the device between steps."""
        data = 0 if self.way == "sampling" else self.graph_bytes + self.feature_bytes
        return self.state_bytes + data + (self.history_bytes if self.history_tier == "device" else 0)

    @property
    def host_bytes(self) -> int:
        """What stays on the host."""
        data = self.graph_bytes + self.feature_bytes if self.way == "sampling" else 0
        return data + (self.history_bytes if self.history_tier == "pinned" else 0)


def compare_memory(
    dataset: Dataset,
    ways: Sequence[str] = ("full", "full-pyg", "histories", "pinned", "cluster", "sampling"),
    *,
    models: Sequence[str] = ("GCN",),
    layers: Sequence[int] = (2, 3, 4),
    hidden: Sequence[int] = (64,),
    batch_sizes: Sequence[int] = (1,),
    num_parts: int = 40,
    partition: str | Partition = "metis",
    dropout: float = 0.5,
    history_dtype: str = "float32",
    neighbors: int = 10,
    seeds: int | None = None,
    steps: int = 3,
    device: torch.device | str = "cpu",
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    counts_data: bool = True,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measures the memory of a training step for every way, model, depth, width and batch size.

    Every model is trained for one step that does not count, which makes Adam's moments, and then for `steps` steps on
    different batches. Needs torch, triton and NumPy; a way that needs more (PyG, its samplers) gives a row with the
    reason where that is not installed, and so does one that runs out of memory.

    Args:
        dataset: the graph, features and labels.
        ways: keys of `WAYS`.
        models: names of `gas_triton.models.MODELS`.
        layers: numbers of layers.
        hidden: widths between layers.
        batch_sizes: clusters of a batch.
        num_parts: clusters of the partition.
        partition: "metis", "random", "contiguous" (ranges of ids), or a partition of the dataset's graph.
        dropout: on the input of every layer.
        history_dtype: of the tables.
        neighbors: neighbours that "sampling" draws of each node, in every hop.
        seeds: nodes whose outputs a step of "sampling" trains on; if None, as many training nodes as a batch of
            clusters has on average, so that an epoch has as many steps.
        steps: steps measured for each row.
        device: where the models run. On a CPU, bytes are those of torch's allocator too.
        seed: of parameters, dropout and the order of batches.
        cache: folder of METIS partitions.
        counts_data: whether to count the share of the data that is used.
        on_row: called with each row when it is measured.

    Returns:
        The rows, in the order of models, widths, layers, batch sizes and ways.

    Raises:
        ValueError: an unknown name, a number out of range, or a device that is not there.
    """
    device = find_device(device)
    check_arguments(
        ways, models=models, layers=layers, hidden=hidden, batch_sizes=batch_sizes, num_parts=num_parts,
        partition=partition, dropout=dropout, history_dtype=history_dtype, neighbors=neighbors, seeds=seeds,
        steps=steps,
    )  # fmt: skip
    data = _Data(dataset, partition, num_parts, seed, cache, device)
    rows = []
    for model, width, depth in product(models, hidden, layers):
        setting = _Setting(
            data, model, depth, width, dropout, history_dtype, neighbors, seeds, steps, seed, counts_data
        )  # fmt: skip
        for size in (None, *batch_sizes):
            for way in ways:
                if (way in FULL) == (size is None):
                    rows.append(setting.measure(way, size))
                    if on_row is not None:
                        on_row(rows[-1])
    return rows


def check_arguments(
    ways: Sequence[str], *, models: Sequence[str], layers: Sequence[int], hidden: Sequence[int],
    batch_sizes: Sequence[int], num_parts: int, partition: str | Partition, dropout: float, history_dtype: str,
    neighbors: int, seeds: int | None, steps: int,
) -> None:  # fmt: skip
    """Raises ValueError for what `compare_memory` refuses of any dataset, before one is read."""
    for name, given, known in (("ways", ways, WAYS), ("models", models, MODELS)):
        unknown = [value for value in given if value not in known]
        if unknown or not given:
            raise ValueError(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    single = {
        "num_parts": [num_parts],
        "steps": [steps],
        "neighbors": [neighbors],
        "seeds": [1 if seeds is None else seeds],
    }
    counts = {"layers": layers, "hidden": hidden, "batch_sizes": batch_sizes}
    for name, values in {**counts, **single}.items():
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected positive ints, got {value!r}")
        if not values:
            raise ValueError(f"{name}: expected at least one")
    if history_dtype not in HISTORY_DTYPES:
        raise ValueError(f"history_dtype: expected one of {', '.join(HISTORY_DTYPES)}, got {history_dtype!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
    if max(batch_sizes) > num_parts:
        raise ValueError(f"batch_sizes: expected at most num_parts ({num_parts}), got {max(batch_sizes)}")
    if isinstance(partition, str) and partition not in PARTITIONS:
        raise ValueError(f"partition: expected one of {', '.join(PARTITIONS)}, got {partition!r}")


class _Data:
    """The permuted graph and its tensors, and what each model makes of the graph."""

    def __init__(
        self, dataset: Dataset, partition: str | Partition, num_parts: int, seed: int,
        cache: str | os.PathLike[str] | None, device: torch.device,
    ) -> None:  # fmt: skip
        graph = Graph.from_edge_index(dataset.edge_index, num_nodes=dataset.num_nodes)
        self.dataset, self.device = dataset, device
        self.parts = partition if isinstance(partition, Partition) else _cut(graph, partition, num_parts, seed, cache)
        self.graph, self.x, y, self.mask = self.parts.permute(graph, dataset.x, dataset.y, dataset.train_mask)
        is_trained = self.mask if y.dim() == 1 else self.mask[:, None]
        self.target = torch.where(is_trained, y, torch.full_like(y, _IGNORED))
        self._prepared: dict[str, Graph] = {}

    def prepared(self, model: str) -> Graph:
        """The graph as a model expects it, on the device."""
        if model not in self._prepared:
            self._prepared = {model: MODELS[model].prepare(self.graph).to(self.device)}
        return self._prepared[model]


def _cut(graph: Graph, name: str, num_parts: int, seed: int, cache: Any) -> Partition:
    if name == "metis":
        return metis(graph, num_parts, seed, cache)
    if name == "random":
        return random_partition(graph, num_parts, seed)
    ends = [part * graph.num_nodes // num_parts for part in range(num_parts + 1)]
    return contiguous_partition(graph, [last - first for first, last in pairwise(ends)])


@dataclass(frozen=True)
class _Setting:
    """One model on the data."""

    data: _Data
    model: str
    layers: int
    hidden: int
    dropout: float
    history_dtype: str
    neighbors: int
    seeds: int | None
    steps: int
    seed: int
    counts_data: bool

    def measure(self, way: str, batch_size: int | None) -> Row:
        """The row of a way."""
        row = Row(way, self.model, self.layers, self.hidden, self.data.parts.num_parts, batch_size)
        missing = {"full-pyg": missing_for_pyg, "sampling": missing_for_sampling}
        reason = missing[way]() if way in missing else ""
        if reason:
            return replace(row, reason=reason)
        start = time.perf_counter()
        device = self.data.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _quiet():
                torch.manual_seed(self.seed)
                row = {"full": self._full, "full-pyg": self._full_pyg, "sampling": self._sampling}.get(
                    way, self._clusters
                )(row)
        except torch.cuda.OutOfMemoryError:
            row = replace(row, reason=f"out of memory on {device}")
        except (_Unmeasured, MemoryError) as error:
            row = replace(row, reason=str(error))
        finally:
            gc.collect()
        return replace(row, seconds=time.perf_counter() - start)

    # --- ways ---------------------------------------------------------------------------------------------------------

    def _full(self, row: Row) -> Row:
        loader, model = self._loader(1), self._make()
        step = self._step(model)
        batch = loader.full()
        self._check_room(6 * batch.num_nodes * self.hidden * 4)

        def run() -> None:
            step(batch.features, batch, batch.target)

        run()
        size = BatchSize.of(batch, is_planned=False)
        row = self._stays(row, model, kept=batch.node_ids.nbytes + batch.outer.rowptr.nbytes)
        row = self._uses(row, [share_of(self.data.mask, loader.graph, self.layers, self.counts_data)])
        return self._fill(row, self._peak(run, 1), 1, [size], self._predict(model, [size], "device", True))

    def _full_pyg(self, row: Row) -> Row:
        graph = self.data.prepared(self.model)
        model = self._theirs(normalizes=False)
        # messages of all edges, and their products with the weights; some layers transform rows before, some after
        width = self.data.dataset.num_features if self.model in ("SAGE", "GIN") else self.hidden
        self._check_room((1 + (graph.weight is not None)) * graph.num_edges * max(width, self.hidden) * 4)
        edges = Edges(graph.edge_index(), graph.weight, graph.num_nodes)
        x, target = self.data.x.to(self.data.device), self.data.target.to(self.data.device)
        step = self._step(model)

        def run() -> None:
            step(x, edges, target)

        run()
        size = BatchSize(graph.num_nodes, 0, graph.num_edges, 0)
        weights = 0 if edges.edge_weight is None else edges.edge_weight.nbytes
        row = replace(self._stays(row, model), graph_bytes=edges.edge_index.nbytes + weights)
        row = self._uses(row, [share_of(self.data.mask, graph, self.layers, self.counts_data)])
        return self._fill(row, self._peak(run, 1), 1, [size], None)

    def _clusters(self, row: Row) -> Row:
        """Histories, and Cluster-GCN."""
        has_halo, tier = row.way != "cluster", "device" if row.way == "histories" else "pinned"
        loader, model = self._loader(row.batch_size or 1), self._make(has_halo)
        step = self._step(model)
        histories = None
        if has_halo:
            histories = attach_histories(
                model, self.data.graph.num_nodes, tier, HISTORY_DTYPES[self.history_dtype],
                in_place=row.way == "pinned-in-place",
            )  # fmt: skip
        # outside of an epoch, so that no slot is made before its bytes are counted
        self._train(step, loader.batch(list(range(loader.batch_size))))
        loader._planned.clear()
        sizes: list[BatchSize] = []
        shares: list[Share] = []
        batches = iter(loader) if histories is None else histories.prefetch(loader)
        count = min(self.steps, len(loader))

        def run() -> None:
            batch = next(batches)
            sizes.append(BatchSize.of(batch))
            seen.append(batch.clusters)
            self._train(step, batch)
            # plans that are kept count as what stays, once
            loader._planned.clear()

        seen: list[list[int]] = []
        peak = self._peak(run, count, getattr(batches, "close", None))
        for clusters in seen:
            batch = loader.batch(clusters)
            shares.append(share_of_batch(batch, loader.graph, self.data.mask, self.layers, has_halo, self.counts_data))
            loader._planned.clear()
        is_staged = row.way == "pinned"
        has_streams = histories is not None and self.data.device.type == "cuda"
        ahead = 1 if is_staged or has_streams else 0
        predicted = self._predict(model, sizes, tier, has_halo, ahead)
        if predicted is not None and is_staged:
            largest = replace(sizes[0], halo=max(size.halo for size in sizes))
            predicted += slot_bytes(largest, history_dims(model), self.history_dtype)
        kept = 0
        if loader.batch_size == 1:
            options = self._options("device", has_halo)
            kept = sum(plan_bytes(size, options) for size in sizes) * len(loader) // len(sizes)
        row = self._uses(self._stays(row, model, kept), shares)
        if histories is not None:
            row = replace(row, history_bytes=histories.nbytes, history_tier=tier)
            histories.close()
        return self._fill(row, peak, count, sizes, predicted)

    def _sampling(self, row: Row) -> Row:
        data, model = self.data, self._theirs(normalizes=True)
        trained = data.mask.nonzero().squeeze(1)
        steps = -(-data.parts.num_parts // (row.batch_size or 1))
        seeds = self.seeds or -(-trained.numel() // steps)
        fanout = [self.neighbors] * self.layers
        take = sampling_loader(data.graph.edge_index(), data.x, data.target, trained, seeds, fanout, self.seed)
        step, device = self._step(model), data.device
        sampled: list[tuple[Tensor, Tensor]] = []
        sizes: list[BatchSize] = []

        def load() -> Any:
            batch = take()
            sampled.append((batch.e_id, batch.n_id[: batch.batch_size]))
            sizes.append(BatchSize(batch.num_nodes, 0, batch.num_edges, 0))
            return batch

        def run(batch: Any) -> None:
            # sampled on the host, and then a copy for the device, also where both are the CPU
            batch = batch.to(device) if device.type == "cuda" else batch.clone()
            step(batch.x, Edges(batch.edge_index, None, batch.num_nodes), batch.y[: batch.batch_size])

        run(load())
        sampled.clear()
        sizes.clear()
        count = min(self.steps, -(-trained.numel() // seeds))
        peak = 0
        for _ in range(count):
            batch = load()
            peak = max(peak, self._peak(functools.partial(run, batch), 1))
        shares = []
        for edge_ids, targets in sampled:
            mask = torch.zeros(data.graph.num_nodes, dtype=torch.bool)
            mask[targets] = True
            read = torch.zeros(data.graph.num_edges, dtype=torch.bool)
            read[edge_ids] = True
            shares.append(share_of(mask, data.graph, self.layers, self.counts_data, read))
        row = replace(self._stays(row, model), graph_bytes=data.graph.edge_index().nbytes)
        return self._fill(self._uses(row, shares), peak, count, sizes, None)

    # --- parts of them ------------------------------------------------------------------------------------------------

    def _make(self, has_halo: bool = True) -> Model:
        kind, dataset = MODELS[self.model], self.data.dataset
        options = kind.options_of(self.data.prepared(self.model))
        model = kind(
            dataset.num_features, self.hidden, dataset.num_classes, self.layers, dropout=self.dropout, **options
        )
        for module in model.modules():
            if isinstance(module, HistoryLayer):
                module.halo = "read" if has_halo else "drop"
        return model.to(self.data.device)

    def _theirs(self, normalizes: bool) -> nn.Module:
        try:
            return to_pyg(self._make(), normalizes)
        except ValueError as error:
            raise _Unmeasured(str(error)) from error

    def _loader(self, batch_size: int) -> ClusterLoader:
        data = self.data
        return ClusterLoader(
            data.prepared(self.model), data.parts, batch_size, seed=self.seed, x=data.x.to(data.device),
            target=data.target.to(data.device),
        )  # fmt: skip

    def _step(self, model: nn.Module) -> Callable[[Any, Any, Tensor], None]:
        """A training step: forward, loss, backward and Adam."""
        optimizer = torch.optim.Adam(model.parameters())

        def step(x: Any, batch: Any, target: Tensor) -> None:
            out = model(x, batch)
            loss = _loss(out[: target.size(0)], target)
            # the loss has what it needs of it
            del out
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _train(self, step: Callable[[Any, Any, Tensor], None], batch: Batch) -> None:
        step(batch.features, batch, batch.target)

    def _peak(self, run: Callable[[], None], steps: int, close: Callable[[], None] | None = None) -> int:
        with peak_bytes(self.data.device) as peak:
            for _ in range(steps):
                run()
            if close is not None:
                close()
        return peak.nbytes

    def _options(self, tier: str, has_halo: bool, ahead: int = 0) -> StepOptions:
        graph = self.data.prepared(self.model)
        return StepOptions(
            device_type=self.data.device.type, weighted=graph.weight is not None, halo=has_halo,
            history_dtype=self.history_dtype, tier=tier, plans_ahead=ahead, index=graph.col.element_size(),
            symmetric=graph.is_symmetric, label_bytes=self.data.target[0].nbytes,
        )  # fmt: skip

    def _predict(
        self, model: nn.Module, sizes: list[BatchSize], tier: str, has_halo: bool, ahead: int = 0
    ) -> int | None:
        if self.model not in STEP_MODELS:
            return None
        return max(step_bytes(model, size, self._options(tier, has_halo, ahead)) for size in sizes)

    def _stays(self, row: Row, model: nn.Module, kept: int = 0) -> Row:
        graph = self.data.prepared(self.model)
        return replace(
            row,
            state_bytes=state_bytes(model),
            graph_bytes=graph_bytes(graph.num_nodes, graph.num_edges, graph.weight is not None) + kept,
            feature_bytes=self.data.x.nbytes + self.data.target.nbytes,
        )

    def _uses(self, row: Row, shares: list[Share]) -> Row:
        found = [share for share in shares if share is not None]
        if not found:
            return row
        nodes, edges, neighbors = (sum(values) / len(found) for values in zip(*found, strict=True))
        return replace(row, nodes_used=nodes, edges_used=edges, neighbors_used=neighbors)

    def _fill(self, row: Row, peak: int, steps: int, sizes: list[BatchSize], predicted: int | None) -> Row:
        nodes, halo, edges = (
            round(sum(getattr(size, name) for size in sizes) / len(sizes)) for name in ("nodes", "halo", "edges")
        )
        has_halo = row.way in ("histories", "pinned", "pinned-in-place")
        edges = edges if row.way != "cluster" else round(sum(size.inner for size in sizes) / len(sizes))
        return replace(
            row, step_bytes=peak, steps=steps, nodes=nodes, halo=halo * has_halo, edges=edges, predicted_bytes=predicted
        )

    def _check_room(self, nbytes: int) -> None:
        """Refuses what the kernel would end the process for; a GPU says itself that it is full."""
        free = free_host_bytes()
        if self.data.device.type == "cpu" and free is not None and nbytes > free:
            raise _Unmeasured(f"takes more than {gib(nbytes)}, of which the host has {gib(free)} free")


class _Unmeasured(Exception):
    """Why a way cannot be measured."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that a user who asked for this comparison knows: no GPU to pin memory for, and PyG's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _loss(out: Tensor, target: Tensor) -> Tensor:
    """The mean over the targets that are trained on."""
    if target.dim() == 1:
        return F.cross_entropy(out, target, ignore_index=_IGNORED)
    is_label = target != _IGNORED
    loss = F.binary_cross_entropy_with_logits(out, target.clamp(min=0.0), reduction="none")
    return (loss * is_label).sum() / is_label.sum().clamp(min=1)

"""A training loop: one model on one graph, with histories, full-batch, or without out-of-batch neighbours."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gas_triton.batch import Batch
from gas_triton.datasets import Dataset
from gas_triton.graph import Graph
from gas_triton.history import Histories, attach_histories
from gas_triton.inference import inference
from gas_triton.loader import ClusterLoader
from gas_triton.memory import peak_bytes
from gas_triton.models import MODELS, Stack
from gas_triton.nn.base import Halo, HistoryLayer
from gas_triton.partition import metis, random_partition

__all__ = ["HISTORY_DTYPES", "PARTITIONS", "EpochRecord", "Result", "TrainConfig", "find_device", "train"]

PARTITIONS = {"metis": metis, "random": random_partition}
HISTORY_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Models whose layers expect the graph of Kipf and Welling; all others take it as it is.
_NORMALIZED = {"GCN"}
# `F.cross_entropy` leaves rows of this class out.
_IGNORED = -100


@dataclass(frozen=True)
class TrainConfig:
    """What `train` does; together with the dataset it determines the result.

    Attributes:
        model: a name in `gas_triton.models.MODELS`, in any case.
        layers: L.
        hidden: width between layers.
        dropout: probability, on the input of every layer.
        model_options: further arguments of the model (`batch_norm`, `residual`, `linear`, `drop_input`, ...).
        lr: learning rate of Adam.
        weight_decay: of all parameters but the last layer's (`Stack.reg_parameters`).
        weight_decay_last: of the last layer's.
        grad_norm: gradients are scaled down to this norm; None leaves them.
        epochs: epochs to train.
        eval_every: epochs between two evaluations; the last epoch is always evaluated.
        num_parts: clusters of the partition.
        batch_size: clusters of a batch.
        partition: "metis" or "random".
        partition_seed: seed of the partition, apart from `seed` so that runs can share one.
        full_batch: trains on the whole graph at once; the partition then only orders the rows.
        histories: False leaves out-of-batch neighbours out while training (Cluster-GCN, Chiang et al., KDD 2019).
        history_dtype: storage dtype of the histories: float32, bfloat16 or float16.
        host_features: keeps x in host memory, so that each batch copies the rows it reads to the device.
        max_steps: most batches of an epoch; None takes all.
        seed: of the parameters, the dropout masks and the order of the batches.

    Raises:
        ValueError: an unknown model, partition or dtype, or a number out of range.
    """

    model: str = "GCN"
    layers: int = 2
    hidden: int = 64
    dropout: float = 0.5
    model_options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.01
    weight_decay: float = 0.0
    weight_decay_last: float = 0.0
    grad_norm: float | None = None
    epochs: int = 100
    eval_every: int = 1
    num_parts: int = 40
    batch_size: int = 10
    partition: str = "metis"
    partition_seed: int = 0
    full_batch: bool = False
    histories: bool = True
    history_dtype: str = "float32"
    host_features: bool = False
    max_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known: dict[str, Iterable[str]] = {"model": MODELS, "partition": PARTITIONS, "history_dtype": HISTORY_DTYPES}
        for name, choices in known.items():
            given = getattr(self, name)
            spelling = {choice.lower(): choice for choice in choices}
            if not isinstance(given, str) or given.lower() not in spelling:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {given!r}")
            object.__setattr__(self, name, spelling[given.lower()])
        for name in ("layers", "hidden", "epochs", "eval_every", "num_parts", "batch_size", "max_steps"):
            count = getattr(self, name)
            if count is None and name == "max_steps":
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} must be a positive int, got {count!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("lr", "weight_decay", "weight_decay_last", "grad_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: counted from 1.
        train_loss: mean over the training nodes, each at the step that trained on it.
        seconds: of the training steps, evaluation excluded.
        val_acc: accuracy (micro-F1 for multi-label data) of the validation nodes in [0, 1]; None if not evaluated.
        test_acc: of the test nodes.
    """

    epoch: int
    train_loss: float
    seconds: float
    val_acc: float | None = None
    test_acc: float | None = None


@dataclass
class Result:
    """What a run reached; None where it ended before there was a value.

    Attributes:
        test_acc: accuracy (micro-F1 for multi-label data) of the test nodes at `best_epoch`, in [0, 1].
        val_acc: of the validation nodes there.
        best_epoch: the first evaluated epoch with the highest `val_acc`.
        train_loss: of the last epoch.
        epoch_seconds: median over the epochs, without the first if there are more: it is slower, because kernels are
            compiled and memory is measured.
        peak_bytes: most bytes that a training step allocates at once beyond what stays allocated between steps (graph,
            features, parameters, optimizer state, histories), over the steps of the first epoch; see
            `gas_triton.memory.peak_bytes`.
        history_bytes: of the history tables.
        num_parameters: trained values of the model.
        interrupted: whether Ctrl-C ended the run.
        epochs: a record for each epoch that was completed.
    """

    test_acc: float | None = None
    val_acc: float | None = None
    best_epoch: int | None = None
    train_loss: float | None = None
    epoch_seconds: float | None = None
    peak_bytes: int | None = None
    history_bytes: int | None = None
    num_parameters: int | None = None
    interrupted: bool = False
    epochs: list[EpochRecord] = field(default_factory=list)

    def add(self, record: EpochRecord) -> None:
        """Takes an epoch into account."""
        self.epochs.append(record)
        self.train_loss = record.train_loss
        self.epoch_seconds = statistics.median([r.seconds for r in self.epochs][min(1, len(self.epochs) - 1) :])
        if record.val_acc is not None and (self.val_acc is None or record.val_acc > self.val_acc):
            self.val_acc, self.test_acc, self.best_epoch = record.val_acc, record.test_acc, record.epoch


def train(
    dataset: Dataset,
    config: TrainConfig,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    *,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | None = None,
) -> Result:
    """Trains a model on a dataset and reports the test accuracy at the best validation epoch.

    A step computes a batch of clusters, reads the halo from histories and takes the mean loss of the batch's training
    nodes (Fey et al., ICML 2021, algorithm 1; hyper-parameters as in PyGAS). A batch without training nodes only
    refreshes its rows of the histories. Evaluation reads no history: every neighbour is fresh.

    The same arguments give the same numbers (times excepted), whatever state torch's generators are in, and the
    generators are left as they were. Ctrl-C ends the run after the last completed epoch.

    Args:
        dataset: the graph, its features, labels and split.
        config: the model and how to train it.
        on_epoch: called after each epoch.
        device: where the graph, the model and the histories live.
        cache: folder that keeps METIS partitions; None computes anew.

    Returns:
        What was reached.

    Raises:
        ValueError: more parts than nodes, a mask of the split without a node, or a device that is not there.
    """
    device = find_device(device)
    with _seeded(config.seed, device):
        run = _Run(dataset, config, device, cache)
        num_parameters = sum(p.numel() for p in run.model.parameters())
        result = Result(num_parameters=num_parameters, history_bytes=run.histories.nbytes)
        try:
            for epoch in range(1, config.epochs + 1):
                record, peak = run.epoch(epoch)
                if result.peak_bytes is None:
                    result.peak_bytes = peak
                result.add(record)
                if on_epoch is not None:
                    on_epoch(record)
        except KeyboardInterrupt:
            result.interrupted = True
        return result


class _Run:
    """The state of a run."""

    def __init__(
        self, dataset: Dataset, config: TrainConfig, device: torch.device, cache: str | os.PathLike[str] | None
    ) -> None:
        self.config, self.device, self.multi_label = config, device, dataset.multi_label
        for name in ("train_mask", "val_mask", "test_mask"):
            if not bool(getattr(dataset, name).any()):
                raise ValueError(f"{name} of {dataset.name} must select a node, got none")
        self.loader, train_mask = _make_loader(dataset, config, device, cache)
        before = torch.cat([train_mask.new_zeros(1, dtype=torch.int64), train_mask.cumsum(0)])
        # known on the host, so that no step waits for the device to count
        self.labelled: list[int] = before[self.loader.parts.ptr].diff().tolist()
        self.model: Stack = MODELS[config.model](
            dataset.num_features, config.hidden, dataset.num_classes, config.layers, dropout=config.dropout,
            **config.model_options,
        ).to(device)  # fmt: skip
        self.histories = Histories({})
        self.full: Batch | None = None
        if config.full_batch:
            self.full = self.loader.full()
        elif config.histories:
            self.histories = attach_histories(self.model, dataset.num_nodes, dtype=HISTORY_DTYPES[config.history_dtype])
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.model.reg_parameters, "weight_decay": config.weight_decay},
                {"params": self.model.nonreg_parameters, "weight_decay": config.weight_decay_last},
            ],
            lr=config.lr,
        )

    def epoch(self, epoch: int) -> tuple[EpochRecord, int]:
        """The record of an epoch, and the most bytes of a step, which only the first epoch measures."""
        self.model.train()
        self._set_halo("read" if self.config.histories else "drop")
        loss, seconds, peak = self._train_epoch(measure=epoch == 1)
        self._set_halo("read")
        record = EpochRecord(epoch, loss, seconds)
        if epoch % self.config.eval_every == 0 or epoch == self.config.epochs:
            val_acc, test_acc = self._evaluate()
            record = EpochRecord(epoch, loss, seconds, val_acc, test_acc)
        return record, peak

    def _train_epoch(self, measure: bool) -> tuple[float, float, int]:
        total, count, peak = torch.zeros((), device=self.device), 0, 0
        batches, num_steps = self._batches()
        start = time.perf_counter()
        for _ in range(num_steps):
            # the plan of a batch is made when it is asked for, and is part of what a step needs
            with peak_bytes(self.device) if measure else nullcontext() as step:
                batch = next(batches)
                num_labelled = self._num_labelled(batch)
                loss = self._step(batch, num_labelled)
                del batch
            if loss is not None:
                total += loss * num_labelled
                count += num_labelled
            if step is not None:
                peak = max(peak, step.nbytes)
        mean = float(total) / count if count else math.nan
        return mean, time.perf_counter() - start, peak

    def _batches(self) -> tuple[Iterator[Batch], int]:
        """The batches of an epoch, and how many of them to take."""
        if self.full is not None:
            return iter([self.full]), 1
        return self.histories.prefetch(self.loader), min(len(self.loader), self.config.max_steps or len(self.loader))

    def _num_labelled(self, batch: Batch) -> int:
        return sum(self.labelled) if batch is self.full else sum(self.labelled[cluster] for cluster in batch.clusters)

    def _step(self, batch: Batch, num_labelled: int) -> Tensor | None:
        """The loss of a batch before the step that it takes, None if it has no training node."""
        if num_labelled == 0:
            with torch.no_grad():
                self._forward(self.model, batch)
            return None
        loss = self._loss(self._forward(self.model, batch), batch.target, num_labelled)
        loss.backward()
        if self.config.grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _loss(self, out: Tensor, target: Tensor, num_labelled: int) -> Tensor:
        """Mean over the training nodes, which `target` marks: to select their rows would wait for the device."""
        if not self.multi_label:
            return F.cross_entropy(out, target, ignore_index=_IGNORED)
        is_label = target != _IGNORED
        loss = F.binary_cross_entropy_with_logits(out, target.clamp(min=0.0), reduction="none")
        return (loss * is_label).sum() / (num_labelled * target.size(1))

    def _forward(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        return model(batch.x if self.config.host_features else batch.features, batch)

    def _evaluate(self) -> tuple[float, float]:
        """(validation, test) accuracy."""
        if self.full is None:
            logits = inference(self.model, self.loader, self._forward)
        else:
            self.model.eval()
            with torch.no_grad():
                logits = self._forward(self.model, self.full)
        tensors = self.loader.node_tensors
        score = _micro_f1 if self.multi_label else _accuracy
        scores = [score(logits[tensors[mask]], tensors["y"][tensors[mask]]) for mask in ("val_mask", "test_mask")]
        val_acc, test_acc = torch.stack(scores).tolist()
        return val_acc, test_acc

    def _set_halo(self, halo: Halo) -> None:
        for module in self.model.modules():
            if isinstance(module, HistoryLayer):
                module.halo = halo


def _make_loader(
    dataset: Dataset, config: TrainConfig, device: torch.device, cache: str | os.PathLike[str] | None
) -> tuple[ClusterLoader, Tensor]:
    """The batches on `device`, and the training mask in their order on the CPU."""
    graph = Graph.from_edge_index(dataset.edge_index, num_nodes=dataset.num_nodes)
    # before loops are added, so that all models share a cached partition
    if config.partition == "metis":
        parts = metis(graph, config.num_parts, config.partition_seed, cache)
    else:
        parts = random_partition(graph, config.num_parts, config.partition_seed)
    graph, x, y, train_mask, val_mask, test_mask = parts.permute(
        graph, dataset.x, dataset.y, dataset.train_mask, dataset.val_mask, dataset.test_mask
    )
    if config.model in _NORMALIZED:
        graph = graph.add_self_loops().gcn_norm()
    is_trained = train_mask if y.dim() == 1 else train_mask[:, None]
    target = torch.where(is_trained, y, torch.full_like(y, _IGNORED))
    x = x if config.host_features else x.to(device)
    loader = ClusterLoader(
        graph.to(device), parts, config.batch_size, seed=config.seed, x=x, y=y.to(device), target=target.to(device),
        val_mask=val_mask.to(device), test_mask=test_mask.to(device),
    )  # fmt: skip
    return loader, train_mask


def find_device(device: torch.device | str) -> torch.device:
    """The device with its index; ValueError, with the known ones, where this machine has no such device."""
    known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is not None and found.type == "cuda" and found.index is None and len(known) > 1:
        found = torch.device("cuda", torch.cuda.current_device())
    if found is None or str(found) not in known:
        raise ValueError(f"device must be one of {', '.join(known)} on this machine, got {str(device)!r}")
    return found


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the generators of the CPU and of `device`, and puts them back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == y).double().mean()


def _micro_f1(logits: Tensor, y: Tensor) -> Tensor:
    predicted, actual = logits > 0, y > 0.5
    hits = (predicted & actual).sum().double()
    wrong = (predicted != actual).sum()
    return 2 * hits / (2 * hits + wrong).clamp(min=1)

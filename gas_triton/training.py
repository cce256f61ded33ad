"""A training loop: one model on one graph, with histories, full-batch, or without out-of-batch neighbours."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gas_triton.batch import Batch
from gas_triton.checkpoint import lock_folder
from gas_triton.compensation import Compensated
from gas_triton.datasets import Dataset
from gas_triton.diagnostics import Diagnosis, diagnose
from gas_triton.functional import SparseRows
from gas_triton.graph import Graph
from gas_triton.history import Histories, attach_histories
from gas_triton.inference import filling_histories, inference
from gas_triton.loader import ClusterLoader
from gas_triton.memory import peak_bytes
from gas_triton.models import MODELS, Model
from gas_triton.nn.base import Halo, HistoryLayer
from gas_triton.partition import metis, random_partition
from gas_triton.regularization import LipschitzPenalty
from gas_triton.scores import accuracy, micro_f1
from gas_triton.static import use_static_rows
from gas_triton.training_checkpoint import Saver, identity
from gas_triton.training_config import (
    HISTORY_DTYPES,
    PARTITIONS,
    EpochRecord,
    Result,
    TrainConfig,
    check_diagnosed,
)
from gas_triton.training_trace import check_output, trace

__all__ = [
    "HISTORY_DTYPES",
    "PARTITIONS",
    "EpochRecord",
    "Result",
    "TrainConfig",
    "check_output",
    "find_device",
    "train",
]

# `F.cross_entropy` leaves rows of this class out.
_IGNORED = -100


def train(
    dataset: Dataset,
    config: TrainConfig,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    *,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
    profile: str | os.PathLike[str] | None = None,
    measure_memory: bool = True,
    say: Callable[[str], None] | None = None,
    on_diagnose: Callable[[int, Diagnosis], None] | None = None,
    diagnose_every: int = 10,
    diagnose_gradients: bool = False,
) -> Result:
    """Trains a model on a dataset and reports the test accuracy at the best validation epoch.

    A step computes a batch of clusters, reads the halo from histories and takes the mean loss of the batch's training
    nodes (Fey et al., ICML 2021, algorithm 1; hyper-parameters as in PyGAS, see `gas_triton.presets`). A batch without
    training nodes only refreshes its rows of the histories. Evaluation reads no history: every neighbour is fresh.

    The same arguments give the same numbers (times excepted), whatever state torch's generators are in, and the
    generators are left as they were. So does a run that ended early and was resumed, with any number of `epochs`: an
    evaluation that `eval_every` does not ask for, made because the epoch was the last, is then left out of the result.

    Ctrl-C ends the run after the last completed epoch. Within an epoch it leaves the newest checkpoint as it is: the
    model and the tables have changed since the last epoch ended.

    Args:
        dataset: the graph, its features, labels and split.
        config: the model and how to train it.
        on_epoch: called after each epoch that this call trains.
        device: where the graph and the model live.
        cache: folder that keeps METIS partitions; None computes anew.
        checkpoint: folder for a checkpoint, which a later one replaces (see `gas_triton.checkpoint`); None keeps none.
        checkpoint_every: epochs between two checkpoints; the last epoch always makes one.
        resume: goes on from the checkpoint, or starts from the beginning where there is none.
        profile: file for a trace of the second epoch that this call trains (of the first if there is only one), which
            chrome://tracing and Perfetto show. A single epoch on a CPU is traced instead of measured: `peak_bytes` is
            None.
        measure_memory: False leaves `peak_bytes` None: to measure it on a CPU takes as long as some ten epochs of a
            deep model.
        say: called with lines about where the run starts and where its histories live.
        on_diagnose: called with the epoch and what `gas_triton.diagnose` finds after its last step, before an
            evaluation can fill the histories; changes no number of the run.
        diagnose_every: epochs between two of these calls.
        diagnose_gradients: compares gradients too, for which the whole graph has to fit in memory as one batch.

    Returns:
        What was reached, by the epochs before a resume too.

    Raises:
        ValueError: more parts than nodes, a mask of the split without a node, a device that is not there, a checkpoint
            where `resume` was not asked for, or one of another config or other data.
        OSError: a checkpoint cannot be saved; the one before it is intact.
    """
    device = find_device(device)
    if not isinstance(checkpoint_every, int) or isinstance(checkpoint_every, bool) or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be a positive int, got {checkpoint_every!r}")
    if resume and checkpoint is None:
        raise ValueError("resume needs checkpoint, the folder to resume from, got None")
    if profile is not None:
        check_output("profile", Path(profile))
    if on_diagnose is not None:
        check_diagnosed(config, diagnose_every)
    say = say or (lambda line: None)
    with ExitStack() as stack:
        stack.enter_context(_seeded(config.seed, device))
        saver = None
        if checkpoint is not None:
            stack.enter_context(lock_folder(checkpoint))
            saver = Saver(Path(checkpoint), checkpoint_every, identity(dataset, config, device))
            saver.open(config, resume, say)
            if saver.epoch == config.epochs:
                if profile is not None:
                    say(f"no epoch is left to trace: {profile} was not written")
                return saver.result(config)
        run = _Run(dataset, config, device, cache, resume)
        stack.callback(run.close)
        if resume and saver is not None and saver.epoch == 0:
            # a folder may hold the tables of a run that ended before it saved
            run.histories.reset()
        result = Result() if saver is None else saver.restore(run)
        result.num_parameters = sum(p.numel() for p in run.model.parameters())
        result.history_bytes = run.histories.nbytes
        reads_all = (config.histories or config.full_batch) and config.edge_dropout == 0.0
        if config.static_first_layer and reads_all:
            result.static_bytes = run.use_static_rows(say)
        if run.histories and config.history_tier != "device":
            say(run.histories.summary())
        first = len(result.epochs) + 1
        if first == 1:
            run.fill_histories()
        traced = None if profile is None else min(first + 1, config.epochs)
        try:
            for epoch in range(first, config.epochs + 1):
                # on a CPU both are torch's profiler, which runs once at a time
                is_profiled = epoch == traced and device.type == "cpu"
                measure = measure_memory and result.peak_bytes is None and not is_profiled
                look = None
                if on_diagnose is not None and epoch % diagnose_every == 0:
                    look = partial(run.diagnose, diagnose_gradients)
                with nullcontext() if profile is None or epoch != traced else trace(profile, device):
                    record, peak = run.epoch(epoch, measure, look)
                result.peak_bytes = peak if measure else result.peak_bytes
                result.add(record)
                if saver is not None:
                    saver.save_after_epoch(run, result)
                if on_epoch is not None:
                    on_epoch(record)
                if on_diagnose is not None and run.diagnosis is not None:
                    on_diagnose(epoch, run.diagnosis)
        except KeyboardInterrupt:
            result.interrupted = True
            if saver is not None and run.begun == len(result.epochs) > saver.epoch:
                with suppress(KeyboardInterrupt):
                    saver.save(run, result)
        result.transfers = run.transfers()
        return result


class _Run:
    """The state of a run."""

    def __init__(
        self,
        dataset: Dataset,
        config: TrainConfig,
        device: torch.device,
        cache: str | os.PathLike[str] | None,
        resume: bool = False,
    ) -> None:
        self.config, self.device, self.multi_label = config, device, dataset.multi_label
        for name in ("train_mask", "val_mask", "test_mask"):
            if not bool(getattr(dataset, name).any()):
                raise ValueError(f"{name} of {dataset.name} must select a node, got none")
        self.loader, train_mask = _make_loader(dataset, config, device, cache)
        before = torch.cat([train_mask.new_zeros(1, dtype=torch.int64), train_mask.cumsum(0)])
        # known on the host, so that no step waits for the device to count
        self.labelled: list[int] = before[self.loader.parts.ptr].diff().tolist()
        num_batches = 1 if config.full_batch else len(self.loader)
        self.mean_labelled = sum(self.labelled) / num_batches
        self.model = _make_model(dataset, config, self.loader.graph).to(device)
        self.penalty = None
        if config.lipschitz > 0.0:
            self.penalty = LipschitzPenalty(self.model, config.lipschitz, config.lipschitz_noise)
        self.histories = Histories({})
        self.full: Batch | None = None
        if config.full_batch:
            self.full = self.loader.full()
        elif config.histories:
            self.histories = attach_histories(
                self.model, dataset.num_nodes, config.history_tier, HISTORY_DTYPES[config.history_dtype],
                nonfinite=config.nonfinite, path=config.history_folder,
                reopen=resume and config.history_folder is not None, gradients=config.compensation == "lmc",
            )  # fmt: skip
        # what a training step calls
        self.trained: Callable[..., Tensor] = self.model
        if config.compensates:
            gradients = config.compensation == "lmc"
            self.trained = Compensated(self.model, self.loader, config.halo_momentum, gradients)
        self.begun = 0
        self.diagnosis: Diagnosis | None = None
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.model.reg_parameters, "weight_decay": config.weight_decay},
                {"params": self.model.nonreg_parameters, "weight_decay": config.weight_decay_last},
            ],
            lr=config.lr,
        )

    def use_static_rows(self, say: Callable[[str], None]) -> int:
        """Bytes of the features that are aggregated once, for the first layer."""
        nbytes = use_static_rows(self.model, self.loader, say)
        if self.full is not None:
            self.full = self.loader.full()
        return nbytes

    def epoch(
        self, epoch: int, measure: bool = False, look: Callable[[], Diagnosis] | None = None
    ) -> tuple[EpochRecord, int]:
        """The record of an epoch, and the most bytes of a step if that is measured.

        `look` is called between training and evaluation; `diagnosis` keeps what it finds.
        """
        self.begun = epoch
        self.model.train()
        self._set_halo("read" if self.config.histories else "drop")
        with torch.profiler.record_function("train"):
            loss, seconds, peak = self._train_epoch(measure)
        self._set_halo("read")
        with torch.profiler.record_function("diagnose"):
            self.diagnosis = None if look is None else look()
        record = EpochRecord(epoch, loss, seconds)
        is_due = epoch % self.config.eval_every == 0
        if is_due or epoch == self.config.epochs:
            with torch.profiler.record_function("evaluate"):
                # one that is only made because the epoch is the last must not change a run that goes on
                val_acc, test_acc = self._evaluate(fills_histories=is_due)
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
        batches = self.histories.prefetch(self.loader, order=self.config.prefetch_order)
        return batches, min(len(self.loader), self.config.max_steps or len(self.loader))

    def _num_labelled(self, batch: Batch) -> int:
        return sum(self.labelled) if batch is self.full else sum(self.labelled[cluster] for cluster in batch.clusters)

    def _step(self, batch: Batch, num_labelled: int) -> Tensor | None:
        """The loss of a batch before the step that it takes, None if it has no training node."""
        batch = batch.drop_edges(self.config.edge_dropout)
        keeps_gradients = self.config.compensation == "lmc"
        if num_labelled == 0 and not keeps_gradients:
            with torch.no_grad():
                self._forward(self.trained, batch)
            return None
        out = self._forward(self.trained, batch)
        loss = self._loss(out, batch.target, num_labelled) if num_labelled > 0 else 0.0 * out.sum()
        # the loss has what it needs of it
        del out
        self._objective(loss, num_labelled).backward()
        if self.config.grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach() if num_labelled > 0 else None

    def _objective(self, loss: Tensor, num_labelled: int) -> Tensor:
        """What a step minimises: the loss with the weight of its batch, and the penalty."""
        # gradients that are kept need the same unit in every batch
        if self.config.loss_weighting == "node" or self.config.compensation == "lmc":
            loss = loss * (num_labelled / self.mean_labelled)
        return loss if self.penalty is None else loss + self.penalty()

    def _loss(self, out: Tensor, target: Tensor, num_labelled: int) -> Tensor:
        """Mean over the training nodes, which `target` marks: to select their rows would wait for the device."""
        if not self.multi_label:
            return F.cross_entropy(out, target, ignore_index=_IGNORED)
        is_label = target != _IGNORED
        loss = F.binary_cross_entropy_with_logits(out, target.clamp(min=0.0), reduction="none")
        return (loss * is_label).sum() / (num_labelled * target.size(1))

    def _forward(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        return model(batch.x if self.config.host_features and not self.loader.static else batch.features, batch)

    def _logits(self, fills_histories: bool) -> Tensor:
        """[N, C] of the model as it is; histories are filled only where the config says so too."""
        fills = fills_histories and self.config.fill_histories and bool(self.histories)
        if self.full is None and not self.config.full_evaluation:
            return inference(self.model, self.loader, self._forward, fill_histories=fills)
        self.model.eval()
        with torch.no_grad(), filling_histories(self.model) if fills else nullcontext():
            return self._forward(self.model, self.full or self.loader.full())

    def fill_histories(self) -> None:
        """Fills the histories by an evaluation, where the config says so."""
        if self.config.fill_histories and self.histories:
            self._logits(fills_histories=True)

    def diagnose(self, gradients: bool = False) -> Diagnosis:
        """What `gas_triton.diagnose` finds; the loss is the mean over all training nodes."""
        total = sum(self.labelled)

        def loss(out: Tensor, batch: Batch) -> Tensor:
            count = int((batch.target != _IGNORED).sum()) // (1 if batch.target.dim() == 1 else batch.target.size(1))
            return self._loss(out, batch.target, count) * (count / total) if count else 0.0 * out.sum()

        return diagnose(self.model, self.loader, self._forward, loss=loss if gradients else None)

    def _evaluate(self, fills_histories: bool = False) -> tuple[float, float]:
        """(validation, test) accuracy."""
        logits = self._logits(fills_histories)
        tensors = self.loader.node_tensors
        score = micro_f1 if self.multi_label else accuracy
        scores = [score(logits[tensors[mask]], tensors["y"][tensors[mask]]) for mask in ("val_mask", "test_mask")]
        val_acc, test_acc = torch.stack(scores).tolist()
        return val_acc, test_acc

    def transfers(self) -> dict[str, Any] | None:
        """What the histories copied, None where layers read and write them in place."""
        stats = self.histories.transfer_stats()
        return stats if stats["pushes"] else None

    def close(self) -> None:
        """Gives back what the histories hold besides memory."""
        self.histories.close()

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
    graph = MODELS[config.model].prepare(graph)
    is_trained = train_mask if y.dim() == 1 else train_mask[:, None]
    target = torch.where(is_trained, y, torch.full_like(y, _IGNORED))
    if config.sparse_features:
        x = SparseRows.of(x)
    x = x if config.host_features else x.to(device)
    loader = ClusterLoader(
        graph.to(device), parts, config.batch_size, seed=config.seed, x=x, y=y.to(device), target=target.to(device),
        val_mask=val_mask.to(device), test_mask=test_mask.to(device),
    )  # fmt: skip
    return loader, train_mask


def _make_model(dataset: Dataset, config: TrainConfig, graph: Graph) -> Model:
    kind = MODELS[config.model]
    options = {**kind.options_of(graph), **config.model_options}
    try:
        return kind(
            dataset.num_features, config.hidden, dataset.num_classes, config.layers, dropout=config.dropout, **options
        )
    except TypeError as error:
        # an unknown name, or a value of another type
        raise ValueError(f"model_options {dict(config.model_options)} do not suit {config.model}: {error}") from error


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

"""What `train` is told, and what it gives back."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gas_triton.functional.dropout import check_probability
from gas_triton.history.staging import ORDERS, Order
from gas_triton.history.store import NONFINITE, Nonfinite
from gas_triton.history.tiers import TIERS
from gas_triton.models import MODELS
from gas_triton.partition import metis, random_partition

__all__ = ["HISTORY_DTYPES", "LOSS_WEIGHTINGS", "PARTITIONS", "EpochRecord", "Result", "TrainConfig"]

LOSS_WEIGHTINGS = ("batch", "node")
PARTITIONS = {"metis": metis, "random": random_partition}
HISTORY_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8,
}  # fmt: skip


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
        edge_dropout: probability with which a training step leaves an edge out (`Batch.drop_edges`).
        lipschitz: strength of the penalty on layers that amplify noise (`gas_triton.regularization.LipschitzPenalty`),
            of all layers but the first; 0 for none.
        lipschitz_noise: deviation of that noise.
        loss_weighting: "batch" takes the mean loss of a batch's training nodes, whatever their number (as PyGAS);
            "node" multiplies it by their number over the mean number in a batch, so that every training node counts the
            same in an epoch.
        epochs: epochs to train.
        full_evaluation: evaluates the whole graph at once, in the memory of full-batch inference, instead of layer by
            layer; the numbers are the same.
        fill_histories: an evaluation before the first epoch, and every later one, pushes the rows that it computes to
            the histories, as PyGAS does; False leaves them to training.
        sparse_features: keeps the features as `SparseRows`, for bags of words: the first linear layer of every
            model but GIN then reads only what is not zero.
        eval_every: epochs between two evaluations; the last epoch is always evaluated.
        num_parts: clusters of the partition.
        batch_size: clusters of a batch.
        partition: "metis" or "random".
        partition_seed: seed of the partition, apart from `seed` so that runs can share one.
        full_batch: trains on the whole graph at once; the partition then only orders the rows.
        histories: False leaves out-of-batch neighbours out while training (Cluster-GCN, Chiang et al., KDD 2019).
        history_dtype: storage dtype of the histories: float32, bfloat16, float16 or int8.
        history_tier: where the tables live: "device", "pinned" (host memory), "file", or "auto".
        history_folder: where the files of tier "file" (or "auto") are made.
        nonfinite: what a NaN or Inf that is pushed to a history does: "raise", "warn", "skip" or "allow".
        halo_momentum: weight of halo rows computed in the step against those of the histories, in [0, 1]; see
            `gas_triton.compensation`: gamma of GraphFM-OB, or beta of LMC.
        compensation: "lmc" adds the gradients that reach a batch through its halo, "none" leaves them out.
        prefetch_order: "strict" reads what the batch before has pushed, "stale" what was there before that.
        host_features: keeps x in host memory, so that each batch copies the rows it reads to the device.
        static_first_layer: aggregates the features for the first layer once, where it reads the same in every step (no
            dropout of its input) and memory has room; the numbers are those without it, up to rounding.
        max_steps: most batches of an epoch; None takes all.
        seed: of the parameters, the dropout masks and the order of the batches.

    Raises:
        TypeError: `model_options` is not a mapping from names.
        ValueError: an unknown name, a number out of range, a `history_folder` for a tier without files, or a penalty on
            a single layer.
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
    edge_dropout: float = 0.0
    lipschitz: float = 0.0
    lipschitz_noise: float = 0.1
    loss_weighting: str = "batch"
    epochs: int = 100
    eval_every: int = 1
    full_evaluation: bool = False
    fill_histories: bool = False
    sparse_features: bool = False
    num_parts: int = 40
    batch_size: int = 10
    partition: str = "metis"
    partition_seed: int = 0
    full_batch: bool = False
    histories: bool = True
    history_dtype: str = "float32"
    history_tier: str = "device"
    history_folder: str | None = None
    nonfinite: Nonfinite = "raise"
    halo_momentum: float = 0.0
    compensation: str = "none"
    prefetch_order: Order = "strict"
    host_features: bool = False
    static_first_layer: bool = True
    max_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known: dict[str, Iterable[str]] = {
            "model": MODELS, "partition": PARTITIONS, "history_dtype": HISTORY_DTYPES, "history_tier": TIERS,
            "nonfinite": NONFINITE, "prefetch_order": ORDERS, "loss_weighting": LOSS_WEIGHTINGS,
            "compensation": ("none", "lmc"),
        }  # fmt: skip
        for name, choices in known.items():
            given = getattr(self, name)
            spelling = {choice.lower(): choice for choice in choices}
            if not isinstance(given, str) or given.lower() not in spelling:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {given!r}")
            object.__setattr__(self, name, spelling[given.lower()])
        if self.history_folder is not None:
            object.__setattr__(self, "history_folder", os.fspath(self.history_folder))
            if not self.history_folder:
                raise ValueError("history_folder must name a folder, got ''")
            if self.history_tier not in ("file", "auto"):
                raise ValueError(f"history_folder is for history_tier 'file' or 'auto', got {self.history_tier!r}")
        if self.prefetch_order == "stale" and self.history_tier not in ("pinned", "file"):
            raise ValueError(
                f"prefetch_order 'stale' is for history_tier 'pinned' or 'file', got {self.history_tier!r}: tables on "
                "the device are read in place, always fresh"
            )
        for name in ("layers", "hidden", "epochs", "eval_every", "num_parts", "batch_size", "max_steps"):
            count = getattr(self, name)
            if count is None and name == "max_steps":
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} must be a positive int, got {count!r}")
        if not 0.0 <= self.halo_momentum <= 1.0:
            raise ValueError(f"halo_momentum must be in [0, 1], got {self.halo_momentum}")
        if self.compensates and (self.full_batch or not self.histories):
            raise ValueError("halo_momentum and compensation are for training with histories, not for full_batch")
        if self.compensates and self.layers < 2:
            raise ValueError(f"halo_momentum and compensation are for models of at least 2 layers, got {self.layers}")
        if self.compensates and (self.edge_dropout > 0.0 or self.lipschitz > 0.0):
            raise ValueError("halo_momentum and compensation do not go together with edge_dropout or lipschitz")
        if self.compensates and self.sparse_features:
            raise ValueError("halo_momentum and compensation read dense features, not sparse_features")
        for name in ("dropout", "edge_dropout"):
            check_probability(name, getattr(self, name))
        for name in ("lr", "weight_decay", "weight_decay_last", "grad_norm", "lipschitz"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if not (math.isfinite(self.lipschitz_noise) and self.lipschitz_noise > 0.0):
            raise ValueError(f"lipschitz_noise must be a finite number above 0, got {self.lipschitz_noise}")
        if self.lipschitz > 0.0 and self.layers < 2:
            raise ValueError(f"lipschitz is for models of at least 2 layers, got layers {self.layers}")
        if not isinstance(self.model_options, Mapping) or not all(isinstance(name, str) for name in self.model_options):
            raise TypeError(f"model_options must be a mapping from names to values, got {self.model_options!r}")

    @property
    def compensates(self) -> bool:
        """Whether a training step computes halo rows too."""
        return self.halo_momentum > 0.0 or self.compensation != "none"


def check_diagnosed(config: TrainConfig, every: int) -> None:
    """Raises ValueError for a run without histories, which has nothing to diagnose."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"diagnose_every must be a positive int, got {every!r}")
    way = "full_batch" if config.full_batch else "histories=False" if not config.histories else None
    way = "a model of one layer" if way is None and config.layers < 2 else way
    if way is not None:
        raise ValueError(f"diagnose needs a run with histories, got {way}")


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: counted from 1.
        train_loss: mean over the training nodes, each at the step that trained on it, without penalties.
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
        static_bytes: of the features aggregated for the first layer, 0 if they are not.
        num_parameters: trained values of the model.
        transfers: what was copied between the histories and the device, as `Histories.transfer_stats` says; of this
            call only, where a run was resumed.
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
    static_bytes: int | None = None
    num_parameters: int | None = None
    transfers: dict[str, Any] | None = None
    interrupted: bool = False
    epochs: list[EpochRecord] = field(default_factory=list)

    def add(self, record: EpochRecord) -> None:
        """Takes an epoch into account."""
        self.epochs.append(record)
        self.train_loss = record.train_loss
        self.epoch_seconds = statistics.median([r.seconds for r in self.epochs][min(1, len(self.epochs) - 1) :])
        if record.val_acc is not None and (self.val_acc is None or record.val_acc > self.val_acc):
            self.val_acc, self.test_acc, self.best_epoch = record.val_acc, record.test_acc, record.epoch

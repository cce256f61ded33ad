"""What `train` saves, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gas_triton.checkpoint import checksum, has_checkpoint, load_checkpoint, write_checkpoint
from gas_triton.datasets import Dataset
from gas_triton.training_config import EpochRecord, Result, TrainConfig

if TYPE_CHECKING:
    from gas_triton.training import _Run

__all__ = ["Saver", "identity"]

# A run may be resumed with other values of these: they change no number of the epochs that were trained.
_FREE = {"epochs", "history_tier", "history_folder"}
# Rows of x whose values tell one dataset from another: to read all of a large one would take minutes.
_SAMPLE = 4096
# Fields of a result that are saved as they are.
_SAVED = ("peak_bytes", "num_parameters", "history_bytes", "static_bytes")


class Saver:
    """The checkpoint of a run: its folder, how often it is saved, and what must be the same for it to be resumed.

    Attributes:
        epoch: of the newest checkpoint, 0 if there is none.
    """

    def __init__(self, folder: Path, every: int, same: dict[str, str]) -> None:
        self.folder, self.every, self.same = folder, every, same
        self.epoch, self.saved = 0, dict[str, Any]()

    def open(self, config: TrainConfig, resume: bool, say: Callable[[str], None]) -> None:
        """Reads the checkpoint, and refuses one that this run cannot go on from."""
        if not has_checkpoint(self.folder):
            if resume:
                say(f"no checkpoint in {self.folder} yet: training from the beginning")
            return
        self.saved = load_checkpoint(self.folder)
        if self.saved.get("of") != "gas_triton.training":
            raise ValueError(f"{self.folder} holds a checkpoint that train did not save: name another folder")
        self.epoch = self.saved["epoch"]
        if not resume:
            raise ValueError(
                f"{self.folder} holds a checkpoint of epoch {self.epoch}: add --resume (resume=True), or name another "
                "folder"
            )
        for name, value in self.same.items():
            self.compare(name, value)
        if self.epoch > config.epochs:
            raise ValueError(
                f"{self.folder} holds a checkpoint of epoch {self.epoch}: epochs must be at least that, got "
                f"{config.epochs}"
            )
        left = "nothing is left to train" if self.epoch == config.epochs else f"{config.epochs - self.epoch} to go"
        say(f"resuming after epoch {self.epoch} of {self.folder}: {left}")

    def compare(self, name: str, value: str) -> None:
        # a field that is newer than the checkpoint had what is now its default
        saved = self.saved["same"].get(name, repr(getattr(TrainConfig(), name, None)))
        if saved != value:
            raise ValueError(f"{self.folder} holds a checkpoint with {name} {saved} but this run has {name} {value}")

    def result(self, config: TrainConfig) -> Result:
        """What was reached before; without evaluations that a longer run would not have made."""
        saved: dict[str, Any] = {name: self.saved.get(name) for name in _SAVED}
        result = Result(**saved)
        for fields in self.saved["epochs"]:
            record = EpochRecord(**fields)
            if config.epochs > self.epoch and record.epoch % config.eval_every:
                record = replace(record, val_acc=None, test_acc=None)
            result.add(record)
        return result

    def restore(self, run: _Run) -> Result:
        """Puts a run where the checkpoint left it."""
        if not self.saved:
            return Result()
        self.compare("row_order", repr(run.loader.graph.row_order))
        saved = load_checkpoint(self.folder, run.histories, run.loader.graph)
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.loader.epoch = saved["loader_epoch"]
        torch.default_generator.set_state(saved["generator"])
        if run.device.type == "cuda":
            torch.cuda.set_rng_state(saved["device_generator"], run.device)
        return self.result(run.config)

    def save_after_epoch(self, run: _Run, result: Result) -> None:
        epoch = len(result.epochs)
        if epoch % self.every == 0 or epoch == run.config.epochs:
            self.save(run, result)

    def save(self, run: _Run, result: Result) -> None:
        on_gpu = run.device.type == "cuda"
        state = {
            "of": "gas_triton.training",
            "epoch": len(result.epochs),
            "same": {**self.same, "row_order": repr(run.loader.graph.row_order)},
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "loader_epoch": run.loader.epoch,
            "generator": torch.default_generator.get_state(),
            "device_generator": torch.cuda.get_rng_state(run.device) if on_gpu else None,
            "epochs": [asdict(record) for record in result.epochs],
            **{name: getattr(result, name) for name in _SAVED},
        }
        write_checkpoint(self.folder, state, run.histories)
        self.epoch = len(result.epochs)


def identity(dataset: Dataset, config: TrainConfig, device: torch.device) -> dict[str, str]:
    """What a run must have in common with a checkpoint to go on from it, as text."""
    fields = {name: value for name, value in asdict(config).items() if name not in _FREE}
    fields["model_options"] = dict(sorted(fields["model_options"].items()))
    masks = (dataset.train_mask, dataset.val_mask, dataset.test_mask)
    sample = dataset.x[:: max(dataset.num_nodes // _SAMPLE, 1)]
    data = {
        "device": device.type,
        "nodes": dataset.num_nodes,
        "edges": dataset.num_edges,
        "features": dataset.num_features,
        "classes": dataset.num_classes,
        "edge_index of check sum": checksum([dataset.edge_index]),
        "x of check sum": checksum([sample]),
        "y of check sum": checksum([dataset.y]),
        "split of check sum": checksum(masks),
    }
    return {name: repr(value) for name, value in (fields | data).items()}

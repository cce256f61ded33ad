"""The settings of PyGAS's benchmarks, which are those of the GNNAutoScale paper, under names such as `cora-gcn`.

One file a model, one table a dataset; what a table leaves out is said above the tables, or `TrainConfig`'s default. The
graph is made by the model (`prepare`), which for none of them depends on the dataset.

What differs from PyGAS: PPI is one graph with masks, where PyGAS trains on a graph of its own; the large benchmark's
histories are where they fit (`history_tier="auto"`), where PyGAS has them in host memory; and a batch without training
nodes writes its rows to the histories, where PyGAS skips it.

Source: https://github.com/rusty1s/pyg_autoscale, the `conf` folders of `small_benchmark` and `large_benchmark`.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from gas_triton.text import table
from gas_triton.training_config import TrainConfig

__all__ = ["load", "names", "overview", "read"]


def names() -> tuple[str, ...]:
    """All presets, those of a model together."""
    return tuple(_presets())


def read(name: str) -> dict[str, Any]:
    """What a preset says: `dataset`, `model`, and fields of `TrainConfig`.

    Args:
        name: one of `names()`; case, `-` and `_` do not matter.

    Raises:
        ValueError: the name is unknown.
    """
    known = {_key(preset): preset for preset in _presets()}
    if not isinstance(name, str) or _key(name) not in known:
        raise ValueError(f"preset must be one of {', '.join(_presets())}, got {name!r}")
    fields = _presets()[known[_key(name)]]
    return {**fields, "model_options": dict(fields.get("model_options", {}))}


def load(name: str) -> tuple[str, TrainConfig]:
    """The dataset of a preset, as `datasets.load` names it, and how to train on it.

    Args:
        name: one of `names()`; case, `-` and `_` do not matter.

    Raises:
        ValueError: the name is unknown.
    """
    fields = read(name)
    return fields.pop("dataset"), TrainConfig(**fields)


def overview() -> str:
    """A table of all presets."""
    columns = {
        "model": "model", "dataset": "dataset", "layers": "layers", "hidden": "hidden", "dropout": "dropout",
        "lr": "lr", "weight decay": "weight_decay", "last": "weight_decay_last", "clip": "grad_norm",
        "epochs": "epochs", "parts": "num_parts", "batch": "batch_size", "steps": "max_steps",
    }  # fmt: skip
    presets = {name: read(name) for name in names()}
    rows = [[name, *(str(fields.get(field, "-")) for field in columns.values())] for name, fields in presets.items()]
    return table(["preset", *columns], rows)


@cache
def _presets() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            fields = tomllib.loads(file.read_text(encoding="utf-8"))
            shared = {name: value for name, value in fields.items() if not isinstance(value, dict)}
            suffix = shared["model"].lower().replace("_", "-")
            found |= {f"{name}-{suffix}": shared | own for name, own in fields.items() if name not in shared}
    return found


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")

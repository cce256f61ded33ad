"""The paper's first table again: full-batch against GAS, on real graphs, with the paper's settings.

    python -m bench.reproduce --root DATA            # 20 seeds of GCN and GAT, 10 of APPNP and GCN2: days of one core
    python -m bench.reproduce --root DATA --quick    # 3 seeds
    python -m bench.reproduce --table                # what is finished, beside the published cells

A run is one seed of a model on a dataset in one way. Its test accuracy is that of the best validation epoch; datasets
that have no split of their own get the seed's (Shchur et al., 2018), as in PyGAS. A finished run is in the JSON file
and is not run again: stop and start at will, in several processes if there are several cores.

Source: Fey et al., GNNAutoScale, ICML 2021, table 1; settings of https://github.com/rusty1s/pyg_autoscale,
small_benchmark.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from bench.fresh import train_fresh
from bench.reproduce_table import FRESH, tables
from bench.run_record import RunRecord
from gas_triton import presets
from gas_triton.datasets import Dataset, load
from gas_triton.training import TrainConfig, train

RESULTS = Path(__file__).parent / "results" / "reproduce-cpu.json"
DATASETS = ("Cora", "CiteSeer", "PubMed", "AmazonComputers", "CoauthorPhysics")
MODELS = ("GCN", "GAT", "APPNP", "GCN2")
SEEDS = {"GCN": 20, "GAT": 20, "APPNP": 10, "GCN2": 10}
QUICK_SEEDS = 3
# against what batches and histories do
REMEDIES: dict[str, dict[str, Any]] = {
    "GAS, nodes alike": {"loss_weighting": "node"},
    "GAS, nodes alike, LMC": {"loss_weighting": "node", "compensation": "lmc", "halo_momentum": 0.5},
}
# how a model is trained -> what that changes of the paper's settings
WAYS: dict[str, dict[str, Any]] = {
    "full-batch": {"full_batch": True},
    "GAS": {},
    "GAS, random clusters": {"partition": "random"},
    # histories that no evaluation fills
    "GAS, training only": {"fill_histories": False},
    "GAS, random clusters, training only": {"fill_histories": False, "partition": "random"},
    # see `bench.fresh`
    FRESH: {},
    # not the paper's, and not tuned
    **REMEDIES,
}
# where the literature has random clusters too
RANDOM = (("Cora", "GCN"), ("Cora", "APPNP"), ("Cora", "GCN2"))
# where GAS is off full-batch: histories or batches?
OFF = (
    ("CiteSeer", "GCN"), ("CiteSeer", "APPNP"), ("CoauthorPhysics", "APPNP"),
    *(("AmazonComputers", model) for model in ("GCN", "GAT", "APPNP", "GCN2")),
)  # fmt: skip
# where GAS is below full-batch
BELOW = (("AmazonComputers", "GCN"), ("AmazonComputers", "GCN2"))
# ways that are for these cells alone
CELLS = dict.fromkeys(list(WAYS)[2:], RANDOM) | {FRESH: OFF} | dict.fromkeys(REMEDIES, BELOW)
# a seed trains on the split of its number, drawn or published; on other graphs all train on the one that there is
SPLIT_BY_SEED = ("CoauthorCS", "CoauthorPhysics", "AmazonComputers", "AmazonPhoto", "WikiCS")
# features with more values than this are kept dense
MAX_DENSITY = 0.2
# PyGAS has no settings for GAT on these: the model of its other GAT cells on the batches of GCN on the same graph
AMAZON = ("AmazonComputers", "AmazonPhoto")
GAT_ON_AMAZON: dict[str, Any] = {
    "model": "GAT", "hidden": 8, "dropout": 0.6, "lr": 0.005, "epochs": 400,
    "model_options": {"hidden_heads": 8, "out_heads": 1},
}  # fmt: skip


@cache
def cells() -> dict[tuple[str, str], str]:
    """The preset of every (dataset, model) that has settings, datasets named as in `gas_triton.datasets`."""
    found = {}
    for preset in presets.names():
        dataset, config = presets.load(preset)
        found[dataset, config.model] = preset
    found |= {(dataset, "GAT"): found[dataset, "GCN"] for dataset in AMAZON}
    return {cell: preset for cell, preset in found.items() if cell[1] in MODELS}


def canonical(name: str) -> str:
    """A dataset's name as `cells` has it; case, `-` and `_` do not matter.

    Raises:
        ArgumentTypeError: no preset is for that dataset.
    """
    names = {_key(dataset): dataset for dataset, _ in cells()}
    if _key(name) not in names:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(names.values())}, got {name!r}")
    return names[_key(name)]


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def settings(dataset: str, model: str, way: str) -> TrainConfig:
    """The paper's settings of a cell, for seed 0; all seeds share one partition, as in PyGAS.

    Args:
        dataset: and
        model: a cell of `cells()`.
        way: a key of `WAYS`.
    """
    config = presets.load(cells()[dataset, model])[1]
    if model == "GAT" and dataset in AMAZON:
        config = replace(config, **GAT_ON_AMAZON)
    # as in PyGAS: an evaluation of the whole graph before the first epoch and after each, which fills the histories
    changes: dict[str, Any] = {"full_evaluation": True, "fill_histories": True, "host_features": True, **WAYS[way]}
    return replace(config, **changes)


def described(config: TrainConfig) -> dict[str, Any]:
    """What the runs of a cell have in common, as JSON has it."""
    return {key: value for key, value in asdict(config).items() if key not in ("seed", "sparse_features")}


def run(dataset: Dataset, config: TrainConfig, way: str, cache: str) -> dict[str, Any] | None:
    """Trains once; None if Ctrl-C ended it. `late_test_acc` is the mean over the second half of the epochs."""
    is_sparse = not config.compensates and float((dataset.x != 0).float().mean()) <= MAX_DENSITY
    start = time.perf_counter()
    train_by = train_fresh if way == FRESH else train
    result = train_by(dataset, replace(config, sparse_features=is_sparse), cache=cache, measure_memory=False)
    if result.interrupted or result.test_acc is None or result.val_acc is None:
        return None
    late = [record.test_acc for record in result.epochs[len(result.epochs) // 2 :] if record.test_acc is not None]
    return {
        "test_acc": round(result.test_acc, 6),
        "late_test_acc": round(statistics.mean(late), 6),
        "val_acc": round(result.val_acc, 6),
        "best_epoch": result.best_epoch,
        "seconds": round(time.perf_counter() - start, 1),
    }


def wanted(
    datasets: Sequence[str], models: Sequence[str], ways: Sequence[str], seeds: int | None
) -> list[tuple[str, str, str, int]]:
    """The runs asked for as (dataset, model, way, seed): a first seed of everything before a second one."""
    found = [
        (dataset, model, way)
        for model in models
        for dataset in datasets
        for way in ways
        if (dataset, model) in cells() and (dataset, model) in CELLS.get(way, cells())
    ]
    most = {model: SEEDS[model] if seeds is None else seeds for model in models}
    return [(*cell, seed) for seed in range(max(most.values())) for cell in found if seed < most[cell[1]]]


def report(record: RunRecord, datasets: Sequence[str] = DATASETS, models: Sequence[str] = MODELS) -> str:
    """The tables of what is finished.

    Args:
        record: of the finished runs.
        datasets: named as in `cells`.
        models: of `MODELS`.
    """
    return tables(record, [run[:3] for run in wanted(datasets, models, list(WAYS), 1)], list(REMEDIES))


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of npz files and downloads (default: $GAS_TRITON_DATA)")
    parser.add_argument(
        "--datasets", nargs="+", default=list(DATASETS), type=canonical, metavar="NAME",
        help="any of `gas-triton train --list-presets`; a model that has no settings for one is left out",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    numbers = parser.add_mutually_exclusive_group()
    default = ", ".join(f"{number} of {model}" for model, number in SEEDS.items())
    numbers.add_argument("--seeds", type=int, help=f"of every cell (default: {default})")
    numbers.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seeds of every cell")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where runs are kept (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is finished")
    arguments = parser.parse_args()
    if not wanted(arguments.datasets, arguments.models, list(WAYS), 1):
        parser.error(f"no settings for {', '.join(arguments.models)} on {', '.join(arguments.datasets)}")
    record = RunRecord(arguments.json, described(TrainConfig()))
    if not arguments.table:
        _run_all(record, arguments)
    print(report(record, arguments.datasets, arguments.models))


def _run_all(record: RunRecord, arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    seeds = QUICK_SEEDS if arguments.quick else arguments.seeds
    loaded: dict[tuple[str, int], Dataset] = {}
    cache = os.path.join(tempfile.gettempdir(), f"gas_triton-{os.getuid()}")
    bar = tqdm(wanted(arguments.datasets, arguments.models, arguments.ways, seeds), unit="run")
    for name, model, way, seed in bar:
        bar.set_description(f"{name}, {model}, {way}, seed {seed}")
        config = settings(name, model, way)
        record.refresh()
        if str(seed) in record.runs(f"{name} {model} {way}", described(config)):
            continue
        split = seed if name in SPLIT_BY_SEED else 0
        if (name, split) not in loaded:
            loaded = {(name, split): load(name, arguments.root, split)}
        values = run(loaded[name, split], replace(config, seed=seed), way, cache)
        if values is None:
            break
        record.add(f"{name} {model} {way}", described(config), seed, values)
    bar.close()


if __name__ == "__main__":
    main()

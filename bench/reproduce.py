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
from dataclasses import asdict, replace
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
}
# where the literature has random clusters too
RANDOM = (("Cora", "GCN"), ("Cora", "APPNP"), ("Cora", "GCN2"))
# where GAS is off full-batch: histories or batches?
OFF = (
    ("CiteSeer", "GCN"), ("CiteSeer", "APPNP"), ("AmazonComputers", "GCN"), ("AmazonComputers", "GAT"),
    ("AmazonComputers", "GCN2"), ("CoauthorPhysics", "APPNP"),
)  # fmt: skip
# ways that are for these cells alone
CELLS = {way: OFF if way == FRESH else RANDOM for way in list(WAYS)[2:]}
# every seed has a split of its own
UNSPLIT = ("CoauthorCS", "CoauthorPhysics", "AmazonComputers", "AmazonPhoto")
# features with more values than this are kept dense
MAX_DENSITY = 0.2
# PyGAS has no settings for this cell: the model of its other GAT cells on the batches of GCN on this graph
GAT_ON_COMPUTERS = {
    "model": "GAT", "hidden": 8, "dropout": 0.6, "lr": 0.005, "epochs": 400,
    "model_options": {"hidden_heads": 8, "out_heads": 1},
}  # fmt: skip


def settings(dataset: str, model: str, way: str) -> TrainConfig:
    """The paper's settings of a cell, for seed 0; all seeds share one partition, as in PyGAS.

    Args:
        dataset: a name that `gas_triton.datasets.load` knows.
        model: one of `MODELS`.
        way: a key of `WAYS`.
    """
    if (dataset, model) == ("AmazonComputers", "GAT"):
        config = replace(presets.load(f"{dataset}-gcn")[1], **GAT_ON_COMPUTERS)
    else:
        config = presets.load(f"{dataset}-{model}")[1]
    # as in PyGAS: an evaluation of the whole graph before the first epoch and after each, which fills the histories
    changes: dict[str, Any] = {"full_evaluation": True, "fill_histories": True, "host_features": True, **WAYS[way]}
    return replace(config, **changes)


def described(config: TrainConfig) -> dict[str, Any]:
    """What the runs of a cell have in common, as JSON has it."""
    return {key: value for key, value in asdict(config).items() if key not in ("seed", "sparse_features")}


def run(dataset: Dataset, config: TrainConfig, way: str, cache: str) -> dict[str, Any] | None:
    """Trains once; None if Ctrl-C ended it. `late_test_acc` is the mean over the second half of the epochs."""
    is_sparse = float((dataset.x != 0).float().mean()) <= MAX_DENSITY
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


def wanted(datasets: list[str], models: list[str], ways: list[str], seeds: int | None) -> list[tuple[str, ...]]:
    """The runs asked for as (dataset, model, way, seed): a first seed of everything before a second one."""
    cells = [
        (dataset, model, way)
        for model in models
        for dataset in datasets
        for way in ways
        if (dataset, model) in CELLS.get(way, [(dataset, model)])
    ]
    most = {model: SEEDS[model] if seeds is None else seeds for model in models}
    return [(*cell, str(seed)) for seed in range(max(most.values())) for cell in cells if seed < most[cell[1]]]


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of npz files and downloads (default: $GAS_TRITON_DATA)")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), metavar="NAME", help="any with presets")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--seeds", type=int, help="of every cell (default: the paper's number)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seeds of every cell")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where runs are kept (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is finished")
    arguments = parser.parse_args()
    record = RunRecord(arguments.json, described(TrainConfig()))
    if not arguments.table:
        _run_all(record, arguments)
    print(tables(record, arguments.datasets, arguments.models))


def _run_all(record: RunRecord, arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    seeds = QUICK_SEEDS if arguments.quick else arguments.seeds
    loaded: dict[tuple[str, int], Dataset] = {}
    cache = os.path.join(tempfile.gettempdir(), f"gas_triton-{os.getuid()}")
    bar = tqdm(wanted(arguments.datasets, arguments.models, arguments.ways, seeds), unit="run")
    for name, model, way, number in bar:
        bar.set_description(f"{name}, {model}, {way}, seed {number}")
        config, seed = settings(name, model, way), int(number)
        record.refresh()
        if number in record.runs(f"{name} {model} {way}", described(config)):
            continue
        split = seed if name in UNSPLIT else 0
        if (name, split) not in loaded:
            loaded = {(name, split): load(name, arguments.root, split)}
        values = run(loaded[name, split], replace(config, seed=seed), way, cache)
        if values is None:
            break
        record.add(f"{name} {model} {way}", described(config), seed, values)
    bar.close()


if __name__ == "__main__":
    main()

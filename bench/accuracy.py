"""Test accuracy of a GCN trained with histories, also of narrow dtypes or compensated, with the paper's settings.

    python -m bench.accuracy --root DATA --seeds 10 --datasets Cora PubMed --json bench/results/accuracy-cpu.json

A run is one seed of one dataset in one way; its test accuracy is that of the best validation epoch. Every finished run
is written to the JSON file, and a run whose settings stand there already is not repeated: stop and start again at will.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.run_record import RunRecord
from gas_triton import presets
from gas_triton.datasets import Dataset, load
from gas_triton.training import TrainConfig, train

# how to train -> (storage dtype of the histories, what its accuracy is compared with)
WAYS: dict[str, tuple[str, str | None]] = {
    "full-batch": ("float32", None),
    "histories": ("float32", "full-batch"),
    "bfloat16": ("bfloat16", "histories"),
    "int8": ("int8", "histories"),
    "momentum": ("float32", "histories"),
    "lmc": ("float32", "histories"),
}
# further settings of a way: gamma of GraphFM-OB, beta of LMC
OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"halo_momentum": 0.3},
    "lmc": {"halo_momentum": 0.5, "compensation": "lmc"},
}
MAX_DIFFERENCE = 0.5

DATASETS = ("Cora", "CiteSeer", "PubMed", "CoauthorCS", "CoauthorPhysics", "AmazonComputers", "AmazonPhoto", "WikiCS")


def preset(name: str, way: str, seed: int, epochs: int = 200) -> TrainConfig:
    """The paper's settings for a dataset, with histories of training alone; all seeds share one partition, as in PyGAS.

    Args:
        name: one of `DATASETS`.
        way: a key of `WAYS`.
        seed: of the parameters, the dropout masks and the order of the batches.
        epochs: epochs to train.
    """
    _, config = presets.load(f"{name}-gcn")
    # filled by exact rows after each epoch, histories would hide what a narrow dtype or compensation does to them
    config = replace(config, fill_histories=False, full_evaluation=False, epochs=epochs, seed=seed)
    return replace(config, full_batch=way == "full-batch", history_dtype=WAYS[way][0], **OPTIONS.get(way, {}))


def run(dataset: Dataset, config: TrainConfig) -> dict[str, Any] | None:
    """Trains once; None if Ctrl-C ended it."""
    result = train(dataset, config)
    if result.interrupted or result.test_acc is None or result.val_acc is None:
        return None
    return {
        "test_acc": round(result.test_acc, 6),
        "val_acc": round(result.val_acc, 6),
        "best_epoch": result.best_epoch,
    }


def common(name: str, way: str, epochs: int) -> dict[str, Any]:
    """The settings that all seeds of a dataset and way share."""
    return {key: value for key, value in asdict(preset(name, way, 0, epochs)).items() if key != "seed"}


class Record(RunRecord):
    """Finished runs by dataset and way, in memory and in a JSON file."""

    def group(self, name: str, way: str, epochs: int) -> dict[str, Any]:
        """Runs of a dataset by seed; those of other settings than today's are forgotten."""
        return self.runs(f"{name} {way}", common(name, way, epochs))

    def accuracies(self, name: str, way: str, seeds: int, epochs: int) -> list[float]:
        """Test accuracies in points, of the seeds below `seeds` that are done."""
        done = self.group(name, way, epochs)
        return [100 * done[str(seed)]["test_acc"] for seed in range(seeds) if str(seed) in done]

    def seeds(self, name: str, way: str, epochs: int) -> int:
        """How many seeds are done."""
        return len(self.group(name, way, epochs))


def table(record: Record, names: list[str], ways: list[str], seeds: int, epochs: int) -> str:
    """Mean and standard deviation of the test accuracy in points, and how far the mean is from that of another way."""
    lines = ["| dataset | trained | test accuracy | difference | seeds |", "|---|---|---|---|---|"]
    for name in names:
        means: dict[str, float] = {}
        for way in ways:
            points = record.accuracies(name, way, seeds, epochs)
            if not points:
                continue
            means[way] = statistics.mean(points)
            spread = statistics.stdev(points) if len(points) > 1 else 0.0
            base, difference = WAYS[way][1], ""
            if base in means:
                apart = means[way] - means[base]
                verdict = "within" if abs(apart) <= MAX_DIFFERENCE else "NOT within"
                difference = f"{apart:+.2f} to {base}, {verdict} {MAX_DIFFERENCE} points"
            lines.append(f"| {name} | {way} | {means[way]:.2f} ± {spread:.2f} | {difference} | {len(points)} |")
    return "\n".join(lines)


def tables(record: Record, epochs: int = 200) -> str:
    """What the file holds: histories and dtypes, then compensated training, on the seeds that all ways of a table have.

    Args:
        record: the finished runs.
        epochs: of the runs that count.
    """
    texts = []
    for ways in (["full-batch", "histories", "bfloat16", "int8"], ["histories", "momentum", "lmc"]):
        lines: list[str] = []
        for name in DATASETS:
            seeds = min(record.seeds(name, way, epochs) for way in ways)
            head, rule, *found = table(record, [name], ways, seeds, epochs).splitlines()
            lines += [*([] if lines else [head, rule]), *found] if found else []
        texts += ["\n".join(lines)] if lines else []
    if not texts:
        return "Not measured: `python -m bench.accuracy --root DATA --json bench/results/accuracy-cpu.json`"
    return "\n\n".join([*texts, f"<sub>{record.machine}; `python -m bench.accuracy`</sub>"])


def summary(record: Record, name: str, way: str, epochs: int = 200) -> str:
    """Mean and standard deviation in points of all seeds that are done; empty without any."""
    points = record.accuracies(name, way, record.seeds(name, way, epochs), epochs)
    return f"{statistics.mean(points):.2f} ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of the .npz files (default: $GAS_TRITON_DATA)")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--datasets", nargs="+", default=["Cora", "PubMed"], choices=DATASETS, metavar="NAME")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--json", type=Path, help="where runs are kept and taken up again")
    arguments = parser.parse_args()
    from tqdm import tqdm

    record = Record(arguments.json)
    wanted = [(n, w, s) for n in arguments.datasets for s in range(arguments.seeds) for w in arguments.ways]
    loaded: dict[str, Dataset] = {}
    bar = tqdm(wanted, unit="run")
    for name, way, seed in bar:
        bar.set_description(f"{name}, {way}, seed {seed}")
        done = record.group(name, way, arguments.epochs)
        if str(seed) in done:
            continue
        if name not in loaded:
            loaded = {name: load(name, arguments.root)}
        values = run(loaded[name], preset(name, way, seed, arguments.epochs))
        if values is None:
            break
        record.add(f"{name} {way}", common(name, way, arguments.epochs), seed, values)
    bar.close()
    print(table(record, arguments.datasets, arguments.ways, arguments.seeds, arguments.epochs))


if __name__ == "__main__":
    main()

"""What METIS, Lipschitz regularisation and histories each bring: eight ways to train with batches, beside full-batch.

    python -m bench.ablation --root DATA                # what is missing of results/ablation-cpu.json
    python -m bench.ablation --root DATA --only gin --seeds 5
    python -m bench.ablation --plot bench/results       # trains nothing, draws the curves of what is finished
    python -m bench.ablation --root DATA --choose       # the strength of the regularisation, by validation accuracy

{METIS, random clusters} x {without, with Lipschitz regularisation} x {histories, none}, where none leaves out-of-batch
neighbours out (Cluster-GCN), on two models in which errors of histories may grow: a GCNII of 64 layers on Cora, and a
GIN, which sums, on graphs drawn like those of CLUSTER. Models and batches are those of PyGAS's examples
`train_gcn2.py` and `train_gin.py`; what differs is said in bench/README.md. Only training steps write to histories:
evaluations leave them alone, or they would be fresher than a large graph affords.

A finished run is in the JSON file and is not run again: stop and start at will, in several processes if there are
several cores.

Source: Fey et al., GNNAutoScale, ICML 2021, figure 3 and table 2.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench import ablation_plot
from bench.ablation_table import table, tables
from bench.block_model import cluster_like
from bench.run_record import RunRecord
from gas_triton.datasets import Dataset, load
from gas_triton.training import TrainConfig, train

RESULTS = Path(__file__).parent / "results" / "ablation-cpu.json"
QUICK = {"seeds": 1, "epochs": 4}
# the strength of the regularisation is chosen from these, with seeds that are not among those of the table
STRENGTHS = (0.01, 0.1, 1.0)
CHOICE_SEED = 100


class Way(NamedTuple):
    """How batches are made, and what reaches a batch from outside."""

    partition: str
    histories: bool
    lipschitz: bool

    @property
    def name(self) -> str:
        return f"{self.partition}, {'histories' if self.histories else 'none'}{', Lipschitz' if self.lipschitz else ''}"


WAYS: dict[str, Way | None] = {"full-batch": None}
WAYS |= {
    way.name: way
    for way in (
        Way(partition, histories, lipschitz)
        for histories in (True, False)
        for partition in ("metis", "random")
        for lipschitz in (False, True)
    )
}


@dataclass(frozen=True)
class Case:
    """A model on a graph.

    Attributes:
        title: of its figure and table.
        data: what the graph is, as the record keeps it.
        make: the graph, given the folder of the data.
        config: full-batch, for seed 0.
        strength: of the regularisation: the one of `STRENGTHS` with the best validation accuracy (`--choose`).
        choice_epochs: of the runs that choose it.
        seeds: of the table.
    """

    title: str
    data: str
    make: Callable[[str | None], Dataset]
    config: TrainConfig
    strength: float
    choice_epochs: int
    seeds: int


CASES = {
    "gcn2": Case(
        title="GCNII of 64 layers on Cora",
        data="Cora",
        make=lambda root: load("Cora", root),
        config=TrainConfig(
            model="GCN2", layers=64, hidden=64, dropout=0.6, model_options={"alpha": 0.1, "theta": 0.5}, lr=0.01,
            weight_decay=0.01, weight_decay_last=5e-4, epochs=100, eval_every=2, num_parts=40, batch_size=20,
            full_evaluation=True, sparse_features=True, host_features=True,
        ),
        strength=1.0,
        choice_epochs=30,
        seeds=3,
    ),
    "gin": Case(
        title="GIN of 4 layers on graphs like CLUSTER's",
        data="cluster_like(120, 0, val_share=1/6, test_share=1/6)",
        make=lambda root: cluster_like(120, 0, val_share=1 / 6, test_share=1 / 6),
        config=TrainConfig(
            model="GIN", layers=4, hidden=128, dropout=0.0,
            model_options={"linear": True, "residual": True, "perceptron_norm": True, "running_statistics": False},
            lr=0.003, epochs=60, eval_every=2, num_parts=360, batch_size=36, full_evaluation=True, host_features=True,
        ),
        strength=1.0,
        choice_epochs=20,
        seeds=3,
    ),
}  # fmt: skip


def settings(case: str, way: str, epochs: int | None = None, strength: float | None = None) -> TrainConfig:
    """How a way of a case is trained, for seed 0; all seeds share one partition.

    Args:
        case: a key of `CASES`.
        way: a key of `WAYS`.
        epochs: other than the case's.
        strength: of the regularisation, other than the case's.
    """
    base, how = CASES[case].config, WAYS[way]
    base = replace(base, epochs=epochs or base.epochs)
    if how is None:
        return replace(base, full_batch=True)
    lipschitz = (CASES[case].strength if strength is None else strength) if how.lipschitz else 0.0
    return replace(base, partition=how.partition, histories=how.histories, lipschitz=lipschitz)


def described(case: str, config: TrainConfig) -> dict[str, Any]:
    """What the runs of a group have in common, as JSON has it."""
    return {"data": CASES[case].data} | {key: value for key, value in asdict(config).items() if key != "seed"}


def run(dataset: Dataset, config: TrainConfig, cache: str | None = None) -> dict[str, Any] | None:
    """Trains once; the curves hold the evaluated epochs. None if Ctrl-C ended it."""
    start = time.perf_counter()
    result = train(dataset, config, cache=cache, measure_memory=False)
    if result.interrupted or result.test_acc is None or result.val_acc is None:
        return None
    evaluated = [epoch for epoch in result.epochs if epoch.val_acc is not None]
    return {
        "test_acc": round(result.test_acc, 6),
        "val_acc": round(result.val_acc, 6),
        "best_epoch": result.best_epoch,
        "seconds": round(time.perf_counter() - start, 1),
        "curves": {
            "epoch": [epoch.epoch for epoch in evaluated],
            "train_loss": [round(epoch.train_loss, 4) for epoch in evaluated],
            "val_acc": [round(epoch.val_acc or 0.0, 4) for epoch in evaluated],
            "test_acc": [round(epoch.test_acc or 0.0, 4) for epoch in evaluated],
        },
    }


class Wanted(NamedTuple):
    """A run that is asked for."""

    case: str
    group: str
    config: TrainConfig


def wanted(cases: list[str], ways: list[str], seeds: int | None = None, epochs: int | None = None) -> list[Wanted]:
    """The runs of the table: a first seed of every way of a case before a second one."""
    return [
        Wanted(case, f"{case}: {way}", replace(settings(case, way, epochs), seed=seed))
        for case in cases
        for seed in range(CASES[case].seeds if seeds is None else seeds)
        for way in ways
    ]


def to_choose(cases: list[str], seeds: int | None = None, epochs: int | None = None) -> list[Wanted]:
    """The runs that choose a strength: METIS clusters with histories."""
    way = Way("metis", True, True).name
    return [
        Wanted(
            case,
            f"{case}: strength {strength:g}",
            replace(settings(case, way, epochs or CASES[case].choice_epochs, strength), seed=CHOICE_SEED + seed),
        )
        for case in cases
        for seed in range(seeds or 1)
        for strength in STRENGTHS
    ]


def run_missing(record: RunRecord, runs: list[Wanted], root: str | None) -> None:
    """Runs what the record does not have, until it has all or Ctrl-C ends one."""
    from tqdm import tqdm

    cache = os.path.join(tempfile.gettempdir(), f"gas_triton-{os.getuid()}")
    loaded: dict[str, Dataset] = {}
    with tqdm(runs, unit="run") as bar:
        for case, group, config in bar:
            bar.set_description(f"{group}, seed {config.seed}")
            record.refresh()
            if str(config.seed) in record.runs(group, described(case, config)):
                continue
            if case not in loaded:
                loaded = {case: CASES[case].make(root)}
            values = run(loaded[case], config, cache)
            if values is None:
                return
            record.add(group, described(case, config), config.seed, values)


def report(path: Path) -> str:
    """The tables of bench/README.md.

    Args:
        path: of the finished runs.
    """
    return tables(RunRecord(path), {name: case.title for name, case in CASES.items()})


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of npz files and downloads (default: $GAS_TRITON_DATA)")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help="; ".join(WAYS))
    parser.add_argument("--seeds", type=int, help="of every way (default: 3)")
    parser.add_argument("--epochs", type=int, help="replaces the runs in the file that had others")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs; kept where --json says")
    parser.add_argument("--choose", action="store_true", help="the runs that choose the strength")
    parser.add_argument("--json", type=Path, help=f"where runs are kept (default: {RESULTS})")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw there, and train nothing")
    arguments = parser.parse_args()
    path, limits = arguments.json or RESULTS, {"seeds": arguments.seeds, "epochs": arguments.epochs}
    if arguments.quick:
        path, limits = arguments.json, QUICK
    record = RunRecord(path)
    if arguments.plot is None:
        choosing = to_choose(arguments.only, **limits)
        runs = choosing if arguments.choose else wanted(arguments.only, arguments.ways, **limits)
        run_missing(record, runs, arguments.root)
    else:
        if reason := ablation_plot.missing():
            parser.error(reason)
        for case in arguments.only:
            print(ablation_plot.draw(record, case, CASES[case].title, arguments.plot))
    for case in arguments.only:
        print(f"\n{CASES[case].title}\n\n{table(record, case)}")


if __name__ == "__main__":
    main()

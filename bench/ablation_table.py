"""The tables of `bench.ablation`, from its finished runs."""

from __future__ import annotations

import statistics
from typing import Any

from bench.run_record import RunRecord

FULL = "full-batch"
COMMAND = "python -m bench.ablation --root DATA"


def finished(record: RunRecord, case: str) -> dict[str, dict[str, Any]]:
    """The runs of a case by way, then by seed."""
    start = f"{case}: "
    found = {
        name.removeprefix(start): group["seeds"]
        for name, group in record.groups.items()
        if name.startswith(start) and not name.startswith(f"{start}strength")
    }
    return {way: found[way] for way in sorted(found, key=_place) if found[way]}


def table(record: RunRecord, case: str) -> str:
    """Accuracy at the best validation epoch in points, and how far it is from full-batch with the same seeds.

    Args:
        record: finished runs.
        case: whose.
    """
    runs = finished(record, case)
    columns = ["clusters", "out-of-batch neighbours", "regularised", "validation", "test", "to full-batch"]
    columns += ["test, last epoch", "loss, last epoch", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for way, seeds in runs.items():
        val, test = ([100 * run[f"{split}_acc"] for run in seeds.values()] for split in ("val", "test"))
        full = runs.get(FULL, {})
        apart = [100 * (run["test_acc"] - full[seed]["test_acc"]) for seed, run in seeds.items() if seed in full]
        last, loss = ([run["curves"][name][-1] for run in seeds.values()] for name in ("test_acc", "train_loss"))
        cells = [
            *_columns(way), _spread(val), _spread(test), _spread(apart, "+") if apart and way != FULL else "",
            _spread([100 * acc for acc in last]), _spread(loss), str(len(seeds)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if not runs:
        return f"Not measured: `{COMMAND} --only {case}`"
    return "\n".join(lines)


def choice(record: RunRecord, case: str) -> str:
    """Validation accuracy in points of each strength that was tried; empty if none was."""
    start = f"{case}: strength "
    parts = [
        f"{name.removeprefix(start)}: {_spread([100 * run['val_acc'] for run in group['seeds'].values()])}"
        for name, group in record.groups.items()
        if name.startswith(start)
    ]
    return "; ".join(parts)


def tables(record: RunRecord, titles: dict[str, str]) -> str:
    """The tables of all cases, each with its title.

    Args:
        record: finished runs.
        titles: of the cases.
    """
    texts = []
    for case, title in titles.items():
        texts.append(f"### {title}\n\n{table(record, case)}")
        if tried := choice(record, case):
            texts[-1] += f"\n\nStrength of the regularisation, and validation accuracy with it: {tried}."
    return "\n\n".join([*texts, f"<sub>{record.machine}; `{COMMAND}`</sub>" if record.machine else ""]).strip()


def _columns(way: str) -> list[str]:
    if way == FULL:
        return [FULL, "", ""]
    partition, source, *rest = way.split(", ")
    clusters = {"metis": "METIS"}.get(partition, partition)
    return [clusters, {"none": "left out"}.get(source, source), "yes" if rest else "no"]


def _place(way: str) -> tuple[bool, bool, bool, bool]:
    return (way != FULL, "none" in way, "random" in way, "Lipschitz" in way)


def _spread(values: list[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean

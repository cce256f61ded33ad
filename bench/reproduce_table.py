"""The tables of `bench.reproduce`: our runs beside the published cells, and what misses a goal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from bench import published
from bench.run_record import RunRecord

# a mean of GAS at most this far from that of full-batch training, above or below, in points
MAX_FROM_FULL_BATCH = 0.5
# cells of fewer seeds are marked where their number is not shown
FEW = 5
# accuracies are shares of some hundred nodes: sums of them in points are off by less
ROUNDING = 1e-6
COMMAND = "python -m bench.reproduce"
FRESH = "batches of GAS, nothing stale"


class Cell(NamedTuple):
    """Test accuracies of a cell in points: mean, sample deviation, and how many seeds."""

    mean: float
    deviation: float
    seeds: int

    @property
    def error(self) -> float:
        """Standard error of the mean; nan of a single seed."""
        return self.deviation / math.sqrt(self.seeds) if self.seeds > 1 else math.nan

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.deviation:.2f} ({self.seeds})" if self.seeds > 1 else f"{self.mean:.2f} (1)"


class Comparison(NamedTuple):
    """A cell trained in both ways, on the seeds that both have.

    `late` is the difference of the mean test accuracies over the second half of the epochs, for which no epoch is
    chosen, on the seeds that have it.
    """

    dataset: str
    model: str
    full_batch: Cell
    gas: Cell
    paired_error: float
    late: Cell | None = None

    @property
    def difference(self) -> float:
        """GAS minus full-batch."""
        return self.gas.mean - self.full_batch.mean

    @property
    def misses(self) -> list[str]:
        """What is not as it should be, in words; empty where all is."""
        found = []
        if abs(self.difference) > MAX_FROM_FULL_BATCH + ROUNDING:
            side = "above" if self.difference > 0 else "below"
            found.append(
                f"{abs(self.difference):.2f} points {side} full-batch"
                + (f" (standard error {self.paired_error:.2f})" if self.gas.seeds > 1 else " (one seed)")
                + ("" if self.late is None else f"; without the choice of an epoch {_late(self)}")
            )
        theirs = published.GAS.get((self.dataset, self.model))
        if theirs is not None and self.gas.mean < theirs[0] - theirs[1] - ROUNDING:
            below = theirs[0] - self.gas.mean
            found.append(f"{below:.2f} points below the published cell, whose deviation is {theirs[1]}")
        return found


def accuracies(record: RunRecord, dataset: str, model: str, way: str, key: str = "test_acc") -> dict[int, float]:
    """Test accuracy in points by seed, of what is finished."""
    group = record.groups.get(f"{dataset} {model} {way}", {"seeds": {}})
    return {int(seed): 100 * run[key] for seed, run in group["seeds"].items() if key in run}


def cell(points: Sequence[float]) -> Cell:
    """Mean and deviation of some accuracies."""
    return Cell(statistics.mean(points), statistics.stdev(points) if len(points) > 1 else 0.0, len(points))


def compare(record: RunRecord, dataset: str, model: str, base: str, way: str) -> Comparison | None:
    """Two ways of a cell on the seeds that both have; None where there are none."""
    ones, others = (accuracies(record, dataset, model, each) for each in (base, way))
    seeds = sorted(ones.keys() & others.keys())
    if not seeds:
        return None
    apart = cell([others[seed] - ones[seed] for seed in seeds])
    first, second = (accuracies(record, dataset, model, each, "late_test_acc") for each in (base, way))
    both = [second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())]
    pair = (cell([ones[seed] for seed in seeds]), cell([others[seed] for seed in seeds]))
    return Comparison(dataset, model, *pair, apart.error, cell(both) if both else None)


def comparisons(
    record: RunRecord, datasets: Sequence[str], models: Sequence[str], base: str = "full-batch", way: str = "GAS"
) -> list[Comparison]:
    """Every cell that has runs of both ways, model by model."""
    found = [compare(record, dataset, model, base, way) for model in models for dataset in datasets]
    return [each for each in found if each is not None]


def tables(record: RunRecord, planned: Sequence[tuple[str, str, str]], remedies: Sequence[str] = ()) -> str:
    """Accuracy of every cell, what misses, what histories and batches do, and METIS against random, as Markdown.

    Args:
        record: of the finished runs.
        planned: every (dataset, model, way) that there should be; one without a run is said not to be measured.
        remedies: ways that may bring a cell closer to full-batch.
    """
    datasets, models, _ = (tuple(dict.fromkeys(names)) for names in zip(*planned, strict=True))
    main = comparisons(record, datasets, models)
    if not main:
        return f"Not measured: `{COMMAND} --root DATA`"
    rows = []
    for each in main:
        theirs = [cells.get((each.dataset, each.model)) for cells in (published.GAS, published.PGL_METIS)]
        verdict = "yes" if not each.misses else "no"
        quoted = [f"{pair[0]:.2f} ± {pair[1]:.2f}" if pair else "" for pair in theirs]
        rows.append([*_ways(each), _late(each), *quoted, verdict])
    header = ["model", "dataset", "full-batch", "GAS", "difference", "late", "in the paper", "by PGL", "as promised"]
    texts = [_markdown(header, rows)]
    missed = [f"* {each.model} on {each.dataset}: {'; '.join(each.misses)}." for each in main if each.misses]
    texts += ["Missed:\n\n" + "\n".join(missed)] if missed else []
    stale = comparisons(record, datasets, models, FRESH, "GAS")
    if stale:
        texts.append("Histories or batches:\n\n" + _stale_table(record, stale))
    closer = [(way, each) for way in remedies for each in comparisons(record, datasets, models, "full-batch", way)]
    if closer:
        texts.append("With other settings than the paper's:\n\n" + _remedy_table(closer))
    random = comparisons(record, datasets, models, "GAS, random clusters", "GAS")
    if random:
        texts.append("METIS against random clusters:\n\n" + _random_table(random))
    alone = comparisons(record, datasets, models, "GAS, random clusters, training only", "GAS, training only")
    if alone:
        texts.append("The same with histories that no evaluation fills:\n\n" + _random_table(alone))
    absent = [
        f"{model} on {dataset} ({way})"
        for dataset, model, way in planned
        if not accuracies(record, dataset, model, way)
    ]
    texts += [f"Not measured: {', '.join(absent)}: `{COMMAND}`."] if absent else []
    return "\n\n".join([*texts, f"<sub>{record.machine}; `{COMMAND} --root DATA`</sub>"])


def summary(record: RunRecord, datasets: Sequence[str], models: Sequence[str]) -> str:
    """A line a model and a column a dataset: full-batch, then GAS, then the paper's GAS where it is verified."""
    found = {(each.model, each.dataset): each for each in comparisons(record, datasets, models)}
    if not found:
        return f"Not measured: `{COMMAND} --root DATA`"
    rows = [[model, *(_three(found.get((model, dataset))) for dataset in datasets)] for model in models]
    seeds = [each.gas.seeds for each in found.values()]
    span = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    few = f" (\\*: fewer than {FEW})" if min(seeds) < FEW <= max(seeds) else ""
    note = (
        f"full-batch / GAS (GAS in the paper, where verified); {span} seeds a cell{few}; {record.machine}; `{COMMAND}`"
    )
    return f"{_markdown(['', *datasets], rows)}\n\n<sub>{note}</sub>"


def _three(found: Comparison | None) -> str:
    if found is None:
        return "not measured"
    theirs = published.GAS.get((found.dataset, found.model))
    text = f"{found.full_batch.mean:.1f} / {found.gas.mean:.1f}" + (f" ({theirs[0]:.1f})" if theirs else "")
    return text + (" \\*" if found.gas.seeds < FEW else "")


def _stale_table(record: RunRecord, found: list[Comparison]) -> str:
    rows = []
    for each in found:
        batches = compare(record, each.dataset, each.model, "full-batch", FRESH)
        by_batches, late = ("", "") if batches is None else (_ways(batches)[-1], _late(batches))
        rows.append([*_ways(each), by_batches, _late(each), late])
    header = ["model", "dataset", "nothing stale", "GAS", "by histories", "by batches"]
    return _markdown([*header, "late: by histories", "late: by batches"], rows)


def _remedy_table(found: list[tuple[str, Comparison]]) -> str:
    rows = [[*_ways(each)[:2], way, *_ways(each)[2:], _late(each)] for way, each in found]
    return _markdown(["model", "dataset", "way", "full-batch", "this way", "difference", "late"], rows)


def _random_table(found: list[Comparison]) -> str:
    rows = []
    for each in found:
        key = (each.dataset, each.model)
        cells = (published.PGL_RANDOM, published.PGL_METIS)
        theirs = [f"{each_cell[key][0]:.2f}" if key in each_cell else "" for each_cell in cells]
        rows.append([*_ways(each), *theirs])
    return _markdown(
        ["model", "dataset", "random clusters", "METIS", "difference", "random, by PGL", "METIS, by PGL"], rows
    )


def _ways(each: Comparison) -> list[str]:
    """Model, dataset, both ways and their difference."""
    spread = f" ± {each.paired_error:.2f}" if each.gas.seeds > 1 else ""
    return [each.model, each.dataset, str(each.full_batch), str(each.gas), f"{each.difference:+.2f}{spread}"]


def _late(each: Comparison) -> str:
    if each.late is None:
        return ""
    return f"{each.late.mean:+.2f}" + (
        f" ± {each.late.error:.2f} ({each.late.seeds})" if each.late.seeds > 1 else " (1)"
    )


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

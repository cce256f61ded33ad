"""Curves of `bench.ablation`: validation accuracy and training loss by epoch, one figure for each case."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.ablation_table import FULL, finished
from bench.plots import BLUE, GREY, ORANGE, STYLE, missing
from bench.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "missing"]

COLORS = {"metis": BLUE, "random": ORANGE}
LABELS = {"metis": "METIS", "random": "random"}
PANELS = {"histories": "Histories", "none": "Out-of-batch neighbours left out"}
CURVES = {"val_acc": ("validation accuracy", 100.0), "train_loss": ("training loss", 1.0)}


def draw(record: RunRecord, case: str, title: str, folder: Path, suffix: str = "svg") -> Path:
    """Draws the mean over seeds, and a band from the lowest to the highest.

    Args:
        record: finished runs.
        case: whose.
        title: of the figure.
        folder: made if missing.
        suffix: the format, "svg" or "png".

    Returns:
        The file, `ablation-<case>.<suffix>`.

    Raises:
        ValueError: no run of the case is finished.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = finished(record, case)
    if not runs:
        raise ValueError(f"record has no finished run of {case}")
    counts = [len(done) for done in runs.values()]
    seeds = sorted({min(counts), max(counts)})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(12.8, 7.6), sharex=True, sharey="row")
        for down, (curve, (label, factor)) in enumerate(CURVES.items()):
            for across, (source, heading) in enumerate(PANELS.items()):
                axis = axes[down, across]
                for way, done in runs.items():
                    if way == FULL or source in way:
                        _draw(axis, way, done, curve, factor)
                axis.grid(True, axis="y", color="#dddddd", linewidth=0.7)
                axis.set_axisbelow(True)
                if down == 0:
                    axis.set_title(heading)
                else:
                    axis.set_xlabel("epoch")
                if across == 0:
                    axis.set_ylabel(f"{label}, %" if factor == 100.0 else label)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        for handle, text in zip(*axes[0, 1].get_legend_handles_labels(), strict=True):
            if text not in labels:
                handles.append(handle)
                labels.append(text)
        figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=11)
        of = f"{seeds[0]} seed" if seeds == [1] else f"mean and range of {' to '.join(map(str, seeds))} seeds"
        figure.suptitle(f"{title}: {of}", x=0.012, ha="left", color=GREY)
        figure.tight_layout(rect=(0, 0.05, 1, 1), w_pad=2.0)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"ablation-{case}.{suffix}"
        # without a date, equal runs give an equal file
        figure.savefig(path, dpi=90, metadata={"Date": None} if suffix == "svg" else {})
        plt.close(figure)
    return path


def _draw(axis: Axes, way: str, done: dict[str, Any], curve: str, factor: float) -> None:
    partition, is_regularised = way.split(",")[0], way.endswith("Lipschitz")
    color = COLORS.get(partition, GREY)
    label = LABELS.get(partition, way) + (", Lipschitz" if is_regularised else "")
    epochs = next(iter(done.values()))["curves"]["epoch"]
    values = factor * np.array([run["curves"][curve] for run in done.values()])
    axis.plot(epochs, values.mean(0), "--" if is_regularised else "-", color=color, label=label, linewidth=1.8)
    if len(values) > 1:
        axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)

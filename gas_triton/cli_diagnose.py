"""`gas-triton train --diagnose`: what is printed, and the files that are written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gas_triton.diagnostics import Diagnosis

__all__ = ["Diagnoses", "add_arguments"]


def add_arguments(train: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """The arguments of `train`."""
    group = train.add_argument_group("looking into the approximation")
    group.add_argument("--diagnose", type=int, metavar="EPOCHS", help="compare with exact rows every so many epochs")
    group.add_argument("--diagnose-json", type=path, metavar="FILE", help="file for a list with what each time found")
    group.add_argument("--diagnose-plot", type=path, metavar="FILE", help="file for a figure: .png, .svg or .pdf")
    group.add_argument(
        "--diagnose-gradients", action="store_true", help="compare gradients too; the whole graph must fit in memory"
    )


class Diagnoses:
    """What was found so far.

    Args:
        args: of the command line.
        say: prints a line.

    Raises:
        ValueError: options without --diagnose, or a file that cannot be written.
        MissingPackageError: matplotlib is needed and not installed.
    """

    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        from gas_triton.memory_plot import check_matplotlib
        from gas_triton.training import check_output

        self.every: int | None = args.diagnose
        self.gradients: bool = args.diagnose_gradients
        self.json: Path | None = args.diagnose_json
        self.plot: Path | None = args.diagnose_plot
        self.say, self.found = say, list[tuple[int, "Diagnosis"]]()
        if self.every is not None and self.every < 1:
            raise ValueError(f"--diagnose must be at least 1 epoch, got {self.every}")
        if self.every is None and (self.gradients or self.json is not None or self.plot is not None):
            raise ValueError("--diagnose-json, --diagnose-plot and --diagnose-gradients need --diagnose EPOCHS")
        for flag, file in (("--diagnose-json", self.json), ("--diagnose-plot", self.plot)):
            if file is not None:
                check_output(flag, file)
        if self.plot is not None:
            check_matplotlib(self.plot)

    def options(self) -> dict[str, Any]:
        """Arguments of `gas_triton.training.train`."""
        if self.every is None:
            return {}
        return {"on_diagnose": self.add, "diagnose_every": self.every, "diagnose_gradients": self.gradients}

    def add(self, epoch: int, diagnosis: Diagnosis) -> None:
        """Prints a line, and writes all that was found so far."""
        self.found.append((epoch, diagnosis))
        self.say(f"epoch {epoch}: {diagnosis.line()}")
        if self.json is not None:
            records = [{"epoch": number, **found.to_dict()} for number, found in self.found]
            self.json.write_text(json.dumps(records, indent=2, allow_nan=False) + "\n")

    def finish(self, title: str) -> None:
        """Prints the tables of the last time, and draws it."""
        if not self.found:
            if self.every is not None:
                self.say(f"nothing was diagnosed: no epoch was trained that {self.every} divides")
            return
        epoch, last = self.found[-1]
        self.say(f"\nepoch {epoch}\n{last.table()}\n")
        if self.plot is not None:
            last.plot(self.plot, f"{title}, epoch {epoch}")

"""Writes the tables of bench/README.md and README.md from the files in bench/results.

    python -m bench.report             writes them
    python -m bench.report --check     says what would change, and exits 1 if anything would

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is around is written by hand. Tables of a CPU
come from the newest file of a CPU, those of a GPU from the newest of a GPU; what was not measured is named, with the
command that measures it.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import ablation, accuracy, reproduce
from bench.report_goals import GOALS, goals_table, highlights
from bench.report_tables import (
    COMMAND,
    NOT_MEASURED,
    TABLES,
    Results,
    memory_table,
    partition_table,
    read_results,
    scale,
    unmeasured,
)
from bench.reproduce_table import summary
from bench.run_record import RunRecord
from bench.runner import PARTS

ROOT = Path(__file__).parent.parent
FILES = ("README.md", "bench/README.md")
RESULTS = Path("bench/results")
MARKED = re.compile(r"(?P<open><!-- table (?P<name>[^>]+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def block(results: Results, name: str) -> str:
    """What stands between the markers of a name.

    Raises:
        ValueError: there is no such table.
    """
    if name == "highlights":
        return highlights(results)
    if name in ("reproduction", "reproduction in brief"):
        record = RunRecord(results.folder / reproduce.RESULTS.name)
        if name == "reproduction":
            return reproduce.report(record)
        return summary(record, reproduce.DATASETS, reproduce.MODELS)
    if name == "accuracy":
        return accuracy.tables(accuracy.Record(results.folder / "accuracy-cpu.json"))
    if name == "ablation":
        return ablation.report(results.folder / ablation.RESULTS.name)
    if name == "memory against full-batch":
        return memory_table(results)
    if name in ("partition", "partition metis"):
        return partition_table(results, name.split()[-1])
    kind, _, rest = name.partition(" ")
    if kind in GOALS and rest == "goals":
        return goals_table(results, kind)
    if kind in GOALS and rest == "tables":
        return every_table(results, kind)
    if kind in GOALS and rest == "scale":
        return scale(results, kind)
    if kind in GOALS and rest in TABLES:
        table = TABLES[rest]
        return table.text(results, kind) or unmeasured(kind, table.part)
    known = ["highlights", "ablation", "reproduction", "reproduction in brief", "accuracy", "memory against full-batch"]
    known += ["partition", "partition metis", "cpu goals", *(f"cpu {name}" for name in TABLES)]
    raise ValueError(f"table {name!r}: expected one of {', '.join(known)}, or gpu instead of cpu, or gpu tables")


def every_table(results: Results, kind: str) -> str:
    """All tables of a device, each with a heading; then what was not measured."""
    texts, missing = [], []
    wanted = {name: table for name, table in TABLES.items() if table.part in PARTS or results.part(kind, table.part)}
    for table in wanted.values():
        entry = PARTS.get(table.part)
        if entry is not None and {"cpu": "cpu", "gpu": "cuda"}[kind] not in entry.devices:
            continue
        if text := table.text(results, kind):
            texts.append(f"### {table.title}\n\n{text}")
        elif results.part(kind, table.part) is None:
            missing.append(table.part)
    if missing:
        texts.append(f"{NOT_MEASURED.capitalize()}: `{COMMAND[kind]} --only {' '.join(dict.fromkeys(missing))}`")
    return "\n\n".join(texts)


def rewrite(text: str, results: Results) -> str:
    """The text of a file with its tables made anew."""
    return MARKED.sub(lambda found: f"{found['open']}\n{block(results, found['name'])}\n\n{found['end']}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        1 if `--check` finds a file that is not up to date, 2 if there is a file of results that cannot be used, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository (default: this one)")
    arguments = parser.parse_args(argv)
    try:
        results = read_results(arguments.root / RESULTS)
        texts = {name: (arguments.root / name).read_text() for name in FILES}
        made = {name: rewrite(text, results) for name, text in texts.items()}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    changed = [name for name in FILES if made[name] != texts[name]]
    for name in changed:
        if arguments.check:
            pair = (texts[name].splitlines(keepends=True), made[name].splitlines(keepends=True))
            sys.stdout.writelines(difflib.unified_diff(*pair, name, f"{name} from bench/results"))
        else:
            (arguments.root / name).write_text(made[name])
            print(f"wrote {name}")
    return int(arguments.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())

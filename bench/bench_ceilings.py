"""What the machine can do at best, as rows: the ceilings that "of speed of light" is measured against.

python -m bench.bench_ceilings
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bench import groups
from bench.groups import Setting
from bench.roofline import Ceilings, measure_ceilings
from bench.tables import Row

# Ends of the names of `Ceilings`: the column of a row, and what a value is divided by.
UNITS = {"_gbps": ("gbps", 1), "_tflops": ("tflops", 1), "_bytes": ("size_mib", 2**20)}
WAY = "this machine"


def measure(setting: Setting) -> list[Row]:
    """A row for each ceiling; they are measured unless the setting has them."""
    if setting.ceilings is None and setting.size == "tiny":
        return [{"op": "ceilings", "ceiling": "all", "way": WAY, "missing": "it takes longer than size tiny"}]
    return rows_of(setting.ceilings or measure_ceilings(setting.device))


def rows_of(ceilings: Ceilings) -> list[Row]:
    """A row for each number, one for each table that rows were gathered from."""
    rows: list[Row] = []
    values: dict[str, Any] = asdict(ceilings)
    for name, value in values.items():
        for end, (column, divisor) in UNITS.items():
            if name.endswith(end) and value:
                text = name.removesuffix(end).replace("_", " ")
                rows.append({"op": "ceilings", "ceiling": text, "way": WAY, column: value / divisor})
    for mib, rate in values.get("gathers", ()):
        rows.append({"op": "ceilings", "ceiling": f"gather from a table of {mib:g} MiB", "way": WAY, "gbps": rate})
    return rows


if __name__ == "__main__":
    groups.main(__doc__, measure)

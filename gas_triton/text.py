"""Numbers and tables for a reader."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text with one line a row, columns aligned to the right except the first."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def mebibytes(nbytes: int) -> str:
    """Bytes for a reader: `12.3 MiB`."""
    return f"{nbytes / 2**20:.1f} MiB"


def readable(nbytes: float | None) -> str:
    """Bytes for a reader, in three digits and binary units: `1.25 GiB`; `-` for None."""
    if nbytes is None:
        return "-"
    unit = 0
    while abs(nbytes) >= 999.5 and unit < 4:
        nbytes, unit = nbytes / 1024, unit + 1
    digits = 0 if unit == 0 else max(0, 2 - int(math.log10(max(abs(nbytes), 1))))
    return f"{nbytes:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"

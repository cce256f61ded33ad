"""Numbers and tables for a reader."""

from __future__ import annotations

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

"""Rows of results for a reader: tables for a terminal and for a file, and one line a case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gas_triton.text import table

# Flat and of JSON's types: what identifies the row (op, case, way), then numbers with their unit in the name.
Row = dict[str, Any]
OURS = "gas_triton"

# Columns that many rows have, as a reader sees them; others are shown under their own names.
_COLUMNS = {
    "ms": ("ms", "{:.3f}"), "fastest_ms": ("fastest ms", "{:.3f}"), "times_ours": ("over ours", "{:.2f}x"),
    "gbps": ("GB/s", "{:.1f}"), "light": ("of light", "{:.0%}"), "peak_mib": ("peak MiB", "{:.1f}"),
    "difference": ("difference", "{:.1e}"),
}  # fmt: skip


def render(rows: Sequence[Row]) -> str:
    """The rows as tables, one a case, for a terminal; of checks, how many there were and those that failed."""
    texts = []
    for title, group in _by_case([row for row in rows if not _is_check(row)]).items():
        columns = _columns(group, skip=("fastest_ms", "difference", "rounds"))
        lines = [[row.get("way", ""), *(_shown(row, key) for key in columns)] for row in group if "missing" not in row]
        lost = [f"{row['way']}: not measured, {row['missing']}" for row in group if "missing" in row]
        body = [table(["", *(_COLUMNS.get(key, (key,))[0] for key in columns)], lines)] if lines else []
        texts.append("\n".join([title, *body, *lost]))
    return "\n\n".join([*texts, *(["\n".join(checked)] if (checked := _checked_lines(rows)) else [])])


def markdown(rows: Sequence[Row]) -> str:
    """The rows as Markdown tables, one an op."""
    texts = []
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        if not _is_check(row):
            by_op.setdefault(row.get("op", ""), []).append(row)
    for group in by_op.values():
        names = list(dict.fromkeys(key for row in group for key in _identity(row)))
        # an op whose rows have no columns in common has them all, with gaps
        columns = [*names, *(["way"] if any("way" in row for row in group) else []), *_columns(group, skip=())]
        columns += ["missing"] if any("missing" in row for row in group) else []
        lines = [
            [_COLUMNS.get(key, (key,))[0] for key in columns],
            ["---" if key in names or key in ("way", "missing") else "--:" for key in columns],
            *([_shown(row, key, "").replace("|", "\\|") for key in columns] for row in group),
        ]
        texts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    checked = "\n".join(f"* {line}" for line in _checked_lines(rows))
    return "\n\n".join([*texts, *([checked] if checked else [])])


def headlines(rows: Sequence[Row]) -> list[str]:
    """A line for each case: our time and the others' over it, or what else the rows have; targets that were missed."""
    lines = []
    for title, group in _by_case([row for row in rows if not _is_check(row)]).items():
        words = []
        for row in group:
            way = row.get("way", "")
            if "missing" in row:
                continue
            if "ms" in row and (way == OURS or "times_ours" not in row):
                light = [f"{_shown(row, 'light')} of light"] if row.get("light") is not None else []
                words.append(", ".join([f"{way} {_shown(row, 'ms')} ms", *light]))
            elif "times_ours" in row:
                words.append(f"{way} {_shown(row, 'times_ours')}")
            else:
                words.append(
                    " ".join([way, *(f"{key} {_shown(row, key)}" for key in _columns([row], skip=()))]).strip()
                )
            if "met" in row:
                words.append("met" if row["met"] else "MISSED")
        lines.append(f"{title}: {'; '.join(words)}")
    return [*lines, *_checked_lines(rows)]


def _is_check(row: Row) -> bool:
    return "ok" in row and "tolerance" in row


def _checked_lines(rows: Sequence[Row]) -> list[str]:
    """For each op, how many checks there were and how near to the tolerance they came; then those that failed."""
    lines = []
    checks = [row for row in rows if _is_check(row)]
    for op in dict.fromkeys(row["op"] for row in checks):
        group = [row for row in checks if row["op"] == op]
        shares = [row["error"] / row["tolerance"] for row in group if row["ok"] and row["tolerance"]]
        worst = f", at most {max(shares):.2f} of the tolerance" if shares else ""
        lines.append(f"{op}: {sum(row['ok'] for row in group)} of {len(group)} checks passed{worst}")
    failed = [row for row in checks if not row["ok"]]
    return lines + [f"FAILED {_title(row)}: {_why(row)}" for row in failed]


def _why(row: Row) -> str:
    if "failure" in row:
        # the whole of it is in the file
        return row["failure"].rstrip().rpartition("\n")[2]
    return f"error {_shown(row, 'error')}, at worst {_shown(row, 'largest')}, over {row['tolerance']:.1e}"


def _identity(row: Row) -> list[str]:
    """The keys that tell a row's case from others: those before its way, or without one, its texts."""
    keys = list(row)
    if "way" in row:
        return keys[: keys.index("way")]
    return [key for key in keys if isinstance(row[key], str) and key != "failure"]


def _columns(group: Sequence[Row], skip: Sequence[str]) -> list[str]:
    """The keys that hold what was measured, those that many rows have first."""
    found = dict.fromkeys(key for row in group for key in row if key not in (*_identity(row), "way", "missing", *skip))
    return [*(key for key in _COLUMNS if key in found), *(key for key in found if key not in _COLUMNS)]


def _shown(row: Row, key: str, absent: str = "-") -> str:
    value = row.get(key)
    if value is None:
        return absent
    if isinstance(value, float):
        return _COLUMNS.get(key, ("", "{:.4g}"))[1].format(value)
    return str(value)


def _title(row: Row) -> str:
    return ", ".join(str(row[k]) if isinstance(row[k], str) else f"{k} {row[k]}" for k in _identity(row))


def _by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_title(row), []).append(row)
    return found

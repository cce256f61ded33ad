"""Rows of results as Markdown tables that read as comparisons: a line a case and a column a way, or a line a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.tables import OURS, Row

# What a row must have to be meant: a value, one of several, or what a function says of it (None where it is absent).
Where = Mapping[str, Any]
MISSED = "**missed**"


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits; all digits of whole numbers, in groups of three from 10 000 on."""
    if isinstance(value, int) or value == int(value) or abs(value) >= 999.5:
        return f"{value:,.0f}".replace(",", " ") if abs(value) >= 10_000 else f"{value:.0f}"
    digits = f"{value:.3g}"
    return f"{float(digits):.6f}".rstrip("0").rstrip(".") if "e" in digits and abs(value) >= 1e-6 else digits


def scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """The value in the first unit of which there is one at least, or in the last."""
    # what rounds up to one counts
    size, unit = next((pair for pair in units if abs(value) >= 0.9995 * pair[0]), units[-1])
    return f"{number(value / size)} {unit}"


def duration(ms: float) -> str:
    """`3.7 ms`, `1.2 s`, `45 us`."""
    return scaled(ms, ((1e3, "s"), (1.0, "ms"), (1e-3, "us")))


def memory(mib: float) -> str:
    """`58.2 MiB`, `1.5 GiB`, `12 KiB`."""
    return scaled(mib, ((2.0**10, "GiB"), (1.0, "MiB"), (2.0**-10, "KiB")))


def share(value: float) -> str:
    """`83 %`, with a digit more below one percent."""
    return f"{100 * value:.0f} %" if abs(value) >= 0.0095 or value == 0 else f"{100 * value:.2f} %"


def percent(value: float) -> str:
    """`8.3 %`."""
    return f"{number(100 * value)} %"


def times(value: float) -> str:
    """`3.1x`, of a ratio."""
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x" if value < 99.5 else f"{value:.0f}x"


def seconds(value: float) -> str:
    """`3.1 s`."""
    return duration(1e3 * value)


def exponent(value: float) -> str:
    """`0.98`."""
    return f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def megabytes(value: float) -> str:
    """`551 MB`."""
    return f"{value:.0f} MB"


def microseconds(value: float) -> str:
    """`21.1 us`."""
    return f"{value:.1f} us"


# Columns by key: header and how a value is written. Others have their own name and plain numbers.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ms": ("time", duration), "fastest_ms": ("fastest", duration), "step_ms": ("training step", duration),
    "plan_ms": ("plan", duration), "host_ms": ("host", duration), "times_ours": ("times ours", times),
    "peak_times_ours": ("memory over ours", times), "gbps": ("GB/s", number), "light": ("of speed of light", share),
    "peak_mib": ("peak memory", memory), "history_mib": ("histories", memory), "table_ms": ("table made in", duration),
    "data_mib": ("graph, features, labels", memory), "table_mib": ("table", memory), "device_mib": ("device", memory),
    "pulled_mib": ("pulled", memory), "pull_gbps": ("pulled at, GB/s", number), "hidden": ("hidden", share),
    "share": ("plan over step", percent), "growth": ("growth", percent), "curve": ("over", lambda key: header(key)),
    "of": ("cost", lambda key: header(key)), "slope": ("slope", exponent), "exponent": ("exponent", exponent),
    "epoch_s": ("epoch", seconds), "arithmetic": ("off the arithmetic", percent), "measure": ("", str),
    "batch_nodes": ("rows of a batch", number), "predicted_mib": ("by arithmetic", memory),
    "size_mib": ("size", memory), "tflops": ("TFLOP/s", number),
    "halo_ratio": ("halo rows an in-batch row", number), "halo_share": ("halo share", share),
    "kernels_us": ("kernels alone", microseconds), "call_us": ("call", microseconds), "over": ("over the layer", times),
    "overhead_us": ("overhead", microseconds), "table_mb": ("tables", megabytes), "halo": ("halo share", share),
    "anonymous_mb": ("peak anonymous memory", megabytes), "growth_mb": ("more", megabytes),
}  # fmt: skip


def header(key: str) -> str:
    """Of a column."""
    return COLUMNS.get(key, (key.replace("_", " "),))[0]


def shown(row: Row, key: str) -> str:
    """A cell; empty where the row lacks the key."""
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in COLUMNS and (key in ("of", "curve") or not isinstance(value, str)):
        return COLUMNS[key][1](value)
    return number(value) if isinstance(value, (int, float)) else str(value)


def verdict(row: Row) -> str:
    """` (target >= 3x: met)`; empty without a target."""
    if row.get("target") is None or row.get("met") is None:
        return ""
    target = row["target"] if isinstance(row["target"], str) else f">= {number(row['target'])}"
    return f" ({target}: {'met' if row['met'] else MISSED})"


# --- rows -------------------------------------------------------------------------------------------------------------


def matches(row: Row, where: Where) -> bool:
    """Whether a row is meant."""

    def agrees(value: Any, wanted: Any) -> bool:
        if callable(wanted):
            return bool(wanted(value))
        return value in wanted if isinstance(wanted, (tuple, list, set)) else bool(value == wanted)

    return all(agrees(row.get(key), wanted) for key, wanted in where.items())


def case_of(row: Row) -> dict[str, Any]:
    """The keys that tell a row's case from others: those between its op and its way."""
    keys = list(row)
    return {key: row[key] for key in keys[: keys.index("way")] if key != "op"} if "way" in row else {}


def by_case(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of every case, in their order; each with `peak_times_ours`, its peak over that of the first way."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(case_of(row).items()), []).append(row)
    return [[_with_peak(row, group[0]) for row in group] for group in found.values()]


def base_case(rows: Sequence[Row]) -> list[Row]:
    """The rows of the first case, in every pass."""
    first = {**case_of(rows[0]), "pass": None} if rows else {}
    return [row for row in rows if {**case_of(row), "pass": None} == first]


def _with_peak(row: Row, ours: Row) -> Row:
    if "missing" in row or not row.get("peak_mib") or not ours.get("peak_mib"):
        return row
    return {**row, "peak_times_ours": row["peak_mib"] / ours["peak_mib"]}


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table without the columns that have no cell."""
    kept = [place for place in range(len(head)) if any(line[place] for line in lines)]
    cells = [[line[place].replace("|", "\\|") for place in kept] for line in [head, *lines]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], ["---"] * len(kept), *cells[1:]])


def listing(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A line a row: what varies of its case, its way if that varies, the columns, and the target with its verdict."""
    rows = [row for group in by_case(rows) for row in group]
    present = [row for row in rows if "missing" not in row]
    names = varying(present)
    names += ["way"] if len({row.get("way") for row in present}) > 1 else []
    keys = [*names, *(key for key in columns if key not in names)]
    lines = [[*(shown(row, key) for key in keys), verdict(row).strip(" ()")] for row in present]
    return "\n\n".join([markdown([*map(header, keys), "target"], lines), *notes(rows, names)])


def comparison(
    rows: Sequence[Row], ours: Sequence[str] = ("ms",), others: Sequence[str] = ("times_ours",), best: bool = False
) -> str:
    """A line a case: what varies of it, columns of the first way, and a column for each of the others.

    Args:
        rows: of one part.
        ours: columns of the first way.
        others: what a cell of another way says.
        best: one column for the fastest of the others, in place of one for each.
    """
    groups = [group for group in by_case(rows) if "missing" not in group[0]]
    names = varying([group[0] for group in groups])
    base = groups[0][0]["way"]
    ways = list(dict.fromkeys(row["way"] for group in groups for row in group[1:]))
    head = [*map(header, names), *(_own_header(key, base) for key in ours)]
    head += ["fastest other way"] if best else ways
    lines = []
    for group in groups:
        first, found = group[0], {row["way"]: row for row in group[1:] if "missing" not in row}
        own = [shown(first, key) for key in ours]
        if first["way"] != base:
            own[ours.index("ms")] += f" ({first['way'].removeprefix(base).strip(', ')})"
        own[-1] += verdict(first)
        if best:
            fastest = min(found.values(), key=lambda row: row["times_ours"], default={})
            cells = [f"{fastest['way']}: {_other_cell(fastest, others)}" if fastest else ""]
        else:
            cells = [_other_cell(found.get(way, {}), others) for way in ways]
        lines.append([*(shown(first, key) for key in names), *own, *cells])
    every = [row for group in groups for row in group]
    return "\n\n".join([markdown(head, lines), *notes(every, names)])


def _own_header(key: str, base: str) -> str:
    if key not in ("ms", "peak_mib"):
        return header(key)
    return f"our {header(key)}" if base == OURS else f"{base}: {header(key)}"


def _other_cell(row: Row, keys: Sequence[str]) -> str:
    labels = {"peak_times_ours": "memory "}
    cells = [labels.get(key, "") + shown(row, key) for key in keys if row.get(key) is not None]
    return ", ".join(cells) + verdict(row)


def varying(rows: Sequence[Row]) -> list[str]:
    """Keys of the cases that are not the same in all rows."""
    keys = dict.fromkeys(key for row in rows for key in case_of(row))
    return [key for key in keys if len({row.get(key) for row in rows}) > 1]


def notes(rows: Sequence[Row], varied: Sequence[str]) -> list[str]:
    """What is the same in every case, and the ways that could not be measured."""
    present = [row for row in rows if "missing" not in row]
    same = {key: value for row in present[:1] for key, value in case_of(row).items() if key not in varied}
    found = [f"All: {', '.join(f'{header(key)} {shown(present[0], key)}' for key in same)}."] if same else []
    if any(row.get("partition") == "random" for row in present):
        found.append("Clusters were drawn at random: pymetis was not installed.")
    missing = dict.fromkeys((row.get("way", ""), row["missing"]) for row in rows if "missing" in row)
    return [*found, *(f"{way}: not measured, {reason}." for way, reason in missing)]

"""The tables of `bench.report`: which rows of which part they show, and how."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import bench_partition, records
from bench.pivot import (
    MISSED,
    Where,
    base_case,
    by_case,
    comparison,
    listing,
    markdown,
    matches,
    memory,
    shown,
    varying,
)
from bench.tables import Row
from gas_triton.memory_table import WAYS

COMMAND = {"cpu": "python -m bench.cpu", "gpu": "python -m bench.gpu"}
NOT_MEASURED = "not measured"


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        folder: of the files.
        parts: "cpu" or "gpu" -> the parts of its newest file.
    """

    folder: Path
    parts: dict[str, dict[str, records.Part]]

    def part(self, kind: str, name: str) -> records.Part | None:
        """A part that has rows."""
        found = self.parts.get(kind, {}).get(name)
        return found if found is not None and found.rows else None

    def rows(self, kind: str, name: str, where: Where) -> list[Row]:
        """The rows of a part that are meant and were measured, with `peak_times_ours`."""
        part = self.part(kind, name)
        rows = [row for group in by_case(part.rows) for row in group] if part else []
        return [row for row in rows if "missing" not in row and matches(row, where)]


def read_results(folder: Path) -> Results:
    """The newest file of each kind of device.

    Raises:
        ValueError: a part of it was measured with another size than "full".
    """
    newest: dict[str, tuple[str, Path, dict[str, records.Part]]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(("ablation-", "accuracy-", "memory-", "partition-", "reproduce-", "scale-")):
            continue
        parts = records.read(path)
        date = max((part.date for part in parts.values()), default="")
        kind = kind_of(path, parts)
        if kind not in newest or newest[kind][0] <= date:
            newest[kind] = date, path, parts
    for _, path, parts in newest.values():
        for name, part in parts.items():
            if part.rows and part.size != "full":
                raise ValueError(f"{path.name}: {name} was measured with size {part.size}; a table needs size full")
    return Results(folder, {kind: parts for kind, (_, _, parts) in newest.items()})


def kind_of(path: Path, parts: dict[str, records.Part]) -> str:
    """ "cpu" or "gpu"."""
    is_gpu = any("bench.gpu" in part.command for part in parts.values())
    return "gpu" if is_gpu or "nvidia" in path.name else "cpu"


def machine_of(part: records.Part) -> str:
    """The machine of a part, with its load where that was warned of."""
    return re.sub(r"[;\s]*warning: .*\(load ([\d.]+)\).*", r", load \1 when it began", part.machine, flags=re.DOTALL)


def origin(part: records.Part) -> str:
    """The line below a table."""
    line = f"{machine_of(part)}; {part.date}; `{part.command}`"
    if part.status != "ok":
        line += f" ({': '.join([part.status, *(part.reason or '').strip().splitlines()[-1:]])})"
    return f"<sub>{line}</sub>"


def unmeasured(kind: str, part: str) -> str:
    """What stands in the place of a table without results."""
    return f"{NOT_MEASURED.capitalize()}: `{COMMAND[kind]} --only {part}`"


# --- tables of a part ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of one part.

    Attributes:
        part: of the suite.
        title: for the tables of a GPU, which have no prose around them.
        render: rows to Markdown.
        where: which rows it has.
        choose: which of these rows.
    """

    part: str
    title: str
    render: Callable[[list[Row]], str]
    where: Where = field(default_factory=dict)
    choose: Callable[[list[Row]], list[Row]] = list

    def text(self, results: Results, kind: str) -> str | None:
        """The table and where it comes from; None if nothing was measured."""
        part = results.part(kind, self.part)
        rows = self.choose([row for row in part.rows if matches(row, self.where)]) if part else []
        if part is None or not any("missing" not in row for row in rows):
            return None
        return f"{self.render(rows)}\n\n{origin(part)}"


def absent(value: object) -> bool:
    """For a row that lacks a key."""
    return value is None


def present(value: object) -> bool:
    """For a row that has a key."""
    return value is not None


def compared(**options: object) -> Callable[[list[Row]], str]:
    """`comparison` with options."""
    return lambda rows: comparison(rows, **options)  # type: ignore[arg-type]


def listed(*columns: str) -> Callable[[list[Row]], str]:
    """`listing` of columns."""
    return lambda rows: listing(rows, columns)


SPEED = ("ms", "gbps", "light")
LAYER = compared(ours=("ms", "light", "peak_mib"), others=("times_ours", "peak_times_ours"))
TABLES: dict[str, Table] = {
    "aggregate": Table(
        "aggregate", "aggregate", listed(*SPEED, "times_ours", "peak_mib"), {"pass": present}, base_case
    ),
    "aggregate sweep": Table(
        "aggregate", "aggregate, one thing changed at a time", compared(ours=SPEED, best=True), {"pass": present}
    ),
    "attention": Table("attention", "GATConv", LAYER),
    "dynamic_attention": Table("dynamic_attention", "GATv2Conv and TransformerConv", LAYER),
    "multi_aggregate": Table("multi_aggregate", "Five aggregations at once, and PNAConv", LAYER),
    "sparse_rows": Table("sparse_rows", "A linear layer of sparse features", compared(ours=SPEED)),
    "push": Table("push", "push", compared(ours=SPEED)),
    "pull": Table("pull", "pull", compared(ours=SPEED)),
    "plan": Table("plan", "Planning a batch", compared(ours=("edges", "ms", "peak_mib")), {"against": absent}),
    "plan share": Table(
        "plan", "A plan over its step, and its growth", listed("ms", "step_ms", "share", "exponent"),
        {"against": present},
    ),
    "step": Table(
        "step", "A training step", compared(
            ours=("ms", "host_ms", "light", "hidden", "peak_mib"), others=("times_ours", "peak_times_ours")
        ),
    ),
    "inference": Table(
        "inference", "Inference", compared(ours=("ms", "peak_mib"), others=("times_ours", "peak_times_ours"))
    ),
    "diagnostics": Table(
        "diagnostics", "Diagnosing", compared(ours=("ms", "peak_mib"), others=("ms", "times_ours", "peak_mib"))
    ),
    "epoch": Table(
        "epoch", "An epoch of training", compared(
            ours=("nodes", "edges", "halo_ratio", "ms", "peak_mib"), others=("ms", "times_ours", "peak_times_ours")
        ),
    ),
    "prefetch": Table(
        "prefetch", "Tiers of histories", listed("ms", "times_ours", "peak_mib", "pulled_mib", "pull_gbps", "hidden"),
        {"measure": absent},
    ),
    "prefetch host": Table("prefetch", "The host and the bus", listed("ms", "gbps"), {"measure": present}),
    "memory": Table(
        "memory", "Peak memory of a step", listed("peak_mib", "predicted_mib", "history_mib", "data_mib", "growth")
    ),
    "overhead": Table("overhead", "Host overhead of one call", listed("kernels_us", "call_us", "overhead_us")),
    "static": Table(
        "static", "The first layer, aggregated once", compared(
            ours=("ms", "peak_mib", "table_mib", "table_ms"), others=("ms", "peak_mib", "times_ours")
        ),
    ),
    "autoscale": Table("autoscale", "Wrapping a PyG layer", listed("ms", "over"), {"over": present}),
    "file_tier": Table("file_tier", "Histories in files", listed("nodes", "ms", "anonymous_mb", "growth_mb")),
    "scale": Table(
        "scale", "Scale: slopes", listed("slope"),
        {"slope": present, "of": ("ms", "epoch_s", "plan_ms", "peak_mib", "device_mib")},
    ),
    "scale points": Table(
        "scale", "Scale: what varies is the number of nodes",
        listed("ms", "epoch_s", "plan_ms", "peak_mib", "device_mib", "history_mib"),
        {"slope": absent, "curve": "nodes"},
    ),
    "correctness": Table("correctness", "Checks", lambda rows: checks(rows)),
    "ceilings": Table("ceilings", "Ceilings of the machine", listed("gbps", "tflops", "size_mib")),
}  # fmt: skip


def checks(rows: list[Row]) -> str:
    """How many checks of an op passed, and those that did not."""
    lines = ["| op | checks | passed |", "| --- | --- | --- |"]
    for op in dict.fromkeys(row["op"] for row in rows):
        oks = [bool(row.get("ok")) for row in rows if row["op"] == op]
        lines.append(f"| {op} | {len(oks)} | {sum(oks)}{'' if all(oks) else f' {MISSED}'} |")
    return "\n".join(lines)


# --- other files -----------------------------------------------------------------------------------------------------


def memory_table(results: Results) -> str:
    """Histories against full-batch, from the files of `gas-triton memory --json`: a line a model, a column a way."""
    texts = []
    for path in sorted(results.folder.glob("memory-*.json")):
        content = json.loads(path.read_text())
        rows = content if isinstance(content, list) else content.get("rows", [])
        if rows:
            about = {} if isinstance(content, list) else content
            note = [f"{about[key]}" for key in ("dataset",) if about.get(key)]
            note += [f"{shown(about, key)} {key}" for key in ("nodes", "edges") if about.get(key)]
            note += [str(value) for key, value in (about.get("versions") or {}).items() if key == "device" and value]
            texts.append(
                f"{memory_by_way(rows)}\n\n<sub>{'; '.join([*note, f'`gas-triton memory`, {path.name}'])}</sub>"
            )
    command = "gas-triton memory --json bench/results/memory-cpu.json"
    return "\n\n".join(texts) or f"{NOT_MEASURED.capitalize()}: `{command}`"


def partition_table(results: Results, name: str) -> str:
    """What partitions cost ("partition"), or what METIS takes ("metis"), from the files of `bench.bench_partition`."""
    shown_as = {"partition": bench_partition.quality_table, "metis": bench_partition.metis_table}[name]
    parts = [records.read(path).get(name) for path in sorted(results.folder.glob("partition-*.json"))]
    texts = [f"{shown_as(part.rows)}\n\n{origin(part)}" for part in parts if part is not None and part.rows]
    options = {"partition": "--root DATA", "metis": "--metis"}[name]
    command = f"python -m bench.bench_partition {options} --json bench/results/partition-cpu.json"
    return "\n\n".join(texts) or f"{NOT_MEASURED.capitalize()}: `{command}`"


def memory_by_way(rows: Sequence[Row]) -> str:
    """What a step of each way takes, what stays on the device, and the share of the edges that a step uses."""
    # as rows of a part, where what tells cases apart stands before the way
    keys = ("model", "layers", "hidden", "num_parts", "batch_size")
    cases = [{**{key: row[key] for key in keys if row.get(key) is not None}, "way": "", **row} for row in rows]
    names = [name for name in varying(cases) if name in keys[:3]] or ["layers"]
    ways = list(dict.fromkeys(row["way"] for row in rows))

    def cell(row: Row) -> str:
        if row.get("step_bytes") is None:
            return str(row.get("reason") or "")
        kept, used = row.get("device_bytes"), row.get("edges_used")
        text = memory(row["step_bytes"] / 2**20) + (f" + {memory(kept / 2**20)}" if kept else "")
        return text + ("" if used is None else f", {100 * used:.0f} %")

    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(tuple(shown(row, name) for name in names), dict.fromkeys(ways, ""))
        line[row["way"]] = line[row["way"]] or cell(row)
    return markdown(
        [*names, *(WAYS.get(way, way) for way in ways)], [[*key, *line.values()] for key, line in lines.items()]
    )


def plots(results: Results) -> str:
    """The figures of the scale curves."""
    found = [path for end in ("svg", "png") for path in sorted(results.folder.glob(f"*scale*.{end}"))]
    stems = dict.fromkeys(path.stem for path in found)
    chosen = [next(path for path in found if path.stem == stem) for stem in stems]
    return "\n".join(f"![{path.stem}](results/{path.name})" for path in chosen)


def scale(results: Results, kind: str) -> str:
    """Slopes and figures, also of the runs that have files of their own."""
    names = ("scale", "scale points")
    texts = [text for name in names if (text := TABLES[name].text(results, kind))] or [unmeasured(kind, "scale")]
    for path in sorted(results.folder.glob("scale-*.json")):
        parts = records.read(path)
        alone = Results(results.folder, {kind_of(path, parts): parts})
        texts += [text for name in names if (text := TABLES[name].text(alone, kind))]
    return "\n\n".join(filter(None, [*texts, plots(results) if kind == "cpu" else ""]))

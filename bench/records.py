"""Files of results: one a machine and day, with a part for each benchmark, `bench/results/<device>-<date>.json`.

{"schema": 1, "device": "AMD EPYC", "parts": {"plan": {
    "status": "ok",            or "failed", "cut short", "not run"; "running" if the machine went away
    "reason": null,            the errors, or why not; the rows that came before are kept
    "command": "python -m bench.cpu --only plan",
    "machine": "AMD EPYC, 2 cores, 2 threads, torch 2.13.0+cpu, Python 3.11.7",
    "date": "2026-11-22", "seconds": 12.3, "size": "full",
    "rows": [{"op": "plan", ..., "way": "gas_triton", "ms": 4.4, ...}]}}}
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import tables
from bench.tables import Row

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


@dataclass
class Part:
    """What one benchmark gave."""

    status: str
    command: str
    machine: str
    date: str
    size: str
    seconds: float
    reason: str | None = None
    rows: list[Row] = field(default_factory=list)


def default_path(device: str, date: str, folder: Path = RESULTS) -> Path:
    """Where results of a device belong: `NVIDIA H200` gives `nvidia-h200-2026-11-22.json`."""
    return folder / f"{file_name(device)}-{date}.json"


def file_name(device: str) -> str:
    """A device's name in names of files: `nvidia-h200`."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def read(path: Path) -> dict[str, Part]:
    """The parts of a file by name.

    Raises:
        ValueError: the file is not one of results.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        assert content["schema"] == SCHEMA
        return {name: Part(**part) for name, part in content["parts"].items()}
    except (json.JSONDecodeError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected results with schema {SCHEMA}, got {type(error).__name__}: {error}"
        ) from error


def write(path: Path, device: str, parts: dict[str, Part]) -> None:
    """Writes the parts to a file; parts of other names that it has stay. All of it or nothing is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**(read(path) if path.exists() else {}), **parts}
    content = {"schema": SCHEMA, "device": device, "parts": {name: asdict(part) for name, part in merged.items()}}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    # what is no type of JSON's should not cost the results of a whole run
    draft.write_text(json.dumps(_rounded(content), indent=1, allow_nan=False, default=str) + "\n")
    draft.replace(path)


def markdown(path: Path) -> str:
    """A file's parts as Markdown, for a reader."""
    lines = [f"# {json.loads(path.read_text())['device']}"]
    for name, part in read(path).items():
        lines += [
            f"## {name}",
            f"`{part.command}`, {part.date}, size {part.size}, {part.seconds:.0f} s: {part.machine}",
        ]
        if part.status != "ok" or part.reason:
            lines.append(f"{part.status}:\n\n```\n{part.reason}\n```")
        lines += [tables.markdown(part.rows)] if part.rows else []
    return "\n\n".join(lines) + "\n"


def _rounded(value: Any) -> Any:
    """Numbers with five digits, as a reader of the file compares it with the one before; None for one that is none."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None

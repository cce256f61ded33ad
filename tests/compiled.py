"""What ptxas made of each kernel, kept: a change of registers, loads or shared memory shows even within the limits.

python -m tests.compiled            compiles all kernels (minutes) and keeps what they take
python -m tests.compiled WORD       only those with the word in their name; the others stay as they are
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXPECTED = ROOT / "bench" / "expected" / "compiled.json"
ACCEPT = "python -m tests.compiled"
ARCHITECTURES = ("80", "90")
FACTS = ("registers", "spilled", "wide_loads", "barriers", "shared")

Row = dict[str, Any]


def compile_all(*arguments: str) -> list[Row]:
    """The lines of `tests/aot.py`."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def read(path: Path = EXPECTED) -> dict[str, Any]:
    """`triton`, the version, and `kernels`: name, architecture, fact."""
    return json.loads(path.read_text())


def differences(rows: Sequence[Row], expected: dict[str, Any]) -> list[str]:
    """What changed of the kernels of one architecture, in words."""
    arch = str(rows[0]["arch"])
    before = {name: of_arch[arch] for name, of_arch in expected["kernels"].items() if arch in of_arch}
    lines = []
    for row in rows:
        old = before.pop(row["kernel"], None)
        changed = [] if old is None else [f"{key} {old[key]} -> {row[key]}" for key in FACTS if old[key] != row[key]]
        if old is None or changed:
            lines.append(f"{row['kernel']}, sm_{arch}: {', '.join(changed) or 'not known before'}")
    return lines + [f"{name}, sm_{arch}: not compiled any more" for name in before]


def write(rows: Iterable[Row], path: Path = EXPECTED, keep: bool = False) -> None:
    """Writes what kernels take, a line for each.

    Args:
        rows: of `compile_all`.
        path: the file.
        keep: whether kernels that are not in `rows` stay as they are in the file.
    """
    kernels: defaultdict[str, dict[str, Row]] = defaultdict(dict)
    version = ""
    for row in rows:
        version = row["triton"]
        kernels[row["kernel"]][str(row["arch"])] = {key: row[key] for key in FACTS}
    if not kernels:
        raise ValueError("no kernel was compiled: none has that word in its name")
    old = read(path) if keep else {"triton": version, "kernels": {}}
    if old["triton"] != version:
        raise ValueError(f"{path.name} is of Triton {old['triton']} and this is {version}: compile all kernels")
    lines = [f" {json.dumps(name)}: {json.dumps(of_arch)}" for name, of_arch in (old["kernels"] | kernels).items()]
    text = f'{{"triton": {json.dumps(version)}, "kernels": {{\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text)


if __name__ == "__main__":
    word = " ".join(sys.argv[1:])
    write(compile_all(*ARCHITECTURES, f"--only={word}"), keep=bool(word))
    print(f"wrote {EXPECTED}")

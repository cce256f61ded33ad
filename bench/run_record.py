"""Finished training runs in a JSON file that several processes may add to, so that none is done twice."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.side_by_side import machine


class RunRecord:
    """Runs by group and seed: a group is what is trained, and with which settings.

    Runs of a group whose settings were others are forgotten. A setting that did not exist when a run was done had the
    default that it has today.

    Args:
        path: the file; None keeps the runs in memory.
        defaults: of the settings; one that is not here is not asked of runs that do not have it.
    """

    def __init__(self, path: Path | None, defaults: Mapping[str, Any] | None = None) -> None:
        self.path, self.defaults = path, dict(defaults or {})
        self.machine = ""
        self.groups: dict[str, dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Takes up what other processes have added."""
        if self.path is not None and self.path.exists():
            content = json.loads(self.path.read_text())
            self.machine, self.groups = content.get("machine", ""), content["groups"]

    def runs(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Finished runs of a group by seed.

        Args:
            name: of the group.
            settings: of all its runs, as JSON has them.
        """
        group = self.groups.get(name)
        had = self.defaults | ({} if group is None else group["settings"])
        if group is None or any(settings.get(key) != value for key, value in had.items()):
            group = self.groups[name] = {"settings": dict(settings), "seeds": {}}
        return group["seeds"]

    def add(self, name: str, settings: Mapping[str, Any], seed: int, values: Mapping[str, Any]) -> None:
        """Adds a run to those that are in the file by now; a stop leaves the old file or the new one."""
        with self._locked():
            self.refresh()
            runs = self.runs(name, settings)
            runs[str(seed)] = dict(values)
            self.groups[name]["seeds"] = {key: runs[key] for key in sorted(runs, key=int)}
            if self.path is None:
                return
            content = {"machine": machine().splitlines()[0], "groups": dict(sorted(self.groups.items()))}
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump(content, file, indent=1)
                file.write("\n")
            os.chmod(file.name, 0o644)
            os.replace(file.name, self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # beside the file, which is replaced by every run
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

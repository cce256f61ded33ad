"""Every op, a training step and exact inference on a device against plain torch in float64, forward and backward.

python -m bench.correctness            on the GPU, or without one on the CPU
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.checks import Check, Problem, failure, perform
from bench.checks_of_ops import op_checks
from bench.checks_of_training import training_checks
from bench.groups import Setting, Size
from bench.groups import main as groups_main
from bench.tables import Row

ROOT = Path(__file__).parent.parent
# Kernels are compiled by so many processes at once: a kernel takes a second, and there are hundreds.
PROCESSES = 12
# Exit status of a process whose device does not answer any more.
BROKEN = 3


def measure(setting: Setting) -> list[Row]:
    """A row for each value: error and largest, tolerance, ok; and what failed."""
    checks = all_checks(setting.device, setting.size)
    if setting.device.type == "cuda" and setting.size != "tiny":
        rows = _in_processes(checks, setting)
    else:
        rows = _here(checks, setting)
    failed = sum(not row["ok"] for row in rows)
    if failed:
        setting.progress.failures.append(f"{failed} of {len(rows)} values are wrong")
    return rows


def all_checks(device: torch.device, size: Size) -> list[Check]:
    """The checks of a device; where time is short only the core of them."""
    checks = [*op_checks(), *training_checks(device)]
    if os.environ.get("TRITON_INTERPRET") == "1":
        # half a minute each, and tests/test_on_interpreter.py trains every model
        checks = [check for check in checks if check.core and check.op not in ("training step", "inference")]
    return [check for check in checks if check.core or size != "quick"]


def _here(checks: list[Check], setting: Setting) -> list[Row]:
    # a CPU needs minutes for all checks of thousands of nodes
    small = Problem(setting.device, "tiny")
    large = Problem(setting.device, setting.size)
    rows: list[Row] = []
    for number, check in enumerate(checks):
        if setting.is_over:
            setting.progress.cut = f"cut short after {number} of {len(checks)} checks"
            break
        found = perform(check, large if check.core else small)
        rows += found
        setting.progress.add(found)
    return rows


# --- in many processes -----------------------------------------------------------------------------------------------


def _in_processes(checks: list[Check], setting: Setting) -> list[Row]:
    """All checks, dealt out; one that takes its process down fails, and those after it get a new process."""
    count = min(PROCESSES, os.cpu_count() or 1, len(checks))
    rows: list[Row] = []
    lock = threading.Lock()

    def add(found: list[Row]) -> None:
        with lock:
            rows.extend(found)
            setting.progress.add(found)

    def run(share: list[int]) -> None:
        while share and not setting.is_over:
            done, said = _run_process(share, setting, add)
            share = share[done:]
            if share and not setting.is_over:
                # the device, or the process, went away in the middle of this one
                add([failure(checks[share[0]], f"the process ended: {said}")] if said is not None else [])
                share = share[1:] if said is not None else share
        with lock:
            left.extend(share)

    left: list[int] = []
    # the core of the checks, of steps and plans too, comes first: time may run out
    order = sorted(range(len(checks)), key=lambda place: not checks[place].core)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, [order[first::count] for first in range(count)]))
    if left:
        setting.progress.cut = f"cut short after {len(checks) - len(left)} of {len(checks)} checks"
    return rows


def _run_process(share: list[int], setting: Setting, add: Callable[[list[Row]], None]) -> tuple[int, str | None]:
    """How many of the checks have rows, and what the process said if it did not come to its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # as many processes as cores: more threads would only wait for each other
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-X", "faulthandler", "-m", "bench.correctness", "--device", str(setting.device)]
    command += ["--size", setting.size, "--share", ",".join(map(str, share))]
    done = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        timer = threading.Timer(min(3600.0, max(0.0, setting.deadline - time.monotonic())), process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                add(json.loads(line))
                done += 1
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read().strip()
    if process.returncode == 0 or (process.returncode == BROKEN and done):
        # the last check has a row that says what broke the device
        return done, None if done else "it did nothing"
    return done, f"status {process.returncode}: {said[-1500:]}"


def _share(places: list[int], device: torch.device, size: Size) -> int:
    """What a process does: a line of JSON for each of its checks."""
    checks, problem = all_checks(device, size), Problem(device, size)
    for place in places:
        rows = perform(checks[place], problem)
        print(json.dumps(rows), flush=True)
        if not all(row["ok"] for row in rows) and device.type == "cuda":
            # after an illegal access every later call of a process fails: the next check needs another
            try:
                torch.cuda.synchronize(device)
            except RuntimeError:
                return BROKEN
    return 0


def main() -> None:
    """Prints what was wrong, and how much was right."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--share")
    parser.add_argument("--device", type=torch.device)
    parser.add_argument("--size")
    arguments, _ = parser.parse_known_args()
    if arguments.share is not None:
        sys.exit(_share([int(place) for place in arguments.share.split(",")], arguments.device, arguments.size))
    groups_main(__doc__, measure)


if __name__ == "__main__":
    main()

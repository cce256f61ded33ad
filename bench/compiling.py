"""Compiles the kernels of the benchmarks that follow, in many processes at once.

A kernel takes about a second, an op has dozens of variants (widths, dtypes, what is read), and the parts that measure
run one after another. Here every case is made and computed once by ours, which leaves its kernels in Triton's cache on
disk.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.groups import OURS, Case, Setting, Size
from bench.tables import Row

ROOT = Path(__file__).parent.parent
PROCESSES = 12
# Parts whose cases are quickly made; the graphs of others take longer than their kernels.
MODULES = (
    "bench.bench_aggregate", "bench.bench_attention", "bench.bench_multi_aggregate", "bench.bench_push",
    "bench.bench_pull", "bench.bench_dynamic_attention",
)  # fmt: skip


def measure(setting: Setting) -> list[Row]:
    """A row: how many cases were computed in how many processes. One that fails will do so where it is measured."""
    count = min(PROCESSES, os.cpu_count() or 1)
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        done = sum(pool.map(lambda place: _run_process(place, count, setting), range(count)))
    row: Row = {"op": "compile", "way": OURS, "ms": 1e3 * (time.perf_counter() - start), "cases": done}
    return [{**row, "processes": count}]


def all_cases(setting: Setting) -> list[Case]:
    """The cases of all modules."""
    return [case for name in MODULES for case in importlib.import_module(name).cases(setting)]


def _run_process(place: int, count: int, setting: Setting) -> int:
    """Computes every `count`-th case in a process of its own until the deadline; how many it did."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # as many processes as cores: more threads would only wait for each other
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "bench.compiling", str(setting.device), setting.size, str(place), str(count)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment)
    timer = threading.Timer(min(3600.0, max(0.0, setting.deadline - time.monotonic())), process.kill)
    timer.start()
    try:
        said, _ = process.communicate()
    finally:
        timer.cancel()
        process.kill()
    return said.count("done\n")


def compute(setting: Setting, place: int, count: int) -> None:
    """Makes every `count`-th case, from `place` on, and computes it by each of our ways."""
    for case in all_cases(setting)[place::count]:
        try:
            for name, way in case.build().ways.items():
                if name.startswith(OURS):
                    way()
            print("done", flush=True)
        except Exception as error:
            print(f"{case.title}: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """What a process of `measure` does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", type=torch.device)
    parser.add_argument("size")
    parser.add_argument("place", type=int)
    parser.add_argument("count", type=int)
    arguments = parser.parse_args()
    size: Size = arguments.size
    compute(Setting(arguments.device, size), arguments.place, arguments.count)


if __name__ == "__main__":
    main()

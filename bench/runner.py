"""Runs the parts of the suite on a device and writes what they measured; a part that fails does not stop the rest.

The parts run in a process of their own, `bench.worker`, which is started again for the parts that are left when one
takes it down. This process only waits, and touches no device.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import records, worker
from bench.groups import SECONDS, Size
from bench.side_by_side import machine
from bench.tables import headlines
from bench.worker import Job
from gas_triton.doctor import device_name

ROOT = Path(__file__).parent.parent
MINUTES: dict[str, dict[Size, float]] = {
    "cuda": {"full": 8.0, "quick": 1.5, "tiny": 8.0},
    "cpu": {"full": 90.0, "quick": 15.0, "tiny": 15.0},
}
# Most characters of the summary: where only the end of the output is kept, it holds what counts.
SUMMARY = 9000
# Longest time in seconds that a case may take beyond its part's deadline before its process is ended.
GRACE = 60.0
# Longest time until a worker has begun its first part.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Entry:
    """A part of the suite.

    Attributes:
        module: with `measure(setting) -> list[Row]`.
        devices: kinds of device that it is for.
        share: of the time, in units of that of other parts.
    """

    module: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    share: float = 1.0


# In the order of their worth: where time runs out, the last are left.
PARTS: dict[str, Entry] = {
    "correctness": Entry("bench.correctness", share=3.0),
    # calls of microseconds, which the profiler of the parts after it slows down
    "overhead": Entry("bench.bench_overhead", ("cpu",)),
    "compile": Entry("bench.compiling", ("cuda",)),
    "aggregate": Entry("bench.bench_aggregate", share=2.0),
    "attention": Entry("bench.bench_attention"),
    "multi_aggregate": Entry("bench.bench_multi_aggregate"),
    "step": Entry("bench.bench_step", share=3.0),
    "prefetch": Entry("bench.bench_prefetch"),
    "push": Entry("bench.bench_push"),
    "pull": Entry("bench.bench_pull"),
    "plan": Entry("bench.bench_plan"),
    "inference": Entry("bench.bench_inference"),
    "diagnostics": Entry("bench.bench_diagnostics"),
    "dynamic_attention": Entry("bench.bench_dynamic_attention"),
    "sparse_rows": Entry("bench.bench_sparse_rows"),
    "memory": Entry("bench.bench_memory"),
    "scale": Entry("bench.bench_scale"),
    "ceilings": Entry("bench.bench_ceilings"),
    "epoch": Entry("bench.bench_epoch", ("cpu",)),
    "static": Entry("bench.bench_static", ("cpu",)),
    "autoscale": Entry("bench.bench_autoscale", ("cpu",)),
    "file_tier": Entry("bench.bench_file_tier", ("cpu",)),
    "partition": Entry("bench.bench_partition", ("cpu",)),
}


def main(kind: str, description: str | None, argv: Sequence[str] | None = None) -> int:
    """The command line of `bench.gpu` and `bench.cpu`.

    Args:
        kind: of device, "cuda" or "cpu".
        description: for --help.
        argv: arguments; those of the process if None.

    Returns:
        0 if every part that was to run did, to its end and without an error, else 1.
    """
    began = time.monotonic()
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parse(kind, description, argv)
    if kind == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device; python -m bench.cpu measures on a CPU", file=sys.stderr)
        return 2
    size: Size = "tiny" if arguments.tiny else "quick" if arguments.quick else "full"
    end = began + 60.0 * (arguments.minutes or MINUTES[kind][size])
    device = torch.device(kind)
    name = device_name(device) + (" interpreting" if arguments.interpret else "")
    today = datetime.date.today().isoformat()
    path = arguments.json or records.default_path(name, today if size == "full" else f"{today}-{size}")
    try:
        # before minutes are spent on what could not be kept
        records.write(path, name, {})
    except (OSError, ValueError) as error:
        print(f"cannot write results: {error}", file=sys.stderr)
        return 2
    print(f"{machine(device)}\nwriting {path}", flush=True)
    chosen = {part: PARTS[part] for part in arguments.only}
    job = Job(
        kind=kind,
        size=size,
        seconds=SECONDS[size],
        modules={part: entry.module for part, entry in chosen.items()},
        shares={part: entry.share for part, entry in chosen.items()},
        # the last cases end after it
        deadline=end - min(20.0, 0.1 * (end - began)),
        grace=GRACE,
        path=str(path),
        state="",
        device=name,
        command=f"python -m bench.{'gpu' if kind == 'cuda' else 'cpu'} {shlex.join(argv)}".rstrip(),
        interpret=arguments.interpret,
    )
    try:
        run(job, end)
    except KeyboardInterrupt:
        for part, found in records.read(path).items():
            if found.status == "running":
                _note(job, part, "failed", "interrupted")
        print(f"\ninterrupted; what was measured is in {path}", file=sys.stderr)
        return 130
    parts = {part: found for part, found in records.read(path).items() if part in chosen}
    print(f"\n{summary(parts)}\n\nwritten to {path} and {path.with_suffix('.md').name} in {_since(began)}")
    return 0 if all(part.status == "ok" for part in parts.values()) else 1


def _parse(kind: str, description: str | None, argv: Sequence[str]) -> argparse.Namespace:
    parts = [name for name, entry in PARTS.items() if kind in entry.devices]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="fewer cases and rounds: a look, not a result")
    sizes.add_argument("--tiny", action="store_true", help="the smallest inputs that run everything: a test")
    parser.add_argument("--minutes", type=float, help="after which everything has ended, whatever is left")
    parser.add_argument("--json", type=Path, help="file to write; its other parts stay (default: in bench/results)")
    parser.add_argument(
        "--interpret", action="store_true", help=argparse.SUPPRESS if kind == "cuda" else "run the GPU's kernels, "
        "in Triton's interpreter: hours unless --tiny",
    )  # fmt: skip
    return parser.parse_args(argv)


def run(job: Job, end: float) -> None:
    """Runs all parts of a job until `end`, each process for as long as it lasts."""
    path = Path(job.path)
    with tempfile.TemporaryDirectory() as folder:
        left = dict(job.modules)
        while left and time.monotonic() < job.deadline:
            state = Path(folder, f"state{len(left)}")
            message = run_worker(dataclasses.replace(job, modules=left, state=str(state)), end)
            begun = _state(state).get("part")
            if begun is None:
                # the parts after it would find the same
                for name in left:
                    _note(job, name, "failed", f"before its first part: {message}")
                return
            left = dict(list(left.items())[list(left).index(begun) + 1 :])
            if records.read(path)[begun].status == "running":
                _note(job, begun, "failed", message or "the process ended in the middle of it")
        for name in left:
            _note(job, name, "not run", "out of time")
    _markdown(path)


def run_worker(job: Job, end: float) -> str | None:
    """Runs one worker until it ends or has to be ended; returns what went wrong, if it was not the device."""
    job_env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    job_env.pop("TRITON_INTERPRET", None)
    if job.interpret:
        job_env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-X", "faulthandler", "-m", "bench.worker", json.dumps(dataclasses.asdict(job))]
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        # nothing is written to the pipe: that it closes tells the worker that this process has ended
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors, env=job_env)
        reason = None
        try:
            while process.poll() is None:
                limit = min(end, _state(Path(job.state)).get("end", begun + START_SECONDS))
                if time.monotonic() > limit:
                    reason = "took too long, and its process was ended"
                    break
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        errors.seek(0)
        said = errors.read()
    if process.returncode not in (0, worker.BROKEN) and reason is None:
        reason = f"the process ended with status {process.returncode}: {_tail(said)}"
    if said:
        print(_tail(said), file=sys.stderr, flush=True)
    _markdown(Path(job.path))
    return reason


def summary(parts: dict[str, records.Part]) -> str:
    """What a reader wants first: how each part ended, and a line for each of its cases."""
    lines = []
    for name, part in parts.items():
        reason = "" if part.reason is None else ": " + part.reason.strip().splitlines()[-1][:300]
        lines.append(f"{name}: {part.status} in {part.seconds:.1f} s, {len(part.rows)} rows{reason}")
    states = "\n".join(lines)
    room = SUMMARY - len(states)
    details = []
    for name, part in parts.items():
        for line in headlines(part.rows):
            text = f"{name}: {line}"[:240]
            room -= len(text) + 1
            details.append(text)
    if room < 0:
        while room < 40:
            room += len(details.pop()) + 1
        details.append("… the rest is in the files")
    return "\n".join([*details, "", states])


def _note(job: Job, name: str, status: str, reason: str) -> None:
    path = Path(job.path)
    found = records.read(path).get(name) if path.exists() else None
    if found is not None and found.status == "running":
        found.status, found.reason = status, reason
    elif found is not None and found.rows and status == "not run":
        # what was measured before stays
        return
    else:
        today = datetime.date.today().isoformat()
        found = records.Part(status, job.command, machine(torch.device("cpu")), today, job.size, 0.0, reason)
    records.write(path, job.device, {name: found})
    print(f"\n== {name}: {status}: {reason}", flush=True)


def _markdown(path: Path) -> None:
    if path.exists():
        path.with_suffix(".md").write_text(records.markdown(path))


def _state(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])[-3000:]


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"

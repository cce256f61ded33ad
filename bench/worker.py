"""The process that measures for `bench.runner`: one part after another, every case written as soon as it is done.

All parts share a process, because importing torch and starting CUDA take 5 to 10 seconds of the few minutes that all
have together. It ends itself where the device does not answer any more (after an illegal memory access every later
call of a process fails), the runner ends it where a part takes too long, and the parts that are left get a new one.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import records
from bench.groups import Case, Progress, Row, Setting, Size
from bench.roofline import Ceilings, measure_ceilings
from bench.side_by_side import machine
from bench.tables import render

# Exit status of a process whose device does not answer any more.
BROKEN = 3
TRACEBACK_LINES = 8


@dataclass(frozen=True)
class Job:
    """What a worker is asked for.

    Attributes:
        kind: of device, "cuda" or "cpu".
        size: of the inputs.
        seconds: that the rounds of one group should take.
        modules: of the parts, by name, in order.
        shares: of the time, by name.
        deadline: on `time.monotonic`, which processes of a machine share; no part begins after it.
        grace: seconds that the last case of a part may take beyond the part's deadline.
        path: results.
        state: file that says which part runs, and when it is to be ended.
        device: the name that results are written under.
        command: that asked for it all.
        interpret: run GPU kernels on CPU tensors, in Triton's interpreter.
    """

    kind: str
    size: Size
    seconds: float
    modules: dict[str, str]
    shares: dict[str, float]
    deadline: float
    grace: float
    path: str
    state: str
    device: str
    command: str
    interpret: bool = False


class BrokenDevice(Exception):
    """The device does not answer any more."""


class Saved(Progress):
    """Progress that is written to the results, at most once a second."""

    def __init__(self, part: records.Part, job: Job, name: str) -> None:
        super().__init__()
        self.part, self.job, self.name = part, job, name
        self.device = torch.device(job.kind)
        self.start = self.saved = time.monotonic()

    def add(self, rows: Sequence[Row]) -> None:
        super().add(rows)
        if time.monotonic() - self.saved > 1.0:
            self.save(self.rows)

    def fail(self, case: Case, error: Exception) -> None:
        self.failures.append(f"{case.title}: {describe(error)}")
        # the frames hold what the case had allocated
        traceback.clear_frames(error.__traceback__)
        if not answers(self.device):
            raise BrokenDevice from None
        release(self.device)

    def save(self, rows: Sequence[Row]) -> None:
        """Writes the part as it is now."""
        self.part.rows, self.part.seconds = list(rows), time.monotonic() - self.start
        records.write(Path(self.job.path), self.job.device, {self.name: self.part})
        self.saved = time.monotonic()


def work(job: Job) -> int:
    """Measures the parts; returns the exit status."""
    device = torch.device(job.kind)
    ceilings = ceilings_of(device) if job.size != "tiny" else None
    for place, (name, module) in enumerate(job.modules.items()):
        now = time.monotonic()
        if now >= job.deadline:
            break
        # twice a fair share of the time that is left: no part takes the others' time, and what one leaves the next have
        left = sum(job.shares[other] for other in list(job.modules)[place:])
        deadline = min(job.deadline, now + 2.0 * (job.deadline - now) * job.shares[name] / (left + job.shares[name]))
        _replace(Path(job.state), json.dumps({"part": name, "end": deadline + job.grace}))
        setting = Setting(device, job.size, job.seconds, ceilings, deadline)
        if not run_part(name, module, setting, job):
            return BROKEN
    return 0


def run_part(name: str, module: str, setting: Setting, job: Job) -> bool:
    """Measures one part and writes it; returns whether the device still answers."""
    part = records.Part(
        status="running", command=job.command, machine=machine(setting.device).replace("\n", "; "), size=job.size,
        date=datetime.date.today().isoformat(), seconds=0.0,
    )  # fmt: skip
    progress = Saved(part, job, name)
    progress.save([])
    try:
        rows = importlib.import_module(module).measure(dataclasses.replace(setting, progress=progress))
    except BrokenDevice:
        rows = progress.rows
    except Exception as error:
        rows = progress.rows
        progress.failures.append(describe(error))
        traceback.clear_frames(error.__traceback__)
    healthy = answers(setting.device)
    if not healthy:
        progress.failures.append("the device did not answer any more, and the process was ended")
    part.status = "failed" if progress.failures else "cut short" if progress.cut else "ok"
    part.reason = "\n\n".join([*progress.failures, *([progress.cut] if progress.cut else [])]) or None
    progress.save(rows)
    print(f"\n== {name}: {part.status} in {part.seconds:.1f} s" + (f": {part.reason}" if part.reason else ""))
    print(render(rows), flush=True)
    if healthy:
        forget_inputs()
        release(setting.device)
    return healthy


def describe(error: BaseException) -> str:
    """The last lines of an error's traceback."""
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return "\n".join(lines[-TRACEBACK_LINES:])[-2000:]


def answers(device: torch.device) -> bool:
    """Whether the device still computes."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except Exception:
        return False


def release(device: torch.device) -> None:
    """Gives back memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_inputs() -> None:
    """Empties the caches in which parts keep their inputs."""
    for name, module in list(sys.modules.items()):
        if name.startswith("bench."):
            for value in vars(module).values():
                if getattr(value, "__module__", None) == name and hasattr(value, "cache_clear"):
                    value.cache_clear()


def ceilings_of(device: torch.device) -> Ceilings | None:
    """The machine's ceilings; None, and a line that says why, if they cannot be measured."""
    try:
        return measure_ceilings(device)
    except Exception as error:
        print(f"no share of the speed of light: {describe(error)}", flush=True)
        return None


def watch_runner() -> None:
    """Ends this process when the runner ends, however it does: the pipe from it is closed then."""

    def watch() -> None:
        # not through `sys.stdin`, whose lock the interpreter wants when it ends
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    draft.replace(path)


def main() -> int:
    """The first argument is the `Job` as JSON."""
    job = Job(**json.loads(sys.argv[1]))
    watch_runner()
    if job.size == "tiny":
        # more threads would only wait for each other
        torch.set_num_threads(1)
    if not job.interpret:
        return work(job)
    from bench.on_interpreter import on_interpreter

    with on_interpreter() if job.kind == "cpu" else nullcontext():
        return work(job)


if __name__ == "__main__":
    sys.exit(main())

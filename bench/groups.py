"""What a benchmark is made of: groups of ways to compute the same from one input, and the rows that measuring gives.

A part of the suite is a module of this folder with `measure(setting) -> list[Row]`. Most have `cases(setting)`, a list
of `Case`, and `WAYS`; `measure_cases` does the rest for them, and so do the fixtures of `conftest.py` under pytest.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bench import side_by_side
from bench.roofline import Ceilings, Traffic, measure_ceilings, speed_of_light
from bench.tables import OURS as OURS
from bench.tables import Row, render
from gas_triton.memory import peak_bytes

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Size = Literal["full", "quick", "tiny"]
CPU = torch.device("cpu")
# That the rounds of one group should take.
SECONDS: dict[Size, float] = {"full": 2.0, "quick": 0.3, "tiny": 0.01}


class Progress:
    """What a part has measured so far, for a runner that keeps it when the part does not end.

    Attributes:
        rows: of the cases that are done.
        failures: what went wrong in single cases, as text.
        cut: why the part ended before its last case, None if it did not.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.cut: str | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """Notes the rows of a case."""
        self.rows += rows

    def fail(self, case: Case, error: Exception) -> None:
        """Notes that a case failed; raises the error again if no other case can do better."""
        raise error


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure.

    Attributes:
        device: of the tensors.
        size: "full" for results, "quick" for a look, "tiny" for tests of the benchmark itself.
        seconds: that the rounds of one group should take.
        ceilings: of the machine; without them no row says which share of the speed of light it reaches.
        deadline: on the clock of `time.monotonic`; no case begins after it.
        progress: told of every case.
    """

    device: torch.device = CPU
    size: Size = "full"
    seconds: float = 2.0
    ceilings: Ceilings | None = None
    deadline: float = math.inf
    progress: Progress = field(default_factory=Progress)

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.deadline

    def choose(self, full: Any, quick: Any, tiny: Any) -> Any:
        """The one of three that is for this size."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]


@dataclass(frozen=True)
class Group:
    """One input, and ways to compute the same from it.

    Attributes:
        ways: functions of nothing by name, ours first; each gives what it computed.
        missing: why a way cannot be measured here, by name.
        traffic: what computing it moves at least; None if nobody has counted.
        tolerance: largest difference of an answer from ours, in units of the largest value.
        difference: how far (ours, theirs) are apart; `relative_difference` if None.
    """

    ways: Mapping[str, Callable[[], object]]
    missing: Mapping[str, str] = field(default_factory=dict)
    traffic: Traffic | None = None
    tolerance: float = 1e-4
    difference: Callable[[Any, Any], float] | None = None


# equal to itself alone: pytest keeps the group of the case it is at
@dataclass(frozen=True, eq=False)
class Case:
    """A group that is not made yet.

    Attributes:
        op: what is measured, the name of its kernel where there is one.
        keys: what tells this case from others of the op, by column: {"pass": "forward", "features": 128}.
        build: makes the group.
    """

    op: str
    keys: Mapping[str, Any]
    build: Callable[[], Group]

    @property
    def title(self) -> str:
        """The case in words."""
        return ", ".join([self.op, *(v if isinstance(v, str) else f"{k} {v:g}" for k, v in self.keys.items())])


def measure_cases(
    cases: Iterable[Case], setting: Setting, measure_case: Callable[[Case, Setting], list[Row]] | None = None
) -> list[Row]:
    """The rows of all cases, one after another; each group is dropped before the next is made.

    No case begins after the setting's deadline; a case that fails is left to `setting.progress`.

    Args:
        cases: what to measure.
        setting: where and how long.
        measure_case: gives the rows of a case; `measure` if None.
    """
    measure_case = measure_case or measure
    cases = list(cases)
    rows: list[Row] = []
    for number, case in enumerate(cases):
        if setting.is_over:
            setting.progress.cut = f"cut short after {number} of {len(cases)} cases"
            break
        try:
            found = measure_case(case, setting)
        except Exception as error:
            setting.progress.fail(case, error)
        else:
            rows += found
            setting.progress.add(found)
    return rows


def measure(case: Case, setting: Setting) -> list[Row]:
    """A row for every way: ms (median over rounds), fastest_ms, times_ours, gbps, light, peak_mib, difference.

    times_ours is the median over rounds of the way's time over ours in the same round; gbps divides the least bytes
    that any way has to move by the time; light is the least time that the machine allows over the time, and bound
    what limits it.

    Raises:
        AssertionError: the answers of two ways differ by more than the group's tolerance.
    """
    group = runnable(case.build())
    differences = check(case, group)
    seconds = side_by_side.interleave(group.ways, device=setting.device, seconds=setting.seconds)
    # measured last: the profiler that counts on a CPU disturbs what comes after it
    peaks = {name: peak_of(way, setting.device) for name, way in group.ways.items()}
    ours = next(iter(group.ways))
    light = None
    if group.traffic is not None and setting.ceilings is not None:
        light = speed_of_light(group.traffic, setting.ceilings)
    rows: list[Row] = []
    for name, values in seconds.items():
        median = statistics.median(values)
        row = {"op": case.op, **case.keys, "way": name, "ms": 1e3 * median, "fastest_ms": 1e3 * min(values)}
        row["times_ours"] = side_by_side.ratio(seconds, name, ours)
        if group.traffic is not None:
            row["gbps"] = group.traffic.least_bytes / median / 1e9
            if light is not None:
                row |= {"light": light.seconds / median, "bound": light.bound}
        rows.append({**row, "peak_mib": peaks[name] / 2**20, "difference": differences[name], "rounds": len(values)})
    rows += [{"op": case.op, **case.keys, "way": name, "missing": why} for name, why in group.missing.items()]
    return rows


def runnable(group: Group) -> Group:
    """The group without the ways that raise, ours excepted: where a package or memory fails them, ours still counts."""
    ways, missing = {}, dict(group.missing)
    ours = next(iter(group.ways))
    for name, way in group.ways.items():
        try:
            # ours too: ways may go on from what they did before, and stay at the same place
            way()
            ways[name] = way
        except (RuntimeError, ImportError) as error:
            if name == ours:
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return dataclasses.replace(group, ways=ways, missing=missing)


def check(case: Case, group: Group) -> dict[str, float]:
    """How far every way's answer is from ours.

    Raises:
        AssertionError: further than the group's tolerance, or not a number.
    """
    names = list(group.ways)
    ours = group.ways[names[0]]()
    found = {names[0]: 0.0}
    for name in names[1:]:
        found[name] = (group.difference or relative_difference)(ours, group.ways[name]())
        assert found[name] <= group.tolerance, (
            f"{case.title}: answers of {name} differ from ours by {found[name]:.1e}, more than {group.tolerance:g}"
        )
    return found


def relative_difference(ours: Any, theirs: Any) -> float:
    """The largest difference between two tensors, or pairwise between tuples of them, over the largest value."""
    if not isinstance(ours, Tensor):
        return max(map(relative_difference, ours, theirs))
    assert ours.shape == theirs.shape, f"ours has shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    if ours.numel() == 0:
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    return difference if math.isfinite(difference) else math.inf


def peak_of(way: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call allocates at once, what it returns among them."""
    with peak_bytes(device) as peak:
        way()
    return peak.nbytes


# --- command line -----------------------------------------------------------------------------------------------------


def main(
    description: str | None, measure: Callable[[Setting], list[Row]], parser: argparse.ArgumentParser | None = None
) -> None:
    """The command line of one part: measures and prints.

    Args:
        description: for --help.
        measure: of the part.
        parser: with options of the part's own, see `options`.
    """
    arguments = (parser or options(description)).parse_args()
    print(side_by_side.machine())
    print(render(measure(setting_of(arguments))))


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser of what every part asks: --device, --size, --seconds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(SECONDS), default="full", help="tiny is for tests of the benchmark")
    parser.add_argument("--seconds", type=float, help="that the rounds of one group should take")
    return parser


def setting_of(arguments: argparse.Namespace) -> Setting:
    """What the options of `options` ask for."""
    seconds = SECONDS[arguments.size] if arguments.seconds is None else arguments.seconds
    ceilings = measure_ceilings(arguments.device) if arguments.size == "full" else None
    return Setting(arguments.device, arguments.size, seconds, ceilings)


# --- pytest-benchmark -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _checked(case: Case) -> Group:
    group = case.build()
    check(case, group)
    return group


def run_with(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Runs one way of a case under pytest-benchmark, after a check that the ways of the case agree."""
    group = _checked(case)
    if way not in group.ways:
        import pytest

        pytest.skip(group.missing.get(way, f"{way} does not compute {case.title}"))
    benchmark.group = case.title
    benchmark(group.ways[way])

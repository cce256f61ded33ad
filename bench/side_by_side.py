"""Timing of several functions side by side: one round runs each once, so that a disturbance hits all of them alike."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gas_triton.doctor import device_name
from gas_triton.memory import peak_bytes
from gas_triton.text import mebibytes

Functions = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Target:
    """A ratio that the project promises: `slower` takes at least `at_least` times as long as `faster`."""

    slower: str
    faster: str
    at_least: float


def interleave(functions: Functions, rounds: int = 20, warmup: int = 3, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of every function in every round.

    The order turns by one each round, so that no function always runs in the caches that the same other one left.

    Args:
        functions: what to time, by name.
        rounds: rounds that count.
        warmup: rounds before them that do not.
        calls: calls timed as one, for functions that are short beside the clock.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(-warmup, rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                function = functions[name]
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                elapsed = (time.perf_counter() - start) / calls
                if number >= 0:
                    seconds[name].append(elapsed)
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], slower: str, faster: str) -> float:
    """How many times longer `slower` takes: the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))


def report(title: str, seconds: Mapping[str, list[float]], base: str, targets: list[Target] | None = None) -> str:
    """A table of medians and ratios to `base`, and whether the targets are met."""
    width = max(map(len, seconds))
    lines = [title, f"  {'':{width}}  {'median':>10}  {'fastest':>10}  over {base}"]
    for name, values in seconds.items():
        median, fastest = _duration(statistics.median(values)), _duration(min(values))
        lines.append(f"  {name:{width}}  {median:>10}  {fastest:>10}  {ratio(seconds, name, base):.2f}x")
    for target in targets or []:
        is_measured = target.slower in seconds
        lines.append(_verdict(target, ratio(seconds, target.slower, target.faster) if is_measured else None))
    return "\n".join(lines)


def peaks(functions: Functions) -> dict[str, int]:
    """Most bytes that a call of each function allocates at once, after a call that does not count."""
    found = {}
    for name, function in functions.items():
        function()
        with peak_bytes("cpu") as peak:
            function()
        found[name] = peak.nbytes
    return found


def report_peaks(nbytes: Mapping[str, int], target: Target) -> str:
    """A line of bytes, and whether the target for their ratio is met."""
    line = "  peak memory: " + ", ".join(f"{name} {mebibytes(size)}" for name, size in nbytes.items())
    is_measured = target.slower in nbytes
    return f"{line}\n{_verdict(target, nbytes[target.slower] / nbytes[target.faster] if is_measured else None)}"


def passes(
    ways: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, grad: Tensor, mode: str
) -> dict[str, Callable[[], Tensor]]:
    """Functions of nothing: the output of `x`, or with mode "forward + backward" the gradient of `x`."""

    def forward(way: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return way(x)

    def both(way: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.detach().requires_grad_()
        way(leaf).backward(grad)
        assert leaf.grad is not None
        return leaf.grad

    return {name: functools.partial(forward if mode == "forward" else both, way) for name, way in ways.items()}


def missing_pyg() -> str | None:
    """Why torch_geometric cannot be measured; None if it can."""
    found = importlib.util.find_spec("torch_geometric") is not None
    return None if found else "needs torch_geometric: pip install 'gas-triton[pyg]'"


def parse_rounds(description: str | None, default: int) -> int:
    """How many rounds the command line asks for, with the module's text as its help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=default)
    return parser.parse_args().rounds


def machine() -> str:
    """The machine and the versions that a number belongs to; says so if something else keeps the machine busy."""
    threads = torch.get_num_threads()
    line = (
        f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        line += f"\nwarning: the machine was busy (load {load:.1f}), so the times below are noisy"
    return line


def _verdict(target: Target, reached: float | None) -> str:
    line = f"  target {target.slower} / {target.faster} >= {target.at_least:g}x"
    if reached is None:
        return f"{line}: not measured"
    return f"{line}: {reached:.2f}x, {'met' if reached >= target.at_least else 'MISSED'}"


def _duration(seconds: float) -> str:
    if seconds >= 1.0:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} us"

"""Timing of several functions side by side: one round runs each once, so that a disturbance hits all of them alike."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import triton
from torch import Tensor

from gas_triton.doctor import device_name

Functions = Mapping[str, Callable[[], object]]
CPU = torch.device("cpu")


class Clock(Protocol):
    """Times calls on a device."""

    def time(self, function: Callable[[], object], calls: int) -> Callable[[], float]:
        """Runs the function; what is returned gives the seconds that it took."""

    def wait(self) -> None:
        """Waits until everything that was run is done."""


def interleave(
    functions: Functions,
    rounds: int | None = None,
    warmup: int = 3,
    calls: int = 1,
    *,
    device: torch.device = CPU,
    seconds: float = 2.0,
) -> dict[str, list[float]]:
    """Seconds of every function in every round.

    The order turns by one each round, so that no function always runs in the caches that the same other one left. On a
    GPU, events are recorded around a call, after a write that fills the L2 cache with something else: nothing waits
    for the GPU until all rounds are queued.

    Args:
        functions: what to time, by name.
        rounds: rounds that count; if None, as many as fit into `seconds`, from 3 to 100.
        warmup: rounds before them that do not.
        calls: calls timed as one, for functions that are short beside the clock.
        device: where the functions compute.
        seconds: that the rounds should take, where their number is not given.
    """
    clock: Clock = CudaClock(device) if device.type == "cuda" else HostClock()
    names = list(functions)
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        elapsed = seconds
        for number in range(-warmup, 0):
            start = time.perf_counter()
            for name in turned(names, number):
                clock.time(functions[name], calls)
            clock.wait()
            elapsed = time.perf_counter() - start
            if rounds is None and elapsed > seconds:
                # as long as all rounds that count together should take
                break
        if rounds is None:
            # the last round of the warm-up says how long one takes
            rounds = int(min(100, max(3, seconds / max(elapsed, 1e-6))))
        for number in range(rounds):
            for name in turned(names, number):
                times[name].append(clock.time(functions[name], calls))
        clock.wait()
    finally:
        if was_enabled:
            gc.enable()
    return {name: [read() / calls for read in reads] for name, reads in times.items()}


def turned(names: list[str], number: int) -> list[str]:
    """The names, beginning with another one in each round."""
    turn = number % len(names)
    return names[turn:] + names[:turn]


class HostClock:
    """Times calls that are done when they return."""

    def time(self, function: Callable[[], object], calls: int) -> Callable[[], float]:
        """Runs the function; what is returned gives the seconds that it took."""
        start = time.perf_counter()
        for _ in range(calls):
            function()
        elapsed = time.perf_counter() - start
        return lambda: elapsed

    def wait(self) -> None:
        """Waits until everything that was run is done."""


class CudaClock:
    """Times calls on a GPU's current stream, each after a write that leaves nothing of its inputs in the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # twice the cache, and long enough that the host is ahead with its launches when the write ends
        self.filler = torch.empty(max(2 * cache_bytes, 1 << 28), dtype=torch.int8, device=device)

    def time(self, function: Callable[[], object], calls: int) -> Callable[[], float]:
        """As of `HostClock`; the seconds can be read after `wait`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.filler.zero_()
        start.record(torch.cuda.current_stream(self.device))
        for _ in range(calls):
            function()
        end.record(torch.cuda.current_stream(self.device))
        return lambda: start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        """As of `HostClock`."""
        torch.cuda.synchronize(self.device)


def ratio(seconds: Mapping[str, list[float]], slower: str, faster: str) -> float:
    """How many times longer `slower` takes: the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))


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


def machine(device: torch.device = CPU) -> str:
    """The machine and the versions that a number belongs to; says so if something else keeps the machine busy."""
    threads = torch.get_num_threads()
    line = (
        f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    if device.type == "cuda":
        line = f"{device_name(device)}, CUDA {torch.version.cuda}, triton {triton.__version__}, {line}"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        line += f"\nwarning: the machine was busy (load {load:.1f}), so the times below are noisy"
    return line

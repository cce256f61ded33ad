"""The most memory that torch allocates at once during a call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Peak", "peak_bytes"]


@dataclass
class Peak:
    """What `peak_bytes` measures.

    Attributes:
        nbytes: the most bytes allocated at once beyond those allocated before; set when the block ends.
    """

    nbytes: int = 0


@contextmanager
def peak_bytes(device: torch.device | str) -> Iterator[Peak]:
    """Measures the most bytes that torch has allocated on a device at once inside a `with` block.

        with peak_bytes("cpu") as peak:
            loss(model).backward()
        print(peak.nbytes)

    What was allocated before does not count. Temporaries inside ops do, those of custom ops among them. Bytes are those
    that tensors asked for on a CPU, and blocks of the caching allocator (rounded up to 512 bytes) on a GPU. Memory that
    does not come from torch's allocators (NumPy, METIS) is not seen.

    On a GPU this costs nothing, restarts torch's own peak statistics, and freeing earlier memory makes room for later.
    On a CPU it runs torch's profiler, which slows small ops several times; only the calling thread and the backward
    passes it starts are seen, and freeing what was allocated before does not count either.

    Args:
        device: a CPU or CUDA device.

    Returns:
        A context manager that gives a `Peak`, whose `nbytes` is set when the block ends, also by an exception.

    Raises:
        ValueError: another kind of device.
        RuntimeError: on a CPU, a torch profiler is already running in this thread.
    """
    device = torch.device(device)
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.nbytes = torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu":
        if torch.autograd._profiler_enabled():
            raise RuntimeError("peak_bytes on a cpu runs torch's profiler, and one is already running in this thread")
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU],
            profile_memory=True,
        )
        with without_log(), warnings.catch_warnings():
            # Older torch warns that a second cycle would lose the events of the first: there is one only. With
            # acc_events=True it would not, but then every event becomes a Python object when the block ends.
            warnings.filterwarnings("ignore", "Profiler clears events")
            profiler.start()
        try:
            yield peak
        finally:
            with without_log():
                profiler.stop()
            peak.nbytes = _highest(_allocations(profiler))
    else:
        raise ValueError(f"device must be a cpu or cuda device, got {device}")


def _allocations(profiler: torch.profiler.profile) -> list[tuple[int, int, int]]:
    """(time, address, bytes, negative where they are freed) of every event of the CPU allocator, in order."""
    events: list[tuple[int, int, int]] = []
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    waiting: list[Any] = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == "cpu":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return sorted(events, key=lambda event: event[0])


def _highest(events: list[tuple[int, int, int]]) -> int:
    # Addresses are followed one by one: torch also reports the freeing of blocks that an earlier profile saw allocated.
    live: dict[int, int] = {}
    now = highest = 0
    for _, address, nbytes in events:
        if nbytes > 0:
            live[address] = nbytes
            now += nbytes
            highest = max(highest, now)
        else:
            now -= live.pop(address, 0)
    return highest


@contextmanager
def without_log() -> Iterator[None]:
    """Keeps the profiler's tracing library, which reads its log level when it first starts, from writing to stderr."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]

"""What histories need of a device: streams, events, and a few copies.

Everything asynchronous about histories goes through `Device`, so that its schedule can be checked without a GPU. Work
on one stream runs in the order of its calls; work on different streams is ordered by `wait` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from gas_triton.batch import Batch
from gas_triton.history.tiers import FileMemory, HostMemory
from gas_triton.kernels.pull import gather_rows

Stream = Literal["compute", "plan", "pull", "push"]
Event = Any
Spans = Sequence[Sequence[int]]
T = TypeVar("T")


class Device(Protocol):
    """Streams, events and copies of one device.

    Layers run on "compute", the caller's current stream; batches are planned on "plan", halo rows fetched on "pull" and
    in-batch rows stored on "push".

    Attributes:
        concurrent: whether the other streams run beside "compute".
    """

    concurrent: bool

    def record(self, stream: Stream) -> Event:
        """An event that is done when all work given to `stream` so far is done."""
        ...

    def wait(self, stream: Stream, event: Event, edge: str) -> None:
        """Later work of `stream` starts after `event`; the host does not wait. `edge` names what would go wrong."""
        ...

    def is_done(self, event: Event) -> bool:
        """Whether an event has happened."""
        ...

    def elapsed(self, start: Event, end: Event) -> float:
        """Seconds between two events that are done."""
        ...

    def settle(self) -> None:
        """The host waits until everything is done and tables in host memory are up to date."""
        ...

    def run(self, stream: Stream, make: Callable[[], T]) -> T:
        """Calls `make`, whose work on the device goes to `stream`."""
        ...

    def keep(self, batch: Batch) -> None:
        """Says that a batch made on "plan" is used on "compute" and "pull"."""
        ...

    def map(self, memory: HostMemory | FileMemory) -> Tensor:
        """The tensor by which `gather`, and layers that read in place, see a table in host memory."""
        ...

    def gather(self, stream: Stream, table: Tensor, ids: Tensor, out: Tensor) -> None:
        """out[k] = table[ids[k]], rows as they are stored."""
        ...

    def copy_ranges(self, stream: Stream, source: Tensor, target: Tensor, spans: Spans) -> None:
        """Copies consecutive rows of `source` to the row ranges [first, last) of `target`."""
        ...


class Inline:
    """The CPU: every call is done when it returns."""

    concurrent = False

    def record(self, stream: Stream) -> Event:
        return time.perf_counter()

    def wait(self, stream: Stream, event: Event, edge: str) -> None:
        pass

    def is_done(self, event: Event) -> bool:
        return True

    def elapsed(self, start: Event, end: Event) -> float:
        return end - start

    def settle(self) -> None:
        pass

    def run(self, stream: Stream, make: Callable[[], T]) -> T:
        return make()

    def keep(self, batch: Batch) -> None:
        pass

    def map(self, memory: HostMemory | FileMemory) -> Tensor:
        return memory.tensor

    def gather(self, stream: Stream, table: Tensor, ids: Tensor, out: Tensor) -> None:
        gather_rows(table, ids, out)

    def copy_ranges(self, stream: Stream, source: Tensor, target: Tensor, spans: Spans) -> None:
        start = 0
        for first, last in spans:
            target[first:last].copy_(source[start : start + last - first])
            start += last - first


@cache
def device_of(device: torch.device) -> Device:
    """The device that moves rows for layers on `device`; one for each, so that all histories share its streams."""
    if device.type == "cuda":
        from gas_triton.history.cuda import Cuda

        return Cuda(device)
    return Inline()


def named(stage: str) -> AbstractContextManager[Any]:
    """Names a stage for torch's profiler; costs nothing where none runs."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(stage)

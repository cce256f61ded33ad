"""`Fake`: a device whose streams really run late, in a random legal order, and that reports races.

Two things are kept apart. What runs: work of the side streams waits in queues and runs as late as "compute" or the host
must have it, or earlier by chance, so a missing `wait` shows as wrong rows. What is ordered: a vector clock for each
stream and for the host says which accesses the schedule orders, so a missing `wait` shows even where the rows
happen to be right. Work of "compute" and "plan" runs at once, as torch on a CPU does.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gas_triton import Batch
from gas_triton.history.device import Spans, Stream
from gas_triton.history.tiers import FileMemory, HostMemory
from gas_triton.kernels.pull import gather_rows

T = TypeVar("T")
Clock = dict[str, int]
STREAMS: tuple[Stream, ...] = ("compute", "plan", "pull", "push")
ALL_ROWS = -1


class Wait(NamedTuple):
    """A call of `Device.wait`: in which function, which stream waits for which, and what the edge is called."""

    function: str
    stream: str
    waited_for: str
    edge: str


class Access(NamedTuple):
    """Rows of a storage, as the bits of an int, read or written by the work of an actor that began at `time`."""

    actor: str
    time: int
    what: str
    rows: int
    is_write: bool


@dataclass
class Mark:
    """An event: what happened before it, and how many items of each queue have to have run."""

    stream: str
    clock: Clock
    needs: Clock


@dataclass
class Item:
    """Queued work."""

    needs: Clock
    work: Callable[[], None]


@dataclass
class Queue:
    """Work of a stream that has not run, and when the work before it did."""

    items: deque[Item] = field(default_factory=deque)
    finished: list[int] = field(default_factory=list)

    @property
    def num_given(self) -> int:
        return len(self.finished) + len(self.items)


class Borrowed:
    """A tensor's memory, for work that runs later: knows if it was freed meanwhile, as a device would not."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._about = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self) -> Tensor | None:
        """The memory with a version counter of its own; None if it was freed."""
        dtype, offset, shape, stride = self._about
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return None if storage is None else torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


class Fake:
    """Implements `gas_triton.history.device.Device`.

    Args:
        seed: of the order in which queued work runs.
        pace: how much of it runs by chance at each call: 0 is as late as it can, 1 nearly at once; drawn if None.
        drop: a label of edges whose waits are ignored, or what says so of a `Wait`.

    Attributes:
        races: what was not ordered, in words.
        waits: how often each wait was called.
        scratch: tensors that planning writes.
    """

    concurrent = True

    def __init__(
        self, seed: int = 0, pace: float | None = None, drop: str | Callable[[Wait], bool] | None = None
    ) -> None:
        self._random = random.Random(seed)
        self.pace = self._random.choice([0.0, 0.2, 0.5, 0.9]) if pace is None else pace
        self._drop = (lambda wait: wait.edge == drop) if isinstance(drop, str) else drop
        self.races: list[str] = []
        self.waits: Counter[Wait] = Counter()
        self.scratch: list[Tensor] = []
        self._queues: dict[str, Queue] = {stream: Queue() for stream in STREAMS}
        # what the next work of a stream has to wait for
        self._needs: dict[str, Clock] = {stream: {} for stream in STREAMS}
        self._clocks: dict[str, Clock] = {actor: {actor: 0} for actor in ("host", *STREAMS)}
        self._accesses: defaultdict[int, list[Access]] = defaultdict(list)
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._names: dict[int, str] = {}
        self._kept: list[Batch] = []
        self._planned: Tensor | None = None
        self._num_storages = 0

    # --- what `Device` asks for ---------------------------------------------------------------------------------------

    def record(self, stream: Stream) -> Mark:
        self._drift()
        if stream == "compute":
            # layers have worked since
            self._begin("compute")
        clock, needs = dict(self._clocks[stream]), dict(self._needs[stream])
        _join(clock, self._clocks["host"])
        _join(needs, {stream: self._queues[stream].num_given})
        return Mark(stream, clock, needs)

    def wait(self, stream: Stream, event: Mark, edge: str) -> None:
        self._drift()
        wait = Wait(sys._getframe(1).f_code.co_name, stream, event.stream, edge)
        self.waits[wait] += 1
        if self._drop is not None and self._drop(wait):
            return
        _join(self._clocks[stream], event.clock)
        _join(self._needs[stream], event.needs)
        if stream in ("compute", "plan"):
            self._run_until(event.needs)

    def is_done(self, event: Mark) -> bool:
        self._drift()
        is_known = all(self._clocks["host"].get(actor, 0) >= time for actor, time in event.clock.items())
        # the host may look before the news has come, but not after it has waited
        if not self._has_run(event.needs) or (not is_known and self._random.random() < 0.3):
            return False
        _join(self._clocks["host"], event.clock)
        return True

    def elapsed(self, start: Mark, end: Mark) -> float:
        return float(self._time(end) - self._time(start))

    def settle(self) -> None:
        self._begin("compute")
        for stream in ("compute", "pull", "push"):
            self._run_until({stream: self._queues[stream].num_given})
            _join(self._clocks["host"], self._clocks[stream])

    def run(self, stream: Stream, make: Callable[[], T]) -> T:
        self._drift()
        self._begin(stream)
        made: T | None = None
        is_over = False
        try:
            made = make()
            # nothing left to plan, or what was planned before is loaded
            is_over = made is None or (isinstance(made, Batch) and made.halo_ids is self._planned)
            self._planned = getattr(made, "halo_ids", None)
            if isinstance(made, Batch) and not is_over:
                self._plan(stream, made)
            return made
        finally:
            # also when it was interrupted
            for tensor in () if is_over else self.scratch:
                self._access(stream, "planning", tensor, is_write=True)

    def _plan(self, stream: Stream, batch: Batch) -> None:
        for name, tensor in (("node_ids", batch.node_ids), ("halo_ids", batch.halo_ids)):
            # a plan that is used again was made before
            if self._key(tensor) not in self._accesses:
                self.name(tensor, name)
                self._access(stream, "planning", tensor, is_write=True)

    def keep(self, batch: Batch) -> None:
        self._kept.append(batch)
        # in place of the node tensors that are brought to a real device, of this batch alone
        batch.loaded = torch.zeros(1)  # type: ignore[attr-defined]
        self.name(batch.loaded, "loaded")
        self._access("plan", "loading", batch.loaded, is_write=True)

    def map(self, memory: HostMemory | FileMemory) -> Tensor:
        return memory.tensor

    def gather(self, stream: Stream, table: Tensor, ids: Tensor, out: Tensor) -> None:
        self._drift()
        if self._key(out) not in self._accesses:
            # its memory comes from the allocator of "compute", which may have worked on it until now
            self._access("compute", "what was there before", out, is_write=True)
        self._begin(stream)
        self._access(stream, "gather", ids)
        self._access(stream, "gather", table, rows_of(ids))
        self._access(stream, "gather", out, is_write=True)
        if stream == "compute":
            gather_rows(table, ids, out)
            return
        torch.autograd.graph.increment_version(out)
        # layers that read too early show it; the slot is no other's by now, or a race is reported
        _alias(out).fill_(torch.nan if out.is_floating_point() else 101)
        rows, target = Borrowed(ids), Borrowed(out)

        def work() -> None:
            found, to = rows.tensor(), target.tensor()
            if found is None or to is None:
                self._report(f"{'ids' if found is None else 'a slot'} freed before a gather on {stream}")
            else:
                gather_rows(_alias(table), found, to)

        self._give(stream, work)

    def copy_ranges(self, stream: Stream, source: Tensor, target: Tensor, spans: Spans) -> None:
        self._drift()
        self._access("compute", "rows made", source, is_write=True)
        self._begin(stream)
        self._access(stream, "copy", source)
        rows = sum(((1 << last) - (1 << first)) for first, last in spans)
        self._access(stream, "copy", target, rows, is_write=True)
        torch.autograd.graph.increment_version(target)
        rows_made, spans = Borrowed(source), [tuple(span) for span in spans]

        def work() -> None:
            made, start = rows_made.tensor(), 0
            if made is None:
                self._report(f"pushed rows freed before their copy on {stream}")
                return
            for first, last in spans:
                _alias(target)[first:last].copy_(made[start : start + last - first])
                start += last - first

        self._give(stream, work)

    # --- what a test tells --------------------------------------------------------------------------------------------

    def compute(self, reads: Iterable[Any] = (), writes: Iterable[Any] = (), what: str = "a layer") -> None:
        """Says what layers read and write: tensors, or pairs of a tensor and ids of rows."""
        self._tell("compute", what, reads, writes)

    def host(self, reads: Iterable[Any] = (), writes: Iterable[Any] = (), what: str = "the host") -> None:
        """Says what the host reads and writes."""
        self._tell("host", what, reads, writes)

    def name(self, tensor: Tensor, name: str) -> None:
        """Names a tensor's memory in messages."""
        self._names[self._key(tensor)] = name

    def finish(self) -> None:
        """Runs whatever is queued, as a device does whether or not anyone waits."""
        for stream in STREAMS:
            self._run_until({stream: self._queues[stream].num_given})

    @property
    def num_waiting(self) -> int:
        """Work that has not run."""
        return sum(len(queue.items) for queue in self._queues.values())

    # --- what runs ----------------------------------------------------------------------------------------------------

    @property
    def _num_run(self) -> int:
        return sum(len(queue.finished) for queue in self._queues.values())

    def _give(self, stream: Stream, work: Callable[[], None]) -> None:
        self._queues[stream].items.append(Item(dict(self._needs[stream]), work))
        self._drift()

    def _drift(self) -> None:
        while self._random.random() < self.pace:
            ready = [queue for queue in self._queues.values() if queue.items and self._has_run(queue.items[0].needs)]
            if not ready:
                return
            self._run_first(self._random.choice(ready))

    def _run_until(self, needs: Clock) -> None:
        for stream, count in needs.items():
            queue = self._queues[stream]
            while len(queue.finished) < count:
                self._run_until(queue.items[0].needs)
                # which may have run it too
                if len(queue.finished) < count:
                    self._run_first(queue)

    def _run_first(self, queue: Queue) -> None:
        queue.items.popleft().work()
        queue.finished.append(self._num_run + 1)

    def _has_run(self, needs: Clock) -> bool:
        return all(len(self._queues[stream].finished) >= count for stream, count in needs.items())

    def _time(self, event: Mark) -> int:
        return max([0, *(self._queues[stream].finished[count - 1] for stream, count in event.needs.items() if count)])

    # --- what is ordered ----------------------------------------------------------------------------------------------

    def _begin(self, actor: str) -> None:
        clock = self._clocks[actor]
        _join(clock, self._clocks["host"])
        clock[actor] += 1

    def _tell(self, actor: str, what: str, reads: Iterable[Any], writes: Iterable[Any]) -> None:
        self._drift()
        self._begin(actor)
        for told, is_write in ((reads, False), (writes, True)):
            for one in told:
                tensor, rows = (one, ALL_ROWS) if isinstance(one, Tensor) else (one[0], rows_of(one[1]))
                self._access(actor, what, tensor, rows, is_write)

    def _access(self, actor: str, what: str, tensor: Tensor, rows: int = ALL_ROWS, is_write: bool = False) -> None:
        if tensor.numel() == 0:
            return
        key, clock = self._key(tensor), self._clocks[actor]
        before, now = self._accesses[key], Access(actor, clock[actor], what, rows, is_write)
        for other in before:
            is_conflict = (is_write or other.is_write) and other.actor != actor and other.rows & rows
            if is_conflict and clock.get(other.actor, 0) < other.time:
                name = self._names.get(key, f"{tensor.dtype} {list(tensor.shape)}")
                self._report(f"{name}: {what} on {actor} is not ordered with {other.what} on {other.actor}")
        # what every stream that can still meet it comes after says nothing more
        before[:] = [
            other
            for other in before
            if any(clock.get(other.actor, 0) < other.time for clock in self._clocks.values()) and other != now
        ]
        before.append(now)

    def _report(self, race: str) -> None:
        if race not in self.races:
            self.races.append(race)

    def _key(self, tensor: Tensor) -> int:
        """A number of the tensor's memory, which memory freed and given out again does not share."""
        address = tensor.untyped_storage().data_ptr()
        known = self._storages.get(address)
        if known is None or known[0].expired():
            self._num_storages += 1
            known = self._storages[address] = (StorageWeakRef(tensor.untyped_storage()), self._num_storages)
        return known[1]


def rows_of(ids: Tensor) -> int:
    """Rows as the bits of an int."""
    rows = 0
    for row in ids.tolist():
        rows |= 1 << row
    return rows


def _alias(tensor: Tensor) -> Tensor:
    """The same memory with a version counter of its own: queued work must not count as a change when it runs."""
    return tensor.detach().data


def _join(clock: Clock, other: Clock) -> None:
    for actor, time in other.items():
        clock[actor] = max(clock.get(actor, 0), time)

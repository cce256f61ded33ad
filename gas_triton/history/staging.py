"""`Staging`: halo rows of the next batch, fetched while the device is busy with this one.

    compute:  F1(t) F2(t) F3(t) | loss B3 B2 B1 | optimizer | F1(t+1) F2(t+1) ...
    push:           P2(t) P3(t)                                     P2(t+1)
    pull:                 R2(t+1) R3(t+1)

In strict order a pull waits for the push of the same layer in the batch before, so rows are what a read at the last
moment would give, bit for bit. In stale order all pulls of a batch come before the pushes of the batch before: one step
older, and just as repeatable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from gas_triton.batch import Batch
from gas_triton.history.device import Device, Event, named
from gas_triton.history.store import Halo, HistoryStore, as_halo

Order = Literal["strict", "stale"]
ORDERS = ("strict", "stale")


class Slot:
    """A buffer for staged rows of one layer, used again and again.

    A tensor of its own for each slot, because slices of one tensor share a version counter and autograd would see every
    reuse of one as a change of all.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        # how often the slot was given out: rows handed out earlier belong to another batch
        self.generation = 0
        self.free: Event | None = None
        self.pulled: Event | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.rows.values())


@dataclass
class Staged:
    """Rows of one layer on their way to, or in, a slot."""

    slot: Slot
    generation: int
    num_rows: int
    pushes: int
    resets: int
    started: Event
    pulled: Event

    def halo(self, name: str) -> Halo:
        if self.slot.generation != self.generation:
            raise RuntimeError(
                f"{name}: staged rows were asked for after their slot was given to another batch (generation "
                f"{self.generation}, now {self.slot.generation})"
            )
        return as_halo({key: rows[: self.num_rows] for key, rows in self.slot.rows.items()})


@dataclass
class Ticket:
    """A batch and its staged rows, by layer."""

    batch: Batch
    loaded: Event
    staged: dict[str, Staged] = field(default_factory=dict)


@dataclass
class Transfers:
    """Counts since the histories were made; see `Histories.transfer_stats`."""

    pulls: int = 0
    pull_bytes: int = 0
    pushes: int = 0
    push_bytes: int = 0
    misses: int = 0
    pull_seconds: float = 0.0
    exposed_seconds: float = 0.0


class Staging:
    """Decides when rows are pulled; talks to nothing but a `Device`.

    Args:
        stores: the histories on the host, in the order in which their layers run.
        device: where the layers run.
        transfers: where to count.
    """

    def __init__(self, stores: Sequence[HistoryStore], device: Device, transfers: Transfers) -> None:
        self.stores, self.device, self.transfers = list(stores), device, transfers
        self.staged = [store for store in stores if not store.in_place]
        self.order: Order = "strict"
        self._free: dict[str, list[Slot]] = {store.name: [] for store in stores}
        self._slots: list[Slot] = []
        self._current: Ticket | None = None
        self._next: Ticket | None = None
        # pulls (started, done, layer asked, layer went on) whose times are not yet known
        self._timed: list[tuple[Event, Event, Event | None, Event | None]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.nbytes for slot in self._slots)

    # --- the course of an epoch ---------------------------------------------------------------------------------------

    def begin(self, ticket: Ticket, upcoming: Ticket | None, order: Order) -> None:
        """Begins the step of a batch, and says which one comes next, and in which order its rows are pulled."""
        for left in (self._current, self._next):
            # of another epoch, begun before this one was over
            if left is not None and left is not ticket and left is not upcoming:
                self._release(left)
        self._current, self._next, self.order = ticket, upcoming, order
        self.device.wait("compute", ticket.loaded, "compute<-load")
        for store in self.staged:
            if store.name not in ticket.staged:
                self._pull(ticket, store)
        if self.order == "stale" and upcoming is not None:
            for store in self.staged:
                self._pull(upcoming, store)

    def end(self) -> None:
        """Ends the step: its slots may be used again once the device has done it."""
        # before its slots are free: a slot that is not in use yet does not make the pull wait for this step
        if self._next is not None and self.order == "strict":
            for store in self.staged:
                if store.name not in self._next.staged:
                    self._pull(self._next, store)
        ticket, self._current = self._current, None
        if ticket is not None:
            self._release(ticket)
        for store in self.stores:
            store.retire_sources()
        self.count_times()

    def close(self) -> None:
        """Drops staged rows, wherever the epoch was left; layers go on after what is under way, whose memory may go."""
        tickets, self._current, self._next = (self._current, self._next), None, None
        device = self.device
        device.wait("compute", device.record("pull"), "join")
        device.wait("compute", device.record("push"), "join")
        # an interrupted plan has left the planner's map to be cleaned there
        device.wait("compute", device.record("plan"), "join")
        for ticket in tickets:
            if ticket is not None:
                self._release(ticket)

    def _release(self, ticket: Ticket) -> None:
        done = self.device.record("compute")
        for name, staged in ticket.staged.items():
            staged.slot.free = done
            self._free[name].append(staged.slot)
        ticket.staged.clear()

    # --- pulls --------------------------------------------------------------------------------------------------------

    def _pull(self, ticket: Ticket, store: HistoryStore) -> None:
        batch, device = ticket.batch, self.device
        if batch.num_halo == 0:
            return
        before = ticket.staged.pop(store.name, None)
        slot = self._take_slot(store, batch.num_halo) if before is None else before.slot
        with named("history.pull"):
            device.wait("pull", ticket.loaded, "pull<-plan")
            if store.pushed is not None:
                device.wait("pull", store.pushed, "pull<-push")
            if slot.free is not None:
                device.wait("pull", slot.free, "pull<-free")
            started = device.record("pull")
            pushes, resets = store.pushes, store.resets
            try:
                ids = batch.halo_ids if store.pulls_early else batch.host_halo_ids
                store.gather("pull", ids, {key: rows[: batch.num_halo] for key, rows in slot.rows.items()})
            except BaseException:
                self._free[store.name].append(slot)
                raise
            finally:
                store.pulled = slot.pulled = device.record("pull")
        ticket.staged[store.name] = Staged(slot, slot.generation, batch.num_halo, pushes, resets, started, store.pulled)
        self._count_pull(store, batch)

    def _take_slot(self, store: HistoryStore, num_rows: int) -> Slot:
        free = self._free[store.name]
        slot = free[-1] if free else Slot()
        if not slot.rows or next(iter(slot.rows.values())).size(0) < num_rows:
            if slot.pulled is not None:
                # the old buffer is about to be freed
                self.device.wait("compute", slot.pulled, "compute<-pull")
            slot.rows = store.empty_rows(num_rows)
            # the new one may be memory that the device still reads
            slot.free = self.device.record("compute")
        # only now: without memory for it, or interrupted, it stays where it was
        if free:
            free.pop()
        else:
            self._slots.append(slot)
        slot.generation += 1
        return slot

    def take(self, store: HistoryStore, batch: Batch) -> Halo | None:
        """The batch's halo rows if they are staged and up to date, else None."""
        ticket = self._current
        if ticket is None or ticket.batch.halo_ids is not batch.halo_ids:
            return None
        staged = ticket.staged.get(store.name)
        if staged is None or staged.resets != store.resets:
            return None
        if self.order == "strict" and staged.pushes != store.pushes:
            # another batch was pushed since
            return None
        with named("history.wait"):
            asked = self.device.record("compute")
            self.device.wait("compute", staged.pulled, "compute<-pull")
            self._timed.append((staged.started, staged.pulled, asked, self.device.record("compute")))
        return staged.halo(store.name)

    def on_push(self, store: HistoryStore, batch: Batch) -> None:
        """Takes note of a push; in strict order the rows that the next batch needs can now be pulled."""
        self.transfers.pushes += 1
        self.transfers.push_bytes += batch.num_nodes * store.row_bytes
        ticket = self._current
        if store not in self.staged or ticket is None or ticket.batch.halo_ids is not batch.halo_ids:
            return
        staged = ticket.staged.get(store.name)
        if staged is not None and staged.pushes == store.pushes - 1:
            # a batch's own rows are not among its halo rows; another's, pushed before, may be
            staged.pushes = store.pushes
        if self.order == "strict" and self._next is not None and store.pulls_early:
            self._pull(self._next, store)

    def on_miss(self, store: HistoryStore, batch: Batch, started: Event, pulled: Event) -> None:
        """Takes note of rows that were pulled when the layer asked for them."""
        self.transfers.misses += 1
        self._count_pull(store, batch)
        self._timed.append((started, pulled, started, pulled))
        # nobody ends a step where batches are not fetched ahead
        self.count_times()

    # --- statistics ---------------------------------------------------------------------------------------------------

    def _count_pull(self, store: HistoryStore, batch: Batch) -> None:
        self.transfers.pulls += 1
        self.transfers.pull_bytes += batch.num_halo * store.row_bytes

    def count_times(self) -> None:
        """Adds the times of the pulls that are done."""
        device = self.device
        while self._timed and all(device.is_done(event) for event in self._timed[0]):
            started, pulled, asked, resumed = self._timed.pop(0)
            seconds = device.elapsed(started, pulled)
            self.transfers.pull_seconds += seconds
            # a device without streams of its own has done nothing else meanwhile
            self.transfers.exposed_seconds += device.elapsed(asked, resumed) if device.concurrent else seconds

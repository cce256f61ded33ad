"""`HistoryStore`: one table of last-pushed rows, on the device, in host memory or in a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gas_triton.errors import NonFiniteError
from gas_triton.functional import Quantized
from gas_triton.functional.rows import FLOATS
from gas_triton.history.device import Event, named
from gas_triton.history.rows import StoredRows
from gas_triton.history.tiers import TableFolder
from gas_triton.kernels.pull import pull as pull_op
from gas_triton.kernels.push import NO_ROW, NONFINITE, check, pack
from gas_triton.kernels.push import push as push_op

if TYPE_CHECKING:
    from gas_triton.batch import Batch
    from gas_triton.history.staging import Staging

Nonfinite = Literal["raise", "warn", "skip", "allow"]
Halo = Tensor | Quantized


class HistoryStore(StoredRows):
    """The history of one layer's input: table [N, D] of the rows last pushed, and when.

    Rows that were never pushed are 0 (Fey et al., ICML 2021). Not a module and not a buffer: a cast of the
    model does not touch it, and no gradient flows into it.

    Args:
        num_rows: N.
        dim: D.
        dtype: storage dtype: float32, bfloat16, float16, float64, or int8 with a float32 scale a row. Rows are rounded
            to nearest when pushed.
        device: where the layer computes.
        name: the layer's name, for error messages.
        tier: "device" keeps the table there, "pinned" in page-locked host memory, "file" in files of `folder`.
        in_place: layers read a "pinned" table over the bus, row by row, instead of a copy of the rows they need.
        nonfinite: what a push does with rows that are not finite when stored: "raise", "warn" (and store), "skip" (keep
            the row stored before; on the host tiers of a GPU it counts as pushed) or "allow" (not even look).
        folder: the folder of the "file" tier.

    Attributes:
        last_push: int32 [N], value of the clock when a row was last pushed, -1 if never.
        clock: int64 [], pushes so far.
        row_order: names the row order of the graph that was pushed, None before the first push.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str = "history",
        *,
        tier: str = "device",
        in_place: bool = False,
        nonfinite: Nonfinite = "raise",
        folder: TableFolder | None = None,
    ) -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(f"{name}: nonfinite must be one of {', '.join(map(repr, NONFINITE))}, got {nonfinite!r}")
        # with its index, where it has one
        device = torch.empty(0, device=device).device
        super().__init__(num_rows, dim, dtype, device, name, tier, in_place, folder)
        self.nonfinite = nonfinite
        # told of pushes, and asked for rows fetched ahead; of the `Histories` this store is in, None on the device
        self.staging: Staging | None = None
        # pushes so far, on the host: what rows fetched ahead are compared with
        self.pushes = 0
        self.pushed: Event | None = None
        self.pulled: Event | None = None
        # rows that are being copied, with their versions; those that the step before left, no longer watched
        self._sources: list[tuple[Tensor, int | None, Event]] = []
        self._retired: list[tuple[Tensor, Event]] = []
        self._checked: tuple[Tensor, Event, int] | None = None
        self._report = torch.tensor([0, NO_ROW], device=device)
        self._exchange = HistoryStore._exchange_rows if tier == "device" else _outside_of_graphs()

    def check(self, x: Tensor, batch: Batch) -> None:
        """Raises TypeError or ValueError if `x` and `batch` do not belong to this history."""
        if x.dtype not in FLOATS or x.dim() != 2:
            raise TypeError(f"{self.name}: x must be a floating tensor [B, {self.dim}], got {x.dtype} {list(x.shape)}")
        if batch.graph_nodes != self.num_rows:
            raise ValueError(
                f"the batch is of a graph with {batch.graph_nodes} nodes but {self.name}'s history has {self.num_rows}"
            )
        if x.size(1) != self.dim:
            raise ValueError(f"x has {x.size(1)} features but {self.name}'s history has {self.dim}")
        if x.size(0) != batch.num_nodes:
            raise ValueError(f"{self.name}: x has {x.size(0)} rows but the batch has {batch.num_nodes} in-batch rows")
        self.check_order(batch.row_order, "the batch's graph")
        if self.device != batch.device:
            raise ValueError(f"{self.name}'s history is on {self.device} but the batch is on {batch.device}")
        if x.device != self.device:
            raise ValueError(f"{self.name}: x is on {x.device} but the history is on {self.device}")

    def check_order(self, row_order: str, whose: str) -> None:
        """Raises ValueError if rows were pushed in another order than `row_order`."""
        if self.row_order not in (None, row_order):
            raise ValueError(
                f"{self.name}'s history holds rows in the order {self.row_order} but {whose} has {row_order}: use the "
                "same partition, or reset() the histories"
            )

    # --- push ---------------------------------------------------------------------------------------------------------

    def exchange(self, x: Tensor, batch: Batch, *, push: bool = True, read: bool = True) -> Halo | None:
        """What a layer does with its history: reads the batch's halo rows, and stores its in-batch rows.

        Args:
            x: [B, D].
            batch: the plan whose rows these are.
            push: whether to store `x`.
            read: whether halo rows are wanted.

        Returns:
            What `functional.aggregate` takes as `history`, None without halo rows.
        """
        return self._exchange(self, x, batch, push, read and batch.num_halo > 0)

    def _exchange_rows(self, x: Tensor, batch: Batch, push: bool, read: bool) -> Halo | None:
        if push or read:
            self.check(x, batch)
        # first the halo: rows fetched ahead are compared with the pushes of other batches, not with this one's
        halo = self._read(batch) if read else None
        if push:
            self._push(x, batch)
        return halo

    def push(self, x: Tensor, batch: Batch) -> None:
        """Stores the batch's in-batch rows.

        Args:
            x: [B, D], detached here. It must not be modified in place before the step ends.
            batch: the plan whose rows these are.

        Raises:
            ValueError: another width, number of rows, graph or row order than this history's.
            NonFiniteError: rows that are not finite when stored, with `nonfinite="raise"`. Nothing is stored then. On a
                GPU it comes when the device has looked, at a later push or when the table is read, and rows that were
                not finite are stored on the host tiers, the others on all.
        """
        self.check(x, batch)
        self._push(x, batch)

    def _push(self, x: Tensor, batch: Batch) -> None:
        with torch.no_grad(), named("history.push"):
            if self.tier == "device":
                self._push_to_device(x.detach(), batch)
            else:
                self._push_to_host(x.detach(), batch)
        if self.staging is not None:
            self.staging.on_push(self, batch)

    def _push_to_device(self, x: Tensor, batch: Batch) -> None:
        order_before, self.row_order = self.row_order, batch.row_order
        self.clock += 1
        push_op(
            self._tensors["table"], self._tensors.get("scale"), self.last_push, self._report, x, batch.node_ids,
            batch.spans, self.clock, self.nonfinite,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            # `look` is called when the step is over
            return
        self.pushes += 1
        try:
            self.look(batch)
        except NonFiniteError:
            if not self.engine.concurrent:
                # nothing was stored
                self.clock -= 1
                self.pushes -= 1
                self.row_order = order_before
            raise

    def _push_to_host(self, x: Tensor, batch: Batch) -> None:
        engine = self.engine
        self.release_sources()
        rows = self._pack(x, batch)
        spans = batch.spans.tolist()
        skipped = self._skip(rows, batch) if self.nonfinite == "skip" else None
        self.look(batch, pushed=0)
        ready = engine.record("compute")
        engine.wait("push", ready, "push<-rows")
        if self.pulled is not None:
            engine.wait("push", self.pulled, "push<-pull")
        if self._folder is not None:
            self._folder.mark_dirty(self.name)
        self.row_order = batch.row_order
        # counted first: an interrupted copy has made rows fetched earlier outdated
        self.pushes += 1
        self.clock += 1
        times = None if skipped is None else self.last_push[skipped]
        for first, last in spans:
            self.last_push[first:last] = self.clock
        if skipped is not None and times is not None:
            self.last_push[skipped] = times
        try:
            for key, target in self._tensors.items():
                engine.copy_ranges("push", rows[key], target, spans)
                if self._seen[key] is not target:
                    # autograd cannot know that this is the same memory
                    torch.autograd.graph.increment_version(self._seen[key])
        finally:
            self.pushed = engine.record("push")
            # not freed, and not changed, before it is copied
            self._sources.extend((source, _version(source), self.pushed) for source in rows.values())
        self.release_sources()

    def _pack(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        """In-batch rows as they are stored, on the device, and counted where they are not finite."""
        if x.dtype == self.dtype:
            # as they are: the copy is made by `copy_ranges`
            if self.nonfinite != "allow":
                check(x, self._report, batch.node_ids)
            return {"table": x.contiguous()}
        rows, scale = pack(x, self.dtype, self.nonfinite, self._report, batch.node_ids)
        return {"table": rows, "scale": scale} if self.dtype == torch.int8 else {"table": rows}

    def _skip(self, rows: dict[str, Tensor], batch: Batch) -> Tensor | None:
        """Puts the rows stored before in the place of those that are not finite; their ids, where the host knows."""
        is_bad = ~rows["scale" if "scale" in self._tensors else "table"].isfinite()
        is_bad = is_bad if is_bad.dim() == 1 else is_bad.any(dim=1)
        if not self.engine.concurrent and not bool(is_bad.any()):
            return None
        for key, old in self._gather(batch.node_ids).items():
            rows[key] = torch.where(is_bad if old.dim() == 1 else is_bad[:, None], old, rows[key])
        return None if self.engine.concurrent else batch.node_ids[is_bad]

    def release_sources(self) -> None:
        """Lets go of pushed rows that were copied.

        Raises:
            RuntimeError: rows were modified in place while they were being copied.
        """
        while self._sources and self.engine.is_done(self._sources[0][2]):
            source, version, _ = self._sources.pop(0)
            self._check_source(source, version)

    def retire_sources(self) -> None:
        """Ends a step: lets go of what the one before pushed, in the order of the layers' stream, without waiting here.

        However far the host is ahead, the rows of two steps are held.
        """
        for _, event in self._retired:
            self.engine.wait("compute", event, "free<-push")
        self._retired.clear()
        self.release_sources()
        while self._sources:
            source, version, event = self._sources.pop(0)
            self._retired.append((source, event))
            self._check_source(source, version)

    def _check_source(self, source: Tensor, version: int | None) -> None:
        if _version(source) != version:
            raise RuntimeError(
                f"{self.name}: rows were modified in place after they were pushed and before they were copied to the "
                "history: use the operation that is not in place"
            )

    # --- rows that are not finite -------------------------------------------------------------------------------------

    def look(self, batch: Batch | None = None, pushed: int = 1) -> None:
        """Says if rows were not finite, without waiting for a device that is still counting.

        Args:
            batch: that is being pushed, if one is.
            pushed: whether the clock counts it already.
        """
        if self.nonfinite == "allow":
            return
        if not self.engine.concurrent:
            # the clock, because a compiled push does not count on the host
            self._complain(self._report, int(self.clock) - pushed)
            return
        if self._checked is not None and self.engine.is_done(self._checked[1]):
            (counted, _, step), self._checked = self._checked, None
            self._complain(counted, step)
        if self._checked is None and batch is not None:
            # from a GPU into page-locked memory
            counted = self._report.to("cpu", non_blocking=True, copy=True)
            self._checked = (counted, self.engine.record("compute"), self.pushes - (self.tier == "device"))

    def _complain(self, counted: Tensor, step: int) -> None:
        count, first = counted.tolist()
        if count == 0:
            return
        self._report.copy_(torch.tensor([0, NO_ROW]))
        message = (
            f"{self.name}: {count} rows were not finite as {self.dtype} at push {step}, the first is row {first} of "
            "the permuted graph"
        )
        if self.nonfinite == "raise":
            raise NonFiniteError(message)
        warnings.warn(message + (", kept as it was" if self.nonfinite == "skip" else ""), stacklevel=2)

    # --- pull ---------------------------------------------------------------------------------------------------------

    def _read(self, batch: Batch) -> Halo:
        if self.in_place:
            if self.pushed is not None:
                self.engine.wait("compute", self.pushed, "compute<-push")
            return as_halo(self._seen)
        staged = None if self.staging is None else self.staging.take(self, batch)
        if staged is not None:
            return staged
        with named("history.pull"):
            start = self.engine.record("compute")
            rows = self._gather(batch.halo_ids)
            if self.staging is not None:
                self.staging.on_miss(self, batch, start, self.engine.record("compute"))
            return as_halo(rows)

    def _gather(self, ids: Tensor) -> dict[str, Tensor]:
        """Rows as they are stored, copied now."""
        if self.pushed is not None:
            self.engine.wait("compute", self.pushed, "compute<-push")
        rows = self.empty_rows(ids.numel())
        self.gather("compute", ids, rows)
        return rows

    def empty_rows(self, num_rows: int) -> dict[str, Tensor]:
        """Memory on the device for rows as they are stored."""
        # slots outlive an epoch of inference mode, whose tensors nobody may write afterwards
        with torch.inference_mode(False):
            return {
                key: torch.empty((num_rows, *tensor.shape[1:]), dtype=tensor.dtype, device=self.device)
                for key, tensor in self._tensors.items()
            }

    def gather(self, stream: Any, ids: Tensor, out: dict[str, Tensor]) -> None:
        """Copies rows as they are stored, on a stream that was made to wait for pushes."""
        for key, seen in self._seen.items():
            self.engine.gather(stream, seen, ids, out[key])

    def will_need(self, batch: Batch) -> None:
        """Lets the files of the history be read ahead at the batch's halo rows."""
        if self.tier == "file":
            for key in self._tensors:
                self._memory[key].will_need(batch.host_halo_ids)

    def pull(self, ids: Tensor) -> Tensor:
        """A copy of rows `ids`, [len(ids), D]; float32 for an int8 table, else in the table's dtype.

        Raises:
            IndexError: an id that is not in [0, N).
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_rows:
            raise IndexError(
                f"{self.name}: ids must be in [0, {self.num_rows}), got {int(ids.min())} to {int(ids.max())}"
            )
        self.settle()
        table, home = self._tensors["table"], self._tensors["table"].device
        dtype = torch.float32 if self.dtype == torch.int8 else self.dtype
        return pull_op(table, self._tensors.get("scale"), ids.to(home), dtype).to(self.device)

    def age(self, ids: Tensor | None = None) -> Tensor:
        """Pushes since each row was last pushed (its staleness), int64; -1 for a row never pushed."""
        self.check_open()
        last = (self.last_push if ids is None else self.last_push.index_select(0, ids.to(self.last_push.device))).long()
        return torch.where(last < 0, -1, self.clock - last)

    # --- its life -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Waits until every push is in the table, and says if a row was not finite."""
        if self.engine.concurrent and self.tier != "device":
            self.engine.settle()
            self._retired.clear()
            self.release_sources()
        if self.nonfinite != "allow" and self.device.type != "meta":
            self._checked = None
            self._complain(self._report.cpu(), int(self.clock) - 1)

    def to(self, device: torch.device | str) -> HistoryStore:
        """Follows the layer to another device, in place; never changes the dtype. Tables in host memory stay there."""
        device = torch.empty(0, device=device).device
        if device != self.device:
            self.settle()
            self._move(device)
            self.pushed = self.pulled = self._checked = self.staging = None
            self._report = self._report.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._folder is not None:
            raise TypeError(f"{self.name}: a history in files cannot be copied or pickled: save its state_dict()")
        made = dict(num_rows=self.num_rows, dim=self.dim, dtype=self.dtype, device=self.device, name=self.name)
        options = dict(tier=self.tier, in_place=self.in_place, nonfinite=self.nonfinite)
        return {"made": made, "options": options, "state": self.state_dict()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(**saved["made"], **saved["options"])  # type: ignore[misc]
        self.load_state_dict(saved["state"])

    def __repr__(self) -> str:
        return (
            f"HistoryStore({self.name}, num_rows={self.num_rows}, dim={self.dim}, dtype={self.dtype}, "
            f"{self.nbytes / 2**20:.1f} MiB, tier={self.tier}, device={self.device})"
        )


@cache
def _outside_of_graphs() -> Callable[..., Halo | None]:
    """The exchange of a history on the host, which `torch.compile` leaves to Python; made late, as that imports it."""
    return torch.compiler.disable(
        HistoryStore._exchange_rows,
        reason="a history on the host is exchanged outside of the graph: use fullgraph=False, or tier='device'",
    )


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written; None for one of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def as_halo(rows: Mapping[str, Tensor]) -> Halo:
    """Stored rows as `functional.aggregate` takes them."""
    return Quantized(rows["table"], rows["scale"]) if "scale" in rows else rows["table"]

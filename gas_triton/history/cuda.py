"""The CUDA side of `Device`: three side streams, events, and reads of host memory by kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gas_triton.batch import Batch
from gas_triton.history.device import Event, Spans, Stream
from gas_triton.history.memories import FileMemory, HostMemory, chunk_rows
from gas_triton.kernels.pull import gather_rows

T = TypeVar("T")
# Rows on their way to a file wait in page-locked memory: at most this many pushes of one table.
MAX_WAITING = 2


class Cuda:
    """A CUDA device.

    Tables in page-locked memory are read by a kernel over the bus and written by the copy engine. Tables in files are
    read and written by the host, through page-locked memory: what was pushed is written to the file when the table is
    next read or settled.
    """

    concurrent = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {
            # small kernels that must not queue behind a step's large ones
            "plan": torch.cuda.Stream(device, priority=-1),
            "pull": torch.cuda.Stream(device, priority=-1),
            "push": torch.cuda.Stream(device),
        }
        self._compute: torch.cuda.Stream | None = None
        self._waiting: defaultdict[int, list[tuple[Event, Tensor, Tensor, Spans]]] = defaultdict(list)

    def _stream(self, stream: Stream) -> torch.cuda.Stream:
        if stream != "compute":
            return self._streams[stream]
        current = torch.cuda.current_stream(self.device)
        if self._compute is not None and current != self._compute:
            # layers run on a stream that the loop around them does not: to us, both are one
            current.wait_stream(self._compute)
        self._compute = current
        return current

    def record(self, stream: Stream) -> Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream(stream))
        return event

    def wait(self, stream: Stream, event: Event, edge: str) -> None:
        self._stream(stream).wait_event(event)

    def is_done(self, event: Event) -> bool:
        return event.query()

    def elapsed(self, start: Event, end: Event) -> float:
        return start.elapsed_time(end) / 1e3

    def settle(self) -> None:
        for stream in ("compute", "pull", "push"):
            self._stream(stream).synchronize()
        for address in list(self._waiting):
            self._write(address)

    def run(self, stream: Stream, make: Callable[[], T]) -> T:
        with torch.cuda.stream(self._stream(stream)):
            return make()

    def keep(self, batch: Batch) -> None:
        # Users may hold a batch for as long as they like, so no event of ours can tell when its memory is free: here,
        # and only here, the allocator has to.
        batch.record_stream(self._stream("compute"))
        batch.record_stream(self._streams["pull"])

    def map(self, memory: HostMemory | FileMemory) -> Tensor:
        return _cuda_view(memory.tensor, self.device) if memory.register(self.device) else memory.tensor

    def gather(self, stream: Stream, table: Tensor, ids: Tensor, out: Tensor) -> None:
        with torch.cuda.stream(self._stream(stream)):
            if table.is_cuda:
                gather_rows(table, ids, out)
                return
            self._write(table.data_ptr())
            rows = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            torch.index_select(table, 0, ids.cpu(), out=rows)
            out.copy_(rows, non_blocking=True)

    def copy_ranges(self, stream: Stream, source: Tensor, target: Tensor, spans: Spans) -> None:
        with torch.cuda.stream(self._stream(stream)):
            if target.is_pinned():
                _copy(source, target, spans)
                return
            waiting = self._waiting[target.data_ptr()]
            while len(waiting) >= MAX_WAITING:
                self._write_first(waiting)
            rows = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            rows.copy_(source, non_blocking=True)
            waiting.append((self.record(stream), rows, target, spans))

    def _write(self, address: int) -> None:
        waiting = self._waiting.pop(address, [])
        while waiting:
            self._write_first(waiting)

    def _write_first(self, waiting: list[tuple[Event, Tensor, Tensor, Spans]]) -> None:
        event, rows, target, spans = waiting[0]
        event.synchronize()
        _copy(rows, target, spans)
        # only now: an interrupted write is done again
        del waiting[0]


def _copy(source: Tensor, target: Tensor, spans: Spans) -> None:
    # one copy cannot reach over two pieces of page-locked memory
    rows, start = chunk_rows(target[0].nbytes), 0
    for first, last in spans:
        while first < last:
            end = min(last, (first // rows + 1) * rows)
            target[first:end].copy_(source[start : start + end - first], non_blocking=True)
            start, first = start + end - first, end


class _Bytes:
    """Announces page-locked host memory as memory of the device, which can address it, and keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3,
            "strides": None,
        }  # fmt: skip


def _cuda_view(tensor: Tensor, device: torch.device) -> Tensor:
    view = torch.as_tensor(_Bytes(tensor), device=device)
    if view.data_ptr() != tensor.data_ptr():
        raise RuntimeError(f"{device} sees page-locked memory at another address than the host, which is not supported")
    return view.view(tensor.dtype).view(tensor.shape)

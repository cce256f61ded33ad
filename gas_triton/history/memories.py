"""Memory outside torch's allocators that a table can live in: the host's, page-locked on demand, and a file's."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import resource
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Drivers refuse to page-lock very large pieces (512 GiB is too much).
CHUNK = 256 * 2**30


def chunk_rows(row_bytes: int) -> int:
    """Rows of a table that are page-locked in one piece: whole rows, and whole pages."""
    unit = math.lcm(mmap.PAGESIZE, row_bytes)
    return max(CHUNK // unit, 1) * unit // row_bytes


GAP_ROWS = 64
MAX_RUNS = 8192
# The kernel cuts one request to the device's read-ahead, whose usual setting this is, and forgets the rest.
READ_AHEAD = 128 * 1024
# With these many rows looked at, one cold row in a hundred is found nine times out of ten.
PROBES = 256

LIBC = ctypes.CDLL(None)
LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


class MappedMemory:
    """A tensor over a memory map, which lives as long as any tensor sees it.

    Args:
        mapping: at least as long as the tensor.
        shape: of the tensor, at least one element.
        dtype: of the tensor.
    """

    def __init__(self, mapping: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._mapping: mmap.mmap | None = mapping
        # torch keeps the object it is given but lets go of its buffer: over the map itself, mapping.close() would take
        # the memory from under the tensor. A view holds the buffer, so that close() raises instead.
        self._view: memoryview | None = memoryview(mapping)
        self._tensor: Tensor | None = torch.frombuffer(self._view, dtype=dtype, count=math.prod(shape)).view(shape)

    @property
    def tensor(self) -> Tensor:
        """The CPU tensor over the memory."""
        if self._tensor is None:
            raise RuntimeError(f"this {type(self).__name__} is closed")
        return self._tensor

    def register(self, device: torch.device) -> bool:
        """Page-locks the memory for a CUDA device; False if it is not page-locked."""
        return False

    def flush(self) -> None:
        """Returns when the memory is as durable as it can be."""

    def will_need(self, ids: Tensor) -> None:
        """Says that rows `ids`, ascending int64 [K] on the CPU, will be read soon."""

    def close(self) -> None:
        """Lets go of the memory; it is unmapped when the last tensor that sees it goes."""
        self._tensor = self._view = self._mapping = None


class HostMemory(MappedMemory):
    """Zeroed, page-aligned host memory, seen as a tensor.

    Unlike torch's pinned memory it takes what it holds: torch rounds up to a power of two.

    Args:
        shape: of the tensor, at least one element.
        dtype: of the tensor.

    Raises:
        MemoryError: more than the host has free.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        nbytes = bytes_of(shape, dtype)
        free = free_host_bytes()
        refused = f"{dtype} {list(shape)} takes {gib(nbytes)} of host memory"
        # The kernel would grant it, and kill the process when the rows are written.
        if free is not None and nbytes > free:
            raise MemoryError(f"{refused}, where {gib(free)} are free: use tier='file'")
        try:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{refused}, which the system refuses ({error.strerror}): use tier='file'") from error
        super().__init__(mapping, shape, dtype)
        self._registered: bool | None = None
        self._device = torch.device("cpu")

    def register(self, device: torch.device) -> bool:
        """Page-locks the memory for a CUDA device, until the last tensor over it goes.

        Takes all of its memory at once; keeps what is written. Not usable in forked processes from then on.

        Returns:
            True if it is page-locked. False, with a warning, if CUDA refuses; False without CUDA.

        Raises:
            RuntimeError: it is page-locked for another device.
        """
        if device.type != "cuda" or not torch.cuda.is_available():
            return False
        if self._registered is None:
            self._registered = self._register(device)
            self._device = device
        if self._registered and device != self._device:
            raise RuntimeError(
                f"host memory was page-locked for {self._device} and cannot follow its layer to {device}: call "
                "attach_histories there"
            )
        return self._registered

    def _register(self, device: torch.device) -> bool:
        address, mapping, view = self.tensor.data_ptr(), self._mapping, self._view
        assert mapping is not None
        assert view is not None
        # Locking pages that exist is faster than letting the driver make them one by one, under its global lock.
        torch.frombuffer(view, dtype=torch.uint8)[:: mmap.PAGESIZE].add_(0)
        done: list[int] = []
        piece = chunk_rows(self.tensor[0].nbytes) * self.tensor[0].nbytes
        with torch.cuda.device(device):
            cudart: Any = torch.cuda.cudart()
            for offset in range(0, len(mapping), piece):
                start, nbytes = address + offset, min(piece, len(mapping) - offset)
                code = error_code(cudart.cudaHostRegister(start, nbytes, 0))
                if code != 0:
                    for chunk in done:
                        cudart.cudaHostUnregister(chunk)
                    forget_error(device)
                    warnings.warn(
                        f"CUDA cannot page-lock the host memory of histories (cudaHostRegister: error {code}; the "
                        f"limit of locked memory, ulimit -l, is {locked_limit()}): transfers will be slow",
                        stacklevel=3,
                    )
                    return False
                done.append(start)
        # After a fork a write would move the parent to a new page, while the device still reads the old one.
        mapping.madvise(mmap.MADV_DONTFORK)
        # On the view, which goes before the map does: the map's own finalizers run after it is unmapped. At exit the
        # driver does it.
        weakref.finalize(view, unregister, cudart, done, device, mapping, os.getpid()).atexit = False
        return True


def unregister(cudart: Any, addresses: list[int], device: torch.device, mapping: mmap.mmap, owner: int) -> None:
    """Ends the page-locking of `mapping`, which is kept until then; not in a fork of the owner."""
    if os.getpid() != owner:
        return
    # A kernel that reads the memory in place may still run. If one failed, there is nothing to wait for.
    with suppress(RuntimeError):
        torch.cuda.synchronize(device)
    for address in addresses:
        cudart.cudaHostUnregister(address)


def error_code(result: Any) -> int:
    """The number of a CUDA error, which bindings return as an int, an enum or the first of a tuple."""
    if isinstance(result, tuple):
        result = result[0]
    return int(getattr(result, "value", result))


def forget_error(device: torch.device) -> None:
    """Takes the error that the CUDA runtime keeps from a call that failed: the next kernel launch would raise it."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)


def locked_limit() -> str:
    """What this process may page-lock, for reading."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"


class FileMemory(MappedMemory):
    """A tensor in a file, memory-mapped and shared.

    What is written is in the file even if the process is killed; after `flush`, even if the machine is.

    Args:
        path: a file of exactly the tensor's size, see `TableFolder.create`.
        shape: of the tensor, at least one element.
        dtype: of the tensor.

    Raises:
        ValueError: the file has another size.
        OSError: it cannot be opened for reading and writing.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        nbytes = bytes_of(shape, dtype)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor).st_size
            if found != nbytes:
                raise ValueError(f"{path} has {found} bytes but {dtype} {list(shape)} takes {nbytes}")
            mapping = mmap.mmap(descriptor, nbytes)
        finally:
            os.close(descriptor)
        super().__init__(mapping, shape, dtype)

    def flush(self) -> None:
        """Returns when everything written is on the disk."""
        if self._mapping is None:
            raise RuntimeError("this FileMemory is closed")
        self._mapping.flush()

    def will_need(self, ids: Tensor) -> None:
        """Lets the kernel read rows `ids`, ascending int64 [K] on the CPU, into the page cache, in large pieces.

        Returns before they are read. Does nothing, at a small cost, if a sample of them is all there.
        """
        tensor, mapping = self.tensor, self._mapping
        assert mapping is not None
        row_bytes = tensor.stride(0) * tensor.element_size()
        sample = ids[:: len(ids) // PROBES + 1] * row_bytes + tensor.data_ptr()
        if all(is_cached(address) for address in sample.tolist()):
            return
        for start, stop in runs_of(ids, row_bytes).tolist():
            begin, end = start * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE, stop * row_bytes
            # Advice only: a read that fails says so itself, when it is made.
            with suppress(OSError):
                for offset in range(begin, end, READ_AHEAD):
                    mapping.madvise(mmap.MADV_WILLNEED, offset, min(READ_AHEAD, end - offset))


def is_cached(address: int) -> bool:
    """Whether the page at an address of a memory-mapped file is in the page cache."""
    found = ctypes.c_ubyte()
    page = address // mmap.PAGESIZE * mmap.PAGESIZE
    return LIBC.mincore(page, mmap.PAGESIZE, ctypes.byref(found)) == 0 and found.value & 1 == 1


def runs_of(ids: Tensor, row_bytes: int, gap: int = GAP_ROWS, max_runs: int = MAX_RUNS) -> Tensor:
    """Merges rows into the runs that are worth reading as one piece.

    Two neighbouring ids are in one run if they are at most `gap` rows or one page apart, whichever is more. If that
    leaves more than `max_runs`, the least wider gap that does not.

    Args:
        ids: int64 [K], ascending, on the CPU.
        row_bytes: bytes from one row to the next.
        gap: in rows.
        max_runs: at least 1.

    Returns:
        int64 [R, 2]: first row of each run, and one past its last.
    """
    if ids.numel() == 0:
        return ids.new_empty(0, 2)
    steps = ids.diff()
    gap = max(gap, mmap.PAGESIZE // row_bytes)
    breaks = (steps > gap).nonzero().squeeze(1)
    if len(breaks) >= max_runs:
        # The runs are one more than the steps above the gap, so the gap has to reach the max_runs-th longest step.
        gap = int(steps[breaks].kthvalue(len(breaks) - max_runs + 1).values)
        breaks = (steps > gap).nonzero().squeeze(1)
    starts = torch.cat([ids[:1], ids[breaks + 1]])
    stops = torch.cat([ids[breaks], ids[-1:]]) + 1
    return torch.stack([starts, stops], dim=1)


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor, which must have an element."""
    if math.prod(shape) < 1 or min(shape, default=1) < 1:
        raise ValueError(f"shape must have at least one element, got {list(shape)}")
    return math.prod(shape) * dtype.itemsize


def free_host_bytes() -> int | None:
    """Bytes of host memory that this process can still take: what is available, or what its cgroups leave.

    None if unknown.
    """
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", (PROC / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    if found is None:
        return None
    return max(0, min([int(found[1]) * 1024, *cgroup_leaves()]))


def cgroup_leaves() -> list[int]:
    """Bytes that each memory limit on this process leaves, for cgroups of both versions."""
    try:
        groups = [line.split(":", 2) for line in (PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    leaves = []
    for _, controllers, path in groups:
        limits: tuple[str, ...]
        if controllers == "":
            root, limits, usage, cache = CGROUP, ("memory.max", "memory.high"), "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limits = CGROUP / controllers, ("memory.limit_in_bytes",)
            usage, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # Limits of the groups around count too. In a container, only some of them can be seen.
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(root):
                break
            for limit in limits:
                try:
                    most, taken = (folder / limit).read_text(), int((folder / usage).read_text())
                    droppable = re.search(rf"^{cache} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                except OSError:
                    continue
                if most.strip() != "max":
                    leaves.append(int(most) - taken + (int(droppable[1]) if droppable else 0))
    return leaves


def gib(nbytes: int) -> str:
    """Bytes for reading."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"

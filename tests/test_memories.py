"""Memory for tables: the host's, page-locked with a stand-in for CUDA, and a file's."""

import ctypes
import enum
import gc
import math
import mmap
import os
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gas_triton.history import cuda, memories
from gas_triton.history.memories import READ_AHEAD, FileMemory, HostMemory, free_host_bytes, runs_of
from gas_triton.kernels.pull import gather_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PAGE = mmap.PAGESIZE


def status(field: str) -> int:
    """Bytes that /proc says this process has of one kind of memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < stop:
            return True
    return False


def file_memory(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> FileMemory:
    with open(path, "wb") as file:
        file.truncate(torch.empty(shape, dtype=dtype, device="meta").nbytes)
    return FileMemory(path, shape, dtype)


# Host memory


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int32]
)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 3, 4)])
def test_host_memory_is_zero_and_starts_a_page(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = HostMemory(shape, dtype).tensor
    assert (tensor.shape, tensor.dtype, tensor.device) == (shape, dtype, CPU)
    assert tensor.data_ptr() % PAGE == 0
    assert torch.equal(tensor, torch.zeros(shape, dtype=dtype))
    tensor.fill_(3)
    assert torch.equal(tensor, torch.full(shape, 3, dtype=dtype))


def test_memory_lives_as_long_as_a_tensor_that_sees_it(tmp_path: Path) -> None:
    for memory in (HostMemory((2, PAGE), torch.uint8), file_memory(tmp_path / "f", (2, PAGE), torch.uint8)):
        row = memory.tensor[1]
        address = row.data_ptr()
        memory.close()
        memory.close()
        gc.collect()
        row.fill_(7)
        assert int(row.sum()) == 7 * PAGE
        with pytest.raises(RuntimeError, match=f"this {type(memory).__name__} is closed"):
            _ = memory.tensor
        assert is_mapped(address)
        del row
        assert not is_mapped(address)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (-2, -2)])
def test_memory_refuses_no_elements(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "f").write_bytes(b"")
    for make in (HostMemory, lambda *args: FileMemory(tmp_path / "f", *args)):
        with pytest.raises(ValueError, match="at least one element"):
            make(shape, torch.float32)


def test_host_memory_refuses_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError, match=r"takes 1048576\.0 GiB of host memory, where .* are free: use tier='file'"):
        HostMemory((2**50,), torch.int8)
    monkeypatch.setattr(memories, "free_host_bytes", lambda: None)
    with pytest.raises(MemoryError, match=r"which the system refuses .*: use tier='file'"):
        HostMemory((2**60,), torch.int8)


# Page-locking


class Code(enum.IntEnum):
    success = 0
    memory = 2


class FakeCudart:
    """Keeps what is registered, and fails at the call number `fail_at`."""

    def __init__(self, wrap=lambda code: code, fail_at: int | None = None) -> None:
        self.wrap, self.fail_at = wrap, fail_at
        self.calls: list[tuple[int, int, int]] = []
        self.live: dict[int, int] = {}
        self.mapped_at_unregister: list[bool] = []
        self.anonymous: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int):
        assert type(address) is type(nbytes) is int
        self.anonymous.append(status("RssAnon"))
        self.calls.append((address, nbytes, flags))
        if len(self.calls) - 1 == self.fail_at:
            return self.wrap(Code.memory)
        self.live[address] = nbytes
        return self.wrap(Code.success)

    def cudaHostUnregister(self, address: int):
        self.mapped_at_unregister.append(is_mapped(address))
        del self.live[address]
        return self.wrap(Code.success)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch):
    def use(cudart: FakeCudart) -> list[str]:
        log: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"synchronize {device}"))
        monkeypatch.setattr(memories, "forget_error", lambda device: log.append(f"forget {device}"))
        monkeypatch.setattr(memories, "CHUNK", 4 * PAGE)
        return log

    return use


WRAPS = [
    int,
    Code,
    lambda code: (code,),
    lambda code: (int(code), None),
    lambda code: enum.Enum("E", {"a": 0, "b": 2})(code),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_register_locks_every_chunk_until_the_last_tensor_goes(fake_cuda, wrap) -> None:
    cudart = FakeCudart(wrap)
    log = fake_cuda(cudart)
    memory = HostMemory((9 * PAGE + 12,), torch.uint8)
    memory.tensor.copy_(torch.arange(9 * PAGE + 12))
    start = memory.tensor.data_ptr()
    assert memory.register(CUDA) is True
    assert memory.register(CUDA) is True
    chunks = [(start, 4 * PAGE, 0), (start + 4 * PAGE, 4 * PAGE, 0), (start + 8 * PAGE, PAGE + 12, 0)]
    assert cudart.calls == chunks
    assert torch.equal(memory.tensor, torch.arange(9 * PAGE + 12).to(torch.uint8))
    last = memory.tensor[-1:]
    memory.close()
    del memory
    gc.collect()
    assert len(cudart.live) == 3
    assert log == []
    del last
    assert cudart.live == {}
    assert cudart.mapped_at_unregister == [True] * 3
    assert log == ["synchronize cuda:0"]
    assert not is_mapped(start)


def test_register_takes_the_memory_before_it_locks(fake_cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart()
    fake_cuda(cudart)
    memory = HostMemory((64, 2**18), torch.float32)
    monkeypatch.setattr(memories, "CHUNK", 2**40)
    before = status("RssAnon")
    assert memory.register(CUDA)
    assert cudart.anonymous[0] - before > 60 * 2**20


def test_registered_memory_is_not_inherited_by_forks(fake_cuda) -> None:
    fake_cuda(FakeCudart())
    memory = HostMemory((16 * PAGE,), torch.uint8)

    def flags() -> list[str]:
        # the line VmFlags of the map that the tensor is in; dc: do not copy on fork
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first, *rest = line.split()
            if "-" in first:
                low, high = (int(part, 16) for part in first.split("-"))
                inside = low <= memory.tensor.data_ptr() < high
            if inside and first == "VmFlags:":
                return rest
        raise AssertionError("not mapped")

    assert "dc" not in flags()
    memory.register(CUDA)
    assert "dc" in flags()


def test_a_fork_does_not_unregister(fake_cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart()
    log = fake_cuda(cudart)
    memory = HostMemory((PAGE,), torch.uint8)
    memory.register(CUDA)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del memory
    assert (len(cudart.live), log) == (1, [])


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("fail_at", [0, 2])
def test_register_that_fails_undoes_warns_once_and_keeps_the_memory(fake_cuda, wrap, fail_at: int) -> None:
    cudart = FakeCudart(wrap, fail_at)
    log = fake_cuda(cudart)
    memory = HostMemory((9 * PAGE,), torch.uint8)
    memory.tensor.fill_(5)
    with pytest.warns(UserWarning, match=r"cudaHostRegister: error 2; .*ulimit -l.*transfers will be slow") as caught:
        answers = [memory.register(CUDA) for _ in range(2)]
    assert answers == [False, False]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(cudart.calls) == fail_at + 1
    assert cudart.live == {}
    assert log == ["forget cuda:0"]
    assert int(memory.tensor.sum()) == 5 * 9 * PAGE
    del memory
    assert cudart.mapped_at_unregister == [True] * fail_at


def test_register_without_cuda_says_no_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for memory in (HostMemory((3,), torch.float32), file_memory(tmp_path / "f", (3,), torch.float32)):
            assert memory.register(CUDA) is False
            assert memory.register(CPU) is False
            memory.will_need(torch.tensor([0, 2]))
            memory.flush()


def test_memory_that_was_locked_for_one_device_does_not_go_to_another(fake_cuda) -> None:
    fake_cuda(FakeCudart())
    memory = HostMemory((16,), torch.float32)
    assert memory.register(CUDA)
    with pytest.raises(RuntimeError, match="page-locked for cuda:0 and cannot follow its layer to cuda:1"):
        memory.register(torch.device("cuda", 1))


@given(row_bytes=st.integers(1, 9000), num_pages=st.integers(1, 100))
def test_pieces_are_whole_rows_and_whole_pages(row_bytes: int, num_pages: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memories, "CHUNK", num_pages * PAGE)
        rows = memories.chunk_rows(row_bytes)
    assert rows >= 1
    assert rows * row_bytes % PAGE == 0
    # no longer than asked for, unless not even one row fits
    assert rows * row_bytes <= max(num_pages * PAGE, math.lcm(PAGE, row_bytes))


def test_no_copy_reaches_over_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "CHUNK", PAGE)
    rows, copied = PAGE // 8, []
    target, source = torch.zeros(5 * rows, 2), torch.randn(3 * rows, 2)
    copy = torch.Tensor.copy_

    def watch(self: torch.Tensor, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        first = self.storage_offset() // 2
        copied.append((first, first + self.size(0)))
        return copy(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", watch)
    cuda._copy(source, target, [(7, rows + 7), (2 * rows, 4 * rows)])
    assert copied == [(7, rows), (rows, rows + 7), (2 * rows, 3 * rows), (3 * rows, 4 * rows)]
    assert torch.equal(target[7 : rows + 7], source[:rows])
    assert torch.equal(target[2 * rows : 4 * rows], source[rows:])
    assert not target[rows + 7 : 2 * rows].any()


@pytest.mark.gpu
def test_registered_memory_is_pinned_and_the_device_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "CHUNK", 4 * PAGE)
    memory = HostMemory((1000, 60), torch.float32)
    memory.tensor.normal_()
    device = torch.device("cuda", torch.cuda.current_device())
    assert memory.register(device)
    assert memory.tensor.is_pinned()
    assert torch.equal(memory.tensor.to("cuda", non_blocking=True).cpu(), memory.tensor)
    # over the bus, by a kernel, and written by copies that meet the ends of pieces
    view, ids = cuda._cuda_view(memory.tensor, device), torch.randint(1000, (300,))
    rows = torch.empty(300, 60, device=device)
    gather_rows(view, ids.to(device), rows)
    assert torch.equal(rows.cpu(), memory.tensor[ids])
    written = torch.randn(900, 60, device=device)
    cuda._copy(written, memory.tensor, [(50, 950)])
    torch.cuda.synchronize()
    assert torch.equal(written.cpu(), memory.tensor[50:950])


# Files


def reference_runs(ids: list[int], gap: int) -> list[list[int]]:
    runs: list[list[int]] = []
    for i in ids:
        if runs and i - (runs[-1][1] - 1) <= gap:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return runs


@given(
    ids=st.sets(st.integers(0, 5000), max_size=120).map(sorted),
    row_bytes=st.sampled_from([1, 4, 100, 512, 4096, 5000]),
    gap=st.integers(1, 100),
    max_runs=st.integers(1, 12),
)
def test_runs_are_those_of_a_loop(ids: list[int], row_bytes: int, gap: int, max_runs: int) -> None:
    runs = runs_of(torch.tensor(ids, dtype=torch.int64), row_bytes, gap, max_runs)
    assert runs.dtype == torch.int64
    assert runs.shape[1:] == (2,)
    wide = max(gap, PAGE // row_bytes)
    while len(reference_runs(ids, wide)) > max_runs:
        wide += 1
    assert runs.tolist() == reference_runs(ids, wide)


def test_runs_by_hand() -> None:
    ids = torch.tensor([0, 64, 129, 130, 1000])
    assert runs_of(ids, 512).tolist() == [[0, 65], [129, 131], [1000, 1001]]
    assert runs_of(ids, 4).tolist() == [[0, 1001]]
    assert runs_of(ids, 512, max_runs=2).tolist() == [[0, 131], [1000, 1001]]
    assert runs_of(ids[:0], 512).tolist() == []


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def madvise(self, *call: int) -> None:
        self.calls.append(call)


@pytest.mark.parametrize("shape", [(20_000, 100), (3000, 5000), (40_000,)])
def test_will_need_asks_for_every_row_in_pieces_that_the_kernel_takes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    memory = file_memory(tmp_path / "f", shape, torch.float32)
    recorder = Recorder()
    memory._mapping = recorder  # type: ignore[assignment]
    ids = torch.randperm(shape[0])[:60].sort().values
    memory.will_need(ids)
    row_bytes = memory.tensor[0].nbytes
    asked = np.zeros(memory.tensor.nbytes, dtype=bool)
    for advice, start, length in recorder.calls:
        assert advice == mmap.MADV_WILLNEED
        assert start % PAGE == 0
        assert 0 < length <= READ_AHEAD
        assert start + length <= memory.tensor.nbytes
        assert not asked[start : start + length].all()
        asked[start : start + length] = True
    rows = [(i * row_bytes, (i + 1) * row_bytes) for i in ids.tolist()]
    assert all(asked[start:stop].all() for start, stop in rows)
    # nothing farther than a gap from a row that is needed
    near = max(64 * row_bytes, 2 * PAGE)
    needed = np.zeros_like(asked)
    for start, stop in rows:
        needed[max(0, start - near) : stop + near] = True
    assert not (asked & ~needed).any()


def test_will_need_asks_for_nothing_that_is_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = file_memory(tmp_path / "f", (2000, 1024), torch.float32)
    memory._mapping = recorder = Recorder()  # type: ignore[assignment]
    ids = torch.arange(3, 2000, 2)
    assert not memories.is_cached(memory.tensor[3].data_ptr())
    memory.tensor.fill_(1)
    assert memories.is_cached(memory.tensor[3].data_ptr() + 100)
    cached = memories.is_cached
    probed: list[int] = []
    monkeypatch.setattr(memories, "is_cached", lambda address: (probed.append(address), cached(address))[1])
    memory.will_need(ids)
    assert recorder.calls == []
    # one in four, so that rows of every part are looked at
    assert probed == [memory.tensor[3 + 8 * k].data_ptr() for k in range(250)]
    monkeypatch.setattr(memories, "is_cached", lambda address: address != probed[-1])
    memory.will_need(ids)
    assert len(recorder.calls) > 0


def test_will_need_brings_rows_into_the_page_cache(tmp_path: Path) -> None:
    memory = file_memory(tmp_path / "f", (32 * 256, PAGE), torch.uint8)  # 32 MiB: more than one read-ahead
    memory.tensor.fill_(1)
    memory.flush()
    pages = memory.tensor.shape[0]
    address = memory.tensor.data_ptr()

    def resident() -> np.ndarray:
        found = (ctypes.c_ubyte * pages)()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), found) == 0
        return np.frombuffer(found, dtype=np.uint8) & 1 > 0

    # pages that are mapped cannot be dropped, so look at a fresh map
    memory.close()
    with open(tmp_path / "f", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    memory = FileMemory(tmp_path / "f", (pages, PAGE), torch.uint8)
    address = memory.tensor.data_ptr()
    if resident().any():
        pytest.skip("this file system keeps its pages")
    ids = torch.cat([torch.arange(100, 5000), torch.tensor([7000])])
    memory.will_need(ids)
    # the kernel may drop a page again at any time, so count what was ever there, and be content with nearly all
    seen = resident()
    deadline = time.monotonic() + 10
    while seen[ids.numpy()].mean() < 0.95 and time.monotonic() < deadline:
        time.sleep(0.01)
        seen |= resident()
    assert seen[ids.numpy()].mean() >= 0.95
    assert not seen[5500:6500].any()


def test_file_memory_refuses_a_file_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for size in (95, 97):
        path.write_bytes(bytes(size))
        with pytest.raises(ValueError, match=rf"f has {size} bytes but torch.float32 \[6, 4\] takes 96"):
            FileMemory(path, (6, 4), torch.float32)


def test_a_file_table_takes_no_anonymous_memory(tmp_path: Path) -> None:
    before = status("RssAnon")
    memory = file_memory(tmp_path / "f", (2**18, 256), torch.float32)
    memory.tensor.fill_(1)
    assert memory.tensor.nbytes == 256 * 2**20
    assert status("RssFile") + status("RssShmem") > 256 * 2**20
    assert status("RssAnon") - before < 8 * 2**20
    host = HostMemory((2**18, 64), torch.float32)
    host.tensor.fill_(1)
    assert status("RssAnon") - before > 60 * 2**20


# Free memory


def proc_says(path: Path, available_kib: int, groups: str) -> Path:
    (path / "self").mkdir(parents=True)
    (path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:  {available_kib} kB\nSwapFree: 0 kB\n")
    (path / "self/cgroup").write_text(groups)
    return path


def write_files(path: Path, **texts: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (path / name).write_text(f"{text}\n")


def v2(path: Path, most: object, current: int, cache: int = 0, high: object = "max") -> None:
    names = {"memory.max": most, "memory.high": high, "memory.current": current}
    write_files(path, **names, **{"memory.stat": f"anon 5\ninactive_file {cache}\nactive_file 9"})


def v1(path: Path, limit: int, usage: int, cache: int = 0) -> None:
    names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage}
    write_files(path, **names, **{"memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}"})


HYBRID = "9:name=systemd:/job\n4:memory:/job/a\n2:cpu,cpuacct:/job\n0::/x\n"
GROUPS = {
    "none": (HYBRID, lambda c: None, 1000 * 1024),
    "v2": ("0::/job/a\n", lambda c: v2(c / "job/a", 500_000, 100_000, 30_000), 430_000),
    "v2 without limit": ("0::/job\n", lambda c: v2(c / "job", "max", 100_000), 1000 * 1024),
    "v2 high": ("0::/job\n", lambda c: v2(c / "job", "max", 100_000, 0, 150_000), 50_000),
    "v2 parent": ("0::/job/a\n", lambda c: (v2(c / "job/a", "max", 5), v2(c / "job", 300_000, 200_000)), 100_000),
    "v2 container": ("0::/\n", lambda c: v2(c, 300_000, 100_000), 200_000),
    "v2 above memory": ("0::/\n", lambda c: v2(c, 10**15, 100_000), 1000 * 1024),
    "v2 over": ("0::/\n", lambda c: v2(c, 300_000, 400_000), 0),
    "v1": (HYBRID, lambda c: v1(c / "memory/job/a", 500_000, 100_000, 30_000), 430_000),
    "v1 without limit": (HYBRID, lambda c: v1(c / "memory/job/a", 9223372036854771712, 7), 1000 * 1024),
    "v1 parent": (HYBRID, lambda c: (v1(c / "memory/job/a", 2**62, 7), v1(c / "memory/job", 70_000, 60_000)), 10_000),
    "v1 container": (HYBRID, lambda c: v1(c / "memory", 500_000, 100_000), 400_000),
}


@pytest.mark.parametrize("case", GROUPS)
def test_free_host_memory_heeds_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    groups, make, expected = GROUPS[case]
    monkeypatch.setattr(memories, "PROC", proc_says(tmp_path / "proc", 1000, groups))
    monkeypatch.setattr(memories, "CGROUP", tmp_path / "cgroup")
    make(tmp_path / "cgroup")
    assert free_host_bytes() == expected


def test_free_host_memory_of_an_unknown_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "PROC", tmp_path)
    assert free_host_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 5 kB\n")
    assert free_host_bytes() is None
    (tmp_path / "meminfo").write_text("MemAvailable: 5 kB\n")
    assert free_host_bytes() == 5 * 1024

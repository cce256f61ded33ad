"""The folder of a file tier: what it keeps, what it refuses, and who may use it."""

import errno
import fcntl
import gc
import json
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gas_triton.history import files
from gas_triton.history.files import TableFolder
from gas_triton.history.memories import FileMemory

PAGE = mmap.PAGESIZE
TABLE = {"table": ((6, 4), torch.float32), "last_push": ((6,), torch.int32)}
ABOUT = {"num_nodes": 6, "layers": ["conv2"]}


def run_python(code: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def open_folder(path: Path, **options: bool) -> TableFolder:
    return TableFolder(path / "histories", **options)


@pytest.mark.parametrize(
    "name", ["conv2", "encoder.2", "a/b", "../up", "json", "", ".", "50%", "ä b", "x.table", "lock"]
)
def test_tables_read_as_zeros_and_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    folder = open_folder(tmp_path)
    table = folder.create(name, TABLE, ABOUT)
    assert {key: (tuple(m.tensor.shape), m.tensor.dtype) for key, m in table.items()} == TABLE
    assert all(not m.tensor.any() for m in table.values())
    assert os.listdir(tmp_path) == ["histories"]
    assert len(os.listdir(tmp_path / "histories")) == 4
    values = torch.randn(6, 4)
    table["table"].tensor.copy_(values)
    folder.flush(name, {"clock": 3})
    folder.close()
    with pytest.raises(ValueError, match="already holds the tables"):
        open_folder(tmp_path)
    folder = open_folder(tmp_path, reopen=True)
    assert torch.equal(folder.create(name, TABLE, ABOUT)["table"].tensor, values)
    assert folder.read_state(name) == {"clock": 3}


def test_names_that_look_alike_are_different_tables(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    names = ["a", "a.b", "a.json", "a%2Fb", "a/b", "A", "a.json~", "a.table"]
    tables = [folder.create(name, TABLE, ABOUT)["table"].tensor.fill_(i) for i, name in enumerate(names)]
    assert [float(table.sum()) for table in tables] == [24.0 * i for i in range(len(names))]
    assert files.tables_in(folder.path) == sorted(names)
    with pytest.raises(ValueError, match=r"has a table 'a\.b' already"):
        folder.create("a.b", TABLE, ABOUT)


@pytest.mark.parametrize("key", ["json", "a.b", "a/b", "", "x~"])
def test_keys_are_identifiers(tmp_path: Path, key: str) -> None:
    folder = open_folder(tmp_path)
    with pytest.raises(ValueError, match="keys of tensors must be identifiers"):
        folder.create("conv2", {key: ((2,), torch.int32)}, ABOUT)
    assert os.listdir(folder.path) == ["lock"]


def test_the_files_are_the_tensors(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    table = folder.create("conv2", TABLE, ABOUT)
    table["table"].tensor.copy_(torch.arange(24.0).view(6, 4))
    table["last_push"].tensor.fill_(-1)
    folder.flush("conv2", {})
    assert np.array_equal(np.fromfile(folder.path / "conv2.table", np.float32), np.arange(24.0))
    assert np.array_equal(np.fromfile(folder.path / "conv2.last_push", np.int32), [-1] * 6)
    header = json.loads((folder.path / "conv2.json").read_text())
    assert header["tensors"] == {
        "table": {"shape": [6, 4], "dtype": "float32"},
        "last_push": {"shape": [6], "dtype": "int32"},
    }


def test_state_is_that_of_the_last_flush_until_the_table_changes(tmp_path: Path, monkeypatch) -> None:
    def on_disk() -> dict | None:
        header = json.loads((folder.path / "conv2.json").read_text())
        return header["state"] if header["clean"] else None

    folder = open_folder(tmp_path)
    folder.create("conv2", TABLE, ABOUT)
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (replaced.append(args), replace(*args)))
    assert folder.read_state("conv2") is None
    folder.mark_dirty("conv2")
    assert len(replaced) == 0
    folder.flush("conv2", {"clock": 4, "row_order": None})
    assert folder.read_state("conv2") == on_disk() == {"clock": 4, "row_order": None}
    folder.read_state("conv2")["clock"] = 5
    assert folder.read_state("conv2") == {"clock": 4, "row_order": None}
    for _ in range(3):
        folder.mark_dirty("conv2")
        assert folder.read_state("conv2") is on_disk() is None
    assert len(replaced) == 2
    folder.flush("conv2", {"clock": 6})
    assert folder.read_state("conv2") == on_disk() == {"clock": 6}
    assert sorted(os.listdir(folder.path)) == ["conv2.json", "conv2.last_push", "conv2.table", "lock"]


def test_flush_writes_rows_before_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(tmp_path)
    folder.create("conv2", TABLE, ABOUT)
    with pytest.raises(TypeError, match="not JSON serializable"):
        folder.flush("conv2", {"clock": torch.zeros(())})
    order = []
    flush, replace = FileMemory.flush, os.replace
    monkeypatch.setattr(FileMemory, "flush", lambda self: (order.append("rows"), flush(self)))
    monkeypatch.setattr(os, "replace", lambda *args: (order.append("header"), replace(*args)))
    folder.flush("conv2", {})
    assert order == ["rows", "rows", "header"]

    def broken(self: FileMemory) -> None:
        raise OSError(errno.EIO, "broken disk")

    folder.mark_dirty("conv2")
    monkeypatch.setattr(FileMemory, "flush", broken)
    with pytest.raises(OSError, match="broken disk"):
        folder.flush("conv2", {})
    assert folder.read_state("conv2") is None
    assert json.loads((folder.path / "conv2.json").read_text())["clean"] is False


def test_a_header_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(tmp_path)
    folder.create("conv2", TABLE, ABOUT)
    folder.flush("conv2", {"clock": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.mark_dirty("conv2")
    assert folder.read_state("conv2") == {"clock": 1}
    assert json.loads((folder.path / "conv2.json").read_text())["state"] == {"clock": 1}
    assert sorted(os.listdir(folder.path)) == ["conv2.json", "conv2.last_push", "conv2.table", "lock"]


def test_closing_leaves_tensors_usable_and_unlocks(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    tensor = folder.create("conv2", TABLE, ABOUT)["table"].tensor
    folder.close()
    folder.close()
    tensor.fill_(2)
    assert float(tensor.sum()) == 48
    for call in (
        lambda: folder.create("conv3", TABLE, ABOUT),
        lambda: folder.read_state("conv2"),
        lambda: folder.mark_dirty("conv2"),
        lambda: folder.flush("conv2", {}),
    ):
        with pytest.raises(RuntimeError, match="is closed"):
            call()
    again = open_folder(tmp_path, reopen=True)
    assert float(again.create("conv2", TABLE, ABOUT)["table"].tensor.sum()) == 48
    with pytest.raises(ValueError, match="has no table 'conv3' open, only"):
        again.read_state("conv3")


def test_a_folder_that_is_dropped_is_unlocked(tmp_path: Path) -> None:
    open_folder(tmp_path).create("conv2", TABLE, ABOUT)
    gc.collect()
    open_folder(tmp_path, reopen=True).close()


def test_reopen_makes_tables_that_are_not_there(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, reopen=True)
    folder.create("conv2", TABLE, ABOUT)["table"].tensor.fill_(1)
    folder.flush("conv2", {"clock": 1})
    folder.close()
    folder = open_folder(tmp_path, reopen=True)
    assert not folder.create("conv3", TABLE, ABOUT)["table"].tensor.any()
    assert float(folder.create("conv2", TABLE, ABOUT)["table"].tensor.sum()) == 24
    assert (folder.read_state("conv2"), folder.read_state("conv3")) == ({"clock": 1}, None)


def test_a_folder_with_tables_is_not_taken_by_accident(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for name in ("conv3", "conv2"):
        folder.create(name, TABLE, ABOUT)
    folder.close()
    before = contents(folder.path)
    with pytest.raises(ValueError, match=r"histories already holds the tables conv2, conv3: pass reopen=True"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match=r"histories already holds the tables conv2, conv3: .* or delete the folder"):
        open_folder(tmp_path)
    assert contents(folder.path) == before
    with pytest.raises(ValueError, match="reopen=True needs the path"):
        TableFolder(None, reopen=True)


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    """What is in a folder, and when it was written; the lock changes hands."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir() if p.name != "lock"}


def edit(**fields: object):
    def change(path: Path) -> None:
        header = json.loads((path / "conv2.json").read_text())
        (path / "conv2.json").write_text(json.dumps(header | fields))

    return change


DAMAGE = {
    "short": (lambda p: os.truncate(p / "conv2.table", 95), r"conv2.table has 95 bytes, expected 96 bytes: delete"),
    "long": (lambda p: os.truncate(p / "conv2.last_push", 28), r"conv2.last_push has 28 bytes, expected 24 bytes"),
    "missing": (lambda p: (p / "conv2.table").unlink(), r"conv2.table is missing, expected 96 bytes"),
    "no header": (lambda p: (p / "conv2.json").unlink(), r"conv2.table exists and is not a table to continue with"),
    "cut header": (lambda p: os.truncate(p / "conv2.json", 30), r"conv2.json is not the header of a history table"),
    "empty header": (lambda p: os.truncate(p / "conv2.json", 0), r"conv2.json is not the header of a history table"),
    "binary header": (lambda p: (p / "conv2.json").write_bytes(b"\xff\x00"), r"conv2.json is not the header"),
    "foreign header": (lambda p: (p / "conv2.json").write_text('{"name": "x"}'), r"conv2.json is not the header"),
    "list header": (lambda p: (p / "conv2.json").write_text("[1]"), r"conv2.json is not the header"),
    "version": (edit(version=2), r"conv2.json: version is 2, expected 1"),
    "byteorder": (edit(byteorder="big"), r"conv2.json: byteorder is 'big', expected 'little'"),
    "name": (edit(name="conv3"), r"conv2.json: name is 'conv3', expected 'conv2'"),
    "about": (edit(about={}), r"conv2.json: about is \{\}, expected \{'num_nodes': 6, 'layers': \['conv2'\]\}"),
    "clean": (edit(clean=None), r"conv2.json is damaged"),
    "state": (edit(state=4), r"conv2.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_do_not_fit_are_refused_and_untouched(tmp_path: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    folder = open_folder(tmp_path)
    folder.create("conv2", TABLE, ABOUT)["table"].tensor.fill_(1)
    folder.flush("conv2", {"clock": 1})
    folder.close()
    break_it(folder.path)
    before = contents(folder.path)
    folder = open_folder(tmp_path, reopen=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            folder.create("conv2", TABLE, ABOUT)
    assert contents(folder.path) == before
    with pytest.raises(ValueError, match="no table 'conv2' open"):
        folder.flush("conv2", {})


OTHERS = {
    "rows": (TABLE | {"table": ((7, 4), torch.float32)}, ABOUT, r"tensors is .*\[6, 4\].*, expected .*\[7, 4\]"),
    "dtype": (TABLE | {"table": ((6, 4), torch.int32)}, ABOUT, r"tensors is .*'float32'.*, expected .*'int32'"),
    "fewer": ({"table": TABLE["table"]}, ABOUT, r"tensors is .*last_push.*, expected"),
    "about": (TABLE, ABOUT | {"num_nodes": 7}, r"about is .*6.*, expected .*7.*: use the model, graph and dtype that"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_table_made_for_something_else_is_refused(tmp_path: Path, other: str) -> None:
    tensors, about, message = OTHERS[other]
    folder = open_folder(tmp_path)
    folder.create("conv2", TABLE, ABOUT)
    folder.close()
    before = contents(folder.path)
    folder = open_folder(tmp_path, reopen=True)
    with pytest.raises(ValueError, match=message):
        folder.create("conv2", tensors, about)
    assert contents(folder.path) == before


@pytest.mark.parametrize("reopen", [False, True])
@pytest.mark.parametrize("name", ["conv2.table", "conv2.json", "conv2.last_push"])
def test_foreign_files_are_not_overwritten(tmp_path: Path, name: str, reopen: bool) -> None:
    (tmp_path / "histories").mkdir()
    (tmp_path / "histories" / name).write_text("precious")
    folder = open_folder(tmp_path, reopen=reopen)
    with pytest.raises(ValueError, match=name):
        folder.create("conv2", TABLE, ABOUT)
    assert {n: text for n, (text, _) in contents(folder.path).items()} == {name: b"precious"}


def test_a_link_is_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    (folder.path / "conv2.table").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"conv2: .*\(File exists\)"):
        folder.create("conv2", TABLE, ABOUT)
    assert os.listdir(tmp_path) == ["histories"]


def test_a_foreign_lock_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "histories").mkdir()
    (tmp_path / "histories" / "lock").write_text("precious")
    with pytest.raises(ValueError, match="lock is not the lock of a history folder"):
        open_folder(tmp_path)
    assert (tmp_path / "histories" / "lock").read_text() == "precious"


def test_holes_of_a_copied_table_are_filled(tmp_path: Path) -> None:
    large = {"table": ((64, PAGE), torch.uint8)}
    folder = open_folder(tmp_path)
    folder.create("conv2", large, ABOUT)
    folder.close()
    table = folder.path / "conv2.table"
    os.truncate(table, 0)
    os.truncate(table, 64 * PAGE)
    assert table.stat().st_blocks == 0
    assert not open_folder(tmp_path, reopen=True).create("conv2", large, ABOUT)["table"].tensor.any()
    assert table.stat().st_blocks * 512 >= 64 * PAGE


# Folders that cannot be used


def test_a_path_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"cannot use {path} .*: give the path of a folder that can be written"):
            TableFolder(path)
    assert (tmp_path / "file").read_text() == "precious"
    # not even root can make a folder there
    with pytest.raises(OSError, match=r"cannot use /sys/histories \(.*\): give the path of a folder that can be writt"):
        TableFolder("/sys/histories")


@pytest.mark.parametrize("code, kind", [(errno.EACCES, PermissionError), (errno.EROFS, OSError)])
def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch, code: int, kind: type[OSError]) -> None:
    real = os.open

    def refuse(path, flags: int, *args: int, **options: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *args, **options)

    folder = TableFolder(tmp_path / "open")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=rf"cannot use {tmp_path}/new \({os.strerror(code)}\)") as caught:
        TableFolder(tmp_path / "new")
    assert caught.value.errno == code
    with pytest.raises(kind, match=rf"conv2: the file tier needs 120 bytes in {tmp_path}/open, .*{os.strerror(code)}"):
        folder.create("conv2", TABLE, ABOUT)
    assert os.listdir(folder.path) == ["lock"]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=r"histories cannot lock files .*: give a folder on a local disk"):
        open_folder(tmp_path)


def test_a_table_larger_than_the_disk_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: pytest.fail("would fill the disk"))
    folder = open_folder(tmp_path)
    with pytest.raises(
        OSError, match=rf"conv2: the file tier needs {2**50} bytes in .*histories, where \d+ are"
    ) as caught:
        folder.create("conv2", {"table": ((2**50,), torch.int8)}, ABOUT)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(folder.path) == ["lock"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, calls = os.posix_fallocate, []

    def fills(descriptor: int, offset: int, nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, nbytes)

    folder = open_folder(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", fills)
    with pytest.raises(
        OSError, match=r"conv2: the file tier needs 120 bytes in .*\(No space left on device\): make"
    ) as caught:
        folder.create("conv2", TABLE, ABOUT)
    assert caught.value.errno == errno.ENOSPC
    assert calls == [96, 24]
    assert os.listdir(folder.path) == ["lock"]
    folder.create("conv2", TABLE, ABOUT)


def test_a_full_disk_keeps_a_table_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(tmp_path)
    folder.create("conv2", {"table": ((64, PAGE), torch.uint8)}, ABOUT)
    folder.close()
    os.truncate(folder.path / "conv2.table", PAGE)
    os.truncate(folder.path / "conv2.table", 64 * PAGE)
    before = contents(folder.path)

    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        open_folder(tmp_path, reopen=True).create("conv2", {"table": ((64, PAGE), torch.uint8)}, ABOUT)
    assert contents(folder.path) == before


# Temporary folders


def test_a_temporary_folder_goes_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = TableFolder(None)
    tensor = folder.create("conv2", TABLE, ABOUT)["table"].tensor
    assert folder.path.parent == tmp_path
    folder.flush("conv2", {"clock": 1})
    assert folder.read_state("conv2") == {"clock": 1}
    # a killed process leaves no table behind
    assert sorted(os.listdir(folder.path)) == ["conv2.json", "lock"]
    folder.close()
    assert os.listdir(tmp_path) == []
    assert float(tensor.fill_(1).sum()) == 24
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="cannot use a temporary folder"):
        TableFolder(None)
    monkeypatch.delenv("TMPDIR")
    folder = TableFolder(None)
    assert folder.path.parent in (Path("/var/tmp"), Path("/tmp"))
    folder.close()
    assert not folder.path.exists()


def test_a_temporary_folder_goes_at_exit_but_not_with_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = run_python(
        "import os, sys, torch\n"
        "from gas_triton.history.tiers import TableFolder\n"
        "folder = TableFolder(None)\n"
        "tensor = folder.create('conv2', {'table': ((4,), torch.int32)}, {})['table'].tensor\n"
        "if os.fork() == 0: sys.exit(0)\n"
        "os.wait()\n"
        "print(folder.path, folder.path.exists())\n"
    )
    out, _ = process.communicate(timeout=60)
    path, existed = out.split()
    assert process.returncode == 0
    assert existed == "True"
    assert Path(path).parent == tmp_path
    assert not Path(path).exists()


# Processes


WRITER = """
import os, sys, torch
from gas_triton.history.tiers import TableFolder
folder = TableFolder(sys.argv[1], reopen=True)
table = folder.create("conv2", {"table": ((6, 4), torch.float32)}, {})["table"]
table.tensor.copy_(torch.arange(24.0).view(6, 4))
folder.flush("conv2", {"clock": 7})
print("flushed", flush=True)
sys.stdin.readline()
folder.mark_dirty("conv2")
table.tensor.fill_(-1)
print("dirty", flush=True)
sys.stdin.readline()
"""


def test_rows_reach_other_processes_and_a_kill_shows(tmp_path: Path) -> None:
    process = run_python(WRITER, tmp_path)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "flushed\n"
        with pytest.raises(RuntimeError, match=rf"{tmp_path} is in use by process {process.pid}: give every process"):
            TableFolder(tmp_path, reopen=True)
        # as it was at the flush, in a folder of its own
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in ("conv2.table", "conv2.json"):
            (copy / name).write_bytes((tmp_path / name).read_bytes())
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "dirty\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    tensors = {"table": TABLE["table"]}
    folder = TableFolder(copy, reopen=True)
    assert torch.equal(folder.create("conv2", tensors, {})["table"].tensor, torch.arange(24.0).view(6, 4))
    assert folder.read_state("conv2") == {"clock": 7}
    folder = TableFolder(tmp_path, reopen=True)
    assert torch.equal(folder.create("conv2", tensors, {})["table"].tensor, torch.full((6, 4), -1.0))
    assert folder.read_state("conv2") is None


def test_a_second_folder_of_one_process_is_refused(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    with pytest.raises(RuntimeError, match=rf"histories is in use by this process {os.getpid()}"):
        open_folder(tmp_path)
    folder.close()
    # a pid that is left by a killed process means nothing
    (folder.path / "lock").write_text("1")
    open_folder(tmp_path).close()
    assert (folder.path / "lock").read_text() == ""

"""Checkpoints: what comes back, what a killed or failed save leaves, damaged files, and the memory a save takes."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import gas_triton
from gas_triton import checkpoint
from gas_triton.checkpoint import checksum, has_checkpoint, load_checkpoint, lock_folder, save_checkpoint
from gas_triton.history import Histories, HistoryStore

ROOT = Path(__file__).resolve().parent.parent


def state_of(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"weight": torch.randn(5, 7, generator=generator), "half": torch.randn(3, generator=generator).half()},
        "epoch": seed,
        "generator": generator.get_state(),
        "records": [{"loss": 0.1 + seed, "note": None}],
    }


def histories_of(
    seed: int, dtype: torch.dtype = torch.float32, rows: int = 40, names: tuple[str, ...] = ("a", "b.1")
) -> Histories:
    generator = torch.Generator().manual_seed(seed)
    stores = {name: HistoryStore(rows, 6 + place, dtype, name=name) for place, name in enumerate(names)}
    for store in stores.values():
        store.table.copy_(torch.randn(store.table.shape, generator=generator))
        store.last_push.random_(-1, 50, generator=generator)
        store.clock.fill_(50 + seed)
        store.row_order = "given-40"
    return Histories(stores)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


def clone(histories: Histories) -> dict[str, Any]:
    return {
        name: {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
        for name, state in histories.state_dict().items()
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Makes the system refuse to write more than that to a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_saved_comes_back(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # several pieces a tensor, the last one shorter
    monkeypatch.setattr(checkpoint, "_PIECE", 100)
    folder = tmp_path / "deep" / "er"
    assert not has_checkpoint(folder)
    saved = histories_of(3, dtype)
    assert save_checkpoint(folder, state_of(3), saved).parent == folder
    assert has_checkpoint(folder)
    loaded = histories_of(8, dtype)
    table = loaded["a"].table
    assert_same(load_checkpoint(folder, loaded), state_of(3))
    assert_same(loaded.state_dict(), saved.state_dict())
    assert loaded["a"].table is table
    (raw,) = folder.glob("gas-checkpoint-*/tensor-0.bin")
    assert raw.read_bytes() == saved["a"].table.view(torch.uint8).numpy().tobytes()
    # the table can be written afterwards without touching the file
    loaded["a"].table.zero_()
    assert_same(load_checkpoint(folder), state_of(3))


def test_a_state_of_any_tensors_and_values_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE", 64)
    wide = torch.arange(24 * 10, dtype=torch.float32).reshape(24, 10)
    state = {
        "layer": {
            "table": torch.arange(-120, 120, dtype=torch.int8).reshape(24, 10), "scale": torch.rand(24),
            "strided": wide[:, 2:7], "turned": wide.t(), "none": torch.empty(0, 3), "one": torch.tensor(2.5),
            "flags": torch.rand(9) < 0.5, "clock": 2**40, "share": 0.1, "order": "été", "nothing": None, "yes": True,
        },
        "empty": {},
    }  # fmt: skip

    class Recorded(Histories):
        def load_state_dict(self, given: Any, graph: Any = None) -> None:
            assert_same(given, state)
            assert graph is seen
            given["layer"]["table"][0] = 7

    seen: Any = object()
    save_checkpoint(tmp_path, {}, state)
    before = files(tmp_path)
    assert load_checkpoint(tmp_path, Recorded({}), seen) == {}
    assert files(tmp_path) == before


def test_a_save_replaces_the_one_before_and_leaves_other_files(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    (tmp_path / "checkpoint-100").mkdir()
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path, state_of(epoch), histories_of(epoch))
        assert load_checkpoint(tmp_path)["epoch"] == epoch
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".gas-checkpoint.lock", "checkpoint-100", "gas-checkpoint-000003", "notes.txt"
    ]  # fmt: skip


def test_a_checkpoint_of_a_state_alone_has_no_histories(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(1))
    assert_same(load_checkpoint(tmp_path), state_of(1))
    with pytest.raises(ValueError, match="gas-checkpoint-000001 holds no histories"):
        load_checkpoint(tmp_path, histories_of(1))
    save_checkpoint(tmp_path, state_of(1), Histories({}))
    assert_same(load_checkpoint(tmp_path, Histories({})), state_of(1))


def test_the_checksum_is_that_of_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 8)
    whole = checksum([x, x[:3]])
    monkeypatch.setattr(checkpoint, "_PIECE", 96)
    assert checksum([x, x[:3]]) == whole == checksum([x.t().contiguous().t(), x[:3]])
    changed = x.clone()
    changed[49, 7] += 1
    assert checksum([changed, x[:3]]) != whole


# --- histories that do not fit


def test_histories_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(1), histories_of(1))
    others = {
        "has histories of": histories_of(2, names=("a", "c")),
        "holds torch.float32": histories_of(2, torch.bfloat16),
        r"\[40, 6\]": histories_of(2, rows=41),
        "in the order": histories_of(2),
    }
    others["in the order"]["b.1"].row_order = "another"
    for message, histories in others.items():
        before = clone(histories)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path, histories)
        assert_same(clone(histories), before)
    graph = gas_triton.Graph.from_edge_index(torch.tensor([[0], [39]]), num_nodes=40)
    load_checkpoint(tmp_path, histories_of(2), graph)
    with pytest.raises(ValueError, match="given-40 but the graph has"):
        load_checkpoint(tmp_path, histories_of(2), graph.permute(torch.arange(39, -1, -1)))


# --- damaged and foreign files


@pytest.mark.parametrize("name", ["manifest.json", "state.pt", "tensor-0.bin", "tensor-3.bin"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "empty", "changed"])
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path: Path, name: str, damage: str) -> None:
    file = save_checkpoint(tmp_path, state_of(1), histories_of(1)) / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "changed":
        # a digit of a number, in the manifest
        place = data.index(b'"value": 51') + 9 if name == "manifest.json" else len(data) // 2
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        file.write_bytes({"shorter": data[:-3], "longer": data + b"\0x", "empty": b""}[damage])
    histories = histories_of(2)
    before = clone(histories)
    with pytest.raises(ValueError, match=name) as error:
        load_checkpoint(tmp_path, histories)
    assert_same(clone(histories), before)
    if name != "manifest.json":
        expected = {"missing": "is missing: expected", "changed": r"expected check sum \d+, got \d+"}
        error.match(expected.get(damage, rf"expected {len(data)} bytes, got \d+"))
    # a save does not care, and mends the folder
    save_checkpoint(tmp_path, state_of(3), histories)
    assert load_checkpoint(tmp_path)["epoch"] == 3


def test_a_missing_foreign_or_newer_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere holds no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert not has_checkpoint(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="file is a file, not a folder with a checkpoint"):
        load_checkpoint(tmp_path / "file")
    manifest = save_checkpoint(tmp_path, state_of(1)) / "manifest.json"
    content = json.loads(manifest.read_text())
    for change, message in (
        ({"format": "another program's"}, 'is not of a gas_triton checkpoint: its format is "another program\'s"'),
        ({"version": 2}, "has format version 2 but this gas_triton reads 1"),
        ({"crc32": None}, r"is damaged: expected check sum None, got \d+"),
    ):
        manifest.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=f"{manifest} {message}"):
            load_checkpoint(tmp_path)
    manifest.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"its format is \[1, 2\]"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "state, histories, message",
    [
        ([1], None, "state must be a mapping, got list"),
        ({"path": Path("x")}, None, r"torch.load\(weights_only=True\) cannot read"),
        ({"call": lambda: None}, None, r"torch.load\(weights_only=True\) cannot read"),
        ({}, {"conv": torch.ones(2)}, "histories: conv must be a mapping of names to values, got Tensor"),
        ({}, {"conv": {"table": [1.0]}}, "histories: conv's table must be a tensor, number or str, got list"),
    ],
)
def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path, state: Any, histories: Any, message: str) -> None:
    save_checkpoint(tmp_path, state_of(1))
    before = files(tmp_path)
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path, state, histories)
    assert files(tmp_path) == before


# --- saves that fail


@pytest.mark.parametrize("limit", [100, 9_000, 10_000])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, limit: int) -> None:
    # the limits are reached in state.pt, in the first table and in the second
    histories = histories_of(2, rows=400)
    with largest_file(limit), pytest.raises(OSError, match="there was none before") as error:
        save_checkpoint(tmp_path, state_of(1), histories)
    error.match(rf"was not saved in {tmp_path}: File too large \(0\.0 MiB are needed, [\d.]+ MiB are free\)")
    assert [path.name for path in tmp_path.iterdir()] == [".gas-checkpoint.lock"]
    save_checkpoint(tmp_path, state_of(1), histories)
    before = files(tmp_path)
    with largest_file(limit), pytest.raises(OSError, match="the one before, gas-checkpoint-000001, is intact"):
        save_checkpoint(tmp_path, state_of(2), histories)
    assert files(tmp_path) == before
    assert load_checkpoint(tmp_path, histories)["epoch"] == 1


def test_ctrl_c_within_a_save_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state_of(1), histories_of(1))
    before = files(tmp_path)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(tmp_path, state_of(2), histories_of(2))
        assert files(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OSError, match=f"checkpoints cannot be saved in {file}: it is a file"):
        save_checkpoint(file, {})
    # not under tmp_path, which other users cannot enter
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    try:
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)
        with pytest.raises(PermissionError, match=f"checkpoints cannot be saved in {folder}: Permission denied"):
            save_checkpoint(folder, {})
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_two_cannot_save_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from gas_triton.checkpoint import save_checkpoint\n"
        "try: save_checkpoint(sys.argv[1], {})\n"
        "except BlockingIOError as error: print(error)"
    )
    with lock_folder(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        with pytest.raises(BlockingIOError, match=f"another process saves checkpoints in {tmp_path}"):
            save_checkpoint(tmp_path, {})
    assert f"another process saves checkpoints in {tmp_path}" in other.stdout
    save_checkpoint(tmp_path, {})


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, state_of(1))
    for name in (".gas-checkpoint-000002.writing", ".gas-checkpoint-000001.removing", "gas-checkpoint-000000"):
        shutil.copytree(first, tmp_path / name)
    assert load_checkpoint(tmp_path)["epoch"] == 1
    save_checkpoint(tmp_path, state_of(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gas-checkpoint.lock", "gas-checkpoint-000002"]


def test_a_reader_finds_the_next_checkpoint_when_its_own_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, state_of(1), histories_of(1))
    check, checked = checkpoint._check_file, []

    def check_then_save(path: Path, entry: dict[str, Any]) -> Path:
        checked.append(entry["file"])
        if len(checked) == 2:
            save_checkpoint(tmp_path, state_of(2), histories_of(2))
        return check(path, entry)

    monkeypatch.setattr(checkpoint, "_check_file", check_then_save)
    loaded = histories_of(7)
    assert_same(load_checkpoint(tmp_path, loaded), state_of(2))
    assert_same(loaded.state_dict(), histories_of(2).state_dict())


def save_in_a_loop(folder: Path, start: int, saved: Any) -> None:
    table = torch.empty(2000, 64)
    for number in itertools.count(start):
        state = {"number": number, "weight": torch.full((50,), float(number))}
        save_checkpoint(folder, state, {"conv": {"table": table.fill_(number)}})
        saved.value = number


def test_a_process_killed_at_any_moment_leaves_a_checkpoint_that_it_saved(tmp_path: Path) -> None:
    class Table(Histories):
        def load_state_dict(self, given: Any, graph: Any = None) -> None:
            self.table = given["conv"]["table"].clone()

    # one process that has imported everything, and forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    chance, last, ends = random.Random(0), 0, set()
    for kills in range(200):
        # a fast disk leaves little time to hit the middle of a save
        if kills >= 20 and len(ends) > 1:
            break
        saved = context.RawValue("q", 0)
        program = context.Process(target=save_in_a_loop, args=(tmp_path, last + 1, saved), daemon=True)
        program.start()
        until = time.monotonic() + 60
        while saved.value == 0:
            assert time.monotonic() < until
            assert program.is_alive()
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.03))
        program.kill()
        program.join()
        ends.add(tuple(sorted(path.name.partition("checkpoint-")[0] for path in tmp_path.iterdir())))
        table = Table({})
        state = load_checkpoint(tmp_path, table)
        last = state["number"]
        # what was told is saved; the next one may be too
        assert last in (saved.value, saved.value + 1)
        assert (state["weight"] == last).all()
        assert table.table.shape == (2000, 64)
        assert (table.table == last).all()
    # some were killed in the middle of a save
    assert len(ends) > 1


# --- memory

SAVE_A_MAPPED_TABLE = """
import sys, threading, torch
from gas_triton.checkpoint import load_checkpoint, save_checkpoint
from gas_triton.history import Histories

folder, mib = sys.argv[1], 256
rows = mib * 2**20 // 512
def mapped(name):
    return torch.from_file(f"{folder}/{name}", shared=True, size=rows * 128, dtype=torch.float32).reshape(rows, 128)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

class Table(Histories):
    def load_state_dict(self, state, graph=None):
        target.copy_(state["conv"]["table"])

table, target = mapped("a"), mapped("b")
table.copy_(torch.arange(rows)[:, None].expand(rows, 128))
highest, done = 0.0, threading.Event()
def watch():
    global highest
    while not done.wait(0.002):
        highest = max(highest, anonymous())

save_checkpoint(f"{folder}/small", {}, {"conv": {"table": table[:1]}})
before = anonymous()
threading.Thread(target=watch).start()
try:
    save_checkpoint(f"{folder}/large", {}, {"conv": {"table": table}})
    saved, highest = highest, 0.0
    load_checkpoint(f"{folder}/large", Table({}))
    loaded = highest
    copied = table.clone() is None or anonymous()
finally:
    done.set()
print(saved - before, loaded - before, bool((table == target).all()), highest - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_saving_and_loading_a_mapped_table_takes_little_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVE_A_MAPPED_TABLE, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved, loaded, same, copied = done.stdout.split()
    assert same == "True"
    assert float(saved) < 100
    assert float(loaded) < 100
    # the measure sees a copy of the table
    assert float(copied) > 200

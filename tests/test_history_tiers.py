"""Histories on the host and in files: the same training, and what outlives the process or refuses to."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gas_triton import Histories, HistoryStore, NonFiniteError, attach_histories
from gas_triton.history import histories as module

from .test_history import WIDTHS, Net, make_loader, train

pytestmark = pytest.mark.filterwarnings("ignore:there is no CUDA device")
NUM_NODES = 30


def run(model: Net, histories: Histories, epochs: range) -> list[Tensor]:
    """Trains some epochs; losses."""
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.1), make_loader()
    losses = []
    for epoch in epochs:
        loader.epoch = epoch
        losses += train(model, histories.prefetch(loader), optimizer)
    return losses


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8])
def test_tables_in_files_go_on_after_the_process(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = Net()
    expected = run(whole, attach_histories(whole, NUM_NODES, dtype=dtype), range(4))
    model = Net()
    with attach_histories(model, NUM_NODES, "file", dtype, path=tmp_path) as histories:
        losses = run(model, histories, range(2))
        ages, order = histories.age(), histories["conv2"].row_order
    reopened = attach_histories(model, NUM_NODES, "file", dtype, path=tmp_path, reopen=True)
    assert all(torch.equal(reopened.age()[name], ages[name]) for name in ages)
    assert reopened["conv2"].row_order == order
    losses += run(model, reopened, range(2, 4))
    assert losses == expected
    reopened.close()


def test_a_folder_with_tables_is_not_taken_silently(tmp_path: Path) -> None:
    model = Net()
    with attach_histories(model, NUM_NODES, "file", path=tmp_path) as histories:
        run(model, histories, range(1))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"already holds the tables conv2, conv3: pass reopen=True"):
        attach_histories(model, NUM_NODES, "file", path=tmp_path)
    for options, message in (
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"layers": ["conv1", "conv2"]}, None),
    ):
        if message is None:
            attach_histories(model, NUM_NODES, "file", path=tmp_path, reopen=True, **options).close()
            continue
        with pytest.raises(ValueError, match=message):
            attach_histories(model, NUM_NODES, "file", path=tmp_path, reopen=True, **options)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


def test_tables_of_a_killed_process_are_not_taken_for_whole(tmp_path: Path) -> None:
    program = f"""
        import os, signal, torch
        from gas_triton import attach_histories
        from tests.test_history import Net, make_loader, train
        model = Net()
        histories = attach_histories(model, {NUM_NODES}, "file", torch.float64, path={str(tmp_path)!r})
        train(model, histories.prefetch(make_loader()), torch.optim.SGD(model.parameters(), lr=0.1))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert any(contents(tmp_path)["conv2.table"])
    model = Net()
    with pytest.warns(UserWarning, match=r"conv[23]: the table in .* changed after it was last flushed"):
        histories = attach_histories(model, NUM_NODES, "file", torch.float64, path=tmp_path, reopen=True)
    assert not histories["conv2"].table.any()
    assert histories.age()["conv2"].unique().tolist() == [-1]
    histories.close()


def test_another_process_cannot_have_the_folder_at_once(tmp_path: Path) -> None:
    model = Net()
    with attach_histories(model, NUM_NODES, "file", path=tmp_path) as histories:
        run(model, histories, range(1))
        table = histories["conv2"].table.clone()
        program = f"""
            from gas_triton import attach_histories
            from tests.test_history import Net
            attach_histories(Net(), {NUM_NODES}, "file", path={str(tmp_path)!r}, reopen=True)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
        assert f"{tmp_path} is in use by process {os.getpid()}" in done.stderr
        assert torch.equal(histories["conv2"].table, table)


def test_a_fork_does_not_write_the_tables_of_its_parent(tmp_path: Path) -> None:
    model = Net()
    with attach_histories(model, NUM_NODES, "file", path=tmp_path) as histories:
        run(model, histories, range(1))
        program = os.fork()
        if program == 0:
            try:
                histories.reset()
            except RuntimeError as error:
                os._exit(0 if f"belong to process {os.getppid()}, of which this is a fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) == 0
        assert histories["conv2"].table.any()


def test_a_disk_that_fills_up_leaves_no_tables_and_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reserve, calls = Net(), os.posix_fallocate, []
    before = attach_histories(model, NUM_NODES)

    def fill(descriptor: int, offset: int, nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", fill)
    with pytest.raises(OSError, match=r"conv3: the file tier needs .* bytes in .*No space left"):
        attach_histories(model, NUM_NODES, "file", path=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert model.conv2.history is before["conv2"]
    monkeypatch.setattr(os, "posix_fallocate", reserve)
    attach_histories(model, NUM_NODES, "file", path=tmp_path).close()


def test_without_a_path_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    model = Net()
    histories = attach_histories(model, NUM_NODES, "file", torch.float64)
    assert len(list(tmp_path.iterdir())) == 1
    run(model, histories, range(1))
    histories.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="conv2: the history is closed"):
        run(model, histories, range(1))


def test_flush_makes_the_files_whole_while_training_goes_on(tmp_path: Path) -> None:
    model = Net()
    with attach_histories(model, NUM_NODES, "file", path=tmp_path) as histories:
        run(model, histories, range(1))
        header = tmp_path / "conv2.json"
        assert json.loads(header.read_text())["clean"] is False
        histories.flush()
        assert json.loads(header.read_text())["state"] == {"clock": 3, "row_order": histories["conv2"].row_order}
        run(model, histories, range(1, 2))
        assert json.loads(header.read_text())["clean"] is False


# --- host memory -----------------------------------------------------------------------------------------------------


def test_without_cuda_pinned_tables_warn_once() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: tables are page-locked")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach_histories(Net(), NUM_NODES, "pinned")
    assert [str(warning.message)[:45] for warning in caught] == ["there is no CUDA device: tier 'pinned' keeps "]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("tier, dtype", [("pinned", torch.float64), ("pinned", torch.int8), ("device", torch.int8)])
def test_a_copy_of_a_model_has_tables_of_its_own(tier: str, dtype: torch.dtype) -> None:
    model = Net()
    histories = attach_histories(model, NUM_NODES, tier, dtype)
    run(model, histories, range(1))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mine, other = histories["conv2"].state_dict(), twin.conv2.history.state_dict()
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(other[key])) for key in ("table", "clock"))
        table = histories["conv2"].table.clone()
        train(twin, make_loader(), torch.optim.SGD(twin.parameters(), lr=0.5))
        assert torch.equal(histories["conv2"].table, table)
        assert not torch.equal(twin.conv2.history.table, table)
        assert twin.conv2.history.tier == tier


def test_a_copy_of_a_model_with_tables_in_files_is_refused() -> None:
    model = Net()
    with attach_histories(model, NUM_NODES, "file"), pytest.raises(TypeError, match="conv2: a history in files cannot"):
        copy.deepcopy(model)


def test_tables_that_the_host_has_no_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_host_bytes", lambda: 1000)
    with pytest.raises(
        MemoryError, match=r"the tables take 0\.0 MiB, of which the host has 0\.0 MiB free: use tier 'file'"
    ):
        attach_histories(Net(), NUM_NODES, "pinned")


# --- what a tier says and refuses ------------------------------------------------------------------------------------


def test_summary_shows_bytes_by_layer_and_tier() -> None:
    histories = attach_histories(Net(), 50_000, "pinned", torch.int8)
    nbytes = {name: 50_000 * (width + 4 + 4) for name, width in zip(("conv2", "conv3"), WIDTHS[1:3], strict=True)}
    lines = [line.split() for line in histories.summary().splitlines()]
    assert lines[0] == ["history", "rows", "width", "dtype", "tier", "bytes"]
    assert lines[1] == ["conv2", "50000", "8", "int8", "pinned", f"{nbytes['conv2'] / 2**20:.1f}", "MiB"]
    assert lines[-1] == ["all", f"{sum(nbytes.values()) / 2**20:.1f}", "MiB"]
    assert histories.memory_stats() == {"tables": {"pinned": sum(nbytes.values())}, "staged": 0, "layers": nbytes}


@pytest.mark.parametrize("tier", ["device", "pinned", "file"])
def test_auto_says_what_it_chose(tier: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def choose(nbytes: int, device: torch.device) -> tuple[str, str]:
        asked.append(nbytes)
        return tier, f"chose {tier} for {device}"

    monkeypatch.setattr(module, "choose_tier", choose)
    with caplog.at_level("INFO", "gas_triton"), attach_histories(Net(), NUM_NODES, "auto", torch.int8) as histories:
        assert {store.tier for store in histories.values()} == {tier}
        assert asked == [histories.nbytes]
        assert histories.summary().splitlines()[-1] == f"chose {tier} for cpu"
        assert caplog.messages == [f"chose {tier} for cpu"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tier": "file", "in_place": True}, "in_place=True needs tier 'device' or 'pinned', got 'file'"),
        ({"tier": "pinned", "path": "tables"}, "path and reopen belong to tier 'file', got tier 'pinned'"),
        ({"reopen": True}, "path and reopen belong to tier 'file', got tier 'device'"),
        ({"tier": "file", "reopen": True}, "reopen=True needs the path of the folder"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of 'raise', 'warn', 'skip', 'allow', got 'ignore'"),
        ({"dtype": torch.int16}, "dtype must be torch.float32, bfloat16, float16, float64 or int8, got torch.int16"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises((ValueError, TypeError), match=message):
        attach_histories(model, NUM_NODES, **options)
    assert model.conv2.history is None


@pytest.mark.parametrize("tier", ["device", "pinned"])
def test_a_refused_push_does_not_say_which_order_the_rows_have(tier: str) -> None:
    store, batch = HistoryStore(NUM_NODES, 4, tier=tier), make_loader().batch([0])
    with pytest.raises(NonFiniteError):
        store.push(torch.full((batch.num_nodes, 4), torch.nan), batch)
    assert (store.row_order, int(store.clock)) == (None, 0)


@pytest.mark.parametrize("ids", [[0, NUM_NODES], [-1, 3]])
def test_pull_refuses_ids_that_are_not_rows(ids: list[int]) -> None:
    store = HistoryStore(NUM_NODES, 4)
    with pytest.raises(IndexError, match=rf"history: ids must be in \[0, 30\), got {min(ids)} to {max(ids)}"):
        store.pull(torch.tensor(ids))

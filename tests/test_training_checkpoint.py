"""Training with checkpoints: a resumed run is the run, and what cannot be resumed is refused before it starts."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gas_triton import checkpoint, training, training_checkpoint
from gas_triton.checkpoint import load_checkpoint, lock_folder, save_checkpoint
from gas_triton.datasets import Dataset, generate
from gas_triton.history import Histories
from gas_triton.memory import Peak, peak_bytes
from gas_triton.partition import random_partition
from gas_triton.training import Result, TrainConfig, _Run, train

CONFIG = TrainConfig(layers=3, hidden=16, lr=0.02, grad_norm=1.0, epochs=3, num_parts=8, batch_size=3)
End = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generate(600, 6000, num_classes=4, num_features=8, signal=2.0)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps whose memory was measured, in place of measuring it, which takes longer than all else here."""
    calls: list[str] = []

    @contextmanager
    def quick(device: torch.device) -> Iterator[Peak]:
        calls.append(str(device))
        yield Peak(nbytes=12_345)

    monkeypatch.setattr(training, "peak_bytes", quick)
    return calls


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[End]:
    """Parameters, buffers, moments and tables of each run, as they were when it ended."""
    seen: list[End] = []
    close = _Run.close

    def keep_and_close(self: _Run) -> None:
        tensors = {f"model {name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"Adam {number} {name}": tensor.clone() for name, tensor in state.items()}
        for layer, store in self.histories.state_dict().items():
            tensors |= {
                f"{layer} {name}": torch.as_tensor(value).clone()
                for name, value in store.items()
                if name != "row_order" and value is not None
            }
        seen.append(tensors)
        close(self)

    monkeypatch.setattr(_Run, "close", keep_and_close)
    return seen


def numbers(result: Result) -> dict[str, Any]:
    """A result without its times."""
    fields = asdict(result)
    del fields["epoch_seconds"], fields["transfers"]
    for record in fields["epochs"]:
        del record["seconds"]
    return fields


def assert_same_end(a: End, b: End) -> None:
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- resume


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "SAGE", "partition": "random", "layers": 2, "max_steps": 2},
        {"model": "GIN", "model_options": {"batch_norm": True, "residual": True}, "history_dtype": "bfloat16"},
        {"eval_every": 2, "histories": False},
        {"full_batch": True, "weight_decay": 0.01},
        {"eval_every": 2, "fill_histories": True},
    ],
    ids=["GCN", "SAGE", "GIN", "without histories", "full batch", "filled histories"],
)
def test_a_resumed_run_is_the_run_bit_for_bit(
    dataset: Dataset, tmp_path: Path, ends: list[End], measured: list[str], changes: dict[str, Any]
) -> None:
    config = replace(CONFIG, epochs=6, **changes)
    whole = train(dataset, config)
    first = train(dataset, replace(config, epochs=3), checkpoint=tmp_path)
    torch.rand(5)
    state, seen = torch.get_rng_state(), list[int]()
    second = train(dataset, config, lambda record: seen.append(record.epoch), checkpoint=tmp_path, resume=True)
    assert seen == [4, 5, 6]
    # in the two first epochs, not in the first after the resume
    assert len(measured) == 2 * (1 if config.full_batch else config.max_steps or 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers(second) == numbers(whole)
    # the last epoch is evaluated, whether it is due or not
    assert first.epochs[2].val_acc is not None
    assert (second.epochs[2].val_acc is None) == ("eval_every" in changes)
    whole_end, first_end, second_end = ends
    assert_same_end(second_end, whole_end)
    assert any(not torch.equal(first_end[name], whole_end[name]) for name in whole_end if name.startswith("model"))
    stored = {"GCN": 6, "SAGE": 3, "GIN": 6}[config.model] if config.histories and not config.full_batch else 0
    assert len([name for name in whole_end if name.split()[-1] in ("table", "last_push", "clock")]) == stored


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_resumed_bit_for_bit(dataset: Dataset, tmp_path: Path, ends: list[End]) -> None:
    config = replace(CONFIG, epochs=4)
    whole = train(dataset, config, device="cuda")
    train(dataset, replace(config, epochs=2), device="cuda", checkpoint=tmp_path)
    assert numbers(train(dataset, config, device="cuda", checkpoint=tmp_path, resume=True)) == numbers(whole)
    assert_same_end(ends[2], ends[0])


def test_a_finished_run_gives_its_result_again_and_can_go_on(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(dataset, CONFIG, checkpoint=tmp_path)
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "__init__", None)
        again = train(dataset, CONFIG, checkpoint=tmp_path, resume=True, say=said.append)
    assert asdict(again) == asdict(first)
    assert said == [f"resuming after epoch 3 of {tmp_path}: nothing is left to train"]
    longer = train(dataset, replace(CONFIG, epochs=5), checkpoint=tmp_path, resume=True)
    assert [record.epoch for record in longer.epochs] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"checkpoint of epoch 5: epochs must be at least that, got 3"):
        train(dataset, CONFIG, checkpoint=tmp_path, resume=True)


def test_checkpoints_are_saved_when_due_and_at_the_end(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    write = checkpoint.write_checkpoint

    def record(folder: Path, state: Any, histories: Any) -> Path:
        saved.append(state["epoch"])
        return write(folder, state, histories)

    monkeypatch.setattr(training_checkpoint, "write_checkpoint", record)
    said: list[str] = []
    config = replace(CONFIG, epochs=5)
    train(dataset, config, checkpoint=tmp_path, checkpoint_every=2, resume=True, say=said.append)
    assert saved == [2, 4, 5]
    assert said == [f"no checkpoint in {tmp_path} yet: training from the beginning"]


@pytest.mark.parametrize("stop_at, epochs, saved", [("on_epoch", 3, 3), ("step", 3, 2), ("save", 2, 2)])
def test_ctrl_c_saves_the_last_epoch_unless_the_next_has_begun(
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends: list[End],
    stop_at: str,
    epochs: int,
    saved: int,
) -> None:
    config = replace(CONFIG, epochs=5)
    whole = train(dataset, config)
    step, write, calls = _Run._step, checkpoint.write_checkpoint, {"on_epoch": 0, "step": 0, "save": 0}

    def count(name: str, last: int) -> None:
        calls[name] += 1
        if name == stop_at and calls[name] == last:
            raise KeyboardInterrupt

    def stopped_step(self: _Run, *args: Any) -> Any:
        count("step", 3 * 3 + 2)
        return step(self, *args)

    def stopped_write(*args: Any) -> Path:
        count("save", 1)
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_step", stopped_step)
        patch.setattr(training_checkpoint, "write_checkpoint", stopped_write)
        on_epoch = lambda record: count("on_epoch", 3)  # noqa: E731
        stopped = train(dataset, config, on_epoch, checkpoint=tmp_path, checkpoint_every=2)
    assert stopped.interrupted
    assert [record.epoch for record in stopped.epochs] == list(range(1, epochs + 1))
    assert load_checkpoint(tmp_path)["epoch"] == saved
    resumed = train(dataset, config, checkpoint=tmp_path, resume=True)
    assert numbers(resumed) == numbers(whole)
    assert_same_end(ends[2], ends[0])


def test_a_failed_save_ends_the_run_and_keeps_the_checkpoint_before(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if target.name == "gas-checkpoint-000002":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(OSError, match=r"No space left on device .*gas-checkpoint-000001, is intact"):
            train(dataset, CONFIG, checkpoint=tmp_path)
    assert numbers(train(dataset, CONFIG, checkpoint=tmp_path, resume=True)) == numbers(train(dataset, CONFIG))


# --- refused


def test_a_checkpoint_is_not_overwritten_without_resume(dataset: Dataset, tmp_path: Path) -> None:
    train(dataset, replace(CONFIG, epochs=2), checkpoint=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"holds a checkpoint of epoch 2: add --resume .*or name another folder"):
        train(dataset, CONFIG, checkpoint=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    other = tmp_path / "other"
    save_checkpoint(other, {"epoch": 3})
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds a checkpoint that train did not save: name another folder"):
            train(dataset, CONFIG, checkpoint=other, resume=resume)


def test_two_runs_cannot_save_in_one_folder(dataset: Dataset, tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path),
        pytest.raises(BlockingIOError, match=f"another process saves checkpoints in {tmp_path}"),
    ):
        train(dataset, CONFIG, checkpoint=tmp_path)


@pytest.fixture(scope="module")
def saved(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    train(dataset, replace(CONFIG, epochs=1), checkpoint=folder)
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "SAGE"}, "model 'GCN' but this run has model 'SAGE'"),
        ({"lr": 0.03}, "lr 0.02 but this run has lr 0.03"),
        ({"hidden": 8}, "hidden 16 but this run has hidden 8"),
        ({"seed": 1}, "seed 0 but this run has seed 1"),
        ({"eval_every": 2}, "eval_every 1 but this run has eval_every 2"),
        ({"history_dtype": "bfloat16"}, "history_dtype 'float32' but this run has history_dtype 'bfloat16'"),
        (
            {"prefetch_order": "stale", "history_tier": "pinned"},
            "prefetch_order 'strict' but this run has prefetch_order 'stale'",
        ),
        ({"model_options": {"residual": True}}, "model_options {} but this run has model_options {'residual': True}"),
    ],
)
def test_another_config_is_refused(dataset: Dataset, saved: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{saved} holds a checkpoint with {message}"):
        train(dataset, replace(CONFIG, **changes), checkpoint=saved, resume=True)


def other_data(dataset: Dataset, name: str) -> Dataset:
    edges, mask, y = dataset.edge_index, dataset.train_mask.clone(), dataset.y.clone()
    mask[0], y[0] = ~mask[0], (y[0] + 1) % 4
    return {
        "edges": replace(dataset, edge_index=edges[:, :-2]),
        "edge_index of check sum": replace(dataset, edge_index=torch.cat([edges[:, 1:], edges[:, :1]], dim=1)),
        "features": replace(dataset, x=dataset.x[:, :-1]),
        "x of check sum": replace(dataset, x=dataset.x + 1),
        "y of check sum": replace(dataset, y=y),
        "split of check sum": replace(dataset, train_mask=mask),
        "nodes": generate(602, 6000, num_classes=4, num_features=8, signal=2.0),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["nodes", "edges", "edge_index of check sum", "features", "x of check sum", "y of check sum", "split of check sum"],
)
def test_other_data_is_refused(dataset: Dataset, saved: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{saved} holds a checkpoint with {name} \d+ but this run has {name} \d+"):
        train(other_data(dataset, name), CONFIG, checkpoint=saved, resume=True)


def test_another_partition_or_device_is_refused(dataset: Dataset, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        # METIS may change with its version, under the same config
        patch.setattr(training, "metis", lambda graph, parts, seed, cache: random_partition(graph, parts, seed))
        with pytest.raises(ValueError, match=r"row_order '[\w-]+' but this run has row_order '[\w-]+'"):
            train(dataset, CONFIG, checkpoint=saved, resume=True)
    same = training_checkpoint.identity(dataset, CONFIG, torch.device("cuda", 0))
    saver = training_checkpoint.Saver(saved, 1, same)
    with pytest.raises(ValueError, match="device 'cpu' but this run has device 'cuda'"):
        saver.open(CONFIG, True, print)


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
@pytest.mark.parametrize("tier", ["pinned", "file", "auto"])
def test_the_tier_may_change(dataset: Dataset, tmp_path: Path, tier: str) -> None:
    train(dataset, replace(CONFIG, epochs=1), checkpoint=tmp_path)
    said: list[str] = []
    config = replace(CONFIG, history_tier=tier, history_dtype="FLOAT32")
    moved = train(dataset, config, checkpoint=tmp_path, resume=True, say=said.append)
    assert numbers(moved) == numbers(train(dataset, CONFIG))
    assert (tier if tier != "auto" else "device") in said[-1]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_run_with_histories_in_a_folder_is_resumed(
    dataset: Dataset, tmp_path: Path, dtype: str, ends: list[End], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, history_tier="file", history_folder=str(tmp_path / "tables"), history_dtype=dtype)
    whole = train(dataset, replace(config, history_folder=None))
    train(dataset, replace(config, epochs=1), checkpoint=tmp_path / "saved")
    with pytest.raises(ValueError, match="already holds the tables"):
        train(dataset, config)
    resumed = train(dataset, config, checkpoint=tmp_path / "saved", resume=True)
    assert numbers(resumed) == numbers(whole)
    assert_same_end(ends[-1], ends[0])
    # a run that ended before its first checkpoint left tables: they count for nothing
    again = train(dataset, config, checkpoint=tmp_path / "elsewhere", resume=True)
    assert numbers(again) == numbers(whole)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be a positive int, got 0"),
        ({"checkpoint_every": True}, "checkpoint_every must be a positive int, got True"),
        ({"resume": True}, "resume needs checkpoint, the folder to resume from, got None"),
        ({"profile": "no/such/folder/trace"}, "profile must name a file in a folder that exists, got no/such"),
        ({"checkpoint": ""}, "folder must name a folder, got ''"),
    ],
)
def test_bad_arguments_are_refused(dataset: Dataset, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(dataset, CONFIG, **arguments)


# --- options of the histories


def test_options_reach_the_histories_where_they_are_not_the_defaults(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach, prefetch = training.attach_histories, Histories.prefetch
    asked: list[dict[str, Any]] = []
    events: list[str] = []
    stats = {"pulls": 4, "pull_bytes": 2**20, "pushes": 4}

    def attach_any(model: Any, num_nodes: int, tier: str, dtype: torch.dtype, **options: Any) -> Histories:
        asked.append({"tier": tier, "dtype": dtype, **options})
        return attach(model, num_nodes)

    def prefetch_any(self: Histories, loader: Any, **options: Any) -> Any:
        asked.append(options)
        return prefetch(self, loader)

    def transfer_stats(self: Histories) -> dict[str, Any]:
        events.append("stats")
        return stats

    monkeypatch.setattr(training, "attach_histories", attach_any)
    monkeypatch.setattr(Histories, "prefetch", prefetch_any)
    once = replace(CONFIG, epochs=1)
    assert train(dataset, once).transfers is None
    common = {"reopen": False, "gradients": False}
    plain = {"tier": "device", "dtype": torch.float32, "nonfinite": "raise", "path": None, **common}
    assert asked == [plain, {"order": "strict"}]
    monkeypatch.setattr(Histories, "summary", lambda self: f"{len(self)} tables", raising=False)
    monkeypatch.setattr(Histories, "transfer_stats", transfer_stats, raising=False)
    monkeypatch.setattr(Histories, "close", lambda self: events.append("close"), raising=False)
    config = replace(
        once, history_tier="File", history_folder="/tables", history_dtype="int8", nonfinite="skip",
        prefetch_order="stale",
    )  # fmt: skip
    said: list[str] = []
    asked.clear()
    assert train(dataset, config, say=said.append).transfers == stats
    assert asked == [
        {"tier": "file", "dtype": torch.int8, "nonfinite": "skip", "path": "/tables", **common},
        {"order": "stale"},
    ]
    assert said == ["2 tables"]
    assert events == ["stats", "close"]

    def broken(self: _Run, *args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(_Run, "_step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(dataset, once)
    assert events == ["stats", "close", "close"]


# --- profile


@pytest.mark.parametrize("epochs, first", [(3, 1), (1, 1), (3, 3)], ids=["second", "only", "only one left"])
def test_a_trace_is_of_one_epoch(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, first: int
) -> None:
    # the real one: it is the same profiler, which runs once at a time
    monkeypatch.setattr(training, "peak_bytes", peak_bytes)
    config, file = replace(CONFIG, epochs=epochs), tmp_path / "trace.json"
    whole = train(dataset, config)
    if first > 1:
        train(dataset, replace(config, epochs=first - 1), checkpoint=tmp_path)
    result = train(dataset, config, checkpoint=tmp_path, resume=True, profile=file)
    expected = numbers(whole)
    if epochs == 1:
        expected["peak_bytes"] = None
    assert numbers(result) == expected
    events = json.loads(file.read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    assert (names.count("train"), names.count("evaluate")) == (1, 1)
    assert names.count("Optimizer.step#Adam.step") == 3


def test_a_run_with_nothing_left_writes_no_trace(dataset: Dataset, saved: Path, tmp_path: Path) -> None:
    file, said = tmp_path / "trace.json", list[str]()
    train(dataset, replace(CONFIG, epochs=1), checkpoint=saved, resume=True, profile=file, say=said.append)
    assert not file.exists()
    assert said[-1] == f"no epoch is left to trace: {file} was not written"


@pytest.mark.parametrize("content", [None, b"", b'{"traceEvents": [' + 100 * b" "])
def test_a_trace_that_was_not_written_whole_is_an_error(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    def export(self: torch.profiler.profile, path: str) -> None:
        # as the profiler does: a message on stderr at most
        if content is not None:
            Path(path).write_bytes(content)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    file = tmp_path / "trace.json"
    with pytest.raises(OSError, match=r"the trace was not written to .*trace\.json"):
        train(dataset, replace(CONFIG, epochs=1), profile=file)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_found_before_training(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(training, "_Run", None)
    with pytest.raises(OSError, match=r"profile: .* cannot be written \(Read-only file system\)"):
        train(dataset, CONFIG, profile=tmp_path / "trace.json")

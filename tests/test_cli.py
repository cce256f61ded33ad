"""The command line: what it writes, what it says to bad input, and how Ctrl-C ends it."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gas_triton
from gas_triton import cli, doctor, presets, training
from gas_triton.datasets import generate, load
from gas_triton.training import TrainConfig, train

GENERATED = ["--dataset", "Generated", "--nodes", "600", "--edges", "6000"]
TRAIN = [
    "train",
    *GENERATED,
    "--layers",
    "2",
    "--hidden",
    "8",
    "--num-parts",
    "6",
    "--batch-size",
    "2",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GAS_TRITON_DATA", raising=False)
    threads = torch.get_num_threads()
    # Steps this small are slower on several threads, above all where other programs run.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_npz(path: Path) -> None:
    """A small graph with two splits, of which the second trains on nothing."""
    data = generate(200, 1600, num_classes=3, num_features=4)
    masks = {name: getattr(data, name).numpy() for name in ("train_mask", "val_mask", "test_mask")}
    both = {name: np.stack([mask, mask & (name != "train_mask")], axis=1) for name, mask in masks.items()}
    np.savez(path, edge_index=data.edge_index.numpy(), x=data.x.numpy(), y=data.y.numpy(), **both)


# --- train


def test_train_writes_what_the_library_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    options = ["--model", "GcN", "--epochs", "4", "--eval-every", "2", "--weight-decay", "0.001", "--grad-norm", "2"]
    options += ["--lr", "0.02", "--dropout", "0.25", "--seed", "3", "--history-dtype", "bfloat16"]
    assert cli.main([*TRAIN, *options, "--json", str(path)]) == 0
    config = TrainConfig(
        layers=2, hidden=8, num_parts=6, batch_size=2, epochs=4, eval_every=2, weight_decay=0.001, grad_norm=2.0,
        lr=0.02, dropout=0.25, seed=3, history_dtype="bfloat16",
    )  # fmt: skip
    expected = train(generate(600, 6000), config)
    written = json.loads(path.read_text())
    for key in ("test_acc", "val_acc", "train_loss", "peak_bytes", "num_parameters", "history_bytes", "best_epoch"):
        assert written[key] == getattr(expected, key), key
    assert written["epoch_seconds"] > 0
    assert written["interrupted"] is False
    assert written["config"]["dataset"] == "Generated"
    assert (written["config"]["nodes"], written["config"]["edges"], written["config"]["device"]) == (600, 6000, "cpu")
    assert {key: written["config"][key] for key in vars(config)} == vars(config)
    assert written["versions"] == doctor.versions(torch.device("cpu"))
    assert written["versions"]["gas_triton"] == gas_triton.__version__
    assert written["versions"]["torch"] == torch.__version__
    assert written["versions"]["device"]
    printed = capsys.readouterr()
    assert "Dataset(generated: 600 nodes, 6000 edges" in printed.out
    assert f"test {written['test_acc']:.4f} (validation {written['val_acc']:.4f}, epoch" in printed.out
    assert "4/4" in printed.err
    assert "loss=" in printed.err


def test_quiet_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--epochs", "1", "--full-batch", "--model", "sage", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (line,) = printed.out.splitlines()
    assert re.fullmatch(
        r"test 0\.\d{4} \(validation 0\.\d{4}, epoch 1\), [\d.]+ s an epoch, [\d.]+ MiB a step at most, "
        r"\d+ parameters",
        line,
    )


def test_train_reads_files_under_root_by_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "My-Graph.npz")
    options = ["--epochs", "1", "--num-parts", "4", "--quiet", "--device", "cpu"]
    assert cli.main(["train", "--dataset", "mygraph", "--root", str(tmp_path), *options]) == 0
    monkeypatch.setenv("GAS_TRITON_DATA", str(tmp_path))
    assert cli.main(["train", "--dataset", "MY_GRAPH", *options]) == 0


def test_cora_by_name(data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--hidden", "8", "--epochs", "2", "--quiet", "--device", "cpu"]
    assert cli.main(["train", "--dataset", "cora", "--root", str(data_root), *options]) == 0
    assert f"{1433 * 8 + 8 + 8 * 7 + 7} parameters" in capsys.readouterr().out
    assert load("cora", data_root).num_features == 1433


def test_partitions_are_kept_in_the_cache(tmp_path: Path) -> None:
    run = [*TRAIN, "--epochs", "1", "--quiet"]
    own, default = tmp_path / "own", tmp_path / "cache" / "gas_triton"
    assert cli.main([*run, "--no-cache"]) == 0
    assert not default.exists()
    assert cli.main([*run, "--cache", str(own)]) == 0
    assert not default.exists()
    assert cli.main(run) == 0
    assert [path.name for path in own.iterdir()] == [path.name for path in default.iterdir()]


def test_a_run_is_resumed_by_the_same_command_with_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, json_file = tmp_path / "run", tmp_path / "run.json"
    run = [*TRAIN, "--epochs", "4", "--json", str(json_file)]

    def written() -> dict[str, Any]:
        fields = json.loads(json_file.read_text())
        assert fields.pop("epoch_seconds") > 0
        return fields

    assert cli.main([*run, "--quiet"]) == 0
    expected = written()
    capsys.readouterr()
    assert cli.main([*TRAIN, "--checkpoint", os.devnull]) == 2
    assert f"checkpoints cannot be saved in {os.devnull}: it is a file" in capsys.readouterr().err
    run += ["--checkpoint", str(folder), "--checkpoint-every", "2"]
    assert cli.main([*run, "--epochs", "2", "--resume"]) == 0
    assert f"no checkpoint in {folder} yet: training from the beginning" in capsys.readouterr().out
    assert cli.main([*run]) == 2
    assert f"{folder} holds a checkpoint of epoch 2: add --resume" in capsys.readouterr().err
    assert cli.main([*run, "--lr", "0.5", "--resume"]) == 2
    assert f"{folder} holds a checkpoint with lr 0.01 but this run has lr 0.5" in capsys.readouterr().err
    assert cli.main([*run, "--resume"]) == 0
    printed = capsys.readouterr()
    assert f"resuming after epoch 2 of {folder}: 2 to go" in printed.out
    assert "4/4" in printed.err
    assert written() == expected
    line = printed.out.splitlines()[-1]
    assert line.startswith(f"test {expected['test_acc']:.4f}")
    json_file.unlink()
    monkeypatch.setattr(training, "_Run", None)
    assert cli.main([*run, "--resume"]) == 0
    printed = capsys.readouterr()
    assert f"resuming after epoch 4 of {folder}: nothing is left to train" in printed.out
    assert printed.out.splitlines()[-1] == line
    assert written() == expected


def test_options_of_the_histories_and_their_transfers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def train_nothing(dataset: Any, config: TrainConfig, *args: Any, **options: Any) -> Any:
        asked.update(vars(config))
        return replace(done, transfers=stats)

    done = train(generate(600, 6000), TrainConfig(hidden=8, epochs=1, num_parts=6, batch_size=2))
    stats: dict[str, Any] | None = {
        "pulls": 6, "pull_bytes": 3 * 2**20, "pushes": 5, "push_bytes": 2**20, "misses": 1, "pull_seconds": 0.5,
        "exposed_seconds": 0.1, "hidden_fraction": 0.8,
    }  # fmt: skip
    monkeypatch.setattr(training, "train", train_nothing)
    options = {"history_tier": "file", "history_folder": "tables", "nonfinite": "warn", "prefetch_order": "stale"}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    path, trace = tmp_path / "run.json", ["--profile", str(tmp_path / "trace")]
    assert cli.main([*TRAIN, *flags, "--json", str(path), *trace]) == 0
    assert {name: asked[name] for name in options} == options
    assert json.loads(path.read_text())["transfers"] == stats
    line = (
        "transfers: 6 pulls of 3.0 MiB in 0.500 s, 80.0% of it hidden and 0.100 s waited for, 1 misses; "
        "5 pushes of 1.0 MiB"
    )
    assert line in capsys.readouterr().out.splitlines()
    stats = {**stats, "hidden_fraction": None}
    assert cli.main([*TRAIN, *trace]) == 0
    assert "transfers: nothing was pulled from histories" in capsys.readouterr().out
    assert cli.main([*TRAIN, *trace, "--quiet"]) == 0
    assert "transfers" not in capsys.readouterr().out
    assert cli.main(TRAIN) == 0
    assert "transfers" not in capsys.readouterr().out


def test_a_trace_of_the_only_epoch_takes_the_place_of_its_memory(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    # in a process of its own, where nothing has started the profiler yet, which writes to stderr when it starts
    command = [sys.executable, "-m", "gas_triton.cli", *TRAIN, "--epochs", "1", "--profile", str(file), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "traceEvents" in json.loads(file.read_text())
    assert "USDT" not in done.stderr
    assert "transfers: nothing was pulled from histories" in done.stdout
    assert re.search(r"s an epoch, memory not measured \+ [\d.]+ MiB histories, \d+ parameters", done.stdout)


# --- settings: of the library, of a preset, of the arguments


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, TrainConfig]]:
    """What would be trained, in place of training it."""
    calls: list[tuple[str, TrainConfig]] = []
    data, done = generate(40, 200, 2), training.Result(test_acc=0.5, val_acc=0.5, epoch_seconds=1.0, num_parameters=1)

    def load_nothing(args: Any) -> Any:
        calls.append((args.dataset, TrainConfig()))
        return data

    def train_nothing(dataset: Any, config: TrainConfig, *args: Any, **options: Any) -> Any:
        calls[-1] = (calls[-1][0], config)
        return done

    monkeypatch.setattr(cli, "_load", load_nothing)
    monkeypatch.setattr(training, "train", train_nothing)
    return calls


# field -> (arguments, value), for what is not --field-name value
SPELLED: dict[str, tuple[list[str], Any]] = {
    "model": (["--model", "gin"], "GIN"),
    "model_options": (
        ["--model-option", "batch_norm=true", "--model-option", "alpha=0.5"],
        {"batch_norm": True, "alpha": 0.5},
    ),
    "partition": (["--partition", "random"], "random"),
    "loss_weighting": (["--loss-weighting", "node"], "node"),
    "full_batch": (["--full-batch"], True),
    "histories": (["--no-histories"], False),
    "host_features": (["--host-features"], True),
    "sparse_features": (["--sparse-features"], True),
    "full_evaluation": (["--full-evaluation"], True),
    "fill_histories": (["--fill-histories"], True),
    "static_first_layer": (["--no-static"], False),
    "compensation": (["--compensation", "lmc"], "lmc"),
    "history_dtype": (["--history-dtype", "int8"], "int8"),
    "history_tier": (["--history-tier", "pinned"], "pinned"),
    "history_folder": (["--history-folder", "tables", "--history-tier", "file"], "tables"),
    "nonfinite": (["--nonfinite", "skip"], "skip"),
    "prefetch_order": (["--prefetch-order", "stale", "--history-tier", "file"], "stale"),
}


@pytest.mark.parametrize("field", sorted(vars(TrainConfig())))
def test_every_setting_has_an_argument(asked: list[tuple[str, TrainConfig]], field: str) -> None:
    number = 3 if isinstance(getattr(TrainConfig(), field), int) or field == "max_steps" else 0.25
    flag = f"--{field.replace('_', '-')}"
    arguments, value = SPELLED.get(field, ([flag, str(number)], number))
    assert cli.main(["train", "--dataset", "any", "--device", "cpu", *arguments]) == 0
    assert cli.main(["train", "--dataset", "any", "--device", "cpu"]) == 0
    (_, given), (_, plain) = asked
    assert getattr(given, field) == value != getattr(plain, field)
    assert plain == TrainConfig()


def test_help_names_the_defaults_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field, value in vars(TrainConfig()).items():
        if isinstance(value, bool | dict):
            continue
        (said,) = re.findall(rf" --{field.replace('_', '-')} [A-Z_]+ .*?default: ([\w.]+)", text)
        assert said == str(value).lower(), field


def test_a_preset_sets_what_is_not_given(asked: list[tuple[str, TrainConfig]], tmp_path: Path) -> None:
    path, options = tmp_path / "run.json", ["--device", "cpu", "--quiet"]
    assert cli.main(["train", "--preset", "Cora_GCN", *options, "--json", str(path)]) == 0
    config = TrainConfig(
        hidden=16, weight_decay=5e-4, grad_norm=1.0, epochs=200, num_parts=40, batch_size=10, fill_histories=True,
        full_evaluation=True,
    )  # fmt: skip
    assert asked[-1] == ("Cora", config)
    assert cli.main(["train", "--preset", "cora-gcn", "--no-fill-histories", *options]) == 0
    assert asked[-1] == ("Cora", replace(config, fill_histories=False))
    written = json.loads(path.read_text())["config"]
    assert (written["preset"], written["dataset"], written["weight_decay"]) == ("Cora_GCN", "Cora", 0.0005)
    given = ["--epochs", "3", "--grad-norm", "none", "--hidden", "64", "--dataset", "mine", "--seed", "4"]
    assert cli.main(["train", *given, "--preset", "cora-gcn", *options]) == 0
    assert asked[-1] == ("mine", replace(config, epochs=3, grad_norm=None, hidden=64, seed=4))
    assert cli.main(["train", "--preset", "ppi-gcn", "--max-steps", "None", "--model-option", "residual=false"]) == 0
    assert asked[-1][1].max_steps is None
    assert asked[-1][1].model_options == {"drop_input": False, "batch_norm": True, "residual": False, "linear": True}


def test_a_preset_trains(data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--root", str(data_root), "--epochs", "2", "--quiet", "--device", "cpu"]
    assert cli.main(["train", "--preset", "cora-gcn", *options]) == 0
    assert f"{1433 * 16 + 16 + 16 * 7 + 7} parameters" in capsys.readouterr().out


def test_presets_are_listed(asked: list[tuple[str, TrainConfig]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--list-presets"]) == 0
    assert capsys.readouterr().out == presets.overview() + "\n"
    assert asked == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("alpha=0.1", ("alpha", 0.1)),
        ("num=3", ("num", 3)),
        ("batch_norm=true", ("batch_norm", True)),
        ('aggr="max"', ("aggr", "max")),
        ("aggregators=['mean', 'max']", ("aggregators", ["mean", "max"])),
        ("p=1e-3", ("p", 0.001)),
    ],
)
def test_model_options_are_toml(text: str, expected: Any) -> None:
    name, value = cli._model_option(text)
    assert (name, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize(
    "text", ["alpha", "alpha=", "=1", "batch_norm=True", "aggr=max", "a b=1", "a=1\nb=2", "", "a=1979-05-27"]
)
def test_a_model_option_that_is_not_toml_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    # `True` taken as text would be true, and so would `False`
    with pytest.raises(SystemExit) as ended:
        cli.main([*TRAIN, "--model-option", text])
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "argument --model-option: must be name=value with a value such as true, 0.1, '\"max\"'" in error


# --- bad input


@pytest.mark.parametrize("flag", ["--checkpoint", "--profile", "--json"])
def test_an_empty_path_is_not_the_current_folder(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*TRAIN, flag, ""])
    assert ended.value.code == 2
    assert f"argument {flag}: must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--profile", "--json"])
def test_a_folder_that_cannot_be_written_is_found_before_training(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(cli, "_load", None)
    assert cli.main([*TRAIN, flag, str(tmp_path / "file")]) == 2
    assert f"{flag}: the folder {tmp_path} cannot be written" in capsys.readouterr().err


def test_tables_that_the_host_has_no_room_for_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gas_triton.history.histories.free_host_bytes", lambda: 1000)
    assert cli.main([*TRAIN, "--history-tier", "pinned", "--no-cache"]) == 2
    assert "of which the host has 0.0 MiB free: use tier 'file'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dataset", "coora"], r"expected one of generated, Cora, .*ogbn-products .*got 'coora'"),
        (["--model", "gcm"], r"model must be one of GCN, SAGE, GIN.*, got 'gcm'"),
        (["--num-parts", "601"], r"num_parts must be from 1 to the number of nodes \(600\), got 601"),
        (["--partition", "kmeans"], r"partition must be one of metis, random, got 'kmeans'"),
        (["--history-dtype", "int3"], r"history_dtype must be one of float32, bfloat16, float16, int8, got 'int3'"),
        (["--device", "cuda:99"], r"device must be one of cpu.* on this machine, got 'cuda:99'"),
        (["--edges", "601"], r"num_edges: expected an even number .*, got 601"),
        (["--split", "4"], r"split: generated has 1 \(from 0 to 0\), got 4"),
        (["--dropout", "1.5"], r"dropout must be in \[0, 1\), got 1.5"),
        (["--edge-dropout", "1"], r"edge_dropout must be in \[0, 1\), got 1.0"),
        (["--lipschitz", "-1"], r"lipschitz must be a finite number of at least 0, got -1.0"),
        (["--loss-weighting", "edge"], r"loss_weighting must be one of batch, node, got 'edge'"),
        (["--max-steps", "0"], r"max_steps must be a positive int, got 0"),
        (["--preset", "cora-gcm"], r"preset must be one of .*cora-gcn, .*reddit-pna-jk, got 'cora-gcm'"),
        (["--model-option", "alpha=0.1"], r"model_options \{'alpha': 0.1\} do not suit GCN: .*'alpha'"),
        (["--history-tier", "disk"], r"history_tier must be one of auto, device, pinned, file, got 'disk'"),
        (["--history-folder", "x"], r"history_folder is for history_tier 'file' or 'auto', got 'device'"),
        (["--prefetch-order", "any"], r"prefetch_order must be one of strict, stale, got 'any'"),
        (["--nonfinite", "drop"], r"nonfinite must be one of raise, warn, skip, allow, got 'drop'"),
        (["--resume"], r"--resume needs --checkpoint, the folder to resume from"),
        (["--checkpoint", "x", "--checkpoint-every", "0"], r"checkpoint_every must be a positive int, got 0"),
        (["--profile", "no/such/folder/trace"], r"--profile must name a file in a folder that exists, got no/such"),
        (["--json", "no/such/folder/run.json"], r"--json must name a file in a folder that exists, got no/such/folder"),
    ],
)
def test_bad_input_is_one_line_without_a_traceback(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = ["train", *options] if "--dataset" in options else [*TRAIN, *options]
    assert cli.main([*arguments, "--quiet"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert re.match("gas-triton: error: .*" + message, printed.err)
    with pytest.raises(ValueError, match=message.split(",")[0]):
        cli.main([*arguments, "--debug"])


def test_sizes_are_for_the_generated_graph_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_npz(tmp_path / "mine.npz")
    assert cli.main(["train", "--dataset", "mine", "--root", str(tmp_path), "--nodes", "50"]) == 2
    assert "--nodes and --edges are for --dataset generated, got --dataset mine" in capsys.readouterr().err
    assert cli.main(["train", "--dataset", "mine", "--root", str(tmp_path), "--split", "1", "--num-parts", "4"]) == 2
    assert "train_mask of mine must select a node, got none" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Reddit", "ogbn-arxiv"])
def test_a_missing_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    for module in ("torch_geometric", "torch_geometric.datasets", "ogb", "ogb.nodeproppred"):
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["train", "--dataset", name, "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gas-triton: error: {name} needs torch_geometric")
    assert error.endswith(f"pip install 'gas-triton[pyg]', or put {name}.npz into {tmp_path}\n")


def test_arguments_that_do_not_parse_show_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["train"], ["trian"], ["train", "--dataset", "generated", "--epochs", "many"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert "usage: gas-triton" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    assert "(default: 0.01)" in capsys.readouterr().out


# --- Ctrl-C


def test_ctrl_c_writes_what_was_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"

    @contextmanager
    def impatient(*args: Any) -> Iterator[Any]:
        def on_epoch(record: Any) -> None:
            if record.epoch == 2:
                raise KeyboardInterrupt

        yield on_epoch

    with monkeypatch.context() as patch:
        patch.setattr(cli, "progress", impatient)
        assert cli.main([*TRAIN, "--epochs", "50", "--json", str(path)]) == 130
    written = json.loads(path.read_text())
    assert written["interrupted"] is True
    assert written["best_epoch"] in (1, 2)
    assert 0 <= written["test_acc"] <= 1
    assert "interrupted after 2 epochs: test" in capsys.readouterr().out

    def stop(args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_load", stop)
        assert cli.main([*TRAIN, "--json", str(path)]) == 130
        assert "interrupted after 0 epochs, before the first evaluation" in capsys.readouterr().out
        assert cli.main(["partition", *GENERATED]) == 130
        assert capsys.readouterr().err == "gas-triton: interrupted\n"
    written = json.loads(path.read_text())
    assert (written["interrupted"], written["test_acc"], written["num_parameters"]) == (True, None, None)
    assert written["config"]["hidden"] == 8


def test_a_real_ctrl_c_ends_the_program(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "gas_triton.cli", *TRAIN, "--epochs", "1000000", "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a shell that runs the tests in the background has them, and what they start, ignore the signal
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    finally:
        signal.signal(signal.SIGINT, former)
    assert program.stderr is not None
    watchdog = threading.Timer(60, program.kill)
    watchdog.start()
    try:
        shown = b""
        # the bar is not drawn at every epoch
        while not re.search(rb" [1-9]\d*/1000000", shown):
            read = os.read(program.stderr.fileno(), 4096)
            assert read, shown.decode()
            shown += read
        program.send_signal(signal.SIGINT)
        out, rest = program.communicate()
    finally:
        watchdog.cancel()
        program.kill()
    assert program.returncode == 130
    assert b"Traceback" not in shown + rest
    assert re.search(rb"interrupted after \d+ epochs: test 0\.\d+", out)
    assert json.loads(path.read_text())["interrupted"] is True


# --- doctor


def test_doctor_finds_this_machine_usable(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    write_npz(tmp_path / "mine.npz")
    monkeypatch.setenv("GAS_TRITON_DATA", str(tmp_path))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"gas_triton {gas_triton.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}" in out
    assert re.search(r"^CPU .*1 threads: ok$", out, re.MULTILINE)
    assert re.search(r"^CUDA .*(no GPU|compute capability \d+\.\d)", out, re.MULTILINE)
    assert re.search(r"^METIS .*pymetis \d.*: ok$", out, re.MULTILINE)
    assert f"{tmp_path} (GAS_TRITON_DATA): mine" in out
    assert "This machine can train." in out
    if sys.platform == "linux":
        assert re.search(r"^Triton +\d.*in the interpreter \(TRITON_INTERPRET=1\): ok$", out, re.MULTILINE)


def test_doctor_says_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_triton", lambda version: "not asked")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in doctor.OPTIONAL else object())
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name, extra in (("torch_geometric", "pyg"), ("ogb", "pyg"), ("torch_sparse", "sparse"), ("matplotlib", "plot")):
        assert re.search(rf"optional {name} missing, pip install 'gas-triton\[{extra}\]'", out)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "pymetis" else object())
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "missing  pymetis, which is required: pip install gas-triton" in out
    assert "This machine cannot train" in out


def test_doctor_notices_wrong_numbers_and_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_triton", lambda version: "not asked")
    right = gas_triton.functional.aggregate
    with monkeypatch.context() as patch:
        patch.setattr(gas_triton.functional, "aggregate", lambda *args, **kwargs: right(*args, **kwargs) + 0.5)
        assert doctor.aggregate_error("cpu") == pytest.approx(0.5, abs=1e-4)
        assert cli.main(["doctor"]) == 1
    assert "threads: failed: wrong by 0.5" in capsys.readouterr().out

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("libmetis.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "metis", broken)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "threads: ok" in out
    assert "failed: OSError: libmetis.so: cannot open shared object file" in out


@pytest.mark.gpu
def test_doctor_checks_every_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_triton", lambda version: "not asked")
    assert cli.main(["doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CUDA")]
    assert len(lines) == torch.cuda.device_count()
    assert all(line.endswith(": ok") for line in lines)

"""Diagnoses while training: nothing changes, lines, JSON and figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gas_triton import MissingPackageError, cli, training
from gas_triton.datasets import Dataset, generate
from gas_triton.diagnostics import Diagnosis
from gas_triton.training import Result, TrainConfig, _Run

# to measure memory takes longer than all else here
train = partial(training.train, measure_memory=False)
CONFIG = TrainConfig(layers=3, hidden=8, lr=0.02, epochs=4, num_parts=6, batch_size=2)
RUN = ["train", "--dataset", "generated", "--nodes", "400", "--edges", "2400", "--device", "cpu", "--hidden", "8",
       "--num-parts", "6", "--batch-size", "2", "--no-cache", "--epochs", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generate(400, 2400, num_classes=4, num_features=8, signal=2.0)


def numbers(result: Result) -> dict[str, Any]:
    fields = asdict(result)
    del fields["epoch_seconds"]
    fields["transfers"] = {
        key: value for key, value in (fields["transfers"] or {}).items() if "seconds" not in key and "hidden" not in key
    }
    for record in fields["epochs"]:
        del record["seconds"]
    return fields


def parameters_of(dataset: Dataset, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The numbers of a run, its parameters and its histories."""
    state: list[torch.Tensor] = []
    close = _Run.close

    def keep(run: _Run) -> None:
        state.extend(t.clone() for t in [*run.model.parameters(), *run.model.buffers()])
        for store in run.histories.values():
            state.extend([store.pull(torch.arange(store.num_rows)), store.age()])
        close(run)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "close", keep)
        result = train(dataset, config, **options)
    return numbers(result), state


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
@pytest.mark.parametrize(
    "options",
    [
        {"model_options": {"batch_norm": True}},
        {"model": "gat", "history_tier": "pinned", "history_dtype": "int8", "prefetch_order": "stale"},
        {"model": "pna_jk", "history_tier": "file", "edge_dropout": 0.2},
        {"model": "gcn2", "compensation": "lmc", "halo_momentum": 0.3},
        {"model": "sage", "fill_histories": True, "dropout": 0.0, "host_features": True},
        {"model": "appnp", "sparse_features": True},
    ],
    ids=lambda options: options.get("model", "gcn"),
)
def test_a_diagnosed_run_is_the_run(dataset: Dataset, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, **options)
    found: list[tuple[int, Diagnosis]] = []
    without = parameters_of(dataset, config, monkeypatch)
    diagnosed = parameters_of(
        dataset, config, monkeypatch, on_diagnose=lambda epoch, d: found.append((epoch, d)), diagnose_every=2,
        diagnose_gradients=True,
    )  # fmt: skip
    assert [epoch for epoch, _ in found] == [2, 4]
    assert without[0] == diagnosed[0]
    assert len(without[1]) == len(diagnosed[1]) > 2
    for a, b in zip(without[1], diagnosed[1], strict=True):
        assert torch.equal(a, b)
    for _, diagnosis in found:
        assert diagnosis.output.error.max > 0.0
        assert diagnosis.gradients is not None
        assert 0.0 < diagnosis.gradients[-1].difference < 1.0
        assert diagnosis.gradients[-1].cosine > 0.5
        json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_a_learning_rate_of_0_makes_histories_exact(dataset: Dataset) -> None:
    """As many epochs as layers bring exact rows everywhere, and an exact gradient nowhere but in one batch."""
    found: list[Diagnosis] = []
    config = replace(CONFIG, lr=0.0, dropout=0.0, epochs=4)
    train(dataset, config, on_diagnose=lambda _, d: found.append(d), diagnose_every=1, diagnose_gradients=True)
    first, *_, last = found
    assert first.output.relative_error > 1e-3
    assert last.output.relative_error < 1e-6
    assert last.output.bound.max < 1e-4 * first.output.bound.max
    # histories carry no gradient: the bias stays
    assert last.gradients is not None
    assert last.gradients[-1].difference > 1e-3


def test_histories_are_seen_as_training_left_them(dataset: Dataset) -> None:
    """An evaluation that fills them would leave rows of age 0 and no error."""
    found: list[Diagnosis] = []
    config = replace(CONFIG, dropout=0.0, fill_histories=True, epochs=3)
    train(dataset, config, on_diagnose=lambda _, d: found.append(d), diagnose_every=1)
    num_batches = config.num_parts // config.batch_size
    for diagnosis in found:
        for layer in diagnosis.layers:
            assert layer.age.max == num_batches - 1
            assert layer.relative_error > 1e-3
        assert diagnosis.output.relative_error > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_batch": True}, "got full_batch"),
        ({"histories": False}, "got histories=False"),
        ({"layers": 1}, "a model of one layer"),
    ],
)
def test_runs_without_histories_are_refused(dataset: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"diagnose needs a run with histories.*{message}"):
        train(dataset, replace(CONFIG, **options), on_diagnose=lambda *_: None)
    with pytest.raises(ValueError, match="diagnose_every must be a positive int, got 0"):
        train(dataset, CONFIG, on_diagnose=lambda *_: None, diagnose_every=0)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert cli.main([*RUN, "--diagnose", "2", "--diagnose-json", str(file), "--diagnose-gradients"]) == 0
    out = capsys.readouterr().out
    for text in ("epoch 2: history rows", "epoch 4: history rows", "Theorem 2", "hops from the border", "cosine"):
        assert text in out
    records = json.loads(file.read_text())
    assert [record["epoch"] for record in records] == [2, 4]
    (layer,) = records[-1]["layers"]
    assert layer["name"] == "convs.1"
    assert layer["age"]["quantiles"]["0.5"] >= 0
    assert 0 < records[-1]["output"]["error"]["max"] <= records[-1]["output"]["bound"]["max"]
    assert records[-1]["gradients"][-1]["name"] == "all"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--diagnose-json", "x.json"], "need --diagnose EPOCHS"),
        (["--diagnose-gradients"], "need --diagnose EPOCHS"),
        (["--diagnose", "2", "--full-batch"], "diagnose needs a run with histories"),
        (["--diagnose", "0"], "--diagnose must be at least 1 epoch, got 0"),
    ],
)
def test_command_line_says_what_is_wrong(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN, "--quiet", *options]) == 2
    assert message in capsys.readouterr().err


def test_no_epoch_is_left_to_diagnose(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN, "--diagnose", "50"]) == 0
    assert "nothing was diagnosed" in capsys.readouterr().out


@pytest.mark.interop
@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("model", ["gcn2", "gat"])
def test_figure(model: str, suffix: str, tmp_path: Path, import_optional: Callable[[str, str], ModuleType]) -> None:
    import_optional("matplotlib", "plot")
    file = tmp_path / f"figure.{suffix}"
    options = ["--diagnose", "2", "--diagnose-plot", str(file), "--model", model, "--layers", "4", "--epochs", "2"]
    assert cli.main([*RUN, "--quiet", *options]) == 0
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(data) > 10_000


def test_a_figure_needs_matplotlib(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gas_triton import memory_plot

    def absent(name: str) -> Any:
        raise ImportError(name)

    found: list[Diagnosis] = []
    train(dataset, CONFIG, on_diagnose=lambda _, d: found.append(d), diagnose_every=4)
    monkeypatch.setattr(memory_plot.importlib, "import_module", absent)
    with pytest.raises(MissingPackageError, match=r"gas-triton\[plot\]"):
        found[0].plot(tmp_path / "figure.png")

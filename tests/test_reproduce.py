"""`bench.reproduce`: what is run, that nothing is run twice, and what its tables say."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from bench import published, reproduce
from bench.reproduce_table import Cell, comparisons
from bench.run_record import RunRecord
from gas_triton import datasets, presets
from gas_triton.training import TrainConfig


def record_of(cells: dict[str, list[float]]) -> RunRecord:
    record = RunRecord(None)
    for name, accuracies in cells.items():
        for seed, accuracy in enumerate(accuracies):
            record.add(name, {}, seed, {"test_acc": accuracy})
    return record


# --- what is run ------------------------------------------------------------------------------------------------------


def test_settings_are_the_papers():
    gas = reproduce.settings("Cora", "GCN2", "GAS")
    paper = presets.load("cora-gcn2")[1]
    assert gas == replace(paper, full_evaluation=True, fill_histories=True, host_features=True)
    assert (gas.layers, gas.hidden, gas.epochs, gas.num_parts, gas.batch_size) == (64, 64, 1000, 2, 1)
    assert reproduce.settings("Cora", "GCN2", "full-batch") == replace(gas, full_batch=True)
    assert reproduce.settings("Cora", "GCN2", "GAS, random clusters") == replace(gas, partition="random")
    assert reproduce.settings("Cora", "GCN2", "GAS, training only") == replace(gas, fill_histories=False)


def test_the_cell_without_published_settings_has_those_of_its_neighbours():
    ours = reproduce.settings("AmazonComputers", "GAT", "GAS")
    cora, gcn = presets.load("cora-gat")[1], presets.load("amazon-computers-gcn")[1]
    for name in ("model", "layers", "hidden", "dropout", "lr", "epochs", "model_options"):
        assert getattr(ours, name) == getattr(cora, name), name
    for name in ("num_parts", "batch_size", "weight_decay", "grad_norm"):
        assert getattr(ours, name) == getattr(gcn, name), name


def test_first_seeds_of_all_cells_come_first_and_every_model_has_its_number():
    runs = reproduce.wanted(list(reproduce.DATASETS), list(reproduce.MODELS), list(reproduce.WAYS), None)
    control, remedies = 3 * 20 + 4 * 10, 2 * (20 + 10)
    assert len(set(runs)) == len(runs) == 5 * 2 * (20 + 20 + 10 + 10) + 3 * (20 + 10 + 10) + control + remedies
    numbers = [run[3] for run in runs]
    assert numbers == sorted(numbers)
    for way in ("GAS, random clusters", "GAS, training only", "GAS, random clusters, training only"):
        assert {run[:2] for run in runs if run[2] == way} == set(reproduce.RANDOM)
    assert len(reproduce.wanted(["Cora"], ["GCN"], ["GAS"], 3)) == 3


def test_every_dataset_with_settings_can_be_named():
    assert reproduce.canonical("amazoncomputers") == reproduce.canonical("Amazon-Computers") == "AmazonComputers"
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected one of Cora, .*, got 'Corra'"):
        reproduce.canonical("Corra")
    assert set(reproduce.DATASETS) <= {reproduce.canonical(dataset) for dataset, _ in reproduce.cells()}
    for dataset, model in reproduce.cells():
        config = reproduce.settings(dataset, model, "GAS")
        assert config.model == model
        # of the dataset that is trained on, not of one with a like name
        assert presets.load(reproduce.cells()[dataset, model])[0] == dataset
    # pairs without settings are left out
    assert {run[:2] for run in reproduce.wanted(["Reddit2", "AmazonPhoto"], reproduce.MODELS, ["GAS"], 1)} == {
        ("Reddit2", "GCN"), ("Reddit2", "GCN2"), *(("AmazonPhoto", model) for model in reproduce.MODELS),
    }  # fmt: skip


def test_what_has_no_settings_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reproduce", "--datasets", "reddit2", "--models", "GAT", "--table"])
    with pytest.raises(SystemExit):
        reproduce.main()
    assert "no settings for GAT on Reddit2" in capsys.readouterr().err


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The command on a generated graph, with settings that take no time; the seeds that were trained."""
    trained: list[int] = []

    def settings(dataset: str, model: str, way: str) -> TrainConfig:
        config = TrainConfig(epochs=2, hidden=4, num_parts=4, batch_size=2, partition="random", fill_histories=True)
        return replace(config, **reproduce.WAYS[way])

    def run(dataset, config, way, cache):
        trained.append(config.seed)
        return original(dataset, config, way, cache)

    original = reproduce.run
    monkeypatch.setattr(reproduce, "settings", settings)
    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "load", lambda *_: datasets.generate(num_nodes=200, num_edges=1200))
    return trained


def test_finished_runs_are_not_run_again(tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "runs.json"
    for seeds in ("1", "2", "2"):
        arguments = ["--datasets", "Cora", "--models", "GCN", "--ways", "full-batch", "GAS", "--seeds", seeds]
        monkeypatch.setattr("sys.argv", ["reproduce", *arguments, "--json", str(file)])
        reproduce.main()
    assert tiny == [0, 0, 1, 1]
    groups = json.loads(file.read_text())["groups"]
    assert sorted(groups) == ["Cora GCN GAS", "Cora GCN full-batch"]
    runs = groups["Cora GCN GAS"]["seeds"]
    assert list(runs) == ["0", "1"]
    assert all(0 <= run["test_acc"] <= 1 and 0 <= run["late_test_acc"] <= 1 for run in runs.values())
    assert groups["Cora GCN GAS"]["settings"]["fill_histories"] is True
    mean = statistics.mean(100 * run["test_acc"] for run in runs.values())
    assert f"| {mean:.2f} ± " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "splits"), [("WikiCS", [0, 1]), ("AmazonPhoto", [0, 1]), ("Cora", [0])])
def test_a_seed_has_the_split_of_its_number_where_there_are_many(tiny, name, splits, tmp_path, monkeypatch):
    loaded: list[int] = []

    def load(name, root, split):
        loaded.append(split)
        return datasets.generate(num_nodes=200, num_edges=1200)

    monkeypatch.setattr(reproduce, "load", load)
    arguments = ["--datasets", name.lower(), "--models", "GCN", "--ways", "GAS", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments, "--json", str(tmp_path / "runs.json")])
    reproduce.main()
    assert loaded == splits
    assert tiny == [0, 1]


def test_runs_of_other_settings_do_not_count():
    record = RunRecord(None)
    record.add("Cora GCN GAS", {"lr": 0.01}, 0, {"test_acc": 0.5})
    assert record.runs("Cora GCN GAS", {"lr": 0.01, "made_since": True}) == {"0": {"test_acc": 0.5}}
    assert record.runs("Cora GCN GAS", {"lr": 0.1}) == {}


def test_committed_runs_are_those_of_the_command():
    record = RunRecord(reproduce.RESULTS, reproduce.described(TrainConfig()))
    planned = {run[:3] for run in reproduce.wanted(reproduce.DATASETS, reproduce.MODELS, list(reproduce.WAYS), 1)}
    assert record.groups.keys() <= {" ".join(cell) for cell in planned}
    for cell in planned:
        name = " ".join(cell)
        done = list(record.groups[name]["seeds"]) if name in record.groups else []
        runs = record.runs(name, reproduce.described(reproduce.settings(*cell)))
        assert list(runs) == done, f"{name}: the settings are others than those of the finished runs"


def test_a_setting_that_is_new_had_its_default():
    record = RunRecord(None, {"made_since": False})
    record.groups["Cora GCN GAS"] = {"settings": {"lr": 0.01}, "seeds": {"0": {"test_acc": 0.5}}}
    assert record.runs("Cora GCN GAS", {"lr": 0.01, "made_since": False}) == {"0": {"test_acc": 0.5}}
    assert record.runs("Cora GCN GAS", {"lr": 0.01, "made_since": True}) == {}


def _add(path: Path, name: str) -> None:
    for seed in range(12):
        RunRecord(path).add(name, {}, seed, {"test_acc": 0.5})


def test_processes_add_to_one_file(tmp_path):
    path = tmp_path / "runs.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(path, name)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    groups = RunRecord(path).groups
    assert {name: len(group["seeds"]) for name, group in groups.items()} == {"one": 12, "two": 12}


# --- what is said -----------------------------------------------------------------------------------------------------


def test_published_cells_are_those_of_the_source():
    assert published.GAS["Cora", "GCN"] == (82.29, 0.76)
    assert published.GAS["PubMed", "GCN2"] == (80.19, 0.49)
    assert published.PGL_RANDOM["CiteSeer", "APPNP"] == (70.35, 1.3)
    assert all(len(cells) == 12 for cells in (published.GAS, published.PGL_METIS, published.PGL_FULL))


def test_cells_are_compared_on_the_seeds_that_both_have():
    record = record_of({"Cora GCN full-batch": [0.81, 0.83, 0.99], "Cora GCN GAS": [0.82, 0.83]})
    (found,) = comparisons(record, ["Cora", "PubMed"], ["GCN", "GAT"])
    assert found.full_batch == Cell(pytest.approx(82.0), pytest.approx(math.sqrt(2)), 2)
    assert found.difference == pytest.approx(0.5)
    assert found.paired_error == pytest.approx(0.5)
    assert found.misses == []


@pytest.mark.parametrize(
    ("full_batch", "gas", "words"),
    [
        ([0.830, 0.830], [0.824, 0.824], ["0.60 points below full-batch (standard error 0.00)"]),
        ([0.820], [0.826], ["0.60 points above full-batch (one seed)"]),
        ([0.812], [0.815], ["0.79 points below the published cell, whose deviation is 0.76"]),
        ([0.815], [0.816], []),
        # half a point, though not of floating numbers
        ([0.827], [0.832], []),
    ],
)
def test_misses_are_said(full_batch, gas, words):
    record = record_of({"Cora GCN full-batch": full_batch, "Cora GCN GAS": gas})
    (found,) = comparisons(record, ["Cora"], ["GCN"])
    assert found.misses == words
    text = reproduce.report(record, ["Cora"], ["GCN", "GAT"])
    assert ("| no |" in text) == bool(words)
    assert all(word in text for word in words)
    absent = text[text.index("Not measured: ") :]
    assert "GAT on Cora (full-batch), GAT on Cora (GAS)" in absent
    assert "GCN on Cora (GAS, random clusters)" in absent
    assert "GCN on Cora (GAS)," not in absent


def test_a_miss_says_what_is_left_of_it_without_the_choice_of_an_epoch():
    record = RunRecord(None)
    for seed, (one, other) in enumerate([(0.80, 0.81), (0.82, 0.80)]):
        record.add("Cora GAT full-batch", {}, seed, {"test_acc": 0.85, "late_test_acc": one})
        record.add("Cora GAT GAS", {}, seed, {"test_acc": 0.83, "late_test_acc": other})
    # a run from before there was such a figure
    record.add("Cora GAT full-batch", {}, 2, {"test_acc": 0.85})
    record.add("Cora GAT GAS", {}, 2, {"test_acc": 0.83})
    (found,) = comparisons(record, ["Cora"], ["GAT"])
    assert found.misses == [
        "2.00 points below full-batch (standard error 0.00); without the choice of an epoch -0.50 ± 1.50 (2)"
    ]


def test_random_clusters_have_a_table():
    record = record_of({
        "Cora GCN full-batch": [0.8], "Cora GCN GAS": [0.82], "Cora GCN GAS, random clusters": [0.79],
    })  # fmt: skip
    assert "| GCN | Cora | 79.00 (1) | 82.00 (1) | +3.00 | 78.12 | 81.40 |" in reproduce.report(
        record, ["Cora"], ["GCN"]
    )
    assert "no evaluation fills" not in reproduce.report(record, ["Cora"], ["GCN"])
    record.add("Cora GCN GAS, training only", {}, 0, {"test_acc": 0.81})
    record.add("Cora GCN GAS, random clusters, training only", {}, 0, {"test_acc": 0.77})
    text = reproduce.report(record, ["Cora"], ["GCN"])
    assert "| GCN | Cora | 77.00 (1) | 81.00 (1) | +4.00 |" in text[text.index("no evaluation fills") :]


def test_what_histories_and_batches_do_has_a_table():
    record = record_of({
        "CiteSeer GCN full-batch": [0.70, 0.72], "CiteSeer GCN GAS": [0.72, 0.73],
        f"CiteSeer GCN {reproduce.FRESH}": [0.71, 0.75],
    })  # fmt: skip
    for way, late in (("full-batch", 0.70), ("GAS", 0.72), (reproduce.FRESH, 0.73)):
        record.add(f"CiteSeer GCN {way}", {}, 2, {"test_acc": 0.70, "late_test_acc": late})
    text = reproduce.report(record, ["CiteSeer"], ["GCN"])
    cells = "72.00 ± 2.65 (3) | 71.67 ± 1.53 (3) | -0.33 ± 0.88 | +1.33 ± 0.88 | -1.00 (1) | +3.00 (1) |"
    assert f"| GCN | CiteSeer | {cells}" in text
    # before there is a full-batch run of the cell
    record = record_of({
        "CiteSeer GCN GAS": [0.72], f"CiteSeer GCN {reproduce.FRESH}": [0.71],
        "Cora GCN GAS": [0.82], "Cora GCN full-batch": [0.82],
    })  # fmt: skip
    text = reproduce.report(record, ["Cora", "CiteSeer"], ["GCN"])
    assert "| GCN | CiteSeer | 71.00 (1) | 72.00 (1) | +1.00 |  |  |  |" in text


def test_other_settings_than_the_papers_have_a_table():
    record = record_of({
        "AmazonComputers GCN2 full-batch": [0.83, 0.85], "AmazonComputers GCN2 GAS": [0.80, 0.81],
        "AmazonComputers GCN2 GAS, nodes alike": [0.82, 0.86],
    })  # fmt: skip
    text = reproduce.report(record, ["AmazonComputers"], ["GCN2"])
    row = "| GCN2 | AmazonComputers | GAS, nodes alike | 84.00 ± 1.41 (2) | 84.00 ± 2.83 (2) | +0.00 ± 1.00 |  |"
    assert row in text[text.index("other settings") :]
    assert "AmazonComputers (GAS, nodes alike, LMC)" in text[text.index("Not measured") :]


def test_nothing_measured_is_said():
    assert (
        reproduce.report(RunRecord(None), ["Cora"], ["GCN"]) == "Not measured: `python -m bench.reproduce --root DATA`"
    )

"""The ablation: the graphs it draws, that finished runs are kept, and what is shown of them."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import ablation, ablation_plot, ablation_table
from bench.ablation import CASES, WAYS, Case, described, run_missing, settings, to_choose, wanted
from bench.block_model import COMMUNITIES, cluster_like
from bench.run_record import RunRecord
from gas_triton.datasets import Dataset
from gas_triton.training import TrainConfig

# --- the graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> Dataset:
    return cluster_like(240, seed=1)


def graphs_of(dataset: Dataset) -> torch.Tensor:
    """The graph of every node: its connected component, by the lowest node that reaches it."""
    label = torch.arange(dataset.num_nodes)
    source, target = dataset.edge_index
    while True:
        lowest = label.scatter_reduce(0, target, label[source], "amin")
        if torch.equal(lowest, label):
            return label.unique(return_inverse=True)[1]
        label = lowest


def test_graphs_are_apart_and_split_whole(drawn: Dataset) -> None:
    graph = graphs_of(drawn)
    assert int(graph.max()) + 1 == 240
    assert torch.equal(graph, graph.sort().values), "nodes of a graph do not stand together"
    masks = torch.stack([drawn.train_mask, drawn.val_mask, drawn.test_mask]).long()
    assert torch.equal(masks.sum(0), torch.ones(drawn.num_nodes, dtype=torch.int64))
    assert [graph[mask].unique().numel() for mask in masks.bool()] == [200, 20, 20]
    split = masks.argmax(0)
    assert all(split[graph == number].unique().numel() == 1 for number in range(240))


def test_communities_have_the_sizes_of_the_definition(drawn: Dataset) -> None:
    sizes = torch.bincount(graphs_of(drawn) * COMMUNITIES + drawn.y, minlength=240 * COMMUNITIES)
    assert (int(sizes.min()), int(sizes.max())) == (5, 34)
    # 30 sizes, all as likely: deviation of the mean 8.66 / sqrt(1440)
    assert float(sizes.float().mean()) == pytest.approx(19.5, abs=4 * 8.66 / 1440**0.5)
    # published of CLUSTER: 117.2 nodes, 4303.9 edges a graph
    assert drawn.num_nodes / 240 == pytest.approx(117.2, rel=0.03)
    assert drawn.num_edges / 240 == pytest.approx(4303.9, rel=0.05)


def test_edges_have_the_probabilities_of_the_definition(drawn: Dataset) -> None:
    source, target = drawn.edge_index
    assert not bool((source == target).any())
    key = source * drawn.num_nodes + target
    assert key.unique().numel() == key.numel()
    assert torch.equal(key.sort().values, (target * drawn.num_nodes + source).sort().values)
    sizes = torch.bincount(graphs_of(drawn) * COMMUNITIES + drawn.y).view(240, COMMUNITIES)
    pairs_within = int((sizes * (sizes - 1)).sum())
    pairs_between = int((sizes.sum(1) ** 2 - (sizes**2).sum(1)).sum())
    within = int((drawn.y[source] == drawn.y[target]).sum())
    # edges are pairs of directed ones: twice as many draws would be twice too sure
    for found, pairs, probability in (
        (within, pairs_within, 0.55),
        (drawn.num_edges - within, pairs_between, 0.25),
    ):
        deviation = (probability * (1 - probability) / (pairs / 2)) ** 0.5
        assert found / pairs == pytest.approx(probability, abs=4 * deviation)


def test_one_node_of_each_community_is_known(drawn: Dataset) -> None:
    assert torch.equal(drawn.x.sum(1), torch.ones(drawn.num_nodes))
    column = drawn.x.argmax(1)
    is_known = column > 0
    assert torch.equal(column[is_known] - 1, drawn.y[is_known])
    community = graphs_of(drawn) * COMMUNITIES + drawn.y
    assert torch.equal(community[is_known].sort().values, torch.arange(240 * COMMUNITIES))


def test_equal_seeds_give_equal_graphs() -> None:
    first, again, other = (cluster_like(12, seed) for seed in (3, 3, 4))
    for name in ("edge_index", "x", "y", "train_mask", "val_mask", "test_mask"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.num_nodes != other.num_nodes
    with pytest.raises(ValueError, match=r"expected a graph of each split, got 5, 0 and 0 of 5"):
        cluster_like(5)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case of a second, in place of the others."""
    config = TrainConfig(
        model="GIN", layers=3, hidden=8, dropout=0.0, epochs=3, eval_every=2, num_parts=6, batch_size=2,
        model_options={"linear": True, "residual": True, "perceptron_norm": True, "running_statistics": False},
        full_evaluation=True,
    )  # fmt: skip
    case = Case("tiny", "two", lambda root: cluster_like(12, 0), config, strength=0.1, choice_epochs=2, seeds=2)
    monkeypatch.setattr(ablation, "CASES", {"tiny": case})
    return case


def test_ways_differ_in_what_they_say() -> None:
    assert len(WAYS) == 9
    for case in CASES:
        full = settings(case, "full-batch")
        assert full.full_batch
        assert full.lipschitz == 0.0
        assert not full.fill_histories
        for name, way in WAYS.items():
            if way is None:
                continue
            config = settings(case, name)
            assert (config.partition, config.histories) == (way.partition, way.histories)
            assert config.lipschitz == (CASES[case].strength if way.lipschitz else 0.0)
            same = {"full_batch": True, "partition": "metis", "histories": True, "lipschitz": 0.0}
            assert replace(config, **same) == full
    assert settings("gcn2", "random, none, Lipschitz") == replace(
        CASES["gcn2"].config, partition="random", histories=False, lipschitz=CASES["gcn2"].strength
    )


def test_every_way_is_run_once(tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.json"
    runs = wanted(["tiny"], list(WAYS), seeds=1)
    run_missing(RunRecord(path), runs, None)
    record = RunRecord(path)
    assert set(record.groups) == {f"tiny: {way}" for way in WAYS}
    for way in WAYS:
        group = record.groups[f"tiny: {way}"]
        assert group["settings"] == described("tiny", settings("tiny", way))
        done = group["seeds"]["0"]
        curves = done["curves"]
        assert curves["epoch"] == [2, 3]
        assert done["best_epoch"] in (2, 3)
        best = curves["epoch"].index(done["best_epoch"])
        assert curves["val_acc"][best] == max(curves["val_acc"]) == pytest.approx(done["val_acc"], abs=1e-4)
        assert curves["test_acc"][best] == pytest.approx(done["test_acc"], abs=1e-4)
    losses = [record.groups[f"tiny: {way}"]["seeds"]["0"]["curves"]["train_loss"][-1] for way in WAYS]
    assert len(set(losses)) == 9, "two ways are the same"

    monkeypatch.setattr(ablation, "run", lambda *arguments: pytest.fail("a finished run was run again"))
    before = path.read_text()
    run_missing(RunRecord(path), runs, None)
    assert path.read_text() == before


def test_a_stop_keeps_what_is_finished(tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, real, count = RunRecord(tmp_path / "runs.json"), ablation.run, iter(range(9))
    monkeypatch.setattr(ablation, "run", lambda *arguments: real(*arguments) if next(count) < 2 else None)
    run_missing(record, wanted(["tiny"], list(WAYS)), None)
    assert sum(len(group["seeds"]) for group in record.groups.values()) == 2


def test_a_strength_is_chosen_with_other_seeds(tiny: Case) -> None:
    chosen = to_choose(["tiny"], seeds=2)
    assert [run.config.lipschitz for run in chosen[:3]] == list(ablation.STRENGTHS)
    assert {run.config.partition for run in chosen} == {"metis"}
    assert {run.config.epochs for run in chosen} == {2}
    seeds = {run.config.seed for run in chosen}
    assert len(seeds) == 2
    assert not seeds & {run.config.seed for run in wanted(["tiny"], list(WAYS))}


def test_committed_runs_are_those_of_the_command() -> None:
    record = RunRecord(ablation.RESULTS)
    groups = {
        run.group: described(run.case, run.config) for run in wanted(list(CASES), list(WAYS)) + to_choose(list(CASES))
    }
    assert record.groups.keys() == groups.keys()
    for group, config in groups.items():
        assert record.runs(group, config), f"{group}: the settings are others than those of the finished runs"


def test_quick_command_leaves_the_results_alone(
    tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    monkeypatch.setattr(ablation, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["ablation", "--quick", "--ways", "full-batch", "metis, histories"])
    monkeypatch.setattr(ablation, "QUICK", {"seeds": 1, "epochs": 1})
    ablation.main()
    assert not results.exists()
    assert "| METIS | histories | no |" in capsys.readouterr().out


# --- what is shown ---------------------------------------------------------------------------------------------------


def made_by_hand(test_accs: dict[str, list[float]]) -> RunRecord:
    record = RunRecord(None)
    for name, accs in test_accs.items():
        for seed, acc in enumerate(accs):
            epochs = [2, 4, 6]
            curves: dict[str, Any] = {"epoch": epochs, "train_loss": [2.0, 1.0, 0.5 + acc]}
            curves |= {"val_acc": [0.1, acc, acc], "test_acc": [0.1, acc, acc - 0.1]}
            record.add(name, {}, seed, {"test_acc": acc, "val_acc": acc + 0.01, "best_epoch": 4, "curves": curves})
    return record


BY_HAND = {
    "gin: random, none, Lipschitz": [0.2],
    "gin: metis, histories": [0.7, 0.9],
    "gin: full-batch": [0.8, 0.84],
    "gin: strength 0.1": [0.6],
    "gcn2: full-batch": [0.5],
}


def test_table_of_runs_made_by_hand() -> None:
    record = made_by_hand(BY_HAND)
    assert ablation_table.table(record, "gin").splitlines()[2:] == [
        "| full-batch |  |  | 83.00 ± 2.83 | 82.00 ± 2.83 |  | 72.00 ± 2.83 | 1.32 ± 0.03 | 2 |",
        # pairs of seeds: -10 and +6 points
        "| METIS | histories | no | 81.00 ± 14.14 | 80.00 ± 14.14 | -2.00 ± 11.31 | 70.00 ± 14.14 | 1.30 ± 0.14 | 2 |",
        "| random | left out | yes | 21.00 | 20.00 | -60.00 | 10.00 | 0.70 | 1 |",
    ]
    text = ablation_table.tables(record, {"gcn2": "Deep", "gin": "Wide"})
    assert text.index("### Deep") < text.index("| 50.00 |") < text.index("### Wide") < text.index("0.1: 61.00")
    assert "Not measured: `python -m bench.ablation" in ablation_table.table(RunRecord(None), "gin")


def test_report_shows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ablation-cpu.json"
    assert ablation.report(path).count("Not measured") == len(CASES)
    path.write_text(json.dumps({"machine": "a cpu", "groups": made_by_hand(BY_HAND).groups}))
    assert "| METIS | histories | no | 81.00 ± 14.14 |" in ablation.report(path)
    assert ablation.report(path).endswith("<sub>a cpu; `python -m bench.ablation --root DATA`</sub>")


@pytest.mark.interop
def test_figure_has_a_line_of_every_way(tmp_path: Path, import_optional: Callable[[str, str], ModuleType]) -> None:
    import_optional("matplotlib", "plot")
    record = made_by_hand({f"gin: {way}": [0.5 + place / 100, 0.6] for place, way in enumerate(WAYS)})
    path = ablation_plot.draw(record, "gin", "A GIN", tmp_path / "figures")
    assert path == tmp_path / "figures/ablation-gin.svg"
    text = path.read_text()
    for label in ("METIS", "METIS, Lipschitz", "random", "random, Lipschitz", "full-batch"):
        assert text.count(f">{label}<") == 1, "once, in the legend"
    for label in ("validation accuracy, %", "training loss", "Histories", "A GIN: mean and range of 2 seeds"):
        assert f">{label}<" in text
    # two regularised ways in each of four panels, and their two places in the legend
    assert text.count("stroke-dasharray") == 2 * 4 + 2
    assert path.stat().st_size < 150_000
    before = path.read_bytes()
    ablation_plot.draw(record, "gin", "A GIN", tmp_path / "figures")
    assert path.read_bytes() == before, "equal runs give an equal file"
    with pytest.raises(ValueError, match="no finished run of gcn2"):
        ablation_plot.draw(record, "gcn2", "none", tmp_path)

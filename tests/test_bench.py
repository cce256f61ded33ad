"""The benchmarks compare equal answers: what they compute, at sizes that take no time."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench import (
    accuracy,
    bench_epoch,
    bench_file_tier,
    bench_memory,
    bench_overhead,
    bench_plan,
    bench_prefetch,
    pygas,
    side_by_side,
    tables,
)
from gas_triton import presets
from gas_triton.datasets import Dataset, generate

HIDDEN = 16


@pytest.fixture(scope="module")
def problem() -> bench_epoch.Problem:
    return bench_epoch.make_problem(600, 6000, num_parts=8, batch_size=2, cache=None)


@pytest.fixture(autouse=True)
def _no_cached_problem() -> Iterator[None]:
    # the benchmarks keep their inputs; a tiny one must not be found by a benchmark run after this
    yield
    for module in (bench_epoch, bench_overhead):
        module.make_problem.cache_clear()


# --- side by side ----------------------------------------------------------------------------------------------------


def test_interleave_runs_every_function_in_every_round_in_turning_order() -> None:
    called: list[str] = []
    functions = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = side_by_side.interleave(functions, rounds=3, warmup=1, calls=2)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(called[start : start + 6]) for start in range(0, len(called), 6)]
    assert rounds == ["ccaabb", "aabbcc", "bbccaa", "ccaabb"]


def test_a_ratio_is_taken_within_each_round() -> None:
    seconds = {"ours": [1e-3, 1e-3, 2e-3], "theirs": [4e-3, 3e-3, 8e-3]}
    # 4, 3 and 4
    assert side_by_side.ratio(seconds, "theirs", "ours") == pytest.approx(4.0)


# --- overhead --------------------------------------------------------------------------------------------------------


def test_overhead_calls_the_same_kernels() -> None:
    bench_overhead.check(bench_overhead.make_problem())


# --- plan, epoch -----------------------------------------------------------------------------------------------------


def test_plan_is_complete(problem: bench_epoch.Problem) -> None:
    planning = bench_plan.Planning(problem, hidden=HIDDEN)
    bench_plan.check(planning)
    assert float(planning.step()) > 0.0


def test_plans_have_the_clusters_asked_for(problem: bench_epoch.Problem) -> None:
    plans = (bench_plan.planners(problem, count)[tables.OURS] for count in (2, 4, 8))
    assert [len(plan().clusters) for plan in plans] == [2, 4, 8]


def test_epochs_without_torch_sparse(problem: bench_epoch.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pygas, "missing", lambda: "absent")
    assert list(bench_epoch.trainings(problem)) == [tables.OURS]


def test_epochs_take_the_same_groups(problem: bench_epoch.Problem) -> None:
    training = bench_epoch.Training(problem, hidden=HIDDEN)
    for epoch in range(2):
        training.loader.epoch = epoch
        assert [batch.clusters for batch in training.loader] == problem.groups[epoch]


@pytest.mark.interop
def test_losses_agree_with_pygas(problem: bench_epoch.Problem, torch_sparse: ModuleType) -> None:
    bench_epoch.check(problem, hidden=HIDDEN, epochs=3)


@pytest.mark.interop
def test_different_losses_are_noticed(
    problem: bench_epoch.Problem, torch_sparse: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_push(self: pygas.GCN, history: torch.Tensor, x: torch.Tensor, batch: pygas.Subgraph) -> torch.Tensor:
        return pygas.pull(x, history, batch.n_id[batch.batch_size :])

    monkeypatch.setattr(pygas.GCN, "push_and_pull", without_push)
    with pytest.raises(AssertionError, match="losses of epoch"):
        bench_epoch.check(problem, hidden=HIDDEN, epochs=3)


@pytest.mark.interop
def test_pygas_relabels_to_the_same_subgraph(problem: bench_epoch.Problem, torch_sparse: ModuleType) -> None:
    loader = pygas.SubgraphLoader(problem.graph, problem.parts, y=problem.y)
    batch, ours = loader.batch([5, 2]), problem.loader().batch([5, 2])
    assert batch.batch_size == ours.num_nodes
    assert torch.equal(batch.n_id[: batch.batch_size], ours.node_ids)
    assert torch.equal(batch.n_id[batch.batch_size :].sort().values, ours.halo_ids)
    assert torch.equal(batch.tensors["y"], problem.y[batch.n_id])
    rows = problem.graph.to_torch_csr().to_dense()[ours.node_ids]
    assert torch.equal(batch.adj_t.to_dense(), rows[:, batch.n_id])


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> bench_epoch.Problem:
    return bench_memory.make_problem(600, 6000, num_parts=12, cache=None)


def test_peak_of_equal_batches(small: bench_epoch.Problem) -> None:
    one, many = bench_memory.measure_both(small, 3, hidden=HIDDEN)
    assert (many.num_nodes, many.num_edges) == (3 * one.num_nodes, 3 * one.num_edges)
    assert many.history_bytes == pytest.approx(3 * one.history_bytes, rel=0.01)
    assert abs(many.step_bytes / one.step_bytes - 1) <= bench_memory.MAX_GROWTH


def test_an_allocation_for_every_node_shows(small: bench_epoch.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    step = bench_epoch.Training.step

    def wasteful(self: bench_epoch.Training, batch: object) -> torch.Tensor:
        rows = torch.zeros(self.loader.graph.num_nodes, HIDDEN)
        return step(self, batch) + rows.sum()  # type: ignore[arg-type]

    monkeypatch.setattr(bench_epoch.Training, "step", wasteful)
    one, many = bench_memory.measure_both(small, 3, hidden=HIDDEN)
    assert many.step_bytes / one.step_bytes - 1 > bench_memory.MAX_GROWTH


# --- prefetch, file tier ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_every_tier_trains_alike(problem: bench_epoch.Problem, dtype: torch.dtype) -> None:
    bench_prefetch.check(problem, dtype, HIDDEN)


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
def test_another_loss_of_a_tier_is_noticed(problem: bench_epoch.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = bench_prefetch.attach_histories

    def attach_coarsely(*arguments: object, tier: str, dtype: torch.dtype, **options: object) -> object:
        return attach(*arguments, tier=tier, dtype=torch.int8 if tier == "file" else dtype, **options)  # type: ignore

    monkeypatch.setattr(bench_prefetch, "attach_histories", attach_coarsely)
    with pytest.raises(AssertionError, match="losses of file, ahead differ"):
        bench_prefetch.check(problem, torch.float32, HIDDEN)


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
def test_host_work_is_bounded() -> None:
    # the bench holds it to 300 us on a quiet machine
    assert 0.0 < bench_prefetch.host_microseconds(epochs=3) < 3000.0


def test_a_file_tier_run_stores_every_row() -> None:
    small, large = (bench_file_tier.run_apart(nbytes) for nbytes in (1_000_000, 6_000_000))
    assert large["table_bytes"] == pytest.approx(6_000_000, rel=0.01)
    assert bench_file_tier.growth(large, small) < 100_000_000
    large["rows_stored"] -= 1
    with pytest.raises(AssertionError, match="not every row was pushed"):
        bench_file_tier.growth(large, small)


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the presets train on a tiny graph; what was loaded."""
    loaded: list[str] = []

    def load(name: str, root: str | None) -> Dataset:
        loaded.append(name)
        return generate(400, 4000)

    monkeypatch.setattr(accuracy, "load", load)
    return loaded


def run_accuracy(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["accuracy", "--datasets", "PubMed", "--epochs", "2", *arguments])
    accuracy.main()


def test_accuracy_takes_up_where_it_stopped(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "runs.json"
    ways = ("--ways", "full-batch", "histories")
    run_accuracy(monkeypatch, "--seeds", "1", "--json", str(path), *ways)
    written = json.loads(path.read_text())["groups"]
    assert set(written) == {"PubMed full-batch", "PubMed histories"}
    assert tiny == ["PubMed"]

    run_accuracy(monkeypatch, "--seeds", "1", "--json", str(path), *ways)
    assert tiny == ["PubMed"], "nothing was missing, so nothing should have been loaded"

    run_accuracy(monkeypatch, "--seeds", "2", "--json", str(path), *ways)
    grown = json.loads(path.read_text())["groups"]
    assert all(list(group["seeds"]) == ["0", "1"] for group in grown.values())
    assert all(grown[name]["seeds"]["0"] == written[name]["seeds"]["0"] for name in written)
    assert capsys.readouterr().out.count("| PubMed |") == 6


def test_accuracy_forgets_runs_of_other_settings(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.json"
    run_accuracy(monkeypatch, "--seeds", "1", "--json", str(path))
    dataset, config = presets.load("pubmed-gcn")
    monkeypatch.setattr(presets, "load", lambda name: (dataset, dataclasses.replace(config, hidden=12)))
    run_accuracy(monkeypatch, "--seeds", "1", "--json", str(path))
    groups = json.loads(path.read_text())["groups"]
    assert tiny == ["PubMed", "PubMed"]
    assert all(group["settings"]["hidden"] == 12 for group in groups.values())


def test_accuracy_table() -> None:
    record = accuracy.Record(None)
    runs = {"full-batch": (0.80, 0.82), "histories": (0.81, 0.83), "int8": (0.815, 0.833)}
    for way, points in runs.items():
        done = record.group("Cora", way, 200)
        done |= {str(seed): {"test_acc": point} for seed, point in enumerate(points)}
    assert accuracy.table(record, ["Cora", "CiteSeer"], list(accuracy.WAYS), 2, 200).splitlines()[2:] == [
        "| Cora | full-batch | 81.00 ± 1.41 |  | 2 |",
        "| Cora | histories | 82.00 ± 1.41 | +1.00 to full-batch, NOT within 0.5 points | 2 |",
        "| Cora | int8 | 82.40 ± 1.27 | +0.40 to histories, within 0.5 points | 2 |",
    ]


def test_a_way_changes_the_preset_where_it_should() -> None:
    config = accuracy.preset("Cora", "histories", seed=3)
    alone = {"fill_histories": False, "full_evaluation": False}
    assert config == dataclasses.replace(presets.load("cora-gcn")[1], seed=3, **alone)
    assert all(accuracy.preset(name, "histories", 0).model == "GCN" for name in accuracy.DATASETS)
    assert accuracy.preset("Cora", "full-batch", seed=3) == dataclasses.replace(config, full_batch=True)
    assert accuracy.preset("Cora", "int8", seed=3) == dataclasses.replace(config, history_dtype="int8")
    lmc = dataclasses.replace(config, halo_momentum=0.5, compensation="lmc")
    assert accuracy.preset("Cora", "lmc", seed=3) == lmc

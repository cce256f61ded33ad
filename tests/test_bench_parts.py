"""The parts of the suite that time plans, epochs, tiers and layers as they are used: what their rows say."""

import functools
import importlib.util
import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import (
    bench_autoscale,
    bench_epoch,
    bench_memory,
    bench_overhead,
    bench_plan,
    bench_prefetch,
    bench_static,
    groups,
    pygas,
)
from bench.groups import Setting
from bench.tables import OURS

TINY = Setting(size="tiny", seconds=0.01)
MODULES = [bench_autoscale, bench_epoch, bench_memory, bench_overhead, bench_plan, bench_prefetch, bench_static]
ABSENT = ["matplotlib", "ogb", "pymetis", "pytest", "scipy", "torch_geometric", "torch_scatter", "torch_sparse", "tqdm"]


@functools.cache
def rows_of(module: ModuleType) -> list[dict[str, Any]]:
    """The rows of a part at size tiny, measured once."""
    return module.measure(TINY)


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.removeprefix("bench."))
def test_rows_are_flat_and_finite(module: ModuleType) -> None:
    rows = rows_of(module)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    for row in rows:
        assert row["op"] == module.__name__.removeprefix("bench.bench_")
        assert isinstance(row["way"], str)
        assert "missing" in row or any(isinstance(value, float) for value in row.values())
        assert all(value > 0.0 for key, value in row.items() if key in ("ms", "times_ours", "peak_mib"))
        assert ("target" in row) == ("met" in row)
    # a promise that compares with a package says nothing without it
    is_without = any("missing" in row for row in rows)
    assert any("target" in row for row in rows) or is_without or module is bench_static
    assert groups.render(rows)


# --- plan ------------------------------------------------------------------------------------------------------------


@pytest.mark.interop
def test_plans_of_all_ways_are_compared(torch_sparse: ModuleType, torch_geometric: ModuleType) -> None:
    rows = rows_of(bench_plan)
    assert {row["way"] for row in rows if row.get("clusters") == 8} == set(bench_plan.WAYS)
    assert all(row["difference"] == 0.0 for row in rows if "difference" in row)


def test_plans_grow_with_their_clusters() -> None:
    ours = [row for row in rows_of(bench_plan) if row["way"] == OURS and "against" not in row]
    assert [row["clusters"] for row in ours] == [2, 4, 8]
    # all clusters are the whole graph, whose 6000 edges got 600 loops
    assert ours[-1]["edges"] == 6600
    assert ours[0]["edges"] < ours[1]["edges"] < 6600


@pytest.mark.parametrize("wrong", ["edge", "weight"])
def test_another_plan_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    relabel = bench_plan.relabel

    def wrongly(*arguments: Any) -> bench_plan.Relabelled:
        plan = relabel(*arguments)
        if wrong == "edge":
            return plan._replace(col=plan.col.roll(1))
        return plan._replace(weight=plan.weight * 1.001)

    monkeypatch.setattr(bench_plan, "relabel", wrongly)
    with pytest.raises(AssertionError, match=f"answers of {bench_plan.TORCH} differ from ours"):
        groups.measure(bench_plan.cases(TINY)[0], TINY)


def test_share_of_a_step() -> None:
    (row,) = (row for row in rows_of(bench_plan) if "share" in row)
    assert row["share"] == pytest.approx(row["ms"] / row["step_ms"], rel=0.9)
    assert row["met"] == (row["share"] <= 0.1)


# --- epoch -----------------------------------------------------------------------------------------------------------


def test_an_epoch_without_torch_sparse_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pygas, "missing", lambda: "absent")
    rows = bench_epoch.measure(TINY, [("generated", 0.0)])
    assert [(row["way"], row.get("missing")) for row in rows] == [(OURS, None), (bench_epoch.PYGAS, "absent")]


def test_a_dataset_that_is_not_here_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("GAS_TRITON_DATA", str(tmp_path))
    (row,) = bench_epoch.measure(TINY, [("WordNet31", 0.0)])
    assert row["missing"] == "needs WordNet31.npz in the folder $GAS_TRITON_DATA"


@pytest.mark.interop
def test_an_epoch_of_another_loss_is_noticed(torch_sparse: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_epoch, "check", lambda *arguments: None)
    run_epoch = bench_epoch.PygasTraining.run_epoch
    monkeypatch.setattr(bench_epoch.PygasTraining, "run_epoch", lambda self: [1.01 * loss for loss in run_epoch(self)])
    with pytest.raises(AssertionError, match="answers of PyGAS differ"):
        groups.measure(bench_epoch.cases(TINY)[0], TINY)


# --- memory, prefetch, static ----------------------------------------------------------------------------------------


def test_memory_is_that_of_the_arithmetic_at_any_number_of_nodes() -> None:
    small, large = rows_of(bench_memory)
    assert large["nodes"] == 3 * small["nodes"]
    assert large["peak_mib"] == pytest.approx(small["peak_mib"], rel=0.01)
    assert large["met"]
    assert max(abs(row["arithmetic"]) for row in (small, large)) < 0.1


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
def test_only_tables_that_are_copied_are_pulled() -> None:
    rows = {row["way"]: row for row in rows_of(bench_prefetch) if "dtype" in row}
    assert list(rows) == list(bench_prefetch.WAYS)
    pulled = {way for way, row in rows.items() if "pulls" in row}
    assert pulled == {"pinned, ahead", "pinned, when asked", "file, ahead", "file, when asked"}
    for way in pulled:
        assert rows[way]["misses"] == (rows[way]["pulls"] if "asked" in way else 0)


def test_a_table_of_neighbours_takes_less_of_a_step() -> None:
    rows = {(row["measure"], row["way"]): row for row in rows_of(bench_static)}
    for measure in ("epoch", "full-batch step"):
        assert rows[measure, bench_static.STATIC]["peak_mib"] < rows[measure, bench_static.PLAIN]["peak_mib"]
    assert rows["epoch", bench_static.STATIC]["table_mib"] == pytest.approx(600 * 64 * 4 / 2**20)


# --- a bare machine --------------------------------------------------------------------------------------------------


def test_clusters_are_random_without_pymetis(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pymetis" else find_spec(name))
    sizes = {"num_parts": 8, "batch_size": 2, "cache": None}
    data = bench_epoch.generate(600, 6000)
    problem = bench_epoch.cut(data, **sizes)
    assert problem.partition == "random"
    monkeypatch.undo()
    metis = bench_epoch.cut(data, **sizes)
    assert metis.partition == "METIS"
    assert problem.parts.stats(2).edge_cut > metis.parts.stats(2).edge_cut


def test_plan_prefetch_and_memory_need_torch_alone() -> None:
    program = f"""
import importlib.util, json, sys
absent = {ABSENT}
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in absent else find_spec(name, *more)
for name in absent:
    sys.modules[name] = None
from bench import bench_memory, bench_plan, bench_prefetch, report
from bench.groups import Setting
rows = [module.measure(Setting(size="tiny", seconds=0.01)) for module in (bench_memory, bench_plan, bench_prefetch)]
print(json.dumps(rows))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory, plan, prefetch = json.loads(done.stdout.splitlines()[-1])
    assert {row["partition"] for row in [*memory, *plan]} == {"random"}
    missing = {row["way"] for row in plan if "missing" in row}
    assert missing == {bench_plan.PYGAS, bench_plan.PYG}
    assert len(prefetch) == len(bench_prefetch.WAYS) + 1


def test_a_problem_moves_to_another_device() -> None:
    problem = bench_epoch.make_problem(200, 1000, num_parts=4, batch_size=2, cache=None)
    bench_epoch.make_problem.cache_clear()
    moved = bench_epoch.move(problem, torch.device("meta"))
    tensors = (moved.graph.rowptr, moved.x, moved.y, moved.train_mask)
    assert {tensor.device.type for tensor in tensors} == {"meta"}

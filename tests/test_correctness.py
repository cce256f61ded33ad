"""`bench.correctness`: right ops pass all of it, and what is wrong with one of them shows."""

import os
from dataclasses import replace

import pytest
import torch

from bench import checks_of_ops, checks_of_training, correctness
from bench.checks import EXACT, Check, Problem, perform, poisoned
from bench.checks_of_ops import op_checks
from bench.checks_of_training import training_checks
from bench.groups import Progress, Setting
from gas_triton import functional

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:there is no CUDA device. tier 'pinned':UserWarning")


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    # the CPU's own path, with all checks
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(scope="module")
def problem():
    return Problem(CPU, "tiny")


def core(op):
    return next(check for check in [*op_checks(), *training_checks(CPU)] if check.core and check.op == op)


def test_everything_passes_in_processes(monkeypatch):
    monkeypatch.setattr(correctness, "PROCESSES", 2)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    progress = Progress()
    setting = Setting(CPU, "tiny", progress=progress)
    checks = correctness.all_checks(CPU, "tiny")
    rows = correctness._in_processes(checks, setting)
    assert [row for row in rows if not row["ok"]] == []
    assert {(row["op"], row["case"], row["dtype"]) for row in rows} == {tuple(c.identity.values()) for c in checks}
    assert len(progress.rows) == len(rows)
    assert progress.cut is None
    # half of what is allowed is enough on a CPU: a GPU rounds otherwise
    assert max(row["error"] / row["tolerance"] for row in rows if row["tolerance"]) < 0.5


def test_checks_are_told_apart():
    identities = [tuple(check.identity.values()) for check in op_checks() + training_checks(CPU)]
    assert len(set(identities)) == len(identities)


def test_checks_on_a_gpu_are_built(problem):
    # what only a GPU is asked is compared with the CPU itself here
    for check in checks_of_training.model_checks():
        if check.core:
            assert all(row["ok"] for row in perform(check, problem))


def test_problems_have_what_goes_wrong():
    for size in ("tiny", "full"):
        problem = Problem(CPU, size)
        batch, degree = problem.batch(), problem.batch().joint().rowptr.diff()
        assert batch.spans.size(0) == 2
        assert batch.spans[0, 1] < batch.spans[1, 0]
        assert int(degree.max()) > 2 * problem.hub_edges
        assert int((degree == 0).sum()) > 0
        transposed, hubs = batch.joint_transposed()
        assert int(transposed.rowptr.diff().max()) > problem.hub_edges
        assert len(batch.hubs) == len(hubs) == 4
        source, target = batch.edge_index
        assert torch.stack([source, target]).unique(dim=1).size(1) < batch.num_edges
        assert problem.batch("symmetric").symmetric


OPS = {
    "aggregate": (functional, "aggregate"),
    "multi_aggregate": (functional, "multi_aggregate"),
    "attention": (functional, "attention"),
    "dynamic_attention": (functional, "dynamic_attention"),
    "edge_dot": (checks_of_ops, "edge_dot"),
    "dropout": (functional, "dropout"),
    "messages": (checks_of_ops, "aggregate_messages"),
    "pull": (checks_of_training, "pull"),
    "inference": (checks_of_training, "inference"),
}


class Wrong(torch.autograd.Function):
    """A right value with a slightly wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


WRONGS = {
    "a scaled value": lambda out: out * 1.01,
    "one wrong element": lambda out: out.index_fill(0, torch.tensor([out.size(0) - 1]), 0.5),
    "an element that is not written": lambda out: out.index_fill(0, torch.tensor([1]), torch.nan),
    "another value each time": lambda out: out * (1.0 + 1e-7 * torch.rand(out.shape, dtype=out.dtype)),
}


@pytest.mark.parametrize("wrong", WRONGS)
@pytest.mark.parametrize("op", OPS)
def test_a_wrong_op_shows(op, wrong, problem, monkeypatch):
    module, name = OPS[op]
    right = getattr(module, name)
    assert all(row["ok"] for row in perform(core(op), problem))
    monkeypatch.setattr(module, name, lambda *args, **options: WRONGS[wrong](right(*args, **options)))
    rows = perform(core(op), problem)
    assert not all(row["ok"] for row in rows)
    if wrong == "another value each time" and core(op).tolerance > EXACT:
        assert "a second run differs in" in next(row["failure"] for row in rows if "failure" in row)


@pytest.mark.parametrize("op", ["aggregate", "multi_aggregate", "attention", "dynamic_attention", "dropout"])
def test_a_wrong_gradient_shows(op, problem, monkeypatch):
    module, name = OPS[op]
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: Wrong.apply(right(*args, **options)))
    failed = [row["value"] for row in perform(core(op), problem) if not row["ok"]]
    assert failed
    assert all(value.startswith("gradient of ") for value in failed)


def test_a_wrong_push_and_transpose_show(problem, monkeypatch):
    pushed = checks_of_training.push

    def late(table, *others):
        pushed(table, *others)
        table[0, 0] = 3

    monkeypatch.setattr(checks_of_training, "push", late)
    assert [row["value"] for row in perform(core("push"), problem) if not row["ok"]] == ["table"]

    transposed = checks_of_ops.transpose

    def unstable(row, col, num_cols):
        rowptr, col, edge_id = transposed(row, col, num_cols)
        return rowptr, col.flip(0), edge_id

    monkeypatch.setattr(checks_of_ops, "transpose", unstable)
    assert [row["value"] for row in perform(core("transpose"), problem) if not row["ok"]] == ["col"]


def test_a_wrong_step_shows(problem, monkeypatch):
    attach = checks_of_training.attach_histories

    def stale(*args, **options):
        histories = attach(*args, **options)
        for store in histories.values():
            # the first push is lost
            monkeypatch.setattr(store, "_push", lambda *_: None)
        return histories

    check = next(c for c in checks_of_training.gcn_checks() if c.op == "training step")
    monkeypatch.setattr(checks_of_training, "attach_histories", stale)
    assert not all(row["ok"] for row in perform(check, problem))


def test_a_plan_that_lacks_an_edge_shows(problem, monkeypatch):
    plan = checks_of_training._plan
    calls = []

    def lacking(batch):
        found = plan(batch)
        calls.append(batch)
        if len(calls) <= 2:
            found["inner 1"] = found["inner 1"].clone()
            found["inner 1"][0] += 1
        return found

    monkeypatch.setattr(checks_of_training, "_plan", lacking)
    assert [row["value"] for row in perform(core("plan"), problem) if not row["ok"]] == ["inner 1"]


def test_an_exception_becomes_a_row(problem):
    def build(problem, draw):
        raise ValueError("no such thing")

    (row,) = perform(replace(core("aggregate"), build=build), problem)
    assert not row["ok"]
    assert row["error"] is None
    assert row["failure"].endswith("ValueError: no such thing")


def test_shapes_dtypes_and_names_count(problem):
    def rows_of(found, expected):
        check = Check("x", "y", torch.float32, lambda p, d: (lambda: found, lambda: expected), EXACT)
        return perform(check, problem)

    one = torch.ones(2)
    assert rows_of({"out": one}, {"out": one})[0]["ok"]
    assert "float64" in rows_of({"out": one.double()}, {"out": one})[0]["failure"]
    assert "shape" in rows_of({"out": one[None]}, {"out": one})[0]["failure"]
    assert "expected other" in rows_of({"out": one}, {"other": one})[0]["failure"]
    assert rows_of({"out": one * torch.nan}, {"out": one * torch.nan})[0]["ok"]
    assert not rows_of({"out": one * torch.nan}, {"out": one})[0]["ok"]


def test_memory_is_poisoned_only_inside():
    with poisoned():
        assert bool(torch.empty(10).isnan().all())
        with poisoned(False):
            assert not torch.are_deterministic_algorithms_enabled()
        assert bool(torch.empty(10).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_check_that_takes_its_process_down_costs_only_itself(monkeypatch):
    monkeypatch.setattr(correctness, "PROCESSES", 1)
    checks = correctness.all_checks(CPU, "tiny")[:5]
    asked = []

    def process(share, setting, add):
        asked.append(share)
        if len(asked) == 1:
            add([{"op": "aggregate", "ok": True, "place": share[0]}])
            return 1, "status 3: an illegal memory access"
        for place in share:
            add([{"op": "aggregate", "ok": True, "place": place}])
        return len(share), None

    monkeypatch.setattr(correctness, "_run_process", process)
    rows = correctness._in_processes(checks, Setting(CPU, "tiny", progress=Progress()))
    assert asked == [[0, 1, 2, 3, 4], [2, 3, 4]]
    assert [row.get("place") for row in rows] == [0, None, 2, 3, 4]
    assert rows[1] | checks[1].identity == rows[1]
    assert "illegal memory access" in rows[1]["failure"]


def test_a_wrong_value_fails_the_part(monkeypatch):
    def wrong(p, draw):
        return (lambda: {"out": torch.ones(2)}), (lambda: {"out": torch.zeros(2)})

    check = Check("aggregate", "wrong", torch.float32, wrong, 1e-6)
    monkeypatch.setattr(correctness, "all_checks", lambda device, size: [check])
    progress = Progress()
    (row,) = correctness.measure(Setting(CPU, "tiny", progress=progress))
    assert (row["ok"], row["error"]) == (False, float("inf"))
    assert progress.failures == ["1 of 1 values are wrong"]

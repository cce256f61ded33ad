"""The benchmarks of layers, steps and inference: plain torch stands for PyG, all ways agree, every size gives rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import (
    bench_attention,
    bench_dynamic_attention,
    bench_inference,
    bench_multi_aggregate,
    bench_step,
    layers,
    plain,
    planted,
    pygas,
)
from bench.groups import Case, Setting, check, peak_of
from bench.inputs import random_batch
from bench.layers import BOTH, FORWARD, PLAIN, PYG, Promise
from bench.tables import OURS, Row
from gas_triton.nn import GATConv, GATv2Conv, PNAConv, TransformerConv

TINY = Setting(size="tiny", seconds=0.01)
CPU = torch.device("cpu")
MODULES = [bench_attention, bench_dynamic_attention, bench_multi_aggregate, bench_step, bench_inference]
AGGREGATORS = ["sum", "mean", "min", "max", "std"]
SCALERS = ["identity", "amplification", "attenuation", "linear", "inverse_linear"]
Make = Callable[[], Any]
CONVS: dict[str, Make] = {
    "gat": lambda: GATConv(16, 8, 4, add_self_loops=False),
    "gat, one head": lambda: GATConv(16, 32, 1, add_self_loops=False),
    "gat, mean of heads, edges": lambda: GATConv(16, 8, 4, concat=False, add_self_loops=False, edge_dim=3),
    "gatv2": lambda: GATv2Conv(16, 8, 4, add_self_loops=False),
    "gatv2, edges": lambda: GATv2Conv(16, 8, 4, add_self_loops=False, edge_dim=3),
    "transformer": lambda: TransformerConv(16, 8, 4),
    "transformer, edges": lambda: TransformerConv(16, 8, 4, edge_dim=3),
    "pna": lambda: PNAConv(16, 16, AGGREGATORS, SCALERS, torch.tensor([0, 3, 5, 2])),
    "pna, towers": lambda: PNAConv(16, 16, ["mean", "var"], SCALERS[:2], torch.tensor([0, 3, 5]), towers=2),
    "pna, edges": lambda: PNAConv(16, 16, AGGREGATORS, SCALERS[:2], torch.tensor([0, 3, 5]), edge_dim=3),
}


@pytest.fixture(autouse=True, scope="module")
def _no_cached_problem() -> Iterator[None]:
    yield
    planted.make_problem.cache_clear()
    bench_step.prepare.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Hides packages from the benchmarks."""
    find = pygas.importlib.util.find_spec
    monkeypatch.setattr(pygas.importlib.util, "find_spec", lambda name: None if name in packages else find(name))


# --- plain torch stands for torch_geometric --------------------------------------------------------------------------


@dataclasses.dataclass
class Sides:
    """A layer in plain torch and in torch_geometric: functions of x, and their parameters."""

    plainly: Callable[[Tensor], Tensor]
    pyg: Callable[[Tensor], Tensor]
    parameters: dict[str, nn.Parameter]
    pyg_parameters: dict[str, nn.Parameter]
    x: Tensor


def sides(make: Make, num_rows: int, dtype: torch.dtype) -> Sides:
    batch = random_batch(num_rows, 6)
    conv = make().to(dtype)
    for parameter in conv.parameters():
        # biases begin at 0, which would hide a missing one
        nn.init.uniform_(parameter, -1, 1)
    edges, _ = plain.edges_of(batch)
    x = torch.randn(batch.num_nodes + batch.num_halo, 16, dtype=dtype)
    edge_attr = None if conv.edge_dim is None else torch.randn(batch.num_edges, conv.edge_dim, dtype=dtype)
    theirs, index = layers.pyg_layer(conv).to(dtype), edges.index
    return Sides(
        lambda x: plain.layer(conv, x, edges, edge_attr),
        lambda x: layers.call_pyg(theirs, x, index, edges, edge_attr),
        dict(conv.named_parameters()),
        dict(theirs.named_parameters()),
        x,
    )


@pytest.mark.interop
@pytest.mark.parametrize("name", CONVS)
def test_plain_layer_is_that_of_torch_geometric(name: str, torch_geometric: ModuleType) -> None:
    both = sides(CONVS[name], 30, torch.float64)
    grad = torch.randn_like(both.pyg(both.x))
    ours = layers.run(both.plainly, both.x, grad, both.parameters, BOTH)
    theirs = layers.run(both.pyg, both.x, grad, both.pyg_parameters, BOTH)
    assert len(ours) == len(theirs) == 2 + len(both.parameters)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.interop
@pytest.mark.parametrize("which", [FORWARD, BOTH])
@pytest.mark.parametrize("name", CONVS)
def test_plain_layer_takes_the_memory_of_torch_geometric(name: str, which: str, torch_geometric: ModuleType) -> None:
    both = sides(CONVS[name], 2000, torch.float32)
    grad = torch.randn_like(both.pyg(both.x))
    ours = peak_of(lambda: layers.run(both.plainly, both.x, grad, both.parameters, which), CPU)
    theirs = peak_of(lambda: layers.run(both.pyg, both.x, grad, both.pyg_parameters, which), CPU)
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.interop
@pytest.mark.parametrize("reduces", [AGGREGATORS, ["mean", "max"], ["std"], ["sum", "var"], ["min", "std"]])
def test_plain_aggregations_are_those_of_torch_geometric(reduces: list[str], torch_geometric: ModuleType) -> None:
    edges, _ = plain.edges_of(random_batch(30, 6))
    message = torch.randn(edges.target.numel(), 5, dtype=torch.float64)
    theirs = torch_geometric.nn.MultiAggregation(reduces)
    expected = theirs(message, edges.target, dim_size=30, dim=0)
    torch.testing.assert_close(plain.multi_aggregate(message, edges, reduces), expected)


# --- all ways agree, and every part gives rows -----------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.removeprefix("bench."))
def test_a_part_gives_rows(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a machine with torch and Triton alone; what other packages give is compared below
    without(monkeypatch, "torch_geometric", "torch_sparse")
    rows = module.measure(TINY)
    assert {row["way"] for row in rows if row["way"] in module.WAYS} == set(module.WAYS)
    missing = [row for row in rows if "missing" in row]
    assert all("pip install" in row["missing"] for row in missing)
    for row in rows:
        if row not in missing:
            assert row["ms"] > 0.0
            assert row["peak_mib"] >= 0.0
    assert not any("target" in row for row in rows), "a tiny input keeps no promise"


@pytest.mark.interop
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.removeprefix("bench."))
def test_ways_of_other_libraries_agree(module: Any, torch_geometric: ModuleType, torch_sparse: ModuleType) -> None:
    for case in module.cases(TINY):
        group = case.build()
        assert set(group.ways) == set(module.WAYS)
        differences = check(case, group)
        assert differences[OURS] == 0.0
        assert max(differences.values()) <= group.tolerance


def test_a_wrong_layer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "gat", lambda conv, x, edges, edge_attr: x.new_ones(edges.num_rows, 8))
    case = bench_attention.cases(TINY)[0]
    with pytest.raises(AssertionError, match=f"answers of {PLAIN} differ"):
        check(case, case.build())


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gat = plain.gat
    monkeypatch.setattr(plain, "gat", lambda conv, x, *rest: gat(conv, x.detach() + 0.9 * (x - x.detach()), *rest))
    case = bench_attention.cases(TINY)[1]
    assert case.keys["pass"] == BOTH
    with pytest.raises(AssertionError, match=f"answers of {PLAIN} differ"):
        check(case, case.build())


def test_ties_are_spared_and_nothing_else() -> None:
    ours = torch.ones(5000)
    theirs = ours.clone()
    theirs[:5] = 2.0
    assert layers.all_but_ties((ours,), (theirs,)) == 0.0
    assert layers.largest_difference((ours,), (theirs,)) == pytest.approx(1 / 2)
    theirs[5] = 3.0
    assert layers.all_but_ties((ours,), (theirs,)) == pytest.approx(1 / 3)
    assert layers.all_but_ties((ours,), (torch.full((5000,), torch.nan),)) == torch.inf


# --- targets ---------------------------------------------------------------------------------------------------------


def rows_of(times: float, memory: float, which: str = BOTH) -> list[Row]:
    keys = {"op": "attention", "pass": which}
    ours = {**keys, "way": OURS, "times_ours": 1.0, "peak_mib": 10.0}
    other = {**keys, "times_ours": times, "peak_mib": 10.0 * memory}
    return [ours, {**other, "way": PLAIN}, {**other, "way": PYG}]


@pytest.mark.parametrize(("times", "memory", "met"), [(3.1, 4.1, True), (2.9, 4.1, False), (3.1, 3.9, False)])
def test_promises_are_held_against_pyg(times: float, memory: float, met: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    promises = {"cpu": [Promise(time=3.0, memory=4.0)]}
    for packages, way in (((), PYG), (("torch_geometric",), PLAIN)):
        monkeypatch.setattr(layers, "missing_pyg", lambda packages=packages: "absent" if packages else None)
        rows = layers.hold_to(rows_of(times, memory), Setting(), promises)
        judged = [row for row in rows if "target" in row]
        assert [(row["way"], row["target"], row["met"]) for row in judged] == [(way, ">= 3x, >= 4x memory", met)]
    assert not any("met" in row for row in layers.hold_to(rows_of(times, memory, FORWARD), Setting(), promises))
    assert not any("met" in row for row in layers.hold_to(rows_of(times, memory), TINY, promises))


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bench_step.HIDDEN)
def test_losses_agree_with_the_plain_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch_sparse")
    assert not pygas.is_compiled_for(CPU)
    case = Case("step", {"model": name}, lambda: bench_step.make(TINY, name, "device"))
    bench_step.prepare.cache_clear()
    assert check(case, case.build())[bench_step.PYGAS] < 1e-3


@pytest.mark.interop
@pytest.mark.parametrize("name", bench_step.HIDDEN)
def test_losses_agree_with_torch_sparse(name: str, torch_sparse: ModuleType) -> None:
    assert pygas.is_compiled_for(CPU)
    case = Case("step", {"model": name}, lambda: bench_step.make(TINY, name, "device"))
    bench_step.prepare.cache_clear()
    assert check(case, case.build())[bench_step.PYGAS] < 1e-3


def test_a_push_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def pull_only(self: pygas.Historical, table: Tensor, x: Tensor, step: pygas.Step) -> Tensor:
        return torch.cat([x, table.index_select(0, step.halo_ids)])

    monkeypatch.setattr(pygas.Historical, "push_and_pull", pull_only)
    case = bench_step.cases(TINY)[0]
    with pytest.raises(AssertionError, match="answers of PyGAS's way differ"):
        check(case, case.build())


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_adjacency_multiplies_and_gives_gradients(reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch_sparse")
    batch = random_batch(30, 6)
    adjacency = pygas.Adjacency(batch)
    x = torch.randn(batch.num_nodes + batch.num_halo, 5, requires_grad=True)
    source, target = batch.edge_index
    message = x[source] if reduce == "max" else x[source] * batch.edge_weight[:, None]
    index, name = target[:, None].expand_as(message), {"max": "amax"}.get(reduce, reduce)
    expected = torch.zeros(30, 5).scatter_reduce(0, index, message, name, include_self=False)
    out = adjacency.matmul(x, reduce)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (out, expected)))


def test_classes_make_batches_that_lie_together() -> None:
    problem = planted.make_problem(2000, 20, 4, CPU)
    loader = problem.loader("GCN")
    batches = list(loader.in_order())
    assert [batch.num_nodes for batch in batches] == problem.sizes
    inside = sum(batch.inner.num_edges for batch in batches) / loader.graph.num_edges
    assert inside > 0.6
    is_train = problem.target != planted.IGNORED
    assert 0.05 < float(is_train.double().mean()) < 0.15
    assert torch.equal(problem.target[is_train], problem.y[is_train])


def test_steps_promise_nothing_on_a_cpu_and_much_on_a_gpu() -> None:
    row = {"op": "step", "histories": "pinned", "way": bench_step.PYGAS, "times_ours": 4.0}
    bench_step.hold_to_promise(row, Setting())
    assert "met" not in row
    on_gpu = Setting(torch.device("cuda"))
    bench_step.hold_to_promise(row, on_gpu)
    assert (row["target"], row["met"]) == (">= 5x", False)
    hidden = {"op": "step", "histories": "pinned", "way": OURS, "hidden": 0.96}
    bench_step.hold_to_promise(hidden, on_gpu)
    assert (hidden["target"], hidden["met"]) == (">= 95% hidden", True)


def test_a_deadline_ends_the_steps() -> None:
    setting = dataclasses.replace(TINY, deadline=0.0)
    assert bench_step.measure(setting) == []
    assert setting.progress.cut == "cut short after 0 of 2 cases"

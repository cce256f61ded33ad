"""The benchmarks of aggregate, push and pull, and the inputs that they share: equal answers, counted traffic."""

import importlib.util
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import bench_aggregate, bench_pull, bench_push
from bench.bench_aggregate import BOTH, FORWARD, Shape
from bench.groups import Group, Setting, check, measure_cases
from bench.inputs import make_inputs, make_store, make_tables, random_batch
from bench.roofline import Ceilings
from bench.tables import OURS
from gas_triton import functional
from gas_triton.functional import Quantized
from gas_triton.history.store import HistoryStore

LIMITS = Ceilings(4300.0, 5500.0, 40_000_000, 50.0, upload_gbps=50.0, download_gbps=50.0)
TINY = Setting(size="tiny", seconds=0.0, ceilings=LIMITS)


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", ["uniform", "power law", "one hub"])
@pytest.mark.parametrize("halo_share", [0.0, 0.25, 0.9])
def test_a_batch_has_the_shape_that_was_asked_for(degrees: Any, halo_share: float) -> None:
    batch = random_batch(500, 12, halo_share=halo_share, degrees=degrees)
    assert (batch.num_nodes, batch.num_edges) == (500, 6000)
    assert batch.outer.num_edges == 6000 * halo_share
    count = (batch.inner.rowptr + batch.outer.rowptr).diff().sort(descending=True).values
    if degrees == "uniform":
        assert set(count.tolist()) == {12}
    elif degrees == "one hub":
        assert count[0] >= 500
        assert set(count[1:].tolist()) <= {11, 12}
    else:
        # of a density that falls with the power 2.5, an eighth of the rows has 4 ** (2 / 3) times the median's edges
        assert int(count[62]) / int(count[250]) == pytest.approx(4 ** (2 / 3), rel=0.2)
        assert int(count[0]) > 100
        assert int(count[-1]) >= 3


def test_rows_lie_in_a_graph_as_in_a_real_batch() -> None:
    batch = random_batch(500, 12, degrees="power law")
    ids, halo = batch.node_ids, batch.halo_ids
    assert batch.spans.shape == (10, 2)
    assert torch.equal(ids, torch.cat([torch.arange(first, last) for first, last in batch.spans.tolist()]))
    assert int(batch.spans[-1, 0]) > 0.8 * batch.graph_nodes
    # halo rows are anywhere, and none is in the batch
    assert not set(ids.tolist()) & set(halo.tolist())
    assert torch.equal(halo, halo.sort().values)
    spread = halo.double() / batch.graph_nodes
    assert float(spread.mean()) == pytest.approx(0.5, abs=0.05)
    # about as many as one in 2.7 edges to the halo
    assert batch.num_halo == pytest.approx(1500 / 2.7, rel=0.1)
    # rows of a cluster descend by degree, columns of a row ascend
    count = (batch.inner.rowptr + batch.outer.rowptr).diff().split(50)
    assert all(bool((part.diff() <= 0).all()) for part in count)
    for rowptr, col in (batch.inner, batch.outer):
        starts = set(rowptr.tolist())
        assert all(place + 1 in starts for place in (col.diff() < 0).nonzero().squeeze(1).tolist())


def test_a_batch_is_the_same_each_time_and_another_with_another_seed() -> None:
    first, again, other = (random_batch(100, 6, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.outer.col, again.outer.col)
    assert torch.equal(first.edge_weight, again.edge_weight)
    assert not torch.equal(first.inner.col[:50], other.inner.col[:50])


def test_popular_sources_are_read_more() -> None:
    uniform, zipf = (
        torch.bincount(random_batch(2000, 20, halo_share=0.0, popularity=kind).inner.col, minlength=2000)
        for kind in ("uniform", "zipf 0.8")
    )
    assert int(uniform.max()) < 50
    # the most popular of n rows has 1 / sum(k ** -0.8) of the reads
    expected = 40_000 / float(torch.arange(1, 2001).double().pow(-0.8).sum())
    assert int(zipf.max()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"halo_share": 0.95}, "halo_share must be from 0 to 0.9, got 0.95"),
        ({"degrees": "some"}, "degrees must be 'uniform', 'power law' or 'one hub', got 'some'"),
        ({"popularity": "some"}, "popularity must be 'uniform' or 'zipf 0.8', got 'some'"),
        ({"num_nodes": 10}, "num_nodes must be at least"),
    ],
)
def test_inputs_that_cannot_be(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_batch(10, 4, **arguments)


@pytest.mark.parametrize("history_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_cat_holds_the_rows_that_ours_reads(history_dtype: torch.dtype) -> None:
    inputs = make_inputs(60, 8, 12, halo_share=0.5, history_dtype=history_dtype)
    batch, history = inputs.batch, inputs.history
    if isinstance(history, Quantized):
        table = history.rows.float() * history.scale[:, None]
    else:
        table = history.float()
    assert torch.equal(inputs.cat(inputs.x), torch.cat([inputs.x, table[batch.halo_ids]]))
    ours = functional.aggregate(inputs.x, batch, history, edge_weight=batch.edge_weight)
    rowptr, col, _ = batch.joint()
    size = (60, 60 + batch.num_halo)
    adjacency = torch.sparse_csr_tensor(rowptr, col, inputs.joint_weight, size=size, check_invariants=False).to_dense()
    torch.testing.assert_close(ours, adjacency @ inputs.cat(inputs.x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tier", ["device", "pinned", "file"])
def test_plain_tables_are_like_those_of_a_history(tier: str) -> None:
    store = make_store(tier, 20, 6, torch.int8, torch.device("cpu"))
    table, scale = make_tables(tier, 20, 6, torch.int8, torch.device("cpu"))
    assert (store.table.shape, store.dtype, store.tier) == (table.shape, table.dtype, tier)
    assert scale is not None
    assert store.scale is not None
    assert torch.equal(store.scale, scale)
    assert make_tables(tier, 20, 6, torch.float32, torch.device("cpu"))[1] is None


# --- aggregate --------------------------------------------------------------------------------------------------------


def small_base(setting: Setting) -> Shape:
    return Shape(40, 6, 8)


def test_every_shape_gives_equal_answers_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_aggregate, "base_shape", small_base)
    setting = Setting(size="full", seconds=0.0, ceilings=LIMITS)
    for case in bench_aggregate.cases(setting):
        group = case.build()
        check(case, group)
        assert set(group.ways) | set(group.missing) <= set(bench_aggregate.WAYS)
        ways = [OURS, bench_aggregate.BAG]
        assert list(group.ways)[: len(ways)] == ways, group.missing
        assert group.traffic is not None
        if case.keys["dtype"] == "float32":
            assert bench_aggregate.SPARSE in group.ways, group.missing
        if case.keys["reduce"] == "max" or case.keys == bench_aggregate.cases(setting)[0].keys:
            assert bench_aggregate.SCATTER in group.ways


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_one_thing_is_changed_at_a_time(kind: str) -> None:
    setting = Setting(torch.device(kind))
    base = bench_aggregate.base_shape(setting)
    found = [shape for shape, _ in bench_aggregate.shapes(setting)]
    assert found[0] == base
    assert len(set(found)) == len(found)
    for shape in found[1:]:
        changed = {key for key in vars(base) if getattr(shape, key) != getattr(base, key)}
        # a maximum on a CPU is of fewer rows, because it takes so long
        assert len(changed) == 1 or changed == {"reduce", "rows"}
    values = {key: {getattr(shape, key) for shape in found} for key in vars(base)}
    assert values["features"] == {32, 64, 128, 256, 512}
    assert values["dtype"] == {"float32", "bfloat16", "int8 history"}
    assert values["reduce"] == {"sum", "mean", "max"}
    assert values["halo"] == {0.0, 0.25, 0.5, 0.9}
    assert values["degrees"] == {"uniform", "power law", "one hub"}
    assert values["degree"] == ({15, 50} if kind == "cuda" else {25})


@pytest.mark.interop
def test_aggregate_is_compared_with_pygas_and_pyg(torch_sparse: ModuleType, torch_geometric: ModuleType) -> None:
    rows = bench_aggregate.measure(TINY)
    base = [row for row in rows if (row["pass"], row["reduce"], row["dtype"]) == (FORWARD, "sum", "float32")]
    assert [row["way"] for row in base] == [
        OURS, bench_aggregate.BAG, bench_aggregate.SPARSE, bench_aggregate.PYGAS, bench_aggregate.SCATTER,
        bench_aggregate.PYG,
    ]  # fmt: skip
    assert not any("missing" in row for row in base)


def test_a_wrong_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.aggregate
    case = bench_aggregate.cases(TINY)[0]
    check(case, case.build())
    monkeypatch.setattr(bench_aggregate.functional, "aggregate", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(AssertionError, match=r"aggregate, forward, .* differ from ours by"):
        check(case, case.build())


def test_only_ties_may_differ_in_the_gradient_of_a_maximum() -> None:
    theirs = torch.randn(100, 100)
    ours = theirs.clone()
    assert bench_aggregate.share_of_differences(ours, theirs) == 0.0
    ours[0, :10] += 1.0
    assert bench_aggregate.share_of_differences(ours, theirs) == 1e-3
    ours[1] = torch.nan
    assert bench_aggregate.share_of_differences(ours, theirs) == pytest.approx(0.011)


def test_without_packages_the_rest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = ("torch_sparse", "torch_geometric")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    rows = measure_cases(bench_aggregate.cases(TINY)[:1], TINY)
    missing = {row["way"]: row["missing"] for row in rows if "missing" in row}
    assert "pip install 'gas-triton[sparse]'" in missing[bench_aggregate.PYGAS]
    assert "pip install 'gas-triton[pyg]'" in missing[bench_aggregate.PYG]
    assert len(rows) == len(bench_aggregate.WAYS)


def test_a_way_that_torch_cannot_compute_is_missing() -> None:
    def unable() -> torch.Tensor:
        raise RuntimeError('"bag" not implemented for "Half"\nmore')

    found, missing = bench_aggregate.able({OURS: lambda: torch.ones(1), "bag": unable, "other": lambda: torch.ones(1)})
    assert list(found) == [OURS, "other"]
    assert missing == {"bag": '"bag" not implemented for "Half"'}


def row_of(setting: Setting, **changed: Any) -> dict[str, Any]:
    keys = {**vars(bench_aggregate.base_shape(setting)), "pass": FORWARD, "way": OURS, "times_ours": 1.0, "light": 0.7}
    return {**keys, **changed}


def test_targets_are_those_of_the_base_case() -> None:
    cpu, cuda = Setting(torch.device("cpu")), Setting(torch.device("cuda"))

    def verdict(setting: Setting, **changed: Any) -> tuple[str | None, bool | None]:
        (row,) = bench_aggregate.hold_to_targets([row_of(setting, **changed)], setting)
        return row.get("target"), row.get("met")

    slow = {"way": bench_aggregate.PYGAS, "times_ours": 4.0}
    assert verdict(cpu, **slow) == (">= 5x our time", False)
    assert verdict(cpu, **slow, **{"pass": BOTH}) == (">= 3x our time", True)
    assert verdict(cpu, **slow, features=64) == (None, None)
    assert verdict(cpu) == (None, None)
    assert verdict(cuda, way=bench_aggregate.SPARSE, times_ours=3.5) == (">= 3x our time", True)
    assert verdict(cuda, way=bench_aggregate.BAG, times_ours=1.2) == (">= 1.3x our time", False)
    assert verdict(cuda) == verdict(cuda, features=512) == (">= 80% of the speed of light", False)
    assert verdict(cuda, features=32) == (">= 60% of the speed of light", True)
    assert verdict(cuda, reduce="mean") == (None, None)
    assert verdict(TINY, **slow) == (None, None)


# --- push, pull -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("module", [bench_push, bench_pull, bench_aggregate])
def test_rows_are_complete(module: ModuleType) -> None:
    rows = module.measure(TINY)
    assert json.loads(json.dumps(rows)) == rows
    cases = module.cases(TINY)
    identity = [tuple((key, row[key]) for key in cases[0].keys) for row in rows]
    assert list(dict.fromkeys(identity)) == [tuple(case.keys.items()) for case in cases]
    for row in rows:
        assert row["way"] in module.WAYS
        if "missing" not in row:
            assert row["ms"] > 0.0
            assert row["light"] > 0.0
            assert row["bound"] in ("memory", "cache")


@pytest.mark.parametrize("module", [bench_push, bench_pull])
def test_tiers_and_dtypes(module: ModuleType) -> None:
    keys = [(case.keys["tier"], case.keys["dtype"]) for case in module.cases(Setting(torch.device("cuda")))]
    everything = {(tier, dtype) for tier in ("device", "pinned", "file") for dtype in ("float32", "bfloat16", "int8")}
    assert set(keys) == everything


def test_a_push_that_leaves_a_row_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = HistoryStore.push

    def without_first(self: HistoryStore, x: torch.Tensor, batch: Any) -> None:
        right(self, x.index_fill(0, torch.tensor([0]), 0.0), batch)

    monkeypatch.setattr(HistoryStore, "push", without_first)
    for case in bench_push.cases(TINY)[:3]:
        with pytest.raises(AssertionError, match=r"(index_copy_|table\[ids\] = x|PyGAS|unchecked) differ from ours"):
            check(case, case.build())


def test_a_pull_of_other_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_pull.halo_rows
    monkeypatch.setattr(bench_pull, "halo_rows", lambda *arguments: right(*arguments).roll(1, 0))
    for case in bench_pull.cases(TINY)[:4]:
        with pytest.raises(AssertionError, match="index_select differ from ours"):
            check(case, case.build())


def test_shuffled_ids_are_the_same_rows() -> None:
    ascending, shuffled = (bench_pull.build("device", torch.float32, ids, 20, torch.device("cpu")) for ids in
                           ("ascending", "shuffled"))  # fmt: skip
    rows, mixed = (next(iter(group.ways.values()))() for group in (ascending, shuffled))
    assert isinstance(rows, torch.Tensor)
    assert isinstance(mixed, torch.Tensor)
    assert rows.shape == mixed.shape
    assert rows.shape[0] > 10


def test_rows_that_leave_a_gpu_are_counted_on_the_bus() -> None:
    batch = random_batch(20, 10, halo_share=0.5)
    on_gpu = type("Placed", (), {"device": torch.device("cuda"), "num_nodes": 20, "num_halo": batch.num_halo})()
    pushed = bench_push.traffic_of(on_gpu, "pinned", torch.int8)
    assert (pushed.downloaded, pushed.streamed) == (20 * (128 + 4), 20 * (4 * 128 + 8))
    pulled = bench_pull.traffic_of(on_gpu, "file", torch.bfloat16)
    assert (pulled.uploaded, pulled.streamed) == (batch.num_halo * 256, batch.num_halo * (8 + 512))
    here = bench_pull.traffic_of(batch, "pinned", torch.int8)
    assert here.least_bytes == batch.num_halo * (8 + 512 + 128 + 4)
    assert bench_push.traffic_of(batch, "pinned", torch.int8).least_bytes == 20 * (4 * 128 + 8 + 128 + 4 + 4)


class Benchmark:
    """Stands for pytest-benchmark's fixture."""

    group = ""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, way: Callable[[], object]) -> None:
        way()
        self.ran.append(self.group)


def test_a_group_is_made_once_for_all_of_its_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    made, build, benchmark = [], bench_pull.build, Benchmark()

    def count(*arguments: Any) -> Group:
        made.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(bench_pull, "build", count)
    cases = bench_pull.cases(TINY)[:2]
    for case in cases:
        for way in bench_pull.WAYS:
            bench_pull.test_pull(benchmark, case, way)
    assert len(made) == 2
    assert benchmark.ran == [case.title for case in cases for _ in bench_pull.WAYS]

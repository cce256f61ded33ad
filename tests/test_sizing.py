"""The arithmetic of memory: against what steps take, against the tables that histories make, and what fits a budget."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gas_triton as gas
from gas_triton.batch import Batch
from gas_triton.datasets import generate
from gas_triton.memory import peak_bytes
from gas_triton.models import MODELS
from gas_triton.sizing import (
    BatchSize,
    Budget,
    ModelSize,
    Problem,
    StepOptions,
    candidates,
    feature_bytes,
    fit,
    graph_bytes,
    history_bytes,
    history_dims,
    plan_bytes,
    slot_bytes,
    state_bytes,
    step_bytes,
)

NUM_NODES, NUM_FEATURES, NUM_CLASSES = 4000, 48, 10


def problem(num_copies: int = 1) -> gas.Graph:
    """Disjoint copies of one graph."""
    edges = generate(NUM_NODES, 40_000, NUM_CLASSES, NUM_FEATURES).edge_index
    shift = torch.arange(num_copies) * NUM_NODES
    edge_index = (edges[:, None] + shift[:, None]).reshape(2, -1)
    return gas.Graph.from_edge_index(edge_index, num_nodes=num_copies * NUM_NODES)


def make_loader(model: str, num_copies: int = 1) -> gas.ClusterLoader:
    """Batches of ranges of ids, four to a copy."""
    graph = problem(num_copies)
    parts = gas.contiguous_partition(graph, [NUM_NODES // 4] * (4 * num_copies))
    total = graph.num_nodes
    x, y = torch.randn(total, NUM_FEATURES), torch.randint(NUM_CLASSES, (total,))
    graph, x, y = parts.permute(graph, x, y)
    return gas.ClusterLoader(MODELS[model].prepare(graph), parts, 1, shuffle=False, x=x, y=y)


def make_step(model: nn.Module):
    optimizer = torch.optim.Adam(model.parameters())

    def step(batch: Batch) -> None:
        out = model(batch.features, batch)
        loss = F.cross_entropy(out, batch.y)
        del out
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(size: ModelSize, halo: str = "read", full: bool = False, num_copies: int = 1) -> tuple[int, BatchSize]:
    """(peak of a step after one that made Adam's moments, the sizes of its batch)."""
    loader, model = make_loader(size.name, num_copies), size.make("cpu")
    for module in model.modules():
        if hasattr(module, "halo"):
            module.halo = halo
    if halo == "read" and not full:
        gas.attach_histories(model, loader.graph.num_nodes)
    step = make_step(model)
    if full:
        batch = loader.full()
        step(batch)
        with peak_bytes("cpu") as peak:
            step(batch)
        return peak.nbytes, BatchSize.of(batch, is_planned=False)
    step(loader.batch([0]))
    with peak_bytes("cpu") as peak:
        batch = loader.batch([1])
        step(batch)
    return peak.nbytes, BatchSize.of(batch)


def predict(size: ModelSize, batch: BatchSize, halo: str = "read") -> int:
    weighted = size.name == "GCN"
    return step_bytes(size.make(), batch, StepOptions("cpu", weighted=weighted, halo=halo == "read"))


def gcn(layers: int = 2, hidden: int = 64, dropout: float = 0.5, name: str = "GCN") -> ModelSize:
    return ModelSize(name, NUM_FEATURES, hidden, NUM_CLASSES, layers, dropout)


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize(("hidden", "dropout"), [(16, 0.0), (64, 0.5), (256, 0.0), (256, 0.5)])
def test_a_gcn_step_is_predicted_within_two_percent(layers: int, hidden: int, dropout: float) -> None:
    size = gcn(layers, hidden, dropout)
    measured, batch = measure(size)
    assert batch.halo > batch.nodes // 2
    assert predict(size, batch) == pytest.approx(measured, rel=0.02)


def test_the_halo_is_summed_apart_on_a_cpu() -> None:
    # one layer is at its peak there
    size = gcn(1, 16, 0.0)
    measured, batch = measure(size)
    assert predict(size, batch) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(("model", "within"), [("SAGE", 0.02), ("GIN", 0.02), ("GAT", 0.1)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_steps_of_other_models_are_predicted(model: str, within: float, dropout: float) -> None:
    size = gcn(3, 32, dropout, model)
    measured, batch = measure(size)
    assert predict(size, batch) == pytest.approx(measured, rel=within)


@pytest.mark.parametrize("model", ["GCN", "SAGE", "GIN", "GAT"])
@pytest.mark.parametrize("way", ["drop", "full"])
def test_steps_without_histories_are_predicted(model: str, way: str) -> None:
    size = gcn(3, 64, 0.5, model)
    halo = "drop" if way == "drop" else "read"
    measured, batch = measure(size, halo, full=way == "full")
    assert predict(size, batch, halo) == pytest.approx(measured, rel=0.1 if model == "GAT" else 0.02)


def test_a_step_is_the_same_at_any_number_of_nodes() -> None:
    measured, batch = measure(gcn())
    of_more, same = measure(gcn(), num_copies=6)
    assert same == batch
    assert of_more == pytest.approx(measured, rel=1e-3)


def test_more_of_anything_takes_more() -> None:
    model, batch = gcn().make(), BatchSize(1000, 800, 9000, 4000)
    least = step_bytes(model, batch)
    for name in ("nodes", "halo", "inner", "outer"):
        assert step_bytes(model, replace(batch, **{name: 10 * getattr(batch, name)})) > least
    assert step_bytes(gcn(layers=5).make(), batch) > least
    # a Triton kernel drops halo rows where it reads them, the CPU's copies them
    assert step_bytes(model, batch, StepOptions("cpu")) > step_bytes(model, batch, StepOptions("cuda"))


def test_what_stays_is_exact() -> None:
    loader, model = make_loader("GCN"), gcn(3).make("cpu")
    graph, optimizer = loader.graph, torch.optim.Adam(model.parameters())
    tensors = [graph.rowptr, graph.col, graph.weight, loader._planner._local]
    assert graph_bytes(graph.num_nodes, graph.num_edges, True) == sum(t.nbytes for t in tensors if t is not None)
    assert feature_bytes(graph.num_nodes, NUM_FEATURES) == loader.x.nbytes + loader.node_tensors["y"].nbytes
    for dtype in ("float32", "bfloat16", "int8"):
        tables = gas.attach_histories(model, graph.num_nodes, dtype=getattr(torch, dtype))
        times = sum(store.last_push.nbytes for store in tables.values())
        found = sum(t.nbytes for store in tables.values() for t in store._tensors.values()) + times
        assert history_bytes(graph.num_nodes, history_dims(model), dtype) == found
    make_step(model)(loader.batch([0]))
    model(loader.batch([0]).features, loader.batch([0])).sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    kept = sum(t.nbytes for t in (*moments, *model.parameters()))
    assert state_bytes(model) == state_bytes(gcn(3).make()) == kept


def test_a_plan_is_exact() -> None:
    loader = make_loader("GCN")
    batch = loader.batch([2])
    tensors = [batch.node_ids, batch.halo_ids, *batch.inner, *batch.outer, batch.outer_slot, batch.edge_weight]
    kept = sum(t.nbytes for t in (*tensors, *batch._places) if t is not None)
    assert plan_bytes(BatchSize.of(batch), StepOptions()) == pytest.approx(kept, abs=64)


def test_slots_are_those_that_are_made() -> None:
    loader, model = make_loader("GCN"), gcn(3).make("cpu")
    with pytest.warns(UserWarning, match="no CUDA device"):
        histories = gas.attach_histories(model, loader.graph.num_nodes, "pinned", torch.int8)
    step, halo = make_step(model), 0
    for batch in histories.prefetch(loader):
        step(batch)
        halo = max(halo, batch.num_halo)
    made = histories.memory_stats()["staged"]
    largest = BatchSize(1, halo, 0, 0)
    # each slot grows to the largest batch that it was given to
    assert 0.9 * slot_bytes(largest, [64, 64], "int8") < made <= slot_bytes(largest, [64, 64], "int8")


# --- what fits --------------------------------------------------------------------------------------------------------

GRAPH = Problem(num_nodes=1_000_000, num_edges=20_000_000, num_features=100, num_classes=40)
GB = 10**9


def found(device: float, host: float, disk: float | None = None, **options):
    budget = Budget(int(device * GB), int(host * GB), None if disk is None else int(disk * GB))
    return list(candidates(GRAPH, ModelSize("GCN", 100, 256, 40, 3), budget, **options))


def test_the_fastest_way_that_fits_is_chosen() -> None:
    everything = fit(found(80, 256))
    assert everything is not None
    assert (everything.tier, everything.num_parts) == ("full-batch", 1)
    without_full = fit(found(80, 256, num_parts=[20, 80]))
    assert without_full is not None
    assert (without_full.tier, without_full.num_parts) == ("device", 20)
    full, tables = everything.device, without_full.histories
    assert tables == 2 * GRAPH.num_nodes * (256 * 4 + 4)
    # too small for the tables beside the rest, so they go to the host; and to files when that is full
    small = (without_full.device - tables / 2) / 0.9 / GB
    assert small * GB < full
    pinned, file = fit(found(small, 16, num_parts=[20, 80, 320])), fit(found(small, 1, 9, num_parts=[20, 80, 320]))
    assert pinned is not None
    assert file is not None
    assert (pinned.tier, pinned.host, pinned.disk) == ("pinned", tables, 0)
    assert (file.tier, file.host, file.disk) == ("file", 0, tables)
    assert pinned.slots == slot_bytes(pinned.batch, [256, 256]) > 0
    assert fit(found(0.1, 16)) is None


def test_a_candidate_adds_up_and_says_what_is_short() -> None:
    for candidate in found(3, 1, history_dtypes=["float32", "int8"]):
        device = candidate.state + candidate.graph + candidate.plans + candidate.features
        device += candidate.slots + candidate.step + (candidate.histories if candidate.tier == "device" else 0)
        assert candidate.device == device
        assert candidate.fits == (candidate.device <= 0.9 * 3 * GB and candidate.host <= 0.8 * GB)
        assert candidate.fits == (candidate.reason == "")
    reasons = {candidate.reason for candidate in found(3, 1)}
    assert {"device", "host"} <= reasons


def test_a_batch_of_all_parts_holds_all_rows_and_no_halo() -> None:
    assert GRAPH.batch(10, 10) == BatchSize(GRAPH.num_nodes, 0, GRAPH.num_edges, 0)
    batch = replace(GRAPH, halo_ratio=3.0).batch(40, 2, has_loops=True)
    assert (batch.nodes, batch.halo) == (50_000, 150_000)
    assert batch.edges == 1_000_000 + 50_000
    assert batch.outer == 750_000
    # no more halo rows than there are others
    assert replace(GRAPH, halo_ratio=30.0).batch(4, 2).halo == 500_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nodes": 0}, "num_nodes: expected a positive int, got 0"),
        ({"num_edges": 1.5}, "num_edges: expected a positive int, got 1.5"),
        ({"halo_ratio": -1.0}, "halo_ratio: expected a number of at least 0, got -1.0"),
    ],
)
def test_sizes_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GRAPH, **change)


def test_a_model_without_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected one of GCN, SAGE, GIN, GAT.*got APPNP"):
        step_bytes(ModelSize("APPNP", 4, 8, 3, 2).make(), BatchSize(10, 10, 10, 10))
    with pytest.raises(ValueError, match=r"history_dtype: expected one of float32.*got 'int4'"):
        history_bytes(10, [4], "int4")

"""Aggregated features: the first layer without its halo, against the layer with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gas_triton.static
from bench import bench_epoch, bench_static
from gas_triton import Batch, ClusterLoader, Features, attach_histories, cli, functional, inference, random_partition
from gas_triton.datasets import Dataset, generate
from gas_triton.models import GCN, GIN, SAGE, Stack
from gas_triton.nn import GCNConv, SAGEConv
from gas_triton.training import TrainConfig, train

from .reference import GRAPHS, block
from .test_nn import CASES, CLUSTERS, Case, assert_same, gradients, make_loader, state_of

USING = {name: case for name, case in CASES.items() if "project" not in name}
MODELS: dict[str, tuple[type[Stack], dict[str, Any]]] = {
    "gcn": (GCN, {"normalize": False}),
    "gcn residual": (GCN, {"normalize": False, "residual": True, "batch_norm": True}),
    "sage": (SAGE, {}),
    "sage max": (SAGE, {"aggr": "max"}),
    "gin": (GIN, {}),
}
TIERS = ["device", "pinned", "file", "auto"]


def aggregated(loader: ClusterLoader, layer: Any, **options: Any) -> ClusterLoader:
    """The loader, with the table that a layer or model reads."""
    loader.aggregate_features(**layer.static_input._asdict(), **options)
    return loader


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("neighbours were aggregated")


@pytest.fixture
def no_aggregation(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, no layer aggregates."""
    return lambda: monkeypatch.setattr(functional, "aggregate", refuse)


def batches_of(loader: ClusterLoader) -> dict[str, Batch]:
    return {"several clusters": loader.batch(CLUSTERS), "one cluster": loader.batch([3]), "full": loader.full()}


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GRAPHS])
@pytest.mark.parametrize("case", USING.values(), ids=USING)
def test_output_and_gradients_are_those_of_plain_torch(
    case: Case, name: str, no_aggregation: Callable[[], None]
) -> None:
    graph = GRAPHS[name].graph()
    parts = random_partition(graph, min(6, graph.num_nodes))
    x = torch.randn(graph.num_nodes, case.in_channels, dtype=torch.float64)
    conv = case.ours()
    loader = aggregated(ClusterLoader(parts.permute(graph), parts, x=x), conv)
    no_aggregation()
    for batch in (loader.batch([*range(parts.num_parts)][:2]), loader.batch([parts.num_parts - 1]), loader.full()):
        state = state_of(conv)
        expected = case.reference(state, batch.x, block(loader.graph, batch.node_ids.tolist()))
        leaves = [state[name] for name, _ in conv.named_parameters()]
        assert_same(conv(batch.features, batch), expected, list(conv.parameters()), leaves)


@pytest.mark.parametrize("case", USING.values(), ids=USING)
def test_the_halo_is_not_read(case: Case) -> None:
    conv = case.ours()
    loader = aggregated(make_loader(num_features=case.in_channels), conv)
    batch = loader.batch(CLUSTERS)
    expected = conv(batch.features, batch)
    assert batch.num_halo > 0
    # through .data, which does not count as a change
    loader.x.data[batch.halo_ids] = torch.nan
    for is_read_again in (False, True):
        batch = loader.batch(CLUSTERS) if is_read_again else batch
        assert torch.equal(conv(batch.features, batch), expected)
        assert "x" not in batch._sliced


@pytest.mark.parametrize("batch_size", [1, 4, 6])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
def test_the_whole_graph_has_the_same_bits(reduce: Any, batch_size: int) -> None:
    graph = GRAPHS["weighted_directed"].graph()
    parts = random_partition(graph, 6)
    loader = ClusterLoader(parts.permute(graph), parts, batch_size, x=torch.randn(30, 5))
    batch = loader.full()
    for weight in (None, batch.edge_weight):
        plain = functional.aggregate(batch.features, batch, reduce=reduce, edge_weight=weight)
        table = loader.aggregate_features(reduce, weight is not None)
        assert torch.equal(table.rows, plain)
        # the rows of the whole graph are the table, not a copy
        static = loader.full().features.static_rows(reduce, weight is not None)
        assert static is not None
        assert static.data_ptr() == table.rows.data_ptr()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "dtype, unit", [(torch.float64, 0), (torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_a_table_of_any_tier_and_dtype_is_the_product(
    tier: str, dtype: torch.dtype, unit: float, tmp_path: Path
) -> None:
    conv = CASES["gcn"].ours()
    loader = make_loader()
    table = loader.aggregate_features(
        tier=tier, dtype=None if unit == 0 else dtype, path=tmp_path if tier == "file" else None
    )
    product = GRAPHS["weighted_directed"].scipy()[loader.parts.perm.numpy()][:, loader.parts.perm.numpy()] @ loader.x
    exact = torch.from_numpy(np.asarray(product))
    assert (table.rows.dtype, table.nbytes) == (dtype, 30 * 6 * dtype.itemsize)
    assert table.tier == (tier if tier != "auto" else "device")
    assert bool(((table.rows.double() - exact).abs() <= unit * exact.abs() + 1e-14 * exact.abs().max()).all())
    assert f"sum, weighted, [30, 6] {str(dtype)[6:]}" in repr(table)
    assert not [*tmp_path.iterdir()]
    for batch in batches_of(loader).values():
        rows = table.rows.double()[batch.node_ids]
        state = state_of(conv)
        expected = F.linear(rows, state["lin.weight"], state["bias"])
        leaves = [state[name] for name, _ in conv.named_parameters()]
        assert_same(conv(batch.features, batch), expected, list(conv.parameters()), leaves)


def test_narrow_features_are_summed_before_they_are_rounded() -> None:
    loader = make_loader()
    loader.x = loader.x.bfloat16()
    exact = functional.aggregate(loader.x.double(), loader.full(), edge_weight=loader.graph.weight)
    for dtype in (None, torch.float32):
        rows = loader.aggregate_features(dtype=dtype).rows
        assert rows.dtype == (dtype or torch.bfloat16)
        assert bool(((rows.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all())
        assert loader.full().static_rows("sum", True).dtype == torch.bfloat16


def test_hub_rows_are_aggregated_too() -> None:
    hub = torch.stack([torch.arange(1500) % 40, torch.zeros(1500, dtype=torch.int64)])
    graph = gas_triton.Graph.from_edge_index(hub, num_nodes=40)
    x = torch.randn(40, 3, dtype=torch.float64)
    parts = random_partition(graph, 4)
    graph, x = parts.permute(graph, x)
    loader = ClusterLoader(graph, parts, x=x)
    rows = loader.aggregate_features("mean", False).rows
    place = int((parts.perm == 0).nonzero())
    count = torch.bincount(hub[0], minlength=40).double()[parts.perm]
    expected = torch.zeros(40, 3, dtype=torch.float64)
    expected[place] = count @ x / 1500
    torch.testing.assert_close(rows, expected)


def test_without_weights_both_sums_are_one_table() -> None:
    loader = make_loader("symmetric")
    table = loader.aggregate_features(weighted=True)
    assert [*loader.static] == [("sum", False)]
    assert loader.full().static_rows("sum", True) is not None
    assert torch.equal(loader.full().static_rows("sum", True), table.rows)
    weighted = make_loader("weighted_symmetric")
    weighted.aggregate_features()
    assert weighted.full().static_rows("sum", False) is None


# --- where it does not apply -----------------------------------------------------------------------------------------


def plain_and_static(case: Case, conv: nn.Module) -> tuple[Batch, Batch]:
    plain = make_loader(num_features=case.in_channels)
    static = make_loader(num_features=case.in_channels)
    for reduce in ("sum", "mean", "max", "min"):
        static.aggregate_features(reduce, weighted=False)
    static.aggregate_features()
    return plain.batch(CLUSTERS), static.batch(CLUSTERS)


def without_edges(batch: Batch) -> Batch:
    batch.has_all_edges = False
    return batch


@pytest.mark.parametrize(
    "options, given",
    [
        ({"input_dropout": 0.4}, lambda batch: batch),
        ({"halo": "drop"}, lambda batch: batch),
        ({}, without_edges),
    ],
    ids=["dropout", "no halo", "fewer edges"],
)
@pytest.mark.parametrize("name", ["gcn", "sage", "sage_max", "gin"])
def test_the_plain_path_is_taken_where_rows_differ(name: str, options: Any, given: Callable[[Batch], Batch]) -> None:
    conv = CASES[name].ours(**options)
    outs = []
    for batch in plain_and_static(CASES[name], conv):
        torch.manual_seed(5)
        outs.append(conv(given(batch).features, given(batch)))
    assert torch.equal(*outs)
    if "input_dropout" not in options:
        return
    conv.eval()
    outs = [conv(batch.features, batch) for batch in plain_and_static(CASES[name], conv)]
    torch.testing.assert_close(*outs)


def test_a_handle_made_before_edges_were_left_out_does_not_use_it() -> None:
    conv = CASES["gcn"].ours()
    plain, static = plain_and_static(CASES["gcn"], conv)
    fewer = without_edges(copy.copy(static))
    assert fewer.static_rows("sum", True) is None
    assert static.static_rows("sum", True) is not None
    assert torch.equal(conv(static.features, fewer), conv(plain.features, plain))


def test_layers_that_transform_first_do_not_use_it() -> None:
    conv = CASES["sage_project"].ours()
    assert conv.static_input is None
    plain, static = plain_and_static(CASES["sage_project"], conv)
    assert torch.equal(conv(plain.features, plain), conv(static.features, static))


def test_own_edge_weights_and_rows_do_not_use_it() -> None:
    conv = CASES["gcn"].ours()
    plain, static = plain_and_static(CASES["gcn"], conv)
    assert torch.equal(conv(plain.x, plain), conv(static.x, static))
    own = torch.rand(plain.num_edges, dtype=torch.float64, requires_grad=True)
    outs = []
    for batch in (plain, static):
        batch.edge_weight, graph_weight = own, batch.edge_weight
        source = conv.read(batch.features, batch)
        batch.edge_weight = graph_weight
        outs.append(source.aggregate("sum", own))
    assert torch.equal(*outs)
    assert torch.equal(*(gradients(out, [own])[0] for out in outs))


def test_the_handle_of_another_batch_does_not_use_it() -> None:
    conv = CASES["gcn"].ours()
    plain, static = make_loader(), aggregated(make_loader(), conv)
    outs = [conv(loader.batch([0, 5]).features, loader.batch(CLUSTERS)) for loader in (plain, static)]
    assert torch.equal(*outs)


def test_batches_made_before_go_on_without() -> None:
    loader = make_loader()
    before = loader.batch(CLUSTERS)
    loader.aggregate_features()
    assert before.static_rows("sum", True) is None
    assert loader.batch(CLUSTERS).static_rows("sum", True) is not None
    loader.static.clear()
    assert loader.batch(CLUSTERS).static_rows("sum", True) is None


# --- models ----------------------------------------------------------------------------------------------------------


def model_loader(is_static: bool, model: Stack, **options: Any) -> ClusterLoader:
    graph = GRAPHS["weighted_symmetric"].graph()
    parts = random_partition(graph, 6)
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(graph.num_nodes, 8, dtype=torch.float64, generator=draw)
    y = torch.randint(3, (graph.num_nodes,), generator=draw)
    loader = ClusterLoader(parts.permute(graph), parts, 2, x=x, y=y)
    return aggregated(loader, model, **options) if is_static else loader


def make_model(name: str, **options: Any) -> Stack:
    torch.manual_seed(4)
    kind, fixed = MODELS[name]
    return kind(8, 8, 3, 3, **fixed, **options).double()


def fit(model: Stack, batches: Callable[[], Any], steps: int = 8) -> list[Tensor]:
    """Losses, and the parameters at the end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses: list[Tensor] = []
    torch.manual_seed(2)
    while len(losses) < steps:
        for batch in batches():
            loss = F.cross_entropy(model(batch.features, batch), batch.y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
@pytest.mark.parametrize("history_tier", ["device", "pinned", "file"])
@pytest.mark.parametrize("tier", ["device", "file"])
@pytest.mark.parametrize("name", MODELS)
def test_training_with_histories_is_the_same(name: str, tier: str, history_tier: str) -> None:
    results = []
    for is_static in (False, True):
        model = make_model(name, dropout=0.4, drop_input=False)
        loader = model_loader(is_static, model, tier=tier)
        with attach_histories(model, 30, history_tier, torch.float64) as histories:
            results.append(fit(model, partial(histories.prefetch, loader)))
            results[-1] += [store.pull(torch.arange(30)).clone() for store in histories.values()]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", MODELS)
def test_full_batch_training_is_the_same(name: str) -> None:
    results = []
    for is_static in (False, True):
        model = make_model(name)
        batch = model_loader(is_static, model).full()
        results.append(fit(model, lambda batch=batch: [batch], steps=4))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_inference_is_the_same(name: str) -> None:
    model = make_model(name)
    expected = inference(model, model_loader(False, model))
    by_handle = inference(model, model_loader(True, model), lambda model, batch: model(batch.features, batch))
    torch.testing.assert_close(by_handle, expected)


def test_each_batch_aggregates_one_layer_less(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = functional.aggregate
    monkeypatch.setattr(functional, "aggregate", lambda *args, **kwargs: calls.append(0) or real(*args, **kwargs))
    model = make_model("sage")
    loader = model_loader(True, model)
    histories = attach_histories(model, 30, dtype=torch.float64)
    fit(model, lambda: histories.prefetch(loader), steps=3)
    assert len(calls) == 3 * 2


def test_a_model_says_what_its_first_layer_reads() -> None:
    assert make_model("gcn").static_input == ("sum", True, False)
    assert make_model("sage max").static_input == ("max", False, True)
    assert make_model("sage", root_weight=False).static_input == ("mean", False, False)
    assert make_model("gin").static_input == ("sum", False, True)
    assert make_model("gin", dropout=0.5).static_input is None
    assert make_model("gin", dropout=0.5, drop_input=False).static_input == ("sum", False, True)
    assert make_model("gcn", linear=True).static_input is None


def test_a_model_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    results = []
    for mode in ("plain", "static", "compiled"):
        model = make_model("sage")
        loader = model_loader(mode != "plain", model)
        call = torch.compile(model, fullgraph=True, backend="eager") if mode == "compiled" else model
        attach_histories(model, 30, dtype=torch.float64)
        results.append([call(batch.features, batch).detach() for batch in loader])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_a_table_made_in_inference_mode_can_be_trained_on() -> None:
    conv = CASES["gcn"].ours()
    loader = make_loader()
    with torch.inference_mode():
        loader.aggregate_features()
    batch = loader.full()
    assert all(bool(g.any()) for g in gradients(conv(batch.features, batch), list(conv.parameters())))


# --- features elsewhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", USING.values(), ids=USING)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_features_elsewhere_give_the_same(case: Case, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = case.ours(input_dropout=dropout)
    loader = aggregated(make_loader(num_features=case.in_channels), conv)

    def run() -> tuple[Batch, Tensor]:
        batch = loader.batch(CLUSTERS)
        torch.manual_seed(3)
        return batch, conv(batch.features, batch)

    _, expected = run()
    monkeypatch.setattr(Features, "is_in_place", False)
    batch, out = run()
    # with dropout the plain path copies all rows, as batch.x does
    torch.testing.assert_close(out, expected)
    assert ("x" in batch._sliced) == (dropout > 0)


@pytest.mark.parametrize("name, own_rows", [("gcn", False), ("sage", True)])
def test_a_batch_brings_no_halo_along(name: str, own_rows: bool) -> None:
    # "meta" is a device without rows: any gathering by its ids fails
    loader = aggregated(make_loader(), CASES[name].ours())
    brought = {"x of in-batch rows"} if own_rows else set()
    brought |= {"sum of x, weighted" if name == "gcn" else "mean of x"}
    moved, loaded = loader.batch(CLUSTERS).to("meta"), loader.batch(CLUSTERS).to("meta")
    loaded._sliced = {}
    for batch in (moved, loaded.load()):
        assert set(batch._sliced) == brought
        assert {rows.shape for rows in batch._sliced.values()} == {(batch.num_nodes, 6)}
        out = CASES[name].ours().to("meta")(batch.features, batch)
        assert (out.shape, out.device.type) == ((batch.num_nodes, 4), "meta")


def test_slices_that_were_made_move_along() -> None:
    loader = aggregated(make_loader(), CASES["sage"].ours())
    batch = loader.batch(CLUSTERS)
    rows = batch.x
    assert torch.equal(batch.own_rows, rows[: batch.num_nodes])
    assert batch.to("meta").x.shape == rows.shape


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["device", "pinned", "file"])
@pytest.mark.parametrize("name", ["gcn", "sage", "gin"])
def test_features_on_the_host_of_a_gpu(name: str, tier: str) -> None:
    conv = CASES[name].ours()
    expected = [conv(batch.features, batch) for batch in batches_of(make_loader()).values()]
    host = make_loader()
    loader = aggregated(ClusterLoader(host.graph.to("cuda"), host.parts, x=host.x), conv, tier=tier)
    conv.cuda()
    for batch, rows in zip(batches_of(loader).values(), expected, strict=True):
        torch.testing.assert_close(conv(batch.load().features, batch).cpu(), rows)
        assert "x" not in batch._sliced


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_changed_features_are_noticed() -> None:
    conv = CASES["gcn"].ours()
    loader = aggregated(make_loader(), conv)
    held = loader.full()
    loader.x.mul_(2)
    with pytest.raises(ValueError, match=r"x was changed in place when loader.aggregate_features\('sum'\) was called"):
        loader.batch([0])
    with pytest.raises(ValueError, match="x was changed in place"):
        _ = held.features
    aggregated(loader, conv)
    batch, plain = loader.batch(CLUSTERS), make_loader()
    plain.x.mul_(2)
    other = plain.batch(CLUSTERS)
    torch.testing.assert_close(conv(batch.features, batch), conv(other.features, other))
    loader.x = loader.x.clone()
    with pytest.raises(ValueError, match="x is another tensor than it was"):
        next(iter(loader))
    loader.static.clear()
    assert len([*loader]) == 6


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"reduce": "median"}, ValueError, "reduce must be one of sum, mean, max, min, got 'median'"),
        ({"tier": "disk"}, ValueError, "tier must be one of auto, device, pinned, file, got 'disk'"),
        ({"dtype": torch.int8}, TypeError, r"dtype must be one of .*, got torch\.int8"),
        ({"dtype": "float32"}, TypeError, "dtype must be one of .*, got 'float32'"),
        ({"path": "/tmp"}, ValueError, "path is for tier 'file' or 'auto', got tier 'device'"),
        ({"tier": "file", "path": __file__}, OSError, "need 1440 bytes in .*test_static.py .*: give another path"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    loader = make_loader()
    with pytest.raises(error, match=message):
        loader.aggregate_features(**arguments)
    assert not loader.static


@pytest.mark.parametrize(
    "x, error, message",
    [
        (None, ValueError, "aggregate_features needs features: give the loader x=features"),
        (torch.ones(30, 2, dtype=torch.int64), TypeError, r"floating x of shape .*, got torch.int64 \[30, 2\]"),
        (torch.ones(30), TypeError, r"floating x of shape .*, got torch.float32 \[30\]"),
        (torch.ones(30, 0), TypeError, r"floating x of shape .*, got torch.float32 \[30, 0\]"),
        (torch.ones(30, 2, requires_grad=True), ValueError, "got x with requires_grad=True"),
    ],
)
def test_wrong_features(x: Tensor | None, error: type[Exception], message: str) -> None:
    loader = make_loader()
    loader.x = x
    with pytest.raises(error, match=message):
        loader.aggregate_features()


def test_a_dtype_that_overflows_is_refused() -> None:
    loader = make_loader()
    loader.x.fill_(60_000.0)
    with pytest.raises(
        ValueError, match=r"dtype float16 cannot hold the sum of x, which reaches .*: use torch\.bfloat16"
    ):
        loader.aggregate_features(weighted=False, dtype=torch.float16)
    assert not loader.static
    # rows that are infinite themselves are kept
    loader.x.fill_(torch.inf)
    assert bool(loader.aggregate_features("max", False, dtype=torch.float16).rows.isinf().any())


@pytest.mark.parametrize("tier", ["device", "file"])
def test_an_interrupted_call_leaves_the_loader_as_it_was(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = CASES["gcn"].ours()
    loader = make_loader()
    path = tmp_path if tier == "file" else None
    first = loader.aggregate_features(tier=tier, path=path)
    real, calls = gas_triton.static.aggregate_range, []

    def interrupted(graph: Any, x: Any, span: Any, *args: Any) -> Tensor:
        calls.append(span)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(graph, x, span, *args)

    monkeypatch.setattr(gas_triton.static, "aggregate_range", interrupted)
    for options in ({}, {"reduce": "max"}):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            loader.aggregate_features(tier=tier, path=path, **options)
        assert loader.static == {("sum", True): first}
        assert not [*tmp_path.iterdir()]
    batch = loader.batch(CLUSTERS)
    assert torch.equal(conv(batch.features, batch), conv.lin(first.rows[batch.node_ids]) + conv.bias)


def test_rows_are_computed_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    real, spans = gas_triton.static.aggregate_range, []
    monkeypatch.setattr(gas_triton.static, "aggregate_range", lambda *args: spans.append(args[2][:2]) or real(*args))
    graph = GRAPHS["directed"].graph()
    parts = random_partition(graph, 6)
    loader = ClusterLoader(parts.permute(graph), parts, 4, x=torch.randn(30, 2))
    loader.aggregate_features()
    ptr = parts.ptr.tolist()
    assert spans == [(0, ptr[4]), (ptr[4], 30)]
    assert loader.num_planned == 0


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generate(600, 6000, num_classes=4, num_features=12, signal=2.0)


SHORT = TrainConfig(layers=2, hidden=8, dropout=0.0, lr=0.02, epochs=3, num_parts=6, batch_size=2)


@pytest.mark.parametrize("model", ["GCN", "SAGE", "GIN"])
@pytest.mark.parametrize(
    "options", [{}, {"full_batch": True}, {"host_features": True}], ids=["histories", "full", "host"]
)
def test_train_reaches_the_same_with_and_without(
    dataset: Dataset, model: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SHORT, model=model, **options)
    said: list[str] = []
    calls, real = [0], functional.aggregate

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls[-1] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(functional, "aggregate", counted)
    static = train(dataset, config, say=said.append)
    calls.append(0)
    plain = train(dataset, replace(config, static_first_layer=False), say=said.append)
    # one of two layers, in training and in evaluation
    assert calls[0] == calls[1] / 2
    assert (static.static_bytes, plain.static_bytes) == (600 * 12 * 4, None)
    assert len(said) == 1
    assert said[0].startswith("first layer: neighbours aggregated once (")
    losses = [[record.train_loss for record in result.epochs] for result in (static, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert static.test_acc == pytest.approx(plain.test_acc, abs=0.02)
    assert static.history_bytes == plain.history_bytes


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"histories": False},
        {"model_options": {"linear": True}},
        {"model": "SAGE", "model_options": {"project": True}},
    ],
    ids=["dropout", "cluster-gcn", "linear", "project"],
)
def test_train_leaves_it_where_it_does_not_apply(dataset: Dataset, options: dict[str, Any]) -> None:
    said: list[str] = []
    result = train(dataset, replace(SHORT, epochs=1, **options), say=said.append)
    assert not result.static_bytes
    assert not said


def test_train_goes_without_where_memory_has_no_room(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gas_triton.static, "choose_tier", lambda *args: ("file", "the tables take more than is free"))
    said: list[str] = []
    assert train(dataset, replace(SHORT, epochs=1), say=said.append).static_bytes == 0
    assert said == ["first layer: its neighbours are aggregated in every step, as the tables take more than is free"]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "--dataset", "generated", "--nodes", "600", "--edges", "6000", "--hidden", "8", "--num-parts", "6"]
    run += ["--batch-size", "2", "--epochs", "1", "--dropout", "0", "--device", "cpu", "--no-cache"]
    for flags, is_used in (([], True), (["--no-static"], False)):
        assert cli.main([*run, *flags]) == 0
        printed = capsys.readouterr().out
        assert ("first layer: neighbours aggregated once (sum)" in printed) == is_used
        assert ("MiB aggregated features" in printed.splitlines()[-1]) == is_used


def test_the_benchmark_compares_equal_answers_and_needs_less_memory() -> None:
    problem = bench_epoch.make_problem(600, 6000, num_parts=8, batch_size=2, cache=None)
    bench_epoch.make_problem.cache_clear()
    bench_static.check(problem, hidden=8)
    peaks = bench_static.measure_peaks(problem, hidden=8)
    plain, static = bench_static.PLAIN, bench_static.STATIC
    # the table is read in place of rows that the step would make
    assert peaks.full[static] <= peaks.full[plain] - 600 * 64 * 4
    assert peaks.batch[static] <= peaks.batch[plain]


def test_layers_without_a_declaration_read_their_neighbours() -> None:
    assert GCNConv(3, 2).static_input == ("sum", True, False)
    assert SAGEConv(3, 2, aggr="add").static_input == ("sum", False, True)
    assert gas_triton.nn.base.HistoryLayer().static_input is None

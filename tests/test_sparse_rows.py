"""`SparseRows`: the first linear layer of sparse features, against the same features dense."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gas_triton as gas
from gas_triton import datasets, functional
from gas_triton.functional import SparseRows, sparse_rows
from gas_triton.static import use_static_rows
from gas_triton.training import TrainConfig, train
from tests.pretend_cuda import pretended_cuda


def bag_of_words(num_rows: int, num_features: int, density: float = 0.1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_features, generator=generator)
    return x * (torch.rand(num_rows, num_features, generator=generator) < density)


@pytest.fixture(scope="module")
def dataset() -> datasets.Dataset:
    made = datasets.generate(num_nodes=300, num_edges=2400)
    return dataclasses.replace(made, x=bag_of_words(300, 50) + 0.0)


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 40), num_features=st.integers(1, 30), width=st.integers(1, 9),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_linear_equals_scipy_and_autograd(num_rows, num_features, width, density, seed):
    x = bag_of_words(num_rows, num_features, density, seed).double()
    weight = torch.randn(width, num_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(width, dtype=torch.float64, requires_grad=True)
    rows = SparseRows.of(x)
    out = torch.nn.functional.linear(rows, weight, bias)
    expected = scipy.sparse.csr_array(x.numpy()) @ weight.detach().numpy().T + bias.detach().numpy()
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (weight, bias), grad)
    dense = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (weight, bias), grad)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["dense", "csr", "coo", "csc"])
def test_every_layout_gives_the_same_rows(layout):
    x = bag_of_words(20, 12)
    made = {"dense": x, "csr": x.to_sparse_csr(), "coo": x.to_sparse_coo(), "csc": x.to_sparse_csc()}[layout]
    torch.testing.assert_close(SparseRows.of(made).to_dense(), x, rtol=0, atol=0)


def test_rows_are_selected_in_order():
    x = bag_of_words(20, 12)
    ids = torch.tensor([19, 3, 3, 0])
    rows = SparseRows.of(x)
    assert torch.equal(rows.index_select(0, ids).to_dense(), x[ids])
    assert torch.equal(rows[ids].to_dense(), x[ids])
    assert torch.equal(rows[5:11].to_dense(), x[5:11])
    assert rows[ids[:0]].shape == (0, 12)


def test_long_columns_are_summed_whole():
    # more rows than one program of the gradient's kernel takes
    x = torch.ones(3000, 2, dtype=torch.float64)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.linear(SparseRows.of(x), weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((3, 2), 3000.0, dtype=torch.float64))


def test_dropout_is_that_of_the_dense_rows():
    loader, x = _loader_of(200, 30)
    batch = loader.batch([0, 2])
    seed = torch.tensor([123456789123])
    dense = functional.dropout(x[batch.all_ids], batch, 0.4, seed)
    sparse = functional.dropout(batch.x, batch, 0.4, seed)
    assert torch.equal(sparse.to_dense(), dense)
    assert 0.3 < float((dense == 0).float().mean() - (x == 0).float().mean()) / float((x != 0).float().mean()) < 0.5


def test_dropped_values_are_zero_whatever_they_were():
    loader, x = _loader_of(200, 30)
    x[:, ::2] = torch.inf
    loader.x = SparseRows.of(x)
    batch, seed = loader.batch([0, 2]), torch.tensor([5])
    sparse = functional.dropout(batch.x, batch, 0.5, seed).to_dense()
    assert torch.equal(sparse, functional.dropout(x[batch.all_ids], batch, 0.5, seed))
    assert (sparse == 0).any()


def _loader_of(num_nodes: int, num_features: int) -> tuple[gas.ClusterLoader, torch.Tensor]:
    made = datasets.generate(num_nodes=num_nodes, num_edges=4 * num_nodes)
    graph = gas.Graph.from_edge_index(made.edge_index, num_nodes=num_nodes).add_self_loops().gcn_norm()
    parts = gas.random_partition(graph, 5)
    graph, x, rows = parts.permute(graph, *2 * [bag_of_words(num_nodes, num_features)])[:3]
    _, rows = parts.permute(graph, SparseRows.of(bag_of_words(num_nodes, num_features)))
    return gas.ClusterLoader(graph, parts, 2, x=rows), x


@pytest.mark.parametrize("way", [{}, {"full_batch": True}, {"histories": False}], ids=["histories", "full", "drop"])
@pytest.mark.parametrize("model", ["GCN", "GAT", "APPNP", "GCN2", "PNA"])
def test_training_is_that_of_dense_features(dataset, model, way):
    options = {"PNA": {"linear": True}}.get(model, {})
    config = TrainConfig(
        model=model, layers=3, hidden=8, epochs=3, num_parts=6, batch_size=2, model_options=options,
        host_features=True, partition="random", dropout=0.3, static_first_layer=False, **way,
    )  # fmt: skip
    dense = train(dataset, config)
    sparse = train(dataset, dataclasses.replace(config, sparse_features=True))
    for ours, theirs in zip(sparse.epochs, dense.epochs, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        # a logit may round across another one
        assert ours.test_acc == pytest.approx(theirs.test_acc, abs=0.02)


@pytest.mark.parametrize("batch_size", [2, 5], ids=["with halo", "without"])
@pytest.mark.parametrize("fills", [False, True])
def test_inference_is_that_of_dense_features(batch_size, fills):
    loader, x = _loader_of(100, 12)
    loader.batch_size = batch_size
    model = gas.models.GCN(12, 8, 3, 3)
    histories = gas.attach_histories(model, 100)
    found = gas.inference(model, loader, fill_histories=fills)
    tables = [store.pull(torch.arange(100)) for store in histories.values()]
    loader.x = x
    histories.reset()
    torch.testing.assert_close(found, gas.inference(model, loader, fill_histories=fills))
    for ours, store in zip(tables, histories.values(), strict=True):
        torch.testing.assert_close(ours, store.pull(torch.arange(100)))
        assert bool(ours.any()) is fills


def test_own_rows_and_rows_of_a_moved_batch():
    loader, x = _loader_of(60, 10)
    batch = loader.batch([0, 2])
    assert torch.equal(batch.own_rows.to_dense(), x[batch.node_ids])
    moved = batch._map(lambda t: t.to("cpu"))
    assert torch.equal(moved.x.to_dense(), x[batch.all_ids])
    assert torch.equal(moved.own_rows.to_dense(), x[batch.node_ids])


@pytest.mark.parametrize("first", [False, True], ids=["before drop_edges", "after"])
def test_rows_survive_dropped_edges(first):
    loader, x = _loader_of(60, 10)
    batch = loader.batch([0, 2])
    rows = batch.x if first else None
    dropped = batch.drop_edges(0.5, seed=1)
    assert torch.equal(dropped.x.to_dense(), x[batch.all_ids])
    assert rows is None or dropped.x is rows


def test_features_on_the_host_reach_a_gpu_row_by_row(monkeypatch):
    loader, x = _loader_of(60, 10)
    table, moved = loader.x, []
    move = SparseRows.to
    monkeypatch.setattr(SparseRows, "to", lambda self, *args, **kw: moved.append(self.shape) or move(self, *args, **kw))
    with pretended_cuda() as device:
        there = gas.ClusterLoader(loader.graph.to(device), loader.parts, 2, x=table)
        torch.manual_seed(0)
        model = gas.models.GCN(10, 8, 3, 1, dropout=0.5)
        weight = model.convs[0].lin.weight.detach().clone()
        model = model.to(device)
        batch = there.batch([0, 2])
        out = torch.nn.functional.linear(batch.load().x, weight.to(device))
        model(batch.x, batch).sum().backward()
        recorded = []
        monkeypatch.setattr(type(batch.node_ids), "record_stream", lambda t, stream: recorded.append(t), raising=False)
        batch.record_stream(None)
        assert any(t is batch.x.value for t in recorded)
        assert any(t is batch.x.csr.col for t in recorded)
        ids = batch.all_ids.cpu()
        torch.testing.assert_close(out.detach().cpu(), x[ids] @ weight.t())
    assert moved == [(batch.num_nodes + batch.num_halo, 10)]


def test_a_plan_that_is_kept_keeps_its_rows(dataset):
    loader, _ = _loader_of(60, 10)
    loader.shuffle = False
    first = loader.batch([0, 1]).x
    assert loader.batch([0, 1]).x is first
    loader.x = SparseRows.of(bag_of_words(60, 10, seed=1))
    assert loader.batch([0, 1]).x is not first


def test_a_model_that_needs_dense_rows_says_so(dataset):
    config = TrainConfig(model="GIN", epochs=1, num_parts=4, batch_size=2, sparse_features=True)
    with pytest.raises(TypeError, match=r"x must be dense .*GINConv.* got SparseRows: give x.to_dense\(\)"):
        train(dataset, config)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "x must be a floating tensor, got torch.int64"),
        ([1.0], TypeError, "x must be a floating tensor, got list"),
        (torch.ones(3), ValueError, r"x must have shape \[rows, features\], got \[3\]"),
    ],
)
def test_bad_input(x, error, message):
    with pytest.raises(error, match=message):
        SparseRows.of(x)


def test_a_first_layer_of_sparse_features_has_nothing_to_aggregate_once():
    loader, x = _loader_of(60, 10)
    model, said = gas.models.GCN(10, 8, 3, 2, drop_input=False), []
    assert use_static_rows(model, loader, said.append) == 0
    assert not said
    loader.x = x
    assert use_static_rows(model, loader, said.append) > 0


def test_the_transpose_is_made_for_a_gradient_alone_and_once(monkeypatch):
    made, transpose = [], sparse_rows.transpose_csr
    monkeypatch.setattr(sparse_rows, "transpose_csr", lambda *args: made.append(args) or transpose(*args))
    loader, _ = _loader_of(60, 10)
    batch, weight = loader.batch([0, 2]), torch.randn(3, 10, requires_grad=True)
    torch.nn.functional.linear(batch.x, weight.detach())
    with torch.no_grad():
        torch.nn.functional.linear(batch.x, weight)
    assert not made
    for _ in range(2):
        dropped = functional.dropout(batch.x, batch, 0.5, torch.tensor([3]))
        torch.nn.functional.linear(dropped, weight).sum().backward()
    torch.nn.functional.linear(batch.x, weight).sum().backward()
    assert len(made) == 1


def test_linear_takes_keywords():
    x, weight, bias = bag_of_words(4, 12), torch.randn(3, 12), torch.randn(3)
    out = torch.nn.functional.linear(bias=bias, input=SparseRows.of(x), weight=weight)
    torch.testing.assert_close(out, x @ weight.t() + bias)


def test_compensation_needs_dense_features():
    with pytest.raises(ValueError, match="read dense features, not sparse_features"):
        TrainConfig(halo_momentum=0.5, sparse_features=True)


def test_a_wrong_weight_is_named():
    with pytest.raises(ValueError, match=r"weight must have shape \[outputs, 12\], got \[3, 5\]"):
        torch.nn.functional.linear(SparseRows.of(bag_of_words(4, 12)), torch.ones(3, 5))


def test_other_functions_refuse():
    with pytest.raises(TypeError, match="relu does not take SparseRows"):
        torch.relu(SparseRows.of(bag_of_words(4, 12)))

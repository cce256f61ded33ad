"""A training step through the Triton kernels equals the CPU path: on a GPU where there is one, else interpreted."""

import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import gas_triton as gas
from gas_triton.kernels import aggregate, dropout, pull, push
from gas_triton.models import GCN, GCN2, GIN, SAGE
from gas_triton.planner import Planner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def cpu_ops_are(**implementations):
    """Gives the CPU ops other implementations; yields how often each was called."""
    library = torch.library.Library("gas_triton", "IMPL")
    calls = Counter()

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, function in implementations.items():
            library.impl(name, counted(name, function), "CPU", allow_override=True)
    try:
        yield calls
    finally:
        library._destroy()


TRITON = dict(
    aggregate=aggregate.aggregate_triton,
    aggregate_winners=aggregate.winners_triton,
    dropout=dropout.dropout_triton,
    check=push.check_triton,
    pack=push.pack_triton,
    pull=pull.pull_triton,
    push=push.push_triton,
)


def tiny_graph(directed):
    edge_index = torch.randint(24, (2, 60))
    # a hub: node 3 hears from everyone
    edge_index = torch.cat([edge_index, torch.stack([torch.arange(24), torch.full((24,), 3)])], dim=1)
    edge_index = edge_index if directed else torch.cat([edge_index, edge_index.flip(0)], dim=1)
    return gas.Graph.from_edge_index(edge_index, num_nodes=24)


def two_epochs(model_class, options, graph, device, **histories):
    """Losses, parameters and rows of histories after two epochs, the same on every device but for rounding."""
    torch.manual_seed(1)
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    model = model_class(5, 6, 3, 2, dropout=0.5, **options)
    graph = graph.add_self_loops().gcn_norm().to(device)
    parts = gas.random_partition(graph, 4)
    graph = parts.permute(graph)
    loader = gas.ClusterLoader(graph, parts, batch_size=2, x=x.to(device), y=y.to(device))
    loader._planner = Planner(graph, hub_edges=8)
    model.to(device)
    histories = gas.attach_histories(model, 24, **histories)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        for batch in histories.prefetch(loader):
            assert (len(batch.hubs) > 0) == (int((batch.inner.rowptr + batch.outer.rowptr).diff().max()) > 8)
            loss = F.cross_entropy(model(batch.features, batch), batch.y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().cpu())
    tables = [store.pull(torch.arange(24, device=device)).cpu() for store in histories.values()]
    return losses, [p.detach().cpu() for p in model.parameters()], tables


class Fixed:
    """Dropout seeds by number, so that two devices draw the same masks."""

    def __init__(self):
        self.count = 0

    def __call__(self, device):
        self.count += 1
        return torch.tensor([1000 + self.count], device=device)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize(
    "model_class, options",
    [(GCN, {}), (SAGE, {}), (SAGE, {"aggr": "max"}), (GIN, {}), (GCN2, {})],
    ids=["gcn", "sage", "sage-max", "gin", "gcn2"],
)
def test_training_equals_the_cpu_path(model_class, options, directed, monkeypatch):
    graph = tiny_graph(directed)
    monkeypatch.setattr("gas_triton.functional.draw_seed", Fixed())
    expected = two_epochs(model_class, options, graph, torch.device("cpu"))
    monkeypatch.setattr("gas_triton.functional.draw_seed", Fixed())
    with cpu_ops_are(**TRITON if DEVICE.type == "cpu" else {}) as calls:
        found = two_epochs(model_class, options, graph, DEVICE)
    if DEVICE.type == "cpu":
        assert calls["aggregate"] >= 8
        assert calls["dropout"] >= 8
        assert calls["push"] >= 4
        assert (calls["aggregate_winners"] > 0) == ("aggr" in options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
@pytest.mark.parametrize("tier", ["device", "pinned"])
@pytest.mark.parametrize("dtype, step", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.int8, 1 / 127)])
def test_training_with_stored_rows_equals_the_cpu_path(dtype, step, tier, monkeypatch):
    graph, options = tiny_graph(directed=False), {"dtype": dtype, "tier": tier}
    monkeypatch.setattr("gas_triton.functional.draw_seed", Fixed())
    expected = two_epochs(GCN, {}, graph, torch.device("cpu"), **options)
    monkeypatch.setattr("gas_triton.functional.draw_seed", Fixed())
    if DEVICE.type == "cpu":
        monkeypatch.setattr("gas_triton.history.device.gather_rows", pull.gather_triton)
    with cpu_ops_are(**TRITON if DEVICE.type == "cpu" else {}) as calls:
        found = two_epochs(GCN, {}, graph, DEVICE, **options)
    if DEVICE.type == "cpu":
        used = "push" if tier == "device" else "check" if dtype == torch.float32 else "pack"
        assert calls[used] >= 4
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=max(1e-5, step / 10))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=max(1e-5, step / 10))
    for ours, theirs in zip(found[2], expected[2], strict=True):
        # a value between two steps may be rounded to either, where sums were taken in another order
        largest = theirs.abs().amax(dim=1, keepdim=True)
        assert bool(((ours.float() - theirs.float()).abs() <= 1.01 * step * largest + 1e-5).all())


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_aggregated_features_equal_those_of_the_cpu_path(reduce):
    graph = tiny_graph(directed=True).add_self_loops().gcn_norm()
    parts = gas.random_partition(graph, 4)
    graph, x = parts.permute(graph, torch.randn(24, 5))
    expected = gas.ClusterLoader(graph, parts, batch_size=2, x=x).aggregate_features(reduce).rows
    loader = gas.ClusterLoader(graph.to(DEVICE), parts, batch_size=2, x=x.to(DEVICE))
    loader._planner = Planner(loader.graph, hub_edges=8)
    with cpu_ops_are(**TRITON if DEVICE.type == "cpu" else {}) as calls:
        rows = loader.aggregate_features(reduce).rows
        batch = loader.full()
        weight = batch.edge_weight
        assert torch.equal(rows, gas.functional.aggregate(batch.features, batch, reduce=reduce, edge_weight=weight))
    assert DEVICE.type != "cpu" or calls["aggregate"] == 3
    torch.testing.assert_close(rows.cpu(), expected)


@pytest.mark.gpu
def test_features_may_stay_on_the_host():
    graph = tiny_graph(directed=False).to("cuda")
    parts = gas.random_partition(graph, 4)
    graph = parts.permute(graph)
    x = torch.randn(24, 5)
    loader = gas.ClusterLoader(graph, parts, batch_size=2, x=x)
    batch = next(iter(loader))
    assert torch.equal(batch.x.cpu(), x[batch.all_ids.cpu()])
    with pytest.raises(ValueError, match=r"batch\.features reads x in place, but x is on cpu"):
        _ = batch.features


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device():
    graph = tiny_graph(directed=False).add_self_loops().gcn_norm().to("cuda")
    parts = gas.random_partition(graph, 4)
    graph = parts.permute(graph)
    loader = gas.ClusterLoader(graph, parts, 2, x=torch.randn(24, 5, device="cuda"), y=torch.zeros(24).long().cuda())
    model = GCN(5, 6, 3, 3, dropout=0.5).cuda()
    gas.attach_histories(model, 24)
    batches = list(loader)

    def step(batch):
        F.cross_entropy(model(batch.features, batch), batch.y).backward()

    step(batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())

"""Diagnoses: errors, ages and bounds against naive full-batch forwards in float64."""

from __future__ import annotations

import copy
import json
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gas_triton as gas
from gas_triton import Batch, ClusterLoader, Graph, attach_histories, contiguous_partition, diagnose, random_partition
from gas_triton.diagnostics import Diagnosis, diagnosis
from gas_triton.diagnostics.edges import MOST_HOPS
from gas_triton.inference import filling_histories
from gas_triton.models import MODELS, Model
from gas_triton.nn import GATConv, GCNConv, GINConv, SAGEConv
from gas_triton.nn.base import HistoryLayer

from .reference import GRAPHS

# (model, its options): those whose constants are all exact
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "GCN": ("GCN", {}),
    "GCN, norm and residual": ("GCN", {"batch_norm": True, "residual": True}),
    "GCN, linear ends": ("GCN", {"linear": True, "batch_norm": True, "residual": True}),
    "SAGE": ("SAGE", {}),
    "SAGE, sum": ("SAGE", {"aggr": "sum"}),
    "SAGE, max": ("SAGE", {"aggr": "max"}),
    "SAGE, min, no root": ("SAGE", {"aggr": "min", "root_weight": False}),
    "SAGE, project": ("SAGE", {"project": True}),
    "GIN": ("GIN", {}),
    "GIN, norm": ("GIN", {"perceptron_norm": True, "residual": True}),
    "GCN2": ("GCN2", {"alpha": 0.2}),
    "GCN2, own weights": ("GCN2", {"shared_weights": False}),
    "APPNP": ("APPNP", {}),
}
ESTIMATED: dict[str, tuple[str, dict[str, Any]]] = {
    "GAT": ("GAT", {"hidden_heads": 2}),
    "PNA": ("PNA", {}),
    "PNA_JK": ("PNA_JK", {}),
    "SAGE, normalize": ("SAGE", {"normalize": True}),
}
ALL = EXACT | ESTIMATED


def make(
    name: str,
    num_layers: int = 3,
    *,
    graph: str = "weighted_directed",
    num_parts: int = 6,
    seed: int = 0,
    **options: Any,
) -> tuple[Model, ClusterLoader]:
    kind, own = ALL[name]
    edges = GRAPHS[graph].graph() if isinstance(graph, str) else graph
    edges = MODELS[kind].prepare(edges)
    parts = random_partition(edges, num_parts, seed)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(edges.num_nodes, 6, generator=draw, dtype=torch.float64)
    y = torch.randint(4, (edges.num_nodes,), generator=draw)
    edges, x, y = parts.permute(edges, x, y)
    loader = ClusterLoader(edges, parts, **{"batch_size": 2, "seed": seed, "x": x, "y": y, **options})
    torch.manual_seed(seed)
    model = MODELS[kind](6, 8, 4, num_layers, **MODELS[kind].options_of(edges), **own).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model, loader


def train(model: nn.Module, loader: ClusterLoader, histories: gas.Histories, epochs: int = 2, lr: float = 0.05) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in histories.prefetch(loader):
            F.cross_entropy(model(batch.x, batch), batch.y).backward()
            optimizer.step()
            optimizer.zero_grad()


def trained(name: str, num_layers: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model, loader = make(name, num_layers, **options)
    histories = attach_histories(model, loader.graph.num_nodes, dtype=dtype)
    train(model, loader, histories)
    return model, loader, histories


def inputs_of(model: nn.Module, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """Input rows of the layers with histories, and the output, of a batch in `eval()` mode."""
    model = copy.deepcopy(model).eval()
    rows: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, HistoryLayer) and module.history is not None:
            module.register_forward_pre_hook(lambda module, args: rows.append(args[0].clone()))
    with torch.no_grad():
        return rows, model(batch.x, batch)


def expected(model: nn.Module, loader: ClusterLoader) -> dict[str, Any]:
    """The same, row by row, from the whole graph at once and batches one after another."""
    exact, exact_out = inputs_of(model, loader.full())
    computed, out = [torch.empty_like(rows) for rows in exact], torch.empty_like(exact_out)
    pulled: list[int] = []
    for batch in loader.in_order():
        rows, out[batch.node_ids] = inputs_of(model, batch)
        for table, part in zip(computed, rows, strict=True):
            table[batch.node_ids] = part
        pulled += batch.halo_ids.tolist()
    stores = [m.history for m in model.modules() if isinstance(m, HistoryLayer) and m.history is not None]
    everything = torch.arange(loader.graph.num_nodes)
    return {
        "pulled": torch.tensor(pulled, dtype=torch.int64),
        "norm": [rows.norm(dim=1) for rows in exact],
        "history": [(store.pull(everything) - rows).norm(dim=1) for store, rows in zip(stores, exact, strict=True)],
        "computed": [(ours - rows).norm(dim=1) for ours, rows in zip(computed, exact, strict=True)],
        "out": (out - exact_out).norm(dim=1),
        "out_norm": exact_out.norm(dim=1),
    }


def close(ours: float | None, theirs: Tensor | float) -> None:
    assert ours is not None
    torch.testing.assert_close(torch.tensor(ours).double(), torch.as_tensor(theirs).double(), rtol=1e-5, atol=1e-12)


# --- what was measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["GCN, norm and residual", "SAGE, max", "GCN2", "APPNP", "GAT", "PNA_JK"])
def test_errors_are_those_of_full_batch_forwards(name: str, dtype: torch.dtype) -> None:
    model, loader, _ = trained(name, dtype=dtype)
    right = expected(model, loader)
    found = diagnose(model, loader)
    assert len(found.layers) == len(right["history"]) > 1
    for place, layer in enumerate(found.layers):
        history, norm = right["history"][place][right["pulled"]], right["norm"][place][right["pulled"]]
        assert layer.pulls == len(history)
        assert layer.rows == len(right["pulled"].unique())
        assert layer.error.max > 0.0
        close(layer.error.max, history.max())
        close(layer.error.mean, history.mean())
        close(layer.error.median, history.quantile(0.5, interpolation="lower"))
        close(layer.relative.median, (history / norm)[norm > 0].quantile(0.5, interpolation="lower"))
        close(layer.relative_error, history.norm() / norm.norm())
        assert layer.zero_rows == int((norm == 0).sum())
        close(layer.computed.max, right["computed"][place].max())
        close(layer.computed_relative, right["computed"][place].norm() / right["norm"][place].norm())
    close(found.output.error.max, right["out"].max())
    close(found.output.relative_error, right["out"].norm() / right["out_norm"].norm())


def test_groups_by_degree_and_by_hops() -> None:
    """Against dictionaries and a breadth-first search."""
    model, loader, _ = trained("GCN", 4, graph="symmetric")
    right = expected(model, loader)
    found = diagnose(model, loader)
    degree = loader.graph.degree
    by_degree: dict[int, list[int]] = {}
    for row in right["pulled"].tolist():
        by_degree.setdefault(int(degree[row]).bit_length(), []).append(row)
    # errors go as many hops as layers read histories
    most = len(found.layers)
    assert most < MOST_HOPS
    hops = torch.full((loader.graph.num_nodes,), most)
    for batch in loader.in_order():
        source, target = batch.edge_index
        frontier = {v for u, v in zip(source.tolist(), target.tolist(), strict=True) if u >= batch.num_nodes}
        seen, hop = set(frontier), 0
        while frontier and hop < most:
            hops[batch.node_ids[list(frontier)]] = hop
            frontier = {
                v for u, v in zip(source.tolist(), target.tolist(), strict=True) if u in frontier and v not in seen
            }
            seen |= frontier
            hop += 1
    for place, layer in enumerate(found.layers):
        assert [group.count for group in layer.by_degree] == [len(by_degree[key]) for key in sorted(by_degree)]
        for group, key in zip(layer.by_degree, sorted(by_degree), strict=True):
            assert (group.least, group.most) == (1 << key >> 1, (1 << key) - 1)
            close(group.error, right["history"][place][by_degree[key]].mean())
        for group in layer.by_distance:
            rows = hops == group.least
            assert group.count == int(rows.sum())
            close(group.error, right["computed"][place][rows].mean())
            # one layer later, an error is one hop further
            assert group.least < place or group.error < 1e-15


def test_ages_of_a_schedule() -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]]), num_nodes=4)
    graph = graph.add_self_loops().gcn_norm()
    parts = contiguous_partition(graph, [1, 1, 2])
    loader = ClusterLoader(parts.permute(graph), parts, shuffle=False, x=torch.randn(4, 6))
    model = MODELS["GCN"](6, 8, 4, 2)
    attach_histories(model, 4)
    model.train()
    with torch.no_grad():
        for cluster in (0, 1, 0):
            batch = loader.batch([cluster])
            model(batch.x, batch)
    # batch 0 pulls row 1, pushed one step ago; batch 1 rows 0 (now) and 2 (never); batch 2 row 1
    (layer,) = diagnose(model, loader).layers
    assert (layer.pulls, layer.rows, layer.never) == (4, 3, 0.25)
    assert (layer.age.count, layer.age.median, layer.age.max) == (3, 1.0, 1.0)
    close(layer.age.mean, 2 / 3)
    # zeros stand in for it
    assert layer.relative.max == 1.0


# --- bounds -----------------------------------------------------------------------------------------------------------


def assert_bounded(found: Diagnosis) -> None:
    slack = 1 + 1e-5
    for layer in [*found.layers]:
        assert layer.bound is not None
        assert layer.computed.max <= layer.bound * slack + 1e-12
        assert layer.theorem is None or layer.bound <= layer.theorem * slack + 1e-12
    output = found.output
    assert output.is_rigorous
    assert output.error.max <= output.bound.max * slack + 1e-12
    assert output.error.mean <= output.bound.mean * slack + 1e-12
    assert output.theorem is None or output.bound.max <= output.theorem * slack


@pytest.mark.parametrize("num_layers", [2, 5])
@pytest.mark.parametrize("name", EXACT)
def test_error_is_below_the_bound(name: str, num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every node, not only of the worst one: the bound's own quantiles would hide it."""
    seen: dict[str, Tensor] = {}
    real_bounds, real_measure = diagnosis.node_bounds, diagnosis.measure

    def bounds(*args: Any) -> Any:
        seen["bound"] = (out := real_bounds(*args)).output
        return out

    def measured(*args: Any) -> Any:
        seen["error"] = (out := real_measure(*args)).out_error
        return out

    monkeypatch.setattr(diagnosis, "node_bounds", bounds)
    monkeypatch.setattr(diagnosis, "measure", measured)
    model, loader, _ = trained(name, num_layers, seed=num_layers)
    for scale in (1.0, 0.3, 10.0):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter *= scale
        found = diagnose(model, loader)
        # a ReLU behind the last layer may let nothing through
        assert found.output.error.max > 0.0 or name == "GIN, norm"
        assert_bounded(found)
        assert (seen["error"] <= seen["bound"] * (1 + 1e-5) + 1e-12).all()


def test_bound_is_reached() -> None:
    """One wide: the norm of W is its value, and errors of one sign add up."""
    graph = GRAPHS["weighted_directed"].graph()
    parts = random_partition(graph, 5)
    loader = ClusterLoader(parts.permute(graph), parts, x=torch.rand(graph.num_nodes, 1, dtype=torch.float64))
    model = MODELS["GCN"](1, 1, 1, 4, normalize=False).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    attach_histories(model, graph.num_nodes, dtype=torch.float64)
    # histories of zeros: every row is too small
    found = diagnose(model, loader)
    close(found.output.bound.max, found.output.error.max)
    close(found.output.bound.mean, found.output.error.mean)
    close(found.layers[-1].bound, found.layers[-1].computed.max)


def test_theorem_2_by_hand() -> None:
    r"""`sum_l eps_l (k_1 k_2 |N(v)|)^(L - l)` for a GCN, constants by SVD."""
    model, loader, histories = trained("GCN", 4)
    found = diagnose(model, loader)
    k = [float(torch.linalg.svdvals(conv.lin.weight.detach())[0]) for conv in model.convs]
    graph = loader.graph
    spread = float(graph.degree.max() * graph.weight.abs().max())
    bound = 0.0
    for layer in found.layers:
        gain = 1.0
        for place in range(layer.place, 4):
            gain *= k[place] * spread
        bound += layer.staleness * gain
    close(found.output.theorem, bound)
    # the staleness is that between the history and the row computed now
    rows = [inputs_of(model, batch)[0] for batch in loader.in_order()]
    pulled = expected(model, loader)["pulled"]
    for place, (layer, store) in enumerate(zip(found.layers, histories.values(), strict=True)):
        now = torch.cat([part[place] for part in rows])
        close(layer.staleness, (now - store.pull(torch.arange(graph.num_nodes))).norm(dim=1)[pulled].max())


@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_everything_vanishes_when_histories_are_exact(name: str, fills: bool) -> None:
    model, loader, _ = trained(name, 3)
    model.eval()
    if fills:
        gas.inference(model, loader, fill_histories=True)
    else:
        # a row is exact after as many epochs as layers are in front of it; evaluation as batch norm is the same
        with torch.no_grad(), filling_histories(model):
            for _ in range(4):
                for batch in loader.in_order():
                    model(batch.x, batch)
    found = diagnose(model, loader)
    for layer in found.layers:
        assert layer.error.max < 1e-12
        assert layer.bound < 1e-9
        assert layer.never == 0.0
    assert found.output.error.max < 1e-12
    assert found.output.bound.max < 1e-9


@pytest.mark.parametrize("name", EXACT)
def test_constants_are_above_what_layers_do(name: str) -> None:
    """Random moves of all rows that a layer reads, and of one row at a time."""
    model, loader = make(name, 3)
    batch = next(iter(loader))
    layer: Any = [m for m in model.modules() if isinstance(m, HistoryLayer)][1]
    gain = layer.eval().lipschitz
    width = 4 if name == "APPNP" else 8
    joint = torch.zeros(batch.num_nodes, batch.num_nodes + batch.num_halo, dtype=torch.float64)
    source, target = batch.edge_index
    weight = batch.edge_weight.abs() if gain.weighted else torch.ones(batch.num_edges, dtype=torch.float64)
    joint.index_put_((target, source), weight, accumulate=True)
    draw = torch.Generator().manual_seed(1)
    x_0 = (
        (torch.randn(batch.num_nodes, width, generator=draw, dtype=torch.float64),)
        if name[:4] in ("GCN2", "APPN")
        else ()
    )
    best = 0.0
    for trial in range(60):
        x = torch.randn(joint.size(1), width, generator=draw, dtype=torch.float64)
        shift = torch.randn(x.shape, generator=draw, dtype=torch.float64) * 10.0 ** (-trial % 3)
        if trial % 2:
            shift[torch.arange(len(shift)) != trial % len(shift)] = 0.0
        with torch.no_grad():
            moved = (layer(x + shift, *x_0, batch) - layer(x, *x_0, batch)).norm(dim=1)
        by = shift.norm(dim=1)
        spread = {
            "sum": joint @ by,
            "mean": joint @ by / joint.sum(dim=1).clamp(min=1),
            "root": (joint @ by.square()).sqrt(),
        }[gain.spread]
        most = gain.own * by[: batch.num_nodes] + gain.neighbours * spread
        assert (moved <= most * (1 + 1e-9) + 1e-12).all()
        best = max(best, float((moved / most.clamp(min=1e-12)).max()))
    # and not by far: a factor too much would show; that of a perceptron is a product of norms
    assert best > (0.1 if name == "GIN, norm" else 0.25)


@pytest.mark.parametrize("name", ESTIMATED)
def test_estimates_say_so_and_see_the_errors(name: str) -> None:
    model, loader, _ = trained(name, 3)
    found = diagnose(model, loader)
    assert not found.output.is_rigorous
    assert "~" in found.table()
    for layer in found.layers:
        assert layer.lipschitz.neighbours > 0.0
        assert not layer.is_exact
    # an estimate is at least what these errors show
    assert found.output.error.max <= found.output.bound.max * (1 + 1e-5)


def test_estimate_of_a_known_constant() -> None:
    """A linear map of its own row: the probe finds its norm nearly, from below. What `GCNConv` says is not its."""

    class Own(GCNConv):
        def forward(self, x: Any, batch: Batch, edge_weight: Tensor | None = None) -> Tensor:
            return self.lin(self.read(x, batch).in_batch())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GCNConv(6, 8), Own(8, 8)

        def forward(self, x: Any, batch: Batch) -> Tensor:
            return self.second(self.first(x, batch).relu(), batch)

    _, loader = make("GCN")
    torch.manual_seed(0)
    model = Net().double()
    attach_histories(model, loader.graph.num_nodes)
    (layer,) = diagnose(model, loader).layers
    norm = float(torch.linalg.matrix_norm(model.second.lin.weight.detach(), 2))
    assert 0.6 * norm < layer.lipschitz.neighbours <= norm * (1 + 1e-6)


# --- gradients --------------------------------------------------------------------------------------------------------


def sum_loss(out: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(out, batch.y, reduction="sum")


def test_gradient_bias_by_hand() -> None:
    model, loader, _ = trained("GCN", 3)
    found = diagnose(model, loader, loss=sum_loss)
    assert found.gradients is not None
    reference = copy.deepcopy(model).eval()
    sum_loss(reference(loader.full().x, loader.full()), loader.full()).backward()
    exact = {name: p.grad.clone() for name, p in reference.named_parameters()}
    reference.zero_grad()
    for batch in loader.in_order():
        sum_loss(reference(batch.x, batch), batch).backward()
    ours = {name: p.grad for name, p in reference.named_parameters()}
    assert [g.name for g in found.gradients] == [*exact, "all"]
    ours["all"], exact["all"] = (torch.cat([g.flatten() for g in grads.values()]) for grads in (ours, exact))
    for bias in found.gradients:
        a, b = ours[bias.name].flatten(), exact[bias.name].flatten()
        close(bias.norm, b.norm())
        close(bias.difference, (a - b).norm() / b.norm())
        close(bias.cosine, F.cosine_similarity(a, b, dim=0))
    assert found.gradients[-1].difference > 1e-3
    assert all(p.grad is None for p in model.parameters())


def test_no_bias_in_one_batch() -> None:
    model, loader, _ = trained("SAGE", 3, batch_size=6)
    found = diagnose(model, loader, loss=sum_loss)
    assert found.num_batches == 1
    assert found.gradients is not None
    assert all(g.difference < 1e-12 and g.cosine > 1 - 1e-12 for g in found.gradients)
    for layer in found.layers:
        assert layer.pulls == 0
        assert layer.error.max is None
        assert layer.bound == 0.0
    assert found.output.error.max < 1e-12


# --- nothing changes, everything works --------------------------------------------------------------------------------


def state_of(model: nn.Module, histories: gas.Histories) -> list[Any]:
    tensors = [t.clone() for t in [*model.parameters(), *model.buffers()]]
    for store in histories.values():
        tensors += [store.pull(torch.arange(store.num_rows)), store.age(), torch.tensor(store.pushes)]
    modes = torch.tensor([module.training for module in model.modules()])
    return [*tensors, modes, torch.get_rng_state()]


@pytest.mark.parametrize("name", ["GCN, norm and residual", "GAT", "PNA_JK"])
@pytest.mark.parametrize("tier", ["device", "file"])
def test_nothing_is_changed(name: str, tier: str) -> None:
    model, loader = make(name)
    histories = attach_histories(model, loader.graph.num_nodes, tier=tier, dtype=torch.float64)
    train(model, loader, histories, epochs=1)
    model.train()
    next(model.children()).eval()
    before, stats, epoch = state_of(model, histories), histories.transfer_stats(), loader.epoch
    forwards = [vars(module).get("forward") for module in model.modules()]
    diagnose(model, loader, loss=sum_loss)
    for a, b in zip(before, state_of(model, histories), strict=True):
        assert torch.equal(a, b)
    assert histories.transfer_stats() == stats
    assert loader.epoch == epoch
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert not model._forward_hooks
    histories.close()


@pytest.mark.parametrize("wrong", ["forward", "loss"])
def test_nothing_is_changed_by_an_error(wrong: str) -> None:
    model, loader, histories = trained("GCN")
    model.train()
    before = state_of(model, histories)

    def fail(*_: Any) -> Tensor:
        torch.rand(3)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        diagnose(model, loader, **{wrong: fail})
    for a, b in zip(before, state_of(model, histories), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("tier", ["device", "pinned", "file"])
@pytest.mark.filterwarnings("ignore:there is no CUDA device")
def test_tiers_and_dtypes(tier: str, dtype: torch.dtype) -> None:
    model, loader = make("GCN", num_layers=3)
    histories = attach_histories(model, loader.graph.num_nodes, tier=tier, dtype=dtype)
    train(model, loader, histories)
    gas.inference(model, loader, fill_histories=True)
    found = diagnose(model, loader)
    # what is left is what storing has rounded
    scale = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.int8: 2**-6}[dtype]
    assert all(0.0 < layer.relative.max < scale and layer.tier == tier for layer in found.layers)
    assert_bounded(found)
    histories.close()


class Skips(nn.Module):
    """A user's model: branches, a skip over two layers, and a head that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(6, 8, normalize=False), SAGEConv(8, 8, aggr="max")
        self.left, self.right = GATConv(8, 5), GINConv(nn.Sequential(nn.Linear(8, 5), nn.GELU()))
        self.head = nn.Linear(18, 3)

    def forward(self, x: Any, batch: Batch) -> Tensor:
        h1 = self.conv1(x, batch).tanh()
        h2 = self.conv2(h1, batch).sigmoid() * h1
        return self.head(torch.cat([h1, self.left(h2, batch), self.right(h2, batch)], dim=1))


def test_model_of_a_user() -> None:
    _, loader = make("GCN")
    model = Skips().double()
    histories = attach_histories(model, loader.graph.num_nodes, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for batch in histories.prefetch(loader):
            model(batch.x, batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    right = expected(model, loader)
    found = diagnose(model, loader)
    assert [layer.name for layer in found.layers] == ["conv2", "left", "right"]
    assert not found.output.is_rigorous
    close(found.output.error.max, right["out"].max())
    assert found.output.error.max <= found.output.bound.max * (1 + 1e-5)
    close(found.layers[0].lipschitz.neighbours, torch.linalg.svdvals(model.conv2.lin_l.weight)[0])


@pytest.mark.interop
def test_autoscaled_layers(torch_geometric: ModuleType) -> None:
    """A fused layer is known, a wrapped one is probed, on the batch's own edges."""
    _, loader = make("GCN")
    convs = torch_geometric.nn.GCNConv(6, 8), torch_geometric.nn.GCNConv(8, 8), torch_geometric.nn.GraphConv(8, 4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(convs)

        def forward(self, x: Tensor, edge_index: Any) -> Tensor:
            for conv in self.convs[:-1]:
                x = conv(x, edge_index).relu()
            return self.convs[-1](x, edge_index)

    model = gas.autoscale(Net().double())
    histories = attach_histories(model, loader.graph.num_nodes, dtype=torch.float64)
    train(model, loader, histories)
    right, found = expected(model, loader), diagnose(model, loader)
    assert [layer.lipschitz.is_exact for layer in found.layers] == [True, False]
    close(found.output.error.max, right["out"].max())
    assert found.output.error.max <= found.output.bound.max * (1 + 1e-5)


@pytest.mark.parametrize("graph", ["no_edges", "symmetric"])
@pytest.mark.parametrize("name", ["GCN", "SAGE, max", "GAT", "APPNP"])
def test_isolated_nodes_and_batches_without_halo(graph: str, name: str) -> None:
    model, loader, _ = trained(name, 3, graph=graph, num_parts=4, batch_size=1)
    found = diagnose(model, loader)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.table()
    assert found.line()
    if name in EXACT:
        assert_bounded(found)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_component_of_its_own(is_sparse: bool) -> None:
    """Batches with and without halo, by hand."""
    triangle = torch.tensor([[0, 1, 2], [1, 2, 0]])
    path = torch.tensor([[3, 4, 5, 6, 7, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 3, 4, 5, 6, 7]])
    graph = Graph.from_edge_index(torch.cat([triangle, path], dim=1), num_nodes=9).add_self_loops().gcn_norm()
    parts = contiguous_partition(graph, [3, 3, 3])
    x = torch.randn(9, 6)
    loader = ClusterLoader(parts.permute(graph), parts, x=gas.functional.SparseRows.of(x) if is_sparse else x)
    model = MODELS["GCN"](6, 8, 4, 3)
    attach_histories(model, 9)
    found = diagnose(model, loader, lambda model, batch: model(batch.features, batch))
    assert all(layer.pulls == 2 for layer in found.layers)
    assert [(g.least, g.most, g.count) for g in found.output.by_distance] == [
        (0, 0, 2),
        (1, 1, 2),
        (2, None, 5),
    ]
    assert found.output.is_rigorous


@pytest.mark.parametrize("name", ["GCN", "GCN, linear ends"])
def test_forward_that_adds_to_the_model_is_estimated(name: str) -> None:
    model, loader, _ = trained(name)
    plain = diagnose(model, loader)
    for scale in (1.0, 100.0):
        found = diagnose(model, loader, lambda model, batch, by=scale: by * model(batch.x, batch))
        assert not found.output.is_rigorous
        assert all(layer.is_exact for layer in found.layers[:-1])
        # what the errors show is in the estimate, and the last layer's residual
        assert found.output.bound.max >= plain.output.bound.max
        assert found.output.error.max <= found.output.bound.max * (1 + 1e-5)


def test_calls_of_layers_are_those_of_inference_and_of_one_sweep() -> None:
    """What it costs, without a clock: a layer in front of the histories is not computed again."""
    model, loader, _ = trained("GCN, linear ends", 4)
    calls: Counter[str] = Counter()

    def count(name: str, module: Any) -> None:
        compute = module.forward

        def forward(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return compute(*args, **options)

        module.forward = forward

    for name, module in model.named_modules():
        if isinstance(module, HistoryLayer | nn.Linear) and not name.endswith(".lin"):
            count(name, module)
    gas.inference(model, loader)
    batches = len(loader)
    assert calls == Counter({f"convs.{place}": batches for place in range(4)} | {"lins.0": batches, "lins.1": batches})
    calls.clear()
    diagnose(model, loader)
    assert calls["convs.0"] == batches
    assert all(calls[f"convs.{place}"] == 2 * batches for place in range(1, 4))
    assert calls["lins.0"] == calls["lins.1"] == 2 * batches


def test_the_bench_gives_rows() -> None:
    from bench import bench_diagnostics
    from bench.groups import Setting

    rows = bench_diagnostics.measure(Setting(size="tiny", seconds=0.01))
    assert {row["way"] for row in rows} == {bench_diagnostics.INFERENCE, bench_diagnostics.OURS}
    assert all(row["ms"] > 0.0 for row in rows)


def test_errors_say_what_is_wrong() -> None:
    model, loader = make("GCN")
    with pytest.raises(ValueError, match="no layer of GCN has a history"):
        diagnose(model, loader)
    histories = attach_histories(model, loader.graph.num_nodes)
    train(model, loader, histories, epochs=1)
    with pytest.raises(TypeError, match="loader must be a ClusterLoader, got list"):
        diagnose(model, [])  # type: ignore[arg-type]
    _, other = make("GCN", num_parts=5)
    with pytest.raises(ValueError, match="holds rows in the order"):
        diagnose(model, other)
    _, small = make("GCN", graph="symmetric", num_parts=2)
    if small.graph.num_nodes != loader.graph.num_nodes:
        with pytest.raises(ValueError, match="nodes but"):
            diagnose(model, small)
    for module in model.modules():
        if isinstance(module, HistoryLayer):
            module.halo = "drop"
    with pytest.raises(ValueError, match="leaves its halo out"):
        diagnose(model, loader)

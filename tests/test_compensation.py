"""Momentum for halo rows, and compensated gradients: GAS at their neutral settings, their equations at others."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import (
    Batch,
    ClusterLoader,
    Compensated,
    Graph,
    Histories,
    attach_histories,
    contiguous_partition,
    functional,
    inference,
    load_checkpoint,
    random_partition,
    save_checkpoint,
)  # fmt: skip
from gas_triton.cli import main
from gas_triton.compensation import SCORES
from gas_triton.csr import Csr
from gas_triton.datasets import Dataset, generate, load
from gas_triton.models import GCN, GIN, SAGE
from gas_triton.nn import GCNConv
from gas_triton.nn.base import HistoryLayer
from gas_triton.training import TrainConfig, _Run, train

from .fake_device import Fake
from .prefetch_runs import TIERS, Training, assert_same, attach
from .reference import GRAPHS, Edges
from .test_training import numbers

NUM_NODES = 30
WIDTHS = (6, 8, 7, 4)


def scaled(edges: Edges) -> Edges:
    """Weights that do not let rows grow from layer to layer."""
    return edges if edges.weight is None else edges._replace(weight=0.3 * edges.weight)


EDGES = {name: scaled(edges) for name, edges in GRAPHS.items()}
# edges in both directions, of different weights
NUM_EDGES = GRAPHS["symmetric"].edge_index.size(1)
EDGES["mutual"] = GRAPHS["symmetric"]._replace(weight=torch.linspace(0.05, 0.3, NUM_EDGES, dtype=torch.float64))


def make_loader(name: str = "weighted_directed", num_parts: int = 6, **options: Any) -> ClusterLoader:
    graph = EDGES[name].graph()
    parts = random_partition(graph, min(num_parts, graph.num_nodes))
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(graph.num_nodes, WIDTHS[0], dtype=torch.float64, generator=draw)
    weight = torch.rand(graph.num_nodes, WIDTHS[-1], dtype=torch.float64, generator=draw)
    options = {"batch_size": 2, "seed": 5, "x": x, "weight": weight, **options}
    return ClusterLoader(parts.permute(graph), parts, **options)


def attach_to(model: nn.Module, gradients: bool = False, **options: Any) -> Histories:
    return attach_histories(model, NUM_NODES, dtype=torch.float64, gradients=gradients, **options)


def loss_of(out: Tensor, batch: Batch) -> Tensor:
    """A sum over nodes, as compensated gradients need it."""
    return (out.sin() * batch.weight).sum()


class InitialResidual(HistoryLayer):
    """out_i = W (0.7 sum_j w_ij h_j + 0.3 x0_i): a layer with another argument of rows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.lin = nn.Linear(channels, channels)

    @property
    def history_dim(self) -> int:
        return self.in_channels

    def forward(self, x: Tensor, x_0: Tensor, batch: Batch) -> Tensor:
        out = self.read(x, batch).aggregate("sum", batch.edge_weight)
        return self.lin(0.7 * out + 0.3 * x_0[: batch.num_nodes])


class Deep(nn.Module):
    """A linear layer in front, whose rows every layer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(6, 5), nn.Linear(5, 4)
        self.convs = nn.ModuleList(InitialResidual(5) for _ in range(3))

    def forward(self, x: Any, batch: Batch) -> Tensor:
        x = x_0 = self.front(x if isinstance(x, Tensor) else x.rows()).relu()
        for conv in self.convs:
            x = conv(x, x_0, batch).relu()
        return self.back(x)


class Loose(nn.Module):
    """A parameter of its own between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.one, self.two = GCNConv(6, 5, normalize=False), GCNConv(5, 4, normalize=False)

    def forward(self, x: Any, batch: Batch) -> Tensor:
        return self.two(self.one(x, batch).relu() * self.scale, batch)


def gcn(**options: Any) -> nn.Module:
    return GCN(6, 8, 4, 3, normalize=False, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gcn": gcn,
    "gcn_residual": lambda: gcn(residual=True),
    "gcn_linear": lambda: gcn(linear=True, residual=True),
    "gcn_narrowing": lambda: GCN(6, 40, 4, 3, normalize=False),
    "sage_sum": lambda: SAGE(6, 8, 4, 3, aggr="sum"),
    "initial_residual": Deep,
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "gcn_dropout": lambda: gcn(dropout=0.5),
    "gcn_batch_norm": lambda: gcn(batch_norm=True, dropout=0.3),
    "gcn_linear_batch_norm": lambda: gcn(batch_norm=True, linear=True, residual=True),
    "sage_mean": lambda: SAGE(6, 8, 4, 3, dropout=0.5),
    "sage_max": lambda: SAGE(6, 8, 4, 3, aggr="max"),
    "sage_project": lambda: SAGE(6, 8, 4, 3, project=True),
    "gin": lambda: GIN(6, 8, 4, 3),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = {**MODELS, **OTHERS, "loose": Loose}[name]().double()
    for parameter in model.parameters():
        # biases that start at 0 would hide a missing one; small, because sums without normalisation grow
        nn.init.uniform_(parameter, -0.15, 0.15)
    return model


# --- plan ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_halo_rows_are_planned_as_a_batch(name: str, mutual: bool) -> None:
    loader = make_loader(name)
    graph = loader.graph
    rowptr, col = graph.rowptr.tolist(), graph.col.tolist()
    for clusters in ([0], [2, 1], [1, 0, 3])[: graph.num_nodes]:
        clusters = [cluster for cluster in clusters if cluster < loader.parts.num_parts]
        batch = loader.batch(clusters)
        halo = loader.halo_batch(batch, mutual)
        nodes, rows = batch.node_ids.tolist(), batch.halo_ids.tolist()
        edges = [(r, col[e], e) for r, node in enumerate(rows) for e in range(rowptr[node], rowptr[node + 1])]
        inner = [edge for edge in edges if edge[1] in rows and mutual]
        outer = [edge for edge in edges if edge[1] in nodes]

        def targets(csr: Csr, rows: Sequence[int] = rows) -> list[int]:
            return torch.repeat_interleave(torch.arange(len(rows)), csr.rowptr.diff().long()).tolist()

        assert (halo.node_ids.tolist(), halo.halo_ids.tolist()) == (rows, nodes)
        assert (halo.num_nodes, halo.num_halo) == (len(rows), len(nodes))
        assert (targets(halo.inner), targets(halo.outer)) == ([r for r, _, _ in inner], [r for r, _, _ in outer])
        assert halo.inner.col.tolist() == [rows.index(source) for _, source, _ in inner]
        assert halo.outer.col.tolist() == [source for _, source, _ in outer]
        assert halo.outer_slot.tolist() == [nodes.index(source) for _, source, _ in outer]
        assert halo.edge_ids.tolist() == [place for _, _, place in inner + outer]
        if graph.weight is not None:
            assert torch.equal(halo.edge_weight, graph.weight[halo.edge_ids])
        spanned = [node for first, last in halo.spans.tolist() for node in range(first, last)]
        assert spanned == rows
        assert all(start > last for (_, last), (start, _) in zip(halo.spans, halo.spans[1:], strict=False))
        # the map is clean, and not the one of plans
        assert loader._halo_planner is not loader._planner
        assert (loader._halo_planner._local == -1).all()


def test_a_halo_batch_is_planned_once_for_a_plan_and_follows_it() -> None:
    loader = make_loader(shuffle=False)
    first, again = loader.batch([0, 1]), loader.batch([0, 1])
    assert loader.halo_batch(first) is loader.halo_batch(again)
    assert loader.halo_batch(first) is not loader.halo_batch(first, mutual=False)
    assert loader.num_planned == 1
    other = make_loader("symmetric")
    with pytest.raises(ValueError, match=r"batch is of a graph in the order [\w-]+, the loader's is [\w-]+"):
        other.halo_batch(first)


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_of_the_share_of_edges_that_the_step_has(score: str) -> None:
    loader = make_loader("directed")
    model = make("gcn")
    attach_to(model, gradients=True)
    weights = []
    for batch in loader.in_order():
        step = Compensated(model, loader, 0.5, True, score)
        seen = set(batch.all_ids.tolist())
        weight = _Weights.of(step, batch)
        for node, value in zip(batch.halo_ids.tolist(), weight, strict=True):
            sources = loader.graph.col[loader.graph.rowptr[node] : loader.graph.rowptr[node + 1]].tolist()
            share = sum(source in seen for source in sources) / len(sources) if sources else 1.0
            expected = {"constant": 1, "linear": share, "convex": share**2, "concave": 2 * share - share**2}[score]
            assert value == pytest.approx(0.5 * expected)
            weights.append(value)
    assert (len(set(weights)) == 1) == (score == "constant")


class _Weights:
    @staticmethod
    def of(owner: Compensated, batch: Batch) -> list[float]:
        from gas_triton.compensation import _Step

        weight = _Step(owner, batch).weight
        return [weight] * batch.num_halo if isinstance(weight, float) else weight[:, 0].tolist()


# --- neutral settings ------------------------------------------------------------------------------------------------


def states(model: nn.Module, histories: Histories) -> list[Tensor]:
    tables = [store.table for name, store in histories.items() if not name.endswith(".gradient")]
    gradients = [parameter.grad for parameter in model.parameters()]
    return [*model.parameters(), *gradients, *model.buffers(), *tables]


def assert_close(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("handle", [False, True], ids=["x", "features"])
@pytest.mark.parametrize("graph", ["weighted_directed", "weighted_symmetric"])
@pytest.mark.parametrize("name", [*MODELS, *OTHERS, "loose"])
def test_without_momentum_training_is_gas(name: str, graph: str, handle: bool) -> None:
    loader = make_loader(graph)
    gas, model = make(name), make(name)
    histories = [attach_to(gas), attach_to(model)]
    compensated = Compensated(model, loader, 0.0)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (gas, model)]
    for _ in range(2):
        for batch in loader:
            outs = []
            for call, optimizer in zip((gas, compensated), optimizers, strict=True):
                torch.manual_seed(loader.epoch)
                optimizer.zero_grad()
                x = batch.features if handle else batch.x.clone().requires_grad_()
                outs.append([call(x, batch)])
                loss_of(outs[-1][0], batch).backward()
                outs[-1] += [] if handle else [x.grad]
                optimizer.step()
            assert_close(outs[0], outs[1])
            assert_close(states(gas, histories[0]), states(model, histories[1]))
    for name in histories[0]:
        assert torch.equal(histories[0][name].age(), histories[1][name].age())


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_with_empty_gradient_tables_a_step_is_gas(name: str) -> None:
    loader = make_loader()
    gas, model = make(name), make(name)
    histories = [attach_to(gas), attach_to(model, gradients=True)]
    compensated = Compensated(model, loader, 0.0, gradients=True)
    with torch.no_grad():
        for batch in loader:
            for call in (gas, model):
                torch.manual_seed(0)
                call(batch.x, batch)
    batch = loader.batch([3, 1])
    outs = []
    for call in (gas, compensated):
        torch.manual_seed(0)
        outs.append(call(batch.x, batch))
        loss_of(outs[-1], batch).backward()
    assert_close(outs[:1], outs[1:])
    assert_close(states(gas, histories[0]), states(model, histories[1]))


# --- exact tables ----------------------------------------------------------------------------------------------------


def summed_gradients(model: nn.Module, call: Callable[..., Tensor], batches: Iterable[Batch]) -> list[Tensor]:
    model.zero_grad()
    for batch in batches:
        loss_of(call(batch.x, batch), batch).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("graph", ["mutual", "weighted_symmetric"])
@pytest.mark.parametrize("name", MODELS)
def test_with_exact_tables_gradients_add_up_to_those_of_the_full_batch(name: str, graph: str) -> None:
    loader, model = make_loader(graph), make(name)
    histories = attach_to(model, gradients=True)
    compensated = Compensated(model, loader, 0.0, gradients=True)
    # the whole graph as one batch fills the tables
    exact = summed_gradients(model, compensated, [loader.full()])
    assert_close(exact, summed_gradients(model, model, [loader.full()]))
    tables = [store.table.clone() for store in histories.values()]
    assert max(errors(summed_gradients(model, compensated, loader), exact)) < 1e-10
    # what in-batch rows were pushed is what was there
    assert_close([store.table for store in histories.values()], tables)
    # GAS leaves out what reaches a batch through its halo; so would averages with incomplete rows
    assert max(errors(summed_gradients(model, model, loader), exact)) > 0.1
    assert max(errors(summed_gradients(model, Compensated(model, loader, 0.5, True), loader), exact)) > 1e-3


def test_on_a_directed_graph_rows_that_only_read_the_batch_are_left_out() -> None:
    # 0 -> 1 -> 2, a cluster each: 2 reads 1 but is not among its neighbours
    edges = torch.tensor([[0, 1], [1, 2]])
    graph = Graph.from_edge_index(edges, num_nodes=3)
    parts = contiguous_partition(graph, [1, 1, 1])
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(3, width, dtype=torch.float64, generator=draw) for width in (6, 4))
    loader = ClusterLoader(parts.permute(graph), parts, x=x, weight=weight)
    model = make("gcn")
    attach_histories(model, 3, dtype=torch.float64, gradients=True)
    compensated = Compensated(model, loader, 0.0, gradients=True)
    exact = summed_gradients(model, compensated, [loader.full()])
    assert max(errors(summed_gradients(model, compensated, loader), exact)) > 0.1


# --- the equations ---------------------------------------------------------------------------------------------------


class Dense:
    """Three GCN layers with ReLUs between on dense matrices, and the tables of both methods."""

    def __init__(self, model: nn.Module, loader: ClusterLoader) -> None:
        graph = loader.graph
        num_nodes = graph.num_nodes
        self.matrix = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
        target = torch.repeat_interleave(torch.arange(num_nodes), graph.rowptr.diff().long())
        self.matrix.index_put_((target, graph.col.long()), graph.weight, accumulate=True)
        self.x = loader.x
        convs = [model.convs[place] for place in range(3)]
        self.weights = [conv.lin.weight.detach().clone() for conv in convs]
        self.biases = [conv.bias.detach().clone() for conv in convs]
        self.rows = [torch.zeros(num_nodes, 8, dtype=torch.float64) for _ in range(2)]
        self.gradients = [torch.zeros(num_nodes, width, dtype=torch.float64) for width in (8, 4)]

    def layer(self, place: int, rows: Tensor) -> Tensor:
        return rows @ self.weights[place].T + self.biases[place]

    def momentum(self, batch: Batch, gamma: float) -> tuple[Tensor, list[Tensor]]:
        b, h = batch.node_ids, batch.halo_ids
        to_b, to_h = self.matrix[b], self.matrix[h]
        leaves = [t.requires_grad_() for t in (*self.weights, *self.biases)]
        out = self.layer(0, to_b @ self.x)
        fresh = self.layer(0, to_h[:, b] @ self.x[b])
        for place in (1, 2):
            table, below = self.rows[place - 1], out.relu()
            table[h] = (1 - gamma) * table[h] + gamma * fresh.detach().relu()
            table[b] = below.detach()
            out = self.layer(place, to_b[:, b] @ below + to_b[:, h] @ table[h].clone())
            fresh = self.layer(place, to_h[:, b] @ below)
        grads = torch.autograd.grad(loss_of(out, batch), leaves)
        self.weights, self.biases = [t.detach() for t in self.weights], [t.detach() for t in self.biases]
        return out.detach(), list(grads)

    def lmc(self, batch: Batch, beta: float) -> tuple[Tensor, list[Tensor]]:
        b, h = batch.node_ids, batch.halo_ids
        n = b.numel()
        # rows of the step, in-batch rows first; in-batch rows have all their neighbours there
        step = torch.cat([b, h])
        matrix = self.matrix[step][:, step]
        outs, read = [self.layer(0, torch.cat([self.matrix[b] @ self.x, matrix[n:] @ self.x[step]]))], [None]
        for place in (1, 2):
            rows, table = outs[-1].relu(), self.rows[place - 1]
            halo = (1 - beta) * table[h] + beta * rows[n:]
            table[b] = rows[:n]
            read.append(matrix[:n] @ torch.cat([rows[:n], halo]))
            outs.append(self.layer(place, matrix @ torch.cat([rows[:n], halo])))
        read[0] = self.matrix[b] @ self.x

        out = outs[2][:n].clone().requires_grad_()
        (loss,) = torch.autograd.grad(loss_of(out, batch), out)
        v = torch.cat([loss, torch.zeros(h.numel(), loss.size(1), dtype=torch.float64)])
        weights, biases = [None] * 3, [None] * 3
        for place in (2, 1, 0):
            weights[place], biases[place] = v[:n].T @ read[place], v[:n].sum(0)
            if place == 0:
                break
            table = self.gradients[place - 1]
            own = beta if place == 1 else 0.0
            hat = torch.cat([v[:n], (1 - own) * table[h] + own * v[n:]])
            table[b] = v[:n]
            v = (matrix.T @ hat @ self.weights[place]) * (outs[place - 1] > 0)
        return out.detach(), [*weights, *biases]


@pytest.mark.parametrize("graph", ["weighted_directed", "mutual"])
@pytest.mark.parametrize("gradients", [False, True], ids=["momentum", "lmc"])
def test_training_follows_the_equations(gradients: bool, graph: str) -> None:
    loader, model = make_loader(graph), make("gcn")
    histories = attach_to(model, gradients)
    dense, compensated = Dense(model, loader), Compensated(model, loader, 0.3, gradients)
    tables = [*dense.rows, *(dense.gradients if gradients else [])]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        for batch in loader:
            expected, grads = (dense.lmc if gradients else dense.momentum)(batch, 0.3)
            optimizer.zero_grad()
            out = compensated(batch.x, batch)
            loss_of(out, batch).backward()
            optimizer.step()
            parameters = [model.convs[place].lin.weight for place in range(3)]
            parameters += [model.convs[place].bias for place in range(3)]
            assert_close([out], [expected])
            assert_close([parameter.grad for parameter in parameters], grads)
            for place in range(3):
                dense.weights[place] = dense.weights[place] - 0.05 * grads[place]
                dense.biases[place] = dense.biases[place] - 0.05 * grads[place + 3]
            assert_close([store.table for store in histories.values()], tables)
    assert all(table.abs().max() > 0 for table in tables)


def test_batch_norms_take_their_statistics_from_in_batch_rows() -> None:
    loader, gas, model = make_loader(), make("gcn_batch_norm"), make("gcn_batch_norm")
    attach_to(gas), attach_to(model, gradients=True)
    batch = loader.batch([0, 2])
    outs = []
    for call in (gas, Compensated(model, loader, 1.0, gradients=True)):
        torch.manual_seed(0)
        outs.append(call(batch.x, batch))
    # the first layer's in-batch rows are complete either way, the others' are not
    assert_close(
        [model.norms[0].running_mean, model.norms[0].running_var], [gas.norms[0].running_mean, gas.norms[0].running_var]
    )
    assert all(norm.num_batches_tracked == 1 and norm.training for norm in model.norms)
    assert (outs[0] - outs[1]).abs().max() > 1e-3


def test_in_batch_and_halo_rows_of_a_layer_read_the_same_dropout_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, model = make_loader(), make("gcn_dropout")
    attach_to(model)
    batch, seeds, draw = loader.batch([0, 2]), [], functional.draw_seed

    def recorded(device: torch.device) -> Tensor:
        seeds.append(draw(device))
        return seeds[-1]

    monkeypatch.setattr(functional, "draw_seed", recorded)
    Compensated(model, loader, 0.5)(batch.x, batch)
    values = [int(seed) for seed in seeds]
    assert values[::2] == values[1::2]
    assert len(set(values)) == 3


# --- with the rest ---------------------------------------------------------------------------------------------------


class CompensatedTraining(Training):
    """`Training` with compensation."""

    def __init__(self, gradients: bool, *args: Any, engine: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        tier, dtype = options.get("tier", "pinned"), options.get("dtype", torch.float32)
        self.histories = attach(self.model, dtype=dtype, gradients=gradients, **TIERS[tier])
        for store in self.histories.values() if engine is not None else ():
            store.engine = engine
        self.histories._stage()
        self.compensated = Compensated(self.model, self.loader, 0.4, gradients)

    def forward(self, batch: Batch) -> Tensor:
        loss = F.cross_entropy(self.compensated(batch.x, batch), batch.y, reduction="sum") / NUM_NODES
        self.log.append(loss.detach())
        return loss


def after_three_epochs(gradients: bool, depth: int, **options: Any) -> list[Tensor]:
    training = CompensatedTraining(gradients, depth, **options)
    for _ in range(3):
        training.epoch()
    return training.state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["momentum", "lmc"])
def test_tiers_and_prefetching_change_no_bit(gradients: bool, dtype: torch.dtype) -> None:
    expected = after_three_epochs(gradients, 0, tier="device", dtype=dtype)
    assert_same(after_three_epochs(gradients, 0, tier="device", dtype=dtype), expected)
    for tier in ("pinned", "in_place", "file"):
        assert_same(after_three_epochs(gradients, 1, tier=tier, dtype=dtype), expected)


@pytest.mark.parametrize("gradients", [False, True], ids=["momentum", "lmc"])
def test_the_schedule_of_streams_orders_what_compensation_reads_and_writes(gradients: bool) -> None:
    expected = after_three_epochs(gradients, 0, tier="device")
    for seed in range(3):
        assert_same(after_three_epochs(gradients, 1, tier="pinned", engine=Fake(seed)), expected)


def test_halo_rows_that_momentum_writes_are_not_fetched_twice() -> None:
    training = CompensatedTraining(False, 1, tier="pinned")
    for _ in range(3):
        training.epoch()
    stats = training.histories.transfer_stats()
    assert (stats["misses"], stats["pushes"]) == (0, 3 * 3 * 2)


def test_checkpoints_hold_gradient_tables_and_a_reset_forgets_them(tmp_path: Path) -> None:
    training = CompensatedTraining(True, 0, tier="device")
    training.epoch()
    histories = training.histories
    assert list(histories) == ["convs.1", "convs.2", "convs.1.gradient", "convs.2.gradient"]
    assert [store.dim for store in histories.values()] == [8, 8, 8, 4]
    saved = {name: store.table.clone() for name, store in histories.items()}
    assert all(table.abs().max() > 0 for table in saved.values())
    save_checkpoint(tmp_path / "saved", {}, histories)
    histories.reset()
    assert all(not store.table.any() for store in histories.values())
    load_checkpoint(tmp_path / "saved", histories, training.loader.graph)
    assert all(torch.equal(histories[name].table, table) for name, table in saved.items())
    plain = attach(copy.deepcopy(training.model))
    with pytest.raises(ValueError, match=r"the state has histories of .* but the model of \['convs.1', 'convs.2'\]"):
        plain.load_state_dict(histories.state_dict())


def test_a_batch_without_a_halo_is_full_batch_training() -> None:
    graph = GRAPHS["weighted_directed"].graph()
    parts = contiguous_partition(graph, [NUM_NODES])
    x = torch.randn(NUM_NODES, 6, dtype=torch.float64)
    loader = ClusterLoader(parts.permute(graph), parts, x=x, weight=torch.rand(NUM_NODES, 4).double())
    batch = loader.batch([0])
    for gradients in (False, True):
        model = make("gcn_linear")
        histories = attach_to(model, gradients)
        found = summed_gradients(model, Compensated(model, loader, 0.5, gradients), [batch])
        assert_close(found, summed_gradients(model, model, [batch]))
        assert all(store.table.abs().max() > 0 for store in histories.values())


def test_evaluation_is_the_model_and_forwards_are_put_back() -> None:
    loader, model = make_loader(), make("gcn_dropout")
    attach_to(model)
    compensated = Compensated(model, loader, 0.5)
    batch = loader.batch([0, 1])
    compensated(batch.x, batch)
    model.convs[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("in a layer")))
    with pytest.raises(KeyError, match="in a layer"):
        compensated(batch.x, batch)
    assert all("forward" not in vars(module) for module in model.modules())
    model.convs[1]._forward_hooks.clear()
    model.eval()
    assert torch.equal(compensated(batch.x, batch), model(batch.x, batch))
    assert torch.equal(inference(model, loader), inference(copy.deepcopy(model), loader))


class Branches(nn.Module):
    """Two layers read the features, the second of which has a history that it must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (GCNConv(i, o, normalize=False) for i, o in ((6, 5), (6, 5), (5, 4)))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.last((self.first(x, batch) + self.second(x, batch)).relu(), batch)


def test_layers_that_are_given_complete_rows_leave_their_history_alone() -> None:
    loader = make_loader("mutual")
    torch.manual_seed(0)
    model = Branches().double()
    histories = attach_to(model, gradients=True)
    compensated = Compensated(model, loader, 0.0, gradients=True)
    exact = summed_gradients(model, compensated, [loader.full()])
    histories["second"].reset()
    assert max(errors(summed_gradients(model, compensated, loader), exact)) < 1e-10
    assert not histories["second"].table.any()


# --- bad input -------------------------------------------------------------------------------------------------------


class Short(nn.Module):
    """Gives one row too few, or calls something that compensation cannot."""

    def __init__(self, how: str = "rows") -> None:
        super().__init__()
        self.how = how
        self.one, self.two = GCNConv(6, 5, normalize=False), GCNConv(5, 4, normalize=False)

    def forward(self, x: Any, batch: Batch) -> Tensor:
        h = self.one(x, batch)
        if self.how == "aggregate":
            return functional.aggregate(h, batch)
        if self.how == "other rows":
            h = h[:3]
        out = self.two(h, batch)
        return out[:-1] if self.how == "rows" else out


def attached(model: nn.Module, layers: list[str] | None = None, gradients: bool = False) -> nn.Module:
    attach_histories(model, NUM_NODES, layers=layers, gradients=gradients)
    return model


@pytest.mark.parametrize(
    "make_model, options, error, message",
    [
        (gcn, {}, ValueError, r"model has no layer with a history: attach_histories\(model, num_nodes\) first"),
        (lambda: nn.Linear(2, 2), {}, ValueError, r"model has no layer with a history"),
        (lambda: attached(gcn(halo="drop")), {}, ValueError, r"convs.0 leaves the halo out \(halo='drop'\)"),
        (lambda: attached(gcn()), {"gradients": True}, ValueError, r"convs.1 has no history of gradients: .*=True\)"),
        (lambda: attached(gcn()), {"gradients": 1}, TypeError, r"gradients must be a bool, got 1"),
        (lambda: attached(gcn()), {"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        (lambda: attached(gcn()), {"momentum": True}, ValueError, r"momentum must be in \[0, 1\], got True"),
        (lambda: attached(gcn()), {"score": "cubic"}, ValueError, r"score must be one of constant, linear, convex, c"),
        (lambda: attached(gcn()), {"score": "linear"}, ValueError, r"score 'linear' is for gradients=True"),
        (lambda: attached(gcn()), {"loader": [1]}, TypeError, r"loader must be a ClusterLoader, got list"),
        (
            lambda: attached(Loose(), gradients=True),
            {"gradients": True},
            ValueError,
            r"model has parameters of its own beside layers, which halo rows would give gradients",
        ),
    ],
)
def test_what_cannot_be_compensated_is_refused(
    make_model: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Compensated(**{"model": make_model(), "loader": make_loader(), **options})


def test_a_module_that_gives_more_than_rows_is_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = GCNConv(6, 5, normalize=False), GCNConv(5, 4, normalize=False)
            self.lstm = nn.LSTM(5, 5, batch_first=True)

        def forward(self, x: Any, batch: Batch) -> Tensor:
            return self.two(self.lstm(self.one(x, batch)[:, None])[0][:, 0], batch)

    loader = make_loader(x=torch.randn(NUM_NODES, 6))
    batch = loader.batch([0, 1])
    with pytest.raises(TypeError, match=r"LSTM must give a tensor with a row for each of its rows, .* got tuple"):
        Compensated(attached(Recurrent()), loader)(batch.x, batch)


def test_a_call_with_other_rows_is_refused() -> None:
    loader = make_loader(x=torch.randn(NUM_NODES, 6))
    batch = loader.batch([0, 1])
    num_rows = batch.num_nodes + batch.num_halo
    model = attached(gcn())
    compensated = Compensated(model, loader)
    with pytest.raises(ValueError, match=rf"x must have {num_rows} rows, in-batch and halo rows, got \[\d+, 6\]"):
        compensated(batch.x[: batch.num_nodes], batch)
    with pytest.raises(TypeError, match=r"x must be batch.x or batch.features, got list"):
        compensated([1.0], batch)
    with pytest.raises(TypeError, match=r"batch must be a Batch of a ClusterLoader, got int"):
        compensated(batch.x, 3)
    model.convs[1].history = None
    with pytest.raises(ValueError, match=r"convs.1 has no history that holds its halo rows"):
        compensated(batch.x, batch)
    for how, message in {
        "rows": rf"model must give {num_rows} rows, one for each of its batch, got \[{num_rows - 1}, 4\]",
        "aggregate": r"a compensated batch has no inner: only layers with histories can aggregate in it",
        "other rows": rf"two: x must have {num_rows} rows or be the model's input, got \[3, 5\]",
    }.items():
        with pytest.raises((ValueError, AttributeError), match=message):
            Compensated(attached(Short(how)), loader)(batch.x, batch)


# --- training --------------------------------------------------------------------------------------------------------

SMALL = TrainConfig(hidden=16, dropout=0.3, lr=0.05, epochs=4, eval_every=2, num_parts=6, batch_size=2, layers=3)
WAYS: dict[str, dict[str, Any]] = {
    "momentum": {"halo_momentum": 0.3},
    "lmc": {"halo_momentum": 0.5, "compensation": "LMC"},
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generate(600, 6000, num_classes=4, num_features=16, signal=2.0)


@pytest.mark.parametrize("way", WAYS)
def test_runs_learn_repeat_and_resume(dataset: Dataset, way: str, tmp_path: Path) -> None:
    config = replace(SMALL, **WAYS[way])
    result = train(dataset, config)
    # a class is a quarter of the nodes
    assert result.test_acc > 0.6
    train(dataset, replace(config, epochs=2), checkpoint=tmp_path)
    assert numbers(train(dataset, config, checkpoint=tmp_path, resume=True)) == numbers(result)
    with pytest.raises(ValueError, match=r"holds a checkpoint with (halo_momentum|compensation) "):
        train(dataset, SMALL, checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("model", ["APPNP", "GCN2"])
def test_other_models_train_compensated(dataset: Dataset, model: str) -> None:
    # a model's gradient tables are as wide as what its layers give
    result = train(dataset, replace(SMALL, model=model, epochs=2, compensation="lmc", halo_momentum=0.5))
    assert all(math.isfinite(record.train_loss) for record in result.epochs)
    assert result.epochs[1].train_loss < result.epochs[0].train_loss


def test_the_loss_has_one_unit_and_batches_without_training_nodes_pass_gradients_on(dataset: Dataset) -> None:
    run = _Run(dataset, replace(SMALL, compensation="lmc", lr=0.0, dropout=0.0), torch.device("cpu"), None)
    run.labelled = [0 if cluster < 2 else count for cluster, count in enumerate(run.labelled)]
    run.mean_labelled = sum(run.labelled) / len(run.loader)
    run.loader.node_tensors["target"][: int(run.loader.parts.ptr[2])] = -100
    stores = run.histories
    # until the tables are those of one state
    for _ in range(4):
        for batch in run.loader.in_order():
            run._step(batch, run._num_labelled(batch))
    batch = run.loader.batch([0, 1])
    # no loss of its own, but gradients of the layer below from its halo
    assert not stores["convs.2.gradient"].table[batch.node_ids].any()
    assert stores["convs.1.gradient"].table[batch.node_ids].any()
    other = run.loader.batch([2, 3])
    target = other.target[other.target >= 0]
    logits = run.model.eval()(other.features, other)[other.target >= 0].detach().requires_grad_()
    F.cross_entropy(logits, target, reduction="sum").backward()
    unit = sum(run.labelled) / len(run.loader)
    kept = stores["convs.2.gradient"].table[other.node_ids[other.target >= 0]]
    torch.testing.assert_close(kept * unit, logits.grad, rtol=1e-3, atol=1e-5)


def test_the_command_line_compensates(tmp_path: Path) -> None:
    options = ["train", "--dataset", "generated", "--nodes", "600", "--edges", "6000", "--hidden", "8", "--quiet"]
    options += ["--num-parts", "6", "--batch-size", "2", "--epochs", "2", "--no-cache", "--device", "cpu"]
    assert (
        main([*options, "--compensation", "lmc", "--halo-momentum", "0.5", "--json", str(tmp_path / "run.json")]) == 0
    )
    text = (tmp_path / "run.json").read_text()
    assert re.search(r'"halo_momentum": 0.5,\s+"compensation": "lmc"', text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"halo_momentum": -0.1}, r"halo_momentum must be in \[0, 1\], got -0.1"),
        ({"compensation": "graphfm"}, r"compensation must be one of none, lmc, got 'graphfm'"),
        (
            {"compensation": "lmc", "full_batch": True},
            r"halo_momentum and compensation are for training with histories",
        ),
        ({"halo_momentum": 0.2, "histories": False}, r"halo_momentum and compensation are for training with histories"),
        ({"halo_momentum": 0.2, "layers": 1}, r"are for models of at least 2 layers, got 1"),
        ({"halo_momentum": 0.2, "edge_dropout": 0.1}, r"halo_momentum and compensation do not go together with"),
        ({"compensation": "lmc", "lipschitz": 0.1}, r"halo_momentum and compensation do not go together with"),
    ],
)
def test_a_config_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize("way", WAYS)
def test_cora_reaches_what_is_known_of_it(data_root: Path, way: str) -> None:
    config = TrainConfig(hidden=16, lr=0.02, weight_decay=5e-4, grad_norm=1.0, epochs=20, eval_every=5)
    assert train(load("cora", data_root), replace(config, **WAYS[way])).test_acc > 0.76

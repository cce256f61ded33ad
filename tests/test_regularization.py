"""`LipschitzPenalty`: its value and gradient against formulas written out, and that nothing else changes."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import Batch, ClusterLoader, attach_histories, random_partition
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.models import GCN, GIN, MODELS, SAGE
from gas_triton.nn import GINConv, HistoryLayer
from gas_triton.regularization import LipschitzPenalty

from .reference import random_edges

N, WIDTH = 30, 5


def make_loader(
    prepare: Callable[..., Any] = lambda graph: graph, num_parts: int = 3, device: str = "cpu"
) -> ClusterLoader:
    graph = random_edges(N, 120, symmetric=True, plain=True).graph()
    parts = random_partition(graph, num_parts)
    graph, x = parts.permute(graph, torch.randn(N, WIDTH, dtype=torch.float64))
    graph = prepare(graph)
    if graph.weight is not None:
        graph.weight = graph.weight.double()
    return ClusterLoader(graph.to(device), parts, x=x.to(device))


def dense(batch: Batch) -> Tensor:
    """[B, B + H], the weights of the batch's edges."""
    weight = torch.ones(batch.num_edges, dtype=torch.float64) if batch.edge_weight is None else batch.edge_weight
    row = torch.cat([row_of_edge(*batch.inner), row_of_edge(*batch.outer)])
    col = torch.cat([batch.inner.col.long(), batch.outer_slot.long() + batch.num_nodes])
    matrix = torch.zeros(batch.num_nodes, batch.num_nodes + batch.num_halo, dtype=torch.float64)
    return matrix.index_put_((row, col), weight.double(), accumulate=True)


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def filled(model: nn.Module, loader: ClusterLoader) -> Any:
    """Histories of random rows."""
    histories = attach_histories(model, N, dtype=torch.float64)
    for batch in loader.in_order():
        for store in histories.values():
            store.push(torch.randn(batch.num_nodes, store.dim, dtype=torch.float64), batch)
    return histories


# --- its value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, range(1, 3), [0, 3]])
def test_gin_is_penalised_as_in_the_example_of_pygas(layers: Any) -> None:
    loader = make_loader()
    batch, strength, noise = loader.full(), 0.7, 0.1
    model = GIN(WIDTH, 8, 4, num_layers=4).double()
    for conv in model.convs:
        # running statistics, of which the second call must not be a part
        conv.nn = nn.Sequential(conv.nn[0], nn.BatchNorm1d(8).double(), *conv.nn[1:])
    plain = copy.deepcopy(model)
    penalty = LipschitzPenalty(model, strength, noise, layers)
    torch.manual_seed(3)
    out = model(batch.x, batch)
    value = penalty()

    torch.manual_seed(3)
    x, adjacency, terms = batch.x, dense(batch), []
    for place, conv in enumerate(plain.convs):
        h = adjacency @ x + (1 + conv.eps) * x
        x = conv.nn(h)
        if place in (range(1, 4) if layers is None else layers):
            approximate = copy.deepcopy(conv.nn)
            for parameter, original in zip(approximate.parameters(), conv.nn.parameters(), strict=True):
                parameter.data = original.data
            noisy = h + noise * torch.randn_like(h)
            noisy = torch.func.functional_call(approximate, dict(conv.nn.named_parameters()), (noisy,))
            terms.append((x - noisy).pow(2).sum(1).sqrt().mean())
        x = x if place == 3 else x.relu()
    torch.testing.assert_close(out, x)
    expected = strength * sum(terms) / 3
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, model), gradients(expected, plain))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffer, model.get_buffer(name))
    assert int(model.convs[2].nn[1].num_batches_tracked) == 1


@pytest.mark.parametrize("halo", ["read", "drop"])
@pytest.mark.parametrize("kind", [GCN, SAGE])
def test_other_layers_are_penalised_for_noise_on_the_rows_that_they_read(kind: Any, halo: Any) -> None:
    loader = make_loader(kind.prepare)
    batch, noise = loader.batch([1]), 0.3
    model = kind(WIDTH, 6, 4, num_layers=3, halo=halo).double()
    filled(model, loader)
    assert batch.num_halo > 0
    penalty = LipschitzPenalty(model, 2.0, noise)
    torch.manual_seed(1)
    model(batch.x, batch)
    value = penalty()

    torch.manual_seed(1)
    matrix = dense(batch)
    if halo == "drop":
        matrix = matrix[:, : batch.num_nodes]
    if kind is SAGE:
        matrix = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    expected = torch.zeros((), dtype=torch.float64)
    for conv in model.convs[1:]:
        change = noise * torch.randn(matrix.size(1), 6, dtype=torch.float64)
        if kind is GCN:
            moved = matrix @ change @ conv.lin.weight.T
        else:
            moved = matrix @ change @ conv.lin_l.weight.T + change[: batch.num_nodes] @ conv.lin_r.weight.T
        expected = expected + moved.pow(2).sum(1).sqrt().mean()
    torch.testing.assert_close(value, 2.0 * expected / 2)
    torch.testing.assert_close(gradients(value, model), gradients(expected, model))


def test_descending_the_penalty_makes_layers_smoother() -> None:
    loader = make_loader(GCN.prepare)
    batch, model = loader.full(), GCN(WIDTH, 6, 4, num_layers=2).double()
    penalty = LipschitzPenalty(model, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    before = torch.linalg.matrix_norm(model.convs[1].lin.weight, ord=2).item()
    for _ in range(100):
        model(batch.x, batch)
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert torch.linalg.matrix_norm(model.convs[1].lin.weight, ord=2).item() < 0.7 * before


# --- what stays as it is ----------------------------------------------------------------------------------------------


class Attentive(HistoryLayer):
    """Draws masks before and after it reads, and counts its calls in a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(input_dropout=0.4)
        self.in_channels = width
        self.lin = nn.Linear(width, width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @property
    def history_dim(self) -> int:
        return self.in_channels

    def forward(self, x: Any, batch: Batch) -> Tensor:
        self.calls += 1
        ones = torch.ones(batch.num_nodes, 1, dtype=torch.float64, device=batch.device)
        factor = F.dropout(ones, 0.5, self.training)
        out = self.read(x, batch).aggregate("sum")
        return F.dropout(self.lin(out), 0.5, self.training) * factor


class Two(nn.Module):
    def __init__(self, kind: Callable[[int], HistoryLayer] = Attentive) -> None:
        super().__init__()
        self.first, self.second = kind(WIDTH), kind(WIDTH)

    def forward(self, x: Any, batch: Batch) -> Tensor:
        return self.second(self.first(x, batch).relu(), batch)


def dropping_gin(width: int) -> GINConv:
    perceptron = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5), nn.Linear(width, width))
    return GINConv(perceptron, input_dropout=0.3)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("kind", [Attentive, dropping_gin])
def test_both_calls_draw_the_same_masks(kind: Any, features: bool) -> None:
    loader = make_loader()
    model, batch = Two(kind).double(), loader.batch([0])
    filled(model, loader)
    penalty = LipschitzPenalty(model, 1.0, noise=1e-9, layers=[0, 1])
    model(batch.features if features else batch.x, batch)
    assert 0.0 < penalty().item() < 1e-7
    # the draws go on: another forward has other masks
    outs = [model(batch.x, batch) for _ in range(2)]
    assert not torch.equal(*outs)


@pytest.mark.parametrize("name", sorted({"GCN", "SAGE", "GIN"} & set(MODELS)))
def test_the_forward_is_the_one_without_a_penalty_and_pushes_once(name: str) -> None:
    kind = MODELS[name]
    loader = make_loader(kind.prepare)
    model = kind(WIDTH, 6, 4, num_layers=2, dropout=0.5).double()
    torch.manual_seed(7)
    histories = filled(model, loader)
    other = copy.deepcopy(model)
    batch, penalty = loader.batch([2]), LipschitzPenalty(model, 1.0)
    outs = []
    for one in (model, other):
        torch.manual_seed(7)
        outs.append(one(batch.x, batch))
    assert torch.equal(*outs)
    for conv, store in zip(other.convs[1:], histories.values(), strict=True):
        assert torch.equal(conv.history.table, store.table)
        assert int(conv.history.clock) == int(store.clock)
    outs[0].sum().backward()
    outs[1].sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    assert penalty().item() > 0


def test_buffers_count_one_call_and_state_dicts_have_nothing_new() -> None:
    loader = make_loader()
    model, names = Two().double(), list(Two().state_dict())
    filled(model, loader)
    with LipschitzPenalty(model, 1.0) as penalty:
        batch = loader.batch([0])
        model(batch.x, batch)
        penalty()
    assert [int(model.first.calls), int(model.second.calls)] == [1, 1]
    assert list(model.state_dict()) == names
    assert "read" not in vars(model.second)


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
def test_rows_fetched_ahead_are_pulled_once() -> None:
    pulls = []
    for strength in (0.0, 1.0):
        loader = make_loader(GCN.prepare)
        model = GCN(WIDTH, 6, 4, num_layers=3).double()
        histories = attach_histories(model, N, tier="pinned", dtype=torch.float64)
        penalty = LipschitzPenalty(model, strength)
        for batch in histories.prefetch(loader):
            (model(batch.x, batch).sum() + penalty()).backward()
        stats = histories.transfer_stats()
        pulls.append([stats[name] for name in ("pulls", "pushes", "misses", "pull_bytes")])
    assert pulls[0] == pulls[1]
    assert pulls[0][0] > 0


# --- when there is none -----------------------------------------------------------------------------------------------


def test_strength_zero_changes_and_draws_nothing() -> None:
    loader = make_loader(GCN.prepare)
    model, batch = GCN(WIDTH, 6, 4, num_layers=2).double(), loader.full()
    penalty = LipschitzPenalty(model, 0.0)
    state = torch.get_rng_state()
    out = model(batch.x, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    loss = out.sum()
    assert torch.equal(loss + penalty(), loss)


def test_there_is_none_in_eval_mode_without_gradient_or_after_removal() -> None:
    loader = make_loader(GCN.prepare)
    model, batch = GCN(WIDTH, 6, 4, num_layers=2).double(), loader.full()
    penalty = LipschitzPenalty(model, 1.0)
    state = torch.get_rng_state()
    with torch.no_grad():
        model(batch.x, batch)
    model.eval()(batch.x, batch)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="of a forward in training mode, of which there was none since the last"):
        penalty()
    model.train()(batch.x, batch)
    assert penalty().item() > 0
    with pytest.raises(RuntimeError, match="none since the last"):
        penalty()
    penalty.remove()
    model(batch.x, batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="none since the last"):
        penalty()


def test_an_error_in_a_layer_leaves_it_as_it_was() -> None:
    loader = make_loader()
    model, batch = Two().double(), loader.batch([0])
    penalty = LipschitzPenalty(model, 1.0)
    with pytest.raises(ValueError, match="no history holds"):
        model(batch.x, batch)
    assert "read" not in vars(model.second)
    filled(model, loader)
    model(batch.x, batch)
    assert penalty().item() > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": -1.0}, "strength must be a finite number of at least 0, got -1.0"),
        ({"strength": math.inf}, "strength must be a finite number of at least 0, got inf"),
        ({"strength": 1.0, "noise": 0.0}, "noise must be a finite number above 0, got 0.0"),
        ({"strength": 1.0, "layers": [2]}, r"layers must be different places in \[0, 2\), at least one, got \[2\]"),
        ({"strength": 1.0, "layers": [1, 1]}, r"layers must be different places .* got \[1, 1\]"),
        ({"strength": 1.0, "layers": []}, r"layers must be different places .* got \[\]"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LipschitzPenalty(Two(), **options)


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="model must have at least 2 layers that can read a history, got 1"):
        LipschitzPenalty(GCN(4, 4, 4, num_layers=1), 1.0)

    class Aloof(Attentive):
        def forward(self, x: Any, batch: Batch) -> Tensor:
            return x[: batch.num_nodes]

    model, batch = Two(Aloof).double(), make_loader().batch([0])
    LipschitzPenalty(model, 1.0)
    with pytest.raises(RuntimeError, match=r"Aloof did not read its rows through HistoryLayer\.read"):
        model(batch.x, batch)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Attentive, dropping_gin])
def test_on_a_gpu_both_calls_draw_the_same_masks_and_the_host_does_not_wait(kind: Any) -> None:
    loader = make_loader(device="cuda")
    model, batch = Two(kind).double().cuda(), loader.batch([0])
    attach_histories(model, N, dtype=torch.float64)
    penalty = LipschitzPenalty(model, 1.0, noise=1e-9, layers=[0, 1])
    # plans what the backward needs
    model(batch.x, batch)
    penalty()
    before = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch.x, batch)
        value = penalty()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(torch.cuda.get_rng_state(), before)
    assert 0.0 < value.item() < 1e-7

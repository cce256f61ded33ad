"""Histories: training with them is what plain torch gives, and they keep, restore and refuse what they say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import Batch, ClusterLoader, Histories, HistoryStore, attach_histories, random_partition
from gas_triton.nn import GCNConv, GINConv, SAGEConv

from . import reference
from .reference import GRAPHS, GasReference

WIDTHS = [6, 8, 7, 4]
LAYERS: dict[str, tuple[Callable[[int, int], nn.Module], reference.Layer]] = {
    "gcn": (lambda i, o: GCNConv(i, o, normalize=False), reference.gcn),
    "sage": (SAGEConv, reference.sage),
    "sage_max": (lambda i, o: SAGEConv(i, o, aggr="max"), lambda p, x, edges: reference.sage(p, x, edges, "max")),
    "sage_project": (lambda i, o: SAGEConv(i, o, project=True), reference.sage),
    "gin": (
        lambda i, o: GINConv(nn.Sequential(nn.Linear(i, 5), nn.ReLU(), nn.Linear(5, o)), train_eps=True),
        reference.gin,
    ),
}


class Net(nn.Module):
    def __init__(self, kind: str = "gcn") -> None:
        super().__init__()
        torch.manual_seed(3)
        make = LAYERS[kind][0]
        self.conv1, self.conv2, self.conv3 = (make(*WIDTHS[place : place + 2]) for place in range(3))
        self.double()

    @property
    def convs(self) -> list[nn.Module]:
        return [self.conv1, self.conv2, self.conv3]

    def forward(self, x: Any, batch: Batch) -> Tensor:
        x = self.conv1(x, batch).relu()
        x = self.conv2(x, batch).relu()
        return self.conv3(x, batch)


def make_loader(name: str = "weighted_directed", seed: int = 0, **options: Any) -> ClusterLoader:
    graph = GRAPHS[name].graph()
    parts = random_partition(graph, min(6, graph.num_nodes), seed=seed)
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(graph.num_nodes, WIDTHS[0], dtype=torch.float64, generator=draw)
    y = torch.randint(WIDTHS[-1], (graph.num_nodes,), generator=draw)
    options = {"batch_size": 2, "seed": 5, "x": x, "y": y, **options}
    return ClusterLoader(parts.permute(graph), parts, **options)


def attach(model: nn.Module, num_nodes: int = 30, dtype: torch.dtype = torch.float64) -> Histories:
    return attach_histories(model, num_nodes, dtype=dtype)


def train(model: nn.Module, batches: Iterable[Batch], optimizer: torch.optim.Optimizer, handle: bool = False) -> list:
    losses = []
    for batch in batches:
        loss = F.cross_entropy(model(batch.features if handle else batch.x, batch), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, handle", [(torch.float64, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("name", ["weighted_directed", "symmetric"])
@pytest.mark.parametrize("kind", LAYERS)
def test_training_with_histories_is_that_of_plain_torch(kind: str, name: str, dtype: torch.dtype, handle: bool) -> None:
    model = Net(kind)
    plain = GasReference(
        LAYERS[kind][1], [conv.state_dict() for conv in model.convs], WIDTHS[:-1], make_loader(name).graph, dtype
    )
    histories = attach(model, dtype=dtype)
    optimizer, plain_optimizer = (torch.optim.Adam(p, lr=0.02) for p in (model.parameters(), plain.leaves()))
    loader, plain_loader = make_loader(name), make_loader(name)
    for _ in range(3):
        losses = train(model, histories.prefetch(loader), optimizer, handle)
        for batch, loss in zip(plain_loader, losses, strict=True):
            nodes = batch.node_ids.tolist()
            plain_loss = F.cross_entropy(plain.forward(plain_loader.x, nodes), plain_loader.node_tensors["y"][nodes])
            plain_optimizer.zero_grad()
            plain_loss.backward()
            plain_optimizer.step()
            torch.testing.assert_close(loss, plain_loss.detach())
    for conv, state in zip(model.convs, plain.parameters, strict=True):
        for parameter, value in conv.state_dict().items():
            torch.testing.assert_close(value, state[parameter].detach())
    for store, table in zip(histories.values(), plain.tables[1:], strict=True):
        torch.testing.assert_close(store.table, table)
        assert int(store.age().min()) == 0


def test_prefetch_does_not_change_a_bit() -> None:
    results = []
    for is_prefetched in (False, True):
        model, loader = Net(), make_loader()
        histories = attach(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for _ in range(2):
            losses += train(model, histories.prefetch(loader) if is_prefetched else loader, optimizer)
        results.append([*losses, *model.parameters(), *(store.table for store in histories.values())])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_only_training_on_in_batch_rows_pushes() -> None:
    model, loader = Net(), make_loader()
    histories = attach(model)
    batch = loader.batch([0, 3])
    model.eval()
    before = model(batch.x, batch)
    assert all(not store.table.any() and int(store.clock) == 0 for store in histories.values())
    model.train()
    assert torch.equal(model(batch.x, batch), before)
    for store in histories.values():
        outside = torch.ones(30, dtype=torch.bool).index_fill_(0, batch.node_ids, False)
        assert int(store.clock) == 1
        assert bool(store.table[batch.node_ids].any())
        assert not store.table[outside].any()
    table = histories["conv2"].table.clone()
    rows = torch.randn(batch.num_nodes + batch.num_halo, WIDTHS[1], dtype=torch.float64)
    model.conv2(rows, batch)
    assert torch.equal(histories["conv2"].table, table)


def test_a_batch_of_the_whole_graph_pushes_every_row() -> None:
    model, loader = Net(), make_loader()
    histories = attach(model)
    batch = loader.full()
    model(batch.x, batch)
    hidden = model.conv1(batch.x, batch).relu()
    assert torch.equal(histories["conv2"].table, hidden.detach())


# --- one table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16])
def test_push_rounds_as_a_cast(dtype: torch.dtype, given: torch.dtype) -> None:
    batch = make_loader().batch([4, 1])
    store = HistoryStore(30, 5, dtype)
    expected = torch.zeros(30, 5, dtype=dtype)
    x = torch.randn(batch.num_nodes, 5).to(given).requires_grad_()
    expected[batch.node_ids] = x.detach().to(dtype)
    store.push(x, batch)
    assert torch.equal(store.table, expected)
    assert torch.equal(store.pull(batch.node_ids[:3]), expected[batch.node_ids[:3]])
    assert not store.table.requires_grad


def test_age_counts_pushes_since_a_row_was_pushed() -> None:
    loader = make_loader()
    store = HistoryStore(30, 2)
    last: dict[int, int] = {}
    for step, clusters in enumerate([[0, 1], [3], [1, 4], [3, 0]]):
        batch = loader.batch(clusters)
        store.push(torch.ones(batch.num_nodes, 2), batch)
        last.update(dict.fromkeys(batch.node_ids.tolist(), step))
        expected = [step - last[node] if node in last else -1 for node in range(30)]
        assert store.age().tolist() == expected
        assert store.age().dtype == torch.int64
        assert store.age(batch.halo_ids).tolist() == [expected[node] for node in batch.halo_ids.tolist()]
    # clusters 0 and 3 were pushed last, 1 and 4 before that, 2 and 5 never
    assert set(expected) == {-1, 0, 1}


def test_reset_forgets_everything() -> None:
    model, loader = Net(), make_loader()
    histories = attach(model)
    train(model, histories.prefetch(loader), torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(ages.max() > 0 for ages in histories.age().values())
    histories.reset()
    for store in histories.values():
        assert not store.table.any()
        assert store.age().unique().tolist() == [-1]
        assert (int(store.clock), store.row_order) == (0, None)


def test_bytes_and_repr() -> None:
    histories = attach(Net(), num_nodes=50_000, dtype=torch.bfloat16)
    nbytes = [50_000 * (WIDTHS[1] * 2 + 4), 50_000 * (WIDTHS[2] * 2 + 4)]
    assert [store.nbytes for store in histories.values()] == nbytes
    assert histories.nbytes == sum(nbytes)
    assert f"Histories({sum(nbytes) / 2**20:.1f} MiB" in repr(histories)
    assert f"conv2, num_rows=50000, dim=8, dtype=torch.bfloat16, {nbytes[0] / 2**20:.1f} MiB" in repr(histories)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    model, loader = Net(), make_loader()
    histories = attach(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    train(model, histories.prefetch(loader), optimizer)
    saved = {"model": model.state_dict(), "histories": histories.state_dict(), "optimizer": optimizer.state_dict()}
    assert not any("history" in name for name in saved["model"])
    torch.save(saved, tmp_path / "checkpoint.pt")
    ages = histories.age()
    expected = train(model, histories.prefetch(loader), optimizer)

    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed, loader = Net(), make_loader()
    loader.epoch = 1
    restored = attach(resumed)
    optimizer = torch.optim.Adam(resumed.parameters(), lr=0.02)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    restored.load_state_dict(state["histories"])
    for name, store in restored.items():
        assert torch.equal(store.table, state["histories"][name]["table"])
        assert torch.equal(store.age(), ages[name])
        assert store.row_order == loader.graph.row_order
    assert train(resumed, restored.prefetch(loader), optimizer) == expected
    for name, store in histories.items():
        assert torch.equal(restored[name].table, store.table)
        assert torch.equal(restored[name].age(), store.age())


def changed_state(change: str, state: dict[str, Any]) -> dict[str, Any]:
    last = dict(state["conv3"])
    if change == "layers":
        return {"conv2": state["conv2"]}
    if change == "missing":
        del last["last_push"]
    elif change == "width":
        last["table"] = torch.ones(30, 99, dtype=torch.float64)
    elif change == "nodes":
        last["table"] = torch.ones(31, WIDTHS[2], dtype=torch.float64)
    elif change == "dtype":
        last["table"] = last["table"].bfloat16()
    elif change == "order":
        last["row_order"] = "permuted-elsewhere"
    elif change == "live":
        last["clock"] = 1
    elif change == "clock":
        last["clock"] = -1
    elif change == "sparse":
        last["table"] = last["table"].to_sparse()
    elif change == "scale":
        last["scale"] = torch.ones(30)
    elif change == "times":
        last["last_push"] = torch.zeros(1, dtype=torch.int32)
    return {**state, "conv3": last}


@pytest.mark.parametrize(
    "change, message",
    [
        ("layers", r"histories of \['conv2'\] but the model of \['conv2', 'conv3'\]"),
        ("missing", "conv3: the state lacks last_push"),
        ("width", r"conv3: the state holds torch.float64 \[30, 99\] but the history is torch.float64 \[30, 7\]"),
        ("nodes", r"conv3: the state holds torch.float64 \[31, 7\]"),
        ("dtype", r"conv3: the state holds torch.bfloat16 \[30, 7\]"),
        ("order", "conv3: the state holds rows in the order permuted-elsewhere but this history's graph has permuted-"),
        (
            "live",
            r"conv3: the state's last_push goes from 1 to 3 but its clock is 1: it was changed",
        ),
        ("clock", r"conv3: the state's clock must be in \[0, 2\*\*31\), got -1"),
        ("sparse", "conv3: the state's table is torch.sparse_coo on cpu, expected rows"),
        ("scale", "conv3: the state has a scale but the history has no scale"),
        ("times", r"conv3: the state's last_push is torch.int32 \[1\], expected torch.int32 \[30\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(change: str, message: str) -> None:
    model, loader = Net(), make_loader()
    histories = attach(model)
    train(model, histories.prefetch(loader), torch.optim.SGD(model.parameters(), lr=0.1))
    state = copy.deepcopy(histories.state_dict())
    train(model, histories.prefetch(loader), torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(histories.state_dict())
    with pytest.raises(ValueError, match=message):
        histories.load_state_dict(changed_state(change, state))
    for name, store in histories.items():
        for key, value in store.state_dict().items():
            assert torch.equal(value, before[name][key]) if isinstance(value, Tensor) else value == before[name][key]


# --- a model's tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cast_of_the_model_leaves_the_tables_alone(dtype: torch.dtype) -> None:
    model = Net()
    histories = attach(model)
    table = histories["conv2"].table
    model.to(dtype)
    assert histories["conv2"].table is table is model.conv2.history.table
    assert table.dtype == torch.float64


def test_tables_follow_the_model_to_another_device() -> None:
    model = Net()
    histories = attach(model, dtype=torch.bfloat16)
    model.to("meta")
    for store in histories.values():
        assert (store.table.device.type, store.table.dtype) == ("meta", torch.bfloat16)
        assert store.last_push.device.type == "meta"


def test_a_copy_of_the_model_has_its_own_tables() -> None:
    model, loader = Net(), make_loader()
    histories = attach(model)
    train(model, histories.prefetch(loader), torch.optim.SGD(model.parameters(), lr=0.1))
    twin = copy.deepcopy(model)
    before = histories["conv2"].table.clone()
    assert torch.equal(twin.conv2.history.table, before)
    train(twin, loader, torch.optim.SGD(twin.parameters(), lr=0.5))
    assert torch.equal(histories["conv2"].table, before)
    assert not torch.equal(twin.conv2.history.table, before)


def test_every_layer_but_the_first_gets_a_history() -> None:
    model = Net()
    histories = attach(model)
    assert model.conv1.history is None
    assert list(histories) == ["conv2", "conv3"]
    assert [store.dim for store in histories.values()] == WIDTHS[1:3]
    assert histories["conv2"] is model.conv2.history
    assert [store.table.dtype for store in attach_histories(model, 30).values()] == [torch.float32] * 2


def test_chosen_layers_get_a_history_in_the_order_of_the_model() -> None:
    model = Net()
    attach(model)
    histories = attach_histories(model, 30, layers=["conv3", "conv1"])
    assert list(histories) == ["conv1", "conv3"]
    assert model.conv1.history is histories["conv1"]
    assert model.conv2.history is None


def test_nested_layers_are_found_by_name() -> None:
    model = nn.ModuleDict(
        {"encoder": nn.ModuleList([SAGEConv(3, 5), nn.ReLU(), SAGEConv(5, 6)]), "head": GCNConv(6, 2)}
    )
    assert {name: store.dim for name, store in attach_histories(model, 4).items()} == {"encoder.2": 5, "head": 6}


def test_a_layer_that_cannot_have_a_history_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(SAGEConv(3, 5), SAGEConv(5, 5), GINConv(nn.Identity()))
    with pytest.raises(ValueError, match="give in_channels="):
        attach_histories(model, 30)
    assert [conv.history for conv in model] == [None] * 3


def test_prefetch_refuses_another_graph() -> None:
    model, loader = Net(), make_loader(seed=0)
    other_order, other_size = make_loader(seed=1), make_loader("no_edges")
    histories = attach(model)
    with pytest.raises(ValueError, match="graph has 5 nodes but conv2's history has 30"):
        next(histories.prefetch(other_size))
    train(model, histories.prefetch(loader), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"rows in the order permuted-.* but the graph has permuted-"):
        next(histories.prefetch(other_order))
    histories.reset()
    assert len(list(histories.prefetch(other_order))) == 3

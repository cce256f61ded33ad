"""A training step of every model with what a GPU runs, the Triton launchers, against the CPU's own path."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.on_interpreter import on_interpreter, op_names
from gas_triton import Batch, ClusterLoader, Graph, attach_histories, inference, random_partition
from gas_triton.kernels import aggregate_triton, pull
from gas_triton.models import MODELS
from gas_triton.nn import GATv2Conv, TransformerConv

from .reference import random_edges

if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU, not interpreted", allow_module_level=True)

WIDTH, CLASSES = 12, 3
OPTIONS: dict[str, dict[str, Any]] = {"GAT": {"hidden_heads": 2, "out_heads": 1}}
TIERS = {"GCN": ("device", torch.int8), "GIN": ("pinned", torch.float32), "SAGE": ("pinned", torch.int8)}


class Dynamic(nn.Module):
    """A layer of each kind of dynamic attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = GATv2Conv(WIDTH, 8, heads=2, input_dropout=0.3, dropout=0.2)
        self.conv2 = TransformerConv(16, CLASSES, heads=1, beta=True)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.conv2(self.conv1(x, batch).relu(), batch)


def make_model(name: str, graph: Graph) -> nn.Module:
    if name == "dynamic":
        return Dynamic()
    options = {"dropout": 0.3} | OPTIONS.get(name, {}) | MODELS[name].options_of(graph)
    return MODELS[name](WIDTH, 16, CLASSES, 3, **options)


def train(name: str, graph: Graph) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Losses, gradients, histories and logits of an epoch."""
    torch.manual_seed(1)
    parts = random_partition(graph, 3)
    loader = ClusterLoader(parts.permute(graph), parts, shuffle=False, x=torch.randn(graph.num_nodes, WIDTH))
    # rows of more edges are cut into chunks
    loader._planner.hub_edges = 6
    model = make_model(name, graph)
    tier, dtype = TIERS.get(name, ("device", torch.float32))
    histories = attach_histories(model, graph.num_nodes, tier, dtype)
    target = torch.arange(graph.num_nodes) % CLASSES
    losses = []
    for batch in histories.prefetch(loader):
        loss = F.cross_entropy(model(batch.x, batch), target[batch.node_ids])
        # gradients of all steps add up
        loss.backward()
        losses.append(loss.detach())
    tables = {name: store.pull(torch.arange(graph.num_nodes)) for name, store in histories.items()}
    logits = inference(model, loader)
    histories.close()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, tables, logits


def compare(name: str) -> None:
    graph = random_edges(18, 36, symmetric=True, plain=True).graph()
    graph = MODELS[name].prepare(graph) if name in MODELS else graph.add_self_loops()
    expected = train(name, graph)
    with on_interpreter():
        found = train(name, graph)
    # a row of int8 that lies between two steps may fall to either side
    rounding = 1e-2 if TIERS.get(name, ("", None))[1] == torch.int8 else 1e-5
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.filterwarnings("ignore:there is no CUDA device. tier 'pinned':UserWarning")
@pytest.mark.parametrize("name", [*MODELS, "dynamic"])
def test_a_step_of_the_launchers_is_a_step_of_the_cpu(name):
    compare(name)


def test_a_broken_launcher_shows(monkeypatch):
    kernel = aggregate_triton._aggregate_kernel

    class HalfStride:
        def __getitem__(self, grid):
            return lambda *inputs, **constants: kernel[grid](
                *inputs, **constants | {"STRIDE_X": constants["STRIDE_X"] // 2}
            )

    monkeypatch.setattr(aggregate_triton, "_aggregate_kernel", HalfStride())
    with pytest.raises(AssertionError):
        compare("GCN")


def test_the_block_changes_ops_only_inside(monkeypatch):
    launched = []
    monkeypatch.setattr(pull, "_launch", lambda *arguments: launched.append(arguments))
    table, ids = torch.randn(5, 4), torch.tensor([3, 1])

    def is_launched() -> bool:
        launched.clear()
        pull.pull(table, None, ids, torch.float32)
        return bool(launched)

    assert not is_launched()
    with on_interpreter():
        assert is_launched()
        with on_interpreter():
            assert is_launched()
        assert is_launched()
    assert not is_launched()
    with pytest.raises(KeyError), on_interpreter():
        raise KeyError
    assert not is_launched()
    assert {"aggregate", "pull", "push", "attention"} <= set(op_names())


def test_compiled_kernels_are_refused():
    program = "from bench.on_interpreter import on_interpreter\nwith on_interpreter(): pass"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "on_interpreter needs TRITON_INTERPRET=1 in the environment before gas_triton is imported" in done.stderr

"""No layer does in a step what would make the host wait for a GPU."""

import pytest
import torch

from bench.counting import Waits
from gas_triton import ClusterLoader, random_partition
from gas_triton.nn import GATConv, GATv2Conv, LightPNAConv, PNAConv, TransformerConv, degree_histogram

from .reference import GRAPHS

ALL = ["sum", "mean", "min", "max", "var", "std"]


LAYERS = {
    "gat": (GATConv, {"heads": 2, "edge_dim": 3, "dropout": 0.5}),
    "gatv2": (GATv2Conv, {"heads": 2, "edge_dim": 3, "dropout": 0.5}),
    "gatv2 with a number for self loops": (GATv2Conv, {"heads": 2, "edge_dim": 3, "fill_value": 1.5}),
    "transformer": (TransformerConv, {"heads": 2, "edge_dim": 3, "beta": True, "dropout": 0.5}),
    "pna": (PNAConv, {"edge_dim": 3, "pre_layers": 2}),
    "pna of rows": (PNAConv, {"input_dropout": 0.5}),
    "light pna": (LightPNAConv, {"input_dropout": 0.5}),
}


@pytest.mark.parametrize("edge_dropout", [0.0, 0.5])
@pytest.mark.parametrize("halo", ["read", "drop"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_waits_for_nothing(name, halo, edge_dropout):
    graph = GRAPHS["directed"].graph().add_self_loops()
    kind, options = LAYERS[name]
    if kind in (PNAConv, LightPNAConv):
        scalers = ["identity", "amplification", "attenuation"]
        options = {**options, "aggregators": ALL, "scalers": scalers, "deg": degree_histogram(graph)}
    layer = kind(6, 4, halo=halo, **options)
    parts = random_partition(graph, 3)
    graph = parts.permute(graph)
    batch = ClusterLoader(graph, parts).batch([1])
    assert batch.num_halo > 0
    x = torch.randn(batch.num_nodes + batch.num_halo, 6, requires_grad=True)
    with Waits() as waits:
        batch = batch.drop_edges(edge_dropout, seed=1)
        edge_attr = torch.randn(batch.num_edges, 3)
        out = layer(x, batch, edge_attr) if "edge_dim" in options else layer(x, batch)
        out.square().sum().backward()
    assert x.grad is not None
    assert waits.calls == []


NUMBERS = torch.arange(4.0)
MASK = NUMBERS > 1
WAITING = {
    "item": lambda: NUMBERS.sum().item(),
    "bool": lambda: bool(MASK.any()),
    "tolist": lambda: NUMBERS.tolist(),
    "numpy": lambda: NUMBERS.numpy(),
    "cpu": lambda: NUMBERS.cpu(),
    "to": lambda: NUMBERS.to("cpu"),
    "nonzero": lambda: MASK.nonzero(),
    "mask": lambda: NUMBERS[MASK],
    "mask of what is written": lambda: NUMBERS.clone().index_put_((MASK,), torch.zeros((), device=NUMBERS.device)),
    "unique": lambda: NUMBERS.unique(),
    "repeat_interleave": lambda: torch.repeat_interleave(NUMBERS.long()),
    "numbers of the host": lambda: torch.tensor([1, 2], device=NUMBERS.device),
    "copy from the host": lambda: NUMBERS.clone().copy_(torch.zeros(4)),
    "in a gradient": lambda: Reads.apply(torch.ones(2, device=NUMBERS.device, requires_grad=True)).sum().backward(),
}
NOT_WAITING = {
    "numbers that stay on the host": lambda: torch.tensor([1, 2]).sum().tolist(),
    "a seed": lambda: int(torch.randint(9, (1,))),
    "a copy that is not waited for": lambda: NUMBERS.clone().copy_(torch.zeros(4), non_blocking=True),
    "a late copy to the host": lambda: NUMBERS.to("cpu", non_blocking=True, copy=True).tolist(),
    "a number written": lambda: NUMBERS.clone().__setitem__(slice(2), 0.0),
    "rows": lambda: NUMBERS[NUMBERS.long()],
    "a known size": lambda: torch.repeat_interleave(NUMBERS.long(), output_size=6),
}


class Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * float(grad.max())


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_found(name):
    with Waits() as waits:
        WAITING[name]()
    assert len(waits.calls) == 1
    assert waits.calls[0].endswith(
        "in tests.test_waits.Reads.backward" if name == "in a gradient" else "in tests.test_waits.<lambda>"
    )


@pytest.mark.parametrize("name", NOT_WAITING)
def test_what_does_not_wait_is_not_listed(name):
    with Waits() as waits:
        NOT_WAITING[name]()
    assert waits.calls == []


def test_tensors_of_the_host_may_be_made_before():
    spans = torch.tensor([[0, 4]])
    with Waits(host=[spans]) as waits:
        spans.tolist()
        # a tensor made of such is one
        int(spans[0, 1] + 1)
    assert waits.calls == []

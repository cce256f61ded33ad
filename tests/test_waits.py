"""No layer does in a step what would make the host wait for a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gas_triton import ClusterLoader, random_partition
from gas_triton.nn import GATConv, GATv2Conv, LightPNAConv, PNAConv, TransformerConv, degree_histogram

from .reference import GRAPHS

ALL = ["sum", "mean", "min", "max", "var", "std"]


class Waits(TorchDispatchMode):
    """Lists the calls whose result the host would read from a device, or copy there from memory of its own."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        by_value = name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh")
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_value or name.startswith(("unique", "_unique")) or unsized or masked:
            self.calls.append(str(func))
        return func(*args, **kwargs)


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

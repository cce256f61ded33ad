"""Models with PyGAS's options."""

from gas_triton.models.appnp import APPNP
from gas_triton.models.base import Model
from gas_triton.models.basic import GCN, GIN, SAGE
from gas_triton.models.gat import GAT
from gas_triton.models.gcn2 import GCN2
from gas_triton.models.pna import PNA, PNA_JK
from gas_triton.models.stack import Stack

MODELS: dict[str, type[Model]] = {
    "GCN": GCN, "SAGE": SAGE, "GIN": GIN, "GAT": GAT, "APPNP": APPNP, "GCN2": GCN2, "PNA": PNA, "PNA_JK": PNA_JK,
}  # fmt: skip

__all__ = ["APPNP", "GAT", "GCN", "GCN2", "GIN", "MODELS", "PNA", "PNA_JK", "SAGE", "Model", "Stack"]

"""Models with PyGAS's options."""

from gas_triton.models.basic import GCN, GIN, SAGE
from gas_triton.models.stack import Stack

MODELS: dict[str, type[Stack]] = {"GCN": GCN, "SAGE": SAGE, "GIN": GIN}

__all__ = ["GCN", "GIN", "MODELS", "SAGE", "Stack"]

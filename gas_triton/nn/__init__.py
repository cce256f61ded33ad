"""Layers with the arguments and parameter names of their PyG namesakes."""

from gas_triton.nn.base import HistoryLayer
from gas_triton.nn.gcn_conv import GCNConv
from gas_triton.nn.gin_conv import GINConv
from gas_triton.nn.sage_conv import SAGEConv

__all__ = ["GCNConv", "GINConv", "HistoryLayer", "SAGEConv"]

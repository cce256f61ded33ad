"""Layers with the arguments and parameter names of their PyG namesakes."""

from gas_triton.nn.appnp import APPNP, APPNPConv
from gas_triton.nn.base import HistoryLayer
from gas_triton.nn.gat_conv import GATConv
from gas_triton.nn.gatv2_conv import GATv2Conv
from gas_triton.nn.gcn2_conv import GCN2Conv
from gas_triton.nn.gcn_conv import GCNConv
from gas_triton.nn.gin_conv import GINConv
from gas_triton.nn.light_pna_conv import LightPNAConv
from gas_triton.nn.pna_conv import PNAConv, degree_histogram
from gas_triton.nn.sage_conv import SAGEConv
from gas_triton.nn.transformer_conv import TransformerConv

__all__ = [
    "APPNP",
    "APPNPConv",
    "GATConv",
    "GATv2Conv",
    "GCN2Conv",
    "GCNConv",
    "GINConv",
    "HistoryLayer",
    "LightPNAConv",
    "PNAConv",
    "SAGEConv",
    "TransformerConv",
    "degree_histogram",
]

"""Tensor functions of a batch: they check shapes, say what is wrong, and call one op."""

from gas_triton.functional.aggregate import Reduce, aggregate
from gas_triton.functional.attention import attention
from gas_triton.functional.dropout import draw_seed, dropout
from gas_triton.functional.dynamic_attention import dynamic_attention
from gas_triton.functional.multi_aggregate import MultiReduce, multi_aggregate
from gas_triton.functional.rows import Features, Halo, Quantized, StaticInput, halo_rows
from gas_triton.functional.sparse_rows import Rows, SparseRows

__all__ = [
    "Features",
    "Halo",
    "MultiReduce",
    "Quantized",
    "Reduce",
    "Rows",
    "SparseRows",
    "StaticInput",
    "aggregate",
    "attention",
    "draw_seed",
    "dropout",
    "dynamic_attention",
    "halo_rows",
    "multi_aggregate",
]

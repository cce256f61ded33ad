"""Tensor functions of a batch: they check shapes, say what is wrong, and call one op."""

from gas_triton.functional.aggregate import Reduce, aggregate
from gas_triton.functional.dropout import check_probability, draw_seed, dropout
from gas_triton.functional.rows import FLOATS, Features, Quantized, halo_rows

__all__ = [
    "FLOATS",
    "Features",
    "Quantized",
    "Reduce",
    "aggregate",
    "check_probability",
    "draw_seed",
    "dropout",
    "halo_rows",
]

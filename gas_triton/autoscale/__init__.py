"""Scaling models written in plain PyTorch Geometric."""

from gas_triton.autoscale.replace import autoscale

__all__ = ["autoscale"]

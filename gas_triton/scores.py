"""How good logits are: accuracy for one class a node, micro-F1 for several labels."""

from __future__ import annotations

from torch import Tensor

__all__ = ["accuracy", "micro_f1"]


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of nodes whose largest logit is that of their class, float64, without waiting for the device.

    Args:
        logits: [N, C].
        y: int64 [N].
    """
    return (logits.argmax(dim=1) == y).double().mean()


def micro_f1(logits: Tensor, y: Tensor) -> Tensor:
    """`2 TP / (2 TP + FP + FN)` over all nodes and labels, float64, without waiting for the device.

    A label is predicted where its logit is above 0. Without a true positive it is 0, as in PyGAS's `compute_micro_f1`,
    whose harmonic mean of precision and recall this is.

    Args:
        logits: [N, C].
        y: [N, C] of zeros and ones.
    """
    predicted, actual = logits > 0, y > 0.5
    hits = (predicted & actual).sum().double()
    wrong = (predicted != actual).sum()
    return 2 * hits / (2 * hits + wrong).clamp(min=1)

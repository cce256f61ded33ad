"""Training on the batches of GAS with nothing stale: what histories cost, apart from what the batches do.

A step computes the whole graph, so that every row is new and has a gradient, and takes the loss of the batch's training
nodes. It differs from a step of GAS in the histories alone, and from full-batch training in the batches alone: their
number, and which nodes they have. It needs the memory of full-batch training and its time for every batch.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gas_triton import training
from gas_triton.batch import Batch
from gas_triton.datasets import Dataset
from gas_triton.training import Result, TrainConfig

__all__ = ["FreshRun", "train_fresh"]


class FreshRun(training._Run):
    """A run of GAS whose steps compute the rows of out-of-batch neighbours instead of reading them."""

    def _step(self, batch: Batch, num_labelled: int) -> Tensor | None:
        tensors = self.loader.node_tensors
        is_out = torch.ones(batch.graph_nodes, dtype=torch.bool, device=batch.device)
        is_out[batch.node_ids] = False
        target = tensors["target"].clone()
        target[is_out] = training._IGNORED
        whole = self.loader.full().with_tensors(self.loader.x, {**tensors, "target": target})
        return super()._step(whole, num_labelled)


def train_fresh(dataset: Dataset, config: TrainConfig, **options: Any) -> Result:
    """`gas_triton.training.train` with the steps of `FreshRun`.

    Args:
        dataset: the graph.
        config: of a run of GAS.
        **options: further arguments of `train`.
    """
    with mock.patch.object(training, "_Run", FreshRun):
        return training.train(dataset, config, **options)

"""`bench.fresh`: a step on a batch of GAS whose neighbours are all computed anew."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench.fresh import FreshRun, train_fresh
from gas_triton import training
from gas_triton.datasets import Dataset, generate
from gas_triton.training import TrainConfig, train

CONFIG = TrainConfig(
    layers=3, hidden=8, dropout=0.0, lr=0.02, epochs=3, num_parts=6, batch_size=2, partition="random",
    weight_decay=0.01, fill_histories=True, full_evaluation=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generate(400, 2400, num_classes=4, num_features=8, signal=2.0)


@pytest.mark.parametrize("model", ["GCN", "GCN2", "APPNP"])
def test_a_step_is_one_on_the_exact_loss_of_the_batchs_nodes(dataset: Dataset, model: str) -> None:
    run = FreshRun(dataset, replace(CONFIG, model=model), torch.device("cpu"), None)
    run.fill_histories()
    run.model.train()
    batch = run.loader.batch([1, 4])
    exact = copy.deepcopy(run.model)
    target = run.loader.node_tensors["target"][batch.node_ids]
    out = exact(run.loader.full().x, run.loader.full())[batch.node_ids]
    is_trained = target != training._IGNORED
    expected = F.cross_entropy(out[is_trained], target[is_trained])
    gradients = torch.autograd.grad(expected, list(exact.parameters()))
    seen: list[torch.Tensor] = []
    step = run.optimizer.step
    run.optimizer.step = lambda: (seen.extend(p.grad.clone() for p in run.model.parameters()), step())[1]
    loss = run._step(batch, int(is_trained.sum()))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(seen, list(gradients), rtol=1e-4, atol=1e-6)


def test_with_all_clusters_in_a_batch_it_is_full_batch_training_and_gas_is_not(dataset: Dataset) -> None:
    one = replace(CONFIG, batch_size=6)
    whole = train(dataset, replace(one, full_batch=True), measure_memory=False)
    assert _losses(train_fresh(dataset, one, measure_memory=False)) == pytest.approx(_losses(whole), rel=1e-4)
    fresh, stale = (_losses(each(dataset, CONFIG, measure_memory=False)) for each in (train_fresh, train))
    assert fresh != pytest.approx(stale, rel=1e-4)


def test_the_library_is_left_as_it_was(dataset: Dataset) -> None:
    run = training._Run
    train_fresh(dataset, replace(CONFIG, epochs=1), measure_memory=False)
    assert training._Run is run


def _losses(result: training.Result) -> list[float]:
    return [record.train_loss for record in result.epochs]

"""Options of a training step: edge dropout, the Lipschitz penalty, weights of batches, clipping, and scores."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gas_triton import training
from gas_triton.datasets import Dataset, generate
from gas_triton.models import MODELS
from gas_triton.regularization import LipschitzPenalty
from gas_triton.scores import accuracy, micro_f1
from gas_triton.training import Result, TrainConfig, _Run

CPU = torch.device("cpu")
# to measure memory takes longer than all else here
train = partial(training.train, measure_memory=False)
CONFIG = TrainConfig(layers=3, hidden=8, lr=0.02, epochs=2, num_parts=8, batch_size=3)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generate(600, 6000, num_classes=4, num_features=8, signal=2.0)


def numbers(result: Result) -> dict[str, Any]:
    """A result without its times."""
    fields = asdict(result)
    del fields["epoch_seconds"], fields["transfers"]
    for record in fields["epochs"]:
        del record["seconds"]
    return fields


def make_run(dataset: Dataset, config: TrainConfig) -> _Run:
    """A run whose parameters are those of its seed, as in `train`."""
    torch.manual_seed(config.seed)
    return _Run(dataset, config, CPU, None)


def gradients_of_an_epoch(run: _Run, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The gradients at each step of the optimizer, which then does nothing, in float64."""
    run.model.double()
    run.loader.x = run.loader.x.double()
    if run.multi_label:
        run.loader.node_tensors["target"] = run.loader.node_tensors["target"].double()
    run.full = run.full and run.loader.full()
    steps: list[list[Tensor]] = []
    parameters = list(run.model.parameters())
    monkeypatch.setattr(run.optimizer, "step", lambda: steps.append([p.grad.clone() for p in parameters]))
    run.epoch(1)
    return steps


# --- edge dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_batch", [False, True])
def test_edges_are_left_out_of_training_steps_only(dataset: Dataset, full_batch: bool) -> None:
    run = make_run(dataset, replace(CONFIG, edge_dropout=0.75, full_batch=full_batch))
    whole = [run.loader.full()] if full_batch else list(run.loader)
    run.loader.epoch = 0
    seen: dict[bool, list[Any]] = {True: [], False: []}
    run.model.convs[2].register_forward_hook(lambda conv, args, out: seen[conv.training].append(args[1]))
    run.epoch(1)
    assert [batch.clusters for batch in seen[True]] == [batch.clusters for batch in whole]
    for batch, full in zip(seen[True], whole, strict=True):
        # about a quarter, by six deviations of the binomial distribution
        assert abs(batch.num_edges - 0.25 * full.num_edges) < 6 * (0.75 * 0.25 * full.num_edges) ** 0.5
        assert torch.equal(batch.halo_ids, full.halo_ids)
    assert sum(batch.num_edges for batch in seen[False]) == 6000 + 600
    first, second = (make_run(dataset, replace(CONFIG, edge_dropout=p)) for p in (0.0, 0.5))
    assert first.epoch(1)[0].train_loss != second.epoch(1)[0].train_loss


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
def test_rows_fetched_ahead_are_those_of_the_batch_with_fewer_edges(dataset: Dataset) -> None:
    config = replace(CONFIG, edge_dropout=0.5)
    pinned = train(dataset, replace(config, history_tier="pinned"))
    assert pinned.transfers is not None
    assert pinned.transfers["misses"] == 0
    assert pinned.transfers["pulls"] == 2 * 2 * 3
    assert numbers(pinned) == numbers(train(dataset, config))


# --- the Lipschitz penalty --------------------------------------------------------------------------------------------


def test_a_step_descends_the_loss_and_the_penalty(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, model="GIN", batch_size=8, dropout=0.0)
    steps = []
    for strength in (3.0, 0.0):
        run = make_run(dataset, replace(config, lipschitz=strength, lipschitz_noise=0.2))
        # all that is drawn from here is noise
        torch.manual_seed(11)
        steps += gradients_of_an_epoch(run, monkeypatch)
    penalty = LipschitzPenalty(run.model.train(), 3.0, 0.2)
    run.loader.epoch = 0
    torch.manual_seed(11)
    run._forward(run.model, next(iter(run.loader)))
    added = torch.autograd.grad(penalty(), list(run.model.parameters()), allow_unused=True)
    for got, loss, extra in zip(*steps, added, strict=True):
        torch.testing.assert_close(got, loss if extra is None else loss + extra)
    assert all(extra is not None for extra in added[5:])


def test_a_penalty_makes_the_trained_layers_smoother_and_is_no_part_of_the_loss_that_is_reported(
    dataset: Dataset,
) -> None:
    config = replace(CONFIG, model="GIN", dropout=0.0)
    rough, smooth = (make_run(dataset, replace(config, lipschitz=strength)) for strength in (0.0, 10.0))
    assert rough.penalty is None
    first = [run.epoch(1)[0].train_loss for run in (rough, smooth)]
    assert first[1] == pytest.approx(first[0], rel=0.3)
    moved = []
    for run in (rough, smooth):
        for epoch in range(2, 12):
            run.epoch(epoch)
        if run.penalty is not None:
            run.penalty.remove()
        penalty, batch = LipschitzPenalty(run.model.train(), 1.0), run.loader.batch([0, 1])
        run._forward(run.model, batch)
        moved.append(penalty().item())
    assert moved[1] < 0.5 * moved[0]


def test_a_batch_without_training_nodes_has_no_penalty(uneven: Dataset) -> None:
    run = make_run(uneven, replace(CONFIG, batch_size=1, lipschitz=1.0))
    assert 0 in run.labelled
    record, _ = run.epoch(1)
    assert record.train_loss > 0
    assert run.penalty is not None
    with pytest.raises(RuntimeError, match="none since the last"):
        run.penalty()


# --- weights of batches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(dataset: Dataset) -> Dataset:
    """Nearly all training nodes in a few clusters, and some batches without any."""
    train_mask = torch.zeros(600, dtype=torch.bool)
    order = make_run(dataset, CONFIG).loader.parts.perm
    train_mask[order[:60]] = True
    train_mask[order[-1]] = True
    return replace(dataset, train_mask=train_mask)


@pytest.mark.parametrize("labels", [False, True], ids=["classes", "labels"])
@pytest.mark.parametrize("model", ["GCN", "SAGE", "GIN"])
def test_by_node_the_gradients_of_an_epoch_are_those_of_the_whole_graph(
    uneven: Dataset, monkeypatch: pytest.MonkeyPatch, model: str, labels: bool
) -> None:
    if labels:
        uneven = replace(uneven, y=torch.stack([uneven.y == 1, uneven.y > 1], dim=1).float())
    # a single layer reads features, so that every row is exact
    config = replace(CONFIG, model=model, layers=1, dropout=0.0, batch_size=2, loss_weighting="node")
    (whole,) = gradients_of_an_epoch(make_run(uneven, replace(config, full_batch=True)), monkeypatch)

    def epoch(config: TrainConfig) -> list[Tensor]:
        steps = gradients_of_an_epoch(make_run(uneven, config), monkeypatch)
        # of 4 batches, some have no training node
        assert 1 < len(steps) < 4
        return [torch.stack(grads).sum(0) for grads in zip(*steps, strict=True)]

    by_node = epoch(config)
    for total, expected in zip(by_node, whole, strict=True):
        torch.testing.assert_close(total, 4 * expected, rtol=1e-9, atol=1e-12)
    by_batch = epoch(replace(config, loss_weighting="batch"))
    pairs = zip(by_batch, whole, strict=True)
    assert any((total - 4 * expected).norm() > 0.1 * expected.norm() for total, expected in pairs)


def test_the_reported_loss_does_not_depend_on_the_weights(uneven: Dataset) -> None:
    config = replace(CONFIG, lr=0.0, dropout=0.0, layers=1)
    losses = [make_run(uneven, replace(config, loss_weighting=how)).epoch(1)[0].train_loss for how in ("batch", "node")]
    assert losses[0] == losses[1]


# --- clipping, and epochs cut short -----------------------------------------------------------------------------------


def test_gradients_are_scaled_to_the_norm_only_where_they_exceed_it(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, dropout=0.0, lipschitz=0.0)
    steps = {}
    for norm in (None, 1e-3, 1e3):
        steps[norm] = gradients_of_an_epoch(make_run(dataset, replace(config, grad_norm=norm)), monkeypatch)
    for plain, clipped, untouched in zip(*steps.values(), strict=True):
        total = torch.cat([grad.flatten() for grad in plain]).norm()
        assert total > 1e-3
        for before, after, same in zip(plain, clipped, untouched, strict=True):
            # as torch's clip_grad_norm_, which divides by the norm + 1e-6
            torch.testing.assert_close(after, before * (1e-3 / (total + 1e-6)))
            assert torch.equal(before, same)


def test_a_batch_without_training_nodes_is_one_of_the_steps(uneven: Dataset) -> None:
    run = make_run(uneven, replace(CONFIG, batch_size=1, max_steps=5))
    run.epoch(1)
    assert [int(store.clock) for store in run.histories.values()] == [5, 5]
    steps = {int(state["step"]) for state in run.optimizer.state.values()}
    assert len(steps) == 1
    assert 0 < steps.pop() < 5


# --- scores -----------------------------------------------------------------------------------------------------------


def f1_by_hand(logits: Tensor, y: Tensor) -> float:
    """The harmonic mean of precision and recall, 0 where one is undefined or both are 0, as PyGAS has it."""
    pairs = [(a > 0, b > 0.5) for a, b in zip(logits.flatten().tolist(), y.flatten().tolist(), strict=True)]
    hits = sum(a and b for a, b in pairs)
    predicted, actual = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    if hits == 0:
        return 0.0
    precision, recall = hits / predicted, hits / actual
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("shift", [-9.0, -1.0, 0.0, 9.0])
def test_micro_f1_is_the_harmonic_mean_of_precision_and_recall(share: float, shift: float) -> None:
    logits, y = torch.randn(40, 7) + shift, (torch.rand(40, 7) < share).float()
    found = micro_f1(logits, y)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(f1_by_hand(logits, y), abs=1e-12)


def test_scores_of_hand_worked_cases() -> None:
    logits = torch.tensor([[1.0, -1.0], [2.0, 3.0], [-1.0, 0.0]])
    # predicted: 3, actual: 3, both: 2; a logit of 0 is not a prediction
    assert float(micro_f1(logits, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))) == pytest.approx(2 / 3)
    assert float(accuracy(logits, torch.tensor([0, 1, 0]))) == pytest.approx(2 / 3)


# --- reproducible -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"edge_dropout": 0.3, "lipschitz": 0.5, "loss_weighting": "node"}


@pytest.mark.parametrize("model", sorted({"GCN", "GIN"} & set(MODELS)))
def test_a_resumed_run_with_all_options_is_the_run(dataset: Dataset, tmp_path: Path, model: str) -> None:
    config = replace(CONFIG, model=model, epochs=4, **OPTIONS)
    whole = train(dataset, config)
    train(dataset, replace(config, epochs=2), checkpoint=tmp_path)
    assert numbers(train(dataset, config, checkpoint=tmp_path, resume=True)) == numbers(whole)
    for name in OPTIONS:
        other = train(dataset, replace(config, **{name: getattr(CONFIG, name)}))
        assert other.train_loss != whole.train_loss, name


@pytest.fixture(scope="module")
def saved(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    train(dataset, replace(CONFIG, epochs=1), checkpoint=folder)
    return folder


@pytest.mark.parametrize(
    "name, value, before",
    [
        ("edge_dropout", 0.5, "0.0"),
        ("lipschitz", 1.0, "0.0"),
        ("lipschitz_noise", 0.2, "0.1"),
        ("loss_weighting", "node", "'batch'"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(
    dataset: Dataset, saved: Path, name: str, value: Any, before: str
) -> None:
    message = f"holds a checkpoint with {name} {before} but this run has {name} {value!r}"
    with pytest.raises(ValueError, match=message):
        train(dataset, replace(CONFIG, **{name: value}), checkpoint=saved, resume=True)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"edge_dropout": 1.0}, r"edge_dropout must be in \[0, 1\), got 1.0"),
        ({"edge_dropout": -0.5}, r"edge_dropout must be in \[0, 1\), got -0.5"),
        ({"lipschitz": -1.0}, r"lipschitz must be a finite number of at least 0, got -1.0"),
        ({"lipschitz": float("inf")}, r"lipschitz must be a finite number of at least 0, got inf"),
        ({"lipschitz_noise": 0.0}, r"lipschitz_noise must be a finite number above 0, got 0.0"),
        ({"lipschitz": 1.0, "layers": 1}, r"lipschitz is for models of at least 2 layers, got layers 1"),
        ({"loss_weighting": "degree"}, r"loss_weighting must be one of batch, node, got 'degree'"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
    assert TrainConfig(loss_weighting="NODE").loss_weighting == "node"


def test_model_options_that_the_model_does_not_have_are_refused(dataset: Dataset) -> None:
    with pytest.raises(TypeError, match=r"model_options must be a mapping from names to values, got \['alpha'\]"):
        TrainConfig(model_options=["alpha"])  # type: ignore[arg-type]
    message = r"model_options \{'alhpa': 0.1\} do not suit GCN: .*unexpected keyword argument 'alhpa'"
    with pytest.raises(ValueError, match=message):
        train(dataset, replace(CONFIG, model_options={"alhpa": 0.1}))
    with pytest.raises(ValueError, match=r"model_options \{'dropout': 0.1\} do not suit GCN: .*'dropout'"):
        train(dataset, replace(CONFIG, model_options={"dropout": 0.1}))

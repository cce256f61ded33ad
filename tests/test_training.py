"""Training: histories against full-batch, reproducibility, steps without training nodes, Ctrl-C."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pymetis
import pytest
import torch
import torch.nn.functional as F

from gas_triton import training
from gas_triton.datasets import Dataset, generate, load
from gas_triton.models import MODELS
from gas_triton.training import EpochRecord, Result, TrainConfig, _Run, find_device, train

CPU = torch.device("cpu")
SMALL = TrainConfig(
    layers=3, hidden=32, dropout=0.0, lr=0.02, grad_norm=1.0, epochs=30, eval_every=3, num_parts=12, batch_size=3
)
SHORT = replace(SMALL, dropout=0.5, epochs=3, eval_every=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Steps this small are slower on several threads, above all where other programs run.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generate(2000, 30_000, num_classes=5, num_features=16, signal=2.0)


def numbers(result: Result) -> dict[str, Any]:
    """A result without its times."""
    fields = asdict(result)
    del fields["epoch_seconds"]
    for record in fields["epochs"]:
        del record["seconds"]
    return fields


def parameters(run: _Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


# --- what it reaches


def test_histories_reach_full_batch_and_an_mlp_does_not(dataset: Dataset) -> None:
    gas, full = train(dataset, SMALL), train(dataset, replace(SMALL, full_batch=True))
    alone = replace(dataset, edge_index=dataset.edge_index[:, :0])
    mlp = train(alone, replace(SMALL, full_batch=True, partition="random"))
    assert full.test_acc > 0.8
    assert gas.test_acc > full.test_acc - 0.03
    assert mlp.test_acc < gas.test_acc - 0.15
    assert gas.peak_bytes < full.peak_bytes / 2
    assert (gas.history_bytes, full.history_bytes) == (2 * 2000 * (32 + 1) * 4, 0)
    assert gas.num_parameters == full.num_parameters == 16 * 32 + 32 + 32 * 32 + 32 + 32 * 5 + 5


def test_memory_is_not_measured_where_it_is_not_asked_for(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "peak_bytes", None)
    assert train(dataset, replace(SMALL, epochs=1), measure_memory=False).peak_bytes is None


def test_cora_reaches_what_is_known_of_it(data_root: Path) -> None:
    config = TrainConfig(hidden=16, lr=0.02, weight_decay=5e-4, grad_norm=1.0, epochs=30, eval_every=5)
    cora = load("cora", data_root)
    gas, full = train(cora, config), train(cora, replace(config, full_batch=True, epochs=60))
    assert gas.test_acc > 0.76
    assert full.test_acc > 0.76


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_learns(dataset: Dataset, name: str) -> None:
    options = {"batch_norm": True} if name == "GIN" else {}
    config = replace(SMALL, model=name.lower(), layers=2, epochs=10, eval_every=5, model_options=options)
    result = train(dataset, config)
    # a class is a fifth of the nodes
    assert result.test_acc > 0.55
    assert result.epochs[-1].train_loss < 0.75 * result.epochs[0].train_loss


def test_low_precision_histories_give_almost_the_same(dataset: Dataset) -> None:
    results = [train(dataset, replace(SHORT, dropout=0.0, history_dtype=dtype)) for dtype in ("float32", "BFloat16")]
    assert results[1].history_bytes == 2 * 2000 * (32 * 2 + 4)
    assert results[0].train_loss != results[1].train_loss
    assert results[0].train_loss == pytest.approx(results[1].train_loss, rel=0.02)


def test_without_histories_out_of_batch_neighbours_are_left_out_of_training_only(dataset: Dataset) -> None:
    config = replace(SHORT, partition="random", batch_size=1, histories=False, dropout=0.0)
    result = train(dataset, config)
    assert result.history_bytes == 0
    run = _Run(dataset, config, CPU, None)
    seen = []
    run.model.convs[1].register_forward_hook(lambda conv, args, out: seen.append((conv.training, conv.halo)))
    run.epoch(1)
    assert set(seen) == {(True, "drop"), (False, "read")}


def test_features_in_host_memory_give_the_same(dataset: Dataset) -> None:
    config = replace(SHORT, dropout=0.0)
    in_place, copied = train(dataset, config), train(dataset, replace(config, host_features=True))
    assert copied.train_loss == pytest.approx(in_place.train_loss, rel=1e-4)
    assert copied.test_acc == pytest.approx(in_place.test_acc, abs=0.01)


# --- reproducible


def test_a_seed_fixes_every_number_and_leaves_the_generator_alone(dataset: Dataset) -> None:
    state = torch.get_rng_state()
    first = train(dataset, SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = train(dataset, SHORT), train(dataset, replace(SHORT, seed=1))
    assert numbers(first) == numbers(again)
    assert first.train_loss != other.train_loss


def test_a_cached_partition_is_used_by_all_models(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(dataset, SHORT, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("METIS ran although the partition is cached")

    monkeypatch.setattr(pymetis, "part_graph", refuse)
    assert numbers(train(dataset, SHORT, cache=tmp_path)) == numbers(first)
    train(dataset, replace(SHORT, model="SAGE", epochs=1), cache=tmp_path)


# --- one step


def test_a_batch_without_training_nodes_only_refreshes_its_histories(dataset: Dataset) -> None:
    config = replace(SHORT, batch_size=1, weight_decay=0.1)
    run = _Run(dataset, config, CPU, None)
    first = run.loader.parts.perm[: int(run.loader.parts.ptr[1])]
    only_first = torch.zeros(2000, dtype=torch.bool)
    only_first[first] = True
    run = _Run(replace(dataset, train_mask=only_first), config, CPU, None)
    assert run.labelled == [len(first)] + [0] * 11
    # a step with training nodes fills Adam's moments, which would move the parameters without any gradient
    run._step(run.loader.batch([0]), run.labelled[0])
    batch, before = run.loader.batch([5]), parameters(run)
    assert run._step(batch, 0) is None
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(run), strict=True))
    assert all(p.grad is None for p in run.model.parameters())
    for store in run.histories.values():
        assert (store.age(batch.node_ids) == 0).all()
        assert (store.table[batch.node_ids] != 0).any()
        untouched = torch.ones(2000, dtype=torch.bool)
        untouched[batch.node_ids] = False
        untouched[run.loader.batch([0]).node_ids] = False
        assert (store.table[untouched] == 0).all()
    record, _ = run.epoch(1)
    assert all((store.last_push > 0).all() for store in run.histories.values())
    assert len(run.optimizer.state) == len(before)
    assert all(state["step"] == 2 for state in run.optimizer.state.values())
    assert record.train_loss > 0


def test_the_loss_is_the_mean_over_the_training_nodes_of_the_batch(dataset: Dataset) -> None:
    run = _Run(dataset, SHORT, CPU, None)
    mask, y = run.loader.parts.permute(run.loader.graph, dataset.train_mask, dataset.y)[1:]
    batch = run.loader.batch([1, 4])
    mask, y, num_labelled = mask[batch.node_ids], y[batch.node_ids], run._num_labelled(batch)
    assert num_labelled == int(mask.sum())
    out = torch.randn(batch.num_nodes, 5)
    expected = F.cross_entropy(out[mask], y[mask])
    torch.testing.assert_close(run._loss(out, batch.target, num_labelled), expected)
    labels = (torch.rand(2000, 4) < 0.3).float()
    several = _Run(replace(dataset, y=labels), SHORT, CPU, None)
    labels = labels[several.loader.parts.perm][batch.node_ids]
    out = torch.randn(batch.num_nodes, 4)
    expected = F.binary_cross_entropy_with_logits(out[mask], labels[mask])
    torch.testing.assert_close(several._loss(out, several.loader.batch([1, 4]).target, num_labelled), expected)


def test_weight_decay_and_gradient_norm_are_those_of_the_config(dataset: Dataset) -> None:
    config = replace(SHORT, weight_decay=0.25, weight_decay_last=0.5, grad_norm=0.0)
    run = _Run(dataset, config, CPU, None)
    decayed, last = run.optimizer.param_groups
    assert (decayed["weight_decay"], last["weight_decay"]) == (0.25, 0.5)
    assert [p.shape for p in last["params"]] == [(5,), (5, 32)]
    assert len(decayed["params"]) + len(last["params"]) == len(list(run.model.parameters()))
    still = _Run(dataset, replace(config, weight_decay=0.0, weight_decay_last=0.0), CPU, None)
    before = parameters(still)
    still.epoch(1)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(still), strict=True))


def test_max_steps_cuts_an_epoch_short(dataset: Dataset) -> None:
    run = _Run(dataset, replace(SHORT, max_steps=2), CPU, None)
    run.epoch(1)
    assert [int(store.clock) for store in run.histories.values()] == [2, 2]
    run = _Run(dataset, replace(SHORT, max_steps=99), CPU, None)
    run.epoch(1)
    assert [int(store.clock) for store in run.histories.values()] == [4, 4]


# --- evaluation and the result


def test_evaluation_is_exact_and_scheduled(dataset: Dataset) -> None:
    records: list[EpochRecord] = []
    result = train(dataset, replace(SMALL, epochs=8, eval_every=3), records.append)
    assert [record.epoch for record in records] == list(range(1, 9))
    assert [record.epoch for record in records if record.val_acc is not None] == [3, 6, 8]
    best = max((r for r in records if r.val_acc is not None), key=lambda r: r.val_acc)
    assert (result.best_epoch, result.val_acc, result.test_acc) == (best.epoch, best.val_acc, best.test_acc)
    assert result.train_loss == records[-1].train_loss
    assert result.epochs == records
    run = _Run(dataset, SMALL, CPU, None)
    run.epoch(1)
    inferred = run._evaluate()
    run.full = run.loader.full()
    assert run._evaluate() == pytest.approx(inferred, abs=1e-9)


def test_the_result_keeps_the_best_epoch_and_the_median_time() -> None:
    result = Result()
    for epoch, (seconds, val_acc) in enumerate([(9.0, 0.5), (1.0, None), (3.0, 0.7), (2.0, 0.7)], start=1):
        result.add(EpochRecord(epoch, 1.0 / epoch, seconds, val_acc, None if val_acc is None else epoch / 10))
        if epoch == 1:
            assert result.epoch_seconds == 9.0
    assert (result.best_epoch, result.val_acc, result.test_acc) == (3, 0.7, 0.3)
    assert (result.epoch_seconds, result.train_loss) == (2.0, 0.25)


def test_several_labels_a_node_are_scored_by_micro_f1(dataset: Dataset) -> None:
    labels = F.one_hot(dataset.y, 5).float() + F.one_hot((dataset.y + 1) % 5, 5).float()
    result = train(replace(dataset, y=labels), replace(SMALL, layers=2, epochs=12, eval_every=4))
    assert result.test_acc > 0.7
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    run = _Run(replace(dataset, y=labels), SHORT, CPU, None)
    run.epoch(1)
    run.full = run.loader.full()
    logits = run._forward(run.model.eval(), run.full).detach()
    test, truth = run.loader.node_tensors["test_mask"], run.loader.node_tensors["y"]
    guessed, actual = (logits[test] > 0).numpy(), (truth[test] > 0).numpy()
    hits = (guessed & actual).sum()
    precision, recall = hits / max(guessed.sum(), 1), hits / actual.sum()
    expected = 2 * precision * recall / max(precision + recall, 1e-12)
    assert run._evaluate()[1] == pytest.approx(float(expected), abs=1e-9)


# --- Ctrl-C


def test_ctrl_c_between_epochs_keeps_what_was_reached(dataset: Dataset) -> None:
    def on_epoch(record: EpochRecord) -> None:
        if record.epoch == 2:
            raise KeyboardInterrupt

    result, whole = train(dataset, SHORT, on_epoch), train(dataset, replace(SHORT, epochs=2))
    assert result.interrupted
    assert not whole.interrupted
    assert numbers(result) == {**numbers(whole), "interrupted": True}


def test_ctrl_c_within_a_step_keeps_the_epochs_before(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    step = _Run._step

    def interrupted(self: _Run, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(_Run, "_step", interrupted)
    stop_at = 6
    result = train(dataset, SHORT)
    assert result.interrupted
    assert [record.epoch for record in result.epochs] == [1]
    assert result.test_acc == result.epochs[0].test_acc
    calls, stop_at = 0, 2
    result = train(dataset, SHORT)
    assert result.interrupted
    assert (result.epochs, result.test_acc, result.epoch_seconds, result.peak_bytes) == ([], None, None, None)
    assert result.num_parameters == 1765


# --- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "gcm"}, r"model must be one of GCN, SAGE, GIN.*, got 'gcm'"),
        ({"partition": "kmeans"}, r"partition must be one of metis, random, got 'kmeans'"),
        ({"history_dtype": "int4"}, r"history_dtype must be one of float32, bfloat16, float16, int8, got 'int4'"),
        ({"history_tier": "disk"}, r"history_tier must be one of auto, device, pinned, file, got 'disk'"),
        ({"history_folder": "x"}, r"history_folder is for history_tier 'file' or 'auto', got 'device'"),
        ({"nonfinite": "drop"}, r"nonfinite must be one of raise, warn, skip, allow, got 'drop'"),
        ({"prefetch_order": "stale"}, r"prefetch_order 'stale' is for history_tier 'pinned' or 'file', got 'device'"),
        ({"history_tier": "file", "history_folder": ""}, r"history_folder must name a folder, got ''"),
        ({"prefetch_order": "any"}, r"prefetch_order must be one of strict, stale, got 'any'"),
        ({"layers": 0}, r"layers must be a positive int, got 0"),
        ({"batch_size": 2.0}, r"batch_size must be a positive int, got 2.0"),
        ({"epochs": -1}, r"epochs must be a positive int, got -1"),
        ({"max_steps": 0}, r"max_steps must be a positive int, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"lr": float("nan")}, r"lr must be a finite number of at least 0, got nan"),
        ({"grad_norm": -1.0}, r"grad_norm must be a finite number of at least 0, got -1.0"),
    ],
)
def test_a_config_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_names_in_a_config_may_have_any_case() -> None:
    config = TrainConfig(model="sage", partition="METIS", history_dtype="BFLOAT16", history_tier="File")
    assert (config.model, config.partition, config.history_dtype) == ("SAGE", "metis", "bfloat16")
    assert config.history_tier == "file"


def test_a_dataset_that_cannot_be_trained_on_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"num_parts must be from 1 to the number of nodes \(2000\), got 2001"):
        train(dataset, replace(SHORT, num_parts=2001))
    empty = torch.zeros(2000, dtype=torch.bool)
    for name in ("train_mask", "val_mask", "test_mask"):
        with pytest.raises(ValueError, match=f"{name} of generated must select a node, got none"):
            train(replace(dataset, **{name: empty}), SHORT)


def test_a_device_that_is_not_there_is_refused() -> None:
    for name in ("cuda:99", "meta", "gpu"):
        with pytest.raises(ValueError, match=rf"device must be one of cpu.* on this machine, got '{name}'"):
            find_device(name)
    assert find_device("cpu") == CPU


@pytest.mark.gpu
def test_a_gpu_trains_to_the_same_accuracy(dataset: Dataset) -> None:
    on_cpu, on_gpu = train(dataset, SMALL), train(dataset, SMALL, device="cuda")
    assert on_gpu.test_acc == pytest.approx(on_cpu.test_acc, abs=0.02)
    assert numbers(on_gpu) == numbers(train(dataset, SMALL, device="cuda"))

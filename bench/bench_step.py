"""A training step of every model: ours against PyGAS's way (`bench/pygas.py`), on the same batches.

A step is forward, loss, backward and Adam. The plan of a batch is not in it: batches are a class or two of the
generated graph each, always the same, planned once; `bench_plan` and `bench_epoch` measure planning. PyGAS's way finds
its batches relabelled and its features sliced. Steps follow each other as in an epoch, with dropout, and ours fetches
rows ahead where histories are not on the device. Before that, without dropout, the losses of both ways must agree.

    python -m bench.bench_step        a table for each model and tier
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import groups, pygas
from bench.groups import Case, Group, Setting, check, measure_cases, peak_of, run_with
from bench.planted import IGNORED, make_problem, size_of
from bench.roofline import Traffic, aggregate_traffic, speed_of_light
from bench.side_by_side import interleave, ratio
from bench.tables import OURS, Row
from gas_triton import Batch, ClusterLoader, attach_histories
from gas_triton.models import MODELS

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["WAYS", "cases", "measure"]
NARROW, PYGAS, FULL_BATCH = "gas_triton, bf16 histories", "PyGAS's way", "gas_triton, full batch"
WAYS = (OURS, PYGAS)
NUM_LAYERS, DROPOUT, LEARNING_RATE = 3, 0.5, 0.01
# width of a head for GAT, which has eight
HIDDEN = {"GCN": 256, "SAGE": 256, "GIN": 256, "GAT": 8, "APPNP": 256, "GCN2": 256, "PNA": 64}
# models that are measured with histories in the host's memory
IN_HOST = ("GCN", "GAT")
# steps of PyGAS's way that are timed as one on a GPU: each takes its time alone, so few will do
PYGAS_STEPS = 4
# of a step with histories on the device, and in the host's memory
MIN_TIMES = {"device": 3.0, "pinned": 5.0}
MIN_HIDDEN = 0.95
Losses = list[Tensor]


class Training:
    """Our model with histories, or full-batch without.

    Args:
        name: of the model.
        loader: its batches.
        num_classes: width of the last layer.
        tier: of the histories; None trains full-batch.
        dtype: of the histories.
        dropout: of the model.
        hidden: width; that of `HIDDEN` if None.
    """

    def __init__(
        self,
        name: str,
        loader: ClusterLoader,
        num_classes: int,
        tier: str | None = "device",
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.0,
        hidden: int | None = None,
    ) -> None:
        self.loader = loader
        self.model = make_model(name, loader, num_classes, dropout, hidden)
        num_nodes = loader.graph.num_nodes
        self.histories = None if tier is None else attach_histories(self.model, num_nodes, tier, dtype)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def epoch(self, steps: int) -> Losses:
        """Trains the first steps of an epoch; their losses, not waited for."""
        if self.histories is None:
            return [self.step(self.loader.full())]
        batches = self.histories.prefetch(self.loader)
        # to the end of an epoch, so that its last step ends too
        batches = batches if steps >= len(self.loader) else itertools.islice(batches, steps)
        return [self.step(batch) for batch in batches]

    def step(self, batch: Batch) -> Tensor:
        """Trains one step; its loss."""
        return descend(self.optimizer, self.model(batch.features, batch), batch.target)

    def hidden_share(self) -> float | None:
        """The share of the time of transfers that was hidden since the last call; None where nothing was moved."""
        if self.histories is None:
            return None
        share: float | None = self.histories.transfer_stats()["hidden_fraction"]
        self.histories.reset_stats()
        return share


class PygasTraining:
    """The same model in PyGAS's way.

    Args:
        name: of the model.
        loader: ours, for its graph.
        num_classes: width of the last layer.
        made: its batches, as `pygas_steps` makes them.
        tables_on: device of the histories.
        dropout: of the model.
        hidden: width; that of `HIDDEN` if None.
    """

    def __init__(
        self,
        name: str,
        loader: ClusterLoader,
        num_classes: int,
        made: Sequence[pygas.Step],
        tables_on: torch.device,
        dropout: float = 0.0,
        hidden: int | None = None,
    ) -> None:
        model = make_model(name, loader, num_classes, dropout, hidden)
        self.model = pygas.Historical(model, loader.graph.num_nodes, tables_on)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.made = [replace(step, halo_ids=step.halo_ids.to(tables_on)) for step in made]

    def epoch(self, steps: int) -> Losses:
        """Trains the first steps of an epoch; their losses, not waited for."""
        return [descend(self.optimizer, self.model(step), step.target) for step in self.made[:steps]]


def make_model(name: str, loader: ClusterLoader, num_classes: int, dropout: float, hidden: int | None) -> Any:
    """A model of `MODELS`, always with the same parameters, on the device of the loader's graph."""
    torch.manual_seed(0)
    kind: Any = MODELS[name]
    assert loader.x is not None
    sizes = (loader.x.size(1), hidden or HIDDEN[name], num_classes, NUM_LAYERS)
    return kind(*sizes, dropout=dropout, **kind.options_of(loader.graph)).to(loader.graph.device)


def pygas_steps(loader: ClusterLoader, steps: int) -> list[pygas.Step]:
    """The first batches of a loader for PyGAS's way."""
    return [
        pygas.Step(pygas.Adjacency(batch), batch.spans.tolist(), batch.halo_ids, batch.x, batch.target)
        for batch in itertools.islice(loader.in_order(), steps)
    ]


def descend(optimizer: torch.optim.Optimizer, out: Tensor, target: Tensor) -> Tensor:
    """Backward and Adam; the loss."""
    loss = F.cross_entropy(out, target, ignore_index=IGNORED)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def losses(training: Training | PygasTraining, steps: int) -> Tensor:
    """The losses of two epochs of some steps: in the second, rows are read that were pushed."""
    return torch.stack([loss for _ in range(2) for loss in training.epoch(steps)])


@functools.lru_cache(maxsize=1)
def prepare(setting: Setting, name: str) -> tuple[ClusterLoader, list[pygas.Step], int]:
    """The batches of a model, those of PyGAS's way, and the number of classes."""
    problem = make_problem(*size_of(setting), setting.device)
    loader = problem.loader(name)
    num_steps = len(loader) if setting.device.type == "cuda" else 2
    return loader, pygas_steps(loader, num_steps), problem.num_classes


def cases(setting: Setting) -> list[Case]:
    """The models with histories on the device, two of them with pinned ones too: without a GPU, both are the same."""
    names = setting.choose(list(HIDDEN), ["GCN", "GAT"], ["GCN", "APPNP"])
    in_host = IN_HOST if setting.device.type == "cuda" else ()
    return [
        Case("step", {"model": name, "histories": tier}, functools.partial(make, setting, name, tier))
        for name in names
        for tier in ("device", *(["pinned"] if name in in_host else []))
    ]


def make(setting: Setting, name: str, tier: str) -> Group:
    """Ways to train without dropout, which give losses."""
    ours, theirs = makers(setting, name, tier)
    steps = min(3, len(prepare(setting, name)[1]))
    ways: dict[str, Training | PygasTraining] = {OURS: ours(), PYGAS: theirs()}
    # losses differ by rounding, which Adam's first steps magnify
    return Group({way: functools.partial(losses, training, steps) for way, training in ways.items()}, tolerance=1e-3)


def makers(setting: Setting, name: str, tier: str) -> tuple[Callable[..., Training], Callable[..., PygasTraining]]:
    """What makes trainings of a model, ours and PyGAS's."""
    loader, made, num_classes = prepare(setting, name)
    hidden = setting.choose(None, None, 2)
    tables_on = setting.device if tier == "device" else torch.device("cpu")
    ours = functools.partial(Training, name, loader, num_classes, tier=tier, hidden=hidden)
    return ours, functools.partial(PygasTraining, name, loader, num_classes, made, tables_on, hidden=hidden)


def measure(setting: Setting) -> list[Row]:
    """A row for every model, tier and way: ms of a step, host_ms until it is queued, synchronises, hidden, light."""
    return measure_cases(cases(setting), setting, measure_training)


def measure_training(case: Case, setting: Setting) -> list[Row]:
    """The rows of a case, whose losses agree, and in that of the GCN of full-batch training."""
    check(case, case.build())
    is_gpu, is_gcn = setting.device.type == "cuda", case.keys["model"] == "GCN"
    ours, theirs = makers(setting, name=case.keys["model"], tier=case.keys["histories"])
    loader, made, _ = prepare(setting, case.keys["model"])
    ways: dict[str, Any] = {OURS: ours(dropout=DROPOUT)}
    if is_gpu or is_gcn:
        ways[NARROW] = ours(dtype=torch.bfloat16, dropout=DROPOUT)
    ways[PYGAS] = theirs(dropout=DROPOUT)
    steps = len(made) if is_gpu else 1
    traffic = step_traffic(ways[OURS].model, loader, steps, case.keys["histories"]) if is_gcn else None
    rows = measure_ways({"op": case.op, **case.keys}, ways, loader, steps, traffic, setting)
    if is_gcn:
        for row in rows:
            hold_to_promise(row, setting)
    if is_gcn and case.keys["histories"] == "device":
        keys = {"op": case.op, "model": "GCN", "histories": "none"}
        rows += measure_ways(keys, {FULL_BATCH: ours(tier=None, dropout=DROPOUT)}, loader, 1, None, setting)
    return rows


def measure_ways(
    keys: Row,
    ways: dict[str, Any],
    loader: ClusterLoader,
    steps: int,
    traffic: Traffic | None,
    setting: Setting,
) -> list[Row]:
    """The rows of trainings that run side by side."""
    device = setting.device
    counts = {name: min(steps, PYGAS_STEPS) if name == PYGAS else steps for name in ways}
    calls = {name: functools.partial(way.epoch, counts[name]) for name, way in ways.items()}
    if device.type == "cuda":
        # compiling is no part of the time of transfers, nor of a round
        for way in ways.values():
            way.epoch(min(steps, 2))
            _ = way.hidden_share() if isinstance(way, Training) else None
    taken = interleave(calls, warmup=1, device=device, seconds=setting.seconds)
    seconds = {name: [value / counts[name] for value in values] for name, values in taken.items()}
    is_full = FULL_BATCH in ways
    seen = sum(batch.num_nodes for batch in itertools.islice(loader.in_order(), steps))
    nodes = loader.graph.num_nodes if is_full else seen / steps
    rows = []
    for name, way in ways.items():
        median = statistics.median(seconds[name])
        row = {**keys, "way": name, "ms": 1e3 * median, "fastest_ms": 1e3 * min(seconds[name])}
        row |= {
            "times_ours": ratio(seconds, name, next(iter(ways))),
            "nodes": nodes,
            "ns_per_node": 1e9 * median / nodes,
        }
        if traffic is not None and setting.ceilings is not None:
            row["light"] = speed_of_light(traffic, setting.ceilings).seconds / steps / median
        if device.type == "cuda":
            row |= {
                "host_ms": 1e3 * host_seconds(calls[name], device) / counts[name],
                "synchronises": synchronises(calls[name]),
            }
        share = way.hidden_share() if isinstance(way, Training) else None
        row |= {} if share is None else {"hidden": share}
        peak = peak_of(functools.partial(way.epoch, min(steps, 2)), device)
        rows.append({**row, "peak_mib": peak / 2**20, "rounds": len(seconds[name])})
    return rows


def hold_to_promise(row: Row, setting: Setting) -> None:
    """Adds "target" and "met", where the project promises something of a row."""
    if setting.device.type != "cuda" or setting.size != "full":
        return
    if row["way"] == PYGAS:
        least = MIN_TIMES[row["histories"]]
        row |= {"target": f">= {least:g}x", "met": row["times_ours"] >= least}
    elif row["way"] == OURS and "hidden" in row:
        row |= {"target": f">= {MIN_HIDDEN:.0%} hidden", "met": row["hidden"] >= MIN_HIDDEN}


def host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time until everything of a call is queued on a GPU that was idle."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return elapsed


def synchronises(call: Callable[[], object]) -> bool:
    """Whether the host waits for the GPU within a call, as torch's own check sees it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def step_traffic(model: Any, loader: ClusterLoader, steps: int, tier: str) -> Traffic:
    """What steps of our GCN with float32 histories move at least: aggregations, linear layers, tables and Adam."""
    parts = []
    for batch in itertools.islice(loader.in_order(), steps):
        for place, conv in enumerate(model.convs):
            narrow, wide = conv.in_channels, conv.out_channels
            parts.append(aggregate_traffic(batch, narrow, backward=place > 0))
            passes = 2 if place == 0 else 3
            rows = 4 * batch.num_nodes * (narrow + wide)
            parts.append(Traffic(passes * rows, flops=passes * 2 * batch.num_nodes * narrow * wide))
            if place > 0:
                pushed, pulled = 4 * batch.num_nodes * narrow, 4 * batch.num_halo * narrow
                is_on_host = tier == "pinned"
                parts.append(Traffic(pushed, uploaded=pulled * is_on_host, downloaded=pushed * is_on_host))
        # parameters, gradients and both moments are read; all but the gradients written
        parts.append(Traffic(sum(7 * parameter.nbytes for parameter in model.parameters())))
    return functools.reduce(Traffic.followed_by, parts)


def test_step(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """Two epochs of a few steps, under pytest-benchmark."""
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

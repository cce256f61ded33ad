"""The schedule of pulls and pushes: no race in any legal order, every wait needed, and slots that do not leak."""

from __future__ import annotations

import ast
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gas_triton import Batch, ClusterLoader, Histories, HistoryStore, attach_histories
from gas_triton.functional import Quantized
from gas_triton.history import histories as histories_module
from gas_triton.history.device import Inline
from gas_triton.history.staging import ORDERS, Ticket

from .fake_device import Fake, Wait
from .test_history import Net, make_loader, train

NUM_ROWS = 30


class Interrupted(Exception):
    pass


@dataclass
class Course:
    """What a run is to do, drawn from a seed: the same for every device."""

    seed: int
    order: str = "strict"
    depth: int = 1
    num_layers: int = 3
    epochs: int = 4
    dtype: torch.dtype = torch.float32
    in_place: bool = False
    # chances, a step
    foreign: float = 0.2
    evaluated: float = 0.2
    planned: float = 0.2
    unread: float = 0.1
    raised: float = 0.1
    left: float = 0.1
    unplanned: float = 0.05


@dataclass
class Player:
    """Plays an epoch's steps on stores, without a model.

    Attributes:
        seen: the halo rows that layers got, forward and backward.
    """

    course: Course
    engine: Any
    seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.course.seed)
        self.draw = torch.Generator().manual_seed(self.course.seed)
        self.loader = make_loader("symmetric", seed=self.course.seed, batch_size=self.random.choice([1, 2, 3]))
        names = [f"conv{place + 2}" for place in range(self.course.num_layers - 1)]
        self.histories = make_histories(
            self.engine, dict.fromkeys(names, self.course.dtype), in_place=self.course.in_place
        )
        self.plan_one, self.loader.batch = self.loader.batch, self.plan_or_not
        if isinstance(self.engine, Fake):
            self.engine.scratch = [self.loader._planner._local]

    def play(self) -> Player:
        for _ in range(self.course.epochs):
            batches = self.histories.prefetch(self.loader, self.course.depth, self.course.order)
            try:
                for batch in batches:
                    self.step(batch)
                    if self.happens(self.course.left):
                        break
            except Interrupted:
                pass
            del batches
            if self.happens(0.2):
                self.forward(self.plan(2), push=False)
                self.histories.reset()
                self.told("host", writes=[store._tensors["table"] for store in self.histories.values()])
        return self

    def step(self, batch: Batch) -> None:
        if self.happens(self.course.evaluated):
            self.forward(batch, push=False)
        if self.happens(self.course.planned):
            self.plan(2)
        if self.happens(self.course.foreign):
            self.forward(self.plan(2))
        self.forward(batch, is_whole=False)
        if self.happens(self.course.foreign / 2):
            self.forward(self.plan(1))

    def plan_or_not(self, clusters: list[int]) -> Batch:
        batch = self.plan_one(clusters)
        if self.course.unplanned and self.happens(self.course.unplanned):
            raise Interrupted
        return batch

    def plan(self, num_clusters: int) -> Batch:
        """A batch planned by the caller, on "compute", with the map that "plan" uses."""
        planned = self.loader.num_planned
        batch = self.plan_one(self.random.sample(range(6), num_clusters))
        if self.loader.num_planned > planned:
            made = [self.loader._planner._local, batch.node_ids, batch.halo_ids]
            self.told("compute", writes=made, what="planning of the caller")
        return batch

    def forward(self, batch: Batch, push: bool = True, is_whole: bool = True) -> None:
        halos = []
        for store in self.histories.values():
            x = torch.randn(batch.num_nodes, store.dim, generator=self.draw)
            loaded = [vars(batch)["loaded"]] if "loaded" in vars(batch) else []
            self.told("compute", reads=[batch.node_ids, batch.halo_ids, *loaded], writes=[x])
            if not is_whole and self.happens(self.course.raised):
                raise Interrupted
            read = is_whole or not self.happens(self.course.unread)
            halo = store.exchange(x, batch, push=push, read=read)
            if halo is not None:
                rows = [halo.rows, halo.scale] if isinstance(halo, Quantized) else [halo]
                halos.append(([(part, batch.halo_ids) for part in rows] if store.in_place else rows, rows, batch))
                self.see(*halos[-1])
        # saved for backward
        for halo in reversed(halos):
            self.see(*halo)

    def see(self, reads: list[Any], rows: list[Tensor], batch: Batch) -> None:
        self.told("compute", reads=reads)
        self.seen += [part[batch.halo_ids] if self.course.in_place else part.clone() for part in rows]

    def forget(self) -> None:
        """What the collector does when the histories go."""
        for store in self.histories.values():
            store.staging = None
        del self.histories

    def happens(self, chance: float) -> bool:
        return self.random.random() < chance

    def told(self, actor: str, **what: Any) -> None:
        if isinstance(self.engine, Fake):
            getattr(self.engine, actor)(**what)

    def tables(self) -> list[Tensor]:
        found = []
        for store in self.histories.values():
            found += [store.table, store.last_push, store.clock, *([] if store.scale is None else [store.scale])]
        return [tensor.clone() for tensor in found]


def make_histories(engine: Any, dtypes: dict[str, torch.dtype], **options: Any) -> Histories:
    stores = {}
    for place, (name, dtype) in enumerate(dtypes.items()):
        stores[name] = HistoryStore(NUM_ROWS, 3 + place, dtype, name=name, tier="pinned", nonfinite="allow", **options)
        stores[name].engine = engine
        if isinstance(engine, Fake):
            for key, tensor in stores[name]._tensors.items():
                engine.name(tensor, f"{name} {key}")
    return Histories(stores)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def courses(order: str, num: int = 40, **options: Any) -> list[Course]:
    found = []
    for seed in range(num):
        draw = random.Random(seed)
        drawn: dict[str, Any] = dict(
            depth=draw.choice([1, 2]),
            num_layers=draw.choice([2, 3, 5]),
            dtype=draw.choice([torch.float32, torch.float64, torch.bfloat16, torch.int8]),
            unread=draw.choice([0.0, 0.1, 0.9]),
            foreign=draw.choice([0.0, 0.0, 0.5]),
            raised=draw.choice([0.0, 0.1, 0.4]),
        )
        found.append(Course(seed, order, **{**drawn, **options}))
    return found


# --- races -----------------------------------------------------------------------------------------------------------


def race(course: Course, drop: Callable[[Wait], bool] | None = None) -> tuple[list[str], Counter[Wait]]:
    """Races of a course without the waits that `drop` names, and the waits called."""
    fake = Fake(course.seed, drop=drop)
    Player(course, fake).play().forget()
    # what nobody waited for runs all the same
    fake.finish()
    return fake.races, fake.waits


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_execution_gives_the_rows_of_an_inline_device(order: str, in_place: bool) -> None:
    # with nothing to fetch ahead, an inline device does not plan ahead either
    for course in courses(order, 25, in_place=in_place, unplanned=0.0 if in_place else 0.05):
        expected, fake = Player(course, Inline()).play(), Fake(course.seed)
        played = Player(course, fake).play()
        assert same(played.seen, expected.seen), course
        assert same(played.tables(), expected.tables()), course
        played.forget()
        fake.finish()
        assert fake.races == [], course


# what is wrong without a wait: each word of it is in the message of a race
WAITS = {
    Wait("_plan_next", "compute", "plan", "compute<-plan"): "planning of the caller on compute, planning on plan",
    Wait("_prefetch", "plan", "compute", "plan<-compute"): "planning on plan, planning of the caller on compute",
    Wait("_pull", "pull", "plan", "pull<-plan"): "halo_ids: gather on pull, planning on plan",
    Wait("_pull", "pull", "push", "pull<-push"): "table: gather on pull, copy on push",
    Wait("_pull", "pull", "compute", "pull<-free"): "gather on pull, what was there before on compute",
    Wait("_take_slot", "compute", "pull", "compute<-pull"): "a slot freed before a gather on pull",
    Wait("take", "compute", "pull", "compute<-pull"): "a layer on compute, gather on pull",
    Wait("_push_to_host", "push", "compute", "push<-rows"): "copy on push, rows made on compute",
    Wait("_push_to_host", "push", "pull", "push<-pull"): "table: copy on push, gather on pull",
    Wait("_gather", "compute", "push", "compute<-push"): "table: gather on compute, copy on push",
    Wait("retire_sources", "compute", "push", "free<-push"): "pushed rows freed before their copy on push",
    Wait("close", "compute", "pull", "join"): "a slot freed before a gather on pull",
    Wait("close", "compute", "push", "join"): "pushed rows freed before their copy on push",
    Wait("close", "compute", "plan", "join"): "planning of the caller on compute, planning on plan",
}
# implied by another wait: the next batch is planned, and that waited for, before a batch's turn comes
LOAD = Wait("begin", "compute", "plan", "compute<-load")
WAITS_IN_PLACE = {
    Wait("_read", "compute", "push", "compute<-push"): "table: a layer on compute, copy on push",
    Wait("retire_sources", "compute", "push", "free<-push"): "pushed rows freed before their copy on push",
}


def is_found(expected: str, races: list[str]) -> bool:
    return any(all(part in found for part in expected.split(", ")) for found in races)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "wait, expected, in_place",
    [(*item, False) for item in WAITS.items()] + [(*item, True) for item in WAITS_IN_PLACE.items()],
    ids=lambda value: " ".join(value) if isinstance(value, Wait) else "",
)
def test_a_schedule_without_one_of_its_waits_has_a_race(wait: Wait, expected: str, in_place: bool, order: str) -> None:
    # rare ones need rows that nobody reads, or a step that ends before its first push
    for course in courses(order, 300, in_place=in_place):
        if is_found(expected, race(course, lambda called: called == wait)[0]):
            return
    pytest.fail(f"no race without {wait}")


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_batch_brings_is_there_when_its_step_begins(order: str) -> None:
    def shows(*dropped: Wait) -> bool:
        expected = "loaded: a layer on compute, loading on plan"
        return any(is_found(expected, race(course, lambda wait: wait in dropped)[0]) for course in courses(order))

    assert shows(LOAD, Wait("_plan_next", "compute", "plan", "compute<-plan"))
    assert not shows(LOAD)


@pytest.mark.parametrize("order, other", [("strict", "plan<-compute"), ("stale", None)])
def test_a_slot_is_not_filled_before_the_backward_that_reads_it(order: str, other: str | None) -> None:
    # In strict order its next user was planned after the backward, or follows a push that came after it.
    expected = "gather on pull, a layer on compute"

    def shows(*dropped: str | None) -> bool:
        return any(is_found(expected, race(course, lambda wait: wait.edge in dropped)[0]) for course in courses(order))

    assert shows("pull<-free", other)
    if other is not None:
        assert not shows("pull<-free")
        assert not shows(other)


def test_the_table_of_waits_is_complete() -> None:
    called = Counter()
    for order in ORDERS:
        for in_place in (False, True):
            for course in courses(order, 25, in_place=in_place):
                called += race(course)[1]
    assert set(called) == {*WAITS, *WAITS_IN_PLACE, LOAD}

    written = set()
    folder = Path(histories_module.__file__).parent
    for file in ("rows.py", "store.py", "staging.py", "histories.py"):
        for function in ast.walk(ast.parse((folder / file).read_text())):
            if isinstance(function, ast.FunctionDef):
                for call in ast.walk(function):
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "wait":
                        stream, _, edge = call.args
                        written.add((function.name, ast.literal_eval(stream), ast.literal_eval(edge)))
    assert written == {(wait.function, wait.stream, wait.edge) for wait in called}


def test_a_race_shows_in_the_rows_too() -> None:
    for edge in ("pull<-push", "compute<-pull"):
        played = []
        for course in courses("strict", 10):
            fake = Fake(course.seed, pace=0.0, drop=edge)
            expected = Player(course, Inline()).play()
            played.append(same(Player(course, fake).play().seen, expected.seen))
        assert not all(played), edge


# --- slots and sources -----------------------------------------------------------------------------------------------


def on_fake(fake: Fake, **options: Any) -> tuple[Net, Histories, ClusterLoader]:
    model, loader = Net(), make_loader(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        histories = attach_histories(model, NUM_ROWS, "pinned", torch.float64)
    for store in histories.values():
        store.engine = fake
    return model, histories, loader


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(6))
def test_a_model_trains_as_on_an_inline_device(order: str, seed: int) -> None:
    results = []
    for engine in (Inline(), Fake(seed)):
        model, histories, loader = on_fake(engine)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses: list[Tensor] = []
        for epoch in range(4):
            losses += train(model, histories.prefetch(loader, 1 + epoch % 2, order), optimizer)
        results.append([*losses, *model.parameters(), *(store.table for store in histories.values())])
        assert histories.transfer_stats()["misses"] == 0
    assert same(*results)
    assert engine.races == []


def test_two_slots_a_layer_are_enough_for_ever() -> None:
    for order in ORDERS:
        for course in courses(order, 10, epochs=12):
            player = Player(course, Fake(course.seed)).play()
            staging = player.histories._staging
            assert staging is not None
            assert len(staging._slots) <= 2 * (course.num_layers - 1)
            assert sorted(id(slot) for free in staging._free.values() for slot in free) == sorted(
                id(slot) for slot in staging._slots
            )


def test_a_slot_that_could_not_grow_is_not_lost() -> None:
    player = Player(Course(0, raised=0.0, left=0.0, unplanned=0.0), Inline()).play()
    staging, store = player.histories._staging, player.histories["conv2"]
    assert staging is not None
    before = len(staging._slots)
    batch = max((player.loader.batch([a, b]) for a in range(6) for b in range(a)), key=lambda batch: batch.num_halo)
    for slot in staging._free["conv2"]:
        slot.rows = {}
    make, store.empty_rows = store.empty_rows, no_memory
    for _ in range(3):
        with pytest.raises(MemoryError):
            staging.begin(Ticket(batch, None), None, "strict")
        staging.close()
    store.empty_rows = make
    player.play()
    assert len(staging._slots) == before
    assert sum(map(len, staging._free.values())) == before


def no_memory(num_rows: int) -> dict[str, Tensor]:
    raise MemoryError


def test_staged_rows_of_a_slot_that_was_given_away_are_refused() -> None:
    model, histories, loader = on_fake(Fake())
    batches = histories.prefetch(loader)
    next(batches)
    staging = histories._staging
    assert staging is not None
    staged = staging._current.staged["conv2"]
    assert staged.halo("conv2") is not None
    for batch in batches:
        model(batch.x, batch)
    with pytest.raises(RuntimeError, match=r"conv2: staged rows .* given to another batch \(generation 1, now [2-9]\)"):
        staged.halo("conv2")


@pytest.mark.parametrize("engine", [Inline(), Fake(pace=0.0), Fake(pace=0.9)], ids=["inline", "late", "early"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_backward_after_its_slot_was_used_again_is_refused(engine: Any, order: str) -> None:
    _, histories, loader = on_fake(engine)
    store = histories["conv2"]
    kept = []
    batches = histories.prefetch(loader, order=order)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # noqa: PT012
        for batch in batches:
            halo = store.exchange(torch.randn(batch.num_nodes, store.dim, dtype=torch.float64), batch)
            weight = torch.ones(batch.num_halo, 1, dtype=torch.float64, requires_grad=True)
            kept.append((weight, (halo * weight).sum(), halo.sum(1)))
            if len(kept) == 3:
                kept[0][1].backward()
    # within its own step it is right
    weight, out, expected = kept[2]
    out.backward()
    assert torch.equal(weight.grad[:, 0], expected)


def test_pushed_rows_do_not_pile_up() -> None:
    for order in ORDERS:
        for seed in range(8):
            model, histories, loader = on_fake(Fake(seed), batch_size=1)
            for _ in range(4):
                for batch in histories.prefetch(loader, order=order):
                    model(batch.x, batch)
                    # rows and scales of the few steps by which the device is behind, of 24
                    assert all(len(store._sources) <= 16 for store in histories.values())
            histories.flush()
            assert all(store._sources == [] for store in histories.values())


def test_rows_changed_in_place_before_they_are_copied_are_refused() -> None:
    _, histories, loader = on_fake(Fake(pace=0.0))
    store, batch = histories["conv2"], loader.batch([0, 1])
    store.push(torch.randn(batch.num_nodes, store.dim, dtype=torch.float64), batch)
    store._sources[0][0].relu_()
    with pytest.raises(RuntimeError, match="conv2: rows were modified in place after they were pushed and before"):
        histories.flush()
    # said once
    histories.flush()
    assert store._sources == []


@pytest.mark.parametrize("pace", [0.0, 0.9])
def test_what_layers_change_after_a_push_is_refused_or_not_stored(pace: float) -> None:
    _, histories, loader = on_fake(Fake(pace=pace))
    store, batch = histories["conv2"], loader.batch([0, 1])
    x = torch.randn(batch.num_nodes, store.dim, dtype=torch.float64)
    expected = x.clone()
    store.push(x, batch)
    is_shared = store._sources[0][0].data_ptr() == x.data_ptr() if store._sources else False
    x.mul_(2)
    if is_shared:
        with pytest.raises(RuntimeError, match="modified in place"):
            store.flush()
    else:
        assert torch.equal(store.table[batch.node_ids], expected)

"""Facts about performance that are counted, not timed: the same on every machine, so that CI can compare them.

    python -m bench.facts             a table: launches, torch ops, tensors, bytes
    python -m bench.facts --check     compares with bench/expected/facts.json; lists what differs and exits with 1
    python -m bench.facts --update    accepts what there is now

Each case runs what a GPU would run, the Triton launchers in Triton's interpreter (`bench.on_interpreter`), on a graph
of a few rows, and is counted by `bench.counting`. Launches of our kernels, and that no training step makes the host
wait, hold for every version of torch. The other facts are compared only with the one they were counted with.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Triton asks for it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from bench.counting import Counted
from bench.on_interpreter import on_interpreter
from gas_triton import Batch, ClusterLoader, Graph, attach_histories, inference, random_partition
from gas_triton.history import HistoryStore
from gas_triton.models import MODELS
from gas_triton.nn import GATv2Conv, TransformerConv

EXPECTED = Path(__file__).parent / "expected" / "facts.json"
ACCEPT = "python -m bench.facts --update"
NODES, CLUSTERS, FEATURES, CLASSES = 18, 6, 32, 4
# names of cases in which the host has to wait; nowhere else
MAY_WAIT = ("plan", "inference")

Facts = dict[str, Any]


# --- what is counted --------------------------------------------------------------------------------------------------


class Dynamic(nn.Module):
    """A layer of each kind of dynamic attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = GATv2Conv(FEATURES, 16, heads=2)
        self.conv2 = TransformerConv(32, CLASSES, beta=True)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.conv2(self.conv1(x, batch).relu(), batch)


def make_graph() -> Graph:
    """Every node has neighbours 1, 5 and 7 places away on both sides, and node 0 every fourth node too."""
    node = torch.arange(NODES)
    far = node[4::4]
    target = torch.cat([(node + step) % NODES for step in (1, 5, 7)] + [far])
    source = torch.cat([node.repeat(3), torch.zeros_like(far)])
    edges = torch.cat([torch.stack([source, target]), torch.stack([target, source])], dim=1)
    return Graph.from_edge_index(edges.unique(dim=1), num_nodes=NODES)


def make_loader(graph: Graph, hub_edges: int | None = None) -> ClusterLoader:
    parts = random_partition(graph, CLUSTERS)
    x = torch.arange(NODES * FEATURES).reshape(NODES, FEATURES).sin()
    loader = ClusterLoader(
        parts.permute(graph), parts, batch_size=2, shuffle=False, x=x, y=torch.arange(NODES) % CLASSES
    )
    if hub_edges is not None:
        loader._planner.hub_edges = hub_edges
    return loader


def make_model(name: str, dropout: float = 0.0) -> tuple[nn.Module, Graph]:
    graph = make_graph()
    torch.manual_seed(0)
    if name == "dynamic":
        return Dynamic(), graph.add_self_loops()
    kind = MODELS[name]
    graph = kind.prepare(graph)
    options = {"dropout": dropout, **kind.options_of(graph)}
    if name == "GAT":
        return kind(FEATURES, 16, CLASSES, 3, hidden_heads=4, **options), graph
    # the interpreter takes seconds for a layer of PNA
    num_layers = 2 if name == "PNA" else 3
    return kind(FEATURES, 64, CLASSES, num_layers, **options), graph


def train(
    name: str,
    tier: str | None = "device",
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    hub_edges: int | None = None,
    edge_dropout: float = 0.0,
) -> Counted:
    """The second step of training: with histories in a tier, or full-batch if that is None."""
    model, graph = make_model(name, dropout)
    loader = make_loader(graph, hub_edges)
    histories = None if tier is None else attach_histories(model, NODES, tier, dtype)
    # what torch takes for parameters on a GPU, if nothing is said
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)

    def step(batches: Iterator[Batch], phase: Callable[[str], Any]) -> None:
        with phase("read"):
            batch = next(batches)
            if edge_dropout:
                batch = batch.drop_edges(edge_dropout, seed=1)
            x, y = batch.x, batch.y
        with phase("forward"):
            out = model(x, batch)
        with phase("loss"):
            loss = F.cross_entropy(out, y)
            del out
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    # planned now; the second is counted, while a third can be fetched ahead
    batches = [loader.full()] * 3 if histories is None else list(loader.in_order())
    with Counted([batch.spans for batch in batches]) as counted:
        source = iter(batches) if histories is None else histories.prefetch(loader)
        step(source, lambda name: nullcontext())
        step(source, counted.phase)
    return counted


def infer() -> Counted:
    model, graph = make_model("GCN")
    loader = make_loader(graph)
    with Counted() as counted, counted.phase("three batches"):
        inference(model, loader)
    return counted


def plan() -> Counted:
    loader = make_loader(make_graph().add_self_loops().gcn_norm())
    with Counted([loader.parts.ptr]) as counted:
        with counted.phase("plan"):
            batch = loader.batch([0, 2])
        with counted.phase("transpose"):
            batch.transposed_joint()
    return counted


def move(dtype: torch.dtype) -> Counted:
    """A push, and a pull of the halo rows of a batch."""
    batch = make_loader(make_graph()).batch([0, 1])
    store = HistoryStore(NODES, 64, dtype)
    x = torch.ones(batch.num_nodes, 64)
    with Counted([batch.spans]) as counted:
        store.push(x, batch)
        with counted.phase("push"):
            store.push(x, batch)
        with counted.phase("pull"):
            torch.ops.gas_triton.pull(
                store._tensors["table"], store._tensors.get("scale"), batch.halo_ids, torch.float32
            )
    return counted


CASES: dict[str, Callable[[], Counted]] = {
    "GCN full batch": lambda: train("GCN", None),
    "GCN": lambda: train("GCN"),
    "GCN with dropout": lambda: train("GCN", dropout=0.5),
    "GCN with edge dropout": lambda: train("GCN", edge_dropout=0.5),
    "GCN with hub rows": lambda: train("GCN", hub_edges=6),
    "GCN int8": lambda: train("GCN", dtype=torch.int8),
    "GCN pinned bfloat16": lambda: train("GCN", "pinned", torch.bfloat16),
    "GAT": lambda: train("GAT"),
    "GATv2 and Transformer": lambda: train("dynamic"),
    **{name: functools.partial(train, name) for name in ("SAGE", "GIN", "APPNP", "GCN2", "PNA")},
    "GAT full batch": lambda: train("GAT", None),
    "inference of GCN": infer,
    "plan": plan,
    **{
        f"history {str(dtype).removeprefix('torch.')}": functools.partial(move, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    },
}  # fmt: skip


# --- facts ------------------------------------------------------------------------------------------------------------


def count(name: str) -> Counted:
    """Runs a case."""
    with on_interpreter(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="there is no CUDA device: tier 'pinned'")
        return CASES[name]()


def facts_of(counted: Counted) -> Facts:
    """What was counted, as it is written to the file."""
    facts: Facts = {
        name: {
            "triton": dict(sorted(phase.triton.items())),
            "torch": dict(sorted(phase.torch.items())),
            "tensors": phase.tensors,
            "bytes allocated": phase.nbytes,
            "bytes touched": phase.touched,
        }
        for name, phase in counted.phases.items()
    }
    waits = {call: counted.calls.count(call) for call in sorted(set(counted.calls))}
    return facts | {"peak bytes": counted.peak, "waits": waits}


def differences(expected: Facts, found: Facts, counted: Counted | None = None, all_facts: bool = True) -> list[str]:
    """`fact: old -> new` for each fact that changed; of ops and launches with the functions that ask for them.

    Args:
        expected: facts of a case.
        found: those there are now.
        counted: where they come from.
        all_facts: False compares only what does not depend on the version of torch.
    """
    lines = []
    old, new = _flat(expected), _flat(found)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key, 0) == new.get(key, 0) or not (all_facts or key[-2:-1] == ("triton",)):
            continue
        places: dict[str, int] = {} if counted is None or len(key) < 3 else counted.places.get(key[-1], {})
        by = ", ".join(f"{place} ({times})" for place, times in sorted(places.items()))
        now = f" (now in {by})" if by and new.get(key, 0) else ""
        lines.append(f"{', '.join(key)}: {old.get(key, 0):,} -> {new.get(key, 0):,}{now}")
    return lines


def _flat(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    if not isinstance(value, dict):
        return {path: value}
    return {key: number for name, inner in value.items() for key, number in _flat(inner, (*path, name)).items()}


def version_of_torch() -> str:
    """The part of torch's version that says which ops a call is made of."""
    return ".".join(torch.__version__.split(".")[:2])


def check(name: str, expected: Facts) -> list[str]:
    """What is wrong with a case: how it differs from the content of the file, and where a step waits."""
    counted = count(name)
    is_known = expected["torch"] == version_of_torch()
    lines = differences(expected["cases"].get(name, {}), facts_of(counted), counted, is_known)
    if not name.startswith(MAY_WAIT):
        lines += [f"the host waits for the device: {call}" for call in counted.calls]
    return [f"{name}: {line}" for line in lines]


def read() -> Facts:
    return json.loads(EXPECTED.read_text())


def _as_text(written: Facts) -> str:
    """JSON with a line for each part of a case, so that a change of one is a line of a diff."""
    cases = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in case.items())
        + "\n }"
        for name, case in written["cases"].items()
    ]
    versions = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in written.items() if k != "cases")
    return "{\n" + versions + ' "cases": {\n ' + ",\n ".join(cases) + "\n}}\n"


def _rows(name: str, facts: Facts) -> Iterator[str]:
    for phase, found in facts.items():
        if not isinstance(found, dict) or phase == "waits":
            continue
        launches, ops = sum(found["triton"].values()), sum(found["torch"].values())
        yield (
            f"{name:24}{phase:15}{launches:8}{ops:8}{found['tensors']:9}{found['bytes allocated']:12,}"
            f"{found['bytes touched']:12,}"
        )
    waits = sum(facts["waits"].values())
    yield f"{name:24}{'all':15}{'':25}{facts['peak bytes']:12,} at most{f', {waits} waits' if waits else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.facts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help=f"compare with {EXPECTED.name}")
    parser.add_argument("--update", action="store_true", help=f"write {EXPECTED.name}")
    parser.add_argument("-k", default="", metavar="WORD", help="only cases with this in their name")
    chosen = parser.parse_args()
    names = [name for name in CASES if chosen.k in name]
    if chosen.check:
        expected = read()
        if expected["torch"] != version_of_torch():
            print(f"counted with torch {expected['torch']}, this is {torch.__version__}: only launches are compared")
        wrong = [line for name in names for line in check(name, expected)]
        print("\n".join([*wrong, f"to accept this: {ACCEPT}"]) if wrong else f"{len(names)} cases are as expected")
        return 1 if wrong else 0
    if not chosen.update:
        print(f"{'case':24}{'part':15}{'launches':>8}{'ops':>8}{'tensors':>9}{'allocated':>12}{'touched':>12}")
    cases = {}
    for name in names:
        cases[name] = facts_of(count(name))
        if not chosen.update:
            print("\n".join(_rows(name, cases[name])))
    if chosen.update:
        before = read()["cases"] if chosen.k else {}
        kept = {name: before.get(name) or cases[name] for name in CASES if name in before or name in cases}
        written = {"torch": version_of_torch(), "triton": triton.__version__, "cases": kept | cases}
        EXPECTED.parent.mkdir(exist_ok=True)
        EXPECTED.write_text(_as_text(written))
        print(f"wrote {EXPECTED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

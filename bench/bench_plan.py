"""Time to plan a batch: against other ways to relabel it, against the training step that uses it, and as it grows.

Every round draws another group of clusters, so that no plan is found ready-made. Our plan is `ClusterLoader.batch` and
what the model's layers make of it on first use, the transpose for the backward among it. Others: PyGAS's C++ function
on the CPU (and a copy to the device), what one would write in stock torch, and PyG's `k_hop_subgraph`, which looks at
every edge of the graph. All must give the same edges. The step is forward, backward and Adam on the batch just planned.

    python -m bench.bench_plan             rounds interleaved
    pytest bench/bench_plan.py             pytest-benchmark, one case after another
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bench import groups, pygas
from bench.bench_epoch import NUM_LAYERS, PYGAS, Problem, Training, hidden_of, problem_of
from bench.groups import Case, Group, Setting, measure_cases, relative_difference, run_with
from bench.side_by_side import interleave, missing_pyg, ratio
from bench.slopes import slope_of
from bench.tables import OURS, Row
from gas_triton import Batch, ClusterLoader, Graph
from gas_triton.kernels.csr_rows import row_of_edge

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

TORCH, PYG = "unique and searchsorted", "k_hop_subgraph"
WAYS = (OURS, PYGAS, TORCH, PYG)
MAX_SHARE = 0.1
MAX_EXPONENT = 1.1
MULTIPLES = (1, 2, 4, 8)


class Relabelled(NamedTuple):
    """A batch of another way: edge e goes from `n_id[col[e]]` to `n_id[row[e]]`; in CSR `rowptr` gives the rows."""

    n_id: Tensor
    col: Tensor
    weight: Tensor
    row: Tensor | None = None
    rowptr: Tensor | None = None


class Planning:
    """Plans batch after batch, and trains on the one planned last.

    Args:
        problem: the graph, its clusters and the groups of them that make batches.
        hidden: width between the model's layers.
    """

    def __init__(self, problem: Problem, hidden: int) -> None:
        self.training = Training(problem, hidden=hidden)
        self.loader = self.training.loader
        self.groups = itertools.cycle(itertools.chain.from_iterable(problem.groups))
        self.batch = self.plan()

    def plan(self) -> Batch:
        """The next batch, complete."""
        self.batch = complete(self.loader.batch(next(self.groups)))
        return self.batch

    def step(self) -> Tensor:
        """Trains on the batch planned last; its loss."""
        return self.training.step(self.batch)


def complete(batch: Batch) -> Batch:
    """The batch with all that the layers of a GCN ask it to make of its edges."""
    _ = batch.inner_graph_col
    batch.transposed_inner(shared=batch.symmetric)
    return batch


def relabel(graph: Graph, rows: Tensor) -> Relabelled:
    """The edges into some rows and their halo, in stock torch."""
    start = graph.rowptr[rows].long()
    degree = graph.rowptr[rows + 1].long() - start
    rowptr = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    edge = torch.arange(int(rowptr[-1]), device=rows.device) + (start - rowptr[:-1]).repeat_interleave(degree)
    source = graph.col[edge].long()
    is_in_batch = torch.zeros(graph.num_nodes, dtype=torch.bool, device=rows.device)
    is_in_batch[rows] = True
    n_id = torch.cat([rows, source[~is_in_batch[source]].unique()])
    ordered, place = n_id.sort()
    assert graph.weight is not None
    return Relabelled(n_id, place[torch.searchsorted(ordered, source)], graph.weight[edge], rowptr=rowptr)


def relabel_pygas(loader: pygas.SubgraphLoader, clusters: list[int], device: torch.device) -> Relabelled:
    """The batch of PyGAS's loader, without node tensors, on a device."""
    batch = loader.batch(clusters)
    rowptr, col, weight = (tensor.to(device) for tensor in batch.adj_t.csr())
    return Relabelled(batch.n_id.to(device), col, weight, rowptr=rowptr)


def planners(problem: Problem, num_clusters: int) -> dict[str, Callable[[], Any]]:
    """Functions that plan random batches of some clusters, every way the same ones; those that can run here."""
    graph, num_parts, device = problem.graph, problem.parts.num_parts, problem.x.device
    loader = ClusterLoader(graph, problem.parts, problem.batch_size)
    ptr = problem.parts.ptr.tolist()

    def rows_of(clusters: list[int]) -> Tensor:
        return torch.cat([torch.arange(ptr[c], ptr[c + 1], device=device) for c in clusters])

    ways: dict[str, Callable[[list[int]], Any]] = {
        OURS: lambda clusters: complete(loader.batch(clusters)),
        TORCH: lambda clusters: relabel(graph, rows_of(clusters)),
    }
    if pygas.missing() is None:
        subgraphs = pygas.SubgraphLoader(graph.to("cpu"), problem.parts)
        ways[PYGAS] = lambda clusters: relabel_pygas(subgraphs, clusters, device)
    if missing_pyg() is None:
        from torch_geometric.utils import k_hop_subgraph

        edge_index, weight = graph.edge_index(), graph.weight
        assert weight is not None

        def k_hop(clusters: list[int]) -> Relabelled:
            n_id, edges, _, mask = k_hop_subgraph(
                rows_of(clusters), 1, edge_index, relabel_nodes=True, num_nodes=graph.num_nodes, directed=True
            )
            return Relabelled(n_id, edges[0], weight[mask], row=edges[1])

        ways[PYG] = k_hop

    def drawing(way: Callable[[list[int]], Any]) -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        return lambda: way(torch.randperm(num_parts, generator=generator)[:num_clusters].tolist())

    return {name: drawing(way) for name, way in ways.items()}


def edges_of(plan: Batch | Relabelled, num_nodes: int) -> tuple[Tensor, Tensor]:
    """The edges of a plan as numbers target * N + source, ascending, and their weights."""
    if isinstance(plan, Batch):
        blocks = (plan.inner, plan.outer)
        target = torch.cat([plan.node_ids[row_of_edge(block.rowptr, block.col).long()] for block in blocks])
        source, weight = torch.cat([plan.inner_graph_col, plan.outer.col]), plan.edge_weight
        assert weight is not None
    else:
        row = plan.row if plan.rowptr is None else row_of_edge(plan.rowptr, plan.col)
        assert row is not None
        target, source, weight = plan.n_id[row.long()], plan.n_id[plan.col], plan.weight
    number, order = (target.long() * num_nodes + source.long()).sort()
    return number, weight[order]


def difference(num_nodes: int, ours: Any, theirs: Any) -> float:
    """Infinite if two plans have other edges; else how far the weights are apart."""
    (edges, weight), (their_edges, their_weight) = edges_of(ours, num_nodes), edges_of(theirs, num_nodes)
    return relative_difference(weight, their_weight) if torch.equal(edges, their_edges) else math.inf


def make_group(setting: Setting, multiple: int) -> Group:
    """Ways to plan m times the clusters of a batch."""
    problem = problem_of(setting)
    reasons = {PYGAS: pygas.missing(), PYG: missing_pyg()}
    return Group(
        ways=planners(problem, multiple * problem.batch_size),
        missing={name: reason for name, reason in reasons.items() if reason},
        tolerance=0.0,
        difference=functools.partial(difference, problem.graph.num_nodes),
    )


def cases(setting: Setting) -> list[Case]:
    """A batch, and multiples of it."""
    batch_size = setting.choose(4, 4, 2)
    multiples = setting.choose(MULTIPLES, MULTIPLES, MULTIPLES[:3])
    return [Case("plan", {"clusters": m * batch_size}, functools.partial(make_group, setting, m)) for m in multiples]


def check(planning: Planning) -> None:
    """Raises AssertionError if a planned batch does not have the edges and weights of its rows in the graph."""
    batch, graph = planning.plan(), planning.loader.graph
    rows = batch.node_ids
    degree = (graph.rowptr[rows + 1] - graph.rowptr[rows]).to(batch.inner.rowptr.dtype)
    assert torch.equal(batch.inner.rowptr.diff() + batch.outer.rowptr.diff(), degree)
    assert torch.equal(batch.halo_ids[batch.outer_slot.long()], batch.outer.col.long())
    assert torch.equal(torch.cat([batch.inner_graph_col, batch.outer.col]), graph.col[batch.edge_ids])
    assert batch.edge_weight is not None
    assert graph.weight is not None
    assert torch.equal(batch.edge_weight, graph.weight[batch.edge_ids])


def share_of_step(setting: Setting, problem: Problem) -> Row:
    """Our plan over the training step of the batch just planned."""
    planning = Planning(problem, hidden_of(setting))
    check(planning)
    seconds = interleave({OURS: planning.plan, "step": planning.step}, device=setting.device, seconds=setting.seconds)
    share = ratio(seconds, OURS, "step")
    return {
        "op": "plan", "clusters": problem.batch_size, "against": "training step", "way": OURS,
        "ms": 1e3 * statistics.median(seconds[OURS]), "step_ms": 1e3 * statistics.median(seconds["step"]),
        "share": share, "layers": NUM_LAYERS, "width": hidden_of(setting), "rounds": len(seconds[OURS]),
        "target": f"<= {100 * MAX_SHARE:g} %", "met": share <= MAX_SHARE,
    }  # fmt: skip


def mean_edges(problem: Problem, num_clusters: int, count: int) -> float:
    """Edges of the batches that `planners` draws, the mean over the first ones."""
    plan = planners(problem, num_clusters)[OURS]
    return statistics.mean(plan().num_edges for _ in range(count))


def measure(setting: Setting) -> list[Row]:
    """Ways to plan batches of several sizes, the share of a training step, and the exponent of the growth."""
    problem = problem_of(setting)
    rows = measure_cases(cases(setting), setting)
    ours = [row for row in rows if row["way"] == OURS]
    edges = {row["clusters"]: mean_edges(problem, row["clusters"], row["rounds"]) for row in ours}
    for row in rows:
        row["edges"] = edges[row["clusters"]]
    rows.append(share_of_step(setting, problem))
    slope = slope_of([row["edges"] for row in ours], [row["ms"] for row in ours])
    if slope is not None:
        rows.append({
            "op": "plan", "against": "edges", "way": OURS, "exponent": slope,
            "target": f"time ~ edges^k, k <= {MAX_EXPONENT:g}", "met": slope <= MAX_EXPONENT,
        })  # fmt: skip
    for row in rows:
        row |= {"nodes": problem.graph.num_nodes, "partition": problem.partition}
    return rows


def test_plan(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    run_with(benchmark, case, way)


if __name__ == "__main__":
    groups.main(__doc__, measure)

"""What `bench.correctness` is made of: checks of what the library computes against plain torch in float64.

Every check computes twice, and both runs must give the same bits. Memory that torch hands out is filled with NaN
before, so that what a kernel does not write shows.
"""

from __future__ import annotations

import functools
import math
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.groups import Size
from bench.tables import Row
from gas_triton import Batch, ClusterLoader, Graph, contiguous_partition
from gas_triton.functional import Quantized
from gas_triton.kernels.dropout import keep_mask

Values = dict[str, Tensor]
Run = Callable[[], Values]

# |computed - exact| over |exact|, as norms, and of the worst element over the largest: a few units of rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EXACT = 0.0


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        op: what is checked.
        case: in words.
        dtype: that decides what rounding explains.
        build: makes, of the problem and random numbers, what computes the values and what gives the right ones.
        tolerance: `EXACT` for equal bits.
        core: whether it is made where time is short.
    """

    op: str
    case: str
    dtype: torch.dtype
    build: Callable[[Problem, Draw], tuple[Run, Run]]
    tolerance: float
    core: bool = False

    @property
    def identity(self) -> Row:
        return {"op": self.op, "case": self.case, "dtype": name_of(self.dtype)}


class Draw:
    """Random tensors on a device, the same ones on every device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)
        self.seed = torch.tensor([123_456_789_012_345], device=device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """In [0.1, 1.1): weights, none of them next to 0."""
        return (torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.1).to(self.device, dtype)

    def table(self, rows: int, width: int, stored: torch.dtype) -> Tensor | Quantized:
        """A history of rows of very different size."""
        size = torch.logspace(-1, 1, rows, dtype=torch.float64)[torch.randperm(rows, generator=self.generator)]
        values = torch.randn(rows, width, generator=self.generator, dtype=torch.float64) * size[:, None]
        if stored != torch.int8:
            return values.to(self.device, stored)
        scale = (values.abs().amax(1) / 127.0).float()
        return Quantized((values / scale[:, None]).round().to(self.device, torch.int8), scale.to(self.device))


def widened(table: Tensor | Quantized) -> Tensor:
    """What the rows of a history stand for, in float64; int8 rows times their scale are float32 by definition."""
    return table.double() if isinstance(table, Tensor) else (table.rows.float() * table.scale[:, None]).double()


class Problem:
    """Graphs and batches that have what goes wrong: hubs, rows without edges, parallel edges, clusters apart.

    Attributes:
        device: of all tensors.
        is_large: some thousand nodes, or a few dozen.
    """

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device, self.is_large = device, size != "tiny"
        self.hub_edges = 512 if self.is_large else 12

    @functools.cache  # noqa: B019
    def graph(self, kind: str = "directed", device: torch.device | None = None) -> Graph:
        """A weighted graph; "normalized" is the symmetric one with GCN's normalisation."""
        if kind == "normalized":
            graph = self.graph("symmetric", torch.device("cpu")).add_self_loops().gcn_norm()
            return graph.to(device or self.device)
        draw = torch.Generator().manual_seed(1)
        nodes, edges, hub, fan = (4000, 40_000, 1800, 1800) if self.is_large else (40, 90, 30, 20)
        alone = nodes // 40
        pairs = torch.randint(nodes - alone, (2, edges), generator=draw)
        # node 3 has many edges into it, node 5 many out of it
        into = torch.stack([torch.randint(nodes - alone, (hub,), generator=draw), torch.full((hub,), 3)])
        out = torch.stack([torch.full((fan,), 5), torch.randint(nodes - alone, (fan,), generator=draw)])
        pairs = torch.cat([pairs, pairs[:, : edges // 50], into, out], dim=1)
        weight = torch.rand(pairs.size(1), generator=draw) + 0.1
        if kind == "symmetric":
            pairs = pairs.unique(dim=1)
            pairs = pairs[:, pairs[0] < pairs[1]]
            weight = weight[: pairs.size(1)].repeat(2)
            pairs = torch.cat([pairs, pairs.flip(0)], dim=1)
        # nodes without edges are everywhere
        order = torch.randperm(nodes, generator=draw)
        order = torch.cat([torch.tensor([3, 5]), order[(order != 3) & (order != 5)]])
        place = torch.empty_like(order)
        place[order] = torch.arange(nodes)
        return Graph.from_edge_index(place[pairs], weight, num_nodes=nodes).to(device or self.device)

    def loader(self, kind: str = "directed", device: torch.device | None = None, **tensors: Any) -> ClusterLoader:
        """Five clusters."""
        graph = self.graph(kind, device)
        sizes = [700, 600, 900, 800, 1000] if self.is_large else [7, 6, 9, 8, 10]
        cpu = self.graph(kind, torch.device("cpu"))
        loader = ClusterLoader(graph, contiguous_partition(cpu, sizes), batch_size=2, shuffle=False, **tensors)
        loader._planner.hub_edges = self.hub_edges
        return loader

    @functools.cache  # noqa: B019
    def batch(self, kind: str = "directed") -> Batch:
        """Two clusters that do not touch, the hubs among them."""
        return self.loader(kind).batch([0, 2])


def perform(check: Check, problem: Problem) -> list[Row]:
    """The rows of a check, one for each value; an exception becomes a row that failed."""
    try:
        with warnings.catch_warnings(), poisoned():
            warnings.simplefilter("ignore")
            compute, reference = check.build(problem, Draw(problem.device, zlib.crc32(repr(check.identity).encode())))
            first, again = compute(), compute()
            with poisoned(False):
                expected = reference()
        assert first.keys() == expected.keys(), f"computed {', '.join(first)}, expected {', '.join(expected)}"
        return [_compare(check, name, first[name], again[name], expected[name]) for name in first]
    except Exception as error:
        said = traceback.format_exception(error)[-3:]
        traceback.clear_frames(error.__traceback__)
        return [failure(check, "".join(said).rstrip()[-1500:])]


def failure(check: Check, reason: str) -> Row:
    """The row of a check that gave no value."""
    return {**check.identity, "error": None, "tolerance": check.tolerance, "ok": False, "failure": reason}


def _compare(check: Check, name: str, first: Tensor, again: Tensor, expected: Tensor) -> Row:
    assert first.shape == expected.shape, f"{name} has shape {list(first.shape)}, expected {list(expected.shape)}"
    first, again, expected = first.detach(), again.detach(), expected.detach().to(first.device)
    row = {**check.identity, "value": name}
    if check.tolerance == EXACT:
        assert first.dtype == expected.dtype, f"{name} is {first.dtype}, expected {expected.dtype}"
        error = largest = float(_num_different(first, expected))
    else:
        difference, size = first.double() - expected.double(), expected.double()
        error = _quotient(difference.norm(), size.norm())
        largest = 0.0 if size.numel() == 0 else _quotient(difference.abs().max(), size.abs().max())
    num_changed = _num_different(first, again)
    # a comparison with NaN is false
    ok = error <= check.tolerance and largest <= check.tolerance and num_changed == 0
    row |= {"error": error, "largest": largest, "tolerance": check.tolerance, "ok": ok}
    if num_changed:
        row["failure"] = f"a second run differs in {num_changed} of {first.numel()} elements"
    return row


def _quotient(error: Tensor, size: Tensor) -> float:
    return float(error / size) if float(size) > 0.0 else 0.0 if float(error) == 0.0 else math.inf


def _num_different(a: Tensor, b: Tensor) -> int:
    is_same = a == b
    if a.is_floating_point():
        is_same |= a.isnan() & b.isnan()
    return int((~is_same).sum())


@contextmanager
def poisoned(on: bool = True) -> Iterator[None]:
    """Fills what `torch.empty` gives with NaN, or with the largest integer."""
    memory: Any = torch.utils.deterministic
    modes = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(on, warn_only=True)
    memory.fill_uninitialized_memory = on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        memory.fill_uninitialized_memory = modes[2]


def edges_of(batch: Batch, has_halo: bool = True) -> tuple[Tensor, Tensor]:
    """(source, target) of the edges in the batch's order; sources are rows of [x; halo rows]."""
    source, target = batch.edge_index
    return (source, target) if has_halo else (source[: batch.inner.num_edges], target[: batch.inner.num_edges])


def scattered(message: Tensor, target: Tensor, num_rows: int, reduce: str) -> Tensor:
    """The messages of each row reduced, in plain torch."""
    out = message.new_zeros(num_rows, *message.shape[1:])
    if reduce in ("max", "min"):
        index = target.reshape(-1, *(1,) * (message.dim() - 1)).expand_as(message)
        return out.scatter_reduce(0, index, message, f"a{reduce}", include_self=False)
    out = out.index_add(0, target, message)
    if reduce == "mean":
        count = torch.bincount(target, minlength=num_rows).clamp(min=1)
        out = out / count.reshape(-1, *(1,) * (message.dim() - 1))
    return out


def softmaxed(logit: Tensor, target: Tensor, num_rows: int) -> Tensor:
    """Softmax over the edges of each row, [E, heads]."""
    best = scattered(logit.detach(), target, num_rows, "max")
    weight = (logit - best[target]).exp()
    return weight / scattered(weight, target, num_rows, "sum")[target]


def with_gradients(run: Callable[..., Tensor], leaves: dict[str, Tensor], grad: Tensor, exact: bool) -> Values:
    """The output of `run(**leaves)` and the gradient of every floating leaf, in float64 if `exact`."""
    inputs = {name: value.detach().to(torch.float64 if exact else value.dtype) for name, value in leaves.items()}
    for value in inputs.values():
        value.requires_grad_()
    out = run(**{name: value.clone() for name, value in inputs.items()})
    gradients = torch.autograd.grad(out, list(inputs.values()), grad.to(out.dtype))
    named = zip(inputs, gradients, strict=True)
    return {"out": out.detach()} | {f"gradient of {name}": value for name, value in named}


def both(ours: Callable[..., Tensor], exact: Callable[..., Tensor], leaves: Values, grad: Tensor) -> tuple[Run, Run]:
    """What a check builds: `with_gradients` of ours, and of the exact one in float64."""
    return (lambda: with_gradients(ours, leaves, grad, False)), (lambda: with_gradients(exact, leaves, grad, True))


def kept(ids: Tensor, width: int, p: float, seed: Tensor) -> Tensor:
    """What dropout keeps of rows, by the mask that the CPU makes."""
    return keep_mask(ids.cpu(), width, p, seed.cpu()).to(ids.device)

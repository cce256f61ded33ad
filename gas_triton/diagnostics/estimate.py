"""Estimates of Lipschitz constants that are not known: largest ratios that were seen, so lower bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gas_triton.batch import Batch
from gas_triton.diagnostics.edges import BatchEdges
from gas_triton.diagnostics.passes import Measured
from gas_triton.diagnostics.wiring import Link
from gas_triton.inference import Forward, LayerRows, watched
from gas_triton.loader import ClusterLoader

__all__ = ["estimate_links", "lift_last", "lifted", "probe", "ratios_of_errors"]

# The probed rows have about this share of the graph's edges, so that all probes cost less than half a sweep.
SHARE = 1 / 16
# How far rows are moved, and above which an error tells something, relative to the root mean square of the rows' norms.
STEP, SMALLEST = 1e-2, 1e-4


def probe(
    model: nn.Module, loader: ClusterLoader, forward: Forward, exact: Sequence[LayerRows], places: Sequence[int]
) -> dict[int, float]:
    """The largest ratio of an output row's movement to the movement of the rows that it reads, by place.

    All rows of a small batch, halo rows included, are moved equally far: at random, then to where the sum of squares of
    the outputs' movements grows fastest (a step of the power iteration, with a bound on every row). "Exact" rows stand
    for halo rows.

    Args:
        model: in `eval()` mode.
        loader: batches.
        forward: how to call the model.
        exact: exact rows of every call of a layer.
        places: calls to probe.
    """
    found: dict[int, float] = {}
    calls = [0]

    def call(layer: Any, compute: Forward, x: Any, *args: Any, **options: Any) -> Tensor:
        place, calls[0] = calls[0], calls[0] + 1
        inputs = exact[place].inputs
        if place in places and inputs is not None:
            halo = inputs[batch.halo_ids.to(inputs.device)].to(x)
            rows = torch.cat([x, halo]) if batch.num_halo else x
            found[place] = _largest_ratio(lambda rows: compute(rows, *args, **options), rows, place)
        return compute(x, *args, **options)

    batch = _small_batch(loader)
    with torch.no_grad(), watched(model, call):
        forward(model, batch)
    return found


def _small_batch(loader: ClusterLoader) -> Batch:
    """Rows in the middle of the largest cluster, where those of middle degree are."""
    graph, ptr = loader.graph, loader.parts.ptr
    largest = int(ptr.diff().argmax())
    first, last = int(ptr[largest]), int(ptr[largest + 1])
    num_rows = min(last - first, max(1, round(graph.num_nodes * SHARE)))
    first += (last - first - num_rows) // 2
    span = (first, first + num_rows)
    edges = (int(graph.rowptr[span[0]]), int(graph.rowptr[span[1]]))
    return loader._with_tensors(loader._planner.plan([largest], [span], [edges]))


def _largest_ratio(compute: Callable[[Tensor], Tensor], rows: Tensor, seed: int) -> float:
    step = STEP * _scale(torch.linalg.vector_norm(rows.double(), dim=1))
    here = compute(rows)
    # drawn on the CPU: the same rows on every device
    draw = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).to(rows)
    shift = _to_length(draw, step)
    with torch.enable_grad():
        shift.requires_grad_()
        moved = compute(rows + shift) - here
        (uphill,) = torch.autograd.grad(moved.square().sum(), shift)
    best = torch.linalg.vector_norm(moved.detach().double(), dim=1).max()
    uphill = _to_length(torch.where(uphill.any(dim=1, keepdim=True), uphill, shift.detach()), step)
    again = torch.linalg.vector_norm((compute(rows + uphill) - here).double(), dim=1).max()
    return float(torch.maximum(best, again)) / step


def _to_length(rows: Tensor, length: float) -> Tensor:
    return rows * (length / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-30))


def _scale(norms: Tensor) -> float:
    """The root mean square of norms, 1 where all are 0."""
    return float(norms.double().square().mean().sqrt()) or 1.0


def ratios_of_errors(edges: BatchEdges, measured: Measured, places: Sequence[int]) -> dict[int, float]:
    """The largest ratio of an output row's error to the largest error among the rows that it read, by place.

    0 where all errors are about those of rounding.
    """
    found = {}
    for place in places:
        distances = measured.layers[place]
        largest = torch.maximum(edges.spread(distances.computed, distances.history, "max"), distances.computed)
        found[place] = _ratio(measured.outputs[place], largest, SMALLEST * _scale(distances.norm))
    return found


def _ratio(error: Tensor, of: Tensor, smallest: float) -> float:
    is_told = of > smallest
    return float((error[is_told] / of[is_told]).max()) if bool(is_told.any()) else 0.0


def estimate_links(measured: Measured, num_calls: int) -> list[Link]:
    """What stands behind each call, from the errors of rows: an input's to those of all outputs before it.

    Whatever a model makes of the layers' outputs, row by row: an input row is exact where they are.
    """
    links, squares = [], torch.zeros_like(measured.out_error)
    for place in range(num_calls):
        if place in measured.outputs:
            squares = squares + measured.outputs[place].square()
        following = measured.layers.get(place + 1)
        if place == num_calls - 1:
            error, norm = measured.out_error, measured.out_norm
        elif following is not None:
            error, norm = following.computed, following.norm
        else:
            links.append(Link(is_exact=False, of_outputs=True))
            continue
        factor = _ratio(error, squares.sqrt(), SMALLEST * _scale(norm)) or 1.0
        links.append(Link(factor=factor, is_exact=False, of_outputs=True))
    return links


def lift_last(links: Sequence[Link], bound: Tensor, measured: Measured) -> list[Link]:
    """The links where `forward` makes something else of the model's output, so that `bound` [N] may not be one."""
    seen = _ratio(measured.out_error, bound, SMALLEST * _scale(measured.out_norm))
    return [*links[:-1], replace(links[-1], factor=links[-1].factor * max(1.0, seen), is_exact=False)]


def lifted(probed: Mapping[int, float], seen: Mapping[int, float]) -> dict[int, float]:
    """The larger of both, by place."""
    return {place: max(value, seen[place]) for place, value in probed.items()}

"""`diagnose`: how far a model with histories is from the model without."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from gas_triton.diagnostics.bound import node_bounds, uniform_bounds
from gas_triton.diagnostics.edges import MOST_HOPS, BatchEdges, batch_edges
from gas_triton.diagnostics.estimate import estimate_links, lift_last, lifted, probe, ratios_of_errors
from gas_triton.diagnostics.gradients import Loss, gradient_bias
from gas_triton.diagnostics.passes import Measured, evaluation, measure
from gas_triton.diagnostics.report import Diagnosis, LayerDiagnosis, OutputDiagnosis
from gas_triton.diagnostics.statistics import degree_groups, grouped, summarize
from gas_triton.diagnostics.wiring import Link, wiring_of
from gas_triton.history import ReadsHistory
from gas_triton.inference import Forward, LayerRows, call_with_x, exact_rows
from gas_triton.loader import ClusterLoader
from gas_triton.nn.lipschitz import Lipschitz

__all__ = ["diagnose"]


def diagnose(
    model: nn.Module, loader: ClusterLoader, forward: Forward | None = None, *, loss: Loss | None = None
) -> Diagnosis:
    """How old the rows of the histories are, how far they and what is computed with them are from the exact ones.

    Every batch of consecutive clusters is run once in `eval()` mode, with its halo from the histories as they are, and
    compared with exact inference. For every layer that reads a history, and for the output, errors are given beside
    what they can be at most: Theorem 2 of Fey et al. (ICML 2021), and the recursion behind it node by node, which is
    far tighter. Both hold, up to rounding, where the Lipschitz constants are exact: for `Stack` models and `APPNP` of
    `gas_triton.models` with `GCNConv`, `SAGEConv`, `GINConv` and `GCN2Conv`. Other constants are estimated from below.

    Nothing is changed: parameters, gradients, histories, running statistics, modes and generators are as they were. It
    takes about twice as long as `inference`, and a few milliseconds, which show on graphs of a few thousand nodes.
    The rows of all layers are held in host memory.

    Histories hold rows of training forwards: with dropout in front of them, or `BatchNorm` over batches, they differ
    from exact rows by that too, and so they do by what a narrow dtype rounds.

    Args:
        model: a model with histories (`attach_histories`), whose rows depend on the layers' outputs at the same row.
        loader: batches; their order does not matter.
        forward: how to call the model on a batch; `model(batch.x, batch)` if None.
        loss: sum over the nodes of a batch, of the output of `forward` and the batch. If given, the gradients of the
            batches are compared with that of the whole graph, which has to fit in memory as one batch.

    Returns:
        What was found.

    Raises:
        ValueError: no layer reads a history, layers leave the halo out, or histories of another graph.
    """
    names = _check(model, loader)
    forward = forward or call_with_x
    with evaluation(model):
        logits, exact = exact_rows(model, loader, forward)
        places = [
            place
            for place, call in enumerate(exact)
            if getattr(call.layer, "history", None) is not None and call.inputs is not None
        ]
        if not places:
            raise ValueError("model: no layer with a history is given in-batch rows only, so none is read")
        found = {place: _constants_of(exact[place].layer) for place in places}
        constants = {place: constant for place, constant in found.items() if constant is not None}
        unknown = [place for place in places if place not in constants]
        wiring = wiring_of(model, [call.layer for call in exact])
        compared = unknown if wiring is not None else [place for place in range(len(exact)) if place >= places[0]]
        measured = measure(model, loader, forward, logits, exact, places, compared)
        edges = batch_edges(loader.graph, measured.spans)
        if unknown:
            probed = lifted(probe(model, loader, forward, exact, unknown), ratios_of_errors(edges, measured, unknown))
            constants |= {place: Lipschitz(0.0, value, "max", is_exact=False) for place, value in probed.items()}
        links = estimate_links(measured, len(exact)) if wiring is None else wiring
        gradients = None if loss is None else gradient_bias(model, loader, forward, loss)
        layers, output = _describe(loader, exact, names, measured, edges, constants, links)
    return Diagnosis(loader.graph.num_nodes, len(measured.spans), layers, output, gradients)


def _check(model: nn.Module, loader: ClusterLoader) -> dict[int, str]:
    """The names of the layers, by identity."""
    if not isinstance(loader, ClusterLoader):
        raise TypeError(f"loader must be a ClusterLoader, got {type(loader).__name__}")
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, ReadsHistory)}
    reading = {name: layer for name, layer in layers.items() if layer.history is not None}
    if not reading:
        raise ValueError(
            f"model: no layer of {type(model).__name__} has a history, so none can be out of date: call "
            "gas.attach_histories(model, num_nodes) and train; a model of one layer, and full-batch training, have none"
        )
    for name, layer in reading.items():
        if getattr(layer, "halo", "read") == "drop":
            raise ValueError(f"model: {name} leaves its halo out (halo='drop'), so it does not read its history")
        if layer.history.num_rows != loader.graph.num_nodes:
            raise ValueError(
                f"loader: the graph has {loader.graph.num_nodes} nodes but {name}'s history {layer.history.num_rows}"
            )
        layer.history.check_order(loader.graph.row_order, "the loader's graph")
    return {id(layer): name for name, layer in layers.items()}


def _constants_of(layer: Any) -> Lipschitz | None:
    """The layer's own, unless a subclass computes something else."""
    for kind in type(layer).__mro__:
        if "lipschitz" in vars(kind):
            return layer.lipschitz
        if "forward" in vars(kind):
            return None
    return None


def _describe(
    loader: ClusterLoader,
    exact: list[LayerRows],
    names: dict[int, str],
    measured: Measured,
    edges: BatchEdges,
    gains: dict[int, Lipschitz],
    links: list[Link],
) -> tuple[list[LayerDiagnosis], OutputDiagnosis]:
    graph, pulls = loader.graph, measured.pulls
    is_pulled = pulls > 0
    staleness = {place: float((found.stale * is_pulled).max()) for place, found in measured.layers.items()}
    errors = {place: found.history for place, found in measured.layers.items()}
    bounds = node_bounds(edges, gains, links, errors)
    if not measured.is_direct:
        links = lift_last(links, bounds.output, measured)
        bounds = node_bounds(edges, gains, links, errors)
    theorem, theorem_of_output = uniform_bounds(graph, gains, links, staleness)
    # a layer carries errors by a hop
    most_hops = min(MOST_HOPS, len(exact) - min(gains))
    hops = edges.hops_from_border(most_hops)
    of_hops: list[tuple[int, int | None]] = [*((hop, hop) for hop in range(most_hops)), (most_hops, None)]
    degree, of_degree = degree_groups(graph.degree)
    layers = []
    for place, found in measured.layers.items():
        layer: Any = exact[place].layer
        store, link, gain = layer.history, links[place], gains[place]
        age = store.age().to(pulls.device)
        was_pushed, is_zero = age >= 0, found.norm == 0
        of_age, error, relative, computed = summarize(
            (age, found.history, found.history / found.norm.where(~is_zero, 1.0), found.computed),
            (pulls * was_pushed, pulls, pulls * ~is_zero, None),
        )
        by_degree, relative_error = grouped(degree, of_degree, found.history, found.norm, pulls)
        by_distance, computed_relative = grouped(hops, of_hops, found.computed, found.norm)
        total = error.count
        layers.append(
            LayerDiagnosis(
                name=_name(names, exact, place), place=place, width=store.dim,
                dtype=str(store.dtype).removeprefix("torch."), tier=store.tier,
                pulls=total, rows=int(is_pulled.sum()), never=(total - of_age.count) / max(total, 1),
                age=of_age, error=error, relative=relative, zero_rows=total - relative.count,
                relative_error=relative_error, by_degree=by_degree, computed=computed,
                computed_relative=computed_relative, by_distance=by_distance, staleness=staleness[place],
                lipschitz=gain, behind=link.norm * link.factor, is_exact=gain.is_exact and link.is_exact,
                bound=_finite(float(bounds.inputs[place].max())), theorem=_finite(theorem[place]),
            )
        )  # fmt: skip
    error, bound = summarize((measured.out_error, bounds.output), (None, None))
    by_distance, relative_error = grouped(hops, of_hops, measured.out_error, measured.out_norm)
    output = OutputDiagnosis(
        error=error, relative_error=relative_error, by_distance=by_distance, bound=bound,
        theorem=_finite(theorem_of_output), is_rigorous=all(gain.is_exact for gain in gains.values())
        and all(link.is_exact for link in links[min(gains) :]),
    )  # fmt: skip
    return layers, output


def _name(names: dict[int, str], exact: list[LayerRows], place: int) -> str:
    before = sum(call.layer is exact[place].layer for call in exact[:place])
    return names[id(exact[place].layer)] + (f" (call {before + 1})" if before else "")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

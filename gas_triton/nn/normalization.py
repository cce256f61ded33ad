"""Whether a batch's graph has the self loops and the normalisation that a layer's arguments ask for."""

from __future__ import annotations

from gas_triton.batch import Batch

_LOOPS = {None: "", 1.0: ".add_self_loops()", 2.0: ".add_self_loops(2.0)"}


def check_normalization(layer: str, batch: Batch, add_self_loops: bool, improved: bool | None = None) -> None:
    """Checks that the graph was normalised as for a graph convolution (Kipf and Welling, ICLR 2017).

    The normalisation needs the degrees of the whole graph and is made once, on the graph, so layers only look at it.

    Args:
        layer: name of the layer, for the error.
        batch: the plan of the step.
        add_self_loops: whether the graph must have self loops.
        improved: whether they must weigh 2; None for layers without this argument.

    Raises:
        ValueError: the graph is another one; the error says how to make it.
    """
    loop_weight = (2.0 if improved else 1.0) if add_self_loops else None
    if batch.normalization == "gcn" and batch.self_loop_weight == loop_weight:
        return
    given = f"normalize=True, add_self_loops={add_self_loops}" + ("" if improved is None else f", improved={improved}")
    raise ValueError(
        f"{layer}({given}) needs a graph made by graph{_LOOPS[loop_weight]}.gcn_norm(), got "
        f"normalization={batch.normalization}, self loops of weight {batch.self_loop_weight}; "
        f"{layer}(normalize=False) uses the graph's weights as they are"
    )


def check_self_loops(layer: str, batch: Batch) -> None:
    """Checks that self loops were added to the graph, of any weight.

    Args:
        layer: name of the layer, for the error.
        batch: the plan of the step.
    """
    if batch.self_loop_weight is None:
        raise ValueError(
            f"{layer}(add_self_loops=True) needs a graph made by graph.add_self_loops(), got one without; "
            f"{layer}(add_self_loops=False) uses the graph's edges as they are"
        )

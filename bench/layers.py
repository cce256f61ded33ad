"""What the benchmarks of layers share: a layer of ours against PyG's, its traffic, and what is promised of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import plain
from bench.groups import Group, Setting
from bench.roofline import Gather, Traffic, count_reads
from bench.side_by_side import missing_pyg
from bench.tables import OURS, Row
from gas_triton import Batch
from gas_triton.csr import Transposed
from gas_triton.nn import PNAConv

PLAIN, PYG = plain.WAY, "torch_geometric"
WAYS = (OURS, PLAIN, PYG)
FORWARD, BOTH = PASSES = ("forward", "forward + backward")
Answer = tuple[Tensor, ...]


def layer_group(
    conv: Any, batch: Batch, x: Tensor, which: str, *, edge_attr: Tensor | None = None, traffic: Traffic | None = None
) -> Group:
    """A layer on the rows of one tensor, in three ways with the same parameters.

    Args:
        conv: our layer, on the device of the batch.
        batch: the plan of the step.
        x: [B + H, F_in], in-batch rows, then halo rows.
        which: pass, one of `PASSES`; with a backward pass the answers are the output and all gradients.
        edge_attr: [num_edges, edge_dim] in the batch's order.
        traffic: what the pass has to move.
    """
    edges, place = plain.edges_of(batch)
    # the plans that every later step of the same batch finds made
    batch.joint_transposed()
    sorted_attr = None if edge_attr is None else edge_attr[place]
    parameters = dict(conv.named_parameters())
    ours = (lambda x: conv(x, batch)) if edge_attr is None else (lambda x: conv(x, batch, edge_attr))
    forwards: dict[str, tuple[Callable[[Tensor], Tensor], Mapping[str, nn.Parameter]]] = {
        OURS: (ours, parameters),
        PLAIN: (lambda x: plain.layer(conv, x, edges, sorted_attr), parameters),
    }
    missing = {}
    if reason := missing_pyg():
        missing[PYG] = reason
    else:
        theirs = pyg_layer(conv)
        index = edges.index
        forwards[PYG] = (lambda x: call_pyg(theirs, x, index, edges, sorted_attr)), dict(theirs.named_parameters())
    with torch.no_grad():
        grad = torch.randn_like(conv(x, batch, *([] if edge_attr is None else [edge_attr])))
    has_extrema = isinstance(conv, PNAConv)
    return Group(
        {name: functools.partial(run, forward, x, grad, own, which) for name, (forward, own) in forwards.items()},
        missing,
        traffic,
        # where rounding decides between neighbours, a gradient goes to another one: a weight's gradient sums over all
        # rows, and in float32 PyG's is as far from float64 as ours
        tolerance=5e-4 if has_extrema else 1e-4,
        difference=None if which == FORWARD else all_but_ties if has_extrema else largest_difference,
    )


def run(
    forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, parameters: Mapping[str, nn.Parameter], which: str
) -> Answer:
    """The output of a pass, and with a backward the gradients of `x` and of the parameters in the order of names."""
    if which == FORWARD:
        with torch.no_grad():
            return (forward(x),)
    leaf = x.detach().requires_grad_()
    out = forward(leaf)
    wanted = [leaf, *(parameters[name] for name in sorted(parameters))]
    gradients = torch.autograd.grad(out, wanted, grad)
    return (out.detach(), *gradients)


def pyg_layer(conv: Any) -> nn.Module:
    """PyG's layer with the parameters of ours."""
    import torch_geometric.nn

    name = type(conv).__name__
    arguments: list[Any] = [conv.in_channels, conv.out_channels]
    options: dict[str, Any] = {"edge_dim": conv.edge_dim}
    if name == "PNAConv":
        # the histogram only sets buffers, which the state brings
        arguments += [conv.aggregators, conv.scalers, torch.ones(4)]
        options |= {"towers": conv.towers, "divide_input": conv.divide_input}
    else:
        arguments += [conv.heads, conv.concat]
        options |= {"dropout": conv.dropout}
    if name in ("GATConv", "GATv2Conv"):
        options["add_self_loops"] = False
    theirs = getattr(torch_geometric.nn, name)(*arguments, **options).to(next(conv.parameters()))
    theirs.load_state_dict(conv.state_dict())
    return theirs


def call_pyg(theirs: Any, x: Tensor, index: Tensor, edges: plain.Edges, edge_attr: Tensor | None) -> Tensor:
    """[B, F_out] of PyG's layer."""
    if type(theirs).__name__ == "PNAConv":
        return theirs(x, index, edge_attr)[: edges.num_rows]
    return theirs((x, x[: edges.num_rows]), index, edge_attr)


def all_but_ties(ours: Answer, theirs: Answer) -> float:
    """`largest_difference` of all but a value in a thousand of each tensor.

    Where extrema are equal, PyG shares their gradient out and ours gives it to one of them.
    """
    return largest_difference(ours, theirs, spared=1e-3)


def largest_difference(ours: Answer, theirs: Answer, spared: float = 0.0) -> float:
    """The largest difference over tensors, each in units of its largest value or 1.

    A gradient that is 0 but for rounding, as of the keys' bias, has no unit of its own.

    Args:
        ours: what we computed.
        theirs: what the other way did.
        spared: share of the values of a tensor, those furthest apart, that do not count.
    """
    worst = 0.0
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape, f"ours has shape {tuple(our.shape)}, theirs {tuple(their.shape)}"
        apart = ((our - their).abs() / their.abs().max().clamp(min=1.0)).flatten()
        largest = apart.topk(int(spared * apart.numel()) + 1).values[-1] if apart.numel() else apart.sum()
        worst = max(worst, float(largest.nan_to_num(torch.inf, torch.inf)))
    return worst


# --- traffic ---------------------------------------------------------------------------------------------------------


def gathered(csr: Transposed, table_rows: int, row_bytes: int) -> Gather:
    """Rows of a table read by the columns of a CSR."""
    return Gather(count_reads(csr.col, table_rows), row_bytes)


def index_bytes(csr: Transposed) -> int:
    """Bytes of a CSR's arrays."""
    return sum(part.nbytes for part in csr if part is not None)


def attention_traffic(
    batch: Batch,
    in_channels: int,
    width: int,
    heads: int,
    which: str,
    *,
    linears: int = 1,
    own_linears: int = 0,
    sources: int = 1,
    is_dynamic: bool = False,
    edge_dim: int | None = None,
) -> Traffic:
    """What an attention layer moves at least, in float32: dense products of rows, and attention over edges.

    Forward: rows are read and transformed once, transformed rows gathered along the joint CSR, the output written.
    Backward: along the transpose, gradients and the softmax's normaliser gathered (and the queries, where logits are
    made from pairs of rows), transformed rows read and their gradients written. Where logits are made from pairs, the
    gradient of the queries needs transformed rows gathered once more.

    Args:
        batch: the plan of the step.
        in_channels: F_in.
        width: features of a transformed row, all heads.
        heads: heads.
        which: pass, one of `PASSES`.
        linears: linear layers of all rows.
        own_linears: linear layers of the in-batch rows.
        sources: transformed rows that an edge reads: key and value are two.
        is_dynamic: whether logits are made from pairs of rows.
        edge_dim: width of edge features, if there are any: a transformed row for each edge.
    """
    num_rows, num_all = batch.num_nodes, batch.num_nodes + batch.num_halo
    joint, (transposed, _) = batch.joint(), batch.joint_transposed()
    narrow, wide, logits = 4 * in_channels, 4 * width, 4 * heads
    edge_bytes = 0 if edge_dim is None else batch.num_edges * (4 * edge_dim + 2 * wide)
    flops = 2 * in_channels * width * (linears * num_all + own_linears * num_rows)
    flops += 0 if edge_dim is None else 2 * edge_dim * width * batch.num_edges
    # rows read and written transformed; then the output, and what the softmax of a row leaves for the backward
    products = num_all * (narrow + wide * sources) + num_rows * wide * own_linears
    of_row = num_rows * (wide * (1 + is_dynamic) + 2 * logits)
    rows = gathered(joint, num_all, wide * sources + (0 if is_dynamic else logits))
    traffic = Traffic(products + of_row + index_bytes(joint) + edge_bytes, [rows], flops)
    if which == FORWARD:
        return traffic
    if is_dynamic:
        # the gradient of the queries
        traffic = traffic.followed_by(Traffic(of_row + index_bytes(joint), [rows]))
    of_target = gathered(transposed, num_rows, wide + 2 * logits + (wide if is_dynamic else logits))
    back = products + num_all * wide * sources + num_rows * wide
    return traffic.followed_by(Traffic(back + index_bytes(transposed) + 2 * edge_bytes, [of_target], 2 * flops))


# --- promises --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """What the project promises of rows whose pass is `which` (any if None): how much more the other way takes.

    Attributes:
        time: times our time.
        memory: times our peak.
    """

    time: float | None = None
    memory: float | None = None
    which: str | None = BOTH


def hold_to(rows: list[Row], setting: Setting, promises: Mapping[str, Sequence[Promise]]) -> list[Row]:
    """The rows, with "target" and "met" in those of PyG (of PyG's way where it is absent) if the size is full.

    Args:
        rows: of `measure_cases`.
        setting: that they were measured with.
        promises: by kind of device.
    """
    if setting.size != "full":
        return rows
    has_pyg = missing_pyg() is None
    ours: Row = {}
    for row in rows:
        ours = row if row["way"] == OURS else ours
        wanted = [p for p in promises.get(setting.device.type, ()) if p.which in (None, row["pass"])]
        if row["way"] == (PYG if has_pyg else PLAIN) and "missing" not in row and wanted:
            reached = [
                (value, least, text)
                for p in wanted
                for value, least, text in (
                    (row["times_ours"], p.time, ""),
                    (row["peak_mib"] / ours["peak_mib"], p.memory, " memory"),
                )
                if least is not None
            ]
            row["target"] = ", ".join(f">= {least:g}x{text}" for _, least, text in reached)
            row["met"] = all(value >= least for value, least, _ in reached)
    return rows

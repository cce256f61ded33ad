"""One training step, tensor by tensor: when each is made, when it is let go of, and so the most bytes at once.

The order is that of the code: `planner.Planner`, then the layers of `nn/` forward, the loss, the layers backward, and
Adam. A layer's forward leaves its backward on the tape, as autograd does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from gas_triton.kernels.attention_cpu import CPU_EDGES
from gas_triton.kernels.dropout import CPU_BLOCK
from gas_triton.models.stack import Stack
from gas_triton.nn import GATConv, GCNConv, GINConv, SAGEConv

if TYPE_CHECKING:
    from gas_triton.batch import Batch

__all__ = ["STEP_MODELS", "BatchSize", "StepOptions", "plan_bytes", "step_bytes"]

# Models whose layers have an arithmetic here.
STEP_MODELS = ("GCN", "SAGE", "GIN", "GAT")
FLOAT = 4  # bytes of a float32
LONG = 8  # bytes of an int64


@dataclass(frozen=True)
class BatchSize:
    """A batch by its sizes.

    Attributes:
        nodes: B, in-batch rows.
        halo: H, halo rows.
        inner: edges from in-batch rows.
        outer: edges from halo rows.
        is_planned: whether the step makes the plan; False where it was made before and is kept.
        has_hubs: whether a row may have more than 512 edges, which a GPU sums in pieces.
    """

    nodes: int
    halo: int
    inner: int
    outer: int
    is_planned: bool = True
    has_hubs: bool = True

    @classmethod
    def of(cls, batch: Batch, is_planned: bool = True) -> BatchSize:
        """The sizes of a batch."""
        edges = batch.inner.num_edges, batch.outer.num_edges
        return cls(batch.num_nodes, batch.num_halo, *edges, is_planned, len(batch.hubs) > 0)

    @property
    def edges(self) -> int:
        """All edges into the batch's rows."""
        return self.inner + self.outer


@dataclass(frozen=True)
class StepOptions:
    """How a step is run.

    Attributes:
        device_type: "cuda" or "cpu". On a CPU, dropping or widening halo rows copies them; a Triton kernel does it
            where it reads them.
        weighted: whether edges have weights.
        halo: whether halo rows are read; False for Cluster-GCN.
        history_dtype: of the tables.
        tier: where they live, "device", "pinned" or "file".
        plans_ahead: plans held beside the step's own, by `Histories.prefetch`.
        index: bytes of an id.
        symmetric: whether the graph is, so that its arrays stand for their transpose.
        label_bytes: of a row's target: an int64 class, or a float32 a label.
    """

    device_type: str = "cuda"
    weighted: bool = True
    halo: bool = True
    history_dtype: str = "float32"
    tier: str = "device"
    plans_ahead: int = 0
    index: int = 4
    symmetric: bool = True
    label_bytes: int = LONG


class _Tape:
    """Bytes held, the most at once, and what the backward pass will do, last first."""

    def __init__(self) -> None:
        self.now = self.most = 0
        # each is given the bytes of the gradient of what it made, held, and gives those of what it was given
        self.backward: list[Callable[[int], int]] = []

    def hold(self, nbytes: int) -> int:
        self.now += nbytes
        self.most = max(self.most, self.now)
        return nbytes

    def free(self, *sizes: int) -> None:
        self.now -= sum(sizes)

    def touch(self, *sizes: int) -> None:
        """Holds for a moment."""
        self.most = max(self.most, self.now + sum(sizes))


def plan_bytes(batch: BatchSize, options: StepOptions) -> int:
    """Bytes of a batch's plan, as it is kept: `Batch` says of what."""
    if not batch.is_planned:
        return 0
    rows = LONG * (batch.nodes + batch.halo) + 2 * options.index * (batch.nodes + 1)
    edges = options.index * (batch.inner + 2 * batch.outer) + FLOAT * options.weighted * batch.edges
    # where the edges stand in the graph, for `edge_ids`
    return rows + edges + LONG * batch.edges


def step_bytes(model: nn.Module, batch: BatchSize, options: StepOptions | None = None) -> int:
    """The most bytes that one training step allocates at once, from the plan to Adam, beyond what stays.

    Args:
        model: a `gas_triton.models.Stack` of layers with an arithmetic (`STEP_MODELS`), on any device, also "meta".
        batch: the sizes of its batch.
        options: how the step is run; a float32 model with histories on a GPU if None.

    Returns:
        Bytes. Slots of staged rows, which stay from step to step, are `gas_triton.sizing.slot_bytes`.

    Raises:
        ValueError: a model without an arithmetic.
    """
    options = options or StepOptions()
    if not isinstance(model, Stack) or len(model.lins) or len(model.norms) or model.residual:
        raise ValueError(
            f"model: expected one of {', '.join(STEP_MODELS)} without linear ends, norms and residuals, got "
            f"{type(model).__name__}"
        )
    return _Step(model, batch, options).run()


class _Step:
    """One step on a tape."""

    def __init__(self, model: Stack, batch: BatchSize, options: StepOptions) -> None:
        self.model, self.batch, self.options, self.tape = model, batch, options, _Tape()
        self.on_cpu = options.device_type == "cpu"
        self.nodes = batch.nodes
        self.halo = batch.halo if options.halo else 0
        self.has_joint = self.has_transposed = False

    def run(self) -> int:
        """The most bytes at once."""
        tape, plan = self.tape, plan_bytes(self.batch, self.options)
        layers: list[Any] = list(self.model.convs)
        if self.options.plans_ahead == 0:
            self._plan()
        tape.hold(plan * (1 + self.options.plans_ahead))
        out = 0
        held_pushes = 0
        for place, conv in enumerate(layers):
            is_last = place == len(layers) - 1
            width = _width(conv)
            given = out
            if place > 0 and self._reads_history:
                held_pushes += self._push(conv, given)
            out = self._forward(conv, place, given)
            if not is_last:
                out = self._activate(out, width)
        logits = out
        target = tape.hold(self.nodes * self.options.label_bytes)
        log_softmax = tape.hold(logits)
        tape.free(logits)
        grad = self._loss_backward(log_softmax)
        while tape.backward:
            grad = tape.backward.pop()(grad)
        tape.free(grad)
        self._adam()
        tape.free(target)
        if self.options.plans_ahead:
            # the plan after the next, while the generator holds the step's own
            self._plan()
        # on a GPU the rows pushed to the host are held until the copies of the step are done
        return tape.most + (held_pushes if not self.on_cpu and self.options.tier != "device" else 0)

    @property
    def _reads_history(self) -> bool:
        return self.options.halo and self.batch.halo > 0

    # --- the plan -----------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """What `Planner.plan` takes on the way."""
        batch, index, edges = self.batch, self.options.index, self.batch.edges
        if not batch.is_planned:
            return
        tape, before = self.tape, self.tape.now
        tape.hold(LONG * self.nodes)  # node_ids
        rowptr = tape.hold(index * self.nodes)
        # col, scratch, local_col, is_inner, inner_before
        working = tape.hold(index * (2 * edges + max(edges, self.nodes))) + tape.hold(edges)
        before_edge = tape.hold(index * edges)
        if self.on_cpu:
            tape.touch(index * edges)  # is_inner as integers, for its prefix sum
        tape.hold(index * self.nodes)  # rowptr of inner
        tape.hold(LONG * batch.inner)
        tape.touch(batch.edges, LONG * batch.outer)  # ~is_inner
        tape.hold(LONG * batch.outer)
        tape.hold(index * edges)  # columns of both blocks
        # distinct ids: int64 columns, whether each is the first, the ids, sorted with their places
        columns = LONG * batch.outer + batch.outer
        sorting = LONG * batch.halo * (3 if self.on_cpu else 5)
        tape.touch(columns, index * batch.outer, LONG * batch.halo)
        tape.touch(columns, LONG * batch.halo, sorting)
        tape.hold(LONG * batch.halo)  # halo_ids
        tape.touch(columns, index * batch.outer)
        tape.hold(index * batch.outer)  # outer_slot
        if self.options.weighted:
            tape.touch(FLOAT * edges, LONG * edges, FLOAT * edges)
            tape.touch(FLOAT * edges, FLOAT * edges)
            tape.hold(FLOAT * edges)
        tape.hold(index * self.nodes)  # rowptr of outer
        tape.touch(index * self.nodes * 2)
        tape.free(rowptr, working, before_edge)
        tape.free(tape.now - before)

    def _push(self, conv: Any, given: int) -> int:
        """Bytes of the rows that a layer pushes, where a copy of them is made to be stored."""
        if self.options.tier == "device":
            return 0
        if self.options.history_dtype != "float32":
            from gas_triton.sizing import row_bytes

            packed = self.nodes * row_bytes(conv.history_dim, self.options.history_dtype)
            self.tape.touch(packed)
            return packed
        return given

    # --- the layers ---------------------------------------------------------------------------------------------------

    def _forward(self, conv: Any, place: int, given: int) -> int:
        """Takes over the `given` bytes of the layer's input rows; gives those of its output rows, held."""
        if isinstance(conv, GCNConv):
            return self._gcn(conv, place, given)
        if isinstance(conv, SAGEConv):
            return self._sage(conv, place, given)
        if isinstance(conv, GINConv):
            return self._gin(conv, place, given)
        if isinstance(conv, GATConv):
            return self._gat(conv, place, given)
        raise ValueError(f"model: expected layers of {', '.join(STEP_MODELS)}, got {type(conv).__name__}")

    def _activate(self, given: int, width: int) -> int:
        """ReLU keeps what it gives, ELU what it is given."""
        tape, is_elu = self.tape, isinstance(self.model.convs[0], GATConv)
        out = tape.hold(given)
        if not is_elu:
            tape.free(given)

        def backward(grad: int) -> int:
            tape.hold(given)
            tape.free(grad, given)
            return given

        tape.backward.append(backward)
        return out

    def _mask(self, rows: int, width: int) -> int:
        """What the mask of dropout takes while it is made: on a CPU itself and words of its hash, block by block."""
        if not self.on_cpu:
            return 0
        values = rows * width
        block = max(1, CPU_BLOCK // width) * width
        # the words of a block, and shifted ones
        return values + FLOAT * (rows + 2 * min(block, values))

    def _drop(self, rows: int, width: int) -> int:
        """Dropped rows, held."""
        dropped = self.tape.hold(rows * width * FLOAT)
        # no mask of all values
        self.tape.touch(max(0, self._mask(rows, width) - rows * width))
        return dropped

    def _undrop(self, grad: int, width: int) -> int:
        """The gradient of what was dropped, held."""
        out = self._drop(self.nodes, width)
        self.tape.free(grad)
        return out

    def _in_batch(self, conv: Any, place: int, given: int, width: int) -> tuple[int, bool]:
        """(bytes of in-batch rows as the layer reads them, whether they are its own), held where they are new."""
        if conv.input_dropout == 0.0:
            return given, False
        if place > 0:
            return self._drop(self.nodes, width), True
        copied = self.tape.hold(self.nodes * width * FLOAT)  # out of the features
        rows = self._drop(self.nodes, width)
        self.tape.free(copied)
        return rows, True

    def _aggregate(self, conv: Any, place: int, width: int, reads_halo: bool = True) -> int:
        """One row for each in-batch row, held."""
        tape, out = self.tape, self.nodes * width * FLOAT
        if place == 0 and conv.input_dropout == 0.0:
            # columns as ids of the whole table, kept with the plan
            self._once("graph columns", self.options.index * self.batch.inner, self.batch.inner * LONG)
        if place > 0:
            self._transpose()
        if not self.on_cpu:
            tape.hold(out)
            # partial sums of rows with many edges
            tape.touch(FLOAT * width * self.batch.edges // 256 if self.batch.has_hubs else 0)
            return out
        halo, copied = self.halo if reads_halo else 0, 0
        is_narrow = place > 0 and self.options.history_dtype != "float32"
        if halo and (conv.input_dropout > 0.0 or is_narrow):
            copied = tape.hold(halo * width * FLOAT)
            if is_narrow:
                tape.touch(halo * width * 2)
            if conv.input_dropout > 0.0:
                tape.touch(self._mask(halo, width))
                tape.touch(halo * width * (1 + FLOAT))  # the mask, and as floats
        tape.hold(out)
        # what `embedding_bag` says of its bags; a second sum for the halo
        tape.touch(out * (halo > 0), 8 * self.nodes)
        tape.free(copied)
        return out

    def _once(self, name: str, kept: int, temporary: int = 0) -> None:
        """What is made at the first use, and kept with the plan; nothing where the plan was kept from before."""
        if name in self.__dict__ or not self.batch.is_planned:
            return
        self.__dict__[name] = True
        self.tape.hold(kept)
        self.tape.touch(temporary)

    def _transpose(self) -> None:
        if not self.options.symmetric:
            self._transposed(self.nodes, self.batch.inner)

    def _transposed(self, rows: int, edges: int) -> None:
        index = self.options.index
        temporary = edges * (LONG * 3 + index)
        self._once("transposed", index * (rows + 2 * edges), temporary)

    def _weights_back(self) -> int:
        """Weights in the order of the transpose."""
        return FLOAT * self.batch.inner if self.options.weighted and not self.options.symmetric else 0

    def _aggregate_back(self, grad: int, width: int, mean: bool = False) -> int:
        """The gradient of the in-batch rows, held, for that of what was aggregated, freed."""
        tape, out = self.tape, self.nodes * width * FLOAT
        divided = tape.hold(out) if mean else 0
        tape.touch(out, self._weights_back(), 8 * self.nodes * self.on_cpu)
        if not self.on_cpu and self.batch.has_hubs:
            tape.touch(out, FLOAT * width * self.batch.edges // 256)
        tape.hold(out)
        tape.free(grad, divided)
        return out

    def _linear_back(self, grad: int, saved: int, linear: nn.Linear, needs_rows: bool) -> int:
        """The gradient of a linear layer's rows, held, for that of its output, freed; keeps the weight's gradient."""
        tape = self.tape
        tape.hold(linear.weight.numel() * FLOAT)
        rows = tape.hold(self.nodes * linear.in_features * FLOAT) if needs_rows else 0
        tape.free(grad, saved)
        return rows

    def _gcn(self, conv: GCNConv, place: int, given: int) -> int:
        tape, has_bias = self.tape, conv.bias is not None
        rows, are_new = self._in_batch(conv, place, given, conv.in_channels)
        out = self.nodes * conv.out_channels * FLOAT
        num_edges, num_in, num_out = self.batch.edges, conv.in_channels, conv.out_channels
        # as `Source.is_cheaper_transformed`
        is_transformed = (
            place > 0
            and not self._reads_history
            and self.nodes * (num_in + num_out) + num_edges * num_out < num_edges * num_in
        )
        if is_transformed:
            transformed = tape.hold(out)
            self._aggregate(conv, place, num_out)
            tape.free(transformed)
            saved = rows
        else:
            saved = self._aggregate(conv, place, num_in)
            tape.hold(out)
        if has_bias:
            tape.touch(out)
        if are_new and not is_transformed:
            tape.free(rows)

        def backward(grad: int) -> int:
            if is_transformed:
                grad = self._aggregate_back(grad, num_out)
                # without dropout, the rows are kept by the ReLU before too
                grad = self._linear_back(grad, saved if are_new else 0, conv.lin, True)
            else:
                grad = self._linear_back(grad, saved, conv.lin, place > 0)
                grad = self._aggregate_back(grad, num_in) if place > 0 else grad
            return self._undrop(grad, num_in) if place > 0 and conv.input_dropout > 0.0 else grad

        tape.backward.append(backward)
        return out

    def _sage(self, conv: SAGEConv, place: int, given: int) -> int:
        tape, num_in, num_out = self.tape, conv.in_channels, conv.out_channels
        rows, are_new = self._in_batch(conv, place, given, num_in)
        out = self.nodes * num_out * FLOAT
        num_edges = self.batch.edges
        is_transformed = (
            place > 0
            and not self._reads_history
            and self.nodes * (num_in + num_out) + num_edges * num_out < num_edges * num_in
        )
        own = rows if are_new else 0
        saved = 0
        if is_transformed:
            transformed = tape.hold(out)
            self._aggregate(conv, place, num_out)
            tape.free(transformed)
            tape.touch(out)  # with the bias
        else:
            saved = self._aggregate(conv, place, num_in)
            tape.hold(out)
        if conv.root_weight:
            if place == 0 and not are_new:
                own = tape.hold(self.nodes * num_in * FLOAT)  # a copy out of the features
            tape.touch(out, out)

        def backward(grad: int) -> int:
            root = 0
            if conv.root_weight:
                tape.hold(conv.lin_r.weight.numel() * FLOAT)
                if place > 0:
                    # the gradient of a slice of the rows is made anew
                    root = tape.hold(self.nodes * num_in * FLOAT)
                    tape.touch(root)
                tape.free(own)
            if is_transformed:
                grad = self._aggregate_back(grad, num_out, conv.aggr == "mean")
                grad = self._linear_back(grad, 0, conv.lin_l, True)
                tape.touch(root)
            else:
                grad = self._linear_back(grad, saved, conv.lin_l, place > 0)
                grad = self._aggregate_back(grad, num_in, conv.aggr == "mean") if place > 0 else grad
            tape.free(root)
            return self._undrop(grad, num_in) if place > 0 and conv.input_dropout > 0.0 else grad

        tape.backward.append(backward)
        return out

    def _gin(self, conv: GINConv, place: int, given: int) -> int:
        tape, linears = self.tape, [m for m in conv.nn.modules() if isinstance(m, nn.Linear)]
        num_in = linears[0].in_features
        rows, are_new = self._in_batch(conv, place, given, num_in)
        wide = self.nodes * num_in * FLOAT
        own = rows if are_new else 0
        aggregated = self._aggregate(conv, place, num_in)
        if place == 0 and not are_new:
            own = tape.hold(wide)  # a copy out of the features
        scaled = tape.hold(wide)
        summed = tape.hold(wide)
        tape.free(aggregated, scaled)
        middle = tape.hold(self.nodes * linears[0].out_features * FLOAT)
        tape.touch(middle)  # its ReLU
        out = tape.hold(self.nodes * linears[1].out_features * FLOAT)

        def backward(grad: int) -> int:
            grad = self._linear_back(grad, 0, linears[1], True)
            tape.touch(grad)
            tape.free(middle)
            grad = self._linear_back(grad, summed, linears[0], place > 0 or conv.eps.requires_grad)
            # eps is multiplied by the rows
            tape.touch(wide * (1 + (place > 0)))
            tape.free(own)
            if place > 0:
                root = tape.hold(wide)
                tape.touch(wide)
                grad = self._aggregate_back(grad, num_in)
                tape.free(root)
            return self._undrop(grad, num_in) if place > 0 and conv.input_dropout > 0.0 else grad

        tape.backward.append(backward)
        return out

    def _gat(self, conv: GATConv, place: int, given: int) -> int:
        tape, batch, index = self.tape, self.batch, self.options.index
        num_in, heads, width = conv.in_channels, conv.heads, conv.heads * conv.out_channels
        total = self.nodes + self.halo
        rows, are_new = self._in_batch(conv, place, given, num_in)
        wide, own_wide, logits = total * width * FLOAT, self.nodes * width * FLOAT, total * heads * FLOAT
        saved = given
        if place == 0 or self.halo:
            halo = self.halo * num_in * FLOAT * (place > 0 or conv.input_dropout > 0.0)
            tape.hold(halo)
            if conv.input_dropout > 0.0 and halo:
                # pulled, then dropped
                tape.touch(self._mask(self.halo, num_in))
                tape.touch(halo, self.halo * num_in * self.on_cpu)
            saved = tape.hold(total * num_in * FLOAT)
            tape.free(halo)
        tape.hold(wide)
        tape.touch(wide, logits)
        tape.hold(logits)
        tape.touch(own_wide)
        target = tape.hold(self.nodes * heads * FLOAT)
        num_edges = batch.edges if self.halo else batch.inner
        if self.halo:
            self._once("joint", index * (self.nodes + num_edges) + LONG * num_edges, num_edges * (2 * LONG + index))
        self._transposed(total, num_edges)
        kept = 2 * own_wide + 2 * self.nodes * heads * FLOAT
        tape.hold(kept)
        block = min(num_edges, CPU_EDGES) * heads * FLOAT
        if self.on_cpu:
            tape.touch(wide, 3 * block)
        out = self.nodes * (width if conv.concat else conv.out_channels) * FLOAT
        averaged = 0 if conv.concat else tape.hold(out)
        tape.hold(out)  # with the bias
        tape.free(averaged)
        if are_new and (place == 0 or self.halo):
            tape.free(rows)
        if place > 0 and not (self.halo == 0 and not are_new):
            tape.free(given)  # what ELU gave, which nothing keeps

        def backward(grad: int) -> int:
            spread = 0 if conv.concat else tape.hold(own_wide)
            tape.touch(own_wide)  # products
            # gradients of the rows through the sum and through both logits
            made = tape.hold(wide) + tape.hold(logits)
            if self.on_cpu:
                tape.touch(own_wide, 3 * block, 2 * self._block_rows() * width * FLOAT)
            tape.free(kept, grad, spread)
            tape.touch(2 * wide)
            tape.free(logits, target, made)
            grad = tape.hold(wide)
            tape.hold(conv.lin.weight.numel() * FLOAT)
            if place == 0:
                tape.free(wide, saved, grad)
                return 0
            rows_grad = tape.hold(total * num_in * FLOAT)
            tape.free(wide, grad, saved)
            own = rows_grad
            if self.halo:
                own = tape.hold(self.nodes * num_in * FLOAT)
                tape.free(rows_grad)
            return self._undrop(own, num_in) if conv.input_dropout > 0.0 else own

        tape.backward.append(backward)
        return out

    def _block_rows(self) -> int:
        """Most rows of the transpose whose edges a CPU takes as one block."""
        # halo rows come last and have few edges each
        outer, inner = self.batch.outer if self.halo else 0, max(self.batch.inner, 1)
        if outer >= CPU_EDGES:
            return max(1, math.ceil(CPU_EDGES * self.halo / outer))
        return self.halo + min(self.nodes, math.ceil((CPU_EDGES - outer) * self.nodes / inner))

    # --- the loss and the optimizer -----------------------------------------------------------------------------------

    def _loss_backward(self, log_softmax: int) -> int:
        tape = self.tape
        of_loss = tape.hold(log_softmax)
        grad = tape.hold(log_softmax)
        tape.free(of_loss, log_softmax)
        return grad

    def _adam(self) -> None:
        """Temporaries of an update: of all parameters at once on a GPU, of one after the other on a CPU."""
        sizes = [p.numel() * FLOAT for p in self.model.parameters()]
        self.tape.touch(2 * max(sizes) if self.on_cpu else sum(sizes))
        self.tape.free(sum(sizes))


def _width(conv: Any) -> int:
    return int(conv.gradient_dim)

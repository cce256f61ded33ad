"""`functional.aggregate` and its op: values, gradients, registration, tracing, determinism."""

import builtins

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gas_triton as gas
from gas_triton import functional
from gas_triton.csr import find_hubs
from gas_triton.kernels.aggregate import aggregate as aggregate_op
from gas_triton.kernels.aggregate import aggregate_ref
from gas_triton.kernels.aggregate_cpu import RUN_EDGES, aggregate_cpu, winners_cpu
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.dropout import keep_mask
from gas_triton.kernels.pull import widen
from gas_triton.kernels.push import quantize_ref
from gas_triton.kernels.transpose import transpose_torch
from gas_triton.models import GCN
from tests.blocks import KINDS, assert_as_exact, make_blocks

REDUCTIONS = ["sum", "mean", "max", "min"]
SEED = torch.tensor([3])


def make_batch(num_nodes=40, num_edges=150, symmetric=False, weighted=True, clusters=(0, 2), num_features=5):
    edge_index = torch.randint(num_nodes, (2, num_edges))
    if symmetric:
        edge_index = torch.cat([edge_index, edge_index.flip(0)], dim=1)
    scale = torch.rand(num_nodes) + 0.1
    weight = scale[edge_index].prod(0) if weighted else None
    graph = gas.Graph.from_edge_index(edge_index, weight, num_nodes)
    parts = gas.random_partition(graph, 4)
    graph = parts.permute(graph)
    loader = gas.ClusterLoader(graph, parts, batch_size=2, x=torch.randn(num_nodes, num_features))
    return loader.batch(list(clusters))


def as_lists(batch):
    return list(batch.inner), list(batch.outer)


def relative_error(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_op_equals_float64(kind, reduce):
    blocks = make_blocks(kind)
    for weight in (None, torch.randn(blocks.num_edges)):
        x, table = torch.randn(blocks.num_rows, 6), torch.randn(blocks.num_table, 6)
        out, _ = aggregate_op(
            x, table, None, weight, blocks.inner, blocks.outer, [], None, [], [], reduce, 0.0, None, 512, False
        )  # fmt: skip
        assert_as_exact(out, x, table, weight, blocks, reduce)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_cpu_op_takes_every_mix_of_dtypes(dtype, table_dtype):
    blocks = make_blocks("mixed", num_rows=20, num_table=400)
    x, table = torch.randn(20, 8).to(dtype), torch.randn(400, 8).to(table_dtype)
    weight = torch.rand(blocks.num_edges)
    out, _ = aggregate_op(
        x, table, None, weight, blocks.inner, blocks.outer, [], None, [], [], "sum", 0.0, None, 512, False
    )  # fmt: skip
    assert_as_exact(out, x, table, weight, blocks)


@pytest.mark.parametrize("with_halo", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_rows_and_weights(symmetric, reduce, with_halo):
    batch = make_batch(symmetric=symmetric)
    inner, outer = as_lists(batch)
    rows = batch.num_nodes + (batch.num_halo if with_halo else 0)
    x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(batch.num_edges, dtype=torch.float64, requires_grad=True)
    history = None if with_halo else torch.randn(40, 3, dtype=torch.float64)
    if with_halo:
        outer[1] = batch.outer_joint_col

    def ours(x, weight):
        return functional.aggregate(x, batch, history, reduce, edge_weight=weight)

    assert torch.autograd.gradcheck(ours, (x, weight))
    out, expected = ours(x, weight), aggregate_ref(x, history, weight, inner, outer, reduce)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_with_the_graphs_own_weights(symmetric, weighted):
    batch = make_batch(symmetric=symmetric, weighted=weighted)
    assert batch.symmetric is symmetric
    x = torch.randn(batch.num_nodes, 3, dtype=torch.float64, requires_grad=True)
    history = torch.randn(40, 3, dtype=torch.float64)
    out = functional.aggregate(x, batch, history, edge_weight=batch.edge_weight)
    expected = aggregate_ref(x, history, batch.edge_weight, *as_lists(batch))
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad), torch.autograd.grad(expected, x, grad))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_three_ways_to_give_the_halo_agree(reduce):
    batch = make_batch()
    table = batch.features.table
    exact = functional.aggregate(batch.x, batch, reduce=reduce, edge_weight=batch.edge_weight)
    in_place = functional.aggregate(batch.features, batch, reduce=reduce, edge_weight=batch.edge_weight)
    history = functional.aggregate(
        batch.x[: batch.num_nodes], batch, table, reduce=reduce, edge_weight=batch.edge_weight
    )
    torch.testing.assert_close(in_place, exact)
    torch.testing.assert_close(history, exact)


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_nan", [True, False])
def test_the_first_of_equal_extrema_wins(has_nan, dtype, reduce):
    # one run, two, more than fit in one level of runs, none
    degrees = torch.tensor([RUN_EDGES, RUN_EDGES + 1, 2 * RUN_EDGES**2 + 3, 0, 1, 3])
    x = torch.randint(-2, 3, (6, 8)).to(dtype)
    if has_nan:
        x[torch.rand(6, 8) < 0.1], x[0, 0], x[1, 1] = torch.nan, torch.inf, -torch.inf
    blocks = []
    for degree in (degrees, degrees.flip(0)):
        rowptr = torch.cat([degree.new_zeros(1), degree.cumsum(0)]).to(torch.int32)
        blocks.append([rowptr, torch.randint(6, (int(rowptr[-1]),), dtype=torch.int32)])
    for inner, outer in (blocks, (blocks[0], [])):
        arguments = x, None, None, None, inner, outer, [], None, [], [], reduce, 0.0, None, 512, False, None, 0.0
        out, winner = aggregate_op(*arguments, True)
        parts = [inner, outer] if outer else [inner]
        message = torch.cat([x[col.long()] for _, col in parts])
        row = torch.cat([row_of_edge(*part) for part in parts])
        for i in range(6):
            edges = (row == i).nonzero().squeeze(1)
            for feature in range(8):
                # Python's max and min take the first; a NaN comes before everything
                values = message[edges, feature].nan_to_num(9.0 if reduce == "max" else -9.0, 8.0, -8.0).tolist()
                best = getattr(builtins, reduce)(range(len(values)), key=values.__getitem__, default=None)
                assert winner[i, feature] == (-1 if best is None else edges[best])
                value = torch.zeros((), dtype=dtype) if best is None else message[edges[best], feature]
                assert torch.equal(out[i, feature].nan_to_num(9.0), value.nan_to_num(9.0))
        assert torch.equal(aggregate_op(*arguments, False)[0].nan_to_num(9.0), out.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_edge_of_a_run_may_be_better_than_the_one_before(dtype):
    x, count = torch.arange(2.0 * RUN_EDGES, dtype=dtype)[:, None], torch.arange(2 * RUN_EDGES + 1)
    rowptr = torch.cat([count.new_zeros(1), count.cumsum(0)]).to(torch.int32)
    col = torch.cat([torch.arange(n, dtype=torch.int32) for n in count.tolist()])
    out, winner = aggregate_cpu(x, None, None, None, [rowptr, col], [], [], None, [], [], "max", 0.0, None, 512, False)
    assert torch.equal(out[1:, 0], x[:, 0])
    assert winner[1:, 0].tolist() == (rowptr[2:] - 1).tolist()


@pytest.mark.parametrize("weighted", [True, False])
def test_no_tensor_of_an_extremum_is_of_the_size_of_the_messages(weighted):
    rowptr, col = torch.arange(0, 20001, 100, dtype=torch.int32), torch.randint(200, (20000,), dtype=torch.int32)
    x, weight = torch.randn(200, 64), torch.rand(20000) if weighted else None
    row = torch.repeat_interleave(torch.arange(200), 100)
    rowptr_t, col_t, edge_id = transpose_torch(row, col, 200)
    with Calls() as seen:
        out, winner = aggregate_cpu(
            x, None, None, weight, [rowptr, col], [], [], None, [], [], "max", 0.0, None, 512, False
        )  # fmt: skip
        winners_cpu(out, winner, None if weight is None else weight[edge_id], [rowptr_t, col_t], edge_id, [], 512)
    assert "maximum" in seen.names
    assert max(seen.sizes) < col.numel() * 64 // 2


def test_winners_are_made_only_for_a_gradient():
    batch = make_batch()
    leaf, history = torch.randn(batch.num_nodes, 5, requires_grad=True), torch.randn(40, 5)
    weight = torch.rand(batch.num_edges)
    makes = {}
    for name, x, own in (
        ("none", leaf.detach(), weight),
        ("rows", leaf, weight),
        ("weight", leaf.detach(), weight.clone().requires_grad_()),
    ):
        with Calls() as seen:
            functional.aggregate(x, batch, history, "max", edge_weight=own)
        makes[name] = bool((seen.outputs["aggregate"][1] >= 0).any())
    assert makes == {"none": False, "rows": True, "weight": True}


STORED = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


def make_history(batch, stored, num_features=5):
    """(what its rows stand for in float64, the table, the same staged)."""
    values = torch.randn(batch.graph_nodes, num_features, dtype=torch.float64)
    if stored != torch.int8:
        table = values.to(stored)
        return table.double(), table, table[batch.halo_ids]
    rows, scale = quantize_ref(values)
    staged = functional.Quantized(rows[batch.halo_ids], scale[batch.halo_ids])
    return widen(rows, scale, torch.float64), functional.Quantized(rows, scale), staged


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("stored", STORED)
def test_every_table_in_place_and_staged(stored, reduce, dropout):
    batch = make_batch()
    values, table, staged = make_history(batch, stored)
    seed = SEED if dropout else None
    leaves = torch.randn(batch.num_nodes, 5), torch.rand(batch.num_edges)
    grad = torch.randn(batch.num_nodes, 5)
    results = []
    for history in (table, staged):
        x, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        out = functional.aggregate(
            x, batch, history, reduce, edge_weight=weight, history_dropout=dropout, seed=seed
        )  # fmt: skip
        results.append((out, *torch.autograd.grad(out, (x, weight), grad)))
    x, weight = (leaf.double().requires_grad_() for leaf in leaves)
    expected = aggregate_ref(x, values, weight, *as_lists(batch), reduce, dropout, seed)
    expected = (expected, *torch.autograd.grad(expected, (x, weight), grad.double()))
    for in_place, from_staged, exact in zip(*results, expected, strict=True):
        assert torch.equal(in_place, from_staged)
        torch.testing.assert_close(in_place.double(), exact, rtol=1e-5, atol=1e-5)


class Calls(TorchDispatchMode):
    """The names of the operations that were called, their outputs, and how many values those have."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes, self.outputs = [], [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        out = function(*args, **(kwargs or {}))
        self.outputs[self.names[-1]] = out
        self.sizes += [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
def test_staged_rows_are_not_gathered_again(stored):
    batch = make_batch()
    outer = [*batch.outer, batch.outer_slot, batch.halo_ids]
    calls = {}
    for staged in (False, True):
        history = make_history(batch, stored)[1 + staged]
        rows, scale = (history.rows, history.scale) if stored == torch.int8 else (history, None)
        with Calls() as seen:
            aggregate_cpu(
                torch.randn(batch.num_nodes, 5), rows, scale, None, list(batch.inner), outer, [], None, [], [], "sum",
                0.0, None, 512, staged,
            )  # fmt: skip
        calls[staged] = seen.names
    assert "index_select" not in calls[True]
    assert ("index_select" in calls[False]) == (stored != torch.float32)
    assert ("_to_copy" in calls[True]) == (stored != torch.float32)


def test_a_backward_does_not_read_staged_rows_that_were_overwritten():
    batch = make_batch()
    weight = torch.rand(batch.num_edges, requires_grad=True)
    for stored in (torch.float32, torch.int8):
        staged = make_history(batch, stored)[2]
        out = functional.aggregate(torch.randn(batch.num_nodes, 5), batch, staged, edge_weight=weight)
        (staged.scale if stored == torch.int8 else staged).zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stored", STORED)
def test_halo_rows_of_every_table(stored, dtype, dropout):
    batch = make_batch()
    values, *histories = make_history(batch, stored)
    expected = values[batch.halo_ids].to(dtype)
    if dropout:
        expected = torch.where(keep_mask(batch.halo_ids, 5, dropout, SEED), expected, 0.0) * (1.0 / (1.0 - dropout))
    kept = [None if isinstance(h, functional.Quantized) else h.clone() for h in histories]
    for history, before in zip(histories, kept, strict=True):
        out = functional.halo_rows(history, batch, dtype, dropout, SEED)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected, rtol=2.0**-22 if dtype != torch.bfloat16 else 2.0**-8, atol=0)
        assert before is None or torch.equal(history, before)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
def test_stored_rows_compile_into_one_graph(stored, staged):
    torch._dynamo.reset()
    batch = make_batch()
    history = make_history(batch, stored)[1 + staged]

    def layer(x, history):
        out = functional.aggregate(x, batch, history, history_dropout=0.4, seed=SEED)
        return out.sum() + functional.halo_rows(history, batch, x.dtype).sum()

    x = torch.randn(batch.num_nodes, 5, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [(loss, *torch.autograd.grad(loss, x)) for loss in (layer(x, history), compiled(x, history))]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_dropped_halo_leaves_the_induced_subgraph(reduce):
    batch = make_batch()
    x = batch.x[: batch.num_nodes]
    out = functional.aggregate(x, batch, reduce=reduce, edge_weight=batch.edge_weight, halo="drop")
    own = batch.edge_weight[: batch.inner.num_edges]
    torch.testing.assert_close(out, aggregate_ref(x, None, own, list(batch.inner), [], reduce))
    torch.testing.assert_close(
        functional.aggregate(batch.x, batch, reduce=reduce, edge_weight=batch.edge_weight, halo="drop"), out
    )


def test_gradients_with_the_halo_dropped():
    batch = make_batch(symmetric=True)
    x = torch.randn(batch.num_nodes, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(batch.num_edges, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: functional.aggregate(x, batch, edge_weight=w, halo="drop"), (x, weight)
    )


def test_one_dropout_mask_however_the_halo_is_read():
    batch = make_batch(num_features=16)
    dropped = functional.dropout(batch.x, batch, 0.4, SEED)
    assert 0.3 < float((dropped == 0).double().mean()) < 0.5
    exact = functional.aggregate(dropped, batch)
    for table in (batch.features.table, batch.features.table.bfloat16()):
        x = functional.dropout(batch.x[: batch.num_nodes], batch, 0.4, SEED)
        out = functional.aggregate(x, batch, table, history_dropout=0.4, seed=SEED)
        tolerance = {} if table.dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 2.0**-5}
        torch.testing.assert_close(out, exact, **tolerance)


def test_weight_gradient_sees_the_dropped_halo():
    batch = make_batch(num_features=16)
    weight = torch.rand(batch.num_edges, dtype=torch.float64, requires_grad=True)
    x, table = torch.randn(batch.num_nodes, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    out = functional.aggregate(x, batch, table, edge_weight=weight, history_dropout=0.4, seed=SEED)
    expected = aggregate_ref(x, table, weight, *as_lists(batch), "sum", 0.4, SEED)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, weight, grad), torch.autograd.grad(expected, weight, grad))


def test_dropout_gradient_is_the_same_mask():
    batch = make_batch(num_features=16)
    x = torch.randn(batch.num_nodes, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: functional.dropout(x, batch, 0.4, SEED), x)


def test_strided_rows_tables_and_weights():
    batch = make_batch()
    x, table = torch.randn(5, batch.num_nodes).T, torch.randn(5, 40).T
    weight = torch.rand(batch.num_edges, 2)[:, 0]
    for reduce in REDUCTIONS:
        out = functional.aggregate(x, batch, table, reduce, edge_weight=weight)
        torch.testing.assert_close(out, aggregate_ref(x, table, weight, *as_lists(batch), reduce))


def test_a_second_derivative_is_refused():
    batch = make_batch()
    x = torch.randn(batch.num_nodes, 3, requires_grad=True)
    out = functional.aggregate(x, batch, torch.randn(40, 3))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_same_input_same_bits():
    batch = make_batch(num_nodes=400, num_edges=8000)
    x, history = torch.randn(batch.num_nodes, 24, requires_grad=True), torch.randn(400, 24)
    results = []
    for _ in range(3):
        out = functional.aggregate(x, batch, history, edge_weight=batch.edge_weight)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)


def opcheck_inputs():
    for reduce, read in (("sum", "table"), ("sum", "staged"), ("sum", "x"), ("mean", "table"), ("max", "staged")):
        blocks = make_blocks("one_hub", num_table=7)
        inner, outer, num_edges = blocks.inner, blocks.outer, blocks.num_edges
        table = scale = None
        if read == "x":
            outer, num_edges = [], inner[1].numel()
        elif read == "table":
            table = torch.randn(7, 4)
        else:
            table, scale = quantize_ref(torch.randn(7, 4))
            outer = [outer[0], outer[1] + 40, outer[1], torch.arange(40, 47)]
        x, weight = torch.randn(7, 4, requires_grad=True), torch.rand(num_edges, requires_grad=True)
        row = torch.repeat_interleave(torch.arange(7), inner[0].diff().long())
        rowptr, col, edge_id = transpose_torch(row, inner[1], 7)
        hubs, hubs_transposed = find_hubs(inner[0], inner[1].numel(), 8), find_hubs(rowptr, col.numel(), 8)
        yield (
            x, table, scale, weight, inner, outer, [rowptr, col], edge_id, hubs, hubs_transposed, reduce,
            0.0 if table is None else 0.3, SEED, 8, read == "staged",
        )  # fmt: skip


def test_aggregate_is_registered_as_torch_library_wants():
    for inputs in opcheck_inputs():
        torch.library.opcheck(torch.ops.gas_triton.aggregate.default, inputs)


def test_other_ops_are_registered_as_torch_library_wants():
    blocks = make_blocks("mixed")
    row = torch.repeat_interleave(torch.arange(7), blocks.inner[0].diff().long())
    rowptr, col, edge_id = transpose_torch(row, blocks.inner[1], 7)
    x, ids = torch.randn(7, 4), torch.arange(7)
    winner = torch.zeros(7, 4, dtype=torch.int32)
    ops = torch.ops.gas_triton
    for op, inputs in (
        (ops.transpose, (row, blocks.inner[1], 7)),
        (ops.dropout, (x.clone().requires_grad_(), ids, 0.4, SEED)),
        (ops.edge_dot, (x, x, None, *blocks.inner, None, None, 0, 0.3, SEED)),
        (ops.edge_dot, (x, *quantize_ref(x), *blocks.inner, blocks.inner[1] + 40, None, 0, 0.3, SEED)),
        (ops.aggregate_winners, (x, winner, None, [rowptr, col], edge_id, [], 8)),
    ):
        torch.library.opcheck(op.default, inputs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_compiles_into_one_graph(symmetric):
    torch._dynamo.reset()
    edge_index = torch.randint(60, (2, 200))
    edge_index = torch.cat([edge_index, edge_index.flip(0)], dim=1) if symmetric else edge_index
    graph = gas.Graph.from_edge_index(edge_index, num_nodes=60).add_self_loops().gcn_norm()
    parts = gas.random_partition(graph, 6)
    graph = parts.permute(graph)
    loader = gas.ClusterLoader(graph, parts, 2, x=torch.randn(60, 4), y=torch.randint(3, (60,)))
    # 4 -> 8 -> 3: one layer gathers first, one transforms first
    eager = GCN(4, 8, 3, 3, batch_norm=True)
    traced = GCN(4, 8, 3, 3, batch_norm=True)
    traced.load_state_dict(eager.state_dict())
    histories = [gas.attach_histories(model, 60) for model in (eager, traced)]
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for batch in loader:
        losses = [F.cross_entropy(model(batch.x, batch), batch.y) for model in (eager, compiled)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    for a, b in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for name in histories[0]:
        torch.testing.assert_close(histories[0][name].table, histories[1][name].table)
        assert torch.equal(histories[0][name].age(), histories[1][name].age())


def quantized(num_rows, num_features, dtype=torch.int8, scale=None):
    scale = torch.ones(num_rows) if scale is None else scale
    return functional.Quantized(torch.zeros(num_rows, num_features, dtype=dtype), scale)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(3, 5)), ValueError, r"x has 3 rows, expected \d+ \(in-batch rows\) or \d+"),
        (
            dict(x=torch.zeros(20, 5).long()),
            TypeError,
            "x must be a floating tensor or batch.features, got torch.int64",
        ),
        (dict(x=torch.zeros(20)), ValueError, r"x must have shape \[rows, features\], got \[20\]"),
        (dict(x=torch.zeros(20, 5, device="meta")), ValueError, "x is on meta but the batch is on cpu"),
        (dict(history=None), ValueError, "no history holds the .* halo rows"),
        (dict(history=torch.zeros(39, 5)), ValueError, r"history must have 40 rows, one a node, got shape \[39, 5\]"),
        (dict(history=torch.zeros(40)), ValueError, r"history must have 40 rows, one a node, got shape \[40\]"),
        (dict(history=torch.zeros(40, 6)), ValueError, "x has 5 features but the history has 6"),
        (dict(history=quantized(40, 6)), ValueError, "x has 5 features but the history has 6"),
        (dict(history=quantized(39, 5)), ValueError, r"history must have 40 rows, one a node, got shape \[39, 5\]"),
        (
            dict(history=quantized(40, 5, torch.float32)),
            TypeError,
            r"rows int8 \[R, features\] .* got torch.float32 \[40",
        ),
        (dict(history=quantized(40, 5, scale=torch.ones(39))), TypeError, r"float32 \[R\], got .*float32 \[39\]"),
        (dict(history=quantized(40, 5, scale=torch.ones(40).double())), TypeError, r"got .* and torch.float64 \[40\]"),
        (
            dict(history=quantized(40, 5, scale=torch.ones(40, device="meta"))),
            ValueError,
            "history has rows on cpu but their scale on meta",
        ),
        (dict(history=torch.zeros(40, 5, device="meta")), ValueError, "history is on meta but the batch is on cpu"),
        (dict(history=torch.zeros(40, 5).int()), TypeError, "history must be a floating tensor"),
        (dict(reduce="median"), ValueError, "reduce must be one of sum, mean, max, min, got 'median'"),
        (dict(halo="mirror"), ValueError, "halo must be 'read' or 'drop', got 'mirror'"),
        (dict(edge_weight=torch.zeros(3)), ValueError, r"edge_weight must have shape \[\d+\], got \[3\]"),
        (dict(history_dropout=1.5, seed=SEED), ValueError, r"history_dropout must be in \[0, 1\), got 1.5"),
        (dict(history_dropout=0.5), ValueError, "history_dropout=0.5 needs a seed, got None"),
        (dict(edge_weight=torch.zeros(3).long()), TypeError, "edge_weight must be a floating tensor, got torch.int64"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = dict(x=torch.zeros(20, 5), history=torch.zeros(40, 5)) | change
    with pytest.raises(error, match=message):
        functional.aggregate(arguments.pop("x"), make_batch(), **arguments)


def test_halo_rows_of_a_wrong_history_are_named():
    batch = make_batch()
    message = r"history must have 40 rows, one a node, got shape \[39, 5\]; staged rows of this batch would be "
    with pytest.raises(ValueError, match=f"{message}{batch.num_halo}, one a halo node"):
        functional.halo_rows(torch.zeros(39, 5), batch, torch.float32)


def test_dropout_probability_is_checked():
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\), got 1.0"):
        functional.dropout(torch.zeros(20, 5), make_batch(), 1.0, SEED)

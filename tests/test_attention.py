"""`functional.attention` and its op: values, gradients, masks, hubs, the Triton kernels, registration, bad input."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gas_triton as gas
from gas_triton import Batch, functional
from gas_triton.kernels import attention_cpu
from gas_triton.kernels.attention import attention as attention_op
from gas_triton.kernels.attention import attention_ref
from gas_triton.kernels.attention_cpu import attention_backward_cpu
from gas_triton.kernels.attention_cpu import attention_cpu as attention_on_cpu
from gas_triton.kernels.attention_triton import attention_backward_triton, attention_triton, tile
from gas_triton.kernels.dropout import keep_mask
from tests.blocks import UNIT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = torch.tensor([123_456_789_012_345])


def make_batch(num_nodes: int = 40, num_edges: int = 90, hub_edges: int = 512) -> Batch:
    """Directed, with nodes that no edge touches, and one node into which and one out of which many edges lead."""
    pairs = torch.randint(num_nodes - 3, (2, num_edges))
    into = torch.stack([torch.randint(num_nodes, (18,)), torch.full((18,), num_nodes // 8)])
    out_of = torch.stack([torch.full((18,), num_nodes // 6), torch.randint(num_nodes - 3, (18,))])
    graph = gas.Graph.from_edge_index(torch.cat([pairs, into, out_of], dim=1), num_nodes=num_nodes)
    parts = gas.contiguous_partition(graph, [num_nodes // 4] * 4)
    loader = gas.ClusterLoader(graph, parts, batch_size=2)
    loader._planner.hub_edges = hub_edges
    return loader.batch([0, 2])


def make_small_batch(hub_edges: int = 512) -> Batch:
    """For Triton's interpreter, which takes milliseconds for an edge."""
    return make_batch(16, 16, hub_edges)


class Inputs(NamedTuple):
    x: Tensor
    source: Tensor
    target: Tensor
    edge: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    def to(self, *args: Any) -> Inputs:
        return Inputs(*(None if t is None else t.detach().to(*args) for t in self))

    def requires_grad_(self) -> Inputs:
        for leaf in self.leaves():
            leaf.requires_grad_()
        return self


def make_inputs(batch: Batch, heads: int, width: int, has_edge: bool = False, num_rows: int | None = None) -> Inputs:
    rows = batch.num_nodes + batch.num_halo if num_rows is None else num_rows
    edge = torch.randn(batch.num_edges, heads, dtype=torch.float64) if has_edge else None
    x, source = torch.randn(rows, heads, width, dtype=torch.float64), torch.randn(rows, heads, dtype=torch.float64)
    return Inputs(x, source, torch.randn(batch.num_nodes, heads, dtype=torch.float64), edge)


def lists(batch: Batch, has_halo: bool = True) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(joint, transposed, hubs of the transpose) as the op takes them."""
    csr, (reverse, hubs) = batch.joint(has_halo), batch.joint_transposed(has_halo)
    return [t for t in csr if t is not None], list(reverse), hubs


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=draw).to(out.dtype)
    return list(torch.autograd.grad(out, leaves, cotangent))


def call(inputs: Inputs, batch: Batch, **options: Any) -> Tensor:
    x, source, target, edge = inputs
    return functional.attention(x, batch, source, target, edge_logit=edge, **options)


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("has_edge", [False, True])
@pytest.mark.parametrize("heads, width", [(1, 7), (3, 5), (8, 8)])
def test_output_and_gradients_are_those_of_plain_torch(
    heads: int, width: int, has_edge: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch()
    inputs = make_inputs(batch, heads, width, has_edge).requires_grad_()
    expected = attention_ref(*inputs, lists(batch)[0], 0.3, dropout, SEED)
    wanted = gradients(expected, inputs.leaves())
    # in one block, and in blocks that are shorter than the longest row
    for block in (attention_cpu.CPU_EDGES, 16):
        monkeypatch.setattr(attention_cpu, "CPU_EDGES", block)
        out = call(inputs, batch, negative_slope=0.3, dropout=dropout, seed=SEED)
        torch.testing.assert_close(out, expected)
        for ours, exact in zip(gradients(out, inputs.leaves()), wanted, strict=True):
            torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("has_edge", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout: float, has_edge: bool) -> None:
    batch = make_batch(20, 30)
    inputs = make_inputs(batch, 2, 3, has_edge).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *leaves: call(Inputs(*leaves, *[None] * (4 - len(leaves))), batch, dropout=dropout, seed=SEED),
        inputs.leaves(),
    )


@pytest.mark.parametrize("has_edge", [False, True])
def test_leaving_the_halo_out_is_attention_over_the_inner_edges(has_edge: bool) -> None:
    batch = make_batch()
    inputs = make_inputs(batch, 3, 4, has_edge).requires_grad_()
    x, source, target, edge = inputs
    num_rows, num_inner = batch.num_nodes, batch.inner.num_edges
    own = Inputs(x[:num_rows], source[:num_rows], target, None if edge is None else edge[:num_inner])
    expected = attention_ref(*own, list(batch.inner))
    wanted = gradients(expected, inputs.leaves())
    given = Inputs(own.x, own.source, target, edge)
    for arguments in (inputs, given):
        out = call(arguments, batch, halo="drop")
        torch.testing.assert_close(out, expected)
        for ours, exact in zip(gradients(out, inputs.leaves()), wanted, strict=True):
            torch.testing.assert_close(ours, exact)


def test_edges_of_no_weight() -> None:
    batch = make_small_batch(hub_edges=8)
    inputs = make_inputs(batch, 2, 3, has_edge=True)
    joint, _, _ = lists(batch)
    row = torch.repeat_interleave(torch.arange(batch.num_nodes), joint[0].diff().long())
    degree = joint[0].diff()
    emptied = int(degree.argmax())
    is_out = torch.rand(batch.num_edges) < 0.3
    is_out[joint[2]] |= row == emptied
    assert inputs.edge is not None
    inputs.edge[is_out] = -torch.inf
    inputs.requires_grad_()
    out = call(inputs, batch)
    kept = ~is_out[joint[2]]
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row[kept], minlength=batch.num_nodes)])
    expected = attention_ref(*inputs, [rowptr.cumsum(0), joint[1][kept], joint[2][kept]])
    torch.testing.assert_close(out, expected)
    assert not out[emptied].any()
    wanted = gradients(expected, inputs.leaves())
    for ours, exact in zip(gradients(out, inputs.leaves()), wanted, strict=True):
        torch.testing.assert_close(ours, exact)
    triton = run_triton(inputs.to(torch.float64), batch, 0.0)
    for ours, exact in zip(triton, [expected.detach(), *wanted], strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.filterwarnings("error")
def test_logits_far_from_zero_do_not_overflow() -> None:
    batch = make_small_batch()
    inputs = make_inputs(batch, 2, 4)
    inputs = inputs._replace(source=inputs.source * 1e4 + 1e6)
    expected = attention_ref(*inputs, lists(batch)[0])
    assert expected.isfinite().all()
    torch.testing.assert_close(call(inputs, batch), expected)
    torch.testing.assert_close(run_triton(inputs, batch, 0.0)[0], expected)


def test_rows_in_half_precision_are_accumulated_in_float32() -> None:
    batch = make_batch()
    for dtype in (torch.float16, torch.bfloat16):
        inputs = make_inputs(batch, 2, 5).to(dtype).requires_grad_()
        exact = inputs.to(torch.float64).requires_grad_()
        out, expected = call(inputs, batch), attention_ref(*exact, lists(batch)[0])
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=4 * UNIT[dtype], atol=4 * UNIT[dtype])
        wanted = gradients(expected, exact.leaves())
        for ours, other in zip(gradients(out, inputs.leaves()), wanted, strict=True):
            assert ours.dtype == dtype
            # <g, out> is taken of a rounded out
            torch.testing.assert_close(ours.double(), other, rtol=32 * UNIT[dtype], atol=32 * UNIT[dtype])


def test_strided_inputs_are_not_misread() -> None:
    batch = make_small_batch()
    x, source, target, edge = inputs = make_inputs(batch, 3, 4, has_edge=True)
    assert edge is not None
    strided = Inputs(
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        source.T.contiguous().T,
        target.T.contiguous().T,
        edge.T.contiguous().T,
    )
    torch.testing.assert_close(call(strided, batch), call(inputs, batch))
    for ours, exact in zip(run_triton(strided, batch, 0.0), run_triton(inputs, batch, 0.0), strict=True):
        assert torch.equal(ours, exact)
    # rows of a wider tensor are read in place
    wide = torch.cat([x, x], dim=1)[:, :3]
    assert torch.equal(run_triton(inputs._replace(x=wide), batch, 0.0)[0], run_triton(inputs, batch, 0.0)[0])


def test_same_input_same_bits() -> None:
    batch = make_batch(400, 8000)
    inputs = make_inputs(batch, 4, 8, has_edge=True).to(torch.float32).requires_grad_()
    results = []
    for _ in range(3):
        out = call(inputs, batch, dropout=0.3, seed=SEED)
        results.append([out, *gradients(out, inputs.leaves())])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_only_wanted_gradients_are_computed() -> None:
    batch = make_batch()
    inputs = make_inputs(batch, 2, 3, has_edge=True)
    every = inputs.to(torch.float64).requires_grad_()
    wanted = gradients(call(every, batch), every.leaves())
    for place, expected in enumerate(wanted):
        alone = inputs.to(torch.float64)
        leaf = alone[place].requires_grad_()
        out = call(alone, batch)
        torch.testing.assert_close(gradients(out, [leaf]), [expected])


# --- dropout ---------------------------------------------------------------------------------------------------------


def kept_edges(batch: Batch, heads: int, p: float, seed: Tensor) -> Tensor:
    """What the op kept, [num_edges, heads], read off weights of equal logits on rows that name their neighbour."""
    num_rows = batch.num_nodes + batch.num_halo
    x = torch.eye(num_rows, dtype=torch.float64)[:, None, :].expand(-1, heads, -1).contiguous()
    zero = torch.zeros(num_rows, heads, dtype=torch.float64)
    out = functional.attention(x, batch, zero, zero[: batch.num_nodes], dropout=p, seed=seed)
    joint, _, _ = lists(batch)
    row = torch.repeat_interleave(torch.arange(batch.num_nodes), joint[0].diff().long())
    kept = torch.empty(batch.num_edges, heads, dtype=torch.float64)
    kept[joint[2]] = out[row, :, joint[1].long()] * joint[0].diff()[row, None] * (1 - p)
    return kept


def test_the_mask_belongs_to_the_edge_and_the_head() -> None:
    pairs = torch.randperm(60 * 60)[:900]
    graph = gas.Graph.from_edge_index(torch.stack([pairs // 60, pairs % 60]), num_nodes=60)
    batch = gas.ClusterLoader(graph, gas.contiguous_partition(graph, [20] * 3), batch_size=2).batch([0, 2])
    mask = kept_edges(batch, 3, 0.3, SEED)
    torch.testing.assert_close(mask, keep_mask(torch.arange(batch.num_edges), 3, 0.3, SEED).double())
    draws = mask.numel()
    # six standard deviations of a binomial
    assert abs(float(mask.mean()) - 0.7) < 6 * (0.21 / draws) ** 0.5
    for a, b in ((mask[:, 0], mask[:, 1]), (mask[1:, 0], mask[:-1, 0])):
        assert abs(float((a * b).mean()) - 0.49) < 6 * (0.49 * 0.51 / a.numel()) ** 0.5
    assert not torch.equal(mask, kept_edges(batch, 3, 0.3, SEED + 1))


def test_dropped_output_is_right_on_average() -> None:
    batch = make_batch()
    inputs = make_inputs(batch, 2, 3)
    expected = call(inputs, batch)
    draws = torch.stack([call(inputs, batch, dropout=0.5, seed=torch.tensor([seed])) for seed in range(400)])
    error = (draws.mean(0) - expected).abs()
    assert (error <= 6 * draws.std(0) / 20 + 1e-12).all()


# --- the Triton kernels ----------------------------------------------------------------------------------------------


def run_triton(inputs: Inputs, batch: Batch, dropout: float, slope: float = 0.2) -> list[Tensor]:
    """The output and the gradients that `gradients` takes, from the kernels, on the CPU."""
    to = [None if t is None else t.detach().to(DEVICE) for t in inputs]
    joint, transposed, hubs_transposed = ([t.to(DEVICE) for t in part] for part in lists(batch))
    hubs, seed = [t.to(DEVICE) for t in batch.hubs], SEED.to(DEVICE) if dropout else None
    options = slope, dropout, seed, batch.hub_edges
    out, lse, positive, weight = attention_triton(*to, joint, transposed, hubs, hubs_transposed, *options)
    draw = torch.Generator().manual_seed(2)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=draw).to(out.dtype).to(DEVICE)
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    grad_x, grad_source, grad_edge = attention_backward_triton(
        grad, *to, lse, delta, transposed, hubs_transposed, *options, inputs.edge is not None
    )
    grad_target = (1 - slope) * ((grad.to(lse.dtype) * positive.to(lse.dtype)).sum(-1) - delta * weight)
    grads = [out, grad_x, grad_source, grad_target, *([] if inputs.edge is None else [grad_edge])]
    return [t.cpu() for t in grads]


def assert_kernels_are_exact(inputs: Inputs, batch: Batch, dropout: float = 0.0, scale: float = 16.0) -> None:
    exact = inputs.to(torch.float64).requires_grad_()
    expected = attention_ref(*exact, lists(batch)[0], 0.2, dropout, SEED)
    wanted = [expected, *gradients(expected, exact.leaves())]
    # 1 / (1 - p) is that of float32
    unit = max(UNIT[inputs.x.dtype], UNIT[torch.float32] if dropout else 0.0)
    for ours, other in zip(run_triton(inputs, batch, dropout), wanted, strict=True):
        # gradients of logits are differences of sums of products of size 1
        size = max(1.0 if other.dim() == 3 else inputs.x.size(2), float(other.detach().abs().max()))
        torch.testing.assert_close(ours.double(), other, rtol=scale * unit, atol=scale * unit * size)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("has_edge", [False, True])
@pytest.mark.parametrize("hub_edges", [512, 8])
def test_kernels_equal_float64(hub_edges: int, has_edge: bool, dropout: float) -> None:
    batch = make_small_batch(hub_edges)
    assert (len(batch.hubs) > 0) == (hub_edges == 8)
    assert_kernels_are_exact(make_inputs(batch, 3, 4, has_edge).to(torch.float32), batch, dropout)


@pytest.mark.parametrize(
    "heads, width, has_edge", [(1, 1, True), (8, 2, False), (1, 33, False), (1, 140, False), (1, 260, True)]
)
def test_kernels_take_any_width(heads: int, width: int, has_edge: bool) -> None:
    batch = make_small_batch(8)
    assert_kernels_are_exact(make_inputs(batch, heads, width, has_edge).to(torch.float32), batch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_kernels_take_every_dtype(dtype: torch.dtype) -> None:
    batch = make_small_batch(8)
    # Triton's interpreter truncates to bfloat16, and <g, out> is taken of a rounded out
    assert_kernels_are_exact(make_inputs(batch, 2, 8, True).to(dtype), batch, scale=16.0 if dtype.itemsize > 2 else 64)


def test_kernels_drop_the_edges_that_the_cpu_drops() -> None:
    batch = make_small_batch()
    x, source, target, _ = make_inputs(batch, 8, 2)
    ones = Inputs(torch.ones_like(x), torch.zeros_like(source), torch.zeros_like(target), None).to(torch.float32)
    out = call(ones, batch, dropout=0.5, seed=SEED)
    assert out.unique().numel() > 3
    torch.testing.assert_close(run_triton(ones, batch, 0.5)[0], out)


def test_a_row_of_positive_logits_has_no_gradient_of_its_own_logit(poison_empty: None) -> None:
    # a softmax does not see what all its logits share; every output is written, or there would be NaN
    for dtype in (torch.float32, torch.bfloat16):
        batch = make_small_batch(hub_edges=8)
        inputs = make_inputs(batch, 2, 4)
        inputs = inputs._replace(source=inputs.source.abs() + 1, target=inputs.target.abs()).to(dtype)
        out, _, _, grad_target = run_triton(inputs, batch, 0.0)
        assert grad_target.abs().max() < 1e-5
        assert out.isfinite().all()


def test_tiles_follow_the_alignment_of_heads() -> None:
    for itemsize, width, expected in (
        (4, 8, (8, 16)),
        (2, 8, (8, 32)),
        (4, 7, (8, 4)),
        (4, 100, (128, 1)),
        (4, 256, (128, 1)),
        (2, 1, (1, 32)),
        (2, 121, (128, 1)),
        (8, 2, (2, 32)),
    ):
        assert tile(width, itemsize) == expected


# --- no edges, registration, tracing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows, num_edges", [(0, 0), (5, 0)])
def test_no_rows_and_no_edges(num_rows: int, num_edges: int) -> None:
    rowptr, col = torch.zeros(num_rows + 1, dtype=torch.int32), torch.zeros(num_edges, dtype=torch.int32)
    x, logit = torch.randn(num_rows, 2, 3), torch.randn(num_rows, 2)
    transposed = [rowptr, col, col]
    for forward, backward in (
        (attention_on_cpu, attention_backward_cpu),
        (attention_triton, attention_backward_triton),
    ):
        options = 0.2, 0.0, None, 512
        out, lse, *_ = forward(x, logit, logit, None, [rowptr, col], transposed, [], [], *options)
        assert out.shape == x.shape
        assert not out.any()
        grads = backward(out, x, logit, logit, None, lse, lse, transposed, [], *options, False)
        assert grads[0].shape == x.shape
        assert not any(grad.any() for grad in grads)


def test_ops_are_registered_as_torch_library_wants() -> None:
    batch = make_small_batch(8)
    joint, transposed, hubs_transposed = lists(batch)
    for has_edge, dropout in ((False, 0.0), (True, 0.3)):
        inputs = make_inputs(batch, 2, 3, has_edge).to(torch.float32).requires_grad_()
        options = 0.2, dropout, SEED, 8
        arguments = (*inputs, joint, transposed, batch.hubs, hubs_transposed, *options)
        torch.library.opcheck(torch.ops.gas_triton.attention.default, arguments)
        if not has_edge:
            continue
        out, lse, *_ = attention_op(*arguments)
        grad, lse = torch.randn_like(out), lse.detach()
        backward = (grad, *inputs.to(torch.float32), lse, torch.randn_like(lse), transposed, hubs_transposed)
        torch.library.opcheck(torch.ops.gas_triton.attention_backward.default, (*backward, *options, has_edge))


def test_attention_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    batch = make_batch()
    inputs = make_inputs(batch, 2, 3, True).requires_grad_()

    def layer(*inputs: Tensor) -> Tensor:
        return call(Inputs(*inputs), batch, dropout=0.4, seed=SEED).square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [[out, *gradients(out, inputs.leaves())] for out in (layer(*inputs), compiled(*inputs))]
    torch.testing.assert_close(*results)


def test_without_gradient_nothing_is_kept_for_it() -> None:
    batch = make_batch()
    inputs = make_inputs(batch, 2, 3)
    joint, transposed, _ = lists(batch)
    for wanted in ([], transposed):
        _, *saved = attention_op(*inputs, joint, wanted, batch.hubs, [], 0.2, 0.0, None, 512)
        assert [t.numel() > 0 for t in saved] == [len(wanted) > 0] * 3


def test_a_second_derivative_is_refused() -> None:
    batch = make_batch()
    inputs = make_inputs(batch, 2, 3).requires_grad_()
    (grad,) = torch.autograd.grad(call(inputs, batch).square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(3, 2, 5)), ValueError, r"x has 3 rows, expected \d+ \(in-batch rows\) or \d+"),
        (dict(x=torch.zeros(37, 10)), ValueError, r"x must have shape \[rows, heads, features\], got \[37, 10\]"),
        (dict(x=torch.zeros(37, 2, 5).long()), TypeError, "x must be a floating tensor, got torch.int64"),
        (dict(x=None), TypeError, "x must be a floating tensor, got NoneType"),
        (dict(x=torch.zeros(20, 2, 5)), ValueError, "x has only the 20 in-batch rows, but the batch has .* halo rows"),
        (dict(source_logit=torch.zeros(20, 2)), ValueError, r"source_logit must have shape \[\d+, 2\], got \[20, 2\]"),
        (dict(target_logit=torch.zeros(20, 3)), ValueError, r"target_logit must have shape \[20, 2\], got \[20, 3\]"),
        (dict(target_logit=torch.zeros(20, 2).int()), TypeError, "target_logit must be a floating tensor"),
        (dict(edge_logit=torch.zeros(4, 2)), ValueError, r"edge_logit must have shape \[\d+, 2\], got \[4, 2\]"),
        (dict(dropout=1.0, seed=SEED), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (dict(dropout=0.5), ValueError, "dropout=0.5 needs a seed, got None"),
        (dict(halo="mirror"), ValueError, "halo must be 'read' or 'drop', got 'mirror'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = make_batch()
    rows = batch.num_nodes + batch.num_halo
    arguments: dict[str, Any] = dict(
        x=torch.zeros(rows, 2, 5), source_logit=torch.zeros(rows, 2), target_logit=torch.zeros(batch.num_nodes, 2)
    )
    arguments |= change
    with pytest.raises(error, match=message):
        functional.attention(arguments.pop("x"), batch, **arguments)


def test_another_device_is_named() -> None:
    batch = make_batch()
    inputs = make_inputs(batch, 2, 3)
    for name, moved in (
        ("x", inputs._replace(x=inputs.x.to("meta"))),
        ("target_logit", inputs._replace(target=inputs.target.to("meta"))),
    ):
        with pytest.raises(ValueError, match=f"{name} is on meta but the batch is on cpu"):
            call(moved, batch)

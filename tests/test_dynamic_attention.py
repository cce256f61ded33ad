"""`functional.dynamic_attention`: values, gradients, registration, and its Triton kernels against float64."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.kernels.dropout import keep_mask
from gas_triton.kernels.dynamic_attention import dynamic_attention_ref
from gas_triton.kernels.dynamic_attention_triton import (
    dynamic_attention_backward_triton,
    dynamic_attention_triton,
    tile,
)
from gas_triton.planner import Planner
from tests.blocks import UNIT
from tests.reference import Edges, random_edges

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = torch.tensor([123_456_789_012_345])
SCORES = ["dot", "gatv2"]


def make_batch(num_nodes: int = 24, num_edges: int = 60, hub_edges: int = 512, clusters: int = 2) -> Batch:
    """The first half of a directed graph with an in-hub, an out-hub and nodes without edges."""
    random = random_edges(num_nodes, num_edges).edge_index
    spread = torch.arange(num_nodes - 4)
    hubs = torch.cat([torch.stack([spread, spread * 0 + 2]), torch.stack([spread * 0 + 3, spread])], dim=1)
    pairs = torch.cat([random, hubs], dim=1)
    # no edge into the nodes 0 and 4
    graph = Edges(pairs[:, (pairs[1] != 0) & (pairs[1] != 4)], None, num_nodes).graph()
    last = num_nodes // clusters
    planner = Planner(graph, hub_edges)
    if clusters == 1:
        return planner.full()
    return planner.plan([0], [(0, last)], [(0, int(graph.rowptr[last]))])


class Inputs(NamedTuple):
    """What the function is given, as leaves."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    att: Tensor | None
    edge: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def to(self, *args: Any) -> "Inputs":
        """Copies of another dtype or on another device."""
        return Inputs(*(None if t is None else t.detach().to(*args).requires_grad_() for t in self))


def make_inputs(
    batch: Batch, score: str, heads: int = 3, width: int = 5, *, value: bool = True, edge: bool = False,
    halo: str = "read", dtype: torch.dtype = torch.float64,
) -> Inputs:  # fmt: skip
    rows = batch.num_nodes + (batch.num_halo if halo == "read" else 0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    return Inputs(
        draw(batch.num_nodes, heads, width), draw(rows, heads, width), draw(rows, heads, width) if value else None,
        draw(heads, width) if score == "gatv2" else None, draw(batch.num_edges, heads, width) if edge else None,
    )  # fmt: skip


def attend(inputs: Inputs, batch: Batch, score: str, **options: Any) -> Tensor:
    return functional.dynamic_attention(
        *inputs[:3], batch, score=score, att=inputs.att, edge=inputs.edge, **options
    )  # fmt: skip


def exact(inputs: Inputs, batch: Batch, score: str, dropout: float = 0.0, halo: str = "read") -> Tensor:
    """The meaning, from the two blocks of the batch: nothing of the joint plan is used."""
    inner, outer = batch.inner, batch.outer
    col = inner.col
    rowptr, order = inner.rowptr, torch.arange(inner.num_edges)
    if halo == "read":
        rows = torch.arange(batch.num_nodes)
        row = torch.cat([rows.repeat_interleave(csr.rowptr.diff().long()) for csr in (inner, outer)])
        order = row.sort(stable=True).indices
        col = torch.cat([inner.col, batch.outer_slot + batch.num_nodes])[order]
        rowptr = inner.rowptr + outer.rowptr
    seed = SEED if dropout else None
    return dynamic_attention_ref(*inputs, [rowptr, col], order, score, 0.2, dropout, seed)


def assert_same(out: Tensor, expected: Tensor, leaves: list[Tensor], wanted: list[Tensor], **tolerance: float) -> None:
    grad = torch.randn_like(expected)
    torch.testing.assert_close(out, expected, **tolerance)
    for got, want in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(got, want, **tolerance)


def assert_rounded(got: Tensor, want: Tensor, interpreted: bool = False) -> None:
    """Equal but for rounding: once to the dtype of the rows, and of the hundred terms of a sum in the accumulator's."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, want)
        return
    # a gradient passes through the rounded output; the interpreter truncates to bfloat16
    units = 8 if interpreted and got.dtype == torch.bfloat16 else 4
    bound = (units * UNIT[got.dtype] + 128 * UNIT[torch.float32]) * want.detach().abs().max()
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=float(bound))


# --- the function on a CPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halo", ["read", "drop"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("heads, width", [(1, 5), (8, 2)])
@pytest.mark.parametrize("score", SCORES)
def test_values_and_gradients(
    score: str, heads: int, width: int, value: bool, edge: bool, dropout: float, halo: str
) -> None:
    batch = make_batch()
    inputs = make_inputs(batch, score, heads, width, value=value, edge=edge, halo=halo)
    expected = exact(inputs, batch, score, dropout, halo)
    out = attend(inputs, batch, score, dropout=dropout, seed=SEED if dropout else None, halo=halo)
    leaves = inputs.leaves()
    assert_same(out, expected, leaves, leaves)
    degree = batch.inner.rowptr.diff() + (batch.outer.rowptr.diff() if halo == "read" else 0)
    assert (degree == 0).any()
    assert not out[degree == 0].any()


@pytest.mark.parametrize("score", SCORES)
def test_pieces_of_the_edges_join(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # rows begin, end and lie whole within a piece of 7 edges
    monkeypatch.setattr("gas_triton.kernels.dynamic_attention_cpu.PIECE", 7 * 15)
    batch = make_batch()
    inputs = make_inputs(batch, score, edge=True)
    assert_same(attend(inputs, batch, score), exact(inputs, batch, score), inputs.leaves(), inputs.leaves())


@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score: str, edge: bool) -> None:
    batch = make_batch(12, 20)
    inputs = make_inputs(batch, score, 2, 2, edge=edge)
    names = [name for name, tensor in inputs._asdict().items() if tensor is not None]

    def call(*leaves: Tensor) -> Tensor:
        given = inputs._replace(**dict(zip(names, leaves, strict=True)))
        return attend(given, batch, score, dropout=0.3, seed=SEED)

    assert torch.autograd.gradcheck(call, tuple(inputs.leaves()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_narrow_rows(score: str, dtype: torch.dtype) -> None:
    batch = make_batch()
    inputs = make_inputs(batch, score, edge=True, dtype=dtype)
    wide = inputs.to(torch.float64)
    out, expected = attend(inputs, batch, score), exact(wide, batch, score)
    grad = torch.randn(out.shape).to(dtype)
    results = [out, *torch.autograd.grad(out, inputs.leaves(), grad)]
    wanted = [expected, *torch.autograd.grad(expected, wide.leaves(), grad.double())]
    for got, want in zip(results, wanted, strict=True):
        assert got.dtype == dtype
        assert_rounded(got, want)


def test_large_logits_do_not_overflow() -> None:
    batch = make_batch()
    inputs = make_inputs(batch, "dot")
    scaled = inputs._replace(query=(inputs.query.detach() * 1e4).requires_grad_())
    out = attend(scaled, batch, "dot")
    assert torch.isfinite(out).all()
    assert_same(out, exact(scaled, batch, "dot"), scaled.leaves(), scaled.leaves())


def test_strided_rows() -> None:
    batch = make_batch()
    inputs = make_inputs(batch, "dot")
    both = torch.randn(batch.num_nodes + batch.num_halo, 3, 10, dtype=torch.float64)
    strided = Inputs(both[: batch.num_nodes, :, :5], both[..., :5], both[..., 5:], None, None)
    for name in ("query", "key", "value"):
        assert not getattr(strided, name).is_contiguous()
    expected = exact(Inputs(*(None if t is None else t.contiguous() for t in strided)), batch, "dot")
    torch.testing.assert_close(attend(strided, batch, "dot"), expected)
    assert inputs.query.is_contiguous()


def test_same_input_same_bits() -> None:
    batch = make_batch(200, 3000)
    for score in SCORES:
        inputs = make_inputs(batch, score, dtype=torch.float32)
        grad = torch.randn(batch.num_nodes, 3, 5)
        results = []
        for _ in range(2):
            out = attend(inputs, batch, score)
            results.append([out, *torch.autograd.grad(out, inputs.leaves(), grad)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_what_needs_it_gets_a_gradient() -> None:
    batch = make_batch()
    inputs = make_inputs(batch, "gatv2")
    query = inputs.query.detach()
    out = attend(inputs._replace(query=query), batch, "gatv2")
    out.sum().backward()
    assert query.grad is None
    assert inputs.key.grad is not None


def test_dropout_is_a_hash_of_edge_and_head() -> None:
    batch = make_batch(300, 6000)
    heads, p = 4, 0.3
    # equal logits and one-hot values: an output is the share of a row's edges that were kept
    query = torch.zeros(batch.num_nodes, heads, 1, dtype=torch.float64)
    value = torch.ones(batch.num_nodes + batch.num_halo, heads, 1, dtype=torch.float64)
    key = torch.zeros_like(value)

    def run(seed: int) -> Tensor:
        return functional.dynamic_attention(query, key, value, batch, dropout=p, seed=torch.tensor([seed]))[..., 0]

    mask = keep_mask(torch.arange(batch.num_edges), heads, p, torch.tensor([5])).double()
    rows = torch.arange(batch.num_nodes)
    row = torch.cat([rows.repeat_interleave(csr.rowptr.diff().long()) for csr in (batch.inner, batch.outer)])
    degree = torch.bincount(row, minlength=batch.num_nodes)
    kept = torch.zeros(batch.num_nodes, heads, dtype=torch.float64).index_add(0, row, mask)
    torch.testing.assert_close(run(5), kept / degree.clamp(min=1)[:, None] / (1 - p))
    # six standard deviations of a binomial, for every head
    bound = 6 * (p * (1 - p) / batch.num_edges) ** 0.5
    assert ((mask.mean(0) - (1 - p)).abs() < bound).all()
    assert not torch.equal(run(5), run(6))
    assert torch.equal(run(5), run(5))


@pytest.mark.parametrize("score, value, edge", [("dot", True, False), ("dot", False, True), ("gatv2", False, False)])
def test_ops_are_registered_as_torch_library_wants(score: str, value: bool, edge: bool) -> None:
    batch = make_batch(12, 20, hub_edges=8)
    inputs = make_inputs(batch, score, 2, 3, value=value, edge=edge, dtype=torch.float32)
    rowptr, col, edge_id = batch.joint()
    csr, hubs = batch.joint_transposed()
    plan = [rowptr, col], edge_id, batch.joint_hubs(), [csr.rowptr, csr.col], csr.edge_id, hubs
    options = score, 0.2, 0.3, SEED, 8
    ops = torch.ops.gas_triton
    torch.library.opcheck(ops.dynamic_attention.default, (*inputs, *plan, *options))
    detached = [None if tensor is None else tensor.detach() for tensor in inputs]
    out, lse = ops.dynamic_attention(*detached, *plan, *options)
    torch.library.opcheck(
        ops.dynamic_attention_backward.default, (torch.randn_like(out), *detached, out, lse, *plan, *options)
    )


@pytest.mark.parametrize("score", SCORES)
def test_it_compiles_into_one_graph(score: str) -> None:
    torch._dynamo.reset()
    batch = make_batch()
    inputs = make_inputs(batch, score, edge=True)
    compiled = torch.compile(
        lambda *given: attend(Inputs(*given), batch, score, dropout=0.2, seed=SEED), fullgraph=True, backend="aot_eager"
    )
    eager = attend(inputs, batch, score, dropout=0.2, seed=SEED)
    assert_same(compiled(*inputs), eager, inputs.leaves(), inputs.leaves())


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(score="cosine"), ValueError, "score must be one of dot, gatv2, got 'cosine'"),
        (dict(halo="skip"), ValueError, "halo must be 'read' or 'drop', got 'skip'"),
        (dict(dropout=1.0, seed=SEED), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (dict(dropout=0.5), ValueError, "dropout=0.5 needs a seed, got None"),
        (dict(query=torch.zeros(12, 3, 5).long()), TypeError, "query must be a floating tensor, got torch.int64"),
        (dict(query=torch.zeros(12, 15)), ValueError, r"query must have shape \[rows, heads, features\], got \[12, 15"),
        (dict(query=torch.zeros(11, 3, 5)), ValueError, r"query has 11 rows, expected 12 \(in-batch rows\)"),
        (
            dict(key=torch.zeros(12, 3, 5), value=None),
            ValueError,
            "key has only the 12 in-batch rows, but the batch has .* halo rows: give key all rows",
        ),
        (dict(key=torch.zeros(7, 3, 5), halo="drop", value=None), ValueError, r"key has 7 rows, expected 12 "),
        (dict(key=torch.zeros(12, 3, 4)), ValueError, r"key must have shape \[rows, 3, 5\], got \[12, 3, 4\]"),
        (dict(key=torch.zeros(12, 3, 5).double()), TypeError, "key is torch.float64 but query is torch.float32"),
        (dict(key=torch.zeros(12, 3, 5, device="meta")), ValueError, "key is on meta but the batch is on cpu"),
        (dict(value=torch.zeros(3, 3, 5)), ValueError, r"value has 3 rows but key has \d+"),
        (dict(edge=torch.zeros(4, 3, 5)), ValueError, r"edge has 4 rows, expected \d+, one an edge of the batch"),
        (dict(att=torch.zeros(3, 5)), ValueError, "att is for score='gatv2', got it with score='dot'"),
        (dict(score="gatv2"), TypeError, "score='gatv2' needs att, a floating tensor, got NoneType"),
        (dict(score="gatv2", att=torch.zeros(15)), ValueError, r"att must have shape \[3, 5\] .* got \[15\]"),
        (dict(score="gatv2", att=torch.zeros(3, 5, device="meta")), ValueError, "att is on meta but query is on cpu"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = make_batch()
    inputs = make_inputs(batch, "dot", dtype=torch.float32)
    given = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "batch": batch, **change}
    with pytest.raises(error, match=message):
        functional.dynamic_attention(**given)


# --- the Triton kernels ----------------------------------------------------------------------------------------------


def run_triton(
    inputs: Inputs, batch: Batch, score: str, grad: Tensor, dropout: float = 0.0, halo: str = "read"
) -> list[Tensor]:
    """The output and the gradients of all leaves, on the CPU."""
    batch = batch.to(DEVICE)
    has_halo = halo == "read"
    rowptr, col, edge_id = batch.joint(has_halo)
    csr, hubs = batch.joint_transposed(has_halo)
    plan = [rowptr, col], edge_id, batch.joint_hubs(has_halo), [csr.rowptr, csr.col], csr.edge_id, hubs
    options = score, 0.2, dropout, SEED.to(DEVICE) if dropout else None, batch.hub_edges
    given = [None if tensor is None else tensor.detach().to(DEVICE) for tensor in inputs]
    if given[4] is not None:
        given[4] = given[4][: col.numel()]
    out, lse = dynamic_attention_triton(*given, *plan, *options)
    grads = dynamic_attention_backward_triton(grad.to(DEVICE), *given, out, lse, *plan, *options)
    kept = [each for each, tensor in zip(grads, inputs, strict=True) if tensor is not None]
    return [each.cpu() for each in (out, *kept)]


def assert_kernels_agree(inputs: Inputs, batch: Batch, score: str, dropout: float = 0.0, halo: str = "read") -> None:
    dtype = inputs.query.dtype
    wide = inputs.to(torch.float64)
    expected = exact(wide, batch, score, dropout, halo)
    grad = torch.randn(expected.shape).to(dtype)
    wanted = [expected, *torch.autograd.grad(expected, wide.leaves(), grad.double())]
    if inputs.edge is not None and halo == "drop":
        wanted[-1] = wanted[-1][: batch.inner.num_edges]
    results = run_triton(inputs, batch, score, grad, dropout, halo)
    for got, want in zip(results, wanted, strict=True):
        assert got.dtype == dtype
        assert_rounded(got, want, interpreted=DEVICE.type == "cpu")


@pytest.mark.parametrize(
    "hub_edges, options",
    [
        (512, {"value": False}),
        (512, {"edge": True, "dropout": 0.4}),
        (6, {"edge": True, "value": False}),
        (6, {"dropout": 0.4, "halo": "drop"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("score", SCORES)
def test_kernels(score: str, hub_edges: int, options: dict[str, Any], poison_empty: None) -> None:
    batch = make_batch(14, 20, hub_edges)
    assert (len(batch.hubs) > 0) == (hub_edges == 6)
    of_kernel = {name: options[name] for name in ("dropout", "halo") if name in options}
    of_inputs = {name: options[name] for name in options if name != "dropout"}
    assert_kernels_agree(make_inputs(batch, score, 2, 3, **of_inputs), batch, score, **of_kernel)


@pytest.mark.parametrize("heads, width", [(1, 1), (1, 140), (3, 9), (8, 4)])
@pytest.mark.parametrize("score", SCORES)
def test_kernels_of_every_shape(score: str, heads: int, width: int) -> None:
    batch = make_batch(8, 8)
    assert_kernels_agree(make_inputs(batch, score, heads, width), batch, score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES)
def test_kernels_of_every_dtype(score: str, dtype: torch.dtype) -> None:
    batch = make_batch(10, 10, hub_edges=6)
    assert_kernels_agree(make_inputs(batch, score, 2, 3, dtype=dtype), batch, score)


def test_kernels_without_edges() -> None:
    graph = random_edges(num_nodes=5, num_edges=0).graph()
    batch = Planner(graph).full()
    for score in SCORES:
        inputs = make_inputs(batch, score, edge=True)
        assert_kernels_agree(inputs, batch, score)
        assert not attend(inputs, batch, score).any()


def test_a_tile_is_a_warp_of_16_byte_vectors_or_one_whole_head() -> None:
    for itemsize in (2, 4, 8):
        for heads, width in ((1, 1), (1, 100), (8, 16), (3, 64), (2, 512)):
            rows, block_h, block_d = tile(heads, width, itemsize)
            assert block_d >= width
            assert rows * block_h * block_d * itemsize == max(32 * 16, block_d * itemsize)

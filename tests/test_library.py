"""Registration of ops."""

import pytest
import torch

from gas_triton.kernels._library import define


class _NoGradient(torch.autograd.Function):
    """Identity that gives no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.fixture(scope="module")
def twice():
    """`x -> (2 x, 3 x)` with a gradient for the first, and the gradients that its backward got."""
    got = []

    def both(x):
        return 2 * x, 3 * x

    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])

    def backward(ctx, *grads):
        got.append(grads)
        return 2 * grads[0]

    op = define(
        "twice_for_a_test(Tensor x) -> (Tensor, Tensor)", cpu=both, cuda=both, fake=both, setup_context=setup_context,
        backward=lambda ctx, *grads: (backward(ctx, *grads),),
    )  # fmt: skip
    return op, got


def test_no_zeros_are_made_for_outputs_without_a_gradient(twice):
    op, got = twice
    x = torch.tensor([1.0, -4.0], requires_grad=True)
    (op(x)[0] * torch.tensor([5.0, 7.0])).sum().backward()
    assert x.grad.tolist() == [10.0, 14.0]
    assert got[-1][1] is None


def test_no_gradient_gives_none_back(twice):
    op, got = twice
    got.clear()
    x = torch.tensor([1.0, -4.0], requires_grad=True)
    y = torch.tensor([3.0, 2.0], requires_grad=True)
    (_NoGradient.apply(op(x)[0]) + y).sum().backward()
    assert x.grad is None
    assert y.grad.tolist() == [1.0, 1.0]
    assert got == []

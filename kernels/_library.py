"""What every op has: a registration with torch.library, and a dtype in which it accumulates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library("gas_triton", "DEF")


def accumulator_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines `gas_triton::<schema>` and returns what calls it; only the first output can have a gradient.

    `Library.define` and `impl` cost about a quarter of `torch.library.custom_op` for each call, and a layer call
    crosses this boundary once. In eager mode the gradient is an `autograd.Function` around the op, a third of the cost
    of the one that `register_autograd` makes; a traced model gets the registered one, of the same two functions.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    qualified = f"gas_triton::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    op = getattr(torch.ops.gas_triton, name).default
    if backward is None or setup_context is None:
        return op
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)

    def forward(ctx: Any, *inputs: Any) -> Any:
        # straight to the device's implementation: the gradient registered for traced models is not wanted here
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        setup_context(ctx, inputs, output)
        # or zeros of the size of every other output would be written for each backward
        ctx.set_materialize_grads(False)
        return output

    @once_differentiable
    def flat_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        # `autograd.Function` wants one gradient for a list argument, `register_autograd` a list of them
        return tuple(None if isinstance(grad, list) else grad for grad in backward(ctx, *grads))

    function: Any = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(flat_backward)}
    )

    def call(*inputs: Any) -> Any:
        is_plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        return op(*inputs) if is_plain else function.apply(*inputs)

    return call

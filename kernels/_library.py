"""Registration of an op with torch.library: one implementation a device, shapes for tracing, a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("gas_triton", "DEF")


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Defines `gas_triton::<schema>` and returns the op.

    `Library.define` and `impl` cost about a quarter of `torch.library.custom_op` for each call, and a layer call crosses
    this boundary once.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    qualified = f"gas_triton::{name}"
    if fake is not None:
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.gas_triton, name).default

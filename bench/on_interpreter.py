"""Runs what only a GPU runs, on a machine without one: every op's Triton launcher, on CPU tensors, in the interpreter.

    with on_interpreter():
        model(batch.x, batch).sum().backward()        # GPU code path: launchers, Triton kernels, Triton gradients

Every op of `gas_triton` has one implementation for CPU tensors and one for CUDA tensors. Inside the block CPU tensors
go to the CUDA one, whose kernels Triton then interprets: a training step, a benchmark or a check runs the code that a
GPU would run, at sizes of a few hundred rows (a program of a kernel takes about a millisecond). TRITON_INTERPRET=1 has
to be set before `gas_triton` is imported, because Triton looks at it when a kernel is defined.

What stays the CPU's: torch's own ops and generators, and copies between host and device; there are no streams. Triton's
interpreter cuts bfloat16 rows off where a kernel leaves rounding to Triton, which a GPU does not.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton

from gas_triton.history import device
from gas_triton.kernels.pull import _pull_kernel, gather_triton

_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@contextmanager
def on_interpreter() -> Iterator[None]:
    """Sends CPU tensors to the implementation that every `gas_triton` op has for CUDA tensors.

    May be nested. Histories gather their rows with the Triton kernel too, and prefetch and look for rows that are not
    finite as on a GPU, one whose streams are done at once.

    Raises:
        RuntimeError: TRITON_INTERPRET was not set when `gas_triton` was imported.
    """
    if isinstance(_pull_kernel, triton.JITFunction):
        raise RuntimeError("on_interpreter needs TRITON_INTERPRET=1 in the environment before gas_triton is imported")
    library = torch.library.Library("gas_triton", "IMPL")
    try:
        with warnings.catch_warnings():
            # torch warns that the second implementation takes the place of the first, which is what is wanted
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name in op_names():
                library.impl(name, _launcher(name), "CPU", allow_override=True)
        # rows fetched ahead are copied by a function that asks where they are: on a GPU it is the kernel
        gather = patch.object(device, "gather_rows", gather_triton)
        # histories never ask a GPU for a number and wait for it, as they do on a CPU
        schedule = patch.object(device.Inline, "concurrent", True)
        with gather, schedule:
            yield
    finally:
        # the implementations from before are in force again
        library._destroy()


def op_names() -> list[str]:
    """Names of the ops that `gas_triton` registers for CUDA tensors."""
    prefix = "gas_triton::"
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    return sorted(name.removeprefix(prefix) for name in registered if name.startswith(prefix))


def _launcher(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.gas_triton, name).default
    return lambda *args, **options: op.redispatch(_CUDA, *args, **options)


def main() -> None:
    """python -m bench.on_interpreter MODULE [ARGUMENTS]: runs a module as `python -m MODULE` does, in the block."""
    parser = argparse.ArgumentParser(prog="python -m bench.on_interpreter", description=main.__doc__)
    parser.add_argument("module", help="for example bench.bench_aggregate")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the module is given")
    chosen = parser.parse_args()
    sys.argv = [chosen.module, *chosen.arguments]
    with on_interpreter():
        runpy.run_module(chosen.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

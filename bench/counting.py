"""Counts what a piece of work asks of a device, without one: waits of the host, launches, memory, bytes.

Everything runs on CPU tensors, so a tensor is taken for one of the host if it would be there on a machine with a GPU
too: it comes from a function that was given no device, or "cpu" by name (`torch.tensor(spans)`, Adam's step counts), or
from such tensors alone. All others stand for tensors of the device.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from triton.runtime.interpreter import InterpretedFunction

_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_FACTORIES = {
    getattr(torch, name)
    for name in ("arange", "as_tensor", "empty", "eye", "from_numpy", "full", "linspace", "ones", "rand", "randint",
                 "randn", "randperm", "tensor", "zeros")
}  # fmt: skip
# what gives the host a tensor's values, and shows to torch functions only, as on a CPU there is nothing to do
_TO_HOST = ("tolist", "numpy", "cpu", "__array__")
# ops whose result, or its size, the host has to know
_BY_VALUE = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount")
# ops that give memory or another view of it, and launch nothing
_NO_KERNEL = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh",
    "_local_scalar_dense",
)  # fmt: skip
_READ_ROWS = ("index_select", "index", "gather", "embedding")
_WRITE_ROWS = ("index_put_", "index_copy_", "index_add_", "index_fill_", "_index_put_impl_")
_WRITE_ONLY = ("copy_", "fill_", "zero_", "random_", "bernoulli_")
# a table that a Triton kernel reads or writes at some rows, and the arguments that may say which
_TABLES = ("p_table", "p_scale", "p_last_push")
_TABLE_ROWS = ("p_outer_col", "p_col", "p_ids")


@dataclass
class Phase:
    """What part of the work asked for.

    Attributes:
        triton: launches of each Triton kernel.
        torch: calls of each op of torch's that launches at least one kernel on a GPU.
        tensors: how many were allocated on the device.
        nbytes: their bytes together.
        touched: bytes of all tensors that launches and calls were given and gave; of tables, of the rows used.
    """

    triton: Counter[str] = field(default_factory=Counter)
    torch: Counter[str] = field(default_factory=Counter)
    tensors: int = 0
    nbytes: int = 0
    touched: int = 0


class Waits:
    """Lists the calls for which the host would wait for a device: it reads from there, or copies there from its memory.

        with Waits() as waits:
            loss(model).backward()
        assert waits.calls == []

    Ops of `gas_triton` are looked into only by `Counted`: on the CPU they do other things than on a GPU.

    Args:
        host: tensors made before that are in host memory.

    Attributes:
        calls: name of each call that waits, and the function that makes it.
    """

    def __init__(self, host: Iterable[Tensor] = ()) -> None:
        self.calls: list[str] = []
        self._on_host = WeakIdKeyDictionary()
        for tensor in host:
            self._on_host[tensor.untyped_storage()] = True
        self._modes = ExitStack()
        self._makes_host = False
        # within what a GPU does in another way
        self._ignores = False

    def __enter__(self) -> Any:
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Ops(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for one in host memory."""
        return tensor.untyped_storage() in self._on_host

    def put_on_host(self, value: Any) -> None:
        for tensor in _tensors(value):
            self._on_host[tensor.untyped_storage()] = True

    def run(self, mode: _Ops, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls an op, and notes it."""
        if self._ignores or func.namespace == "gas_triton":
            with self._ignoring():
                return func(*args, **kwargs)
        given = _tensors((args, kwargs))
        all_on_host = self._makes_host or (len(given) > 0 and all(map(self.is_on_host, given)))
        if not all_on_host and self._is_wait(func, args, kwargs):
            self.wait(func.overloadpacket.__name__)
        before = {id(tensor.untyped_storage()) for tensor in given}
        out = func(*args, **kwargs)
        made = _tensors(out)
        if all_on_host:
            self.put_on_host(made)
        else:
            self.note(func, args, given, made, before)
        return out

    def note(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor], before: set[int]) -> None:
        """Told of an op on the device; `before` are the storages it was given."""

    def wait(self, name: str) -> None:
        if not self._ignores:
            self.calls.append(f"{name} in {_caller()}")

    @contextmanager
    def _ignoring(self) -> Iterator[None]:
        before, self._ignores = self._ignores, True
        try:
            yield
        finally:
            self._ignores = before

    def _is_wait(self, func: Any, args: Any, kwargs: Any) -> bool:
        name = func.overloadpacket.__name__
        if name == "copy_":
            is_late = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            return is_late and args[1].numel() > 0 and self.is_on_host(args[0]) != self.is_on_host(args[1])
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        return name in _BY_VALUE or name.startswith(("unique", "_unique")) or unsized or masked


class Counted(Waits):
    """Counts launches, tensors and bytes too, and looks into the ops of `gas_triton`; within `on_interpreter`.

        with on_interpreter(), Counted() as counted:
            with counted.phase("forward"):
                out = model(batch.x, batch)

    Allocated and touched bytes are those that torch's ops and our launchers ask for: temporaries within an op of
    torch's are not seen, nor what an op would do otherwise on a GPU (its dropout is one kernel there, here four).

    Attributes:
        phases: what each part asked for; work outside of all is not counted.
        peak: the most bytes allocated at once beyond those that were when the first part began.
        places: for each op or kernel the functions that asked for it.
    """

    def __init__(self, host: Iterable[Tensor] = ()) -> None:
        super().__init__(host)
        self.phases: dict[str, Phase] = {}
        self.peak = 0
        self.places: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._live = 0
        self._phase: Phase | None = None

    def __enter__(self) -> Counted:
        run = InterpretedFunction.run

        def launch(kernel: Any, *args: Any, **options: Any) -> Any:
            with self._ignoring():
                self._launch(kernel, args, options)
                return run(kernel, *args, **options)

        # memory is freed when its last user goes, not when the collector happens to come by
        gc.collect()
        if gc.isenabled():
            gc.disable()
            self._modes.callback(gc.enable)
        self._modes.enter_context(patch.object(InterpretedFunction, "run", launch))
        return super().__enter__()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block as a part of the work; a part may have several blocks."""
        if not self.phases:
            # what is left of work before does not count
            self._live = 0
        before, self._phase = self._phase, self.phases.setdefault(name, Phase())
        try:
            yield
        finally:
            self._phase = before

    def run(self, mode: _Ops, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "gas_triton" and not self._ignores:
            with mode:
                return func.redispatch(_CUDA, *args, **kwargs)
        return super().run(mode, func, args, kwargs)

    def wait(self, name: str) -> None:
        if self._phase is not None:
            super().wait(name)

    def note(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor], before: set[int]) -> None:
        phase, name = self._phase, func.overloadpacket.__name__
        fresh = [tensor for tensor in made if id(tensor.untyped_storage()) not in before]
        for tensor in fresh:
            self._allocate(tensor)
        writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in _arguments(func))
        is_kernel = name not in _NO_KERNEL and (writes or len(fresh) > 0)
        # of an op that writes its arguments and returns nothing, those are what it makes
        if phase is None or not is_kernel or not any(tensor.numel() for tensor in made or given):
            return
        phase.torch[name] += 1
        self.places[name][_caller()] += 1
        phase.touched += _touched_by_op(name, args, given, made)

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes == 0:
            return
        if self._phase is not None:
            self._phase.tensors += 1
            self._phase.nbytes += nbytes
        self._live += nbytes
        self.peak = max(self.peak, self._live) if self.phases else 0
        weakref.finalize(storage, self._free, nbytes).atexit = False

    def _free(self, nbytes: int) -> None:
        self._live -= nbytes

    def _launch(self, kernel: Any, args: Any, options: Any) -> None:
        if self._phase is None:
            return
        name = kernel.fn.__name__
        self._phase.triton[name] += 1
        self.places[name][_caller("gas_triton.kernels")] += 1
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        self._phase.touched += _touched_by_kernel(given)


class _Functions(TorchFunctionMode):
    """Tells of calls that do not show as ops."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, waits = kwargs or {}, self.waits
        name = getattr(func, "__name__", "")
        if func is Tensor.backward:
            # in the mode: gradients are made of calls too
            with self:
                return torch.autograd.backward(args[0], kwargs.pop("gradient", None), **kwargs)
        if name in _TO_HOST and not waits.is_on_host(args[0]):
            waits.wait(name)
        to_host = name == "to" and "cpu" in (args[1:2] or (kwargs.get("device"),)) and not waits.is_on_host(args[0])
        if to_host and not kwargs.get("non_blocking", False):
            waits.wait("to")
        is_copied = func in (torch.tensor, torch.as_tensor) and not _tensors(args)
        if is_copied and kwargs.get("device") not in (None, "cpu"):
            # numbers of the host, or an array
            waits.wait(name)
        is_of_host = func in _FACTORIES and kwargs.get("device") in (None, "cpu") and not _tensors(args)
        waits._makes_host, before = is_of_host, waits._makes_host
        try:
            out = func(*args, **kwargs)
        finally:
            waits._makes_host = before
        if is_of_host or (to_host and out is not args[0]):
            waits.put_on_host(out)
        return out


class _Ops(TorchDispatchMode):
    """Tells of ops."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.waits.run(self, func, args, kwargs or {})


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _arguments(func: Any) -> Any:
    return func._schema.arguments


def _nbytes(tensor: Tensor) -> int:
    # an expanded tensor is smaller than it looks
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _row_nbytes(table: Tensor) -> int:
    return table.nbytes // max(table.size(0), 1) if table.dim() else table.nbytes


def _touched_by_op(name: str, args: Any, given: list[Tensor], made: list[Tensor]) -> int:
    first = given[0] if given else None
    if name in _READ_ROWS:
        return sum(map(_nbytes, given[1:])) + 2 * sum(map(_nbytes, made))
    if name in _WRITE_ROWS and first is not None:
        return sum(map(_nbytes, given[1:])) + given[1].numel() * _row_nbytes(first)
    if name in _WRITE_ONLY:
        return sum(map(_nbytes, given[1:])) + sum(map(_nbytes, made))
    return sum(map(_nbytes, given)) + sum(map(_nbytes, made))


def _touched_by_kernel(given: dict[str, Any]) -> int:
    rows = next((given[name] for name in _TABLE_ROWS if isinstance(given.get(name), Tensor)), None)
    # what the same memory is given as twice is moved once
    nbytes: dict[tuple[int, int], int] = {}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            continue
        is_table = name in _TABLES or (name == "p_rows" and given.get("SCATTER"))
        moved = _nbytes(tensor)
        if is_table and rows is not None:
            moved = min(moved, rows.unique().numel() * _row_nbytes(tensor))
        nbytes.setdefault((tensor.data_ptr(), tensor.nbytes), moved)
    return sum(nbytes.values())


def _caller(besides: str = __name__) -> str:
    """The innermost function that is not torch's, Triton's, of this module or of the package `besides`."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        is_other = module.split(".")[0] in ("torch", "triton", "unittest", "contextlib", "numpy")
        if not is_other and module != __name__ and not module.startswith(besides):
            return f"{module.removeprefix('gas_triton.')}.{frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"

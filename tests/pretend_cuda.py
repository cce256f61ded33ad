"""A pretended GPU: tensors of `cuda:0` whose values lie on the CPU, which refuse to mix with those of the CPU.

What a CUDA build of torch refuses shows without a GPU: an op that is given tensors of two devices, a generator of the
wrong one, a NumPy view of a tensor of the device. Ops of `gas_triton` run their CPU implementation.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# ops that take a tensor of the host beside one of the device
_BOTH = ("copy_", "_to_copy", "is_pinned", "pin_memory", "_pin_memory", "set_", "detach", "alias")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class PretendedTensor(Tensor):
    """A tensor of the device; `elem` has its values."""

    elem: Tensor

    @staticmethod
    def __new__(cls: Any, elem: Tensor) -> Any:
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device="meta",
        )  # fmt: skip
        found.elem = elem
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        return self.elem.tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass

    def is_pinned(self, *arguments: Any) -> bool:
        return False

    def __deepcopy__(self, memo: Any) -> Any:
        with torch.no_grad():
            copied: Any = self.detach().clone()
        copied = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        return memo.setdefault(id(self), copied)

    def __repr__(self, **options: Any) -> str:
        return f"pretended {self.elem!r}"


def _is_there(tensor: Tensor) -> bool:
    return isinstance(tensor, PretendedTensor)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    name, wanted = func.overloadpacket.__name__, kwargs.get("device")
    there = any(map(_is_there, given))
    if wanted is not None:
        there = wanted.type in ("cuda", "meta")
        kwargs = {**kwargs, "device": CPU}
    if name == "is_pinned":
        return True
    if name in ("pin_memory", "_pin_memory"):
        assert not there, "cannot pin a tensor of the device"
        return args[0].clone()
    if kwargs.get("pin_memory"):
        assert not there, "only dense CPU tensors can be pinned"
        kwargs = {**kwargs, "pin_memory": False}
    if func.namespace != "gas_triton" and name not in _BOTH:
        _refuse_mixed(name, args, given)
    arguments, options = tree_map(lambda leaf: leaf.elem if isinstance(leaf, PretendedTensor) else leaf, (args, kwargs))
    if name == "copy_":
        there = _is_there(args[0])
    out = func(*arguments, **options)
    known = {id(tensor.elem): tensor for tensor in given if isinstance(tensor, PretendedTensor)}

    def back(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) in known:
            return known[id(leaf)]
        if (
            isinstance(leaf, Tensor)
            and leaf.layout == torch.strided
            and there
            and not any(leaf is tensor for tensor in given)
        ):
            return PretendedTensor(leaf)
        return leaf

    return tree_map(back, out)


def _refuse_mixed(name: str, args: Any, given: list[Tensor]) -> None:
    if name in _INDEXED:
        # indices may be the host's, of a tensor of the device; values of one element too
        if not _is_there(args[0]):
            assert not any(map(_is_there, given)), f"{name}: indices of the device into a tensor of the host"
        return
    # a sparse tensor is never wrapped
    given = [tensor for tensor in given if tensor.layout == torch.strided]
    there = [tensor for tensor in given if _is_there(tensor)]
    here = [tensor for tensor in given if not _is_there(tensor) and tensor.dim() > 0]
    if name in (
        "index_select",
        "gather",
        "embedding",
        "searchsorted",
        "bucketize",
        "cat",
        "index_add_",
        "scatter_add_",
    ):
        here = [tensor for tensor in given if not _is_there(tensor)]
    shapes = [list(tensor.shape) for tensor in here]
    assert not there or not here, f"{name}: tensors of the device and of the host, {shapes}"


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if isinstance(generator, _Generator):
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            there = (
                torch.device(kwargs["device"] or "cpu").type == "cuda"
                if "device" in kwargs
                else any(map(_is_there, given))
            )
            assert (generator.device.type == "cuda") == there, f"{func.__name__}: a generator of {generator.device}"
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "cuda":
            if isinstance(args[0], Tensor):
                return args[0].to(device)
            return PretendedTensor(func(*args, **{**kwargs, "device": CPU}))
        if func is torch.sparse.mm:
            if len(args) > 2 or (args[1].requires_grad and torch.is_grad_enabled()):
                raise NotImplementedError("not pretended")
            return PretendedTensor(func(args[0], args[1].detach().elem))
        if func is Tensor.to:
            # torch would ask the driver for the device
            found = [leaf for leaf in (*args[1:2], kwargs.get("device")) if isinstance(leaf, str | torch.device)]
            if found and torch.device(found[0]).type == "cuda":
                dtypes = [leaf for leaf in (*args[1:], kwargs.get("dtype")) if isinstance(leaf, torch.dtype)]
                dtype = dtypes[0] if dtypes else args[0].dtype
                is_same = _is_there(args[0]) and dtype == args[0].dtype and not kwargs.get("copy")
                return args[0] if is_same else torch.ops.aten._to_copy(args[0], device=CUDA, dtype=dtype)
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        found = super().__new__(cls)
        found.where = torch.device(device)  # type: ignore[attr-defined]
        return found

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA if self.where.type == "cuda" else CPU  # type: ignore[attr-defined]


class _Stream:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.is_timed, self.at = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        assert self.is_timed, "events without timing"
        return 1e3 * max(end.at - self.at, 1e-7)


def _gather(table: Tensor, ids: Tensor, out: Tensor, num_programs: int = 0) -> None:
    assert _is_there(ids), "ids of a kernel are the device's"
    values = table.elem if isinstance(table, PretendedTensor) else table
    out.copy_(values.index_select(0, ids.elem))  # type: ignore[attr-defined]


@contextlib.contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """Within, `torch.device("cuda")` works in eager mode; gives it."""
    stream, current = _Stream(), SimpleNamespace(mode=0)
    calls: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "synchronize": lambda *_: None, "Event": _Event,
        "Stream": _Stream, "current_stream": lambda *_: stream, "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(), "device_of": lambda *_: contextlib.nullcontext(),
        "get_device_properties": lambda *_: SimpleNamespace(L2_cache_size=1 << 16, name="pretended"),
        "get_device_name": lambda *_: "pretended", "device_count": lambda: 1, "current_device": lambda: 0,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 1 << 20, "empty_cache": lambda: None,
        "memory_reserved": lambda *_: 0, "reset_peak_memory_stats": lambda *_: None, "is_initialized": lambda: True,
        "mem_get_info": lambda *_: (1 << 34, 1 << 34), "get_sync_debug_mode": lambda: current.mode,
        "set_sync_debug_mode": lambda mode: None, "manual_seed": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
    }  # fmt: skip
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        # what a parameter wraps cannot be changed
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        for name, value in calls.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        stack.enter_context(patch("gas_triton.kernels.pull.gather_triton", _gather))
        stack.enter_context(patch("gas_triton.history.cuda._cuda_view", lambda tensor, device: PretendedTensor(tensor)))
        stack.enter_context(_Functions())
        stack.enter_context(_Mode())
        yield torch.device("cuda")

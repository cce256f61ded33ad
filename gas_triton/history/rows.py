"""`StoredRows`: the memory of a history, on the device, on the host or in files, and how it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gas_triton.functional.rows import FLOATS
from gas_triton.history.device import device_of
from gas_triton.history.tiers import FileMemory, HostMemory, TableFolder

DTYPES = (*FLOATS, torch.int8)


class StoredRows:
    """Rows [N, D] of any dtype in one of the tiers, with the times when they were pushed.

    See `HistoryStore`, which pushes and pulls them.
    """

    def __init__(
        self, num_rows: int, dim: int, dtype: torch.dtype, device: torch.device, name: str, tier: str, in_place: bool,
        folder: TableFolder | None,
    ) -> None:  # fmt: skip
        if num_rows < 1 or dim < 1:
            raise ValueError(f"{name}: a history needs at least one row and one feature, got [{num_rows}, {dim}]")
        if dtype not in DTYPES:
            raise TypeError(f"{name}: dtype must be float32, bfloat16, float16, float64 or int8, got {dtype}")
        if tier not in ("device", "pinned", "file"):
            raise ValueError(f"{name}: tier must be 'device', 'pinned' or 'file', got {tier!r}")
        if in_place and tier == "file":
            raise ValueError(f"{name}: in_place=True needs tier 'device' or 'pinned', got 'file'")
        if (folder is None) == (tier == "file"):
            raise ValueError(f"{name}: tier 'file' needs a folder, and no other tier has one")
        self.name, self.tier, self.in_place = name, tier, in_place or tier == "device"
        self.device, self.engine = device, device_of(device)
        self.row_order: str | None = None
        # how often all rows were replaced, which makes rows fetched ahead worthless
        self.resets = 0
        self._folder = folder
        self._memory: dict[str, HostMemory | FileMemory] = {}
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"table": ((num_rows, dim), dtype)}
        if dtype == torch.int8:
            tensors["scale"] = ((num_rows,), torch.float32)
        home = device if tier == "device" else torch.device("cpu")
        self.clock = torch.zeros((), dtype=torch.int64, device=home)
        if tier == "device":
            self._tensors = {key: torch.zeros(shape, dtype=kind, device=home) for key, (shape, kind) in tensors.items()}
            self.last_push = torch.full((num_rows,), -1, dtype=torch.int32, device=home)
        else:
            tensors["last_push"] = ((num_rows,), torch.int32)
            if folder is None:
                self._memory = {key: HostMemory(shape, kind) for key, (shape, kind) in tensors.items()}
            else:
                about = {"num_rows": num_rows, "dim": dim, "dtype": str(dtype)}
                self._memory.update(folder.create(name, tensors, about))
            self._tensors = {key: memory.tensor for key, memory in self._memory.items() if key != "last_push"}
            self.last_push = self._memory["last_push"].tensor
            self._restore()
        # of a row as it is stored, its scale included
        self.row_bytes = sum(t[0].nbytes for t in self._tensors.values())
        self._map()

    def _restore(self) -> None:
        """Takes over what the files hold, or begins with rows that were never pushed."""
        folder = self._folder
        state = None if folder is None else folder.read_state(self.name)
        if state is not None:
            self.clock.fill_(state["clock"])
            self.row_order = state["row_order"]
            return
        if folder is not None and self.name in folder.reopened:
            warnings.warn(
                f"{self.name}: the table in {folder.path} changed after it was last flushed, as when a process is "
                "killed, and starts from rows that were never pushed",
                stacklevel=2,
            )
            for tensor in self._tensors.values():
                tensor.zero_()
        self.last_push.fill_(-1)

    def _map(self) -> None:
        # what kernels of the device read the table by
        self._seen = {
            key: self.engine.map(self._memory[key]) if self._memory else tensor for key, tensor in self._tensors.items()
        }
        if self.in_place and not self.pulls_early:
            raise RuntimeError(f"{self.name}: in_place=True needs page-locked memory, which {self.device} did not give")

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def table(self) -> Tensor:
        """Rows as they are stored, [N, D]; waits for pushes under way."""
        self.settle()
        return self._tensors["table"]

    @property
    def scale(self) -> Tensor | None:
        """Scales of the rows of an int8 table, float32 [N], else None; waits for pushes under way."""
        self.settle()
        return self._tensors.get("scale")

    @property
    def dtype(self) -> torch.dtype:
        return self._tensors["table"].dtype

    @property
    def num_rows(self) -> int:
        return self._tensors["table"].size(0)

    @property
    def dim(self) -> int:
        return self._tensors["table"].size(1)

    @property
    def nbytes(self) -> int:
        """Bytes of the table, its scales and the push times."""
        return sum(t.nbytes for t in (*self._tensors.values(), self.last_push))

    @property
    def pulls_early(self) -> bool:
        """Whether rows can be pulled as soon as others are pushed; a host that copies would wait for the device."""
        return self._seen["table"].device == self.device

    # --- its life -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Waits until every push is in the table."""
        raise NotImplementedError

    def flush(self) -> None:
        """Settles, and writes a file tier to disk, so that another process can go on from it."""
        self.settle()
        if self._folder is not None and not self._folder.temporary:
            self._folder.flush(self.name, {"clock": int(self.clock), "row_order": self.row_order})

    def close(self) -> None:
        """Settles, flushes and lets go of files; a history in files cannot be used afterwards."""
        self.settle()
        if self._folder is not None and self._memory:
            self.flush()
            memory, self._memory = self._memory, {}
            self._tensors, self._seen = _Closed(self.name), _Closed(self.name)
            self.last_push = torch.empty(0, dtype=torch.int32)
            for mapped in memory.values():
                mapped.close()

    def check_open(self) -> None:
        """Raises RuntimeError if the history was closed."""
        _ = self._tensors["table"]

    def reset(self) -> None:
        """Forgets every row."""
        self._before_writing()
        for tensor in self._tensors.values():
            tensor.zero_()
        self.last_push.fill_(-1)
        self.clock.zero_()
        self.row_order = None

    def _before_writing(self) -> None:
        self.settle()
        self.resets += 1
        if self._folder is not None:
            self._folder.mark_dirty(self.name)

    def _move(self, device: torch.device) -> None:
        """Follows the layer to another device; tables in host memory stay there."""
        self.device = device
        self.engine = device_of(self.device)
        if self.tier == "device":
            self._tensors = {key: tensor.to(device) for key, tensor in self._tensors.items()}
            self.last_push, self.clock = self.last_push.to(device), self.clock.to(device)
        self._map()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The rows as they are stored, scales, push times, clock and row order; tensors are not copied."""
        return {
            "table": self.table,
            "scale": self.scale,
            "last_push": self.last_push,
            "clock": int(self.clock),
            "row_order": self.row_order,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if `state` does not fit this history; changes nothing."""
        if not isinstance(state, Mapping):
            raise TypeError(f"{self.name}: state must be a mapping, got {type(state).__name__}")
        missing = {"table", "scale", "last_push", "clock", "row_order"} - state.keys()
        if missing:
            raise ValueError(f"{self.name}: the state lacks {', '.join(sorted(missing))}")
        kinds: dict[str, Any] = {"table": Tensor, "scale": Tensor | None, "last_push": Tensor, "clock": int}
        for key, kind in {**kinds, "row_order": str | None}.items():
            if not isinstance(state[key], kind) or isinstance(state[key], bool):
                raise TypeError(f"{self.name}: the state's {key} is a {type(state[key]).__name__}")
        table = state["table"]
        if table.shape != (self.num_rows, self.dim) or table.dtype != self.dtype:
            raise ValueError(
                f"{self.name}: the state holds {table.dtype} {list(table.shape)} but the history is "
                f"{self.dtype} {[self.num_rows, self.dim]}"
            )
        expected = {"last_push": self.last_push, "scale": self._tensors.get("scale")}
        for key, tensor in expected.items():
            found = state[key]
            if (found is None) != (tensor is None):
                has, wants = ("a" if isinstance(value, Tensor) else "no" for value in (found, tensor))
                raise ValueError(f"{self.name}: the state has {has} {key} but the history has {wants} {key}")
            if tensor is not None and (found.shape != tensor.shape or found.dtype != tensor.dtype):
                raise ValueError(
                    f"{self.name}: the state's {key} is {found.dtype} {list(found.shape)}, expected {tensor.dtype} "
                    f"[{self.num_rows}]"
                )
        for key in ("table", "scale", "last_push"):
            found = state[key]
            if found is not None and (found.layout != torch.strided or found.device.type == "meta"):
                raise ValueError(f"{self.name}: the state's {key} is {found.layout} on {found.device}, expected rows")
        times, clock = state["last_push"], state["clock"]
        if not 0 <= clock < 2**31:
            raise ValueError(f"{self.name}: the state's clock must be in [0, 2**31), got {clock}")
        first, last = (int(time) for time in torch.aminmax(times))
        if not -1 <= first <= last < max(clock + 1, 1):
            raise ValueError(
                f"{self.name}: the state's last_push goes from {first} to {last} but its clock is {clock}: it was "
                "changed after it was taken, as live tables are by training (copy.deepcopy a state_dict() to keep it)"
            )
        if None not in (self.row_order, state["row_order"]) and self.row_order != state["row_order"]:
            raise ValueError(
                f"{self.name}: the state holds rows in the order {state['row_order']} but this history's graph has "
                f"{self.row_order}: rows would be given to the wrong nodes"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: another shape, dtype or row order; nothing is written then.
        """
        self.check_state(state)
        self._before_writing()
        for key, tensor in self._tensors.items():
            tensor.copy_(state[key])
        self.last_push.copy_(state["last_push"])
        self.clock.fill_(state["clock"])
        self.row_order = state["row_order"]


class _Closed(dict[str, Tensor]):
    """In place of the tensors of a history that was closed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __missing__(self, key: str) -> Tensor:
        raise RuntimeError(f"{self.name}: the history is closed")

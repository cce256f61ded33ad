"""`Histories`: all tables of a model."""

from __future__ import annotations

import logging
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any, cast

import torch
from torch import nn

from gas_triton.batch import Batch
from gas_triton.errors import NonFiniteError
from gas_triton.graph import Graph
from gas_triton.history.device import named
from gas_triton.history.rows import DTYPES
from gas_triton.history.staging import ORDERS, Order, Staging, Ticket, Transfers
from gas_triton.history.store import HistoryStore, Nonfinite
from gas_triton.history.tiers import TIERS, TableFolder, choose_tier, free_host_bytes
from gas_triton.loader import ClusterLoader
from gas_triton.text import mebibytes, table

_logger = logging.getLogger("gas_triton")


class ReadsHistory:
    """What a layer has that pushes its input to a history and reads halo rows from it."""

    history: HistoryStore | None
    # of the rows that the layer gives; see `gas_triton.compensation`
    gradient_history: HistoryStore | None = None

    @property
    def history_dim(self) -> int:
        """Width of the layer's input rows."""
        raise NotImplementedError(f"{type(self).__name__} must say how wide its history is")

    @property
    def gradient_dim(self) -> int:
        """Width of the layer's output rows.

        `out_channels` of each head, `channels`, or that of the last linear layer, of its `nn` if it has one.
        """
        width = getattr(self, "out_channels", None)
        if isinstance(width, int):
            return width * (getattr(self, "heads", 1) if getattr(self, "concat", False) is True else 1)
        width = getattr(self, "channels", None)
        if isinstance(width, int):
            return width
        # a linear layer beside `nn` may be of edge features; PyG's says out_channels
        within: nn.Module = getattr(self, "nn", cast(nn.Module, self))
        linears = [m for m in within.modules() if type(m).__name__ == "Linear" or isinstance(m, nn.Linear)]
        widths: list[Any] = [m.out_features if isinstance(m, nn.Linear) else m.out_channels for m in linears]
        if not widths:
            raise NotImplementedError(f"{type(self).__name__} must say how wide its output is, as gradient_dim")
        return widths[-1]


class Histories(Mapping[str, HistoryStore]):
    """The histories of a model, by layer name, in the order of the layers.

    Made by `attach_histories`.

    Args:
        stores: the tables.
        folder: of the file tier.
        why: why the tier was chosen, for `summary`.
    """

    def __init__(self, stores: dict[str, HistoryStore], folder: TableFolder | None = None, why: str = "") -> None:
        self._stores, self._folder, self._why = stores, folder, why
        self._transfers = Transfers()
        self._staging: Staging | None = None
        self._stage()

    def __getitem__(self, name: str) -> HistoryStore:
        return self._stores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stores)

    def __len__(self) -> int:
        return len(self._stores)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(store.nbytes for store in self.values())

    # --- training -----------------------------------------------------------------------------------------------------

    def prefetch(self, loader: ClusterLoader, depth: int = 1, order: Order = "strict") -> Iterator[Batch]:
        """Iterates over the loader's batches for one epoch of training, and fetches ahead what the next ones need.

        While a step runs, later batches are planned, their plan and node tensors brought to the layers' device, and the
        halo rows of the next batch copied from the histories that are not read in place, layer by layer, each as soon
        as the push that it has to see is under way. A layer that asks for rows that were not fetched ahead gets them
        then, and `transfer_stats` counts a miss.

        An exception, Ctrl-C or `break` in the middle of a step leaves nothing behind: begin the next epoch as usual.
        Staged rows live until the end of their step, so call `backward` within it: later, autograd says that a tensor
        was modified in place.

        Args:
            loader: batches.
            depth: how many batches to plan ahead; 0 fetches nothing ahead.
            order: "strict" gives the rows that a read at the last moment would give: the results are those without
                prefetching, bit for bit. "stale" fetches them before the push of the step before, which leaves more
                time; rows that the two batches share are one step older. Tables read in place are always fresh.

        Raises:
            TypeError: no `ClusterLoader`.
            ValueError: the loader's graph is not the one whose rows the histories hold, or an argument is out of range.
        """
        if not isinstance(loader, ClusterLoader):
            raise TypeError(f"loader must be a ClusterLoader, got {type(loader).__name__}")
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
            raise ValueError(f"depth must be an int of at least 0, got {depth!r}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}")
        self.check(loader.graph)
        staging = self._stage()
        if depth == 0 or staging is None or not (staging.staged or staging.device.concurrent):
            # without rows to copy, and without streams, nothing would run beside a step
            return self._look_after(loader)
        return self._prefetch(loader, depth, order, staging)

    def _look_after(self, loader: ClusterLoader) -> Iterator[Batch]:
        for batch in loader:
            yield batch
            for store in self.values():
                store.look()

    def _stage(self) -> Staging | None:
        """What stages rows on the device where the layers are now; None for a model on several devices."""
        engines = {store.engine for store in self.values()}
        if len(engines) != 1:
            self._staging = None
        elif self._staging is None or self._staging.device not in engines:
            on_host = [store for store in self.values() if store.tier != "device"]
            self._staging = Staging(on_host, engines.pop(), self._transfers)
        for store in self.values():
            store.staging = self._staging if store.tier != "device" else None
        return self._staging

    def _prefetch(self, loader: ClusterLoader, depth: int, order: Order, staging: Staging) -> Iterator[Batch]:
        device = next(iter(self.values())).device
        batches, ahead = iter(loader), deque[Ticket]()
        planned_before = -1
        try:
            while True:
                while len(ahead) <= depth:
                    if loader.num_planned != planned_before:
                        # the map of the planner was last used by the caller
                        staging.device.wait("plan", staging.device.record("compute"), "plan<-compute")
                    ticket = _plan_next(batches, staging, device)
                    planned_before = loader.num_planned
                    if ticket is None:
                        break
                    ahead.append(ticket)
                if not ahead:
                    return
                ticket = ahead.popleft()
                staging.begin(ticket, ahead[0] if ahead else None, order)
                yield ticket.batch
                staging.end()
                for store in self.values():
                    store.look()
        finally:
            staging.close()

    def check(self, graph: Graph) -> None:
        """Raises ValueError if the histories cannot hold the rows of `graph`."""
        for store in self.values():
            if store.num_rows != graph.num_nodes:
                raise ValueError(f"graph has {graph.num_nodes} nodes but {store.name}'s history has {store.num_rows}")
            store.check_order(graph.row_order, "the graph")

    # --- their life ---------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets every row of every history."""
        for store in self.values():
            store.reset()

    def flush(self) -> None:
        """Waits for pushes under way, and writes file tiers to disk, so that another process can go on from them."""
        for store in self.values():
            store.flush()

    def close(self) -> None:
        """Flushes, and gives file tiers free for other processes; histories in files cannot be used afterwards."""
        errors = []
        for store in self.values():
            try:
                store.close()
            except (OSError, NonFiniteError) as error:
                errors.append(error)
        if self._folder is not None:
            self._folder.close()
        if errors:
            # the others are closed all the same
            raise errors[0]

    def __enter__(self) -> Histories:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def age(self) -> dict[str, torch.Tensor]:
        """Staleness of every row, by layer; see `HistoryStore.age`."""
        return {name: store.age() for name, store in self.items()}

    def state_dict(self) -> dict[str, Any]:
        """States of all histories; waits for pushes under way. Tensors are not copied."""
        return {name: store.state_dict() for name, store in self.items()}

    def load_state_dict(self, state: Mapping[str, Any], graph: Graph | None = None) -> None:
        """Restores what `state_dict` gave.

        Args:
            state: from `state_dict`.
            graph: the graph that will be trained on, whose row order the state must have. Without it, histories that
                have not been pushed to cannot tell, and refuse a wrong order at the first push or read.

        Raises:
            ValueError: other layers, or a history of another shape, dtype or row order; nothing is written then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of layer names to states, got {type(state).__name__}")
        if list(state) != list(self):
            raise ValueError(f"the state has histories of {list(state)} but the model of {list(self)}")
        for name, store in self.items():
            store.check_state(state[name])
            order = state[name]["row_order"]
            if graph is not None and order not in (None, graph.row_order):
                raise ValueError(
                    f"{name}: the state holds rows in the order {order} but the graph has {graph.row_order}: rows "
                    "would be given to the wrong nodes"
                )
        for name, store in self.items():
            store.load_state_dict(state[name])

    # --- what they cost -----------------------------------------------------------------------------------------------

    def memory_stats(self) -> dict[str, Any]:
        """Bytes held: `tables` by tier (scales and push times included), `staged` copies of rows, `layers` by name."""
        tables: dict[str, int] = {}
        for store in self.values():
            tables[store.tier] = tables.get(store.tier, 0) + store.nbytes
        staged = 0 if self._staging is None else self._staging.nbytes
        return {"tables": tables, "staged": staged, "layers": {name: store.nbytes for name, store in self.items()}}

    def transfer_stats(self) -> dict[str, Any]:
        """What was moved since the histories were made or `reset_stats` was called.

        Returns:
            `pulls` and `pull_bytes` (halo rows of one layer and batch count once), `pushes` and `push_bytes`, `misses`
            (pulls that a layer had to wait for from the start), `pull_seconds` (time that pulls took),
            `exposed_seconds` (the part of it that layers waited) and `hidden_fraction` (the rest's share; None without
            pulls). Where pulls have no stream of their own, as on a CPU, all of their time is exposed. Tables on the
            device are neither pulled nor pushed, tables read in place not pulled.
        """
        staging = self._stage()
        if staging is not None:
            staging.device.settle()
            staging.count_times()
        stats = asdict(self._transfers)
        pulled, exposed = stats["pull_seconds"], stats["exposed_seconds"]
        stats["hidden_fraction"] = max(0.0, 1.0 - exposed / pulled) if pulled > 0.0 else None
        return stats

    def reset_stats(self) -> None:
        """Sets what `transfer_stats` counts to zero."""
        self.transfer_stats()
        for name, value in asdict(Transfers()).items():
            setattr(self._transfers, name, value)

    def summary(self) -> str:
        """A table of bytes by layer and tier."""
        header = ["history", "rows", "width", "dtype", "tier", "bytes"]
        rows = [
            [name, str(store.num_rows), str(store.dim), str(store.dtype).removeprefix("torch."), store.tier,
             mebibytes(store.nbytes)]
            for name, store in self.items()
        ]  # fmt: skip
        lines = [table(header, [*rows, ["all", "", "", "", "", mebibytes(self.nbytes)]])]
        return "\n".join([*lines, *([self._why] if self._why else [])])

    def __repr__(self) -> str:
        lines = [f"  {store!r}" for store in self.values()] + ([f"  {self._why}"] if self._why else [])
        return "\n".join([f"Histories({mebibytes(self.nbytes)}", *lines]) + ")"


def _plan_next(batches: Iterator[Batch], staging: Staging, device: torch.device) -> Ticket | None:
    engine = staging.device

    def load(batch: Batch) -> Batch:
        if batch.device != device:
            is_pinnable = (batch.device.type, device.type) == ("cpu", "cuda")
            batch = (batch.pin_memory() if is_pinnable else batch).to(device, non_blocking=True)
        for store in staging.staged:
            store.will_need(batch)
        return batch.load()

    with named("history.plan"):
        planned = engine.run("plan", lambda: next(batches, None))
        # the planner's map may be used by the caller next; what is loaded has time until the batch's turn
        engine.wait("compute", engine.record("plan"), "compute<-plan")
        if planned is None:
            return None
        batch = engine.run("plan", lambda: load(planned))
        engine.keep(batch)
        return Ticket(batch, engine.record("plan"))


def attach_histories(
    model: nn.Module,
    num_nodes: int,
    tier: str = "device",
    dtype: torch.dtype = torch.float32,
    *,
    layers: list[str] | None = None,
    in_place: bool = False,
    nonfinite: Nonfinite = "raise",
    path: str | os.PathLike[str] | None = None,
    reopen: bool = False,
    gradients: bool = False,
) -> Histories:
    """Gives every layer but the first a history of its input, in place of those that the model had.

    The first layer needs none: it is given `batch.x` or `batch.features`, where every neighbour is present. Layers
    count in the order in which the model registers them.

    Args:
        model: a model made of `gas_triton.nn` layers, on the device where it will be trained.
        num_nodes: N of the graph.
        tier: where tables live. "device": beside their layer's parameters, read in place. "pinned": in page-locked host
            memory (plain host memory without CUDA), from which `Histories.prefetch` copies rows ahead of time.
            "file": in memory-mapped files. "auto": the first of these that has room; `Histories.summary` says which
            and why.
        dtype: storage dtype of the tables, whatever the layers compute in; `torch.int8` keeps a float32 scale a row.
        layers: names of the layers that get a history, as in `model.named_modules()`; all but the first if None.
        in_place: layers read pinned tables over the bus themselves, and nothing is copied ahead.
        nonfinite: what a push does with rows that are not finite: "raise", "warn", "skip" or "allow"; `HistoryStore`
            says how.
        path: folder of the file tier; a temporary one, removed in the end, if None.
        reopen: go on with the tables that the folder holds.
        gradients: makes a table for the gradients of these layers' outputs too, named like the layer and ".gradient",
            for `Compensated(gradients=True)`.

    Returns:
        The tables, zero unless reopened.

    Raises:
        ValueError: an unknown tier or layer name, a model without `gas_triton.nn` layers, or a folder with tables.
        RuntimeError: the folder is in use.
        OSError: no room for the files, or no permission.
        MemoryError: no room for pinned tables.
    """
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(map(repr, TIERS))}, got {tier!r}")
    if not isinstance(num_nodes, int) or isinstance(num_nodes, bool):
        raise TypeError(f"num_nodes must be an int, got {type(num_nodes).__name__}")
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be torch.float32, bfloat16, float16, float64 or int8, got {dtype!r}")
    if not isinstance(in_place, bool):
        raise TypeError(f"in_place must be a bool, got {in_place!r}")
    if path is not None and (not isinstance(path, str | os.PathLike) or not os.fspath(path)):
        raise ValueError(f"path must name a folder, got {path!r}")
    if isinstance(layers, str):
        raise TypeError(f"layers must be a list of names, got the str {layers!r}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, ReadsHistory)}
    if not found:
        raise ValueError(f"model has no gas_triton.nn layer, got {type(model).__name__}")
    if layers is None:
        layers = list(found)[1:]
    unknown = [name for name in layers if name not in found]
    if unknown:
        raise ValueError(f"layers must be among {list(found)}, got {unknown}")

    dims = {name: layer.history_dim for name, layer in found.items() if name in layers}
    devices = {}
    for name in dims:
        parameters = chain(model.get_submodule(name).parameters(), model.parameters())
        devices[name] = next((p.device for p in parameters), torch.device("cpu"))
    if gradients:
        dims |= {f"{name}.gradient": found[name].gradient_dim for name in dims}
        devices |= {f"{name}.gradient": device for name, device in devices.items()}
    nbytes = sum(num_nodes * (dim * dtype.itemsize + 4 + 4 * (dtype == torch.int8)) for dim in dims.values())
    why = ""
    if tier not in ("file", "auto") and (path is not None or reopen):
        raise ValueError(f"path and reopen belong to tier 'file', got tier {tier!r}")
    if tier == "auto":
        tier, why = choose_tier(nbytes, next(iter(devices.values()), torch.device("cpu")))
        _logger.info(why)
    free = free_host_bytes()
    if tier == "pinned" and free is not None and nbytes > free:
        # the operating system would grant each table, and end the process when they are written
        raise MemoryError(
            f"the tables take {mebibytes(nbytes)}, of which the host has {mebibytes(free)} free: use tier 'file', or a "
            "narrower dtype"
        )
    if tier == "pinned" and not torch.cuda.is_available():
        warnings.warn(
            "there is no CUDA device: tier 'pinned' keeps its tables in plain host memory (tier 'device' does too, and "
            "reads them in place)",
            stacklevel=2,
        )
    folder = TableFolder(path, reopen) if tier == "file" else None
    stores: dict[str, HistoryStore] = {}
    try:
        for name, dim in dims.items():
            stores[name] = HistoryStore(
                num_nodes, dim, dtype, devices[name], name, tier=tier, in_place=in_place, nonfinite=nonfinite,
                folder=folder,
            )  # fmt: skip
    except BaseException:
        if folder is not None:
            # the tables before the one that did not fit
            folder.discard()
        raise
    for name, layer in found.items():
        layer.history = stores.get(name)
        layer.gradient_history = stores.get(f"{name}.gradient")
    return Histories(stores, folder, why)

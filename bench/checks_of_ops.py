"""Checks of every op, forward and backward; those of attention are in a file of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.checks import (
    EXACT,
    TOLERANCE,
    Check,
    Draw,
    Problem,
    Run,
    Values,
    both,
    edges_of,
    kept,
    scattered,
    widened,
)
from bench.checks_of_attention import attention_checks, dynamic_checks
from gas_triton import functional
from gas_triton.functional import Quantized
from gas_triton.functional.multi_aggregate import aggregate_messages, source_rows, target_rows
from gas_triton.kernels.csr_rows import row_of_edge
from gas_triton.kernels.edge_dot import edge_dot
from gas_triton.kernels.transpose import transpose

F64, F32, F16, BF16, INT8 = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8
WIDTHS = (1, 3, 31, 32, 33, 64, 100, 128, 256, 500, 513)
SIX = ["sum", "mean", "min", "max", "var", "std"]


def op_checks() -> list[Check]:
    """All of them."""
    return [
        *aggregate_checks(), *multi_checks(), *attention_checks(), *dynamic_checks(), *edge_dot_checks(),
        *dropout_checks(), *message_checks(), transpose_check(),
    ]  # fmt: skip


# --- aggregate -------------------------------------------------------------------------------------------------------


def aggregate_checks() -> list[Check]:
    def check(width: int, dtype: torch.dtype = F32, core: bool = False, **options: Any) -> Check:
        words = [f"{k.replace('_', ' ')} {v}".replace("torch.", "") for k, v in options.items()]
        case = ", ".join([f"F {width}", *words])
        return Check("aggregate", case, dtype, _aggregate(width, dtype, **options), TOLERANCE[dtype], core)

    tables = [(F32, t) for t in (BF16, F16, INT8, F64)] + [(BF16, BF16), (BF16, INT8), (F16, F16), (F16, INT8)]
    tables += [(BF16, F32), (F64, F64), (F64, F32), (F64, INT8)]
    return [
        check(33, core=True, history=F32, weight="learned"),
        check(32, core=True, history=F32, weight="graph", graph="symmetric"),
        check(32, BF16, core=True, history=INT8, dropout=0.4),
        check(16, core=True, reduce="max", history=F32),
        check(16, F64, core=True, reduce="min", history=F32, staged=True, weight="learned", dropout=0.5),
        check(24, core=True, reduce="mean", history=INT8, residual=0.1),
        check(20, core=True, weight="learned"),
        *(check(width, history=F32) for width in WIDTHS),
        *(check(width, BF16, history=BF16) for width in WIDTHS),
        *(check(width, weight="graph") for width in (3, 100, 128, 513)),
        *(check(64, dtype, history=table, weight="learned") for dtype, table in tables),
        *(check(128, dtype, history=table, staged=True) for dtype, table in tables),
        *(check(width, dtype, history=INT8) for dtype in (F32, F16) for width in (1, 31, 100, 513)),
        *(
            check(width, dtype, reduce=reduce, history=history, weight=weight)
            for reduce in ("mean", "max", "min")
            for width, dtype, history, weight in (
                (33, F32, F32, None), (128, F32, None, None), (100, F64, F64, "learned"), (513, F32, BF16, None),
            )
        ),
        *(check(64, F32, reduce=reduce, history=F32, halo="drop") for reduce in ("sum", "max")),
        *(
            check(width, dtype, history=table, dropout=0.5, staged=staged, weight="learned")
            for width, dtype, table, staged in (
                (33, F32, F32, False), (128, F32, INT8, False), (128, BF16, BF16, True), (100, F64, F64, False),
            )
        ),
        check(64, F64, reduce="max", history=F64, dropout=0.5),
        *(
            check(width, dtype, reduce=reduce, history=F32, residual=0.2)
            for width, dtype in ((64, F32), (128, BF16))
            for reduce in ("sum", "mean")
        ),
        *(check(128, dtype, weight="graph", graph="symmetric", history=dtype) for dtype in (F32, BF16)),
        *(check(width, features=True, reduce=reduce) for width in (33, 128) for reduce in ("sum", "max")),
    ]  # fmt: skip


def _aggregate(
    width: int, dtype: torch.dtype, *, reduce: Any = "sum", history: torch.dtype | None = None, weight: Any = None,
    staged: bool = False, dropout: float = 0.0, residual: float = 0.0, halo: Any = "read", graph: str = "directed",
    features: bool = False,
) -> Any:  # fmt: skip
    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        batch, wide = p.batch(graph), F64 if dtype == F64 else F32
        if features:
            whole = draw.normal(batch.graph_nodes, width, dtype=dtype)
            batch = p.loader(graph, x=whole).batch([0, 2])
        num_rows = batch.num_nodes + (batch.num_halo if history is None else 0)
        leaves = {"x": draw.normal(num_rows, width, dtype=dtype)}
        if weight == "learned":
            leaves["edge_weight"] = draw.uniform(batch.num_edges, dtype=wide)
        if residual:
            leaves["residual"] = draw.normal(batch.num_nodes, width, dtype=dtype)
        table = None if history is None else draw.table(batch.num_halo if staged else batch.graph_nodes, width, history)
        grad = draw.normal(batch.num_nodes, width, dtype=dtype)
        seed = draw.seed if dropout else None

        def ours(x: Tensor, edge_weight: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
            edge_weight = batch.edge_weight if weight == "graph" else edge_weight
            return functional.aggregate(
                x, batch, table, reduce, edge_weight=edge_weight, halo=halo, history_dropout=dropout, seed=seed,
                residual=residual, residual_weight=amount,
            )  # fmt: skip

        def exact(x: Tensor, edge_weight: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
            source, target = edges_of(batch, halo == "read")
            message = _all_rows(x, table, batch, dropout, draw.seed)[source]
            if weight == "graph":
                assert batch.edge_weight is not None
                edge_weight = batch.edge_weight.double()
            message = message if edge_weight is None else message * edge_weight[: message.size(0), None]
            out = (1.0 - amount) * scattered(message, target, batch.num_nodes, reduce)
            return out if residual is None else out + amount * residual

        amount = residual
        if not features:
            return both(ours, exact, leaves, grad)
        rows = whole[torch.cat([batch.node_ids, batch.halo_ids])].double()
        handle: Any = batch.features
        return lambda: {"out": ours(handle)}, lambda: {"out": exact(rows)}

    return build


def _all_rows(x: Tensor, table: Tensor | Quantized | None, batch: Any, dropout: float, seed: Tensor) -> Tensor:
    """[x; halo rows] in float64; the halo rows dropped by a mask that the CPU makes."""
    if table is None:
        return x
    halo = widened(table)
    halo = halo if halo.size(0) == batch.num_halo else halo[batch.halo_ids]
    if dropout:
        halo = halo * kept(batch.halo_ids, x.size(1), dropout, seed) / (1.0 - dropout)
    return torch.cat([x, halo])


# --- multi_aggregate -------------------------------------------------------------------------------------------------


def multi_checks() -> list[Check]:
    def check(width: int, dtype: torch.dtype = F32, core: bool = False, **options: Any) -> Check:
        words = [f"{k} {'+'.join(v) if isinstance(v, list) else v}".replace("torch.", "") for k, v in options.items()]
        # the standard deviation of rows that are nearly alike, and its gradient, lose digits
        tolerance = {F32: 1e-4}.get(dtype, TOLERANCE[dtype])
        case = ", ".join([f"F {width}", *words])
        return Check("multi_aggregate", case, dtype, _multi(width, dtype, **options), tolerance, core)

    return [
        check(24, core=True, history=F32),
        check(16, F64, core=True, history=F64, staged=True, dropout=0.5),
        check(16, BF16, core=True, history=INT8, reduces=["sum", "mean"]),
        *(check(width, history=F32) for width in (1, 3, 33, 64, 128, 256, 513)),
        *(check(width) for width in (33, 128)),
        *(check(64, F64, history=table, staged=True) for table in (F32, INT8, BF16)),
        *(check(128, F32, history=table) for table in (INT8, BF16, F16)),
        *(check(128, dtype, history=dtype, reduces=["sum", "mean"]) for dtype in (BF16, F16)),
        *(check(64, F64, history=F64, reduces=[name]) for name in SIX),
        check(64, F64, history=F64, dropout=0.5),
        check(64, F32, history=F32, halo="drop"),
    ]


def _multi(
    width: int, dtype: torch.dtype, *, history: torch.dtype | None = None, reduces: Any = SIX, staged: bool = False,
    dropout: float = 0.0, halo: Any = "read",
) -> Any:  # fmt: skip
    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        batch = p.batch()
        num_rows = batch.num_nodes + (batch.num_halo if history is None else 0)
        leaves = {"x": draw.normal(num_rows, width, dtype=dtype)}
        table = None if history is None else draw.table(batch.num_halo if staged else batch.graph_nodes, width, history)
        grad = draw.normal(batch.num_nodes, len(reduces), width, dtype=dtype)

        def ours(x: Tensor) -> Tensor:
            seed = draw.seed if dropout else None
            return functional.multi_aggregate(
                x, batch, table, reduces, halo=halo, history_dropout=dropout, seed=seed
            )  # fmt: skip

        def exact(x: Tensor) -> Tensor:
            source, target = edges_of(batch, halo == "read")
            return _six(_all_rows(x, table, batch, dropout, draw.seed)[source], target, batch.num_nodes, reduces)

        return both(ours, exact, leaves, grad)

    return build


def _six(message: Tensor, target: Tensor, num_rows: int, reduces: list[str]) -> Tensor:
    mean = scattered(message, target, num_rows, "mean")
    # as the mean of squares less the square of the mean, without its cancellation
    variance = scattered((message - mean[target]).square(), target, num_rows, "mean")
    found = {name: scattered(message, target, num_rows, name) for name in ("sum", "mean", "min", "max")}
    found |= {"var": variance, "std": torch.where(variance <= 1e-5, 0.0, variance.clamp(min=1e-5).sqrt())}
    return torch.stack([found[name] for name in reduces], dim=1)


# --- smaller ones ----------------------------------------------------------------------------------------------------


def edge_dot_checks() -> list[Check]:
    def check(width: int, dtype: torch.dtype, stored: torch.dtype, dropout: float = 0.0, core: bool = False) -> Check:
        case = f"F {width}, table {stored}, dropout {dropout}".replace("torch.", "")
        # signs change: a sum is smaller than what it is of
        tolerance = 4 * TOLERANCE[F64 if dtype == F64 else F32]
        return Check("edge_dot", case, dtype, _edge_dot(width, dtype, stored, dropout), tolerance, core)

    return [
        check(33, F32, F32, core=True),
        check(16, BF16, INT8, 0.4, core=True),
        *(check(width, F32, F32) for width in WIDTHS if width != 33),
        *(check(128, dtype, dtype, p) for dtype in (F64, F16, BF16) for p in (0.0, 0.5)),
        *(check(64, F32, stored) for stored in (INT8, BF16, F16)),
    ]


def _edge_dot(width: int, dtype: torch.dtype, stored: torch.dtype, dropout: float) -> Any:
    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        batch = p.batch()
        outer, seed = batch.outer, draw.seed if dropout else None
        grad, table = draw.normal(batch.num_nodes, width, dtype=dtype), draw.table(batch.graph_nodes, width, stored)
        rows, scale = (table, None) if isinstance(table, Tensor) else (table.rows, table.scale)

        def ours() -> Values:
            return {"out": edge_dot(grad, rows, scale, outer.rowptr, outer.col, None, None, 0, dropout, seed)}

        def exact() -> Values:
            value = widened(table)
            if dropout:
                ids = torch.arange(batch.graph_nodes, device=grad.device)
                value = value * kept(ids, width, dropout, draw.seed) / (1.0 - dropout)
            target = edges_of(batch)[1][batch.inner.num_edges :]
            return {"out": (grad.double()[target] * value[outer.col.long()]).sum(1)}

        return ours, exact

    return build


def dropout_checks() -> list[Check]:
    def build(width: int, dtype: torch.dtype, all_rows: bool) -> Any:
        def make(p: Problem, draw: Draw) -> tuple[Run, Run]:
            batch = p.batch()
            ids = batch.all_ids if all_rows else batch.node_ids
            leaves = {"x": draw.normal(ids.numel(), width, dtype=dtype)}
            # Triton takes a Python number as float32: 1 / (1 - p) must be exact where float64 is looked at
            drop = 0.5 if dtype == F64 else 0.3
            mask = kept(ids, width, drop, draw.seed)
            return both(
                lambda x: functional.dropout(x, batch, drop, draw.seed), lambda x: x * mask / (1.0 - drop), leaves,
                draw.normal(ids.numel(), width, dtype=dtype),
            )  # fmt: skip

        return make

    def check(width: int, dtype: torch.dtype, all_rows: bool = False, core: bool = False) -> Check:
        case = f"F {width}, {'all' if all_rows else 'in-batch'} rows"
        return Check("dropout", case, dtype, build(width, dtype, all_rows), TOLERANCE[dtype], core)

    return [
        check(33, F32, core=True),
        *(check(width, F32, True) for width in (1, 128, 513)),
        *(check(64, dtype) for dtype in (F64, F16, BF16)),
    ]


def message_checks() -> list[Check]:
    """Messages made edge by edge: `source_rows`, `target_rows`, `aggregate_messages`."""

    def build(width: int, halo: Any) -> Any:
        def make(p: Problem, draw: Draw) -> tuple[Run, Run]:
            batch = p.batch()
            num_rows = batch.num_nodes + (batch.num_halo if halo == "read" else 0)
            leaves = {"x": draw.normal(num_rows, width), "y": draw.normal(batch.num_nodes, width)}
            source, target = edges_of(batch, halo == "read")

            def ours(x: Tensor, y: Tensor) -> Tensor:
                message = source_rows(x, batch, halo) * target_rows(y, batch, halo)
                return aggregate_messages(message, batch, ["sum", "max"], halo)

            def exact(x: Tensor, y: Tensor) -> Tensor:
                return _six(x[source] * y[target], target, batch.num_nodes, ["sum", "max"])

            return both(ours, exact, leaves, draw.normal(batch.num_nodes, 2, width))

        return make

    return [
        Check("messages", f"F {width}, halo {halo}", F32, build(width, halo), TOLERANCE[F32], width == 12)
        for width, halo in ((12, "read"), (64, "read"), (100, "drop"))
    ]


def transpose_check() -> Check:
    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        outer, nodes = p.batch().outer, p.batch().graph_nodes
        row = row_of_edge(*outer)
        names = ("rowptr", "col", "edge_id")

        def exact() -> Values:
            order = sorted(range(outer.col.numel()), key=outer.col.tolist().__getitem__)
            count = torch.bincount(outer.col.long().cpu(), minlength=nodes)
            found = (torch.cat([count.new_zeros(1), count.cumsum(0)]), row.cpu()[order], torch.tensor(order))
            return {name: value.to(outer.col.dtype) for name, value in zip(names, found, strict=True)}

        return lambda: dict(zip(names, transpose(row, outer.col, nodes), strict=True)), exact

    return Check("transpose", "outer edges", torch.int32, build, EXACT, core=True)

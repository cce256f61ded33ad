"""Checks of what surrounds the ops: the plan of a batch, rows written and read, exact inference, training steps."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.checks import EXACT, TOLERANCE, Check, Draw, Problem, Run, Values, edges_of, name_of, poisoned, scattered
from gas_triton import Batch, ClusterLoader, attach_histories, inference
from gas_triton.functional import Quantized, halo_rows
from gas_triton.kernels.pull import gather_rows, pull
from gas_triton.kernels.push import NO_ROW, check, pack, push, quantize_ref
from gas_triton.models import MODELS
from gas_triton.nn import GCNConv

F64, F32, F16, BF16, INT8 = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8
CPU = torch.device("cpu")
WIDTH, HIDDEN, CLASSES = 12, 16, 5


def training_checks(device: torch.device) -> list[Check]:
    """All of them; those against the CPU's own path only on another device."""
    checks = [*push_checks(), *pull_checks(), *plan_checks(), *gcn_checks(), poison_check()]
    return checks + (model_checks() + [wait_check()] if device.type == "cuda" else [])


# --- push and pull ---------------------------------------------------------------------------------------------------


def push_checks() -> list[Check]:
    def case(dtype: torch.dtype, stored: torch.dtype, width: int, bad: str | None = None, core: bool = False) -> Check:
        words = f"F {width}, table {name_of(stored)}" + (f", not finite: {bad}" if bad else "")
        return Check("push", words, dtype, _push(dtype, stored, width, bad), EXACT, core)

    pairs = [
        *itertools.product((F32, BF16, F16), (F32, BF16, F16, INT8)),
        (F64, F64), (F64, F32), (F64, BF16), (F64, INT8), (F32, F64),
    ]  # fmt: skip
    return [
        *(case(F32, stored, 20, core=True) for stored in (F32, BF16, INT8)),
        *(case(F32, INT8, 20, bad, core=True) for bad in ("warn", "skip", "allow")),
        *(case(dtype, stored, 64) for dtype, stored in pairs),
        *(case(dtype, stored, 64, bad) for dtype, stored in pairs[:7] for bad in ("warn", "skip")),
        *(case(F32, stored, width) for stored in (F32, INT8) for width in (1, 3, 100, 513, 1025)),
    ]


def _push(dtype: torch.dtype, stored: torch.dtype, width: int, bad: str | None) -> Any:
    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        batch = p.batch()
        x = draw.normal(batch.num_nodes, width, dtype=dtype) * 3.0
        if dtype == F32:
            # halfway between two numbers of bfloat16, and of float16: to even
            for first, bits in ((0, 16), (1, 13)):
                word = x[first::3].view(torch.int32)
                x[first::3] = (((word >> bits) << bits) + (1 << (bits - 1))).view(F32)
        bad_rows = torch.tensor([1, batch.num_nodes // 2, batch.num_nodes - 1])
        if bad:
            x[bad_rows[0], 0], x[bad_rows[1], width - 1], x[bad_rows[2], width // 2] = torch.nan, torch.inf, -torch.inf
        before = torch.zeros(batch.graph_nodes, width, dtype=stored, device=p.device)
        scales = torch.ones(batch.graph_nodes, device=p.device) if stored == INT8 else None

        def ours() -> Values:
            table, scale = before.clone(), None if scales is None else scales.clone()
            last = torch.full((batch.graph_nodes,), -1, dtype=torch.int32, device=p.device)
            reports = [torch.tensor([0, NO_ROW], device=p.device) for _ in range(3)]
            clock = torch.tensor([7], dtype=torch.int64, device=p.device)
            how = bad or "warn"
            push(table, scale, last, reports[0], x, batch.node_ids, batch.spans, clock, how)
            found = {"table": table, "last push": last, "report": reports[0]}
            packed, packed_scale = pack(x, stored, "warn", reports[1], batch.node_ids)
            found |= {"packed": packed, "report of packed": reports[1]}
            if scale is not None:
                found |= {"scale": scale, "packed scale": packed_scale}
            if stored == dtype:
                check(x, reports[2], batch.node_ids)
                found["report of check"] = reports[2]
            return found

        def exact() -> Values:
            ids, values = batch.node_ids.cpu(), x.cpu()
            rows, row_scale = quantize_ref(values) if stored == INT8 else (values.to(stored), values)
            written = torch.ones(ids.numel(), dtype=torch.bool)
            if bad == "skip":
                written[bad_rows] = False
            table, last = before.cpu(), torch.full((batch.graph_nodes,), -1, dtype=torch.int32)
            table[ids[written]], last[ids[written]] = rows[written], 7
            seen = torch.tensor([3, int(ids[bad_rows].min())] if bad else [0, NO_ROW])
            unseen = torch.tensor([0, NO_ROW])
            found = {"table": table, "last push": last, "report": unseen if bad == "allow" else seen}
            found |= {"packed": rows, "report of packed": seen}
            if scales is not None:
                scale = scales.cpu()
                scale[ids[written]] = row_scale[written]
                found |= {"scale": scale, "packed scale": row_scale}
            if stored == dtype:
                found["report of check"] = seen
            return found

        return ours, exact

    return build


def pull_checks() -> list[Check]:
    def build(stored: torch.dtype, dtype: torch.dtype, width: int) -> Any:
        def make(p: Problem, draw: Draw) -> tuple[Run, Run]:
            batch = p.batch()
            table = draw.table(batch.graph_nodes, width, stored)
            rows, scale = (table, None) if isinstance(table, Tensor) else (table.rows, table.scale)
            ids = batch.halo_ids
            number = torch.arange(batch.graph_nodes, device=p.device)

            def ours() -> Values:
                bits, numbers = rows.new_empty(ids.numel(), width), number.new_empty(ids.numel())
                gather_rows(rows, ids, bits)
                gather_rows(number, ids, numbers)
                own = rows[ids], None if scale is None else scale[ids]
                staged = own[0] if own[1] is None else Quantized(own[0], own[1])
                return {
                    "rows": pull(rows, scale, ids, dtype), "stored rows": bits, "numbers": numbers,
                    "halo rows": halo_rows(table, batch, dtype), "staged": halo_rows(staged, batch, dtype),
                }  # fmt: skip

            def exact() -> Values:
                own = rows.cpu()[ids.cpu()]
                # through float32, as every narrow rounding here
                wide = own if scale is None else own.float() * scale.cpu()[ids.cpu(), None]
                found = wide.to(dtype)
                return {"rows": found, "stored rows": own, "numbers": ids.cpu(), "halo rows": found, "staged": found}

            return ours, exact

        return make

    def case(stored: torch.dtype, dtype: torch.dtype, width: int, core: bool = False) -> Check:
        return Check("pull", f"F {width}, table {name_of(stored)}", dtype, build(stored, dtype, width), EXACT, core)

    return [
        *(case(stored, F32, 20, core=True) for stored in (F32, BF16, INT8)),
        *(case(stored, dtype, 64) for stored in (F32, BF16, F16, F64, INT8) for dtype in (F32, BF16, F16, F64)),
        *(case(stored, F32, width) for stored in (F32, INT8) for width in (1, 3, 100, 513, 1025)),
    ]


# --- plans -----------------------------------------------------------------------------------------------------------


def plan_checks() -> list[Check]:
    """The plan of a batch on the device against that of the CPU, and against the graph."""

    def build(kind: str) -> Any:
        def make(p: Problem, draw: Draw) -> tuple[Run, Run]:
            def ours() -> Values:
                batch = p.loader(kind).batch([0, 2])
                return _plan(batch) | _edges(batch)

            def exact() -> Values:
                loader = p.loader(kind, CPU)
                batch, graph = loader.batch([0, 2]), loader.graph
                ids, place = batch.node_ids, batch.edge_ids
                # edges of the graph by their place in it, without a plan
                target = torch.repeat_interleave(torch.arange(graph.num_nodes), graph.rowptr.long().diff())
                is_own = torch.zeros(graph.num_nodes, dtype=torch.bool).index_fill(0, ids, True)
                assert torch.equal(place.sort().values.long(), is_own[target].nonzero().squeeze(1))
                edges = {"source id": graph.col[place].long(), "target id": target[place.long()]}
                assert graph.weight is not None
                return _plan(batch) | edges | {"edge weight": graph.weight[place]}

            return ours, exact

        return make

    return [
        Check("plan", f"{kind} graph", torch.int32, build(kind), EXACT, core=kind == "directed")
        for kind in ("directed", "symmetric")
    ]


def _plan(batch: Batch) -> Values:
    found: dict[str, Any] = {
        "node ids": batch.node_ids, "halo ids": batch.halo_ids, "outer slot": batch.outer_slot,
        "edge ids": batch.edge_ids, "joint col": batch.outer_joint_col, "graph col": batch.inner_graph_col,
    }  # fmt: skip
    transposed, hubs = batch.transposed_inner(shared=False)
    joint_transposed, joint_hubs = batch.joint_transposed()
    groups = {
        "inner": batch.inner, "outer": batch.outer, "joint": batch.joint(), "hubs": batch.hubs,
        "transposed": transposed, "hubs of transposed": hubs, "transposed joint": joint_transposed,
        "hubs of transposed joint": joint_hubs,
    }  # fmt: skip
    assert len(batch.hubs) == 4, "the problem has hubs"
    found |= {f"{name} {place}": value for name, group in groups.items() for place, value in enumerate(group)}
    return found


def _edges(batch: Batch) -> Values:
    source, target = edges_of(batch)
    assert batch.edge_weight is not None
    return {
        "source id": batch.all_ids[source], "target id": batch.node_ids[target], "edge weight": batch.edge_weight
    }  # fmt: skip


# --- training --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three layers of a GCN."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH, HIDDEN, HIDDEN, CLASSES]
        self.convs = nn.ModuleList([GCNConv(a, b) for a, b in itertools.pairwise(widths)])

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        for conv in self.convs[:-1]:
            x = conv(x, batch).relu()
        return self.convs[-1](x, batch)


def gcn_checks() -> list[Check]:
    """Two epochs with histories against index_select, cat and index_add; exact inference against the whole graph."""
    words = [("device", 0, F64), ("device", 0, F32), ("pinned", 1, F64), ("pinned", 2, F32)]
    steps = [
        # two epochs of steps magnify rounding
        Check("training step", f"GCN, histories {tier}, prefetch {depth}", dtype, _train(tier, depth, dtype),
              100 * TOLERANCE[dtype], core=dtype == F64)
        for tier, depth, dtype in words
    ]  # fmt: skip
    return steps + [
        Check("inference", "GCN", dtype, _infer(dtype), 4 * TOLERANCE[dtype], dtype == F64) for dtype in (F64, F32)
    ]


def _gcn_problem(p: Problem, draw: Draw, dtype: torch.dtype) -> tuple[nn.Module, ClusterLoader]:
    nodes = p.graph("normalized").num_nodes
    x, y = draw.normal(nodes, WIDTH, dtype=dtype), torch.arange(nodes, device=p.device) % CLASSES
    torch.manual_seed(1)
    return Net().to(p.device, dtype), p.loader("normalized", x=x, y=y)


def _train(tier: str, depth: int, dtype: torch.dtype) -> Any:
    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        start, loader = _gcn_problem(p, draw, dtype)

        def ours() -> Values:
            model = copy.deepcopy(start)
            with attach_histories(model, loader.graph.num_nodes, tier, dtype) as histories:
                losses = _epochs(model, histories, loader, depth)
                everyone = torch.arange(loader.graph.num_nodes, device=p.device)
                tables = {f"table {k}": histories[f"convs.{k}"].pull(everyone.to(_where(tier, p))) for k in (1, 2)}
            return _state(losses, model) | tables

        def exact() -> Values:
            model = copy.deepcopy(start).double()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            tables = [torch.zeros(loader.graph.num_nodes, HIDDEN, dtype=F64, device=p.device) for _ in range(2)]
            losses = []
            for _, batch in itertools.product(range(2), loader):
                out = _step(model, batch.x.double(), batch, tables)
                losses.append(F.cross_entropy(out, batch.y))
                optimizer.zero_grad()
                losses[-1].backward()
                optimizer.step()
            return _state(losses, model) | {f"table {k}": tables[k - 1] for k in (1, 2)}

        return ours, exact

    return build


def _where(tier: str, p: Problem) -> torch.device:
    return p.device if tier == "device" else CPU


def _epochs(model: nn.Module, histories: Any, loader: ClusterLoader, depth: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        for batch in histories.prefetch(loader, depth):
            losses.append(F.cross_entropy(model(batch.x, batch), batch.y))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    return losses


def _step(model: nn.Module, x: Tensor, batch: Batch, tables: list[Tensor]) -> Tensor:
    """The three layers in plain torch; `tables` are pushed to, then read."""
    source, target = edges_of(batch)
    assert batch.edge_weight is not None
    weight = batch.edge_weight.double()[:, None]
    for place, conv in enumerate(model.convs):  # type: ignore[arg-type]
        if place > 0:
            table = tables[place - 1]
            x = x.relu()
            table[batch.node_ids] = x.detach()
            x = torch.cat([x, table[batch.halo_ids]])
        x = scattered(x[source] * weight, target, batch.num_nodes, "sum") @ conv.lin.weight.T + conv.bias
    return x


def _state(losses: list[Tensor], model: nn.Module) -> Values:
    return {"losses": torch.stack(losses).detach()} | {name: p.detach() for name, p in model.named_parameters()}


def _infer(dtype: torch.dtype) -> Any:
    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        model, loader = _gcn_problem(p, draw, dtype)

        def exact() -> Values:
            graph, exact_model = loader.graph, copy.deepcopy(model).double()
            assert graph.weight is not None
            assert isinstance(loader.x, Tensor)
            target = torch.repeat_interleave(graph.rowptr.long().diff())
            x = loader.x.double()
            for place, conv in enumerate(exact_model.convs):  # type: ignore[arg-type]
                x = x.relu() if place > 0 else x
                message = x[graph.col.long()] * graph.weight.double()[:, None]
                x = scattered(message, target, graph.num_nodes, "sum") @ conv.lin.weight.T + conv.bias
            return {"logits": x}

        return lambda: {"logits": inference(model, loader)}, exact

    return build


def model_checks() -> list[Check]:
    """An epoch of every model on the device against the CPU's own path."""

    def build(name: str, tier: str) -> Any:
        def make(p: Problem, draw: Draw) -> tuple[Run, Run]:
            graph = MODELS[name].prepare(p.graph("symmetric", CPU))
            parts = p.loader("symmetric", CPU).parts
            x, y = draw.normal(graph.num_nodes, WIDTH, dtype=F64).cpu(), torch.arange(graph.num_nodes) % CLASSES
            options = {"dropout": 0.0} | MODELS[name].options_of(graph)
            options |= {"hidden_heads": 2, "out_heads": 1} if name == "GAT" else {}
            torch.manual_seed(2)
            start = MODELS[name](WIDTH, HIDDEN, CLASSES, 3, **options).double()

            def run(device: torch.device) -> Values:
                model = copy.deepcopy(start).to(device)
                loader = ClusterLoader(
                    graph.to(device), parts, batch_size=2, shuffle=False, x=x.to(device), y=y.to(device)
                )
                with attach_histories(model, graph.num_nodes, tier, F64) as histories:
                    losses = _epochs(model, histories, loader, 1)
                return _state(losses, model)

            return lambda: run(p.device), lambda: run(CPU)

        return make

    return [
        Check("model", f"{name}, histories {tier}", F64, build(name, tier), 1e-8, core=name == "GCN")
        for name in MODELS
        for tier in ("device", "pinned")
    ]


def wait_check() -> Check:
    """A step on batches that are planned, with histories on the device, does not wait for it."""

    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        model, loader = _gcn_problem(p, draw, F32)

        def ours() -> Values:
            with attach_histories(model, loader.graph.num_nodes) as histories, poisoned(False):
                _epochs(model, histories, loader, 1)
                torch.cuda.synchronize(p.device)
                batches = histories.prefetch(loader)
                losses = [F.cross_entropy(model(batch.x, batch), batch.y) for batch in [next(batches)]]
                before = torch.cuda.get_sync_debug_mode()
                try:
                    # a call that waits raises
                    torch.cuda.set_sync_debug_mode("error")
                    for batch in batches:
                        losses.append(F.cross_entropy(model(batch.x, batch), batch.y))
                        losses[-1].backward()
                finally:
                    torch.cuda.set_sync_debug_mode(before)
            return {"steps": torch.tensor(len(losses))}

        return ours, lambda: {"steps": torch.tensor(len(loader))}

    return Check("no waiting", "GCN, histories device", F32, build, EXACT, core=True)


def poison_check() -> Check:
    """That what torch hands out really is filled."""

    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        return (
            lambda: {"filled": torch.empty(1000, device=p.device).isnan()},
            lambda: {"filled": torch.ones(1000, dtype=torch.bool)},
        )

    return Check("poison", "torch.empty", F32, build, EXACT, core=True)

"""Checks of both kinds of attention, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.checks import TOLERANCE, Check, Draw, Problem, Run, both, edges_of, kept, scattered, softmaxed
from gas_triton import functional

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# A gradient of a logit is a small difference of two large numbers, and a GPU's exp in float32 an approximation.
TOLERANCE_OF_SOFTMAX = {dtype: value * (10 if dtype == F32 else 4) for dtype, value in TOLERANCE.items()}


def attention_checks() -> list[Check]:
    def check(heads: int, width: int, dtype: torch.dtype = F32, core: bool = False, **options: Any) -> Check:
        case = ", ".join([f"{heads} x {width}", *(f"{k.replace('_', ' ')} {v}" for k, v in options.items())])
        build = _attention(heads, width, dtype, **options)
        return Check("attention", case, dtype, build, TOLERANCE_OF_SOFTMAX[dtype], core)

    return [
        check(2, 8, core=True, edge_logit=True),
        check(1, 33, BF16, core=True),
        check(4, 4, F64, core=True, edge_logit=True, dropout=0.5),
        *(check(heads, width) for heads, width in ((1, 1), (1, 64), (1, 128), (1, 256), (3, 33), (4, 16), (8, 8))),
        *(check(heads, width) for heads, width in ((2, 100), (4, 64), (8, 32), (5, 7))),
        *(check(4, 32, dtype, edge_logit=edge) for dtype in (F64, F16, BF16) for edge in (False, True)),
        *(check(4, 32, dtype, dropout=0.5, edge_logit=True) for dtype in (F32, F64)),
        check(8, 16, halo="drop"),
    ]  # fmt: skip


def _attention(
    heads: int, width: int, dtype: torch.dtype, *, edge_logit: bool = False, dropout: float = 0.0, halo: Any = "read"
) -> Any:
    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        batch = p.batch()
        rows = batch.num_nodes + batch.num_halo
        leaves = {
            "x": draw.normal(rows, heads, width, dtype=dtype),
            "source_logit": draw.normal(rows, heads, dtype=dtype),
            "target_logit": draw.normal(batch.num_nodes, heads, dtype=dtype),
        }
        if edge_logit:
            leaves["edge_logit"] = draw.normal(batch.num_edges, heads, dtype=dtype)
        grad = draw.normal(batch.num_nodes, heads, width, dtype=dtype)

        def ours(x: Tensor, source_logit: Tensor, target_logit: Tensor, edge_logit: Tensor | None = None) -> Tensor:
            return functional.attention(
                x, batch, source_logit, target_logit, edge_logit=edge_logit, dropout=dropout,
                seed=draw.seed if dropout else None, halo=halo,
            )  # fmt: skip

        def exact(x: Tensor, source_logit: Tensor, target_logit: Tensor, edge_logit: Tensor | None = None) -> Tensor:
            source, target = edges_of(batch, halo == "read")
            logit = source_logit[source] + target_logit[target]
            logit = logit if edge_logit is None else logit + edge_logit[: source.numel()]
            weight = softmaxed(F.leaky_relu(logit, 0.2), target, batch.num_nodes)
            weight = _dropped(weight, dropout, draw.seed)
            return scattered(weight[:, :, None] * x[source], target, batch.num_nodes, "sum")

        return both(ours, exact, leaves, grad)

    return build


def _dropped(weight: Tensor, p: float, seed: Tensor) -> Tensor:
    """Weights of edges in the batch's order, dropped by a mask of (seed, place, head)."""
    if not p:
        return weight
    return weight * kept(torch.arange(weight.size(0), device=weight.device), weight.size(1), p, seed) / (1.0 - p)


# --- dynamic_attention -----------------------------------------------------------------------------------------------


def dynamic_checks() -> list[Check]:
    def check(
        score: str, heads: int, width: int, dtype: torch.dtype = F32, core: bool = False, **options: Any
    ) -> Check:
        case = ", ".join([score, f"{heads} x {width}", *(f"{k} {v}" for k, v in options.items())])
        build = _dynamic(score, heads, width, dtype, **options)
        return Check("dynamic_attention", case, dtype, build, TOLERANCE_OF_SOFTMAX[dtype], core)

    return [
        check("gatv2", 2, 8, core=True, edge=True),
        check("dot", 2, 8, core=True, edge=True, value=True, dropout=0.3),
        check("dot", 1, 33, BF16, core=True),
        *(
            check(score, heads, width)
            for score in ("gatv2", "dot")
            for heads, width in ((1, 1), (1, 64), (1, 256), (3, 33), (4, 16), (8, 32), (2, 100))
        ),
        *(
            check(score, 4, 32, dtype, edge=True, value=score == "dot")
            for score in ("gatv2", "dot")
            for dtype in (F64, F16, BF16, F32)
        ),
        *(check(score, 4, 32, F64, dropout=0.5, edge=True, value=True) for score in ("gatv2", "dot")),
        *(check(score, 4, 16, halo="drop") for score in ("gatv2", "dot")),
    ]


def _dynamic(
    score: Any, heads: int, width: int, dtype: torch.dtype, *, edge: bool = False, value: bool = False,
    dropout: float = 0.0, halo: Any = "read",
) -> Any:  # fmt: skip
    def build(p: Problem, draw: Draw) -> tuple[Run, Run]:
        batch = p.batch()
        rows = batch.num_nodes + batch.num_halo
        leaves = {
            "query": draw.normal(batch.num_nodes, heads, width, dtype=dtype),
            "key": draw.normal(rows, heads, width, dtype=dtype),
        }
        if value:
            leaves["value"] = draw.normal(rows, heads, width, dtype=dtype)
        if score == "gatv2":
            # logits of order 1, whatever the width
            leaves["att"] = draw.normal(heads, width, dtype=dtype) / math.sqrt(width)
        if edge:
            leaves["edge"] = draw.normal(batch.num_edges, heads, width, dtype=dtype)
        grad = draw.normal(batch.num_nodes, heads, width, dtype=dtype)

        def ours(query: Tensor, key: Tensor, value: Tensor | None = None, **others: Any) -> Tensor:
            return functional.dynamic_attention(
                query, key, value, batch, score=score, dropout=dropout, seed=draw.seed if dropout else None, halo=halo,
                **others,
            )  # fmt: skip

        def exact(
            query: Tensor, key: Tensor, value: Tensor | None = None, att: Tensor | None = None,
            edge: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            source, target = edges_of(batch, halo == "read")
            left, right, carried = query[target], key[source], (key if value is None else value)[source]
            if edge is not None:
                right = right + edge[: source.numel()]
                carried = carried + edge[: source.numel()] if score == "dot" else carried
            if score == "dot":
                logit = (left * right).sum(2) / math.sqrt(width)
            else:
                assert att is not None
                logit = (F.leaky_relu(left + right, 0.2) * att).sum(2)
            weight = _dropped(softmaxed(logit, target, batch.num_nodes), dropout, draw.seed)
            return scattered(weight[:, :, None] * carried, target, batch.num_nodes, "sum")

        return both(ours, exact, leaves, grad)

    return build

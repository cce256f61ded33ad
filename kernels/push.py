"""Writing a batch's rows into a history.

    table[node_ids[r]] = x[r],   last_push[node_ids[r]] = clock        r in 0 .. B-1

The rows of a batch are a few contiguous spans of the table, one a cluster: on the CPU they are copied span by span,
which is several times faster than a scatter of rows.
"""

from __future__ import annotations

from torch import Tensor

from gas_triton.kernels._library import define


def push_cpu(table: Tensor, last_push: Tensor, x: Tensor, node_ids: Tensor, spans: Tensor, clock: Tensor) -> None:
    start = 0
    for first, last in spans.tolist():
        end = start + last - first
        table[first:last].copy_(x[start:end])
        last_push[first:last].fill_(int(clock))
        start = end


def push_cuda(table: Tensor, last_push: Tensor, x: Tensor, node_ids: Tensor, spans: Tensor, clock: Tensor) -> None:
    table.index_copy_(0, node_ids, x.to(table.dtype))
    last_push.index_copy_(0, node_ids, clock.to(last_push.dtype).expand(node_ids.numel()))


def _push_fake(table: Tensor, last_push: Tensor, x: Tensor, node_ids: Tensor, spans: Tensor, clock: Tensor) -> None:
    return None


push = define(
    "push(Tensor(a!) table, Tensor(b!) last_push, Tensor x, Tensor node_ids, Tensor spans, Tensor clock) -> ()",
    cpu=push_cpu,
    cuda=push_cuda,
    fake=_push_fake,
)

"""Random CSR blocks for kernel tests, and how far from float64 a result may be."""

from typing import NamedTuple

import torch
from torch import Tensor

from gas_triton.kernels.aggregate import aggregate_ref

KINDS = ("mixed", "no_edges", "one_hub", "empty_rows", "all_halo", "all_in_batch")
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Blocks(NamedTuple):
    """`inner` [B x B] and `outer` [B x N] of a batch, as the op takes them."""

    inner: list[Tensor]
    outer: list[Tensor]
    num_rows: int
    num_table: int

    @property
    def num_edges(self) -> int:
        return self.inner[1].numel() + self.outer[1].numel()


def make_blocks(kind: str = "mixed", num_rows: int = 7, num_table: int = 11, seed: int = 0) -> Blocks:
    """Blocks with duplicates; the shape of the trouble is named by `kind`."""
    draw = torch.Generator().manual_seed(seed)

    def degrees(most: int) -> Tensor:
        return torch.randint(0, most + 1, (num_rows,), generator=draw)

    inner, outer = degrees(5), degrees(4)
    if kind == "no_edges":
        inner, outer = torch.zeros_like(inner), torch.zeros_like(outer)
    elif kind == "one_hub":
        inner[num_rows // 2], outer[num_rows // 2] = 21, 14
    elif kind == "empty_rows":
        inner[::2], outer[::2] = 0, 0
    elif kind == "all_halo":
        inner.zero_()
    elif kind == "all_in_batch":
        outer.zero_()
    return Blocks(_csr(inner, num_rows, draw), _csr(outer, num_table, draw), num_rows, num_table)


def _csr(degree: Tensor, num_cols: int, draw: torch.Generator) -> list[Tensor]:
    rowptr = torch.cat([degree.new_zeros(1), degree.cumsum(0)]).to(torch.int32)
    return [rowptr, torch.randint(0, num_cols, (int(rowptr[-1]),), generator=draw, dtype=torch.int32)]


def assert_as_exact(
    out: Tensor,
    x: Tensor,
    table: Tensor | None,
    weight: Tensor | None,
    blocks: Blocks,
    reduce: str = "sum",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    interpreted: bool = False,
) -> None:
    """Compares with float64 on the same inputs, within what rounding explains.

    A sum of d products in float32 is off by at most about d units of rounding of the sum of magnitudes; storing the
    result adds one unit of its own dtype. Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest.
    """
    unit = UNIT[x.dtype] * (2 if interpreted and x.dtype == torch.bfloat16 else 1)

    def exact(magnitude: bool) -> Tensor:
        def get(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            t = t.detach().cpu().double()
            return t.abs() if magnitude else t

        seed_cpu = None if seed is None else seed.cpu()
        how = "sum" if magnitude else reduce
        outer = blocks.outer if table is not None else []
        return aggregate_ref(get(x), get(table), get(weight), blocks.inner, outer, how, dropout, seed_cpu)

    reference = exact(magnitude=False)
    degree = blocks.inner[0].diff() + (blocks.outer[0].diff() if table is not None else 0)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    bound = (degree[:, None] + 4) * UNIT[accumulator] * exact(magnitude=True) + unit * reference.abs()
    error = (out.detach().cpu().double() - reference).abs()
    assert out.dtype == x.dtype
    assert torch.isfinite(out).all()
    worst = (error - bound).max() if error.numel() else torch.tensor(0.0)
    assert worst <= 0, f"error {error.max():.3g} exceeds its bound by {worst:.3g}"

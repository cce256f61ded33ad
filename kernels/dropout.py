"""Dropout whose mask is a function of (seed, node, feature).

    out[r, f] = x[r, f] * keep(seed, ids[r], f) / (1 - p)

The mask of a node depends on its id, not on where the node stands in a batch: every edge that reads the node sees the
same mask, nothing is stored, and the backward computes it again. The generator is a counter-based integer hash (the
"lowbias32" finaliser, C. Wellons, hash-prospector), the same 32-bit arithmetic on every device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gas_triton.kernels._library import define

THRESHOLD_BITS = 24
CPU_BLOCK = 1 << 17
_FEATURE = -1640531527  # 0x9E3779B9 as int32
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_mask(ids: Tensor, num_features: int, p: float, seed: Tensor) -> Tensor:
    """The mask in plain torch: bool [len(ids), num_features], True where a feature is kept.

    Args:
        ids: int32 or int64 [R], node ids.
        num_features: F.
        p: probability of dropping a feature, in [0, 1).
        seed: int64 [1].
    """
    mask = torch.empty(ids.numel(), num_features, dtype=torch.bool, device=ids.device)
    for rows, block in _mask_blocks(ids, num_features, p, seed):
        mask[rows] = block
        del block
    return mask


def _mask_blocks(ids: Tensor, num_features: int, p: float, seed: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The mask, block of rows by block: the hash passes over its words a dozen times, in the cache."""
    key = _row_key(ids, seed)[:, None]
    feature = torch.arange(num_features, dtype=torch.int32, device=ids.device) * _FEATURE
    size = max(1, CPU_BLOCK // max(num_features, 1))
    for start in range(0, ids.numel(), size):
        rows = slice(start, start + size)
        word = _mix(key[rows] + feature)
        mask = _shift_right(word, 32 - THRESHOLD_BITS, word) >= threshold(p)
        # before the words of the next block are made
        del word
        yield rows, mask
        del mask


def keep_values(ids: Tensor, feature: Tensor, p: float, seed: Tensor) -> Tensor:
    """The mask of single values: bool [V], True where feature `feature[v]` of node `ids[v]` is kept."""
    kept = torch.empty(ids.numel(), dtype=torch.bool, device=ids.device)
    for start in range(0, ids.numel(), CPU_BLOCK):
        values = slice(start, start + CPU_BLOCK)
        word = _mix(_row_key(ids[values], seed) + feature[values].to(torch.int32) * _FEATURE)
        torch.ge(_shift_right(word, 32 - THRESHOLD_BITS, word), threshold(p), out=kept[values])
    return kept


def threshold(p: float) -> int:
    """Hash values below this many of 2**24 are dropped."""
    return round(p * (1 << THRESHOLD_BITS))


def _row_key(ids: Tensor, seed: Tensor) -> Tensor:
    return _mix(_mix(_as_int32(ids.long()) + _as_int32(seed)) + _as_int32(seed >> 32))


def _as_int32(value: Tensor) -> Tensor:
    low = value & 0xFFFFFFFF
    return torch.where(low > 0x7FFFFFFF, low - (1 << 32), low).to(torch.int32)


def _shift_right(word: Tensor, bits: int, out: Tensor) -> Tensor:
    # torch shifts int32 arithmetically; the hash is defined on unsigned words
    return torch.bitwise_right_shift(word, bits, out=out).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    """The finaliser, in place."""
    shifted = torch.empty_like(word)
    word.bitwise_xor_(_shift_right(word, 16, shifted)).mul_(0x7FEB352D)
    word.bitwise_xor_(_shift_right(word, 15, shifted)).mul_(-2073254261)  # 0x846CA68B
    return word.bitwise_xor_(_shift_right(word, 16, shifted))


@triton.jit
def _mix_bits(value):
    value ^= value >> 16
    value *= 0x7FEB352D
    value ^= value >> 15
    value *= 0x846CA68B
    value ^= value >> 16
    return value


@triton.jit
def row_key(ids, seed):
    """The part of the hash that a row's features share."""
    seed_low = (seed & 0xFFFFFFFF).to(tl.uint32)
    seed_high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix_bits(_mix_bits(ids.to(tl.uint32) + seed_low) + seed_high)


@triton.jit
def keep(key, o_feature, drop_below):
    """Whether a feature is kept, for a row's key; shapes broadcast."""
    return (_mix_bits(key + o_feature.to(tl.uint32) * 0x9E3779B9) >> 8) >= drop_below.to(tl.uint32)


@triton.jit(do_not_specialize=["num_rows", "drop_below"])
def _dropout_kernel(
    p_x, p_ids, p_seed, p_out, num_rows, drop_below, scale,
    F: tl.constexpr, STRIDE_X: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_row = o_row < num_rows
    m = m_row[:, None] & (o_feature < F)[None, :]
    ids = tl.load(p_ids + o_row, mask=m_row, other=0)
    key = row_key(ids, tl.load(p_seed))
    x = tl.load(p_x + o_row[:, None] * STRIDE_X + o_feature[None, :], mask=m, other=0.0)
    kept = keep(key[:, None], o_feature[None, :], drop_below)
    out = tl.where(kept, x * scale, 0.0)
    tl.store(p_out + o_row[:, None] * F + o_feature[None, :], out.to(x.dtype), mask=m)


def dropout_triton(x: Tensor, ids: Tensor, p: float, seed: Tensor) -> Tensor:
    num_rows, num_features = x.shape
    out = torch.empty((num_rows, num_features), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    block_f = min(triton.next_power_of_2(num_features), 256)
    rows = max(1, 1024 // block_f)
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_features, block_f))
    with torch.cuda.device_of(x):
        _dropout_kernel[grid](
            x, ids, seed, out, num_rows, threshold(p), 1.0 / (1.0 - p),
            F=num_features, STRIDE_X=x.stride(0), BLOCK_F=block_f, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return out


def dropout_cpu(x: Tensor, ids: Tensor, p: float, seed: Tensor) -> Tensor:
    out, scale = torch.empty(x.shape, dtype=x.dtype), 1.0 / (1.0 - p)
    # bits, because a product would make nan of what is dropped of inf, and `torch.where` is several times slower
    bits = _BITS[x.itemsize]
    read, written = x.view(bits), out.view(bits)
    for rows, mask in _mask_blocks(ids, x.size(1), p, seed):
        torch.bitwise_and(read[rows], mask.to(bits).neg_(), out=written[rows])
        out[rows].mul_(scale)
        del mask
    return out


def _dropout_fake(x: Tensor, ids: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, ids, p, seed = inputs
    ctx.save_for_backward(ids, seed)
    ctx.p = p


def _backward(ctx, grad):
    ids, seed = ctx.saved_tensors
    return dropout(grad, ids, ctx.p, seed), None, None, None


dropout = define(
    "dropout(Tensor x, Tensor ids, float p, Tensor seed) -> Tensor",
    cpu=dropout_cpu,
    cuda=dropout_triton,
    fake=_dropout_fake,
    setup_context=_setup_context,
    backward=_backward,
)

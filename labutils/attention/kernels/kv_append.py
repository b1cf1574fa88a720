"""Writes new keys and values into a KV cache, and rotates keys and queries by the rotary embedding.

Source of the embedding: arXiv 2104.09864. Pairs (x1, x2) of a vector at position p become
(x1 cos - x2 sin, x1 sin + x2 cos), cos and sin from row p of the caller's tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from labutils.attention.kernels.launch import CACHE_SIZES, SEQUENCE_LENGTHS, launch
from labutils.attention.kernels.launch_config import SMALLEST_BLOCK, LaunchConfig, next_power_of_2
from labutils.attention.kernels.options import Cache


@triton.jit(do_not_specialize=(*SEQUENCE_LENGTHS, *CACHE_SIZES))
def _append_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, seqlens_ptr, batch_idx_ptr, leftpad_ptr, table_ptr, stride_tb, CAPACITY, PLACES,
    POSITIONS, H, N_Q, N_K,
    stride_xb, stride_xn, stride_xh, stride_xd,
    stride_yb, stride_yn, stride_yh, stride_yd,
    stride_cn, stride_cd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, TO_CACHE: tl.constexpr, ONE_POSITION: tl.constexpr,
):  # fmt: skip
    """One token of one sequence, all heads: rotates x (B, N_Q, H, D) and writes it to y, a cache or a tensor like x.

    Nobody checks lengths and places in a captured CUDA graph. Whatever they are, nothing is read or written outside of
    the tables and the cache: a token without a place in the cache is not written, and one whose position the tables
    lack is not rotated.
    """
    b = (tl.program_id(0) // N_Q).to(tl.int64)
    n = tl.program_id(0) % N_Q
    position = N_K
    if seqlens_ptr is not None:
        position = tl.load(seqlens_ptr + b)
    step = n
    if ONE_POSITION:
        step = 0
    exists = position >= 0  # a negative length is padding
    if CAPACITY is not None:
        exists = exists & (position < CAPACITY - step)
    position = tl.where(exists, position + step, 0)
    offs_h = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    inside = (offs_h < H) & (offs_d < D)
    x_ptrs = x_ptr + b * stride_xb + n.to(tl.int64) * stride_xn + offs_h * stride_xh
    x = tl.load(x_ptrs + offs_d * stride_xd, mask=inside, other=0.0)
    if cos_ptr is not None:
        if INTERLEAVED:
            is_first = offs_d % 2 == 0
            partner = tl.where(is_first, offs_d + 1, offs_d - 1)
            pair = offs_d // 2
        else:
            is_first = offs_d < ROTARY // 2
            partner = tl.where(is_first, offs_d + ROTARY // 2, offs_d - ROTARY // 2)
            pair = offs_d % (ROTARY // 2)
        turned = inside & (offs_d < ROTARY)
        other = tl.load(x_ptrs + partner * stride_xd, mask=turned, other=0.0).to(tl.float32)
        known = exists & (position < POSITIONS)
        row = position.to(tl.int64) * stride_cn
        cos = tl.load(cos_ptr + row + pair * stride_cd, mask=known & (offs_d < ROTARY), other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + row + pair * stride_cd, mask=known & (offs_d < ROTARY), other=0.0).to(tl.float32)
        x = x.to(tl.float32) * cos + tl.where(is_first, -other, other) * sin
    y_ptr += offs_h * stride_yh + offs_d * stride_yd
    if not TO_CACHE:
        y_ptr += b * stride_yb + n.to(tl.int64) * stride_yn
    elif table_ptr is not None:
        block = tl.load(table_ptr + b * stride_tb + position // PAGE, mask=exists, other=0).to(tl.int64)
        inside = inside & exists & (block >= 0) & (block < PLACES)
        y_ptr += block * stride_yb + (position % PAGE).to(tl.int64) * stride_yn
    else:
        place = b
        if batch_idx_ptr is not None:
            place = tl.load(batch_idx_ptr + b).to(tl.int64)
            exists = exists & (place >= 0) & (place < PLACES)
        inside = inside & exists
        y_ptr += place * stride_yb + position.to(tl.int64) * stride_yn
    tl.store(y_ptr, x.to(y_ptr.dtype.element_ty), mask=inside)


def _run(x, y, cache, cos, sin, interleaved, *, to_cache, one_position=False) -> None:
    batch, n, heads, head_dim = x.shape
    places = cache.arguments(y) if to_cache else (cache.seqlens, None, None, None, None, None, None)
    launch(
        _append_kernel, (batch * n,), LaunchConfig(SMALLEST_BLOCK, SMALLEST_BLOCK, 4, 1),
        x, y, cos, sin, *places, None if cos is None else len(cos), heads, n, cache.seqlen, *x.stride(), *y.stride(),
        *((0, 0) if cos is None else cos.stride()),
        D=head_dim, BLOCK_D=next_power_of_2(head_dim), BLOCK_H=next_power_of_2(heads),
        PAGE=cache.page(y) if to_cache else 0, ROTARY=0 if cos is None else 2 * cos.shape[1],
        INTERLEAVED=interleaved, TO_CACHE=to_cache, ONE_POSITION=one_position,
    )  # fmt: skip


def append(
    new: torch.Tensor,
    into: torch.Tensor,
    cache: Cache,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = True,
) -> None:
    """Writes new keys or values into the cache, behind those that it holds; with cos and sin it rotates them first.

    Args:
        new: (B, N_new, H_kv, D): row i of sequence b goes to place seqlens[b] + i of the cache.
        into: the cache, (B_cache, N_cache, H_kv, D), or (blocks, rows of a block, H_kv, D) with a block table.
        cache: where each sequence has its keys, before these are appended.
        cos, sin: (positions, rotary_dim / 2), equal strides; rotary_dim at most D.
        interleaved: True: a pair is two neighbours. False: one from each half of the rotary dimensions.
    """
    _run(new, into, cache, cos, sin, interleaved, to_cache=True)


def rotate(
    q: torch.Tensor, cache: Cache, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, *, one_position: bool
) -> torch.Tensor:
    """A rotated copy of queries (B, N_q, H, D): query i to position seqlens[b] + i, or all of them to seqlens[b]."""
    rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _run(q, rotated, cache, cos, sin, interleaved, to_cache=False, one_position=one_position)
    return rotated

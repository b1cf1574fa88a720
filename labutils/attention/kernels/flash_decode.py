"""Decoding: a few queries against a long KV cache, which is split over programs; a second kernel merges the parts.

With one query per sequence each head has a single row of scores, and the forward kernel would leave most of the GPU
idle. So two things change here. The query heads that share a key head become the rows of one tile, and each key is read
once for all of them. The keys are split into `splits` parts (flash decoding): each part gives an output and a
log-sum-exp, and the second kernel merges them. It can, because the online softmax is associative.

Source: T. Dao, D. Haziza, F. Massa, G. Sizov, "Flash-Decoding for long-context inference" (PyTorch blog, 2023).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from labutils.attention.kernels.flash_v2 import attend
from labutils.attention.kernels.launch import CACHE_SIZES, SEQUENCE_LENGTHS, Launch, launch, pick_config
from labutils.attention.kernels.launch_config import SMALLEST_BLOCK, LaunchConfig, cdiv, next_power_of_2
from labutils.attention.kernels.options import Cache, Options
from labutils.attention.kernels.scores import LN_2, LOG2_E, columns_of
from labutils.attention.kernels.tiles import load_tile, row_pointers, source, store_tile

MOST_SPLITS = 128  # the merge holds all parts of a row in one tile


@triton.jit(do_not_specialize=(*SEQUENCE_LENGTHS, *CACHE_SIZES, "N_NEW", "SPLITS"))
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    seqlens_ptr, batch_idx_ptr, leftpad_ptr, table_ptr, stride_tb, CAPACITY, PLACES,
    slopes_ptr, stride_sb, softmax_scale, softcap, window_left, window_right, H_KV, SPLITS, N_Q, N_K, N_NEW,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_os, stride_ob, stride_on, stride_oh, stride_od,
    stride_ls, stride_lb, stride_lh, stride_ln,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of rows of one key head against one part of its keys. Row r is query r // GROUP of head r % GROUP."""
    blocks_m = tl.cdiv(N_Q * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    start_m = pid % blocks_m * BLOCK_M
    split = pid // blocks_m % SPLITS
    b = (pid // blocks_m // SPLITS // H_KV).to(tl.int64)
    h_kv = (pid // blocks_m // SPLITS % H_KV).to(tl.int64)

    # Nobody checks lengths and places in a captured CUDA graph: whatever they are, no key outside of the cache is read.
    n_k = N_K + N_NEW
    if seqlens_ptr is not None:
        length = tl.minimum(tl.load(seqlens_ptr + b), CAPACITY)
        n_k = tl.where(length < 0, 0, tl.minimum(length + N_NEW, CAPACITY))  # below 0 it is padding
    k_ptr += h_kv * stride_kh
    v_ptr += h_kv * stride_vh
    if table_ptr is not None:
        table_ptr += b * stride_tb
    else:
        place = b
        if batch_idx_ptr is not None:
            place = tl.load(batch_idx_ptr + b).to(tl.int64)
            n_k = tl.where((place >= 0) & (place < PLACES), n_k, 0)
            place = tl.minimum(tl.maximum(place, 0), PLACES - 1)
        k_ptr += place * stride_kb
        v_ptr += place * stride_vb
        if leftpad_ptr is not None:
            first_key = tl.minimum(tl.maximum(tl.load(leftpad_ptr + b), 0), n_k)
            n_k -= first_key
            k_ptr += first_key.to(tl.int64) * stride_kn
            v_ptr += first_key.to(tl.int64) * stride_vn

    offs_m = start_m + tl.arange(0, BLOCK_M)
    token = offs_m // GROUP
    head = h_kv * GROUP + offs_m % GROUP
    place_q = token.to(tl.int64) * stride_qn + head * stride_qh
    place_o = token.to(tl.int64) * stride_on + head * stride_oh
    k_src = source(k_ptr, stride_kn, stride_kd, BLOCK_N, BLOCK_D, False, table_ptr)
    v_src = source(v_ptr, stride_vn, stride_vd, BLOCK_N, BLOCK_D, False, table_ptr)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_sb + head)[:, None]
    q_ptrs = row_pointers(q_ptr + b * stride_qb, stride_qd, place_q, BLOCK_D)
    q = load_tile(q_ptrs, offs_m, N_Q * GROUP, D, BLOCK_D)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    rows = token[:, None]
    offset = n_k - N_Q
    TOKENS: tl.constexpr = (BLOCK_M + GROUP - 2) // GROUP + 1  # the most queries with rows in one tile
    first, begin, end, last = columns_of(start_m // GROUP, N_Q, n_k, offset, window_left, window_right, TOKENS, BLOCK_N)
    part = tl.cdiv(tl.cdiv(last - first, BLOCK_N), SPLITS) * BLOCK_N
    first = tl.minimum(first + split * part, last)
    last = tl.minimum(first + part, last)
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q, k_src, v_src, 0, 0, stride_kn, stride_kd, stride_vn, stride_vd,
        table_ptr, PLACES, stride_kb, stride_vb,
        rows, first, begin, end, last, n_k, offset, None, slope, None, None, softmax_scale, softcap,
        window_left, window_right, D, BLOCK_D, BLOCK_N, PAGE, False,
    )  # fmt: skip

    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    o_ptrs = row_pointers(o_ptr + split.to(tl.int64) * stride_os + b * stride_ob, stride_od, place_o, BLOCK_D)
    store_tile(o_ptrs, acc / l_safe[:, None], offs_m, N_Q * GROUP, D, BLOCK_D)
    lse_ptrs = lse_ptr + split.to(tl.int64) * stride_ls + b * stride_lb + head * stride_lh + token * stride_ln
    tl.store(lse_ptrs, (m_i + tl.math.log2(l_safe)) * LN_2, mask=offs_m < N_Q * GROUP)


@triton.jit(do_not_specialize=(*SEQUENCE_LENGTHS, "SPLITS"))
def _merge_kernel(
    parts_ptr, part_lse_ptr, o_ptr, lse_ptr, H, N_Q, SPLITS,
    stride_ps, stride_pr, stride_ls, stride_lr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """O = Σ_s exp(L_s - L) O_s with L = log Σ_s exp(L_s): one program per row (sequence, query, head) of the output."""
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse_ptr + offs_s * stride_ls + row * stride_lr, mask=offs_s < SPLITS, other=float("-inf"))
    parts = tl.load(
        parts_ptr + offs_s[:, None] * stride_ps + row * stride_pr + offs_d[None, :],
        mask=(offs_s[:, None] < SPLITS) & (offs_d[None, :] < D),
        other=0.0,
    )
    m = tl.max(lse, axis=0)
    weight = tl.math.exp2((lse - tl.where(m == float("-inf"), 0.0, m)) * LOG2_E)
    l = tl.sum(weight, axis=0)
    l_safe = tl.where(l == 0.0, 1.0, l)
    o = tl.sum(parts * (weight / l_safe)[:, None], axis=0)
    tl.store(o_ptr + row * D + offs_d, o.to(o_ptr.dtype.element_ty), mask=offs_d < D)
    b, n, h = row // H // N_Q, row // H % N_Q, row % H
    tl.store(lse_ptr + (b * H + h) * N_Q + n, m + tl.math.log2(l_safe) * LN_2)


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def cut_to_rows(config: LaunchConfig, rows: int) -> LaunchConfig:
    """The configuration with tiles for no more than `rows` rows, the queries times the heads that share a key head."""
    return replace(config, block_m=min(config.block_m, max(SMALLEST_BLOCK, next_power_of_2(rows))))


@functools.lru_cache(1024)  # every layer asks the same for every token, and trying all splits takes as long as a launch
def choose_splits(programs: int, tiles: int, slots: int) -> int:
    """How many parts to split the keys into: the number with which all programs end first, if they run in waves.

    Args:
        programs: how many there are without a split. tiles: blocks of keys of the longest sequence.
        slots: programs in a wave. There is one for each multiprocessor, since two would read no faster.

    A wave takes the time of the tiles of one program, and a little more to begin and end. A split adds the merge.
    """
    begin_and_end, merge = 2, 2  # each takes as long as so many tiles

    def cost(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves * (-(-tiles // splits) + begin_and_end) + (merge if splits > 1 else 0)

    return min(range(1, max(1, min(tiles, MOST_SPLITS)) + 1), key=cost)


class Plan(NamedTuple):
    """The part of a decoding launch that does not depend on the number of keys.

    Attributes:
        right: the window's right bound; None if already the first query sees the last key.
        config: the launch configuration. programs: how many there are without a split. slots: as in `choose_splits`.
    """

    right: int | None
    config: LaunchConfig
    programs: int
    slots: int

    @staticmethod
    def of(q: torch.Tensor, heads_kv: int, right: int | None, n_k: int, config: LaunchConfig | None = None) -> Plan:
        """The plan for queries (B, N_q, H, D). Only in the interpreter does it depend on `n_k`, the most keys."""
        batch, n_q, heads, head_dim = q.shape
        rows = n_q * heads // heads_kv
        if right is not None and right >= n_q - 1:
            right = None  # causal decoding of one token
        if config is None:
            kernel = "decode" if rows < 128 else "forward"  # many rows: a prompt against the cache
            config = pick_config(kernel, head_dim, q.dtype, right is not None, q.device, longest=max(rows, n_k))
            config = cut_to_rows(config, rows)
        slots = _multiprocessors(q.device.index or 0) if q.is_cuda else 1
        return Plan(right, config, batch * heads_kv * cdiv(rows, config.block_m), slots)

    def splits(self, n_k: int) -> int:
        """How many parts to split `n_k` keys into."""
        return choose_splits(self.programs, cdiv(n_k, self.config.block_n), self.slots)


def rows_of_merge(splits: int) -> int:
    """Rows of the tile in which `_merge_kernel` holds all parts of one row of the output."""
    return max(SMALLEST_BLOCK, next_power_of_2(splits))


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache: Cache,
    options: Options,
    *,
    n_new: int = 0,
    splits: int = 0,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few queries over the keys of a cache; no backward.

    Args:
        q: (B, N_q, H, D).
        k_cache, v_cache: (B_cache, N_cache, H_kv, D), or (blocks, rows of a block, H_kv, D) with a block table.
        cache: where each sequence has its keys.
        options: scale, window, softcap, ALiBi; no dropout, no packed sequences.
        n_new: keys in the cache that `cache` does not count, since they were just appended.
        splits: parts of the keys, 1 to 128; 0 lets `choose_splits` decide.
        config: block sizes and warps; by default from the launch table, with no more rows than needed.

    Returns:
        out (B, N_q, H, D) in the dtype of q, and lse (B, H, N_q) float32, natural logarithm. For rows that see no key
        they are zero and -inf.

    Raises:
        RuntimeError: as `launch.pick_config` and `launch.launch`.
    """
    n_k = cache.seqlen + n_new  # of the longest sequence
    plan = Plan.of(q, k_cache.shape[2], options.window_right, n_k, config)
    return launch_decode(q, k_cache, v_cache, cache, options, plan, n_new, splits or plan.splits(n_k))[:2]


def launch_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache: Cache,
    options: Options,
    plan: Plan,
    n_new: int,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor, list[Launch | None]]:
    """`decode` by a plan. Also returns its launches, for `replay.Replay`: the decoding, then the merge if any."""
    batch, n_q, heads, head_dim = q.shape
    heads_kv, config = k_cache.shape[2], plan.config
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, n_q, dtype=torch.float32, device=q.device)
    if splits == 1:
        parts, part_lse = out[None], lse.transpose(1, 2)[None]
    else:  # the parts stay float32: rounding each would add to the error
        parts = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, batch, n_q, heads), dtype=torch.float32, device=q.device)
    launched = [launch(
        _decode_kernel, (plan.programs * splits,), config,
        q, k_cache, v_cache, parts, part_lse, *cache.arguments(k_cache),
        *options.slopes(), options.softmax_scale, options.softcap, options.window_left, plan.right, heads_kv, splits,
        n_q, cache.seqlen, n_new, *q.stride(), *k_cache.stride(), *v_cache.stride(), *parts.stride(),
        part_lse.stride(0), part_lse.stride(1), part_lse.stride(3), part_lse.stride(2),
        D=head_dim, BLOCK_D=config.block_d(head_dim), GROUP=heads // heads_kv, PAGE=cache.page(k_cache),
    )]  # fmt: skip
    if splits > 1:
        block_s = rows_of_merge(splits)
        warps = 4 if block_s * head_dim <= 8192 else 16
        launched.append(launch(
            _merge_kernel, (batch * n_q * heads,), LaunchConfig(SMALLEST_BLOCK, SMALLEST_BLOCK, warps, 1),
            parts, part_lse, out, lse, heads, n_q, splits, parts.stride(0), head_dim, part_lse.stride(0), 1,
            D=head_dim, BLOCK_D=config.block_d(head_dim), BLOCK_S=block_s,
        ))  # fmt: skip
    return out, lse, launched

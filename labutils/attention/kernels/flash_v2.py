"""FlashAttention-2, forward: one program per block of queries; O, l and m on chip; log-sum-exp kept for the backward.

Scores are kept in base 2: exp(x) = 2^(x log2 e), and the GPU computes 2^x in one instruction. The softmax scale
contains the factor log2 e, so the change of base costs nothing.

Source: arXiv 2307.08691, Algorithm 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from labutils.attention.kernels.launch import SEQUENCE_LENGTHS, Launch, describe, descriptors_fit, launch, pick_config
from labutils.attention.kernels.launch_config import LaunchConfig, cdiv
from labutils.attention.kernels.options import Options, with_batch
from labutils.attention.kernels.scores import (
    LN_2,
    columns_of,
    dropout_keep,
    end_of_sequences,
    mask_tile,
    score_tile,
    score_unit,
    sequence,
)
from labutils.attention.kernels.tiles import (
    blocks_of_keys,
    load_paged,
    load_rows,
    load_tile,
    source,
    store_tile,
    tile_pointers,
    zero_rows,
)


@triton.jit
def attend(
    acc, l_i, m_i, q, k_src, v_src, b, h_kv, stride_kn, stride_kd, stride_vn, stride_vd,
    table_ptr, BLOCKS, stride_kp, stride_vp,
    rows, first, begin, end, last, n_k, offset, head, slope, seed_ptr, dropout_p, softmax_scale, softcap,
    window_left, window_right,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds the columns from `first` to `last` to acc, l and m of one block of rows.

    From `begin` to `end` every row sees every column, and no mask is computed. All threads of a program take the same
    side of that branch, so it costs next to nothing. Two loops, one with the mask and one without, would fill two
    pipelines and need more registers.
    """
    unit = score_unit(softmax_scale, softcap, slope)
    for start_n in tl.range(first, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if table_ptr is not None:
            block = blocks_of_keys(table_ptr, offs_n, n_k, BLOCKS, PAGE)
            k = load_paged(k_src, block, offs_n, stride_kp, stride_kn, stride_kd, D, BLOCK_D, PAGE)
        else:
            k = load_rows(k_src, stride_kn, b, h_kv, start_n, n_k, D, BLOCK_N, BLOCK_D, TMA)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # S_ij = Q_i K_jᵀ
        s, _ = score_tile(s, rows, offs_n[None, :], offset, softmax_scale, softcap, slope)
        if (start_n < begin) | (start_n >= end):  # an edge of the mask or the end of the sequence
            s = mask_tile(s, rows, offs_n[None, :], n_k, offset, window_left, window_right)
        if table_ptr is not None:
            s = tl.where(block[None, :] >= 0, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1) * unit)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: 2^(-inf - 0) = 0, 2^(-inf + inf) = NaN
        p = tl.math.exp2(s * unit - m_safe[:, None])  # P_ij = exp(S_ij - m_new), one multiply-add and one exp2
        alpha = tl.math.exp2(m_i - m_safe)  # rescales sums from the old maximum to the new one
        l_i = l_i * alpha + tl.sum(p, axis=1)
        if seed_ptr is not None:  # the softmax is over all keys: l stays, and only the sum over V loses a weight
            p = tl.where(dropout_keep(seed_ptr, dropout_p, head, rows, offs_n[None, :]), p, 0.0)
        if table_ptr is not None:
            v = load_paged(v_src, block, offs_n, stride_vp, stride_vn, stride_vd, D, BLOCK_D, PAGE)
        else:
            v = load_rows(v_src, stride_vn, b, h_kv, start_n, n_k, D, BLOCK_N, BLOCK_D, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # O_i = alpha O_i + P_ij V_j
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, slopes_ptr, stride_sb, seed_ptr, dropout_p,
    softmax_scale, softcap, window_left, window_right, table_ptr, stride_tb, BLOCKS,
    H, GROUP, N_Q, N_K, TOTAL_Q, TOTAL_K,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_ob, stride_on, stride_oh, stride_od,
    stride_lb, stride_lh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(N_Q, BLOCK_M)
    bh = tl.program_id(0) // blocks_m  # neighbours in the grid share a head, so its K and V stay in the L2 cache
    pid_m = tl.program_id(0) % blocks_m
    if window_right is not None:
        pid_m = blocks_m - 1 - pid_m  # the last rows see the most keys: they start first, so that all end together
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    start_q, n_q = sequence(cu_seqlens_q_ptr, b, N_Q, TOTAL_Q)
    start_k, n_k = sequence(cu_seqlens_k_ptr, b, N_K, TOTAL_K)
    start_m = pid_m * BLOCK_M
    if cu_seqlens_q_ptr is not None:
        programs = tl.num_programs(0) // H  # of a head: together they fill the rows that belong to no sequence
        place = b * blocks_m + pid_m
        behind = end_of_sequences(cu_seqlens_q_ptr, programs // blocks_m, TOTAL_Q)
        zero_rows(o_ptr + h * stride_oh, stride_on, stride_od, behind, TOTAL_Q, place, programs, D, BLOCK_D, BLOCK_M)
        for start in tl.range(behind + place * BLOCK_M, TOTAL_Q, programs * BLOCK_M):
            offs = start + tl.arange(0, BLOCK_M)
            tl.store(lse_ptr + h * stride_lh + offs, float("-inf"), mask=offs < TOTAL_Q)
    if start_m >= n_q:
        return  # packed sequences: the grid is made for the longest one
    batch = b
    if cu_seqlens_q_ptr is not None:
        batch = b * 0  # packed sequences are a batch of one
    q_ptr += batch * stride_qb + start_q * stride_qn + h * stride_qh
    o_ptr += batch * stride_ob + start_q * stride_on + h * stride_oh
    h_kv = (h // GROUP).to(tl.int32)
    if not TMA:  # with TMA k_ptr and v_ptr are tensor descriptors: a load from them names b and h_kv
        k_ptr += h_kv.to(tl.int64) * stride_kh
        v_ptr += h_kv.to(tl.int64) * stride_vh
        if table_ptr is not None:
            table_ptr += b * stride_tb
        else:
            k_ptr += batch * stride_kb + start_k * stride_kn
            v_ptr += batch * stride_vb + start_k * stride_vn
    k_src = source(k_ptr, stride_kn, stride_kd, BLOCK_N, BLOCK_D, TMA, table_ptr)
    v_src = source(v_ptr, stride_vn, stride_vd, BLOCK_N, BLOCK_D, TMA, table_ptr)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_sb + h)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = offs_m[:, None]
    offset = n_k - n_q  # bottom-right alignment: a causal mask lets row i see the columns j <= i + offset

    q = load_tile(tile_pointers(q_ptr, stride_qn, stride_qd, start_m, BLOCK_M, BLOCK_D), offs_m, n_q, D, BLOCK_D)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, begin, end, last = columns_of(start_m, n_q, n_k, offset, window_left, window_right, BLOCK_M, BLOCK_N)
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q, k_src, v_src, bh // H, h_kv, stride_kn, stride_kd, stride_vn, stride_vd,
        table_ptr, BLOCKS, stride_kb, stride_vb,
        rows, first, begin, end, last, n_k, offset, bh, slope, seed_ptr, dropout_p, softmax_scale, softcap,
        window_left, window_right, D, BLOCK_D, BLOCK_N, PAGE, TMA,
    )  # fmt: skip

    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    divisor = l_safe
    if seed_ptr is not None:
        divisor = l_safe * (1.0 - dropout_p)  # the weights that are kept stand for the dropped ones, too
    acc = acc / divisor[:, None]  # the one division; rows that saw nothing stay zero
    store_tile(tile_pointers(o_ptr, stride_on, stride_od, start_m, BLOCK_M, BLOCK_D), acc, offs_m, n_q, D, BLOCK_D)
    lse = (m_i + tl.math.log2(l_safe)) * LN_2  # rows that saw nothing: m is -inf, and so is lse
    lse_ptr += batch * stride_lb + h * stride_lh + start_q
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < n_q)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, config: LaunchConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by FlashAttention-2.

    Args:
        q: (B, N_q, H, D), or (total_q, H, D) of packed sequences.
        k, v: (B, N_k, H_kv, D), or (total_k, H_kv, D); with a block table (blocks, rows of a block, H_kv, D). H_kv
            divides H. Any strides.
        options: scale, masks, dropout, and where packed sequences begin.
        config: block sizes and warps; by default from the launch table.

    Returns:
        out in the shape and dtype of q, and lse (B, H, N_q), or (H, total_q) of packed sequences: float32, natural
        logarithm. For rows that see no key, and packed rows behind the last sequence, they are zero and -inf.

    Raises:
        RuntimeError: as `launch.pick_config` and `launch.launch`.
    """
    return launch_forward(q, k, v, options, config)[:2]


def launch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, config: LaunchConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor, Launch | None]:
    """`forward`, which also returns its launch, for a `replay.Replay`."""
    batch, n_q, n_k = options.sizes(q, k)
    heads, head_dim = q.shape[-2:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    packed = options.cu_seqlens_q is not None
    lse = torch.empty((heads, len(q)) if packed else (batch, heads, n_q), dtype=torch.float32, device=q.device)
    if config is None:
        config = pick_config(
            "forward", head_dim, q.dtype, options.window_right is not None, q.device, longest=max(n_q, n_k)
        )
    block_d = config.block_d(head_dim)
    tma = config.tma and not packed and options.block_table is None and descriptors_fit(k, v)
    programs = cdiv(n_q, config.block_m) * batch * heads
    if packed and programs == 0:  # no sequence has a row, and no program writes those behind
        out.zero_()
        lse.fill_(-torch.inf)
    launched = launch(
        _forward_kernel, (programs,), config,
        q, *(describe(t, config.block_n, block_d) if tma else t for t in (k, v)), out, lse,
        *options.arguments(), *options.paging(k), heads, heads // k.shape[-2], n_q, n_k,
        *options.totals(q, k),
        *with_batch(q).stride(), *with_batch(k).stride(), *with_batch(v).stride(), *with_batch(out).stride(),
        0 if packed else lse.stride(0), lse.stride(-2),
        D=head_dim, BLOCK_D=block_d, PAGE=0 if options.block_table is None else k.shape[1], TMA=tma,
    )  # fmt: skip
    return out, lse, launched

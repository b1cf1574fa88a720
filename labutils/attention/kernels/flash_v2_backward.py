"""FlashAttention-2, backward: recomputes the probabilities from the log-sum-exp, in two kernels without atomics.

`_dq_kernel` has one program per block of queries, and also computes Δ = rowsum(dO ∘ O). `_dkdv_kernel` has one program
per block of keys, and reads Δ. No two programs write to the same place, so the result has the same bits in every run.

Source: arXiv 2307.08691, Algorithm 2. The split into two kernels is ours; S and dP are computed in both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from labutils.attention.kernels.launch import (
    SEQUENCE_LENGTHS,
    Launch,
    describe,
    describe_vectors,
    descriptors_fit,
    launch,
    pick_config,
)
from labutils.attention.kernels.launch_config import LaunchConfig, cdiv
from labutils.attention.kernels.options import Options, with_batch
from labutils.attention.kernels.scores import (
    LOG2_E,
    columns_of,
    dropout_keep,
    end_of_sequences,
    mask_tile,
    rows_of,
    score_tile,
    score_unit,
    sequence,
)
from labutils.attention.kernels.tiles import (
    load_rows,
    load_tile,
    load_vector,
    source,
    store_tile,
    tile_pointers,
    zero_rows,
)


@triton.jit
def _dq_inner(
    dq, q, do, lse2, delta, k_src, v_src, b, h_kv, stride_kn, stride_vn,
    rows, first, begin, end, last, n_k, offset, head, slope, seed_ptr, dropout_p, softmax_scale, softcap,
    window_left, window_right,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds the columns from `first` to `last` to dQ of one block of rows; `begin` and `end` as in `flash_v2.attend`."""
    unit = score_unit(softmax_scale, softcap, slope)
    for start_n in tl.range(first, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_src, stride_kn, b, h_kv, start_n, n_k, D, BLOCK_N, BLOCK_D, TMA)
        v = load_rows(v_src, stride_vn, b, h_kv, start_n, n_k, D, BLOCK_N, BLOCK_D, TMA)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s, derivative = score_tile(s, rows, offs_n[None, :], offset, softmax_scale, softcap, slope)
        if (start_n < begin) | (start_n >= end):
            s = mask_tile(s, rows, offs_n[None, :], n_k, offset, window_left, window_right)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # tensor cores compute it beside the exponentials below
        p = tl.math.exp2(s * unit - lse2[:, None])  # P_ij = exp(S_ij - L_i)
        if seed_ptr is not None:
            keep = dropout_keep(seed_ptr, dropout_p, head, rows, offs_n[None, :])
            dp = tl.where(keep, dp / (1.0 - dropout_p), 0.0)
        ds = p * (dp - delta[:, None]) * derivative  # dS_ij = P_ij ∘ (dP_ij - Δ_i)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # dQ_i += dS_ij K_j
    return dq


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, lse2_ptr, delta_ptr, dq_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, slopes_ptr, stride_sb, seed_ptr, dropout_p,
    softmax_scale, softcap, window_left, window_right, H, GROUP, N_Q, N_K, TOTAL_Q, TOTAL_K,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_ob, stride_on, stride_oh, stride_od,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_dqb, stride_dqn, stride_dqh, stride_dqd,
    stride_lb, stride_lh, stride_rb, stride_rh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(N_Q, BLOCK_M)
    bh = tl.program_id(0) // blocks_m
    pid_m = tl.program_id(0) % blocks_m
    if window_right is not None:
        pid_m = blocks_m - 1 - pid_m
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    start_q, n_q = sequence(cu_seqlens_q_ptr, b, N_Q, TOTAL_Q)
    start_k, n_k = sequence(cu_seqlens_k_ptr, b, N_K, TOTAL_K)
    start_m = pid_m * BLOCK_M
    if cu_seqlens_q_ptr is not None:  # as in the forward kernel
        programs = tl.num_programs(0) // H
        behind = end_of_sequences(cu_seqlens_q_ptr, programs // blocks_m, TOTAL_Q)
        zero_rows(
            dq_ptr + h * stride_dqh, stride_dqn, stride_dqd,
            behind, TOTAL_Q, b * blocks_m + pid_m, programs, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    if start_m >= n_q:
        return
    batch = b
    if cu_seqlens_q_ptr is not None:
        batch = b * 0
    q_ptr += batch * stride_qb + start_q * stride_qn + h * stride_qh
    o_ptr += batch * stride_ob + start_q * stride_on + h * stride_oh
    do_ptr += batch * stride_dob + start_q * stride_don + h * stride_doh
    dq_ptr += batch * stride_dqb + start_q * stride_dqn + h * stride_dqh
    h_kv = (h // GROUP).to(tl.int32)
    if not TMA:
        k_ptr += batch * stride_kb + start_k * stride_kn + h_kv.to(tl.int64) * stride_kh
        v_ptr += batch * stride_vb + start_k * stride_vn + h_kv.to(tl.int64) * stride_vh
    per_row = batch * stride_lb + h * stride_lh + start_q
    k_src = source(k_ptr, stride_kn, stride_kd, BLOCK_N, BLOCK_D, TMA)
    v_src = source(v_ptr, stride_vn, stride_vd, BLOCK_N, BLOCK_D, TMA)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_sb + h)
    offset = n_k - n_q
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = offs_m[:, None]
    q = load_tile(tile_pointers(q_ptr, stride_qn, stride_qd, start_m, BLOCK_M, BLOCK_D), offs_m, n_q, D, BLOCK_D)
    o = load_tile(tile_pointers(o_ptr, stride_on, stride_od, start_m, BLOCK_M, BLOCK_D), offs_m, n_q, D, BLOCK_D)
    do = load_tile(tile_pointers(do_ptr, stride_don, stride_dod, start_m, BLOCK_M, BLOCK_D), offs_m, n_q, D, BLOCK_D)
    # The gradient of softmax subtracts Δ_i = Σ_d dO_id O_id from each dP_ij of row i. A gradient by the log-sum-exp
    # is added here, too: ∂L_i/∂S_ij = P_ij, so that dS_ij = P_ij (dP_ij - Δ_i + dL_i).
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + per_row + offs_m, mask=offs_m < n_q, other=0.0)
    lse2 = tl.load(lse_ptr + per_row + offs_m, mask=offs_m < n_q, other=0.0) * LOG2_E
    lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)  # a row that saw no key: P = 2^(-inf - 0) = 0
    per_row = batch * stride_rb + h * stride_rh + start_q
    tl.store(delta_ptr + per_row + offs_m, delta, mask=offs_m < n_q)
    tl.store(lse2_ptr + per_row + offs_m, lse2, mask=offs_m < n_q)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    first, begin, end, last = columns_of(start_m, n_q, n_k, offset, window_left, window_right, BLOCK_M, BLOCK_N)
    dq = _dq_inner(
        dq, q, do, lse2, delta, k_src, v_src, bh // H, h_kv, stride_kn, stride_vn,
        rows, first, begin, end, last, n_k, offset, bh, slope, seed_ptr, dropout_p, softmax_scale, softcap,
        window_left, window_right, D, BLOCK_D, BLOCK_N, TMA,
    )  # fmt: skip
    dq_ptrs = tile_pointers(dq_ptr, stride_dqn, stride_dqd, start_m, BLOCK_M, BLOCK_D)
    store_tile(dq_ptrs, dq * softmax_scale, offs_m, n_q, D, BLOCK_D)


@triton.jit
def _dkdv_inner(
    dk, dv, k, v, q_src, do_src, lse2_src, delta_src, b, h, stride_qn, stride_don,
    cols, first, begin, end, last, n_q, n_k, offset, head, slope, seed_ptr, dropout_p, softmax_scale, softcap,
    window_left, window_right,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds the rows from `first` to `last` to dK and dV of a block of keys; `begin` and `end` as in `flash_v2.attend`.

    Every tile is transposed, keys down and queries across: Pᵀ and dSᵀ are then the left operands of the products for dV
    and dK. Rows past n_q must have P = 0: with ALiBi it may be infinite, and infinity times a dO of zero is NaN.
    """
    unit = score_unit(softmax_scale, softcap, slope)
    for start_m in tl.range(first, last, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_rows(q_src, stride_qn, b, h, start_m, n_q, D, BLOCK_M, BLOCK_D, TMA)
        do = load_rows(do_src, stride_don, b, h, start_m, n_q, D, BLOCK_M, BLOCK_D, TMA)
        lse2 = load_vector(lse2_src, head, start_m, BLOCK_M, TMA)
        delta = load_vector(delta_src, head, start_m, BLOCK_M, TMA)
        sT = tl.dot(k, tl.trans(q), input_precision="ieee")  # S_ijᵀ = K_j Q_iᵀ
        sT, derivative = score_tile(sT, offs_m[None, :], cols, offset, softmax_scale, softcap, slope)
        if (start_m < begin) | (start_m >= end):
            sT = mask_tile(sT, offs_m[None, :], cols, n_k, offset, window_left, window_right)
            lse2 = tl.where(offs_m < n_q, lse2, float("inf"))  # past the end P is 0, whatever memory holds there
            delta = tl.where(offs_m < n_q, delta, 0.0)
        dpT = tl.dot(v, tl.trans(do), input_precision="ieee")  # dP_ijᵀ = V_j dO_iᵀ
        pT = tl.math.exp2(sT * unit - lse2[None, :])
        if seed_ptr is not None:
            keep = dropout_keep(seed_ptr, dropout_p, head, offs_m[None, :], cols)
            dv = tl.dot(tl.where(keep, pT, 0.0).to(do.dtype), do, dv, input_precision="ieee")
            dpT = tl.where(keep, dpT / (1.0 - dropout_p), 0.0)
        else:
            dv = tl.dot(pT.to(do.dtype), do, dv, input_precision="ieee")  # dV_j += P_ijᵀ dO_i
        dsT = pT * (dpT - delta[None, :]) * derivative
        dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision="ieee")  # dK_j += dS_ijᵀ Q_i
    return dk, dv


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, slopes_ptr, stride_sb, seed_ptr, dropout_p,
    softmax_scale, softcap, window_left, window_right, H, GROUP, N_Q, N_K, TOTAL_Q, TOTAL_K,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_dkb, stride_dkn, stride_dkh, stride_dkd,
    stride_dvb, stride_dvn, stride_dvh, stride_dvd,
    stride_rb, stride_rh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(N_K, BLOCK_N)
    bh = tl.program_id(0) // blocks_n
    start_n = tl.program_id(0) % blocks_n * BLOCK_N  # causal: the most rows see the first keys, which start first
    heads_kv = H // GROUP
    b, h_kv = (bh // heads_kv).to(tl.int64), (bh % heads_kv).to(tl.int64)
    start_q, n_q = sequence(cu_seqlens_q_ptr, b, N_Q, TOTAL_Q)
    start_k, n_k = sequence(cu_seqlens_k_ptr, b, N_K, TOTAL_K)
    if cu_seqlens_k_ptr is not None:
        programs = tl.num_programs(0) // heads_kv
        behind = end_of_sequences(cu_seqlens_k_ptr, programs // blocks_n, TOTAL_K)
        place = b * blocks_n + start_n // BLOCK_N
        zero_rows(
            dk_ptr + h_kv * stride_dkh, stride_dkn, stride_dkd, behind, TOTAL_K, place, programs, D, BLOCK_D, BLOCK_N
        )
        zero_rows(
            dv_ptr + h_kv * stride_dvh, stride_dvn, stride_dvd, behind, TOTAL_K, place, programs, D, BLOCK_D, BLOCK_N
        )
    if start_n >= n_k:
        return
    batch = b
    if cu_seqlens_q_ptr is not None:
        batch = b * 0
    offset = n_k - n_q
    if cu_seqlens_q_ptr is not None:
        n_q = tl.minimum(n_q, N_Q)  # the dQ kernel has written L and Δ of no further row
    offs_n = start_n + tl.arange(0, BLOCK_N)
    cols = offs_n[:, None]
    k_ptr += batch * stride_kb + start_k * stride_kn + h_kv * stride_kh
    v_ptr += batch * stride_vb + start_k * stride_vn + h_kv * stride_vh
    k = load_tile(tile_pointers(k_ptr, stride_kn, stride_kd, start_n, BLOCK_N, BLOCK_D), offs_n, n_k, D, BLOCK_D)
    v = load_tile(tile_pointers(v_ptr, stride_vn, stride_vd, start_n, BLOCK_N, BLOCK_D), offs_n, n_k, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first, begin, end, last = rows_of(start_n, n_q, n_k, offset, window_left, window_right, BLOCK_M, BLOCK_N)

    for member in tl.range(0, GROUP):  # grouped-query attention: all query heads that share this key head
        h = h_kv * GROUP + member
        q_src, do_src, lse2_src, delta_src = q_ptr, do_ptr, lse2_ptr, delta_ptr
        if not TMA:
            q_src += batch * stride_qb + start_q * stride_qn + h * stride_qh
            do_src += batch * stride_dob + start_q * stride_don + h * stride_doh
            lse2_src += batch * stride_rb + h * stride_rh + start_q
            delta_src += batch * stride_rb + h * stride_rh + start_q
        q_src = source(q_src, stride_qn, stride_qd, BLOCK_M, BLOCK_D, TMA)
        do_src = source(do_src, stride_don, stride_dod, BLOCK_M, BLOCK_D, TMA)
        head = (b * H + h).to(tl.int32)
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + b * stride_sb + h)
        dk, dv = _dkdv_inner(
            dk, dv, k, v, q_src, do_src, lse2_src, delta_src, bh // heads_kv, h.to(tl.int32), stride_qn, stride_don,
            cols, first, begin, end, last, n_q, n_k, offset, head, slope, seed_ptr, dropout_p,
            softmax_scale, softcap, window_left, window_right, D, BLOCK_D, BLOCK_M, TMA,
        )  # fmt: skip

    if seed_ptr is not None:
        dv = dv / (1.0 - dropout_p)
    dk_ptr += batch * stride_dkb + start_k * stride_dkn + h_kv * stride_dkh
    dv_ptr += batch * stride_dvb + start_k * stride_dvn + h_kv * stride_dvh
    dk_ptrs = tile_pointers(dk_ptr, stride_dkn, stride_dkd, start_n, BLOCK_N, BLOCK_D)
    dv_ptrs = tile_pointers(dv_ptr, stride_dvn, stride_dvd, start_n, BLOCK_N, BLOCK_D)
    store_tile(dk_ptrs, dk * softmax_scale, offs_n, n_k, D, BLOCK_D)
    store_tile(dv_ptrs, dv, offs_n, n_k, D, BLOCK_D)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    configs: dict[str, LaunchConfig] | None = None,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `flash_v2.forward`.

    Args:
        dout: gradient by the output, in its shape; any strides.
        q, k, v, options: as given to `forward`; with dropout, the same seed. out, lse: as returned by it.
        configs: launch configurations by kernel ("dkdv", "dq"); by default from the launch table.
        dlse: gradient by lse, in its shape, or None.

    Returns:
        dq, dk and dv in the shapes of q, k and v, contiguous, in the dtype of q; zero for packed rows behind the last
        sequence.

    Raises:
        RuntimeError: as `launch.pick_config` and `launch.launch`.
    """
    return launch_backward(dout, q, k, v, out, lse, options, configs, dlse)[0]


def launch_backward(
    dout, q, k, v, out, lse, options: Options, configs: dict[str, LaunchConfig] | None = None, dlse=None
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Launch | None], torch.Tensor]:
    """`backward`, which also returns its launches by kernel ("dq", "dkdv"), for `replay.Replay`, and a tensor (2, ...).

    That tensor holds L log2 e and Δ of each row: the dQ kernel writes it, and the dK/dV kernel reads it.
    """
    batch, n_q, n_k = options.sizes(q, k)
    heads, head_dim = q.shape[-2:]
    heads_kv = k.shape[-2]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dlse = None if dlse is None else dlse.contiguous()
    packed = options.cu_seqlens_q is not None
    lse_strides = (0 if packed else lse.stride(0), lse.stride(-2))
    strides = {t: with_batch(t).stride() for t in (q, k, v, out, dout, dq, dk, dv)}

    def config(kernel: str) -> LaunchConfig:
        causal = options.window_right is not None
        chosen = (configs or {}).get(kernel)
        return chosen or pick_config(kernel, head_dim, q.dtype, causal, q.device, longest=max(n_q, n_k))

    # L log2 e and Δ, one number for each query. `_dkdv_kernel` reads whole blocks of them, so there is room for a block
    # behind the last one. The multiple of 16 makes each head begin where the copy engine can read.
    columns = cdiv((len(q) if packed else n_q) + config("dkdv").block_m, 16) * 16
    per_row = torch.empty(2, *lse.shape[:-1], columns, dtype=torch.float32, device=q.device)
    lse2, delta = per_row
    row_strides = (0 if packed else lse2.stride(0), lse2.stride(-2))

    c = config("dq")
    block_d = c.block_d(head_dim)
    tma = c.tma and not packed and descriptors_fit(k, v)
    programs = cdiv(n_q, c.block_m) * batch * heads
    if packed and programs == 0:  # no sequence has a row, and no program writes those behind
        dq.zero_()
    launched = {}
    launched["dq"] = launch(
        _dq_kernel, (programs,), c,
        q, *(describe(t, c.block_n, block_d) if tma else t for t in (k, v)), out, dout, lse, dlse,
        lse2, delta, dq,
        *options.arguments(), heads, heads // heads_kv, n_q, n_k, *options.totals(q, k),
        *strides[q], *strides[k], *strides[v], *strides[out], *strides[dout], *strides[dq], *lse_strides,
        *row_strides,
        D=head_dim, BLOCK_D=block_d, TMA=tma,
    )  # fmt: skip
    c = config("dkdv")
    # The copy engine writes to addresses that are multiples of 128 bytes. Triton puts the buffers of a loop one behind
    # the other: with fewer than 32 numbers of L or Δ in a buffer, the second one would begin elsewhere.
    tma = c.tma and not packed and c.block_m >= 32 and descriptors_fit(q, dout)
    programs = cdiv(n_k, c.block_n) * batch * heads_kv
    if packed and programs == 0:
        dk.zero_()
        dv.zero_()
    launched["dkdv"] = launch(
        _dkdv_kernel, (programs,), c,
        describe(q, c.block_m, block_d) if tma else q, k, v, describe(dout, c.block_m, block_d) if tma else dout,
        *(describe_vectors(t, c.block_m) if tma else t for t in (lse2, delta)), dk, dv,
        *options.arguments(), heads, heads // heads_kv, n_q, n_k, *options.totals(q, k),
        *strides[q], *strides[k], *strides[v], *strides[dout], *strides[dk], *strides[dv], *row_strides,
        D=head_dim, BLOCK_D=block_d, TMA=tma,
    )  # fmt: skip
    return (dq, dk, dv), launched, per_row

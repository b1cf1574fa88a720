"""FlashAttention-2, backward: the probabilities computed again from the log-sum-exp, and no two programs' writes meet.

Three kernels: `_delta_kernel` (Δ = rowsum(dO ∘ O)), `_dkdv_kernel` (one program per block of keys) and `_dq_kernel`
(one program per block of queries). No atomics, so the result has the same bits in every run.

Source: arXiv 2307.08691, Algorithm 2; the split in two kernels is ours, it recomputes S and dP once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from labutils.kernels.flash_v2 import Options, with_batch
from labutils.kernels.launch import SEQUENCE_LENGTHS, LaunchConfig, launch, pick_config
from labutils.kernels.scores import LOG2_E, columns_of, dropout_keep, rows_of, score_tile, score_unit, sequence
from labutils.kernels.tiles import load_tile, store_tile, tile_pointers


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, cu_seqlens_q_ptr, H, N_Q,
    stride_ob, stride_on, stride_oh, stride_od,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_lb, stride_lh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Δ_i = Σ_d dO_id O_id: what the gradient of softmax subtracts from each dP_ij of row i.

    A gradient by the log-sum-exp comes in here: ∂L_i/∂S_ij = P_ij, so that dS_ij = P_ij (dP_ij - Δ_i + dL_i).
    """
    blocks_m = tl.cdiv(N_Q, BLOCK_M)
    bh = tl.program_id(0) // blocks_m
    start_m = tl.program_id(0) % blocks_m * BLOCK_M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    start_q, n_q = sequence(cu_seqlens_q_ptr, b, N_Q)
    if start_m >= n_q:
        return
    batch = b
    if cu_seqlens_q_ptr is not None:
        batch = b * 0
    offs_m = start_m + tl.arange(0, BLOCK_M)
    o_ptr += batch * stride_ob + start_q * stride_on + h * stride_oh
    do_ptr += batch * stride_dob + start_q * stride_don + h * stride_doh
    o = load_tile(tile_pointers(o_ptr, stride_on, stride_od, start_m, BLOCK_M, BLOCK_D), offs_m, n_q, D, BLOCK_D, True)
    do = load_tile(
        tile_pointers(do_ptr, stride_don, stride_dod, start_m, BLOCK_M, BLOCK_D), offs_m, n_q, D, BLOCK_D, True
    )
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    place = batch * stride_lb + h * stride_lh + start_q + offs_m
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + place, mask=offs_m < n_q, other=0.0)
    tl.store(delta_ptr + place, delta, mask=offs_m < n_q)


@triton.jit
def _dkdv_inner(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qn, stride_qd, stride_don, stride_dod,
    cols, first, last, n_q, n_k, offset, head, slope, seed_ptr, dropout_p, softmax_scale, softcap,
    window_left, window_right,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the rows from `first` to `last` contribute to dK and dV of one block of keys.

    Everything is transposed, keys down and queries across, so that Pᵀ and dSᵀ are already what the products for dV
    and dK take on their left. Rows past n_q read as zero in Q and dO and so add nothing.
    """
    unit = score_unit(softmax_scale, softcap, slope)
    q_ptrs = tile_pointers(q_ptr, stride_qn, stride_qd, first, BLOCK_M, BLOCK_D)
    do_ptrs = tile_pointers(do_ptr, stride_don, stride_dod, first, BLOCK_M, BLOCK_D)
    for start_m in tl.range(first, last, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptrs, offs_m, n_q, D, BLOCK_D, MASKED)
        do = load_tile(do_ptrs, offs_m, n_q, D, BLOCK_D, MASKED)
        if MASKED:
            lse = tl.load(lse_ptr + offs_m, mask=offs_m < n_q, other=0.0)
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < n_q, other=0.0)
        else:
            lse = tl.load(lse_ptr + offs_m)
            delta = tl.load(delta_ptr + offs_m)
        sT = tl.dot(k, tl.trans(q), input_precision="ieee")  # S_ijᵀ = K_j Q_iᵀ
        sT, derivative = score_tile(
            sT, offs_m[None, :], cols, n_k, offset, softmax_scale, softcap, slope, window_left, window_right, MASKED
        )
        if MASKED:  # a row that saw no key has L = -inf, and no P
            lse = tl.where(lse == float("-inf"), 0.0, lse)
        pT = tl.math.exp2(sT * unit - (lse * LOG2_E)[None, :])  # P_ij = exp(S_ij - L_i)
        dpT = tl.dot(v, tl.trans(do), input_precision="ieee")  # dP_ijᵀ = V_j dO_iᵀ
        if seed_ptr is not None:
            keep = dropout_keep(seed_ptr, dropout_p, head, offs_m[None, :], cols)
            dv = tl.dot(tl.where(keep, pT, 0.0).to(do.dtype), do, dv, input_precision="ieee")
            dpT = tl.where(keep, dpT / (1.0 - dropout_p), 0.0)
        else:
            dv = tl.dot(pT.to(do.dtype), do, dv, input_precision="ieee")  # dV_j += P_ijᵀ dO_i
        dsT = pT * (dpT - delta[None, :]) * derivative  # dS_ij = P_ij ∘ (dP_ij - Δ_i)
        dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision="ieee")  # dK_j += dS_ijᵀ Q_i
        q_ptrs += BLOCK_M * stride_qn
        do_ptrs += BLOCK_M * stride_don
    return dk, dv


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, slopes_ptr, stride_sb, seed_ptr, dropout_p,
    softmax_scale, softcap, window_left, window_right, H, GROUP, N_Q, N_K,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_dkb, stride_dkn, stride_dkh, stride_dkd,
    stride_dvb, stride_dvn, stride_dvh, stride_dvd,
    stride_lb, stride_lh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(N_K, BLOCK_N)
    bh = tl.program_id(0) // blocks_n
    start_n = tl.program_id(0) % blocks_n * BLOCK_N  # causal: the first keys are seen by the most rows, and start first
    heads_kv = H // GROUP
    b, h_kv = (bh // heads_kv).to(tl.int64), (bh % heads_kv).to(tl.int64)
    start_q, n_q = sequence(cu_seqlens_q_ptr, b, N_Q)
    start_k, n_k = sequence(cu_seqlens_k_ptr, b, N_K)
    if start_n >= n_k:
        return
    batch = b
    if cu_seqlens_q_ptr is not None:
        batch = b * 0
    offset = n_k - n_q
    offs_n = start_n + tl.arange(0, BLOCK_N)
    cols = offs_n[:, None]
    k_ptr += batch * stride_kb + start_k * stride_kn + h_kv * stride_kh
    v_ptr += batch * stride_vb + start_k * stride_vn + h_kv * stride_vh
    k = load_tile(tile_pointers(k_ptr, stride_kn, stride_kd, start_n, BLOCK_N, BLOCK_D), offs_n, n_k, D, BLOCK_D, True)
    v = load_tile(tile_pointers(v_ptr, stride_vn, stride_vd, start_n, BLOCK_N, BLOCK_D), offs_n, n_k, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first, begin, end, last = rows_of(start_n, n_q, n_k, offset, window_left, window_right, BLOCK_M, BLOCK_N)

    for member in tl.range(0, GROUP):  # grouped-query attention: all query heads that share this key head
        h = h_kv * GROUP + member
        q_head = q_ptr + batch * stride_qb + start_q * stride_qn + h * stride_qh
        do_head = do_ptr + batch * stride_dob + start_q * stride_don + h * stride_doh
        lse_head = lse_ptr + batch * stride_lb + h * stride_lh + start_q
        delta_head = delta_ptr + batch * stride_lb + h * stride_lh + start_q
        head = (b * H + h).to(tl.int32)
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + b * stride_sb + h)
        if window_right is not None:
            dk, dv = _dkdv_inner(
                dk, dv, k, v, q_head, do_head, lse_head, delta_head, stride_qn, stride_qd, stride_don, stride_dod,
                cols, first, begin, n_q, n_k, offset, head, slope, seed_ptr, dropout_p, softmax_scale, softcap,
                window_left, window_right, D, BLOCK_D, BLOCK_M, True,
            )  # fmt: skip
        dk, dv = _dkdv_inner(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head, stride_qn, stride_qd, stride_don, stride_dod,
            cols, begin, end, n_q, n_k, offset, head, slope, seed_ptr, dropout_p, softmax_scale, softcap,
            window_left, window_right, D, BLOCK_D, BLOCK_M, False,
        )  # fmt: skip
        dk, dv = _dkdv_inner(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head, stride_qn, stride_qd, stride_don, stride_dod,
            cols, end, last, n_q, n_k, offset, head, slope, seed_ptr, dropout_p, softmax_scale, softcap,
            window_left, window_right, D, BLOCK_D, BLOCK_M, True,
        )  # fmt: skip

    if seed_ptr is not None:
        dv = dv / (1.0 - dropout_p)
    dk_ptr += batch * stride_dkb + start_k * stride_dkn + h_kv * stride_dkh
    dv_ptr += batch * stride_dvb + start_k * stride_dvn + h_kv * stride_dvh
    dk_ptrs = tile_pointers(dk_ptr, stride_dkn, stride_dkd, start_n, BLOCK_N, BLOCK_D)
    dv_ptrs = tile_pointers(dv_ptr, stride_dvn, stride_dvd, start_n, BLOCK_N, BLOCK_D)
    store_tile(dk_ptrs, dk * softmax_scale, offs_n, n_k, D, BLOCK_D)
    store_tile(dv_ptrs, dv, offs_n, n_k, D, BLOCK_D)


@triton.jit
def _dq_inner(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
    rows, first, last, n_k, offset, head, slope, seed_ptr, dropout_p, softmax_scale, softcap, window_left, window_right,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the columns from `first` to `last` contribute to dQ of one block of rows."""
    unit = score_unit(softmax_scale, softcap, slope)
    k_ptrs = tile_pointers(k_ptr, stride_kn, stride_kd, first, BLOCK_N, BLOCK_D)
    v_ptrs = tile_pointers(v_ptr, stride_vn, stride_vd, first, BLOCK_N, BLOCK_D)
    for start_n in tl.range(first, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptrs, offs_n, n_k, D, BLOCK_D, MASKED)
        v = load_tile(v_ptrs, offs_n, n_k, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s, derivative = score_tile(
            s, rows, offs_n[None, :], n_k, offset, softmax_scale, softcap, slope, window_left, window_right, MASKED
        )
        p = tl.math.exp2(s * unit - (lse * LOG2_E)[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if seed_ptr is not None:
            keep = dropout_keep(seed_ptr, dropout_p, head, rows, offs_n[None, :])
            dp = tl.where(keep, dp / (1.0 - dropout_p), 0.0)
        ds = p * (dp - delta[:, None]) * derivative
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # dQ_i += dS_ij K_j
        k_ptrs += BLOCK_N * stride_kn
        v_ptrs += BLOCK_N * stride_vn
    return dq


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, slopes_ptr, stride_sb, seed_ptr, dropout_p,
    softmax_scale, softcap, window_left, window_right, H, GROUP, N_Q, N_K,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_dqb, stride_dqn, stride_dqh, stride_dqd,
    stride_lb, stride_lh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(N_Q, BLOCK_M)
    bh = tl.program_id(0) // blocks_m
    pid_m = tl.program_id(0) % blocks_m
    if window_right is not None:
        pid_m = blocks_m - 1 - pid_m
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    start_q, n_q = sequence(cu_seqlens_q_ptr, b, N_Q)
    start_k, n_k = sequence(cu_seqlens_k_ptr, b, N_K)
    start_m = pid_m * BLOCK_M
    if start_m >= n_q:
        return
    batch = b
    if cu_seqlens_q_ptr is not None:
        batch = b * 0
    q_ptr += batch * stride_qb + start_q * stride_qn + h * stride_qh
    do_ptr += batch * stride_dob + start_q * stride_don + h * stride_doh
    dq_ptr += batch * stride_dqb + start_q * stride_dqn + h * stride_dqh
    k_ptr += batch * stride_kb + start_k * stride_kn + (h // GROUP) * stride_kh
    v_ptr += batch * stride_vb + start_k * stride_vn + (h // GROUP) * stride_vh
    lse_ptr += batch * stride_lb + h * stride_lh + start_q
    delta_ptr += batch * stride_lb + h * stride_lh + start_q
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_sb + h)
    offset = n_k - n_q
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = offs_m[:, None]
    q = load_tile(tile_pointers(q_ptr, stride_qn, stride_qd, start_m, BLOCK_M, BLOCK_D), offs_m, n_q, D, BLOCK_D, True)
    do = load_tile(
        tile_pointers(do_ptr, stride_don, stride_dod, start_m, BLOCK_M, BLOCK_D), offs_m, n_q, D, BLOCK_D, True
    )
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < n_q, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row that saw no key has no P
    delta = tl.load(delta_ptr + offs_m, mask=offs_m < n_q, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    first, begin, end, last = columns_of(start_m, n_q, n_k, offset, window_left, window_right, BLOCK_M, BLOCK_N)
    if window_left is not None:
        dq = _dq_inner(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
            rows, first, begin, n_k, offset, bh, slope, seed_ptr, dropout_p, softmax_scale, softcap,
            window_left, window_right, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    dq = _dq_inner(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        rows, begin, end, n_k, offset, bh, slope, seed_ptr, dropout_p, softmax_scale, softcap,
        window_left, window_right, D, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    dq = _dq_inner(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        rows, end, last, n_k, offset, bh, slope, seed_ptr, dropout_p, softmax_scale, softcap,
        window_left, window_right, D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    dq_ptrs = tile_pointers(dq_ptr, stride_dqn, stride_dqd, start_m, BLOCK_M, BLOCK_D)
    store_tile(dq_ptrs, dq * softmax_scale, offs_m, n_q, D, BLOCK_D)


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
        configs: launch configurations by kernel ("delta", "dkdv", "dq"); the launch table's for those not given.
        dlse: gradient by lse, in its shape, or None.

    Returns:
        dq, dk and dv in the shapes of q, k and v, contiguous, in the dtype of q.
    """
    batch, n_q, n_k = options.sizes(q, k)
    heads, head_dim = q.shape[-2:]
    heads_kv = k.shape[-2]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    lse_strides = (0 if lse.dim() == 2 else lse.stride(0), lse.stride(-2))
    strides = {t: with_batch(t).stride() for t in (q, k, v, out, dout, dq, dk, dv)}

    def config(kernel: str) -> LaunchConfig:
        causal = options.window[1] is not None
        chosen = (configs or {}).get(kernel)
        return chosen or pick_config(kernel, head_dim, q.dtype, causal, q.device, longest=max(n_q, n_k))

    c = config("delta")
    launch(
        _delta_kernel, (triton.cdiv(n_q, c.block_m) * batch * heads,), c,
        out, dout, dlse, delta, options.cu_seqlens_q, heads, n_q, *strides[out], *strides[dout], *lse_strides,
        D=head_dim, BLOCK_D=c.block_d(head_dim),
    )  # fmt: skip
    c = config("dkdv")
    launch(
        _dkdv_kernel, (triton.cdiv(n_k, c.block_n) * batch * heads_kv,), c,
        q, k, v, dout, lse, delta, dk, dv, *options.arguments(), heads, heads // heads_kv, n_q, n_k,
        *strides[q], *strides[k], *strides[v], *strides[dout], *strides[dk], *strides[dv], *lse_strides,
        D=head_dim, BLOCK_D=c.block_d(head_dim),
    )  # fmt: skip
    c = config("dq")
    launch(
        _dq_kernel, (triton.cdiv(n_q, c.block_m) * batch * heads,), c,
        q, k, v, dout, lse, delta, dq, *options.arguments(), heads, heads // heads_kv, n_q, n_k,
        *strides[q], *strides[k], *strides[v], *strides[dout], *strides[dq], *lse_strides,
        D=head_dim, BLOCK_D=c.block_d(head_dim),
    )  # fmt: skip
    return dq, dk, dv

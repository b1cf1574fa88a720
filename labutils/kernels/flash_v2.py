"""FlashAttention-2, forward and backward: Q in the grid, O, l and m on chip, one number per row kept for the backward.

Four kernels. `_forward_kernel` computes O and the log-sum-exp L of each row. The backward recomputes the probabilities
from L and runs `_delta_kernel` (Δ = rowsum(dO ∘ O)), `_dkdv_kernel` (one program per block of keys) and `_dq_kernel`
(one program per block of queries); no two programs write to the same place, so the result is the same in every run.

Scores are kept in base 2: exp(x) = 2^(x log2 e), the GPU computes 2^x in one instruction, and log2 e is folded into
the softmax scale, so that the change of base costs nothing.

Source: arXiv 2307.08691, Algorithms 1 and 2.
"""

import torch
import triton
import triton.language as tl

from labutils.kernels.launch import SEQUENCE_LENGTHS, LaunchConfig, launch, pick_config
from labutils.kernels.tiles import load_tile, store_tile, tile_pointers

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _forward_inner(
    acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
    offs_m, first, last, N_K, offset, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Takes the columns from `first` to `last` into acc, l and m of one block of rows.

    MASKED is for blocks that hold the diagonal or the end of the sequence; the others need no mask.
    """
    k_ptrs = tile_pointers(k_ptr, stride_kn, stride_kd, first, BLOCK_N, BLOCK_D)
    v_ptrs = tile_pointers(v_ptr, stride_vn, stride_vd, first, BLOCK_N, BLOCK_D)
    for start_n in tl.range(first, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptrs, offs_n, N_K, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # S_ij = Q_i K_jᵀ, not yet scaled
        if MASKED:
            visible = offs_n[None, :] < N_K
            if CAUSAL:
                visible = visible & (offs_n[None, :] <= offs_m[:, None] + offset)
            s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1) * qk_scale)
        m_safe = m_new
        if MASKED:  # a row that has seen no key yet: 2^(-inf - 0) = 0, where 2^(-inf + inf) would be NaN
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.math.exp2(s * qk_scale - m_safe[:, None])  # P_ij = exp(scale * S_ij - m_new), one multiply-add each
        alpha = tl.math.exp2(m_i - m_safe)  # what the old maximum is worth under the new one
        l_i = l_i * alpha + tl.sum(p, axis=1)
        v = load_tile(v_ptrs, offs_n, N_K, D, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # O_i = alpha O_i + P_ij V_j
        m_i = m_new
        k_ptrs += BLOCK_N * stride_kn
        v_ptrs += BLOCK_N * stride_vn
    return acc, l_i, m_i


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    softmax_scale, H, GROUP, N_Q, N_K,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_ob, stride_on, stride_oh, stride_od,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(N_Q, BLOCK_M)
    bh = tl.program_id(0) // blocks_m  # neighbours in the grid share a head, so its K and V stay in the L2 cache
    pid_m = tl.program_id(0) % blocks_m
    if CAUSAL:
        pid_m = blocks_m - 1 - pid_m  # the lowest rows see the most keys: start them first, end together
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + (h // GROUP) * stride_kh
    v_ptr += b * stride_vb + (h // GROUP) * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    start_m = pid_m * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offset = N_K - N_Q  # bottom-right alignment: row i sees the columns j <= i + offset

    q = load_tile(tile_pointers(q_ptr, stride_qn, stride_qd, start_m, BLOCK_M, BLOCK_D), offs_m, N_Q, D, BLOCK_D, True)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2_E

    last = N_K
    unmasked = N_K // BLOCK_N * BLOCK_N  # up to here every row sees every column
    if CAUSAL:
        last = tl.minimum(tl.maximum(start_m + BLOCK_M + offset, 0), N_K)
        unmasked = tl.minimum(tl.maximum(start_m + 1 + offset, 0), N_K) // BLOCK_N * BLOCK_N
    acc, l_i, m_i = _forward_inner(
        acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        offs_m, 0, unmasked, N_K, offset, qk_scale, D, BLOCK_D, BLOCK_N, False, CAUSAL,
    )  # fmt: skip
    acc, l_i, m_i = _forward_inner(
        acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        offs_m, unmasked, last, N_K, offset, qk_scale, D, BLOCK_D, BLOCK_N, True, CAUSAL,
    )  # fmt: skip

    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    acc = acc / l_safe[:, None]  # the one division; rows that saw nothing stay zero
    o_ptrs = tile_pointers(o_ptr, stride_on, stride_od, start_m, BLOCK_M, BLOCK_D)
    store_tile(o_ptrs, acc, offs_m, N_Q, D, BLOCK_D)
    lse = (m_i + tl.math.log2(l_safe)) * LN_2  # rows that saw nothing: m is -inf, and so is this
    tl.store(lse_ptr + bh.to(tl.int64) * N_Q + offs_m, lse, mask=offs_m < N_Q)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by FlashAttention-2.

    Args:
        q: (B, N_q, H, D). k, v: (B, N_k, H_kv, D), H_kv a divisor of H. Any strides.
        softmax_scale: positive factor on the scores.
        causal: aligned to the bottom right.
        config: block sizes and warps; the launch table's where not given.

    Returns:
        out (B, N_q, H, D) in the dtype of q, and lse (B, H, N_q) float32, natural logarithm, -inf for rows that see no
        key.
    """
    batch, n_q, heads, head_dim = q.shape
    n_k, heads_kv = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, n_q, dtype=torch.float32, device=q.device)
    if config is None:
        config = pick_config("forward", head_dim, q.dtype, causal, q.device, longest=max(n_q, n_k))
    launch(
        _forward_kernel, (triton.cdiv(n_q, config.block_m) * batch * heads,), config,
        q, k, v, out, lse, softmax_scale, heads, heads // heads_kv, n_q, n_k,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        D=head_dim, BLOCK_D=config.block_d(head_dim), CAUSAL=causal,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _delta_kernel(
    o_ptr, do_ptr, delta_ptr, H, N_Q,
    stride_ob, stride_on, stride_oh, stride_od,
    stride_dob, stride_don, stride_doh, stride_dod,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Δ_i = Σ_d dO_id O_id: what the gradient of softmax subtracts from each dP_ij of row i."""
    blocks_m = tl.cdiv(N_Q, BLOCK_M)
    bh = tl.program_id(0) // blocks_m
    start_m = tl.program_id(0) % blocks_m * BLOCK_M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    o_ptrs = tile_pointers(o_ptr + b * stride_ob + h * stride_oh, stride_on, stride_od, start_m, BLOCK_M, BLOCK_D)
    do_ptrs = tile_pointers(do_ptr + b * stride_dob + h * stride_doh, stride_don, stride_dod, start_m, BLOCK_M, BLOCK_D)
    o = load_tile(o_ptrs, offs_m, N_Q, D, BLOCK_D, True).to(tl.float32)
    do = load_tile(do_ptrs, offs_m, N_Q, D, BLOCK_D, True).to(tl.float32)
    tl.store(delta_ptr + bh.to(tl.int64) * N_Q + offs_m, tl.sum(o * do, axis=1), mask=offs_m < N_Q)


@triton.jit
def _dkdv_inner(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qn, stride_qd, stride_don, stride_dod,
    offs_n, first, last, N_Q, offset, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Adds what the rows from `first` to `last` contribute to dK and dV of one block of keys.

    Everything is transposed, keys down and queries across, so that Pᵀ and dSᵀ are already what the products for dV
    and dK take on their left. Rows past N_Q read as zero in Q and dO and so add nothing.
    """
    q_ptrs = tile_pointers(q_ptr, stride_qn, stride_qd, first, BLOCK_M, BLOCK_D)
    do_ptrs = tile_pointers(do_ptr, stride_don, stride_dod, first, BLOCK_M, BLOCK_D)
    for start_m in tl.range(first, last, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptrs, offs_m, N_Q, D, BLOCK_D, MASKED)
        do = load_tile(do_ptrs, offs_m, N_Q, D, BLOCK_D, MASKED)
        if MASKED:
            lse = tl.load(lse_ptr + offs_m, mask=offs_m < N_Q, other=0.0)
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < N_Q, other=0.0)
        else:
            lse = tl.load(lse_ptr + offs_m)
            delta = tl.load(delta_ptr + offs_m)
        sT = tl.dot(k, tl.trans(q), input_precision="ieee")  # S_ijᵀ = K_j Q_iᵀ
        pT = tl.math.exp2(sT * qk_scale - (lse * LOG2_E)[None, :])  # P_ij = exp(scale * S_ij - L_i)
        if MASKED and CAUSAL:
            pT = tl.where(offs_n[:, None] <= offs_m[None, :] + offset, pT, 0.0)
        dv = tl.dot(pT.to(do.dtype), do, dv, input_precision="ieee")  # dV_j += P_ijᵀ dO_i
        dpT = tl.dot(v, tl.trans(do), input_precision="ieee")  # dP_ijᵀ = V_j dO_iᵀ
        dsT = pT * (dpT - delta[None, :])  # dS_ij = P_ij ∘ (dP_ij - Δ_i)
        dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision="ieee")  # dK_j += dS_ijᵀ Q_i
        q_ptrs += BLOCK_M * stride_qn
        do_ptrs += BLOCK_M * stride_don
    return dk, dv


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    softmax_scale, H, GROUP, N_Q, N_K,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_dkb, stride_dkn, stride_dkh, stride_dkd,
    stride_dvb, stride_dvn, stride_dvh, stride_dvd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(N_K, BLOCK_N)
    bh = tl.program_id(0) // blocks_n
    start_n = tl.program_id(0) % blocks_n * BLOCK_N  # causal: the first keys are seen by the most rows, and start first
    heads_kv = H // GROUP
    b, h_kv = (bh // heads_kv).to(tl.int64), (bh % heads_kv).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offset = N_K - N_Q
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    k = load_tile(tile_pointers(k_ptr, stride_kn, stride_kd, start_n, BLOCK_N, BLOCK_D), offs_n, N_K, D, BLOCK_D, True)
    v = load_tile(tile_pointers(v_ptr, stride_vn, stride_vd, start_n, BLOCK_N, BLOCK_D), offs_n, N_K, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2_E

    first = 0
    below_diagonal = 0  # from this row on, every row sees every key of the block
    if CAUSAL:
        first = tl.minimum(tl.maximum(start_n - offset, 0), N_Q) // BLOCK_M * BLOCK_M
        below_diagonal = tl.maximum(tl.cdiv(start_n + BLOCK_N - 1 - offset, BLOCK_M) * BLOCK_M, first)
    full_blocks = tl.maximum(N_Q // BLOCK_M * BLOCK_M, first)  # behind it: the last, partial block of rows

    for head in tl.range(0, GROUP):  # grouped-query attention: all query heads that share this key head
        h = h_kv * GROUP + head
        q_head = q_ptr + b * stride_qb + h * stride_qh
        do_head = do_ptr + b * stride_dob + h * stride_doh
        lse_head = lse_ptr + (b * H + h) * N_Q
        delta_head = delta_ptr + (b * H + h) * N_Q
        if CAUSAL:
            dk, dv = _dkdv_inner(
                dk, dv, k, v, q_head, do_head, lse_head, delta_head, stride_qn, stride_qd, stride_don, stride_dod,
                offs_n, first, tl.minimum(below_diagonal, full_blocks), N_Q, offset, qk_scale,
                D, BLOCK_D, BLOCK_M, True, CAUSAL,
            )  # fmt: skip
        dk, dv = _dkdv_inner(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head, stride_qn, stride_qd, stride_don, stride_dod,
            offs_n, tl.minimum(below_diagonal, full_blocks), full_blocks, N_Q, offset, qk_scale,
            D, BLOCK_D, BLOCK_M, False, CAUSAL,
        )  # fmt: skip
        dk, dv = _dkdv_inner(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head, stride_qn, stride_qd, stride_don, stride_dod,
            offs_n, full_blocks, N_Q, N_Q, offset, qk_scale, D, BLOCK_D, BLOCK_M, True, CAUSAL,
        )  # fmt: skip

    dk_ptrs = tile_pointers(
        dk_ptr + b * stride_dkb + h_kv * stride_dkh, stride_dkn, stride_dkd, start_n, BLOCK_N, BLOCK_D
    )
    dv_ptrs = tile_pointers(
        dv_ptr + b * stride_dvb + h_kv * stride_dvh, stride_dvn, stride_dvd, start_n, BLOCK_N, BLOCK_D
    )
    store_tile(dk_ptrs, dk * softmax_scale, offs_n, N_K, D, BLOCK_D)
    store_tile(dv_ptrs, dv, offs_n, N_K, D, BLOCK_D)


@triton.jit
def _dq_inner(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
    offs_m, first, last, N_K, offset, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Adds what the columns from `first` to `last` contribute to dQ of one block of rows."""
    k_ptrs = tile_pointers(k_ptr, stride_kn, stride_kd, first, BLOCK_N, BLOCK_D)
    v_ptrs = tile_pointers(v_ptr, stride_vn, stride_vd, first, BLOCK_N, BLOCK_D)
    for start_n in tl.range(first, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptrs, offs_n, N_K, D, BLOCK_D, MASKED)
        v = load_tile(v_ptrs, offs_n, N_K, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.math.exp2(s * qk_scale - (lse * LOG2_E)[:, None])
        if MASKED:
            visible = offs_n[None, :] < N_K
            if CAUSAL:
                visible = visible & (offs_n[None, :] <= offs_m[:, None] + offset)
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # dQ_i += dS_ij K_j
        k_ptrs += BLOCK_N * stride_kn
        v_ptrs += BLOCK_N * stride_vn
    return dq


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    softmax_scale, H, GROUP, N_Q, N_K,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_dob, stride_don, stride_doh, stride_dod,
    stride_dqb, stride_dqn, stride_dqh, stride_dqd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(N_Q, BLOCK_M)
    bh = tl.program_id(0) // blocks_m
    pid_m = tl.program_id(0) % blocks_m
    if CAUSAL:
        pid_m = blocks_m - 1 - pid_m
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    start_m = pid_m * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offset = N_K - N_Q
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + (h // GROUP) * stride_kh
    v_ptr += b * stride_vb + (h // GROUP) * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    q = load_tile(tile_pointers(q_ptr, stride_qn, stride_qd, start_m, BLOCK_M, BLOCK_D), offs_m, N_Q, D, BLOCK_D, True)
    do = load_tile(
        tile_pointers(do_ptr, stride_don, stride_dod, start_m, BLOCK_M, BLOCK_D), offs_m, N_Q, D, BLOCK_D, True
    )
    lse = tl.load(lse_ptr + bh.to(tl.int64) * N_Q + offs_m, mask=offs_m < N_Q, other=0.0)
    delta = tl.load(delta_ptr + bh.to(tl.int64) * N_Q + offs_m, mask=offs_m < N_Q, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2_E

    last = N_K
    unmasked = N_K // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = tl.minimum(tl.maximum(start_m + BLOCK_M + offset, 0), N_K)
        unmasked = tl.minimum(tl.maximum(start_m + 1 + offset, 0), N_K) // BLOCK_N * BLOCK_N
    dq = _dq_inner(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        offs_m, 0, unmasked, N_K, offset, qk_scale, D, BLOCK_D, BLOCK_N, False, CAUSAL,
    )  # fmt: skip
    dq = _dq_inner(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        offs_m, unmasked, last, N_K, offset, qk_scale, D, BLOCK_D, BLOCK_N, True, CAUSAL,
    )  # fmt: skip
    dq_ptrs = tile_pointers(dq_ptr + b * stride_dqb + h * stride_dqh, stride_dqn, stride_dqd, start_m, BLOCK_M, BLOCK_D)
    store_tile(dq_ptrs, dq * softmax_scale, offs_m, N_Q, D, BLOCK_D)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool = False,
    configs: dict[str, LaunchConfig] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`.

    Args:
        dout: (B, N_q, H, D), gradient by the output; any strides.
        q, k, v: as given to `forward`. out, lse: as returned by it.
        softmax_scale, causal: as there.
        configs: launch configurations by kernel ("delta", "dkdv", "dq"); the launch table's for those not given.

    Returns:
        dq (B, N_q, H, D), dk and dv (B, N_k, H_kv, D), contiguous, in the dtype of q.
    """
    batch, n_q, heads, head_dim = q.shape
    n_k, heads_kv = k.shape[1:3]
    group = heads // heads_kv
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)

    def config(kernel: str) -> LaunchConfig:
        chosen = (configs or {}).get(kernel)
        return chosen or pick_config(kernel, head_dim, q.dtype, causal, q.device, longest=max(n_q, n_k))

    c = config("delta")
    launch(
        _delta_kernel, (triton.cdiv(n_q, c.block_m) * batch * heads,), c,
        out, dout, delta, heads, n_q, *out.stride(), *dout.stride(), D=head_dim, BLOCK_D=c.block_d(head_dim),
    )  # fmt: skip
    c = config("dkdv")
    launch(
        _dkdv_kernel, (triton.cdiv(n_k, c.block_n) * batch * heads_kv,), c,
        q, k, v, dout, lse, delta, dk, dv, softmax_scale, heads, group, n_q, n_k,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dk.stride(), *dv.stride(),
        D=head_dim, BLOCK_D=c.block_d(head_dim), CAUSAL=causal,
    )  # fmt: skip
    c = config("dq")
    launch(
        _dq_kernel, (triton.cdiv(n_q, c.block_m) * batch * heads,), c,
        q, k, v, dout, lse, delta, dq, softmax_scale, heads, group, n_q, n_k,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dq.stride(),
        D=head_dim, BLOCK_D=c.block_d(head_dim), CAUSAL=causal,
    )  # fmt: skip
    return dq, dk, dv

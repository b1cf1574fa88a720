"""FlashAttention-1, forward, as in its paper: K and V in the outer loop; O, l and m in HBM; one program per head.

It is here to be measured and understood, not to be used: `flash_v2` computes the same faster. Two things make it
slow. Each inner step reads and writes a block of O, l and m in global memory. And only batch x heads programs run,
which leaves most of a large GPU idle at batch 1.

Source: arXiv 2205.14135, Algorithm 1; line numbers below are that algorithm's.
"""

import torch
import triton
import triton.language as tl

from labutils.attention.kernels.launch import SEQUENCE_LENGTHS, launch, pick_config
from labutils.attention.kernels.launch_config import LaunchConfig
from labutils.attention.kernels.tiles import load_tile, tile_pointers


@triton.jit(do_not_specialize=SEQUENCE_LENGTHS)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, l_ptr, m_ptr,
    softmax_scale, H, GROUP, N_Q, N_K,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_ob, stride_on, stride_oh, stride_od,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)  # one program computes a whole head; nothing else is parallel
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + (h // GROUP) * stride_kh
    v_ptr += b * stride_vb + (h // GROUP) * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    l_ptr += bh.to(tl.int64) * N_Q
    m_ptr += bh.to(tl.int64) * N_Q
    offset = N_K - N_Q  # bottom-right alignment: row i sees the columns j <= i + offset

    for start_n in tl.range(0, N_K, BLOCK_N):  # line 5: for each block of K and V
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_tile(tile_pointers(k_ptr, stride_kn, stride_kd, start_n, BLOCK_N, BLOCK_D), offs_n, N_K, D, BLOCK_D)
        v = load_tile(tile_pointers(v_ptr, stride_vn, stride_vd, start_n, BLOCK_N, BLOCK_D), offs_n, N_K, D, BLOCK_D)
        first_row = 0
        if CAUSAL:  # rows above start_n - offset see nothing of this block
            first_row = tl.maximum(start_n - offset, 0) // BLOCK_M * BLOCK_M
        for start_m in tl.range(first_row, N_Q, BLOCK_M):  # line 7: for each block of Q
            offs_m = start_m + tl.arange(0, BLOCK_M)
            in_m = offs_m < N_Q
            q = load_tile(
                tile_pointers(q_ptr, stride_qn, stride_qd, start_m, BLOCK_M, BLOCK_D), offs_m, N_Q, D, BLOCK_D
            )
            o_ptrs = tile_pointers(o_ptr, stride_on, stride_od, start_m, BLOCK_M, BLOCK_D)
            o = load_tile(o_ptrs, offs_m, N_Q, D, BLOCK_D)  # line 8: O_i, l_i, m_i come from HBM
            l_old = tl.load(l_ptr + offs_m, mask=in_m, other=0.0)
            m_old = tl.load(m_ptr + offs_m, mask=in_m, other=float("-inf"))

            s = tl.dot(q, tl.trans(k), input_precision="ieee") * softmax_scale  # line 9: S_ij = scale * Q_i K_jᵀ
            visible = offs_n[None, :] < N_K
            if CAUSAL:
                visible = visible & (offs_n[None, :] <= offs_m[:, None] + offset)
            s = tl.where(visible, s, float("-inf"))

            m_new = tl.maximum(m_old, tl.max(s, axis=1))  # lines 10, 11
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing: exp(-inf - 0) = 0
            p = tl.exp(s - m_safe[:, None])  # P_ij = exp(S_ij - m_new)
            alpha = tl.exp(m_old - m_safe)
            l_new = alpha * l_old + tl.sum(p, axis=1)
            # line 12: O_i = (l_old e^(m_old - m_new) O_i + P_ij V_j) / l_new
            divisor = tl.where(l_new == 0.0, 1.0, l_new)
            pv = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            o = ((alpha * l_old)[:, None] * o + pv) / divisor[:, None]

            # Threads may hold copies of each other's l and m: all must have read before any of them writes.
            tl.debug_barrier()
            in_o = in_m[:, None] & (tl.arange(0, BLOCK_D)[None, :] < D)
            tl.store(o_ptrs, o, mask=in_o)  # lines 12, 13: back to HBM
            tl.store(l_ptr + offs_m, l_new, mask=in_m)
            tl.store(m_ptr + offs_m, m_new, mask=in_m)
        tl.debug_barrier()  # the next block of K and V reads what other threads have written


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by FlashAttention-1.

    Args:
        q: (B, N_q, H, D). k, v: (B, N_k, H_kv, D).
        softmax_scale: positive factor on the scores.
        causal: aligned to the bottom right.
        config: block sizes and warps; by default from the launch table.

    Returns:
        out (B, N_q, H, D) in the dtype of q, and lse (B, H, N_q) float32, natural logarithm. For rows that see no key
        they are zero and -inf.

    Raises:
        RuntimeError: as `launch.pick_config` and `launch.launch`.
    """
    batch, n_q, heads, head_dim = q.shape
    n_k, heads_kv = k.shape[1:3]
    # O is rescaled once for every block of K. In 16 bits each rounding would add to the error, so the working copy in
    # HBM is float32. The authors' CUDA code kept such a copy, too, if K had several blocks.
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    l = torch.zeros(batch, heads, n_q, dtype=torch.float32, device=q.device)
    m = torch.full_like(l, -torch.inf)
    if config is None:
        config = pick_config("v1", head_dim, q.dtype, causal, q.device, longest=max(n_q, n_k))
    launch(
        _forward_kernel, (batch * heads,), config,
        q, k, v, out, l, m, softmax_scale, heads, heads // heads_kv, n_q, n_k,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        D=head_dim, BLOCK_D=config.block_d(head_dim), CAUSAL=causal,
    )  # fmt: skip
    return out.to(q.dtype), m + l.log()

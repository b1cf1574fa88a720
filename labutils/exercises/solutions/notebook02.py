"""Answers to the exercises of notebook 02."""

import torch
import triton
import triton.language as tl


def program_count(batch, heads, seqlen, block_m):
    """Programs that the v2 kernel's launch starts."""
    return batch * heads * triton.cdiv(seqlen, block_m)


@triton.jit
def row_lse_kernel(x_ptr, y_ptr, row_stride, n_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + offs, mask=offs < n_columns, other=float("-inf"))
    m = tl.max(x, axis=0)
    tl.store(y_ptr + row, m + tl.log(tl.sum(tl.exp(x - m), axis=0)))


def row_lse(x):
    """Log-sum-exp of each row of x (rows, columns); rows are x.stride(0) elements apart."""
    y = torch.empty(x.shape[0], device=x.device)
    row_lse_kernel[(x.shape[0],)](x, y, x.stride(0), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return y


def tile_kind(start_m, block_m, start_n, block_n, n_q, n_k):
    """ "skipped", "masked" or "plain" for a tile under a causal mask aligned to the bottom right."""
    last_row = min(start_m + block_m, n_q) - 1
    last_column = start_n + block_n - 1
    if start_n > last_row + n_k - n_q:
        return "skipped"
    if last_column <= start_m + n_k - n_q and last_column < n_k:
        return "plain"
    return "masked"


@triton.jit
def window_kernel(q_ptr, k_ptr, v_ptr, o_ptr, scale, window, N, H,
                  D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    bh, start_m = tl.program_id(1), tl.program_id(0) * BLOCK_M
    head = (bh // H) * N * H * D + (bh % H) * D
    offs_d, offs_m = tl.arange(0, D), start_m + tl.arange(0, BLOCK_M)
    rows = head + offs_m[:, None] * (H * D) + offs_d[None, :]
    q = tl.load(q_ptr + rows, mask=offs_m[:, None] < N, other=0.0)
    o = tl.zeros([BLOCK_M, D], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    first = tl.maximum(start_m - window, 0) // BLOCK_N * BLOCK_N
    for start_n in tl.range(first, tl.minimum(start_m + BLOCK_M, N), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        kv = head + offs_n[:, None] * (H * D) + offs_d[None, :]
        k = tl.load(k_ptr + kv, mask=offs_n[:, None] < N, other=0.0)
        v = tl.load(v_ptr + kv, mask=offs_n[:, None] < N, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        gap = offs_m[:, None] - offs_n[None, :]
        s = tl.where((offs_n[None, :] < N) & (gap >= 0) & (gap <= window), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
        p = tl.exp2(s - safe[:, None])
        alpha = tl.exp2(m - safe)
        l = alpha * l + tl.sum(p, axis=1)
        o = tl.dot(p.to(v.dtype), v, alpha[:, None] * o, input_precision="ieee")
        m = m_new
    l = tl.where(l == 0.0, 1.0, l)  # rows that do not exist, beyond N
    tl.store(o_ptr + rows, o / l[:, None], mask=offs_m[:, None] < N)


def window_attention(q, k, v, window):
    """q, k, v (B, N, H, D), contiguous -> out; a query sees itself and the `window` keys before it."""
    B, N, H, D = q.shape
    out = torch.empty_like(q)
    grid = (triton.cdiv(N, 32), B * H)
    window_kernel[grid](q, k, v, out, D**-0.5, window, N, H, D=D, BLOCK_M=32, BLOCK_N=32)
    return out


def score_gradient(S, V, dO, dL):
    """S (N_q, N_k), V (N_k, D), dO (N_q, D), dL (N_q,) -> dS (N_q, N_k)."""
    P = S.softmax(dim=-1)
    dP = dO @ V.T
    delta = (P * dP).sum(dim=-1)  # Δ_i, which is also Σ_d dO_id O_id
    return P * (dP - delta[:, None] + dL[:, None])


def kv_head(head, heads, kv_heads):
    """The head of K and V that query head `head` reads."""
    return head // (heads // kv_heads)

"""Answers to the exercises of notebook 02."""

import torch
import triton
import triton.language as tl

from labutils.attention.interface import flash_attn_func


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


def find_bug(q, k, v, out, block):
    """q, k, v, out (N, D) of a causal kernel with `block` keys a step: "right", "scale", "mask", "l", "o" or "tail"."""
    N, D = q.shape
    rows, columns = torch.arange(N, device=q.device)[:, None], torch.arange(N, device=q.device)[None, :]
    causal, everything = columns <= rows, columns <= N
    full = causal & (columns < N // block * block)

    def kernel(scale=D**-0.5, mask=causal, rescale_l=True, rescale_o=True):
        S = (scale * q @ k.T).masked_fill(~mask, -torch.inf)
        m, l, o = q.new_full((N, 1), -torch.inf), q.new_zeros(N, 1), torch.zeros_like(q)
        for start in range(0, N, block):
            part = S[:, start : start + block]
            m_new = torch.maximum(m, part.amax(dim=1, keepdim=True))
            p, alpha = torch.exp(part - m_new), torch.exp(m - m_new)
            l = (alpha if rescale_l else 1) * l + p.sum(dim=1, keepdim=True)
            o = (alpha if rescale_o else 1) * o + p @ v[start : start + block]
            m = m_new
        return o / l

    candidates = {
        "right": kernel(), "scale": kernel(scale=1.0), "mask": kernel(mask=everything),
        "l": kernel(rescale_l=False), "o": kernel(rescale_o=False), "tail": kernel(mask=full),
    }  # fmt: skip
    return min(candidates, key=lambda name: (candidates[name] - out).abs().max().item())


def gpt2_attention(query, key, value, scaling, padding):
    """query (B, H, N_q, D), key, value (B, H, N_k, D) -> (B, N_q, H, D); padding: None or bool (B, N_k)."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (B, H, N, D) -> (B, N, H, D)
    if padding is None:
        return flash_attn_func(q, k, v, softmax_scale=scaling, causal=True)
    out = torch.zeros_like(q)
    for b, tokens in enumerate(padding):
        rows = tokens[k.shape[1] - q.shape[1] :]  # query i stands at key i + N_k - N_q
        part = (q[b : b + 1, rows], k[b : b + 1, tokens], v[b : b + 1, tokens])
        out[b, rows] = flash_attn_func(*part, softmax_scale=scaling, causal=True)[0]
    return out

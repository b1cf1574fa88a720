"""Answers to the exercises of notebook 01."""

import math

import torch


def score_bytes(batch, heads, seqlen, itemsize):
    """Bytes of the matrix S of scores."""
    return batch * heads * seqlen * seqlen * itemsize


def safe_softmax(x):
    """Softmax over the last dimension of x."""
    m = x.amax(dim=-1, keepdim=True)  # one maximum for each row
    p = (x - m).exp()
    return p / p.sum(dim=-1, keepdim=True)


def online_update(m, l, x):
    """m, l (R,) of R rows and their next block of scores x (R, n) -> m_new, l_new (R,)."""
    m_new = torch.maximum(m, x.amax(dim=-1))
    # exp(-inf - (-inf)) would be NaN: a score of -inf has the weight 0
    alpha = torch.where(m.isneginf(), 0.0, (m - m_new).exp())
    p = torch.where(x.isneginf(), 0.0, (x - m_new[:, None]).exp())
    return m_new, alpha * l + p.sum(dim=-1)


def normalised_update(m, l, o, x, v):
    """m, l (R,), o (R, D), scores x (R, n), values v (n, D) -> m_new, l_new (R,), o_new (R, D)."""
    m_new = torch.maximum(m, x.amax(dim=-1))
    alpha = (m - m_new).exp()
    p = (x - m_new[:, None]).exp()
    l_new = alpha * l + p.sum(dim=-1)
    # o · l is the weighted sum before its division by l
    o_new = ((alpha * l)[:, None] * o + p @ v) / l_new[:, None]
    return m_new, l_new, o_new


def combine(outs, lses):
    """outs (S, N, D), lses (S, N) of S pieces -> out (N, D), lse (N,) of the whole."""
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.where(lses.isneginf(), 0.0, (lses - lse).exp())  # (S, N); a piece that saw nothing has the weight 0
    return (weights[..., None] * outs).sum(dim=0), lse


def tiled_attention(q, k, v, block_m, block_n, causal):
    """One head: q (N_q, D), k, v (N_k, D) -> out (N_q, D) in the dtype of q, lse (N_q,)."""
    n_q, n_k, scale = len(q), len(k), q.shape[-1] ** -0.5
    out, lse = torch.zeros_like(q), torch.full((n_q,), -math.inf, device=q.device)
    for i in range(0, n_q, block_m):
        q_i = q[i : i + block_m].float()
        rows = torch.arange(i, i + len(q_i), device=q.device)[:, None] + n_k - n_q  # the last column that each may see
        m = torch.full((len(q_i),), -math.inf, device=q.device)
        l, a = torch.zeros_like(m), torch.zeros_like(q_i)
        for j in range(0, n_k, block_n):
            k_j, v_j = k[j : j + block_n].float(), v[j : j + block_n].float()
            s = scale * q_i @ k_j.mT
            if causal:
                columns = torch.arange(j, j + len(k_j), device=q.device)[None, :]
                s = s.masked_fill(columns > rows, -math.inf)
            m_new = torch.maximum(m, s.amax(dim=-1))
            alpha = torch.where(m.isneginf(), 0.0, (m - m_new).exp())
            p = torch.where(s.isneginf(), 0.0, (s - m_new[:, None]).exp())
            l = alpha * l + p.sum(dim=-1)
            a = alpha[:, None] * a + p @ v_j
            m = m_new
        out[i : i + block_m] = (a / torch.where(l == 0, 1.0, l)[:, None]).to(q.dtype)
        lse[i : i + block_m] = m + l.log()
    return out, lse

"""Attention with a planted bug: a good check must find it, and the exercises recognise it in a reader's code."""

from __future__ import annotations

import math

import torch

from labutils.attention.reference import causal_mask


def tiles_without(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block: int,
    *,
    causal: bool,
    rescale_l: bool = True,
    rescale_o: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2's loop over blocks of keys; it can leave a rescaling out.

    Args:
        q: (N_q, D), one head. k, v: (N_k, D). block: keys in a block.
        causal: mask aligned to the bottom right.
        rescale_l, rescale_o: if False, l or O is not rescaled when the running maximum grows.

    Returns:
        out (N_q, D) and lse (N_q,) in float64; right if both rescalings are made.
    """
    q, k, v = q.double(), k.double(), v.double()
    mask = (
        causal_mask(len(q), len(k), q.device)
        if causal
        else torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
    )
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
    m, l, o = (
        torch.full((len(q),), -math.inf, dtype=torch.float64, device=q.device),
        torch.zeros(len(q), dtype=torch.float64, device=q.device),
        torch.zeros(len(q), v.shape[1], dtype=torch.float64, device=q.device),
    )
    for start in range(0, len(k), block):
        part = s[:, start : start + block]
        m_new = torch.maximum(m, part.amax(dim=-1))
        alpha, p = _weight(m, m_new), _weight(part, m_new[:, None])
        l = (alpha if rescale_l else 1.0) * l + p.sum(dim=-1)
        o = (alpha[:, None] if rescale_o else 1.0) * o + p @ v[start : start + block]
        m = m_new
    return o / torch.where(l == 0, 1.0, l)[:, None], m + l.log()


def _weight(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """exp(a - b), and 0 where a is -inf."""
    return torch.where(a.isneginf(), 0.0, (a - b).exp())

"""Attention in plain PyTorch: the exact result, the steps from softmax to tiled attention, and the 2 x rule.

Everything here is written to be read and to be right, not to be fast. Shapes are flash-attn's: q (B, N_q, H, D), k and
v (B, N_k, H_kv, D) with H_kv a divisor of H, out (B, N_q, H, D), lse (B, H, N_q).

The 2 x rule says whether the result of a kernel is right; flash-attn's own tests use it. The error of the result
against exact attention may be at most twice the error of the textbook formula in the same dtype. `judge` applies the
rule to any tensor, `check_attention` to an output and `check_gradients` to gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Standard attention
# ---------------------------------------------------------------------------------------------------------------------


def causal_mask(n_q: int, n_k: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Boolean mask (N_q, N_k), True where query i may see key j: j <= i + N_k - N_q.

    The diagonal ends in the bottom right corner: the last query sees every key, as in decoding with a cache. With
    N_q > N_k the first N_q - N_k queries see nothing.
    """
    return torch.ones(n_q, n_k, dtype=torch.bool, device=device).tril(diagonal=n_k - n_q)


def visible_mask(
    n_q: int,
    n_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Boolean mask (N_q, N_k) of a causal mask and a sliding window together, True where query i may see key j.

    The window is flash-attn's: i + N_k - N_q - left <= j <= i + N_k - N_q + right, -1 for no bound.
    """
    place = torch.arange(n_q, device=device)[:, None] + n_k - n_q
    key = torch.arange(n_k, device=device)[None, :]
    left, right = window_size
    mask = torch.ones(n_q, n_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= key >= place - left
    if right >= 0:
        mask &= key <= place + right
    if causal:
        mask &= key <= place
    return mask


def alibi_bias(slopes: torch.Tensor, n_q: int, n_k: int) -> torch.Tensor:
    """ALiBi's bias -slope * |i + N_k - N_q - j|: slopes (H,) or (B, H) -> (1 or B, H, N_q, N_k).

    Source: Press et al., "Train Short, Test Long" (arXiv 2108.12409); the distance as flash-attn takes it.
    """
    place = torch.arange(n_q, device=slopes.device)[:, None] + n_k - n_q
    distance = (place - torch.arange(n_k, device=slopes.device)[None, :]).abs()
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance


def _scores(q, k, softmax_scale, visible, softcap, alibi_slopes) -> torch.Tensor:
    """The scores that softmax sees, (B, H, N_q, N_k): -inf where `visible` is False. None makes all keys visible."""
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q = q.transpose(1, 2)  # (B, N, H, D) -> (B, H, N, D)
    k = k.transpose(1, 2).repeat_interleave(group, dim=1)
    scores = (q @ k.mT) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes.to(scores.dtype), q.shape[2], k.shape[2])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(softmax_scale * Q Kᵀ) V with the whole N_q x N_k matrix in memory, in the dtype of the inputs.

    Args:
        q: (B, N_q, H, D). k, v: (B, N_k, H_kv, D).
        causal: mask aligned to the bottom right, see `causal_mask`.
        softmax_scale: factor on the scores; D ** -0.5 by default.
        window_size: see `visible_mask`.
        softcap: c > 0 turns the scaled scores s into c * tanh(s / c).
        alibi_slopes: (H,) or (B, H), see `alibi_bias`.
        dropout_mask: boolean (B, H, N_q, N_k), True where dropout keeps a probability.
        dropout_p: the probability that `dropout_mask` was drawn with.
        return_lse: also return the log-sum-exp of each row's scores (B, H, N_q), natural logarithm.

    Returns:
        out (B, N_q, H, D); with `return_lse` a tuple (out, lse). For a query that sees no key, out is zero and lse is
        -inf. Differentiable.
    """
    n_q, n_k = q.shape[1], k.shape[1]
    visible = None  # benchmarks time this function: without a mask it must not pay for one
    if causal or tuple(window_size) != (-1, -1):
        visible = visible_mask(n_q, n_k, causal=causal, window_size=window_size, device=q.device)
    scores = _scores(q, k, softmax_scale, visible, softcap, alibi_slopes)
    probabilities = scores.softmax(dim=-1)
    right = 0 if causal else window_size[1]
    # The softmax of a row of -inf is NaN; attention to nothing is zero.
    if visible is not None and right >= 0 and n_k - n_q + right < 0:
        probabilities = probabilities.masked_fill(~visible.any(dim=1)[:, None], 0.0)
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask / (1.0 - dropout_p)
    value = v.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    out = (probabilities @ value).transpose(1, 2)  # (B, H, N, D) -> (B, N, H, D)
    if return_lse:
        return out, scores.logsumexp(dim=-1)
    return out


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The exact result: `naive_attention` computed in float64 from inputs of any dtype. Arguments as there."""
    return naive_attention(q.double(), k.double(), v.double(), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Softmax, from the definition to one pass
# ---------------------------------------------------------------------------------------------------------------------


def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension, with the maximum subtracted first: three passes over x.

    exp(x) overflows float32 from x = 89 on and float16 from 12 on; exp(x - max) never does, and the common factor
    exp(-max) cancels in the quotient.

    Args:
        x: of any shape; each row of its last dimension needs one number above -inf, else its result is nan.

    Returns:
        In the shape and dtype of x; each row sums to 1.
    """
    m = x.amax(dim=-1, keepdim=True)  # pass 1
    l = (x - m).exp().sum(dim=-1, keepdim=True)  # pass 2
    return (x - m).exp() / l  # pass 3


def online_softmax_trace(x: torch.Tensor, block: int) -> list[dict[str, Any]]:
    """The running maximum m and sum l of one pass over the last dimension of x, after each block.

    Args:
        x: (..., N). block: elements in a block, 1 or more; the last block may hold fewer.

    Returns:
        One dict per block: `start` and `stop` of the block, `m` and `l` (shape of x without its last dimension), and
        `rescale`, the factor exp(m_old - m_new) that the old sum was multiplied by.

    Raises:
        ValueError: `block` is below 1.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867), Algorithm 3.
    """
    if block < 1:
        raise ValueError(f"block={block}: a block holds at least one element.")
    m = torch.full(x.shape[:-1], -math.inf, dtype=x.dtype, device=x.device)
    l = torch.zeros_like(m)
    steps: list[dict[str, torch.Tensor | int]] = []
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block]
        m_new = torch.maximum(m, part.amax(dim=-1))
        rescale = _exp_difference(m, m_new)
        # l counted multiples of exp(m_old); in multiples of exp(m_new) it is exp(m_old - m_new) times as large
        l = l * rescale + _exp_difference(part, m_new[..., None]).sum(dim=-1)
        m = m_new
        steps.append({"start": start, "stop": start + part.shape[-1], "m": m, "l": l, "rescale": rescale})
    return steps


def online_softmax(x: torch.Tensor, block: int = 4) -> torch.Tensor:
    """Softmax over the last dimension: one pass over blocks finds m and l, a second pass divides.

    Arguments and errors as for `online_softmax_trace`; the result has the shape and dtype of x.
    """
    last = online_softmax_trace(x, block)[-1]
    return _exp_difference(x, last["m"][..., None]) / last["l"][..., None]


def _exp_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """exp(a - b) for b >= a, with exp(-inf - -inf) = 0, since a sum over no keys has no weight."""
    return torch.where(torch.isneginf(a), 0.0, (a - b).exp())


# ---------------------------------------------------------------------------------------------------------------------
# Tiled attention in the loop orders of the two papers
# ---------------------------------------------------------------------------------------------------------------------


def tiled_attention_v1(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in the order of FlashAttention-1: blocks of K and V outside, blocks of Q inside.

    O, l and m live in full-length arrays ("HBM"); each inner step reads, rescales and writes one block of them. O is
    normalised after every step. Computes in float32 or better.

    Args:
        q: (B, N_q, H, D). k, v: (B, N_k, H_kv, D).
        causal: mask aligned to the bottom right, see `causal_mask`.
        softmax_scale: factor on the scores; D ** -0.5 by default.
        block_m, block_n: rows of Q, and of K and V, in a tile.
        return_lse: also return the log-sum-exp of each row's scores (B, H, N_q), natural logarithm.

    Returns:
        out (B, N_q, H, D) in the dtype of q; with `return_lse` a tuple (out, lse).

    Source: arXiv 2205.14135, Algorithm 1.
    """
    q_, k_, v_, scale = _prepare_tiles(q, k, v, softmax_scale)
    batch, heads, n_q, _ = q_.shape
    n_k = k_.shape[2]
    out = torch.zeros_like(q_)
    m = torch.full((batch, heads, n_q), -math.inf, dtype=q_.dtype, device=q.device)
    l = torch.zeros_like(m)
    for start_n in range(0, n_k, block_n):
        cols = slice(start_n, min(start_n + block_n, n_k))
        for start_m in range(0, n_q, block_m):
            rows = slice(start_m, min(start_m + block_m, n_q))
            if causal and cols.start > rows.stop - 1 + n_k - n_q:
                continue  # every score of this tile is above the diagonal
            s = _tile_scores(q_, k_, rows, cols, scale, causal)  # S_ij = scale * Q_i K_jᵀ
            m_old, l_old = m[..., rows], l[..., rows]
            m_new = torch.maximum(m_old, s.amax(dim=-1))
            alpha = _exp_difference(m_old, m_new)
            p = _exp_difference(s, m_new[..., None])  # P_ij = exp(S_ij - m_new)
            l_new = alpha * l_old + p.sum(dim=-1)
            divisor = torch.where(l_new == 0, 1.0, l_new)[..., None]  # a row that has seen no key yet stays zero
            # O_i = (l_old e^(m_old - m_new) O_i + P_ij V_j) / l_new
            out[:, :, rows] = ((alpha * l_old)[..., None] * out[:, :, rows] + p @ v_[:, :, cols]) / divisor
            m[..., rows], l[..., rows] = m_new, l_new
    return _finish_tiles(q, out, m, l, return_lse)


def tiled_attention_v2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in the order of FlashAttention-2: blocks of Q outside, blocks of K and V inside.

    O, l and m of one block of rows stay with the outer step ("on chip") until its rows are done. O is divided by l only
    once, at the end. The backward pass needs one number per row of the softmax, the log-sum-exp. The outer steps do not
    touch each other's rows, so a GPU can run them at the same time. Arguments and result as for `tiled_attention_v1`.

    Source: arXiv 2307.08691, Algorithm 1.
    """
    q_, k_, v_, scale = _prepare_tiles(q, k, v, softmax_scale)
    batch, heads, n_q, _ = q_.shape
    n_k = k_.shape[2]
    out = torch.zeros_like(q_)
    m_all = torch.full((batch, heads, n_q), -math.inf, dtype=q_.dtype, device=q.device)
    l_all = torch.zeros_like(m_all)
    for start_m in range(0, n_q, block_m):
        rows = slice(start_m, min(start_m + block_m, n_q))
        acc = torch.zeros_like(q_[:, :, rows])
        m = torch.full_like(m_all[..., rows], -math.inf)
        l = torch.zeros_like(m)
        for start_n in range(0, n_k, block_n):
            cols = slice(start_n, min(start_n + block_n, n_k))
            if causal and cols.start > rows.stop - 1 + n_k - n_q:
                break  # this tile and all to its right are above the diagonal
            s = _tile_scores(q_, k_, rows, cols, scale, causal)  # S_ij = scale * Q_i K_jᵀ
            m_new = torch.maximum(m, s.amax(dim=-1))
            alpha = _exp_difference(m, m_new)
            p = _exp_difference(s, m_new[..., None])  # P_ij = exp(S_ij - m_new)
            l = alpha * l + p.sum(dim=-1)
            acc = alpha[..., None] * acc + p @ v_[:, :, cols]  # O_i, not yet divided
            m = m_new
        out[:, :, rows] = acc / torch.where(l == 0, 1.0, l)[..., None]
        m_all[..., rows], l_all[..., rows] = m, l
    return _finish_tiles(q, out, m_all, l_all, return_lse)


def _prepare_tiles(q, k, v, softmax_scale):
    group = q.shape[2] // k.shape[2]
    working = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q_ = q.to(working).transpose(1, 2)  # (B, N, H, D) -> (B, H, N, D)
    k_, v_ = (t.to(working).transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))
    return q_, k_, v_, scale


def _tile_scores(q, k, rows: slice, cols: slice, scale: float, causal: bool) -> torch.Tensor:
    s = (q[:, :, rows] @ k[:, :, cols].mT) * scale
    if causal:
        visible = causal_mask(q.shape[2], k.shape[2], q.device)[rows, cols]
        s = s.masked_fill(~visible, -math.inf)
    return s


def _finish_tiles(q, out, m, l, return_lse):
    out = out.transpose(1, 2).to(q.dtype)  # (B, H, N, D) -> (B, N, H, D)
    return (out, m + l.log()) if return_lse else out


# ---------------------------------------------------------------------------------------------------------------------
# The rule
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the 2 x rule says about one tensor; as a condition it is true if the tensor passes."""

    name: str
    passed: bool
    error: float
    """max |out - ref|; inf if the tensor holds NaN, or an infinity that the reference does not hold."""
    allowed: float
    """factor * max |low - ref| + atol."""
    where: tuple[int, ...]
    """Index of the largest error."""
    note: str = ""

    @property
    def ratio(self) -> float:
        """error / allowed: at most 1 if the tensor passes."""
        return self.error / self.allowed

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        verdict = "right" if self.passed else "WRONG"
        place = f"largest at {self.name}[{', '.join(map(str, self.where))}]" if self.where else ""
        text = f"{self.name}: {verdict}, error {self.error:.2e}, allowed {self.allowed:.2e} ({self.ratio:.2f} of it)"
        return "; ".join(part for part in (text, place, self.note) if part)

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the verdict's text if the tensor failed."""
        if not self.passed:
            raise AssertionError(str(self))


def judge(
    out: torch.Tensor,
    ref: torch.Tensor,
    low: torch.Tensor,
    *,
    factor: float = 2.0,
    atol: float = 1e-5,
    name: str = "out",
) -> Verdict:
    """The 2 x rule: max |out - ref| <= factor * max |low - ref| + atol.

    Args:
        out: the result to judge.
        ref: the exact result, float64, same shape.
        low: the textbook formula computed in the dtype of `out`, same shape.
        factor: 2 for outputs; flash-attn's tests take 3 for gradients.
        atol: keeps the rule fair if the textbook formula happens to be exact.
        name: the tensor's name in the verdict.

    Infinite values must stand in the same places as in `ref`, and any NaN fails.

    Raises:
        ValueError: the shapes differ.

    Source: Dao-AILab/flash-attention, tests/test_flash_attn.py; the reference there is float32, here float64.
    """
    if not out.shape == ref.shape == low.shape:
        raise ValueError(
            f"{name}: shapes differ: out {tuple(out.shape)}, ref {tuple(ref.shape)}, low {tuple(low.shape)}."
        )
    if out.numel() == 0:
        return Verdict(name, True, 0.0, atol, (), "empty")
    out, ref, low = (t.detach().double() for t in (out, ref, low))
    allowed = factor * _distance(low, ref).nan_to_num(nan=0.0, posinf=0.0).max().item() + atol
    distance = _distance(out, ref)
    note = ""
    if out.isnan().any():
        distance = torch.where(out.isnan(), math.inf, 0.0)
        note = f"{int(out.isnan().sum())} of {out.numel()} values are NaN"
    flat = int(distance.argmax())
    error = distance.flatten()[flat].item()
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat, device="cpu"), distance.shape))
    return Verdict(name, error <= allowed, error, allowed, where, note)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b|, and 0 where both are the same infinity: lse of a row that sees no key is -inf in both."""
    return torch.where(a == b, 0.0, (a - b).abs())


def check_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    factor: float = 2.0,
    lse: torch.Tensor | None = None,
    **options: Any,
) -> Verdict:
    """Judges the output of an attention forward pass by the 2 x rule, against `exact_attention`.

    Args:
        out: (B, N_q, H, D), the result to judge. q, k, v: its inputs, in the dtype that it was computed in.
        factor: see `judge`.
        lse: (B, H, N_q); if it is given, it is judged, too.
        options: the kernel's options: `causal`, `softmax_scale` and the others of `naive_attention`.

    Returns:
        The verdict on `out`, or the worse one if `lse` is given.

    Raises:
        ValueError: `out` or `lse` has another shape.
    """
    with torch.no_grad():
        ref, ref_lse = exact_attention(q, k, v, return_lse=True, **options)
        low, low_lse = naive_attention(q, k, v, return_lse=True, **options)
    verdict = judge(out, ref, low, factor=factor)
    if lse is None:
        return verdict
    lse_verdict = judge(lse, ref_lse, low_lse, factor=factor, name="lse")
    return max(verdict, lse_verdict, key=lambda v: v.ratio)


def check_gradients(
    gradients: Sequence[torch.Tensor],
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    factor: float = 3.0,
    **options: Any,
) -> list[Verdict]:
    """Judges (dq, dk, dv) by the 2 x rule, against autograd through `exact_attention`.

    Args:
        gradients: dq (B, N_q, H, D), dk and dv (B, N_k, H_kv, D).
        dout: (B, N_q, H, D), gradient of the loss by the output.
        q, k, v: inputs of the forward pass.
        factor: 3, as in flash-attn's tests.
        options: the kernel's options: `causal`, `softmax_scale` and the others of `naive_attention`.

    Returns:
        The verdicts on dq, dk and dv.

    Raises:
        ValueError: a gradient has another shape than its tensor, or there are not three.
    """

    def grads(inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        result: Any = naive_attention(*inputs, **options)
        return torch.autograd.grad(result, inputs, dout.to(result.dtype))

    exact, low = grads([t.double() for t in (q, k, v)]), grads((q, k, v))
    names = ("dq", "dk", "dv")
    return [judge(g, e, p, factor=factor, name=n) for g, e, p, n in zip(gradients, exact, low, names, strict=True)]

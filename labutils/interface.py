"""The functions of flash-attn's own interface, over the Triton kernels: checked arguments, autograd, same names.

A program written for flash-attn 2.8 changes its import and runs: names, argument order, layouts and the bottom-right
alignment of masks are those of the `flash_attn` package. What our kernels cannot do is refused with an error that says
so, never ignored. The arguments that several functions share are described in `flash_attn_func`.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from labutils import checks
from labutils.kernels import flash_v1, flash_v2, flash_v2_backward
from labutils.kernels.flash_v2 import Options

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse = flash_v2.forward(q, k, v, options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable  # there is no second derivative: asking for one raises, rather than count this one as constant
    def backward(ctx, dout, _dlse):
        return *flash_v2_backward.backward(dout, *ctx.saved_tensors, ctx.options), None


def _attention(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs, batch, **packed
) -> Result:
    """Checks what all functions share, draws a seed for dropout, and runs."""
    dropout_p = checks.dropout(dropout_p)
    seed = None
    if dropout_p > 0.0:
        # From PyTorch's generator of the device, so that manual_seed repeats it and checkpointing restores it.
        seed = torch.randint(2**31 - 1, (1,), dtype=torch.int64, device=q.device)
    options = Options(
        softmax_scale=checks.scale(softmax_scale, q.shape[-1]),
        window=checks.window(window_size, causal),
        softcap=checks.cap(softcap),
        alibi_slopes=checks.slopes(alibi_slopes, batch, q.shape[-2], q.device),
        dropout_p=dropout_p,
        seed=seed,
        **packed,
    )
    out, lse = _FlashAttention.apply(q, k, v, options)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """softmax(softmax_scale * Q Kᵀ) V without the N_q x N_k matrix in memory; differentiable.

    Args:
        q: (B, N_q, H, D), float16, bfloat16 or float32, D from 1 to 256, any strides.
        k, v: (B, N_k, H_kv, D); H_kv divides H (grouped-query and multi-query attention).
        dropout_p: probability in [0, 1) of leaving a weight out; the others are divided by 1 - dropout_p. The kernel
            draws by Philox from a seed that PyTorch's generator gives, and the backward draws the same again.
        softmax_scale: factor on the scores, positive; D ** -0.5 where not given.
        causal: query i sees the keys j <= i + N_k - N_q (aligned to the bottom right, as flash-attn does since 2.1).
        window_size: (left, right): query i sees the keys from i + N_k - N_q - left to i + N_k - N_q + right; -1 is no
            bound. With `causal`, right is 0.
        softcap: c > 0 turns the scaled scores s into c * tanh(s / c); 0 leaves them.
        alibi_slopes: float32 (H,) or (B, H): slope * |i + N_k - N_q - j| is subtracted from the score of i and j.
        deterministic: accepted; our backward always is.
        return_attn_probs: also return the log-sum-exp, as flash-attn does; no gradient flows through it. The third
            value, probabilities that flash-attn computes for its own tests, is None here.

    Returns:
        out (B, N_q, H, D); with `return_attn_probs` a tuple (out, lse (B, H, N_q) float32, None). A query that sees no
        key gives zeros, and -inf in lse.

    Raises:
        ValueError: shapes that do not fit together, values out of range, tensors on different devices.
        TypeError: a type or dtype that the kernels or the GPU do not have.
        NotImplementedError: a gradient by alibi_slopes.
        RuntimeError: a GPU too old or too small.
    """
    checks.tensors(q, k, v)
    return _attention(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs, q.shape[0]
    )


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with K and V in one tensor: q (B, N_q, H, D), kv (B, N_k, 2, H_kv, D). No copy is made."""
    k, v = _unpack("kv", kv, 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with Q, K and V in one tensor: qkv (B, N, 3, H, D). No copy is made."""
    q, k, v = _unpack("qkv", qkv, 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Result:
    """Attention within each of several sequences of different lengths, packed one after the other, without padding.

    Args:
        q: (total_q, H, D). k, v: (total_k, H_kv, D).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,): sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. Their values
            are checked, which waits for the GPU (not while a CUDA graph is captured).
        max_seqlen_q, max_seqlen_k: the longest sequence of each, or more.
        block_table: None; a paged K and V is not supported here.
        The others: as in `flash_attn_func`, for each sequence by itself; alibi_slopes (H,) or (B, H).

    Returns:
        out (total_q, H, D); with `return_attn_probs` a tuple (out, lse (H, total_q) float32, None).

    Raises:
        As `flash_attn_func`, and NotImplementedError for a `block_table`.
    """
    if block_table is not None:
        raise NotImplementedError(
            "block_table: paged keys and values are not supported yet; gather the pages into packed k and v."
        )
    checks.tensors(q, k, v, packed=True)
    cu_seqlens_q = checks.sequences("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, q.shape[0], None, q.device)
    batch = len(cu_seqlens_q) - 1
    cu_seqlens_k = checks.sequences("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, k.shape[0], batch, q.device)
    return _attention(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs, batch,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=int(max_seqlen_q), max_seqlen_k=int(max_seqlen_k),
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with K and V in one tensor: q (total_q, H, D), kv (total_k, 2, H_kv, D)."""
    k, v = _unpack("kv", kv, 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with Q, K and V in one tensor: qkv (total, 3, H, D)."""
    q, k, v = _unpack("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _unpack(name: str, packed: torch.Tensor, parts: int, dimensions: int) -> tuple[torch.Tensor, ...]:
    """Views of the parts that lie side by side in dimension -3."""
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"{name} is a {type(packed).__name__}: pass a torch.Tensor.")
    if packed.dim() != dimensions or packed.shape[-3] != parts:
        layout = ("(total, " if dimensions == 4 else "(B, N, ") + f"{parts}, H, D)"
        raise ValueError(f"{name} has shape {tuple(packed.shape)}: pass {layout}.")
    return packed.unbind(dim=-3)


def flash_attn_v1_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """Attention by the FlashAttention-1 kernel, forward alone: for comparison, slower than `flash_attn_func`.

    Shapes, dtypes and errors as in `flash_attn_func`; D up to 128.

    Raises:
        NotImplementedError: an input requires a gradient.
    """
    checks.tensors(q, k, v, largest=128)
    softmax_scale = checks.scale(softmax_scale, q.shape[-1])
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise NotImplementedError(
            "flash_attn_v1_func has no backward pass: call it under torch.no_grad(), or use flash_attn_func."
        )
    return flash_v1.forward(q, k, v, softmax_scale, bool(causal))[0]

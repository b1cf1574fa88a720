"""The functions of flash-attn's own interface, over the Triton kernels: checked arguments, autograd, same names.

A program written for flash-attn 2.8 changes its import and runs: names, argument order, the (B, N, H, D) layout and the
bottom-right alignment of the causal mask are those of the `flash_attn` package. What our kernels cannot do yet is
refused with a NotImplementedError, never ignored.
"""

from __future__ import annotations

import math

import torch

from labutils.kernels import flash_v1, flash_v2

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 128)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal):
        out, lse = flash_v2.forward(q, k, v, softmax_scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.softmax_scale, ctx.causal = softmax_scale, causal
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = flash_v2.backward(dout, q, k, v, out, lse, ctx.softmax_scale, ctx.causal)
        return dq, dk, dv, None, None


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """softmax(softmax_scale * Q Kᵀ) V without the N_q x N_k matrix in memory; differentiable.

    Args:
        q: (B, N_q, H, D), float16, bfloat16 or float32, D from 16 to 128, any strides.
        k, v: (B, N_k, H_kv, D); H_kv divides H (grouped-query and multi-query attention).
        softmax_scale: factor on the scores, positive; D ** -0.5 where not given.
        causal: query i sees the keys j <= i + N_k - N_q (aligned to the bottom right, as flash-attn does since 2.1).
        deterministic: accepted; our backward always is.
        return_attn_probs: also return the log-sum-exp, as flash-attn does; its third value, the probabilities that it
            computes for its own tests, is None here.
        dropout_p, window_size, softcap, alibi_slopes: their defaults alone, for now.

    Returns:
        out (B, N_q, H, D); with `return_attn_probs` a tuple (out, lse (B, H, N_q) float32, None). A query that sees no
        key gives zeros, and -inf in lse.

    Raises:
        ValueError: shapes that do not fit together, a head dimension out of range, tensors on different devices.
        TypeError: a dtype that the kernels or the GPU do not have.
        NotImplementedError: an argument that is not supported yet.
        RuntimeError: a GPU too old or too small.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p={dropout_p}: dropout is not supported yet; pass 0.0.")
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError(f"window_size={window_size}: windows are not supported yet; pass (-1, -1).")
    if softcap != 0.0:
        raise NotImplementedError(f"softcap={softcap}: capped scores are not supported yet; pass 0.0.")
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes: ALiBi is not supported yet; pass None.")
    softmax_scale = _check(q, k, v, softmax_scale)
    out, lse = _FlashAttention.apply(q, k, v, softmax_scale, bool(causal))
    return (out, lse, None) if return_attn_probs else out


def flash_attn_v1_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """Attention by the FlashAttention-1 kernel, forward alone: for comparison, slower than `flash_attn_func`.

    Shapes, dtypes and errors as in `flash_attn_func`.

    Raises:
        NotImplementedError: an input requires a gradient.
    """
    softmax_scale = _check(q, k, v, softmax_scale)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise NotImplementedError(
            "flash_attn_v1_func has no backward pass: call it under torch.no_grad(), or use flash_attn_func."
        )
    return flash_v1.forward(q, k, v, softmax_scale, bool(causal))[0]


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None) -> float:
    """Raises where the kernels cannot compute what was asked, and returns the scale to use."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}: pass a torch.Tensor of shape (B, N, H, D).")
        if t.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}: pass four dimensions (B, N, H, D): batch, sequence, heads, head "
                "dimension."
            )
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: both must be (B, N_k, H_kv, D).")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]}, k and v have {k.shape[0]}: they must agree.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head dimension {q.shape[3]}, k and v have {k.shape[3]}: they must agree.")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(
            f"q has {q.shape[2]} heads, k and v have {k.shape[2]}: the heads of k and v must divide those of q. "
            f"Shapes are (B, N, H, D); if yours are (B, H, N, D), as in scaled_dot_product_attention, transpose(1, 2)."
        )
    lowest, highest = HEAD_DIMS
    if not lowest <= q.shape[3] <= highest:
        raise ValueError(
            f"head dimension {q.shape[3]} is not supported: {lowest} to {highest} are. Pad the last dimension with "
            "zeros (and pass softmax_scale for the unpadded one), or use "
            "torch.nn.functional.scaled_dot_product_attention."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: convert them to one.")
    if q.dtype not in DTYPES:
        raise TypeError(f"dtype {q.dtype} is not supported: use torch.float16, torch.bfloat16 or torch.float32.")
    _check_device(q, k, v)
    if softmax_scale is None:
        return q.shape[3] ** -0.5
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ValueError(f"softmax_scale={softmax_scale}: pass a positive, finite number, or None for D ** -0.5.")
    return float(softmax_scale)


def _check_device(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    from labutils import runtime

    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: move them to one device.")
    if runtime.interpreted and q.device.type != "cpu":
        raise ValueError(
            f"q is on {q.device}, but kernels run in Triton's interpreter in this process: move the tensors to the "
            "CPU, or unset LABUTILS_DEVICE and TRITON_INTERPRET and restart."
        )
    if not runtime.interpreted and q.device.type != "cuda":
        raise ValueError(
            f"q is on {q.device}: move the tensors to the GPU (runtime.device), or set LABUTILS_DEVICE=cpu and "
            "restart to run in Triton's interpreter."
        )
    if q.dtype == torch.bfloat16 and q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        raise TypeError(
            f"{torch.cuda.get_device_name(q.device)} has no bfloat16 arithmetic (compute capability below 8.0): use "
            "torch.float16."
        )

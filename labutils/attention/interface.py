"""flash-attn's functions, computed by our Triton kernels: same names and arguments, checked, with gradients.

A program written for flash-attn 2.8 only has to change its import. Names, argument order, layouts and the bottom-right
alignment of masks are the same as in the `flash_attn` package. If our kernels cannot do what an argument asks for, the
function raises an error that says so. `flash_attn_func` describes the arguments that several functions share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from labutils.attention import checks, fast_path, operators
from labutils.attention.kernels.options import Options
from labutils.machine import runtime

_Result: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]
_NUMBERS = {float, int}


def _cast(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors in autocast's dtype if autocast is on, as PyTorch casts them for its own attention."""
    device = runtime.device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)

    def cast(t: torch.Tensor | None) -> torch.Tensor | None:
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64:
            return t.to(dtype)
        return t  # None, or something that the checks refuse

    return list(map(cast, tensors))


def _needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """Raises if a tensor has a tangent: no kernel returns one, and PyTorch would silently take it for zero."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(_NO_FORWARD_MODE)


_NO_FORWARD_MODE = (
    "flash_attn functions have no forward-mode derivative (torch.func.jvp, jacfwd and hessian, "
    "torch.autograd.forward_ad): use backward(), or compute it with labutils.attention.reference.naive_attention."
)


class _FlashAttention(torch.autograd.Function):
    """The forward and backward pass of all functions here, as autograd sees them.

    Gradients reach q, k and v from out and from the log-sum-exp. There is no second derivative. Profiles show this
    class by its name. Source: arXiv 2307.08691, Algorithm 2.
    """

    @staticmethod
    def forward(ctx, q, k, v, options: Options, known: fast_path.KnownCall | None):
        if known is not None:  # the call keeps its options, in which there is no tensor
            out, lse = known.output(q, k, v)
            ctx.save_for_backward(q, k, v, out, lse)
        else:
            out, lse = _operator(q, k, v)(q, k, v, *options)
            _save(ctx, q, k, v, out, lse, options)
        ctx.known = known
        ctx.set_materialize_grads(False)  # a gradient by lse is rare: without it backward gets None, not zeros
        return out, lse

    @staticmethod
    @once_differentiable  # a second derivative raises an error
    def backward(ctx, dout, dlse):
        known = ctx.known
        if known is None:
            return *_gradients(ctx, dout, dlse), None, None
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.resolve_neg()
        dlse = None if dlse is None else dlse.resolve_neg()
        gradients = known.gradients(dout, dlse, q, k, v, out, lse)
        if gradients is None:
            run = _undifferentiable(operators.flash_attention_backward)
            gradients = run(dout, dlse, q, k, v, out, lse, *known.options[:-1])
        return *gradients, None, None


class _TransformedFlashAttention(_FlashAttention):
    """`_FlashAttention` under torch.func's transforms, which ask for this form; it takes 30 us more for each call.

    The fields of the options are arguments of their own, so that the transforms see the tensors among them.
    """

    generate_vmap_rule = True  # made of the vmap rules of the operators

    @staticmethod
    def forward(q, k, v, *options):  # type: ignore[override]  # PyTorch asks for this form if there is a setup_context
        return operators.flash_attention(q, k, v, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (q, k, v, *options), (out, lse) = inputs, output
        _save(ctx, q, k, v, out, lse, Options(*options))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        return *_gradients(ctx, dout, dlse), *[None] * len(Options._fields)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_NO_FORWARD_MODE)


class _WithoutDerivative(torch.autograd.Function):
    """An operator without a derivative under torch.func's transforms: a backward through it raises an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator, *arguments):
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(_NO_BACKWARD[ctx.operator])

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_NO_FORWARD_MODE)


_NO_BACKWARD = {
    operators.flash_attention_backward: "flash_attn functions have no second derivative: compute it with "
    "labutils.attention.reference.naive_attention.",
    operators.flash_attention_with_cache: "flash_attn_with_kvcache has no backward pass: call it outside of what is "
    "differentiated, or use flash_attn_func.",
    operators.flash_attention_v1: "flash_attn_v1_func has no backward pass: call it outside of what is differentiated, "
    "or use flash_attn_func.",
}


def _transformed() -> bool:
    """Whether one of torch.func's transforms is under way that needs a derivative or another batch."""
    if torch.compiler.is_compiling():
        return False  # a compiler follows torch.vmap through the operators; it cannot trace our derivatives
    innermost = torch._C._functorch.peek_interpreter_stack()
    return innermost is not None and innermost.key() != torch._C._functorch.TransformType.Functionalize


def _undifferentiable(operator: Callable) -> Callable:
    """An operator without a derivative, in a form that torch.func's transforms can follow if one is under way."""
    return functools.partial(_WithoutDerivative.apply, operator) if _transformed() else operator


def _save(ctx, q, k, v, out, lse, options: Options) -> None:
    """Keeps for the backward pass what `_gradients` needs."""
    ctx.save_for_backward(
        q, k, v, out, lse, options.alibi_slopes, options.seed, options.cu_seqlens_q, options.cu_seqlens_k
    )
    ctx.numbers = (
        options.softmax_scale, options.window_left, options.window_right, options.softcap, options.dropout_p,
        options.max_seqlen_q, options.max_seqlen_k,
    )  # fmt: skip


def _gradients(ctx, dout, dlse) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv by the operator."""
    q, k, v, out, lse, slopes, seed, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    scale, left, right, softcap, dropout_p, max_seqlen_q, max_seqlen_k = ctx.numbers
    return _undifferentiable(operators.flash_attention_backward)(
        torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, out, lse, scale, left, right, softcap, slopes,
        dropout_p, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip


def _operator(q, k, v) -> Callable:
    """The operator, or the function under it if nothing needs PyTorch's dispatcher."""
    return operators.undispatched_forward if fast_path.applies(q, k, v) else operators.flash_attention


def _attention(q, k, v, options: Options, known: fast_path.KnownCall | None, return_attn_probs: bool) -> _Result:
    """Computes the attention, through autograd if an input requires a gradient."""
    if known is None and _transformed():
        out, lse = _TransformedFlashAttention.apply(q, k, v, *options)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _FlashAttention.apply(q, k, v, options, known)
    elif known is not None:
        out, lse = known.output(q, k, v)
    else:
        out, lse = _operator(q, k, v)(q, k, v, *options)
    if return_attn_probs is False:
        return out
    return (out, lse, None) if checks.truth("return_attn_probs", return_attn_probs) else out


def _options(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, batch,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0, block_table=None,
) -> Options:  # fmt: skip
    """Checks the arguments that all functions share, and draws a seed if there is dropout."""
    _refuse_tangents(q, k, v, alibi_slopes if isinstance(alibi_slopes, torch.Tensor) else None)
    dropout_p = checks.dropout(dropout_p)
    scale = checks.scale(softmax_scale, q.shape[-1])
    window = checks.window(window_size, causal)
    softcap = checks.cap(softcap)
    slopes = checks.slopes(alibi_slopes, batch, q.shape[-2], q.device)
    seed = None
    if dropout_p > 0.0:
        # PyTorch's generator of the device gives the seed: manual_seed repeats it, checkpointing restores it.
        seed = torch.randint(2**31 - 1, (1,), dtype=torch.int64, device=q.device)
    return Options(
        scale, *window, softcap, slopes, dropout_p, seed,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table,
    )  # fmt: skip


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
) -> _Result:
    """softmax(softmax_scale * Q Kᵀ) V without the N_q x N_k matrix in memory; differentiable.

    Args:
        q: (B, N_q, H, D), float16, bfloat16 or float32, D from 1 to 256, any strides.
        k, v: (B, N_k, H_kv, D); H_kv divides H (grouped-query and multi-query attention).
        dropout_p: probability in [0, 1) that a weight is dropped; the others are divided by 1 - dropout_p. PyTorch's
            generator gives a seed. Forward and backward draw the same weights from it, by Philox. Unlike in
            scaled_dot_product_attention the fourth argument is not a mask.
        softmax_scale: factor on the scores; D ** -0.5 by default. A tensor without dimensions is read, which waits for
            the GPU. A factor that is not positive costs a copy of q.
        causal: query i sees the keys j <= i + N_k - N_q (aligned to the bottom right, as in flash-attn since 2.1).
        window_size: (left, right): query i sees the keys from i + N_k - N_q - left to i + N_k - N_q + right. -1, or
            any negative number, means no bound. With `causal`, right is 0.
        softcap: c > 0 turns the scaled scores s into c * tanh(s / c); 0 changes nothing.
        alibi_slopes: float32 (H,) or (B, H): slope * |i + N_k - N_q - j| is subtracted from the score of i and j.
        deterministic: has no effect, since our backward is always deterministic.
        return_attn_probs: also return the log-sum-exp. Unlike in flash-attn a gradient flows through it, so that merged
            parts of attention can be trained. The third value is None; flash-attn returns probabilities for its own
            tests there.

    Returns:
        out (B, N_q, H, D); with `return_attn_probs` a tuple (out, lse (B, H, N_q) float32, None). For a query that sees
        no key, out is zero and lse is -inf.

    torch.func's transforms (grad, vjp, jacrev, vmap) and batched gradients work; forward mode (jvp, jacfwd) does not.
    For tensors on the device "meta" the result has shapes and no values.

    Raises:
        ValueError: shapes do not fit together, a value is out of range, or tensors are on different devices.
        TypeError: the kernels or the GPU do not support a type or dtype.
        NotImplementedError: alibi_slopes or softmax_scale require a gradient, or a tensor has a tangent (forward-mode
            differentiation).
        RuntimeError: the GPU is too old or too small; in the backward, a second derivative is asked for.
    """
    q, k, v = _cast(q, k, v)
    if (
        type(dropout_p) in _NUMBERS
        and dropout_p == 0.0
        and alibi_slopes is None
        and type(window_size) is tuple
        and fast_path.applies(q, k, v)
        and (softmax_scale is None or (type(softmax_scale) in _NUMBERS and softmax_scale > 0.0))
    ):

        def check() -> Options:
            checks.tensors(q, k, v)
            return Options(
                checks.scale(softmax_scale, q.shape[-1]), *checks.window(window_size, causal), checks.cap(softcap)
            )

        known = fast_path.known_call(q, k, v, (softmax_scale, causal, window_size, softcap), check)
        return _attention(q, k, v, known.options, known, return_attn_probs)
    checks.tensors(q, k, v)
    options = _options(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, q.shape[0])
    return _attention(q, k, v, options, None, return_attn_probs)


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
) -> _Result:
    """`flash_attn_func` with K and V in one tensor: q (B, N_q, H, D), kv (B, N_k, 2, H_kv, D). No copy is made.

    The other arguments, the result and the errors are as in `flash_attn_func`.
    """
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
) -> _Result:
    """`flash_attn_func` with Q, K and V in one tensor: qkv (B, N, 3, H, D). No copy is made.

    The other arguments, the result and the errors are as in `flash_attn_func`.
    """
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
) -> _Result:
    """Attention within each of several sequences. They are packed one after the other, without padding.

    Args:
        q: (total_q, H, D). k, v: (total_k, H_kv, D).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,): sequence b is the rows from cu_seqlens[b] up to cu_seqlens[b + 1].
            Rows behind the last sequence are ignored: their out is 0, their lse -inf, their gradients are 0. The check
            of the values waits for the GPU. While a CUDA graph is captured, it is left out.
        max_seqlen_q, max_seqlen_k: the length of the longest sequence, or more: integers below 2**31. A tensor without
            dimensions is read, which waits for the GPU.
        block_table: int32 (B, blocks of a sequence), if k and v are in pages, (blocks, rows of a block, H_kv, D). Key j
            of sequence b is row j % rows of block block_table[b, j // rows]. Pages have no backward.
        The others: as in `flash_attn_func`, for each sequence by itself; alibi_slopes (H,) or (B, H).

    Returns:
        out (total_q, H, D); with `return_attn_probs` a tuple (out, lse (H, total_q) float32, None).

    Raises:
        As `flash_attn_func`; RuntimeError if `block_table` has too few columns for a sequence; in the backward,
        NotImplementedError if there is a `block_table`.
    """
    q, k, v = _cast(q, k, v)
    checks.tensors(q, k, v, packed=True, paged=block_table is not None)
    cu_seqlens_q, max_seqlen_q = checks.sequences("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, None, q.device)
    batch = len(cu_seqlens_q) - 1
    cu_seqlens_k, max_seqlen_k = checks.sequences("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, batch, q.device)
    if block_table is not None:
        block_table = checks.table(block_table, batch, q.device)
    options = _options(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, batch,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table,
    )  # fmt: skip
    return _attention(q, k, v, options, None, return_attn_probs)


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
) -> _Result:
    """`flash_attn_varlen_func` with K and V in one tensor: q (total_q, H, D), kv (total_k, 2, H_kv, D).

    No copy is made. The other arguments, the result and the errors are as in `flash_attn_varlen_func`.
    """
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
) -> _Result:
    """`flash_attn_varlen_func` with Q, K and V in one tensor: qkv (total, 3, H, D). No copy is made.

    `cu_seqlens` and `max_seqlen` hold for queries and keys alike. The other arguments, the result and the errors are as
    in `flash_attn_varlen_func`.
    """
    q, k, v = _unpack("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new queries over a cache of keys and values, after new ones are appended to it; no backward.

    Args:
        q: (B, N_q, H, D).
        k_cache, v_cache: (B_cache, N_cache, H_kv, D), or with a `block_table` (blocks, rows of a block, H_kv, D).
        k, v: (B, N_new, H_kv, D), written into the caches, in place, behind the keys that are there.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), rotary_dim from 2 to D. Key i of sequence b is rotated to
            position cache_seqlens[b] + i before it is written. A copy of q is rotated, too: with `causal` or a window
            in the same way, else all queries to position cache_seqlens[b].
        cache_seqlens: keys of each sequence in the cache before k is appended: int32 (B,), or one integer for all
            sequences. An integer is faster, since nothing is read from the GPU. None means a full cache. In a tensor -1
            marks an entry that is padding: nothing is appended to it, its out is 0 and its lse -inf.
        cache_batch_idx: int32 (B,), the cache's row for each sequence; by default sequence b has row b.
        cache_leftpad: int32 (B,), where in its row a sequence begins; keys before that are ignored.
        block_table: int32 (B, blocks of a sequence): key j of sequence b is row j % rows of block
            block_table[b, j // rows]. A block may have any number of rows.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`. N_k is the length of
            sequence b after k is appended: cache_seqlens[b] + N_new - cache_leftpad[b].
        rotary_interleaved: True rotates dimensions 0 and 1, 2 and 3, ... together, False i and i + rotary_dim / 2.
        num_splits: how many parts the keys are split into, 1 to 128; 0 lets the function choose.
        return_softmax_lse: also return the log-sum-exp.

    The check of lengths and indices that lie on the GPU waits for it. While a CUDA graph is captured, it is left out.
    Then a negative length counts as -1, a longer one as a full cache. A row or block that the cache lacks holds no key
    and takes none, and a leftpad is cut to 0 ... length.

    Returns:
        out (B, N_q, H, D); with `return_softmax_lse` a tuple (out, lse (B, H, N_q) float32).

    Raises:
        ValueError: shapes do not fit together, the cache has no room for k, an index points outside of it, or q, k, v
            and the caches share memory although k and v are appended.
        TypeError: the kernels or the GPU do not support a type or dtype.
        NotImplementedError: alibi_slopes or softmax_scale require a gradient, or a tensor has a tangent (forward-mode
            differentiation).
        RuntimeError: the GPU is too old or too small, block_table has too few columns for a sequence, or a backward is
            asked for.
    """
    q, k, v = _cast(q, k, v)
    if (
        type(cache_seqlens) is type(num_splits) is int
        and type(window_size) is tuple
        and k is v is rotary_cos is rotary_sin is None
        and cache_batch_idx is cache_leftpad is block_table is alibi_slopes is None
        and fast_path.applies(q, k_cache, v_cache)
        and (softmax_scale is None or (type(softmax_scale) in _NUMBERS and softmax_scale > 0.0))
        and not _needs_gradient(q, k_cache, v_cache)
        and k_cache.dim() == 4
        and 0 <= cache_seqlens <= k_cache.shape[1]
    ):

        def check() -> Options:
            checks.tensors(q, k_cache, v_cache, cached=True)
            checks.cache(q, k_cache, v_cache, None, None, (None, None), cache_seqlens, num_splits)
            _check_rows(q, k_cache)
            return Options(
                checks.scale(softmax_scale, q.shape[-1]), *checks.window(window_size, causal), checks.cap(softcap)
            )

        asked = (softmax_scale, causal, window_size, softcap)
        known = fast_path.known_decoding(q, k_cache, v_cache, cache_seqlens, num_splits, asked, check)
        out, lse = known.decode(q, k_cache, v_cache, cache_seqlens)
    else:
        out, lse = _append_and_attend(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
            block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits,
        )  # fmt: skip
    if return_softmax_lse is False:
        return out
    return (out, lse) if checks.truth("return_softmax_lse", return_softmax_lse) else out


def _append_and_attend(
    q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
    block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out and lse of `flash_attn_with_kvcache`, if the fast path does not take the call."""
    paged = block_table is not None
    checks.tensors(q, k_cache, v_cache, paged=paged, cached=True)
    checks.cache(q, k_cache, v_cache, k, v, (rotary_cos, rotary_sin), cache_seqlens, num_splits)
    _refuse_tangents(q, k_cache, v_cache, k, v)
    batch = q.shape[0]
    full = k_cache.shape[1]
    if paged:
        block_table = checks.table(block_table, batch, q.device)
        full *= block_table.shape[1]
    seqlen = full if cache_seqlens is None else 0 if isinstance(cache_seqlens, torch.Tensor) else cache_seqlens
    seqlens, batch_idx, leftpad = checks.cache_indices(
        batch, q.device, paged=paged,
        cache_seqlens=cache_seqlens if isinstance(cache_seqlens, torch.Tensor) else None,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
    )  # fmt: skip
    if not paged and batch_idx is None:
        _check_rows(q, k_cache)
    direct = (
        fast_path.applies(q, k_cache, v_cache)
        and (k is None or not (k.is_neg() or v.is_neg()))  # the dispatcher resolves a pending minus sign
        and not _needs_gradient(q, k_cache, v_cache, k, v)
    )
    run = operators.undispatched_with_cache if direct else _undifferentiable(operators.flash_attention_with_cache)
    if direct and k is not None:
        # An operator does this for tensors that it writes to: a backward that needs the old values then raises.
        torch.autograd.graph.increment_version([t for t in (k_cache, v_cache) if not t.is_inference()])
    rotary_cos, rotary_sin = (None if t is None else t.contiguous() for t in (rotary_cos, rotary_sin))
    return run(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin,
        seqlens, int(seqlen), batch_idx, leftpad, block_table,
        checks.scale(softmax_scale, q.shape[-1]), *checks.window(window_size, causal), checks.cap(softcap),
        checks.truth("rotary_interleaved", rotary_interleaved),
        checks.slopes(alibi_slopes, batch, q.shape[-2], q.device), int(num_splits),
    )  # fmt: skip


def _check_rows(q: torch.Tensor, k_cache: torch.Tensor) -> None:
    """Raises if the cache has fewer rows than q has sequences."""
    if len(q) > len(k_cache):
        raise ValueError(
            f"q has batch size {len(q)}, the cache {len(k_cache)} rows: pass a larger cache, or cache_batch_idx."
        )


def _unpack(name: str, packed: torch.Tensor, parts: int, dimensions: int) -> tuple[torch.Tensor, ...]:
    """The tensors that lie side by side in dimension -3 of `packed`, as views."""
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"{name} is a {type(packed).__name__}: pass a torch.Tensor.")
    if packed.dim() != dimensions or packed.shape[-3] != parts:
        heads = "H_kv" if name == "kv" else "H"
        layout = ("(total, " if dimensions == 4 else "(B, N, ") + f"{parts}, {heads}, D)"
        raise ValueError(f"{name} has shape {tuple(packed.shape)}: pass {layout}.")
    return packed.unbind(dim=-3)


def flash_attn_v1_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """Attention by the FlashAttention-1 kernel, for comparison: slower than `flash_attn_func`, forward only.

    Args:
        q, k, v, softmax_scale, causal: as in `flash_attn_func`, D up to 128.

    Returns:
        out (B, N_q, H, D); zeros for a query that sees no key.

    Raises:
        ValueError, TypeError, RuntimeError: as `flash_attn_func`.
        NotImplementedError: a tensor requires a gradient, or has a tangent (forward-mode differentiation).
    """
    q, k, v = _cast(q, k, v)
    checks.tensors(q, k, v, largest=128)
    softmax_scale = checks.scale(softmax_scale, q.shape[-1])
    _refuse_tangents(q, k, v)
    if _needs_gradient(q, k, v):
        raise NotImplementedError(
            "flash_attn_v1_func has no backward pass: call it under torch.no_grad(), or use flash_attn_func."
        )
    direct = fast_path.applies(q, k, v)
    run = operators.undispatched_v1 if direct else _undifferentiable(operators.flash_attention_v1)
    return run(q, k, v, softmax_scale, checks.truth("causal", causal))

"""The kernels as PyTorch operators, for torch.compile, torch.vmap and FLOP counters, and formulas that count FLOPs.

`torch.ops.labutils.flash_attention` and `flash_attention_backward` take tensors that `attention.interface` has checked,
then the fields of `options.Options`. `flash_attention_with_cache` writes to a cache and attends to it.
`flash_attention_v1` is the kernel of the first paper. The operators have no derivative of their own:
`interface._FlashAttention` joins forward and backward. The functions whose names begin with `undispatched` are those
under the operators, for calls that need no dispatcher.

Some checks read values from the GPU: lengths of sequences, places in a cache. They are made here and not in the
interface, because a compiler traces the interface, but never what an operator does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from labutils.attention import checks
from labutils.attention.kernels import flash_decode, flash_v1, flash_v2, flash_v2_backward, kv_append
from labutils.attention.kernels.options import Cache, Options


def _with_positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float, int]:
    """(q, softmax_scale, factor) with a positive scale, as the kernels need it, and q multiplied by the factor.

    The factor is 1, -1 for a negative scale, or 0. The gradient by q is to be multiplied by it.
    """
    if softmax_scale > 0:
        return q, softmax_scale, 1
    return (-q, -softmax_scale, -1) if softmax_scale < 0 else (q * 0, 1.0, 0)


def undispatched_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out and lse, as `flash_v2.forward` returns them. The scale may have either sign, or be 0.

    Raises:
        ValueError: one of cu_seqlens_q and cu_seqlens_k is missing, a block table comes without them, or a length or a
            block does not exist.
        RuntimeError: as `flash_v2.forward`, or the block table has no column for a key.
    """
    q, softmax_scale, _ = _with_positive_scale(q, softmax_scale)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        if cu_seqlens_q is not None:
            raise ValueError("cu_seqlens_q came without cu_seqlens_k: pass both for packed sequences.")
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k came without cu_seqlens_q: pass both for packed sequences.")
        if block_table is not None:
            raise ValueError("block_table came without cu_seqlens_q and cu_seqlens_k: pass both with it.")
    else:
        checks.packed_values("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, q.shape[0])
        checks.packed_values("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, k.shape[0] if block_table is None else None)
        if block_table is not None:
            checks.table_values(block_table, cu_seqlens_k.diff(), k.shape[0], k.shape[1])
    options = Options(
        softmax_scale, window_left, window_right, softcap, alibi_slopes, dropout_p, seed,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table,
    )  # fmt: skip
    out, lse, _ = flash_v2.launch_forward(q, k, v, options)
    return out, lse


flash_attention = torch.library.custom_op("labutils::flash_attention", undispatched_forward, mutates_args=())


@flash_attention.register_fake
def _(q, k, v, *rest):
    cu_seqlens_q = rest[7]
    shape = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("labutils::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, as `flash_v2_backward.backward` returns them.

    Raises:
        NotImplementedError: k and v are in pages.
        RuntimeError: as `flash_v2_backward.backward`.
    """
    if k.dim() != q.dim():
        raise NotImplementedError(
            "there is no backward through a paged cache (block_table): call under torch.no_grad(), or gather the "
            "blocks into packed k and v."
        )
    q, softmax_scale, factor = _with_positive_scale(q, softmax_scale)
    options = Options(
        softmax_scale, window_left, window_right, softcap, alibi_slopes, dropout_p, seed,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    (dq, dk, dv), _, _ = flash_v2_backward.launch_backward(dout, q, k, v, out, lse, options, dlse=dlse)
    return dq if factor == 1 else dq * factor, dk, dv


@flash_attention_backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def undispatched_with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
    seqlen: int,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Writes k and v to the cache, and returns out and lse as `flash_decode.decode` does.

    `seqlen` is the length of every sequence if `cache_seqlens` is None.

    Raises:
        ValueError: the cache does not have a length, row or block, or the caches share memory with one another, with q
            or with what is written to them. Nothing is written then.
        RuntimeError: as `flash_decode.decode`, or the block table has no column for a key.
    """
    q, softmax_scale, _ = _with_positive_scale(q, softmax_scale)
    n_new = 0 if k is None else k.shape[1]
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    one_position = window_left is None and window_right is None
    checks.cache_values(
        cache_seqlens, seqlen, n_new, capacity, q.shape[0], cache_batch_idx, cache_leftpad, k_cache.shape[0],
        None if rotary_cos is None else rotary_cos.shape[0], 1 if one_position else q.shape[1], block_table, page,
    )  # fmt: skip
    if k is not None and v is not None:
        checks.separate_memory(q, k_cache, v_cache, k, v)
    if cache_seqlens is not None:
        seqlen = capacity - n_new  # the most that fits: reading the true lengths would wait for the GPU
    cache = Cache(cache_seqlens, seqlen, cache_batch_idx, cache_leftpad, block_table)
    if k is not None and v is not None:
        kv_append.append(k, k_cache, cache, rotary_cos, rotary_sin, rotary_interleaved)
        kv_append.append(v, v_cache, cache)
    if rotary_cos is not None:
        q = kv_append.rotate(q, cache, rotary_cos, rotary_sin, rotary_interleaved, one_position=one_position)
    options = Options(softmax_scale, window_left, window_right, softcap, alibi_slopes)
    return flash_decode.decode(q, k_cache, v_cache, cache, options, n_new=n_new, splits=num_splits)


flash_attention_with_cache = torch.library.custom_op(
    "labutils::flash_attention_with_cache", undispatched_with_cache, mutates_args=("k_cache", "v_cache")
)


@flash_attention_with_cache.register_fake
def _(q, *rest):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def undispatched_v1(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """out, as `flash_v1.forward` returns it. The scale may have either sign, or be 0.

    Raises:
        RuntimeError: as `flash_v1.forward`.
    """
    q, softmax_scale, _ = _with_positive_scale(q, softmax_scale)
    return flash_v1.forward(q, k, v, softmax_scale, causal)[0]


flash_attention_v1 = torch.library.custom_op("labutils::flash_attention_v1", undispatched_v1, mutates_args=())


@flash_attention_v1.register_fake
def _(q, *rest):
    return q.new_empty(q.shape)


# ----------------------------------------------------------------------------------------------------------------------
# torch.vmap: the vmapped dimension becomes part of the batch
# ----------------------------------------------------------------------------------------------------------------------


def _folded(operator: Callable, info: Any, in_dims: tuple, arguments: tuple) -> tuple[tuple[Tensor, ...], tuple]:
    """Calls the operator once, with the vmapped dimension folded into the batch: (n, B, ...) -> (n B, ...).

    A tensor without the dimension is repeated. All tensors among the arguments must begin with B.
    """

    def fold(t: Any, dim: int | None) -> Any:
        if not isinstance(t, Tensor):
            return t
        whole = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        return whole.flatten(0, 1)

    results = operator(*map(fold, arguments, in_dims))
    results = (results,) if isinstance(results, Tensor) else results
    first, dim = arguments[0], in_dims[0]
    batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]
    apart = tuple(t.unflatten(0, (info.batch_size, batch)) for t in results)
    return apart, (0,) * len(apart)


def _one_by_one(operator: Callable, info: Any, in_dims: tuple, arguments: tuple) -> tuple[tuple[Tensor, ...], tuple]:
    """Calls the operator for one entry of the vmapped dimension after the other."""
    if info.batch_size == 0:
        raise ValueError(f"{operator} cannot be vmapped over a dimension without entries: leave the call out.")
    calls = [
        operator(*(t if dim is None else t.select(dim, i) for t, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    results = tuple(map(torch.stack, zip(*calls, strict=True)))
    return results, (0,) * len(results)


def _vmap(operator: Callable, tensors: int) -> Callable:
    """The vmap rule of an operator whose first arguments, so many, are tensors that begin with the batch dimension."""

    def rule(info, in_dims, *arguments):
        # Borders of packed sequences, slopes and a seed do not begin with the batch. Dropout numbers the sequences of a
        # batch, and forward and backward may be folded differently.
        others = any(isinstance(argument, Tensor) for argument in arguments[tensors:])
        return (_one_by_one if others else _folded)(operator, info, in_dims, arguments)

    return rule


flash_attention.register_vmap(_vmap(flash_attention, 3))
flash_attention_backward.register_vmap(_vmap(flash_attention_backward, 7))


@flash_attention_v1.register_vmap
def _(info, in_dims, *arguments):
    (out,), _ = _folded(flash_attention_v1, info, in_dims, arguments)
    return out, 0


@flash_attention_with_cache.register_vmap
def _(info, in_dims, *arguments):
    appended = arguments[3] is not None
    if appended and None in in_dims[1:3]:
        raise ValueError(
            "k and v are appended under torch.vmap to a cache that all entries share: vmap over k_cache and v_cache, "
            "too, for example with a copy for each entry."
        )
    return _one_by_one(flash_attention_with_cache, info, in_dims, arguments)


# ----------------------------------------------------------------------------------------------------------------------
# FLOPs
# ----------------------------------------------------------------------------------------------------------------------


def visible_pairs(n_q: int, n_k: int, window_left: int | None = None, window_right: int | None = None) -> int:
    """How many pairs of a query and a key a mask leaves visible.

    The mask is aligned to the bottom right; a bound of None means no bound.
    """

    def triangle(n: int) -> int:
        return n * (n + 1) // 2 if n > 0 else 0

    def cut_off(first: int) -> int:  # Σ over the queries i of first + i, clamped to 0 ... n_k
        ramp = triangle(n_q - 1 + first) - triangle(first - 1)
        beyond = triangle(n_q - 1 + first - n_k) - triangle(first - n_k - 1)
        return ramp - beyond

    offset = n_k - n_q
    up_to = n_q * n_k if window_right is None else cut_off(offset + window_right + 1)
    before = 0 if window_left is None else cut_off(offset - window_left)
    return up_to - before


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """The lengths of packed sequences. While a graph is traced they have no values: each then counts as `longest`."""
    if isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        return [longest] * (len(cu_seqlens) - 1)
    return cu_seqlens.diff().tolist()


def _forward_flops(q, k, window_left, window_right, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> int:
    """4 D FLOPs for each visible pair and head: two products of 2 D each. Masked pairs do not count."""
    heads, head_dim = q.shape[-2:]
    if cu_seqlens_q is None:
        pairs = q.shape[0] * visible_pairs(q.shape[1], k.shape[1], window_left, window_right)
    else:
        lengths = zip(_lengths(cu_seqlens_q, max_seqlen_q), _lengths(cu_seqlens_k, max_seqlen_k), strict=True)
        pairs = sum(visible_pairs(n_q, n_k, window_left, window_right) for n_q, n_k in lengths)
    return 4 * heads * head_dim * pairs


@register_flop_formula(torch.ops.labutils.flash_attention, get_raw=True)
def _(
    q, k, v, scale, left, right, softcap, slopes, dropout_p, seed, cu_q, cu_k, max_q, max_k, table, *, out_val=None
) -> int:
    return _forward_flops(q, k, left, right, cu_q, cu_k, max_q, max_k)


@register_flop_formula(torch.ops.labutils.flash_attention_backward, get_raw=True)
def _(
    dout, dlse, q, k, v, out, lse, scale, left, right, softcap, slopes, dropout_p, seed, cu_q, cu_k, max_q, max_k,
    *, out_val=None,
) -> int:  # fmt: skip
    """Five products; the forward has two. Our kernels compute two of the five twice, which does not count."""
    return _forward_flops(q, k, left, right, cu_q, cu_k, max_q, max_k) * 5 // 2


@register_flop_formula(torch.ops.labutils.flash_attention_with_cache, get_raw=True)
def _(q, k_cache, v_cache, k, v, cos, sin, seqlens, seqlen, batch_idx, leftpad, table, scale, left, right, *rest, **_):
    """Lengths on the GPU are not read, since that would wait for it: the cache then counts as full."""
    n_new = 0 if k is None else k.shape[1]
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    n_k = capacity if seqlens is not None else seqlen + n_new
    batch, n_q, heads, head_dim = q.shape
    return 4 * batch * heads * head_dim * visible_pairs(n_q, n_k, left, right)


@register_flop_formula(torch.ops.labutils.flash_attention_v1, get_raw=True)
def _(q, k, v, scale, causal, *, out_val=None) -> int:
    return _forward_flops(q, k, None, 0 if causal else None, None, None, 0, 0)

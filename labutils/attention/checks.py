"""Checks of the arguments of `attention.interface`, with the messages that a user reads if one is wrong.

A check raises ValueError for a value or shape, TypeError for a type or dtype, and NotImplementedError for something
that our kernels cannot do. Its message names the argument, says what was found and what to do. A check may return its
argument in the form that the kernels take.

The checks whose names end in `_values` read tensors, and so wait for the GPU. The operators call them, not the
interface: nothing that a compiler traces may depend on values. While a CUDA graph is captured nothing can wait for the
GPU, so these checks do nothing. The kernels themselves then keep inside of every tensor, whatever the values are.
"""

from __future__ import annotations

import functools
import numbers
import types

import numpy as np
import torch

from labutils.machine import chips, runtime

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
LARGEST_SPLITS = 128
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # kernels take float32
_BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


def tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    packed: bool = False,
    paged: bool = False,
    cached: bool = False,
    largest: int = LARGEST_HEAD_DIM,
) -> None:
    """Checks that q, k and v fit together, and that the kernels and this GPU support their dtype.

    Args:
        q, k, v: (B, N, H, D), unless the next arguments say otherwise.
        packed: sequences lie one after the other, (total, H, D).
        paged: k and v are in pages, (blocks, rows of a block, H, D).
        cached: k and v are k_cache and v_cache, which may have another batch size than q.
        largest: the largest head dimension.
    """
    batched, flat, pages = "(B, N, H, D)", "(total, H, D)", "(blocks, rows of a block, H, D)"
    layout_q = flat if packed else batched
    layout_k = pages if paged else layout_q
    k_name, v_name = ("k_cache", "v_cache") if cached else ("k", "v")
    for name, t, layout in (("q", q, layout_q), (k_name, k, layout_k), (v_name, v, layout_k)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}: pass a torch.Tensor of shape {layout}.")
        dimensions = layout.count(",") + 1
        if t.dim() != dimensions:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}: pass {dimensions} dimensions, {layout}"
                + (
                    ": batch, sequence, heads, head dimension."
                    if layout == batched
                    else ", all sequences one after the other."
                    if layout == flat
                    else ", as a block_table asks for."
                )
            )
    both = f"{k_name} and {v_name}"
    if k.shape != v.shape:
        raise ValueError(
            f"{k_name} has shape {tuple(k.shape)} and {v_name} {tuple(v.shape)}: both must be {layout_k}, of one shape."
        )
    if paged and k.shape[1] == 0:
        raise ValueError(f"{both} have shape {tuple(k.shape)}, blocks of 0 rows: pass blocks with a row or more.")
    if layout_k == batched and q.shape[0] != k.shape[0] and not cached:
        raise ValueError(f"q has batch size {q.shape[0]}, {both} have {k.shape[0]}: they must agree.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head dimension {q.shape[-1]}, {both} have {k.shape[-1]}: they must agree.")
    if q.shape[-2] == 0 or k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(
            f"q has {q.shape[-2]} heads, {both} have {k.shape[-2]}: their number must divide that of q. "
            f"Pass {layout_q}; if yours are (B, H, N, D), as scaled_dot_product_attention takes them, transpose(1, 2)."
        )
    if not 1 <= q.shape[-1] <= largest:
        raise ValueError(
            f"q has head dimension {q.shape[-1]}: the kernels support 1 to {largest}. Split the heads, or use "
            "torch.nn.functional.scaled_dot_product_attention."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, {both} have dtypes {q.dtype}, {k.dtype}, {v.dtype}: convert them to one dtype.")
    if q.dtype not in DTYPES:
        raise TypeError(
            f"q, {both}: dtype {q.dtype} is not supported, use torch.float16, torch.bfloat16 or torch.float32."
        )
    _device(q, k, v, k_name, v_name)


def _device(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_name: str, v_name: str) -> None:
    """Checks that the tensors are on one device, that the kernels run there, and that it supports bfloat16 if asked."""
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q is on {q.device}, {k_name} on {k.device}, {v_name} on {v.device}: move them to one device."
        )
    if q.device.type == "meta":
        return  # no kernel runs: the operators only tell the shapes of their results
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
    if q.dtype == torch.bfloat16 and q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        if capability < chips.BFLOAT16:
            raise TypeError(
                f"{torch.cuda.get_device_name(q.device)} has no bfloat16 arithmetic (compute capability "
                f"{chips.dotted(capability)}, below {chips.dotted(chips.BFLOAT16)}): use torch.float16."
            )


def _number(name: str, value: float) -> None:
    """Checks for a Python number: reading a tensor would wait for the GPU, and no gradient would reach it."""
    if not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} is a {type(value).__name__}: pass a Python number.")


def truth(name: str, value: bool) -> bool:
    """A truth value as a bool. A text such as "no" would count as true, and reading a tensor would wait for the GPU."""
    if not isinstance(value, (numbers.Integral, np.bool_, torch.SymBool, torch.SymInt, type(None))):
        raise TypeError(f"{name} is a {type(value).__name__}: pass True or False.")
    return bool(value)


def scale(softmax_scale: float | torch.Tensor | None, head_dim: int) -> float:
    """The factor on the scores: D ** -0.5 if `softmax_scale` is None. A tensor without dimensions is read."""
    if softmax_scale is None:
        return head_dim**-0.5
    if isinstance(softmax_scale, torch.Tensor):
        if softmax_scale.dim() > 0 or softmax_scale.is_complex():
            raise TypeError(
                f"softmax_scale is a {softmax_scale.dtype} tensor of shape {tuple(softmax_scale.shape)}: pass a real "
                "number, or a tensor without dimensions that holds one."
            )
        if softmax_scale.requires_grad:
            raise NotImplementedError(
                "softmax_scale requires a gradient, which the kernels do not compute: detach() it, or multiply q by it."
            )
        softmax_scale = softmax_scale.item()
    _number("softmax_scale", softmax_scale)
    if softmax_scale != 0 and not _SMALLEST <= abs(softmax_scale) <= _LARGEST:
        raise ValueError(
            f"softmax_scale={softmax_scale}: pass a finite number in float32's range, or None for D ** -0.5."
        )
    return float(softmax_scale)


def window(window_size: tuple[int, int], causal: bool) -> tuple[int | None, int | None]:
    """(left, right) as the kernels take them: None means no bound, and `causal` sets the right bound to 0.

    As in flash-attn any negative number means no bound.
    """
    try:
        left, right = (int(side) for side in window_size)
        # A tensor among them may change its value later, and the fast path would not see it.
        whole = [left, right] == list(window_size) and not any(isinstance(s, torch.Tensor) for s in window_size)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"window_size={window_size!r}: pass two integers (left, right), -1 for no bound.")
    if truth("causal", causal):
        right = 0
    return _bound(left), _bound(right)


def _bound(side: int) -> int | None:
    # Kernels add a bound to a position in 32 bits. A bound longer than any sequence would overflow; it means no bound.
    return None if side < 0 or side >= 2**30 else side


def cap(softcap: float) -> float | None:
    """softcap as the kernels take it: None if it is 0, which turns it off."""
    _number("softcap", softcap)
    if softcap != 0 and not _SMALLEST <= softcap <= _LARGEST:
        raise ValueError(
            f"softcap={softcap}: pass a positive, finite number in float32's range, or 0.0 to turn it off."
        )
    return float(softcap) or None


def dropout(dropout_p: float) -> float:
    """dropout_p as a float. It must be in [0, 1), also after rounding to float32."""
    if isinstance(dropout_p, torch.Tensor):  # where scaled_dot_product_attention has its mask
        raise TypeError(
            f"dropout_p, the fourth argument, is a tensor of shape {tuple(dropout_p.shape)}: pass a Python number. The "
            "functions take no mask: use causal, window_size or alibi_slopes, flash_attn_varlen_func for padding, or "
            "torch.nn.functional.scaled_dot_product_attention for any other mask."
        )
    _number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= _BELOW_ONE:
        raise ValueError(f"dropout_p={dropout_p}: pass a probability in [0, 1); 1 would drop everything.")
    return float(dropout_p)


def slopes(alibi_slopes: torch.Tensor | None, batch: int, heads: int, device: torch.device) -> torch.Tensor | None:
    """ALiBi's slopes, contiguous: float32 (H,) or (B, H) on the device of q."""
    if alibi_slopes is None:
        return None
    if not isinstance(alibi_slopes, torch.Tensor) or alibi_slopes.dtype != torch.float32:
        kind = alibi_slopes.dtype if isinstance(alibi_slopes, torch.Tensor) else type(alibi_slopes).__name__
        raise TypeError(f"alibi_slopes is {kind}: pass a float32 tensor (H,) or (B, H).")
    if alibi_slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes has shape {tuple(alibi_slopes.shape)}: pass ({heads},), one slope for each head, or "
            f"({batch}, {heads}), one for each sequence and head."
        )
    if alibi_slopes.device != device:
        raise ValueError(f"alibi_slopes is on {alibi_slopes.device}, q on {device}: move it to the device of q.")
    if alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes requires a gradient, but the kernels compute none: detach() it.")
    return alibi_slopes.contiguous()


def _integers(name: str, t: torch.Tensor, shape: str, device: torch.device, *, dimensions: int = 1) -> torch.Tensor:
    """`t`, contiguous: an int32 tensor with `dimensions` on the device of q. Messages write its shape as `shape`."""
    if not isinstance(t, torch.Tensor) or t.dtype != torch.int32:
        kind = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
        raise TypeError(f"{name} is {kind}: pass an int32 tensor {shape}.")
    if t.dim() != dimensions:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: pass {shape}.")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, q on {device}: move it to the device of q.")
    return t.contiguous()


def sequences(
    name: str, cu_seqlens: torch.Tensor, max_seqlen: int | torch.Tensor, batch: int | None, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Where packed sequences begin, int32 (B + 1,), and their greatest length. `packed_values` checks the values."""
    cu_seqlens = _integers(name, cu_seqlens, "(B + 1,), the cumulated lengths, beginning with 0", device)
    if len(cu_seqlens) < 1:
        raise ValueError(f"{name} is empty: pass (B + 1,), the cumulated lengths, beginning with 0.")
    if batch is not None and len(cu_seqlens) != batch + 1:
        raise ValueError(
            f"cu_seqlens_q speaks of {batch} sequences and {name} of {len(cu_seqlens) - 1}: they must agree."
        )
    return cu_seqlens, _length("max_seqlen" + name.removeprefix("cu_seqlens"), max_seqlen)


def _length(name: str, value: int | torch.Tensor) -> int:
    """A length as an int. A tensor without dimensions is read, as flash-attn reads it."""
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not (value.is_floating_point() or value.is_complex()):
        value = value.item()
    if not isinstance(value, (numbers.Integral, torch.SymInt)):
        found = f"={value!r}"
        if isinstance(value, torch.Tensor):
            found = f" is a {value.dtype} tensor of shape {tuple(value.shape)}"
        raise TypeError(f"{name}{found}: pass a Python integer, or an integer tensor without dimensions.")
    # A compiler may not know whether the value is negative. `packed_values` compares it with the lengths.
    if not torch.compiler.is_compiling() and value < 0:
        raise ValueError(f"{name}={value}: pass the length of the longest sequence, 0 or more.")
    if not torch.compiler.is_compiling():
        _countable(name, int(value))
    return int(value)


def _countable(name: str, length: int) -> None:
    """Checks that a length is below 2**31, since kernels count rows in 32 bits."""
    if length >= 2**31:
        raise ValueError(f"{name}={length}: pass the length of the longest sequence, which must be below 2**31.")


def _capturing(t: torch.Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def packed_values(name: str, cu_seqlens: torch.Tensor, max_seqlen: int, total: int | None) -> None:
    """Checks that cu_seqlens rises from 0 to at most `total` in steps of at most `max_seqlen`.

    A paged cache has no total: it is None.
    """
    which = name.removeprefix("cu_seqlens")
    _countable(f"max_seqlen{which}", max_seqlen)
    if _capturing(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    lengths = [after - before for before, after in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"{name} begins {bounds[:6]}: it must begin with 0 and never decrease.")
    if total is not None and bounds[-1] > total:
        raise ValueError(
            f"{name} ends with {bounds[-1]}, but the packed tensor has only {total} rows: pass {total} or less as the "
            "last entry."
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"max_seqlen{which}={max_seqlen}, but the longest sequence of {name} has {max(lengths)} rows: pass "
            f"max_seqlen{which}={max(lengths)}."
        )


def table(block_table: torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """Which blocks of a paged cache each sequence has: int32 (B, blocks of a sequence)."""
    block_table = _integers("block_table", block_table, "(B, blocks of a sequence)", device, dimensions=2)
    if len(block_table) != batch:
        raise ValueError(f"block_table has {len(block_table)} rows for {batch} sequences: pass one row for each.")
    return block_table


def table_values(block_table: torch.Tensor, lengths: torch.Tensor, blocks: int, page: int, n_new: int = 0) -> None:
    """Checks that the block table has a block for every key, and that these blocks exist.

    Args:
        block_table: int32 (B, blocks of a sequence).
        lengths: int (B,), the keys of each sequence; 0 for an entry that is padding, to which nothing is written.
        blocks: blocks in the cache. page: rows of a block.
        n_new: how many keys at the end of each sequence are written. No other sequence may see their rows.
    """
    if _capturing(block_table):
        return
    table, lengths = block_table.tolist(), lengths.tolist()
    for b, (row, length) in enumerate(zip(table, lengths, strict=True)):
        needed = -(-length // page) if length else 0
        if needed > len(row):
            raise RuntimeError(  # as in flash-attn, whose users catch it
                f"block_table has {len(row)} blocks of {page} rows a sequence, but sequence {b} has {length} keys: it "
                f"needs {needed}. Give the table more columns."
            )
        if any(not 0 <= block < blocks for block in row[:needed]):
            raise ValueError(
                f"block_table[{b}] begins {row[:needed][:6]}: pass blocks of the cache, from 0 to {blocks - 1}."
            )
    if n_new:
        _check_no_shared_writes(table, lengths, page, n_new)


def _check_no_shared_writes(table: list[list[int]], lengths: list[int], page: int, n_new: int) -> None:
    """Raises if a row that is written is seen by another sequence, too, or in another place of the same sequence."""
    # For each block: the first row that is written, and which (sequence, place in its table) writes it.
    first_written: dict[int, tuple[int, tuple[int, int]]] = {}
    for b, (row, length) in enumerate(zip(table, lengths, strict=True)):
        if length == 0:  # padding
            continue
        for place in range((length - n_new) // page, -(-length // page)):
            written = max(length - n_new - place * page, 0), (b, place)
            first_written[row[place]] = min(first_written.get(row[place], written), written)
    for b, (row, length) in enumerate(zip(table, lengths, strict=True)):
        needed = row[: -(-length // page)]
        for block in first_written.keys() & set(needed):
            start, owner = first_written[block]
            for place, other in enumerate(needed):
                if other == block and (b, place) != owner and start < length - place * page:
                    raise ValueError(
                        f"block_table[{owner[0]}] has block {block}, to which k is appended from row {start} on, and "
                        f"block_table[{b}] sees these rows as well: give each sequence a block of its own to append to."
                    )


def cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    rotary: tuple[torch.Tensor | None, torch.Tensor | None],
    cache_seqlens: int | torch.Tensor | None,
    num_splits: int,
) -> None:
    """Checks new keys and values, rotary tables, the type of the lengths, and splits; indices are checked elsewhere."""
    if (k is None) != (v is None):
        raise ValueError("k and v are appended together, but one of them is None: pass both or neither.")
    if k is not None:
        tensors(q, k, v)
        if k.shape[2] != k_cache.shape[2]:
            raise ValueError(f"k and v have {k.shape[2]} heads, the cache has {k_cache.shape[2]}: they must agree.")
        for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
            if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
                raise ValueError(
                    f"{name} is expanded: several of its elements share their memory, and k and v would be written "
                    "there. clone() it."
                )
        if k_cache is v_cache:
            raise ValueError("k_cache and v_cache are one tensor, and k and v would both be written to it: pass two.")
        if cache_seqlens is None:
            raise ValueError(
                "cache_seqlens is None with k and v given: pass how many keys each sequence has in the cache, an "
                "integer or int32 (B,), so that the new keys go behind them."
            )
    if isinstance(cache_seqlens, bool) or not isinstance(
        cache_seqlens, (numbers.Integral, torch.SymInt, torch.Tensor, type(None))
    ):
        raise TypeError(
            f"cache_seqlens is a {type(cache_seqlens).__name__}: pass an integer, an int32 tensor (B,) or None."
        )
    cos, sin = rotary
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin belong together, but one is None: pass both or neither.")
    if cos is not None:
        if k is None:
            raise ValueError("rotary_cos is given without k: rotate q yourself, or pass k and v as well.")
        for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
            if not isinstance(t, torch.Tensor) or not t.is_floating_point():
                kind = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
                raise TypeError(f"{name} is {kind}: pass a floating-point tensor (positions, rotary_dim / 2).")
            if t.dim() != 2 or t.shape != cos.shape or not 1 <= 2 * t.shape[1] <= q.shape[-1]:
                raise ValueError(
                    f"{name} has shape {tuple(t.shape)}: pass (positions, rotary_dim / 2), the same for both, with "
                    f"rotary_dim from 2 to the head dimension {q.shape[-1]}."
                )
            if t.device != q.device:
                raise ValueError(f"{name} is on {t.device}, q on {q.device}: move it to the device of q.")
    if (
        isinstance(num_splits, bool)
        or not isinstance(num_splits, numbers.Integral)
        or not 0 <= num_splits <= LARGEST_SPLITS
    ):
        raise ValueError(
            f"num_splits={num_splits!r}: pass an integer from 1 to {LARGEST_SPLITS}, or 0 to let the function choose."
        )


def cache_indices(
    batch: int, device: torch.device, *, paged: bool, **indices: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """cache_seqlens, cache_batch_idx and cache_leftpad, contiguous: each int32 (B,), or None."""
    checked = []
    for name, t in indices.items():
        if t is not None:
            if paged and name != "cache_seqlens":
                raise ValueError(f"{name} has no meaning for a paged cache: leave it out, block_table has the rows.")
            t = _integers(name, t, "(B,), one entry for each sequence", device)
            if len(t) != batch:
                raise ValueError(f"{name} has {len(t)} entries for {batch} sequences: pass one for each.")
        checked.append(t)
    return checked


def separate_memory(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Checks that what is written to a cache changes no other tensor of the call, and no other row of the cache."""
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not t.is_contiguous() and _overlaps_itself(tuple(t.shape), t.stride()):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)} and strides {t.stride()}: several of its elements share their "
                "memory, and k and v would be written there. clone() it."
            )
    k_span, v_span = _span(k_cache), _span(v_cache)
    if _share(k_cache, k_span, v_cache, v_span):
        raise ValueError(
            "k_cache and v_cache share memory, and k and v would both be written to it: pass two tensors, or views of "
            "one that do not overlap."
        )
    for name, t in (("q", q), ("k", k), ("v", v)):
        span = _span(t)
        for cache_name, into, into_span in (("k_cache", k_cache, k_span), ("v_cache", v_cache, v_span)):
            if _share(t, span, into, into_span):
                raise ValueError(
                    f"{name} shares memory with {cache_name}, to which k and v are appended: clone() {name} first."
                )


def _span(t: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the byte behind its last one."""
    start = t.data_ptr()
    if t.is_contiguous() or t.numel() == 0:
        return start, start + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()


def _share(a: torch.Tensor, span_a: tuple[int, int], b: torch.Tensor, span_b: tuple[int, int]) -> bool:
    """Whether an element of one tensor lies where an element of the other does. Views may interlace without that."""
    if span_a[1] <= span_b[0] or span_b[1] <= span_a[0]:
        return False
    layouts = (tuple(a.shape), a.stride(), a.element_size()), (tuple(b.shape), b.stride(), b.element_size())
    return _layouts_meet(*layouts, span_b[0] - span_a[0])


_Layout = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, bytes of an element


@functools.lru_cache(1024)  # the layers of a model have one layout
def _layouts_meet(a: _Layout, b: _Layout, distance: int) -> bool:
    """Whether two layouts have a byte in common, if the second begins `distance` bytes behind the first."""

    def array(layout: _Layout, address: int) -> np.ndarray:
        """An array that nobody may read: nothing of it but its addresses is used."""
        shape, strides, width = layout
        strides = tuple(stride * width for stride in strides)
        memory = {"version": 3, "typestr": f"|V{width}", "data": (address, True), "shape": shape, "strides": strides}
        return np.asarray(types.SimpleNamespace(__array_interface__=memory))

    somewhere = 2**60
    try:
        return np.shares_memory(array(a, somewhere), array(b, somewhere + distance), max_work=10**6)
    except np.exceptions.TooHardError:
        return True  # strides for which nobody can tell


@functools.lru_cache(1024)
def _overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two elements of a tensor lie at one address."""
    if 0 in shape:
        return False
    reached = 0  # the last element that the dimensions with smaller strides reach
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reached:
            break
        reached += (size - 1) * stride
    else:
        return False
    # Such strides are rare, and may interlace without an overlap. Do elements meet that are s apart in dimension d?
    for d, size in enumerate(shape):
        rest = shape[:d] + shape[d + 1 :], strides[:d] + strides[d + 1 :], 1
        if any(_layouts_meet(rest, rest, s * strides[d]) for s in range(1, size)):
            return True
    return False


def cache_values(
    cache_seqlens: torch.Tensor | None,
    seqlen: int,
    n_new: int,
    capacity: int,
    batch: int,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    cache_batch: int,
    positions: int | None,
    rotated_queries: int,
    block_table: torch.Tensor | None,
    page: int,
) -> None:
    """Checks that the cache and the rotary tables are long enough, and that every index lies in the cache.

    An entry of cache_seqlens that is -1 is padding: the other indices of that sequence may be anything.
    """
    known = [t for t in (cache_seqlens, cache_batch_idx, cache_leftpad, block_table) if t is not None]
    captured = any(map(_capturing, known))
    if captured and cache_seqlens is not None:
        return
    lengths = [seqlen] * batch if cache_seqlens is None else cache_seqlens.tolist()
    if min(lengths, default=0) < (0 if cache_seqlens is None else -1):
        raise ValueError(
            f"cache_seqlens={lengths[:6]}: pass lengths of 0 or more. In a tensor -1 marks an entry that is padding."
        )
    longest = max(lengths, default=0)
    if block_table is not None and longest + n_new > capacity:
        raise RuntimeError(  # as in flash-attn, whose users catch it
            f"block_table has {block_table.shape[1]} blocks of {page} rows a sequence, room for {capacity} keys, but "
            f"cache_seqlens holds {longest}"
            + (f" and k appends {n_new}" if n_new else "")
            + ": give block_table more columns, or correct cache_seqlens."
        )
    if longest + n_new > capacity:
        raise ValueError(
            f"the cache has room for {capacity} keys a sequence, but cache_seqlens holds {longest}"
            + (f" and k appends {n_new}" if n_new else "")
            + ": make a larger cache, or correct cache_seqlens."
        )
    if positions is not None and longest + max(n_new, rotated_queries) > positions:
        raise ValueError(
            f"rotary_cos and rotary_sin have {positions} positions, but position "
            f"{longest + max(n_new, rotated_queries) - 1} is needed: make longer tables."
        )
    if captured:
        return
    if cache_batch_idx is not None:
        rows = [row for row, length in zip(cache_batch_idx.tolist(), lengths, strict=True) if length >= 0]
        if any(not 0 <= row < cache_batch for row in rows):
            raise ValueError(f"cache_batch_idx={rows[:6]}: pass rows of the cache, from 0 to {cache_batch - 1}.")
        if n_new and len(set(rows)) < len(rows):
            raise ValueError(
                f"cache_batch_idx={rows[:6]} names a row twice, and k would be appended to it twice: give each "
                "sequence its own row."
            )
    if cache_leftpad is not None:
        for b, (pad, length) in enumerate(zip(cache_leftpad.tolist(), lengths, strict=True)):
            if length >= 0 and not 0 <= pad <= length:
                raise ValueError(
                    f"cache_leftpad[{b}]={pad}, but cache_seqlens[{b}]={length}: pass the row of the first key, from 0 "
                    "to the length of the sequence."
                )
    if block_table is not None:
        needed = torch.tensor([n + n_new if n >= 0 else 0 for n in lengths], device="cpu")
        table_values(block_table, needed, cache_batch, page, n_new)

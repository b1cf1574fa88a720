"""What the functions of `labutils.attention.interface` ask of their arguments, and what they say where it is not met.

Each check raises ValueError (a value or shape), TypeError (a type or dtype) or NotImplementedError (what our kernels
cannot do), with a message that names the argument and what to do.

Those called `..._values` read tensors, and so wait for the GPU. The operators call them, not the interface: nothing
that a compiler traces may depend on values. While a CUDA graph is captured nothing can wait, and they are left out.
"""

from __future__ import annotations

import numbers

import torch

from labutils.machine import chips, runtime

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
LARGEST_SPLITS = 128
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # kernels take float32
_BELOW_ONE = 1 - 2**-24  # what float32 does not round to 1


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
    """q, k and v fit together, and the kernels and this GPU have their dtype.

    `packed`: the sequences of q (and of k and v, where they are not `paged`) lie one after the other. `cached`: k and v
    are k_cache and v_cache, which may have another batch size than q. `largest`: head dimension.
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
            f"{k_name} has shape {tuple(k.shape)} and {v_name} {tuple(v.shape)}: both must be {layout_k}, with the "
            "heads of k and v."
        )
    if paged and k.shape[1] == 0:
        raise ValueError(f"{both} have shape {tuple(k.shape)}, blocks of 0 rows: pass blocks with a row or more.")
    if layout_k == batched and q.shape[0] != k.shape[0] and not cached:
        raise ValueError(f"q has batch size {q.shape[0]}, {both} have {k.shape[0]}: they must agree.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head dimension {q.shape[-1]}, {both} have {k.shape[-1]}: they must agree.")
    if q.shape[-2] == 0 or k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(
            f"q has {q.shape[-2]} heads, {both} have {k.shape[-2]}: the heads of k and v must divide those of q. "
            f"Shapes are {layout_q}; if yours are (B, H, N, D), as in scaled_dot_product_attention, transpose(1, 2)."
        )
    if not 1 <= q.shape[-1] <= largest:
        raise ValueError(
            f"head dimension {q.shape[-1]} is not supported: 1 to {largest} are. Split the heads, or use "
            "torch.nn.functional.scaled_dot_product_attention."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, {both} have dtypes {q.dtype}, {k.dtype}, {v.dtype}: convert them to one.")
    if q.dtype not in DTYPES:
        raise TypeError(f"dtype {q.dtype} is not supported: use torch.float16, torch.bfloat16 or torch.float32.")
    _device(q, k, v, k_name, v_name)


def _device(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_name: str, v_name: str) -> None:
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q is on {q.device}, {k_name} on {k.device}, {v_name} on {v.device}: move them to one device."
        )
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
    """A tensor is none: it would be read, and so waited for, and no gradient would reach it."""
    if not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} is a {type(value).__name__}: pass a Python number.")


def scale(softmax_scale: float | None, head_dim: int) -> float:
    """The factor on the scores: D ** -0.5 for None."""
    if softmax_scale is None:
        return head_dim**-0.5
    _number("softmax_scale", softmax_scale)
    if not _SMALLEST <= softmax_scale <= _LARGEST:
        raise ValueError(
            f"softmax_scale={softmax_scale}: pass a positive, finite number of float32's range, or None for D ** -0.5."
        )
    return float(softmax_scale)


def window(window_size: tuple[int, int], causal: bool) -> tuple[int | None, int | None]:
    """(left, right) as the kernels take it: None for no bound; causal bounds the right by 0."""
    try:
        left, right = (int(side) for side in window_size)
        whole = [left, right] == list(window_size)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"window_size={window_size!r}: pass two integers (left, right), -1 for no bound.")
    if left < -1 or right < -1:
        raise ValueError(f"window_size={window_size}: each side is -1 (no bound), 0 or more.")
    if causal:
        right = 0
    return _bound(left), _bound(right)


def _bound(side: int) -> int | None:
    # Kernels add a bound to a place in 32 bits; one that is longer than any sequence is none.
    return None if side == -1 or side >= 2**30 else side


def cap(softcap: float) -> float | None:
    """softcap as the kernels take it: None for 0, which turns it off."""
    _number("softcap", softcap)
    if softcap != 0 and not _SMALLEST <= softcap <= _LARGEST:
        raise ValueError(
            f"softcap={softcap}: pass a positive, finite number of float32's range, or 0.0 to turn it off."
        )
    return float(softcap) or None


def dropout(dropout_p: float) -> float:
    """A probability in [0, 1), also after rounding to float32."""
    _number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= _BELOW_ONE:
        raise ValueError(f"dropout_p={dropout_p}: pass a probability in [0, 1); 1 would drop everything.")
    return float(dropout_p)


def slopes(alibi_slopes: torch.Tensor | None, batch: int, heads: int, device: torch.device) -> torch.Tensor | None:
    """ALiBi's slopes: float32 (H,) or (B, H) on the device of q."""
    if alibi_slopes is None:
        return None
    if not isinstance(alibi_slopes, torch.Tensor) or alibi_slopes.dtype != torch.float32:
        kind = alibi_slopes.dtype if isinstance(alibi_slopes, torch.Tensor) else type(alibi_slopes).__name__
        raise TypeError(f"alibi_slopes is {kind}: pass a float32 tensor (H,) or (B, H).")
    if alibi_slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes has shape {tuple(alibi_slopes.shape)}: pass ({heads},), one slope a head, or "
            f"({batch}, {heads}), one a sequence and head."
        )
    if alibi_slopes.device != device:
        raise ValueError(f"alibi_slopes is on {alibi_slopes.device}, q on {device}: move it to the device of q.")
    if alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes requires a gradient, and there is none by it: detach() it.")
    return alibi_slopes.contiguous()


def _integers(name: str, t: torch.Tensor, shape: str, device: torch.device, *, dimensions: int = 1) -> torch.Tensor:
    """`t` is an int32 tensor with `dimensions`, written `shape` for people, on the device of q; made contiguous."""
    if not isinstance(t, torch.Tensor) or t.dtype != torch.int32:
        kind = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
        raise TypeError(f"{name} is {kind}: pass an int32 tensor {shape}.")
    if t.dim() != dimensions:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: pass {shape}.")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, q on {device}: move it to the device of q.")
    return t.contiguous()


def sequences(
    name: str, cu_seqlens: torch.Tensor, max_seqlen: int, batch: int | None, device: torch.device
) -> torch.Tensor:
    """Where packed sequences begin: int32 (B + 1,); their values are for `packed_values`."""
    which = name.removeprefix("cu_seqlens")
    cu_seqlens = _integers(name, cu_seqlens, "(B + 1,), the cumulated lengths, beginning with 0", device)
    if len(cu_seqlens) < 1:
        raise ValueError(f"{name} is empty: pass (B + 1,), the cumulated lengths, beginning with 0.")
    if batch is not None and len(cu_seqlens) != batch + 1:
        raise ValueError(
            f"cu_seqlens_q speaks of {batch} sequences and {name} of {len(cu_seqlens) - 1}: they must agree."
        )
    whole = isinstance(max_seqlen, (numbers.Integral, torch.SymInt))
    if not whole or max_seqlen < 0:
        raise TypeError(f"max_seqlen{which}={max_seqlen!r}: pass a Python integer, 0 or more.")
    return cu_seqlens


def _capturing(t: torch.Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def packed_values(name: str, cu_seqlens: torch.Tensor, max_seqlen: int, total: int | None) -> None:
    """From 0 in steps of at most `max_seqlen` up to `total` rows (None: of a paged cache, which has no total)."""
    if _capturing(cu_seqlens):
        return
    which = name.removeprefix("cu_seqlens")
    bounds = cu_seqlens.tolist()
    lengths = [after - before for before, after in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"{name} must begin with 0 and never decrease; it begins {bounds[:6]}.")
    if total is not None and bounds[-1] != total:
        raise ValueError(f"{name} ends with {bounds[-1]}, but the packed tensor has {total} rows: they must agree.")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"max_seqlen{which}={max_seqlen}, but the longest sequence of {name} has {max(lengths)}: pass that."
        )


def table(block_table: torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """Which blocks of a paged cache a sequence has: int32 (B, blocks of a sequence)."""
    block_table = _integers("block_table", block_table, "(B, blocks of a sequence)", device, dimensions=2)
    if len(block_table) != batch:
        raise ValueError(f"block_table has {len(block_table)} rows for {batch} sequences: pass one row each.")
    return block_table


def table_values(block_table: torch.Tensor, lengths: torch.Tensor, blocks: int, page: int, n_new: int = 0) -> None:
    """Each sequence, int (B,) keys long, has the blocks of `page` rows it needs, and they exist.

    The last `n_new` keys of each, which are written, must be its own; those before may be shared.
    """
    if _capturing(block_table):
        return
    table, lengths = block_table.tolist(), lengths.tolist()
    for b, (row, length) in enumerate(zip(table, lengths, strict=True)):
        needed = -(-length // page) if length else 0
        if needed > len(row):
            raise ValueError(
                f"block_table has {len(row)} blocks of {page} rows a sequence, but sequence {b} has {length} keys: it "
                f"needs {needed}. Give the table more columns."
            )
        if any(not 0 <= block < blocks for block in row[:needed]):
            raise ValueError(
                f"block_table[{b}] begins {row[:needed][:6]}, but the cache has the blocks 0 to {blocks - 1} alone."
            )
    if n_new:
        _not_written_for_two(table, lengths, page, n_new)


def _not_written_for_two(table: list[list[int]], lengths: list[int], page: int, n_new: int) -> None:
    """No row of a block that is written to is one that another sequence sees, or the same one in another place."""
    # By block: the first row that is written, and whose it is.
    first_written: dict[int, tuple[int, tuple[int, int]]] = {}
    for b, (row, length) in enumerate(zip(table, lengths, strict=True)):
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
    """The arguments of the cache that are no index: what is appended, the rotary tables, the lengths, the splits."""
    if (k is None) != (v is None):
        raise ValueError("k and v are appended together: pass both or neither.")
    if k is not None:
        tensors(q, k, v)
        if k.shape[2] != k_cache.shape[2]:
            raise ValueError(f"k and v have {k.shape[2]} heads, the cache has {k_cache.shape[2]}: they must agree.")
        for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
            if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
                raise ValueError(
                    f"{name} is expanded, several of its elements share their memory, and k and v would be written to "
                    "it: clone() it."
                )
        if k_cache is v_cache:
            raise ValueError("k_cache and v_cache are one tensor, and k and v would be written to it: pass two.")
        if cache_seqlens is None:
            raise ValueError(
                "cache_seqlens is None with k and v given: pass how many keys each sequence has in the cache, an "
                "integer or int32 (B,), so that the new ones go behind them."
            )
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, torch.Tensor, type(None))):
        raise TypeError(
            f"cache_seqlens is a {type(cache_seqlens).__name__}: pass an integer, an int32 tensor (B,) or None."
        )
    cos, sin = rotary
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin belong together: pass both or neither.")
    if cos is not None:
        if k is None:
            raise ValueError("rotary_cos is given without k: turn q yourself, or pass k and v to be appended as well.")
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
    if isinstance(num_splits, bool) or not isinstance(num_splits, int) or not 0 <= num_splits <= LARGEST_SPLITS:
        raise ValueError(
            f"num_splits={num_splits!r}: pass an integer from 1 to {LARGEST_SPLITS}, or 0 to have it chosen."
        )


def cache_indices(
    batch: int, device: torch.device, *, paged: bool, **indices: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """cache_seqlens, cache_batch_idx, cache_leftpad: int32 (B,), or None."""
    checked = []
    for name, t in indices.items():
        if t is not None:
            if paged and name != "cache_seqlens":
                raise ValueError(f"{name} has no meaning for a paged cache: leave it out, and let block_table say it.")
            t = _integers(name, t, "(B,), one entry a sequence", device)
            if len(t) != batch:
                raise ValueError(f"{name} has {len(t)} entries for {batch} sequences: pass one each.")
        checked.append(t)
    return checked


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
    """The keys that are there and those to be appended have room, and every index is one of the cache."""
    known = [t for t in (cache_seqlens, cache_batch_idx, cache_leftpad, block_table) if t is not None]
    if any(map(_capturing, known)):
        return
    lengths = [seqlen] * batch if cache_seqlens is None else cache_seqlens.tolist()
    if min(lengths, default=0) < 0:
        raise ValueError(f"cache_seqlens={lengths[:6]}: lengths are 0 or more.")
    longest = max(lengths, default=0)
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
    if cache_batch_idx is not None:
        rows = cache_batch_idx.tolist()
        if any(not 0 <= row < cache_batch for row in rows):
            raise ValueError(f"cache_batch_idx={rows[:6]}: the cache has the rows 0 to {cache_batch - 1} alone.")
        if n_new and len(set(rows)) < len(rows):
            raise ValueError(
                f"cache_batch_idx={rows[:6]} names a row twice, and k would be appended to it twice: give each "
                "sequence its own row."
            )
    if cache_leftpad is not None:
        for b, (pad, length) in enumerate(zip(cache_leftpad.tolist(), lengths, strict=True)):
            if not 0 <= pad <= length:
                raise ValueError(
                    f"cache_leftpad[{b}]={pad}, but cache_seqlens[{b}]={length}: the first key of a sequence stands at "
                    "0 or later, and not behind its last."
                )
    if block_table is not None:
        table_values(block_table, torch.tensor(lengths) + n_new, cache_batch, page, n_new)

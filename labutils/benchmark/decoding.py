"""How fast decoding reads its cache."""

from __future__ import annotations

import torch

from labutils.attention import interface
from labutils.attention.backends import Unsupported
from labutils.benchmark.timing import time_replayed
from labutils.machine import runtime


def decode_bandwidth(
    *,
    batch: int,
    seqlen: int,
    heads: int = 64,
    heads_kv: int = 8,
    head_dim: int = 128,
    page: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[float, float]:
    """How fast `flash_attn_with_kvcache` reads a full cache for one token: (microseconds, GB/s of keys and values).

    Decoding reads each key and value once and computes little with them, so that memory is its bound: compare with
    `analysis.measure_ceilings().gb_per_s`.

    Args:
        batch, seqlen, heads, heads_kv, head_dim: B, N_k, H, H_kv, D.
        page: rows of a block of a paged cache, the blocks in random order; None for a cache in one piece.
        dtype: of queries and cache.

    Raises:
        Unsupported: no GPU.
    """
    if runtime.device.type != "cuda":
        raise Unsupported("decoding is timed on a GPU alone: in the interpreter a time means nothing.")
    on_gpu = {"device": runtime.device, "dtype": dtype}
    size = 2 * batch * seqlen * heads_kv * head_dim * dtype.itemsize  # bytes of one cache
    l2 = torch.cuda.get_device_properties(runtime.device).L2_cache_size
    copies = max(2, -(-4 * l2 // size))
    q = torch.randn(batch, 1, heads, head_dim, **on_gpu)
    table = None
    if page is not None:
        blocks = -(-seqlen // page)
        table = torch.randperm(batch * blocks, device=runtime.device).view(batch, blocks).int()
    shape = (batch, seqlen) if page is None else (batch * blocks, page)
    caches = [torch.randn(2, *shape, heads_kv, head_dim, **on_gpu) for _ in range(copies)]
    lengths = torch.full((batch,), seqlen, dtype=torch.int32, device=runtime.device)
    calls = [
        lambda kv=kv: interface.flash_attn_with_kvcache(q, kv[0], kv[1], cache_seqlens=lengths, block_table=table)
        for kv in caches
    ]
    microseconds = time_replayed(calls)
    return microseconds, size / microseconds / 1e3

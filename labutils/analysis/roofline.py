"""The roofline: measures the ceilings of a machine, and places implementations under them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
import triton
import triton.language as tl

from labutils.analysis.traffic import compulsory_bytes, io_bytes
from labutils.attention import interface
from labutils.attention.backends import BACKENDS
from labutils.benchmark import (
    RESULTS,
    SCHEMAS,
    Unsupported,
    attention_flops,
    dtype_name,
    time_call,
    time_replayed,
)
from labutils.machine import runtime


@dataclass(frozen=True)
class Ceilings:
    """The two ceilings of a machine, as measured on it."""

    tflops: float
    """TFLOP/s of a large matmul in `dtype`."""
    gb_per_s: float
    """GB/s (10^9 bytes) of a large copy, reads and writes counted."""
    dtype: str
    machine: str

    @property
    def ridge(self) -> float:
        """FLOP/byte at which the two ceilings meet. Below it memory is the bound, above it arithmetic."""
        return 1e3 * self.tflops / self.gb_per_s

    def roof(self, intensity: float) -> float:
        """TFLOP/s attainable at an arithmetic intensity in FLOP/byte."""
        return min(self.tflops, 1e-3 * self.gb_per_s * intensity)


def measure_ceilings(*, dtype: torch.dtype | None = None, seconds: float = 0.5) -> Ceilings:
    """Measures this machine's two ceilings: a square matmul, and a copy too large for the caches.

    Args:
        dtype: of the matmul; None for `runtime.dtype`.
        seconds: spent on each of the two.
    """
    dtype = runtime.dtype if dtype is None else dtype
    n = runtime.choose(cpu=1024, gpu=4096, large_gpu=8192)
    a, b = (torch.randn(n, n, device=runtime.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    matmul = time_call(lambda: torch.mm(a, b, out=out), seconds=seconds)
    size = runtime.choose(cpu=128, gpu=256, large_gpu=2048) * 2**20
    source = torch.zeros(size, dtype=torch.uint8, device=runtime.device)
    target = torch.empty_like(source).zero_()  # written once, so that the timed copy meets no page faults
    copy = time_call(lambda: target.copy_(source), seconds=seconds)
    return Ceilings(
        tflops=2 * n**3 / matmul.median_ms / 1e9,
        gb_per_s=2 * size / copy.median_ms / 1e6,
        dtype=dtype_name(dtype),
        machine=runtime.machine,
    )


def stored_ceilings(gpu: str = "nvidia_h200") -> Ceilings:
    """The stored ceilings of a named GPU.

    Args:
        gpu: a folder under labutils/results.

    Raises:
        FileNotFoundError: this GPU has no stored ceilings.
    """
    path = RESULTS / gpu / "ceilings.json"
    if not path.exists():
        raise FileNotFoundError(f"no ceilings of {gpu!r} are stored: measure_ceilings() measures this machine's.")
    return Ceilings(**json.loads(path.read_text(encoding="utf-8")))


@triton.jit
def _exponentials(out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = offs.to(tl.float32) * 1e-9
    for _ in tl.range(0, STEPS):
        x = tl.math.exp2(-x)  # stays near 0.64; the sign costs other units an eighth of the time
    tl.store(out_ptr + offs, x)


def measure_exponentials(*, seconds: float = 0.2) -> float:
    """Exponentials (base 2, float32) that this GPU computes in a second if it does nothing else.

    Args:
        seconds: of recorded repeats.

    Raises:
        Unsupported: there is no GPU.
    """
    if runtime.device.type != "cuda":
        raise Unsupported("the rate of exponentials is a GPU's: in the interpreter a time means nothing.")
    programs = 16 * torch.cuda.get_device_properties(runtime.device).multi_processor_count
    block, steps = 2048, 1024  # 16 independent numbers a thread hide the latency of each
    out = torch.empty(programs * block, device=runtime.device)
    ms = time_call(lambda: _exponentials[(programs,)](out, STEPS=steps, BLOCK=block), seconds=seconds).median_ms
    return 1e3 * programs * block * steps / ms


def exponential_tflops(exponentials_per_s: float, head_dim: int) -> float:
    """TFLOP/s of a forward pass if only its exponentials took time: 4 * D FLOPs belong to each exponential.

    Args:
        exponentials_per_s: of the GPU, by `measure_exponentials`.
        head_dim: D.
    """
    return 4e-12 * head_dim * exponentials_per_s


def in_turn(*tflops: float) -> float:
    """TFLOP/s of a kernel that does several things one after another, without overlap.

    Args:
        tflops: the rate at which it would run if it did only one of them.
    """
    return 1 / sum(1 / rate for rate in tflops)


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
    """How fast `flash_attn_with_kvcache` reads a full cache for one token.

    Decoding reads each key and value once and computes little with them, so memory bounds it. Compare the rate with
    `measure_ceilings().gb_per_s`.

    Args:
        batch, seqlen, heads, heads_kv, head_dim: B, N_k, H, H_kv, D.
        page: rows of a block of a paged cache, the blocks in random order; None for a cache in one piece.
        dtype: of queries and cache.

    Returns:
        Microseconds of the call, and GB/s (10^9 bytes) of keys and values.

    Raises:
        Unsupported: there is no GPU.
    """
    if runtime.device.type != "cuda":
        raise Unsupported("decoding is timed only on a GPU: in the interpreter a time means nothing.")
    on_gpu = {"device": runtime.device, "dtype": dtype}
    size = 2 * batch * seqlen * heads_kv * head_dim * dtype.itemsize  # bytes of one cache
    # Each call reads a cache of its own. Together they are four times the L2 cache, so none is found there.
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


def decode_points(
    batches: Iterable[int], *, seqlen: int = 8192, heads: int = 64, heads_kv: int = 8, head_dim: int = 128
) -> pd.DataFrame:
    """Measures decoding one token against a full cache on this GPU, for a place under the roofline.

    Args:
        batches: the values of B.
        seqlen, heads, heads_kv, head_dim: N_k, H, H_kv and D.

    Returns:
        batch, seqlen, heads, heads_kv, head_dim, us (microseconds), gb_per_s (of keys and values), `flops` (4 * B * H *
        N_k * D), `intensity` (FLOP/byte: H / H_kv in 16 bits) and tflops.

    Raises:
        Unsupported: there is no GPU.
    """
    rows = []
    for batch in batches:
        us, gb_per_s = decode_bandwidth(batch=batch, seqlen=seqlen, heads=heads, heads_kv=heads_kv, head_dim=head_dim)
        flops = 4.0 * batch * heads * seqlen * head_dim
        rows.append([batch, seqlen, heads, heads_kv, head_dim, us, gb_per_s, flops, heads / heads_kv, flops / us / 1e6])
    return pd.DataFrame(rows, columns=list(SCHEMAS["decoding"]))


def roofline_points(df: pd.DataFrame, ceilings: Ceilings, *, block_m: int = 128, block_n: int = 128) -> pd.DataFrame:
    """The place of each measured forward pass under the roofline.

    Args:
        df: a table of `benchmark.sweep`; rows with pass "fwd" and status "ok" are used.
        ceilings: of the machine that measured it.
        block_m, block_n: the blocks assumed in the IO model of the tiled implementations.

    Returns:
        impl, seqlen, causal, tflops, flops, model_bytes, and:

        - `intensity`: FLOP/byte by the IO model.
        - `intensity_compulsory`: FLOP/byte if every tensor moves once, as with a cache that serves all repeated loads.
        - `roof_tflops`: the roof at `intensity`. `share`: of that roof.
        - `bound`: "memory" or "compute".

        A share above 1 means that a cache served loads that the model sends to memory.
    """
    rows = []
    for row in df[(df["pass"] == "fwd") & (df["status"] == "ok")].itertuples():
        shape = {"batch": row.batch, "heads": row.heads, "seqlen": row.seqlen, "head_dim": row.head_dim}
        size = getattr(torch, row.dtype).itemsize
        model = BACKENDS[row.impl].io_model if row.impl in BACKENDS else "v2"
        moved = io_bytes(
            model,
            **shape,
            block_m=block_m,
            block_n=block_n,
            dtype_bytes=size,
            causal=row.causal,
            per_tensor=False,
        )
        flops = attention_flops(
            batch=row.batch, heads=row.heads, seqlen_q=row.seqlen, head_dim=row.head_dim, causal=row.causal
        )
        intensity, roof = flops / moved, ceilings.roof(flops / moved)
        rows.append(
            {
                "impl": row.impl,
                "seqlen": row.seqlen,
                "causal": row.causal,
                "tflops": row.tflops,
                "flops": flops,
                "model_bytes": moved,
                "intensity": intensity,
                "intensity_compulsory": flops / compulsory_bytes(**shape, dtype_bytes=size),
                "roof_tflops": roof,
                "share": row.tflops / roof,
                "bound": "memory" if intensity < ceilings.ridge else "compute",
            }
        )
    columns = [
        "impl", "seqlen", "causal", "tflops", "flops", "model_bytes", "intensity", "intensity_compulsory",
        "roof_tflops", "share", "bound",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)

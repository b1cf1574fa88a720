"""Measures attention: time, peak memory and error of every implementation, failures included, as a table.

`sweep` is the one function that measures; it returns a DataFrame with a row for each point, also for those
that ran out of memory or cannot run, with the reason. `reference_results` reads such a table as it was stored
on a named GPU. `time_call` and `peak_memory_mib` measure one function.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from labutils import interface, reference, runtime

Attention = Callable[..., torch.Tensor]
"""f(q, k, v, *, causal, softmax_scale) -> out; q and out (B, N_q, H, D), k and v (B, N_k, H_kv, D)."""

SCHEMAS: dict[str, tuple[str, ...]] = {
    name: tuple(columns.split())
    for name, columns in {
        "attention": "impl pass dtype head_dim causal batch heads seqlen ms tflops peak_mib status",
        "training": "model impl checkpointing chunked_loss seqlen batch peak_gib reserved_gib cap_gib "
        "tokens_per_s loss status",
        "traffic": "impl seqlen head_dim block_m block_n model_bytes counted_bytes measured_bytes",
        "prediction": "impl pass head_dim causal batch heads seqlen ms predicted_ms split",
    }.items()
}
"""The columns that each stored table starts with; more may follow."""

COLUMNS: tuple[str, ...] = (*SCHEMAS["attention"], "spread_ms", "max_error", "reason")
"""The columns of `sweep`'s table."""

RESULTS = Path(__file__).parent / "results"

MIN_REPEATS, MAX_REPEATS = 3, 1000
INTERPRETER_TILES = 64  # tiles of 128 x 128 scores that the interpreter may spend on an error: a second or so
INTERPRETER_BACKWARD = 4  # what forward and backward together cost there, in forward passes
ORACLE_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # float64 scores that the oracle holds at a time


class Unsupported(RuntimeError):
    """The implementation cannot do what was asked; the message says why."""


# ------------------------------------------------------------------------------------------------------------
# The implementations
# ------------------------------------------------------------------------------------------------------------


def _naive(q, k, v, *, causal=False, softmax_scale=None):
    return reference.naive_attention(q, k, v, causal=causal, softmax_scale=softmax_scale)


def _sdpa(backend: SDPBackend, q, k, v, *, causal=False, softmax_scale=None):
    if causal and q.shape[1] != k.shape[1]:
        raise Unsupported(
            "scaled_dot_product_attention(is_causal=True) aligns the mask to the top left, the others to the "
            "bottom right: compare at N_q = N_k."
        )
    # With one backend allowed PyTorch runs that one or raises; it does not choose another.
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),  # (B, N, H, D) -> (B, H, N, D), views
            is_causal=causal,
            scale=softmax_scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
    return out.transpose(1, 2)


def _flash_attn(q, k, v, *, causal=False, softmax_scale=None):
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unsupported(f"the flash-attn package cannot be imported: {error}") from error
    return flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)


@cache
def _compiled_flex(signature: tuple) -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled for one signature (shapes, dtype, ...) and kept."""
    import torch._functorch.config as functorch_config
    from torch.nn.attention.flex_attention import flex_attention

    # A donated buffer is overwritten by the backward pass, which could then run only once: timing runs it many times.
    # For good, not for this call: PyTorch asks again when the backward runs.
    functorch_config.donated_buffer = False

    def call(q, k, v, block_mask, scale):
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])

    # torch.compile keeps its graphs with the code object, eight of them, and then refuses: a sweep has more
    # shapes than that, so each signature gets a code object of its own.
    call = types.FunctionType(call.__code__.replace(co_name="flex"), globals(), "flex", None, call.__closure__)
    return torch.compile(call, fullgraph=True, dynamic=False)


@lru_cache(maxsize=8)
def _flex_causal_mask(n_q: int, n_k: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, i, j):
        return j <= i + n_k - n_q

    return create_block_mask(visible, None, None, n_q, n_k, device=device)


def _flex(q, k, v, *, causal=False, softmax_scale=None):
    if q.device.type != "cuda":
        raise Unsupported("compiled FlexAttention is measured on a GPU: on a CPU it has no backward pass.")
    grad = torch.is_grad_enabled() and q.requires_grad
    mask = _flex_causal_mask(q.shape[1], k.shape[1], str(q.device)) if causal else None
    compiled = _compiled_flex((q.shape, k.shape, q.stride(), q.dtype, str(q.device), causal, grad, softmax_scale))
    out = compiled(*(t.transpose(1, 2) for t in (q, k, v)), mask, softmax_scale)
    return out.transpose(1, 2)


def _triton_v1(q, k, v, *, causal=False, softmax_scale=None):
    return interface.flash_attn_v1_func(q, k, v, softmax_scale=softmax_scale, causal=causal)


def _triton_v2(q, k, v, *, causal=False, softmax_scale=None):
    return interface.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)


def _tiled_v1(q, k, v, *, causal=False, softmax_scale=None):
    if torch.is_grad_enabled() and q.requires_grad:
        raise Unsupported("the loop of v1 overwrites O, l and m in each step, which autograd cannot go back through")
    return reference.tiled_attention_v1(q, k, v, causal=causal, softmax_scale=softmax_scale)


def _tiled_v2(q, k, v, *, causal=False, softmax_scale=None):
    return reference.tiled_attention_v2(q, k, v, causal=causal, softmax_scale=softmax_scale)


IMPLEMENTATIONS: dict[str, Attention] = {
    "naive": _naive,
    "sdpa_math": partial(_sdpa, SDPBackend.MATH),
    "sdpa_efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "flash_attn": _flash_attn,
    "flex": _flex,
    "triton_v1": _triton_v1,
    "triton_v2": _triton_v2,
    "tiled_v1": _tiled_v1,
    "tiled_v2": _tiled_v2,
}
"""Every implementation by name, with one signature: f(q, k, v, *, causal=False, softmax_scale=None) -> out.

Tensors are (B, N, H, D). One that cannot run raises and says why; none gives way to another. triton_v1 and
tiled_v1 have no backward pass; tiled_v1 and tiled_v2 are the PyTorch loops of `reference`.
"""


# ------------------------------------------------------------------------------------------------------------
# FLOPs, time, memory
# ------------------------------------------------------------------------------------------------------------


def attention_flops(
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    head_dim: int,
    seqlen_k: int | None = None,
    causal: bool = False,
    backward: bool = False,
) -> float:
    """FLOPs of attention by the field's convention: two matmuls of 2 * N_q * N_k * D each forward.

    Args:
        batch, heads, seqlen_q, head_dim, seqlen_k: B, H, N_q, D and N_k (N_q where not given).
        causal: half of it.
        backward: of the backward pass alone, 2.5 times the forward (five matmuls against two).

    The convention counts useful work: what a kernel recomputes or masks away is not in it.

    Source: FlashAttention-2 (arXiv 2307.08691), section 4.1.
    """
    n_k = seqlen_q if seqlen_k is None else seqlen_k
    flops = 4.0 * batch * heads * seqlen_q * n_k * head_dim
    return flops * (0.5 if causal else 1.0) * (2.5 if backward else 1.0)


class Timing(NamedTuple):
    """What `time_call` measured."""

    median_ms: float
    spread_ms: float
    """Interquartile range: the middle half of the repeats lies within it."""


def _l2_flush_buffer() -> torch.Tensor:
    """Twice the size of the L2 cache: writing it leaves nothing of a tensor there."""
    size = torch.cuda.get_device_properties(runtime.device).L2_cache_size
    return torch.empty(2 * max(size, 2**20), dtype=torch.int8, device=runtime.device)


def _summary(times_ms: Sequence[float]) -> Timing:
    times = torch.tensor(times_ms, dtype=torch.float64)
    low, median, high = torch.quantile(times, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Timing(median, high - low)


def time_call(fn: Callable[[], Any], *, seconds: float = 0.5, warm_up: bool = True) -> Timing:
    """Median and spread of the time of `fn()`, in milliseconds.

    On a GPU: CUDA events around each call, after a warm-up call, with the L2 cache flushed before each, so
    that the inputs come from HBM as they would in a model; the host does not wait between calls. On the CPU:
    perf_counter.

    Args:
        fn: called without arguments; its result is thrown away.
        seconds: the budget. Repeats are as many as fit in it, at least 3 and at most 1000.
        warm_up: call `fn` once before, unrecorded: the first call compiles, allocates, loads libraries.

    A GPU time below about 50 microseconds for each kernel in `fn` is that of launching, not of computing.
    """
    if warm_up:
        fn()
    if runtime.device.type != "cuda":
        times: list[float] = []
        while len(times) < MIN_REPEATS or (sum(times) < 1e3 * seconds and len(times) < MAX_REPEATS):
            start = time.perf_counter()
            fn()
            times.append(1e3 * (time.perf_counter() - start))
        return _summary(times)

    flush = _l2_flush_buffer()

    def timed(repeats: int) -> list[float]:
        starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
        for start, end in zip(starts, ends, strict=True):
            flush.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return [s.elapsed_time(e) for s, e in zip(starts, ends, strict=True)]

    began = time.perf_counter()
    times = timed(MIN_REPEATS)
    estimate = (time.perf_counter() - began) / MIN_REPEATS
    fitting = int(min(seconds / max(estimate, 1e-6), MAX_REPEATS))
    return _summary(timed(fitting) if fitting > MIN_REPEATS else times)


def time_replayed(calls: Sequence[Callable[[], Any]], *, repeats: int = 30) -> float:
    """Microseconds of one of `calls` on the GPU, without the host: the median over replays of a CUDA graph of all.

    For work shorter than its launch. The L2 cache is not flushed: give each call tensors of its own, several times the
    cache's size in all, so that none finds its inputs there.

    Raises:
        Unsupported: no GPU.
    """
    if runtime.device.type != "cuda":
        raise Unsupported("a CUDA graph needs a GPU: there is no time of launches to leave out on this machine.")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles and allocates, which a graph cannot capture
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
    return 1e3 * _summary(times).median_ms / len(calls)


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
        lambda kv=kv: interface.flash_attn_with_kvcache(q, *kv, cache_seqlens=lengths, block_table=table)
        for kv in caches
    ]
    microseconds = time_replayed(calls)
    return microseconds, size / microseconds / 1e3


def torch_profiler(**options: Any) -> torch.profiler.profile:
    """`torch.profiler.profile(**options)`, without the log lines and warnings that it writes to stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the first profiler starts
    return torch.profiler.profile(acc_events=True, **options)  # without it PyTorch 2.11 warns of cleared events


def peak_memory_mib(fn: Callable[[], Any]) -> float:
    """Peak memory of `fn()` in MiB, over what was allocated before the call; its result is included.

    On a GPU the allocator's own maximum. On the CPU the sum of the allocations and releases that
    torch.profiler records, in their order; memory that a library takes past PyTorch's allocator is not seen.
    """
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    with torch_profiler(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = fn()
    del result
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    allocated = peak = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak / 2**20


# ------------------------------------------------------------------------------------------------------------
# Triton's interpreter: noticed, never timed
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def watch_interpreter(before_launch: Callable[[Any, tuple, dict], None]) -> Iterator[None]:
    """Calls `before_launch(executor, args, kwargs)` before each kernel that the interpreter runs in the
    block.

    `executor` is Triton's GridExecutor: `executor.fn` is the Python function of the kernel. On a GPU, where
    kernels are compiled, nothing is ever called.
    """
    if not runtime.interpreted:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    plain = GridExecutor.__call__

    def call(self, *args, **kwargs):
        before_launch(self, args, kwargs)
        return plain(self, *args, **kwargs)

    GridExecutor.__call__ = call
    try:
        yield
    finally:
        GridExecutor.__call__ = plain


INTERPRETED = "it runs in Triton's interpreter on this machine, where a time means nothing"


# ------------------------------------------------------------------------------------------------------------
# One point
# ------------------------------------------------------------------------------------------------------------


class _Oracle:
    """Exact output and gradients of one set of inputs, found when first asked for and shared by all
    implementations.

    Works through heads and blocks of rows, so that no N x N matrix in float64 ever exists, and gives up
    (None) after `seconds`.
    """

    def __init__(self, q, k, v, dout, causal: bool, seconds: float):
        self.inputs, self.dout, self.causal, self.seconds = (q, k, v), dout, causal, seconds
        self.gave_up = seconds <= 0
        self._kept: dict[str, tuple[torch.Tensor, ...] | None] = {}

    def get(self, which: str) -> tuple[torch.Tensor, ...] | None:
        if which not in self._kept:
            self._kept[which] = None if self.gave_up else self._compute(backward=which == "bwd")
        return self._kept[which]

    def _compute(self, backward: bool) -> tuple[torch.Tensor, ...] | None:
        q, k, v = self.inputs
        batch, n, heads, _ = q.shape
        rows = max(1, ORACLE_BYTES[q.device.type] // (8 * batch * n))
        result = tuple(
            torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in ((q, k, v) if backward else (q,))
        )
        began = None
        for head in range(heads):
            one = slice(head, head + 1)
            for start in range(0, n, rows):
                stop = min(start + rows, n)
                # With the mask aligned to the bottom right, rows up to `stop` against keys up to `stop` are
                # causal too.
                keys = slice(0, stop if self.causal else n)
                part = [t.detach().double().requires_grad_(backward) for t in
                        (q[:, start:stop, one], k[:, keys, one], v[:, keys, one])]  # fmt: skip
                with torch.set_grad_enabled(backward):
                    out = reference.exact_attention(*part, causal=self.causal)
                if backward:
                    gradients = torch.autograd.grad(out, part, self.dout[:, start:stop, one].double())
                    for total, at, gradient in zip(result, (slice(start, stop), keys, keys), gradients, strict=True):
                        total[:, at, one] += gradient
                else:
                    result[0][:, start:stop, one] = out
                if q.device.type == "cuda":
                    torch.cuda.synchronize()
                if began is None:  # the first block, which also loads libraries, is not held against the rest
                    began = time.perf_counter()
                if time.perf_counter() - began > self.seconds:
                    self.gave_up = True
                    return None
        return result


def _max_error(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor] | None) -> float:
    """max |result - exact| over all tensors; inf where a result is not a number; NaN where there is no
    oracle."""
    if exact is None:
        return math.nan
    errors = [(r.detach().double() - e).abs().max().item() for r, e in zip(results, exact, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _measure(attention: Attention, which: str, q, k, v, dout, causal: bool, oracle: _Oracle, seconds: float) -> dict:
    """Columns ms, spread_ms, peak_mib, max_error, status and reason of one point. Raises what `attention`
    raises."""
    n_tiles = (
        q.shape[0] * q.shape[2] * math.ceil(q.shape[1] / 128) ** 2 * (1 if which == "fwd" else INTERPRETER_BACKWARD)
    )
    interpreted = False

    def before_launch(*_):
        nonlocal interpreted
        interpreted = True
        if n_tiles > INTERPRETER_TILES:
            raise Unsupported(INTERPRETED)

    def forward():
        with torch.no_grad():
            return attention(q, k, v, causal=causal, softmax_scale=None)

    def forward_and_backward():
        out = attention(*leaves, causal=causal, softmax_scale=None)
        if not out.requires_grad:
            raise Unsupported("it has no backward pass")
        return torch.autograd.grad(out, leaves, dout)

    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    step = forward if which == "fwd" else forward_and_backward
    # The first call is the probe: it compiles, and it shows what cannot run before anything is repeated.
    with watch_interpreter(before_launch):
        results = step()
    error = _max_error([results] if which == "fwd" else results, oracle.get(which))
    del results
    if interpreted:
        return {"status": "unsupported", "reason": INTERPRETED, "max_error": error}

    peak = peak_memory_mib(step)
    if which == "fwd":
        timing = time_call(forward, seconds=seconds, warm_up=False)  # the two calls above were that
    else:
        out = attention(*leaves, causal=causal, softmax_scale=None)
        timing = time_call(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), seconds=seconds)
    return {
        "ms": timing.median_ms,
        "spread_ms": timing.spread_ms,
        "peak_mib": peak,
        "max_error": error,
        "status": "ok",
        "reason": "",
    }


def _is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's CPU allocator raises a bare RuntimeError
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _one_line(error: BaseException, warned: Iterable[warnings.WarningMessage] = ()) -> str:
    parts = [str(error), *(str(w.message) for w in warned)]
    text = " ".join(" ".join(parts).split())
    name = "" if isinstance(error, Unsupported) else f"{type(error).__name__}: "
    return name + (text if len(text) <= 400 else text[:397] + "...")


def _attempt(attention: Attention, *args: Any) -> dict:
    """`_measure`, with a failure turned into a row."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # SDPA says in warnings why a backend refused
        try:
            row = _measure(attention, *args)
        except Exception as error:
            status = "oom" if _is_out_of_memory(error) else "unsupported"
            row = {"status": status, "reason": _one_line(error, warned if status == "unsupported" else ())}
    if row["status"] == "ok":
        for warning in warned:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    else:
        gc.collect()  # only here, with the exception gone, do its frames let go of the tensors
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


# ------------------------------------------------------------------------------------------------------------
# The sweep
# ------------------------------------------------------------------------------------------------------------


def sweep(
    impls: Iterable[str] | Mapping[str, Attention],
    seqlens: Iterable[int],
    *,
    batch: int = 1,
    heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype | None = None,
    causal: bool = False,
    passes: Sequence[str] = ("fwd",),
    tokens: int | None = None,
    seconds_per_point: float = 0.3,
    error_seconds: float = 2.0,
    progress: bool = True,
) -> pd.DataFrame:
    """Time, peak memory and error of implementations over sequence lengths, on this machine.

    Args:
        impls: names from `IMPLEMENTATIONS`, or a mapping from names to functions of the same signature.
        seqlens: N = N_q = N_k, measured in ascending order.
        batch, heads, head_dim: B, H (4 on a CPU, 16 on a GPU where not given) and D.
        dtype: `runtime.dtype` where not given.
        causal: lower-triangular mask.
        passes: "fwd", "bwd" or both.
        tokens: keeps B * N at this number: the batch of each point is tokens // N, at least 1, and `batch` is
            not used.
        seconds_per_point: time spent on the repeats of one point.
        error_seconds: what the float64 oracle may take for one length; where it takes longer `max_error` is
            NaN.
        progress: a progress bar on stdout.

    Returns:
        One row for each length, implementation and pass, with `COLUMNS`: `ms` (median) and `spread_ms`
        (interquartile range); `tflops` (TFLOP/s by the convention of `attention_flops`); `peak_mib` over the
        inputs; `max_error`, the largest absolute difference from `exact_attention` (of dq, dk and dv in the
        backward pass); `status` ok, oom or unsupported, and the `reason`. What was not measured is NaN.
        A "bwd" row times the backward pass alone; its `peak_mib` is that of forward and backward together.
        `.attrs`: "machine" and "interrupted" (True after a KeyboardInterrupt, with the rows so far).

    Once an implementation has run out of memory, longer lengths are rows with status oom that were not tried.
    What runs in Triton's interpreter gets status unsupported and no time, and its error where that is cheap.

    Raises:
        ValueError: an unknown implementation or pass, no length, or a length below 1.
    """
    chosen = _chosen(impls)
    lengths = sorted(set(seqlens))
    if not lengths or lengths[0] < 1:
        raise ValueError(f"seqlens={lengths}: give at least one sequence length, each 1 or more.")
    if not passes or set(passes) - {"fwd", "bwd"}:
        raise ValueError(f"passes={tuple(passes)}: give 'fwd', 'bwd' or both.")
    heads = runtime.choose(cpu=4, gpu=16) if heads is None else heads
    dtype = runtime.dtype if dtype is None else dtype

    from tqdm import tqdm

    # The description is what redraws the bar, once for each point: it names the point that is being measured.
    points = len(lengths) * len(chosen) * len(passes)
    bar = tqdm(total=points, file=sys.stdout, disable=not progress, ncols=90, mininterval=3600)
    rows: list[dict] = []
    exhausted: dict[tuple[str, str], str] = {}  # implementation and pass -> why it is not tried any more
    interrupted = False
    try:
        for n in lengths:
            b = batch if tokens is None else max(1, tokens // n)
            try:
                q, k, v, dout = _inputs((b, n, heads, head_dim), dtype)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                why = f"not tried: at N = {n:,} the inputs alone do not fit"
                exhausted = {(name, which): why for name in chosen for which in passes} | exhausted
                q = k = v = dout = None
            oracle = _Oracle(q, k, v, dout, causal, error_seconds)
            for name, attention in chosen.items():
                for which in passes:
                    bar.set_description_str(f"{name} {which} N={n:,}")
                    if (name, which) in exhausted:
                        point = {"status": "oom", "reason": exhausted[name, which]}
                    else:
                        point = _attempt(attention, which, q, k, v, dout, causal, oracle, seconds_per_point)
                        if point["status"] == "oom":
                            why = f"not tried: it ran out of memory at N = {n:,}"
                            exhausted[name, which] = why
                            if which == "fwd":  # the backward pass needs what the forward one needs, and more
                                exhausted[name, "bwd"] = why
                    shape = {"head_dim": head_dim, "causal": causal, "batch": b, "heads": heads, "seqlen": n}
                    rows.append({"impl": name, "pass": which, "dtype": dtype_name(dtype), **shape, **point})
                    bar.update()
            if oracle.gave_up:  # longer lengths cost more
                error_seconds = 0.0
            del q, k, v, dout, oracle  # before the next, longer ones are made
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()

    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in ("ms", "spread_ms", "peak_mib", "max_error"):
        table[column] = table[column].astype(float)
    table["tflops"] = [
        attention_flops(
            batch=row.batch, heads=row.heads, seqlen_q=row.seqlen, head_dim=row.head_dim, causal=row.causal,
            backward=which == "bwd",
        ) / row.ms / 1e9
        for row, which in zip(table.itertuples(), table["pass"], strict=True)
    ]  # fmt: skip
    table["tflops"] = table["tflops"].astype(float)
    table.attrs.update(machine=runtime.machine, interrupted=interrupted)
    return table


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16", as it stands in the tables."""
    return str(dtype).removeprefix("torch.")


def _chosen(impls: Iterable[str] | Mapping[str, Attention]) -> dict[str, Attention]:
    if isinstance(impls, Mapping):
        chosen = dict(impls)
    else:
        names = [impls] if isinstance(impls, str) else list(impls)
        unknown = [name for name in names if name not in IMPLEMENTATIONS]
        if unknown:
            raise ValueError(f"unknown implementation {unknown}: choose from {', '.join(IMPLEMENTATIONS)}.")
        chosen = {name: IMPLEMENTATIONS[name] for name in names}
    if not chosen:
        raise ValueError("no implementation to measure: name at least one.")
    return chosen


def _inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and dout: the same numbers for every implementation, and no effect on PyTorch's global
    generator."""
    generator = torch.Generator(device=runtime.device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=runtime.device, dtype=dtype) for _ in range(4)]


def speedup(df: pd.DataFrame, over: str = "naive") -> pd.DataFrame:
    """The table with a column `speedup`: time of `over` by time of the row, at the same pass, dtype and
    shape.

    NaN where either did not run.

    Raises:
        ValueError: `over` is not among the implementations, or stands twice at the same point.
    """
    if over not in set(df["impl"]):
        raise ValueError(f"over={over!r} is not in the table, which has {', '.join(sorted(set(df['impl'])))}.")
    keys = ["pass", "dtype", "head_dim", "causal", "batch", "heads", "seqlen"]
    base = df.loc[df["impl"] == over, [*keys, "ms"]].rename(columns={"ms": "base_ms"})
    if base.duplicated(keys).any():
        raise ValueError(f"{over} stands more than once at the same point: pass one sweep at a time.")
    merged = df.merge(base, on=keys, how="left")
    result = merged.drop(columns="base_ms").assign(speedup=merged["base_ms"] / merged["ms"])
    result.attrs.update(df.attrs)
    return result


# ------------------------------------------------------------------------------------------------------------
# Stored results
# ------------------------------------------------------------------------------------------------------------


def check_schema(df: pd.DataFrame, table: str) -> None:
    """Raises ValueError unless the table starts with the columns of `SCHEMAS[table]`, in order."""
    if table not in SCHEMAS:
        raise ValueError(f"table={table!r} is not known: {', '.join(SCHEMAS)}.")
    wanted = list(SCHEMAS[table])
    got = list(df.columns[: len(wanted)])
    if got != wanted:
        raise ValueError(f"a table {table!r} starts with the columns {wanted}; this one starts with {got}.")


def save_results(df: pd.DataFrame, directory: str | Path, environment: Any, *, table: str = "attention") -> Path:
    """Writes `<directory>/<table>.csv` and, beside it, the environment that made it.

    Args:
        df: a table with the columns of `SCHEMAS[table]` first.
        directory: made where it does not exist; one directory for each GPU.
        environment: a mapping, or an object with `as_dict()` (`environment.environment()`); it needs a key
            "gpu".
        table: attention, training, traffic or prediction.

    `environment.json` holds an entry for each table, since tables of one GPU are measured at different times.

    Returns:
        The path of the CSV file.

    Raises:
        ValueError: wrong columns, no "gpu" in the environment, or a directory with results of another GPU.
    """
    check_schema(df, table)
    made_by = dict(environment.as_dict() if hasattr(environment, "as_dict") else environment)
    if "gpu" not in made_by:
        raise ValueError(f"the environment has no entry 'gpu' (it has {sorted(made_by)}): which machine measured this?")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "environment.json"
    environments = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    others = {e["gpu"] for name, e in environments.items() if name != table} - {made_by["gpu"]}
    if others:
        raise ValueError(f"{directory} holds results of {others}, not of {made_by['gpu']}: use another directory.")
    environments[table] = made_by
    csv = directory / f"{table}.csv"
    df.to_csv(csv, index=False, float_format="%.6g", lineterminator="\n")
    path.write_text(json.dumps(environments, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return csv


def reference_results(gpu: str = "nvidia_h200", table: str = "attention") -> pd.DataFrame:
    """A stored table of a named GPU, with the environment that made it.

    Args:
        gpu: a directory under labutils/results.
        table: attention, training, traffic or prediction.

    Returns:
        The table; `.attrs["environment"]` (dict) and `.attrs["machine"]` (the GPU's name).

    Raises:
        FileNotFoundError: no such results; the message lists those that there are.
        ValueError: the file does not have the columns of its schema.
    """
    csv = RESULTS / gpu / f"{table}.csv"
    if not csv.exists():
        stored = sorted(f"{p.parent.name}/{p.stem}" for p in RESULTS.glob("*/*.csv"))
        raise FileNotFoundError(f"no stored table {gpu}/{table}; there are: {', '.join(stored) or 'none'}.")
    df = pd.read_csv(csv, dtype={"reason": "str"})
    check_schema(df, table)
    if "reason" in df.columns:
        df["reason"] = df["reason"].fillna("")
    environment = json.loads((csv.parent / "environment.json").read_text(encoding="utf-8"))[table]
    df.attrs.update(environment=environment, machine=environment["gpu"] or environment.get("cpu"))
    return df

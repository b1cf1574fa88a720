"""Measures one call: its time and spread, its peak memory, and whether launching it takes the time."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from labutils.attention.backends import Unsupported
from labutils.machine import runtime

MIN_REPEATS, MAX_REPEATS = 3, 1000
WARM_UP_SECONDS = {"cpu": 0.02, "cuda": 0.1}


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
        batch, heads, seqlen_q, head_dim, seqlen_k: B, H, N_q, D and N_k (None for N_q).
        causal: True halves them.
        backward: only the backward pass, 2.5 times the forward (five matmuls against two).

    The convention counts useful work, not what a kernel recomputes or masks away.

    Source: FlashAttention-2 (arXiv 2307.08691), section 4.1.
    """
    n_k = seqlen_q if seqlen_k is None else seqlen_k
    flops = 4.0 * batch * heads * seqlen_q * n_k * head_dim
    return flops * (0.5 if causal else 1.0) * (2.5 if backward else 1.0)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in the tables: `torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


class Timing(NamedTuple):
    """The result of `time_call`."""

    median_ms: float
    spread_ms: float
    """The interquartile range, which holds the middle half of the repeats."""


def _l2_flush_buffer() -> torch.Tensor:
    """A buffer of twice the size of the L2 cache. Writing it removes every other tensor from there."""
    size = torch.cuda.get_device_properties(runtime.device).L2_cache_size
    return torch.empty(2 * max(size, 2**20), dtype=torch.int8, device=runtime.device)


def _summary(times_ms: Sequence[float]) -> Timing:
    times = torch.tensor(times_ms, dtype=torch.float64)
    low, median, high = torch.quantile(times, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Timing(median, high - low)


def time_call(fn: Callable[[], Any], *, seconds: float = 0.5, warm_up: float | None = None) -> Timing:
    """Median and spread of the time of `fn()`, in milliseconds.

    On a GPU, CUDA events stand around each call. The L2 cache is flushed before each call, so that the inputs come from
    HBM as they would in a model. The host does not wait between calls. On the CPU the clock is perf_counter.

    Args:
        fn: called without arguments; its result is thrown away.
        seconds: the budget. As many repeats are made as fit in it, at least 3 and at most 1000.
        warm_up: seconds of calls that are not recorded, at least one call; None for `WARM_UP_SECONDS` of the device.
            The first call compiles, allocates and loads libraries. Under the load of the others a GPU reaches the
            clock that it keeps.

    A GPU time below about 50 microseconds for each kernel in `fn` is the time of launching, not of computing.
    `overhead_bound` checks that.
    """
    warm_up = WARM_UP_SECONDS[runtime.device.type] if warm_up is None else warm_up
    began = time.perf_counter()
    if runtime.device.type != "cuda":
        fn()
        while time.perf_counter() - began < warm_up:
            fn()
        times: list[float] = []
        while len(times) < MIN_REPEATS or (sum(times) < 1e3 * seconds and len(times) < MAX_REPEATS):
            start = time.perf_counter()
            fn()
            times.append(1e3 * (time.perf_counter() - start))
        return _summary(times)

    flush = _l2_flush_buffer()
    _timed_on_gpu(fn, 1, flush)
    chunk = 1  # flushes and calls in turn, as they will be timed: without flushes the GPU would draw another power
    while (left := warm_up - (time.perf_counter() - began)) > 0:
        chunk_began = time.perf_counter()
        _timed_on_gpu(fn, chunk, flush)
        each = (time.perf_counter() - chunk_began) / chunk
        chunk = max(1, min(int(left / max(each, 1e-6)), MAX_REPEATS, 2 * chunk))
    began = time.perf_counter()
    times = _timed_on_gpu(fn, MIN_REPEATS, flush)
    estimate = (time.perf_counter() - began) / MIN_REPEATS
    fitting = int(min(seconds / max(estimate, 1e-6), MAX_REPEATS))
    return _summary(_timed_on_gpu(fn, fitting, flush) if fitting > MIN_REPEATS else times)


def _timed_on_gpu(fn: Callable[[], Any], repeats: int, flush: torch.Tensor, flushes: int = 1) -> list[float]:
    """Milliseconds between the events around each call. The L2 cache is flushed before each."""
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        for _ in range(flushes):
            flush.zero_()
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [s.elapsed_time(e) for s, e in zip(starts, ends, strict=True)]


ISSUED_TOGETHER = 50  # calls of few kernels each. A CUDA stream queues far more before it blocks


def time_issuing(fn: Callable[[], Any], *, calls: int = 2000) -> float:
    """Microseconds that `fn()` keeps the host busy while the GPU works on: the median over many calls.

    Between batches of calls the host waits for the GPU, so that no call waits for room in its queue. That wait is not
    timed. On a CPU, which issues nothing, it is the time of the call.

    Args:
        fn: called without arguments. calls: how many are timed, after a tenth as many that are not.
    """
    times = []
    for number in range(-(calls // 10), calls):
        if number % ISSUED_TOGETHER == 0 and runtime.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        fn()
        if number >= 0:
            times.append(1e6 * (time.perf_counter() - began))
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return sorted(times)[len(times) // 2]


HEAD_START_FLUSHES = 500  # a CUDA stream queues more than these and the call's own kernels before it blocks


def overhead_bound(fn: Callable[[], Any], median_ms: float) -> bool:
    """Whether the GPU waits for the host during a tenth or more of `fn`'s time. Always False on a CPU.

    The GPU first gets other work, for longer than the host needs to issue the call. Then nothing keeps the call's
    kernels apart, and their time is the GPU's own. The rest of the median counts as launch overhead, if the host takes
    that long at all. Otherwise the GPU's clock has risen in between.

    Args:
        fn: called without arguments. median_ms: its time, as `time_call` measured it.
    """
    if runtime.device.type != "cuda":
        return False
    flush = _l2_flush_buffer()
    issued = []
    for _ in range(MIN_REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        fn()
        issued.append(1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    host_ms = sorted(issued)[len(issued) // 2]
    if host_ms < 0.1 * median_ms:
        return False
    flush_ms = _summary(_timed_on_gpu(flush.zero_, MIN_REPEATS, flush)).median_ms
    ahead = min(math.ceil(2 * host_ms / max(flush_ms, 1e-3)) + 1, HEAD_START_FLUSHES)
    alone = [_timed_on_gpu(fn, 1, flush, flushes=ahead)[0] for _ in range(5)]
    waiting_ms = median_ms - _summary(alone).median_ms
    return 0.1 * median_ms <= waiting_ms <= 1.2 * host_ms


def time_replayed(calls: Sequence[Callable[[], Any]], *, repeats: int = 30) -> float:
    """Microseconds of one of `calls` on the GPU, without the host: the median over replays of a CUDA graph of all.

    It measures work that is shorter than its launch. The L2 cache is not flushed. Give each call tensors of its own, in
    all several times the size of the cache, so that no call finds its inputs there.

    Args:
        calls: functions without arguments, which a CUDA graph must be able to hold.
        repeats: how often the graph is replayed.

    Raises:
        Unsupported: there is no GPU.
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


def torch_profiler(**options: Any) -> torch.profiler.profile:
    """`torch.profiler.profile(**options)` without its log lines and warnings on stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the first profiler starts
    return torch.profiler.profile(acc_events=True, **options)  # without it PyTorch 2.11 warns of cleared events


def peak_memory_mib(fn: Callable[[], Any]) -> float:
    """Peak memory of `fn()` in MiB, beyond what was allocated before the call. Its result is included.

    On a GPU this is the maximum of PyTorch's allocator. On the CPU it comes from the allocations and releases that
    torch.profiler records, which lack the memory that a library takes past PyTorch's allocator.

    Args:
        fn: called without arguments.
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
# Triton's interpreter, which is never timed
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def watch_interpreter(before_launch: Callable[[Any, tuple, dict], None]) -> Iterator[None]:
    """Calls `before_launch(executor, args, kwargs)` before each kernel that the interpreter runs in the block.

    `executor` is Triton's GridExecutor: `executor.fn` is the Python function of the kernel. If kernels are compiled,
    nothing is called.
    """
    if not runtime.interpreted:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    plain = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before_launch(self, args, kwargs)
        return plain(self, *args, **kwargs)

    GridExecutor.__call__ = call
    try:
        yield
    finally:
        GridExecutor.__call__ = plain


INTERPRETED = "it runs in Triton's interpreter on this machine, where a time means nothing"

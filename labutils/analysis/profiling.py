"""Reads torch.profiler: where the time of a function goes, when each operation runs, what launches cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from labutils.benchmark import Unsupported, time_replayed, torch_profiler
from labutils.machine import runtime

# The profiler records its own requests for memory, and its steps, among the operations.
_PROFILERS_OWN = ("Activity Buffer Request", "ProfilerStep")


def short_operation(name: str) -> str:
    """An operation's or kernel's name without result, namespaces and template arguments."""
    for noise in ("<unnamed>::", "(anonymous namespace)::"):
        name = name.replace(noise, "")
    return name.split("<")[0].split("(")[0].split("::")[-1].removeprefix("void ").strip()


def profile(
    fn: Callable[[], Any], *, repeats: int = 3, top: int | None = 10, flops: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """Where the time of `fn()` goes, operation by operation, by torch.profiler.

    Args:
        fn: called `repeats` times, after one call that is not recorded.
        repeats: calls to average over.
        top: rows to return, longest first; None for all.
        flops: part of an operation's name -> its FLOPs in one call of `fn`, for operations that the profiler does not
            count, such as attention kernels. The longest operation of that name gets them.

    Returns:
        A row for each operation, with numbers per call of fn:

        - `op`: its name. On a GPU, a kernel launched outside a PyTorch operation has its own row, as Triton's kernels
          do.
        - `calls`: how often it ran.
        - `self_ms`: its time without the operations that it calls: on the GPU if there is one, else on the CPU.
        - `share`: of the total.
        - `gflops`: NaN if the profiler does not count them. It counts only matmuls and a few elementwise operations.

        `.attrs`: "total_ms", "machine", "device" ("CPU" or "GPU").

    Raises:
        ValueError: a part in `flops` occurs in no operation's name.
    """
    on_gpu = runtime.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    fn()
    with torch_profiler(
        activities=[activity.CPU, activity.CUDA] if on_gpu else [activity.CPU], with_flops=True
    ) as profiler:
        for _ in range(repeats):
            fn()
        if on_gpu:
            torch.cuda.synchronize()

    cpu = torch.autograd.DeviceType.CPU
    rows: list[dict] = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == cpu and microseconds > 0 and event.key not in _PROFILERS_OWN:
            rows.append({"op": event.key, "calls": event.count, "us": microseconds, "flops": event.flops or nan})
    if on_gpu:
        rows += _kernels_without_operation(profiler)
    table = pd.DataFrame(rows, columns=["op", "calls", "us", "flops"]).sort_values("us", ascending=False)
    total_us = table["us"].sum()
    result = pd.DataFrame(
        {
            "op": table["op"],
            "calls": table["calls"] / repeats,
            "self_ms": table["us"] / repeats / 1e3,
            "share": table["us"] / total_us,
            "gflops": table["flops"] / repeats / 1e9,
        }
    ).reset_index(drop=True)
    for part, number in (flops or {}).items():
        named = result.index[result["op"].str.contains(part, regex=False)]
        if not len(named):
            raise ValueError(f"no operation's name contains {part!r}: {', '.join(result['op'].head(20))}.")
        result.loc[named[0], "gflops"] = number / 1e9
    result = result if top is None else result.head(top)
    result.attrs.update(
        total_ms=float(total_us) / repeats / 1e3, machine=runtime.machine, device="GPU" if on_gpu else "CPU"
    )
    return result


def _kernels_without_operation(profiler: Any) -> list[dict]:
    """GPU kernels that no PyTorch operation launched, so that no operation accounts for their time."""
    cpu = torch.autograd.DeviceType.CPU
    spent: Counter[str] = Counter()  # microseconds by kernel, without those that an operation accounts for
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == cpu:
            for kernel in event.kernels:
                spent[kernel.name] -= kernel.duration
                calls[kernel.name] -= 1
        else:
            spent[event.name] += event.self_device_time_total
            calls[event.name] += 1
    for name in _PROFILERS_OWN:
        calls.pop(name, None)
    return [{"op": name, "calls": n, "us": spent[name], "flops": nan} for name, n in calls.items() if n > 0]


# ------------------------------------------------------------------------------------------------------------
# Timeline
# ------------------------------------------------------------------------------------------------------------


def timeline(fn: Callable[[], Any], *, trace: str | Path | None = None) -> pd.DataFrame:
    """When each operation of one call of `fn()` ran: a row for each, in microseconds from the first.

    Args:
        fn: called twice to warm up, and once more, recorded.
        trace: a file for the whole trace, which https://ui.perfetto.dev and chrome://tracing open.

    Returns:
        `op`, `track` ("CPU" or "GPU"), `start_us`, `end_us` and `depth`: how many operations of the same track were
        running when this one began (`matmul` 0, the `bmm` that it calls 1). `.attrs`: "machine".
    """
    on_gpu = runtime.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    fn()
    first_unrecorded = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch_profiler(
        activities=[activity.CPU, activity.CUDA] if on_gpu else [activity.CPU], schedule=first_unrecorded
    ) as profiler:
        for call in range(2):  # with the profiler's start in it, the first operation would take milliseconds
            fn()
            if on_gpu:
                torch.cuda.synchronize()
            if call == 0:
                profiler.step()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    cpu = torch.autograd.DeviceType.CPU
    rows = [
        [e.name, "CPU" if e.device_type == cpu else "GPU", e.time_range.start, e.time_range.end]
        for e in profiler.events()
        if not e.name.startswith(_PROFILERS_OWN) and e.time_range.end > e.time_range.start
    ]
    table = pd.DataFrame(rows, columns=["op", "track", "start_us", "end_us"])
    table[["start_us", "end_us"]] -= table["start_us"].min()
    table = table.sort_values(["track", "start_us", "end_us"], ascending=[True, True, False]).reset_index(drop=True)
    depth = []
    going_on: list[tuple[str, float]] = []
    for row in table.itertuples():
        going_on = [(track, end) for track, end in going_on if track == row.track and end > row.start_us]
        depth.append(len(going_on))
        going_on.append((row.track, row.end_us))
    table["depth"] = depth
    table.attrs["machine"] = runtime.machine
    return table


@dataclass(frozen=True)
class LaunchOverhead:
    """The time of a call with the host, and without it.

    Attributes:
        called_us: microseconds of one of many calls in a row, until the GPU has finished all.
        replayed_us: microseconds of the same work as a CUDA graph, which the host starts at once.
    """

    called_us: float
    replayed_us: float

    @property
    def waiting(self) -> float:
        """Share of a call's time in which the GPU waits for the host."""
        return max(0.0, 1 - self.replayed_us / self.called_us)


def launch_overhead(fn: Callable[[], Any], *, repeats: int = 50) -> LaunchOverhead:
    """The cost of starting a call's kernels from Python: the call itself, beside the same work as a CUDA graph.

    Args:
        fn: called without arguments; a CUDA graph must be able to hold it.
        repeats: calls in a row that are timed together.

    Raises:
        Unsupported: there is no GPU.
    """
    if runtime.device.type != "cuda":
        raise Unsupported("launches are a GPU's: on a CPU the operation itself runs when it is called.")
    for _ in range(5):
        fn()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        fn()
    torch.cuda.synchronize()
    called_us = 1e6 * (time.perf_counter() - began) / repeats
    return LaunchOverhead(called_us, time_replayed([fn]))

"""Measures many points in rounds: every implementation at every shape. Each point gets a row, also if it fails."""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import pandas as pd
import torch

from labutils.attention.backends import Attention, chosen
from labutils.benchmark.points import NOT_REACHED, DeviceLost, Oracle, Point, attempt, device_error, is_out_of_memory
from labutils.benchmark.tables import as_table
from labutils.benchmark.timing import attention_flops, dtype_name
from labutils.machine import runtime

if TYPE_CHECKING:
    from tqdm import tqdm


def plan(
    impls: Iterable[str],
    seqlens: Iterable[int],
    *,
    head_dims: Iterable[int] = (64,),
    dtypes: Iterable[torch.dtype] | None = None,
    causal: Iterable[bool] = (False,),
    passes: Sequence[str] = ("fwd",),
    batches: Iterable[int] = (1,),
    tokens: int | None = None,
    heads: int | None = None,
    hidden: int | None = None,
) -> list[Point]:
    """The points of a sweep, in the order in which a round measures them.

    Args:
        impls: names of implementations. `plan` does not check them.
        seqlens: N = N_q = N_k, measured in ascending order.
        head_dims: D.
        dtypes: None for `runtime.dtype`.
        causal: False, True or both.
        passes: "fwd", "bwd" or both.
        batches: B.
        tokens: keeps B * N at this number: B is tokens // N, at least 1, and `batches` is not used.
        heads: H; None for 4 on a CPU and 16 on a GPU.
        hidden: keeps H * D at this number: H is hidden // D, and `heads` is not used.

    Raises:
        ValueError: nothing to measure, a number below 1, an unknown pass, or a `hidden` that D does not divide.
    """
    lengths, widths, impls = sorted(set(seqlens)), list(dict.fromkeys(head_dims)), list(dict.fromkeys(impls))
    batches, masks = list(dict.fromkeys(batches)), list(dict.fromkeys(causal))
    dtypes = list(dict.fromkeys((runtime.dtype,) if dtypes is None else dtypes))
    if not lengths or lengths[0] < 1:
        raise ValueError(f"seqlens={lengths}: give at least one sequence length, each 1 or more.")
    if not passes or set(passes) - {"fwd", "bwd"}:
        raise ValueError(f"passes={tuple(passes)}: give 'fwd', 'bwd' or both.")
    if not impls:
        raise ValueError("no implementation to measure: name at least one.")
    if not widths or min(widths) < 1:
        raise ValueError(f"head_dims={widths}: give at least one head dimension, each 1 or more.")
    if not masks or not dtypes:
        raise ValueError(f"causal={masks}, dtypes={dtypes}: give at least one of each.")
    for name, value in {"batch": min(batches, default=0), "tokens": tokens, "heads": heads, "hidden": hidden}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: it must be 1 or more.")
    wrong = [] if hidden is None else [d for d in widths if hidden % d]
    if wrong:
        raise ValueError(f"hidden={hidden} is no multiple of the head dimension {wrong[0]}: H would not be whole.")
    heads = runtime.choose(cpu=4, gpu=16) if heads is None else heads
    return [
        Point(
            impl, which, dtype_name(dtype), d, mask, b if tokens is None else max(1, tokens // n),
            heads if hidden is None else hidden // d, n,
        )
        for dtype in dtypes
        for d in widths
        for mask in masks
        for b in (batches if tokens is None else [0])
        for n in lengths
        for impl in impls
        for which in dict.fromkeys(passes)
    ]  # fmt: skip


def measure_rounds(
    points: Sequence[Point],
    implementations: Mapping[str, Attention],
    rows: dict[Point, dict],
    *,
    rounds: int = 1,
    seconds_per_point: float = 0.3,
    warm_up: float | None = None,
    error_seconds: float = 2.0,
    describe: Callable[[str], None] = lambda text: None,
) -> Iterator[int]:
    """Measures the points that `rows` lacks, and adds their rows, one step at a time.

    Each round measures all points before the next round begins. The rounds of one point then lie as far apart as the
    sweep allows, so that slow changes show as spread, such as those of a GPU's temperature and clock.

    Args:
        points: of `plan`.
        implementations: a function for each name among the points.
        rows: filled here. Rows that it holds already only get the rounds that they lack.
        rounds: 1 or more.
        seconds_per_point: of recorded repeats of a point, over all rounds.
        warm_up: seconds before the repeats, in each round, as for `time_call`.
        error_seconds: as for `sweep`.
        describe: told which point is being measured.

    Yields:
        How many of the `pending(points, rows, rounds)` measurements the last row has finished.

    Raises:
        ValueError: less than one round.
        DeviceLost: the GPU computes nothing more in this process. The point that was being measured has its row.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: it must be 1 or more.")
    oracle_seconds: dict[tuple, float] = {}  # the time that the oracle has left for each dtype, D and mask
    for number in range(rounds):
        exhausted: dict[tuple, list[Point]] = {}  # points that ran out of memory, by all but batch and length
        for shape, alike in groupby(points, key=Point.inputs):
            group = list(alike)
            for point in group:
                if rows.get(point, {}).get("status") == "oom":
                    _note_exhausted(exhausted, point)
            todo = [point for point in group if _lacks(rows.get(point), number)]
            if not todo:
                continue
            dtype, d, causal, b, h, n = shape
            kind = (dtype, d, causal)
            try:
                tensors = _inputs((b, n, h, d), getattr(torch, dtype))
            except RuntimeError as error:
                lost = device_error()
                if lost is not None:
                    raise _stopped(f"before {todo[0].impl} {todo[0].which} N={n:,}", lost) from error
                if not is_out_of_memory(error):
                    raise
                tensors = None
            patience = oracle_seconds.get(kind, error_seconds)
            oracle = Oracle(*(tensors or [None] * 4), causal=causal, seconds=patience)
            for point in todo:
                describe(f"{point.impl} {point.which} N={n:,}")
                before = rows.get(point)
                less = next((p for p in exhausted.get(point.but_size(), ()) if _needs_no_more(p, point)), None)
                if tensors is None:
                    found = {"status": "oom", "reason": f"not tried: at N = {n:,} the inputs alone do not fit"}
                elif before is None and less is not None:
                    found = {"status": "oom", "reason": f"not tried: it ran out of memory at N = {less.seqlen:,}"}
                else:
                    try:
                        found = attempt(
                            implementations[point.impl], point.which, tensors, causal,
                            oracle if before is None else None, seconds=seconds_per_point / rounds, warm_up=warm_up,
                        )  # fmt: skip
                    except DeviceLost as lost:  # every later point would fail as well, and would be blamed for it
                        assert lost.row is not None  # `attempt` gives the row of the point
                        rows[point] = _merged(point, before, lost.row)
                        yield rounds - number  # so that the caller can write this row, too
                        raise _stopped(f"at {point.impl} {point.which} N={n:,}", lost) from lost
                rows[point] = _merged(point, before, found)
                if found["status"] == "oom":
                    _note_exhausted(exhausted, point)
                yield rounds - number if found["status"] != "ok" else 1
            if oracle.gave_up:  # longer lengths cost more
                oracle_seconds[kind] = 0.0
            del tensors, oracle  # before the next, longer tensors are made


def _stopped(where: str, lost: DeviceLost | str) -> DeviceLost:
    what = str(lost).rstrip(".")
    return DeviceLost(
        f"the sweep stopped {where}: {what}. After such an error a process computes nothing more on the GPU"
    )


def pending(points: Iterable[Point], rows: Mapping[Point, Mapping], rounds: int) -> int:
    """How many measurements `measure_rounds` still has to make: one for each point and round."""
    return sum(_lacks(rows.get(point), number) for point in points for number in range(rounds))


def _lacks(row: Mapping | None, number: int) -> bool:
    """Whether a point still needs the round of that number. A point that failed needs no more rounds."""
    return row is None or (row["status"] == "ok" and len(_rounds(row)) <= number)


def _rounds(row: Mapping) -> list[float]:
    """The median of each round. A row without `rounds_ms` has one round."""
    text = row.get("rounds_ms") or ""
    return [float(part) for part in str(text).split(";") if part] or [row["ms"]]


def _note_exhausted(exhausted: dict[tuple, list[Point]], point: Point) -> None:
    exhausted.setdefault(point.but_size(), []).append(point)
    if point.which == "fwd":  # the backward pass needs the forward pass's memory, and more
        exhausted.setdefault(point.but_size(which="bwd"), []).append(point)


def _needs_no_more(failed: Point, point: Point) -> bool:
    """Whether `point` needs at least as much memory as `failed`, which had too little. It grows as B * N or B * N²."""
    return failed.seqlen <= point.seqlen and failed.batch * failed.seqlen <= point.batch * point.seqlen


def _merged(point: Point, before: Mapping | None, found: Mapping) -> dict:
    """The row of a point after one more round."""
    if found["status"] != "ok":
        return {"overhead_bound": None, "rounds_ms": "", **found}
    medians = [*([] if before is None else _rounds(before)), found["ms"]]
    ms = statistics.median(medians)
    # The middle half of the repeats shows how far calls in a row differ. The rounds show how far minutes differ.
    within = [found["spread_ms"]]
    if before is not None:
        earlier = _rounds(before)
        within.append(max(0.0, before["spread_ms"] - (max(earlier) - min(earlier))))
    flops = attention_flops(
        batch=point.batch, heads=point.heads, seqlen_q=point.seqlen, head_dim=point.head_dim, causal=point.causal,
        backward=point.which == "bwd",
    )  # fmt: skip
    merged = dict(before or {}) | {key: value for key, value in found.items() if key not in ("ms", "spread_ms")}
    return merged | {
        "ms": ms,
        "spread_ms": max(within) + max(medians) - min(medians),
        "tflops": flops / ms / 1e9,
        "rounds_ms": ";".join(f"{median:.6g}" for median in medians),
    }


def _inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and dout, the same numbers for every implementation. PyTorch's global generator stays as it is."""
    generator = torch.Generator(device=runtime.device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=runtime.device, dtype=dtype) for _ in range(4)]


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
    warm_up: float | None = None,
    error_seconds: float = 2.0,
    rounds: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Time, peak memory and error of implementations over sequence lengths, on this machine.

    Args:
        impls: names from `IMPLEMENTATIONS`, or a mapping from names to functions of the same signature.
        seqlens: N = N_q = N_k, measured in ascending order.
        batch, heads, head_dim: B, H (None for 4 on a CPU and 16 on a GPU) and D.
        dtype: None for `runtime.dtype`.
        causal: lower-triangular mask.
        passes: "fwd", "bwd" or both.
        tokens: keeps B * N at this number: the batch of each point is tokens // N, at least 1, and `batch` is not used.
        seconds_per_point: time spent on the repeats of one point.
        warm_up: seconds before the repeats, in each round, as for `time_call`.
        error_seconds: time that the float64 oracle may take for one length. If it takes longer, `max_error` is NaN.
        rounds: how often the whole sweep is measured. `seconds_per_point` is shared among the rounds.
        progress: whether to show a progress bar on stdout.

    Returns:
        One row for each length, implementation and pass, with `COLUMNS`. A value that was not measured is NaN.

        - `ms`: the median of the rounds' medians.
        - `spread_ms`: the largest interquartile range of a round's repeats, plus the range of the rounds' medians.
        - `tflops`: TFLOP/s by the convention of `attention_flops`.
        - `peak_mib`: memory over that of the inputs.
        - `max_error`: the largest absolute difference from `reference.exact_attention`; in the backward pass of dq, dk
          and dv.
        - `status`: ok, oom or unsupported, and `reason`.
        - `overhead_bound`: whether launching, not the GPU, takes the time, by `timing.overhead_bound`.
        - `rounds_ms`: the medians of the rounds, separated by semicolons.

        A "bwd" row has the time of only the backward pass, and the memory of forward and backward together.

        `.attrs`: "machine", and "interrupted". The latter is True after a KeyboardInterrupt. It is also True, with a
        warning, after an error that makes the GPU useless to this process. Points that were not reached then have rows
        that say so.

    If an implementation runs out of memory, longer lengths are not tried; their rows have the status oom. In Triton's
    interpreter a row has the status unsupported and no time. It has an error if that is cheap to compute.

    Raises:
        ValueError: an unknown implementation or pass, no length, or a number below 1.
    """
    functions = chosen(impls)
    points = plan(
        functions, seqlens, head_dims=(head_dim,), dtypes=None if dtype is None else (dtype,), causal=(causal,),
        passes=passes, batches=(batch,), tokens=tokens, heads=heads,
    )  # fmt: skip
    rows: dict[Point, dict] = {}
    interrupted = False
    with progress_bar(pending(points, rows, rounds), progress) as bar:
        steps = measure_rounds(
            points, functions, rows, rounds=rounds, seconds_per_point=seconds_per_point, warm_up=warm_up,
            error_seconds=error_seconds, describe=bar.set_description_str,
        )  # fmt: skip
        try:
            for done in steps:
                bar.update(done)
        except KeyboardInterrupt:
            interrupted = True
            bar.write(f"Interrupted: {len(rows)} of {len(points)} points were reached. Run this cell again for all of "
                      "them.", file=sys.stdout)  # fmt: skip
        except DeviceLost as lost:
            interrupted = True
            warnings.warn(
                f"{lost}: restart it (in Jupyter, the kernel), and leave that point out or mend it",
                RuntimeWarning,
                stacklevel=2,
            )
    table = as_table({point: rows.get(point, NOT_REACHED) for point in points})
    table.attrs.update(machine=runtime.machine, interrupted=interrupted)
    return table


def progress_bar(total: int, shown: bool = True) -> tqdm:
    """A progress bar on stdout. It is redrawn only when its description changes, once for each point."""
    from tqdm import tqdm

    return tqdm(total=total, file=sys.stdout, disable=not shown, ncols=90, mininterval=3600)

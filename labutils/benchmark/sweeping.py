"""Sweeps: every implementation at every shape, in rounds, with a row for each point whatever becomes of it."""

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
        impls: names; they are not looked up here.
        seqlens: N = N_q = N_k, measured in ascending order.
        head_dims: D.
        dtypes: `runtime.dtype` where not given.
        causal: False, True or both.
        passes: "fwd", "bwd" or both.
        batches: B.
        tokens: keeps B * N at this number: B is tokens // N, at least 1, and `batches` is not used.
        heads: H; 4 on a CPU, 16 on a GPU where neither this nor `hidden` is given.
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
    """Measures the points that `rows` lacks, and puts their rows there, after each step of the way.

    Each round goes through all points before the next begins, so that the rounds of one point lie as far apart as the
    sweep allows: what changes slowly, such as a GPU's temperature and with it its clock, shows as spread.

    Args:
        points: of `plan`.
        implementations: a function for each name among the points.
        rows: filled here; what it holds already is not measured again, except for rounds that are missing.
        rounds: 1 or more.
        seconds_per_point: of recorded repeats of a point, over all rounds.
        warm_up: seconds before the repeats, in each round (see `measuring.time_call`).
        error_seconds: as for `sweep`.
        describe: told what is being measured.

    Yields:
        How many of `pending(points, rows, rounds)` are done with the row that was written last.

    Raises:
        ValueError: less than one round.
        DeviceLost: the GPU computes nothing more in this process. The point that was being measured has its row.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: it must be 1 or more.")
    oracle_seconds: dict[tuple, float] = {}  # what is left of the oracle's patience, for each dtype, D and mask
    for number in range(rounds):
        exhausted: dict[tuple, list[Point]] = {}  # what has run out of memory, by all but batch and length
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
                    except DeviceLost as lost:  # whatever came next would fail, and be blamed for it
                        assert lost.row is not None  # `attempt` says what became of the point
                        rows[point] = _merged(point, before, lost.row)
                        yield rounds - number  # for whoever writes rows down: this one is written, too
                        raise _stopped(f"at {point.impl} {point.which} N={n:,}", lost) from lost
                rows[point] = _merged(point, before, found)
                if found["status"] == "oom":
                    _note_exhausted(exhausted, point)
                yield rounds - number if found["status"] != "ok" else 1
            if oracle.gave_up:  # longer lengths cost more
                oracle_seconds[kind] = 0.0
            del tensors, oracle  # before the next, longer ones are made


def _stopped(where: str, lost: DeviceLost | str) -> DeviceLost:
    what = str(lost).rstrip(".")
    return DeviceLost(
        f"the sweep stopped {where}: {what}. After such an error a process computes nothing more on the GPU"
    )


def pending(points: Iterable[Point], rows: Mapping[Point, Mapping], rounds: int) -> int:
    """How many rounds of points `measure_rounds` has before it."""
    return sum(_lacks(rows.get(point), number) for point in points for number in range(rounds))


def _lacks(row: Mapping | None, number: int) -> bool:
    """Whether a point still needs its round of that number; one that failed needs no more."""
    return row is None or (row["status"] == "ok" and len(_rounds(row)) <= number)


def _rounds(row: Mapping) -> list[float]:
    """Median of each round; a table from before there were rounds has one."""
    text = row.get("rounds_ms") or ""
    return [float(part) for part in str(text).split(";") if part] or [row["ms"]]


def _note_exhausted(exhausted: dict[tuple, list[Point]], point: Point) -> None:
    exhausted.setdefault(point.but_size(), []).append(point)
    if point.which == "fwd":  # the backward pass needs what the forward one needs, and more
        exhausted.setdefault(point.but_size(which="bwd"), []).append(point)


def _needs_no_more(failed: Point, point: Point) -> bool:
    """Whether memory for `point`, be it as B * N or as B * N², is at least what there was not for `failed`."""
    return failed.seqlen <= point.seqlen and failed.batch * failed.seqlen <= point.batch * point.seqlen


def _merged(point: Point, before: Mapping | None, found: Mapping) -> dict:
    """The row of a point after one more round."""
    if found["status"] != "ok":
        return {"overhead_bound": None, "rounds_ms": "", **found}
    medians = [*([] if before is None else _rounds(before)), found["ms"]]
    ms = statistics.median(medians)
    # The middle half of the repeats says how far calls in a row differ; the rounds, how far minutes apart differ.
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
    """q, k, v and dout: the same numbers for every implementation, and no effect on PyTorch's global generator."""
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
        batch, heads, head_dim: B, H (4 on a CPU, 16 on a GPU where not given) and D.
        dtype: `runtime.dtype` where not given.
        causal: lower-triangular mask.
        passes: "fwd", "bwd" or both.
        tokens: keeps B * N at this number: the batch of each point is tokens // N, at least 1, and `batch` is not used.
        seconds_per_point: time spent on the repeats of one point.
        warm_up: seconds before the repeats, in each round (see `measuring.time_call`).
        error_seconds: what the float64 oracle may take for one length; where it takes longer `max_error` is NaN.
        rounds: how often the whole sweep is gone through; `seconds_per_point` is shared among the rounds.
        progress: a progress bar on stdout.

    Returns:
        One row for each length, implementation and pass, with `COLUMNS`: `ms` (median of the rounds' medians) and
        `spread_ms` (interquartile range of a round's repeats, the largest, and what the rounds' medians range over on
        top); `tflops` (TFLOP/s by the convention of `attention_flops`); `peak_mib` over the inputs; `max_error`, the
        largest absolute difference from `reference.exact_attention` (of dq, dk and dv in the backward pass); `status`
        ok, oom or unsupported, and the `reason`; `overhead_bound`, whether the time is that of launching (see
        `measuring.overhead_bound`); `rounds_ms`, the medians of the rounds, separated by semicolons. What was not
        measured is NaN.
        A "bwd" row times the backward pass alone; its `peak_mib` is that of forward and backward together.
        `.attrs`: "machine" and "interrupted" (True after a KeyboardInterrupt, or, with a warning, after an error that
        leaves the GPU without use to this process: points that were not reached are then rows that say so, and what
        reads the table finds all that it looks for).

    Once an implementation has run out of memory, longer lengths are rows with status oom that were not tried.
    What runs in Triton's interpreter gets status unsupported and no time, and its error where that is cheap.

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
    """The bar of a sweep, on stdout. Its description is what redraws it, once for each point: it names the point."""
    from tqdm import tqdm

    return tqdm(total=total, file=sys.stdout, disable=not shown, ncols=90, mininterval=3600)

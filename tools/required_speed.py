"""The requirements on the kernels' speed: what must be measured, and how the measurements are judged.

A sweep measures `points`, by `sweeping.measure_rounds`. `feature_costs` and `host_times` measure the rest. `assess`
judges tables from anywhere, so also stored ones.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pandas as pd
import torch

from labutils.attention import interface
from labutils.attention.backends import IMPLEMENTATIONS, Attention, Unsupported
from labutils.benchmark.points import Point
from labutils.benchmark.sweeping import plan
from labutils.benchmark.timing import Timing, time_call, time_issuing
from labutils.machine import runtime

# Limits on ratios of times
SPEEDUP = 1.5  # at least: over FlashAttention-2, the geometric mean; no point may be slower
BFLOAT16 = 1.05  # at most: bfloat16 over float16
ODD_LENGTH = 1.10  # at most: N = 4,095 over 4,096, for the same work
WITHOUT = 1.02  # at most: features switched off, over kernels without them
HOST = 1.5  # at most: host time of a call, over that of PyTorch's attention

# The grid
OURS, FA2, GQA = "triton_v2", ("sdpa_flash", "flash_attn"), "triton_v2_gqa8"
HEAD_DIMS, LENGTHS, TOKENS, HIDDEN = (64, 128), (1024, 4096, 16384), 16384, 2048
ODD, EVEN = 4095, 4096  # no multiple of a block, and its neighbour
GROUP = 8  # query heads that share a key head
PASSES = {"fwd": "forward", "bwd": "backward"}


# ------------------------------------------------------------------------------------------------------------
# What is measured
# ------------------------------------------------------------------------------------------------------------


def points() -> list[Point]:
    """All points that the requirements need. Points that are compared stand next to each other."""
    shared: dict[str, Any] = dict(head_dims=HEAD_DIMS, causal=(False, True), tokens=TOKENS, hidden=HIDDEN)
    half, both = [torch.float16], ("fwd", "bwd")
    found = [
        *plan((OURS, *FA2), LENGTHS, dtypes=half, passes=both, **shared),
        *plan((OURS,), LENGTHS, dtypes=[torch.bfloat16], passes=both, **shared),
        *plan((OURS,), (ODD,), dtypes=half, passes=both, **shared),
        *plan((GQA,), LENGTHS, dtypes=half, **shared),
    ]
    return sorted(found, key=lambda point: (point.head_dim, point.causal, point.seqlen, point.dtype))


@lru_cache(maxsize=2)  # of keys and of values: kept, so that the copies are not timed
def _every_eighth_head(t: torch.Tensor) -> torch.Tensor:
    return t[:, :, ::GROUP].contiguous()


def _grouped(q, k, v, *, causal=False, softmax_scale=None):
    k, v = _every_eighth_head(k), _every_eighth_head(v)
    return interface.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)


def implementations() -> dict[str, Attention]:
    """`IMPLEMENTATIONS`, and "triton_v2_gqa8": ours with eight query heads for each key head, only for the forward."""
    return {**IMPLEMENTATIONS, GQA: _grouped}


FEATURE_COLUMNS = ("pass", "head_dim", "causal", "with_ms", "without_ms", "spread")


def feature_costs(*, rounds: int = 3, seconds: float = 0.1) -> Iterator[dict[str, Any]]:
    """Times our kernels with all features off against kernels without features (`without_features`), in turn.

    Args:
        rounds: of both, in turn.
        seconds: of recorded repeats of one, in a round.

    Yields:
        A row for each pass, head dimension and mask, with `FEATURE_COLUMNS`; N = 4,096, fp16, B * N = 16,384. `spread`
        is relative: the largest interquartile range, plus the range of the rounds' ratios.

    Raises:
        Unsupported: there is no GPU.
    """
    if runtime.device.type != "cuda":
        raise Unsupported("kernels are timed only on a GPU: in the interpreter a time means nothing.")
    import without_features
    from labutils.attention.kernels import flash_v2, flash_v2_backward
    from labutils.attention.kernels.options import Options

    for d in HEAD_DIMS:
        shape = (TOKENS // EVEN, EVEN, HIDDEN // d, d)
        generator = torch.Generator(runtime.device).manual_seed(0)
        q, k, v, dout = (
            torch.randn(shape, generator=generator, device=runtime.device, dtype=torch.float16) for _ in range(4)
        )
        for causal in (False, True):
            options = Options(d**-0.5, window_right=0 if causal else None)
            out, lse = flash_v2.forward(q, k, v, options)

            def forward(q=q, k=k, v=v, options=options):
                return flash_v2.forward(q, k, v, options)

            def backward(q=q, k=k, v=v, dout=dout, out=out, lse=lse, options=options):
                return flash_v2_backward.backward(dout, q, k, v, out, lse, options)

            calls: dict[str, Callable[[], Any]] = {"fwd": forward, "bwd": backward}
            for which, call in calls.items():
                kernels: tuple[Callable[[], Any], ...] = (contextlib.nullcontext, without_features.plain_kernels)
                timed: tuple[list[Timing], list[Timing]] = ([], [])
                # Round -1 compiles: a GPU that waits for a compiler cools, and its clock rises. The two kernels take
                # turns at being the first of a round.
                for number in range(-1, rounds):
                    for one in (0, 1) if number % 2 else (1, 0):
                        with kernels[one]():
                            if number < 0:
                                call()
                            else:
                                timed[one].append(time_call(call, seconds=seconds))
                yield feature_row(which, d, causal, *timed)


def feature_row(which: str, head_dim: int, causal: bool, ours: Sequence[Timing], plain: Sequence[Timing]) -> dict:
    """The row of `feature_costs` for a pass, a D and a mask, from the timings of each round."""
    ratios = [one.median_ms / other.median_ms for one, other in zip(ours, plain, strict=True)]
    within = max(timing.spread_ms / timing.median_ms for timing in (*ours, *plain))
    medians = [statistics.median(timing.median_ms for timing in timings) for timings in (ours, plain)]
    return dict(zip(FEATURE_COLUMNS, (which, head_dim, causal, *medians, within + max(ratios) - min(ratios))))


HOST_COLUMNS = ("head_dim", "causal", "ours_us", "sdpa_us")


def host_times(*, calls: int = 2000) -> list[dict[str, Any]]:
    """Host time of a forward call of `flash_attn_func`, and of PyTorch's attention with its flash backend.

    Host time is how long a call takes to return while the GPU works on (`benchmark.time_issuing`). Both get the same
    q, k and v in fp16, (B, N, H, D) for ours and (B, H, N, D) for PyTorch's, each contiguous. The context that chooses
    the backend is entered once, around all calls.

    Args:
        calls: how often each of the two is called at each point.

    Returns:
        A row for each head dimension and mask, with `HOST_COLUMNS`, medians in microseconds; (B, N, H) = (1, 256, 8).

    Raises:
        Unsupported: there is no GPU.
    """
    if runtime.device.type != "cuda":
        raise Unsupported("host time is measured while a GPU works, and this machine has none.")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for d in HEAD_DIMS:
            q, k, v = torch.randn(3, 1, 256, 8, d, device=runtime.device, dtype=torch.float16).unbind()
            theirs = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
            for causal in (False, True):

                def ours(q=q, k=k, v=v, causal=causal):
                    return interface.flash_attn_func(q, k, v, causal=causal)

                def sdpa(qkv=theirs, causal=causal):
                    return torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=causal)

                # A core's clock rises and falls, so both take turns: two halves each.
                found = [[time_issuing(call, calls=calls // 2) for call in (ours, sdpa)] for _ in range(2)]
                rows.append(dict(zip(HOST_COLUMNS, (d, causal, *(sum(pair) / 2 for pair in zip(*found))))))
    return rows


# ------------------------------------------------------------------------------------------------------------
# What is required
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One requirement, and whether it is met.

    Attributes:
        what: the quantity. required, measured: in words, with the numbers.
        met: None if it could not be judged; `measured` then says why.
        optional: whether all together may pass without this one.
    """

    what: str
    required: str
    measured: str
    met: bool | None
    optional: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields in JSON's types."""
        return asdict(self)


def passed(findings: Iterable[Finding]) -> bool:
    """Whether all are met. An optional one need not have been measured; if it was, it must be met, too."""
    return all(finding.met or (finding.met is None and finding.optional) for finding in findings)


_PLACE = ["head_dim", "causal", "seqlen"]
_MISSING = "not measured"


def _pairs(one: pd.DataFrame, other: pd.DataFrame, on: Sequence[str], wanted: int) -> pd.DataFrame | str:
    """Times of two tables side by side, `ms_1` and `ms_2`, or a text that says how many `wanted` points are missing."""
    columns = [*on, "ms", "spread_ms", "seqlen", "batch"]
    both = one[list(dict.fromkeys(columns))].merge(
        other[list(dict.fromkeys(columns))], on=list(on), suffixes=("_1", "_2"), validate="one_to_one"
    )
    both = both[both["ms_1"].notna() & both["ms_2"].notna()]
    return both if len(both) == wanted else f"{_MISSING}: {len(both)} of {wanted} pairs of points are there"


def _at(row: Any) -> str:
    length = getattr(row, "seqlen", None) or getattr(row, "seqlen_1", None)
    return f"D {row.head_dim}, {'causal' if row.causal else 'full'}, N {length:,}"


def _geomean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def assess(
    table: pd.DataFrame,
    features: pd.DataFrame | None = None,
    host: pd.DataFrame | None = None,
) -> list[Finding]:
    """Judges every requirement.

    Args:
        table: an attention table, with the columns `benchmark.COLUMNS`. Rows that are not among `points` are left out.
        features: rows of `feature_costs`. host: rows of `host_times`. None if they were not measured.

    Raises:
        ValueError: the table has a point twice.
    """
    table = table[(table["batch"] == TOKENS // table["seqlen"]) & (table["heads"] * table["head_dim"] == HIDDEN)]
    table = table[table["head_dim"].isin(HEAD_DIMS)]
    grid = table[table["seqlen"].isin(LENGTHS)]
    half = grid[grid["dtype"] == "float16"]

    def rows(of: pd.DataFrame, impl: str, which: str) -> pd.DataFrame:
        chosen = of[(of["impl"] == impl) & (of["pass"] == which)]
        if chosen.duplicated([*_PLACE, "dtype"]).any():
            raise ValueError(f"{impl}, {which}: a point is there twice; judge one run at a time.")
        return chosen

    whole = len(HEAD_DIMS) * len(LENGTHS) * 2
    findings = []
    for peer in FA2:
        for which, name in PASSES.items():
            pairs = _pairs(rows(half, OURS, which), rows(half, peer, which), _PLACE, whole)
            findings += _faster(f"{name} over {peer}", pairs, optional=peer == "flash_attn")
    for which, name in PASSES.items():
        brain = grid[grid["dtype"] == "bfloat16"]
        pairs = _pairs(rows(brain, OURS, which), rows(half, OURS, which), _PLACE, whole)
        findings.append(_slower(f"{name} in bf16 beside fp16", BFLOAT16, pairs))
    pairs = _pairs(rows(half, GQA, "fwd"), rows(half, OURS, "fwd"), _PLACE, whole)
    findings.append(_slower(f"forward with {GROUP} query heads a key head, beside one", 1.0, pairs, spread=True))
    for which, name in PASSES.items():
        odd = table[(table["dtype"] == "float16") & (table["seqlen"] == ODD)]
        even = half[half["seqlen"] == EVEN]
        pairs = _pairs(rows(odd, OURS, which), rows(even, OURS, which), ["head_dim", "causal"], 2 * len(HEAD_DIMS))
        if not isinstance(pairs, str):  # for the same work: the batches hold almost as many scores, not quite
            work = (pairs["batch_2"] * pairs["seqlen_2"] ** 2) / (pairs["batch_1"] * pairs["seqlen_1"] ** 2)
            pairs = pairs.assign(ms_1=pairs["ms_1"] * work)
        findings.append(_slower(f"{name} at N = {ODD:,}, beside {EVEN:,}", ODD_LENGTH, pairs))
    findings += [_features(features), _host(host)]
    return findings


def _faster(what: str, pairs: pd.DataFrame | str, *, optional: bool) -> list[Finding]:
    """Judges how much longer the second takes: in the geometric mean, and at the worst point."""
    mean_of, least_of = f"{what}, geometric mean", f"{what}, every point"
    required = f"{SPEEDUP:.2f} x"
    if isinstance(pairs, str):
        return [
            Finding(mean_of, required, pairs, None, optional),
            Finding(least_of, "not slower", pairs, None, optional),
        ]
    ratios = pairs["ms_2"] / pairs["ms_1"]
    worst = next(pairs.loc[[ratios.idxmin()]].itertuples())
    mean, least = _geomean(ratios), ratios.min()
    return [
        Finding(mean_of, required, f"{mean:.3f} x", bool(mean >= SPEEDUP), optional),
        Finding(least_of, "not slower", f"{least:.3f} x at {_at(worst)}", bool(least >= 1), optional),
    ]


def _slower(what: str, limit: float, pairs: pd.DataFrame | str, *, spread: bool = False) -> Finding:
    """Judges how much longer the first takes at the worst point. `spread` also allows the spread of both."""
    required = f"at most {limit:.2f} x the time" + (", or within the spread" if spread else "")
    if isinstance(pairs, str):
        return Finding(what, required, pairs, None)
    ratios = pairs["ms_1"] / pairs["ms_2"]
    allowed = pd.Series(limit, index=pairs.index)
    if spread:
        allowed += pairs["spread_ms_1"] / pairs["ms_1"] + pairs["spread_ms_2"] / pairs["ms_2"]
    at = (ratios / allowed).idxmax()
    worst = next(pairs.loc[[at]].itertuples())
    share = f" (spread {allowed[at] - limit:.3f})" if spread else ""
    measured = f"{ratios[at]:.3f} x at {_at(worst)}{share}; geometric mean {_geomean(ratios):.3f} x"
    return Finding(what, required, measured, bool((ratios <= allowed).all()))


def _features(features: pd.DataFrame | None) -> Finding:
    what, required = "features switched off, beside kernels without them", f"at most {WITHOUT:.2f} x the time"
    wanted = 4 * len(HEAD_DIMS)
    if features is None or len(features) != wanted:
        return Finding(what, required, f"{_MISSING}: {0 if features is None else len(features)} of {wanted} rows", None)
    ratios = features["with_ms"] / features["without_ms"]
    worst = features.loc[ratios.idxmax()]
    mask = "causal" if worst["causal"] else "full"
    measured = f"{ratios.max():.3f} x at {worst['pass']}, D {worst['head_dim']}, {mask} (spread {worst['spread']:.3f})"
    return Finding(what, required, measured, bool(ratios.max() <= WITHOUT))


def _host(host: pd.DataFrame | None) -> Finding:
    what, required = "host time of a forward call, beside PyTorch's attention", f"at most {HOST:.1f} x"
    wanted = 2 * len(HEAD_DIMS)
    if host is None or len(host) != wanted:
        return Finding(what, required, f"{_MISSING}: {0 if host is None else len(host)} of {wanted} rows", None)
    ratios = host["ours_us"] / host["sdpa_us"]
    worst = host.loc[ratios.idxmax()]
    measured = f"{ratios.max():.2f} x: {worst['ours_us']:.1f} and {worst['sdpa_us']:.1f} us at D {worst['head_dim']}"
    return Finding(what, required, measured, bool(ratios.max() <= HOST))


def as_text(findings: Sequence[Finding]) -> str:
    """The findings as a table in text."""
    word = {True: "met", False: "NOT MET", None: "not measured"}
    wide = max(len(finding.what) for finding in findings)
    broad = max(len(finding.required) for finding in findings)
    lines = [f"{'':<13}{'':<{wide}}  {'required':<{broad}}  measured"]
    for f in findings:
        measured = f.measured.removeprefix(f"{_MISSING}: ") if f.met is None else f.measured
        optional = " (optional)" if f.met is None and f.optional else ""
        lines.append(f"{word[f.met]:<13}{f.what:<{wide}}  {f.required:<{broad}}  {measured}{optional}")
    return "\n".join(lines)


def as_json(
    findings: Sequence[Finding], tables: Mapping[str, pd.DataFrame | None], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Environment, findings and the rows of each table in JSON's types. A missing table is null."""
    return {
        "environment": dict(environment),
        "passed": passed(findings),
        "targets": [finding.as_dict() for finding in findings],
        **{name: None if df is None else df.to_dict("records") for name, df in tables.items()},
    }

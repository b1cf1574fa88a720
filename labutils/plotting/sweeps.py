"""Figures of sweeps: time, throughput, peak memory and error over the sequence length."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labutils.plotting.style import LABELS, RED, WIDTH, footnote, legend_above, length_axis, look_of, machine_of, styled

_QUANTITIES = {  # column -> axis, what to see
    "ms": ("time (ms)", "Time"),
    "tflops": ("TFLOP/s", "Throughput"),
    "peak_mib": ("peak memory over the inputs (MiB)", "Peak memory"),
    "max_error": ("max |out − exact|", "Largest error"),
}


def _of_pass(df: pd.DataFrame, which: str) -> pd.DataFrame:
    rows = df[df["pass"] == which]
    if rows.empty:
        raise ValueError(f"the table has no rows with pass {which!r}; it has {sorted(set(df['pass']))}.")
    twice = rows[rows.duplicated(["impl", "seqlen"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"{first['impl']} stands more than once at N = {first['seqlen']:,}: choose one dtype, head_dim, "
            "causal, batch and heads before drawing."
        )
    return rows


def _like(reference: pd.DataFrame, df: pd.DataFrame) -> pd.DataFrame:
    """The rows of a stored table at the head dimension and mask of the measured one."""
    head_dim, causal = df["head_dim"].iloc[0], df["causal"].iloc[0]
    rows = reference[(reference["head_dim"] == head_dim) & (reference["causal"] == causal)]
    if rows.empty:
        raise ValueError(f"the reference has no rows with head_dim {head_dim} and causal {causal}.")
    return rows


_RING = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 12,
    "markerfacecolor": "none",
    "markeredgecolor": RED,
    "markeredgewidth": 1.3,
    "label": "bound by launch overhead",
}


def _overhead_bound(df: pd.DataFrame) -> pd.Series:
    """Which rows the host's launching bounds; none of a table that does not say."""
    if "overhead_bound" not in df:
        return pd.Series(False, index=df.index)
    return df["overhead_bound"].map(lambda value: str(value) == "True").astype(bool)


def _draw_quantity(ax: Axes, df: pd.DataFrame, column: str, which: str, reference: pd.DataFrame | None) -> None:
    """Lines over N, one for each implementation."""
    rows = _of_pass(df, which)
    lengths = list(rows["seqlen"])
    out_of_memory: dict[int, list[str]] = {}  # first length that failed -> labels
    ringed: list[pd.DataFrame] = []  # drawn last: over the lines, and last in the legend
    for i, (name, group) in enumerate(rows.groupby("impl", sort=False)):
        group = group.sort_values("seqlen")
        good = group[group[column].notna()]
        look = look_of(name, i)
        if len(good):
            ax.plot(good["seqlen"], good[column], **look)
            if column == "ms" and "spread_ms" in good:
                half = good["spread_ms"] / 2
                low = (good["ms"] - half).clip(lower=good["ms"] / 2)  # a bar to zero has no place on this axis
                ax.fill_between(good["seqlen"], low, good["ms"] + half, color=look["color"], alpha=0.15, linewidth=0)
            bound = good[_overhead_bound(good)] if column in ("ms", "tflops") else good[:0]
            if len(bound):
                ringed.append(bound)
        failed = group[group["status"] == "oom"]
        if len(failed) and column != "max_error":
            out_of_memory.setdefault(failed["seqlen"].iloc[0], []).append(look["label"])
    if reference is not None:
        stored = _of_pass(_like(reference, df), which)
        stored = stored[stored["impl"].isin(set(rows["impl"])) & stored[column].notna()]
        lengths += list(stored["seqlen"])
        for i, (name, group) in enumerate(stored.groupby("impl", sort=False)):
            look = look_of(name, i) | {"linestyle": "--", "markerfacecolor": "white", "linewidth": 1.2}
            look["markeredgecolor"] = look["color"]
            look["label"] = f"{look['label']}, {machine_of(reference)} (stored)"
            group = group.sort_values("seqlen")
            ax.plot(group["seqlen"], group[column], **look)
    for bound in ringed:
        ax.plot(bound["seqlen"], bound[column], **_RING)
    over_axis = ax.get_xaxis_transform()
    # One line of text for each length, the longest on top: neighbours on the axis are narrower than their texts.
    for line, (n, labels) in enumerate(sorted(out_of_memory.items(), reverse=True)):
        height = 0.95 - 0.07 * line
        cross = {"marker": "x", "markersize": 8, "markeredgewidth": 2.2, "color": RED, "linestyle": "none"}
        ax.plot([n], [height], **cross, transform=over_axis, clip_on=False)
        ax.annotate(
            f"out of memory: {', '.join(labels)}",
            (n, height),
            xycoords=over_axis,
            fontsize=8,
            ha="right",
            va="center",
            xytext=(-8, 0),
            textcoords="offset points",
        )
    length_axis(ax, lengths)
    ax.set_ylabel(_QUANTITIES[column][0])
    if column == "tflops":
        ax.set_ylim(0, ax.get_ylim()[1] * (1.05 + 0.1 * len(out_of_memory)))
    else:
        ax.set_yscale("log")
        ax.margins(y=0.08)
        if out_of_memory:  # room for the crosses, above the lines alone
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** (0.12 + 0.1 * len(out_of_memory)))


def _shape(df: pd.DataFrame) -> str:
    """ "float16, B = 1, H = 4, D = 64, causal": what a table was measured with."""
    first = df.iloc[0]
    tokens = set(df["batch"] * df["seqlen"])
    batch = f"B = {first['batch']}" if df["batch"].nunique() == 1 else f"B·N = {max(tokens):,}"
    mask = ", causal" if first["causal"] else ""
    return f"{first['dtype']}, {batch}, H = {first['heads']}, D = {first['head_dim']}{mask}"


def _sweep_notes(df: pd.DataFrame, which: str, reference: pd.DataFrame | None, columns: Sequence[str]) -> str:
    notes = [f"{machine_of(df)}: {_shape(df)}."]
    rows = _of_pass(df, which)
    reasons: dict[str, list[str]] = {}
    for name, group in rows[rows["status"] == "unsupported"].groupby("impl", sort=False):
        reason = str(group["reason"].iloc[0]) if "reason" in group else "unsupported"
        reasons.setdefault(textwrap.shorten(reason, 90, placeholder=" …"), []).append(LABELS.get(name, name))
    if any(c != "max_error" for c in columns):
        notes += [f"Not timed: {', '.join(names)} ({reason.rstrip('.')})." for reason, names in reasons.items()]
    if "ms" in columns and "spread_ms" in rows:
        several = "rounds_ms" in rows and rows["rounds_ms"].astype(str).str.contains(";").any()
        between = " and what the rounds differ by" if several else ""
        notes.append(f"Bands: the middle half of the repeats{between}.")
    if reference is not None:
        stored = _of_pass(_like(reference, df), which)
        notes.append(f"Dashed: stored results of {machine_of(reference)}, {_shape(stored)}.")
    return " ".join(notes)


def _slope_guides(ax: Axes, df: pd.DataFrame, which: str) -> None:
    """Dotted lines that grow with N and with N², below the data, to compare slopes with.

    Where B·N is constant, the batch shrinks as N grows: what a sequence needs grows by one power of N more.
    """
    rows = _of_pass(df, which)
    rows = rows[rows["peak_mib"].notna()]
    first, last = rows["seqlen"].min(), rows["seqlen"].max()
    if not first < last:
        return
    at = rows[rows["seqlen"] == first]["peak_mib"].min() * 0.5
    constant = _constant_tokens(rows)
    for power, name in ((1, "∝ N"), (2, "∝ N²")):
        ends = [at, at * (last / first) ** (power - constant)]
        name += " for each sequence" if constant else ""
        above = constant and power == 2  # under the rising line so long a text would cross it
        ax.plot([first, last], ends, linestyle=":", linewidth=1.2, color="#777777")
        ax.annotate(
            name,
            (last, ends[1]),
            fontsize=9,
            color="#555555",
            xytext=(0, 4 if above else -5),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
        )


def _constant_tokens(rows: pd.DataFrame) -> bool:
    return rows["batch"].nunique() > 1 and (rows["batch"] * rows["seqlen"]).nunique() == 1


def _pass_name(which: str) -> str:
    return {"fwd": "forward pass", "bwd": "backward pass"}[which]


@styled
def plot_time(
    df: pd.DataFrame, reference: pd.DataFrame | None = None, *, which: str = "fwd", quantity: str = "ms"
) -> Figure:
    """Time, or throughput, over sequence length, of one pass.

    Args:
        df: a table of `benchmark.sweep`, at one dtype and shape.
        reference: a stored table (`benchmark.reference_results`), drawn dashed at the same head dimension and mask.
        which: "fwd" or "bwd".
        quantity: "ms", or "tflops" for throughput.

    Raises:
        ValueError: another quantity, no row of that pass, or several at one length.
    """
    if quantity not in ("ms", "tflops"):
        raise ValueError(f"quantity={quantity!r} is not known: 'ms' or 'tflops'.")
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6))
    _draw_quantity(ax, df, quantity, which, reference)
    ax.set_title(f"{_QUANTITIES[quantity][1]} of the {_pass_name(which)}, {machine_of(df)}")
    legend_above(fig, ax)
    footnote(fig, _sweep_notes(df, which, reference, [quantity]))
    return fig


@styled
def plot_memory(df: pd.DataFrame, reference: pd.DataFrame | None = None, *, which: str = "fwd") -> Figure:
    """Peak memory over sequence length, with the slopes of N and N² beside it. Arguments, errors: as in `plot_time`."""
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6))
    _slope_guides(ax, df, which)
    _draw_quantity(ax, df, "peak_mib", which, reference)
    asked = "who needs N² for a sequence?" if _constant_tokens(df) else "which curve is steeper than N?"
    ax.set_title(f"Peak memory, {_pass_name(which)}: {asked} {machine_of(df)}")
    legend_above(fig, ax)
    footnote(fig, _sweep_notes(df, which, reference, ["peak_mib"]))
    return fig


@styled
def plot_error(df: pd.DataFrame, *, which: str = "fwd") -> Figure:
    """Largest absolute difference from exact attention over sequence length. Arguments, errors: as in `plot_time`."""
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6))
    _draw_quantity(ax, df, "max_error", which, None)
    ax.set_title(f"Rounding error against float64, {_pass_name(which)}, {machine_of(df)}")
    legend_above(fig, ax)
    footnote(fig, _sweep_notes(df, which, None, ["max_error"]))
    return fig

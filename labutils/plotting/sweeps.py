"""Figures over the sequence length: time, throughput, peak memory and error, of attention and of whole models."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from labutils.plotting.style import (
    LABELS,
    RED,
    VERMILLION,
    WIDE,
    WIDTH,
    footnote,
    legend_above,
    length_axis,
    look_of,
    machine_of,
    styled,
)

_ATTENTION_QUANTITIES = {  # column -> label of the axis, first word of the title
    "ms": ("time (ms)", "Time"),
    "tflops": ("TFLOP/s", "Throughput"),
    "peak_mib": ("peak memory over the inputs (MiB)", "Peak memory"),
    "max_error": ("max |out − exact|", "Largest error"),
}


def _of_pass(df: pd.DataFrame, which: str) -> pd.DataFrame:
    """The rows of a pass; ValueError if there are none, or several of one implementation at one length."""
    rows = df[df["pass"] == which]
    if rows.empty:
        raise ValueError(f"the table has no rows with pass {which!r}; it has {sorted(set(df['pass']))}.")
    twice = rows[rows.duplicated(["impl", "seqlen"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"the table has {first['impl']} more than once at N = {first['seqlen']:,}: choose one dtype, head_dim, "
            "causal, batch and heads before drawing."
        )
    return rows


def _like(reference: pd.DataFrame, df: pd.DataFrame) -> pd.DataFrame:
    """The rows of the stored table `reference` with the head dimension and mask of the measured table `df`."""
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
    """Whether each row only measures the launch overhead of the host; False if the table lacks that column."""
    if "overhead_bound" not in df:
        return pd.Series(False, index=df.index)
    return df["overhead_bound"].map(lambda value: str(value) == "True").astype(bool)


def _draw_quantity(ax: Axes, df: pd.DataFrame, column: str, which: str, reference: pd.DataFrame | None) -> None:
    """Draws a column over N: a line for each implementation, and crosses at lengths that ran out of memory."""
    rows = _of_pass(df, which)
    lengths = list(rows["seqlen"])
    out_of_memory: dict[int, list[str]] = {}  # first length that failed -> labels
    ringed: list[pd.DataFrame] = []  # drawn last, above the lines and at the end of the legend
    for i, (name, group) in enumerate(rows.groupby("impl", sort=False)):
        group = group.sort_values("seqlen")
        good = group[group[column].notna()]
        look = look_of(name, i)
        if len(good):
            ax.plot(good["seqlen"], good[column], **look)
            if column == "ms" and "spread_ms" in good:
                half = good["spread_ms"] / 2
                low = (good["ms"] - half).clip(lower=good["ms"] / 2)  # a log axis has no zero
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
    # One line of text for each length, the longest on top: side by side the texts would overlap.
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
    ax.set_ylabel(_ATTENTION_QUANTITIES[column][0])
    if column == "tflops":
        ax.set_ylim(0, ax.get_ylim()[1] * (1.05 + 0.1 * len(out_of_memory)))
    else:
        ax.set_yscale("log")
        ax.margins(y=0.08)
        if out_of_memory:  # room above the lines, for the crosses
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** (0.12 + 0.1 * len(out_of_memory)))


def _shape(df: pd.DataFrame) -> str:
    """ "float16, B = 1, H = 4, D = 64, causal": the shape and dtype of a table."""
    first = df.iloc[0]
    tokens = set(df["batch"] * df["seqlen"])
    batch = f"B = {first['batch']}" if df["batch"].nunique() == 1 else f"B·N = {max(tokens):,}"
    mask = ", causal" if first["causal"] else ""
    return f"{first['dtype']}, {batch}, H = {first['heads']}, D = {first['head_dim']}{mask}"


def _sweep_notes(df: pd.DataFrame, which: str, reference: pd.DataFrame | None, columns: Sequence[str]) -> str:
    """The footnote: what was measured where, what is missing and why, and what bands and dashes mean."""
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
    """Draws dotted lines that grow with N and with N², below the data, to compare slopes with.

    If B·N is constant, the batch shrinks as N grows. The memory of one sequence then grows by one more power of N than
    the memory of the batch.
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
        above = constant and power == 2  # a text this long would cross the rising line if it stood below
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
    """Draws time or throughput of one pass over the sequence length.

    Args:
        df: the table that `benchmark.sweep` returns, of one dtype and shape.
        reference: a stored table, see `benchmark.reference_results`. Its rows with the same head dimension and mask are
            drawn dashed.
        which: the pass, "fwd" or "bwd".
        quantity: "ms", or "tflops" for throughput.

    Raises:
        ValueError: another quantity; no row of that pass; several rows of one implementation at one length; no row of
            `reference` with that head dimension and mask.
    """
    if quantity not in ("ms", "tflops"):
        raise ValueError(f"quantity={quantity!r} is not known: 'ms' or 'tflops'.")
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6))
    _draw_quantity(ax, df, quantity, which, reference)
    ax.set_title(f"{_ATTENTION_QUANTITIES[quantity][1]} of the {_pass_name(which)}, {machine_of(df)}")
    legend_above(fig, ax)
    footnote(fig, _sweep_notes(df, which, reference, [quantity]))
    return fig


@styled
def plot_memory(df: pd.DataFrame, reference: pd.DataFrame | None = None, *, which: str = "fwd") -> Figure:
    """Draws peak memory over the sequence length, above the slopes of N and N²; arguments and errors of `plot_time`."""
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
    """Draws the largest error against exact attention over the sequence length; arguments and errors of `plot_time`."""
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6))
    _draw_quantity(ax, df, "max_error", which, None)
    ax.set_title(f"Rounding error against float64, {_pass_name(which)}, {machine_of(df)}")
    legend_above(fig, ax)
    footnote(fig, _sweep_notes(df, which, None, ["max_error"]))
    return fig


_MODEL_QUANTITIES = {  # column -> label of the axis, end of the title
    "ms": ("time (ms)", "lower is better"),
    "tokens_per_s": ("throughput (tokens per second)", "higher is better"),
    "peak_gib": ("peak memory (GiB)", "what it needs"),
    "speedup": ("speed-up (times)", "higher is better"),
}


@styled
def plot_models(table: pd.DataFrame, work: str = "step", quantity: str = "tokens_per_s") -> Figure:
    """Draws a GPT-2 with each attention over the sequence length, a panel for each model and batch size.

    A cross stands at the length at which an attention ran out of memory.

    Args:
        table: the table that `model_benchmark.measure_models` or `benchmark.speedup` returns.
        work: "forward", "backward", "step", "prefill" or "decode".
        quantity: "ms", "tokens_per_s", "peak_gib" or "speedup".

    Raises:
        ValueError: an unknown quantity, or no row of that work.
    """
    if quantity not in _MODEL_QUANTITIES:
        raise ValueError(f"quantity={quantity!r} is not known: {', '.join(_MODEL_QUANTITIES)}.")
    rows = table[table["work"] == work]
    if rows.empty:
        raise ValueError(f"the table has no row of {work!r}; it has {', '.join(sorted(set(table['work'])))}.")
    panels = list(rows.groupby(["model", "batch"], sort=False))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(WIDE, 0.4 + 3.6 * lines), squeeze=False)
    unit, title = _MODEL_QUANTITIES[quantity]
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, ((model, batch), group) in zip(axes.flat, panels, strict=False):
        for i, (name, line) in enumerate(group.groupby("impl", sort=False)):
            look, line = look_of(name, i), line.sort_values("seqlen")
            good = line[line[quantity].notna()]
            if len(good):
                ax.plot(good["seqlen"], good[quantity], **look)
            lost = line[line["status"] == "oom"]
            if len(lost):
                n = lost["seqlen"].iloc[0]
                ax.plot([n], [0.03], marker="X", markersize=10, linestyle="none", transform=ax.get_xaxis_transform(),
                        color=look["color"], markeredgecolor=VERMILLION, label=f"{look['label']}: out of memory",
                        clip_on=False)  # fmt: skip
        length_axis(ax, group["seqlen"])
        if quantity == "ms":
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, ax.get_ylim()[1] * 1.05)  # room for the highest marker
            ax.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")
            )
        ax.set_ylabel(unit)
        ax.set_title(f"{work}, GPT-2 {model}, batch size {batch}: {title}")
    footnote(fig, f"Measured on: {machine_of(table)}.")
    legend_above(fig, *axes.flat[: len(panels)])
    return fig

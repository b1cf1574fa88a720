"""Every figure of the lab. Functions take the tables that the other modules return, and return a matplotlib
Figure.

In a notebook let a call be the last line of its cell: the figure shows itself, once. An implementation has
one colour and one marker in all figures (`COLORS`, `MARKERS`); the markers tell them apart where colours do
not.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from labutils import runtime
from labutils.analysis import Bytes, Ceilings, total_bytes

# Okabe and Ito, "Color Universal Design" (2008); grey added, and darker shades of two of theirs.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#8C8C8C"

COLORS: dict[str, str] = {
    "naive": BLACK,
    "sdpa_math": GREY,
    "sdpa_efficient": YELLOW,
    "sdpa_flash": BLUE,
    "sdpa_cudnn": SKY,
    "flash_attn": GREEN,
    "flex": PURPLE,
    "triton_v1": ORANGE,
    "triton_v2": VERMILLION,
    "tiled_v1": "#8A5F00",
    "tiled_v2": "#7A3300",
    "notebook_v1": "#FFD48A",  # lighter shades of ORANGE and VERMILLION: the kernels that notebook 02 writes
    "notebook_v2": "#F4A582",
    "sdpa": BLUE,
}
"""Colour of each implementation."""

LABELS: dict[str, str] = {
    "naive": "naive",
    "sdpa_math": "SDPA math",
    "sdpa_efficient": "SDPA memory-efficient",
    "sdpa_flash": "SDPA flash",
    "sdpa_cudnn": "SDPA cuDNN",
    "flash_attn": "flash-attn package",
    "flex": "FlexAttention",
    "triton_v1": "our Triton v1",
    "triton_v2": "our Triton v2",
    "tiled_v1": "v1 loops in PyTorch",
    "tiled_v2": "v2 loops in PyTorch",
    "notebook_v1": "v1 of this notebook",
    "notebook_v2": "v2 of this notebook",
    "sdpa": "SDPA",
}
"""What an implementation is called in a legend."""

MARKERS: dict[str, str] = {
    "naive": "o",
    "sdpa_math": "s",
    "sdpa_efficient": "^",
    "sdpa_flash": "D",
    "sdpa_cudnn": "v",
    "flash_attn": "P",
    "flex": "X",
    "triton_v1": "h",
    "triton_v2": "*",
    "tiled_v1": "<",
    "tiled_v2": ">",
    "notebook_v1": "p",
    "notebook_v2": "d",
    "sdpa": "D",
}
"""Marker of each implementation."""

TENSOR_COLORS: dict[str, str] = {
    "q": BLUE,
    "k": GREEN,
    "v": SKY,
    "s": YELLOW,
    "p": ORANGE,
    "o": VERMILLION,
    "l": PURPLE,
    "m": GREY,
    "lse": BLACK,
}
"""Colour of each tensor in a figure of traffic."""

TENSOR_LABELS = {
    "s": "S = QKᵀ",
    "p": "P = softmax(S)",
    "l": "l (row sums)",
    "m": "m (row maxima)",
    "lse": "log-sum-exp",
}

STYLE = {
    "figure.facecolor": "white",  # in a dark JupyterLab a transparent figure would lose its black text
    "savefig.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
}

WIDTH = 7.2  # inches: one panel at the width of a notebook's page
WIDE = 10.5  # two or three panels
_OTHER = (GREEN, PURPLE, ORANGE, SKY, GREY)  # for names that are no implementation
_MARK_OTHER = "dp8H<"


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the lab's style, whatever style the notebook has set, and lets pyplot forget the figure.

    Jupyter shows what pyplot still holds at the end of a cell, and the value of the cell's last line too: a
    figure that stayed with pyplot would show twice.
    """

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Figure:
        others = plt.get_fignums()
        with plt.style.context(["default", STYLE]):
            try:
                return draw(*args, **kwargs)
            finally:  # also when it fails: half a figure helps nobody
                for number in set(plt.get_fignums()) - set(others):
                    plt.close(number)

    return wrapped


def _look(name: str, index: int = 0) -> dict[str, Any]:
    """Colour, marker and label of an implementation, or of some other series by its position."""
    color = COLORS.get(name, _OTHER[index % len(_OTHER)])
    look = {
        "color": color,
        "marker": MARKERS.get(name, _MARK_OTHER[index % len(_MARK_OTHER)]),
        "label": LABELS.get(name, name),
        "markeredgecolor": "#333333",
        "markeredgewidth": 0.6,
    }
    if color == YELLOW:  # a thin dark edge: bare yellow is lost on white
        look["path_effects"] = [patheffects.Stroke(linewidth=3.0, foreground="#6B6400"), patheffects.Normal()]
    return look


def _short(n: float) -> str:
    """512 -> "512", 8192 -> "8K", 1048576 -> "1M": sequence lengths on an axis."""
    n = int(n)
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return f"{n:,}"


def _length_axis(ax: Axes, lengths: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _short(n)))
    ax.set_xlabel("sequence length N (tokens)")


def _machine(df: pd.DataFrame) -> str:
    return df.attrs.get("machine") or runtime.machine


def _footnote(fig: Figure, text: str) -> None:
    """Small text under the figure."""
    if text:
        characters = int(fig.get_figwidth() * 15.5)  # of 8 points
        fig.supxlabel("\n".join(textwrap.wrap(text, characters)), fontsize=8, color="#444444", x=0.01, ha="left")


# ------------------------------------------------------------------------------------------------------------
# Sweeps
# ------------------------------------------------------------------------------------------------------------

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
    "markeredgecolor": "#B00020",
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
    for i, (name, group) in enumerate(rows.groupby("impl", sort=False)):
        group = group.sort_values("seqlen")
        good = group[group[column].notna()]
        look = _look(name, i)
        if len(good):
            ax.plot(good["seqlen"], good[column], **look)
            if column == "ms" and "spread_ms" in good:
                half = good["spread_ms"] / 2
                low = (good["ms"] - half).clip(lower=good["ms"] / 2)  # a bar to zero has no place on this axis
                ax.fill_between(good["seqlen"], low, good["ms"] + half, color=look["color"], alpha=0.15, linewidth=0)
            bound = good[_overhead_bound(good)] if column in ("ms", "tflops") else good[:0]
            if len(bound):
                ax.plot(bound["seqlen"], bound[column], **_RING)
        failed = group[group["status"] == "oom"]
        if len(failed) and column != "max_error":
            out_of_memory.setdefault(failed["seqlen"].iloc[0], []).append(look["label"])
    if reference is not None:
        stored = _of_pass(_like(reference, df), which)
        stored = stored[stored["impl"].isin(set(rows["impl"])) & stored[column].notna()]
        lengths += list(stored["seqlen"])
        for i, (name, group) in enumerate(stored.groupby("impl", sort=False)):
            look = _look(name, i) | {"linestyle": "--", "markerfacecolor": "white", "linewidth": 1.2}
            look["markeredgecolor"] = look["color"]
            look["label"] = f"{look['label']}, {_machine(reference)} (stored)"
            group = group.sort_values("seqlen")
            ax.plot(group["seqlen"], group[column], **look)
    over_axis = ax.get_xaxis_transform()
    # One line of text for each length, the longest on top: neighbours on the axis are narrower than their texts.
    for line, (n, labels) in enumerate(sorted(out_of_memory.items(), reverse=True)):
        height = 0.95 - 0.07 * line
        cross = {"marker": "x", "markersize": 8, "markeredgewidth": 2.2, "color": "#B00020", "linestyle": "none"}
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
    _length_axis(ax, lengths)
    ax.set_ylabel(_QUANTITIES[column][0])
    if column == "tflops":
        ax.set_ylim(0, ax.get_ylim()[1] * (1.05 + 0.1 * len(out_of_memory)))
    else:
        ax.set_yscale("log")
        ax.margins(y=0.25 + 0.1 * len(out_of_memory) if out_of_memory else 0.12)


def _legend_above(fig: Figure, *axes: Axes, ncols: int = 3) -> None:
    """One legend for all panels, over them, where it covers no data."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    longest = max(map(len, entries), default=0)
    fitting = int((fig.get_figwidth() + 0.25) // (0.068 * longest + 0.7))  # inches: a character of 9 points, a handle
    ncols = max(1, min(ncols, fitting, len(entries)))
    rows = math.ceil(len(entries) / ncols)
    fig.set_figheight(fig.get_figheight() + 0.19 * max(0, rows - 3))  # the axes keep their size
    fig.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=ncols)


def _shape(df: pd.DataFrame) -> str:
    """ "float16, B = 1, H = 4, D = 64, causal": what a table was measured with."""
    first = df.iloc[0]
    tokens = set(df["batch"] * df["seqlen"])
    batch = f"B = {first['batch']}" if df["batch"].nunique() == 1 else f"B·N = {max(tokens):,}"
    mask = ", causal" if first["causal"] else ""
    return f"{first['dtype']}, {batch}, H = {first['heads']}, D = {first['head_dim']}{mask}"


def _sweep_notes(df: pd.DataFrame, which: str, reference: pd.DataFrame | None, columns: Sequence[str]) -> str:
    notes = [f"{_machine(df)}: {_shape(df)}."]
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
        notes.append(f"Dashed: stored results of {_machine(reference)}, {_shape(stored)}.")
    return " ".join(notes)


def _slope_guides(ax: Axes, df: pd.DataFrame, which: str) -> None:
    """Dotted lines that grow with N and with N², below the data, to compare slopes with."""
    rows = _of_pass(df, which)
    rows = rows[rows["peak_mib"].notna()]
    first, last = rows["seqlen"].min(), rows["seqlen"].max()
    if not first < last:
        return
    at = rows[rows["seqlen"] == first]["peak_mib"].min() * 0.5
    for power, name in ((1, "∝ N"), (2, "∝ N²")):
        ends = [at, at * (last / first) ** power]
        ax.plot([first, last], ends, linestyle=":", linewidth=1.2, color="#777777")
        ax.annotate(
            name,
            (last, ends[1]),
            fontsize=9,
            color="#555555",
            xytext=(0, -5),
            textcoords="offset points",
            ha="right",
            va="top",
        )


def _pass_name(which: str) -> str:
    return {"fwd": "forward pass", "bwd": "backward pass"}[which]


@_figure
def plot_time(
    df: pd.DataFrame, reference: pd.DataFrame | None = None, *, which: str = "fwd", quantity: str = "ms"
) -> Figure:
    """Time over sequence length, of one pass.

    Args:
        df: a table of `benchmark.sweep`, at one dtype and shape.
        reference: a stored table (`benchmark.reference_results`), drawn dashed at the same head dimension and
            mask.
        which: "fwd" or "bwd".
        quantity: "ms", or "tflops" for throughput.

    Raises:
        ValueError: no row of that pass, or several at one length.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6))
    _draw_quantity(ax, df, quantity, which, reference)
    ax.set_title(f"{_QUANTITIES[quantity][1]} of the {_pass_name(which)}, {_machine(df)}")
    _legend_above(fig, ax)
    _footnote(fig, _sweep_notes(df, which, reference, [quantity]))
    return fig


@_figure
def plot_memory(df: pd.DataFrame, reference: pd.DataFrame | None = None, *, which: str = "fwd") -> Figure:
    """Peak memory over sequence length, with the slopes of N and N² beside it. Arguments as in
    `plot_time`."""
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6))
    _slope_guides(ax, df, which)
    _draw_quantity(ax, df, "peak_mib", which, reference)
    ax.set_title(f"Peak memory, {_pass_name(which)}: which curve is steeper than N? {_machine(df)}")
    _legend_above(fig, ax)
    _footnote(fig, _sweep_notes(df, which, reference, ["peak_mib"]))
    return fig


@_figure
def plot_error(df: pd.DataFrame, *, which: str = "fwd") -> Figure:
    """Largest absolute difference from exact attention over sequence length. Arguments as in `plot_time`."""
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6))
    _draw_quantity(ax, df, "max_error", which, None)
    ax.set_title(f"Rounding error against float64, {_pass_name(which)}, {_machine(df)}")
    _legend_above(fig, ax)
    _footnote(fig, _sweep_notes(df, which, None, ["max_error"]))
    return fig


@_figure
def plot_sweep(df: pd.DataFrame, reference: pd.DataFrame | None = None, *, which: str = "fwd") -> Figure:
    """Time, peak memory and error side by side, with one legend. Arguments as in `plot_time`."""
    fig, axes = plt.subplots(1, 3, figsize=(WIDE, 4.4))
    _slope_guides(axes[1], df, which)
    for ax, column in zip(axes, ("ms", "peak_mib", "max_error"), strict=True):
        stored = reference if reference is not None and column in reference and column != "max_error" else None
        _draw_quantity(ax, df, column, which, stored)
        ax.set_title(_QUANTITIES[column][1])
    _legend_above(fig, *axes, ncols=4)
    _footnote(fig, f"{_pass_name(which).capitalize()}. {_sweep_notes(df, which, reference, ['ms', 'peak_mib'])}")
    return fig


# ------------------------------------------------------------------------------------------------------------
# How the algorithm goes
# ------------------------------------------------------------------------------------------------------------


@_figure
def plot_online_softmax(trace: Sequence[Mapping[str, Any]], x: torch.Tensor) -> Figure:
    """The running maximum m and sum l of the online softmax, block after block, under the scores they come
    from.

    Args:
        trace: of `reference.online_softmax_trace(x, block)`.
        x: (N,) scores; of more dimensions the first row is drawn.
    """
    row = x.detach().double().reshape(-1, x.shape[-1])[0].cpu()
    starts = [step["start"] for step in trace]
    stops = [step["stop"] for step in trace]

    def first_row(name: str) -> list[float]:
        return [float(torch.as_tensor(step[name]).reshape(-1)[0]) for step in trace]

    m, l = first_row("m"), first_row("l")
    edges = [s - 0.5 for s in starts] + [stops[-1] - 0.5]
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(WIDTH, 5.2), sharex=True, height_ratios=[3, 2])
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        for ax in (top, bottom):
            if i % 2:
                ax.axvspan(start - 0.5, stop - 0.5, color="#F1F1F1", linewidth=0)
        top.bar(
            range(start, stop), row[start:stop].tolist(), color=SKY, width=0.8, label="score x_j" if i == 0 else None
        )
    top.stairs(m, edges, baseline=None, color=VERMILLION, linewidth=2.2, label="running maximum m")
    top.axhline(0, color="#777777", linewidth=0.8)
    top.set_ylabel("score (no unit)")
    top.set_title("m only rises; l is rescaled by exp(m_old − m_new) whenever it does")
    top.legend(loc="best", framealpha=0.9, frameon=True)
    bottom.stairs(l, edges, baseline=None, color=BLUE, linewidth=2.2, label="running sum l = Σ exp(x_j − m)")
    final = float(torch.exp(row - row.max()).sum())
    bottom.axhline(final, color=BLACK, linestyle=":", label=f"l of the whole row: {final:.2f}")
    for i in range(1, len(trace)):
        if m[i] > m[i - 1]:
            factor = math.exp(m[i - 1] - m[i])
            bottom.axvline(edges[i], color=VERMILLION, linewidth=1, linestyle="--", ymax=0.3)
            bottom.annotate(
                f"old l × {factor:.2g}",
                (edges[i], 0.05),
                xycoords=bottom.get_xaxis_transform(),
                fontsize=8.5,
                color=VERMILLION,
                xytext=(3, 0),
                textcoords="offset points",
            )
    bottom.set_ylim(0, max(*l, final) * 1.35)
    bottom.set_ylabel("l (no unit)")
    bottom.set_xlabel("column j of the row (blocks shaded in turn)")
    bottom.legend(loc="upper left", ncols=2, framealpha=0.9, frameon=True)
    return fig


@_figure
def plot_tile_order(
    n_q: int, n_k: int, block_m: int, block_n: int, order: str = "both", causal: bool = False
) -> Figure:
    """The tiles of the score matrix in the order in which FlashAttention-1 and -2 visit them.

    Args:
        n_q, n_k: N_q and N_k. block_m, block_n: rows and columns of a tile.
        order: "v1" (K/V blocks outside: column by column, by one program), "v2" (Q blocks outside: each row
            of tiles is a program of its own) or "both".
        causal: tiles above the diagonal are left out.

    Raises:
        ValueError: an unknown order.
    """
    if order not in ("v1", "v2", "both"):
        raise ValueError(f"order={order!r} is not known: 'v1', 'v2' or 'both'.")
    orders = ("v1", "v2") if order == "both" else (order,)
    rows, columns = math.ceil(n_q / block_m), math.ceil(n_k / block_n)
    panel = min(5.0, max(3.9, 0.62 * max(rows, columns)))
    fig, axes = plt.subplots(1, len(orders), figsize=(panel * len(orders) + 0.6, panel * 0.86 + 1.4), squeeze=False)
    for ax, version in zip(axes[0], orders, strict=True):
        _draw_tiles(ax, version, n_q, n_k, block_m, block_n, causal)
    return fig


def _draw_tiles(ax: Axes, version: str, n_q: int, n_k: int, block_m: int, block_n: int, causal: bool) -> None:
    rows, columns = math.ceil(n_q / block_m), math.ceil(n_k / block_n)

    def visible(i: int, j: int) -> bool:
        return not causal or j * block_n <= min((i + 1) * block_m, n_q) - 1 + n_k - n_q

    if version == "v1":
        visits = [(i, j) for j in range(columns) for i in range(rows) if visible(i, j)]
        number = {tile: step for step, tile in enumerate(visits, 1)}
        shade = {tile: 0.15 + 0.7 * step / max(len(visits), 1) for tile, step in number.items()}
        colormap = plt.get_cmap("cividis")
        ax.set_title("v1: K/V outside, column by column\none program for the whole head")
    else:
        number = {}
        for i in range(rows):
            number |= {(i, j): step for step, j in enumerate((j for j in range(columns) if visible(i, j)), 1)}
        shade = {(i, j): (i % 8 + 0.5) / 8 for i, j in number}
        colormap = plt.get_cmap("Set2")
        ax.set_title("v2: Q outside, row by row\none program for each row, all at once")
    for i in range(rows):
        for j in range(columns):
            if (i, j) in number:
                color = colormap(shade[i, j])
                ax.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
                bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
                ax.text(
                    j + 0.5,
                    i + 0.5,
                    str(number[i, j]),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="black" if bright > 0.5 else "white",
                )
            else:
                ax.add_patch(
                    Rectangle((j, i), 1, 1, facecolor="#EEEEEE", edgecolor="#BBBBBB", hatch="////", linewidth=0.5)
                )
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    ax.set_xticks([j + 0.5 for j in range(columns)], [str(j) for j in range(columns)])
    ax.set_yticks([i + 0.5 for i in range(rows)], [str(i) for i in range(rows)])
    ax.set_xlabel(f"block j of K and V ({_sizes(n_k, block_n, 'keys')})")
    ax.set_ylabel(f"block i of Q ({_sizes(n_q, block_m, 'queries')})")
    ax.grid(visible=False)
    meaning = "colour and number: its turn" if version == "v1" else "colour: program; number: its turn there"
    handles = [Patch(facecolor=colormap(0.5), edgecolor="white", label=meaning)]
    if len(number) < rows * columns:
        handles.append(Patch(facecolor="#EEEEEE", edgecolor="#BBBBBB", hatch="////", label="masked, never visited"))
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)


def _sizes(n: int, block: int, what: str) -> str:
    last = n % block
    return f"{block} {what} each" + (f", the last {last}" if last else "")


@_figure
def plot_mask(mask: torch.Tensor, title: str | None = None) -> Figure:
    """A mask as a picture: which query sees which key.

    Args:
        mask: bool (N_q, N_k), True = visible, as `reference.causal_mask` returns it.
        title: instead of the one that counts what is visible.

    Raises:
        ValueError: not two-dimensional.
    """
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: pass one of (N_q, N_k).")
    n_q, n_k = mask.shape
    shape = min(max(n_k / n_q, 0.4), 3.0)
    width = min(WIDTH, 1.2 + 3.6 * shape)
    fig, ax = plt.subplots(figsize=(max(width, 3.6), 1.4 + (width - 1.2) / shape))
    edges = ([j - 0.5 for j in range(n_k + 1)], [i - 0.5 for i in range(n_q + 1)])
    picture = ax.pcolormesh(*edges, mask.cpu().int().numpy(), cmap=ListedColormap(["#EEEEEE", BLUE]), vmin=0, vmax=1)
    if max(n_q, n_k) <= 32:
        picture.set(edgecolor="white", linewidth=0.7)
    ax.invert_yaxis()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.set(aspect="equal", xlabel="key j", ylabel="query i")
    ax.grid(visible=False)
    ax.set_title(title or f"{mask.float().mean():.0%} of the scores are visible")
    handles = [
        Patch(facecolor=BLUE, label="visible"),
        Patch(facecolor="#EEEEEE", edgecolor="#BBBBBB", label="masked"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig


@_figure
def plot_memory_hierarchy() -> Figure:
    """A sketch of the two memories of a GPU, and of what standard attention and FlashAttention send between
    them.

    The sizes and speeds are those of an A100 in figure 1 of arXiv 2205.14135.
    """
    fig, axes = plt.subplots(1, 2, figsize=(WIDE, 4.5))
    panels = (
        (
            "Standard attention: the N × N matrices S and P go through HBM",
            "one matmul, or one softmax,\nat a time",
            "Q, K, V, O  (N × d each)\nS, P  (N × N each)",
            ["Q, K", "S", "S", "P", "P, V", "O"],
        ),
        (
            "FlashAttention: a tile of S and P is born and dies in SRAM",
            "blocks of Q, K, V; a tile of S and P;\nm, l and O of a block of rows",
            "Q, K, V, O  (N × d each)\nlog-sum-exp  (N)",
            ["Q, K, V", "O, log-sum-exp"],
        ),
    )
    for ax, (title, on_chip, in_hbm, arrows) in zip(axes, panels, strict=True):
        ax.set(xlim=(0, 10), ylim=(0, 10))
        ax.axis("off")
        ax.set_title(title)
        ax.add_patch(Rectangle((2.0, 7.1), 6.0, 2.6, facecolor="#FFE9C7", edgecolor=ORANGE, linewidth=1.8))
        ax.text(5, 9.1, "SRAM, on chip: 20 MB, 19 TB/s", ha="center", va="center", weight="bold")
        ax.text(5, 7.95, on_chip, ha="center", va="center", fontsize=9)
        ax.add_patch(Rectangle((0.2, 0.3), 9.6, 2.9, facecolor="#D8EAF6", edgecolor=BLUE, linewidth=1.8))
        ax.text(5, 2.6, "HBM: 40 GB, 1.5 TB/s", ha="center", va="center", weight="bold")
        ax.text(5, 1.3, in_hbm, ha="center", va="center", fontsize=9)
        span = 6.0 / len(arrows)
        for i, what in enumerate(arrows):
            x = 2.0 + span * (i + 0.5)
            up = i % 2 == 0  # a load, then a store, and so on
            ends = ((x, 3.25), (x, 7.05)) if up else ((x, 7.05), (x, 3.25))
            color = BLUE if up else VERMILLION
            ax.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=15, color=color, linewidth=2))
            ax.text(x + 0.12, 5.9 if i % 2 else 4.4, what, fontsize=9, color=color, va="center")
    handles = [Patch(color=BLUE, label="load"), Patch(color=VERMILLION, label="store")]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    _footnote(fig, "Sizes and bandwidths of an A100 (40 GB), figure 1 of arXiv 2205.14135.")
    return fig


# ------------------------------------------------------------------------------------------------------------
# Why it is fast
# ------------------------------------------------------------------------------------------------------------


@_figure
def plot_traffic(model: Mapping[str, Bytes], counted: Mapping[str, Bytes] | None = None, title: str = "") -> Figure:
    """Bytes moved to and from HBM, stacked by tensor; the IO model's beside the counted ones.

    Args:
        model: by algorithm, of `analysis.io_bytes`: {"naive": ..., "v1": ..., "v2": ...}.
        counted: by algorithm, of `analysis.counted_traffic`, for those that were counted.
        title: the shape, as it should stand in the title.
    """
    bars = []
    for name, moved in model.items():
        bars.append((f"{name}\nmodel", moved))
        if counted is not None and name in counted:
            bars.append((f"{name}\ncounted", counted[name]))
    largest = max(total_bytes(moved) for _, moved in bars)
    unit, name = next((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")) if largest >= u)
    fig, ax = plt.subplots(figsize=(WIDTH, 4.6))
    tensors = [t for t in TENSOR_COLORS if any(t in moved for _, moved in bars)]
    tensors += sorted({t for _, moved in bars for t in moved} - set(tensors))
    for x, (label, moved) in enumerate(bars):
        bottom = 0.0
        for i, tensor in enumerate(tensors):
            height = sum(moved.get(tensor, {}).values()) / unit
            if height:
                ax.bar(
                    x,
                    height,
                    bottom=bottom,
                    width=0.7,
                    color=TENSOR_COLORS.get(tensor, _OTHER[i % len(_OTHER)]),
                    edgecolor="white",
                    linewidth=0.8,
                    hatch="//" if label.endswith("counted") else None,
                )
            bottom += height
        ax.annotate(
            f"{bottom:.3g} {name}",
            (x, bottom),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    ax.set_xticks(range(len(bars)), [label for label, _ in bars])
    ax.set_ylabel(f"loads and stores ({name})")
    ax.set_title("Where the bytes go" + (f": {title}" if title else ""))
    ax.grid(visible=False, axis="x")
    ax.margins(y=0.1)
    handles = [
        Patch(facecolor=TENSOR_COLORS.get(t, _OTHER[i % len(_OTHER)]), label=TENSOR_LABELS.get(t, t.upper()))
        for i, t in enumerate(tensors)
    ]
    fig.legend(handles=handles[::-1], loc="outside right center", title="tensor")
    note = "Model: the bytes that the algorithm's loops ask for."
    if counted:
        note += " Counted (hatched): those that our Triton kernel asked for in the interpreter."
    _footnote(fig, note)
    return fig


@_figure
def plot_roofline(points: pd.DataFrame, ceilings: Ceilings) -> Figure:
    """Attained TFLOP/s over arithmetic intensity, under the two ceilings measured on this machine.

    A marker stands at the intensity of the IO model. The line to its right ends at the intensity with every
    tensor
    moved once: caches serve repeated loads, so the truth lies in between.

    Args:
        points: of `analysis.roofline_points`.
        ceilings: of `analysis.measure_ceilings`.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 4.9))
    low = min([points["intensity"].min() if len(points) else ceilings.ridge, ceilings.ridge]) / 4
    high = max([points["intensity_compulsory"].max() if len(points) else ceilings.ridge, ceilings.ridge]) * 2
    ax.plot(
        [low, ceilings.ridge, high],
        [ceilings.roof(low), ceilings.tflops, ceilings.tflops],
        color="#444444",
        linewidth=2.2,
        label="roof, measured",
    )
    ax.axvline(ceilings.ridge, color="#999999", linestyle=":", linewidth=1.2)
    ax.annotate(
        f"ridge: {ceilings.ridge:.3g} FLOP/byte",
        (ceilings.ridge, 0.02),
        xycoords=ax.get_xaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color="#555555",
    )
    ax.annotate(
        f"matmul, {ceilings.dtype}: {ceilings.tflops:.3g} TFLOP/s",
        (high, ceilings.tflops),
        ha="right",
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9,
    )
    ax.annotate(
        f"copy: {ceilings.gb_per_s:,.3g} GB/s"
        if ceilings.gb_per_s < 1000
        else f"copy: {ceilings.gb_per_s / 1e3:.3g} TB/s",
        (low, ceilings.roof(low)),
        xytext=(14, 0),
        textcoords="offset points",
        fontsize=9,
        va="center",
    )
    lengths = sorted(set(points["seqlen"]))
    for i, (name, group) in enumerate(points.groupby("impl", sort=False)):
        look = _look(name, i)
        for row in group.itertuples():
            ax.plot(
                [row.intensity, row.intensity_compulsory],
                [row.tflops] * 2,
                color=look["color"],
                linewidth=1,
                alpha=0.6,
            )
        marker = {"linestyle": "none"} | look
        for row in group.sort_values("seqlen", ascending=False).itertuples():
            size = 5 + 6 * (lengths.index(row.seqlen) + 1) / len(lengths)
            ax.plot([row.intensity], [row.tflops], **marker | {"markersize": size})
            marker["label"] = None  # one entry in the legend, of the largest
    ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="TFLOP/s")
    ax.margins(y=0.12)
    ax.set_title(f"Left of the ridge memory is the bound, right of it arithmetic: {ceilings.machine}")
    _legend_above(fig, ax)
    span = f", larger for longer sequences (N = {_short(lengths[0])} to {_short(lengths[-1])})" if lengths else ""
    _footnote(
        fig,
        f"Markers: intensity by the IO model{span}. Lines: up to the intensity with every tensor moved once, "
        "as a cache that serves all repeated loads would have it.",
    )
    return fig


def _shorten(name: str, width: int = 44) -> str:
    """A kernel's name without `void`, template arguments and namespaces, cut to a width."""
    name = name.removeprefix("aten::").removeprefix("void ").split("(")[0]
    base = name.split("<")[0].split("::")[-1] if "<" in name else name
    return base if len(base) <= width else base[: width - 1] + "…"


@_figure
def plot_profile(profiles: pd.DataFrame | Mapping[str, pd.DataFrame], top: int = 8) -> Figure:
    """Where the time goes, operation by operation: bars of self time.

    Args:
        profiles: a table of `analysis.profile`, or several by name, drawn below each other on one scale.
        top: the longest operations of each.
    """
    named = dict(profiles) if isinstance(profiles, Mapping) else {"": profiles}
    # what takes less than half a percent would be a row without a bar
    named = {name: df[df["share"] >= 0.005].head(top) for name, df in named.items()}
    counts = [len(df) for df in named.values()]
    size = (WIDTH, 0.9 + sum(0.3 * n + 0.75 for n in counts))
    fig, axes = plt.subplots(len(named), 1, figsize=size, height_ratios=counts, sharex=True, squeeze=False)
    longest = max(df["self_ms"].max() for df in named.values())
    for i, (ax, (name, shown)) in enumerate(zip(axes[:, 0], named.items(), strict=True)):
        color = COLORS.get(name, BLUE) if name else BLUE
        color = "#555555" if color == BLACK else color
        label = LABELS.get(name, name) or "self time"
        ax.barh(range(len(shown)), shown["self_ms"], color=color, label=label, height=0.7)
        for y, row in enumerate(shown.itertuples()):
            ax.annotate(
                f"{row.share:.0%}, {row.calls:.3g} call{'s' if row.calls != 1 else ''}",
                (row.self_ms, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        ax.set_yticks(range(len(shown)), [_shorten(op) for op in shown["op"]], fontsize=9)
        ax.set(ylim=(len(shown) - 0.4, -0.6), xlim=(0, longest * 1.25))
        ax.grid(visible=False, axis="y")
        device = shown.attrs.get("device", "CPU")
        title = f"{shown.attrs.get('total_ms', shown['self_ms'].sum()):.3g} ms in all. {_machine(shown)}"
        ax.set_title(f"{label}: {title}")
        ax.legend(loc="lower right")
        if i == len(named) - 1:
            ax.set_xlabel(f"self time on the {device} (ms per call of the function)")
    return fig


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


@_figure
def plot_training(history: Any, *, window: int = 1) -> Figure:
    """Loss and tokens per second over the steps of training.

    Args:
        history: a `training.History`, its table (columns step, loss, tokens_per_s), or several of either by
            name.
        window: the loss is averaged over so many logged steps.
    """
    named = dict(history) if isinstance(history, Mapping) else {"": history}
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 4.0))
    for i, (name, one) in enumerate(named.items()):
        frame = getattr(one, "frame", one)
        if frame.empty:
            continue
        look = _look(name, i) if name else {"color": BLUE, "marker": "o", "label": "training"}
        every = max(1, len(frame) // 12)  # lines are dense: a marker here and there
        loss = frame["loss"].rolling(window, min_periods=1).mean()
        left.plot(frame["step"], loss, **look, markevery=every)
        right.plot(frame["step"], frame["tokens_per_s"], **look, markevery=every)
    averaged = f", mean of {window} steps" if window > 1 else ""
    left.set(xlabel="step", ylabel=f"loss (nats per token{averaged})")
    left.set_title(f"Loss: does it fall? {runtime.machine}")
    right.set(xlabel="step", ylabel="throughput (tokens per second)")
    right.set_ylim(0, right.get_ylim()[1] * 1.05)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    right.set_title(f"Tokens per second: higher is faster. {runtime.machine}")
    for ax in (left, right):
        ax.legend()
    return fig


@_figure
def plot_memory_bars(rows: pd.DataFrame | Sequence[Mapping[str, Any]], cap_gib: float | None = None) -> Figure:
    """Peak memory of training steps against a cap; a run that did not fit stands hatched up to the cap.

    Args:
        rows: rows of training.csv, as `training.try_step` returns them.
        cap_gib: the cap in GiB; the largest of the rows' own where not given.

    Raises:
        ValueError: no rows.
    """
    df = pd.DataFrame(rows)
    machine = _machine(rows) if isinstance(rows, pd.DataFrame) else runtime.machine  # stored rows carry theirs
    if df.empty:
        raise ValueError("no rows to draw: pass what training.try_step returned.")
    cap = df["cap_gib"].max() if cap_gib is None else cap_gib
    capped = cap == cap  # not NaN
    # NaN where nothing was measured or capped; with neither there is no scale, and the bars say only what
    # failed
    widest = max((x for x in (df["reserved_gib"].max(), cap) if x == x), default=1.0)
    fig, ax = plt.subplots(figsize=(WIDTH, 1.6 + 0.5 * len(df)))
    labels = []
    for y, row in enumerate(df.itertuples()):
        look = _look(row.impl, y)
        color = "#555555" if look["color"] == BLACK else look["color"]
        extras = ["checkpointing"] * bool(row.checkpointing) + ["chunked loss"] * bool(row.chunked_loss)
        labels.append("\n".join([f"{row.model}, N = {row.seqlen:,}, {look['label']}", " + ".join(extras)]).strip())
        if row.status == "ok":
            ax.barh(y, row.reserved_gib, color=color, alpha=0.45, height=0.62)
            ax.barh(y, row.peak_gib, color=color, height=0.62)
            text, at = f"{row.peak_gib:.1f} ({row.reserved_gib:.1f} reserved)", row.reserved_gib
        else:
            ax.barh(
                y,
                widest * 1.03,
                facecolor="white",
                edgecolor=VERMILLION,
                hatch="////",
                height=0.62,
                linewidth=1.2,
            )
            text, at = "out of memory", widest * 1.03
        ax.annotate(
            text,
            (at, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="black" if row.status == "ok" else VERMILLION,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    if capped:
        ax.axvline(cap, color=BLACK, linestyle="--", linewidth=1.5)
    ax.set_yticks(range(len(df)), labels, fontsize=9)
    ax.set(ylim=(len(df) - 0.4, -0.6), xlim=(0, widest * 1.45), xlabel="peak GPU memory of a training step (GiB)")
    ax.grid(visible=False, axis="y")
    ax.set_title(f"What fits{f' in {cap:.3g} GiB' if capped else ''}? {machine}")
    handles = [
        Patch(facecolor="#555555", label="allocated"),
        Patch(facecolor="#555555", alpha=0.45, label="reserved"),
    ]
    if (df["status"] != "ok").any():
        handles.append(Patch(facecolor="white", edgecolor=VERMILLION, hatch="////", label="does not fit"))
    if capped:
        handles.append(plt.Line2D([], [], color=BLACK, linestyle="--", label=f"cap: {cap:.3g} GiB"))
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
    return fig

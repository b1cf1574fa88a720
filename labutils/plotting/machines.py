"""Figures of kernels on a GPU: which blocks fit and are fast, predicted times, the advice, programs that fill SMs."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from labutils.analysis.resources import gpu_name
from labutils.plotting.style import (
    BLUE,
    COLORS,
    GREY,
    LABELS,
    OTHER_COLORS,
    VERMILLION,
    WIDE,
    WIDTH,
    footnote,
    legend_above,
    machine_of,
    short_size,
    styled,
)

_MAP = "YlGnBu"  # from light to dark: readable for the colour-blind and on paper
_MISSING = "#D9D9D9"  # a field without a value


def _heat(ax: Axes, values: pd.DataFrame, texts: pd.DataFrame, low: float, high: float) -> None:
    """Draws a table as a heat map, from `low` to `high`; NaN is grey. `texts` has the text of each field."""
    colors = plt.get_cmap(_MAP).with_extremes(bad=_MISSING)
    ax.imshow(np.ma.masked_invalid(values.to_numpy(dtype=float)), cmap=colors, vmin=low, vmax=high, aspect="auto")
    for y, row in enumerate(values.index):
        for x, column in enumerate(values.columns):
            value = values.loc[row, column]
            dark = not math.isnan(value) and value > (low + high) / 2
            ax.text(
                x, y, texts.loc[row, column], ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
    ax.set_xticks(range(len(values.columns)), values.columns)
    ax.set_yticks(range(len(values.index)), values.index)
    ax.grid(visible=False)


def _heat_legend(fig: Figure, low: str, high: str, missing: str) -> None:
    """The legend of a heat map: what its lightest, its darkest and its grey fields mean."""
    colors = plt.get_cmap(_MAP)
    handles = [
        Patch(facecolor=colors(0.0), edgecolor="#999999", label=low),
        Patch(facecolor=colors(0.999), edgecolor="#999999", label=high),
        Patch(facecolor=_MISSING, edgecolor="#999999", label=missing),
    ]
    fig.legend(handles=handles, loc="outside upper left", ncols=3)


@styled
def plot_fit(resources: pd.DataFrame, head_dim: int = 128) -> Figure:
    """Draws which block sizes of the forward kernel fit on which GPU, and how much of an SM they occupy.

    Args:
        resources: the table of `analysis.resources.stored_table` or `compile_launches`. Only rows with origin "grid"
            are drawn.
        head_dim: D.

    Raises:
        ValueError: no row with origin "grid" and that head dimension.
    """
    grid = resources[(resources["origin"] == "grid") & (resources["head_dim"] == head_dim)]
    if grid.empty:
        raise ValueError(f"the table has no rows with origin 'grid' and head dimension {head_dim}.")
    gpus = list(dict.fromkeys(sorted(grid["capability"], key=lambda c: tuple(map(int, c.split("."))))))
    columns = min(3, len(gpus))
    rows = math.ceil(len(gpus) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDE, 0.7 + 2.5 * rows), squeeze=False)
    for ax in axes.flat[len(gpus) :]:
        ax.set_axis_off()
    for ax, capability in zip(axes.flat, gpus, strict=False):
        here = grid[grid["capability"] == capability].copy()
        here["warps"] = here["blocks_per_sm"] * here["num_warps"]
        # Show the number of warps that fits, spills least and fills the SM best, in this order.
        order = ["fits", "spilled_bytes", "occupancy"]
        best = here.sort_values(order, ascending=[False, True, False]).drop_duplicates(["block_m", "block_n"])
        best = best.set_index(["block_m", "block_n"])
        texts = pd.Series("does not\nfit", index=best.index)
        fitting = best[best["fits"]]
        for block, row in fitting.iterrows():
            spills = f"\nspills {row['spilled_bytes']:,.0f} B" if row["spilled_bytes"] else ""
            texts[block] = f"{row['blocks_per_sm']:.0f} × {row['num_warps']} warps{spills}"
        occupancy = best["occupancy"].where(best["fits"])
        _heat(ax, occupancy.unstack(), texts.unstack(), 0, 0.75)
        ax.set_title(f"{gpu_name(capability)} ({capability})")
        ax.set(xlabel="block_n (keys)", ylabel="block_m (queries)")
    _heat_legend(fig, "few warps on an SM", "three quarters of those possible", "needs too much shared memory")
    version = grid["triton"].iloc[0]
    footnote(
        fig,
        f"Forward kernel of v2, D = {head_dim}, float16, two stages; compiled by Triton {version} for GPUs that are "
        "not there, not timed. Text: programs that an SM holds at once × warps of each; of 4 and 8 warps the better "
        "one.",
    )
    return fig


@styled
def plot_block_times(blocks: pd.DataFrame) -> Figure:
    """Draws the time of each block size with its best number of warps and stages, a panel per head dimension and mask.

    Args:
        blocks: the table that `analysis.blocks.sweep_blocks` returns.
    """
    panels = list(blocks.groupby(["head_dim", "causal"], sort=True))
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH if len(panels) < 3 else WIDE, 3.3), squeeze=False)
    for ax, ((d, causal), rows) in zip(axes[0], panels, strict=True):
        best = rows.sort_values("ms").drop_duplicates(["block_m", "block_n"]).set_index(["block_m", "block_n"])
        relative = best["ms"] / best["ms"].min()
        texts = pd.Series(
            [
                "none\nfits" if math.isnan(row.ms) else f"{row.ms:.3g} ms\n{row.num_warps} w, {row.num_stages} st"
                for row in best.itertuples()
            ],
            index=best.index,
        )
        _heat(ax, relative.unstack(), texts.unstack(), 1, 2)
        ax.set_title(f"D = {d}, {'causal' if causal else 'full'}")
        ax.set(xlabel="block_n (keys)", ylabel="block_m (queries)")
    _heat_legend(fig, "the fastest", "takes twice as long, or more", "does not fit")
    row = blocks.iloc[0]
    footnote(
        fig,
        f"{machine_of(blocks)}: forward kernel of v2, {row['dtype']}, B = {row['batch']}, N = {row['seqlen']:,}; "
        "in each field the best of all numbers of warps (w) and stages (st).",
    )
    return fig


@styled
def plot_prediction(predicted: pd.DataFrame, apart: int = 96) -> Figure:
    """Draws predicted over measured time, a panel for each implementation, with a band of 10 % around the truth.

    Args:
        predicted: the table that `analysis.prediction.predict` returns, with a column `split`. Rows that were fitted,
            all but "held_out", are drawn pale.
        apart: a head dimension that gets a colour of its own.
    """
    impls = list(dict.fromkeys(predicted["impl"]))
    ratio = predicted["predicted_ms"] / predicted["ms"]
    fig, axes = plt.subplots(1, len(impls), figsize=(WIDE, 3.9), sharex=True, sharey=True, squeeze=False)
    fitted, other = predicted["split"] != "held_out", predicted["head_dim"] == apart
    series = [
        ("fitted", fitted, {"color": "#BBBBBB", "marker": ".", "markersize": 4}),
        ("held out", ~fitted & ~other, {"color": BLUE, "marker": "o", "markersize": 3.5}),
        (f"held out, D = {apart}", ~fitted & other, {"color": VERMILLION, "marker": "^", "markersize": 4.5}),
    ]
    for ax, impl in zip(axes[0], impls, strict=True):
        ax.axhspan(0.9, 1.1, color="#E3E3E3", label="within 10 %", zorder=0)
        for label, chosen, look in series:
            rows = predicted.index[chosen & (predicted["impl"] == impl)]
            ax.plot(predicted.loc[rows, "ms"], ratio[rows], linestyle="none", label=label, **look)
        ax.set(xscale="log", xlabel="measured (ms)")
        ax.set_title(LABELS.get(impl, impl))
    axes[0][0].set_ylabel("predicted / measured")
    legend_above(fig, *axes[0], ncols=4)
    footnote(fig, f"{machine_of(predicted)}, forward and backward; the fit has not seen what is held out.")
    return fig


@styled
def plot_decisions(decisions: pd.DataFrame, machine: str) -> Figure:
    """Draws the fastest implementation at each stored shape, and how much longer the recommended one takes.

    Args:
        decisions: the table that `analysis.advice.against_fastest` returns, of one dtype, with one batch size and one
            number of heads for each length.
        machine: the name of the machine that measured the times.
    """
    rows = [
        (f"{which}, D = {d}, {'causal' if causal else 'full'}", part.set_index("seqlen"))
        for (which, d, causal), part in decisions.groupby(["pass", "head_dim", "causal"], sort=False)
    ]
    lengths = sorted(set(decisions["seqlen"]))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.36 * len(rows)))
    for y, (_, part) in enumerate(rows):
        for x, n in enumerate(lengths):
            if n in part.index:
                row = part.loc[n]
                ax.barh(y, 0.96, left=x - 0.48, height=0.9, color=COLORS.get(row["fastest"], GREY), alpha=0.75)
                ax.text(x, y, f"{row['ratio']:.2f}", ha="center", va="center", fontsize=8)
    ax.set_xticks(range(len(lengths)), [short_size(n) for n in lengths])
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set(xlabel="sequence length N", ylim=(len(rows) - 0.5, -0.5))
    ax.grid(visible=False)
    ax.set_title(f"The fastest of all, and the advice beside it: {machine}")
    names = list(dict.fromkeys(decisions["fastest"]))
    handles = [Patch(facecolor=COLORS.get(n, GREY), alpha=0.75, label=f"fastest: {LABELS.get(n, n)}") for n in names]
    fig.legend(handles=handles, loc="outside upper left", ncols=3)
    footnote(fig, "Numbers: time of the recommended implementation by that of the fastest.")
    return fig


@styled
def plot_fill(lines: pd.DataFrame, processors: int, machine: str) -> Figure:
    """Draws throughput over the number of programs, to show what a last wave costs that does not fill the GPU.

    Args:
        lines: columns `programs`, `tflops` and `label`, with a line for each label. A label that begins with the name
            of an implementation gives the line its colour.
        processors: SMs of the GPU.
        machine: the name of the GPU that was measured or predicted.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 3.6))
    for i, (label, rows) in enumerate(lines.groupby("label", sort=False)):
        # Measured and predicted lines of an implementation share its colour, and differ in their dashes.
        known = [COLORS[name] for name, start in LABELS.items() if str(label).startswith(start)]
        color = known[0] if known else OTHER_COLORS[i % len(OTHER_COLORS)]
        line = ("-", "--", "-.", ":")[i % 4]
        ax.plot(rows["programs"], rows["tflops"], color=color, linestyle=line, label=label)
    for waves in range(1, int(lines["programs"].max() // processors) + 1):
        ax.axvline(waves * processors, color="#BBBBBB", linewidth=0.8, zorder=0)
    ax.set(xlabel="programs (blocks of rows of all heads)", ylabel="TFLOP/s", ylim=(0, None))
    ax.set_title(f"{processors} multiprocessors to fill: {machine}")
    legend_above(fig, ax)
    footnote(fig, f"Grey lines: multiples of {processors} programs.")
    return fig

"""Figures of what a GPU makes of a kernel: resources, block sizes, counters, predictions, timelines, advice."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from labutils.analysis.profiling import short_operation
from labutils.analysis.resources import gpu_name
from labutils.plotting.style import (
    BLUE,
    COLORS,
    GREEN,
    GREY,
    LABELS,
    ORANGE,
    OTHER_COLORS,
    PURPLE,
    SKY,
    VERMILLION,
    WIDE,
    WIDTH,
    YELLOW,
    footnote,
    legend_above,
    machine_of,
    short_size,
    styled,
)

_MAP = "YlGnBu"  # light to dark, also for colour-blind readers and on paper


def _heat(ax: Axes, values: pd.DataFrame, texts: pd.DataFrame, low: float, high: float) -> None:
    """A heat map of a table: rows down, columns across; NaN is grey."""
    colors = plt.get_cmap(_MAP).with_extremes(bad="#D9D9D9")
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


def _key(fig: Figure, low: str, high: str, missing: str) -> None:
    colors = plt.get_cmap(_MAP)
    handles = [
        Patch(facecolor=colors(0.0), edgecolor="#999999", label=low),
        Patch(facecolor=colors(0.999), edgecolor="#999999", label=high),
        Patch(facecolor="#D9D9D9", edgecolor="#999999", label=missing),
    ]
    fig.legend(handles=handles, loc="outside upper left", ncols=3)


@styled
def plot_fit(resources: pd.DataFrame, head_dim: int = 128) -> Figure:
    """Which block sizes of the forward kernel fit on which GPU, and how full they make an SM.

    Args:
        resources: of `analysis.resources.stored_table` or `compile_launches`; the rows with origin "grid" are used.
        head_dim: D.

    Raises:
        ValueError: no such rows.
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
        # of the numbers of warps the one that fits and spills least, then the one that fills the SM best
        order = ["fits", "spilled_bytes", "occupancy"]
        best = here.sort_values(order, ascending=[False, True, False]).drop_duplicates(["block_m", "block_n"])
        best = best.set_index(["block_m", "block_n"])
        texts = pd.Series("does not\nfit", index=best.index)
        fitting = best[best["fits"]]
        for place, row in fitting.iterrows():
            spills = f"\nspills {row['spilled_bytes']:,.0f} B" if row["spilled_bytes"] else ""
            texts[place] = f"{row['blocks_per_sm']:.0f} × {row['num_warps']} warps{spills}"
        occupancy = best["occupancy"].where(best["fits"])
        _heat(ax, occupancy.unstack(), texts.unstack(), 0, 0.75)
        ax.set_title(f"{gpu_name(capability)} ({capability})")
        ax.set(xlabel="block_n (keys)", ylabel="block_m (queries)")
    _key(fig, "few warps on an SM", "three quarters of those possible", "needs too much shared memory")
    made = grid["triton"].iloc[0]
    footnote(
        fig,
        f"Forward kernel of v2, D = {head_dim}, float16, two stages; compiled by Triton {made} for GPUs that are not "
        "there, not timed. Text: programs that an SM holds at once × warps of each; of 4 and 8 warps the better one.",
    )
    return fig


@styled
def plot_block_times(blocks: pd.DataFrame) -> Figure:
    """Times of block sizes, the best of all warps and stages: one panel for each head dimension and mask.

    Args:
        blocks: of `analysis.tuning.sweep_blocks`.
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
    _key(fig, "the fastest", "takes twice as long, or more", "does not fit")
    row = blocks.iloc[0]
    footnote(
        fig,
        f"{machine_of(blocks)}: forward kernel of v2, {row['dtype']}, B = {row['batch']}, N = {row['seqlen']:,}; "
        "in each field the best of all numbers of warps (w) and stages (st).",
    )
    return fig


@styled
def plot_counters(traffic: pd.DataFrame) -> Figure:
    """Bytes of the forward pass by sequence length: compulsory, at DRAM, at L2, at the SMs, and by the IO model.

    Args:
        traffic: the stored table "traffic".
    """
    forward = traffic[traffic["pass"] == "fwd"]
    impls = list(dict.fromkeys(forward["impl"]))
    fig, axes = plt.subplots(1, len(impls), figsize=(WIDE, 3.8), sharey=True, squeeze=False)
    series = [
        ("compulsory_bytes", "compulsory", GREY, "--", "o"),
        ("measured_bytes", "DRAM, measured", VERMILLION, "-", "s"),
        ("l2_bytes", "L2, measured", SKY, "-", "^"),
        ("sm_bytes", "SMs, measured", ORANGE, "-", "v"),
        ("model_bytes", "IO model", BLUE, ":", "D"),
    ]
    for ax, impl in zip(axes[0], impls, strict=True):
        rows = forward[forward["impl"] == impl].sort_values("seqlen")
        rows = rows.assign(l2_bytes=rows["l2_read_bytes"] + rows["l2_write_bytes"])
        rows = rows.assign(sm_bytes=rows["l1_filled_bytes"] + rows["l2_write_bytes"])
        for column, label, color, line, marker in series:
            if rows[column].notna().any():
                ax.plot(rows["seqlen"], rows[column] / 2**20, color=color, linestyle=line, marker=marker, label=label)
        ax.set(xscale="log", yscale="log", xlabel="sequence length N")
        ax.set_xticks(list(rows["seqlen"]), [short_size(n) for n in rows["seqlen"]])
        ax.minorticks_off()
        ax.set_title(LABELS.get(impl, impl))
    axes[0][0].set_ylabel("bytes moved (MiB)")
    legend_above(fig, *axes[0], ncols=5)
    row = forward.iloc[0]
    footnote(
        fig,
        f"{machine_of(traffic)}, by Nsight Compute: B = {row['batch']}, H = {row['heads']}, D = {row['head_dim']}, "
        f"{row['dtype']}, caches empty before each kernel. SMs: what came into L1 and shared memory, and was stored.",
    )
    return fig


@styled
def plot_prediction(predicted: pd.DataFrame, apart: int = 96) -> Figure:
    """Predicted by measured time, a panel for each implementation, with the band of 10 % around the truth.

    Args:
        predicted: of `analysis.prediction.predict`, with a column `split`: what was fitted is drawn pale.
        apart: a head dimension that is drawn in another colour.
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
def plot_timeline(events: pd.DataFrame, depth: int = 3, title: str = "") -> Figure:
    """Operations over time, calls below their callers; on a GPU the kernels in a track of their own.

    Args:
        events: of `analysis.timeline`.
        depth: levels of calls that are drawn.
        title: what was called.
    """
    shown = events[events["depth"] < depth]
    tracks = [track for track in ("CPU", "GPU") if (shown["track"] == track).any()]
    levels = {track: int(shown.loc[shown["track"] == track, "depth"].max()) + 1 for track in tracks}
    fig, axes = plt.subplots(
        len(tracks), 1, figsize=(WIDE, 1.3 + 0.6 * sum(levels.values())), sharex=True, squeeze=False,
        height_ratios=list(levels.values()),
    )  # fmt: skip
    palette = (BLUE, ORANGE, GREEN, SKY, VERMILLION, PURPLE, YELLOW)
    total = shown["end_us"].max()
    took = (shown["end_us"] - shown["start_us"]).groupby([shown["track"], shown["op"].map(short_operation)]).max()
    for ax, track in zip(axes[:, 0], tracks, strict=True):
        longest = took[track].nlargest(len(palette))
        colors = dict(zip(longest.index[longest > 0.01 * total], palette, strict=False))
        entries: dict[str, Any] = {}
        for row in shown[shown["track"] == track].itertuples():
            name, width = short_operation(row.op), row.end_us - row.start_us
            bar = ax.barh(
                row.depth, width, left=row.start_us, height=0.8, color=colors.get(name, GREY), edgecolor="white",
                linewidth=0.3,
            )  # fmt: skip
            entries.setdefault(name if name in colors else "shorter ones", bar)
        ax.set(ylim=(levels[track] - 0.5, -0.5), yticks=[], ylabel=track)
        ax.grid(visible=False, axis="y")
        names = [name for name in [*colors, "shorter ones"] if name in entries]
        labels = [name if len(name) <= 34 else name[:33] + "…" for name in names]
        ax.legend([entries[name] for name in names], labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    axes[-1, 0].set_xlabel("time since the first operation (µs)")
    axes[0, 0].set_title(f"{title or 'One call'}: {machine_of(events)}")
    return fig


@styled
def plot_decisions(judged: pd.DataFrame, machine: str) -> Figure:
    """Which implementation was the fastest at each stored shape, and what the recommended one takes beside it.

    Args:
        judged: of `analysis.advice.against_fastest`, of one dtype, one batch and number of heads for each length.
        machine: that measured it.
    """
    rows = [
        (f"{which}, D = {d}, {'causal' if causal else 'full'}", part.set_index("seqlen"))
        for (which, d, causal), part in judged.groupby(["pass", "head_dim", "causal"], sort=False)
    ]
    lengths = sorted(set(judged["seqlen"]))
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
    names = list(dict.fromkeys(judged["fastest"]))
    handles = [Patch(facecolor=COLORS.get(n, GREY), alpha=0.75, label=f"fastest: {LABELS.get(n, n)}") for n in names]
    fig.legend(handles=handles, loc="outside upper left", ncols=3)
    footnote(fig, "Numbers: time of the recommended implementation by that of the fastest.")
    return fig


@styled
def plot_fill(lines: pd.DataFrame, processors: int, machine: str) -> Figure:
    """Throughput over the number of programs: full waves, and the one that is not.

    Args:
        lines: `programs`, `tflops` and `label`, one line for each label, in the colour of the implementation whose
            name the label begins with.
        processors: SMs of the GPU.
        machine: that was measured, or predicted.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 3.6))
    for i, (label, rows) in enumerate(lines.groupby("label", sort=False)):
        # an implementation keeps its colour, measured or predicted; the kind of line tells these apart
        of = [COLORS[name] for name, known in LABELS.items() if str(label).startswith(known)]
        color = of[0] if of else OTHER_COLORS[i % len(OTHER_COLORS)]
        line = ("-", "--", "-.", ":")[i % 4]
        ax.plot(rows["programs"], rows["tflops"], color=color, linestyle=line, label=label)
    for waves in range(1, int(lines["programs"].max() // processors) + 1):
        ax.axvline(waves * processors, color="#BBBBBB", linewidth=0.8, zorder=0)
    ax.set(xlabel="programs (blocks of rows of all heads)", ylabel="TFLOP/s", ylim=(0, None))
    ax.set_title(f"{processors} multiprocessors to fill: {machine}")
    legend_above(fig, ax)
    footnote(fig, f"Grey lines: multiples of {processors} programs.")
    return fig

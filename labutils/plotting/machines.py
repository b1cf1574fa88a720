"""Figures of what a GPU makes of a kernel: resources, block sizes, counters, predictions, timelines, advice."""

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
    GREEN,
    GREY,
    LABELS,
    ORANGE,
    SKY,
    VERMILLION,
    WIDE,
    WIDTH,
    footnote,
    legend_above,
    look_of,
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
    """Bytes of the forward pass by sequence length: compulsory, at DRAM, at L2, and by the IO model.

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
        ("model_bytes", "IO model", BLUE, ":", "D"),
    ]
    for ax, impl in zip(axes[0], impls, strict=True):
        rows = forward[forward["impl"] == impl].sort_values("seqlen")
        rows = rows.assign(l2_bytes=rows["l2_read_bytes"] + rows["l2_write_bytes"])
        for column, label, color, line, marker in series:
            if rows[column].notna().any():
                ax.plot(rows["seqlen"], rows[column] / 2**20, color=color, linestyle=line, marker=marker, label=label)
        ax.set(xscale="log", yscale="log", xlabel="sequence length N")
        ax.set_xticks(list(rows["seqlen"]), [short_size(n) for n in rows["seqlen"]])
        ax.minorticks_off()
        ax.set_title(LABELS.get(impl, impl))
    axes[0][0].set_ylabel("bytes moved (MiB)")
    legend_above(fig, *axes[0], ncols=4)
    row = forward.iloc[0]
    footnote(
        fig,
        f"{machine_of(traffic)}, by Nsight Compute: B = {row['batch']}, H = {row['heads']}, D = {row['head_dim']}, "
        f"{row['dtype']}, caches empty before each kernel.",
    )
    return fig


@styled
def plot_prediction(predicted: pd.DataFrame) -> Figure:
    """Predicted over measured time, with the band of 10 % around the truth.

    Args:
        predicted: of `analysis.prediction.predict`; with a column `split`, what was fitted is drawn pale.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 4.4))
    low, high = predicted["ms"].min() / 1.3, predicted["ms"].max() * 1.3
    ax.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], color="#DDDDDD", label="within 10 %")
    ax.plot([low, high], [low, high], color="#777777", linewidth=1)
    held_out = predicted["split"] == "held_out" if "split" in predicted else pd.Series(True, index=predicted.index)
    for i, (impl, rows) in enumerate(predicted.groupby("impl", sort=False)):
        look = look_of(impl, i) | {"linestyle": "none"}
        shown = rows[held_out[rows.index]]
        ax.plot(shown["ms"], shown["predicted_ms"], **look, markersize=5)
        fitted = rows[~held_out[rows.index]]
        ax.plot(fitted["ms"], fitted["predicted_ms"], **look | {"label": None}, markersize=4, alpha=0.25)
    ax.set(xscale="log", yscale="log", xlabel="measured (ms)", ylabel="predicted (ms)", xlim=(low, high))
    ax.set_title(f"Predicted from shapes alone: {machine_of(predicted)}")
    legend_above(fig, ax)
    footnote(fig, "Strong markers: shapes that the fit has not seen. Pale ones: those it was fitted on.")
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
        len(tracks), 1, figsize=(WIDE, 0.9 + 0.55 * sum(levels.values())), sharex=True, squeeze=False,
        height_ratios=list(levels.values()),
    )  # fmt: skip
    palette = (BLUE, ORANGE, GREEN, SKY, VERMILLION)
    total = shown["end_us"].max()
    for ax, track in zip(axes[:, 0], tracks, strict=True):
        for i, row in enumerate(shown[shown["track"] == track].itertuples()):
            width = row.end_us - row.start_us
            label = "operations on the CPU" if track == "CPU" else "kernels on the GPU"
            ax.barh(
                row.depth, width, left=row.start_us, height=0.8, color=palette[i % len(palette)], edgecolor="white",
                linewidth=0.5, label=label if i == 0 else None,
            )  # fmt: skip
            name = row.op.removeprefix("aten::").removeprefix("void ").split("<")[0].split("(")[0]
            if width > 0.008 * total * len(name):
                ax.text(row.start_us + width / 2, row.depth, name, ha="center", va="center", fontsize=7, clip_on=True)
        ax.set(ylim=(levels[track] - 0.5, -0.5), yticks=[], ylabel=track)
        ax.grid(visible=False, axis="y")
    axes[-1, 0].set_xlabel("time since the first operation (µs)")
    axes[0, 0].set_title(f"{title or 'One call'}: {machine_of(events)}")
    legend_above(fig, *axes[:, 0])
    return fig


@styled
def plot_decisions(judged: pd.DataFrame, machine: str) -> Figure:
    """Which implementation was the fastest at each stored shape, and what the recommended one takes beside it.

    Args:
        judged: of `analysis.advice.judged`, of one dtype, one batch and number of heads for each length.
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
        lines: `programs`, `tflops` and `label`, one line for each label.
        processors: SMs of the GPU.
        machine: that was measured, or predicted.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 3.6))
    styles = ((BLUE, "-"), (VERMILLION, "--"), (GREEN, "-."), (ORANGE, ":"))
    for (label, rows), (color, line) in zip(lines.groupby("label", sort=False), styles, strict=False):
        ax.plot(rows["programs"], rows["tflops"], color=color, linestyle=line, label=label)
    for waves in range(1, int(lines["programs"].max() // processors) + 1):
        ax.axvline(waves * processors, color="#BBBBBB", linewidth=0.8, zorder=0)
    ax.set(xlabel="programs (blocks of rows of all heads)", ylabel="TFLOP/s", ylim=(0, None))
    ax.set_title(f"{processors} multiprocessors to fill: {machine}")
    legend_above(fig, ax)
    footnote(fig, f"Grey lines: multiples of {processors} programs.")
    return fig

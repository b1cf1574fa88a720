"""Figures of where bytes and time go: traffic by tensor and by level of memory, the roofline, profiles, a timeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from labutils.analysis import Bytes, Ceilings, total_bytes
from labutils.analysis.profiling import short_operation
from labutils.plotting.style import (
    BLACK,
    BLUE,
    COLORS,
    GREEN,
    GREY,
    LABELS,
    ORANGE,
    OTHER_COLORS,
    PURPLE,
    SKY,
    TENSOR_COLORS,
    TENSOR_LABELS,
    VERMILLION,
    WIDE,
    WIDTH,
    YELLOW,
    footnote,
    legend_above,
    look_of,
    machine_of,
    short_size,
    styled,
)


@styled
def plot_traffic(model: Mapping[str, Bytes], counted: Mapping[str, Bytes] | None = None, title: str = "") -> Figure:
    """Draws the bytes moved to and from HBM, stacked by tensor: what the IO model says beside what was counted.

    Args:
        model: algorithm ("naive", "v1", "v2") -> what `analysis.io_bytes` returns for it.
        counted: algorithm -> what `analysis.counted_traffic` returns for it; may lack some algorithms.
        title: the shape, for the title.
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
                    color=TENSOR_COLORS.get(tensor, OTHER_COLORS[i % len(OTHER_COLORS)]),
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
        Patch(
            facecolor=TENSOR_COLORS.get(t, OTHER_COLORS[i % len(OTHER_COLORS)]), label=TENSOR_LABELS.get(t, t.upper())
        )
        for i, t in enumerate(tensors)
    ]
    fig.legend(handles=handles[::-1], loc="outside right center", title="tensor")
    note = "Model: the bytes that the algorithm's loops ask for."
    if counted:
        note += " Counted (hatched): those that our Triton kernel asked for in the interpreter."
    footnote(fig, note)
    return fig


@styled
def plot_counters(traffic: pd.DataFrame) -> Figure:
    """Draws the bytes of the forward pass over the sequence length: compulsory, at DRAM, L2 and SMs, by the IO model.

    Args:
        traffic: the stored table "traffic", see `benchmark.SCHEMAS`.
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
def plot_roofline(
    points: pd.DataFrame,
    ceilings: Ceilings,
    *,
    lower: Mapping[str, float] | None = None,
    decoding: pd.DataFrame | None = None,
) -> Figure:
    """Draws attained TFLOP/s over arithmetic intensity, under the two measured ceilings of the machine.

    A marker stands at the intensity that the IO model gives. The line to its right ends at the intensity if every
    tensor moved only once. Caches serve repeated loads, so the truth lies in between.

    Args:
        points: the table that `analysis.roofline_points` returns.
        ceilings: the machine's ceilings, from `analysis.measure_ceilings`.
        lower: name -> TFLOP/s of further ceilings, such as the throughput of exponentials.
        decoding: the table that `analysis.decode_points` returns, for reading a cache for one token.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 4.9))
    lowest = [ceilings.ridge, *points["intensity"], *(() if decoding is None else decoding["intensity"])]
    low = min(lowest) / 4
    high = max([points["intensity_compulsory"].max() if len(points) else ceilings.ridge, ceilings.ridge]) * 2
    _draw_ceilings(ax, ceilings, lower or {}, low, high)
    if decoding is not None:
        ax.plot(
            decoding["intensity"],
            decoding["tflops"],
            linestyle="none",
            marker="s",
            markerfacecolor="none",
            markeredgecolor=BLACK,
            label=f"decoding, B = {', '.join(map(str, decoding['batch']))}",
        )
    lengths = sorted(set(points["seqlen"]))
    _draw_points(ax, points, lengths)
    ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="TFLOP/s")
    ax.margins(y=0.12)
    ax.set_title(f"Left of the ridge memory is the bound, right of it arithmetic: {ceilings.machine}")
    legend_above(fig, ax)
    span = (
        f", larger for longer sequences (N = {short_size(lengths[0])} to {short_size(lengths[-1])})" if lengths else ""
    )
    footnote(
        fig,
        f"Markers: intensity by the IO model{span}. Lines: up to the intensity with every tensor moved once, "
        "as a cache that serves all repeated loads would have it.",
    )
    return fig


def _draw_ceilings(ax: Axes, ceilings: Ceilings, lower: Mapping[str, float], low: float, high: float) -> None:
    """Draws the roof from intensity `low` to `high` (FLOP/byte), its ridge, and further ceilings (TFLOP/s)."""
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
        (ceilings.ridge if lower else high, ceilings.tflops),  # other ceilings are close to the end of the roof
        ha="right",
        va="center" if lower else "bottom",
        xytext=(-6, 0) if lower else (0, 4),
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
    for i, (name, tflops) in enumerate(lower.items()):
        ax.hlines(tflops, 1e3 * tflops / ceilings.gb_per_s, high, color="#777777", linestyle=("--", "-.", ":")[i % 3])
        ax.annotate(
            f"{name}: {tflops:,.0f} TFLOP/s",
            (1e3 * tflops / ceilings.gb_per_s, tflops),
            ha="right",
            va="bottom" if tflops > ceilings.tflops else "center",
            xytext=(-6, 0),
            textcoords="offset points",
            fontsize=8,
            color="#555555",
        )


def _draw_points(ax: Axes, points: pd.DataFrame, lengths: list[int]) -> None:
    """Draws a marker and its line for each row of `analysis.roofline_points`; longer sequences get larger markers."""
    for i, (name, group) in enumerate(points.groupby("impl", sort=False)):
        look = look_of(name, i)
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
            marker["label"] = None  # only the largest marker gets an entry in the legend


def _shorten(name: str, width: int) -> str:
    """A name cut to `width` characters."""
    return name if len(name) <= width else name[: width - 1] + "…"


@styled
def plot_profile(profiles: pd.DataFrame | Mapping[str, pd.DataFrame], top: int = 8) -> Figure:
    """Draws the self time of the longest operations as bars.

    Args:
        profiles: the table that `analysis.profile` returns, or name -> table. Several tables are drawn below each other
            on one scale.
        top: operations that are drawn of each table. An operation with less than half a percent of the time is left
            out.
    """
    named = dict(profiles) if isinstance(profiles, Mapping) else {"": profiles}
    # the bar of half a percent could not be seen
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
        ax.set_yticks(range(len(shown)), [_shorten(short_operation(op), 44) for op in shown["op"]], fontsize=9)
        ax.set(ylim=(len(shown) - 0.4, -0.6), xlim=(0, longest * 1.25))
        ax.grid(visible=False, axis="y")
        device = shown.attrs.get("device", "CPU")
        title = f"{shown.attrs.get('total_ms', shown['self_ms'].sum()):.3g} ms in all. {machine_of(shown)}"
        ax.set_title(f"{label}: {title}")
        ax.legend(loc="lower right")
        if i == len(named) - 1:
            ax.set_xlabel(f"self time on the {device} (ms per call of the function)")
    return fig


@styled
def plot_timeline(events: pd.DataFrame, depth: int = 3, title: str = "") -> Figure:
    """Draws operations over time, each call below its caller, and the kernels of a GPU in a track of their own.

    Args:
        events: the table that `analysis.timeline` returns.
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
        labels = [_shorten(name, 34) for name in names]
        ax.legend([entries[name] for name in names], labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    axes[-1, 0].set_xlabel("time since the first operation (µs)")
    axes[0, 0].set_title(f"{title or 'One call'}: {machine_of(events)}")
    return fig

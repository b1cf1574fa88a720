"""Figures of training: its curves, its memory, the longest context that fits, and what the trained model can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from labutils.machine import runtime
from labutils.plotting.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    OTHER_COLORS,
    PURPLE,
    SKY,
    VERMILLION,
    WIDE,
    WIDTH,
    YELLOW,
    length_axis,
    look_of,
    machine_of,
    short_size,
    styled,
)


@styled
def plot_training(history: Any, *, window: int = 1) -> Figure:
    """Draws loss, gradient norm and tokens per second over the steps of training.

    A step whose gradients overflowed has no gradient norm, and leaves a gap there.

    Args:
        history: a `training.History`, or its table with the columns step, loss, grad_norm and tokens_per_s, or a
            mapping from names to either.
        window: logged steps over which the loss is averaged.
    """
    runs = dict(history) if isinstance(history, Mapping) else {"": history}
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(WIDE, 3.6))
    for i, (name, run) in enumerate(runs.items()):
        frame = getattr(run, "frame", run)
        if frame.empty:
            continue
        look = look_of(name, i) if name else {"color": BLUE, "marker": "o", "label": "training"}
        every = max(1, len(frame) // 12)  # about 12 markers: one at each step would hide the line
        loss = frame["loss"].rolling(window, min_periods=1).mean()
        left.plot(frame["step"], loss, **look, markevery=every)
        norms = frame["grad_norm"].where(frame["grad_norm"].abs() < float("inf"))
        middle.plot(frame["step"], norms, **look, markevery=every)
        right.plot(frame["step"], frame["tokens_per_s"], **look, markevery=every)
    averaged = f", mean of {window} steps" if window > 1 else ""
    left.set(xlabel="step", ylabel=f"loss (nats per token{averaged})")
    left.set_title("Loss: does it fall?")
    middle.set(xlabel="step", ylabel="gradient norm before clipping", yscale="log")
    middle.set_title("Gradient: is it calm?")
    right.set(xlabel="step", ylabel="throughput (tokens per second)")
    right.set_ylim(0, right.get_ylim()[1] * 1.05)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    right.set_title("Speed: higher is faster")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    fig.suptitle(runtime.machine, x=0.01, ha="left", fontsize=10)
    return fig


@styled
def plot_memory_bars(rows: pd.DataFrame | Sequence[Mapping[str, Any]], cap_gib: float | None = None) -> Figure:
    """Draws the peak memory of training steps, and the memory cap; a step that did not fit gets a hatched bar.

    Args:
        rows: rows of training.csv, as `training.try_step` returns them.
        cap_gib: the cap in GiB; by default the largest cap of the rows.

    Raises:
        ValueError: no rows.
    """
    df = pd.DataFrame(rows)
    machine = machine_of(rows) if isinstance(rows, pd.DataFrame) else runtime.machine  # stored rows name their machine
    if df.empty:
        raise ValueError("no rows to draw: pass what training.try_step returned.")
    cap = df["cap_gib"].max() if cap_gib is None else cap_gib
    capped = cap == cap  # not NaN
    # Either may be NaN: no step fitted, or there was no cap. If both are, no bar has a length, and any scale will do.
    widest = max((x for x in (df["reserved_gib"].max(), cap) if x == x), default=1.0)
    fig, ax = plt.subplots(figsize=(WIDTH, 1.6 + 0.5 * len(df)))
    labels = []
    for y, row in enumerate(df.itertuples()):
        look = look_of(row.impl, y)
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


@styled
def plot_ladder(rows: pd.DataFrame) -> Figure:
    """Draws the longest sequence of each rung of the ladder, and its predicted and measured peak memory.

    "≥" marks a rung at which the search stopped before it found a sequence that does not fit.

    Args:
        rows: the table that `ladder.ladder` returns, of one model or several.

    Raises:
        ValueError: no rows.
    """
    if rows.empty:
        raise ValueError("no rows to draw: pass what ladder.ladder returned.")
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 1.8 + 0.42 * len(rows)), sharey=True)
    labels = [f"{row.model}, {row.rung}" for row in rows.itertuples()]
    for y, row in enumerate(rows.itertuples()):
        fits = row.status == "ok"
        left.barh(y, row.seqlen if fits else 1, color=BLUE if fits else VERMILLION, height=0.6)
        speed = f", {row.tokens_per_s:,.0f} tokens/s" if fits else ""
        text = f"{row.seqlen:,}{speed}" if fits else f"does not fit at {row.seqlen:,}"
        if fits and row.bound != row.bound:  # NaN: no longer sequence was tried
            text = f"≥ {text}"
        left.annotate(text, (row.seqlen if fits else 1, y), xytext=(4, 0), textcoords="offset points", va="center")
    right.barh([y - 0.17 for y in range(len(rows))], rows["predicted_gib"], 0.32, color=ORANGE, label="predicted")
    right.barh([y + 0.17 for y in range(len(rows))], rows["peak_gib"].fillna(0), 0.32, color=BLUE, label="measured")
    cap = rows["cap_gib"].max()
    if cap == cap:  # not NaN
        right.axvline(cap, color=GREY, linestyle="--", label=f"card: {cap:.3g} GiB")
    left.set_yticks(range(len(rows)), labels, fontsize=9)
    left.invert_yaxis()
    left.set(xlabel="longest sequence that trains (tokens)", xlim=(0, 1.85 * rows["seqlen"].max()))
    left.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    left.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    left.set_title(f"How long? {machine_of(rows)}")
    right.set(xlabel="peak allocated at that length (GiB)")
    right.set_title("Does the prediction hold?")
    fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


_KIND_COLORS = {
    "parameters": BLUE, "AdamW": SKY, "16-bit weights": PURPLE, "residual stream": GREEN, "attention": VERMILLION,
    "MLP": YELLOW, "logits": ORANGE, "gradients": GREY, "backward": "#444444",
}  # fmt: skip


@styled
def plot_ledger(table: pd.DataFrame, title: str = "", cap_gib: float | None = None) -> Figure:
    """Draws the memory of training steps by kind, a stacked bar for each step.

    Args:
        table: GiB, with a row for each step and a column for each kind of memory. The index labels the bars; kinds are
            stacked in the order of the columns; NaN counts as 0.
        title: the figure's title.
        cap_gib: the memory of a card in GiB, drawn as a line.

    Raises:
        ValueError: no rows.
    """
    if table.empty:
        raise ValueError("no rows to draw: pass GiB by kind, a row for each step.")
    fig, ax = plt.subplots(figsize=(WIDE, 1.7 + 0.36 * len(table)))
    table = table.fillna(0.0)
    left = pd.Series(0.0, index=range(len(table)))
    for i, kind in enumerate(table.columns):
        size = table[kind].to_numpy()
        color = _KIND_COLORS.get(kind, OTHER_COLORS[i % len(OTHER_COLORS)])
        look = {"height": 0.7, "color": color, "edgecolor": "white", "linewidth": 0.5}
        ax.barh(range(len(table)), size, left=left, label=kind, **look)
        left = left + size
    for y, total in enumerate(left):
        ax.annotate(f"{total:.1f}", (total, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    if cap_gib is not None:
        ax.axvline(cap_gib, color="black", linestyle="--", linewidth=1.5, label=f"card: {cap_gib:.3g} GiB")
    ax.set_yticks(range(len(table)), table.index, fontsize=9)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="at the peak of a training step (GiB)", xlim=(0, 1.08 * max(left.max(), cap_gib or 0)))
    ax.set_title(title)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


@styled
def plot_loss_by_position(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draws the loss by position in the document, with error bars.

    Args:
        tables: name of a model -> the table that `loss.by_position` returns for it.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 4.2))
    edges: set[int] = set()
    for i, (name, table) in enumerate(tables.items()):
        middle = (table["from"] * table["to"]) ** 0.5
        ax.errorbar(middle, table["mean"], yerr=table["error"], capsize=3, **look_of(name, i))
        edges |= {*table["from"], *table["to"]}
    length_axis(ax, sorted(edges))
    ax.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
    ax.set_title(f"Loss of held-out files by position. Bars: one standard error. {runtime.machine}")
    ax.legend()
    return fig


@styled
def plot_accuracy(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draws the share of right answers by the distance of the statement that is asked for, a panel for each task.

    Args:
        tables: name of a model -> the table that `tasks.accuracy` returns for it, of one task or several.
    """
    names = list(dict.fromkeys(name for table in tables.values() for name in table["task"]))
    guess = max(table["guess"].max() for table in tables.values())  # all tasks choose among `tasks.VALUES`
    fig, axes = plt.subplots(1, len(names), figsize=(max(WIDTH, 2.9 * len(names)), 3.8), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], names, strict=True):
        for i, (name, table) in enumerate(tables.items()):
            rows = table[table["task"] == task]
            ax.errorbar(rows["distance"], rows["accuracy"], yerr=rows["error"], capsize=3, **look_of(name, i))
        lengths = sorted({int(d) for table in tables.values() for d in table["distance"]})
        length_axis(ax, lengths)
        ax.set_xticks(lengths, [short_size(n) for n in lengths], rotation=45)
        ax.axhline(guess, color=GREY, linestyle="--", label="guessing")
        ax.set(xlabel="distance (tokens)", ylim=(-0.03, 1.05))
        ax.set_title(task)
    axes[0][0].set_ylabel("right answers")
    axes[0][0].yaxis.set_major_formatter(PercentFormatter(1.0))
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    title = f"Right answers by the distance from the statement to its answer. {runtime.machine}"
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    return fig

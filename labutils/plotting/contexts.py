"""Figures of long contexts: the ladder, the loss by position, right answers by distance."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from labutils.machine import runtime
from labutils.plotting.style import (
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
def plot_ladder(rows: pd.DataFrame) -> Figure:
    """The longest sequence of each rung ("≥": the search ended there), and the peak predicted against the one measured.

    Args:
        rows: of `ladder.ladder`, of one model or several.

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
        if fits and row.bound != row.bound:  # NaN: nothing longer was tried
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
    """The memory of training steps by kind, a stacked bar for each row.

    Args:
        table: GiB; a row for each bar, by its label, a column for each kind, drawn in their order. NaN is nothing.
        title: of the figure.
        cap_gib: a line at the size of a card.

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
    """Loss between positions, with error bars.

    Args:
        tables: of `positions.by_position`, by the name of the model.
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
    """Right answers by the distance of the statement, a panel for each task.

    Args:
        tables: of `tasks.accuracy`, of one task or several, by the name of the model.
    """
    names = list(dict.fromkeys(name for table in tables.values() for name in table["task"]))
    guess = max(table["guess"].max() for table in tables.values())  # the same for all: one of `tasks.VALUES`
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

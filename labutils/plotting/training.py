"""Figures of training: curves over the steps, and stacked bars of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from labutils.machine import runtime
from labutils.plotting.style import BLACK, BLUE, VERMILLION, WIDE, WIDTH, look_of, machine_of, styled


@styled
def plot_training(history: Any, *, window: int = 1) -> Figure:
    """Loss, gradient norm and tokens per second over the steps of training.

    Args:
        history: a `training.History`, its table (columns step, loss, grad_norm, tokens_per_s), or several of either by
            name. A step whose gradients overflowed has no norm to draw.
        window: the loss is averaged over so many logged steps.
    """
    named = dict(history) if isinstance(history, Mapping) else {"": history}
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(WIDE, 3.6))
    for i, (name, one) in enumerate(named.items()):
        frame = getattr(one, "frame", one)
        if frame.empty:
            continue
        look = look_of(name, i) if name else {"color": BLUE, "marker": "o", "label": "training"}
        every = max(1, len(frame) // 12)  # lines are dense: a marker here and there
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
    """Peak memory of training steps against a cap; a run that did not fit stands hatched up to the cap.

    Args:
        rows: rows of training.csv, as `training.try_step` returns them.
        cap_gib: the cap in GiB; the largest of the rows' own where not given.

    Raises:
        ValueError: no rows.
    """
    df = pd.DataFrame(rows)
    machine = machine_of(rows) if isinstance(rows, pd.DataFrame) else runtime.machine  # stored rows carry theirs
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

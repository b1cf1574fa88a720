"""Figures of whole models: what each attention makes of a GPT-2, over the sequence length."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from labutils.plotting.style import VERMILLION, WIDE, footnote, legend_above, length_axis, look_of, machine_of, styled

_QUANTITIES = {
    "ms": ("time (ms)", "lower is better"),
    "tokens_per_s": ("throughput (tokens per second)", "higher is better"),
    "peak_gib": ("peak memory (GiB)", "what it needs"),
    "speedup": ("speed-up (times)", "higher is better"),
}


@styled
def plot_models(table: pd.DataFrame, work: str = "step", quantity: str = "tokens_per_s") -> Figure:
    """One panel for each model and batch size, one line for each attention; a cross where memory ended.

    Args:
        table: of `model_benchmark.measure_models` or `benchmark.speedup`.
        work: "forward", "backward", "step", "prefill" or "decode".
        quantity: ms, tokens_per_s, peak_gib or speedup.

    Raises:
        ValueError: an unknown quantity, or no row of that work.
    """
    if quantity not in _QUANTITIES:
        raise ValueError(f"quantity={quantity!r} is not known: {', '.join(_QUANTITIES)}.")
    rows = table[table["work"] == work]
    if rows.empty:
        raise ValueError(f"the table has no row of {work!r}; it has {', '.join(sorted(set(table['work'])))}.")
    panels = list(rows.groupby(["model", "batch"], sort=False))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(WIDE, 0.4 + 3.6 * lines), squeeze=False)
    unit, title = _QUANTITIES[quantity]
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

"""The README's figure: how fast attention is, and how long a context trains, from stored results."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from labutils.plotting.style import (
    BLUE,
    WIDE,
    footnote,
    legend_above,
    length_axis,
    look_of,
    machine_of,
    short_size,
    styled,
)

_SHOWN = ("triton_v2", "sdpa_cudnn", "flex", "flash_attn", "sdpa_flash", "naive")


@styled
def plot_overview(attention: pd.DataFrame, ladder: pd.DataFrame, *, model: str = "124M") -> Figure:
    """Draws the speed of attention over the sequence length, and the longest contexts that train on a small card.

    Args:
        attention: rows of `SCHEMAS["attention"]` of one dtype, head dimension and mask, both passes.
        ladder: rows of `SCHEMAS["ladder"]`.
        model: whose ladder.

    Raises:
        ValueError: the attention table mixes dtypes, head dimensions or masks, or the ladder lacks the model or mixes
            caps.
    """
    for column in ("dtype", "head_dim", "causal"):
        if attention[column].nunique() != 1:
            raise ValueError(f"choose one {column} before drawing: the table has {sorted(set(attention[column]))}.")
    rungs = ladder[(ladder["model"] == model) & (ladder["status"] == "ok")]
    if rungs.empty:
        raise ValueError(f"the ladder has no rows of {model}; it has {', '.join(sorted(set(ladder['model'])))}.")
    if rungs["cap_gib"].nunique() != 1:
        raise ValueError(f"choose one cap_gib before drawing: the ladder has {sorted(set(rungs['cap_gib']))}.")
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 4.4), width_ratios=(1, 1.05))
    _throughput(left, attention)
    _contexts(right, rungs, model)
    legend_above(fig, left, ncols=3)
    first = attention.iloc[0]
    footnote(
        fig,
        f"{machine_of(attention)}. Left: {first['dtype']}, {int(first['batch'] * first['seqlen']):,} tokens in each "
        f"batch, D = {first['head_dim']}, {'causal' if first['causal'] else 'no mask'}. Right: batch of one, memory "
        f"of PyTorch and the CUDA context together limited to {rungs['cap_gib'].iloc[0]:.3g} GiB.",
    )
    return fig


def _throughput(ax: Axes, attention: pd.DataFrame) -> None:
    """FLOPs of forward and backward by the time of both. A length at which either pass failed is left out."""
    good = attention[(attention["status"] == "ok") & attention["impl"].isin(_SHOWN)]
    good = good.assign(flops=good["tflops"] * good["ms"])
    both = good.groupby(["impl", "seqlen"]).agg(flops=("flops", "sum"), ms=("ms", "sum"), passes=("pass", "nunique"))
    both = both[both["passes"] == 2].reset_index()
    for name in _SHOWN:
        rows = both[both["impl"] == name].sort_values("seqlen")
        if len(rows):
            ax.plot(rows["seqlen"], rows["flops"] / rows["ms"], **look_of(name))
    length_axis(ax, list(both["seqlen"]))
    ax.set(ylabel="TFLOP/s, forward and backward", ylim=(0, None))
    ax.set_title("How fast?")


def _contexts(ax: Axes, rungs: pd.DataFrame, model: str) -> None:
    labels = list(rungs["rung"])
    longest = rungs["seqlen"].max()
    ax.barh(range(len(rungs)), rungs["seqlen"], color=BLUE, height=0.62)
    for y, row in enumerate(rungs.itertuples()):
        # An empty `bound` says that the search ended at its own limit: a longer context might have fit.
        least = "at least " if pd.isna(row.bound) else ""
        text = f"{least}{short_size(row.seqlen)}, {row.tokens_per_s:,.0f} tokens/s"
        ax.annotate(text, (row.seqlen, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(range(len(rungs)), labels, fontsize=9)
    ax.invert_yaxis()
    ax.set(xlabel="longest context that trains (tokens)", xlim=(0, 1.9 * longest))
    ax.xaxis.set_major_locator(MultipleLocator(2**15))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short_size(n)))
    ax.grid(axis="y", visible=False)
    ax.set_title(f"How long? GPT-2 {model} within {rungs['cap_gib'].iloc[0] * 2**30 / 1e9:.0f} GB")

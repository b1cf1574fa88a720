"""What all figures share: colours, markers and labels of implementations, sizes, legends, notes under a figure."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from labutils.attention.backends import Column
from labutils.machine import runtime

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#8C8C8C"
RED = "#B00020"  # limits, and what failed or says little: no implementation has it

COLORS = Column("color")
"""Colour of each backend."""

LABELS = Column("label")
"""What a backend is called in a legend."""

MARKERS = Column("marker")
"""Marker of each backend."""

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
OTHER_COLORS = (GREEN, PURPLE, ORANGE, SKY, GREY)  # for names that are no implementation
OTHER_MARKERS = "dp8H<"


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
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


def look_of(name: str, index: int = 0) -> dict[str, Any]:
    """Colour, marker and label of an implementation, as `Axes.plot` takes them, or of some other series.

    Args:
        name: of `COLORS`, or any other.
        index: the position of a series that is no implementation, which decides how it looks.
    """
    color = COLORS.get(name, OTHER_COLORS[index % len(OTHER_COLORS)])
    look = {
        "color": color,
        "marker": MARKERS.get(name, OTHER_MARKERS[index % len(OTHER_MARKERS)]),
        "label": LABELS.get(name, name),
        "markeredgecolor": "#333333",
        "markeredgewidth": 0.6,
    }
    if color == YELLOW:  # a thin dark edge: bare yellow is lost on white
        look["path_effects"] = [patheffects.Stroke(linewidth=3.0, foreground="#6B6400"), patheffects.Normal()]
    return look


def short_size(n: float) -> str:
    """512 -> "512", 8192 -> "8K", 1048576 -> "1M": sequence lengths on an axis."""
    n = int(n)
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return f"{n:,}"


def length_axis(ax: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis of sequence lengths, with a tick at each."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short_size(n)))
    ax.set_xlabel("sequence length N (tokens)")


def machine_of(df: pd.DataFrame) -> str:
    """The machine on which a table was measured: its own where it is a stored one."""
    return df.attrs.get("machine") or runtime.machine


def footnote(fig: Figure, text: str) -> None:
    """Small text under the figure."""
    if text:
        characters = int(fig.get_figwidth() * 15.5)  # of 8 points
        fig.supxlabel("\n".join(textwrap.wrap(text, characters)), fontsize=8, color="#444444", x=0.01, ha="left")


def legend_above(fig: Figure, *axes: Axes, ncols: int = 3) -> None:
    """One legend for all panels, over them, where it covers no data.

    Args:
        axes: whose entries it has, each once.
        ncols: columns, at most: fewer where their texts are too wide for the figure.
    """
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

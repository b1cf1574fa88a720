"""What all figures share: colours, markers and labels of implementations, sizes, axes, legends, footnotes."""

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
RED = "#B00020"  # limits, failures and doubtful points; not the colour of any implementation

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
    "figure.facecolor": "white",  # black text on a transparent figure could not be read in a dark JupyterLab
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
OTHER_COLORS = (GREEN, PURPLE, ORANGE, SKY, GREY)  # for series that are not implementations
OTHER_MARKERS = "dp8H<"


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorates a function to draw in the lab's style, whatever style the notebook has set.

    pyplot forgets the figure. Jupyter shows the value of a cell's last line, and all figures that pyplot still holds: a
    figure that pyplot kept would show twice.
    """

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Figure:
        others = plt.get_fignums()
        with plt.style.context(["default", STYLE]):
            try:
                return draw(*args, **kwargs)
            finally:  # after an error too: nobody needs half a figure
                for number in set(plt.get_fignums()) - set(others):
                    plt.close(number)

    return wrapped


def look_of(name: str, index: int = 0) -> dict[str, Any]:
    """Colour, marker and label of an implementation or of another series, as arguments of `Axes.plot`.

    Args:
        name: an implementation's name in `COLORS`, or the label of another series.
        index: the position among the series; it chooses the look of a series that is not an implementation.
    """
    color = COLORS.get(name, OTHER_COLORS[index % len(OTHER_COLORS)])
    look = {
        "color": color,
        "marker": MARKERS.get(name, OTHER_MARKERS[index % len(OTHER_MARKERS)]),
        "label": LABELS.get(name, name),
        "markeredgecolor": "#333333",
        "markeredgewidth": 0.6,
    }
    if color == YELLOW:  # a thin dark edge makes it visible on white
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
    """Makes the x axis logarithmic, with a tick and a short label at each sequence length."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short_size(n)))
    ax.set_xlabel("sequence length N (tokens)")


def machine_of(df: pd.DataFrame) -> str:
    """The machine on which a table was measured: the machine that a stored table names, otherwise this one."""
    return df.attrs.get("machine") or runtime.machine


def footnote(fig: Figure, text: str) -> None:
    """Puts small text under the figure, wrapped at its width."""
    if text:
        characters = int(fig.get_figwidth() * 15.5)  # 15.5 characters of 8 points in an inch
        fig.supxlabel("\n".join(textwrap.wrap(text, characters)), fontsize=8, color="#444444", x=0.01, ha="left")


def legend_above(fig: Figure, *axes: Axes, ncols: int = 3) -> None:
    """Puts one legend for all panels above them, where it covers no data.

    Args:
        fig: the figure.
        axes: the panels; an entry that several of them have is shown once.
        ncols: the most columns. There are fewer if their texts are too wide for the figure.
    """
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    longest = max(map(len, entries), default=0)
    # in inches: 0.068 for a character of 9 points, 0.7 for a handle
    fitting = int((fig.get_figwidth() + 0.25) // (0.068 * longest + 0.7))
    ncols = max(1, min(ncols, fitting, len(entries)))
    rows = math.ceil(len(entries) / ncols)
    fig.set_figheight(fig.get_figheight() + 0.19 * max(0, rows - 3))  # the axes keep their size
    fig.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=ncols)

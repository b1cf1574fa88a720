"""Figures of how attention is computed: online softmax, tiles, masks, errors row by row, the two memories of a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from labutils.plotting.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    VERMILLION,
    WIDE,
    WIDTH,
    footnote,
    styled,
)

_NOT_VISITED = {"facecolor": "#EEEEEE", "edgecolor": "#BBBBBB", "hatch": "////"}  # a tile that no program visits


@styled
def plot_online_softmax(trace: Sequence[Mapping[str, Any]], x: torch.Tensor) -> Figure:
    """Draws the running maximum m and sum l of the online softmax, block after block, under the row's scores.

    Args:
        trace: the steps that `reference.online_softmax_trace(x, block)` returns.
        x: (..., N), scores; only the first row is drawn.
    """
    row = x.detach().double().reshape(-1, x.shape[-1])[0].cpu()
    starts = [step["start"] for step in trace]
    stops = [step["stop"] for step in trace]

    def first_row(name: str) -> list[float]:
        return [float(torch.as_tensor(step[name]).reshape(-1)[0]) for step in trace]

    m, l = first_row("m"), first_row("l")
    edges = [s - 0.5 for s in starts] + [stops[-1] - 0.5]
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(WIDTH, 5.2), sharex=True, height_ratios=[3, 2])
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        for ax in (top, bottom):
            if i % 2:
                ax.axvspan(start - 0.5, stop - 0.5, color="#F1F1F1", linewidth=0)
        top.bar(
            range(start, stop), row[start:stop].tolist(), color=SKY, width=0.8, label="score x_j" if i == 0 else None
        )
    top.stairs(m, edges, baseline=None, color=VERMILLION, linewidth=2.2, label="running maximum m")
    top.axhline(0, color="#777777", linewidth=0.8)
    top.set_ylabel("score (no unit)")
    top.set_title("m only rises; l is rescaled by exp(m_old − m_new) whenever it does")
    top.legend(loc="best", framealpha=0.9, frameon=True)
    bottom.stairs(l, edges, baseline=None, color=BLUE, linewidth=2.2, label="running sum l = Σ exp(x_j − m)")
    final = float(torch.exp(row - row.max()).sum())
    bottom.axhline(final, color=BLACK, linestyle=":", label=f"l of the whole row: {final:.2f}")
    for i in range(1, len(trace)):
        if m[i] > m[i - 1]:
            factor = math.exp(m[i - 1] - m[i])
            bottom.axvline(edges[i], color=VERMILLION, linewidth=1, linestyle="--", ymax=0.3)
            bottom.annotate(
                f"old l × {factor:.2g}",
                (edges[i], 0.05),
                xycoords=bottom.get_xaxis_transform(),
                fontsize=8.5,
                color=VERMILLION,
                xytext=(3, 0),
                textcoords="offset points",
            )
    bottom.set_ylim(0, max(*l, final) * 1.35)
    bottom.set_ylabel("l (no unit)")
    bottom.set_xlabel("column j of the row (blocks shaded in turn)")
    bottom.legend(loc="upper left", ncols=2, framealpha=0.9, frameon=True)
    return fig


@styled
def plot_tile_order(
    n_q: int, n_k: int, block_m: int, block_n: int, order: str = "both", causal: bool = False
) -> Figure:
    """Draws the tiles of the score matrix in the order in which FlashAttention-1 and -2 visit them.

    Args:
        n_q, n_k: N_q and N_k.
        block_m, block_n: rows and columns of a tile.
        order: "v1", "v2" or "both". In v1 the outer loop runs over blocks of K and V: one program, column by column. In
            v2 it runs over blocks of Q: each row of tiles is a program.
        causal: leave out the tiles above the diagonal.

    Raises:
        ValueError: `order` is not one of the three.
    """
    if order not in ("v1", "v2", "both"):
        raise ValueError(f"order={order!r} is not known: 'v1', 'v2' or 'both'.")
    orders = ("v1", "v2") if order == "both" else (order,)
    rows, columns = math.ceil(n_q / block_m), math.ceil(n_k / block_n)
    panel = min(5.0, max(3.9, 0.62 * max(rows, columns)))
    tiles = panel * (1.0 if len(orders) == 1 else 0.86)  # inches: the largest side that the square of tiles may have
    fig, axes = plt.subplots(1, len(orders), figsize=(panel * len(orders) + 0.6, tiles + 2.1), squeeze=False)
    for ax, version in zip(axes[0], orders, strict=True):
        _draw_tiles(ax, version, n_q, n_k, block_m, block_n, causal)
    return fig


def _draw_tiles(ax: Axes, version: str, n_q: int, n_k: int, block_m: int, block_n: int, causal: bool) -> None:
    """One panel of `plot_tile_order`: the tiles of "v1" or "v2", numbered in the order of the visits."""
    rows, columns = math.ceil(n_q / block_m), math.ceil(n_k / block_n)

    def visible(i: int, j: int) -> bool:
        return not causal or j * block_n <= min((i + 1) * block_m, n_q) - 1 + n_k - n_q

    if version == "v1":
        visits = [(i, j) for j in range(columns) for i in range(rows) if visible(i, j)]
        number = {tile: step for step, tile in enumerate(visits, 1)}
        shade = {tile: 0.15 + 0.7 * step / max(len(visits), 1) for tile, step in number.items()}
        colormap = plt.get_cmap("cividis")
        ax.set_title("v1: K/V outside, column by column\none program for the whole head")
    else:
        number = {}
        for i in range(rows):
            number |= {(i, j): step for step, j in enumerate((j for j in range(columns) if visible(i, j)), 1)}
        shade = {(i, j): (i % 8 + 0.5) / 8 for i, j in number}
        colormap = plt.get_cmap("Set2")
        ax.set_title("v2: Q outside, row by row\neach row of tiles is a program of its own")
    for i in range(rows):
        for j in range(columns):
            if (i, j) in number:
                color = colormap(shade[i, j])
                ax.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
                bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
                ax.text(
                    j + 0.5,
                    i + 0.5,
                    str(number[i, j]),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="black" if bright > 0.5 else "white",
                )
            else:
                ax.add_patch(Rectangle((j, i), 1, 1, linewidth=0.5, **_NOT_VISITED))
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    ax.set_xticks([j + 0.5 for j in range(columns)], [str(j) for j in range(columns)])
    ax.set_yticks([i + 0.5 for i in range(rows)], [str(i) for i in range(rows)])
    ax.set_xlabel(f"block j of K and V ({_sizes(n_k, block_n, 'keys')})")
    ax.set_ylabel(f"block i of Q ({_sizes(n_q, block_m, 'queries')})")
    ax.grid(visible=False)
    meaning = "colour and number: its turn" if version == "v1" else "colour: program; number: its turn there"
    handles = [Patch(facecolor=colormap(0.5), edgecolor="white", label=meaning)]
    if len(number) < rows * columns:
        handles.append(Patch(label="masked, never visited", **_NOT_VISITED))
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)


def _sizes(n: int, block: int, what: str) -> str:
    """ "64 keys each, the last 16": the sizes of the blocks of `n` rows or columns."""
    last = n % block
    return f"{block} {what} each" + (f", the last {last}" if last else "")


@styled
def plot_mask(mask: torch.Tensor, title: str | None = None) -> Figure:
    """Draws which query sees which key.

    Args:
        mask: (N_q, N_k), bool, True where a query sees a key, as `reference.causal_mask` returns it.
        title: replaces the default title, which says how many scores are visible.

    Raises:
        ValueError: the mask is not two-dimensional.
    """
    _require_matrix(mask)
    n_q, n_k = mask.shape
    shape = min(max(n_k / n_q, 0.4), 3.0)
    width = min(WIDTH, 1.2 + 3.6 * shape)
    fig, ax = plt.subplots(figsize=(max(width, 3.6), 1.4 + (width - 1.2) / shape))
    edges = ([j - 0.5 for j in range(n_k + 1)], [i - 0.5 for i in range(n_q + 1)])
    picture = ax.pcolormesh(*edges, mask.cpu().int().numpy(), cmap=ListedColormap(["#EEEEEE", BLUE]), vmin=0, vmax=1)
    if max(n_q, n_k) <= 32:
        picture.set(edgecolor="white", linewidth=0.7)
    ax.invert_yaxis()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.set(aspect="equal", xlabel="key j", ylabel="query i")
    ax.grid(visible=False)
    ax.set_title(title or f"{mask.float().mean():.0%} of the scores are visible")
    handles = [
        Patch(facecolor=BLUE, label="visible"),
        Patch(facecolor="#EEEEEE", edgecolor="#BBBBBB", label="masked"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig


def _require_matrix(mask: torch.Tensor) -> None:
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: pass a mask of shape (N_q, N_k).")


_TILE_LOOKS = {
    "plain": {"facecolor": BLUE, "edgecolor": "white"},
    "masked": {"facecolor": ORANGE, "edgecolor": "white", "hatch": "...."},
    "skipped": _NOT_VISITED,
}


@styled
def plot_tile_kinds(mask: torch.Tensor, block_m: int, block_n: int) -> Figure:
    """Draws a mask in tiles, each skipped, masked or plain, and how many tiles each program visits.

    Args:
        mask: (N_q, N_k), bool, True where a query sees a key.
        block_m, block_n: rows and columns of a tile. A program works on one row of tiles.

    Raises:
        ValueError: the mask is not two-dimensional.
    """
    _require_matrix(mask)
    mask = mask.cpu()
    rows, columns = math.ceil(mask.shape[0] / block_m), math.ceil(mask.shape[1] / block_n)
    panel = min(4.6, 1.6 + 0.4 * max(rows, columns))
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, panel), width_ratios=[columns, 1 + columns])
    visits = []
    for i in range(rows):
        visited = 0
        for j in range(columns):
            tile = mask[i * block_m : (i + 1) * block_m, j * block_n : (j + 1) * block_n]
            whole = tile.all() and (j + 1) * block_n <= mask.shape[1]
            kind = "plain" if whole else "masked" if tile.any() else "skipped"
            visited += kind != "skipped"
            left.add_patch(Rectangle((j, i), 1, 1, linewidth=0.8, **_TILE_LOOKS[kind]))
        visits.append(visited)
    left.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    left.set(xlabel=f"block j of K and V ({block_n} keys each)", ylabel=f"block i of Q ({block_m} queries each)")
    left.set_title(f"{sum(visits)} of {rows * columns} tiles are visited")
    left.grid(visible=False)
    for axis in (left.xaxis, left.yaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    right.barh(range(rows), visits, color=BLUE, edgecolor="white")
    right.axvline(sum(visits) / rows, color="black", linestyle=":", label=f"mean: {sum(visits) / rows:.1f} tiles")
    right.set(ylim=(rows - 0.5, -0.5), xlabel="tiles that it visits", ylabel="program")
    right.set_title(f"A program visits {min(visits)} to {max(visits)} tiles")
    handles = [Patch(label=kind, **look) for kind, look in _TILE_LOOKS.items()]
    fig.legend(handles=[*handles, *right.get_legend_handles_labels()[0]], loc="outside lower center", ncols=4)
    return fig


@styled
def plot_row_errors(errors: dict[str, torch.Tensor], allowed: float, machine: str = "") -> Figure:
    """Draws the largest error of each row of several results, to tell rounding from bugs.

    Args:
        errors: label -> (N,), max |out - exact| over heads and dimensions; at most five results.
        allowed: the largest error that the 2 x rule allows, see `labutils.attention.reference.judge`.
        machine: the text with which the footnote begins.

    Raises:
        ValueError: there are more results than colours.
    """
    colors, markers = (BLACK, BLUE, VERMILLION, GREEN, PURPLE), "oDX^s"
    if len(errors) > len(colors):
        raise ValueError(f"{len(errors)} results, but colours for only {len(colors)}: draw fewer in one figure.")
    fig, ax = plt.subplots(figsize=(WIDE, 3.9))
    floor = allowed / 1e5
    for (label, values), color, marker in zip(errors.items(), colors, markers, strict=False):
        y = values.double().cpu().clamp(min=floor)
        ax.plot(range(len(y)), y, label=label, color=color, marker=marker, markersize=4.5, linestyle="none", alpha=0.85)
    ax.axhline(allowed, color=RED, linestyle="--", linewidth=1.4, label="what the 2 × rule allows")
    ax.set_yscale("log")
    ax.set_xlabel("row (query) i")
    ax.set_ylabel("max |out − exact| of the row")
    ax.set_title("Rounding stays below the line in every row; a bug leaves a pattern")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    footnote(fig, f"{machine} At the bottom edge: rows whose error is zero, or too small for this axis.")
    return fig


@styled
def plot_memory_hierarchy() -> Figure:
    """Sketches the two memories of a GPU, and what standard attention and FlashAttention send between them.

    The sizes and bandwidths of an A100 come from figure 1 of arXiv 2205.14135.
    """
    fig, axes = plt.subplots(1, 2, figsize=(WIDE, 4.5))
    panels = (
        (
            "Standard attention: the N × N matrices S and P go through HBM",
            "one matmul, or one softmax,\nat a time",
            "Q, K, V, O  (N × D each)\nS, P  (N × N each)",
            ["Q, K", "S", "S", "P", "P, V", "O"],
        ),
        (
            "FlashAttention-2: a tile of S and P is born and dies in SRAM",
            "blocks of Q, K, V; a tile of S and P;\nm, l and O of a block of rows",
            "Q, K, V, O  (N × D each)\nlog-sum-exp  (N)",
            ["Q once, K and V for\neach block of Q", "O, log-sum-exp"],
        ),
    )
    for ax, (title, on_chip, in_hbm, arrows) in zip(axes, panels, strict=True):
        ax.set(xlim=(0, 10), ylim=(0, 10))
        ax.axis("off")
        ax.set_title(title)
        ax.add_patch(Rectangle((2.0, 7.1), 6.0, 2.6, facecolor="#FFE9C7", edgecolor=ORANGE, linewidth=1.8))
        ax.text(5, 9.1, "SRAM, on chip: 20 MB, 19 TB/s", ha="center", va="center", weight="bold")
        ax.text(5, 7.95, on_chip, ha="center", va="center", fontsize=9)
        ax.add_patch(Rectangle((0.2, 0.3), 9.6, 2.9, facecolor="#D8EAF6", edgecolor=BLUE, linewidth=1.8))
        ax.text(5, 2.6, "HBM: 40 GB, 1.5 TB/s", ha="center", va="center", weight="bold")
        ax.text(5, 1.3, in_hbm, ha="center", va="center", fontsize=9)
        span = 6.0 / len(arrows)
        for i, what in enumerate(arrows):
            x = 2.0 + span * (i + 0.5)
            up = i % 2 == 0  # loads and stores alternate
            ends = ((x, 3.25), (x, 7.05)) if up else ((x, 7.05), (x, 3.25))
            color = BLUE if up else VERMILLION
            ax.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=15, color=color, linewidth=2))
            ax.text(x + 0.12, 4.4 if up else 5.9, what, fontsize=9, color=color, va="center")
    handles = [Patch(color=BLUE, label="load"), Patch(color=VERMILLION, label="store")]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    footnote(fig, "Sizes and bandwidths of an A100 (40 GB), figure 1 of arXiv 2205.14135.")
    return fig

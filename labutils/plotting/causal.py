"""Figures of a causal mask in tiles: which the kernel skips, masks and takes plain, and what work each program has."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from labutils.plotting.style import BLUE, ORANGE, WIDE, styled

_LOOK = {
    "plain": {"facecolor": BLUE, "edgecolor": "white"},
    "masked": {"facecolor": ORANGE, "edgecolor": "white", "hatch": "...."},
    "skipped": {"facecolor": "#EEEEEE", "edgecolor": "#BBBBBB", "hatch": "////"},
}


@styled
def plot_tile_kinds(mask: torch.Tensor, block_m: int, block_n: int) -> Figure:
    """A mask cut into tiles: skipped, masked and plain ones, and beside them the tiles that each program visits.

    Args:
        mask: bool (N_q, N_k), True = visible.
        block_m, block_n: rows and columns of a tile; each row of tiles is one program's.

    Raises:
        ValueError: a mask that is not two-dimensional.
    """
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: pass one of (N_q, N_k).")
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
            left.add_patch(Rectangle((j, i), 1, 1, linewidth=0.8, **_LOOK[kind]))
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
    handles = [Patch(label=kind, **look) for kind, look in _LOOK.items()]
    fig.legend(handles=[*handles, *right.get_legend_handles_labels()[0]], loc="outside lower center", ncols=4)
    return fig

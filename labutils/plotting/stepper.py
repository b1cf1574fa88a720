"""A block of rows on its way through the tiles of K and V: the running m, l and a after each tile.

`steps` computes the states, `plot_steps` draws all of them, and `step_through` is a widget that shows one at a time.
Both draw with the same functions, so a page without Python shows the same as the widget.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from labutils.attention.reference import online_softmax_trace
from labutils.plotting.style import BLUE, ORANGE, VERMILLION, WIDE, footnote, styled

_SEEN, _NOW, _LATER = "#D8EAF6", "#FFE9C7", "#F4F4F4"


@dataclass(frozen=True)
class Step:
    """The state of R rows after one tile; tensors are float64.

    Attributes:
        start, stop: columns of the tile, from start to stop - 1.
        scores: (R, N), the scores of all tiles, for the drawing.
        p: (R, stop - start), exp(S - m).
        m, l, rescale: (R,), as in `reference.online_softmax_trace`.
        acc: (R, D), the sum of p V, not yet divided by l.
    """

    start: int
    stop: int
    scores: torch.Tensor
    p: torch.Tensor
    m: torch.Tensor
    l: torch.Tensor
    rescale: torch.Tensor
    acc: torch.Tensor


def steps(scores: torch.Tensor, values: torch.Tensor, block: int) -> list[Step]:
    """The state of a block of rows after each tile.

    Args:
        scores: (R, N), already scaled.
        values: (N, D).
        block: columns of a tile.

    Returns:
        One state for each tile, from left to right.

    Raises:
        ValueError: the shapes do not fit, or `block` is below 1.
    """
    if scores.ndim != 2 or values.ndim != 2 or scores.shape[1] != values.shape[0]:
        raise ValueError(
            f"scores must be (R, N) and values (N, D); they are {tuple(scores.shape)} and {tuple(values.shape)}."
        )
    scores, values = scores.double().cpu(), values.double().cpu()
    acc = torch.zeros(scores.shape[0], values.shape[1], dtype=torch.float64)
    result = []
    for state in online_softmax_trace(scores, block):
        start, stop = state["start"], state["stop"]
        p = (scores[:, start:stop] - state["m"][:, None]).exp()
        acc = state["rescale"][:, None] * acc + p @ values[start:stop]  # a = α a + P V
        result.append(Step(start, stop, scores, p, state["m"], state["l"], state["rescale"], acc))
    return result


def _number(value: float, digits: int = 2) -> str:
    """A number with a real minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def _draw_scores(ax: Axes, step: Step) -> None:
    """Draws the scores as squares, coloured by whether their tile was visited; the current tile shows its numbers."""
    rows, columns = step.scores.shape
    for i in range(rows):
        for j in range(columns):
            now = step.start <= j < step.stop
            color = _NOW if now else _SEEN if j < step.start else _LATER
            ax.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor="white"))
            if now:
                text = _number(step.scores[i, j].item(), digits=1)
                ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8.5, color="black")
    frame = (step.start, 0), step.stop - step.start, rows
    ax.add_patch(Rectangle(*frame, facecolor="none", edgecolor=ORANGE, linewidth=2.5))
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.set_xticks([0, *range(step.stop - step.start, columns + 1, step.stop - step.start)])
    ax.set_yticks([i + 0.5 for i in range(rows)], [f"row {i}" for i in range(rows)])
    ax.tick_params(length=0, labelsize=8.5)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)


def _draw_state(ax: Axes, step: Step) -> None:
    """Draws a table of m, α, l, a and a / l of each row after the step."""
    rows = step.m.shape[0]
    header = ["", "m", "α", "l", "a", "a / l"]
    widths = [0.10, 0.12, 0.12, 0.12, 0.27, 0.27]
    ax.set(xlim=(0, 1), ylim=(rows + 1, 0))
    ax.axis("off")
    for line in range(rows + 1):
        x = 0.0
        if line == 0:
            cells = header
        else:
            i = line - 1
            acc = step.acc[i]
            cells = [
                f"row {i}",
                _number(step.m[i].item()),
                _number(step.rescale[i].item()),
                _number(step.l[i].item()),
                ", ".join(_number(v) for v in acc.tolist()),
                ", ".join(_number(v) for v in (acc / step.l[i]).tolist()),
            ]
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            rescaled = line and column == 2 and 0 < step.rescale[line - 1] < 1
            color = VERMILLION if rescaled else BLUE if column == 5 and line else "black"
            weight = "bold" if line == 0 or rescaled else "normal"
            ax.text(x + width / 2, line + 0.5, cell, ha="center", va="center", fontsize=9, color=color, weight=weight)
            x += width
    ax.axhline(1, color="#777777", linewidth=0.8)


def _draw_step(left: Axes, right: Axes, states: Sequence[Step], number: int) -> None:
    """Draws one step and its titles: the scores on the left, the state of the rows on the right."""
    step = states[number]
    _draw_scores(left, step)
    _draw_state(right, step)
    left.set_title(f"Tile {number + 1} of {len(states)}: columns {step.start} to {step.stop - 1}")
    right.set_title("After it: m, l and a stay on chip")


def _explain(fig: Figure) -> None:
    """Explains colours and letters below the figure."""
    footnote(
        fig,
        "Orange: the tile at hand. Blue: seen, and forgotten. Grey: not yet seen. α = exp(m_old − m), 0 at the first "
        "tile; bold where it makes the old l and a smaller. a: the sum of exp(S − m) V. a / l: attention over the "
        "columns seen.",
    )


@styled
def plot_steps(states: Sequence[Step]) -> Figure:
    """Draws every step, one below the other: the scores on the left, the state of the rows on the right.

    Args:
        states: what `steps` returns.
    """
    rows = states[0].m.shape[0]
    height = 0.45 + len(states) * (0.55 + 0.3 * (rows + 1))
    fig, axes = plt.subplots(len(states), 2, figsize=(WIDE, height), width_ratios=[5, 6], squeeze=False)
    for number, (left, right) in enumerate(axes):
        _draw_step(left, right, states, number)
    _explain(fig)
    return fig


@styled
def plot_step(states: Sequence[Step], number: int) -> Figure:
    """Draws one step, as `plot_steps` does.

    Args:
        states: what `steps` returns.
        number: the index of the step, from 0.
    """
    rows = states[number].m.shape[0]
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 1.15 + 0.3 * (rows + 1)), width_ratios=[5, 6])
    _draw_step(left, right, states, number)
    _explain(fig)
    return fig


def step_through(states: Sequence[Step]) -> Any:
    """A widget with a slider and a play button that walks through the steps.

    Steps count from 1 here, as in their titles. Show `plot_steps` beside the widget, for a page without Python.

    Args:
        states: what `steps` returns.
    """
    import ipywidgets as widgets

    pictures = []
    for number in range(len(states)):
        buffer = io.BytesIO()
        plot_step(states, number).savefig(buffer, format="png")
        pictures.append(buffer.getvalue())
    image = widgets.Image(value=pictures[0], format="png", layout=widgets.Layout(max_width="100%"))
    numbers = {"value": 1, "min": 1, "max": len(states)}
    play = widgets.Play(**numbers, interval=1500, show_repeat=False)
    slider = widgets.IntSlider(**numbers, description="tile", readout_format="d")
    widgets.jslink((play, "value"), (slider, "value"))
    slider.observe(lambda change: setattr(image, "value", pictures[change["new"] - 1]), names="value")
    # Without flex-start the picture would be stretched, and larger than in the static figure.
    return widgets.VBox([widgets.HBox([play, slider]), image], layout=widgets.Layout(align_items="flex-start"))

"""Every figure of the lab: functions that take tables of the other rooms and return a matplotlib Figure.

In a notebook, make the call the last line of its cell, and the figure shows once. An implementation has the same colour
and marker in all figures (`COLORS`, `MARKERS`). Markers serve readers who cannot tell the colours apart.

    style      colours, markers and labels of implementations, axes, legends, footnotes: what all figures share
    algorithm  how attention is computed: online softmax, tiles, masks, errors row by row, the two memories of a GPU
    stepper    a block of rows on its way through the tiles, as a figure and as a widget; not handed on from here
    sweeps     time, memory and error over the sequence length, of attention and of whole models
    costs      where bytes and time go: traffic, the roofline, profiles, a timeline
    machines   kernels on a GPU: which blocks fit and are fast, predicted times, the advice
    training   curves and memory of training, the longest context that fits, loss by position, right answers
"""

from labutils.plotting.algorithm import (
    plot_mask,
    plot_memory_hierarchy,
    plot_online_softmax,
    plot_row_errors,
    plot_tile_kinds,
    plot_tile_order,
)
from labutils.plotting.costs import plot_counters, plot_profile, plot_roofline, plot_timeline, plot_traffic
from labutils.plotting.machines import plot_block_times, plot_decisions, plot_fill, plot_fit, plot_prediction
from labutils.plotting.style import COLORS, LABELS, MARKERS
from labutils.plotting.sweeps import plot_error, plot_memory, plot_models, plot_time
from labutils.plotting.training import (
    plot_accuracy,
    plot_ladder,
    plot_ledger,
    plot_loss_by_position,
    plot_memory_bars,
    plot_training,
)

__all__ = [
    "COLORS",
    "LABELS",
    "MARKERS",
    "plot_accuracy",
    "plot_block_times",
    "plot_counters",
    "plot_decisions",
    "plot_error",
    "plot_fill",
    "plot_fit",
    "plot_ladder",
    "plot_ledger",
    "plot_loss_by_position",
    "plot_mask",
    "plot_memory",
    "plot_memory_bars",
    "plot_memory_hierarchy",
    "plot_models",
    "plot_online_softmax",
    "plot_prediction",
    "plot_profile",
    "plot_roofline",
    "plot_row_errors",
    "plot_tile_kinds",
    "plot_tile_order",
    "plot_time",
    "plot_timeline",
    "plot_traffic",
    "plot_training",
]

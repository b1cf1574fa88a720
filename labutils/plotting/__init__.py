"""Every figure of the lab: functions that take the tables of other modules, and return a matplotlib Figure.

In a notebook let a call be the last line of its cell: the figure shows itself, once. An implementation has one colour
and one marker in all figures (`COLORS`, `MARKERS`); the markers tell them apart where colours do not.

The parts: `style` has what all figures share, `sweeps` draws measurements over the sequence length, `algorithm` how
attention is computed, `causal` what a causal mask leaves of it, `costs` bytes, roofline and profiles, `machines` what a
GPU makes of a kernel, `training` losses and memory, `models` the times of a whole model, `contexts` what long contexts
cost and buy.
"""

from labutils.plotting.algorithm import plot_mask, plot_memory_hierarchy, plot_online_softmax, plot_tile_order
from labutils.plotting.causal import plot_tile_kinds
from labutils.plotting.contexts import plot_accuracy, plot_ladder, plot_ledger, plot_loss_by_position
from labutils.plotting.costs import plot_profile, plot_roofline, plot_traffic
from labutils.plotting.machines import (
    plot_block_times,
    plot_counters,
    plot_decisions,
    plot_fill,
    plot_fit,
    plot_prediction,
    plot_timeline,
)
from labutils.plotting.models import plot_models
from labutils.plotting.style import COLORS, LABELS, MARKERS, TENSOR_COLORS
from labutils.plotting.sweeps import plot_error, plot_memory, plot_time
from labutils.plotting.training import plot_memory_bars, plot_training

__all__ = [
    "COLORS",
    "LABELS",
    "MARKERS",
    "TENSOR_COLORS",
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
    "plot_tile_kinds",
    "plot_tile_order",
    "plot_time",
    "plot_timeline",
    "plot_traffic",
    "plot_training",
]

"""Training: the loop, one step of it, whether a step fits, and the memory cap that imitates a smaller GPU.

The parts: `step` has a step and what it is made with, `loop` goes through the steps and evaluates, `memory` makes a
large GPU behave like one with 16 GB, `trying` trains a few steps and says whether they fit, `profiling` says which
attention ran. What is used from outside is named here.
"""

from labutils.machine.memory import GIB, Cap, free_memory, memory_cap
from labutils.training.attention_used import attention_used
from labutils.training.fits import try_step
from labutils.training.loop import COLUMNS, History, evaluate, train
from labutils.training.step import make_optimizer, resolved_autocast, set_checkpointing

__all__ = [
    "COLUMNS",
    "GIB",
    "Cap",
    "History",
    "attention_used",
    "evaluate",
    "free_memory",
    "make_optimizer",
    "memory_cap",
    "resolved_autocast",
    "set_checkpointing",
    "train",
    "try_step",
]
